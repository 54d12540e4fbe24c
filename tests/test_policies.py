"""Step policies: what each hands to the loop, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ts_adapt.errors import TsAdaptError
from ts_adapt.interfaces import Condition, Node, StepPolicy, TimeGrid
from ts_adapt.noise import RectifiedFlow
from ts_adapt.policies import FollowGrid, FromNoise, StepByStep, as_policy

TIMES = torch.tensor([1.0, 0.6, 0.1], dtype=torch.float64)
X = torch.zeros(3, 2)


def walk(policy: StepPolicy, x: Tensor = X) -> list[Node]:
    node, state = policy.init(x, {})
    nodes = [node]
    while node.index < node.steps:
        node, state = policy.next(x, x, node, state)
        nodes.append(node)
    return nodes


def test_follow_grid_visits_every_time_with_its_corrections() -> None:
    grid = TimeGrid(TIMES, model_times=TIMES[:-1] + 0.01, output_scale=torch.tensor([1.0, 0.9]))
    nodes = walk(FollowGrid(grid))
    assert [node.index for node in nodes] == [0, 1, 2]
    assert [float(node.t) for node in nodes] == TIMES.tolist()
    assert nodes[1].model_time is not None and nodes[1].output_scale is not None
    assert float(nodes[1].model_time) == pytest.approx(0.61) and float(nodes[1].output_scale) == pytest.approx(0.9)
    assert nodes[2].model_time is None and nodes[2].output_scale is None


def test_follow_grid_gives_each_sample_its_own_time() -> None:
    rows = torch.stack([TIMES, TIMES * 0.9, TIMES * 0.8])
    for index, node in enumerate(walk(FollowGrid(rows))):
        assert torch.equal(node.t, rows[:, index])


def test_follow_grid_may_begin_inside() -> None:
    nodes = walk(FollowGrid(TimeGrid(TIMES, output_scale=torch.tensor([1.0, 0.9])), first=1))
    assert [(node.index, node.steps, float(node.t)) for node in nodes] == [(1, 2, 0.6), (2, 2, 0.1)]
    assert nodes[0].output_scale is not None and float(nodes[0].output_scale) == pytest.approx(0.9)


def test_follow_grid_refuses_bad_grids_and_other_batches() -> None:
    with pytest.raises(TsAdaptError, match="not decreasing"):
        FollowGrid(TIMES.flip(0))
    with pytest.raises(TsAdaptError, match="2 grids for a batch of 3"):
        FollowGrid(TIMES.expand(2, -1)).init(X, {})
    with pytest.raises(TsAdaptError, match="outside the noise schedule"):
        FollowGrid(TIMES * 2, RectifiedFlow())


def test_from_noise_asks_once_and_follows_the_answer() -> None:
    asked: list[Condition] = []

    def grid_of(x_T: Tensor, condition: Condition) -> TimeGrid:
        asked.append(condition)
        return TimeGrid(TIMES * torch.linspace(1, 0.5, len(x_T))[:, None])

    policy = FromNoise(grid_of)
    node, state = policy.init(X, {"label": 3})
    node, state = policy.next(X, X, node, state)
    torch.testing.assert_close(node.t, 0.6 * torch.linspace(1, 0.5, 3).double())
    assert asked == [{"label": 3}]


def test_from_noise_checks_the_answer() -> None:
    with pytest.raises(TsAdaptError, match="twice the same time"):
        FromNoise(lambda x_T, condition: TimeGrid(torch.ones(3))).init(X, {})


def halve(x_t: Tensor, x0: Tensor, node: Node, condition: Condition) -> Node:
    return replace(node, index=node.index + 1, t=node.t / 2)


def test_step_by_step_asks_at_every_step() -> None:
    first = Node(0, 3, torch.ones((), dtype=torch.float64))
    assert [float(node.t) for node in walk(StepByStep(first, halve))] == [1.0, 0.5, 0.25, 0.125]


def test_step_by_step_refuses_standing_still() -> None:
    first = Node(0, 3, torch.ones(3, dtype=torch.float64))
    with pytest.raises(TsAdaptError, match="after step 0 the policy went to 0; expected 1"):
        walk(StepByStep(first, lambda x_t, x0, node, condition: node))
    with pytest.raises(TsAdaptError, match="after step 0 the policy's time does not fall"):
        walk(StepByStep(first, lambda x_t, x0, node, condition: replace(node, index=1)))


def test_as_policy_wraps_grids_and_passes_policies() -> None:
    assert isinstance(as_policy(TIMES), FollowGrid) and isinstance(as_policy(TimeGrid(TIMES)), FollowGrid)
    policy = FromNoise(lambda x_T, condition: TimeGrid(TIMES))
    assert as_policy(policy) is policy
    with pytest.raises(TsAdaptError, match="got list"):
        as_policy([1.0, 0.5, 0.0])  # type: ignore[arg-type]
