"""ts-adapt: the command line. Every option of `Config` is a flag (`--teacher.nfe 50`) or a line of a YAML `--config`.

Errors of the user's input are one sentence and exit code 2; what was finished before stays on disk.
"""

from __future__ import annotations

import codecs
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import reduce
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ts_adapt import distributed, remedies
from ts_adapt.assembly import build_solver, solver_name
from ts_adapt.commands import COMMANDS, Command, Demo, Sample, build_parser, command_parser
from ts_adapt.errors import TsAdaptError, TsAdaptWarning, unknown
from ts_adapt.noise import ContinuousVP
from ts_adapt.options import hints_of, read, yaml_text
from ts_adapt.parsing import CONFIG, HELP, HELP_ALL, Line, Parser, flag_of, made, read_line

if TYPE_CHECKING:
    from ts_adapt.config import Config

PLAIN = {"\N{EN DASH}": "-", "\N{MINUS SIGN}": "-", "\N{HORIZONTAL ELLIPSIS}": "..."}


@dataclass(frozen=True)
class Called:
    """A command that was called: its flags, its `Config`, and what of the command line named options."""

    name: str
    command: Command
    config: Config
    line: Line


def parse(arguments: Sequence[str]) -> Called:
    """What is called by `arguments`, all of it valid; TsAdaptError for what cannot be understood."""
    name = arguments[0] if arguments else None
    if name is None:
        build_parser().print_help()
        raise TsAdaptError("no command is given; name one of the commands above")
    if name in COMMANDS:
        return _called(name, COMMANDS[name], arguments[1:])
    if name in HELP:
        _show(build_parser())
    if name == "--version":
        build_parser().parse_args([name])
    if name.startswith("-"):
        raise TsAdaptError(f"{name} is no command; the command comes first: `ts-adapt COMMAND [OPTION VALUE]...`")
    raise unknown("command", name, COMMANDS)


def _show(parser: Parser) -> NoReturn:
    """Print the help of `parser`, and leave."""
    parser.print_help()
    raise SystemExit(0)


def _called(name: str, kind: type[Command], words: Sequence[str]) -> Called:
    from ts_adapt.config import Config

    if {*HELP} & {*words}:
        _show(command_parser(name, whole=HELP_ALL in words))
    hints = hints_of(kind)
    behind = [option.name for option in fields(kind) if "positional" in option.metadata]
    flags = {option: hint for option, hint in hints.items() if option not in behind}
    elsewhere = _flags_of_all(behind)
    line, base = (read_line(name, each, flags, hints_of(Config), elsewhere) for each in (words, kind.base))
    if line.behind[len(behind) :]:
        extra = line.behind[len(behind)]
        raise TsAdaptError(
            f"{extra!r} is no option and no value of one; `ts-adapt {name} {HELP_ALL}` lists the options"
        )
    if behind[len(line.behind) :]:
        missing = behind[len(line.behind)]
        raise TsAdaptError(f"{name} needs a {missing} behind it; `ts-adapt {name} --help` says which there are")
    given = base.given | line.given
    config, command = made(Config, given), made(kind, given)
    if line.shown is not None:
        content = asdict(config) | {option: getattr(command, option) for option in flags}
        command_parser(name).parse_args([*line.behind, CONFIG, yaml_text(content), line.shown])  # prints it, and leaves
    config.validate()
    for option, word in zip(behind, line.behind, strict=True):
        setattr(command, option, read(word, hints[option], option))
    for option, value in _named_alone(config, line, command).items():
        setattr(command, option, value)
    if (solver := getattr(command, "solver", None)) is not None:
        command.solver = solver_name(solver)
        build_solver(command.solver, ContinuousVP())
    _check_fixed(config, line, base)
    return Called(name, command, config, line)


def _flags_of_all(left_out: Sequence[str]) -> dict[str, list[str]]:
    """Every flag of a command, as it is written, and the commands that have it."""
    found: dict[str, list[str]] = {}
    for name, kind in COMMANDS.items():
        for option in fields(kind):
            if "positional" not in option.metadata and option.name not in left_out:
                found.setdefault(flag_of(option.name), []).append(name)
    return found


