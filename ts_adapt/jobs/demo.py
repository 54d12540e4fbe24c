"""The main job in small: teach, search, train and evaluate on the embedded model, in minutes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ts_adapt.config import Config
from ts_adapt.jobs.evaluating import evaluate
from ts_adapt.jobs.learning import search, teach, train
from ts_adapt.jobs.session import Session

GRIDS = ("linear", "quadratic", "karras", "log_snr", "beta", "ays-sd15", "ays-svd")


def small(config: Config) -> Config:
    """`config` cut down to what two cores do in minutes: one solver, NFE 5, a few hundred samples."""
    return replace(
        config,
        name="demo",
        solvers=["unipc-3"],
        nfe=[5],
        rescale_published=True,
        static_samples=128,
        label_samples=256,
        oracle_samples=256,
        teacher=replace(config.teacher, nfe=25, train_samples=256, test_samples=512, shard_size=128),
        static=replace(config.static, iterations=30),
        per_sample=replace(config.per_sample, iterations=20, random_starts=0),
        train=replace(config.train, epochs=40, end_to_end_epochs=2),
        evaluate=replace(config.evaluate, samples=512, grids=list(GRIDS)),
    )


def demo(config: Config, *, progress: bool = True) -> Path:
    """Run the main job in small and return the report's path."""
    session = Session(small(config), progress=progress)
    began = time.monotonic()

    def say(step: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {step}", flush=True)

    say("teach: 25-step solves of the embedded model, for learning and for the test")
    teach(session)
    say("search: one grid for all samples (static)")
    search(session, "static")
    say("search: the best grid for each training sample (labels) and for each test sample (the oracle)")
    search(session, "per-sample", "train")
    search(session, "per-sample", "test")
    for kind in ("one-shot", "recursive"):
        say(f"train: a predictor of grids ({kind})")
        train(session, kind)
    say("evaluate: every schedule on the same 512 test noises")
    _, report = evaluate(session)
    say("done")
    return report
