"""The job of `sae-nfm explore`: one SAE on held-out text, as a file that a page in the browser shows.

    tokens -> firings of every feature -> contexts, histograms, shares, logits
           -> pairs that fire          -> partners, contexts, logits              -> explorer.json.gz

Source: the views are those of feature dashboards (Bricken et al. 2023, Towards Monosemanticity); pairs and gauges are ours.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from sae_lens import SAE
from torch import Tensor

from sae_nfm.architectures import refuse_transcoder
from sae_nfm.common import check_numbers, check_positive, check_writable, provenance, text_of
from sae_nfm.common.options import PACKAGED_SAE, HeldOutOptions, SavedSAEOptions
from sae_nfm.data import held_out_corpus, told_of_text
from sae_nfm.explorer.activations import firings_of
from sae_nfm.explorer.assemble import NO_PAIRS, ExplorerSizes, assembled, has_pairs, shown_pairs
from sae_nfm.explorer.results import FILENAME, Explorer
from sae_nfm.loading import load_sae, sha256_of
from sae_nfm.models import LanguageModel, check_device, model_of


@dataclass(frozen=True, kw_only=True)
class Explored(SavedSAEOptions, HeldOutOptions):
    """Which SAE, on what text."""

    sae: str = PACKAGED_SAE
    """Folder of a saved SAE of any architecture, or release:sae_id of a released one."""
    n_tokens: int = 20_000
    """Tokens to look at."""
    output: str = "runs/explorer"
    """Folder for explorer.json.gz."""


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(ExplorerSizes, Explored):
    """Which SAE, on what text, and how much of it to show."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded."""
        super().__post_init__()
        check_positive(self, "n_tokens")
        check_numbers(self)
        if self.context_size is not None and self.context_size < 2:
            raise ValueError(f"context_size is {self.context_size}; give at least 2: position 0 is left out")


@dataclass(frozen=True, kw_only=True)
class ExploreResult:
    """What `sae-nfm explore` wrote, in short."""

    file: str
    size: int
    """Bytes in it."""
    sae: str
    hook_name: str
    tokens: int
    documents: int
    text: str
    """Whether the SAE was trained on it, and whether the model wrote it, in words."""
    features: int
    alive: int
    active: float
    """Features that fire on a token, on average."""
    densest: tuple[tuple[int, float], ...]
    """The features that fire on most tokens, and their share of tokens."""
    pairs: int
    """Pairs that fired; 0 for an SAE without pairs."""
    strongest: tuple[tuple[int, int, float, int], ...]
    """Pairs of most energy: both features, share of the summed energy of all pairs, tokens."""
    logits_note: str
    """Why there are no logits; else empty."""

    @classmethod
    def of(cls, explorer: Explorer, file: str | Path, size: int) -> "ExploreResult":
        """What a file has."""
        tokens, pairs = explorer.features.tokens, explorer.pairs
        densest = np.argsort(-tokens, kind="stable")[:3]
        return cls(
            file=str(file),
            size=size,
            sae=explorer.sae,
            hook_name=explorer.hook_name,
            tokens=explorer.tokens,
            documents=explorer.documents,
            text=". ".join(filter(None, (text_of(explorer.provenance), explorer.sampled))),
            features=explorer.d_sae,
            alive=len(explorer.alive),
            active=float(tokens.sum() / explorer.tokens),
            densest=tuple((int(i), float(tokens[i] / explorer.tokens)) for i in densest if tokens[i]),
            pairs=pairs.fired,
            strongest=tuple(
                (int(pairs.first[p]), int(pairs.second[p]), float(pairs.share[p]), int(pairs.tokens[p]))
                for p in range(min(3, len(pairs.first)))
            ),
            logits_note=explorer.logits_note,
        )

    def words(self) -> str:
        """For the terminal."""
        dead = self.features - self.alive
        lines = [
            f"{self.sae} at {self.hook_name}, {self.tokens:,} tokens of {self.documents:,} documents",
            f"text: {self.text}",
            f"{self.alive:,} of {self.features:,} features fire, {dead:,} never do; {self.active:.1f} on a token",
            "on most tokens: " + ", ".join(f"{feature} ({share:.1%})" for feature, share in self.densest),
        ]
        if self.pairs:
            strongest = (
                f"{first} x {second} ({share:.2%} of the energy, {tokens:,} tokens)"
                for first, second, share, tokens in self.strongest
            )
            lines.append(f"{self.pairs:,} pairs fire; strongest: {', '.join(strongest)}")
        if self.logits_note:
            lines.append(f"no logits: {self.logits_note}")
        return "\n".join([*lines, "", f"Explorer: {self.file} ({self.size / 2**20:.1f} MB)"])


