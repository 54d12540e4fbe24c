"""The commands of ts-adapt: a class each, with its flags as fields, what its help says, and what it runs.

The first paragraph of a class's docstring and what follows is the description in its help. Jobs are imported by the
commands that run them, so that options are read, and help is given, without their libraries.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from inspect import cleandoc
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_origin

from jsonargparse import set_parsing_settings

from ts_adapt import distributed
from ts_adapt._version import __version__
from ts_adapt.errors import TsAdaptError
from ts_adapt.options import SMALL, Between, Count, Evaluations, OneOf, PathText, Seed, hints_of, taken_apart
from ts_adapt.parsing import HELP_ALL, Help, Parser, flag_of
from ts_adapt.predictors.store import PREDICTOR_NAMES

if TYPE_CHECKING:
    from ts_adapt.config import Config
    from ts_adapt.jobs.session import Session

DESCRIPTION = """Learned schedules for few-step diffusion sampling.

A config of your model, and one command that makes everything; interrupted, it goes on where it was:
  ts-adapt learn    --plan --config configs/fashion.yml                what it takes, without starting
  ts-adapt learn    --config configs/fashion.yml                       teach, static, recursive, evaluate
  ts-adapt sample   --config configs/fashion.yml --schedule recursive  images
What to learn: recursive first, it gains most; one-shot where the sampling loop cannot be touched; static for exports to
other programs. `ts-adapt demo` is `learn` in small, without a config. One by one, between `teach` and `evaluate`:
  ts-adapt search   --config configs/fashion.yml --method static        one grid for all samples
  ts-adapt train    --config configs/fashion.yml --predictor recursive  times that follow the sample
To and from ComfyUI, stable-diffusion.cpp, diffusers, ...:
  ts-adapt export   train_data/fashion/static/unipc-3-nfe5.json --format sigmas
  ts-adapt import   sigmas.txt --format sigmas --model.name fashion-ddpm --solver unipc-3 --out imported.json
  ts-adapt export   static --config configs/fashion.yml --format diffusers --out fashion-static
  ts-adapt sample   --pipeline fashion-ddpm --schedule fashion-static --count 64
The least config is `name: mine` and `model: {name: FOLDER_OR_HUB_ID}`, a line each; `ts-adapt learn
--help-all` lists what else may stand in it, and is a flag as well. `ts-adapt COMMAND --help` is about a command."""
OPTIONS = """Options of the config: a line `nfe: [3, 5]` or a group `teacher: {nfe: 40}` of its YAML file is --nfe 3,5
and --teacher.nfe 40 here"""
REDO = "replace what was made with other options, or does not fit any more, once the new one is complete"


def flag(default: Any, said: str, **how: Any) -> Any:
    """A flag of a command: what it is where it is not given, what help says of it, and how argparse takes it."""
    return field(default=default, metadata={"help": said, **how})


def argument(said: str) -> Any:
    """What stands behind the command's name."""
    return flag("", said, positional=True)


@dataclass
class Command:
    """One command; its fields are its flags, all of which it has beside the options of the config."""

    brief: ClassVar[str]
    """What the list of commands says of it."""
    kept: ClassVar[str]
    """What is kept when it is interrupted."""
    shared: ClassVar[bool] = False
    """Whether several processes do it together."""
    base: ClassVar[Sequence[str]] = ()
    """Words of a command line that come first, and whose options are not to be given otherwise."""
    keeps: ClassVar[Sequence[str]] = ("data", "logs")
    """The folders of the workspace that it writes to, where it is given no `out`."""
    quiet: bool = flag(False, "no progress bars")

    def run(self, config: Config, given: Collection[str]) -> None:
        """Do it for `config`; `given`: the options that were named, by the command line or its config files."""
        raise NotImplementedError

    @property
    def progress(self) -> bool:
        """Whether jobs show bars."""
        return not self.quiet and distributed.rank() == 0

    def session(self, config: Config) -> Session:
        """The experiment."""
        from ts_adapt.jobs.session import Session

        return Session(config, progress=self.progress)


@dataclass
class Learn(Command):
    """Everything that the config asks for, in order: teach, then what `learn` lists, then evaluate.

      static     one grid for all samples: for exports to other programs
      one-shot   the grid is predicted from the noise: where the sampling loop cannot be touched
      recursive  the next time is chosen at every step, from the state: gains most

    static+shift+scale+coefficients, oracle and the methods of `search` may be listed too. What is finished stays."""

    brief = "teach, learn and evaluate, all that a config asks for"
    kept = "finished steps are kept, and the same command goes on from there"
    shared = True
    plan: bool = flag(False, "say what is missing of each job and what it takes, without starting")
    redo: bool = flag(False, REDO)

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs.learn import learn, show_plan

        if self.plan:
            distributed.first(lambda: show_plan(config, redo=self.redo))
        else:
            learn(config, redo=self.redo, progress=self.progress)


