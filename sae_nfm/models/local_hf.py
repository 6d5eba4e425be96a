"""Local Hugging Face folders as `HookedSAETransformer`: raw weights, the same predictions, nothing fetched.

TransformerLens loads official names only, and takes the shape of Llama and Gemma models from their names. Here the shape is
that of the folder's config.json, the tensors go through TransformerLens's own converters, and the converted model is
compared with the Hugging Face model on a probe: one that predicts differently is an error, never a result.
"""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from sae_lens.util import str_to_dtype
from torch.nn import functional as F
from transformer_lens import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_hf_model_config, get_pretrained_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_FOLDS, _CENTRES = ("fold_ln", "fold_value_biases"), ("center_writing_weights", "center_unembed")
PROCESSING = (*_FOLDS, *_CENTRES, "refactor_factored_attn_matrices")
OTHER_CLASSES = "load it with model_class_name='TransformerBridge' or 'AutoModelForCausalLM'"
PROBE_TOKENS = 64
KL_LIMIT_NATS = 1e-5
"""Rounding in float32 stays far below (1e-9 and less), another activation function or rotary base far above."""
KL_LIMIT_NATS_HALF = 1e-2
"""The same in half precision, where the two models' sums are rounded in another order."""


def is_folder(name: str | Path) -> bool:
    """Whether a model name is a local Hugging Face folder."""
    return (Path(name) / "config.json").is_file()


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder has a vocabulary. Without one, transformers makes up an empty tokenizer for some models."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def hooked_from_folder(
    folder: str | Path,
    device: str = "cpu",
    *,
    dtype: str | torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_ctx: int | None = None,
    default_prepend_bos: bool | None = None,
    default_padding_side: str | None = None,
    **from_pretrained_kwargs: Any,
) -> HookedSAETransformer:
    """A Hugging Face folder as a `HookedSAETransformer`, in eval mode.

    GPT-2, GPT-NeoX (Pythia), Llama, Gemma and Gemma 2, and what else TransformerLens can convert from its config.

    Args:
        folder: config.json, weights, tokenizer; without a tokenizer the model reads token ids only.
        dtype: of the weights, whatever it is on disk.
        n_ctx: longest input in tokens; None takes the config's.
        default_prepend_bos: None takes TransformerLens's default for the architecture.
        default_padding_side: None takes the tokenizer's.
        from_pretrained_kwargs: TransformerLens's processing (`fold_ln`, `center_writing_weights`, ..., off unless given);
            the rest goes to Hugging Face's `from_pretrained`.

    Raises a FileNotFoundError for an incomplete folder, a ValueError for weights that do not fill the model, or an architecture
    that TransformerLens cannot convert exactly.
    """
    dtype = str_to_dtype(from_pretrained_kwargs.pop("torch_dtype", dtype))
    processing = {name: from_pretrained_kwargs.pop(name, False) for name in PROCESSING}
    hf = _load_hf_model(folder, dtype, from_pretrained_kwargs)
    if tokenizer is None and has_tokenizer(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    own = {"init_weights": False, "model_name": Path(folder).resolve().name, "tokenizer_name": None}
    given = {"n_ctx": n_ctx, "default_prepend_bos": default_prepend_bos, "device": device, "dtype": dtype}
    try:
        fields = config_fields(hf) | own | {name: value for name, value in given.items() if value is not None}
        cfg = HookedTransformerConfig.from_dict(fields)
        with torch.no_grad():
            weights = get_pretrained_state_dict(str(folder), cfg, hf, dtype=cfg.dtype)
        model = HookedSAETransformer(cfg, tokenizer, move_to_device=False, default_padding_side=default_padding_side)
        model.load_and_process_state_dict(weights, **processing)
    except (NotImplementedError, AttributeError, AssertionError, RuntimeError) as error:
        # how TransformerLens says: no table, a field that the table asks for, an activation function, tensors that do not fit
        raise ValueError(
            f"TransformerLens cannot convert the {type(hf).__name__} in {str(folder)!r} ({error}); {OTHER_CLASSES}"
        ) from error
    model.move_model_modules_to_device()
    _check_same_predictions(model, hf, folder)
    return model.eval()


def _load_hf_model(folder: str | Path, dtype: torch.dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise FileNotFoundError(f"{str(folder)!r} is not a complete Hugging Face folder: {error}") from error
    except TypeError as error:
        raise ValueError(f"{', '.join(kwargs)} cannot be given for {str(folder)!r}: {error}") from error
    model, info = loaded
    if info["missing_keys"]:  # else they stay as initialised, at random
        raise ValueError(
            f"the weights in {str(folder)!r} lack {', '.join(sorted(info['missing_keys']))}, which config.json asks for; "
            "fetch the folder anew or correct config.json"
        )
    return model.eval()


def config_fields(hf: PreTrainedModel) -> dict[str, Any]:
    """TransformerLens's config of a Hugging Face model, from its config and class, not from its name."""
    architecture, config = type(hf).__name__, hf.config
    if architecture in ("GemmaForCausalLM", "Gemma2ForCausalLM"):
        return _gemma_fields(config) | {"original_architecture": architecture}
    description = config.to_dict() | {"architectures": [architecture]}
    assumed: dict[str, Any] = {}  # by TransformerLens's table, which does not read it
    if architecture == "GPT2LMHeadModel":
        description["n_ctx"] = config.n_positions  # TransformerLens reads a key that only old files have
        assumed = {"d_mlp": config.n_inner or 4 * config.n_embd}
    elif architecture == "GPTNeoXForCausalLM":
        assumed = {"rotary_base": config.rope_parameters["rope_theta"]}
    elif architecture == "LlamaForCausalLM" and config.head_dim:
        assumed = {"d_head": config.head_dim, "rotary_dim": config.head_dim}
    with TemporaryDirectory() as neutral:  # a path with "llama" in it is taken for a name that TransformerLens knows
        (Path(neutral) / "config.json").write_text(json.dumps(description, default=str))
        return convert_hf_model_config(neutral) | assumed


def _gemma_fields(config: Any) -> dict[str, Any]:
    """Gemma and Gemma 2, which TransformerLens knows by name only; the keys are those of its own entries."""
    fields: dict[str, Any] = {
        "d_model": config.hidden_size,
        "d_head": config.head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "d_vocab": config.vocab_size,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "initializer_range": config.initializer_range,
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": config.rope_parameters["rope_theta"],
        "rotary_dim": config.head_dim,
        "gated_mlp": True,
        "final_rms": True,
    }
    if config.model_type == "gemma2":
        fields |= {
            "attn_scale": config.query_pre_attn_scalar**0.5,
            "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
            "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
            "use_local_attn": True,
            "window_size": config.sliding_window,
            "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
            "use_normalization_before_and_after": True,
        }
    return fields


@torch.no_grad()
def _check_same_predictions(model: HookedSAETransformer, hf: PreTrainedModel, folder: str | Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, min(model.cfg.n_ctx, PROBE_TOKENS)), generator=generator)
    log_p = hf(tokens.to(hf.device)).logits.cpu().double().log_softmax(-1)
    log_q = model(tokens.to(model.cfg.device)).cpu().double().log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean().item()
    limit = KL_LIMIT_NATS if model.cfg.dtype in (torch.float32, torch.float64) else KL_LIMIT_NATS_HALF
    if math.isnan(kl) or kl > limit:
        raise ValueError(
            f"TransformerLens's conversion of the {type(hf).__name__} in {str(folder)!r} does not predict what the Hugging "
            f"Face model predicts (KL {kl:.2g} nats per token, at most {limit:g} expected): something in its config.json is "
            f"not converted; {OTHER_CLASSES}"
        )
