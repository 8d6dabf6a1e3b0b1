"""reweigh: loss reweighting for PyTorch and Lightning.

``reweigh.losses`` has the objectives, ``reweigh.weighting`` the weightings they are composed with,
``reweigh.lightning_callbacks`` what drives dynamic weights in a Trainer, ``reweigh.benchmarks`` the comparison suite.
"""

from importlib.metadata import PackageNotFoundError, version

from reweigh import losses, weighting
from reweigh.losses import *  # noqa: F403
from reweigh.weighting import *  # noqa: F403

try:
    __version__ = version("reweigh")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0.0.0"

__all__ = ["losses", "weighting"]
__all__ += losses.__all__
__all__ += weighting.__all__
