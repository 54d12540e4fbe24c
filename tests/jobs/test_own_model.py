"""A model that a function of the user's own makes goes through the whole job, as those of the zoo do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import ts_adapt
from small_job import Job

MODELS = '''
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import ts_adapt
from sizes import CHANNELS  # beside this file
from ts_adapt.noise import RectifiedFlow


@dataclass
class Size:  # dataclasses look for the module that they are in
    side: int = 6


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(CHANNELS, 8, 3, padding=1), nn.Conv2d(8, CHANNELS, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 1)

    def forward(self, x, time):
        wave = torch.sin(time.float() * torch.arange(1, 9)[:, None]).T[..., None, None]
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x) + wave))))


def small():
    torch.manual_seed(0)
    return Small()


class Preconditioned(nn.Module):
    """EDM's D around F, data of standard deviation 1/2."""

    def __init__(self, F):
        super().__init__()
        self.F = F

    def forward(self, x, sigma):
        s = sigma.to(x).reshape(-1, 1, 1, 1)
        total = s**2 + 0.25
        return 0.25 / total * x + 0.5 * s / total.sqrt() * self.F(x / total.sqrt(), sigma.log() / 4)


def edm():
    from sizes import CHANNELS

    return ts_adapt.from_edm(Preconditioned(small()), shape=(CHANNELS, Size().side, 6))


def flow():
    return ts_adapt.NetworkDenoiser(small(), RectifiedFlow(), "velocity", shape=(CHANNELS, 6, 6))


class Sealed(Small):
    def forward(self, x, time):
        with torch.inference_mode():
            return super().forward(x, time)


def sealed():
    return ts_adapt.NetworkDenoiser(Sealed(), RectifiedFlow(), "velocity", shape=(CHANNELS, 6, 6))


def number():
    return 3


def broken():
    raise ValueError("no weights here")


def unfit():
    small()(torch.zeros(1, 7, 6, 6), torch.zeros(1))
