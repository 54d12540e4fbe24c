"""Pipelines of real, tiny, untrained components: our denoiser and solver loop against the pipeline itself."""

from __future__ import annotations

import shutil
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    LDMPipeline,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny_pipelines import dit, ldm, stable_diffusion, text_unet, unet, vae
from ts_adapt import zoo
from ts_adapt.assembly import build_solver
from ts_adapt.denoisers import Guided, NetworkDenoiser, encode_prompts, from_pipeline
from ts_adapt.denoisers.load import image_to_image, load_pipeline
from ts_adapt.denoisers.pipeline import LatentDecoder
from ts_adapt.errors import TsAdaptError
from ts_adapt.pipelines.load import load
from ts_adapt.sampling import initial_noise, integrate
from ts_adapt.schedules.resolve import build_grid
from ts_adapt.teacher.generate import weights_hash


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Stable Diffusion pipeline, with the weights of another network beside it."""
    torch.manual_seed(0)
    path: Path = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(path)
    save_file(text_unet().state_dict(), path / "other.safetensors")
    for name in ("none.safetensors", "none.gguf", "none.bin"):
        (path / name).write_bytes(b"none")
    return path


def same_decoders(one: Any, other: Any) -> bool:
    states = (denoiser.decoder.state_dict().values() for denoiser in (one, other))
    return all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def ddim(denoiser: Any, x: Tensor, steps: int, **condition: Any) -> Tensor:
    """DDIM with diffusers' leading spacing, ending in alpha = 1: two lines of algebra, independent of the solvers."""
    times = [i * (1000 // steps) for i in reversed(range(steps))]
    for i, t in enumerate(times):
        now = torch.tensor(float(t))
        x0 = denoiser(x, now, **condition)
        eps = (x - denoiser.noise_schedule.alpha(now) * x0) / denoiser.noise_schedule.sigma(now)
        if i + 1 == steps:
            return x0.float()
        after = torch.tensor(float(times[i + 1]))
        x = (denoiser.noise_schedule.alpha(after) * x0 + denoiser.noise_schedule.sigma(after) * eps).float()
    raise AssertionError


def scheduler(kind: str = "epsilon", **options: Any) -> DDIMScheduler:
    return DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True, **options)


def as_images(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "given", "condition"),
    [
        ("epsilon", {"batch_size": 2}, {}), ("v_prediction", {"batch_size": 2}, {}), ("sample", {"batch_size": 2}, {}),
        ("ldm", {"batch_size": 2}, {}),
        ("dit", {"class_labels": [3, 8], "guidance_scale": 4.0}, {"class_labels": torch.tensor([3, 8])}),
    ],
)  # fmt: skip
def test_our_loop_ends_in_the_pictures_of_the_pipeline(
    name: str, given: dict[str, Any], condition: dict[str, Tensor]
) -> None:
    """With the decoder of its latents, and guided with its null class, where it has them."""
    if name == "ldm":
        pipe: Any = LDMPipeline(ldm().vqvae, unet(3), scheduler())
    elif name == "dit":
        pipe = DiTPipeline(dit().transformer, vae(), scheduler())
    else:
        pipe = DDIMPipeline(unet(), scheduler(name))
    theirs = pipe(**given, generator=torch.Generator().manual_seed(5), num_inference_steps=5, output_type="np").images
    denoiser = from_pipeline(pipe)
    solved: Any = Guided(denoiser, 4.0) if condition else denoiser
    x_T = torch.randn(2, *denoiser.shape, generator=torch.Generator().manual_seed(5))
    ours = as_images(solved.decode(ddim(solved, x_T, 5, **condition)))
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-3, rtol=1e-3)
    assert denoiser.prediction == {"v_prediction": "v", "sample": "sample"}.get(name, "epsilon")
    assert denoiser.evaluations == 5


@torch.no_grad()
def test_latents_of_images_are_scaled_as_the_decoder_undoes_it() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    coder, vq = vae(shift_factor=0.1), ldm().vqvae
    for one, raw, latents in (
        (coder, coder.encode(images).latent_dist.mode(), (coder.encode(images).latent_dist.mode() - 0.1) * 0.3),
        (vq, vq.encode(images).latents, vq.encode(images).latents * 0.4),
    ):
        torch.testing.assert_close(LatentDecoder(one).encode(images), latents)
        torch.testing.assert_close(LatentDecoder(one)(latents), one.decode(raw).sample)


