"""Write docs/pipelines.md: what every pipeline class of diffusers does on a grid of ours.

    python scripts/pipelines_table.py

Tiny random pipelines of all classes, as the tests make them (tests/diffusers_zoo), are run on a grid that all samples
share, on one for each, and learned on; some minutes of one core.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import ts_adapt  # noqa: F401  (first: it makes torchvision importable beside a CPU torch)

# isort: split
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    from diffusers_zoo.building import classes
    from diffusers_zoo.table import page
    from diffusers_zoo.trial import learning, own_times, shared_times

    warnings.simplefilter("ignore")  # of tiny random components, by the thousand
    logging.disable(logging.WARNING)
    found = {}
    for name in tqdm(classes(), unit="class"):
        found[name] = shared_times(name), own_times(name), learning(name)
        done = ", ".join(f"{outcome.kind} {outcome.words[:120]}" for outcome in found[name])
        tqdm.write(f"{name}: {done}")
    (ROOT / "docs" / "pipelines.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
