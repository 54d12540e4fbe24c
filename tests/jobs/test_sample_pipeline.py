"""sample --pipeline: what the command writes is what the two lines of Python give, in whatever batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiTPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from small_job import sentence
from tiny_families import family
from ts_adapt import LearnedGrid, LearnedScheduler, TimeGrid, attach
from ts_adapt.assembly import build_cachers
from ts_adapt.cachers import attached
from ts_adapt.cli import main
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.jobs.session import Session
from ts_adapt.options import yaml_text
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.quantization import quantize
from ts_adapt.sampling import generator_for
from ts_adapt.teacher.generate import ClassLabels

STEPS, SEED = 4, 1
SHAPES = {"ddpm": (1, 8, 8), "sd": (4, 8, 8), "dit": (4, 8, 8)}
CLASSES = {"ddpm": DDPMPipeline, "sd": StableDiffusionPipeline, "dit": DiTPipeline}
PROMPTS = ["a hat", "two red shoes"]
TEXTS = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
THREE = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
"""Those of three images."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Path:
    """Folders of pipelines and of schedules for them: <pipeline>-<kind>, and an image to start from."""
    folder = tmp_path_factory.mktemp("saved")
    for name, shape in SHAPES.items():
        pipe = tiny.pipeline(name)
        pipe.save_pretrained(folder / name)
        for kind in ("static", "one-shot", "recursive"):
            tiny.schedule(kind, pipe.scheduler.config, shape).save_pretrained(folder / f"{name}-{kind}")
    pixels = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "start.png")
    return folder


def sample(saved: Path, out: Path, pipeline: str, schedule: str, *flags: str) -> Tensor:
    """The images that the command has written, `(n, H, W)` or `(n, H, W, 3)`, in levels of 0 to 255."""
    found = [str(saved / name) if (saved / name).exists() else name for name in (pipeline, schedule)]
    words = ["--pipeline", found[0], "--schedule", found[1], "--count", "3", "--out", str(out), "--quiet", *flags]
    assert main(["sample", *words]) == 0
    return written(out)


def written(out: Path) -> Tensor:
    files = sorted((out / "images").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(len(files))]
    assert (out / "grid.png").exists()
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).float() for file in files])