def test_stable_diffusion_with_prompts() -> None:
    pipe = stable_diffusion()
    pipe.unet.requires_grad_(True)
    denoiser = from_pipeline(pipe)
    assert denoiser.shape == (4, 8, 8)
    assert not any(p.requires_grad for p in denoiser.network.parameters())
    condition, none = encode_prompts(pipe, ["a hat", "two hats"])
    assert condition["encoder_hidden_states"].shape == (2, 8, 16)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor(600.0)
    assert denoiser.encode is not None
    torch.testing.assert_close(denoiser.encode(["a hat", "two hats"]), condition)
    got = Guided(denoiser, 7.5)(x, t, **condition)
    torch.testing.assert_close(got, Guided(denoiser, 7.5, none)(x, t, **condition))
    empty = denoiser(x, t, **encode_prompts(pipe, ["", ""])[0])
    given = denoiser(x, t, **condition)
    torch.testing.assert_close(got, empty + 7.5 * (given - empty), rtol=1e-3, atol=1e-3)
    decoded = denoiser.decode(x)
    torch.testing.assert_close(decoded, pipe.vae.decode(x / 0.3).sample)
    pipe.__class__ = type("Inpainting", (type(pipe),), {})
    assert isinstance(from_pipeline(pipe), NetworkDenoiser)


def test_the_config_of_the_scheduler_is_kept() -> None:
    config = from_pipeline(
        DDIMPipeline(unet(), scheduler("v_prediction", beta_schedule="scaled_linear"))
    ).scheduler_config
    assert config is not None
    assert (config["_class_name"], config["beta_schedule"]) == ("DDIMScheduler", "scaled_linear")
    assert config["prediction_type"] == "v_prediction"
    told = from_pipeline(DDPMPipeline(unet(), DDPMScheduler()), "sample")
    assert told.scheduler_config is not None and told.scheduler_config["prediction_type"] == "sample"
    network = NetworkDenoiser(told.network, told.noise_schedule, "epsilon", null_condition={"class_labels": 3})
    assert network.scheduler_config is None and Guided(network, 2.0).scheduler_config is None


def test_other_pipelines_are_refused_with_a_list() -> None:
    with pytest.raises(
        TsAdaptError, match=r"SimpleNamespace is not supported; supported are DDPMPipeline, .*NetworkDen"
    ):
        from_pipeline(SimpleNamespace(unet=unet()))
    with pytest.raises(TsAdaptError, match="encodes no prompts"):
        encode_prompts(SimpleNamespace(), ["a hat"])


def test_load_reads_a_folder_with_overrides(tmp_path: Path) -> None:
    pipe = DDPMPipeline(unet(), DDPMScheduler(prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path / "model")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor(321.5)
    denoiser = load(str(tmp_path / "model"))
    assert denoiser.prediction == "v"
    torch.testing.assert_close(denoiser(x, t), from_pipeline(pipe)(x, t))
    other = load(tmp_path / "model", prediction="epsilon", device="cpu", dtype=torch.bfloat16)
    assert other.prediction == "epsilon"
    assert next(other.network.parameters()).dtype == torch.bfloat16


def test_load_pipeline_gives_any_class_and_its_image_to_image_twin(folder: Path) -> None:
    pipe = load_pipeline(str(folder), "cpu", torch.bfloat16)
    twin = image_to_image(pipe)
    assert (type(pipe).__name__, type(twin).__name__) == ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    assert twin.unet is pipe.unet and image_to_image(twin) is twin
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}
    with pytest.raises(TsAdaptError, match="no image-to-image pipeline for DDPMPipeline"):
        image_to_image(DDPMPipeline(unet(), DDPMScheduler()))


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of diffusers' quantization that rounds weights to multiples of its step."""
    from diffusers.quantizers import auto
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin

    class Rounding(QuantizationConfigMixin):
        to_diff_dict = QuantizationConfigMixin.to_dict

        def __init__(self, step: float) -> None:
            self.quant_method: Any = Enum("Method", {"rounding": "rounding"}, type=str).rounding  # type: ignore[attr-defined]
            self.step = step

    class Rounder(DiffusersQuantizer):
        is_serializable = is_trainable = False

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None: ...

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            for p in model.parameters():
                p.data = (p.data / self.quantization_config.step).round() * self.quantization_config.step
            return model

    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "rounding", Rounding)
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "rounding", Rounder)


