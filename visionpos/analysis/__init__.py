"""What an encoding does, measured and drawn. Nothing here imports matplotlib until something is drawn."""

from .kernel import NotDefined, logit_kernel
from .measure import PROPERTIES, measure
from .plots import plot_encoding

__all__ = ["PROPERTIES", "NotDefined", "logit_kernel", "measure", "plot_encoding"]
