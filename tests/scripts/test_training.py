"""scripts/training.py: the rate, the average, and gradients that several processes share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training import Plan, average_gradients, follow, learning_rate, train
from ts_adapt.errors import TsAdaptError


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(2, 1)


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [learning_rate(done / 100, 2.0, warmup=0.02) for done in range(101)]
    assert rates[0] == rates[-1] == 0 and rates[1] == 1.0
    assert set(rates[2:76]) == {2.0}
    assert rates[75:] == sorted(rates[75:], reverse=True)


def test_the_average_follows_weights_by_a_share_and_statistics_at_once() -> None:
    net = nn.Sequential(linear(0), nn.BatchNorm1d(1))
    average = copy.deepcopy(net)
    with torch.no_grad():
        net[0].weight += 1
        net[1].running_mean += 1
    follow(average, net, decay=0.75)
    torch.testing.assert_close(average[0].weight, net[0].weight - 0.75)
    assert average[1].running_mean == net[1].running_mean == 1


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_are_summed_over_processes_and_divided_by_their_number(alone: None) -> None:
    net = nn.Sequential(linear(0), nn.PReLU(), linear(1))
    net[0](torch.ones(3, 2)).sum().backward()
    average_gradients(net, 2)
    assert net[0].weight.grad.tolist() == [[1.5, 1.5]] and net[0].bias.grad.tolist() == [1.5]
    assert net[2].weight.grad is None


def test_a_training_finds_a_line_and_another_is_refused(tmp_path: Path) -> None:
    plan = Plan(tmp_path, images=3200, batch=16, peak=0.05, every=100)

    def loss(net: nn.Linear, count: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(count, 2, generator=generator)
        return (net(x) - x @ torch.tensor([[2.0], [-1.0]]) - 3).square().mean()

    def measure(net: nn.Linear) -> float:
        return float(loss(net, 64, torch.Generator().manual_seed(1)))

    seen: list[Tensor] = []
    net = train(linear(0), plan, {"what": "line"}, loss, measure, lambda net: seen.append(net.weight.detach().clone()))
    assert measure(net) < 0.05
    assert len(seen) == 2 and torch.equal(seen[-1], net.weight)
    with pytest.raises(TsAdaptError, match="what"):
        train(linear(0), plan, {"what": "circle"}, loss, measure, lambda net: None)
