"""evaluate --images: folders of images scored as sets of samples are, and two of them compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ts_adapt.errors import TsAdaptError
from ts_adapt.evaluation.features import folder_looks, looks_of, taken_shape
from ts_adapt.evaluation.folders import Scores, halves_of, scored, scores_table, write_scores
from ts_adapt.evaluation.quality import Reference
from ts_adapt.evaluation.tables import as_text
from ts_adapt.jobs.evaluate import reference_images
from ts_adapt.jobs.session import Session
from ts_adapt.prompts import prompts_of, read_prompts

LEGEND = (
    "Intervals are of 95 %, from halves of the images. A - B: the difference of what two folders score;\n"
    "A to B: the scores of A with B in the place of the real images."
)


def score_folders(session: Session, folders: Sequence[Path]) -> list[Scores]:
    """The measures of each folder, with intervals; of two also their difference, and the first against the second.

    Of two, as many images are scored as the smaller has, the first by name. They are printed and kept as images.csv and
    images.json under `log_root`. Raises TsAdaptError for more than two folders, for what are no images, and where there
    is nothing to measure by.
    """
    if len(folders) > 2:
        raise TsAdaptError(f"--images names {len(folders)} folders; give one, or two to compare")
    session.check(scores=True)
    options, extractor = session.config.evaluate, session.extractor()
    reference = reference_images(session, extractor)
    looks = [_looks(session, folder) for folder in folders]
    names, counts = [str(folder) for folder in folders], [len(look["features"]) for look in looks]
    looks = [{key: value[: min(counts)] for key, value in look.items()} for look in looks]
    if min(counts) < max(counts):
        there = ", ".join(f"{name} has {count}" for name, count in zip(names, counts, strict=True))
        print(f"scored on the first {min(counts)} images of each, as scores depend on how many there are: {there}")
    resamples = halves_of(looks[0]["features"]) if options.resamples is None else options.resamples
    sets = [(name, look, reference) for name, look in zip(names, looks, strict=True)]
    if len(folders) == 2:
        sets.append((" to ".join(names), looks[0], Reference.of(looks[1])))
    found = []
    for seed, (name, look, real) in enumerate(sets):
        bar = tqdm(range(resamples), desc="intervals", disable=not session.progress, leave=False)
        found.append(scored(name, look, real, resamples, seed, bar))
    if len(folders) == 2:
        found.insert(2, found[0].minus(found[1]))
    if not any(scores.values for scores in found):
        raise TsAdaptError(
            f"there are no real images to compare {names[0]} with, and {session.features} features give no score "
            "without; name a folder of them in evaluate.reference"
        )
    said = f" (reference: {options.reference})" if options.reference else ""
    print(as_text(scores_table(f"{session.features} features{said}", found, session.features)))
    facts = {"features": session.features, "reference": options.reference, "resamples": resamples}
    print(f"{LEGEND}\ntable: {write_scores(session.workspace.evaluation, found, facts)}")
    return found


def _looks(session: Session, folder: Path) -> dict[str, Tensor]:
    """What there is to know of each image of `folder`; of CLIP, of the test prompts in turn."""
    config = session.config
    extractor, path, weights = session.extractor(), config.teacher.prompts_of("test"), config.evaluate.clip
    scorer, prompts, seen = None, list[str](), 0
    if weights is not None and path is not None:
        from ts_adapt.evaluation.clip import clip_scorer

        scorer, prompts = clip_scorer(weights, config.model.device), read_prompts(path)

    def look(images: Tensor) -> dict[str, Tensor]:
        nonlocal seen
        found = looks_of(extractor, images)
        if scorer is not None:
            found = found | {"clip": scorer(images, prompts_of(prompts, range(seen, seen + len(images))))}
        seen += len(images)
        return found

    shape = taken_shape(session.features, session.image_shape)
    return folder_looks(look, folder, shape, batch_size=config.evaluate.batch_size, progress=session.progress)
