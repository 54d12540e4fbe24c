"""How the command line is read, and what is said where it cannot be.

A list is one value, or has commas (`--nfe 5`, `--solvers unipc-3,ddim`), with or without brackets, in a YAML file too.
Commands in messages are short where they are raised; `completed` adds what says which experiment they are for.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ts_adapt.interfaces import TsAdaptError

_NOTHING = re.compile(r"(, )?default: %\(default\)s|required")
_UNKNOWN = re.compile(
    r"(?:Key|Group|Option) '([\w.-]+)' is not expected|does not accept option '([\w.-]+)'"
    r"|[Uu]nrecognized arguments: (\S+)"
)


ALONE = ("--help", "--version")
"""Options of the program itself, for which no option of an experiment has to be known."""


MAX_BYTES, MAX_VALUES = 2**20, 10_000
"""Of a config file; its aliases count as what they stand for."""


class Refused(Exception):
    """The command line could not be understood."""


class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults behind each option, where there are any; descriptions as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text: str = super()._get_help_string(action)
        return _NOTHING.sub("", text).replace(" ()", "") if action.default is None else text


class Parser(ArgumentParser):
    """Raises `Refused` where argparse would print usage and exit."""

    @property
    def options(self) -> list[str]:
        """The names of its options, without dashes in front."""
        return [name.removeprefix("--") for name in self._option_string_actions if name[-1] != "+"]

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise Refused(message)


class LineParser(Parser):
    """Of whole command lines: reads config files itself, and takes lists without brackets."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        return super().parse_args(None if args is None else _prepared(args), *rest, **options)


def _prepared(words: Sequence[str]) -> list[str]:
    """The command line with config files in place of their names, and every list in brackets."""
    found: list[str] = []
    for option, value in _paired(words):
        if value is not None and option == "--config":
            value = _config_text(Path(value))
        elif value is not None and option[2:] in _lists() and value[:1] != "[" and value != "null":
            value = f"[{value}]"
        found += [option] if value is None else [option, value]
    return found


def _paired(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Every option of the config with its value, and every other word alone."""
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option == "--config" or (option[:2] == "--" and option not in ALONE and option[2:] in _options()):
            yield option, (value if equals else next(rest, None))
        else:
            yield word, None


@cache
def _options() -> dict[str, str]:
    from ts_adapt.config import Config, types_of

    return types_of(Config)


def _lists() -> set[str]:
    return {option for option, kind in _options().items() if kind.startswith("list[")}


def _config_text(path: Path) -> str:
    """The YAML of a config file, every list in it a list; TsAdaptError unless it is a file of options."""
    import yaml

    from ts_adapt.storage.files import check_plain, read_bytes

    try:
        content = yaml.safe_load(read_bytes(path, limit=MAX_BYTES).decode())
        check_plain(content, path, most=MAX_VALUES)
        for place, name in _lists_in(content):
            given = str(place[name])
            place[name] = yaml.safe_load(given if given[:1] == "[" else f"[{given}]")
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if deep else " ".join(str(error).split())
        raise TsAdaptError(f"{path} is no YAML text ({reason}); give a file of lines like `name: fashion`") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}, not options"
        raise TsAdaptError(f"{path} {found}; give a YAML file of lines like `name: fashion`")
    text: str = yaml.safe_dump(content, sort_keys=False)
    return text


def _lists_in(content: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """The places in the options `content` where a list is one value or has commas."""
    for option in _lists():
        *groups, name = option.split(".")
        place = content
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(name), str | int):
            yield place, name


def experiment_of(words: Sequence[str]) -> list[tuple[str, str]]:
    """What of a command line says which experiment it is about: the config, and the options that override it."""
    return [(option, value) for option, value in _paired(words) if value is not None]


def completed(message: str, commands: Iterable[str], words: Sequence[str]) -> str:
    """`message` with every one of the `commands` in it made one for the experiment that the command line `words` is of.

    What the message says of a command (`ts-adapt search --nfe 5`) stands, and the rest of the experiment is added.
    """
    experiment = experiment_of(words)

    def complete(found: re.Match[str]) -> str:
        command, flags = found.groups()
        own = [f" {option} {shlex.quote(value)}" for option, value in experiment if f" {option} " not in f"{flags} "]
        return f"`ts-adapt {command}{''.join(own)}{flags}`"

    return re.sub(rf"`ts-adapt ({'|'.join(commands)})\b((?! --help)[^`]*)`", complete, message)


def explain(message: str, command: str, known: Sequence[str]) -> str:
    """The parser's message as one sentence; for an unknown option of `command`, with the near one of `known`."""
    text = " ".join(message.split())
    found = _UNKNOWN.search(text)
    if not found:
        return re.sub(r"<class '(\w+)'>", r"\1", text.replace("Parser key ", "option ").replace(f"{command}.", ""))
    given = next(name for name in found.groups() if name)
    if found.group(3) and not given.startswith("-"):
        return f"{given!r} is no option and no value of one; `ts-adapt {command} --help` lists the options"
    given = given.removeprefix("--").partition("=")[0]
    near = difflib.get_close_matches(given, known, 1, 0.6)
    if not near:
        short = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [short[name] for name in difflib.get_close_matches(given.rsplit(".", 1)[-1], list(short), 1, 0.6)]
    hint = f"did you mean {near[0]!r}?" if near else f"`ts-adapt {command} --help` lists the options"
    return f"unknown option {given!r}; {hint}"
