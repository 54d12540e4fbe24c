"""ts-adapt: the command line. Every option of `Config` is a flag (`--teacher.nfe 50`) or a line of a YAML `--config`.

Errors of the user's input are one sentence and exit code 2; what was finished before stays on disk.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ts_adapt._version import __version__
from ts_adapt.config import Config, explain
from ts_adapt.interfaces import TsAdaptError

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
    parser.add_argument("--solver", default=None, help="default: the first of `solvers`")
    parser.add_argument("--steps", type=int, default=None, help="evaluations a sample; default: the first of `nfe`")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--label", default=None, help="a class, for class-conditional models")
    parser.add_argument("--out", default=None, help="folder of the images; default: under `log_root`")


def config_of(command: str, options: Namespace, parser: Parser) -> Config:
    """The `Config` part of parsed options."""
    instantiated = parser.instantiate(Namespace(**{command: options, "subcommand": command}))[command]
    return Config(**{field.name: instantiated[field.name] for field in fields(Config)})


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse `arguments` and do the job; raises `Refused` or TsAdaptError."""
    parser = build_parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        raise Refused("name one of the commands above")
    parsed = parser.parse_args(arguments)
    name = parsed.subcommand
    options = parsed[name]
    config = config_of(name, options, parser)
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
            session, options.schedule, options.solver or config.solvers[0], options.steps or config.nfe[0],
            options.count, options.seed, None if options.label is None else int(options.label), options.out,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script: 0 when done, 2 for bad input, 130 when interrupted."""
    try:
        run(arguments)
    except Refused as error:
        print(f"ts-adapt: {explain(str(error))}", file=sys.stderr)
        return 2
    except TsAdaptError as error:
        print(f"ts-adapt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ts-adapt: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
