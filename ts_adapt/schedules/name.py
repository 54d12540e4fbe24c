"""The one language of names: what the commands take for a schedule, and what the tables call it.

    karras, ays-sd15+native, karras+native+rounded    a fixed grid: a family, with +native as published, with ends of
                                                      its own, with +rounded at integer timesteps
    static, static+shift+scale, blackbox, dmn, ..     a grid that a workspace has learned, and the corrections with it
    oracle, oracle+shift                              the grids searched for each test sample
    one-shot, recursive, recursive-all                a predictor of a workspace; with -all one for all its NFEs
    static@hqq4, one-shot@deepcache-2+hqq4            one of the three, learned for a cheaper network
    anything else                                     a place: a schedule of the zoo, a folder, a file, or a hub id

`resolve` says what is behind a name. Solvers have names of their own (`assembly`); +corrector belongs to these.
"""

from __future__ import annotations

from dataclasses import dataclass

from ts_adapt.errors import unknown
from ts_adapt.grids.corrections import CORRECTIONS, corrected
from ts_adapt.grids.fixed import FIXED as FAMILIES
from ts_adapt.grids.published import PUBLISHED
from ts_adapt.predictors.store import PREDICTOR_NAMES
from ts_adapt.search.optimized import METHODS as OPTIMIZED
from ts_adapt.storage.layout import ALL

NATIVE, ROUNDED = "native", "rounded"
OF_STUDENT = "@"
"""Before the network that a schedule was learned for, where it is not the teacher's own."""
SHARED_NAMES = ("static", "blackbox", *OPTIMIZED)
FIXED, SHARED, ORACLE = "a fixed grid", "a learned grid of the workspace", "the oracle"
PREDICTOR, PLACE = "a predictor of the workspace", "a place"


@dataclass(frozen=True)
class Name:
    """A name taken apart; `str` gives it back, with what is behind it in one order.

    kind         FIXED, SHARED, ORACLE, PREDICTOR or PLACE
    base         the family, the method, the predictor's kind, or the place as it was given
    every_nfe    the predictor serves all NFEs
    student      the network that it was learned for; empty: the teacher's own
    """

    kind: str
    base: str
    native: bool = False
    rounded: bool = False
    corrections: tuple[str, ...] = ()
    every_nfe: bool = False
    student: str = ""

    def __str__(self) -> str:
        marks = [mark for mark, given in ((NATIVE, self.native), (ROUNDED, self.rounded)) if given]
        text = "+".join([corrected(self.base, self.corrections), *marks]) + ALL * self.every_nfe
        return f"{text}{OF_STUDENT}{self.student}" if self.student else text


def parse(text: str) -> Name:
    """What `text` says; what is no word of the language is a place."""
    word, at, student = text.partition(OF_STUDENT)
    base, *marks = word.split("+")
    if base in grid_names() and {*marks} <= {NATIVE, ROUNDED} and not at:
        return Name(FIXED, base, native=NATIVE in marks, rounded=ROUNDED in marks)
    if bool(at) == bool(student):
        if base in ("static", "oracle") and {*marks} <= {*CORRECTIONS}:
            found = tuple(each for each in CORRECTIONS if each in marks)
            return Name(SHARED if base == "static" else ORACLE, base, corrections=found, student=student)
        if word in SHARED_NAMES:
            return Name(SHARED, word, student=student)
        if word in PREDICTOR_NAMES:
            return Name(PREDICTOR, word.removesuffix(ALL), every_nfe=word.endswith(ALL), student=student)
    return Name(PLACE, text)


def fixed_name(text: str) -> Name:
    """The fixed grid that `text` names; TsAdaptError where it names none."""
    name = parse(text)
    if name.kind != FIXED:
        raise unknown("grid", text, grid_names())
    return name


def grid_names() -> list[str]:
    """Every family of fixed grids."""
    return [*FAMILIES, *PUBLISHED]
