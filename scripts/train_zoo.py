"""Train the embedded models on Fashion-MNIST: two DDPMs, a class-conditional twin, the feature classifier.

    python scripts/train_zoo.py plain --images 360000 --half
    python scripts/train_zoo.py ddpm --images 3000000
    python scripts/train_zoo.py twin --images 600000 --init ts_adapt/zoo/fashion-ddpm
    python scripts/train_zoo.py classifier --epochs 10
    python scripts/train_zoo.py ddpm --schedule squaredcos_cap_v2 --prediction epsilon

On several cores `torchrun --nproc-per-node 2 scripts/train_zoo.py ddpm` is nearly twice as fast as one process with
two threads, so small are the convolutions; --batch is the batch of all processes together.

The diffusion models are resumable: killed and started again, they go on from the last checkpoint under --out. Their
loss is the mean squared error of what is predicted: of v = alpha eps - sigma x0, as in the embedded models, or of eps,
as DDPM has it. `plain` is trained the way nearly all published models are, at integer timesteps uniform on 0..999 with
the time embedding as it comes; `ddpm` and `twin` at real-valued times and without the embedding's fastest frequencies,
so that they are smooth in t. The schedule is linear, as in DDPM, or the cosine of Nichol and Dhariwal 2021
(squaredcos_cap_v2). The learning rate warms up, stays, and falls linearly to 0 over the last quarter. The classifier
takes minutes; it is in train_classifier.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import ts_adapt  # noqa: F401  (first: it makes torchvision, hence diffusers, importable beside a CPU torch)

# isort: split
import torch
import torch.distributed as dist
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from train_classifier import train_classifier
from ts_adapt.noise import BetaTable
from ts_adapt.numerics import combine
from ts_adapt.zoo.data import load_fashion_mnist, to_model_range

CHANNELS = (16, 32, 96)
CLASSES, NULL_CLASS = 10, 10
SCHEDULES, PREDICTIONS = ("linear", "squaredcos_cap_v2"), ("v_prediction", "epsilon")


def build_unet(channels: tuple[int, ...], conditional: bool, groups: int = 8) -> UNet2DModel:
    """A plain diffusers UNet2DModel for 28x28 grey images, with one self-attention block at 7x7."""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=groups,
        attention_head_dim=channels[-1] // 2,
        num_class_embeds=CLASSES + 1 if conditional else None,
    )


def noised(
    x_0: Tensor, t: Tensor, noise_schedule: BetaTable, generator: torch.Generator, prediction: str = "v_prediction"
) -> tuple[Tensor, Tensor]:
    """x_t and what the network is to predict at real times t, one of PREDICTIONS."""
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    eps = torch.randn(x_0.shape, generator=generator)
    target = eps if prediction == "epsilon" else combine((alpha, eps), (-sigma, x_0))
    return combine((alpha, x_0), (sigma, eps)), target


def learning_rate(done: float, peak: float, warmup: float, decay: float = 0.25) -> float:
    """Trapezoid over the fraction `done` of training: up, level, down to zero."""
    return peak * min(1.0, done / warmup, max(0.0, (1 - done) / decay))


def training_times(count: int, smooth: bool, generator: torch.Generator) -> Tensor:
    """Times `(count,)` for a batch, one from each of `count` equal parts of the schedule: real-valued or timesteps."""
    shares = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return 999 * shares if smooth else (1000 * shares).floor().clamp(max=999)


def hold_fast_frequencies(net: UNet2DModel) -> None:
    """Zero the weights on cos and sin of t and of t / 3.2, the two fastest frequencies of the time embedding.

    The loss hardly sees how the network wiggles with a period of six timesteps, but its derivative in t, which
    schedules are learned from, consists of little else. Called after every step of the optimiser.
    """
    half = net.config["block_out_channels"][0] // 2
    with torch.no_grad():
        net.time_embedding.linear_1.weight[:, [0, 1, half, half + 1]] = 0


def average_gradients(net: nn.Module, world: int) -> None:
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train_diffusion(args: argparse.Namespace, conditional: bool, smooth: bool) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(args.seed)
    images, labels = load_fashion_mnist("train")
    test, test_labels = load_fashion_mnist("test")
    data, held_out = to_model_range(images), to_model_range(test[:1024])
    scheduler = DDPMScheduler(beta_schedule=args.schedule, prediction_type=args.prediction, clip_sample=True)
    noise_schedule = BetaTable.from_config(scheduler.config)
    net = build_unet(tuple(args.channels), conditional, args.groups)
    if args.init:
        weights = UNet2DModel.from_pretrained(args.init, subfolder="unet").state_dict()
        missing = net.load_state_dict(weights, strict=False)
        print(f"initialised from {args.init}; new: {missing.missing_keys}", flush=True)
    if smooth:
        hold_fast_frequencies(net)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99))
    step, spent = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        of = kept.get("schedule", "linear"), kept.get("prediction", "v_prediction")
        if of != (args.schedule, args.prediction):
            raise SystemExit(f"{checkpoint} is of a model with {' and '.join(of)}; choose another --out")
        net.load_state_dict(kept["net"])
        average.load_state_dict(kept["average"])
        optimizer.load_state_dict(kept["optimizer"])
        step, spent = kept["step"], kept["spent"]
    args.out.mkdir(parents=True, exist_ok=True)
    total = args.images // args.batch
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {step} of {total} steps done", flush=True)
    started, recent = time.time(), []

    def save() -> None:
        seconds = spent + time.time() - started
        classes = test_labels[:1024] if conditional else None
        held = validation_loss(average, held_out, classes, noise_schedule, args.prediction)
        row = {
            "step": step,
            "images": step * args.batch,
            "seconds": round(seconds),
            "held_out": round(held, 5),
            "train": round(sum(recent) / max(1, len(recent)), 5),
        }
        print(json.dumps(row), flush=True)
        with open(args.out / "curve.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        weights = {"net": net.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        made_with = {"schedule": args.schedule, "prediction": args.prediction}
        state = {**weights, **made_with, "step": step, "spent": seconds}
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").rename(checkpoint)
        weights = copy.deepcopy(average).half() if args.half else average
        DDPMPipeline(weights, scheduler).save_pretrained(args.out / "pipeline")
        recent.clear()

    local = args.batch // world
    while step < total:
        generator = torch.Generator().manual_seed((args.seed * 10_000_019 + step) * world + rank)
        rows = torch.randint(len(data), (local,), generator=generator)
        t = training_times(local, smooth, generator)
        x_t, target = noised(data[rows], t, noise_schedule, generator, args.prediction)
        classes = None
        if conditional:
            dropped = torch.rand(local, generator=generator) < 0.1
            classes = torch.where(dropped, NULL_CLASS, labels[rows])
        loss = F.mse_loss(net(x_t, t, class_labels=classes).sample, target)
        optimizer.zero_grad()
        loss.backward()
        if world > 1:
            average_gradients(net, world)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate((step + 1) / total, args.lr, warmup=0.02)
        optimizer.step()
        if smooth:
            hold_fast_frequencies(net)
        step += 1
        decay = min(0.9995, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), net.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        recent.append(loss.item())
        if rank == 0 and (step % args.every == 0 or step == total):
            save()


@torch.inference_mode()
def validation_loss(
    net: nn.Module, x_0: Tensor, classes: Tensor | None, noise_schedule: BetaTable, prediction: str = "v_prediction"
) -> float:
    generator = torch.Generator().manual_seed(7)
    t = 999 * (torch.arange(len(x_0)) + 0.5) / len(x_0)
    t = t[torch.randperm(len(x_0), generator=generator)]
    x_t, target = noised(x_0, t, noise_schedule, generator, prediction)
    out = [
        net(x_t[i : i + 128], t[i : i + 128], class_labels=None if classes is None else classes[i : i + 128]).sample
        for i in range(0, len(x_0), 128)
    ]
    return F.mse_loss(torch.cat(out), target).item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plain", "ddpm", "twin", "classifier"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, help="peak learning rate; 1.5e-3, of the classifier 0.1")
    parser.add_argument("--epochs", type=int, default=10, help="of the classifier")
    parser.add_argument("--channels", type=int, nargs="+", default=list(CHANNELS))
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--schedule", choices=SCHEDULES, default=SCHEDULES[0], help="of the betas")
    parser.add_argument("--prediction", choices=PREDICTIONS, default=PREDICTIONS[0], help="of the network")
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--half", action="store_true", help="write the pipeline in float16: half the size on disk")
    parser.add_argument("--init", help="pipeline folder to start from")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.what == "classifier":
        train_classifier(args.out, args.epochs, args.batch, args.lr or 0.1, args.seed)
        return
    args.lr = args.lr or 1.5e-3
    args.out = args.out or Path("train_data/zoo") / args.what
    train_diffusion(args, conditional=args.what == "twin", smooth=args.what != "plain")


if __name__ == "__main__":
    main()
