"""The options of an experiment: their limits, and what of them a result depends on."""

from __future__ import annotations

from typing import Annotated, get_args, get_origin

import pytest

from ts_adapt.config import Config
from ts_adapt.interfaces import TsAdaptError
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
