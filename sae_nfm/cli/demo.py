"""The job of `sae-nfm demo`: the benchmark and its table in words, one of its SAEs to look into, and the page of it all."""

from dataclasses import dataclass
from pathlib import Path

from sae_lens import SAE

from sae_nfm.comparison import JOINT, BenchmarkConfig, BenchmarkResult, Sources, run_benchmark, table, words
from sae_nfm.data import held_out_rows
from sae_nfm.explorer import FILENAME, explore
from sae_nfm.hub import RESULTS_FILENAME
from sae_nfm.report.command import ReportConfig, write_run_report

EXPLORED_TOKENS = 20_000
"""Held-out tokens that the explorer's contexts and pairs are from."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What `sae-nfm demo` found, and where it is."""

    benchmark: BenchmarkResult
    """The table, and what it says."""
    results: Path
    """The same as a file."""
    report: Path
    """The page."""

    def words(self) -> str:
        """The table, what it says, and where everything is."""
        told = words(self.benchmark)
        return f"\n{table(self.benchmark)}\n\n{told}\n\nResults: {self.results}\nReport:  {self.report}"


def run_demo(cfg: BenchmarkConfig, *, command: str | None = None) -> Demo:
    """Train, evaluate, explore, and write results.json, explorer.json.gz and report.html.

    Args:
        cfg: what to do.
        command: how to repeat it, for the provenance.

    Raises:
        ValueError, FileNotFoundError: as `run_benchmark`.
    """
    sources = Sources.of(cfg)
    found = run_benchmark(cfg, command=command, sources=sources)
    _explore(cfg, sources)
    report = write_run_report(ReportConfig(run=cfg.output)).path
    return Demo(benchmark=found, results=Path(cfg.output) / RESULTS_FILENAME, report=report)


def _explore(cfg: BenchmarkConfig, sources: Sources) -> None:
    """Look into the joint NFM-SAE."""
    folder, model = Path(cfg.output) / "saes" / JOINT, sources.model
    n_tokens = min(EXPLORED_TOKENS, cfg.validation_tokens)
    rows = held_out_rows(model, sources.validation, min(cfg.context_size, model.cfg.n_ctx), n_tokens)
    sae = SAE.load_from_disk(folder, device=cfg.device).eval()
    explore(model, sae, rows.tokens, rows.documents, name=JOINT).save(Path(cfg.output) / FILENAME)