def run_explore(config: ExploreConfig, *, command: str | None = None) -> ExploreResult:
    """Explore an SAE and write `explorer.json.gz` to `config.output`.

    Args:
        command: how to repeat it; not kept in the file, which is the same whatever folder it is written to.

    Raises:
        ValueError, FileNotFoundError: for an SAE, model or text that does not work; nothing is written.
    """
    del command
    check_device(config.device)
    check_writable(config.output, folder=True)
    check_writable(Path(config.output) / FILENAME)
    sae = load_sae(config.sae, device=config.device).eval()
    refuse_transcoder(sae, "the explorer")
    model, _ = model_of(sae, config.device, model_name=config.model)
    rows = held_out_corpus(
        model,
        sae,
        model_name=config.model,
        dataset_path=config.held_out,
        split=config.split,
        context_size=config.context_size,
        n_tokens=config.n_tokens,
    )
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    told = told_of_text(model, rows.tokens, metadata=sae.cfg.metadata, folder=config.sae, source=config.held_out)
    explorer = explore(
        model, sae, rows.tokens, rows.documents, name=config.sae, sizes=config, settings=settings, text=told
    )
    file = Path(config.output) / FILENAME
    return ExploreResult.of(explorer, file, explorer.save(file))


def explore(
    model: LanguageModel,
    sae: SAE[Any],
    tokens: Int[Tensor, "rows pos"],
    documents: Int[Tensor, "rows pos"] | None = None,
    *,
    name: str,
    sizes: ExplorerSizes | None = None,
    settings: Mapping[str, Any] | None = None,
    text: str | None = None,
    show_progress: bool = True,
) -> Explorer:
    """What one SAE does on held-out rows; its `save` writes the file. For errors see `firings_of` and `splice`.

    Args:
        sae: an SAE of any architecture, for inference.
        tokens: held-out rows, each beginning with BOS where the model wants one.
        documents: the document of each token (`TokenRows`); without it each row counts as one.
        name: of the SAE, as shown.
        settings: for the provenance; the sizes unless given.
        text: whether the SAE was trained on the rows, in words (`data.told_of_text`); found by its metadata unless given.
    """
    refuse_transcoder(sae, "the explorer")
    sizes = sizes or ExplorerSizes()
    firings = firings_of(model, sae, tokens, batch_rows=sizes.batch_rows, show_progress=show_progress)
    pairs, written = NO_PAIRS, torch.zeros(0, sae.cfg.d_in)
    if has_pairs(sae) and sizes.pairs + sizes.partners > 0:
        pairs, written = shown_pairs(model, sae, tokens, sizes, show_progress=show_progress)
    origin = provenance(
        asdict(sizes) if settings is None else settings,
        text=told_of_text(model, tokens, metadata=sae.cfg.metadata) if text is None else text,
        tokens_sha256=hashlib.sha256(firings.tokens.tobytes()).hexdigest(),
        sae_sha256=sha256_of(sae.state_dict()),
    )
    return assembled(model, sae, firings, pairs, written, documents, name=name, sizes=sizes, provenance=origin)
