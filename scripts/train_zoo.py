"""Train the embedded models on Fashion-MNIST: two DDPMs, a class-conditional twin, the feature classifier, the judge.

    python scripts/train_zoo.py plain --images 360000 --half
    python scripts/train_zoo.py ddpm --images 3000000
    python scripts/train_zoo.py twin --images 600000 --init ts_adapt/zoo/fashion-ddpm
    python scripts/train_zoo.py classifier --epochs 10
    python scripts/train_zoo.py judge --images 400000 --batch 128 --lr 2e-3 --seed 1
    python scripts/train_zoo.py ddpm --schedule squaredcos_cap_v2 --prediction epsilon

On several cores, `torchrun --nproc-per-node 2 scripts/train_zoo.py ddpm`; --batch is the batch of all processes
together. The diffusion models are resumable: killed and started again, they go on from the last checkpoint under --out,
and their learning rate warms up, stays, and falls linearly to 0 over the last quarter (training.py). Their loss is the
mean squared error of what is predicted: of v = alpha eps - sigma x0, as in the embedded models, or of eps, as DDPM has
it. `plain` is trained the way nearly all published models are, at integer timesteps uniform on 0..999 with the time
embedding as it comes; `ddpm` and `twin` at real-valued times and without the embedding's fastest frequencies, so that
they are smooth in t. The schedule is linear, as in DDPM, or the cosine of Nichol and Dhariwal 2021 (squaredcos_cap_v2).
The classifier and the judge take minutes; they are in train_classifier.py.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import ts_adapt  # noqa: F401  (first: it makes torchvision, hence diffusers, importable beside a CPU torch)

# isort: split
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from noising import PREDICTIONS, noised, training_times, validation_times
from train_classifier import train_classifier, train_judge
from training import Plan, train
from ts_adapt.errors import TsAdaptError
from ts_adapt.noise import BetaTable
from ts_adapt.zoo.data import load_fashion_mnist, to_model_range

CHANNELS = (16, 32, 96)
CLASSES, NULL_CLASS = 10, 10
SCHEDULES = ("linear", "squaredcos_cap_v2")


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


def hold_fast_frequencies(net: UNet2DModel) -> None:
    """Zero the weights on cos and sin of t and of t / 3.2, the two fastest frequencies of the time embedding.

    The loss hardly sees how the network wiggles with a period of six timesteps, but its derivative in t, which
    schedules are learned from, consists of little else. Called after every step of the optimiser.
    """
    half = net.config["block_out_channels"][0] // 2
    with torch.no_grad():
        net.time_embedding.linear_1.weight[:, [0, 1, half, half + 1]] = 0


def train_diffusion(args: argparse.Namespace, conditional: bool, smooth: bool) -> None:
    torch.manual_seed(args.seed)
    images, labels = load_fashion_mnist("train")
    test, test_labels = load_fashion_mnist("test")
    data, held_out = to_model_range(images), to_model_range(test[:1024])
    held_classes = test_labels[:1024] if conditional else None
    scheduler = DDPMScheduler(beta_schedule=args.schedule, prediction_type=args.prediction, clip_sample=True)
    noise_schedule = BetaTable.from_config(scheduler.config)
    net = build_unet(tuple(args.channels), conditional, args.groups)
    if args.init:
        weights = UNet2DModel.from_pretrained(args.init, subfolder="unet").state_dict()
        missing = net.load_state_dict(weights, strict=False)
        print(f"initialised from {args.init}; new: {missing.missing_keys}", flush=True)
    if smooth:
        hold_fast_frequencies(net)

    def loss(net: UNet2DModel, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data), (count,), generator=generator)
        t = training_times(count, smooth, generator)
        x_t, target = noised(data[rows], t, noise_schedule, generator, args.prediction)
        classes = None
        if conditional:
            dropped = torch.rand(count, generator=generator) < 0.1
            classes = torch.where(dropped, NULL_CLASS, labels[rows])
        return F.mse_loss(net(x_t, t, class_labels=classes).sample, target)

    def write(average: UNet2DModel) -> None:
        weights = copy.deepcopy(average).half() if args.half else average
        DDPMPipeline(weights, scheduler).save_pretrained(args.out / "pipeline")

    train(
        net,
        Plan(args.out, args.images, args.batch, args.lr, args.every, args.seed),
        {"what": args.what, "schedule": args.schedule, "prediction": args.prediction},
        loss,
        lambda average: validation_loss(average, held_out, held_classes, noise_schedule, args.prediction),
        write,
        hold_fast_frequencies if smooth else lambda net: None,
    )


@torch.inference_mode()
def validation_loss(
    net: nn.Module, x_0: Tensor, classes: Tensor | None, noise_schedule: BetaTable, prediction: str = "v_prediction"
) -> float:
    generator = torch.Generator().manual_seed(7)
    t = validation_times(len(x_0), generator)
    x_t, target = noised(x_0, t, noise_schedule, generator, prediction)
    out = [
        net(x_t[i : i + 128], t[i : i + 128], class_labels=None if classes is None else classes[i : i + 128]).sample
        for i in range(0, len(x_0), 128)
    ]
    return F.mse_loss(torch.cat(out), target).item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plain", "ddpm", "twin", "classifier", "judge"))
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
    try:
        if args.what == "judge":
            train_judge(Plan(args.out, args.images, args.batch, args.lr, args.every, args.seed))
            return
        train_diffusion(args, conditional=args.what == "twin", smooth=args.what != "plain")
    except TsAdaptError as error:
        raise SystemExit(f"train_zoo: {error}") from None


if __name__ == "__main__":
    main()
