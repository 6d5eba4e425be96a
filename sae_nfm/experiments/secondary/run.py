"""The job of `sae-nfm secondary`: a secondary SAE of a primary's hidden code, and its controls, trained, spliced in, measured.

    primary -> secondary SAEs and controls (`training`) -> held-out figures (`measure`) -> table

In the output folder: `saes/<source>/k<k>` (SAELens's files), `rows/` (a row for each token and arm), results.json. What is
finished is not done again.
"""

from dataclasses import dataclass
from pathlib import Path

from sae_nfm import demo
from sae_nfm.architectures import check_primary, primary_digest
from sae_nfm.common import check_positive, provenance
from sae_nfm.common.options import PACKAGED_SAE, SavedSAEOptions, TextOptions
from sae_nfm.data import check_data, datasets, held_out_rows
from sae_nfm.experiments.secondary.measure import secondary_rows
from sae_nfm.experiments.secondary.results import SecondaryResult
from sae_nfm.experiments.secondary.training import default_k, train_secondaries
from sae_nfm.loading import digest, load_sae
from sae_nfm.models import check_device, load_model
from sae_nfm.training import StreamConfig


@dataclass(frozen=True, kw_only=True)
class SecondaryConfig(SavedSAEOptions, TextOptions):
    """Which primary, what to train, and where the results go."""

    primary: str = PACKAGED_SAE
    """Folder of a saved SAE with an interaction path, or a released one as release:sae_id."""
    expansion: int = 25
    """Features per dimension of what is reconstructed; the paper's is 7,500 / 300."""
    k: tuple[int, ...] = ()
    """Active features per token of the SAEs of the hidden code; unless given an eighth of its dimensions, and the paper's 250
    of 300. The SAEs of the linear path and of the residual take the smallest."""
    training_tokens: int = 100_000
    """Activations that each SAE is trained on."""
    held_out_tokens: int = 20_000
    """Held-out tokens for the metrics, at most."""
    fit_tokens: int = 10_000
    """Held-out tokens, after those, for the mean of the hidden code."""
    batch_size: int = 512
    """Activations per training step."""
    context_size: int = 256
    """Tokens per row, BOS included; at most the model's context."""
    lr: float = 5e-3
    """Adam's learning rate, the same for every SAE."""
    seed: int = 0
    """Seed of initialisation, data order and permutations."""
    output: str = "runs/secondary"
    """Folder for everything."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot work."""
        check_positive(self, "expansion", "training_tokens", "held_out_tokens", "fit_tokens", "batch_size")
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens is {self.training_tokens}, less than one batch of {self.batch_size}; raise it"
            )


def run_secondary(cfg: SecondaryConfig, *, command: str | None = None) -> SecondaryResult:
    """Train, measure, and write `results.json` and the SAEs to `cfg.output`.

    Raises:
        ValueError, FileNotFoundError: for a primary, model, data set or size that does not work, or a folder of another run.
    """
    check_device(cfg.device)
    primary = load_sae(cfg.primary, device=cfg.device).eval()
    checked, metadata, output = check_primary(primary), primary.cfg.metadata, Path(cfg.output)
    name = cfg.model or metadata.model_name
    if name is None or metadata.hook_name is None:
        raise ValueError(
            f"the metadata of {cfg.primary!r} has no model_name or no hook_name, so it is not known what it reads; give "
            "--model, or save the SAE with a hook_name"
        )
    model = load_model(name, cfg.device)
    train, validation = datasets.load_splits(cfg.dataset, cfg.held_out, name, cfg.seed)
    stream = StreamConfig(
        model_name=name,
        hook_name=metadata.hook_name,
        dataset=cfg.dataset or demo.MODEL_NAME,
        training_tokens=cfg.training_tokens,
        context_size=min(cfg.context_size, model.cfg.n_ctx),
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        device=cfg.device,
    )
    check_data(model, train, stream.context_size, cfg.dataset)
    rows = held_out_rows(model, validation, stream.context_size, cfg.held_out_tokens)
    fitted = held_out_rows(model, validation, stream.context_size, cfg.fit_tokens, skip_tokens=rows.tokens.numel())
    ks = tuple(sorted(set(cfg.k or default_k(checked.cfg.nfm_dim))))
    trained = train_secondaries(stream, cfg.expansion, ks, cfg.lr, model, primary, train, output / "saes")
    described = {"architecture": primary.cfg.architecture(), "digest": primary_digest(primary)}
    described |= {"d_sae": primary.cfg.d_sae, "nfm_dim": primary.cfg.nfm_dim}
    result = SecondaryResult(
        rows=secondary_rows(model, primary, trained, rows, fitted, output / "rows", seed=cfg.seed),
        provenance=provenance(cfg, command=command, primary=described, held_out_tokens=digest({"tokens": rows.tokens})),
    )
    result.save(output / "results.json")
    return result
