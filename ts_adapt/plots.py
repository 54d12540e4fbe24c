"""Figures of schedules, of quality against NFE, and of images: each function returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torchvision.utils import make_grid

from ts_adapt.interfaces import NoiseSchedule

COLORS = {
    "fixed": "#8c8c8c",
    "optimized": "#b58900",
    "static": "#1f77b4",
    "one-shot": "#2ca02c",
    "recursive": "#d62728",
    "oracle": "#000000",
}

PALE = ("#c7b8a3", "#9fb6c3", "#b5b58c", "#c9a0a0", "#a3a3c7", "#9dbf9d", "#bfbfbf", "#d0b070")
"""Of fixed schedules, drawn thin and dashed behind the learned ones."""


def plot_schedules(grids: Mapping[str, Tensor], noise: NoiseSchedule, title: str = "") -> Figure:
    """Log-SNR at every place of each grid; `(B, N+1)` grids as their median, with the middle 80 % shaded."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for order, (name, times) in enumerate(grids.items()):
        lam = noise.log_snr(times.detach().cpu().double()).clamp(-20, 20)
        rows = lam.reshape(-1, lam.shape[-1])
        places = torch.arange(rows.shape[1])
        learned = name in COLORS
        color = COLORS[name] if learned else PALE[order % len(PALE)]
        axes.plot(
            places, rows.median(0).values, "o-" if learned else ".--", color=color, label=name, markersize=5,
            linewidth=2 if learned else 1, zorder=3 if learned else 2,
        )  # fmt: skip
        if len(rows) > 1:
            low, high = torch.quantile(rows, torch.tensor([0.1, 0.9], dtype=rows.dtype), dim=0)
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(r"log-SNR  $\lambda = \log(\alpha/\sigma)$")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_quality(
    curves: Mapping[str, tuple[str, Sequence[float], Sequence[float]]], ylabel: str, title: str = ""
) -> Figure:
    """Quality against NFE: `curves` maps a name to (kind, NFEs, values)."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, (kind, nfe, values) in curves.items():
        learned = kind not in ("fixed", "optimized")
        axes.plot(
            nfe, values, "o-" if learned else ".--", color=COLORS.get(kind, "C0"), label=name,
            linewidth=2 if learned else 1, alpha=1 if learned else 0.55, markersize=5,
        )  # fmt: skip
    axes.set_xlabel("NFE (denoiser evaluations a sample)")
    axes.set_ylabel(ylabel)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return figure


def plot_images(rows: Mapping[str, Tensor], title: str = "", columns: int = 8) -> Figure:
    """One labelled row of images in [-1, 1] `(n, C, H, W)` for each name: the same noises, so columns compare."""
    figure = Figure(figsize=(1.6 + 0.85 * columns, 0.3 + 0.87 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        picture = make_grid((images[:columns].detach().cpu().float().clamp(-1, 1) + 1) / 2, nrow=columns, padding=1)
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_yticks([])
        axis.set_xticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
