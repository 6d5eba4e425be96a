"""The chapters of a report. To add one: a file here with `TITLE`, `COMMANDS` and `section(run)`, and its name in `ORDER`."""

from dataclasses import replace
from importlib import import_module
from typing import Protocol, cast

from sae_nfm.common.file_errors import cause_of
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
    "recovery",
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


def sections(run: Run) -> tuple[list[Section], list[Chapter], Run]:
    """The sections that a run has results for, the chapters that it has none for, and the run less what could not be drawn."""
    found: list[tuple[Chapter, Section | None]] = []
    for chapter in chapters():
        section, run = _drawn(chapter, run)
        found.append((chapter, section))
    present = [section for _, section in found if section is not None]
    return present, [chapter for chapter, section in found if section is None], run


def _drawn(chapter: Chapter, run: Run) -> tuple[Section | None, Run]:
    """A chapter of a run; what it cannot draw is left out of the run, with the reason."""
    try:
        return chapter.section(run), run
    except Exception:  # whatever is in a file of somebody else's, it does not keep the others from the page
        for path in run.paths():
            try:
                chapter.section(run.alone(path))
            except Exception as error:  # the page names this file, with the reason
                run = run.without(path, _reason(error))
    try:
        return chapter.section(run), run
    except Exception as error:  # likewise of the chapter, where no single file is at fault
        return None, replace(run, left_out=(*run.left_out, (chapter.TITLE, _reason(error))))


def _reason(error: Exception) -> str:
    """Why something could not be drawn: the sentence of a reader, or what went wrong on the way."""
    told = isinstance(error, ValueError | OSError)
    return cause_of(error) if told else f"cannot be drawn ({type(error).__name__}: {cause_of(error)})"


def commands_for(chapter: Chapter, run: Run) -> tuple[str, ...]:
    """Commands that save what a chapter shows; not `demo`, the first command of all, where a run has results already."""
    others = tuple(command for command in chapter.COMMANDS if not command.startswith("sae-nfm demo "))
    return others if run.paths() and others else chapter.COMMANDS
