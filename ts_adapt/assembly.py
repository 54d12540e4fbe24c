"""From names to objects: the one place where options become denoisers, solvers, distances, cachers, quantizers.

Solvers are named `family-order`, or by the family alone (`FAMILIES`), or `ddim-eta0.5`, with `+corrector` behind any of
the multistep family or DDIM for UniPC's corrector; names of schedules are those of `schedules.name`. Names of cachers
are those of `cachers.registry`, names of quantizers those of `quantizers.methods.registry`, with `@uniform`, `@normal`
or `@active` behind one for the selection of its calibration set; pruned networks are called by the file that says what
they are without; `none` is none of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ts_adapt import cachers, distances
from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.denoisers.execution import execute
from ts_adapt.errors import TsAdaptError, one_line, unknown
from ts_adapt.interfaces import MAX_STEPS, Denoiser, Distance, NoiseSchedule, Solver
from ts_adapt.options import PathText
from ts_adapt.solvers import DDIM, DEIS, IPNDM, Corrected, DPMSolverPP, Euler, Heun, UniP, UniPC
from ts_adapt.zoo.networks import GREY

if TYPE_CHECKING:
    from ts_adapt.quantizers.layers.plan import LayerOptions
    from ts_adapt.quantizers.quantization import Quantizer

SOLVERS: dict[str, Callable[[NoiseSchedule], Any]] = {
    "ddim": lambda noise_schedule: DDIM(noise_schedule),
    "ddpm": lambda noise_schedule: DDIM(noise_schedule, eta=1.0),
    "euler": lambda noise_schedule: Euler(noise_schedule),
    "heun": lambda noise_schedule: Heun(noise_schedule),
    "dpmpp-2m": lambda noise_schedule: DPMSolverPP(noise_schedule, order=2),
    "dpmpp-3m": lambda noise_schedule: DPMSolverPP(noise_schedule, order=3),
    "dpmpp-3m-exact": lambda noise_schedule: DPMSolverPP(noise_schedule, order=3, exact=True),
    "deis-1": lambda noise_schedule: DEIS(noise_schedule, order=1),
    "deis-2": lambda noise_schedule: DEIS(noise_schedule, order=2),
    "deis-3": lambda noise_schedule: DEIS(noise_schedule, order=3),
    "unipc-1": lambda noise_schedule: UniPC(noise_schedule, order=1),
    "unipc-2": lambda noise_schedule: UniPC(noise_schedule, order=2),
    "unipc-3": lambda noise_schedule: UniPC(noise_schedule, order=3),
    "unipc-1-bh1": lambda noise_schedule: UniPC(noise_schedule, order=1, variant="bh1"),
    "unipc-2-bh1": lambda noise_schedule: UniPC(noise_schedule, order=2, variant="bh1"),
    "unipc-3-bh1": lambda noise_schedule: UniPC(noise_schedule, order=3, variant="bh1"),
    "unip-2": lambda noise_schedule: UniP(noise_schedule, order=2),
    "unip-3": lambda noise_schedule: UniP(noise_schedule, order=3),
    "ipndm-1": lambda noise_schedule: IPNDM(noise_schedule, order=1),
    "ipndm-2": lambda noise_schedule: IPNDM(noise_schedule, order=2),
    "ipndm-3": lambda noise_schedule: IPNDM(noise_schedule, order=3),
    "ipndm-4": lambda noise_schedule: IPNDM(noise_schedule, order=4),
}
FAMILIES = {"dpmpp": "dpmpp-2m", "unipc": "unipc-2", "unip": "unip-2", "deis": "deis-2", "ipndm": "ipndm-4"}
"""A solver's name without its order stands for the order that diffusers' scheduler of that name has by default."""
WITH_ETA = re.compile(r"ddim-eta(\d*\.?\d+)", re.ASCII)
"""DDIM with some of the noise of `ddpm`."""
ANALYTIC: dict[str, Callable[[], Denoiser]] = {"gaussian-mixture": example_mixture}
CORRECTOR = "+corrector"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NONE = "none"
PLAN_NAME = re.compile(r"[a-z\d][\w.-]{0,63}", re.ASCII | re.IGNORECASE)
"""What the file of a pruning may be called."""
SELECTION = {"tinydm": "active"}
"""How a quantizer's calibration set is selected where its name does not say; of all others uniformly."""


