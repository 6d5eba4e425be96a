"""The job of `sae-nfm secondary`: a secondary SAE of a primary's hidden code, and its controls, trained, spliced in, measured.

    primary -> secondary SAEs and controls (`training`) -> held-out figures (`measure`) -> table

In the output folder: `saes/<source>/k<k>` (SAELens's files), `rows/` (a row for each token and arm), results.json. What is
finished is not done again.
"""

from dataclasses import dataclass
from pathlib import Path

from sae_lens.load_model import HookedProxyLM
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_nfm.architectures import check_primary, primary_digest
from sae_nfm.common import check_extension, check_numbers, check_positive, provenance, publishing
from sae_nfm.common.options import PACKAGED_SAE, CacheOptions, SavedSAEOptions, TextOptions
from sae_nfm.common.results import HELD_OUT
from sae_nfm.data import cached_splits, check_data, datasets, opened_cache, rows_and_others, told_of_text
from sae_nfm.experiments.secondary.measure import secondary_rows
from sae_nfm.experiments.secondary.results import SecondaryResult
from sae_nfm.experiments.secondary.training import default_k, train_secondaries
from sae_nfm.loading import digest, load_sae
from sae_nfm.models import LanguageModel, check_device, loader_kwargs, model_of
from sae_nfm.training import StreamConfig, refuse_several_processes

PARTS = ("saes", "rows")
"""What lies in the output folder beside the results."""


@dataclass(frozen=True, kw_only=True)
class SecondaryConfig(SavedSAEOptions, TextOptions, CacheOptions):
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
        check_numbers(self)
        if self.training_tokens < self.batch_size:
            raise ValueError(
                f"training_tokens is {self.training_tokens}, less than one batch of {self.batch_size}; raise it"
            )
        if self.context_size < 2:
            raise ValueError(f"context_size must be at least 2, got {self.context_size}: position 0 is left out")


def run_secondary(cfg: SecondaryConfig, *, command: str | None = None) -> SecondaryResult:
    """Train, measure, and write `results.json` and the SAEs to `cfg.output`.

    Raises:
        ValueError, FileNotFoundError: for a primary, model, data set or size that does not work, or a folder of another run.
    """
    refuse_several_processes()
    check_extension(cfg.output, "secondary", PARTS)
    check_device(cfg.device)
    primary = load_sae(cfg.primary, device=cfg.device).eval()
    checked, metadata = check_primary(primary), primary.cfg.metadata
    name = cfg.model or metadata.model_name
    if name is None or metadata.hook_name is None:
        raise ValueError(
            f"the metadata of {cfg.primary!r} has no model_name or no hook_name, so it is not known what it reads; give "
            "--model, or save the SAE with a hook_name"
        )
    cache = opened_cache(cfg, cfg.seed)
    model, site = model_of(primary, cfg.device, model_name=cfg.model)
    if isinstance(model, HookedProxyLM):
        raise ValueError(
            "the primary was trained on a model of class AutoModelForCausalLM, in which an SAE's own hook points cannot be "
            "trained on; give a primary of a HookedTransformer or a TransformerBridge"
        )
    context_size, dataset = min(cfg.context_size, model.cfg.n_ctx), cfg.dataset or name
    if cache is None:
        train, validation = datasets.load_splits(cfg.dataset, cfg.held_out, name, cfg.seed)
    else:
        if cfg.context_size == SecondaryConfig.context_size:  # the default
            context_size = cache.identity.context_size
        cache.check(model, [site.hook_name], context_size)
        train, validation = cached_splits(cache, cfg.held_out)
        dataset = cache.identity.dataset
    stream = StreamConfig(
        model_name=name,
        hook_name=metadata.hook_name,
        dataset=dataset,
        training_tokens=cfg.training_tokens,
        context_size=context_size,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        device=cfg.device,
        model_class_name=metadata.model_class_name or "HookedTransformer",
        model_kwargs=loader_kwargs(metadata, name),
        activations=None if cache is None else cache.name,
    )
    check_data(model, train, stream.context_size, cfg.dataset)
    rows, fitted = rows_and_others(model, validation, context_size, cfg.held_out_tokens, cfg.fit_tokens)
    rows.check_documents()
    ks = tuple(sorted(set(cfg.k or default_k(checked.cfg.nfm_dim))))
    described = {"architecture": primary.cfg.architecture(), "digest": primary_digest(primary)}
    described |= {"d_sae": primary.cfg.d_sae, "nfm_dim": primary.cfg.nfm_dim}
    with publishing(cfg.output, "secondary", command=command, extend=PARTS) as made:
        output = made.folder
        trained = train_secondaries(stream, cfg.expansion, ks, cfg.lr, model, primary, train, output / "saes", cache)
        result = SecondaryResult(
            rows=secondary_rows(model, primary, trained, rows, fitted, output / "rows", seed=cfg.seed),
            provenance=provenance(
                cfg,
                command=command,
                model_name=name,
                primary=described,
                activations=stream.activations,
                held_out_tokens=digest({"tokens": rows.tokens}),
                text=_told(model, rows.tokens, cfg, metadata, stream, output / "saes" / "hidden-code" / f"k{ks[0]}"),
            ),
        )
        result.save(output / "results.json")
    return result


def _told(
    model: LanguageModel,
    tokens: Tensor,
    cfg: SecondaryConfig,
    metadata: SAEMetadata,
    stream: StreamConfig,
    secondary: Path,
) -> str:
    """Whether the primary, or a secondary SAE, was trained on the tokens."""
    own = SAEMetadata(dataset_path=stream.dataset, context_size=stream.context_size)
    told = told_of_text(model, tokens, metadata=metadata, folder=cfg.primary, source=cfg.held_out)
    of_secondary = told_of_text(model, tokens, metadata=own, folder=secondary)
    return of_secondary if told.startswith(HELD_OUT) else f"{told}, for the primary"
