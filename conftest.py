"""Modules that import an extra are collected where it is installed."""

import importlib.util

NEED_LM_EVAL = ["qjax/evals/tasks.py", "qjax/evals/zero_shot.py"]
collect_ignore = [] if importlib.util.find_spec("lm_eval") else NEED_LM_EVAL
