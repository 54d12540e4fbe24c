"""Valid files of every kind, made by the package itself: what mutations begin with.

Each function returns {kind: {path in the folder: bytes}}. Several kinds of one reader are variants of the same files,
and lend each other pieces.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from ts_adapt.config import Config
from ts_adapt.denoisers.analytic import example_mixture
from ts_adapt.evaluation.comparison import Results
from ts_adapt.evaluation.records import Difference, Entry, Row, as_bytes
from ts_adapt.grids import fixed
from ts_adapt.grids.corrections import CORRECTIONS, PICTURES
from ts_adapt.grids.space import GridSpace
from ts_adapt.interfaces import NoiseSchedule, TimeGrid
from ts_adapt.noise import BetaTable, RectifiedFlow
from ts_adapt.predictors.one_shot import OneShot
from ts_adapt.predictors.recursive import Recursive
from ts_adapt.predictors.store import save_predictor
from ts_adapt.pruning import plan_file
from ts_adapt.pruning.blocks import candidates
from ts_adapt.quantizers.calibration.collect import Call
from ts_adapt.quantizers.methods.registry import build
from ts_adapt.quantizers.methods.tdq import freeze
from ts_adapt.quantizers.quantization import quantize
from ts_adapt.quantizers.storage import save
from ts_adapt.schedulers.scheduler import LearnedScheduler
from ts_adapt.schedules.file import LearnedGrid
from ts_adapt.search.journal import Journal
from ts_adapt.search.labels import LabelStore
from ts_adapt.search.per_sample import LabelBatch
from ts_adapt.storage.checkpoint import Checkpoint
from ts_adapt.storage.files import write_tensors
from ts_adapt.teacher.manifest import CONFIG as TEACHER_CONFIG
from ts_adapt.teacher.store import TeacherStore

Files = dict[str, bytes]
MIXTURE = example_mixture()
VP, FLOW = MIXTURE.noise_schedule, RectifiedFlow()
TABLE = BetaTable.from_config({})
SHAPE = (1, 4, 4)
STEPS = 3
WIDTH = 4
"""Of the embedding of the time."""
TEACHER_HASH = "a" * 64
METHODS: dict[str, dict[str, Any]] = {
    "hqq4": {}, "minmax-w4a8+split": {}, "minmax-w8a8+dynamic": {"bits": None}, "tdq-w4a8+ptqd": {}, "tdq-w4a8+qat": {},
    "tdq-w4a8": {}, "tinydm-w8a8": {}, "vqdm2": {"rounds": 1, "steps": 2}, "fp16": {},
}  # fmt: skip
FROZEN = "tdq-w4a8"
"""The method whose quantizers are put into a table of timesteps."""
IN_FULL = ("down_blocks.*", "mid_block.*", "up_blocks.1.*")
"""Layers that are not quantized: a few of each kind are left."""


def times_of(noise_schedule: Any, steps: int = STEPS) -> torch.Tensor:
    return fixed.make("karras" if noise_schedule is VP else "linear", noise_schedule, steps)


def corrected(noise_schedule: NoiseSchedule, without: Collection[str] = ()) -> TimeGrid:
    """A grid for a solver of the order 2 that has every correction but one."""
    space = GridSpace(noise_schedule, STEPS, CORRECTIONS.keys() - {*without}, order=2, embedding=WIDTH)
    return space.grid(torch.linspace(-0.3, 0.3, space.size).double())


def taken(folder: Path) -> Files:
    """Every file under `folder` but the hidden ones, which are locks."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def schedules() -> dict[str, Files]:
    grid = TimeGrid(times_of(VP))
    about = {
        "order": 2, "model": "gaussian-mixture", "prediction": "epsilon", "method": "static", "source": "a", "seed": 0,
        "distance": "l2", "teacher": TEACHER_HASH, "teacher_solver": "unipc-3", "teacher_nfe": 40,
        "made_with": {"static": {"lr": 0.1, "starts": 2}},
        "measured": {"fid": {"value": 1.5, "evaluator": "zoo features", "samples": 10}},
    }  # fmt: skip
    of_flow = LearnedGrid(TimeGrid(times_of(FLOW)), "ddim", STEPS, {"model": "flow"})
    return {
        "plain": {"s.json": LearnedGrid(grid, "unipc-2", STEPS, about).text(VP).encode()},
        "corrected": {"s.json": LearnedGrid(corrected(VP), "dpmpp-2m", STEPS, about).text(VP).encode()},
        "flow": {"s.json": of_flow.text(FLOW).encode()},
    }


