"""The session's network, cheaper: pruned, then quantized, then cached, and exactly itself again behind the block.

    with cheaper_network(session, StudentOptions(cacher="deepcache-2", quantizer="minmax-w8a8")):
        whatever samples with session.denoiser, or learns a schedule for it

What a quantizer finds is kept under the workspace's data folder, one folder for each set of options, those of the
calibration set and of the blocks that are left out included; who makes it holds the folder. Calibration sets are calls
of the network in full precision, pruned where it is, along the teacher's grid from training noises. What has to be
trained is made by `quantize` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ts_adapt import distributed, pruning
from ts_adapt.assembly import FULL, NONE, Quantizing, StudentOptions, build_cachers, build_quantizer
from ts_adapt.cachers import attached
from ts_adapt.errors import TsAdaptError
from ts_adapt.jobs.experiment import SPLITS
from ts_adapt.jobs.session import Session
from ts_adapt.remedies import command
from ts_adapt.sampling import noise_for, told
from ts_adapt.storage.files import read_json, sha256_of_file, sha256_of_json, write_json
from ts_adapt.storage.folders import beside, if_free, making, replace_folder
from ts_adapt.storage.layout import CONFIG, REDONE, TENSORS

if TYPE_CHECKING:
    from ts_adapt.quantizers.calibration.collect import Call

TABLE_TIMES = 250
"""Places over the whole range of times, even as the network knows them, of the tables that scales become; they are
interpolated in between."""


class Impossible(TsAdaptError):
    """The session's network does not go together with this file of blocks, cacher or quantizer."""


@contextmanager
def cheaper_network(session: Session, student: StudentOptions) -> Iterator[None]:
    """The network of `session`, made `student`, for as long as the block runs.

    Raises Impossible where the network lacks what a part of it needs or a library is not installed, and TsAdaptError
    for unknown names; the network is then as it was.
    """
    quantizing, cachers = build_quantizer(student.quantizer), build_cachers(student.cacher)
    network = session.denoiser.network
    if network is None:
        if student != FULL:
            raise Impossible(f"the model {session.config.model.name!r} has no network to prune, cache or quantize")
        yield
        return
    with ExitStack() as stack:
        if replace(student, cacher=NONE) != FULL:
            _open_teacher(session)
        if student.pruned != NONE:
            with _refusing():
                stack.enter_context(pruning.pruned(network, *pruning.read(student.pruned, network)))
        if quantizing is not None:
            from ts_adapt.quantizers.quantization import restore

            _quantize(session, network, student, quantizing)
            stack.callback(restore, network)
        with _refusing():
            stack.enter_context(attached(network, *cachers))
        yield


