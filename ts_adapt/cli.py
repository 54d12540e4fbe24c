"""ts-adapt: the command line. Every option of `Config` is a flag (`--teacher.nfe 50`) or a line of a YAML `--config`.

Errors of the user's input are one sentence and exit code 2; what was finished before stays on disk.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from ts_adapt import distributed
from ts_adapt.assembly import solver_name
from ts_adapt.flags import COMMANDS, PIPELINE_FLAGS, build_parser, command_parser
from ts_adapt.interfaces import TsAdaptError, unknown
from ts_adapt.parsing import Refused, completed, explain

if TYPE_CHECKING:
    from ts_adapt.config import Config

SHARED_JOBS = ("teach", "search", "train", "quantize", "evaluate", "demo")
"""The commands that several processes do together."""


def parse(arguments: Sequence[str]) -> tuple[str, Namespace, Config]:
    """The command, its options and its valid `Config`; TsAdaptError for what cannot be understood."""
    name = arguments[0] if arguments else None
    parser = build_parser([name] if name in COMMANDS else [])
    if name is None:
        parser.print_help()
        raise TsAdaptError("no command is given; name one of the commands above")
    if name not in COMMANDS and name not in ("--help", "-h", "--version"):
        if name.startswith("-"):
            raise TsAdaptError(f"{name} is no command; the command comes first: `ts-adapt COMMAND [OPTION VALUE]...`")
        raise unknown("command", name, COMMANDS)
    try:
        parsed = parser.parse_args(arguments)
        config = _config_of(parser.instantiate(parsed)[name])
    except Refused as error:
        raise TsAdaptError(explain(str(error), name, command_parser(name).options)) from error
    except (TypeError, AttributeError, ValueError, KeyError, OverflowError) as error:
        raise TsAdaptError(_not_understood(error)) from error
    config.validate()
    options = parsed[name]
    if options.get("solver") is not None:
        options.solver = solver_name(options.solver)
    if name == "demo":
        check_demo(given_options(name, arguments), config)
    return name, options, config


def _config_of(options: Namespace) -> Config:
    from ts_adapt.config import Config

    return Config(**{field.name: options[field.name] for field in fields(Config)})


def _not_understood(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"the options cannot be understood ({reason}); a group such as `teacher` takes options below it, not a value"


def given_options(command: str, arguments: Sequence[str]) -> Namespace:
    """The options that the command line or its config files name."""
    given: Namespace = build_parser([command]).parse_args(arguments, defaults=False)[command]
    return given


def _for_pipelines(options: Namespace) -> bool:
    """Whether `sample` is given a pipeline; TsAdaptError for flags that need one and have none."""
    if options.pipeline is not None:
        return True
    for flag in PIPELINE_FLAGS:
        if options[flag] is not None:
            raise TsAdaptError(f"--{flag.replace('_', '-')} is for pipelines of diffusers; name one with --pipeline")
    return False


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
    arguments = sys.argv[1:] if arguments is None else arguments
    name, options, config = parse(arguments)
    distributed.join(config.model.device, config.threads)
    if distributed.world() > 1 and name not in SHARED_JOBS:
        raise TsAdaptError(f"{name} is the job of one process; start it without a launcher")
    from ts_adapt.jobs.tracking import tracked

    with distributed.quiet(), tracked(config, name):
        _do(name, options, config, arguments)


def _do(name: str, options: Namespace, config: Config, arguments: Sequence[str]) -> None:
    if name == "sample" and _for_pipelines(options):
        from ts_adapt.jobs import pipelines

        guided = "guidance" in given_options(name, arguments)
        asked = {field.name: options[field.name] for field in fields(pipelines.Request)}
        asked["guidance"] = options.guidance if guided else None
        pipelines.sample_pipeline(config, pipelines.Request(**asked), progress=not options.quiet)
        return
    if name == "export" and options.format == "diffusers":
        from ts_adapt.jobs.scheduler_folder import export_scheduler

        export_scheduler(config, options.schedule, options.solver, options.steps, options.out)
        return
    from ts_adapt.jobs import demo, evaluating, exchange, generating, images, learning
    from ts_adapt.jobs.experiment import SPLITS
    from ts_adapt.jobs.session import Session

    if name == "demo":
        demo.demo(config, redo=options.redo, progress=not options.quiet and distributed.rank() == 0)
        return
    if name == "export":
        exchange.export_schedule(config, options.schedule, options.format, options.solver, options.steps, options.out)
        return
    if name == "import":
        exchange.import_schedule(config, options.file, options.format, options.solver, options.out)
        return
    session = Session(config, progress=not options.quiet and distributed.rank() == 0)
    if name == "teach":
        splits = tuple(SPLITS) if options.split == "both" else (options.split,)
        learning.teach(session, splits, save_png=options.save_png)
    elif name == "search":
        learning.search(session, options.method, options.split, redo=options.redo)
    elif name == "train":
        learning.train(session, options.predictor, redo=options.redo)
    elif name == "quantize":
        from ts_adapt.jobs import quantizing

        quantizing.quantize_all(session, options.quantizer, redo=options.redo)
    elif name == "prune":
        from ts_adapt.jobs import pruning

        pruning.prune(session, options.schedule, options.solver, options.steps, options.out)
    elif name == "evaluate" and options.images:
        distributed.first(lambda: evaluating.evaluate_images(session, Path(options.images)))
    elif name == "evaluate" and options.generate_only and options.score_only:
        raise TsAdaptError("--generate-only and --score-only are the two halves of evaluate; leave both out for both")
    elif name == "evaluate" and options.generate_only:
        generating.generate(session)
    elif name == "evaluate" and options.score_only:
        distributed.first(lambda: evaluating.score_runs(session))
    elif name == "evaluate":
        evaluating.evaluate(session)
    elif name == "sample":
        images.sample_to_folder(
            session, options.schedule, options.solver, options.steps,
            options.count, options.seed, options.label, options.out, options.batch,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script: 0 when done, 2 for bad input, 130 when interrupted, 143 when terminated."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with _terminable():
        return _outcome(arguments)


def _outcome(arguments: Sequence[str]) -> int:
    """The exit code; of several processes one says what went wrong."""
    name = arguments[0] if arguments else ""
    try:
        run(arguments)
    except KeyboardInterrupt as interrupt:
        kept = COMMANDS[name].kept if name in COMMANDS else "nothing was begun"
        if distributed.speaks(interrupt):
            print(f"ts-adapt: {str(interrupt) or 'interrupted'}; {kept}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except (TsAdaptError, OSError, MemoryError, RecursionError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        remedy = sentence if name == "demo" else completed(sentence, COMMANDS, arguments[1:])
        if distributed.speaks(error):
            print(f"ts-adapt: {remedy}", file=sys.stderr)
        return 2
    return 0


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM while the block runs, so that it ends as it does at Ctrl-C."""

    def terminate(*_: Any) -> None:
        raise Terminated("terminated")

    try:
        former = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not in the main thread, which alone receives signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


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
