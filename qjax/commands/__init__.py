"""The subcommands of `qjax`, one file each: a frozen dataclass that runs itself."""
