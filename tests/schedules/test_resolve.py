"""Every form of name x every command: all give the schedule that it means, or refuse it in the same words."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ts_adapt import LearnedGrid, LearnedScheduler, TimeGrid, TsAdaptError, build_grid, initial_noise, integrate, zoo
from ts_adapt.assembly import ModelOptions
from ts_adapt.config import Config
from ts_adapt.errors import TsAdaptWarning
from ts_adapt.grids.between import grid_between
from ts_adapt.interfaces import StepPolicy
from ts_adapt.jobs import runs
from ts_adapt.jobs.export import export_schedule
from ts_adapt.jobs.export_scheduler import export_scheduler
from ts_adapt.jobs.import_schedule import import_schedule
from ts_adapt.jobs.prune import prune
from ts_adapt.jobs.sample import sample_to_folder
from ts_adapt.jobs.sample_pipeline import Request, sample_pipeline
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.teach import teach
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import save_predictor
from ts_adapt.schedules.formats import WRITERS
from ts_adapt.search.objective import Objective

SOLVER, NFE, SHAPE = "unipc-2", 4, (1, 8, 8)


@dataclass(frozen=True)
class World:
    """A workspace with a schedule behind every form of name, and what each of these means."""

    folder: Path
    session: Session
    meanings: dict[str, TimeGrid | StepPolicy]
    static: TimeGrid

    def images(self, schedule: TimeGrid | StepPolicy) -> Tensor:
        """Two images of the model along `schedule`, in levels of 0 to 255."""
        with torch.inference_mode():
            x_T, solver = initial_noise(1, range(2), SHAPE), self.session.solver(SOLVER)
            x = integrate(self.session.denoiser, solver, schedule, x_T).x
            return (self.session.denoiser.decode(x).float().clamp(-1, 1) + 1) * 127.5

    def standing(self, name: str) -> TimeGrid:
        """The grid that is exported of a name: of a predictor the one that it corrects."""
        meaning = self.meanings[name]
        return meaning if isinstance(meaning, TimeGrid) else self.static


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("names")
    tiny.pipeline("ddpm").save_pretrained(folder / "model")
    config = Config(
        name="w", model=ModelOptions(str(folder / "model")), solvers=[SOLVER], nfe=[NFE], distance="l2",
        rescale_published=True, data_root=str(folder / "data"), log_root=str(folder / "logs"),
    )  # fmt: skip
    config.teacher = replace(config.teacher, nfe=4, train_samples=2, test_samples=2, shard_size=2, batch_size=2)
    config.prune = replace(config.prune, samples=2)
    config.train = replace(config.train, corrections=[])
    session = Session(config, progress=False)
    teach(session)
    noise_schedule, workspace = session.noise_schedule, config.workspace
    origin = {"model": config.model.name, "teacher": session.teacher("train")[0].hash, "distance": "l2"}
    static = TimeGrid(tiny.static_times(noise_schedule, NFE))
    corrected = replace(static, model_times=static.times[:-1] * 0.97, output_scale=torch.full((NFE,), 1.1).double())
    learned = {
        "static": static,
        "static+shift+scale": corrected,
        "dmn": TimeGrid(static.times.sqrt() * noise_schedule.t_max**0.5),
    }
    for name, grid in learned.items():
        LearnedGrid(grid, SOLVER, NFE, {**origin, "made_with": config.made_with(name)}).save(
            workspace.shared(name, SOLVER, NFE), noise_schedule
        )
    file = LearnedGrid(corrected, SOLVER, NFE)
    for path in (folder / "mine.json", folder / "mine"):
        file.save(path, noise_schedule)
    one_shot = tiny.predictor(OneShot, noise_schedule, SHAPE)
    recursive = tiny.predictor(Recursive, noise_schedule, SHAPE, NFE, NFE + 1)
    for predictor in (one_shot, recursive):
        predictor.static_times[: NFE + 1] = static.times
    about = {**origin, "base": "static", "solver": SOLVER, "nfe": [NFE], "made_with": config.made_with("one-shot")}
    save_predictor(workspace.predictor("one-shot", SOLVER, NFE), one_shot, about)
    save_predictor(workspace.predictor("recursive-all", SOLVER, NFE), recursive, {**about, "nfe": [NFE, NFE + 1]})
    given = session.denoiser.scheduler_config  # type: ignore[attr-defined]
    LearnedScheduler.from_schedules(file, given).save_pretrained(folder / "grids")
    LearnedScheduler.from_predictors(one_shot, SOLVER, given).save_pretrained(folder / "predicts")
    LearnedScheduler.from_grid("karras+rounded", SOLVER).save_pretrained(folder / "family")
    (folder / "empty").mkdir()

    def fixed(name: str) -> TimeGrid:
        return build_grid(name, noise_schedule, NFE, rescale=True)

    meanings = {
        **{name: fixed(name) for name in ("karras", "karras+native", "ays-sd15+rounded", "log_snr+rounded")},
        **learned,
        "static+scale+shift": corrected,
        "one-shot": one_shot.policy(NFE),
        "recursive-all": recursive.policy(NFE),
        str(workspace.predictor("one-shot", SOLVER, NFE)): one_shot.policy(NFE),
        **{str(folder / name): corrected for name in ("mine.json", "mine", "grids")},
        "of-the-zoo": corrected,
        "owner/name": corrected,
        str(folder / "predicts"): one_shot.policy(NFE),
        str(folder / "family"): fixed("karras+rounded"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "schedules", lambda: {"of-the-zoo": folder / "grids"})
        patch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(folder / "grids"))
        yield World(folder, session, meanings, static)


FORMS = [
    "karras", "karras+native", "ays-sd15+rounded", "log_snr+rounded", "static", "static+shift+scale",
    "static+scale+shift", "dmn", "one-shot", "recursive-all", "data/w/predictors/one-shot/unipc-2-nfe4", "mine.json",
    "mine", "grids", "of-the-zoo", "owner/name", "predicts", "family",
]  # fmt: skip
"""The names of `World.meanings`; paths are below its folder."""
REFUSED = {
    "karas": "unknown schedule 'karas'; did you mean 'karras'",
    "karras+shift": "unknown schedule 'karras+shift'; did you mean 'karras'",
    "karras+corrector": "unknown schedule 'karras+corrector'; did you mean 'karras'",
    "static@hqq4": "give its name alone, static, with that network as --student.pruned and --student.cacher and",
    "oracle+shift": "is for the test samples that were searched, which evaluate compares by itself",
    "no/such.json": "there is no file no/such.json",
    "empty": "holds neither a predictor nor a schedule for diffusers",
}


def written(folder: Path) -> Tensor:
    pictures = [np.array(Image.open(file))[..., 0] for file in sorted((folder / "images").iterdir())]
    return torch.from_numpy(np.stack(pictures))[:, None].float()


def sample(world: World, name: str, out: Path) -> Tensor:
    return written(sample_to_folder(world.session, name, None, None, 2, 1, None, str(out)))


def sample_a_pipeline(world: World, name: str, out: Path) -> Tensor:
    request = Request(str(world.folder / "model"), name, count=2, out=str(out))
    return written(sample_pipeline(world.session.config, request, progress=False))


def pruned(world: World, name: str, out: Path) -> Tensor:
    class Seen(Exception):
        pass

    def student(objective: Objective, policy: Any, batch: Any) -> Tensor:
        raise Seen(policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "student", student)
        with pytest.raises(Seen) as seen:
            prune(world.session, name, out=str(out))
    return world.images(seen.value.args[0])


def exported_to_diffusers(world: World, name: str, out: Path) -> Tensor:
    with redirect_stderr(StringIO()) as warnings:
        schedule = LearnedScheduler.from_pretrained(export_scheduler(world.session.config, name, out=str(out)))
    assert warnings.getvalue() == ""
    assert schedule.config["solver"] == SOLVER
    return world.images(schedule.source.plan(NFE, schedule.noise_schedule).policy(0))


def evaluated(world: World, name: str, out: Path) -> Tensor:
    world.session.config.evaluate.schedules = [name]
    (grid,) = runs.listed(world.session)[SOLVER, NFE].values()
    return world.images(grid)


def exported(kind: str) -> Callable[[World, str, Path], LearnedGrid]:
    def export(world: World, name: str, out: Path) -> LearnedGrid:
        text = export_schedule(world.session.config, name, kind, out=str(out))
        found = LearnedGrid(world.standing(name), SOLVER, NFE)
        if kind == "json":
            return LearnedGrid.load(out, world.session.noise_schedule)
        assert text == WRITERS[kind](found, "", world.session.noise_schedule)[0]
        return found

    return export


SOLVES: dict[str, Callable[[World, str, Path], Tensor]] = {
    "sample": sample, "sample --pipeline": sample_a_pipeline, "prune": pruned, "evaluate": evaluated,
    "export --format diffusers": exported_to_diffusers,
}  # fmt: skip
EXPORTS = {f"export --format {kind}": exported(kind) for kind in ("json", "sigmas", "timesteps")}
COMMANDS: dict[str, Callable[[World, str, Path], Any]] = {**SOLVES, **EXPORTS}


def of_world(world: World, form: str) -> str:
    return str(world.folder / form) if (world.folder / form).exists() else form


def refusal(command: str, form: str) -> str:
    """What `command` says where it takes no such thing."""
    own = form in ("one-shot", "recursive-all", "predicts") or "predictors" in form
    if command == "sample --pipeline" and form in ("static", "dmn", "one-shot", "recursive-all"):
        return f"'{form}' is of a workspace; `ts-adapt export {form} --format diffusers --out FOLDER`"
    if command == "sample --pipeline" and form.startswith("static+"):
        return "'static+shift+scale' is of a workspace"
    if command == "export --format diffusers" and form in ("grids", "of-the-zoo", "owner/name", "predicts", "family"):
        return "is a schedule for diffusers already"
    if command == "evaluate" and (own or form not in ("mine.json", "mine", "grids", "of-the-zoo", "owner/name")):
        return "holds no shared learned grids, one for each NFE"
    return ""


def equal(grid: TimeGrid, other: TimeGrid) -> None:
    torch.testing.assert_close((grid.times, grid.held), (other.times, other.held), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_name_for_the_same_schedule(
    world: World, command: str, form: str, tmp_path: Path
) -> None:
    name, expected = of_world(world, form), refusal(command, form)
    assert name in world.meanings
    if expected:
        with pytest.raises(TsAdaptError) as refused:
            COMMANDS[command](world, name, tmp_path / "out")
        assert expected in str(refused.value)
        return
    found = COMMANDS[command](world, name, tmp_path / "out")
    if isinstance(found, LearnedGrid):
        assert (found.solver, found.nfe) == (SOLVER, NFE)
        equal(found.grid, world.standing(name))
        return
    wanted = world.images(world.meanings[name])
    assert float((found - wanted).abs().max()) <= 1
    assert float((wanted - world.images(build_grid("uniform", world.session.noise_schedule, NFE))).abs().max()) > 2


@pytest.mark.parametrize("form", REFUSED)
def test_what_none_takes_is_refused_in_the_same_words(world: World, form: str, tmp_path: Path) -> None:
    said = set()
    for command in COMMANDS.values():
        with pytest.raises(TsAdaptError) as refused:
            command(world, of_world(world, form), tmp_path / "out")
        said.add(str(refused.value))
    (sentence,) = said
    assert REFUSED[form] in sentence and not list(tmp_path.iterdir())


FOR_ONE = ("mine.json", "mine", "data/w/predictors/one-shot/unipc-2-nfe4", "grids", "predicts")


@pytest.mark.parametrize("form", FOR_ONE)
def test_what_is_for_one_solver_is_taken_for_no_other(world: World, form: str) -> None:
    with pytest.raises(TsAdaptError, match="not for ddim; leave --solver out"):
        sample_to_folder(world.session, of_world(world, form), "ddim", None, 2, 1, None, str(world.folder / "none"))
    with pytest.raises(TsAdaptError, match="not for ddim; leave --solver out"):
        export_schedule(world.session.config, of_world(world, form), "sigmas", "ddim", None)


@pytest.mark.parametrize("form", [form for form in FOR_ONE if "predict" not in form])
def test_a_grid_of_one_number_of_steps_is_interpolated_for_others(world: World, form: str, tmp_path: Path) -> None:
    name = of_world(world, form)
    with pytest.warns(TsAdaptWarning, match="3"):
        found = written(sample_to_folder(world.session, name, SOLVER, 3, 2, 1, None, str(tmp_path / "out")))
    grid = grid_between({NFE: world.standing(name)}, world.session.noise_schedule, 3)
    assert float((found - world.images(grid)).abs().max()) <= 1


@pytest.mark.parametrize(
    ("form", "nfe", "message"),
    [
        *((form, 3, "3") for form in FOR_ONE if "predict" in form),
        *((form, 2 * NFE + 1, "more than 2 times") for form in ("mine.json", "mine")),
        ("recursive-all", 40, r"export recursive-all .*--steps 40"),
    ],
)
def test_a_number_of_steps_that_is_not_served_is_refused(world: World, form: str, nfe: int, message: str) -> None:
    with pytest.raises(TsAdaptError, match=message):
        sample_to_folder(world.session, of_world(world, form), SOLVER, nfe, 2, 1, None, str(world.folder / "none"))


def test_import_reads_files_and_nothing_else(world: World, tmp_path: Path) -> None:
    for form in FORMS:
        name = of_world(world, form)
        if form.startswith("mine"):
            found = import_schedule(world.session.config, name, out=str(tmp_path / "out.json"))
            equal(found.grid, world.meanings[name])
        else:
            with pytest.raises((TsAdaptError, IsADirectoryError), match=r"there is no file|directory"):
                import_schedule(world.session.config, name)


def test_a_word_is_taken_before_a_folder_of_its_name(world: World, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.folder / "grids", tmp_path / "karras")
    for name, expected in (("karras", "karras"), ("./karras", str(world.folder / "mine"))):
        export_schedule(world.session.config, name, "json", out=str(tmp_path / "a.json"))
        found = LearnedGrid.load(tmp_path / "a.json")
        torch.testing.assert_close(found.grid.times, world.standing(expected).times, rtol=0, atol=0)
