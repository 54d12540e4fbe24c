"""The three packages of npm that the data set is made of: fetched once, checked, read without being unpacked.

    emoji-datasource-google   16.0.0   Noto's pictures, 64x64 PNG
    @lobehub/fluent-emoji-3d  1.1.0    Fluent's pictures, 256x256 WebP
    emojibase-data            17.0.0   what each sequence of code points is called in English

Licences, as the packages and the projects behind them say:

    Noto       README of emoji-datasource-google: "Android/Google/Noto images, are available under the Apache License
               2.0"; its LICENSE, MIT, Copyright 2013 Cal Henderson, is of the packaging. README of noto-emoji, where
               they are from: "most image resources are under the Apache license, version 2.0. Flag images under
               third_party/region-flags are in the public domain or otherwise exempt from copyright"
    Fluent     package.json and README of fluent-emoji-3d: MIT, Copyright 2023 LobeHub, with no text of the licence in
               the package; the art is of microsoft/fluentui-emoji: MIT, Copyright Microsoft Corporation
    emojibase  LICENSE of emojibase-data: MIT, Copyright 2017-2019 Miles Johnson
"""

from __future__ import annotations

import base64
import hashlib
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import write_bytes

REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
SECONDS = 120


@dataclass(frozen=True)
class Package:
    """name and version at npm, and the `sha512` of the archive in base64, as the registry has it."""

    name: str
    version: str
    sha512: str

    @property
    def archive(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"


NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)
FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


def fetched(package: Package, folder: Path) -> Path:
    """The archive of `package` in the `folder`, from the registry unless it is there already.

    Raises TsAdaptError if the registry cannot be reached, or if what it gives is not the archive known here.
    """
    path = folder / package.archive
    if not path.exists():
        url = f"{REGISTRY}/{package.name}/-/{package.archive}"
        try:
            with urllib.request.urlopen(url, timeout=SECONDS) as answer:
                data = answer.read()
        except OSError as error:
            raise TsAdaptError(f"{url} could not be fetched ({error}); put the archive at {path} instead") from error
        write_bytes(path, data)
    with open(path, "rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != package.sha512:
        raise TsAdaptError(
            f"{path} is not {package.name} {package.version}: its sha512 is {found}; remove it, and run this again"
        )
    return path


def members(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file of the `archive` whose name begins with `prefix`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(prefix):
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()
