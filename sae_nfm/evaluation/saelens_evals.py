"""The job of `sae-nfm evaluate`: a saved or released SAE of any architecture through SAELens's own evaluation.

The figures are those of `sae_lens.evals.run_evals`, under its names. What one has to know to read them:

* Tokens that the SAE's metadata excludes (BOS, EOS, padding) pass by the SAE and are left out of every mean. The ablation
  arm zeroes the hook point at ALL positions, those too: `..._with_ablation`, and the scores that divide by it, are of a
  harder ablation than the SAE's arm is spared.
* Position 0 and the metadata's `seqpos_slice` are not looked at: all positions count.
* Sparsity and variance are measured on the batches that follow those of KL and cross-entropy.
"""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from typing_extensions import override

from sae_nfm import demo
from sae_nfm.common import check_positive, provenance
from sae_nfm.common.options import HeldOutOptions, SavedSAEOptions
from sae_nfm.data import held_out_tokens, open_dataset
from sae_nfm.evaluation.results import Evaluation
from sae_nfm.loading import load_sae, quiet_saelens
from sae_nfm.models import LanguageModel, check_context, check_device, model_of, refuse_heads_of_a_bridge


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SavedSAEOptions, HeldOutOptions):
    """Which SAE, on what, by which metrics."""

    sae: str
    """Folder of a saved SAE, or a released one as release:sae_id or release sae_id."""
    sae_id: str | None = None
    """Id of the SAE in its release."""
    held_out: str | None = None
    """Held-out text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder, a data set on
    disk or on the hub (name or name:config). By default the embedded model's held-out tokens with that model, else the data set
    the SAE was trained on."""
    model_class_name: str | None = None
    """HookedTransformer, TransformerBridge or AutoModelForCausalLM; the one in the SAE's metadata unless given."""
    batch_size_prompts: int = 16
    """Rows in a batch."""
    n_eval_reconstruction_batches: int = 10
    """Batches for KL and cross-entropy."""
    n_eval_sparsity_variance_batches: int = 10
    """Batches for everything else."""
    compute_kl: bool = True
    """KL(original || with the SAE) of next-token distributions, in nats, beside that of an ablation."""
    compute_ce_loss: bool = True
    """Cross-entropy of the next token, in nats: as it is, with the SAE, with the hook point ablated."""
    compute_l2_norms: bool = True
    """Norms of input and output, and the bias of the reconstruction."""
    compute_sparsity_metrics: bool = True
    """L0 and L1 of the features, per token."""
    compute_variance_metrics: bool = True
    """Explained variance, squared error summed over dimensions, cosine similarity."""
    compute_featurewise_density_statistics: bool = False
    """For each feature: how often it is active (in the JSON file)."""
    compute_featurewise_weight_based_metrics: bool = False
    """For each feature: norms, encoder bias, cosine of encoder and decoder (in the JSON file)."""
    exclude_special_tokens: bool | None = None
    """Whether BOS, EOS and padding are left out; as in the SAE's metadata unless given, and left out where that is silent."""
    save: str | None = None
    """JSON file for every number, with configuration, versions and the sha256 of the tokens."""

    def __post_init__(self) -> None:
        check_positive(self, "batch_size_prompts", "n_eval_reconstruction_batches", "n_eval_sparsity_variance_batches")
        if not any(getattr(self, field.name) for field in fields(self) if field.name.startswith("compute_")):
            raise ValueError("every metric is switched off; leave one of the compute_... options on")


