"""The loop of all trainings here: seeded step by step, resumable, in one process or in several.

    rate(k)    up over the first part of the steps, level, and down to zero over the last
    average    a_k = d_k a_{k-1} + (1 - d_k) w_k with d_k = min(.9995, (1 + k) / (10 + k)): what is written and measured

What process r of R draws for step k comes from a generator seeded by the training's seed, k, r and R alone, so that a
training that was killed goes on with the very batches that it would have had. `torchrun --nproc-per-node 2` is nearly
twice as fast as one process with two threads, so small are the convolutions; a plan's batch is that of all processes
together. What is written every so many steps: `checkpoint.safetensors`, a line of `curve.jsonl`, and what the caller
makes of the average.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ts_adapt.storage.checkpoint import Checkpoint

Net = TypeVar("Net", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """How a training is run.

    out     folder of all that is written
    images  seen in all, by all processes
    batch   images a step, of all processes together
    peak    the highest learning rate
    every   steps from one checkpoint to the next
    warmup  share of the steps in which the rate rises
    """

    out: Path
    images: int
    batch: int
    peak: float
    every: int
    seed: int = 0
    warmup: float = 0.02

    @property
    def steps(self) -> int:
        return self.images // self.batch


def train(
    net: Net,
    plan: Plan,
    about: Mapping[str, Any],
    loss: Callable[[Net, int, torch.Generator], Tensor],
    measure: Callable[[Net], float],
    write: Callable[[Net], None],
    after_step: Callable[[Net], None] = lambda net: None,
) -> Net:
    """Train `net` by AdamW as planned, or on from the checkpoint, and return the average of its weights.

    about       all that the weights depend on but the plan's lengths, as JSON: another training's checkpoint is refused
    loss        of the network on so many images, drawn by the generator
    measure     the held-out loss of the average, for the curve
    write       puts the average under `plan.out`

    Raises TsAdaptError for the checkpoint of another training.
    """
    rank, world = join()
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.peak, weight_decay=0.01, betas=(0.9, 0.99), fused=True)
    checkpoint = Checkpoint(plan.out / "checkpoint.safetensors", dict(about) | {"seed": plan.seed})
    kept = checkpoint.load(
        {"net": net.state_dict(), "average": average.state_dict()}, net.parameters(), {"step": 1, "seconds": 1}
    )
    step, spent = 0, 0.0
    if kept is not None:
        net.load_state_dict(kept.states["net"])
        average.load_state_dict(kept.states["average"])
        kept.give(optimizer)
        step, spent = int(kept.progress["step"][0]), kept.progress["seconds"][0]
    if rank == 0:
        parameters = sum(p.numel() for p in net.parameters())
        print(f"{plan.out}: {parameters:,} parameters, {step} of {plan.steps} steps done", flush=True)
    started, recent = time.time(), list[float]()

    def save() -> None:
        seconds = spent + time.time() - started
        average.eval()
        row = {
            "step": step,
            "images": step * plan.batch,
            "seconds": round(seconds),
            "held_out": round(measure(average), 5),
            "train": round(sum(recent) / len(recent), 5),
        }
        recent.clear()
        print(json.dumps(row), flush=True)
        states = {"net": net.state_dict(), "average": average.state_dict()}
        checkpoint.save(states, {"step": [step], "seconds": [seconds]}, optimizer)
        with open(plan.out / "curve.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        write(average)

    net.train()
    while step < plan.steps:
        generator = torch.Generator().manual_seed((plan.seed * 10_000_019 + step) * world + rank)
        found = loss(net, plan.batch // world, generator)
        optimizer.zero_grad()
        found.backward()
        if world > 1:
            average_gradients(net, world)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / plan.steps, plan.peak, plan.warmup)
        optimizer.step()
        after_step(net)
        step += 1
        follow(average, net, min(0.9995, (1 + step) / (10 + step)))
        recent.append(found.item())
        if rank == 0 and (step % plan.every == 0 or step == plan.steps):
            save()
    return average.eval()


def join() -> tuple[int, int]:
    """The number of this process and how many there are; those of torchrun meet here."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    return rank, world


def learning_rate(done: float, peak: float, warmup: float, decay: float = 0.25) -> float:
    """Trapezoid over the fraction `done` of training: up, level, down to zero."""
    return peak * min(1.0, done / warmup, max(0.0, (1 - done) / decay))


def average_gradients(net: nn.Module, world: int) -> None:
    """Put the mean over all processes in the place of every gradient of `net`."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Move the weights of `average` towards those of `net`; running statistics are taken as they are."""
    for kept, new in zip(average.parameters(), net.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    for held, latest in zip(average.buffers(), net.buffers(), strict=True):
        held.copy_(latest)
