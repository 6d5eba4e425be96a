"""Whether a model, a hook point, a row and a device fit together, asked before anything is trained, evaluated or written."""

from typing import Any

import torch
from sae_lens import SAE, SAETransformerBridge

from sae_nfm.models.load import HEADS, LanguageModel, Site, find_site, load_model, resolve_hook_name


def site_at(model: LanguageModel, hook_name: str, head: int | None = None) -> Site:
    """A hook point, or a single head of it, as an SAE sees it.

    Raises:
        ValueError: when the model has no such hook point or head.
    """
    if head is None:
        return find_site(model, hook_name)
    shape: Any = getattr(model, "cfg", None)
    if shape is None:
        raise ValueError(
            "hook_head_index is for hook points with heads, which AutoModelForCausalLM does not have; leave it out"
        )
    if not 0 <= head < shape.n_heads:
        raise ValueError(f"hook_head_index is {head}; the model has heads 0 to {shape.n_heads - 1}")
    return Site(hook_name=resolve_hook_name(model, hook_name), d_in=shape.d_head, reshape_activations="none")


def model_of(
    sae: SAE[Any], device: str, *, model_name: str | None = None, model_class_name: str | None = None
) -> tuple[LanguageModel, Site]:
    """The language model that an SAE was trained on, and the SAE's hook point there.

    Args:
        sae: the SAE; its metadata name the model, its kind and its hook point.
        device: where the model goes.
        model_name: another name or folder of the model.
        model_class_name: another kind.

    Raises:
        ValueError, FileNotFoundError: when the metadata are silent, or the model is missing or has another width there.
    """
    metadata = sae.cfg.metadata
    name = model_name or metadata.model_name
    if name is None or metadata.hook_name is None:
        raise ValueError(
            "the SAE's metadata has no model_name or no hook_name, so it is not known where to splice it in; give --model, "
            "or save the SAE with a hook_name"
        )
    kind = model_class_name or metadata.model_class_name or "HookedTransformer"
    same = model_name is None and model_class_name is None
    kwargs = (metadata.model_from_pretrained_kwargs or {}) if same else {}
    model = load_model(name, device, model_class_name=kind, **kwargs)
    site = site_at(model, metadata.hook_name, metadata.hook_head_index)
    if site.d_in != sae.cfg.d_in:
        raise ValueError(
            f"the SAE has d_in {sae.cfg.d_in}, but {site.hook_name!r} of {name} has width {site.d_in}; give the model it "
            "was trained on with --model"
        )
    return model, site


def check_context(model: LanguageModel, context_size: int) -> None:
    """Raise a ValueError for rows that are longer than the model reads."""
    config: Any = getattr(model, "cfg", None) or getattr(model.model, "config", None)
    limit = getattr(config, "n_ctx", None) or getattr(config, "max_position_embeddings", None)
    if limit is not None and context_size > limit:
        raise ValueError(f"context_size is {context_size}, but the model reads at most {limit} tokens; lower it")


def check_device(device: str) -> None:
    """Raise a ValueError for a device that this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); give another"
        ) from error


def refuse_heads_of_a_bridge(model: LanguageModel, hook_name: str) -> None:
    """Raise a ValueError where SAELens's evaluation would not flatten heads: it goes by names that a bridge does not use."""
    if isinstance(model, SAETransformerBridge) and hook_name.endswith(HEADS):
        raise ValueError(
            f"SAELens's evaluation does not flatten the heads of {hook_name!r} under a TransformerBridge; evaluate with "
            "--model_class_name HookedTransformer (when training: --evaluate_every 0)"
        )
