"""The README's Python runs as it stands, and the names in it exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torchvision.transforms.functional import pil_to_tensor

from ts_adapt.zoo import load_matching

README = (Path(__file__).parents[1] / "README.md").read_text()


PIPELINE, PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_pipeline_example_runs():
    names: dict[str, object] = {}
    exec(PIPELINE, names)
    images = names["images"]
    assert len(images) == len(names["prompts"]) == 2 and images[0].size == (64, 64)
    net = load_matching()
    seen = torch.stack([pil_to_tensor(image) / 127.5 - 1 for image in images])
    assert net(seen, net.numbers(names["prompts"])).argmax(1).tolist() == [0, 1]


def test_the_python_example_runs():
    names: dict[str, object] = {}
    exec(PYTHON, names)
    images = names["images"]
    assert isinstance(images, torch.Tensor)
    assert images.shape == (16, 1, 28, 28)
    assert 0.2 < float(images.std()) < 1.0


def test_every_name_of_the_readme_exists():
    from ts_adapt.assembly import SOLVERS
    from ts_adapt.schedules.name import grid_names

    solvers = README[README.index("- Solvers:") : README.index("- Grids,")]
    for name in re.findall(r"`([a-z0-9-]+)`", solvers):
        assert name in SOLVERS or name == "-bh1"
    for family, first, last in re.findall(r"`([a-z]+)-(\d)\.\.(\d)`", solvers):
        behind = ["", "-bh1"] if family == "unipc" else [""]
        orders = range(int(first), int(last) + 1)
        assert {f"{family}-{order}{variant}" for order in orders for variant in behind} <= SOLVERS.keys()
    grids = README[README.index("- Grids,") : README.index("- Models:")]
    for name in re.findall(r"`([a-z0-9_-]+)`", grids):
        assert name in grid_names()
