"""The schedules of the zoo: each loads for its model, and what was learned is worth what the model card says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ts_adapt
from ts_adapt import zoo
from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config
from ts_adapt.jobs.session import Session
from ts_adapt.schedules.resolve import resolve
from ts_adapt.teacher.store import TEST_START

SAMPLES, NFE = 48, 5


LEARNED = {"fashion-ddpm": [3, 5, 7, 10], "emoji-sd": [3, 5, 7, 10], "emoji-sd3": [3, 5]}
"""By model, the NFEs that the zoo's schedules for it were learned for."""


@pytest.mark.parametrize("name", zoo.schedules())
def test_every_schedule_is_for_its_model_at_the_nfe_of_the_card(name: str) -> None:
    model = next(each for each in LEARNED if name.startswith((f"{each}-unipc", f"{each}-dpmpp", f"{each}-euler")))
    found = resolve(name, Session(Config(model=ModelOptions(name=model))))
    assert list(found.learned or ()) == LEARNED[model]
    assert found.scheduler.config["learned_for"]["model"] == model


@torch.no_grad()
def test_on_unseen_noises_recursive_is_nearer_to_the_teacher_than_static_and_static_than_karras() -> None:
    session = Session(Config())
    denoiser: Any = session.denoiser
    solver, distance = ts_adapt.build_solver("unipc-3", denoiser.noise_schedule), ts_adapt.build_distance("features")
    x_T = ts_adapt.initial_noise(1, range(TEST_START, TEST_START + SAMPLES), denoiser.shape)
    fine = ts_adapt.build_grid("log_snr", denoiser.noise_schedule, steps=30)
    teacher = ts_adapt.integrate(denoiser, solver, fine, x_T).x
    policies = {
        name: session.policy(resolve(f"fashion-ddpm-unipc-3{name}", session), "unipc-3", NFE)
        for name in ("", "-recursive")
    } | {"karras": ts_adapt.build_grid("karras", denoiser.noise_schedule, steps=NFE)}
    apart = {
        name: float(distance(ts_adapt.integrate(denoiser, solver, policy, x_T).x, teacher).mean())
        for name, policy in policies.items()
    }
    assert apart["-recursive"] < 0.75 * apart[""] < apart[""] < 0.75 * apart["karras"]