@dataclass
class ModelOptions:
    """Which model samples, and how it is called."""

    name: PathText = "fashion-ddpm"
    """A zoo name, a pipeline folder, a hub id, a function that makes a denoiser (package.module:function or
    path/file.py:function), or gaussian-mixture (analytic)."""
    prediction: str | None = None
    """epsilon, sample, v or velocity; None: what the model's scheduler config says."""
    device: str = "cpu"
    dtype: str = "float32"
    """The network's precision: float32, float16 (fp16) or bfloat16 (bf16); coefficients are float64 in any case."""
    channels_last: bool = False
    """The channels innermost in memory: faster convolutions on some machines."""
    fused_qkv: bool = False
    """One product for query, key and value of each attention layer; not with quantizers."""
    compile: str | None = None
    """A backend of torch.compile, such as inductor; not with cachers."""
    weights: PathText | None = None
    """A file that the network which denoises is read from, in place of the pipeline's: .safetensors or .gguf."""
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's call, as diffusers documents them: {guidance_scale: 5, height: 768, ...}."""
    quantization_config: dict[str, Any] = field(default_factory=dict)
    """Weights that diffusers quantizes as it reads them: {quant_backend: bitsandbytes_4bit, load_in_4bit: true}; of
    torchao {quant_backend: torchao, quant_type: Int8WeightOnlyConfig}, or {Int4WeightOnlyConfig: {group_size: 64}}."""

    def __post_init__(self) -> None:
        self.dtype = SHORT.get(self.dtype, self.dtype)

    @property
    def execution(self) -> tuple[str, ...]:
        """What of `denoisers.execution` is asked for: nothing of it changes what is computed, all of it how fast."""
        names = [name for name in ("channels_last", "fused_qkv") if getattr(self, name)]
        return (*names, *([] if self.compile is None else [f"compile {self.compile}"]))


@dataclass(frozen=True)
class StudentOptions:
    """The network that schedules are learned for: the teacher's own, or a cheaper one that is made of it."""

    pruned: PathText = NONE
    """A file that `ts-adapt prune` wrote, as in `pruned`: search and train leave these blocks out."""
    cacher: str = NONE
    """What they attach to it, as in `cachers`."""
    quantizer: str = NONE
    """How they quantize it, as in `quantizers`; what is learned is kept apart, and compared by evaluate with all."""

    @property
    def parts(self) -> tuple[str, ...]:
        """What it is called for each of AXES; TsAdaptError for a file that nothing can be called by."""
        return NONE if self.pruned == NONE else plan_name(self.pruned), self.cacher, self.quantizer

    @property
    def name(self) -> str:
        """Of what is learned for it: `deepcache-2+hqq4`, in `static@deepcache-2+hqq4`; empty for the teacher's own."""
        return student_name(self.parts)


FULL = StudentOptions()
"""The teacher's own network."""
AXES = tuple(axis.name for axis in fields(StudentOptions))
"""What makes a network cheaper, in the order in which it is done."""


def student_name(parts: Iterable[str]) -> str:
    """See `StudentOptions.name`; `parts` in the order of AXES."""
    return "+".join(part for part in parts if part != NONE)


def by_axis(parts: Sequence[str]) -> dict[str, Any]:
    """The `parts` of a student by their AXES."""
    return dict(zip(AXES, parts, strict=True))


def plan_name(path: str) -> str:
    """What a network without the blocks that the file in `path` names is called: as the file is, without its ending.

    Raises TsAdaptError for what cannot stand in the names of schedules and files, or is the name of a cacher or of a
    quantizer already.
    """
    name = Path(path).stem
    taken = (_builds(build, name.lower()) for build in (build_cachers, build_quantizer))
    if not PLAN_NAME.fullmatch(name) or any(taken):
        raise TsAdaptError(
            f"the network that {path} prunes would be called {name!r}; rename the file: up to 64 letters and digits, "
            f"with . _ and - between, and neither {NONE} nor the name of a cacher or quantizer"
        )
    return name


def _builds(build: Callable[[str], object], name: str) -> bool:
    try:
        build(name)
    except TsAdaptError:
        return False
    return True


