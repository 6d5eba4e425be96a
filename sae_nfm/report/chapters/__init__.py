"""The chapters of a report. To add one: a file here with `TITLE`, `COMMANDS` and `section(run)`, and its name in `ORDER`."""

from importlib import import_module
from typing import Protocol, cast

from sae_nfm.report.blocks import Section
from sae_nfm.report.run_folder import Run

ORDER = (
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


class Chapter(Protocol):
    """What the module of a chapter has. It draws saved results and computes nothing."""

    TITLE: str
    """Heading."""
    COMMANDS: tuple[str, ...]
    """Commands each of which saves what the chapter shows; RUN is the run's folder."""

    def section(self, run: Run) -> Section | None:
        """The chapter of a run; None where the run has nothing for it."""
        ...


def chapters() -> list[Chapter]:
    """All chapters, in order."""
    return [cast("Chapter", import_module(f"{__name__}.{name}")) for name in ORDER]


def sections(run: Run) -> tuple[list[Section], list[Chapter]]:
    """The sections that a run has results for, and the chapters that it has none for."""
    found = [(chapter, chapter.section(run)) for chapter in chapters()]
    present = [section for _, section in found if section is not None]
    return present, [chapter for chapter, section in found if section is None]
