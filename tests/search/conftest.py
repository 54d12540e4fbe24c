"""What several of the searches' tests learn from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from ts_adapt.search.objective import Batch, Objective


@pytest.fixture
def narrow(problem: tuple[Objective, Batch]) -> tuple[Objective, Batch, Tensor]:
    """A teacher whose samples are drawn together, and samples of the law that it should have."""
    objective, batch = problem
    apart = replace(batch, target=0.4 * batch.target)
    return replace(objective, derivative="exact"), apart, objective.denoiser.draw(500, 1)
