"""Sets of prompts as they are published: plain text, PartiPrompts, COCO captions.

    plain text     one prompt a line; empty lines are skipped
    PartiPrompts   tab-separated, unquoted, with a head: Prompt, Category, Challenge, Note (Yu et al. 2022,
                   arXiv:2206.10789)
    COCO captions  JSON {"images": [{"id"}], "annotations": [{"id", "image_id", "caption"}]} (Chen et al. 2015,
                   arXiv:1504.00325). The captions of one image, by their ids, are joined to one prompt

Which of them a file is, its content says, or its name: .tsv, .json. Files of other formats, whose lines are no prompts,
are refused by their names, and such of JSON lines by their content. What is longer than a text encoder takes is cut at
a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage import files

PARTI = ["Prompt", "Category", "Challenge", "Note"]
CAPTION: files.Schema = {"id": int, "image_id": int, "caption": str}
OTHERS = (
    "csv", "jsonl", "ndjson", "yml", "yaml", "toml", "xml", "html", "htm", "parquet", "arrow", "feather", "xls",
    "xlsx", "docx", "odt", "pdf", "rtf", "py", "ipynb", "pkl", "npy", "npz", "safetensors", "gz", "zip", "xz", "bz2",
    "zst", "tar", "png", "jpg",
)  # fmt: skip
"""Suffixes of files that may be text, whose lines are no prompts."""
WHAT = "give one prompt a line in a file called .txt, PartiPrompts' TSV or COCO's captions in JSON"
LINE_END = re.compile(r"\r\n|\n|\r")
"""Of a line of text; a prompt may hold what else Unicode calls a break."""
Tokens = Callable[[str], int]
"""prompt -> its number of tokens, those of beginning and end included."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file of any of the three kinds, in its order; of COCO those of its images.

    Raises TsAdaptError for a file that is none of them, that is damaged or larger than
    `files.JSON_BYTES`, or that has no prompts.
    """
    suffix = Path(path).suffix.lower()
    if suffix.removeprefix(".") in OTHERS:
        raise TsAdaptError(f"{path} is a {suffix} file, whose lines are no prompts; {WHAT}")
    try:
        text = files.read_bytes(Path(path), limit=files.JSON_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TsAdaptError(f"{path} is not UTF-8 text ({error}); {WHAT}") from error
    if "\0" in text:
        raise TsAdaptError(f"{path} holds zero bytes, which no text does; {WHAT}")
    head, *_ = lines = LINE_END.split(text)
    if suffix == ".json" or (text.lstrip().startswith("{") and '"annotations"' in text):
        prompts = _coco(path, text)
    elif suffix == ".tsv" or head.startswith(f"{PARTI[0]}\t"):
        prompts = _parti(path, lines)
    else:
        prompts = lines
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise TsAdaptError(f"{path} has no prompts; write one a line")
    if _is_object(prompts[0]):
        raise TsAdaptError(f"{path} holds JSON, line by line; {WHAT}")
    return prompts


def given_prompts(texts: Iterable[str] | None, path: str | Path | None) -> list[str]:
    """`texts`, and behind them the prompts of a file; None of either: nothing was given."""
    return [*(texts or []), *([] if path is None else read_prompts(path))]


def prompts_of(prompts: Sequence[str], index: Iterable[int]) -> list[str]:
    """Those of the samples `index`: sample i has the prompt i modulo their number."""
    return [prompts[int(i) % len(prompts)] for i in index]


def trimmed(prompts: Sequence[str], count: Tokens, longest: int) -> list[str]:
    """`prompts`, each cut behind the last word with which it has at most `longest` tokens.

    A first word that is too long by itself is left to the tokenizer.
    """
    return [_trimmed(prompt, count, longest) for prompt in prompts]


def token_count(tokenizer: Any) -> Tokens:
    """How a tokenizer of transformers counts."""
    return lambda prompt: len(tokenizer(prompt, verbose=False).input_ids)


def _trimmed(prompt: str, count: Tokens, longest: int) -> str:
    if count(prompt) <= longest:
        return prompt
    words = prompt.split()
    fits, not_any_more = 1, len(words)
    while not_any_more - fits > 1:
        middle = (fits + not_any_more) // 2
        if count(" ".join(words[:middle])) <= longest:
            fits = middle
        else:
            not_any_more = middle
    return " ".join(words[:fits])


def _is_object(line: str) -> bool:
    """Whether it is an object of JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parti(path: str | Path, lines: list[str]) -> list[str]:
    """The first column, below its head."""
    head, *rows = lines
    if head.split("\t") != PARTI:
        raise TsAdaptError(
            f"{path} begins with {files.shortened(head)!r}, not with the head of PartiPrompts ({', '.join(PARTI)}); "
            "give that file as it is published, or one prompt a line in a file called .txt"
        )
    return [row.split("\t")[0] for row in rows]


def _coco(path: str | Path, text: str) -> list[str]:
    """The captions of each image that has any, joined, in the order of `images`."""
    value = files.parse_json(text.encode(), Path(path))
    files.check_schema(value, {"images": list, "annotations": list}, Path(path))
    captions: dict[int, list[tuple[int, str]]] = {}
    for place, image in enumerate(value["images"]):
        files.check_schema(image, {"id": int}, f"images[{place}] of {path}")
        captions[image["id"]] = []
    for place, one in enumerate(value["annotations"]):
        files.check_schema(one, CAPTION, f"annotations[{place}] of {path}")
        if one["image_id"] not in captions:
            raise TsAdaptError(
                f"annotations[{place}] of {path} is of image {one['image_id']}, which is not among its images; give "
                "COCO's captions as they are published"
            )
        captions[one["image_id"]].append((one["id"], " ".join(one["caption"].split())))
    return [" ".join(caption for _, caption in sorted(of_image)) for of_image in captions.values()]
