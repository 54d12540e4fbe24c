"""ts-adapt: the command line. Every option of `Config` is a flag (`--teacher.nfe 50`) or a line of a YAML `--config`.

Errors of the user's input are one sentence and exit code 2; what was finished before stays on disk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

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
`ts-adapt demo` does all of it in small."""


class Refused(Exception):
    """The command line could not be understood."""


class Parser(ArgumentParser):
    """Raises `Refused` where argparse would print usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise Refused(message)


def build_parser() -> Parser:
    from ts_adapt.config import Config

    parser = Parser(
        prog="ts-adapt",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ts-adapt {__version__}")
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, help_text, own in (
        ("teach", "generate the teacher's samples", _teach_flags),
        ("search", "search schedules: static, per-sample (the oracle), blackbox", _search_flags),
        ("train", "train a predictor on the oracle's grids", _train_flags),
        ("evaluate", "compare every schedule on test noises; write table, plots and report", _evaluate_flags),
        ("sample", "make images along any schedule", _sample_flags),
        ("demo", "the main job in small, on the embedded model", lambda parser: None),
    ):
        command = Parser(prog=f"ts-adapt {name}", description=help_text, allow_abbrev=False)
        command.add_argument("--config", action="config", help="a YAML file of options; flags behind it override it")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        own(command)
        command.add_class_arguments(Config, as_group=False)
        commands.add_subcommand(name, command, help=help_text)
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
    parser.add_argument("--schedule", default="static", help="a grid, static, one-shot, recursive, or a schedule file")
    parser.add_argument("--solver", default=None, help="default: the file's, or the first of `solvers`")
    parser.add_argument(
        "--steps", type=int, default=None, help="evaluations; default: the file's, or the first of `nfe`"
    )
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--label", type=int, default=None, help="a class, for class-conditional models")
    parser.add_argument("--out", default=None, help="folder of the images; default: under `log_root`")


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
    return name, parsed[name], config


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse `arguments` and do the job; raises TsAdaptError."""
    name, options, config = parse(sys.argv[1:] if arguments is None else arguments)
    from ts_adapt.jobs import demo, evaluating, learning
    from ts_adapt.jobs.session import SPLITS, Session

    if name == "demo":
        demo.demo(config, progress=not options.quiet)
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
        evaluating.sample_to_folder(
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