'''
CONFIG = """
name: small
model: {{name: "{model}"}}
solvers: [dpmpp-2m]
nfe: [3]
distance: l2
static_samples: 8
label_samples: 8
oracle_samples: 8
teacher: {{nfe: 12, train_samples: 16, test_samples: 16, shard_size: 16, batch_size: 16}}
static: {{iterations: 2, evaluations: 16, starts: 1, corrections: []}}
per_sample: {{iterations: 2, random_starts: 0}}
train: {{samples: 16, epochs: 1, width: 4, hidden: 16}}
evaluate: {{samples: 16, features: pixels, batch_size: 16, grids: [karras, linear]}}
"""


@pytest.fixture
def models(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "sizes.py").write_text("CHANNELS = 2\n")
    return tmp_path / "models.py"


PLAIN = """
name: small
model: {{name: "{model}"}}
solvers: [dpmpp-2m]
nfe: [3]
static_samples: 8
teacher: {{nfe: 12, train_samples: 16, test_samples: 16}}
static: {{iterations: 2, evaluations: 16, starts: 1, corrections: []}}
train: {{samples: 16, epochs: 1, width: 4, hidden: 16}}
evaluate: {{samples: 16, grids: [karras, linear]}}
"""


def test_a_network_without_a_gradient_has_a_plan(models, capsys):
    job = Job.begun(models.parent, PLAIN.format(model=f"{models}:sealed"))
    assert job.run("learn", "--plan", "--learn", "blackbox") == 0
    assert "one evaluation of one sample" in capsys.readouterr().out


def test_one_command_learns_for_a_model_of_ones_own_by_the_defaults(models, capsys):
    job = Job.begun(models.parent, PLAIN.format(model=f"{models}:edm"))
    assert job.run("learn") == 0
    said = capsys.readouterr()
    assert said.err.count("by default distance: l2") == 1 and "evaluate.features: pixels" in said.err
    assert {row["schedule"] for row in job.rows()} == {"karras", "linear", "static", "recursive"}
    compared = job.results["facts"]["comparison"]
    assert (compared["distance"], compared["features"]) == ("l2", "pixels")


@pytest.mark.parametrize("command", ["teach", "search", "train", "evaluate", "learn"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--solvers", "unipc3"], "did you mean 'unipc-3'"),
        (["--teacher.solver", "unipc3"], "did you mean 'unipc-3'"),
        (["--teacher.grid", "karass"], "did you mean 'karras'"),
        (["--evaluate.grids", "karras,linaer"], "did you mean 'linear'"),
        (["--evaluate.grids", "ays-sd15"], "another table"),
        (["--evaluate.features", "inceptoin"], "did you mean 'inception'"),
        (["--evaluate.features", "zoo"], "these are 2 x 6 x 6"),
        (["--distance", "features"], "these are 2 x 6 x 6"),
        (["--evaluate.reference", "nowhere"], "no folder"),
        (["--solvers", "heun"], "NFE 3 is no multiple"),
    ],
)
def test_what_a_later_job_would_refuse_is_refused_before_any_work(models, capsys, command, flags, said):
    job = Job.begun(models.parent, PLAIN.format(model=f"{models}:edm"))
    assert said in job.refused(capsys, command, *flags)
    assert not job.data.exists() and not (job.folder / "logs").exists()


@pytest.mark.parametrize("function", ["edm", "flow"])
def test_the_whole_job_on_a_model_from_a_file(models, function, capsys):
    oracle = ("search", "--method", "per-sample", "--split", "test")
    job = Job.begun(models.parent, CONFIG.format(model=f"{models}:{function}")).do(
        ("teach",), ("search",), ("train", "--predictor", "recursive"), oracle, ("evaluate",)
    )
    shown = capsys.readouterr().out
    assert all(row in shown for row in ("static", "recursive", "oracle"))
    row = job.results["rows"][0]
    assert row["fid_data"] is None  # there are no real images of a model of one's own
    assert row["fid_teacher"] >= 0
    made = job.folder / "grid.json"
    assert job.run("export", "static", "--format", "json", "--out", str(made)) == 0
    noise_schedule = ts_adapt.load(f"{models}:{function}").noise_schedule
    assert "fid" not in ts_adapt.LearnedGrid.load(made, noise_schedule).about["measured"]


def test_the_network_of_edm_is_quantized_by_scales_that_depend_on_sigma(models, capsys):
    job = Job.begun(models.parent, CONFIG.format(model=f"{models}:edm"))
    assert job.run("quantize", "--quantizer", "tdq-w8a8") == 0
    (layer, *_) = job.data.glob("quantizers/*/model.safetensors")
    tables = [value for name, value in load_file(layer).items() if name.endswith("times")]
    assert tables and all(float(times.median()) == pytest.approx((0.002 * 80) ** 0.5, rel=0.05) for times in tables)


def test_a_model_from_a_module_in_the_current_folder(models, monkeypatch):
    monkeypatch.chdir(models.parent)
    denoiser = ts_adapt.load("models:edm", dtype=torch.float64)
    assert denoiser.shape == (2, 6, 6)
    weight = next(denoiser.network.parameters())
    assert (weight.dtype, weight.requires_grad, denoiser.network.training) == (torch.float64, False, False)


@pytest.mark.parametrize(
    ("place", "said"),
    [("models.py:nothing", "there are broken, edm, flow, "), ("none.py:edm", "none.py"), ("models.py:number", "int"),
     ("models.py:broken", "no weights here at models.py:"), ("models.py:unfit", "at models.py:"),
     ("not_a_module:edm", "not_a_module")],
)  # fmt: skip
def test_what_is_no_model_is_refused_with_what_was_found(models, capsys, monkeypatch, place, said):
    monkeypatch.chdir(models.parent)
    job = Job.begun(models.parent, CONFIG.format(model=place))
    assert said in job.refused(capsys, "teach")
