"""The commands of ts-adapt: what their help says, and their flags beside the options of the config."""

from __future__ import annotations

import argparse
import re
from functools import cache
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from ts_adapt._version import __version__

DESCRIPTION = """Learned schedules for few-step diffusion sampling.

The main job, in order (each goes on where it was stopped):
  ts-adapt teach    --config configs/fashion.yml                        fine solves to learn from
  ts-adapt search   --config configs/fashion.yml --method static        one grid for all samples
  ts-adapt search   --config configs/fashion.yml --method per-sample    the oracle: one grid for each
  ts-adapt train    --config configs/fashion.yml --predictor one-shot   a network that predicts grids
  ts-adapt evaluate --config configs/fashion.yml                        the comparison, with a report
  ts-adapt sample   --config configs/fashion.yml --schedule static      images
`ts-adapt demo` does all of it in small, without a config. To and from ComfyUI, stable-diffusion.cpp, diffusers, ...:
  ts-adapt export   train_data/fashion/static/unipc-3-nfe5.json --format sigmas
  ts-adapt import   sigmas.txt --format sigmas --model.name fashion-ddpm --solver unipc-3 --out imported.json
  ts-adapt export   static --config configs/fashion.yml --format diffusers --out fashion-static
  ts-adapt sample   --pipeline fashion-ddpm --schedule fashion-static --count 64
`ts-adapt COMMAND --help` lists the options of a command."""

TEACH = "Generate the teacher's samples: fine solves whose end points a schedule is to reach."
SEARCH = """Search schedules for every solver and NFE of the config.

  static      one grid for all samples, by the gradient of their mean distance
  per-sample  the oracle: one grid for each sample
  blackbox    one grid without gradients, by optuna
  dmn         from an error bound, without the model
  gits, oss   by dynamic programming along the teacher's trajectories"""
TRAIN = "Train a predictor of grids on the oracle's grids and through the solver."
EVALUATE = "Compare every schedule on test noises; leaves a table, plots and one HTML page under `log_root`."
SAMPLE = """Make images along any schedule: of the config's model, or with --pipeline of any pipeline of diffusers.

With --pipeline the schedule is a fixed grid, a schedule file, or the folder or hub id of a LearnedScheduler, such as
`export --format diffusers` writes; pipelines of text are given --prompt, image to image starts from --init-image. What
is not said is the pipeline's own, --guidance too. Of the config count model.device, model.dtype and the defaults below.
An image depends on --seed and its number only, not on the others that are made along with it."""
EXPORT = """Write a schedule for other programs, to stdout or to --out. Warnings on stderr say what a format drops.

  json       everything (grid, corrections, solver, model, teacher, loss, what was measured): `import` reads it back
  sigmas     N+1 sigmas with commas between, the last 0: for stable-diffusion.cpp's --sigmas, ComfyUI's ManualSigmas
  comfyui    the same as a ManualSigmas node in API format: drop the file on ComfyUI's canvas
  a1111      a Python file that adds a scheduler to AUTOMATIC1111's web UI and to Forge
  timesteps  N integers, for the `timesteps` of diffusers' pipelines; models with a table of betas only
  diffusers  a folder for LearnedScheduler.from_pretrained, predictors included: static, blackbox, one-shot, recursive
             with all NFEs of the config that were learned, or that of --steps; a fixed grid's name for any NFE

A sigma is sigma/alpha (k-diffusion's) for epsilon, v and EDM models, and t for rectified flows. All but json and
diffusers are lists for programs that denoise fully in their last step: where a grid ends at a small sigma, 0 is written
in its place. Model times, output scales and grids per sample are dropped. `import` reads such a list back, so that it
can be measured."""
IMPORT = """Make a schedule file for a model and a solver of a list of sigmas or timesteps, or check one from elsewhere.

  json       a schedule file, which has to be for this model; read as such without --format
  sigmas     N+1 falling numbers with commas or spaces between, in brackets or not; sigma/alpha, for flows t
  timesteps  N falling timesteps as in diffusers' AysSchedules, or N+1 that end at 0

A last sigma of 0 becomes the model's smallest (t_min), where the model does not reach 0; where the sigma before it is
the smallest already, it is left out. What is changed is said on stderr; the file goes to --out, or to stdout."""
DEMO = "The main job in small, on the embedded model: minutes on two cores, then a report. What it sets is refused."
OPTIONS = """Options of the config (a line `nfe: [5]` or a group `teacher: {nfe: 40}` of the YAML file is --nfe [5],
--teacher.nfe 40 here) follow those of the command itself."""


_NOTHING = re.compile(r"(, )?default: %\(default\)s|required")


class Refused(Exception):
    """The command line could not be understood."""


class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults behind each option, where there are any; descriptions as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text: str = super()._get_help_string(action)
        return _NOTHING.sub("", text).replace(" ()", "") if action.default is None else text


