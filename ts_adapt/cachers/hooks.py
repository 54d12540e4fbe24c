"""What a module does instead of its forward, put in place and taken off again: hooks of diffusers.

    module(...)  ->  action(forward, ...)            forward: the module's own, or that of the hook beneath

Several hooks on one module are nested in the order of `NESTING`, the last one outermost, whichever was put in place
first: what DeepCache skips, T-GATE does not see. diffusers' registry takes off its last hook only without harm to the
others, so those above are lifted first and put back. Once the last hook has gone nothing is left on the module. A copy
of a hooked module would go on calling the original's weights; it is refused when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import nn

from ts_adapt.errors import TsAdaptError

NESTING = ("firstblock", "magcache", "seacache", "taylorseer", "pab", "fastercache", "tgate", "deepcache")
_REGISTRY = "_diffusers_hook"


class Interception(ModelHook):
    """`action` in place of the forward of `module`."""

    def __init__(self, module: nn.Module, action: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.action = module, action

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if module is not self.module:
            raise TsAdaptError(
                f"this {type(module).__name__} is a copy of one with a cacher, and would run the weights of the "
                "original; remove the cacher, copy the network, and attach one to each"
            )
        return args, kwargs

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.action(self.fn_ref.original_forward, *args, **kwargs)


def install(module: nn.Module, name: str, action: Callable[..., Any]) -> None:
    """Let `module` do `action`, under the `name` of one of `NESTING`."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    outer = NESTING[NESTING.index(name) + 1 :]
    with _lifted(registry, lambda top: top in outer):
        registry.register_hook(Interception(module, action), name)


def uninstall(module: nn.Module, name: str) -> None:
    """Take the hook called `name`, if there is one, off `module`; the others stay, and without any the module is as it
    was."""
    registry = getattr(module, _REGISTRY, None)
    if registry is None:
        return
    with _lifted(registry, lambda top: top != name):
        registry.remove_hook(name, recurse=False)
    _tidy(module)


def taken(network: nn.Module, apply: Callable[[nn.Module], None]) -> list[tuple[nn.Module, ModelHook]]:
    """The hooks that `apply` puts on modules of `network`, each with its module; none of them is left there."""
    before = {hook for module in network.modules() for hook in _hooks_of(module).values()}
    found = []
    try:
        apply(network)
    finally:
        for module in network.modules():
            for name, hook in [*_hooks_of(module).items()]:
                if hook not in before:
                    found.append((module, hook))
                    uninstall(module, name)
            _tidy(module)
    return found


def _hooks_of(module: nn.Module) -> dict[str, ModelHook]:
    hooks: dict[str, ModelHook] = getattr(getattr(module, _REGISTRY, None), "hooks", {})
    return hooks


def _tidy(module: nn.Module) -> None:
    """Leave nothing on a `module` without hooks."""
    if hasattr(module, _REGISTRY) and not _hooks_of(module):
        delattr(module, _REGISTRY)
        if vars(module).get("forward") == MethodType(type(module).forward, module):
            del module.forward


@contextmanager
def _lifted(registry: HookRegistry, above: Callable[[str], bool]) -> Iterator[None]:
    """While the block runs, the hooks on top, as long as they are `above`, are off; they are back however it ends."""
    lifted = []
    try:
        while registry.hooks and above(top := next(reversed(registry.hooks))):
            lifted.append((top, registry.hooks[top]))
            registry.remove_hook(top, recurse=False)
        yield
    finally:
        for name, hook in reversed(lifted):
            if name not in registry.hooks:
                registry.register_hook(hook, name)
