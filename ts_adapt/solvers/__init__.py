"""Solvers: one step of the probability-flow ODE, from the x0 values met so far."""

from __future__ import annotations

from ts_adapt.solvers.corrector import Corrected, UniPC
from ts_adapt.solvers.multistep import DEIS, IPNDM, DPMSolverPP, UniP
from ts_adapt.solvers.single_step import DDIM, Euler, Heun

__all__ = ["DDIM", "DEIS", "IPNDM", "Corrected", "DPMSolverPP", "Euler", "Heun", "UniP", "UniPC"]