@dataclass
class Teach(Command):
    """Generate the teacher's samples: fine solves whose end points a schedule is to reach."""

    brief = "generate the teacher's samples"
    kept = "finished shards of samples are kept, and the same command goes on with the next"
    shared = True
    split: Literal["train", "test", "both"] = flag("both", "which samples")
    save_png: bool = flag(False, "also write the teacher's images as PNG files")

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs.teach import teach

        splits = ("train", "test") if self.split == "both" else (self.split,)
        teach(self.session(config), splits, save_png=self.save_png)


@dataclass
class Search(Command):
    """Search schedules for every solver and NFE of the config.

      static      one grid for all samples, by the gradient of their mean distance: times alone, then with
                  corrections; --static.corrections says which
      per-sample  the oracle: one grid for each sample
      blackbox    one grid without gradients, by optuna
      dmn         from an error bound, without the model
      gits, oss   by dynamic programming along the teacher's trajectories
      klub        from the bound of Align Your Steps, estimated for this model on the teacher's end points

    What is computed is kept, of per-sample every batch of samples, of blackbox every trial; interrupted, the same
    command goes on from there. A grid that is found stays until --redo is given along with other options.

    With --student.pruned, --student.cacher and --student.quantizer it is searched for the network that they make
    cheaper, against the same teacher, and kept apart; `evaluate` with them sets it against the one of the full network.
    """

    brief = "search schedules: static, per-sample (the oracle) and others"
    kept = (
        "what is computed is kept, of per-sample every batch of samples, of blackbox every trial, and the same command "
        "goes on from there"
    )
    shared = True
    method: Literal["static", "per-sample", "blackbox", "dmn", "gits", "oss", "klub"] = flag("static", "how: see above")
    split: Literal["train", "test"] = flag("train", "the samples of a per-sample search")
    redo: bool = flag(False, REDO)

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs.search import search

        search(self.session(config), self.method, self.split, redo=self.redo)


@dataclass
class Train(Command):
    """Train a predictor of grids and corrections through the solver, for every solver and NFE; with --train.loss labels
    on the oracle's grids, after `search --method per-sample`.

    With -all behind the name (recursive-all) one network serves all NFEs of the config, and by interpolation those
    between and one beside; it is kept, and compared, apart. After every validation it is said what one more pass
    promises. A predictor that is finished stays until --redo is given along with other options; one that was
    interrupted goes on after its last finished epoch. --student.pruned, .cacher and .quantizer as of search.
    """

    brief = "train a predictor of grids and corrections"
    kept = "finished predictors and epochs are kept, and the same command goes on from there"
    shared = True
    predictor: Annotated[str, OneOf(PREDICTOR_NAMES)] = flag(
        "recursive", "recursive, one-shot; recursive-all: one for all NFEs, and those between"
    )
    redo: bool = flag(False, REDO)

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs.train import train

        train(self.session(config), self.predictor, redo=self.redo)


@dataclass
class Quantize(Command):
    """Calibrate or train a quantizer on the model's network, and report what it does to every layer.

      hqq4, hqq3                weights alone, without calibration
      vqdm4                     weights as sums of codebook vectors, calibrated
      minmax-w8a8, tdq-w4a8,    weights and activations, calibrated; @uniform, @normal or @active behind a name selects
      tinydm-w8a8               the calibration set along the sampling trajectory
      tdq-w4a4+qat              trained as well (--qat.data: images, --qat.steps), resumable, by all processes that
                                `accelerate launch` starts

    It stays in the workspace, where evaluate, search and train find it by its name; what needs no training they make
    themselves. Without --quantizer all of `quantizers` are made; with --student.pruned it is of the pruned network.
    """

    brief = "calibrate or train a quantizer, with a report by layer"
    kept = "finished quantizers and checkpoints of a training are kept, and the same command goes on from there"
    shared = True
    quantizer: str | None = flag(None, "its name; default: every one of the config's `quantizers`")
    redo: bool = flag(False, "make it again where it is there already")

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs.quantize import quantize

        quantize(self.session(config), self.quantizer, redo=self.redo)


