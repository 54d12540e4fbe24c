"""How the command line is read, and what is said where it cannot be.

A list is one value, or has commas (`--nfe 5`, `--solvers unipc-3,ddim`), with or without brackets, in a YAML file too.
YAML's plain words are read as JSON's: what is no number there (010, 1_000, 1:30, a date) is a text, which an option
that is a number reads as people do, or refuses; a key given twice is refused; a group without options gives none.
Every option is checked by what its dataclass says of it (`options`), wherever it is given. jsonargparse gives the help
and prints configs.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from ts_adapt.errors import TsAdaptError, one_line
from ts_adapt.options import Place, Scalar, check, is_list, read, taken_apart

HELP_ALL = "--help-all"
HELP = ("--help", "-h", HELP_ALL)
CONFIG, PRINT = "--config", "--print_config"
_NOTHING = re.compile(r"(, )?default: %\(default\)s|required")
_WORDS = (
    ("bool", re.compile(r"(true|false|True|False|TRUE|FALSE)$"), list("tTfF")),
    ("null", re.compile(r"(null|Null|NULL|~|)$"), ["n", "N", "~", ""]),
    ("int", re.compile(r"-?(0|[1-9][0-9]*)$"), list("-0123456789")),
    ("float", re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$|-?\.inf$|\.nan$"), list("-0123456789.")),
    ("merge", re.compile(r"<<$"), ["<"]),
)
"""Tags of YAML, the plain words that have them, and what these begin with."""
MAX_BYTES, MAX_VALUES = 2**20, 10_000
"""Of a config file; its aliases count as what they stand for."""


class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults behind each option, where there are any; descriptions as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text: str = super()._get_help_string(action)
        absent = action.default is None or action.default is False
        return _NOTHING.sub("", text).replace(" ()", "") if absent else text


class Parser(ArgumentParser):
    """Raises TsAdaptError where argparse would print usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise TsAdaptError(f"the options cannot be understood ({one_line(message)}); leave out what is named")


def flag_of(name: str) -> str:
    """The flag of a command's field `name`."""
    return f"--{name.replace('_', '-')}"


@dataclass
class Line:
    """What stands behind a command.

    given       the options that are named, in config files too, and their values
    experiment  what says which experiment it is about: config files, and the options that override them
    behind      the words that are neither options nor values of one
    shown       the word that asks for the config to be printed, if any
    """

    given: dict[str, Any] = field(default_factory=dict)
    experiment: list[tuple[str, str]] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    shown: str | None = None


def read_line(
    command: str, words: Sequence[str], flags: Mapping[str, Any], options: Mapping[str, Any],
    elsewhere: Mapping[str, Sequence[str]],
) -> Line:  # fmt: skip
    """The `words` behind a `command`; TsAdaptError for an option that is unknown, or has a value that it may not have.

    flags, options  those of the command, and those of the config: their names and what they may be
    elsewhere       the flags of all commands, as they are written, and whose they are
    """
    line, rest, known = Line(), iter(words), {**flags, **options}
    own = {flag_of(name): name for name in flags}
    for word in rest:
        option, equals, text = word.partition("=")
        name = own.get(option, option[2:] if option[:2] == "--" and option[2:] in options else "")
        if option == PRINT:
            line.shown = word
            continue
        if name and option in own and known[name] is bool:
            if equals:
                raise TsAdaptError(f"{option} takes no value; give it alone, or leave it out")
            line.given[name] = True
            continue
        if not name and option != CONFIG:
            if option in elsewhere:
                raise _of_others(command, option, elsewhere[option], known)
            if option[:1] == "-" and option != "-":
                raise _unknown(command, option.removeprefix("--"), known)
            line.behind.append(word)
            continue
        value = text if equals else next(rest, None)
        if value is None or value.partition("=")[0] in (CONFIG, *own, *(f"--{other}" for other in options)):
            raise TsAdaptError(f"{option} has no value; give one behind it")
        line.experiment += [(option, value)] if option not in own else []
        if option == CONFIG:
            line.given |= _file(Path(Place().expanded(CONFIG, value)), command, known)
        elif option in own:
            _flag(line, name, value, known[name])
        else:
            line.given |= _option(command, name, value, known)
    return line


def made(kind: type[Any], given: Mapping[str, Any], prefix: str = "") -> Any:
    """The dataclass `kind`, with what is `given` by dotted names for its options and those of the groups in it."""
    hints, values = get_type_hints(kind), {}
    for name in (option.name for option in fields(kind)):
        if _is_group(hints[name]):
            values[name] = made(hints[name], given, f"{prefix}{name}.")
        elif prefix + name in given:
            values[name] = given[prefix + name]
    return kind(**values)


