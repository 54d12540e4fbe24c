"""ts_adapt: learned time grids for few-step diffusion sampling."""

from ts_adapt import _compat as _compat  # first: it makes torchvision importable beside a CPU-only torch
from ts_adapt._version import __version__ as __version__
