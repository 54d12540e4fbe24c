"""A killed training goes on bit for bit; what is damaged, or no training's, is not used; another's is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.checkpoint import Checkpoint
from ts_adapt.storage.files import read_tensors, write_tensors

ABOUT = {"options": {"lr": 1e-2, "schedule": "cosine"}, "network": (4, 3)}


class Training:
    """A module, its moving average, AdamW, a learning rate with a memory, and a generator of noise."""

    def __init__(self, path: Path | None, about: Any = ABOUT, width: int = 3) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.average = AveragedModel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 12)
        self.generator = torch.Generator().manual_seed(5)
        self.checkpoint, self.losses = Checkpoint(path, about), list[float]()

    def states(self) -> dict[str, dict[str, torch.Tensor]]:
        generator = {"state": self.generator.get_state()}
        return {"model": self.model.state_dict(), "average": self.average.state_dict(), "generator": generator}

    def resume(self) -> Any:
        found = self.checkpoint.load(self.states(), self.model.parameters(), {"losses": None, "rate": 2})
        if found is not None:
            self.model.load_state_dict(found.states["model"])
            self.average.load_state_dict(found.states["average"])
            self.generator.set_state(found.states["generator"]["state"])
            self.losses = found.progress["losses"]
            step, rate = found.progress["rate"]
            self.schedule.load_state_dict({"last_epoch": int(step), "_step_count": int(step) + 1, "_last_lr": [rate]})
            self.optimizer.param_groups[0]["lr"] = rate
            found.give(self.optimizer)
        return found

    def train(self, until: int) -> None:
        while len(self.losses) < until:
            loss = self.model(torch.randn(8, 4, generator=self.generator)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.average.update_parameters(self.model)
            self.losses.append(float(loss.detach()))
            rate = [self.schedule.last_epoch, self.schedule.get_last_lr()[0]]
            self.checkpoint.save(self.states(), {"losses": self.losses, "rate": rate}, self.optimizer)


@pytest.mark.parametrize("killed", [0, 1, 7, 12])
def test_a_resumed_training_is_the_unbroken_one(tmp_path: Path, killed: int) -> None:
    whole, before, after = Training(None), Training(tmp_path / "kept"), Training(tmp_path / "kept")
    whole.train(12)
    before.train(killed)
    assert (after.resume() is None) == (killed == 0)
    after.train(12)
    assert after.losses == whole.losses and len(set(whole.losses)) == 12
    for name, state in whole.states().items():
        assert all(torch.equal(value, after.states()[name][key]) for key, value in state.items())


def test_without_a_path_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = Training(None)
    training.train(2)
    assert training.resume() is None and not list(tmp_path.iterdir())


def test_the_file_of_another_training_is_refused_by_what_differs(tmp_path: Path) -> None:
    Training(tmp_path / "kept").train(1)
    before = (tmp_path / "kept").read_bytes()
    other = Training(tmp_path / "kept", {"options": {"lr": 1e-3, "schedule": "cosine"}, "network": (4, 5)}, width=5)
    with pytest.raises(TsAdaptError, match=r"other options\.lr \(0\.01, now 0\.001\), network"):
        other.resume()
    assert (tmp_path / "kept").read_bytes() == before


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "junk"])
def test_a_damaged_state_is_not_used(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "kept"
    Training(path).train(2)
    data = bytearray(path.read_bytes())
    data[-len(data) // 5] ^= 16
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:-7], "flipped": data, "empty": b"", "junk": b"junk"}[harm])
    assert Training(path).resume() is None


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("progress/losses", lambda value: value * 1e300), ("progress/losses", lambda value: value.float()),
        ("progress/losses", lambda value: -value), ("progress/rate", lambda value: value[:1]),
        ("model/0.bias", lambda value: value.half()), ("model/0.bias", lambda value: value[:1]),
        ("generator/state", lambda value: value[1:]), ("about", lambda value: value[:-1]),
        ("about", lambda value: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        ("optimizer/0/step", lambda value: -value), ("optimizer/0/step", lambda value: value.bool()),
        ("optimizer/0/step", lambda value: value[None]), ("optimizer/0/exp_avg_sq", lambda value: -value),
        ("optimizer/1/exp_avg", lambda value: value.long()), ("optimizer/9/step", lambda value: torch.ones(())),
    ],
)  # fmt: skip
def test_a_state_that_no_training_is_in_is_not_used(tmp_path: Path, name: str, change: Any) -> None:
    path = tmp_path / "kept"
    Training(path).train(2)
    tensors = read_tensors(path)
    write_tensors(path, tensors | {name: change(tensors.get(name))})
    assert Training(path).resume() is None
