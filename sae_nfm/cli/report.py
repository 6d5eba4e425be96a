"""The job of `sae-nfm report`: measures the norms of the SAEs in a folder, which are cheap, and writes the folder's page."""

from contextlib import suppress
from pathlib import Path

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_nfm.analysis import norms_of_saes
from sae_nfm.report.command import ReportConfig, WrittenReport, write_run_report

NORMS_FILENAME = "norms.json"


def write_report(cfg: ReportConfig) -> WrittenReport:
    """Write norms.json of the joint SAEs in a run's folder, then its page.

    Raises:
        FileNotFoundError, ValueError: as of `write_run_report`, or for a damaged SAE.
    """
    folder = Path(cfg.run)
    saes = [path.parent for path in sorted(folder.rglob(SAE_CFG_FILENAME)) if _has_weights(path.parent)]
    found = norms_of_saes(saes, folder)
    if found.saes:
        with suppress(PermissionError):  # somebody else's folder: the page shows what is in it
            found.save(folder / NORMS_FILENAME)
    return write_run_report(cfg)


def _has_weights(folder: Path) -> bool:
    return (folder / SAE_WEIGHTS_FILENAME).is_file()