def same(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of levels."""
    assert found.shape == expected.shape and float(expected.std()) > 2
    assert float((found - expected).abs().max()) <= 1


def two_lines(pipe: Any, schedule: Path, count: int = 3, **arguments: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    attach(pipe, LearnedScheduler.from_pretrained(schedule))
    generators = [generator_for(SEED, i) for i in range(count)]
    images = pipe(generator=generators, num_inference_steps=STEPS, output_type="np", **arguments).images
    return levels(images)


def levels(images: Any) -> Tensor:
    """Grey pictures are stored in three channels."""
    pictures = torch.from_numpy(np.asarray(images)).mul(255).round()
    return pictures.expand(*pictures.shape[:3], 3)


@pytest.fixture
def evaluations() -> Iterator[list[str]]:
    """The calls of denoising networks while a test runs."""
    calls: list[str] = []

    def note(module: Any, args: Any, out: Any) -> None:
        if type(module).__name__ in ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"):
            calls.append(type(module).__name__)

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield calls
    handle.remove()


@pytest.mark.parametrize("kind", ["static", "one-shot", "recursive"])
def test_unconditional(kind: str, saved: Path, tmp_path: Path, evaluations: list[str], capsys) -> None:
    found = sample(saved, tmp_path / "a", "ddpm", f"ddpm-{kind}", "--count", "5", "--batch", "3")
    assert len(found) == 5 and len(evaluations) == 2 * STEPS
    assert f", unipc-3, NFE {STEPS}: " in capsys.readouterr().out
    pipe = DDPMPipeline.from_pretrained(saved / "ddpm")
    same(found, two_lines(pipe, saved / f"ddpm-{kind}", 5, batch_size=5))
    assert len({image.numpy().tobytes() for image in found}) == 5


def test_the_images_of_a_zoo_model_are_those_of_sample_without_a_pipeline(tmp_path: Path) -> None:
    flags = ["--schedule", "karras", "--solver", "dpmpp-2m", "--steps", "3", "--count", "3", "--quiet", "--out"]
    assert main(["sample", "--pipeline", "fashion-ddpm", *flags, str(tmp_path / "a")]) == 0
    assert main(["sample", "--model.name", "fashion-ddpm", *flags, str(tmp_path / "b")]) == 0
    same(written(tmp_path / "a"), written(tmp_path / "b"))


@pytest.mark.parametrize("kind", ["static", "one-shot", "recursive"])
def test_text_to_image(kind: str, saved: Path, tmp_path: Path, evaluations: list[str]) -> None:
    found = sample(saved, tmp_path / "a", "sd", f"sd-{kind}", *TEXTS, "--negative", "grey", "--guidance", "3")
    assert len(evaluations) == STEPS
    pipe = StableDiffusionPipeline.from_pretrained(saved / "sd")
    arguments = {"prompt": THREE, "negative_prompt": ["grey"] * 3, "guidance_scale": 3.0}
    same(found, two_lines(pipe, saved / f"sd-{kind}", **arguments))


def test_a_cacher_and_a_quantizer_are_applied(saved: Path, tmp_path: Path, capsys) -> None:
    flags = ["--student.cacher", "tgate-2+deepcache-2", "--student.quantizer", "hqq4"]
    found = sample(saved, tmp_path / "a", "sd", "sd-static", *TEXTS, *flags)
    assert "with tgate-2+deepcache-2" in capsys.readouterr().out
    pipe = StableDiffusionPipeline.from_pretrained(saved / "sd")
    texts = {"prompt": THREE}
    plain = two_lines(pipe, saved / "sd-static", **texts)
    quantize(pipe.unet, build("hqq4")[0])
    quantized = two_lines(pipe, saved / "sd-static", **texts)
    with attached(pipe.unet, *build_cachers("tgate-2+deepcache-2")):
        same(found, two_lines(pipe, saved / "sd-static", **texts))
    assert float((found - quantized).abs().max()) > 1 < float((quantized - plain).abs().max())


@pytest.mark.parametrize("call", [[], ["--model.call", "{guidance_scale: 3.0}"]])
def test_text_to_image_without_a_pipeline(call: list[str], saved: Path, tmp_path: Path, capsys) -> None:
    """Of the network called directly, with guidance by the package, and by the pipeline's own loop."""
    words = ["sample", "--model.name", str(saved / "sd"), "--schedule", str(saved / "sd-static"), "--count", "3"]
    words += ["--quiet", *(call or ["--guidance", "3"])]
    assert main([*words, *TEXTS, "--out", str(tmp_path / "a")]) == 0
    found = written(tmp_path / "a")
    (tmp_path / "list.txt").write_text("\n".join(PROMPTS))
    assert main([*words, "--teacher.prompts", str(tmp_path / "list.txt"), "--out", str(tmp_path / "b")]) == 0
    assert torch.equal(written(tmp_path / "b"), found)
    same(found, sample(saved, tmp_path / "c", "sd", "sd-static", *TEXTS, "--guidance", "3"))
    assert main([*words, "--out", str(tmp_path / "d")]) == 2
    assert "is told what to make" in capsys.readouterr().err


def test_a_model_without_prompts_is_given_none(capsys) -> None:
    assert main(["sample", "--schedule", "karras", "--prompt", "x"]) == 2
    assert "takes no prompts; leave --prompt and --prompts out" in capsys.readouterr().err
    config = Config()
    config.teacher.test_prompts = "list.txt"
    with pytest.raises(TsAdaptError, match=r"leave teacher\.test_prompts out"):
        Session(config).condition_source("test")


@pytest.mark.parametrize("kind", ["static", "recursive"])
def test_image_to_image(kind: str, saved: Path, tmp_path: Path, evaluations: list[str], capsys) -> None:
    start = ["--init-image", str(saved / "start.png"), "--strength", ".5"]
    found = sample(saved, tmp_path / "a", "sd", f"sd-{kind}", *TEXTS, *start)
    assert len(evaluations) == STEPS // 2
    assert f", NFE {STEPS // 2}: " in capsys.readouterr().out
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(saved / "sd")
    image = Image.open(saved / "start.png")
    same(found, two_lines(pipe, saved / f"sd-{kind}", prompt=THREE, image=[image] * 3, strength=0.5))
    pipe.save_pretrained(tmp_path / "img2img")  # of the class itself, and another file format
    image.save(tmp_path / "start.bmp")
    start[1] = str(tmp_path / "start.bmp")
    again = sample(saved, tmp_path / "b", str(tmp_path / "img2img"), f"sd-{kind}", *TEXTS, *start)
    same(again, found)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_inpainting(strength: float | None, saved: Path, tmp_path: Path, evaluations: list[str]) -> None:
    """What is white in the mask is painted anew, at the image's own size; a schedule's times are its own here too."""
    image = Image.open(saved / "start.png").resize((32, 16))
    mask = Image.fromarray(np.repeat([[0, 255]], (24, 8), 1).repeat(16, 0).astype(np.uint8))
    image.save(tmp_path / "image.png")
    mask.save(tmp_path / "mask.png")
    flags = ["--init-image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"), *TEXTS]
    flags += ["--strength", "0.5"] if strength else []
    found = sample(saved, tmp_path / "a", "sd", "sd-static", *flags)
    assert len(evaluations) == (STEPS // 2 if strength else STEPS)
    pipe = StableDiffusionInpaintPipeline.from_pretrained(saved / "sd")
    given = {"prompt": THREE, "image": [image] * 3, "mask_image": [mask] * 3}
    given |= {"height": 16, "width": 32} | ({"strength": strength} if strength else {})
    same(found, two_lines(pipe, saved / "sd-static", **given))
    pipe.save_pretrained(tmp_path / "inpaint")  # of the class itself
    same(sample(saved, tmp_path / "b", str(tmp_path / "inpaint"), "sd-static", *flags, "--batch", "1"), found)
    kept, new = (float(part.std(0).mean()) for part in found.tensor_split(2, dim=2))
    assert new > 2 * kept, (kept, new)


def test_a_film_is_the_picture_of_its_frames(tmp_path: Path) -> None:
    pipe, call = family("ltx")
    pipe.save_pretrained(tmp_path / "film")
    flags = ["--prompt", PROMPTS[0], "--model.call", yaml_text(call, default_flow_style=True).strip(), "--batch", "2"]
    found = sample(tmp_path, tmp_path / "a", "film", "linear", *flags, "--solver", "euler", "--steps", "2")
    attach(pipe, LearnedScheduler.from_grid("linear", "euler"))
    made = [
        pipe(PROMPTS[0], num_inference_steps=2, generator=generator_for(SEED, i), output_type="np", **call).frames[0]
        for i in range(3)
    ]
    assert found.shape[2] == len(made[0]) * made[0].shape[2]
    same(found, levels(np.stack([np.concatenate(list(frames), 1) for frames in made])))


@pytest.mark.parametrize("label", [None, 7])
def test_classes(label: int | None, saved: Path, tmp_path: Path) -> None:
    found = sample(saved, tmp_path / "a", "dit", "dit-one-shot", *([] if label is None else ["--label", str(label)]))
    labels = ClassLabels(1000, label).draw(SEED, range(3))["class_labels"].tolist()
    pipe = DiTPipeline.from_pretrained(saved / "dit")
    same(found, two_lines(pipe, saved / "dit-one-shot", class_labels=labels))


def case(name: str, kind: str, *flags: str) -> Any:
    return pytest.param(name, f"{name}-{kind}", flags, id=f"{name}-{kind}-{len(flags)}")


@pytest.mark.parametrize(
    ("pipeline", "schedule", "flags"),
    [
        case("ddpm", "one-shot"),
        case("sd", "recursive", *TEXTS),
        case("sd", "static", *TEXTS, "--init-image", "START"),
        case("dit", "recursive"),
        pytest.param("ddpm", "karras", ("--solver", "ddpm", "--steps", "3"), id="ddpm-noise"),
        pytest.param("ddpm", "karras", ("--solver", "ddim-eta0.5", "--steps", "3"), id="ddpm-half-the-noise"),
        pytest.param("sd", "karras", ("--solver", "ddpm", "--steps", "3", *TEXTS), id="sd-noise"),
    ],
)
def test_an_image_does_not_depend_on_its_batch(
    pipeline: str, schedule: str, flags: Sequence[str], saved: Path, tmp_path: Path
) -> None:
    flags = [str(saved / "start.png") if flag == "START" else flag for flag in flags]
    together = sample(saved, tmp_path / "a", pipeline, schedule, *flags)
    same(sample(saved, tmp_path / "b", pipeline, schedule, *flags, "--batch", "1"), together)
    same(sample(saved, tmp_path / "c", pipeline, schedule, *flags, "--evaluate.batch_size", "2"), together)


def test_prompts_from_a_file(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(["", *PROMPTS, ""]))
    found = sample(saved, tmp_path / "a", "sd", "sd-static", "--prompts", str(tmp_path / "prompts.txt"))
    same(found, sample(saved, tmp_path / "b", "sd", "sd-static", *TEXTS))


def test_guidance_is_the_pipelines_own_unless_a_flag_or_else_the_config_gives_it(saved: Path, tmp_path: Path) -> None:
    def images(*flags: str) -> Tensor:
        return sample(saved, tmp_path / "a", "sd", "sd-static", *TEXTS, *flags)

    (tmp_path / "a.yml").write_text("guidance: 1.0")
    call = ["--model.call", "{guidance_scale: 15, negative_prompt: bad}"]
    own, none, told = images(), images("--guidance", "1"), images(*call)
    same(images("--guidance", "7.5"), own)
    same(images("--config", str(tmp_path / "a.yml")), none)
    same(told, images("--guidance", "15", "--negative", "bad"))
    assert float((own - none).abs().max()) > 5 < float((images(*call, "--guidance", "1") - told).abs().max())


def test_a_schedule_file_and_a_hub_id(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(saved, tmp_path / "a", "ddpm", "ddpm-static")
    schedule = LearnedScheduler.from_pretrained(saved / "ddpm-static")
    grid: TimeGrid = schedule.source.grids[STEPS]
    LearnedGrid(grid, "unipc-3", STEPS).save(tmp_path / "s.json", schedule.noise_schedule)
    same(sample(saved, tmp_path / "b", "ddpm", str(tmp_path / "s.json")), expected)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(saved / "ddpm-static"))
    same(sample(saved, tmp_path / "c", "ddpm", "owner/name", "--solver", "unipc-3", "--steps", "4"), expected)


def test_a_number_of_steps_that_was_not_learned_is_remarked_once(saved: Path, tmp_path: Path, capsys) -> None:
    for out in ("a", "b"):
        sample(saved, tmp_path / out, "ddpm", "ddpm-static", "--steps", "3", "--batch", "2")
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("ts-adapt: warning: 3 steps were not learned")
    schedule = LearnedScheduler.from_pretrained(saved / "ddpm-static")
    LearnedGrid(schedule.source.grids[STEPS], "unipc-3", STEPS).save(tmp_path / "s.json", schedule.noise_schedule)
    same(sample(saved, tmp_path / "c", "ddpm", str(tmp_path / "s.json"), "--steps", "3"), written(tmp_path / "a"))
    assert capsys.readouterr().err.startswith("ts-adapt: warning: 3 steps were not learned")


def test_half_precision_and_the_default_folder(saved: Path, tmp_path: Path, capsys) -> None:
    in_full = sample(saved, tmp_path / "a", "ddpm", "ddpm-static")
    words = ["--pipeline", str(saved / "ddpm"), "--schedule", str(saved / "ddpm-static"), "--count", "3", "--quiet"]
    assert main(["sample", *words, "--model.dtype", "bfloat16", "--log_root", str(tmp_path), "--name", "x"]) == 0
    half = written(tmp_path / "x/samples/ddpm-ddpm-static-unipc-3-nfe4")
    assert 0 < float((half - in_full).abs().mean()) < 60
    assert main(["sample", *words, "--log_root", str(tmp_path / "logs")]) == 0
    assert torch.equal(written(tmp_path / "logs/ddpm/samples/ddpm-static-unipc-3-nfe4"), in_full)


@pytest.mark.parametrize("other", ["notes.txt", "images/3.png", "images/cat.png"])
def test_images_are_not_mixed_with_what_else_a_folder_holds(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    out = tmp_path / "out"
    before = sample(saved, out, "ddpm", "ddpm-static")
    same(sample(saved, out, "ddpm", "ddpm-static"), before)
    (out / other).write_text("mine")
    words = ["--pipeline", str(saved / "ddpm"), "--schedule", str(saved / "ddpm-static"), "--out", str(out), "--quiet"]
    assert main(["sample", *words, "--count", "3"]) == 2
    assert f"holds {other} already" in capsys.readouterr().err and (out / other).read_text() == "mine"
    words = ["--model.name", "gaussian-mixture", "--schedule", "karras", "--out", str(out), "--quiet"]
    assert main(["sample", *words, "--count", "3"]) == 2
    assert f"holds {other} already" in capsys.readouterr().err


def test_fewer_images_replace_all_of_an_earlier_command_and_none_of_anyone_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample", "--model.name", "gaussian-mixture", "--schedule", "karras", "--out", str(tmp_path), "--quiet"]
    assert main([*words, "--count", "12"]) == main([*words, "--count", "4"]) == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"{number:05d}.png" for number in range(4)]
    (tmp_path / "grid.png").unlink()  # by which they are known
    capsys.readouterr()
    assert main([*words, "--count", "3"]) == 2
    assert "holds images/00003.png already" in capsys.readouterr().err and (tmp_path / "images/00003.png").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["ddpm", "ddpm-static", "--prompt", "a hat"], "DDPMPipeline takes no prompt; leave --prompt and --prompts"),
        (["ddpm", "ddpm-static", "--negative", "x"], "takes no negative prompt; leave --negative out"),
        (["ddpm", "ddpm-static", "--guidance", "2"], "takes no scale of guidance; leave --guidance out"),
        (["ddpm", "ddpm-static", "--init-image", "START"], "no image-to-image pipeline for DDPMPipeline"),
        (["ddpm", "ddpm-static", "--strength", ".5"], "along with --init-image FILE"),
        (["ddpm", "ddpm-one-shot", "--steps", "9"], "number of steps is 9; this schedule was learned for 4"),
        (["ddpm", "ddpm-static", "--solver", "ddim"], "is for unipc-3, not for ddim; leave --solver out"),
        (["ddpm", "sd-static"], "was learned for another model, which differs in"),
        (["ddpm", "karras", "--solver", "heun", "--steps", "4"], "evaluates the network 2 times a step"),
        (["sd", "JSON", "--prompt", "x"], "is for another noise schedule"),
        (["ddpm", "ddpm-static", "--model.dtype", "float8"], "unknown dtype 'float8'"),
        (["ddpm", "ddpm-static", "--model.prediction", "v"], "says by itself what it predicts"),
        (["ddpm", "ddpm-static", "--model.call", "{guidance_scale: 3}"], "unknown argument of DDPMPipeline"),
        (["ddpm-static", "karras"], "has no model_index.json"),
        (["no/such/folder", "karras"], "there is no folder 'no/such/folder'"),
        (["fashion-ddmp", "karras"], "did you mean 'fashion-ddpm'"),
        (["fashion-ddpm-class", "karras", "--label", "3"], "wants a class, which this pipeline does not give it"),
        (["sd", "sd-static"], "makes images of prompts; give --prompt TEXT, or --prompts FILE"),
        (["sd", "sd-static", "--prompts", "NONE"], "there is no file"),
        (["sd", "sd-static", "--prompt", "x", "--guidance", "0.5"], "guides by a scale above 1 or not at all"),
        (["sd", "sd-static", "--prompt", "x", "--model.call", "{guidance_scale: -2}"], "guidance_scale is -2, and"),
        (["sd", "sd-static", "--prompt", "x", "--label", "1"], "takes no class label; leave --label out"),
        (["sd", "sd-static", "--prompt", "x", "--init-image", "NONE"], "there is no file"),
        (["sd", "sd-static", "--prompt", "x", "--init-image", "LIST"], "cannot be read as an image"),
        (["sd", "sd-static", "--prompt", "x", "--init-image", "START", "--strength", "0.1"], "raise strength"),
        (["sd", "sd-one-shot", "--prompt", "x", "--init-image", "START"], "starts from a noised image"),
        (["sd", "sd-recursive", "--prompt", "x", "--init-image", "TALL"], "learned for samples of shape (4, 8, 8)"),
        (["IMG2IMG", "sd-static", "--prompt", "x"], "starts from an image; give --init-image FILE"),
        (["INPAINT", "sd-static", "--prompt", "x", "--init-image", "START"], "give --init-image FILE and --mask FILE"),
        (["sd", "sd-static", "--prompt", "x", "--mask", "START"], "give that along with it, --init-image FILE"),
        (["sd", "sd-static", "--prompt", "x", "--init-image", "TALL", "--mask", "START"], "is 16x16, the image 16x32"),
        (
            ["ddpm", "ddpm-static", "--init-image", "START", "--mask", "START"],
            "no inpainting pipeline for DDPMPipeline",
        ),
        (["sd", "sd-recursive", "--prompt", "x", "--init-image", "START", "--mask", "START"], "all images share"),
        (["dit", "dit-static", "--label", "1000"], "has classes 0 to 999"),
        (["dit", "dit-static", "--student.cacher", "deepcache-2"], "got DiTTransformer2DModel"),
        (["ddpm", "ddpm-static", "--student.quantizer", "minmax-w8a8"], "--model.name in place of --pipeline"),
        (["dit", "karras", "--solver", "ddpm"], "gives schedulers no generator for it; choose another solver"),
    ],
)
def test_bad_input_is_one_sentence(saved: Path, tmp_path: Path, capsys, arguments, expected) -> None:
    (tmp_path / "list.txt").write_text("a hat")
    names = {"START": saved / "start.png", "LIST": tmp_path / "list.txt", "NONE": tmp_path / "none"}
    if "TALL" in arguments:
        names["TALL"] = tmp_path / "tall.png"
        Image.open(saved / "start.png").resize((16, 32)).save(names["TALL"])
    if "JSON" in arguments:
        names["JSON"] = tmp_path / "s.json"
        schedule = LearnedScheduler.from_pretrained(saved / "ddpm-static")
        LearnedGrid(schedule.source.grids[STEPS], "unipc-3", STEPS).save(names["JSON"], schedule.noise_schedule)
    if "INPAINT" in arguments:
        names["INPAINT"] = tmp_path / "inpaint"
        StableDiffusionInpaintPipeline.from_pretrained(saved / "sd").save_pretrained(names["INPAINT"])
    if "IMG2IMG" in arguments:
        names["IMG2IMG"] = tmp_path / "img2img"
        StableDiffusionImg2ImgPipeline.from_pretrained(saved / "sd").save_pretrained(names["IMG2IMG"])
    names |= {path.name: path for path in saved.iterdir() if path.is_dir()}
    pipeline, schedule, *flags = (
        word if before == "--solver" else str(names.get(word, word)) for before, word in pairwise(["", *arguments])
    )
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["sample", "--pipeline", pipeline, "--schedule", schedule, "--quiet", *out, *flags]) == 2
    assert expected in sentence(capsys)
    assert not list(tmp_path.glob("out/images/*"))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("height has to be\ndivisible by 8"), "cannot make these images (height has to be divisible by 8);"),
        (RuntimeError("not implemented for 'Half'"), "check what it is given, and model.device and model.dtype"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the memory does not suffice"),
        (torch.full((2, 3, 4, 4), torch.nan), "images with NaN in them; choose another model.dtype"),
        (torch.zeros(1, 3, 4, 4), "has made 1 images where 2 were asked for"),
        (["pictures"], "gives images, not images as numbers"),
    ],
)
def test_what_goes_wrong_in_a_pipeline_is_one_sentence(
    raised: Any, expected: str, saved: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pipe: Any, batch_size: int, generator: Any, num_inference_steps: int, output_type: str) -> Any:
        if isinstance(raised, Exception):
            raise raised
        return ImagePipelineOutput(images=raised)

    monkeypatch.setattr(DDPMPipeline, "__call__", fail)
    words = ["--pipeline", str(saved / "ddpm"), "--schedule", "karras", "--count", "2", "--out", str(tmp_path / "a")]
    assert main(["sample", *words, "--quiet"]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--negative", "x"], ["--init-image", "x.png"], ["--strength", ".5"], ["--mask", "x.png"]]
)
def test_flags_of_pipelines_need_one(flags: list[str], capsys) -> None:
    assert main(["sample", "--schedule", "karras", *flags]) == 2
    assert f"{flags[0]} is for pipelines of diffusers; name one with --pipeline" in capsys.readouterr().err
