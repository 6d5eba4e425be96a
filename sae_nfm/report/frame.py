"""What stands around the sections of a report: the summary, what is missing, how to repeat it."""

import json
from collections.abc import Sequence
from typing import Any

from sae_nfm.report.blocks import Block, Heading, Prose, Section, Table, Verbatim
from sae_nfm.report.chapters import Chapter
from sae_nfm.report.run_folder import Found, Run

NO_VERDICT = "Nothing here compares anything: what there is stands below."


def summary(run: Run, there: Sequence[Section]) -> Section:
    """What the other sections found, in words."""
    blocks: list[Block] = []
    for section in there:
        if section.verdicts:
            blocks += [Heading(text=section.title), Prose(lines=section.verdicts, listed=True)]
    return Section(
        id="summary",
        title="Summary",
        lead=f"{_what(run)} What was found, in words; losses and null results are said as plainly as wins.",
        blocks=blocks or [Prose(lines=[NO_VERDICT])],
    )


def what_is_missing(missing: Sequence[Chapter]) -> Section:
    """Chapters without a result, each with the command that makes one."""
    rows = [(chapter.title, chapter.command) for chapter in missing]
    return Section(
        id="missing",
        title="What is missing",
        lead="These chapters have no result in this folder. Each command writes one; run `sae-nfm report RUN` again afterwards.",
        blocks=[
            Table(columns=("chapter", "command"), rows=rows, caption="RUN is this folder.", text_columns=(0, 1)),
        ],
    )


def provenance(run: Run) -> Section:
    """Where each result comes from and how to repeat it."""
    blocks = [block for found in run.results for block in _origin(run, found)]
    return Section(
        id="provenance",
        title="How to repeat it",
        lead="Configuration, seeds, versions and digests of every result above, and the command that makes it again.",
        blocks=blocks or [Prose(lines=["No result here says how it was made."])],
    )


def subtitle(run: Run) -> str:
    """Models and hook points that the results are about."""
    places: list[str] = []
    for found in run.results:
        config = _config(found)
        hook, model = (
            config.get(name) or config.get(f"{name}_name") for name in ("hook", "model")
        )  # those of 0.1 last
        if hook and model:
            places.append(f"{hook} of {model}")
    return "; ".join(dict.fromkeys(places))


def _what(run: Run) -> str:
    about = subtitle(run)
    return f"Sparse autoencoders at {about}." if about else "Sparse autoencoders."


def _origin(run: Run, found: Found[Any]) -> list[Block]:
    origin: dict[str, Any] = found.result.provenance
    command = origin.get("command")
    told = {key: value for key, value in origin.items() if key != "command"}
    repeat = f"$ {command}" if command else "Made from Python; the configuration is below."
    return [
        Heading(text=run.label(found.path)),
        Prose(lines=[repeat]),
        Verbatim(title="Configuration, versions, digests", text=json.dumps(told, indent=1, default=str)),
    ]


def _config(found: Found[Any]) -> dict[str, Any]:
    config = found.result.provenance.get("config")
    return config if isinstance(config, dict) else {}
