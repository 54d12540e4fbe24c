"""The limits of every option that is a number."""

from __future__ import annotations

from typing import Any

from ts_adapt.interfaces import MAX_STEPS, TsAdaptError
from ts_adapt.predictors.store import MAX_HIDDEN, MAX_WIDTH
from ts_adapt.teacher.manifest import MAX_SHARD
from ts_adapt.teacher.store import TEST_START

MANY, SMALL, SEED = 10_000_000, 1e-9, 2**32 - 1
LIMITS: dict[str, tuple[float, float]] = {
    "guidance": (-1000, 1000),
    "nfe": (1, MAX_STEPS),
    "static_samples": (1, TEST_START // 2),
    "label_samples": (2, MANY),
    "oracle_samples": (2, MANY),
    "label_batch": (1, MANY),
    "threads": (0, 1024),
    "teacher.nfe": (1, MAX_STEPS),
    "teacher.train_samples": (1, TEST_START),
    "teacher.test_samples": (1, MANY),
    "teacher.batch_size": (1, MANY),
    "teacher.seed": (0, SEED),
    "teacher.shard_size": (1, MAX_SHARD),
    "derivative_width": (SMALL, 1),
    "static.iterations": (1, MANY),
    "static.evaluations": (1, MANY),
    "static.spread": (SMALL, 1000),
    "static.starts": (1, 1000),
    "static.tolerance": (0, 1),
    "static.batch_size": (1, MANY),
    "static.lr": (SMALL, 1000),
    "static.smoothing": (SMALL, 1000),
    "static.clip": (SMALL, MANY),
    "static.ema": (0, 0.999999),
    "static.validate_every": (1, MANY),
    "static.seed": (0, SEED),
    "per_sample.iterations": (1, MANY),
    "per_sample.lr": (SMALL, 1000),
    "per_sample.random_starts": (0, 1000),
    "per_sample.candidates": (1, 10_000),
    "per_sample.spread": (0, 1000),
    "per_sample.clip": (SMALL, MANY),
    "per_sample.seed": (0, SEED),
    "blackbox.trials": (1, MANY),
    "blackbox.radius": (SMALL, 1000),
    "blackbox.seed": (0, SEED),
    "optimized.samples": (1, MANY),
    "optimized.places": (1, MAX_STEPS),
    "train.epochs": (1, MANY),
    "train.samples": (10, MANY),
    "train.label_epochs": (1, MANY),
    "train.batch_size": (1, MANY),
    "train.lr": (SMALL, 1000),
    "train.label_lr": (SMALL, 1000),
    "train.weight_decay": (0, 1000),
    "train.ema": (0, 0.999999),
    "train.patience": (1, MANY),
    "train.validate_every": (1, MANY),
    "train.width": (1, MAX_WIDTH),
    "train.hidden": (1, MAX_HIDDEN),
    "train.seed": (0, SEED),
    "calibration.noises": (1, TEST_START),
    "calibration.nfe": (1, MAX_STEPS),
    "calibration.count": (1, MANY),
    "qat.steps": (1, MANY),
    "qat.batch_size": (1, MANY),
    "qat.lr": (SMALL, 1000),
    "qat.images": (1, MANY),
    "qat.checkpoint_every": (1, MANY),
    "qat.seed": (0, SEED),
    "prune.cost": (0, 1),
    "prune.samples": (2, MANY),
    "evaluate.samples": (2, MANY),
    "evaluate.batch_size": (1, MANY),
}
"""The least and the greatest value of every option that is a number (of `nfe`: of each of its numbers)."""


def check_limits(option: str, value: Any, low: float, high: float) -> None:
    """TsAdaptError, naming the `option`, unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        wanted = f"at least {low:g}" if isinstance(value, int | float) and value < low else f"a number from {low:g} on"
        ceiling = high if isinstance(high, int) else format(high, "g")
        raise TsAdaptError(f"option {option} is {value}; give {wanted}, at most {ceiling}")
