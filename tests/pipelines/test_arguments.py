"""What a pipeline's call is given: prompts as numbers, options by their names, pictures by their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ts_adapt.errors import TsAdaptError
from ts_adapt.pipelines.arguments import PROMPT_BYTES, Arguments, as_bytes, as_texts


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40), max_size=4))
def test_prompts_are_the_bytes_that_they_are_kept_as(prompts: list[str]) -> None:
    kept = as_bytes(prompts)
    assert kept.shape == (len(prompts), PROMPT_BYTES) and as_texts(kept) == prompts


@pytest.mark.parametrize("prompt", ["é" * PROMPT_BYTES, "a\0b"])
def test_prompts_that_could_not_be_read_back_are_refused(prompt: str) -> None:
    with pytest.raises(TsAdaptError, match="bytes"):
        as_bytes([prompt])


class Pipe:
    def __call__(
        self, prompt: Any = None, image: Any = None, guidance_scale: float = 7.5, negative_prompt: Any = None,
        latents: Any = None, generator: Any = None,
    ) -> None: ...  # fmt: skip


def test_what_all_share_is_given_as_the_pipeline_takes_it() -> None:
    arguments = Arguments(Pipe(), {"guidance_scale": 3.0, "negative_prompt": "bad"})
    found = arguments.of({"prompt": as_bytes(["a", "b"])}, 2)
    first, second = found.pop("generator")
    assert first.initial_seed() == second.initial_seed()  # until it is known that the pipeline draws
    assert found == {"prompt": ["a", "b"], "guidance_scale": 3.0, "negative_prompt": ["bad", "bad"]}
    assert (
        arguments.of({}, 1)["prompt"] == "" and arguments.of({}, 2)["prompt"] == [""] * 2 and arguments.numbered is None
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"guidance": 3}, "did you mean 'guidance_scale'"),
        ({"latents": None}, "leave it out"),
        ({"prompt": "a cat"}, "leave it out"),
        ({"image": "nowhere"}, "no folder"),
    ],
)
def test_what_the_pipeline_does_not_take_is_refused(call: dict[str, Any], said: str) -> None:
    with pytest.raises(TsAdaptError, match=said):
        Arguments(Pipe(), call)


class Above(Pipe):
    """As most guide."""

    def __call__(self, guidance_scale: float = 7.5, strength: float = 0.5) -> None:  # type: ignore[override]
        if strength > 1:
            raise ValueError(strength)
        self._guidance_scale = guidance_scale

    @property
    def guides(self) -> bool:
        return self._guidance_scale > 1.0


class Own(Above):
    """Whose class alone says nothing of it."""


def inside() -> Pipe:
    class Inside(Above):
        """Whose code, taken out of here, is none:
        by this line."""

    return Inside()


class Embedded(Pipe):
    """Whose network is told the scale, whatever it is, or 0 is none; as `guidance_scale > 1` of others is not."""

    def __call__(self, guidance_scale: float = 3.5) -> bool:  # type: ignore[override]
        return guidance_scale > 0


@pytest.mark.parametrize("scale", [0.99, 0.1, -2])
def test_a_scale_below_one_is_refused_where_it_guides_nothing(scale: float) -> None:
    for pipe in (Above(), Own(), inside()):
        with pytest.raises(TsAdaptError, match=f"guidance_scale is {scale:g}, and {type(pipe).__name__} guides by a"):
            Arguments(pipe, {"guidance_scale": scale})
        for call in ({"guidance_scale": 0}, {"guidance_scale": 1}, {"guidance_scale": 1.01}, {"strength": 0.3}):
            assert Arguments(pipe, call).shared == call
    assert Arguments(Embedded(), {"guidance_scale": scale}).shared == {"guidance_scale": scale}


@pytest.mark.parametrize("scale", [3, 3.0, torch.tensor(3.0), torch.tensor([3.0, 3.0], dtype=torch.float64)])
def test_a_call_has_the_scale_of_its_samples_a_number_or_one_for_each(scale: Any) -> None:
    arguments = Arguments(Pipe(), {"guidance_scale": 2.0})
    assert arguments.of({"guidance_scale": scale}, 2)["guidance_scale"] == 3.0
    with pytest.raises(TsAdaptError, match="one scale of guidance"):
        arguments.of({"guidance_scale": torch.tensor([3.0, 4.0])}, 2)


def test_each_sample_has_the_picture_of_its_number(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    arguments = Arguments(Pipe(), {"image": str(tmp_path)})
    images = arguments.of({"number": torch.tensor([4, 2])}, 2)["image"]
    assert [image.getpixel((0, 0))[0] for image in images] == [1, 2]
    before = arguments.numbered
    Image.new("RGB", (4, 4), (9, 0, 0)).save(tmp_path / "0.png")
    assert before != Arguments(Pipe(), {"image": str(tmp_path)}).numbered
