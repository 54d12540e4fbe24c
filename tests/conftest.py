"""Shared by the tests: the guard before all, then ts_adapt (it repairs torchvision's import), and a small problem."""

from __future__ import annotations

import guarded  # isort: skip
import ts_adapt  # noqa: F401  isort: skip

import gzip
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import guard
from ts_adapt import zoo
from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser, example_mixture
from ts_adapt.distances import make
from ts_adapt.grids import fixed
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.solvers import UniPC

SEEN: list[str] = []
"""The tries for the network that tests have heard of."""


def pytest_configure() -> None:
    """Interrupts interrupt, even where the tests are started in the background of a shell, which has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    shutil.rmtree(guarded.FOLDER, ignore_errors=True)


@pytest.fixture(autouse=True)
def tries() -> Iterator[Callable[[], list[str]]]:
    """What was newly reached for off this machine, in words: a test that doesn't ask for it must not have reached."""

    def new() -> list[str]:
        lines = guard.tries()
        heard, SEEN[:] = lines[len(SEEN) :], lines
        return heard

    yield new
    assert new() == [], "the network was reached for; a library may have made up for its refusal"


@pytest.fixture
def installed_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """500 images and labels in the place, and the files, of Debian's package of Fashion-MNIST."""
    images, labels = (part[:500] for part in zoo.test_images())
    folder = tmp_path / "share" / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        for name, part in (("images-idx3", images[:, 0]), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{part.dim()}I", 0, 8, part.dim(), *part.shape)
            with gzip.open(folder / f"{split}-{name}-ubyte.gz", "wb") as file:
                file.write(header + part.to(torch.uint8).numpy().tobytes())
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path / 'nowhere'}:{tmp_path / 'share'}")
    return images, labels


@pytest.fixture(scope="session")
def mixture() -> GaussianMixtureDenoiser:
    """Separated modes on 1x4x4 pictures: the best grid differs from noise to noise."""
    return example_mixture()


@pytest.fixture(scope="session")
def problem(mixture: GaussianMixtureDenoiser) -> tuple[Objective, Batch]:
    """The objective of UniPC-3 under l2, and 48 samples of a fine teacher."""
    solver = UniPC(mixture.noise_schedule, order=3)
    x_T = initial_noise(0, range(48), (1, 4, 4))
    target = integrate(mixture, solver, fixed.make("log_snr", mixture.noise_schedule, 64), x_T).x
    return Objective(mixture, solver, make("l2")), Batch(torch.arange(48), x_T, target, {})


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Builders of tiny pipelines, schedules and predictors."""
    return import_module("tiny_pipelines")
