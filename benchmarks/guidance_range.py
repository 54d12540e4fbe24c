"""What it is worth to tell predictors the scale of guidance, of a config whose `guidance` is a range of them.

Every sample has a scale of its own. In bands of it, and over all, the paired distance to the teacher, mean and median,
along

    the best fixed grid       chosen on the samples that validated the predictor, of all scales
    static, static+...        one grid for all scales, of times alone and with the config's corrections
    recursive, told           shown the scale of each sample
    recursive, told W of all  the same predictor, shown the geometric middle of the range in place of each: what it does
                              with what it is told, not what one without would learn

and how far each is from others on the same samples: training samples behind all that were learned from or validated
on. What was made with other options than those given here is refused: options of the config are flags here too.

    O="--config configs/emoji-sd.yml --guidance 1.5,8 --name emoji-sd-scales"
    ts-adapt teach  $O --split train --teacher.train_samples 768
    ts-adapt search $O --nfe 5
    ts-adapt train  $O --nfe 5
    python benchmarks/guidance_range.py $O

With `--alone NAME W` the predictor is compared with the one that learned guidance W alone, in the workspace NAME, by
the same options otherwise: on the test samples there.

The last line is one JSON object: {"found": {band: {"samples": n, schedule: {"mean", "median"}, "one / other": {"mean",
"interval", "median", "nearer"}}}}; the band of the test samples is called "alone".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from workload import Experiment, compared, last_line  # isort: skip  (first: it loads ts_adapt)
import torch
from torch import Tensor

import ts_adapt
from ts_adapt import TimeGrid, TsAdaptError
from ts_adapt.interfaces import Condition, Node, StepPolicy
from ts_adapt.jobs.session import Session
from ts_adapt.policies import Around
from ts_adapt.search.static import best_start

PREDICTOR, SCALE = "recursive", "guidance_scale"


@dataclass(frozen=True)
class Told(Around):
    """`policy`, shown one scale in place of each sample's; the samples are guided by their own."""

    scale: float

    def init(self, x_T: Tensor, condition: Condition) -> tuple[Node, Any]:
        return self.policy.init(x_T, {**condition, SCALE: self.scale})

    def next(self, x_t: Tensor, x0: Tensor, node: Node, state: Any) -> tuple[Node, Any]:
        return self.policy.next(x_t, x0, node, state)


def main() -> None:
    parser = Experiment.parser(__doc__)
    parser.add_argument("--samples", type=int, default=192, help="samples that all are measured on")
    parser.add_argument("--bands", type=float, nargs="*", default=[2.5, 5.0], help="scales that divide the range")
    parser.add_argument("--alone", nargs=2, metavar=("NAME", "W"), help="what learned one scale alone, and the scale")
    options, more = parser.parse_known_args()
    given = Experiment.of(options, more)
    session, config, objective = given.session, given.config, given.objective
    if not isinstance(config.guidance, list):
        raise TsAdaptError(f"guidance is {config.guidance:g}; give a range, such as --guidance 1.5,8")
    (low, high), place = config.guidance, given.place
    policy = session.predictor(PREDICTOR, *place, strict=True).predictor.policy(session.steps(*place))
    validation, judging = given.unseen(options.samples)
    starts = session.starts(session.steps(*place))
    best, _ = best_start(objective, starts, validation)
    fixed, middle = f"best fixed grid, {best}", f"{PREDICTOR}, told {math.sqrt(low * high):.3g} of all"
    told, shared = f"{PREDICTOR}, told", session.static_name
    schedules: dict[str, TimeGrid | StepPolicy] = {
        fixed: starts[best],
        **{name: session.shared(name, *place, strict=True).grid for name in ("static", shared)},
        told: policy,
        middle: Told(policy, math.sqrt(low * high)),
    }
    pairs = [("static", fixed), (shared, "static"), (told, shared), (told, fixed), (told, middle)]
    distances = {name: objective.measure(schedule, judging) for name, schedule in schedules.items()}
    scales, found, ends = judging.condition[SCALE], dict[str, Any](), [low, *options.bands, high]
    for start, end in [(low, high), *pairwise(ends)]:
        rows = (scales >= start) & ((scales < end) | (end == high))
        here = {name: each[rows] for name, each in distances.items()}
        of_band = compared(f"guidance {start:g} to {end:g} ({int(rows.sum())})", here, pairs)
        found[f"{start:g}-{end:g}"] = {"samples": int(rows.sum()), **of_band}
    if options.alone is not None:
        found["alone"] = _beside_one(given, policy, options.alone[0], float(options.alone[1]))
    last_line(version=ts_adapt.__version__, found=found)


def _beside_one(given: Experiment, policy: StepPolicy, name: str, scale: float) -> dict[str, Any]:
    """`policy` beside the predictor of the workspace `name`, which learned `scale` alone, on its test samples."""
    one = Session(replace(given.config, name=name, guidance=scale), progress=False)
    alone = one.predictor(PREDICTOR, *given.place, strict=True).predictor.policy(one.steps(*given.place))
    _, test = one.teacher("test", given.config.evaluate.samples)
    scales = torch.full((len(test),), scale, dtype=torch.float64, device=test.x_T.device)
    told = replace(test, condition={**test.condition, SCALE: scales})
    distances = {
        "of all scales": given.objective.measure(policy, told), "of this one": given.objective.measure(alone, told)
    }  # fmt: skip
    compare = [("of all scales", "of this one")]
    return {"samples": len(test), **compared(f"guidance {scale:g}", distances, compare)}


if __name__ == "__main__":
    main()