@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("own", [False, True])
def test_the_network_alone_is_read_from_a_file_of_its_own_and_quantized_by_diffusers(own: bool, folder: Path) -> None:
    """By a backend of the test's own, as none is a dependency."""
    weights: dict[str, Any] = {"weights": folder / "other.safetensors"} if own else {}
    plain, full = load(folder), load(folder, **weights)
    found = load(folder, **weights, quantization_config={"quant_backend": "rounding", "step": 0.25})
    expected = load_file(weights["weights"]) if own else plain.network.state_dict()
    for name, value in full.network.state_dict().items():
        assert torch.equal(value, expected[name])
        assert torch.equal(found.network.state_dict()[name], (value / 0.25).round() * 0.25)
    assert same_decoders(found, plain) and same_decoders(full, plain)
    assert len({weights_hash(each) for each in (plain, full, found)}) == 2 + own


@pytest.mark.packages
def test_torchaos_weights_are_sampled_with_differentiated_and_told_apart(folder: Path) -> None:
    hashes = {weights_hash(load(folder))}
    for kind in ("Int8WeightOnlyConfig", {"Int8WeightOnlyConfig": {"set_inductor_config": False}}):
        found = load(folder, quantization_config={"quant_backend": "torchao", "quant_type": kind})
        assert "Int8Tensor" in {type(p.data).__name__ for p in found.network.parameters()}
        x, text = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 16)
        x0 = found(x, torch.tensor(500.0), encoder_hidden_states=text)
        assert bool(torch.autograd.grad(x0.sum(), x)[0].any())
        hashes.add(weights_hash(found))
    assert len(hashes) == 2


def test_weights_that_lack_some_are_refused(folder: Path, tmp_path: Path) -> None:
    few = dict(list(load_file(folder / "other.safetensors").items())[:-1])
    save_file(few, tmp_path / "few.safetensors")
    with pytest.raises(TsAdaptError, match=r"cannot be read from .* missing"):
        load(folder, weights=tmp_path / "few.safetensors")


@pytest.mark.packages
def test_ggufs_few_bits_are_sampled_with_differentiated_and_told_apart(tmp_path: Path) -> None:
    import gguf

    pipe = load_pipeline("emoji-sd3")
    writer = gguf.GGUFWriter(str(tmp_path / "few.gguf"), "sd3")
    for name, value in pipe.transformer.state_dict().items():
        array, few = value.float().numpy(), gguf.GGMLQuantizationType.Q8_0
        if name.endswith(("to_q.weight", "to_out.0.weight")):
            writer.add_tensor(name, gguf.quants.quantize(array, few), raw_dtype=few)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    call = {"guidance_scale": 4.0, "max_sequence_length": 16}
    full, found = load("emoji-sd3", call=call), load("emoji-sd3", call=call, weights=tmp_path / "few.gguf")
    assert {"GGUFParameter"} <= {type(p).__name__ for p in found.network.parameters()}
    assert weights_hash(found) != weights_hash(full)
    x_T = initial_noise(0, [0], full.shape).requires_grad_()
    grid, euler = build_grid("linear", full.noise_schedule, 2), build_solver("euler", full.noise_schedule)
    ends = [integrate(one, euler, grid, x_T, condition=full.encode(["noto red heart"])).x for one in (full, found)]
    off = (ends[0] - ends[1]).detach().abs().max() / ends[0].detach().abs().max()
    assert 0 < float(off) < 0.05
    assert bool(torch.autograd.grad(ends[1].sum(), x_T)[0].any())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gone.safetensors", {}, "no such file"),
        ("none.bin", {}, r"expected a file \.safetensors or \.gguf"),
        ("none.gguf", {"quantization_config": {"quant_backend": "gguf"}}, "leave model.quantization_config out"),
        ("none.safetensors", {}, "cannot be read from"),
    ],
)
def test_weights_that_are_not_the_networks(name: str, options: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(TsAdaptError, match=message):
        load(folder, weights=folder / name, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_backend": "torchoa"}, "did you mean 'torchao'"),
        ({"other": 1}, "unknown quant_backend of model.quantization_config 'None'"),
        ({"quant_backend": "quanto", "weights_dtype": "int9"}, "model.quantization_config cannot be used"),
        ({"quant_backend": "quanto"}, "quanto"),
        ({"quant_backend": "torchao"}, "torchao"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*Quanto")
def test_what_diffusers_cannot_quantize_by_is_one_sentence(
    config: dict[str, Any], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("optimum.quanto", "torchao.quantization"):  # as if they were not installed
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TsAdaptError, match=message):
        load(folder, quantization_config=config)


def test_load_opens_no_pickles(tmp_path: Path) -> None:
    pipe = DDPMPipeline(unet(), DDPMScheduler())
    pipe.save_pretrained(tmp_path / "{model}", safe_serialization=False)
    with pytest.raises(TsAdaptError, match="cannot be loaded"):
        load(tmp_path / "{model}")


def test_load_of_the_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = UNet2DModel.from_config({**unet().config, "num_class_embeds": 11})
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "class")
    folders = {"fashion-ddpm-class": tmp_path / "class", "fashion-ddpm": tmp_path / "none"}
    monkeypatch.setattr(zoo, "paths", lambda: folders)
    assert load("fashion-ddpm-class").null_condition == {"class_labels": 10}
    with pytest.raises(TsAdaptError, match="reinstall"):
        load("fashion-ddpm")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashon-ddpm", "did you mean 'fashion-ddpm'"),
        ("whatever", "no model is called 'whatever'; the zoo has fashion-ddpm"),
        ("./nowhere", "there is no folder './nowhere'"),
        ("/no/such/folder", "there is no folder"),
        ("model.ckpt", "is a pickle"),
        ("gone.safetensors", "gone.safetensors cannot be read"),
    ],
)
def test_load_of_unknown_names(name: str, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        load(name)


def test_load_without_model_index_or_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TsAdaptError, match=r"no model_index\.json"):
        load(tmp_path)

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", unreachable)
    with pytest.raises(TsAdaptError, match=r"could not be had from the Hugging Face hub.*model of the zoo"):
        load("owner/name")


