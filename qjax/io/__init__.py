"""Files: checkpoints of our own and other libraries' formats."""