@dataclass
class Evaluate(Command):
    """Compare every schedule on test noises; leaves a table, plots and one HTML page under `log_root`.

    Test samples of the teacher that are missing are generated first. With `pruned`, `cachers` and `quantizers` in the
    config all of them are compared, each with each, and what was learned for one of them (`search --student.quantizer
    hqq4`, there called static@hqq4) with its like of the full network; what the network does not take is skipped with a
    reason. What was measured once is not measured again.
    """

    brief = "compare every schedule on test noises, with a report"
    keeps = ("logs",)
    kept = "finished measurements are kept, and the same command goes on with the next"
    shared = True
    images: list[PathText] | None = flag(
        None, "score a folder of images instead of schedules, or, given twice, compare two", action="append"
    )
    generate_only: bool = flag(False, "sample, and leave the scoring for later")
    score_only: bool = flag(False, "score what was sampled, and say what is missing")

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs import evaluate, runs, score_folders

        session = self.session(config)
        if self.images is not None:
            folders = list(map(Path, self.images))
            distributed.first(lambda: score_folders.score_folders(session, folders))
        elif self.generate_only and self.score_only:
            both = "--generate-only and --score-only"
            raise TsAdaptError(f"{both} are the two halves of evaluate; leave both out for both")
        elif self.generate_only:
            runs.generate(session)
        elif self.score_only:
            distributed.first(lambda: evaluate.score_runs(session))
        else:
            evaluate.evaluate(session)


@dataclass
class Prune(Command):
    """Leave out those blocks of a UNet that cost most for what they do, one a round.

    Each round every block that is left is tried: the one goes with the least loss of quality for the cost that is
    saved. Quality is the distance to the full network's images, of the same noises along the same few steps; the cost
    is counted in floating-point operations, or measured in seconds. It ends at prune.cost, or before prune.distance.
    Nothing is trained. The list of what went is written to --out: `evaluate` with it in `pruned` compares the network
    without these blocks with the full one, --student.pruned has schedules learned for it. It is called as the file is.
    """

    brief = "leave out the blocks of a UNet that cost most for what they do"
    kept = "nothing is kept, and the same command begins anew"
    schedule: PathText = flag("log_snr", "as of `sample`; of the images that are compared")
    solver: str | None = flag(None, "default: the first of `solvers`")
    steps: Evaluations | None = flag(None, "evaluations; default: the largest of `nfe`")
    out: PathText | None = flag(None, "the file to write; default: under `data_root`")

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs.prune import prune

        prune(self.session(config), self.schedule, self.solver, self.steps, self.out)


