"""What encoders have answered is kept row by row, up to a limit, and what has no rows is asked for anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ts_adapt.pipelines.denoiser import PipelineDenoiser
from ts_adapt.pipelines.encoders import Encoded
from ts_adapt.pipelines.networks import called
from ts_adapt.sampling import initial_noise


class Encoder(nn.Module):
    """Twice what it is given, and its sum; `whole`: one number for all rows as well."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole, self.seen = whole, list[int]()

    def forward(self, ids: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Any:
        self.seen.append(len(ids))
        kept = ids if mask is None else ids * mask
        return (scale * kept, (kept.sum(1), None), kept.sum()[None] if self.whole else object())


def test_only_new_rows_are_encoded() -> None:
    encoder, encoded = Encoder(), Encoded()
    first, second = torch.tensor([[1, 2], [3, 4], [1, 2]]), torch.tensor([[3, 4], [5, 6]])
    with called([encoder], encoded.by):
        out = encoder(first)
        assert torch.equal(out[0], 2.0 * first) and torch.equal(out[1][0], first.sum(1)) and out[1][1] is out[2] is None
        assert torch.equal(encoder(second)[0], 2.0 * second)
        assert encoder.seen == [2, 2]
        assert torch.equal(encoder(first, scale=3.0)[0], 3.0 * first)
        assert torch.equal(encoder(first, torch.tensor([[1, 0]] * 3))[0], 2.0 * first * torch.tensor([1, 0]))
        assert encoder.seen == [2, 2, 2, 2]
    encoder(first)
    assert encoder.seen[-1] == 3 and "forward" not in vars(encoder)


def test_answers_are_kept_apart_for_each_encoder_and_their_gradient_is_not() -> None:
    encoders, encoded = (Encoder(), Encoder()), Encoded()
    ids = torch.tensor([[1.0, 2.0]], requires_grad=True)
    with called(encoders, encoded.by):
        answers = [encoder(ids)[0] for encoder in encoders]
    assert [encoder.seen for encoder in encoders] == [[2], [2]]  # of one row nothing could be told
    assert not any(answer.requires_grad for answer in answers)


def test_what_is_kept_has_a_limit() -> None:
    encoder, rows = Encoder(), [torch.full((1, 4), float(value)) for value in range(4)]
    encoded = Encoded(limit=2 * (16 + 4))  # two answers of five numbers
    with called([encoder], encoded.by):
        for row in (*rows, rows[3], rows[2], rows[0]):
            assert torch.equal(encoder(row)[0], 2 * row)
    assert len(encoder.seen) == 5 and encoded.size <= encoded.limit


def test_an_answer_for_all_rows_together_is_kept_as_one() -> None:
    encoder, encoded = Encoder(whole=True), Encoded()
    with called([encoder], encoded.by):
        for rows in (3, 1, 3):
            assert encoder(torch.ones(rows, 2))[2].tolist() == [2.0 * rows]
    assert encoder.seen == [2, 3, 1]  # the first time to see that rows cannot be told apart


def test_rows_that_share_something_are_encoded_together() -> None:
    encoder, encoded = Encoder(), Encoded()
    shared, ids = torch.tensor([[1.0, 0.0]]), torch.ones(3, 2)
    with called([encoder], encoded.by):
        for _ in range(2):
            assert torch.equal(encoder(ids, shared)[0], 2.0 * ids * shared)
        encoder(ids[:2], shared)
    assert encoder.seen == [3, 2]


class Deep(Encoder):
    """A row of hidden states, each the one before and one; `whole`: and their sum over all rows."""

    def forward(self, ids: Tensor) -> Any:
        self.seen.append(len(ids))
        states = tuple(ids + layer for layer in range(10))
        return BaseModelOutputWithPooling(ids, ids.sum()[None] if self.whole else ids.sum(1), hidden_states=states)


@pytest.mark.parametrize("whole", [False, True])
def test_of_many_hidden_states_only_those_that_are_read_are_kept(whole: bool) -> None:
    encoder, encoded = Deep(whole), Encoded()
    rows = torch.arange(12.0).reshape(3, 4)

    def call(ids: Tensor, *layers: int) -> int:
        before = len(encoder.seen)
        with called([encoder], encoded.by):
            answer = encoder(ids)
            for layer in layers:
                assert torch.equal(answer.hidden_states[layer] * 1, ids + layer)
        encoded.settle()
        return len(encoder.seen) - before

    assert call(rows, 8) == 1 + whole and encoded.size == rows.nbytes
    assert (call(rows, 8), call(rows + 20, 8)) == (0, 1) and encoded.size == 2 * rows.nbytes
    assert call(rows, 8, 3) == 1  # which asks for what was forgotten
    assert (call(rows, 3, 8), call(rows, 3, 8)) == (1, 0) and encoded.size == 3 * rows.nbytes


def test_a_hidden_state_that_is_handed_on_is_one_tensor() -> None:
    encoder, encoded = Deep(), Encoded()
    ids = torch.arange(8.0).reshape(2, 4)
    with called([encoder], encoded.by):
        answer = encoder(ids)
        chosen = answer.hidden_states[2]
        chosen[:, 0] = 7.0  # a pipeline's own change of it
        assert chosen.shape == ids.shape and chosen.dtype == ids.dtype and isinstance(chosen, Tensor)
        assert torch.equal(
            torch.stack(answer.hidden_states)[2], torch.cat([torch.full((2, 1), 7.0), ids[:, 1:] + 2], 1)
        )
        assert torch.equal(nn.Linear(4, 2)(chosen).detach().isfinite(), torch.ones(2, 2).bool())
        assert torch.equal(encoder(ids).hidden_states[2] * 1, ids + 2)


def test_of_an_answer_that_holds_many_states_a_pipeline_keeps_what_it_reads(family: Any) -> None:
    pipe, call = family("sdxl")
    denoiser = PipelineDenoiser(pipe, call)
    x, prompts = initial_noise(0, [0], denoiser.shape), denoiser.encode(["a cat"])
    denoiser(x, torch.tensor(500.0).double(), **prompts)
    known = denoiser._encoded.known
    assert len(known) == 2 and all(0 < len(places) < tensors for (_, tensors), places in known.items())
