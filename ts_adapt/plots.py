"""Figures of schedules, of quality against NFE, and of images: each function returns a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
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

LINES = ("-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
"""Of learned schedules of one kind, one after the other: static, static+shift, ..."""

PALE = ("#c7b8a3", "#9fb6c3", "#b5b58c", "#c9a0a0", "#a3a3c7", "#9dbf9d", "#bfbfbf", "#d0b070")
"""Of fixed schedules, drawn thin and dashed behind the learned ones."""

COLUMNS = 8
"""Of images, in a row."""


def _kind_of(name: str, kinds: Mapping[str, str] | None) -> str:
    """What `kinds` says; else the name itself, without corrections and network behind it, where it is one of a kind."""
    kind = name.partition("@")[0].partition("+")[0]
    return (kinds or {}).get(name, kind if kind in COLORS else "fixed")


def _styles(kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How the line of each name is drawn: fixed schedules thin, dashed and pale, all others in their kind's colour."""
    styles: dict[str, dict[str, Any]] = {}
    met: list[str] = []
    for order, (name, kind) in enumerate(kinds.items()):
        if kind == "fixed":
            styles[name] = {"color": PALE[order % len(PALE)], "linestyle": "--", "linewidth": 1, "marker": "."}
        else:
            line = LINES[met.count(kind) % len(LINES)]
            width = 1.2 if kind == "optimized" else 2
            styles[name] = {"color": COLORS.get(kind, "C0"), "linestyle": line, "linewidth": width, "marker": "o"}
            styles[name] |= {"markersize": 4, "zorder": 3}
        met.append(kind)
    return styles


def plot_schedules(
    grids: Mapping[str, Tensor], noise_schedule: NoiseSchedule, title: str = "", kinds: Mapping[str, str] | None = None
) -> Figure:
    """Log-SNR at every place of each grid; `(B, N+1)` grids as their median, with the middle 80 % shaded.

    kinds  of the grids, by name: fixed, static, ..., oracle; None: by their names
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    styles = _styles({name: _kind_of(name, kinds) for name in grids})
    for name, times in grids.items():
        lam = noise_schedule.log_snr(times.detach().cpu().double()).clamp(-20, 20)
        rows = lam.reshape(-1, lam.shape[-1])
        places = torch.arange(rows.shape[1])
        axes.plot(places, rows.median(0).values, label=name, **styles[name])
        if len(rows) > 1:
            low, high = torch.quantile(rows, torch.tensor([0.1, 0.9], dtype=rows.dtype), dim=0)
            axes.fill_between(places, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("step")
    axes.set_ylabel(r"log-SNR  $\lambda = \log(\alpha/\sigma)$")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, title)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_quality(
    panels: Sequence[tuple[str, str, Mapping[str, tuple[str, Sequence[float], Sequence[float]]]]],
) -> Figure:
    """Quality against NFE, two panels a row with one legend: each (title, label of its values, curves), which map
    a name to (kind, NFEs, values)."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4.0 * rows + 0.6), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    kinds = {name: kind for _, _, curves in panels for name, (kind, _, _) in curves.items()}
    styles, lines = _styles(kinds), dict[str, Any]()
    for axes, (title, label, curves) in zip(places, panels, strict=False):
        for name, (_, nfe, values) in curves.items():
            (lines[name],) = axes.plot(nfe, values, **styles[name])
        axes.set_xlabel("NFE (denoiser evaluations a sample)")
        axes.set_ylabel(label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axes, title)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    figure.legend(lines.values(), lines, loc="outside lower center", frameon=False, fontsize=8, ncols=3 * columns)
    return figure


def plot_intervals(found: Mapping[str, tuple[str, float, float, float, float | None]], xlabel: str) -> Figure:
    """Means with their intervals, one line a name: `found` maps it to (kind, mean, low, high, median or None)."""
    figure = Figure(figsize=(6.4, 1.0 + 0.26 * len(found)), layout="constrained")
    axes = figure.subplots()
    for place, (kind, mean, low, high, median) in enumerate(found.values()):
        color, first = COLORS.get(kind, "C0"), place == 0
        axes.plot([low, high], [place, place], color=color, linewidth=2, solid_capstyle="butt")
        label = "mean, 95 % interval" if first else None
        axes.plot([mean], [place], "o", color=color, markersize=6, label=label, clip_on=False)
        if median is not None:
            label = "median" if first else None
            axes.plot([median], [place], "D", color=color, markersize=5, fillstyle="none", label=label, clip_on=False)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(xlabel)
    _finish(axes, "")
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return figure


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def plot_images(rows: Mapping[str, Tensor], title: str = "") -> Figure:
    """One labelled row of images in [-1, 1] for each name: the same noises, so columns compare."""
    names = max(1.6, 0.2 + 0.08 * max(map(len, rows)))  # inches, at 9 points
    figure = Figure(figsize=(names + 0.85 * COLUMNS, 0.3 + 0.87 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (name, images) in zip(axes, rows.items(), strict=True):
        shown = pictures(images[:COLUMNS].detach().cpu().float())
        picture = make_grid((shown.clamp(-1, 1) + 1) / 2, nrow=COLUMNS, padding=1)
        axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_yticks([])
        axis.set_xticks([])
        axis.set_anchor("E")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for spine in axis.spines.values():
            spine.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def pictures(x: Tensor) -> Tensor:
    """What can be seen of samples `(n, ...)`, `(n, 1 or 3, H, W)`.

    Of videos `(n, C, F, H, W)` the first frame; of other numbers of channels the first three, or the first; tokens and
    the like `(n, L, D)` as grey pictures.
    """
    x = x[:, :, 0] if x.ndim == 5 else x
    x = x.reshape(x.shape[0], 1, -1, x.shape[-1]) if x.ndim != 4 else x
    return x[:, : 3 if x.shape[1] >= 3 else 1]
