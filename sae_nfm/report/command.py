"""The job of `sae-nfm report`: one page of everything that a run has left in its folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sae_nfm.common import check_writable, whole
from sae_nfm.common.results import REPORT_FILENAME
from sae_nfm.report.chapters import commands_for, sections
from sae_nfm.report.page import page
from sae_nfm.report.run_folder import check_not_empty, read_run


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to show, and where the page goes."""

    run: str
    """Folder of a run, or of several: every result in it is shown."""
    save: str | None = None
    """The HTML file; report.html in the run's folder unless given."""


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """The page and what is on it."""

    path: Path
    size: int
    sections: tuple[str, ...]
    """Titles of the chapters shown."""
    missing: tuple[tuple[str, str], ...]
    """Titles of those without a result, each with the command that makes one."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Files and folders that could not be shown, each with the reason."""

    def words(self) -> str:
        """For the terminal."""
        lines = [f"{self.path} ({self.size / 1e6:.1f} MB)", "", "It shows:", *(f"  {title}" for title in self.sections)]
        if self.left_out:
            lines += ["", "Left out:", *(f"  {path}\n      {reason}" for path, reason in self.left_out)]
        if self.missing:
            lines += ["", "It lacks:", *(f"  {title}\n      {command}" for title, command in self.missing)]
        return "\n".join(lines)


def write_run_report(cfg: ReportConfig, damaged: Mapping[Path, str] | None = None) -> WrittenReport:
    """Write the page of a run; `damaged` are SAEs in it that could not be read, with the reasons.

    Raises:
        FileNotFoundError, ValueError: as of `run_folder.read_run`; nothing that is there can be shown.
    """
    run = read_run(cfg.run)
    for folder, reason in (damaged or {}).items():
        run = run.without(folder, reason)
    there, missing, run = sections(run)
    check_not_empty(run)
    run = replace(run, left_out=tuple(sorted(run.left_out)))
    path = Path(cfg.save or run.folder / REPORT_FILENAME)
    check_writable(path)
    with whole(path) as partial:
        partial.write_text(page(run, there, missing), encoding="utf-8")
    return WrittenReport(
        path=path,
        size=path.stat().st_size,
        sections=tuple(section.title for section in there),
        missing=tuple((chapter.TITLE, " or ".join(commands_for(chapter, run))) for chapter in missing),
        left_out=run.left_out,
    )
