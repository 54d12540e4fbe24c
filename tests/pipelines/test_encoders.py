"""What encoders have answered is kept row by row, up to a limit, and what has no rows is asked for anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ts_adapt.pipelines.encoders import Encoded
from ts_adapt.pipelines.networks import called


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


def test_rows_that_share_something_are_encoded_together() -> None:
    encoder, encoded = Encoder(), Encoded()
    shared, ids = torch.tensor([[1.0, 0.0]]), torch.ones(3, 2)
    with called([encoder], encoded.by):
        for _ in range(2):
            assert torch.equal(encoder(ids, shared)[0], 2.0 * ids * shared)
        encoder(ids[:2], shared)
    assert encoder.seen == [3, 2]
