"""The jobs of `sae-nfm report` and `sae-nfm demo`, which join packages that may not import one another."""

from dataclasses import asdict, dataclass
from pathlib import Path

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME

from sae_nfm.analysis import norms_of_saes
from sae_nfm.common import check_output
from sae_nfm.common.file_errors import FORBIDDEN, check_writable
from sae_nfm.common.results import REPORT_FILENAME, RESULTS_FILENAME, text_of
from sae_nfm.comparison import DemoConfig, Prepared, compare_once, publishing_demo
from sae_nfm.comparison.results import ArmName, CompareResult
from sae_nfm.explorer import FILENAME, ExplorerSizes, explore
from sae_nfm.report.command import ReportConfig, WrittenReport, write_run_report
from sae_nfm.report.run_folder import is_saved_sae

NORMS_FILENAME = "norms.json"
EXPLORED_TOKENS = 20_000
"""Held-out tokens that the explorer's contexts and pairs of a demo are from."""


def write_report(cfg: ReportConfig) -> WrittenReport:
    """Write norms.json of the joint SAEs in a run's folder, then its page.

    Raises:
        FileNotFoundError, ValueError: as of `write_run_report`.
    """
    folder = Path(cfg.run)
    check_writable(cfg.save)
    saes = [path.parent for path in sorted(folder.rglob(SAE_CFG_FILENAME)) if is_saved_sae(path.parent, folder)]
    damaged: dict[Path, str] = {}
    found = norms_of_saes(saes, folder, damaged=damaged)
    if found.saes:
        try:
            found.save(folder / NORMS_FILENAME)
        except OSError as error:
            if error.errno not in FORBIDDEN:  # somebody else's folder: the page shows what is in it
                raise
    return write_run_report(cfg, damaged)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What `sae-nfm demo` found, and where it is."""

    comparison: CompareResult
    """The table, and what it says."""
    results: Path
    """The same as a file."""
    report: Path
    """The page."""

    def words(self) -> str:
        """The table, what it says, and where everything is."""
        return f"\n{self.comparison.words()}\n\nResults: {self.results}\nReport:  {self.report}"


def run_demo(cfg: DemoConfig, *, command: str | None = None) -> Demo:
    """Train, evaluate, explore, and write results.json, explorer.json.gz and report.html; `command` repeats it.

    Raises:
        ValueError, FileNotFoundError: as `Prepared.of`; nothing is written then.
    """
    check_output(cfg.output)
    prepared, output = Prepared.of(cfg.comparison()), Path(cfg.output)
    rows = prepared.held_out
    n_rows = max(1, min(EXPLORED_TOKENS, cfg.held_out_tokens) // rows.tokens.shape[1])
    with publishing_demo(prepared, command) as made:
        found = compare_once(cfg, command=command, prepared=prepared, folder=made.folder)
        sae = SAE.load_from_disk(made.folder / "saes" / ArmName.JOINT, device=cfg.device).eval()
        explored = explore(
            prepared.model,
            sae,
            rows.tokens[:n_rows],
            rows.documents[:n_rows],
            name=str(ArmName.JOINT),
            settings=asdict(ExplorerSizes()) | {"held_out": cfg.held_out or cfg.dataset},
            text=text_of(found.provenance),
        )
        explored.save(made.folder / FILENAME)
        write_report(ReportConfig(run=str(made.folder)))
    return Demo(comparison=found, results=output / RESULTS_FILENAME, report=output / REPORT_FILENAME)