def device_and_dtype(options: ModelOptions) -> tuple[torch.device, torch.dtype]:
    """Where and in which precision the model of `options` runs; TsAdaptError for a device that cannot be used here."""
    if options.dtype not in DTYPES:
        raise unknown("dtype", options.dtype, DTYPES)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TsAdaptError(
            f"device {options.device!r} cannot be used here ({one_line(error)}); give cpu, or cuda where there is a GPU"
        ) from error
    return device, DTYPES[options.dtype]


def prepare(network: nn.Module, options: ModelOptions) -> nn.Module:
    """Have `network` run as `options` say, in place; TsAdaptError where it cannot."""
    return execute(network, channels_last=options.channels_last, fused_qkv=options.fused_qkv, compile=options.compile)


def solver_name(name: str) -> str:
    """The one name of a solver: `unipc` is `unipc-2`, `ddim-eta.50` is `ddim-eta0.5`, whose 0 is `ddim` and 1 `ddpm`,
    with +corrector likewise; any other name as it is."""
    base = name.removesuffix(CORRECTOR)
    full, eta = FAMILIES.get(base, base), WITH_ETA.fullmatch(base)
    if eta is not None:
        share = f"{Decimal(eta[1]).normalize():f}"
        full = {"0": "ddim", "1": "ddpm"}.get(share, f"ddim-eta{share}")
    return full + name[len(base) :]


def build_solver(name: str, noise_schedule: NoiseSchedule) -> Solver:
    """The solver called `name` for `noise_schedule`; TsAdaptError for an unknown one."""
    name = solver_name(name)
    base = name.removesuffix(CORRECTOR)
    eta = WITH_ETA.fullmatch(base)
    if base not in SOLVERS and (eta is None or float(eta[1]) > 1):
        raise unknown("solver", base, [*SOLVERS, *FAMILIES, "ddim-eta0.5"])
    solver = SOLVERS[base](noise_schedule) if eta is None else DDIM(noise_schedule, eta=float(eta[1]))
    return Corrected(solver) if name.endswith(CORRECTOR) else solver


def build_distance(name: str, device: str = "cpu", shape: Sequence[int] = GREY) -> Distance:
    """The distance called `name`, of images of `shape`."""
    distance: Distance = distances.make(name, device=device, shape=shape)
    return distance


def build_cachers(name: str) -> list[cachers.Cacher]:
    """The cachers that `name` stands for, to be attached to a network; TsAdaptError for an unknown name."""
    return cachers.build(name)


@dataclass(frozen=True)
class Quantizing:
    """How a network is to be quantized: the method, which layers it is given, the selection of the calibration set."""

    method: Quantizer
    layers: LayerOptions
    select: str

    @property
    def needs_calls(self) -> bool:
        return self.method.needs_calls or self.layers.correct


def build_quantizer(name: str) -> Quantizing | None:
    """What `name` stands for, None for `none`; TsAdaptError for an unknown quantizer, selection or number of bits."""
    if name == NONE:
        return None
    from ts_adapt.quantizers.calibration.collect import SELECTIONS
    from ts_adapt.quantizers.methods.registry import build

    setting, asked, select = name.partition("@")
    method, layers = build(setting)
    if not asked:
        select = SELECTION.get(method.name, "uniform")
    elif not Quantizing(method, layers, select).needs_calls:
        raise TsAdaptError(f"{setting} is not calibrated, and {name!r} selects a calibration set; leave @{select} out")
    if select not in SELECTIONS:
        raise unknown("selection", select, SELECTIONS)
    return Quantizing(method, layers, select)


def steps_of(solver: Solver, nfe: int) -> int:
    """How many steps spend `nfe` evaluations a sample with `solver`."""
    if nfe < 1:
        raise TsAdaptError(f"nfe is {nfe}; a solve takes at least 1 evaluation")
    if nfe > MAX_STEPS:
        raise TsAdaptError(f"nfe is {nfe}; give at most {MAX_STEPS} evaluations a solve")
    each = solver.evaluations_per_step
    if nfe % each:
        near = " or ".join(str(n) for n in (nfe - nfe % each, nfe - nfe % each + each) if n)
        raise TsAdaptError(
            f"{type(solver).__name__} spends {each} evaluations a step; NFE {nfe} is no multiple, take {near}"
        )
    return nfe // each
