"""Shared by the tests: ts_adapt first (it repairs torchvision's import), and a small problem with a known denoiser."""

from __future__ import annotations

import ts_adapt  # noqa: F401  isort: skip

import signal
from importlib import import_module
from typing import Any

import pytest
import torch

from ts_adapt.denoisers.analytic import GaussianMixtureDenoiser, example_mixture
from ts_adapt.distances import make
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.search.objective import Batch, Objective
from ts_adapt.solvers import UniPC


def pytest_configure() -> None:
    """Interrupts interrupt, even where the tests are started in the background of a shell, which has them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mixture() -> GaussianMixtureDenoiser:
    """Separated modes on 1x4x4 pictures: the best grid differs from noise to noise."""
    return example_mixture()


@pytest.fixture(scope="session")
def problem(mixture: GaussianMixtureDenoiser) -> tuple[Objective, Batch]:
    """The objective of UniPC-3 under l2, and 48 samples of a fine teacher."""
    solver = UniPC(mixture.noise, order=3)
    x_T = initial_noise(0, range(48), (1, 4, 4))
    lam = torch.linspace(
        float(mixture.noise.log_snr(torch.tensor(1.0))), float(mixture.noise.log_snr(torch.tensor(1e-3))), 65
    ).double()
    times = mixture.noise.time(lam)
    times[0], times[-1] = 1.0, 1e-3
    target = integrate(mixture, solver, times, x_T).x
    return Objective(mixture, solver, make("l2")), Batch(torch.arange(48), x_T, target, {})


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Builders of tiny pipelines, schedules and predictors."""
    return import_module("tiny_pipelines")
