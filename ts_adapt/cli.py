"""ts-adapt: the command line. Every option of `Config` is a flag (`--teacher.nfe 50`) or a line of a YAML `--config`.

Errors of the user's input are one sentence and exit code 2; what was finished before stays on disk.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

from ts_adapt._version import __version__
from ts_adapt.interfaces import TsAdaptError

if TYPE_CHECKING:
    from ts_adapt.config import Config

DESCRIPTION = """Learned schedules for few-step diffusion sampling.

The main job, in order (each goes on where it was stopped):
  ts-adapt teach    --config configs/fashion.yml                        fine solves to learn from
  ts-adapt search   --config configs/fashion.yml --method static        one grid for all samples
  ts-adapt search   --config configs/fashion.yml --method per-sample    the oracle: one grid for each
  ts-adapt train    --config configs/fashion.yml --predictor one-shot   a network that predicts grids
  ts-adapt evaluate --config configs/fashion.yml                        the comparison, with a report
  ts-adapt sample   --config configs/fashion.yml --schedule static      images
`ts-adapt demo` does all of it in small, without a config. To and from ComfyUI, stable-diffusion.cpp, diffusers, ...:
  ts-adapt export   train_data/fashion/static/unipc-3-nfe5.json --format sigmas
  ts-adapt import   sigmas.txt --format sigmas --model.name fashion-ddpm --solver unipc-3 --out imported.json
`ts-adapt COMMAND --help` lists the options of a command."""

TEACH = "Generate the teacher's samples: fine solves whose end points a schedule is to reach."
SEARCH = "Search schedules for every solver and NFE of the config: static, per-sample (the oracle) or blackbox."
TRAIN = "Train a predictor of grids on the oracle's grids and through the solver."
EVALUATE = "Compare every schedule on test noises; leaves a table, plots and one HTML page under `log_root`."
SAMPLE = "Make images along any schedule: a fixed grid, a learned one, a predictor, or a schedule file."
EXPORT = """Write a schedule for other programs, to stdout or a file. Warnings on stderr say what a format drops.

  json       everything (grid, corrections, solver, model, teacher, loss, what was measured): `import` reads it back
  sigmas     N+1 sigmas with commas between, the last 0: for stable-diffusion.cpp's --sigmas, ComfyUI's ManualSigmas
  comfyui    the same as a ManualSigmas node in API format: drop the file on ComfyUI's canvas
  a1111      a Python file that adds a scheduler to AUTOMATIC1111's web UI and to Forge
  timesteps  N integers, for the `timesteps` of diffusers' pipelines; models with a table of betas only

