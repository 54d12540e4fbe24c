"""scripts/train_zoo.py trains with either schedule and prediction, goes on, and says both to the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train_zoo
from ts_adapt.noise import BetaTable
from ts_adapt.pipelines.load import load


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    images = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(train_zoo, "load_fashion_mnist", lambda split: (images, torch.arange(16) % 10))
    return train_zoo


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_the_target_is_what_is_to_be_predicted(script: Any, prediction: str) -> None:
    noise_schedule = BetaTable.from_config({"beta_schedule": "squaredcos_cap_v2"})
    x_0, t = torch.randn(3, 1, 4, 4), torch.tensor([0.0, 400.5, 999.0], dtype=torch.float64)
    x_t, target = script.noised(x_0, t, noise_schedule, torch.Generator().manual_seed(1), prediction)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    alpha, sigma = (part.float().reshape(3, 1, 1, 1) for part in (noise_schedule.alpha(t), noise_schedule.sigma(t)))
    torch.testing.assert_close(x_t, alpha * x_0 + sigma * eps)
    torch.testing.assert_close(target, eps if prediction == "epsilon" else alpha * eps - sigma * x_0)


@pytest.mark.parametrize(
    ("schedule", "prediction"), [("linear", "v_prediction"), ("squaredcos_cap_v2", "epsilon")]
)  # fmt: skip
def test_a_model_is_trained_and_gone_on_with(script: Any, tmp_path: Path, schedule: str, prediction: str) -> None:
    small = ["ddpm", "--channels", "8", "8", "8", "--batch", "4", "--every", "1", "--out", str(tmp_path)]
    given = ["--schedule", schedule, "--prediction", prediction]
    script.main([*small, *given, "--images", "4"])
    script.main([*small, *given, "--images", "8"])
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 2
    denoiser = load(tmp_path / "pipeline")
    assert denoiser.prediction == {"v_prediction": "v", "epsilon": "epsilon"}[prediction]
    wanted = BetaTable.from_config({"beta_schedule": schedule})
    torch.testing.assert_close(
        denoiser.noise_schedule.log_snr(torch.tensor(500.0)), wanted.log_snr(torch.tensor(500.0))
    )
    with pytest.raises(SystemExit, match="is of a training with other"):
        script.main([*small, "--schedule", "linear", "--prediction", "epsilon", "--images", "12"])
