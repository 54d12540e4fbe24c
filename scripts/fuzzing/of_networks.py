"""How what is done to a network is read: its quantization, pruning, a training's checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from fuzzing import corpus
from fuzzing.checks import finite
from fuzzing.corpus import SHAPE
from ts_adapt.errors import TsAdaptError
from ts_adapt.pruning import pruned, read
from ts_adapt.quantizers.quantization import is_quantized, restore
from ts_adapt.quantizers.storage import load
from ts_adapt.storage.checkpoint import Checkpoint

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


def pruning(folder: Path) -> None:
    with pruned(NETWORK, *read(folder / "p.json", NETWORK)) as found:
        assert corpus.call(found, 500.0, 1).run(found).shape == (1, *SHAPE)


def checkpoint(folder: Path) -> None:
    trained = corpus.module()
    state = trained.state_dict()
    optimizer = torch.optim.AdamW(trained.parameters())
    states = dict.fromkeys(("weights", "average", "best"), state)
    kept = Checkpoint(folder / "c.safetensors", corpus.ABOUT)
    found = kept.load(states, trained.parameters(), {"place": 4, "learned": None})
    if found is None:
        raise TsAdaptError("begun anew")
    for name in states:
        trained.load_state_dict(found.states[name])
        finite(*found.states[name].values())
    place = [int(number) for number in found.progress["place"]]
    assert len(place) == 4 and all(0 <= number <= 2**53 for number in place)
    finite(torch.tensor(found.progress["learned"]))
    found.give(optimizer)
    trained(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    finite(*trained.state_dict().values())