def lists() -> dict[str, Files]:
    sigmas = torch.exp(-VP.log_snr(times_of(VP)))[:-1].tolist()
    return {
        "sigmas": {"s.txt": ", ".join(f"{sigma:.6g}" for sigma in [*sigmas, 0.0]).encode()},
        "bracketed": {"s.txt": f"[{sigmas[0]:.3f} {sigmas[1]:.3f},\n {sigmas[2]:.3e}, 0.0 ]".encode()},
        "timesteps": {"s.txt": b"999, 666, 333\n"},
    }


def predictors() -> dict[str, Files]:
    found = {}
    wide = {"order": 2, "embedding": WIDTH}
    given: tuple[tuple[type[OneShot | Recursive], str, dict[str, Any]], ...] = (
        (OneShot, "one-shot", {}),
        (OneShot, "one-shot-all", {"corrections": [*CORRECTIONS, "start"], "classes": 3, "text": 5, **wide}),
        (Recursive, "recursive", {"corrections": [*CORRECTIONS, *PICTURES], "scales": (1.0, 8.0), **wide}),
    )
    for kind, name, options in given:
        grids = [times_of(VP, steps) for steps in ((2, STEPS) if name == "recursive" else (STEPS,))]
        predictor = kind(VP, grids, SHAPE, width=4, hidden=8, **options)
        with TemporaryDirectory() as folder:
            about = {"solver": "unipc-2", "nfe": list(predictor.learned), "teacher": TEACHER_HASH}
            save_predictor(Path(folder), predictor, about)
            found[name] = taken(Path(folder))
    return found


def labels() -> dict[str, Files]:
    spec = {"teacher": TEACHER_HASH, "solver": "unipc-2", "nfe": STEPS, "distance": "l2", "options": {"lr": 0.1}}
    found = {}
    for name, grid in (("plain", TimeGrid(times_of(VP))), ("corrected", corrected(VP))):
        rows = grid.mapped(lambda value, dims: value.expand(5, *value.shape))
        with TemporaryDirectory() as folder:
            store = LabelStore.create(Path(folder), {**spec, "static": times_of(VP).tolist()})
            for part in range(2):
                index, distance = torch.arange(5) + 5 * part, torch.rand(5)
                store.write(part, LabelBatch(index, rows, distance, distance + 0.1, torch.zeros(5, dtype=torch.int64)))
            found[name] = taken(Path(folder))
    return found


def teachers() -> dict[str, Files]:
    config = {
        "model": "m", "weights": "w", "solver": "ddim", "times": [1.0, 0.5, 0.1], "seed": 0, "first": 0,
        "shape": list(SHAPE), "dtype": "float32", "noise_scale": 1.0, "shard_size": 4, "batch_size": 4,
        "trajectory": False, "guidance": 1.0,
    }  # fmt: skip
    assert TEACHER_CONFIG.keys() <= config.keys()
    found = {}
    for name, trajectory in (("plain", False), ("trajectory", True)):
        with TemporaryDirectory() as folder:
            store = TeacherStore.create(folder, {**config, "trajectory": trajectory})
            for shard, first, count in ((0, 0, 4), (1, 4, 2)):
                tensors = {
                    "index": torch.arange(first, first + count), "target": torch.randn(count, *SHAPE),
                    "class_labels": torch.arange(count), "added.time_ids": torch.zeros(count, 2),
                }  # fmt: skip
                if trajectory:
                    tensors |= {"trajectory": torch.randn(count, 3, *SHAPE)}
                    tensors |= {"trajectory_x0": torch.randn(count, 2, *SHAPE)}
                store.write(shard, tensors)
            found[name] = taken(Path(folder))
    return found


