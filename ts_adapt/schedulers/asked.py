"""What a pipeline's class asks of its scheduler, read from its source: so that what ours has not is refused at once.

    scheduler.name, hasattr(scheduler, "name")      an attribute
    set_timesteps(name=...), step(name=...)         an argument, of the first through `retrieve_timesteps` too
    deepcopy(scheduler)                             copies, which run beside it

`scheduler` is the pipeline's own or a function's argument of that name. `__init__` is over when a schedule is attached,
what is under `isinstance(scheduler, ...)` is for schedulers of diffusers, and what only a callback or a dictionary is
told comes to nothing.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

METHODS = {"set_timesteps": "set_timesteps", "retrieve_timesteps": "set_timesteps", "step": "step"}
"""What is called -> the method of the scheduler that gets the arguments."""


@dataclass
class Asked:
    """Names of attributes, and of methods' arguments (method, name); whether it is copied."""

    attributes: set[str] = field(default_factory=set)
    arguments: set[tuple[str, str]] = field(default_factory=set)
    copied: bool = False


@cache
def asked_of_scheduler(pipeline: type) -> Asked:
    """What the modules of `pipeline` and of its bases ask; nothing where they have no source."""
    from diffusers import DiffusionPipeline

    found = Asked()
    for kind in pipeline.__mro__:
        if kind is not DiffusionPipeline and issubclass(kind, DiffusionPipeline):
            _read(kind.__module__, found)
    return found


def _read(module: str, found: Asked) -> None:
    """Add to `found` what `module` asks."""
    try:
        nodes = list(_running(ast.parse(inspect.getsource(sys.modules[module]))))
    except (KeyError, OSError, TypeError, SyntaxError):
        return
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _is_scheduler(node.value):
            found.attributes.add(node.attr)
        elif isinstance(node, ast.Call):
            if _name(node.func) == "hasattr" and _is_scheduler(node.args[0]):
                found.attributes.add(ast.literal_eval(node.args[1]))
            elif _name(node.func) == "deepcopy":
                found.copied |= any(map(_is_scheduler, node.args))
            elif method := METHODS.get(_name(node.func)):
                found.arguments |= {(method, keyword.arg) for keyword in node.keywords if keyword.arg}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes under `node` that a scheduler which is none of diffusers' may come to."""
    for child in ast.iter_child_nodes(node):
        over = isinstance(child, ast.FunctionDef) and child.name == "__init__"
        if over or isinstance(child, ast.Dict) or _name(getattr(child, "func", None)) == "callback_on_step_end":
            continue
        yield child
        if isinstance(child, ast.If | ast.IfExp) and any(map(_asks_for_class, ast.walk(child.test))):
            rest = child.orelse if isinstance(child.orelse, list) else [child.orelse]
            for other in rest:
                yield other
                yield from _running(other)
        else:
            yield from _running(child)


def _asks_for_class(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) == "isinstance" and _is_scheduler(node.args[0])


def _is_scheduler(node: Any) -> bool:
    return _name(node) == "scheduler"


def _name(node: Any) -> str:
    return str(node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else "")
