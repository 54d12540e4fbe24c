"""Test noises may have prompts of their own, which no learning sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tiny_families import family
from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config, TeacherOptions
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.records import EvaluateOptions
from ts_adapt.jobs import plan
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.storage.files import read_tensors


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("prompts")
    family("sd15")[0].save_pretrained(folder / "model")
    (folder / "seen.txt").write_text("a cat\n")
    (folder / "unseen.txt").write_text("the big dog\na red house\n")
    teacher = TeacherOptions(
        solver="ddim", nfe=2, train_samples=3, test_samples=3, batch_size=3,
        prompts=str(folder / "seen.txt"), test_prompts=str(folder / "unseen.txt"),
    )  # fmt: skip
    config = Config(
        name="prompts", model=ModelOptions(name=str(folder / "model")), teacher=teacher, distance="l2",
        evaluate=EvaluateOptions(samples=3), data_root=str(folder / "data"), log_root=str(folder / "logs"),
    )  # fmt: skip
    session = Session(config, progress=False)
    teach(session)
    return session


@pytest.mark.parametrize(
    ("split", "prompts"), [("train", ["a cat"] * 3), ("test", ["the big dog", "a red house", "the big dog"])]
)
def test_each_split_has_its_own_prompts(session: Session, split: str, prompts: list[str]) -> None:
    _, batch = session.teacher(split)
    encode = session.denoiser.encode
    assert encode is not None
    for name, expected in encode(prompts).items():
        torch.testing.assert_close(batch.condition[name], expected)


def test_a_file_that_is_not_there_is_named_before_any_work(session: Session) -> None:
    other = session.changed(teacher=replace(session.config.teacher, test_prompts="nowhere.txt"))
    with pytest.raises(TsAdaptError, match=r"nowhere\.txt"):
        other.check()


@pytest.mark.parametrize("trajectory", [False, True])
def test_the_plan_says_what_the_samples_take_on_the_disk(session: Session, trajectory: bool) -> None:
    teacher = replace(session.config.teacher, trajectory=trajectory)
    own = Session(replace(session.config, teacher=teacher, name=f"disk-{trajectory}"), progress=False)
    teach(own)
    kept = 0
    for split in ("train", "test"):
        for path in own.workspace.teacher(split).glob("*.safetensors"):
            tensors = read_tensors(path)
            kept += sum(value.nbytes for name, value in tensors.items() if name not in ("index", "prompt_index"))
    assert kept == plan.disk(own)


def test_without_such_a_file_test_noises_have_the_same_prompts() -> None:
    options = TeacherOptions(prompts="prompts.txt")
    assert [options.prompts_of(split) for split in ("train", "test")] == ["prompts.txt"] * 2
