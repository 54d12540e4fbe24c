"""Layout, fused projections and compilation change how a network runs, not what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_networks import said
from ts_adapt.assembly import ModelOptions, build_cachers
from ts_adapt.cachers import attached
from ts_adapt.denoisers.execution import Execution, execute, execution_of
from ts_adapt.denoisers.network import NetworkDenoiser
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops, peak_memory
from ts_adapt.grids import fixed
from ts_adapt.noise import BetaTable
from ts_adapt.pipelines.load import build_denoiser
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import quantize, restore
from ts_adapt.sampling import integrate
from ts_adapt.solvers import DDIM
from ts_adapt.teacher.generate import weights_hash


@pytest.mark.parametrize("kind", ["unet", "text_unet"])
@pytest.mark.parametrize("ways", [{"channels_last"}, {"fused_qkv"}, {"channels_last", "fused_qkv"}])
def test_the_network_says_the_same(tiny: Any, kind: str, ways: set[str]) -> None:
    network = getattr(tiny, kind)()
    if kind == "unet":
        from diffusers import UNet2DModel

        network = UNet2DModel.from_config({**network.config, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"]})
        network.eval().requires_grad_(False)
    full, state = said(network), network.state_dict()
    linear = [name for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    execute(network, **dict.fromkeys(ways, True))
    torch.testing.assert_close(said(network), full, atol=1e-5, rtol=1e-4)
    assert list(network.state_dict()) == list(state)
    if "fused_qkv" in ways:
        fused = {name for name, m in network.named_modules() if isinstance(m, nn.Linear)} - set(linear)
        assert {name.rpartition(".")[2] for name in fused} == ({"to_qkv"} if kind == "unet" else {"to_qkv", "to_kv"})
        ran: list[str] = []
        for name, module in network.named_modules():
            if name.endswith((".to_q", ".to_k", ".to_v")):
                module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        said(network)
        assert not any(name.endswith(("to_k", "to_v")) for name in ran)
    if "channels_last" in ways:
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(TsAdaptError, match="is run in a way of its own already"):
        execute(network, channels_last=True)


def test_a_network_without_attention_of_that_kind_is_refused(tiny: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    with pytest.raises(TsAdaptError, match="no attention of diffusers' making to fuse"):
        execute(nn.Linear(2, 2), fused_qkv=True)
    network = tiny.text_unet()
    network.set_attn_processor(AttnProcessor())
    with pytest.raises(TsAdaptError, match="is run by AttnProcessor, whose projections"):
        execute(network, fused_qkv=True)
    assert execution_of(network) == Execution()
    with pytest.raises(TsAdaptError, match="did you mean 'inductor'"):
        execute(network, compile="inducter")


@pytest.mark.parametrize("quantizer", ["none", "hqq4", "minmax-w8"])
@pytest.mark.parametrize("cacher", ["none", "deepcache-2", "tgate-2-self2-warmup1+deepcache-2"])
def test_channels_last_goes_with_cachers_and_quantizers(tiny: Any, cacher: str, quantizer: str) -> None:
    def run(channels_last: bool) -> Tensor:
        torch.manual_seed(1)
        network = execute(tiny.text_unet(), channels_last=channels_last)
        denoiser = NetworkDenoiser(network, BetaTable.from_config(tiny.betas().config), "epsilon")
        times = fixed.make("linear", denoiser.noise_schedule, 3)
        x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        if quantizer != "none":
            method, layers = build(quantizer)
            quantize(network, method, layers=layers)
        with torch.no_grad(), attached(network, *build_cachers(cacher)):
            text = torch.ones(2, 3, 16)
            return integrate(
                denoiser, DDIM(denoiser.noise_schedule), times, x_T, condition={"encoder_hidden_states": text}
            ).x

    torch.testing.assert_close(run(True), run(False), atol=1e-4, rtol=1e-3)


def test_fused_projections_go_with_cachers_and_refuse_quantizers(tiny: Any) -> None:
    network = execute(tiny.text_unet(), fused_qkv=True)
    full = said(network)
    with pytest.raises(TsAdaptError, match=r"fused, of weights in full precision; leave model\.fused_qkv out"):
        quantize(network, build("hqq4")[0])
    assert torch.equal(said(network), full)
    (cacher,) = build_cachers("tgate-1")
    plain_said = []
    for ways in ({}, {"fused_qkv": True}):
        torch.manual_seed(2)
        other = execute(tiny.text_unet(), **ways)
        with attached(other, cacher):
            cacher.begin(2, 2)
            cacher.at(0)
            said(other)
            cacher.at(1)
            plain_said.append(said(other))
    torch.testing.assert_close(*plain_said, atol=1e-5, rtol=1e-4)


class Small(nn.Module):
    """Something to compile that is compiled in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.middle(self.first(x)) + timestep[:, None]))
        return out


def test_a_compiled_network_notices_layers_and_hooks() -> None:
    network, x, t = Small().eval().requires_grad_(False), torch.randn(3, 4), torch.tensor([0.1, 0.2, 0.3])
    full, seen = network(x, t), list[int]()
    execute(network, compile="eager")
    torch.testing.assert_close(network(x, t), full)
    handle = network.middle.register_forward_hook(lambda *_: seen.append(1))
    network(x, t)
    handle.remove()
    network(x, t)
    assert len(seen) == 1
    quantize(network, build("minmax-w3")[0])
    quantized = network(x, t)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(quantized, network(x, t))
    assert not torch.allclose(quantized, full, atol=1e-3)
    torch.testing.assert_close(restore(network)(x, t), full)
    assert count_flops(lambda: network(x, t)) == 2 * 3 * (4 * 8 + 8 * 8 + 8 * 4)
    assert peak_memory(lambda: network(x, t)) > 0


def test_what_a_compiled_network_cannot_take_is_refused(tiny: Any) -> None:
    network = execute(tiny.text_unet(), compile="eager")
    for name in ("deepcache-2", "tgate-2"):
        with pytest.raises(TsAdaptError, match=r"compiled as one piece; leave model\.compile out"):
            build_cachers(name)[0].attach(network)
    from ts_adapt.quantizers.layers.plan import LayerOptions
    from ts_adapt.quantizers.quantization import begin

    with pytest.raises(TsAdaptError, match=r"cannot be compiled; .* or take tinydm\+plain-attention"):
        begin(network, "tinydm", {"attention": True}, LayerOptions())


@pytest.mark.parametrize(("dtype", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("float32", "float32")])
def test_the_options_of_a_model_are_what_its_network_is_run_by(dtype: str, full: str) -> None:
    options = ModelOptions(dtype=dtype, channels_last=True, fused_qkv=True)
    assert options.dtype == full
    denoiser: Any = build_denoiser(options)
    reference: Any = build_denoiser(ModelOptions())
    found = execution_of(denoiser.network)
    assert found.channels_last and found.fused and denoiser.network.dtype == getattr(torch, full)
    if full == "float32":
        assert weights_hash(denoiser) == weights_hash(reference)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor(500.0, dtype=torch.float64)
    with torch.no_grad():
        x0, wanted = denoiser(x, t), reference(x, t)
    assert x0.dtype == torch.float32 and denoiser.noise_schedule.alpha(t).dtype == torch.float64
    torch.testing.assert_close(x0, wanted, atol=0.2 if full == "bfloat16" else 0.02, rtol=0.05)


def test_options_for_networks_are_refused_without_one() -> None:
    with pytest.raises(TsAdaptError, match=r"model\.fused_qkv is for networks, and 'gaussian-mixture' is none"):
        build_denoiser(ModelOptions("gaussian-mixture", fused_qkv=True))
