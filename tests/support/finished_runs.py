"""A reproduction, small, on the embedded model: finished once for all the test files that read it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sae_nfm.experiments.reproduce.results import ReproduceResult
from sae_nfm.experiments.reproduce.run import ReproduceConfig, run_reproduce

SMALL: dict[str, Any] = {
    "d_sae": 64,
    "k": 8,
    "nfm_dim": 8,
    "context_size": 32,
    "training_tokens": 4_096,  # two batches
    "held_out_tokens": 192,  # six rows, each a document: as many as shares of paths need
    "fit_tokens": 512,
    "n_permutations": 19,
    "sentences": 4,
    "lr": 4e-3,
    "seed": 1,
}
COMMAND = "sae-nfm reproduce --d-sae 64"


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A finished `sae-nfm reproduce`; its folder is read, never written to."""

    config: ReproduceConfig
    result: ReproduceResult
    """As the file has it."""
    returned: str
    """What the run itself returned, in Python's words."""

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    @property
    def arms(self) -> Path:
        """The comparison's, of its one seed."""
        return self.folder / "compare" / "k8" / "seed-1"


@pytest.fixture(scope="session")
def reproduction(once: Callable[..., Path]) -> Reproduction:
    def config(folder: Path) -> ReproduceConfig:
        """Its files stand beside the folder that is renamed: a sequential SAE knows its base by where it was."""
        return ReproduceConfig(**SMALL, output=str(folder.with_name("reproduction-files")))

    def make(folder: Path) -> None:
        returned = run_reproduce(config(folder), command=COMMAND)
        folder.mkdir()
        (folder / "returned.txt").write_text(repr(returned), encoding="utf-8")

    folder = once("reproduction", make)
    cfg = config(folder)
    return Reproduction(
        config=cfg,
        result=ReproduceResult.load(Path(cfg.output) / "results.json"),
        returned=(folder / "returned.txt").read_text(encoding="utf-8"),
    )
