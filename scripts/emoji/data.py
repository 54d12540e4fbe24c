"""The data set: 64x64 pictures on white, their captions, and which of them no training sees.

Pictures are matched to names by their code points. Of the combinations of style, name and tones TEST are held out,
those whose hash with the seed is the lowest; but never all of one name, so that every word of a test prompt has been
seen. The set is four files in a folder:

    pictures.safetensors   pictures (n, 3, 64, 64) uint8
    captions.json          of each picture caption, style, name, tones, group, and whether it is held out
    prompts.txt            to learn schedules by: captions that trainings see, shuffled
    test-prompts.txt       to compare them by: captions held out and other ones seen, by turns
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emoji.captions import CodePoints, Thing, caption, code_points, things
from emoji.packages import FLUENT, NAMES, NOTO, fetched, members
from ts_adapt.storage.files import read_json, read_tensors, write_bytes, write_json, write_tensors

FOLDER = Path("train_data/emoji")
SIZE, TEST, PROMPTS = 64, 0.05, 2048
STYLES = {"noto": (NOTO, "package/img/google/64/"), "fluent": (FLUENT, "package/assets/")}
"""The package of each style, and where its pictures are."""


@dataclass(frozen=True)
class Entry:
    """What is known of a picture; `held_out`: no training sees it."""

    caption: str
    style: str
    name: str
    tones: list[int]
    group: int
    held_out: bool


@dataclass(frozen=True)
class Data:
    """pictures `(n, 3, 64, 64)` uint8, and an entry of each."""

    pictures: Tensor
    entries: list[Entry]

    def part(self, held_out: bool) -> Data:
        """The pictures that trainings see, or those held out."""
        rows = [row for row, entry in enumerate(self.entries) if entry.held_out == held_out]
        return Data(self.pictures[rows], [self.entries[row] for row in rows])

    @property
    def captions(self) -> list[str]:
        return [entry.caption for entry in self.entries]


def build(folder: Path, seed: int) -> Data:
    """Fetch the packages, make the set, write it into the `folder`, and return it."""
    names = dict(members(fetched(NAMES, folder / "packages"), "package/en/"))["package/en/data.json"]
    known = things(json.loads(names))
    found = {(style, points): picture for style in STYLES for points, picture in pictures_of(style, folder)}
    combinations = [(style, known[points]) for style, points in found if points in known]
    held = held_out(combinations, seed)
    entries = [
        Entry(caption(style, thing.name, thing.tones), style, thing.name, list(thing.tones), thing.group, out)
        for (style, thing), out in zip(combinations, held, strict=True)
    ]
    matched = np.stack([picture for (_, points), picture in found.items() if points in known])
    data = Data(torch.from_numpy(matched).permute(0, 3, 1, 2).contiguous(), entries)
    save(data, folder)
    return data


def save(data: Data, folder: Path) -> None:
    """Write the set into the `folder`."""
    write_tensors(folder / "pictures.safetensors", {"pictures": data.pictures})
    write_json(folder / "captions.json", [asdict(entry) for entry in data.entries])
    for name, prompts in prompt_lists(data).items():
        write_bytes(folder / name, "".join(f"{prompt}\n" for prompt in prompts).encode())


def prompt_lists(data: Data) -> dict[str, list[str]]:
    """What is in prompts.txt and test-prompts.txt; no prompt is in both."""
    seen, held_out = (sorted(data.part(out).captions, key=_share) for out in (False, True))
    beside, learned_by = seen[: len(held_out)], seen[len(held_out) :]
    by_turns = [prompt for pair in zip(held_out, beside, strict=True) for prompt in pair]
    return {"prompts.txt": learned_by[:PROMPTS], "test-prompts.txt": by_turns}


def load(folder: Path) -> Data:
    """The set in the `folder`; TsAdaptError if it has not been made there."""
    pictures = read_tensors(folder / "pictures.safetensors", {"pictures": (None, 3, SIZE, SIZE)})["pictures"]
    return Data(pictures, [Entry(**entry) for entry in read_json(folder / "captions.json")])


def pictures_of(style: str, folder: Path) -> Iterator[tuple[CodePoints, np.ndarray]]:
    """Code points and picture `(64, 64, 3)` uint8 of all that the style has, in the order of the code points."""
    package, prefix = STYLES[style]
    files = members(fetched(package, folder / "packages"), prefix)
    contents = {code_points(Path(name).stem): content for name, content in files}
    for points, content in sorted(contents.items()):
        with Image.open(io.BytesIO(content)) as image:
            yield points, np.asarray(on_white(image))


def on_white(image: Image.Image) -> Image.Image:
    """`image` in the middle of a white square of 64x64 pixels; its longer side fills it."""
    image, side = image.convert("RGBA"), max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def held_out(combinations: list[tuple[str, Thing]], seed: int) -> list[bool]:
    """Of each combination of style and thing, whether it is one for tests."""

    shares = [_share(f"{seed}|{caption(style, thing.name, thing.tones)}") for style, thing in combinations]
    last: dict[str, float] = {}
    for (_, thing), of_this in zip(combinations, shares, strict=True):
        last[thing.name] = max(of_this, last.get(thing.name, 0.0))
    return [
        of_this < TEST and of_this < last[thing.name] for (_, thing), of_this in zip(combinations, shares, strict=True)
    ]


def _share(text: str) -> float:
    """Its hash, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def summary(data: Data) -> dict[str, object]:
    """How many there are of what."""
    entries = data.entries
    return {
        "pictures": dict(Counter(entry.style for entry in entries)),
        "with a tone": sum(bool(entry.tones) for entry in entries),
        "things with a tone": len({entry.name for entry in entries if entry.tones}),
        "held out": sum(entry.held_out for entry in entries),
        "words": len({word for entry in entries for word in entry.caption.split()}),
        "most words": max(len(entry.caption.split()) for entry in entries),
        "groups": dict(sorted(Counter(entry.group for entry in entries).items())),
    }