@dataclass
class Sample(Command):
    """Make images along any schedule: of the config's model, or with --pipeline of any pipeline of diffusers.

    The schedule is a grid, the workspace's, a schedule file, a predictor's folder, or the folder, hub id or zoo name of
    a LearnedScheduler, such as `export --format diffusers` writes; with --pipeline not the workspace's. Models of text
    are given --prompt, or else the config's prompts.

    With --pipeline image to image starts from --init-image, of which --mask says what is painted anew. What is not said
    is the pipeline's own, --guidance too; of the config count the student, the model but its name, and the defaults
    below. An image depends on --seed and its number only, not on the others that are made along with it.
    """

    brief = "make images along any schedule"
    keeps = ("logs",)
    kept = "the images that are written stay, and the same command makes all of them again"
    schedule: PathText = flag(
        "static", "a grid, static, blackbox, one-shot, recursive, recursive-all, or a file, folder or zoo name"
    )
    solver: str | None = flag(
        None,
        "such as unipc-3, dpmpp-2m, ddim-eta0.5 (eta between 0 and 1); default: the schedule's, or the first of "
        "`solvers`",
    )
    steps: Evaluations | None = flag(None, "evaluations; default: --nfe N, the schedule's, or the largest of `nfe`")
    count: Annotated[int, Between(1, 1_000_000)] = flag(16, "how many images")
    batch: Count | None = flag(None, "at a time; default: `evaluate.batch_size`")
    seed: Seed = flag(1, "of the starting noises")
    label: int | None = flag(None, "a class, for class-conditional models")
    scale: Annotated[float, Between(-1000, 1000)] | None = flag(None, "of guidance, of all; default: `guidance`")
    out: PathText | None = flag(None, "a folder of their own; default: under `log_root`, by the pipeline's name")
    pipeline: PathText | None = flag(None, "a pipeline of diffusers: a folder, a hub id, or a zoo name")
    prompt: list[str] | None = flag(None, "a text; several take turns, image by image", action="append")
    prompts: PathText | None = flag(None, "a file of prompts: one a line, PartiPrompts', COCO's")
    negative: str | None = flag(None, "the negative prompt of all images")
    init_image: PathText | None = flag(None, "an image file to start from")
    strength: Annotated[float, Between(SMALL, 1)] | None = flag(None, "how far from that image, above 0 to 1")
    mask: PathText | None = flag(None, "an image file of its size: what is white is painted anew, the rest of it kept")

    def run(self, config: Config, given: Collection[str]) -> None:
        if self.pipeline is not None:
            from ts_adapt.jobs.sample_pipeline import Request, sample_pipeline

            asked = {name: getattr(self, name) for name in hints_of(Request) if name != "guidance"}
            guidance = config.guidance if "guidance" in given else None
            if self.scale is not None or isinstance(guidance, list):
                said = f"option guidance is {guidance}" if self.scale is None else f"--scale is {self.scale:g}"
                raise TsAdaptError(f"{said}, but a pipeline is called with one scale of guidance: --guidance NUMBER")
            config = config if "name" in given else replace(config, name=Path(self.pipeline).absolute().name)
            sample_pipeline(config, Request(**asked, guidance=guidance), progress=self.progress)
            return
        for name in ("negative", "init_image", "strength", "mask"):
            if getattr(self, name) is not None:
                raise TsAdaptError(
                    f"--{name.replace('_', '-')} is for pipelines of diffusers; name one with --pipeline"
                )
        from ts_adapt.jobs.sample import sample_to_folder
        from ts_adapt.prompts import given_prompts

        sample_to_folder(
            self.session(config), self.schedule, self.solver, self.steps, self.count, self.seed, self.label, self.out,
            self.batch, given_prompts(self.prompt, self.prompts), self.scale,
        )  # fmt: skip


@dataclass
class Export(Command):
    """Write a schedule for other programs, to stdout or to --out. Warnings on stderr say what a format drops.

      json       everything (grid, corrections, solver, model, teacher, loss, what was measured): `import` reads it back
      sigmas     N+1 sigmas with commas between, the last 0: for stable-diffusion.cpp's --sigmas, ComfyUI's ManualSigmas
      comfyui    the same as a ManualSigmas node in API format: drop the file on ComfyUI's canvas
      a1111      a Python file that adds a scheduler to AUTOMATIC1111's web UI and to Forge
      timesteps  N integers, for the `timesteps` of diffusers' pipelines; models with a table of betas only
      diffusers  a folder for LearnedScheduler.from_pretrained, predictors included: static, blackbox, one-shot,
                 recursive with all NFEs of the config that were learned, or that of --steps; a fixed grid's name for
                 any NFE

    A sigma is sigma/alpha (k-diffusion's) for epsilon, v and EDM models, and t for rectified flows. All but json and
    diffusers are lists for programs that denoise fully in their last step: where a grid ends at a small sigma, 0 is
    written in its place. Model times, output scales and grids per sample are dropped. `import` reads such a list back,
    so that it can be measured.

    --steps may be a number that was not learned: the list is interpolated in log-SNR from those that were
    (of recursive-all from the static grids that it corrects), and what is lost by it is measured on validation noises,
    if the teacher's samples are there, and were made with more steps.
    """

    brief = "write a schedule for other programs"
    keeps = ()
    kept = "the same command begins anew"
    schedule: PathText = argument("as of `sample`")
    format: Literal["json", "sigmas", "comfyui", "a1111", "timesteps", "diffusers"] = flag("json", "what is written")
    solver: str | None = flag(None, "of a schedule given by name; default: the first of `solvers`")
    steps: Evaluations | None = flag(None, "evaluations, likewise; default: the largest of `nfe`")
    out: PathText | None = flag(None, "the file to write, for diffusers the folder; default: stdout")

    def run(self, config: Config, given: Collection[str]) -> None:
        if self.format == "diffusers":
            from ts_adapt.jobs.export_scheduler import export_scheduler

            export_scheduler(config, self.schedule, self.solver, self.steps, self.out)
        else:
            from ts_adapt.jobs.export import export_schedule

            export_schedule(
                config, self.schedule, self.format, self.solver, self.steps, self.out, progress=self.progress
            )


