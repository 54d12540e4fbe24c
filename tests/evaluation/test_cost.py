"""What is counted is what is computed: known numbers of operations, bytes and seconds."""

from __future__ import annotations

import time

import torch
from torch import nn
from torch.nn import functional as F

from ts_adapt import integrate, load
from ts_adapt.assembly import build_solver
from ts_adapt.evaluation.cost import count_flops, peak_memory, seconds
from ts_adapt.sampling import initial_noise
from ts_adapt.schedules.resolve import build_grid


def test_matrix_products_convolutions_and_attention_are_counted() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(5, 6)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5 * 6
    conv = nn.Conv2d(2, 7, 3, padding=1)
    assert count_flops(lambda: conv(torch.randn(4, 2, 8, 8))) == 2 * 4 * 8 * 8 * 7 * 2 * 9
    q, k = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 6, 8)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * 2 * (2 * 3 * 10 * 6 * 8)


def test_the_peak_is_what_lives_at_once_beyond_what_was_there() -> None:
    weight = torch.randn(500, 500)
    mebi = weight.nbytes
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with mode:
            assert peak_memory(lambda: [weight @ weight for _ in range(5)]) == 5 * mebi
            assert peak_memory(lambda: [(weight @ weight).sum() for _ in range(5)]) < 2.1 * mebi
            assert peak_memory(lambda: (weight.t()[:10], weight.view(-1))) == 0
            assert peak_memory(lambda: weight.clone().mul_(2).add_(1)) == mebi


def test_seconds_leave_the_first_run_out() -> None:
    runs: list[float] = []

    def solve() -> None:
        runs.append(0.2 if not runs else 0.02)
        time.sleep(runs[-1])

    assert 0.015 < seconds(solve, repeats=3) < 0.15 and len(runs) == 4


@torch.no_grad()
def test_operations_grow_with_the_batch_and_the_steps() -> None:
    denoiser = load("fashion-ddpm")
    solver = build_solver("ddim", denoiser.noise_schedule)

    def flops_of(batch: int, steps: int) -> int:
        x_T, grid = initial_noise(0, range(batch), denoiser.shape), build_grid("karras", denoiser.noise_schedule, steps)
        return count_flops(lambda: integrate(denoiser, solver, grid, x_T))

    one = flops_of(1, 1)
    assert flops_of(3, 1) == 3 * one and flops_of(2, 3) == 6 * one > 0
