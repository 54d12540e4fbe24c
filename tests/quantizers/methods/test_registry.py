"""The names of quantizers, and what they say."""

from __future__ import annotations

import pytest

from ts_adapt.errors import TsAdaptError
from ts_adapt.quantizers.methods.registry import EXAMPLES, QUANTIZERS, build


@pytest.mark.parametrize("family", QUANTIZERS)
def test_families_have_names(family: str) -> None:
    quantizer, _ = build(family)
    assert type(quantizer) is QUANTIZERS[family] and quantizer.name == family


def test_every_form_of_a_name_is_taken() -> None:
    assert {type(build(name)[0]) for name in EXAMPLES} == set(QUANTIZERS.values())
    assert [build(name)[0].options.mode for name in ("torchao-int8", "torchao-fp8")] == ["dynamic", "float8"]


def test_names_say_bits_and_options() -> None:
    quantizer, layers = build("minmax-w4a8+adaround+split")
    assert (quantizer.options.bits, quantizer.options.activation_bits, quantizer.options.adaround) == (4, 8, 300)
    assert layers.split_shortcuts and quantizer.needs_calls
    assert build("hqq3")[0].options.bits == 3 and build("hqq-2", group=32)[0].options.group == 32
    assert not build("minmax-w4")[0].needs_calls and not build("minmax-w4a8+dynamic")[0].needs_calls


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hqqq4", "did you mean 'hqq4'"),
        ("int8", "unknown quantizer 'int8'"),
        ("hqq-w4a8", "hqq has no option 'activation_bits'"),
        ("hqq4a8", "unknown quantizer 'hqq4a8'"),
        ("hqq-int8", "unknown quantizer 'hqq-int8'"),
        ("vqdm-int8", "known: .*torchao-int8"),
        ("minmax-fp8", "unknown quantizer 'minmax-fp8'"),
        ("minmax8a8", "did you mean 'minmax-w8a8'"),
        ("hqqw3", "did you mean 'hqq4'"),
        ("hqq9", "bits is 9"),
        ("minmax-w4a1", "activation_bits is 1"),
        ("minmax+split+adaruond", "did you mean 'adaround'"),
        ("bf8", "bits is 8; bf and fp have 16"),
        ("fp8", "torchao-fp8"),
        ("hqq4+adaround", "hqq has no option 'adaround'"),
    ],
)
def test_names_that_make_no_sense_are_explained(name: str, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        build(name)
