"""Tracing: sites, apply, the coverage report."""

from qjax.trace.apply import QuantizationWarning, apply
from qjax.trace.explain import explain
from qjax.trace.sites import OtherUse, Site, Sites, sites

__all__ = [
    "OtherUse",
    "QuantizationWarning",
    "Site",
    "Sites",
    "apply",
    "explain",
    "sites",
]