def check_gradients(session: Session) -> None:
    """TsAdaptError, naming the searches that need none, unless gradients pass through the student's network now.

    Through a quantizer they pass straight (as if it did not round), where it has been given such a gradient.
    """
    name, network = session.config.student.name, session.denoiser.network
    if not name or network is None:
        return
    from ts_adapt.denoisers.network import prediction_of
    from ts_adapt.quantizers.calibration.collect import Call

    calls: list[tuple[Tensor, Tensor]] = []

    def left(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append((Call.made(network, args, kwargs).x, prediction_of(out)))

    one, times = session.teacher("train", 1)[1], session.teacher_grid().times
    handle, reason = network.register_forward_hook(left, with_kwargs=True), "passes none"
    try:
        with told(session.denoiser.step_aware, 1, 1), torch.enable_grad():
            session.denoiser(one.x_T.clone().requires_grad_(), times[len(times) // 2], **one.condition)
            x, said = calls[-1]
            gradient = torch.autograd.grad(said.float().square().sum(), x, allow_unused=True)[0]
        usable = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    except (TsAdaptError, RuntimeError) as error:
        usable, reason = False, str(error)
    finally:
        handle.remove()
    if not usable:
        raise TsAdaptError(
            f"the search needs the gradient of the network's output in its input, and {name} has none ({reason}); "
            "take --method blackbox, or --method static with --static.method forward"
        )


def key_of(session: Session, student: StudentOptions) -> tuple[Any, ...]:
    """What the network of `student` depends on beside the model; nothing for the teacher's own.

    A quantization that is made for the first time changes nothing of it; one that was made anew, with another result,
    does.
    """
    if student == FULL:
        return ()
    quantizing, digest, further = build_quantizer(student.quantizer), None, list[Any]()
    if quantizing is not None:
        digest = _digest(session, student, quantizing)
        mark = session.workspace.quantizer(student.quantizer, digest) / REDONE
        further += [read_json(mark, {"tensors": str})["tensors"]] if mark.exists() else []
    return student.cacher, student.quantizer, digest, *further, *_left_out(student).items()


def _left_out(student: StudentOptions) -> dict[str, list[str]]:
    """The blocks that `student` is without; nothing for one that is not pruned."""
    return {} if student.pruned == NONE else {"pruned": sorted(pruning.read(student.pruned))}


def calibration_set(session: Session, select: str) -> list[Call]:
    """The calls that quantizers of `session` are calibrated on, on the model's device."""
    from ts_adapt.quantizers.calibration.collect import collect

    options, teacher = session.config.calibration, session.config.teacher
    solver, (index, x_T, condition) = session.solver(teacher.solver), session.training_noises(options.noises)
    return collect(
        session.denoiser, solver, session.teacher_grid(options.nfe), x_T,
        condition=condition, select=select, count=options.count,
        step_noise=noise_for(teacher.seed, index, x_T) if solver.needs_noise else None,
    )  # fmt: skip


def _open_teacher(session: Session) -> None:
    """Read what there is of the teacher's samples, which are known by the weights of the network in full precision."""
    for split in filter(lambda name: session.workspace.teacher(name).exists(), SPLITS):
        with suppress(TsAdaptError):  # who needs what is damaged, or not of this teacher, says so
            session.teacher(split)


def folder_of(session: Session, student: StudentOptions, quantizing: Quantizing) -> Path:
    """Where what the quantizer of `student` finds with these options is kept."""
    return session.workspace.quantizer(student.quantizer, _digest(session, student, quantizing))


def quantize_anew(
    session: Session, network: nn.Module, quantizing: Quantizing, calls: Sequence[Call],
    train: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Quantize `network`, let `train` train it, and freeze it: scales that depend on time become tables."""
    from ts_adapt.quantizers.methods.tdq import freeze
    from ts_adapt.quantizers.quantization import quantize, restore

    with _refusing():
        quantize(network, quantizing.method, calls, layers=quantizing.layers)
    try:
        if train is not None:
            train()
        shares = torch.linspace(0, 1, TABLE_TIMES, dtype=torch.float64, device=next(network.parameters()).device)
        times = session.noise_schedule.at_share(shares)
        freeze(network, session.denoiser.timestep(times, times))
    except BaseException:
        restore(network)
        raise


def load_or_make(
    network: nn.Module, folder: Path, make: Callable[[], None], *, redo: bool = False, keep: bool = True
) -> bool:
    """Quantize `network` as it is kept in `folder`, else by `make`, and keep that; returns whether it was there.

    redo  make it all the same, and note it where it comes out different (`REDONE`)
    keep  whether the caller holds `folder` (see `making`); what others hold is not written to
    """
    from ts_adapt.quantizers.quantization import restore
    from ts_adapt.quantizers.storage import save

    def write() -> None:
        save(network, beside(folder))
        if redo:
            _mark(folder)
        replace_folder(folder, beside(folder))

    if not redo and _loaded(network, folder):
        return True
    make()
    try:
        if keep:
            distributed.first(write)
    except BaseException:
        restore(network)
        raise
    return False


def _mark(folder: Path) -> None:
    """Note beside `folder` that its tensors give way to others there; of the same ones as it was noted before."""
    former, made = folder / TENSORS, sha256_of_file(beside(folder) / TENSORS)
    if former.exists() and (sha256_of_file(former) != made or (folder / REDONE).exists()):
        write_json(beside(folder) / REDONE, {"tensors": made})


def _quantize(session: Session, network: nn.Module, student: StudentOptions, quantizing: Quantizing) -> None:
    """Quantize `network`: as it was done before where that is kept, else anew, which is kept unless another process is
    at it."""
    folder = folder_of(session, student, quantizing)
    if _loaded(network, folder):
        return
    if quantizing.method.needs_training:
        pruned = [] if student.pruned == NONE else ["--student.pruned", student.pruned]
        training = command("quantize", "--quantizer", student.quantizer, *pruned)
        raise Impossible(f"{student.quantizer} is not trained yet; train it with {training}")

    def make() -> None:
        calls = calibration_set(session, quantizing.select) if quantizing.needs_calls else []
        quantize_anew(session, network, quantizing, calls)

    with distributed.held(if_free(making(folder))) as ours:
        load_or_make(network, folder, make, keep=ours)


def _loaded(network: nn.Module, folder: Path) -> bool:
    """Whether `folder` holds a quantization of this very network, which it then has, in all processes; any other is as
    none."""
    from ts_adapt.quantizers.quantization import is_quantized, restore
    from ts_adapt.quantizers.storage import load

    if (folder / CONFIG).exists():
        with suppress(TsAdaptError):
            load(network, folder)
    if all(distributed.gathered(is_quantized(network))):
        return True
    if is_quantized(network):
        restore(network)
    return False


def _digest(session: Session, student: StudentOptions, quantizing: Quantizing) -> str:
    """A hash of everything that a quantization depends on beside the network."""
    config, method = session.config, quantizing.method
    layers = {name: value for name, value in asdict(quantizing.layers).items() if value or name != "correct"}
    made: dict[str, Any] = {"quantizer": method.name, "options": asdict(method.options), "layers": layers}
    made |= _left_out(student)
    if method.needs_training:
        made["qat"] = {k: v for k, v in asdict(config.qat).items() if k != "checkpoint_every"}
        if config.qat.data == "teacher":
            made["teacher"] = [config.teacher.train_samples, session.teacher_grid().times.tolist()]
    if quantizing.needs_calls:
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
