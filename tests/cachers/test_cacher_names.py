"""Names of cachers: what they set, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from ts_adapt.cachers import (
    DeepCache,
    FasterCache,
    FirstBlock,
    MagCache,
    PyramidAttention,
    SeaCache,
    TaylorSeer,
    TGate,
    build,
)
from ts_adapt.errors import TsAdaptError


@pytest.mark.parametrize(
    ("name", "kinds", "options"),
    [
        ("none", [], [{}]),
        ("deepcache", [DeepCache], [{"interval": 3, "branch": 0, "refresh": "uniform"}]),
        ("deepcache-2", [DeepCache], [{"interval": 2}]),
        ("deepcache-5-branch2-quadratic", [DeepCache], [{"interval": 5, "branch": 2, "refresh": "quadratic"}]),
        ("deepcache-branch1", [DeepCache], [{"interval": 3, "branch": 1}]),
        ("tgate", [TGate], [{"gate_step": None}]),
        ("tgate-5", [TGate], [{"gate_step": 5, "self_attention_interval": 1, "warm_up": 2}]),
        ("tgate-5-self4-warmup0", [TGate], [{"gate_step": 5, "self_attention_interval": 4, "warm_up": 0}]),
        ("firstblock-.1", [FirstBlock], [{"threshold": 0.1}]),
        ("magcache-0.06-skip2", [MagCache], [{"threshold": 0.06, "max_skip": 2}]),
        ("seacache-1", [SeaCache], [{"threshold": 1.0}]),
        ("taylorseer-3-order2-warmup1", [TaylorSeer], [{"interval": 3, "order": 2, "warm_up": 1}]),
        ("pab-2-cross4-temporal3", [PyramidAttention], [{"interval": 2, "cross": 4, "temporal": 3}]),
        ("fastercache-3-uncond4", [FasterCache], [{"interval": 3, "unconditional": 4}]),
        ("tgate-5+deepcache-2", [TGate, DeepCache], [{"gate_step": 5}, {"interval": 2}]),
    ],
)
def test_a_name_sets_what_it_says(name: str, kinds: list[type], options: list[dict[str, Any]]) -> None:
    made = build(name)
    assert [type(cacher) for cacher in made] == kinds
    for cacher, wanted in zip(made, options, strict=False):
        assert {option: getattr(cacher, option) for option in wanted} == wanted
    assert all(one is not other for one, other in zip(build(name), made, strict=True))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepcach-2", "did you mean 'deepcache'"),
        ("", "unknown cacher"),
        ("none+deepcache-2", "unknown cacher 'none'"),
        ("deepcache-0", "interval is 0"),
        ("firstblock-.", "'.' in the cacher"),
        ("deepcache-two", "'two' in the cacher"),
        ("deepcache-2-3", "gives interval twice"),
        ("deepcache-self2", "behind deepcache stands NUMBER, branchNUMBER"),
        ("tgate-quadratic", "'quadratic' in the cacher"),
        ("deepcache-2+deepcache-3", "two of the kind deepcache"),
    ],
)
def test_other_names_are_refused(name: str, expected: str) -> None:
    with pytest.raises(TsAdaptError, match=expected):
        build(name)
