"""How what is done to a network is read: its quantization, fine-tuning, pruning, a training's checkpoint."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from fuzzing import corpus
from fuzzing.checks import finite
from fuzzing.corpus import SHAPE
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.predictors.resume import Checkpoint
from ts_adapt.pruning.blocks import put_back
from ts_adapt.pruning.plan_file import apply
from ts_adapt.quantizers import training
from ts_adapt.quantizers.quantization import is_quantized, restore
from ts_adapt.quantizers.storage import load

NETWORK = corpus.network()


def quantization(folder: Path) -> None:
    try:
        found = load(NETWORK, folder)
        for value in found.state_dict().values():
            finite(value)
        assert corpus.call(found, 500.0, 1).run(found).shape == (1, *SHAPE)
        restore(NETWORK)
    finally:
        left = is_quantized(NETWORK) or len(NETWORK._forward_pre_hooks)
        if left:
            restore(NETWORK)
            raise AssertionError("a part of the quantization was left on the network")


@cache
def tuned() -> Any:
    return corpus.tuned()


def fine_tuning(folder: Path) -> None:
    network, trained, optimizer = tuned()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer.state.clear()
    try:
        losses = training._resumed(folder, network, training.FineTuneOptions(), trained, optimizer)
        finite(torch.tensor(losses), *(parameter.detach() for parameter in trained.values()))
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        for name, parameter in trained.items():
            parameter.data.copy_(before[name])


def pruning(folder: Path) -> None:
    found = apply(NETWORK, folder / "p.json")
    assert corpus.call(found, 500.0, 1).run(found).shape == (1, *SHAPE)
    put_back(found)


def checkpoint(folder: Path) -> None:
    trained = corpus.module()
    state = trained.state_dict()
    optimizer = torch.optim.AdamW(trained.parameters())
    states = dict.fromkeys(("weights", "average", "best"), state)
    found = Checkpoint(folder / "c.safetensors").load(states, trained.parameters(), 5)
    if found is None:
        raise TsAdaptError("begun anew")
    for name in ("weights", "average", "best"):
        trained.load_state_dict(found[name])
        finite(*found[name].values())
    epoch = [int(number) for number in found["progress"][:4]]
    assert len(epoch) == 4 and all(0 <= number < 2**53 for number in epoch)
    finite(torch.tensor(found["progress"][4]))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": found["optimizer"]})
    trained(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    finite(*trained.state_dict().values())
