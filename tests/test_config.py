"""The options of an experiment: their limits, and what of them a result depends on."""

from __future__ import annotations

import pytest

from ts_adapt.config import LIMITS, Config
from ts_adapt.interfaces import TsAdaptError


def with_option(option: str, value: object) -> Config:
    config = Config()
    *groups, name = option.split(".")
    place = config
    for group in groups:
        place = getattr(place, group)
    setattr(place, name, [value] if option == "nfe" else value)
    return config


def test_the_default_options_are_valid() -> None:
    Config().validate()


@pytest.mark.parametrize("option", LIMITS)
def test_every_number_is_bounded(option: str) -> None:
    low, high = LIMITS[option]
    for value in (low - 1, float("nan"), None, *([] if high == float("inf") else [high * 2 + 1])):
        with pytest.raises(TsAdaptError, match=f"option {option} is {value}; give "):
            with_option(option, value).validate()


@pytest.mark.parametrize("option", ["static.method", "derivative", "qat.loss"])
def test_a_choice_is_one_of_those_known(option: str) -> None:
    with pytest.raises(TsAdaptError, match=f"unknown {option} 'foo'"):
        with_option(option, "foo").validate()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "../../esc"),
        ("name", ".."),
        ("name", ""),
        ("name", "a/b"),
        ("name", "/abs"),
        ("name", None),
        ("solvers", []),
        ("solvers", ["ddim", "ddim"]),
        ("teacher", None),
    ],
)
def test_names_lists_and_groups_are_checked(option: str, value: object) -> None:
    with pytest.raises(TsAdaptError, match=f"option {option} "):
        with_option(option, value).validate()


def test_an_empty_or_repeating_nfe_is_refused() -> None:
    for values in ([], [3, 3]):
        with pytest.raises(TsAdaptError, match="option nfe "):
            Config(nfe=values).validate()
