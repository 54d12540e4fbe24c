"""The outcomes of all trials as a page."""

from __future__ import annotations

from collections.abc import Mapping

import diffusers

from diffusers_zoo.trial import Outcome

HEAD = """# Pipelines of diffusers on a grid of ours

Every pipeline class that a loop over diffusers {version} finds, made of tiny random components and run on a fixed grid
of ours, by `python scripts/pipelines_table.py`. *Shared times*: a grid for all samples gives what diffusers' own
scheduler (DDIM, or Euler for rectified flows) gives on the same grid. *Own times*: a grid for each of two samples gives
each sample what it gets alone; "one a call" where the pipeline takes one sample a call, or does not give two what it
gives each alone. *Refused*: when attached, in one sentence, below. *Learn*: a grid's logits
get gradients through the pipeline, and the pipeline, attached, ends in the states that were learned on.

{equal} classes keep a grid, {refused} refuse it, {unknown} could not be tried; on {learned} schedules are learned.

| class | shared times | own times | learn |
| --- | --- | --- | --- |
"""


def page(found: Mapping[str, tuple[Outcome, Outcome, Outcome]]) -> str:
    """The page on what was `found` of each class: with shared times, with own, and when learned on."""
    shared, learned = ([outcomes[place].kind for outcomes in found.values()] for place in (0, 2))
    tried = {name: outcomes for name, outcomes in found.items() if outcomes[0].kind not in ("not built", "not run")}
    lines = [f"| {name} | {' | '.join(map(_cell, outcomes))} |" for name, outcomes in tried.items()]
    refused = [
        f"- {name}: " + "; ".join(dict.fromkeys(o.words for o in outcomes if o.kind == "refused"))
        for name, outcomes in tried.items()
        if any(o.kind == "refused" for o in outcomes)
    ]
    untried = [f"- {name}: {one.kind}, {_short(one.words)}" for name, (one, *_) in found.items() if name not in tried]
    head = HEAD.format(
        version=diffusers.__version__,
        equal=shared.count("equal"),
        refused=shared.count("refused"),
        unknown=len(untried),
        learned=learned.count("equal"),
    )
    parts = [head + "\n".join(lines), "## Refused, and why", "\n".join(refused)]
    return "\n\n".join([*parts, "## Not tried", "The tests have no components for these, or diffusers itself does not "
                        "run them as they are called.", "\n".join(untried)]) + "\n"  # fmt: skip


def _cell(outcome: Outcome) -> str:
    if outcome.kind != "equal":
        return outcome.kind
    return "yes, one a call" if outcome.words.endswith("one a call") else "yes"


def _short(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= 100 else line[:99] + "…"
