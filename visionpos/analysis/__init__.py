"""Measurements and drawings of what an encoding does. matplotlib is not imported until something is drawn."""

from .kernel import NotDefined, logit_kernel
from .measure import PROPERTIES, measure
from .plots import plot_encoding

__all__ = ["PROPERTIES", "NotDefined", "logit_kernel", "measure", "plot_encoding"]
