"""The job of `sae-nfm evaluate`: a saved or released SAE of any architecture through SAELens's own evaluation.

The figures are those of `sae_lens.evals.run_evals`, under its names. What one has to know to read them:

* Tokens that the SAE's metadata excludes (BOS, EOS, padding) pass by the SAE and are left out of every mean. The ablation
  arm zeroes the hook point at ALL positions, those too: `..._with_ablation`, and the scores that divide by it, are of a
  harder ablation than the SAE's arm is spared.
* Position 0 and the metadata's `seqpos_slice` are not looked at: all positions count.
* Sparsity and variance are measured on the batches that follow those of KL and cross-entropy.
* A model or an SAE in 16 bits works in them; logits, activations and features are widened to float32 before SAELens's metrics.
* A transcoder is in place of what it writes, which SAELens's evaluation is not made for: `transcoders`.
* Logits that are not finite are an error that names the condition. A score that divides by next to nothing, or lies outside
  of 0 to 1, and a metric that is not defined have a note.
"""

import hashlib
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import cycle
from typing import Any, cast

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor
from typing_extensions import override

from sae_nfm import demo
from sae_nfm.common import check_numbers, check_positive, check_writable, provenance
from sae_nfm.common.options import HeldOutOptions, SavedSAEOptions, sampled_text
from sae_nfm.common.results import HELD_OUT
from sae_nfm.data import (
    SketchCollector,
    check_ids,
    held_out_tokens,
    open_dataset,
    own_text,
    told_of_text,
    vocabulary_size,
)
from sae_nfm.evaluation.results import Evaluation
from sae_nfm.evaluation.transcoders import evaluate_transcoder
from sae_nfm.kernels import wide
from sae_nfm.loading import load_sae, quiet_saelens
from sae_nfm.models import (
    LanguageModel,
    SharedPrefix,
    check_context,
    check_device,
    check_finite,
    is_transcoder,
    masked_padding,
    model_of,
    refuse_heads_of_a_bridge,
    special_token_ids,
    special_tokens_words,
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SavedSAEOptions, HeldOutOptions):
    """Which SAE, on what, by which metrics."""

    sae: str
    """Folder of a saved SAE, or a released one as release:sae_id or release sae_id."""
    sae_id: str | None = None
    """Id of the SAE in its release."""
    held_out: str | None = None
    """Held-out text or tokens: a .parquet, .arrow, .jsonl, .json, .csv or .txt file (also .gz, .zst), a folder, a data set on
    disk or on the hub (name or name:config). By default the model's own, which the embedded one and smollm2 have, else the data
    set the SAE was trained on."""
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
        check_numbers(self)
        if not any(getattr(self, field.name) for field in fields(self) if field.name.startswith("compute_")):
            raise ValueError("every metric is switched off; leave one of the compute_... options on")