def _flag(line: Line, name: str, value: str, hint: Any) -> None:
    """Give a command's own flag the `value`; where it takes a list, one more of them."""
    if is_list(hint):
        line.given.setdefault(name, []).append(read(value, get_args(taken_apart(hint)[0])[0], name))
        return
    line.given[name] = read(value, hint, name)
    check(name, line.given[name], hint)


def _option(command: str, name: str, value: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the text `value` of an option of the config gives, by dotted names."""
    hint, listed = known[name], is_list(known[name], value)
    text = _in_brackets(value) if listed and value != "null" else value
    nested = listed or _is_group(hint) or hint == dict[str, Any]
    return _entries({name: _yaml(text, f"option {name}") if nested else text}, command, known)


def _in_brackets(value: str) -> str:
    return value if value[:1] == "[" else f"[{value}]"


def _is_group(hint: Any) -> bool:
    return isinstance(hint, type) and is_dataclass(hint)


def _yaml(text: str, what: str) -> Any:
    """What a word says, or the word itself; TsAdaptError, naming `what` it is, for a key that is given twice."""
    import yaml

    try:
        return _load(text, what)
    except (ValueError, RecursionError, yaml.YAMLError):
        return text


def _load(text: str, what: str) -> Any:
    """The content of YAML, whose plain words are those of JSON, and `Scalar`s where they are numbers or truths."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: dict[str, int] = {}
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                name, row = str(key.value), key.start_mark.line + 1
                if name in seen:
                    raise TsAdaptError(f"{what} gives {name!r} twice, in lines {seen[name]} and {row}; leave one out")
                seen[name] = row
            return super().construct_mapping(node, deep)

    def scalar(make: Callable[[Loader, Any], Any], loader: Loader, node: Any) -> Scalar:
        return Scalar(str(node.value), make(loader, node))

    for tag, pattern, first in _WORDS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)
    for tag in ("bool", "int", "float"):
        made = yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{tag}"]
        Loader.add_constructor(f"tag:yaml.org,2002:{tag}", partial(scalar, made))
    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _entries(content: dict[Any, Any], command: str, known: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options in `content` by their dotted names, read and checked."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in known:
            raise _unknown(command, name, known)
        hint = known[name]
        if isinstance(value, dict) and _is_group(hint):
            found |= _entries(value, command, known, f"{name}.")
            continue
        if value is None and _is_group(hint):
            continue
        if is_list(hint, value) and isinstance(value, str):
            value = _yaml(_in_brackets(value), f"option {name}")
        found[name] = read(value, hint, name)
        check(name, found[name], hint)
    return found


def _file(path: Path, command: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a config file by their dotted names; TsAdaptError unless it is a file of options."""
    import yaml

    from ts_adapt.storage.files import check_plain, read_bytes

    try:
        content = _load(read_bytes(path, limit=MAX_BYTES).decode(), str(path))
        check_plain(content, path, most=MAX_VALUES)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        deep = isinstance(error, RecursionError)
        reason = "it is nested too deeply" if deep else " ".join(str(error).split())
        raise TsAdaptError(f"{path} is no YAML text ({reason}); give a file of lines like `name: fashion`") from error
    if not isinstance(content, dict):
        held = "is empty" if content is None else f"holds a {type(content).__name__}, not options"
        raise TsAdaptError(f"{path} {held}; give a YAML file of lines like `name: fashion`")
    found = _entries(content, command, known)
    check_plain(found, path)  # its numbers, where numbers are meant
    return found


def _of_others(command: str, option: str, commands: Sequence[str], known: Iterable[str]) -> TsAdaptError:
    """The error for an `option` that the `command`, which has those `known`, does not have, and these `commands` do."""
    named = " and ".join(filter(None, [", ".join(commands[:-1]), commands[-1]]))
    near = difflib.get_close_matches(option, [f"--{name}" for name in known], 1, 0.9)
    hint = f"did you mean {near[0]}?" if near else f"`ts-adapt {commands[0]} --help` says what it does"
    return TsAdaptError(f"{option} is an option of {named}, not of {command}; {hint}")


def _unknown(command: str, given: str, known: Mapping[str, Any]) -> TsAdaptError:
    """The error for an option that the `command` does not have; it names the near one of those `known`."""
    whole, _, entry = given.rpartition(".")
    if whole in known and not _is_group(known[whole]):
        return TsAdaptError(f"the entries of {whole} are given in one: --{whole} '{{{entry}: ...}}'")
    near = difflib.get_close_matches(given, list(known), 1, 0.6)
    if not near:
        short = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [short[name] for name in difflib.get_close_matches(given.rsplit(".", 1)[-1], list(short), 1, 0.6)]
    hint = f"did you mean {near[0]!r}?" if near else f"`ts-adapt {command} {HELP_ALL}` lists the options"
    return TsAdaptError(f"unknown option {given!r}; {hint}")