@dataclass
class Import(Command):
    """Make a schedule file for a model and a solver of a list of sigmas or timesteps, or check one from elsewhere.

      json       a schedule file, which has to be for this model; read as such without --format
      sigmas     N+1 falling numbers with commas or spaces between, in brackets or not; sigma/alpha, for flows t
      timesteps  N falling timesteps as in diffusers' AysSchedules, or N+1 that end at 0

    A last sigma of 0 becomes the model's smallest (t_min), where the model does not reach 0; where the sigma before it
    is the smallest already, it is left out. What is changed is said on stderr; the file goes to --out, or to stdout.
    """

    brief = "make a schedule file of a list of sigmas or timesteps"
    keeps = ()
    kept = "the same command begins anew"
    file: PathText = argument("the list or schedule file; - reads stdin")
    format: Literal["sigmas", "timesteps", "json"] | None = flag(None, "what the file is; needed for lists")
    solver: str | None = flag(None, "that the schedule is for; default: the first of `solvers`")
    out: PathText | None = flag(None, "the schedule file to write; default: stdout")

    def run(self, config: Config, given: Collection[str]) -> None:
        from ts_adapt.jobs.import_schedule import import_schedule

        import_schedule(config, self.file, self.format, self.solver, self.out)


@dataclass
class Demo(Learn):
    """`learn` in small, on the embedded model: minutes on two cores, then a report. What it sets is refused; what an
    earlier demo searched and trained stays until --redo is given along with other options."""

    brief = "learn in small, on the embedded model"
    base = ("--config", str(Path(__file__).parent / "demo.yml"))


COMMANDS: dict[str, type[Command]] = {
    "learn": Learn, "teach": Teach, "search": Search, "train": Train, "quantize": Quantize, "evaluate": Evaluate,
    "prune": Prune, "sample": Sample, "export": Export, "import": Import, "demo": Demo,
}  # fmt: skip


def build_parser() -> Parser:
    """The parser of the first word, for the help that lists the commands; theirs are `command_parser`'s."""
    parser = Parser(prog="ts-adapt", description=DESCRIPTION, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ts-adapt {__version__}")
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, Parser(), help=command.brief)
    return parser


def command_parser(name: str, *, whole: bool = True) -> Parser:
    """The parser of one command: its own flags, and behind them the options of the config.

    whole  False: of the latter only what there are, in a few lines, for its help
    """
    from ts_adapt.config import Config

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    command = COMMANDS[name]
    own = [option for option in fields(command) if option.name != "quiet"]
    behind = "".join(f" {option.name.upper()}" for option in own if "positional" in option.metadata)
    usage = f"ts-adapt {name}{behind} [--config FILE] [OPTION VALUE]..."
    description, beside = cleandoc(command.__doc__ or ""), None
    if whole:
        description += f"\n\n{OPTIONS}. They follow those of the command itself."
    else:
        beside = f"{OPTIONS}.\n`ts-adapt {name} {HELP_ALL}` says what each of them is.\n\n{_outline(Config)}"
    parser = Parser(usage=usage, description=description, epilog=beside, formatter_class=Help, allow_abbrev=False)
    for option in own:
        _add(parser, command, option)
    parser.add_argument("--config", action="config", help="a YAML file of options; flags behind it override it")
    _add(parser, command, next(option for option in fields(command) if option.name == "quiet"))
    parser.add_argument(HELP_ALL, action="help", help="Show this, and every option of the config, and exit.")
    if whole:
        parser.add_class_arguments(Config, as_group=False)
    return parser


def _outline(config: type[Config]) -> str:
    """The single options of the config by their names, and a line for each of its groups."""
    hints = hints_of(config)
    names = [option.name for option in fields(config)]
    groups = {name: hints[name] for name in names if is_dataclass(hints[name])}
    single = " ".join(f"--{name}" for name in names if name not in groups)
    lines = [
        f"  --{name}.*".ljust(20) + re.split(r"[.:](?:\s|$)", str(kind.__doc__))[0] for name, kind in groups.items()
    ]
    return "\n".join([fill(single, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False), *lines])


def _add(parser: Parser, command: type[Command], option: Field[Any]) -> None:
    how = dict(option.metadata)
    kind = taken_apart(hints_of(command)[option.name])[0]
    if how.pop("positional", False):
        parser.add_argument(option.name, **how)
        return
    if kind is bool:
        how["action"] = "store_true"
    else:
        how["default"] = option.default
    if get_origin(kind) is Literal:
        how["choices"] = get_args(kind)
    elif kind in (int, float):
        how["type"] = kind
    parser.add_argument(flag_of(option.name), **how)