class HashedStore(ActivationsStore):
    """SAELens's store, with the sha256 of the tokens it gave and a count of how often the data were begun."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sha256, self.passes = hashlib.sha256(), 0
        super().__init__(*args, **kwargs)
        self.text = SketchCollector(special_token_ids(cast(Any, self.model)))

    @override
    def get_batch_tokens(self, *args: Any, **kwargs: Any) -> Tensor:
        tokens = super().get_batch_tokens(*args, **kwargs)
        self.sha256.update(tokens.cpu().numpy().tobytes())
        for row in tokens.cpu():
            check_ids(row, self.n_dataset_processed, vocabulary_size(cast(Any, self.model)), self.context_size)
            self.text.add(row.numpy())
        return tokens

    @override
    def _iterate_tokenized_sequences(self) -> Generator[Tensor, None, None]:
        self.passes += 1
        return super()._iterate_tokenized_sequences()


def evaluate_saved(config: EvaluateConfig, *, command: str | None = None) -> Evaluation:
    """Evaluate one SAE; writes `config.save` where that is given, and nothing where SAE, model or data do not work."""
    check_device(config.device)
    check_writable(config.save)
    sae = load_sae(config.sae, config.sae_id, config.device).eval()
    metadata = sae.cfg.metadata
    model = _load_model(sae, config)
    dataset, data = _data(sae, config)
    context_size = config.context_size or metadata.context_size
    if context_size is None:
        raise ValueError("the SAE's metadata has no context_size; give --context-size")
    check_context(model, context_size)
    if is_transcoder(sae):
        _refuse_of_a_transcoder(config)
    held_out_tokens(model, dataset, context_size, 1)  # says so where the text fills no row
    with quiet_saelens():
        store = store_as_in_training(
            sae, model, dataset, context_size, batch_size_prompts=config.batch_size_prompts, device=config.device
        )
        own = is_transcoder(sae)
        if own:
            batches = config.n_eval_reconstruction_batches, config.n_eval_sparsity_variance_batches
            metrics, told = evaluate_transcoder(model, sae, store, *batches)
            feature_metrics: dict[str, list[float]] = {}
        else:
            (metrics, feature_metrics), told = _run(sae, store, model, config), ()
    named: dict[str, Any] = {"folder": config.sae, "source": config.held_out}
    result = Evaluation(
        sae=config.sae if config.sae_id is None else f"{config.sae}:{config.sae_id}",
        architecture=sae.cfg.architecture(),
        model_name=config.model or metadata.model_name,
        hook_name=metadata.hook_name_out if own else metadata.hook_name,
        data=_label(data, config, told_of_text(model, store.text.sketch(), metadata=metadata, **named)),
        special_tokens=special_tokens_words(model, True if own else excluded_tokens(sae, config), "counted"),
        context_size=context_size,
        passes=store.passes,
        metrics=metrics,
        feature_metrics=feature_metrics,
        notes=(*told, *notes_on(metrics)),
        provenance=provenance(
            config, command=command, sae_config=sae.cfg.to_dict(), tokens_sha256=store.sha256.hexdigest()
        ),
    )
    if config.save is not None:
        result.save(config.save)
    return result


def _refuse_of_a_transcoder(config: EvaluateConfig) -> None:
    """Raise a ValueError for an option that is SAELens's alone, which a transcoder does not go through."""
    usual = EvaluateConfig(sae=config.sae)
    for field in fields(config):
        name, given = field.name, getattr(config, field.name)
        if (name.startswith("compute_") or name == "exclude_special_tokens") and given != getattr(usual, name):
            raise ValueError(
                f"{name} is {given!r}, and of a transcoder everything is measured, special tokens left out; leave it out"
            )


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
    if sampled := sampled_text(name := config.model or sae.cfg.metadata.model_name, None):
        what = (
            "held-out tokens of the embedded model"
            if name == demo.MODEL_NAME
            else f"held-out text of {name}. {sampled}"
        )
        return own_text(name, "validation"), what
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


def excluded_tokens(sae: SAE[Any], config: EvaluateConfig) -> Any:
    """True, or the ids, of the special tokens that are left out: as asked, else as in the training."""
    asked = config.exclude_special_tokens
    return sae.cfg.metadata.get("exclude_special_tokens", True) if asked is None else asked


def _label(data: str, config: EvaluateConfig, told: str) -> str:
    """The name of the text, and whether it is held out."""
    if config.held_out is not None:
        return f"{data}: {told}"
    return data if "not held out" in data or told.startswith(HELD_OUT) else f"{data}: {told}"