A sigma is sigma/alpha (k-diffusion's) for epsilon, v and EDM models, and t for rectified flows. All but json are lists
for programs that denoise fully in their last step: where a grid ends at a small sigma, 0 is written in its place. Model
times, output scales and grids per sample are dropped. `import` reads such a list back, so that it can be measured."""
IMPORT = """Make a schedule file for a model and a solver of a list of sigmas or timesteps, or check one from elsewhere.

  json       a schedule file, which has to be for this model; read as such without --format
  sigmas     N+1 falling numbers with commas or spaces between, in brackets or not; sigma/alpha, for flows t
  timesteps  N falling timesteps as in diffusers' AysSchedules, or N+1 that end at 0

A last sigma of 0 becomes the model's smallest (t_min), where the model does not reach 0; where the sigma before it is
the smallest already, it is left out. What is changed is said on stderr; the file goes to --out, or to stdout."""
DEMO = "The main job in small, on the embedded model: minutes on two cores, then a report. What it sets is refused."
OPTIONS = """Options of the config (a line `nfe: [5]` or a group `teacher: {nfe: 40}` of the YAML file is --nfe [5],
--teacher.nfe 40 here) follow those of the command itself."""


_NOTHING = re.compile(r"(, )?default: %\(default\)s|required")


class Refused(Exception):
    """The command line could not be understood."""


class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults behind each option, where there are any; descriptions as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text: str = super()._get_help_string(action)
        return _NOTHING.sub("", text).replace(" ()", "") if action.default is None else text


class Parser(ArgumentParser):
    """Raises `Refused` where argparse would print usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise Refused(message)


def build_parser() -> Parser:
    from ts_adapt.config import Config

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="ts-adapt", description=DESCRIPTION, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ts-adapt {__version__}")
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, argument, brief, description, own in (
        ("teach", "", "generate the teacher's samples", TEACH, _teach_flags),
        ("search", "", "search schedules: static, per-sample (the oracle), blackbox", SEARCH, _search_flags),
        ("train", "", "train a predictor on the oracle's grids", TRAIN, _train_flags),
        ("evaluate", "", "compare every schedule on test noises, with a report", EVALUATE, _evaluate_flags),
        ("sample", "", "make images along any schedule", SAMPLE, _sample_flags),
        ("export", " SCHEDULE", "write a schedule for other programs", EXPORT, _export_flags),
        ("import", " FILE", "make a schedule file of a list of sigmas or timesteps", IMPORT, _import_flags),
        ("demo", "", "the main job in small, on the embedded model", DEMO, lambda parser: None),
    ):
        usage = f"ts-adapt {name}{argument} [--config FILE] [OPTION VALUE]..."
        command = Parser(usage=usage, description=f"{description}\n\n{OPTIONS}", allow_abbrev=False)
        own(command)
        command.add_argument("--config", action="config", help="a YAML file of options; flags behind it override it")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_class_arguments(Config, as_group=False)
        commands.add_subcommand(name, command, help=brief)
    return parser


def _teach_flags(parser: Parser) -> None:
    parser.add_argument("--split", default="both", help="train, test or both")
    parser.add_argument("--save-png", action="store_true", help="also write the teacher's images as PNG files")


def _search_flags(parser: Parser) -> None:
    parser.add_argument("--method", default="static", help="static, per-sample or blackbox")
    parser.add_argument("--split", default="train", help="the samples of a per-sample search: train or test")


def _train_flags(parser: Parser) -> None:
    parser.add_argument("--predictor", default="one-shot", help="one-shot or recursive")


def _evaluate_flags(parser: Parser) -> None:
    parser.add_argument("--images", default=None, help="score a folder of images instead of schedules")


def _sample_flags(parser: Parser) -> None:
    parser.add_argument(
        "--schedule", default="static", help="a grid, static, blackbox, one-shot, recursive, or a schedule file"
    )
    parser.add_argument("--solver", default=None, help="default: the file's, or the first of `solvers`")
    parser.add_argument(
        "--steps", type=int, default=None, help="evaluations; default: the file's, or the first of `nfe`"
    )
    parser.add_argument("--count", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=1, help="of the starting noises")
    parser.add_argument("--label", type=int, default=None, help="a class, for class-conditional models")
    parser.add_argument("--out", default=None, help="folder of the images; default: under `log_root`")


def _export_flags(parser: Parser) -> None:
    parser.add_argument(
        "schedule",
        help="a schedule file, a grid, static, blackbox, one-shot, recursive, or a predictor's folder",
    )
    parser.add_argument("--format", default="json", help="json, sigmas, comfyui, a1111 or timesteps")
    parser.add_argument("--solver", default=None, help="of a schedule given by name; default: the first of `solvers`")
    parser.add_argument("--steps", type=int, default=None, help="evaluations, likewise; default: the first of `nfe`")
    parser.add_argument("--out", default=None, help="the file to write; default: stdout")


def _import_flags(parser: Parser) -> None:
    parser.add_argument("file", help="the list or schedule file; - reads stdin")
    parser.add_argument("--format", default=None, help="sigmas, timesteps or json; needed for lists")
    parser.add_argument("--solver", default=None, help="that the schedule is for; default: the first of `solvers`")
    parser.add_argument("--out", default=None, help="the schedule file to write; default: stdout")


def config_of(command: str, options: Namespace, parser: Parser) -> Config:
    """The `Config` part of parsed options."""
    from ts_adapt.config import Config

    instantiated = parser.instantiate(Namespace(**{command: options, "subcommand": command}))[command]
    return Config(**{field.name: instantiated[field.name] for field in fields(Config)})


def _not_understood(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"the options cannot be understood ({reason}); a group such as `teacher` takes options below it, not a value"


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for place, argument in enumerate(arguments):
        if argument.startswith("--config="):
            yield Path(argument.removeprefix("--config="))
        elif argument == "--config" and place + 1 < len(arguments):
            yield Path(arguments[place + 1])


def check_config_file(path: Path) -> None:
    """TsAdaptError unless `path` is a YAML file of options."""
    import yaml

    from ts_adapt.files import read_bytes

    try:
        content = yaml.safe_load(read_bytes(path).decode())
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise TsAdaptError(f"{path} is no YAML text ({reason}); give a file of lines like `name: fashion`") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}, not options"
        raise TsAdaptError(f"{path} {found}; give a YAML file of lines like `name: fashion`")


def parse(arguments: Sequence[str]) -> tuple[str, Namespace, Config]:
    """The command, its options and its valid `Config`; TsAdaptError for what cannot be understood."""
    from ts_adapt.config import explain

    parser = build_parser()
    if not arguments:
        parser.print_help()
        raise TsAdaptError("no command is given; name one of the commands above")
    for path in _config_files(arguments):
        check_config_file(path)
    try:
        parsed = parser.parse_args(arguments)
        name: str = parsed.subcommand
        config = config_of(name, parsed[name], parser)
    except Refused as error:
        raise TsAdaptError(explain(str(error))) from error
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        raise TsAdaptError(_not_understood(error)) from error
    config.validate()
    if name == "demo":
        check_demo(parser.parse_args(arguments, defaults=False)[name], config)
    return name, parsed[name], config


def check_demo(given: Namespace, config: Config) -> None:
    """TsAdaptError for an option that was given to the demo and that the demo sets itself, to another value."""
    from ts_adapt.jobs.demo import small

    options = {field.name for field in fields(config)}
    for option in (key for key in given.keys() if key.split(".")[0] in options):  # noqa: SIM118 (the dotted keys)
        wanted, used = (reduce(getattr, option.split("."), part) for part in (config, small(config)))
        if wanted != used:
            raise TsAdaptError(
                f"option {option} is {wanted}, but the demo sets it itself, to {used}; leave it out, or run teach, "
                "search, train and evaluate with it"
            )


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse `arguments` and do the job; raises TsAdaptError."""
    name, options, config = parse(sys.argv[1:] if arguments is None else arguments)
    from ts_adapt.jobs import demo, evaluating, exchange, images, learning
    from ts_adapt.jobs.session import SPLITS, Session

    if name == "demo":
        demo.demo(config, progress=not options.quiet)
        return
    if name == "export":
        exchange.export_schedule(config, options.schedule, options.format, options.solver, options.steps, options.out)
        return
    if name == "import":
        exchange.import_schedule(config, options.file, options.format, options.solver, options.out)
        return
    session = Session(config, progress=not options.quiet)
    if name == "teach":
        splits = tuple(SPLITS) if options.split == "both" else (options.split,)
        learning.teach(session, splits, save_png=options.save_png)
    elif name == "search":
        learning.search(session, options.method, options.split)
    elif name == "train":
        learning.train(session, options.predictor)
    elif name == "evaluate" and options.images:
        evaluating.evaluate_images(session, Path(options.images))
    elif name == "evaluate":
        evaluating.evaluate(session)
    elif name == "sample":
        images.sample_to_folder(
            session, options.schedule, options.solver, options.steps,
            options.count, options.seed, options.label, options.out,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script: 0 when done, 2 for bad input, 130 when interrupted."""
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("ts-adapt: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (TsAdaptError, OSError, MemoryError, RecursionError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        print(f"ts-adapt: {sentence}", file=sys.stderr)
        return 2
    return 0


def _sentence(error: Exception) -> str | None:
    """What to tell the user of an error that input or machine can cause; None for a fault of the program."""
    if isinstance(error, TsAdaptError):
        return str(error)
    if isinstance(error, RecursionError):
        return "the input is nested too deeply to be read; give a flat YAML or JSON file"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; check the path and the disk, then run the same command again"
    if isinstance(error, MemoryError) or any(text in str(error) for text in ("out of memory", "can't allocate memory")):
        return "the memory does not suffice; lower the batch sizes (label_batch, teacher.batch_size, ...) and run again"
    return None


if __name__ == "__main__":
    sys.exit(main())
