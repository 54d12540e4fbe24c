"""The commands of ts-adapt: what their help says, their flags beside the options of the config, what they keep."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from jsonargparse import set_parsing_settings

from ts_adapt._version import __version__
from ts_adapt.parsing import Help, LineParser, Parser

DESCRIPTION = """Learned schedules for few-step diffusion sampling.

The main job, in order (each keeps what is finished, and goes on from there):
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
  gits, oss   by dynamic programming along the teacher's trajectories
  klub        from the bound of Align Your Steps, estimated for this model on the teacher's end points

What is computed is kept, of per-sample every batch of samples, of blackbox every trial; interrupted, the same command
goes on from there. A grid that is found stays until --redo is given along with other options.

With --student.cacher and --student.quantizer it is searched for the network that they make cheaper, against the same
teacher, and kept apart; `evaluate` with both sets it against the one of the full network."""
TRAIN = """Train a predictor of grids and corrections through the solver, for every solver and NFE; with
--train.loss labels on the oracle's grids, after `search --method per-sample`.

With -all behind the name (recursive-all) one network serves all NFEs of the config; it is kept, and compared, apart.
A predictor that is finished stays until --redo is given along with other options; one that was interrupted goes on
after its last finished epoch. --student.cacher and --student.quantizer as of search."""
EVALUATE = """Compare every schedule on test noises; leaves a table, plots and one HTML page under `log_root`.

Test samples of the teacher that are missing are generated first. With `cachers` and `quantizers` in the config all of
them are compared, each with each, and what was learned for one of them (`search --student.quantizer hqq4`, there called
static@hqq4) with its like of the full network; what the network does not take is skipped with a reason. What was
measured once is not measured again."""
QUANTIZE = """Calibrate or train a quantizer on the model's network, and report what it does to every layer.

  hqq4, hqq3                weights alone, without calibration
  vqdm4                     weights as sums of codebook vectors, calibrated
  minmax-w8a8, tdq-w4a8,    weights and activations, calibrated; @uniform, @normal or @active behind a name selects the
  tinydm-w8a8               calibration set along the sampling trajectory
  tdq-w4a4+qat              trained as well (--qat.data: images, --qat.steps), resumable, by all processes that
                            `accelerate launch` starts

It stays in the workspace, where evaluate, search and train find it by its name; what needs no training they make
themselves. Without --quantizer all of the config's `quantizers` are made."""
PRUNE = """Leave out those blocks of a UNet that cost most for what they do, one a round.

Each round every block that is left is tried: the one goes with the least loss of quality for the cost that is saved.
Quality is the distance to the full network's images, of the same noises along the same few steps; the cost is counted
in floating-point operations, or measured in seconds. It ends at prune.cost, or before prune.distance. Nothing is
trained. The list of what went is written to --out, and --model.pruned takes it: the model without these blocks."""
SAMPLE = """Make images along any schedule: of the config's model, or with --pipeline of any pipeline of diffusers.

The schedule is a grid, the workspace's, a schedule file, a predictor's folder, or the folder, hub id or zoo name of a
LearnedScheduler, such as `export --format diffusers` writes; with --pipeline not the workspace's. Pipelines of text are
given --prompt, image to image starts from --init-image. What is not said is the pipeline's own, --guidance too. Of the
config count those of the model but its name, and the defaults below.
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
DEMO = """The main job in small, on the embedded model: minutes on two cores, then a report. What it sets is refused.

