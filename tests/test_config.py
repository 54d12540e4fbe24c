"""The options of an experiment: their limits, and what of them a result depends on."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Annotated, Any, get_args, get_origin

import pytest

from ts_adapt.config import USED, Config, other_options
from ts_adapt.errors import TsAdaptError
from ts_adapt.options import Between, hints_of
from ts_adapt.storage.files import differing


def with_option(option: str, value: object) -> Config:
    config = Config()
    *groups, name = option.split(".")
    place = config
    for group in groups:
        place = getattr(place, group)
    setattr(place, name, [value] if option in ("nfe", "evaluate.columns") else value)
    return config


def test_the_default_options_are_valid() -> None:
    Config().validate()


def limits() -> dict[str, Between]:
    """Of every option that is a number, or a list of them."""
    numbers = {option: hint for option, hint in hints_of(Config).items() if get_args(hint)[:1] in ((int,), (float,))}
    return {"nfe": get_args(get_args(hints_of(Config)["nfe"])[0])[1]} | {
        option: get_args(hint)[1] for option, hint in numbers.items() if get_origin(hint) is Annotated
    }


def test_every_number_has_limits() -> None:
    bare = [option for option, hint in hints_of(Config).items() if hint in (int, float)]
    assert not bare and len(limits()) > 60


@pytest.mark.parametrize("option", limits())
def test_every_number_is_bounded(option: str) -> None:
    low, high = limits()[option].low, limits()[option].high
    for value in (low - 1, float("nan"), None, high * 2 + 1):
        with pytest.raises(TsAdaptError, match=f"option {option} is {value}; give "):
            with_option(option, value).validate()


def test_a_range_of_scales_of_guidance_has_two_ends_that_rise() -> None:
    assert Config(guidance=[4.0, 4.0]) == Config(guidance=4.0)
    Config(guidance=[1.5, 8.0]).validate()
    for given in ([8.0, 1.5], [3.0], [], [1.0, 2.0, 3.0], [0.0, 4.0], [-1.0, 4.0], ["a", 4.0], 2000.0, "four", None):
        with pytest.raises(TsAdaptError, match=r"option guidance is .*; give "):
            Config(guidance=given).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option",
    ["static.method", "derivative", "qat.loss", "train.loss", "blackbox.sampler", "prune.measure", "evaluate.columns"],
)
def test_a_choice_is_one_of_those_known(option: str) -> None:
    with pytest.raises(TsAdaptError, match=f"unknown {option} 'foo'"):
        with_option(option, "foo").validate()


def test_an_empty_or_repeating_nfe_is_refused() -> None:
    for values in ([], [3, 3]):
        with pytest.raises(TsAdaptError, match="option nfe "):
            Config(nfe=values).validate()


def test_what_was_trained_before_there_was_dropout_is_that_without() -> None:
    made = Config().made_with("recursive")
    del made["train"]["dropout"]
    assert differing(made, Config().made_with("recursive")) == []
    dropped = with_option("train.dropout", 0.25).made_with("recursive")
    assert differing(made, dropped) == ["train.dropout (None, now 0.25)"]
    assert differing(dropped, Config().made_with("recursive")) == ["train.dropout (0.25, now None)"]


def chosen(group: str, value: str) -> Config:
    return with_option(f"{group}.{USED[group][0]}", value)


CHOICES = [
    (group, result, value)
    for group, result in (("static", "static"), ("train", "recursive"))
    for value in get_args(hints_of(Config)[f"{group}.{USED[group][0]}"])
]


@pytest.mark.parametrize(("group", "result", "value"), CHOICES)
def test_what_a_method_does_not_use_is_not_recorded_and_what_was_kept_of_it_counts_for_nothing(
    group: str, result: str, value: str
) -> None:
    made = chosen(group, value).made_with(result)
    unused = {name for name, under in USED[group][1].items() if value not in under}
    assert not unused & made[group].keys()
    assert {name for name in USED[group][1] if name not in unused} <= made[group].keys()
    kept = {**made, group: {**made[group], **dict.fromkeys(unused, 7)}}
    for _, _, other in (choice for choice in CHOICES if choice[0] == group):
        now = chosen(group, other).made_with(result)
        said = " ".join(other_options(kept, now, now))
        assert not [name for name in unused if f"{group}.{name} " in said]
    one = next(name for name in USED[group][1] if name not in unused)
    assert other_options({**made, group: {**made[group], one: 7}}, made, made) == [
        f"{group}.{one} (7, now {made[group][one]})"
    ]


def test_every_option_that_only_some_methods_use_is_there() -> None:
    for group, (chooser, under) in USED.items():
        assert {chooser, *under} <= {option.name for option in fields(getattr(Config(), group))}
        assert {value for values in under.values() for value in values} <= {
            value for of, _, value in CHOICES if of == group
        }


def test_of_another_method_the_method_is_named_and_none_of_the_options_of_one_alone() -> None:
    kept, made = (chosen("static", method).made_with("static") for method in ("lbfgs", "adam"))
    assert other_options(kept, made, made) == ["static.method (lbfgs, now adam)"]


@pytest.mark.parametrize(
    ("result", "option", "other", "counts"),
    [
        ("per-sample", "per_sample.candidates", 9, False),
        ("per-sample", "per_sample.iterations", 9, True),
        ("recursive", "derivative_width", 0.1, False),
        ("static", "derivative_width", 0.1, False),
    ],
)
def test_an_option_that_another_makes_idle_is_not_recorded(result: str, option: str, other: Any, counts: bool) -> None:
    def made(**changed: Any) -> dict[str, Any]:
        config = with_option(option, changed[option]) if changed else Config()
        config.per_sample.random_starts, config.derivative = 0, "exact"
        return config.made_with(result)

    assert (made(**{option: other}) != made()) == counts


def test_what_an_option_leaves_open_is_recorded_as_it_was_used() -> None:
    static, train = Config(static_samples=40).made_with("static"), Config().made_with("recursive")
    assert (static["static_validation"], Config().made_with("static")["static_validation"]) == (40, 128)
    assert train["train"]["validation"] == Config().train.validating
    given = Config(static_samples=40, static_validation=12).made_with("static")
    asked = asdict(Config(static_samples=40))
    kept = {**static, "static_validation": asked["static_validation"]}
    assert other_options(kept, static, static) == []
    assert other_options(kept, given, static) == ["static_validation (40, now 12)"]
    kept = {**train, "train": {**train["train"], "validation": None}}
    assert other_options(kept, train, train) == []
