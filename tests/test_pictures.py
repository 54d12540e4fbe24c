"""Pictures are read alike, whatever the file keeps them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ts_adapt
from ts_adapt.errors import TsAdaptError
from ts_adapt.pictures import picture_files, read_picture

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: object) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return np.asarray(read_picture(tmp_path / name))


@pytest.fixture
def plain(tmp_path: Path) -> np.ndarray:
    return saved(tmp_path, Image.fromarray(GREY), "plain.png")


def test_files_of_pictures_are_opened_in_one_place():
    """Whatever is compared, learned from, started from: what holds here holds there."""
    sources = {path: path.read_text() for path in Path(ts_adapt.__file__).parent.rglob("*.py")}
    openers = ("Image.open", "decode_image", "imread", "load_image(")
    assert [path.name for path, text in sources.items() if any(each in text for each in openers)] == ["pictures.py"]


def test_sixteen_bits_are_the_same_picture_as_eight(tmp_path, plain):
    assert np.array_equal(saved(tmp_path, Image.fromarray(GREY.astype(np.uint16) * 257)), plain)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_other_ways_of_keeping_grey_are_the_same_picture(tmp_path, plain, mode):
    assert np.array_equal(saved(tmp_path, Image.fromarray(GREY).convert(mode)), plain)


def test_one_bit_is_black_and_white(tmp_path):
    assert set(saved(tmp_path, Image.fromarray(GREY > 100)).flatten().tolist()) == {0, 255}


def test_what_is_transparent_is_white(tmp_path):
    half = np.stack([GREY, np.full_like(GREY, 128)], -1)
    found = saved(tmp_path, Image.fromarray(half, "LA"))
    expected = 255 + (GREY.astype(float) - 255) * 128 / 255
    assert np.abs(found[..., 0] - expected).max() <= 1
    palette = Image.fromarray((GREY > 100).astype(np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    found = saved(tmp_path, palette, transparency=0)
    assert found[0, 0].tolist() == [255, 255, 255] and found[-1, -1].tolist() == [0, 0, 255]


def test_inks_are_colours(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    found = saved(tmp_path, red.convert("CMYK"), "a.jpg", quality=100)
    assert np.abs(found.astype(int) - np.asarray(red)).max() < 12


def test_a_turned_picture_is_upright(tmp_path):
    wide = Image.fromarray(np.repeat(GREY, 2, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert saved(tmp_path, wide, exif=exif).shape == (16, 8, 3)


def test_grey_is_read_as_grey(tmp_path):
    Image.fromarray(GREY).convert("RGB").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_picture(tmp_path / "a.png", "L")), GREY)


def test_what_is_not_read_is_counted_and_named(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    for name in ("a.png", "b/c.png", "d.gif", "b/e.gif", "f.tif"):
        Image.fromarray(GREY).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [str(path.relative_to(tmp_path)) for path in picture_files(tmp_path)] == ["a.png", "b/c.png"]
    said = capsys.readouterr().err
    assert "2 .gif" in said and "1 .tif" in said and "txt" not in said


def test_what_is_hidden_is_no_picture(tmp_path):
    for name in ("a.png", "._a.png", "__MACOSX/._a.png", ".ipynb_checkpoints/a-checkpoint.png", ".gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(GREY).save(tmp_path / name, "png")
    assert picture_files(tmp_path) == [tmp_path / "a.png"]
    (tmp_path / ".hidden").symlink_to(tmp_path)
    assert picture_files(tmp_path / ".hidden") == [tmp_path / ".hidden" / "a.png"]


def test_a_link_that_leads_nowhere_and_what_is_no_folder_are_named(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    for place in ("a.png", "nowhere"):
        with pytest.raises(TsAdaptError, match=f"{place} holds no images, as it is no folder"):
            picture_files(tmp_path / place)
    (tmp_path / "b.png").symlink_to("c.png")
    with pytest.raises(TsAdaptError, match=r"b\.png is a link to c\.png, where nothing is"):
        picture_files(tmp_path)


@pytest.mark.parametrize("name", ["none.png", "text.png", "numbers.tif"])
def test_what_is_no_picture_is_refused(tmp_path, name):
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "numbers.tif")
    with pytest.raises(TsAdaptError, match=name):
        read_picture(tmp_path / name)


def test_a_folder_of_other_formats_alone_says_so(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.gif")
    with pytest.raises(TsAdaptError, match=r"1 \.gif"):
        picture_files(tmp_path)
