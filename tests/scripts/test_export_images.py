"""scripts/export_images.py writes every image once, and goes on where it was stopped."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torchvision.datasets import FakeData

from export_images import export


def test_images_are_written_as_they_are_and_kept(tmp_path):
    data = FakeData(size=3, image_size=(3, 8, 8))
    assert export(data, tmp_path / "png") == 3
    files = sorted((tmp_path / "png").iterdir())
    assert [file.name for file in files] == ["000000.png", "000001.png", "000002.png"]
    assert np.array_equal(np.array(Image.open(files[1])), np.array(data[1][0]))
    files[1].unlink()
    before = files[0].stat().st_mtime_ns
    export(data, tmp_path / "png")
    assert files[1].exists() and files[0].stat().st_mtime_ns == before