What an earlier demo searched and trained stays until --redo is given along with other options; its teacher stays."""
OPTIONS = """Options of the config (a line `nfe: [3, 5]` or a group `teacher: {nfe: 40}` of the YAML file is --nfe 3,5
and --teacher.nfe 40 here) follow those of the command itself."""


@dataclass(frozen=True)
class Command:
    """argument: behind its name; brief, description: its help; flags: adds its own; kept: after an interrupt."""

    brief: str
    description: str
    flags: Callable[[Parser], None]
    kept: str
    argument: str = ""


def build_parser(commands: Collection[str] | None = None) -> LineParser:
    """The parser of the whole command line, with the options of these `commands`; None: of all."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = LineParser(prog="ts-adapt", description=DESCRIPTION, formatter_class=Help, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"ts-adapt {__version__}")
    subcommands = parser.add_subcommands(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = command_parser(name) if commands is None or name in commands else Parser()
        subcommands.add_subcommand(name, own, help=command.brief)
    return parser


def command_parser(name: str) -> Parser:
    """The parser of one command: its own flags, and the options of the config."""
    from ts_adapt.config import Config

    command = COMMANDS[name]
    usage = f"ts-adapt {name}{command.argument} [--config FILE] [OPTION VALUE]..."
    parser = Parser(usage=usage, description=f"{command.description}\n\n{OPTIONS}", allow_abbrev=False)
    command.flags(parser)
    parser.add_argument("--config", action="config", help="a YAML file of options; flags behind it override it")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def _teach_flags(parser: Parser) -> None:
    parser.add_argument("--split", default="both", help="train, test or both")
    parser.add_argument("--save-png", action="store_true", help="also write the teacher's images as PNG files")


REDO = "replace what was made with other options, or does not fit any more, once the new one is complete"


def _search_flags(parser: Parser) -> None:
    parser.add_argument("--method", default="static", help="static, per-sample, blackbox, dmn, gits, oss or klub")
    parser.add_argument("--split", default="train", help="the samples of a per-sample search: train or test")
    parser.add_argument("--redo", action="store_true", help=REDO)


def _train_flags(parser: Parser) -> None:
    parser.add_argument("--predictor", default="one-shot", help="one-shot, recursive; recursive-all: one for all NFEs")
    parser.add_argument("--redo", action="store_true", help=REDO)


def _quantize_flags(parser: Parser) -> None:
    parser.add_argument("--quantizer", default=None, help="its name; default: every one of the config's `quantizers`")
    parser.add_argument("--redo", action="store_true", help="make it again where it is there already")


def _prune_flags(parser: Parser) -> None:
    parser.add_argument("--schedule", default="log_snr", help="as of `sample`; of the images that are compared")
    parser.add_argument("--solver", default=None, help="default: the first of `solvers`")
    parser.add_argument("--steps", type=int, default=None, help="evaluations; default: the first of `nfe`")
    parser.add_argument("--out", default=None, help="the file to write; default: under `data_root`")


def _evaluate_flags(parser: Parser) -> None:
    parser.add_argument("--images", default=None, help="score a folder of images instead of schedules")
    parser.add_argument("--generate-only", action="store_true", help="sample, and leave the scoring for later")
    parser.add_argument("--score-only", action="store_true", help="score what was sampled, and say what is missing")


def _sample_flags(parser: Parser) -> None:
    parser.add_argument(
        "--schedule",
        default="static",
        help="a grid, static, blackbox, one-shot, recursive, recursive-all, or a file, folder or zoo name",
    )
    parser.add_argument("--solver", default=None, help="default: the schedule's, or the first of `solvers`")
    parser.add_argument(
        "--steps", type=int, default=None, help="evaluations; default: the schedule's, or the first of `nfe`"
    )
    parser.add_argument("--count", type=int, default=16, help="how many images")
    parser.add_argument("--batch", type=int, default=None, help="at a time; default: `evaluate.batch_size`")
    parser.add_argument("--seed", type=int, default=1, help="of the starting noises")
    parser.add_argument("--label", type=int, default=None, help="a class, for class-conditional models")
    parser.add_argument("--out", default=None, help="folder of the images; default: under `log_root`")
    parser.add_argument("--pipeline", default=None, help="a pipeline of diffusers: a folder, a hub id, or a zoo name")
    parser.add_argument("--prompt", action="append", default=None, help="a text; several take turns, image by image")
    parser.add_argument("--prompts", default=None, help="a file of prompts: one a line, PartiPrompts', COCO's")
    parser.add_argument("--negative", default=None, help="the negative prompt of all images")
    parser.add_argument("--init-image", default=None, help="an image file to start from")
    parser.add_argument("--strength", type=float, default=None, help="how far from that image, above 0 to 1")


PIPELINE_FLAGS = ("prompt", "prompts", "negative", "init_image", "strength")
"""The flags of `sample` that need --pipeline."""


def _demo_flags(parser: Parser) -> None:
    parser.add_argument("--redo", action="store_true", help=REDO)


def _export_flags(parser: Parser) -> None:
    parser.add_argument("schedule", help="as of `sample`")
    parser.add_argument("--format", default="json", help="json, sigmas, comfyui, a1111, timesteps or diffusers")
    parser.add_argument("--solver", default=None, help="of a schedule given by name; default: the first of `solvers`")
    parser.add_argument("--steps", type=int, default=None, help="evaluations, likewise; default: the first of `nfe`")
    parser.add_argument("--out", default=None, help="the file to write, for diffusers the folder; default: stdout")


def _import_flags(parser: Parser) -> None:
    parser.add_argument("file", help="the list or schedule file; - reads stdin")
    parser.add_argument("--format", default=None, help="sigmas, timesteps or json; needed for lists")
    parser.add_argument("--solver", default=None, help="that the schedule is for; default: the first of `solvers`")
    parser.add_argument("--out", default=None, help="the schedule file to write; default: stdout")


COMMANDS = {
    "teach": Command(
        "generate the teacher's samples", TEACH, _teach_flags,
        "finished shards of samples are kept, and the same command goes on with the next",
    ),
    "search": Command(
        "search schedules: static, per-sample (the oracle) and others", SEARCH, _search_flags,
        "what is computed is kept, of per-sample every batch of samples, of blackbox every trial, and the same command "
        "goes on from there",
    ),
    "train": Command(
        "train a predictor of grids and corrections", TRAIN, _train_flags,
        "finished predictors and epochs are kept, and the same command goes on from there",
    ),
    "quantize": Command(
        "calibrate or train a quantizer, with a report by layer", QUANTIZE, _quantize_flags,
        "finished quantizers and checkpoints of a training are kept, and the same command goes on from there",
    ),
    "evaluate": Command(
        "compare every schedule on test noises, with a report", EVALUATE, _evaluate_flags,
        "finished measurements are kept, and the same command goes on with the next",
    ),
    "prune": Command(
        "leave out the blocks of a UNet that cost most for what they do", PRUNE, _prune_flags,
        "nothing is kept, and the same command begins anew",
    ),
    "sample": Command(
        "make images along any schedule", SAMPLE, _sample_flags,
        "the images that are written stay, and the same command makes all of them again",
    ),
    "export": Command(
        "write a schedule for other programs", EXPORT, _export_flags, "the same command begins anew", " SCHEDULE"
    ),
    "import": Command(
        "make a schedule file of a list of sigmas or timesteps", IMPORT, _import_flags, "the same command begins anew",
        " FILE",
    ),
    "demo": Command(
        "the main job in small, on the embedded model", DEMO, _demo_flags,
        "finished steps are kept, and the same command goes on from there",
    ),
}  # fmt: skip
