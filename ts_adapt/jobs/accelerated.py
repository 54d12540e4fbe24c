"""The session's network, cheaper: quantized, then cached, and exactly itself again behind the block.

    with accelerated(session, "deepcache-2", "minmax-w8a8"):
        whatever samples with session.denoiser

What a quantizer finds is kept under the workspace's data folder, one folder for each set of options, those of the
calibration set included. Calibration sets are calls of the network in full precision, along the teacher's grid from
training noises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ts_adapt.assembly import NONE, Quantizing, build_cachers, build_quantizer
from ts_adapt.cachers import attached
from ts_adapt.files import sha256_of_json
from ts_adapt.interfaces import TsAdaptError
from ts_adapt.jobs.session import Session
from ts_adapt.sampling import initial_noise, noise_for, noise_scale
from ts_adapt.teacher.store import TRAIN_START, condition_of

if TYPE_CHECKING:
    from ts_adapt.quantizers.calls import Call

FULL = (NONE, NONE)
"""Neither cacher nor quantizer."""


class Impossible(TsAdaptError):
    """The session's network does not go together with this cacher or quantizer."""


@contextmanager
def accelerated(session: Session, cacher: str, quantizer: str) -> Iterator[None]:
    """The network of `session` with the quantizer and the cacher of these names, for as long as the block runs.

    Raises Impossible where the network lacks what one of them needs or a library is not installed, and TsAdaptError for
    unknown names; the network is then as it was.
    """
    quantizing, cachers = build_quantizer(quantizer), build_cachers(cacher)
    network = getattr(session.denoiser, "network", None)
    if not isinstance(network, nn.Module):
        if quantizing is not None or cachers:
            raise Impossible(f"the model {session.config.model.name!r} has no network to cache or to quantize")
        yield
        return
    with ExitStack() as stack:
        if quantizing is not None:
            from ts_adapt.quantizers.network import restore

            _quantize(session, network, quantizer, quantizing)
            stack.callback(restore, network)
        with _refusing():
            stack.enter_context(attached(network, *cachers))
        yield


def key_of(session: Session, cacher: str, quantizer: str) -> tuple[Any, ...]:
    """What the network of a cacher and a quantizer depends on beside the model; nothing for neither."""
    if (cacher, quantizer) == FULL:
        return ()
    quantizing = build_quantizer(quantizer)
    return cacher, quantizer, None if quantizing is None else _digest(session, quantizing)


def calibration_set(session: Session, select: str) -> list[Call]:
    """The calls that quantizers of `session` are calibrated on, on the model's device."""
    from ts_adapt.quantizers.calibration import collect

    options, teacher = session.config.calibration, session.config.teacher
    solver, source = session.solver(teacher.solver), session.condition_source()
    index = range(TRAIN_START, TRAIN_START + options.noises)
    x_T: Tensor = initial_noise(teacher.seed, index, session.shape) * noise_scale(session.noise)
    x_T = x_T.to(session.config.model.device)
    drawn = source.draw(teacher.seed, index) if source is not None else {}
    return collect(
        session.denoiser, solver, session.teacher_grid(options.nfe), x_T,
        condition=condition_of({name: value.to(x_T.device) for name, value in drawn.items()}),
        select=select, count=options.count,
        step_noise=noise_for(teacher.seed, index, x_T) if solver.needs_noise else None,
    )  # fmt: skip


def _quantize(session: Session, network: nn.Module, name: str, quantizing: Quantizing) -> None:
    """Quantize `network`: as it was done before where that is kept, else anew."""
    from ts_adapt.quantizers.network import quantize, restore
    from ts_adapt.quantizers.storage import save

    folder = session.workspace.quantizer(name, _digest(session, quantizing))
    if _loaded(network, folder):
        return
    calls = calibration_set(session, quantizing.select) if quantizing.method.needs_calls else []
    with _refusing():
        quantize(network, quantizing.method, calls, layers=quantizing.layers)
    try:
        save(network, folder)
    except BaseException:
        restore(network)
        raise


def _loaded(network: nn.Module, folder: Path) -> bool:
    """Whether `folder` holds a quantization of this very network, which it then has; any other is as none."""
    from ts_adapt.quantizers.network import is_quantized, restore
    from ts_adapt.quantizers.storage import CONFIG, load

    if not (folder / CONFIG).exists():
        return False
    try:
        load(network, folder)
    except TsAdaptError:
        if is_quantized(network):
            restore(network)
        return False
    return True


def _digest(session: Session, quantizing: Quantizing) -> str:
    """A hash of everything that a quantization depends on beside the network."""
    config, method = session.config, quantizing.method
    made: dict[str, Any] = {
        "quantizer": method.name, "options": asdict(method.options), "layers": asdict(quantizing.layers),
    }  # fmt: skip
    if method.needs_calls:
        source = session.condition_source()
        made["calibration"] = {
            **asdict(config.calibration), "select": quantizing.select, "solver": config.teacher.solver,
            "times": session.teacher_grid(config.calibration.nfe).times.tolist(), "seed": config.teacher.seed,
            "guidance": config.guidance, "condition": None if source is None else source.describe(),
        }  # fmt: skip
    return sha256_of_json(made)[:12]


@contextmanager
def _refusing() -> Iterator[None]:
    """What the network refuses in the block is Impossible."""
    try:
        yield
    except TsAdaptError as error:
        raise Impossible(str(error)) from error
