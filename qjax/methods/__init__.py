"""The registry: a method is in it by being imported here."""

from qjax.methods.hqq import HQQ
from qjax.methods.rtn import RTN

METHODS = (RTN, HQQ)

__all__ = ["HQQ", "METHODS", "RTN"]
