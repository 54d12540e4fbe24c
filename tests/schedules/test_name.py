"""The language of names: what is parsed prints as it was, and what is no word of it is a place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_adapt.errors import TsAdaptError
from ts_adapt.grids.corrections import CORRECTIONS
from ts_adapt.schedules.name import (
    FIXED,
    ORACLE,
    PLACE,
    PREDICTOR,
    SHARED,
    SHARED_NAMES,
    Name,
    fixed_name,
    grid_names,
    parse,
)

FLAG = st.booleans()
STUDENT = st.sampled_from(["", "hqq4", "deepcache-2+hqq4"])
CORRECTED = st.sets(st.sampled_from([*CORRECTIONS])).map(
    lambda some: tuple(each for each in CORRECTIONS if each in some)
)
NAMES = st.one_of(
    st.builds(Name, st.just(FIXED), st.sampled_from(grid_names()), native=FLAG, rounded=FLAG),
    st.builds(Name, st.just(SHARED), st.just("static"), corrections=CORRECTED, student=STUDENT),
    st.builds(Name, st.just(SHARED), st.sampled_from(SHARED_NAMES), student=STUDENT),
    st.builds(Name, st.just(ORACLE), st.just("oracle"), corrections=CORRECTED, student=STUDENT),
    st.builds(
        Name, st.just(PREDICTOR), st.sampled_from(["one-shot", "recursive"]), every_nfe=FLAG, student=STUDENT
    ),
)  # fmt: skip


@given(NAMES)
def test_what_is_printed_is_parsed_to_the_same(name: Name) -> None:
    assert parse(str(name)) == name


@given(st.text(max_size=30))
def test_any_text_prints_as_it_was_or_in_the_order_of_the_language(text: str) -> None:
    again = str(parse(text))
    assert again == text or sorted({*text.split("+")}) == sorted(again.split("+"))
    assert parse(again) == parse(text)


def test_what_is_behind_a_word_may_come_in_any_order() -> None:
    assert str(parse("static+scale+shift")) == "static+shift+scale"
    assert str(parse("karras+rounded+native")) == "karras+native+rounded"


@pytest.mark.parametrize(
    "text",
    ["", "karas", "karras+shift", "karras+corrector", "static+native", "static+", "static@", "karras@hqq4", "dmn+shift",
     "one-shot+shift", "karras-all", "static-all", "a/b", "./static", "static.json", "fashion-ddpm-unipc-3"],
)  # fmt: skip
def test_everything_else_is_a_place(text: str) -> None:
    assert parse(text) == Name(PLACE, text)
    with pytest.raises(TsAdaptError, match="unknown grid"):
        fixed_name(text)
