"""quantize: what it leaves, training that is interrupted, the images that are trained on, and who reads the result."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from small_job import real_images
from ts_adapt import distributed
from ts_adapt.assembly import StudentOptions
from ts_adapt.cli import main
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import read_image
from ts_adapt.jobs.cheaper_network import Impossible, cheaper_network, key_of
from ts_adapt.jobs.quantize import quantize
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.jobs.training_data import training_data
from ts_adapt.quantizers import storage, training
from ts_adapt.quantizers.layers.activations import TableActivation
from ts_adapt.quantizers.layers.weights import AffineWeight
from ts_adapt.quantizers.methods import tdq
from ts_adapt.quantizers.quantization import is_quantized, quantized_layers, size_of
from ts_adapt.storage.files import read_json, read_tensors, write_tensors

QAT = "tdq-w4a8+qat"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictors of scales are fitted in fewer steps."""
    monkeypatch.setattr(tdq, "FIT_STEPS", 3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images of the model's size."""
    return real_images(tmp_path / "images", 6)


def session_in(folder: Path, images: Path | None = None, **options: Any) -> Session:
    config = Config(name="q", data_root=str(folder / "data"), log_root=str(folder / "logs"), **options)
    config.teacher.nfe = 4
    config.calibration.noises, config.calibration.nfe, config.calibration.count = 2, 3, 4
    config.qat.steps, config.qat.batch_size, config.qat.checkpoint_every, config.qat.lr = 3, 2, 1, 1e-3
    config.qat.data = config.qat.data if images is None else str(images)
    config.validate()
    return Session(config, progress=False)


def network_of(session: Session) -> Any:
    return session.denoiser.network  # type: ignore[attr-defined]


def only(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return found


def test_a_quantizer_leaves_files_and_a_report_and_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_in(tmp_path)
    before = {name: id(module) for name, module in network_of(session).named_modules()}
    quantize(session, "hqq4")
    assert {name: id(module) for name, module in network_of(session).named_modules()} == before
    folder = only(session.workspace.data / "quantizers")
    names = ["config.json", "layers.csv", "layers.json", "layers.png", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with open(folder / "layers.csv") as file:
        lines = list(csv.DictReader(file))
    layers = read_json(folder / "layers.json")["layers"]
    assert {line["name"] for line in lines} == {layer["name"] for layer in layers}
    assert all(len(layer["timesteps"]) == 3 for layer in layers if layer["reason"] is None)
    assert "hqq4: 4.5" in capsys.readouterr().out
    monkeypatch.setattr("ts_adapt.jobs.cheaper_network.quantize_anew", lambda *_, **__: pytest.fail("quantized again"))
    with cheaper_network(session, StudentOptions(quantizer="hqq4")):
        assert is_quantized(network_of(session))
    quantize(session, "hqq4")
    assert "was there already" in capsys.readouterr().out


def test_of_two_at_once_one_keeps_it_and_the_other_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins when the first is about to write, with its temporary file there already."""
    first, second = session_in(tmp_path), session_in(tmp_path)
    x, t = torch.zeros(1, 1, 28, 28), torch.tensor([300.0])
    save, said = storage.save, []

    def saving(network: Any, folder: Path) -> None:
        monkeypatch.setattr(storage, "save", lambda *_: pytest.fail("written by two"))
        begun = folder / ".model.safetensors.0123abcd.tmp"
        write_tensors(begun, {})
        with cheaper_network(second, StudentOptions(quantizer="hqq4")):
            assert is_quantized(network_of(second))
            said.append(network_of(second)(x, t).sample)
        with pytest.raises(TsAdaptError, match="in use by another process"):
            quantize(second, "hqq4")
        assert not is_quantized(network_of(second)) and begun.exists()
        begun.unlink()
        save(network, folder)

    monkeypatch.setattr(storage, "save", saving)
    with cheaper_network(first, StudentOptions(quantizer="hqq4")):
        said.append(network_of(first)(x, t).sample)
    folder = only(first.workspace.data / "quantizers")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    monkeypatch.setattr("ts_adapt.jobs.cheaper_network.quantize_anew", lambda *_, **__: pytest.fail("quantized again"))
    with cheaper_network(second, StudentOptions(quantizer="hqq4")):
        said.append(network_of(second)(x, t).sample)
    assert torch.equal(said[0], said[1]) and torch.equal(said[1], said[2])


def test_what_another_made_before_the_lock_was_had_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = session_in(tmp_path), session_in(tmp_path)
    held = distributed.held

    def late(lock: Any) -> Any:
        monkeypatch.setattr(distributed, "held", held)
        with cheaper_network(first, StudentOptions(quantizer="hqq4")):
            pass
        monkeypatch.setattr(
            "ts_adapt.jobs.cheaper_network.quantize_anew", lambda *_, **__: pytest.fail("quantized again")
        )
        return held(lock)

    monkeypatch.setattr(distributed, "held", late)
    with cheaper_network(second, StudentOptions(quantizer="hqq4")):
        assert is_quantized(network_of(second))


def test_a_quantization_that_is_made_again_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in(tmp_path)
    quantize(session, "hqq4")
    folder = only(session.workspace.data / "quantizers")
    before, write = {path.name: path.read_bytes() for path in folder.iterdir()}, storage.write_json

    def interrupted(path: Path, value: Any) -> None:
        monkeypatch.setattr(storage, "write_json", write)
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(session, "hqq4", redo=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not is_quantized(network_of(session))
    quantize(session, "hqq4", redo=True)
    assert only(session.workspace.data / "quantizers") == folder
    assert {path.name for path in folder.iterdir()} == before.keys()


def test_a_quantization_made_anew_with_another_result_has_runs_of_its_own(tmp_path: Path) -> None:
    """The first one, and the same once more, have the runs of before."""
    session = session_in(tmp_path)

    def key() -> tuple[Any, ...]:
        return key_of(session, StudentOptions(quantizer="hqq4"))

    before = key()
    with cheaper_network(session, StudentOptions(quantizer="hqq4")):
        assert key() == before
    quantize(session, "hqq4", redo=True)
    assert key() == before
    tensors = only(session.workspace.data / "quantizers") / "model.safetensors"
    write_tensors(tensors, {name: tensor + tensor for name, tensor in read_tensors(tensors).items()})
    quantize(session, "hqq4", redo=True)
    redone = key()
    assert redone != before
    quantize(session, "hqq4")
    assert key() == redone
    quantize(session, "hqq4", redo=True)
    assert key() == redone


def test_training_ends_in_codes_and_tables_and_is_asked_for_where_it_is_missing(tmp_path: Path, images: Path) -> None:
    session = session_in(tmp_path, images, quantizers=["none", QAT])
    session.config.qat.loss = "teacher"
    with pytest.raises(
        Impossible, match=f"{QAT.replace('+', '.')} is not trained yet; train it with `ts-adapt quantize"
    ):
        cheaper_network(session, StudentOptions(quantizer=QAT)).__enter__()
    quantize(session)
    folder = only(session.workspace.data / "quantizers")
    assert list((session.workspace.logs / "tensorboard" / "quantize" / QAT).rglob("events.out.tfevents*"))
    with cheaper_network(session, StudentOptions(quantizer=QAT)):
        layers = [layer for _, layer in quantized_layers(network_of(session))]
        assert all(isinstance(layer.stored, AffineWeight) for layer in layers)
        assert all(isinstance(layer.activation, TableActivation) for layer in layers)
        assert 4 < size_of(network_of(session)).bits < 4.2
        assert not any(p.requires_grad for p in network_of(session).parameters())
    session.config.qat.steps = 4
    with pytest.raises(Impossible, match="is not trained yet"):
        cheaper_network(session, StudentOptions(quantizer=QAT)).__enter__()
    assert folder.exists()


def test_a_training_that_was_interrupted_ends_where_it_would_have(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def codes(folder: Path) -> dict[str, torch.Tensor]:
        return read_tensors(only(folder / "data/q/quantizers") / "model.safetensors")

    quantize(session_in(tmp_path / "whole", images), QAT)
    fine_tune, steps = training.fine_tune, []

    def broken(network: Any, batches: Any, *rest: Any, **named: Any) -> Any:
        def batch(number: int) -> Any:
            if number == 2:
                raise KeyboardInterrupt
            steps.append(number)
            return batches(number)

        return fine_tune(network, batch, *rest, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ts_adapt.jobs.quantize.fine_tune", broken)
        quantize(session_in(tmp_path / "broken", images), QAT)
    assert steps == [0, 1] and only(tmp_path / "broken/data/q/quantizers").name.endswith(".training")
    quantize(session_in(tmp_path / "broken", images), QAT)
    straight, resumed = codes(tmp_path / "whole"), codes(tmp_path / "broken")
    assert straight.keys() == resumed.keys() and all(torch.equal(v, resumed[k]) for k, v in straight.items())


def test_images_come_from_a_folder_or_the_training_set(tmp_path: Path, images: Path, installed_images: Any) -> None:
    x, condition = training_data(session_in(tmp_path, images))
    assert x.shape == (6, 1, 28, 28) and float(x.min()) == -1 and condition == {}
    session = session_in(tmp_path)
    session.config.model.name, session.config.qat.images = "fashion-ddpm-class", 500
    session = Session(session.config, progress=False)
    _, condition = training_data(session)
    assert len(condition["class_labels"]) == 500 and set(condition["class_labels"].tolist()) == set(range(10))
    loss = training.diffusion_loss(session.denoiser)  # type: ignore[arg-type]
    batch = training.image_batches(training_data(session)[0], 4, condition=condition)(0)
    assert bool(torch.isfinite(loss(network_of(session), batch, torch.Generator())))


def test_images_that_cannot_be_trained_on_are_explained(tmp_path: Path, images: Path) -> None:
    with pytest.raises(TsAdaptError, match="holds no images"):
        training_data(session_in(tmp_path, tmp_path / "nowhere"))
    Image.new("L", (20, 28)).save(images / "3.png")
    with pytest.raises(TsAdaptError, match=r"3\.png is of \(1, 28, 20\), the model's samples are of \(1, 28, 28\)"):
        training_data(session_in(tmp_path, images))
    session = session_in(tmp_path, images)
    session.denoiser.decoder = torch.nn.Identity()  # type: ignore[attr-defined]
    with pytest.raises(TsAdaptError, match="train it on the teacher's samples"):
        training_data(session)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red fish\na green hat\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Five pictures of emoji-sd's size, with a text of each."""
    folder = tmp_path / "coloured"
    folder.mkdir()
    texts = ["file_name,text"]
    for number in range(5):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste((40 * number, 90, 200), (12, 12, 52, 52))
        picture.save(folder / f"{number}.png")
        texts.append(f"{number}.png,a blue {'fish' if number % 2 else 'hat'}")
    (folder / "metadata.csv").write_text("\n".join(texts))
    return folder


def test_a_guided_model_of_latents_and_texts_is_trained_on_captioned_images(
    tmp_path: Path, prompts: Path, coloured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_in(tmp_path, coloured, guidance=3.0)
    session.config.model.name, session.config.teacher.prompts = "emoji-sd", str(prompts)
    session.config.qat.norm, session.config.qat.ema, session.config.qat.warm_up = "l1", 0.9, 1
    session.config.qat.dropout = 0.5
    denoiser = session.denoiser.denoiser  # type: ignore[attr-defined]
    x0, condition = training_data(session)
    texts = ["a blue hat", "a blue fish"]
    assert torch.allclose(condition["encoder_hidden_states"][:2], denoiser.encode(texts)["encoder_hidden_states"])
    pictures = torch.cat([read_image(coloured / f"{number}.png") for number in range(5)])
    assert float((denoiser.decode(x0) - pictures).square().mean()) < 0.1 * float(pictures.var())
    monkeypatch.setattr(type(denoiser.decoder), "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(training_data(session)[0], x0)
    shown = []

    def seen(network: Any, batches: Any, *rest: Any, **named: Any) -> Any:
        shown.extend(batches(number).condition["encoder_hidden_states"] for number in range(20))
        return training.fine_tune(network, batches, *rest, **named)

    monkeypatch.setattr("ts_adapt.jobs.quantize.fine_tune", seen)
    quantize(session, QAT)
    null = denoiser.null_condition["encoder_hidden_states"]
    without = torch.cat([(rows == null).all((1, 2)) for rows in shown]).double().mean()
    assert 0.2 < float(without) < 0.8
    with cheaper_network(session, StudentOptions(quantizer=QAT)):
        x = torch.zeros(2, *session.shape)
        assert bool(torch.isfinite(session.denoiser(x, torch.tensor(500.0), **denoiser.encode(texts))).all())
    (coloured / "metadata.csv").write_text("file_name,text\n0.png,a hat")
    with pytest.raises(TsAdaptError, match=r"metadata\.csv has no text of 1\.png"):
        training_data(session)
    (coloured / "metadata.csv").unlink()
    untold = training_data(session)[1]["encoder_hidden_states"]
    assert torch.equal(untold, null.expand_as(untold))


def test_labels_of_a_folder_are_the_classes_of_a_model(tmp_path: Path, images: Path) -> None:
    session = session_in(tmp_path, images)
    session.config.model.name = "fashion-ddpm-class"
    assert set(training_data(session)[1]["class_labels"].tolist()) == {10}
    rows = [f"{number}.png,{number + 3}" for number in range(6)]
    (images / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert training_data(session)[1]["class_labels"].tolist() == [3, 4, 5, 6, 7, 8]
    (images / "metadata.csv").write_text("\n".join(["file_name,label", *rows[:5], "5.png,11"]))
    with pytest.raises(TsAdaptError, match="label '11'; this model has classes 0 to 9"):
        training_data(session)


def test_a_pipeline_that_runs_its_own_loop_is_trained_on_the_teachers_samples(tmp_path: Path, prompts: Path) -> None:
    session = session_in(tmp_path)
    session.config.model.name, session.config.teacher.prompts = "emoji-sd3", str(prompts)
    session.config.model.call = {"guidance_scale": 2.0}
    session.config.teacher.train_samples, session.config.teacher.nfe = 4, 2
    session.config.qat.data, session.config.qat.steps = "teacher", 2
    teach(session, ["train"])
    x0, condition = training_data(session)
    kept = session.teacher("train")[1]
    assert torch.equal(x0, kept.target) and condition.keys() == kept.condition.keys()
    with pytest.raises(TsAdaptError, match="known to its pipeline alone"):
        quantize(session, QAT)
    session.config.qat.loss = "teacher"
    quantize(session, QAT)
    with cheaper_network(session, StudentOptions(quantizer=QAT)):
        assert is_quantized(network_of(session))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "no quantizer is asked for; name one with --quantizer"),
        (["--quantizer", "hqqq4"], "did you mean 'hqq4'"),
        (["--quantizer", "hqq4", "--model.name", "gaussian-mixture"], "has no network to quantize"),
    ],
)
def test_bad_requests_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert main(["quantize", "--quiet", "--data_root", str(tmp_path), "--log_root", str(tmp_path), *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message and "\n" not in message
