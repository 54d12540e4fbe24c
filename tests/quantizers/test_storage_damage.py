"""Quantized weights that lost their end or had a bit flipped are refused, and the network is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ts_adapt.interfaces import TsAdaptError
from ts_adapt.quantizers.network import is_quantized, quantize
from ts_adapt.quantizers.registry import build
from ts_adapt.quantizers.storage import load, save


@pytest.mark.parametrize("method", ["minmax-w8", "hqq4"])
def test_damaged_weights_are_refused(make: Callable[..., Any], tmp_path: Path, method: str) -> None:
    save(quantize(make("unet"), build(method)[0]), tmp_path)
    path, network = tmp_path / "model.safetensors", make("unet")
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    flips = [header + step * (len(whole) - header) // 7 for step in range(7)]
    spoiled = [whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :] for place in flips]
    for data in (whole[:-1], whole[: header - 1], b"", *spoiled):
        path.write_bytes(data)
        with pytest.raises(TsAdaptError, match=str(path)):
            load(network, tmp_path)
        assert not is_quantized(network)
    path.write_bytes(whole)
    assert is_quantized(load(network, tmp_path))
