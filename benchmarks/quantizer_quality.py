"""What quantizers keep of the embedded model, and which calibration set they want.

python benchmarks/quantizer_quality.py [--samples 256] [--nfe 10] [--quantizers hqq4 tdq-w4a4+qat ...] [--steps 1000]

UniPC-3 on the zoo's learned grid, from test noises. For each quantizer, and of the calibrated ones for each selection
of the calibration set (uniform, normal, active): the mean distance (features) of its images to those of the network in
full precision from the same noises, and their Frechet distance (zoo features) to the training images; true bits a
weight; megabytes of the network; the seconds of the processor that calibration, search and training take. All are set
against min-max at their bits: rounding to the nearest level of the range. Those with +qat behind their name are trained
for --steps steps of 64 training images.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workload import MODEL, SOLVER, grid_of, last_line, objective_on, timed

import ts_adapt
from ts_adapt.assembly import Quantizing, build_quantizer
from ts_adapt.config import Config
from ts_adapt.evaluation.features import make_extractor
from ts_adapt.evaluation.metrics import FeatureStatistics, frechet
from ts_adapt.jobs.cheaper_network import calibration_set, quantize_anew
from ts_adapt.jobs.quantize import trainer
from ts_adapt.jobs.session import Session
from ts_adapt.quantizers.calibration.collect import SELECTIONS, Call
from ts_adapt.quantizers.quantization import restore, size_of
from ts_adapt.teacher.store import TEST_START
from ts_adapt.zoo import reference_statistics
from ts_adapt.zoo.features import TRAINING_IMAGES

QUANTIZERS = [
    "hqq4", "vqdm4", "minmax-w4",
    "hqq3", "minmax-w3",
    "tdq-w8a8", "tinydm-w8a8", "minmax-w8a8",
    "tdq-w4a8", "tinydm-w4a8", "minmax-w4a8",
    "tdq-w4a4", "minmax-w4a4",
]  # fmt: skip
"""Those of equal bits one after the other."""
BATCH = 64


@dataclass(frozen=True)
class Found:
    """select  of the calibration set; None: there is none; seconds, of the processor, of calibration and search."""

    quantizer: str
    select: str | None
    distance: float
    frechet: float
    bits: float
    megabytes: float
    seconds: float

    def __str__(self) -> str:
        name = f"{self.quantizer}@{self.select}" if self.select else self.quantizer
        return f"{name:22} distance {self.distance:.4f}, Frechet {self.frechet:.3f}, {self.seconds:4.0f} s"


class Bench:
    """The embedded model, its images in full precision, and calibration sets, each collected once."""

    def __init__(self, samples: int, nfe: int, noises: int, count: int, steps: int) -> None:
        config = Config(name="quantizer_quality", solvers=[SOLVER], nfe=[nfe])
        config.model.name, config.qat.steps = MODEL, steps
        config.calibration.noises, config.calibration.count = noises, count
        self.session, self.objective = Session(config, progress=False), objective_on()
        self.network: Any = self.session.denoiser.network
        self.grid, self.extract = grid_of(self.objective, nfe), make_extractor("zoo", device="cpu")
        self.data = FeatureStatistics.from_moments(*reference_statistics(), TRAINING_IMAGES)
        self.x_T = ts_adapt.initial_noise(0, range(TEST_START, TEST_START + samples), self.session.shape)
        self.full = self.images()
        self._calls: dict[str, tuple[list[Call], float]] = {}

    @torch.inference_mode()
    def images(self) -> Tensor:
        """Of all test noises, by the network as it is now."""
        solver = self.objective.solver
        parts = [ts_adapt.integrate(self.session.denoiser, solver, self.grid, x).x for x in self.x_T.split(BATCH)]
        return torch.cat(parts)

    def calls(self, select: str) -> tuple[list[Call], float]:
        """A calibration set, and the seconds that collecting it took."""
        if select not in self._calls:
            self._calls[select] = timed(lambda: calibration_set(self.session, select))
        return self._calls[select]

    def frechet(self, images: Tensor) -> float:
        features = torch.cat([self.extract(part) for part in images.split(BATCH)])
        return frechet(FeatureStatistics.of(features), self.data)

    def measure(self, name: str, quantizing: Quantizing, select: str | None) -> Found:
        calls, collecting = ([], 0.0) if select is None else self.calls(select)
        with tempfile.TemporaryDirectory() as folder:
            train = trainer(self.session, self.network, name, quantizing, Path(folder) / "training")
            _, searching = timed(lambda: quantize_anew(self.session, self.network, quantizing, calls, train))
        try:
            images, size = self.images(), size_of(self.network)
        finally:
            restore(self.network)
        with torch.inference_mode():
            pairs = zip(images.split(BATCH), self.full.split(BATCH), strict=True)
            distance = float(torch.cat([self.objective.distance(x, y) for x, y in pairs]).mean())
        return Found(
            name, select, distance, self.frechet(images), size.bits, size.weight_bytes / 1e6, collecting + searching
        )


def table(found: list[Found], full: float, megabytes: float) -> str:
    """Markdown: quantizers down, selections across."""
    heads = ["quantizer", "bits", "MB", *(f"distance, {s}" for s in SELECTIONS), *(f"Frechet, {s}" for s in SELECTIONS)]
    lines = [f"| {' | '.join([*heads, 'seconds'])} |", "|---" * (len(heads) + 1) + "|"]
    lines.append(f"| none | 32 | {megabytes:.2f} | 0 |  |  | {full:.3f} |  |  |  |")
    for name in dict.fromkeys(row.quantizer for row in found):
        own = {row.select: row for row in found if row.quantizer == name}
        first = next(iter(own.values()))
        rows = [own.get(None) if None in own and s == "uniform" else own.get(s) for s in SELECTIONS]
        cells = [f"{row.distance:.4f}" if row else "" for row in rows]
        cells += [f"{row.frechet:.3f}" if row else "" for row in rows]
        head = [name, f"{first.bits:.2f}", f"{first.megabytes:.2f}"]
        lines.append(f"| {' | '.join([*head, *cells, f'{first.seconds:.1f}'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--nfe", type=int, default=10)
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS)
    parser.add_argument("--noises", type=int, default=32, help="of the calibration set's solves")
    parser.add_argument("--count", type=int, default=256, help="samples of the calibration set")
    parser.add_argument("--selections", nargs="+", default=list(SELECTIONS), choices=list(SELECTIONS))
    parser.add_argument("--steps", type=int, default=1000, help="of quantization-aware training")
    options = parser.parse_args()
    bench = Bench(options.samples, options.nfe, options.noises, options.count, options.steps)
    full, found = bench.frechet(bench.full), list[Found]()
    for name in options.quantizers:
        quantizing = build_quantizer(name)
        if quantizing is None:
            continue
        for select in options.selections if quantizing.method.needs_calls else [None]:
            found.append(bench.measure(name, quantizing, select))
            print(found[-1], flush=True)
    print(f"\n{MODEL}, {SOLVER}, NFE {options.nfe}, {options.samples} samples; one value: not calibrated\n")
    print(table(found, full, size_of(bench.network).weight_bytes / 1e6))
    rows = {" ".join(filter(None, (row.quantizer, row.select))): asdict(row) for row in found}
    last_line(samples=options.samples, nfe=options.nfe, full=full, rows=rows)


if __name__ == "__main__":
    main()
