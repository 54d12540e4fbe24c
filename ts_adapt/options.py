"""Options are dataclasses whose fields say what they may be; here is what they say it with, and the check of it.

iterations: Count = 20                             a whole number from 1 on
ema: Annotated[float, Between(0, 0.999999)]        a number between two, which are allowed themselves
method: Literal["lbfgs", "adam"] = "lbfgs"         one of these
guidance: Annotated[...] | list[Positive]          a number, or a list of some
columns: list[Annotated[str, OneOf(COLUMNS)]]      each of them a name of a registry
prompts: PathText | None = None                    a file or folder
teacher: TeacherOptions                            a group of options
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from ts_adapt.errors import TsAdaptError, unknown
from ts_adapt.interfaces import MAX_STEPS

MANY, SMALL = 10_000_000, 1e-9


@dataclass(frozen=True, repr=False)
class Between:
    """The least and the greatest value of a number."""

    low: float
    high: float

    def __repr__(self) -> str:
        return f"{self.low:g} to {self.high if isinstance(self.high, int) else format(self.high, 'g')}"


@dataclass(frozen=True, repr=False, eq=False)
class OneOf:
    """The names of a registry, as it is when a value is checked."""

    names: Collection[str]

    def __repr__(self) -> str:
        return ", ".join(self.names)


@dataclass(frozen=True, repr=False)
class Place:
    """Says that a text is a file or folder, whose `~` and `$NAME` stand for what they do in a shell."""

    def __repr__(self) -> str:
        return "a path"

    def expanded(self, option: str, text: str) -> str:
        """TsAdaptError, naming the `option`, for a variable that is not set, a user that there is not, and no text."""
        found = os.path.expanduser(os.path.expandvars(text))
        if not found or "\0" in found:
            raise TsAdaptError(f"option {option} is {text!r}, which is no path; leave it out, or give one")
        missing = re.search(r"\$\w+|\$\{\w+\}", found)
        if missing or found.startswith("~"):
            what = missing.group() if missing else found.partition("/")[0]
            raise TsAdaptError(f"option {option} is {text}, where {what} stands for nothing here; give the path itself")
        return found


PathText = Annotated[str, Place()]
Count = Annotated[int, Between(1, MANY)]
Evaluations = Annotated[int, Between(1, MAX_STEPS)]
Seed = Annotated[int, Between(0, 2**32 - 1)]
Positive = Annotated[float, Between(SMALL, 1000)]
Weight = Annotated[float, Between(0, 1000)]
"""Of a part of a loss."""
Decay = Annotated[float, Between(0, 0.999999)]
"""Of a moving average."""

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def hints_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """The dotted name of every option of a dataclass, groups and what is in them included, and what it may be."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind, include_extras=True)
    for name in (option.name for option in fields(kind)):
        found[prefix + name] = hints[name]
        if is_dataclass(hints[name]) and isinstance(hints[name], type):
            found |= hints_of(hints[name], f"{prefix}{name}.")
    return found


def check_options(options: Any, prefix: str = "") -> None:
    """TsAdaptError naming the first option of a dataclass, or of a group in it, whose value it may not have."""
    for option, hint in hints_of(type(options)).items():
        value = options
        for name in option.split("."):
            value = getattr(value, name)
        check(prefix + option, value, hint)


def check(option: str, value: Any, hint: Any) -> None:
    """TsAdaptError, naming the `option`, unless `value` is what `hint` says."""
    kind, limits, optional = taken_apart(hint, value)
    if value is None and optional:
        return
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(value, kind):
            raise TsAdaptError(
                f"option {option} is {value!r}; it is a group of options, give some of it, like "
                f"{option}.{next(iter(hints_of(kind)))}"
            )
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise TsAdaptError(f"option {option} is {value!r}; give names and values, like {{name: value}}")
    elif get_origin(kind) is list:
        if not isinstance(value, list):
            raise TsAdaptError(f"option {option} is {value!r}; give a list, with commas between")
        for entry in value:
            check(option, entry, get_args(kind)[0])
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown(option, str(value), get_args(kind))
    elif isinstance(limits, OneOf):
        if not isinstance(value, str) or value not in limits.names:
            raise unknown(option, str(value), limits.names)
    elif isinstance(limits, Between):
        _check_limits(option, value, kind, limits)
    elif kind in WORDS and not isinstance(value, (int, float) if kind is float else kind):
        raise TsAdaptError(f"option {option} is {value!r}; give {WORDS[kind]}")


class Scalar(str):
    """A word of YAML as it is written, and the number or truth `value` that it is where no text is expected."""

    value: Any

    def __new__(cls, text: str, value: Any) -> Self:
        found = super().__new__(cls, text)
        found.value = value
        return found


def plain(value: Any) -> Any:
    """`value` with what its words are in place of how they are written."""
    if isinstance(value, dict):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.value if isinstance(value, Scalar) else value


def yaml_text(content: Any, **how: Any) -> str:
    """`content` as YAML, where no text can be taken for a number, whoever reads it: PyYAML writes 1e3 without quotes.

    how  further arguments of `yaml.dump`
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
            sign: [*known] for sign, known in yaml.SafeDumper.yaml_implicit_resolvers.items()
        }

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile("."), list("-+.0123456789"))
    text: str = yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, **how)
    return text


def read(value: Any, hint: Any, option: str) -> Any:
    """What `value`, a text or what a YAML file holds, means where `hint` is expected; what it cannot mean, as it is.

    Raises TsAdaptError, naming the `option`, for a path that means nothing here.
    """
    kind, limits, optional = taken_apart(hint, value)
    if value == "null" and optional:
        return None
    if get_origin(kind) is list and isinstance(value, list):
        return [read(entry, get_args(kind)[0], option) for entry in value]
    value = str(value) if kind is str and isinstance(value, Scalar) else plain(value)
    if isinstance(limits, Place) and isinstance(value, str):
        return limits.expanded(option, value)
    if kind is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        return _number(value, kind)
    return value


def _number(value: str | float, kind: type) -> Any:
    try:
        if kind is int and (isinstance(value, int) or (isinstance(value, str) and not value.strip("+-_0123456789"))):
            return int(value)
        number = float(value)
    except (ValueError, OverflowError):
        return value
    return int(number) if kind is int and number.is_integer() else number


def is_list(hint: Any, value: Any = None) -> bool:
    """Whether a list is expected, where `value` is given."""
    return get_origin(taken_apart(hint, value)[0]) is list


def taken_apart(hint: Any, value: Any = None) -> tuple[Any, Any, bool]:
    """The type itself, its limits, and whether None is one of its values.

    Of a list and something else it is the list where `value` is one, or a text with commas or in brackets.
    """
    kinds = list(_alternatives(hint))
    several = isinstance(value, list) or (isinstance(value, str) and ("," in value or value[:1] == "["))
    known = [kind for kind in kinds if kind is not NoneType]
    kind = next((kind for kind in known if several and get_origin(kind) is list), known[0])
    limits = None
    if get_origin(kind) is Annotated:
        kind, limits = get_args(kind)
    return kind, limits, NoneType in kinds


def _alternatives(hint: Any) -> Iterator[Any]:
    yield from get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _check_limits(option: str, value: Any, kind: type, limits: Between) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not limits.low <= value <= limits.high or (kind is int and value != int(value)):
        low = f"{WORDS[kind]} from {limits.low:g} on"
        wanted = f"at least {limits.low:g}" if number and value < limits.low else low
        ceiling = limits.high if isinstance(limits.high, int) else format(limits.high, "g")
        raise TsAdaptError(f"option {option} is {value}; give {wanted}, at most {ceiling}")
