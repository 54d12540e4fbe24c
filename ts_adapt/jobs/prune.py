"""prune: blocks are left out of the session's network, round by round, and the list is kept for students."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ts_adapt.assembly import FULL, NONE, plan_name
from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.cost import count_flops, seconds
from ts_adapt.jobs.other_steps import policy_at
from ts_adapt.jobs.session import Session
from ts_adapt.jobs.tracking import board
from ts_adapt.pruning import Round, evolve, save
from ts_adapt.remedies import command
from ts_adapt.schedules.resolve import resolve
from ts_adapt.search.objective import Batch

FLOP_IMAGES = 2
"""Images that are sampled at once to count operations, which are the same for each."""


def prune(
    session: Session, schedule: str, solver: str | None = None, nfe: int | None = None, out: str | None = None
) -> Path:
    """Leave blocks out until the options of `prune` say stop; writes and prints what went. Returns the file.

    schedule, solver, nfe  the few-step solve by which the images are made, as `sample` takes them
    out                    the file; None: under `data_root`

    Raises TsAdaptError for a model without a network of such blocks, for a student, and
    where nothing can go within the limits.
    """
    config, options = session.config, session.config.prune
    network = session.denoiser.network
    if network is None:
        raise TsAdaptError(f"the model {config.model.name!r} has no network to prune; choose another model.name")
    if config.student != FULL:
        raise TsAdaptError(
            f"prune leaves blocks out of the full network, and the student is {config.student.name}; leave the options "
            "of the student out"
        )
    found = resolve(schedule, session)
    solver, nfe, _ = found.choose(solver, nfe, config, unlearned=True)
    path = Path(out) if out else session.workspace.pruned(solver, nfe)
    name = plan_name(str(path))
    objective, policy = session.objective(session.solver(solver)), policy_at(session, found, solver, nfe)
    index, x_T, condition = session.training_noises(options.samples)
    batch = Batch(torch.tensor(index), x_T, x_T, condition)
    with torch.no_grad():
        images = [objective.student(policy, part) for part in batch.split(config.evaluate.batch_size)]
    batch = replace(batch, target=torch.cat(images))
    some = batch.rows(slice(0, FLOP_IMAGES if options.measure == "flops" else config.evaluate.batch_size))

    def distance() -> float:
        return float(objective.measure(policy, batch, config.evaluate.batch_size).mean())

    @torch.inference_mode()
    def cost() -> float:
        def solve() -> Tensor:
            return objective.student(policy, some)

        return count_flops(solve) if options.measure == "flops" else seconds(solve, some.x_T.device)

    rounds: list[Round] = []
    with (
        board(session.config, "prune", session.workspace.curves("prune", solver, nfe)) as writer,
        tqdm(desc="prune", unit="block", disable=not session.progress) as bar,
    ):
        for one in evolve(network, distance, cost, options, tried=bar.update):
            rounds.append(one)
            bar.set_postfix(removed=len(rounds), cost=f"{one.cost:.2f}", distance=f"{one.distance:.4f}")
            writer.add_scalar("distance", one.distance, len(rounds))
            writer.add_scalar("cost", one.cost, len(rounds))
    if not rounds:
        raise TsAdaptError(
            f"nothing was left out: no block can go within prune.distance {options.distance} and prune.cost "
            f"{options.cost}; allow more distance, or a lower share of the cost"
        )
    about = {"model": config.model.name, "schedule": schedule, "solver": solver, "nfe": nfe, **asdict(options)}
    save(path, network, rounds, {**about, "distance_name": session.distance})
    print(table(rounds, options.measure))
    print(
        f"{len(rounds)} blocks left out: {path}\n"
        f"{name} beside the full network: {command('evaluate', '--pruned', f'{NONE},{path}')}\n"
        f"with schedules of its own: {command('search', '--student.pruned', path)}, or train"
    )
    return path


def table(rounds: list[Round], measure: str) -> str:
    """The rounds for the terminal."""
    wide = max(len(one.removed) for one in rounds)
    head = f"{'left out':<{wide}}  {'kind':<22}{measure:>8}{'distance':>11}"
    lines = [f"{one.removed:<{wide}}  {one.kind:<22}{one.cost:>8.3f}{one.distance:>11.4f}" for one in rounds]
    return "\n".join([head, "-" * len(head), *lines])
