"""Every kind of file with its reader: how it is read, and what mutations begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers.utils import logging

from fuzzing import corpus, of_data, of_networks, of_schedules
from fuzzing.corpus import Files

Read = Callable[[Path], None]


@dataclass(frozen=True)
class Reader:
    """read    reads the files in a folder; raises TsAdaptError to refuse them, AssertionError where it should have
    sets    valid files by variant
    weight  how often it comes up; the quick ones come more often
    reseal  puts the checksums right after a mutation, as whoever forges a file does; None: it has none
    """

    read: Read
    sets: dict[str, Files]
    weight: int = 4
    reseal: Callable[[Files], Files] | None = None


def all_readers() -> dict[str, Reader]:
    """Every reader by name; making their valid files takes seconds."""
    logging.set_verbosity_error()
    lists = corpus.lists()
    return {
        "schedule": Reader(of_schedules.schedule, corpus.schedules(), 12),
        "export": Reader(of_schedules.exported, corpus.schedules(), 4),
        "sigmas": Reader(of_schedules.sigmas, {name: files for name, files in lists.items() if name != "timesteps"}, 6),
        "timesteps": Reader(of_schedules.timesteps, lists, 6),
        "predictor": Reader(of_schedules.predictor, corpus.predictors(), 10),
        "labels": Reader(of_data.labels, corpus.labels(), 10),
        "teacher": Reader(of_data.teacher, corpus.teachers(), 10, of_data.reseal_teacher),
        "quantization": Reader(of_networks.quantization, corpus.quantizations(), 4),
        "pruning": Reader(of_networks.pruning, corpus.prunings(), 2),
        "journal": Reader(of_data.journal, corpus.journals(), 6, of_data.reseal_journal),
        "checkpoint": Reader(of_networks.checkpoint, corpus.checkpoints(), 8),
        "run": Reader(of_data.run, corpus.runs(), 8),
        "results": Reader(of_data.results, corpus.results(), 4),
        "scheduler": Reader(of_schedules.scheduler, corpus.schedulers(), 8),
        "config": Reader(of_data.config, corpus.configs(), 1),
        "prompts": Reader(of_data.prompts, corpus.prompts(), 4),
        "image": Reader(of_data.image, corpus.images(), 4),
        "metadata": Reader(of_data.metadata, corpus.metadata(), 2),
        "moments": Reader(of_data.moments, corpus.moments(), 4),
    }
