"""The cachers by name, and names of whole settings: `deepcache-3`, `deepcache-5-branch2`, `tgate-5+deepcache-2`.

    deepcache[-INTERVAL][-branchB][-quadratic]     `DeepCache`'s interval, branch and refresh
    tgate[-STEP][-selfINTERVAL][-warmupSTEPS]      `TGate`'s gate_step, self_attention_interval and warm_up
    firstblock[-THRESHOLD]                         `FirstBlock`'s threshold, as .1
    magcache[-THRESHOLD][-skipSTEPS]               `MagCache`'s threshold and max_skip
    seacache[-THRESHOLD]                           `SeaCache`'s threshold
    taylorseer[-INTERVAL][-orderN][-warmupSTEPS]   `TaylorSeer`'s interval, order and warm_up
    pab[-INTERVAL][-crossINTERVAL][-temporalINTERVAL]    `PyramidAttention`'s interval, cross and temporal
    fastercache[-INTERVAL][-uncondINTERVAL]        `FasterCache`'s interval and unconditional
    A+B                                            both at once, in any order
    none                                           no cacher

What a name does not say has its default; so `tgate` gates each number of steps where it is published for it.
"""

from __future__ import annotations

import re
from typing import Any

from ts_adapt.cachers.cacher import Cacher
from ts_adapt.cachers.deepcache import REFRESH, DeepCache
from ts_adapt.cachers.of_diffusers import FasterCache, FirstBlock, MagCache, PyramidAttention, SeaCache, TaylorSeer
from ts_adapt.cachers.tgate import TGate
from ts_adapt.errors import TsAdaptError, unknown

CACHERS: dict[str, type[Cacher]] = {
    "deepcache": DeepCache,
    "tgate": TGate,
    "firstblock": FirstBlock,
    "magcache": MagCache,
    "seacache": SeaCache,
    "taylorseer": TaylorSeer,
    "pab": PyramidAttention,
    "fastercache": FasterCache,
}
NUMBERS: dict[str, dict[str, str]] = {
    "deepcache": {"": "interval", "branch": "branch"},
    "tgate": {"": "gate_step", "self": "self_attention_interval", "warmup": "warm_up"},
    "firstblock": {"": "threshold"},
    "magcache": {"": "threshold", "skip": "max_skip"},
    "seacache": {"": "threshold"},
    "taylorseer": {"": "interval", "order": "order", "warmup": "warm_up"},
    "pab": {"": "interval", "cross": "cross", "temporal": "temporal"},
    "fastercache": {"": "interval", "uncond": "unconditional"},
}
"""Cacher -> what stands before a number in its name -> the option that the number is."""
WORDS: dict[str, dict[str, dict[str, Any]]] = {
    "deepcache": {refresh: {"refresh": refresh} for refresh in REFRESH},
}
NONE = "none"


def build(name: str) -> list[Cacher]:
    """The cachers that `name` stands for; see the module's head. None at all for `none`.

    Raises TsAdaptError for what is no such name, for options out of range, and for two cachers of one kind.
    """
    if name == NONE:
        return []
    parts = [part.split("-") for part in name.split("+")]
    kinds = [kind for kind, *_ in parts]
    for kind in kinds:
        if kind not in CACHERS:
            raise unknown("cacher", kind, [*CACHERS, NONE])
    twice = next((kind for kind in CACHERS if kinds.count(kind) > 1), None)
    if twice is not None:
        raise TsAdaptError(f"the cacher {name!r} has two of the kind {twice}; a network takes one, leave the other out")
    settings = [(CACHERS[kind], _options(name, kind, words)) for kind, *words in parts]
    try:
        return [cacher(**options) for cacher, options in settings]
    except TsAdaptError as error:
        raise TsAdaptError(f"of the cacher {name!r} {error}") from error


def _options(name: str, kind: str, words: list[str]) -> dict[str, Any]:
    """The options that the `words` behind `kind` set."""
    found: dict[str, Any] = {}
    known_words = WORDS.get(kind, {})
    for word in words:
        match = re.fullmatch(r"(?P<before>[a-z]*)(?P<number>\d*\.?\d+)", word, re.ASCII)
        if match is not None and match["before"] in NUMBERS[kind]:
            number = match["number"]
            more: dict[str, Any] = {NUMBERS[kind][match["before"]]: float(number) if "." in number else int(number)}
        elif word in known_words:
            more = known_words[word]
        else:
            known = [f"{before}NUMBER" for before in NUMBERS[kind]] + list(known_words)
            raise TsAdaptError(f"{word!r} in the cacher {name!r} is not known; behind {kind} stands {', '.join(known)}")
        if found.keys() & more.keys():
            raise TsAdaptError(f"the cacher {name!r} gives {', '.join(more)} twice; leave one of them out")
        found |= more
    return found