class Parser(ArgumentParser):
    """Raises `Refused` where argparse would print usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise Refused(message)


@cache
def build_parser() -> Parser:
    """The parser of the whole command line, built once, as that takes a third of a second."""
    from ts_adapt.config import Config

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="ts-adapt", description=DESCRIPTION, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ts-adapt {__version__}")
    commands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, argument, brief, description, own in (
        ("teach", "", "generate the teacher's samples", TEACH, _teach_flags),
        (
            "search",
            "",
            "search schedules: static, per-sample (the oracle) and others",
            SEARCH,
            _search_flags,
        ),
        ("train", "", "train a predictor on the oracle's grids", TRAIN, _train_flags),
        ("evaluate", "", "compare every schedule on test noises, with a report", EVALUATE, _evaluate_flags),
        ("sample", "", "make images along any schedule", SAMPLE, _sample_flags),
        ("export", " SCHEDULE", "write a schedule for other programs", EXPORT, _export_flags),
        ("import", " FILE", "make a schedule file of a list of sigmas or timesteps", IMPORT, _import_flags),
        ("demo", "", "the main job in small, on the embedded model", DEMO, lambda parser: None),
    ):
        usage = f"ts-adapt {name}{argument} [--config FILE] [OPTION VALUE]..."
        command = Parser(usage=usage, description=f"{description}\n\n{OPTIONS}", allow_abbrev=False)
        own(command)
        command.add_argument("--config", action="config", help="a YAML file of options; flags behind it override it")
        command.add_argument("--quiet", action="store_true", help="no progress bars")
        command.add_class_arguments(Config, as_group=False)
        commands.add_subcommand(name, command, help=brief)
    return parser


def _teach_flags(parser: Parser) -> None:
    parser.add_argument("--split", default="both", help="train, test or both")
    parser.add_argument("--save-png", action="store_true", help="also write the teacher's images as PNG files")


def _search_flags(parser: Parser) -> None:
    parser.add_argument("--method", default="static", help="static, per-sample, blackbox, dmn, gits or oss")
    parser.add_argument("--split", default="train", help="the samples of a per-sample search: train or test")


def _train_flags(parser: Parser) -> None:
    parser.add_argument("--predictor", default="one-shot", help="one-shot or recursive")


def _evaluate_flags(parser: Parser) -> None:
    parser.add_argument("--images", default=None, help="score a folder of images instead of schedules")


def _sample_flags(parser: Parser) -> None:
    parser.add_argument(
        "--schedule", default="static", help="a grid, static, blackbox, one-shot, recursive, or a schedule file"
    )
    parser.add_argument("--solver", default=None, help="default: the file's, or the first of `solvers`")
    parser.add_argument(
        "--steps", type=int, default=None, help="evaluations; default: the file's, or the first of `nfe`"
    )
    parser.add_argument("--count", type=int, default=16, help="how many images")
    parser.add_argument("--batch", type=int, default=None, help="at a time; default: `evaluate.batch_size`")
    parser.add_argument("--seed", type=int, default=1, help="of the starting noises")
    parser.add_argument("--label", type=int, default=None, help="a class, for class-conditional models")
    parser.add_argument("--out", default=None, help="folder of the images; default: under `log_root`")
    parser.add_argument("--pipeline", default=None, help="a pipeline of diffusers: a folder, a hub id, or a zoo name")
    parser.add_argument("--prompt", action="append", default=None, help="a text; several take turns, image by image")
    parser.add_argument("--prompts", default=None, help="a file of prompts, one a line")
    parser.add_argument("--negative", default=None, help="the negative prompt of all images")
    parser.add_argument("--init-image", default=None, help="an image file to start from")
    parser.add_argument("--strength", type=float, default=None, help="how far from that image, above 0 to 1")


PIPELINE_FLAGS = ("prompt", "prompts", "negative", "init_image", "strength")
"""The flags of `sample` that need --pipeline."""


def _export_flags(parser: Parser) -> None:
    parser.add_argument(
        "schedule",
        help="a schedule file, a grid, static, blackbox, one-shot, recursive, or a predictor's folder",
    )
    parser.add_argument("--format", default="json", help="json, sigmas, comfyui, a1111, timesteps or diffusers")
    parser.add_argument("--solver", default=None, help="of a schedule given by name; default: the first of `solvers`")
    parser.add_argument("--steps", type=int, default=None, help="evaluations, likewise; default: the first of `nfe`")
    parser.add_argument("--out", default=None, help="the file to write, for diffusers the folder; default: stdout")


def _import_flags(parser: Parser) -> None:
    parser.add_argument("file", help="the list or schedule file; - reads stdin")
    parser.add_argument("--format", default=None, help="sigmas, timesteps or json; needed for lists")
    parser.add_argument("--solver", default=None, help="that the schedule is for; default: the first of `solvers`")
    parser.add_argument("--out", default=None, help="the schedule file to write; default: stdout")
