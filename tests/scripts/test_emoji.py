"""Every training on a dozen pictures that are made up: it goes on as if it had not been killed, and what it writes
makes pictures."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from emoji import autoencoder, captions, data, judges, making, matching, packages, sd, sd3, sheet, text
from emoji.__main__ import main
from emoji.data import Data, Entry
from training import Plan
from ts_adapt.errors import TsAdaptError
from ts_adapt.storage.files import read_tensors
from ts_adapt.zoo.data import to_model_range
from ts_adapt.zoo.networks import DualEncoder

PICTURES = 24
WIDTHS = (8, 8, 16)


@pytest.fixture(scope="module")
def made_up() -> Data:
    """Discs of one colour each, every fourth held out."""
    across = torch.arange(64) - 31.5
    disc = (across[:, None] ** 2 + across**2) < 500
    colours = torch.rand(PICTURES, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    pictures = torch.where(disc, colours, torch.ones(())) * 255
    entries = []
    for number in range(PICTURES):
        style, name, tones = ("noto", "fluent")[number % 2], f"disc {number // 4}", [1 + number % 5]
        entries.append(Entry(captions.caption(style, name, tones), style, name, tones, number % 10, number % 4 == 3))
    return Data(pictures.byte(), entries)


@pytest.fixture(scope="module")
def vae(made_up: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder")
    autoencoder.train_autoencoder(made_up, plan(out), WIDTHS)
    return out / "vae"


def plan(out: Path, steps: int = 2) -> Plan:
    return Plan(out, images=4 * steps, batch=4, peak=1e-3, every=1)


class KilledError(Exception):
    """In the place of a signal."""


TRAININGS = {
    "autoencoder": lambda made_up, vae, plan: autoencoder.train_autoencoder(made_up, plan, WIDTHS),
    "sd": lambda made_up, vae, plan: sd.train_sd(made_up, vae, plan, (16, 32)),
    "sd3": lambda made_up, vae, plan: sd3.train_sd3(made_up, vae, plan, layers=2),
    "distance": lambda made_up, vae, plan: judges.train_distance(made_up, plan),
    "judge": lambda made_up, vae, plan: judges.train_judge(made_up, plan),
    "matching": lambda made_up, vae, plan: matching.train_matching(made_up, plan),
}


@pytest.fixture(scope="module")
def trained(made_up: Data, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each training of two steps, gone through at once."""
    folders = {name: tmp_path_factory.mktemp(name) for name in TRAININGS}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(judges, "RARE", 1)
        for name, training in TRAININGS.items():
            training(made_up, vae, plan(folders[name]))
    return folders


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_was_killed_ends_where_it_would_have_ended(
    name: str, made_up: Data, vae: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judges, "RARE", 1)
    clip, calls = torch.nn.utils.clip_grad_norm_, iter(range(10))

    def killed_in_the_second_step(*given: Any) -> Tensor:
        if next(calls) == 1:
            raise KilledError
        return clip(*given)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", killed_in_the_second_step)
    with pytest.raises(KilledError):
        TRAININGS[name](made_up, vae, plan(tmp_path))
    TRAININGS[name](made_up, vae, plan(tmp_path))
    gone_on, at_once = (read_tensors(folder / "checkpoint.safetensors") for folder in (tmp_path, trained[name]))
    assert gone_on.keys() == at_once.keys()
    for key in gone_on.keys() - {"progress/seconds"}:
        torch.testing.assert_close(gone_on[key], at_once[key], rtol=0, atol=0, msg=key)
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