@torch.no_grad()
def _run(
    sae: SAE[Any], store: HashedStore, model: LanguageModel, config: EvaluateConfig
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    wanted = {field.name: getattr(config, field.name, None) for field in fields(EvalConfig)}
    with masked_padding(model), _in_float32(sae, model):
        metrics, feature_metrics = run_evals(
            sae=sae,
            activation_store=store,
            model=cast(Any, model),
            activation_scaler=ActivationScaler(),
            eval_config=EvalConfig(**{name: value for name, value in wanted.items() if value is not None}),
            exclude_special_tokens=excluded_tokens(sae, config),
            verbose=True,
        )
    if not config.compute_featurewise_density_statistics:  # SAELens then gives 0 / 0 for each feature
        for name in ("feature_density", "consistent_activation_heuristic"):
            feature_metrics.pop(name, None)
    return metrics, feature_metrics


CONDITIONS = ("without the SAE", "with the SAE in place", "with the hook point ablated (zero)")
"""What SAELens runs the model under for each batch, in this order."""


@contextmanager
def _in_float32(sae: SAE[Any], model: LanguageModel) -> Generator[None]:
    """Within it, what SAELens measures of a model or an SAE in 16 bits is float32; logits have to be finite."""
    host: Any = model
    forward, with_cache, encode, decode = host.forward, host.run_with_cache, sae.encode, sae.decode
    conditions, hook_name = cycle(CONDITIONS), str(sae.cfg.metadata.hook_name)
    prefix = SharedPrefix(model, ())

    def wide_forward(tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal prefix
        if kwargs.get("return_type") != "both":
            return forward(tokens, *args, **kwargs)
        condition = next(conditions)
        if condition == CONDITIONS[0]:  # another batch
            prefix = SharedPrefix(model, [hook_name])
        with prefix.shared(hook_name):
            logits, loss = forward(tokens, *args, **kwargs)
        check_finite(logits.flatten(0, 1), torch.ones_like(tokens, dtype=torch.bool), f"{condition} the model's logits")
        if logits.dtype in HALF:
            logits = logits.float()
            loss = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]
        return logits, loss

    def wide_cache(*args: Any, **kwargs: Any) -> Any:
        output, cache = with_cache(*args, **kwargs)
        return output, {name: wide(value) for name, value in cache.items()}

    def wide_encode(x: Tensor) -> Tensor:
        return wide(encode(x).to_dense())

    def wide_decode(acts: Tensor) -> Tensor:
        return wide(decode(acts.to(sae.dtype)))  # features as they were

    changes: list[tuple[Any, str, Any]] = [(host, "forward", wide_forward)]
    if next(host.parameters()).dtype in HALF:
        changes.append((host, "run_with_cache", wide_cache))
    if sae.dtype in HALF:
        changes += [(sae, "encode", wide_encode), (sae, "decode", wide_decode)]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in changes]
    for owner, name, function in changes:
        owner.__dict__[name] = function
    try:
        yield
    finally:
        for owner, name, own in before:
            if own is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = own


HALF = (torch.float16, torch.bfloat16)
SMALL_NATS = 0.01
"""A difference between model and ablated model that is no scale to divide by."""


def notes_on(metrics: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """Sentences on scores that cannot be read as "1: nothing is lost, 0: as bad as ablated", and on what is not defined."""
    found, values = list[str](), {name: value for group in metrics.values() for name, value in group.items()}
    spans = {
        "ce_loss_score": ("cross-entropy", "ce_loss_with_ablation", "ce_loss_without_sae", "ce_loss_with_sae"),
        "kl_div_score": ("KL", "kl_div_with_ablation", None, "kl_div_with_sae"),
    }
    for score, (what, ablated, original, spliced) in spans.items():
        if score not in values:
            continue
        span = values[ablated] - (0.0 if original is None else values[original])
        if not span > SMALL_NATS:
            found.append(
                f"{score} divides by what ablation costs in {what}, here {span:.2g} nats: ablating this hook point hardly "
                f"hurts the model on this text, or helps it, so the score says nothing; read {spliced}"
            )
        elif values[score] > 1:
            found.append(f"{score} is above 1: by {what} the model is better with the SAE than without it on this text")
        elif values[score] < 0:
            found.append(f"{score} is below 0: by {what} the SAE is worse than an ablated hook point on this text")
    undefined = sorted(name for name, value in values.items() if not math.isfinite(value))
    if undefined:
        found.append(
            f"{', '.join(undefined)}: not defined; a token, or all tokens together, gave a number that is not finite (no "
            "variance or norm to divide by, or activations beyond the range of their data type)"
        )
    return tuple(found)
