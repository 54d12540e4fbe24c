"""What a picture is called: a style, a name, and the tones of the skin where it has any.

    noto woman astronaut with dark skin tone
    fluent red heart
    noto woman and man holding hands with medium light and dark skin tones

Names are those of emojibase, "kiss: woman, man" or "flag: São Tomé & Príncipe", in lower-case ASCII words without
punctuation. Tones are left out of them and said at the end, so that any tone goes with any name of a person.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TONES = ("light", "medium light", "medium", "medium dark", "dark")
"""Of the skin, by the numbers of emojibase less one."""
GROUPS = (
    "smileys and emotion",
    "people and body",
    "components",
    "animals and nature",
    "food and drink",
    "travel and places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
"""By emojibase's number."""
SPOKEN = {"#": " hash ", "*": " asterisk ", "&": " and ", "'": "", "\u2019": ""}
SELECTOR = 0xFE0F
"""The code point that only asks for colour: of two sequences that differ by it alone, one is the picture of both."""

CodePoints = tuple[int, ...]


@dataclass(frozen=True)
class Thing:
    """name without tones; the numbers of the tones, from 1; the number of the group."""

    name: str
    tones: tuple[int, ...]
    group: int


def code_points(text: str) -> CodePoints:
    """Those of a hexcode, "1F469-200D-1F680" or "1f3f4-e0067_e0062", without SELECTOR."""
    return tuple(point for point in (int(part, 16) for part in re.split("[-_]", text)) if point != SELECTOR)


def things(data: Sequence[Mapping[str, Any]]) -> dict[CodePoints, Thing]:
    """All that emojibase's `data.json` has a name and a group for; letters, which flags are spelled with, have none."""
    found = {}
    for entry in (entry for entry in data if "group" in entry):
        for form in (entry, *entry.get("skins", ())):
            tone = form.get("tone", ())
            tones = (tone,) if isinstance(tone, int) else tuple(tone)
            found[code_points(form["hexcode"])] = Thing(words(entry["label"]), tones, entry["group"])
    return found


def words(label: str) -> str:
    """`label` in lower-case ASCII words with one space between."""
    for sign, word in SPOKEN.items():
        label = label.replace(sign, word)
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall("[a-z0-9]+", plain))


def caption(style: str, name: str, tones: Iterable[int] = ()) -> str:
    """The prompt for a thing of this name and these tones in this style."""
    said = [TONES[tone - 1] for tone in tones]
    if not said:
        return f"{style} {name}"
    return f"{style} {name} with {' and '.join(said)} skin tone{'s' if len(said) > 1 else ''}"
