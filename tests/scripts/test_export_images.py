"""scripts/export_images.py writes every image once, and goes on where it was stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FakeData

SCRIPT = Path(__file__).parents[2] / "scripts/export_images.py"


def test_images_are_written_as_they_are_and_kept(tmp_path):
    spec = importlib.util.spec_from_file_location("export_images", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    data = FakeData(size=3, image_size=(3, 8, 8))
    assert script.export(data, tmp_path / "png") == 3
    files = sorted((tmp_path / "png").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert np.array_equal(np.array(Image.open(files[1])), np.array(data[1][0]))
    files[1].unlink()
    before = files[0].stat().st_mtime_ns
    script.export(data, tmp_path / "png")
    assert files[1].exists() and files[0].stat().st_mtime_ns == before
