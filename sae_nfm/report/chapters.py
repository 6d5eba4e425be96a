"""The chapters of a report in order, and which of them a run has nothing for."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from sae_nfm.report.blocks import Section
from sae_nfm.report.run_folder import Run

MODULES = (
    "fidelity",
    "verdicts",
    "training",
    "reproduced",
    "behaviour",
    "pareto",
    "norms",
    "shares",
    "interactions",
    "factorial",
    "secondary",
    "dynamics",
    "speed",
    "explorer",
)
"""Modules `<name>_section`, each with `TITLE`, `COMMAND` and `section(run)`."""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A chapter that a report can have."""

    title: str
    """Its heading."""
    command: str
    """What makes its result; RUN is the run's folder."""
    section: Callable[[Run], Section | None]
    """Its section; None where the run has nothing for it."""


def chapters() -> list[Chapter]:
    """All chapters, in order."""
    modules = [import_module(f"sae_nfm.report.{name}_section") for name in MODULES]
    return [Chapter(title=module.TITLE, command=module.COMMAND, section=module.section) for module in modules]


def sections(run: Run) -> tuple[list[Section], list[Chapter]]:
    """The sections that a run has results for, and the chapters that it has none for."""
    there: list[Section] = []
    missing: list[Chapter] = []
    for chapter in chapters():
        section = chapter.section(run)
        if section is None:
            missing.append(chapter)
        else:
            there.append(section)
    return there, missing