@pytest.mark.parametrize(
    ("channels", "said"), [(64, "flux-dev.* cannot be loaded .as FluxPipeline"), (384, "flux-fill")]
)
def test_an_original_file_is_of_the_kind_that_its_tensors_say(
    channels: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*args: object, **options: object) -> None:
        raise ValueError("as FluxPipeline")

    monkeypatch.setattr("diffusers.FluxPipeline.from_single_file", read)
    names = ("double_blocks.0.img_attn.norm.key_norm.scale", "guidance_in.in_layer.bias", "img_in.weight")
    save_file({name: torch.zeros(1, channels) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(TsAdaptError, match=said):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_without_some_of_the_weights_is_refused(part: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / part).glob("*.safetensors")
    tensors = load_file(file)
    left_out = sorted(tensors)[len(tensors) // 2]
    del tensors[left_out]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(TsAdaptError, match=f"{part} is incomplete, without the weights {left_out}"):
        load_pipeline(str(tmp_path), device="cpu")


@pytest.mark.parametrize("kind", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edms_schedulers_give_their_own_x0_and_eulers_solve(kind: Any, prediction_type: str) -> None:
    network = unet()
    scheduler = kind(prediction_type=prediction_type, sigma_data=0.7, sigma_max=40.0)
    denoiser = from_pipeline(DDPMPipeline(network, scheduler))
    noise_schedule = denoiser.noise_schedule
    assert (noise_schedule.t_min, noise_schedule.t_max, denoiser.shape) == (0.002, 40.0, (1, 8, 8))
    x, sigma = 3 * torch.randn(2, 1, 8, 8), torch.tensor(2.5)
    with torch.no_grad():
        told = scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)
        expected = scheduler.precondition_outputs(x, network(*told).sample, sigma)
        torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-4, atol=1e-5)
    assert denoiser.network is network and denoiser.evaluations == 1
    assert denoiser.scheduler_config is not None and denoiser.scheduler_config["sigma_max"] == 40.0
    euler = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=0.7, sigma_max=40.0)
    euler.set_timesteps(4)
    times = torch.cat([euler.sigmas[:-1].double(), torch.tensor([0.002], dtype=torch.float64)])
    times[0] = 40.0
    x_T = noise_schedule.noise_scale * torch.randn(2, 1, 8, 8)
    y = x_T
    with torch.no_grad():
        for t in euler.timesteps[:-1]:
            y = euler.step(network(euler.scale_model_input(y, t), t).sample, t, y).prev_sample
        ours = integrate(denoiser, build_solver("euler", noise_schedule), times[:4], x_T).x
    torch.testing.assert_close(ours, y, rtol=1e-3, atol=1e-3)


def test_other_predictions_of_edms_schedulers_are_refused() -> None:
    for prediction in ("velocity", "v"):
        with pytest.raises(TsAdaptError, match=f"'epsilon' and prediction '{prediction}' is asked for"):
            from_pipeline(DDPMPipeline(unet(), EDMEulerScheduler()), prediction)


def test_a_pipeline_that_needs_transformers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.utils.import_utils.is_transformers_available", lambda: False)
    with pytest.raises(TsAdaptError, match=r"text_encoder of the pipeline in .* pip install 'ts_adapt\[text\]'"):
        load_pipeline("emoji-sd")