def test_the_checkpoint_of_another_training_is_refused(
    made_up: Data, vae: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    autoencoder.train_autoencoder(made_up, plan(tmp_path, steps=1), WIDTHS)
    with pytest.raises(TsAdaptError, match="channels"):
        sd.train_sd(made_up, vae, plan(trained["sd"], steps=3), (16, 16))
    with pytest.raises(TsAdaptError, match="autoencoder"):
        sd3.train_sd3(made_up, tmp_path / "vae", plan(trained["sd3"], steps=3), layers=2)


@pytest.mark.parametrize(
    ("name", "options"), [("sd", {}), ("sd3", {"text_encoder_3": None, "tokenizer_3": None})]
)  # fmt: skip
def test_a_pipeline_makes_pictures_of_prompts(name: str, options: Any, trained: dict[str, Path]) -> None:
    pipe = DiffusionPipeline.from_pretrained(trained[name] / "pipeline", **options)
    made = [
        pipe(prompt, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for prompt in ("noto disc 1", "fluent disc 2", "noto disc 1")
    ]
    assert made[0].shape == (1, 64, 64, 3) and (made[0] == made[2]).all() and (made[0] != made[1]).any()
    weights = list((trained[name] / "pipeline").rglob("*.safetensors"))
    assert weights and all(
        value.dtype in (torch.float16, torch.int64) for path in weights for value in read_tensors(path).values()
    )


def test_what_is_trained_is_what_the_pipelines_compute(made_up: Data, vae: Path, tmp_path: Path) -> None:
    """In float16, and for as many zeros in the place of a T5's tokens as are asked for."""
    torch.manual_seed(0)
    tokenizer, z = text.tokenizer_of(made_up.captions), torch.randn(2, 4, 16, 16)
    prompts, t = made_up.captions[:2], torch.tensor([30.0, 700.0])
    tokens = text.tokens(tokenizer, prompts)
    with torch.no_grad():
        net = sd.Networks(tokenizer, (16, 32)).half().float()
        sd.write_pipeline(net, tokenizer, vae, tmp_path / "sd")
        pipe = making.load(tmp_path / "sd")
        of = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)[0]
        torch.testing.assert_close(pipe.unet(z, t, of).sample, net(z, t, tokens), rtol=1e-4, atol=1e-4)
        net = sd3.Networks(tokenizer, layers=2)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        net = net.half().float().eval()
        sd3.write_pipeline(net, tokenizer, vae, tmp_path / "sd3")
        pipe = making.load(tmp_path / "sd3")
        for count, asked in ((sd3.ZEROS, {}), (5, {"max_sequence_length": 5})):
            of = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **asked)
            found = pipe.transformer(z, of[0], of[2], t).sample
            wanted = net(z, t, tokens, torch.full((2,), float(count)))
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_the_commands_lead_from_pictures_to_a_sheet(made_up: Data, tmp_path: Path) -> None:
    data.save(made_up, tmp_path)
    of, few = ["--folder", str(tmp_path)], ["--images", "4", "--batch", "2", "--every", "9"]
    for what in ("autoencoder", "sd3"):
        main([what, *of, *few])
    main(["sheet", *of, "--of", "sd3", "--count", "2", "--steps", "1", "--out", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as page:
        assert page.height == 64
    with pytest.raises(SystemExit, match=r"pictures\.safetensors"):
        main(["sd", "--folder", str(tmp_path / "elsewhere")])


def test_zeros_that_stand_for_many_are_worth_as_many(made_up: Data) -> None:
    torch.manual_seed(0)
    net = sd3.Networks(text.tokenizer_of(made_up.captions), layers=2).transformer.eval()
    z, prompts, pooled, t = (
        torch.randn(2, 4, 16, 16),
        torch.randn(2, 16, 192),
        torch.randn(2, 192),
        torch.tensor([3, 700]),
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for count in (1, 40):
        wanted = net(z, torch.cat([prompts, torch.zeros(2, count, 192)], 1), pooled, t).sample
        with sd3.Repeated(torch.full((2,), float(count))):
            found = net(z, torch.cat([prompts, torch.zeros(2, 1, 192)], 1), pooled, t).sample
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_latents_are_standardised_and_pictures_stay_what_they_were(made_up: Data) -> None:
    torch.manual_seed(0)
    net = autoencoder.network(WIDTHS).eval()
    x = to_model_range(made_up.pictures)
    with torch.no_grad():
        net.quant_conv.bias += torch.arange(8.0) - 4
        before = net.decode(net.encode(x).latent_dist.mode()).sample
        autoencoder.standardise(net, made_up.pictures)
        after = net.decode(net.encode(x).latent_dist.mode()).sample
    mean, variance = autoencoder.posterior(net, made_up.pictures)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    spread = mean.var((0, 2, 3), correction=0) + variance.mean((0, 2, 3))
    torch.testing.assert_close(spread, torch.ones(4), rtol=1e-3, atol=0)


def test_words_of_captions_are_one_token_and_anything_can_be_written(made_up: Data) -> None:
    tokenizer = text.tokenizer_of(made_up.captions)
    assert tokenizer.tokenize("fluent disc with medium light") == [
        f"{word}</w>" for word in ("fluent", "disc", "with", "medium", "light")
    ]
    assert tokenizer.unk_token not in tokenizer.tokenize("zebra: ½ é 漢 \N{GRINNING FACE}")
    found = text.tokens(tokenizer, ["fluent disc", ""])
    assert found.shape == (2, text.LENGTH)
    assert found[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (text.LENGTH - 1)
    assert found.max() == tokenizer.eos_token_id == len(tokenizer) - 1


def test_a_caption_scores_the_same_beside_longer_ones() -> None:
    torch.manual_seed(0)
    net = DualEncoder(["a", "b", "c", "d"])
    alone, beside = (net.captions(net.numbers(of))[0] for of in (["a b"], ["a b", "a b c d a b"]))
    torch.testing.assert_close(alone, beside)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("kiss: woman, man", "kiss woman man"),
        ("flag: São Tomé & Príncipe", "flag sao tome and principe"),
        ("keycap: *", "keycap asterisk"),
        ("man\u2019s shoe", "mans shoe"),
    ],
)
def test_names_are_plain_words(label: str, said: str) -> None:
    assert captions.words(label) == said


def test_tones_are_said_at_the_end() -> None:
    names = [
        {"label": "person", "hexcode": "1F9D1", "group": 1, "skins": [
            {"label": "person: dark skin tone", "hexcode": "1F9D1-1F3FF", "tone": 5},
            {"label": "person: ...", "hexcode": "1F9D1-1F3FB-1F3FC-FE0F", "tone": [1, 2]},
        ]},
    ]  # fmt: skip
    found = captions.things(names)
    assert [captions.caption("noto", thing.name, thing.tones) for thing in found.values()] == [
        "noto person", "noto person with dark skin tone", "noto person with light and medium light skin tones",
    ]  # fmt: skip
    assert captions.code_points("1f9d1-1f3fb-1f3fc") in found


def test_what_is_held_out_depends_on_the_seed_alone_and_leaves_something_of_every_name() -> None:
    combinations = [
        (style, captions.Thing(f"thing {number}", tones, 1))
        for number in range(400) for style in ("noto", "fluent") for tones in ((), (1,), (2,))
    ]  # fmt: skip
    held = data.held_out(combinations, 0)
    assert held == data.held_out(combinations, 0) != data.held_out(combinations, 1)
    assert 0.035 < sum(held) / len(held) < 0.065
    assert {thing.name for (_, thing), out in zip(combinations, held, strict=True) if not out} == {
        thing.name for _, thing in combinations
    }
    assert held[::-1] == data.held_out(combinations[::-1], 0)


def test_the_set_is_made_from_archives_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [{"label": "red heart", "hexcode": "2764", "group": 0}, {"label": "cat", "hexcode": "1F408", "group": 3}]
    contents = {
        packages.NAMES: {"package/en/data.json": json.dumps(names).encode()},
        packages.NOTO: {"package/img/google/64/2764-fe0f.png": drawn("red", (64, 64))},
        packages.FLUENT: {
            "package/assets/1f408.webp": drawn("blue", (32, 64)),
            "package/assets/1f999.webp": drawn("blue", (64, 64)),
        },
    }
    (tmp_path / "packages").mkdir()
    for package, files in contents.items():
        with tarfile.open(tmp_path / "packages" / package.archive, "w:gz") as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    with pytest.raises(TsAdaptError, match="sha512"):
        data.build(tmp_path, 0)
    monkeypatch.setattr(data, "fetched", lambda package, folder: folder / package.archive)
    data.build(tmp_path, 0)
    found = data.load(tmp_path)
    assert found.captions == ["noto red heart", "fluent cat"]
    assert found.pictures[0, :, 32, 32].tolist() == [255, 0, 0]
    assert found.pictures[1, :, 32, 2].tolist() == [255] * 3 and found.pictures[1, :, 32, 32].tolist() == [0, 0, 255]


def drawn(colour: str, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", size, colour).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_sheet_has_pairs(name: str, made_up: Data, trained: dict[str, Path]) -> None:
    page = sheet.sheet(made_up, trained[name] / "pipeline", count=3, steps=1, guidance=4.0, seed=0)
    assert page.size == (8 * (2 * 64 + 4) - 4, 64)
    real = made_up.part(True).pictures[0, :, 32, 32].tolist()
    assert list(page.getpixel((32, 32))) == real
