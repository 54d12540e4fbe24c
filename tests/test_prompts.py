"""Files of prompts of the three kinds, what is wrong with them, and prompts that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ts_adapt.errors import TsAdaptError
from ts_adapt.prompts import read_prompts, token_count, trimmed
from ts_adapt.storage import files

HEAD = "Prompt\tCategory\tChallenge\tNote\n"
COCO: dict[str, Any] = {
    "info": {"year": 2014},
    "images": [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}, {"id": 5, "file_name": "c.jpg"}],
    "annotations": [
        {"image_id": 4, "id": 12, "caption": "A cat\nsleeps. "},
        {"image_id": 9, "id": 11, "caption": "A bus."},
        {"image_id": 4, "id": 3, "caption": " An old cat."},
    ],
}


def written(folder: Path, text: str, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_plain_lines(tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "a cat\n\n  a dog \n{red|blue} door\nhow\ttabs are kept\n")) == [
        "a cat", "a dog", "{red|blue} door", "how\ttabs are kept",
    ]  # fmt: skip
    assert read_prompts(written(tmp_path, "{a: b} on a wall\n{red: green}\na dog", "p.md"))[1] == "{red: green}"
    assert read_prompts(written(tmp_path, "\ufeffa mark at the beginning\r\na second line")) == [
        "a mark at the beginning", "a second line",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["PartiPrompts.tsv", "prompts"])
def test_parti_prompts_are_unquoted(tmp_path: Path, name: str) -> None:
    rows = 'The words "Fly" on a wall. \tArts\tComplex\t\n"quoted"\tArts\tBasic\ta note\n42\tAbstract\tBasic\t\n'
    assert read_prompts(written(tmp_path, HEAD + rows, name)) == ['The words "Fly" on a wall.', '"quoted"', "42"]


@pytest.mark.parametrize("name", ["captions_val2014.json", "captions"])
def test_the_captions_of_one_image_are_one_prompt(tmp_path: Path, name: str) -> None:
    assert read_prompts(written(tmp_path, json.dumps(COCO), name)) == ["A bus.", "An old cat. A cat sleeps."]


@pytest.mark.parametrize("name", ["prompts.txt", "captions.json"])
def test_a_file_beyond_the_limit_of_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "JSON_BYTES", 500)
    for path in (written(tmp_path, json.dumps(COCO) + 500 * " ", name), Path("/dev/zero")):
        with pytest.raises(TsAdaptError, match="has more than 500 bytes"):
            read_prompts(path)


def test_the_sample_that_ships_has_ten() -> None:
    prompts = read_prompts(Path(__file__).parents[1] / "configs" / "prompts_sample.tsv")
    assert len(prompts) == 10 and not any("\t" in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("", "p.txt", "has no prompts; write one a line"),
        (HEAD, "p.tsv", "has no prompts"),
        ("a cat\n", "p.tsv", "begins with 'a cat', not with the head of PartiPrompts"),
        ("Prompt\tKind\na\tb\n", "p.txt", "not with the head of PartiPrompts"),
        ('["a cat"]', "p.json", "holds a list; expected an object with images, annotations"),
        ('{"annotations": [', "p.txt", "is damaged, or no JSON file"),
        ('{"images": [{"id": "x"}], "annotations": []}', "p.json", "'id' of images[0] of"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 2}]}', "p.json", "has no 'caption'"),
        ("Prompt,Category\na cat,x\n", "p.csv", "is a .csv file, whose lines are no prompts; give one prompt a line"),
        ("prompts: [a cat]", "p.YAML", "is a .yaml file"),
        ('{"prompt": "a cat"}\n\n{"prompt": "a dog"}\n', "p.txt", "holds JSON, line by line"),
        ("a cat\0\n", "p.txt", "holds zero bytes"),
        (json.dumps(COCO | {"images": []}), "p.json", "is of image 4, which is not among its images"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, name: str, said: str) -> None:
    path = written(tmp_path, text, name)
    with pytest.raises(TsAdaptError) as caught:
        read_prompts(path)
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TsAdaptError, match="not UTF-8 text"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(TsAdaptError, match="there is no file"):
        read_prompts(tmp_path / "absent.txt")


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=12), st.integers(3, 30))
def test_a_long_prompt_is_its_longest_beginning_that_fits(words: list[str], longest: int) -> None:
    """A letter is a token, and two stand around."""

    def count(prompt: str) -> int:
        return 2 + len(prompt.replace(" ", ""))

    prompt = " ".join(words)
    (short,) = trimmed([prompt], count, longest)
    kept = len(short.split())
    assert short == " ".join(words[:kept]) and kept >= 1
    assert count(short) <= longest or kept == 1
    assert short == prompt or count(" ".join(words[: kept + 1])) > longest


def test_a_pipeline_is_given_what_its_text_encoder_takes(tiny: Any) -> None:
    """Eight tokens, spelled: begin, six letters, end."""
    import torch

    from ts_adapt.denoisers.pipeline import encode_prompts

    pipe = tiny.stable_diffusion()
    assert token_count(pipe.tokenizer)("ab cd") == 6
    long, short = (encode_prompts(pipe, [text])[0]["encoder_hidden_states"] for text in ("ab cd efg", "ab cd"))
    assert torch.equal(long, short)


def test_a_prompt_may_hold_what_unicode_calls_a_line_break(tmp_path):
    lines = ["a cat\u2028on a mat", "a dog\x0cin fog\x85", "a hen"]
    (tmp_path / "p.txt").write_bytes("\r\n".join(lines).encode())
    assert read_prompts(tmp_path / "p.txt") == [line.strip() for line in lines]