def _named_alone(config: Config, line: Line, command: Command) -> dict[str, Any]:
    """The steps and the solver of a command about one schedule, where --nfe or --solvers says them by one value."""
    lists, flags = {"steps": "nfe", "solver": "solvers"}, {option for option, _ in line.experiment}
    open_ones = {own: name for own, name in lists.items() if f"--{name}" in flags and getattr(command, own, 0) is None}
    return {own: values[0] for own, name in open_ones.items() if len(values := getattr(config, name)) == 1}


def _check_fixed(config: Config, line: Line, base: Line) -> None:
    """TsAdaptError for an option that was given another value than the one that the command sets itself."""
    for option in sorted(line.given.keys() & base.given.keys()):
        wanted, used = reduce(getattr, option.split("."), config), base.given[option]
        if wanted != used:
            raise TsAdaptError(
                f"option {option} is {wanted}, but the demo sets it itself, to {used}; leave it out, or run teach, "
                "search, train and evaluate with it"
            )


def run(arguments: Sequence[str] | None = None) -> None:
    """Parse `arguments` and do the job; raises TsAdaptError."""
    called = parse(sys.argv[1:] if arguments is None else arguments)
    distributed.join(called.config.model.device, called.config.threads)
    if distributed.world() > 1 and not called.command.shared:
        raise TsAdaptError(f"{called.name} is the job of one process; start it without a launcher")
    from ts_adapt.jobs.tracking import tracked

    about = [] if isinstance(called.command, Demo) else called.line.experiment
    distributed.first(lambda: _check_places(called))
    with remedies.experiment(about), distributed.quiet(), warned(), tracked(called.config, called.name):
        called.command.run(called.config, called.line.given)


def _check_places(called: Called) -> None:
    """TsAdaptError where what the command makes could not be kept: in its `out`, else in folders of the workspace."""
    from ts_adapt.storage.files import check_place

    command, workspace = called.command, called.config.workspace
    if (out := getattr(command, "out", None)) is not None:
        check_place(Path(out), folder=isinstance(command, Sample) or getattr(command, "format", None) == "diffusers")
        return
    for each in command.keeps:
        check_place(getattr(workspace, each), folder=True)


@contextmanager
def warned() -> Iterator[None]:
    """While the block runs, each warning of the package is said once, as what commands themselves have to remark."""
    said: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *place: Any, **how: Any) -> None:
            if not issubclass(category, TsAdaptWarning):
                show(message, category, *place, **how)
            elif str(message) not in said:
                said.add(str(message))
                print(f"ts-adapt: warning: {message}", file=sys.stderr)

        warnings.simplefilter("always", TsAdaptWarning)
        warnings.showwarning = say
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script: 0 when done, 2 for bad input, 130 when interrupted, 143 when terminated, 141 when
    nobody reads what it prints."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_spelled.__name__)
    with _terminable():
        return _outcome(arguments)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """What a console shows for a sign that its encoding lacks: a plain one, else its number, so that none is lost."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    plain = (PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs)
    return "".join(plain), error.end


codecs.register_error(_spelled.__name__, _spelled)


def _outcome(arguments: Sequence[str]) -> int:
    """The exit code; of several processes one says what went wrong."""
    name = arguments[0] if arguments else ""
    kept = COMMANDS[name].kept if name in COMMANDS else "nothing was begun"
    try:
        run(arguments)
        print(end="", flush=True)
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # or what is left would be tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError):  # where nobody reads that either
            print(f"ts-adapt: nobody reads the output any more; {kept}", file=sys.stderr)
        return 141
    except KeyboardInterrupt as interrupt:
        if distributed.is_told_here(interrupt):
            print(f"ts-adapt: {str(interrupt) or 'interrupted'}; {kept}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130
    except (TsAdaptError, OSError, MemoryError, RecursionError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        if distributed.is_told_here(error):
            print(f"ts-adapt: {sentence}", file=sys.stderr)
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