class HashedStore(ActivationsStore):
    """SAELens's store, with the sha256 of the tokens it gave and a count of how often the data were begun."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sha256, self.passes = hashlib.sha256(), 0
        super().__init__(*args, **kwargs)

    @override
    def get_batch_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        tokens = super().get_batch_tokens(*args, **kwargs)
        self.sha256.update(tokens.cpu().numpy().tobytes())
        return tokens

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        self.passes += 1
        return super()._iterate_tokenized_sequences()


def evaluate_saved(config: EvaluateConfig, *, command: str | None = None) -> Evaluation:
    """Evaluate one SAE; writes `config.save` where that is given, and nothing where SAE, model or data do not work."""
    check_device(config.device)
    sae = load_sae(config.sae, config.sae_id, config.device).eval()
    metadata = sae.cfg.metadata
    model = _load_model(sae, config)
    dataset, data = _data(sae, config)
    context_size = config.context_size or metadata.context_size
    if context_size is None:
        raise ValueError("the SAE's metadata has no context_size; give --context-size")
    check_context(model, context_size)
    held_out_tokens(model, dataset, context_size, 1)  # says so where the text fills no row
    with quiet_saelens():
        store = store_as_in_training(
            sae, model, dataset, context_size, batch_size_prompts=config.batch_size_prompts, device=config.device
        )
        metrics, feature_metrics = _run(sae, store, model, config)
    result = Evaluation(
        sae=config.sae if config.sae_id is None else f"{config.sae}:{config.sae_id}",
        architecture=sae.cfg.architecture(),
        model_name=config.model or metadata.model_name,
        hook_name=metadata.hook_name,
        data=data,
        context_size=context_size,
        passes=store.passes,
        metrics=metrics,
        feature_metrics=feature_metrics,
        provenance=provenance(
            config, command=command, sae_config=sae.cfg.to_dict(), tokens_sha256=store.sha256.hexdigest()
        ),
    )
    if config.save is not None:
        result.save(config.save)
    return result


def _load_model(sae: SAE[Any], config: EvaluateConfig) -> LanguageModel:
    """The SAE's model; the SAE's hook name becomes the model's own for it."""
    model, site = model_of(sae, config.device, model_name=config.model, model_class_name=config.model_class_name)
    refuse_heads_of_a_bridge(model, site.hook_name)
    sae.cfg.metadata.hook_name = site.hook_name
    return model


def _data(sae: SAE[Any], config: EvaluateConfig) -> tuple[Any, str]:
    trained_on = sae.cfg.metadata.dataset_path
    if config.held_out is not None:
        return open_dataset(config.held_out, split=config.split), config.held_out
    if (config.model or sae.cfg.metadata.model_name) == demo.MODEL_NAME:
        return demo.load_tokens("validation"), "held-out tokens of the embedded model"
    if not trained_on:
        raise ValueError("the SAE's metadata names no data set; give held-out text with --held-out")
    label = f"{trained_on}, on which the SAE was trained: not held out (give --held-out)"
    return open_dataset(trained_on, split="train"), label


def store_as_in_training(
    sae: SAE[Any], model: LanguageModel, dataset: Any, context_size: int, *, batch_size_prompts: int, device: str
) -> HashedStore:
    """A store that cuts the text as for the SAE's training."""
    metadata = sae.cfg.metadata
    store = HashedStore.from_sae(
        cast(Any, model),  # a bridge is as good, though SAELens's type does not say so
        sae,
        dataset,
        context_size=context_size,
        store_batch_size_prompts=batch_size_prompts,
        device=device,
        disable_concat_sequences=bool(metadata.disable_concat_sequences),
        sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
    )
    return cast(HashedStore, store)


@torch.no_grad()
def _run(
    sae: SAE[Any], store: HashedStore, model: LanguageModel, config: EvaluateConfig
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    excluded = config.exclude_special_tokens
    if excluded is None:
        excluded = sae.cfg.metadata.get("exclude_special_tokens", True)
    wanted = {field.name: getattr(config, field.name, None) for field in fields(EvalConfig)}
    metrics, feature_metrics = run_evals(
        sae=sae,
        activation_store=store,
        model=cast(Any, model),
        activation_scaler=ActivationScaler(),
        eval_config=EvalConfig(**{name: value for name, value in wanted.items() if value is not None}),
        exclude_special_tokens=excluded,
        verbose=True,
    )
    if not config.compute_featurewise_density_statistics:  # SAELens then gives 0 / 0 for each feature
        for name in ("feature_density", "consistent_activation_heuristic"):
            feature_metrics.pop(name, None)
    return metrics, feature_metrics
