"""Pictures in files, read alike wherever they come from: upright, 8 bits a channel, on white where transparent.

    16 bits     round(v / 257), so that 65535 is 255
    alpha a     a v + (1 - a) 255
    turned      as the file's EXIF orientation says

Palettes, one bit, CMYK and grey become what they look like.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.storage.files import JSON_BYTES, read_bytes
from ts_adapt.storage.layout import METADATA

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHERS = (".gif", ".tif", ".tiff", ".avif", ".heic", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".ico", ".svg", ".exr")
"""Suffixes of pictures that are not read."""
SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L")


def read_picture(path: str | Path, mode: str = "RGB") -> Image.Image:
    """The picture in the file, in RGB, or in grey (`mode` L).

    Raises TsAdaptError where there is none, and for numbers that are no 8 or 16 bits.
    """
    try:
        with Image.open(path) as found:
            image: Image.Image = ImageOps.exif_transpose(found)
            if image.mode in SIXTEEN_BITS:
                image = _eight_bits(image, path)
            elif image.mode == "F":
                raise TsAdaptError(f"{path} holds real numbers, whose white is not known; save it with 8 or 16 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return image.convert(mode)
    except FileNotFoundError as error:
        raise TsAdaptError(f"there is no file {path}; check the path of the picture") from error
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        raise TsAdaptError(f"{path} cannot be read as an image ({one_line(error)}); give a PNG or JPEG file") from error


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures in `folder` and the folders inside it, in the order of their names; those of formats that are not
    read are counted on stderr, and what is hidden, whose name or folder begins with a dot, is none.

    TsAdaptError if there are none, or for a link that leads nowhere.
    """
    kinds = dict[Path, str]()
    for path in sorted(Path(folder).rglob("*")):
        shown = not any(part.startswith(".") for part in path.relative_to(folder).parts)
        if shown and (path.is_file() or (path.is_symlink() and not path.exists())):
            kinds[path] = path.suffix.lower()
    found = [path for path, kind in kinds.items() if kind in SUFFIXES]
    lost = next((path for path in found if not path.exists()), None)
    if lost is not None:
        raise TsAdaptError(f"{lost} is a link to {lost.readlink()}, where nothing is; restore that, or remove the link")
    left = Counter(kind for kind in kinds.values() if kind in OTHERS)
    named = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
    if not found:
        beside = f", but {named}, which are not read" if left else ""
        beside = beside if Path(folder).is_dir() else ", as it is no folder"
        raise TsAdaptError(f"{folder} holds no images{beside}; expected a folder of {', '.join(SUFFIXES)}")
    if left:
        print(
            f"ts-adapt: of {folder} {named} are left out; of pictures {', '.join(SUFFIXES)} are read", file=sys.stderr
        )
    return found


def metadata_of(folder: str | Path, wanted: str, files: Sequence[Path]) -> list[str] | None:
    """What metadata.csv in `folder` says under `wanted` of each of `files`; None where there is no such file.

    Its columns are file_name, under `folder`, and whatever is known of a picture, as in an image folder of the library
    datasets. Raises TsAdaptError for a file without these columns, and for a picture that it leaves out.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        return None
    try:
        table = csv.DictReader(io.StringIO(read_bytes(path, limit=JSON_BYTES).decode("utf-8-sig"), newline=""))
        known = {row.get("file_name"): row.get(wanted) for row in table}
    except (UnicodeDecodeError, csv.Error) as error:
        raise TsAdaptError(f"{path} is no table of UTF-8 text ({one_line(error)}); give file_name,{wanted}") from error
    found = [known.get(file.relative_to(folder).as_posix()) for file in files]
    for file, value in zip(files, found, strict=True):
        if value is None:
            raise TsAdaptError(f"{path} has no {wanted} of {file.name}; its columns are file_name and {wanted}")
    return [value for value in found if value is not None]


def _eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise TsAdaptError(f"{path} holds numbers from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