def network() -> Any:
    """What is quantized: small, with convolutions, attention and a shortcut that can be split."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return (
        UNet2DModel(
            sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 4),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=2, attention_head_dim=4,
        )
        .eval()
        .requires_grad_(False)
    )  # fmt: skip


def call(unet: Any, t: float, count: int = 4) -> Call:
    """A call of `unet` at timestep `t`."""
    generator = torch.Generator().manual_seed(int(t))
    return Call.of(unet, torch.randn(count, *SHAPE, generator=generator), torch.tensor(t))


def quantizations() -> dict[str, Files]:
    found = {}
    for method, options in METHODS.items():
        (quantizer, layers), unet = build(method, **options), network()
        layers.skip = IN_FULL
        calls = [call(unet, t) for t in (990.0, 700.0, 400.0, 10.0)]
        with TemporaryDirectory() as folder:
            quantized = quantize(unet, quantizer, calls, layers=layers)
            save(freeze(quantized, torch.tensor([10.0, 500.0, 990.0])) if method == FROZEN else quantized, folder)
            found[method] = taken(Path(folder))
    return found


def prunings() -> dict[str, Files]:
    unet = network()
    names = candidates(unet)
    with TemporaryDirectory() as folder:
        plan_file.save(Path(folder) / "p.json", unet, [], {"seed": 0})
        kept = json.loads((Path(folder) / "p.json").read_text())
    return {"pruning": {"p.json": json.dumps({**kept, "removed": names[:2]}, indent=2).encode()}}


def journals() -> dict[str, Files]:
    with TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.json", "key")
        for place in range(4):
            answer = [float(place), 0.25]
            journal.recall([place / 7, 1.0], answer.copy)
        return {"journal": taken(Path(folder))}


def module() -> torch.nn.Module:
    """What the checkpoints are of."""
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


ABOUT = {"options": {"lr": 1e-3, "loss": "both"}}
"""What the checkpoints say of their training."""


def checkpoints() -> dict[str, Files]:
    trained = module()
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with TemporaryDirectory() as folder:
        states = {name: copy.deepcopy(trained.state_dict()) for name in ("weights", "average", "best")}
        progress = {"place": (0, 1, 0, 1), "learned": (0.5,)}
        Checkpoint(Path(folder) / "c.safetensors", ABOUT).save(states, progress, optimizer)
        return {"checkpoint": taken(Path(folder))}


ENTRY = Entry("unipc-2", STEPS, "karras", "fixed", TimeGrid(times_of(VP)), "0123456789abcdef", 6)


def runs() -> dict[str, Files]:
    found = {}
    for name, more in (
        ("run", {}), ("measured", {"clip": torch.rand(6)})
    ):  # fmt: skip
        tensors = {
            "features": torch.randn(6, 5), "distance": torch.rand(6), "seconds": torch.tensor(0.5).double(),
            "pictures": torch.zeros(6, *SHAPE, dtype=torch.uint8), "times": times_of(VP).expand(6, -1),
            "fingerprint": as_bytes(ENTRY.fingerprint), "cost": torch.tensor([8.0, 100.0, 1e6, 1e3]).double(),
        }  # fmt: skip
        with TemporaryDirectory() as folder:
            write_tensors(Path(folder) / ENTRY.file, {**tensors, **more})
            found[name] = taken(Path(folder))
    return found


def results() -> dict[str, Files]:
    rows = [
        Row("gaussian-mixture", "unipc-2", STEPS, name, kind, 6, 0.3, 0.2, 0.1, 0.09, 0.11, 0.001, 0, 0.08, 0.4)
        for name, kind in (("karras", "fixed"), ("static", "static"))
    ]
    apart = [Difference("unipc-2", STEPS, 6, "static", "karras", -0.01, -0.1, -0.2, -0.05, -0.1, 0.8)]
    comparison = {"model": "gaussian-mixture", "teacher": "t", "distance": "l2", "features": "zoo"}
    facts = {"comparison": comparison, "teacher": {"6": 0.1}, "floor": {}, "skipped": []}
    value = Results(rows, apart, facts).as_json()
    return {"results": {"results.json": json.dumps(value, indent=2).encode()}}


def schedulers() -> dict[str, Files]:
    grids = [LearnedGrid(TimeGrid(times_of(TABLE, n)), "unipc-2", n, {"model": "m"}) for n in (3, 5)]
    bare = corrected(TABLE, without=["guidance", "embedding"])  # which ask for a pipeline
    betas = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    predictor = OneShot(TABLE, [times_of(TABLE)], SHAPE, width=4, hidden=8)
    made = {
        "grids": LearnedScheduler.from_schedules(grids, betas, learned_for={"model": "m"}),
        "corrected": LearnedScheduler.from_schedules(LearnedGrid(bare, "unipc-2", STEPS), betas),
        "family": LearnedScheduler.from_grid("karras", "ddim", {**betas, "beta_schedule": "scaled_linear"}),
        "trained": LearnedScheduler(trained_betas=[0.1, 0.2, 0.3], solver="ddim"),
        "predictor": LearnedScheduler.from_predictors(predictor, "unipc-2", betas),
    }
    found = {}
    for name, schedule in made.items():
        with TemporaryDirectory() as folder:
            schedule.save_pretrained(folder)
            found[name] = taken(Path(folder))
    return found


def configs() -> dict[str, Files]:
    small = Path(__file__).parents[2] / "configs"
    whole = yaml.safe_dump(asdict(Config()), sort_keys=False).encode()
    shipped = {path.stem: {"c.yml": path.read_bytes()} for path in sorted(small.glob("*.yml"))[:2]}
    return {"all": {"c.yml": whole}, **shipped}


def prompts() -> dict[str, Files]:
    plain = "a cat\n\na dog, in the rain\n ünïcode 猫 \r\nlast"
    parti = "Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\na dog\tAnimals\tBasic\tx\n"
    coco = {
        "images": [{"id": 7}, {"id": 3}],
        "annotations": [{"id": 1, "image_id": 3, "caption": "a cat"}, {"id": 2, "image_id": 7, "caption": "a dog"}],
    }
    return {
        "plain": {"p.txt": plain.encode()},
        "parti": {"p.tsv": parti.encode()},
        "coco": {"p.json": json.dumps(coco).encode()},
    }


def images() -> dict[str, Files]:
    found = {}
    for mode in ("L", "RGB", "P"):
        text = io.BytesIO()
        Image.new(mode, (4, 4), 7 if mode != "RGB" else (1, 2, 3)).save(text, "PNG")
        found[mode] = {"a.png": text.getvalue()}
    return found


def metadata() -> dict[str, Files]:
    return {
        "labels": {"metadata.csv": b"file_name,label\na.png,3\nsub/b.png,0\n"},
        "prompts": {"metadata.csv": 'file_name,prompt,label\na.png,"a cat, in ""rain""",1\nsub/b.png,猫,2\n'.encode()},
    }


def moments() -> dict[str, Files]:
    found = {}
    for name, keys, write in (
        ("pooled", ("mu", "sigma"), np.savez),
        ("spatial", ("mu", "sigma", "mu_s", "sigma_s"), np.savez_compressed),
    ):
        text = io.BytesIO()
        held: dict[str, Any] = {key: np.eye(4) if key.startswith("sigma") else np.zeros(4) for key in keys}
        write(text, **held)
        found[name] = {"m.npz": text.getvalue()}
    return found
