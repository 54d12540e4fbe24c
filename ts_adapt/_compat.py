"""Make `import torchvision` work beside a torch it was not built for; set thread defaults.

The wheel of torchvision on PyPI is built against the CUDA torch. Beside a CPU-only torch its compiled operators do
not load, and `import torchvision` fails with "operator torchvision::nms does not exist", taking diffusers and
clean-fid with it. Declaring the two schemas that torchvision looks up at import time is enough: transforms, utils,
datasets and models then work, only the operators themselves (nms, roi_align, ...) stay unavailable. Where the
compiled operators do load, nothing is declared.

Imported first by `ts_adapt`, and imports nothing of ours.
"""

from __future__ import annotations

import importlib.util
import os
import sys

# Two busy processes on few cores spin against each other otherwise; it has to be set before torch starts its pool.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # kept referenced: the schemas go with it


def _torchvision_operators_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # nothing to repair
    folder = spec.submodule_search_locations[0]
    for name in os.listdir(folder):
        if name.startswith("_C") and name.endswith((".so", ".pyd")):
            try:
                torch.ops.load_library(os.path.join(folder, name))
                return True
            except OSError:
                return False
    return False


def repair_torchvision() -> bool:
    """Declare torchvision's missing operator schemas; True if that was necessary."""
    global _library
    if "torchvision" in sys.modules or _library is not None:
        return _library is not None
    if _torchvision_operators_load():
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not torch._C._dispatch_has_kernel(f"torchvision::{name}"):
            _library.define(f"{name}{_SCHEMA}")
    return True


repair_torchvision()
