"""Language models by name or from a folder, through each loader of SAELens, and their hook points by every name in use.

Three kinds of model, by SAELens's `model_class_name`:

    HookedTransformer      HookedSAETransformer   blocks.2.hook_resid_post   TransformerLens's own modules, raw weights
    TransformerBridge      SAETransformerBridge   blocks.2.hook_out          Hugging Face's modules under TransformerLens's hooks
    AutoModelForCausalLM   HookedProxyLM          transformer.h.2            Hugging Face's modules and names
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from sae_lens.load_model import HookedProxyLM
from sae_lens.load_model import load_model as load_with_saelens
from sae_lens.util import str_to_dtype
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge.generalized_components import AttentionBridge, BlockBridge, GatedMLPBridge, MLPBridge

from sae_nfm import demo
from sae_nfm.common import check_choice
from sae_nfm.common.options import FETCHED_MODEL
from sae_nfm.demo.model import MODEL_DIR
from sae_nfm.models.local_hf import has_tokenizer, hooked_from_folder, is_folder
from sae_nfm.models.samples import is_samples, load_samples
from sae_nfm.models.smollm2 import fetched_folder, take_over_rotation

LanguageModel = HookedSAETransformer | SAETransformerBridge | HookedProxyLM
OFFLINE = "check the spelling and the connection, or stay offline with the embedded model (leave the option out)"
HEADS = ("hook_z", "attn.o.hook_in")
"""How the names of hook points end whose heads have to be flattened."""

WHICH_MODEL = ("revision", "checkpoint_index", "checkpoint_value", "checkpoint_label", "subfolder", "hf_model")
"""Arguments of loaders that choose among models of one name."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A hook point of a model, as an SAE sees it."""

    hook_name: str
    """The name by which this model knows it: the one to train with."""
    d_in: int
    """Dimensions a token, heads flattened."""
    reshape_activations: Literal["none", "hook_z"]
    """"hook_z" where the SAE has to flatten heads."""


@overload
def load_model(
    name: str | Path, device: str = ..., *, model_class_name: Literal["HookedTransformer"] = ..., **kwargs: Any
) -> HookedSAETransformer: ...
@overload
def load_model(name: str | Path, device: str = ..., *, model_class_name: str, **kwargs: Any) -> LanguageModel: ...
def load_model(
    name: str | Path, device: str = "cpu", *, model_class_name: str = "HookedTransformer", **from_pretrained_kwargs: Any
) -> LanguageModel:
    """A language model: the embedded one or SmolLM2 by its own name, a local Hugging Face folder, or a name from the hub.

    Weights are neither folded nor centred unless asked for. A folder without a tokenizer gives a `HookedTransformer` that
    reads token ids only; the other two classes need one.

    Args:
        name: "sae-nfm-demo", "smollm2" (once `sae-nfm models fetch smollm2` has fetched it), a folder with config.json or one
            of samples (`models.samples`), or a name that TransformerLens or the hub knows.
        model_class_name: "HookedTransformer", "TransformerBridge" or "AutoModelForCausalLM".
        from_pretrained_kwargs: as that class's loader takes them, e.g. `dtype="bfloat16"`.

    Raises:
        ValueError: for another class, a name TransformerLens does not know, a folder it cannot convert exactly, or a fetched
            model that is damaged.
        FileNotFoundError: for an incomplete folder, a model that was not fetched, or when the hub cannot be reached or does not
            have the model.
    """
    check_choice("model_class_name", model_class_name, _LOADERS)
    load = _LOADERS[model_class_name]
    if name == demo.MODEL_NAME and model_class_name == "HookedTransformer" and not from_pretrained_kwargs:
        return demo.load_model(device)
    if name in (demo.MODEL_NAME, FETCHED_MODEL):
        if name == FETCHED_MODEL and is_folder(name):
            raise ValueError(
                f"{name!r} is the fetched model and a folder here; give './{name}' for the folder, or rename it for the model"
            )
        kwargs = {"dtype": torch.float32} | from_pretrained_kwargs  # the embedded model is half precision on disk
        model = load(str(MODEL_DIR if name == demo.MODEL_NAME else fetched_folder()), device, **kwargs)
        if not isinstance(model, HookedProxyLM):
            model.cfg.model_name = name
        if name == FETCHED_MODEL and isinstance(model, HookedSAETransformer):
            take_over_rotation(model, fetched_folder())
        return model
    if is_samples(name):
        asked = {key: value for key, value in from_pretrained_kwargs.items() if value}
        if model_class_name != "HookedTransformer" or asked:
            raise ValueError(
                f"{str(name)!r} has samples and no model, so that there is nothing to load as {model_class_name} with {asked}; "
                "leave both out"
            )
        return load_samples(name, device)
    if is_folder(name):
        return load(str(name), device, **from_pretrained_kwargs)
    if Path(name).is_absolute() or Path(name).is_dir() or str(name).startswith("."):
        raise FileNotFoundError(
            f"{str(name)!r} is not a Hugging Face folder: it has no config.json; give one with config.json, weights and tokenizer"
        )
    try:
        return load(str(name), device, **from_pretrained_kwargs)
    except OSError as error:
        raise FileNotFoundError(f"model {name!r} could not be fetched from the hub; {OFFLINE}") from error


def _only_own_tokens(model: Any) -> Any:
    """Take back the BOS and EOS that TransformerLens gives a tokenizer that has none, where the model has no such token.

    It reads text with padding, for which a tokenizer needs a token, if only one that no single text gets.
    """
    tokenizer, d_vocab = model.tokenizer, model.cfg.d_vocab
    if tokenizer is None:
        return model
    for kind in ("bos", "eos"):
        token = getattr(tokenizer, f"{kind}_token_id")
        if token is None or token >= d_vocab:
            setattr(tokenizer, f"{kind}_token", None)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token or "<|endoftext|>"})
    if tokenizer.bos_token_id is None:
        model.cfg.default_prepend_bos = False
    return model


def _load_hooked(name: str, device: str, **kwargs: Any) -> HookedSAETransformer:
    if is_folder(name):
        return _only_own_tokens(hooked_from_folder(name, device, **kwargs))
    try:
        get_official_model_name(name)
    except ValueError as error:
        raise ValueError(f"TransformerLens knows no model {name!r}; {OFFLINE}") from error
    return _only_own_tokens(HookedSAETransformer.from_pretrained_no_processing(name, device=device, **kwargs))


def _load_bridge(name: str, device: str, **kwargs: Any) -> SAETransformerBridge:
    if "tokenizer" not in kwargs:
        _refuse_without_tokenizer(name, "TransformerBridge")
    if isinstance(kwargs.get("dtype"), str):
        kwargs["dtype"] = str_to_dtype(kwargs["dtype"])
    with torch.random.fork_rng(devices=[]):  # it draws initial weights for the layers it splits
        return _only_own_tokens(SAETransformerBridge.boot_transformers(name, device=device, **kwargs).eval())


def _load_proxy(name: str, device: str, **kwargs: Any) -> HookedProxyLM:
    _refuse_without_tokenizer(name, "AutoModelForCausalLM")
    return cast(HookedProxyLM, load_with_saelens("AutoModelForCausalLM", name, device, kwargs).eval())


def _refuse_without_tokenizer(name: str, model_class_name: str) -> None:
    if is_folder(name) and not has_tokenizer(name):
        raise FileNotFoundError(
            f"{name!r} has no tokenizer, without which {model_class_name} cannot be loaded; add tokenizer.json, or take "
            "model_class_name='HookedTransformer', which reads token ids without one"
        )


_LOADERS: dict[str, Callable[..., Any]] = {
    "HookedTransformer": _load_hooked,
    "TransformerBridge": _load_bridge,
    "AutoModelForCausalLM": _load_proxy,
}


def resolve_hook_name(model: LanguageModel, hook_name: str) -> str:
    """The name by which the model knows a hook point, given that name or the other kind of TransformerLens name.

    `blocks.2.hook_resid_post` and `blocks.2.hook_out` are one place: the first is `HookedSAETransformer`'s name, the second
    `SAETransformerBridge`'s, whose `run_with_cache` and `run_with_hooks` pass over the first in silence. Hook points of
    a spliced SAE follow: `blocks.2.hook_resid_post.hook_nfm_pooled` is `blocks.2.hook_out.hook_nfm_pooled`.

    Raises a ValueError when the model has no such hook point; names like it are listed.
    """
    head, _, tail = hook_name.rpartition(".")
    candidates = (hook_name, _translated(model, hook_name), f"{_translated(model, head)}.{tail}")
    for candidate in candidates:
        if candidate in model.hook_dict:
            return candidate
    if not isinstance(model, HookedProxyLM) and any(_translated(model, at) in candidates for at in model.acts_to_saes):
        raise ValueError(f"an SAE is attached at {hook_name!r} already; take it off first, with model.reset_saes()")
    # SAELens's bridge leaves the aliases out of its hook_dict, TransformerLens's has them
    bridge = isinstance(model, SAETransformerBridge)
    known = list(super(SAETransformerBridge, model).hook_dict if bridge else model.hook_dict)
    near = get_close_matches(hook_name, known, n=4) or known[:4]
    raise ValueError(f"the model has no hook point {hook_name!r}; did you mean one of {', '.join(near)}?")


def _translated(model: LanguageModel, name: str) -> str:
    if isinstance(model, SAETransformerBridge):
        return model._resolve_hook_name(name)  # pyright: ignore[reportPrivateUsage] (what its add_sae does)
    if isinstance(model, HookedSAETransformer):
        block, dot, place = name.removeprefix("blocks.").partition(".")
        return f"blocks.{block}{dot}{_hooked_places(model).get(place, place)}" if name.startswith("blocks.") else name
    return name


def _hooked_places(model: HookedSAETransformer) -> dict[str, str]:
    """Places in a block: TransformerBridge's name to HookedTransformer's, from TransformerBridge's own aliases."""
    block: dict[str, Any] = dict(BlockBridge.hook_aliases)
    if model.cfg.use_normalization_before_and_after:  # Gemma 2 hooks what its second norms write, see its bridge
        block |= {"hook_attn_out": "ln1_post.hook_out", "hook_mlp_out": "ln2_post.hook_out"}
    mlp = GatedMLPBridge if model.cfg.gated_mlp else MLPBridge
    parts: dict[str, dict[str, Any]] = {"": block, "attn.": AttentionBridge.hook_aliases, "mlp.": mlp.hook_aliases}
    return {prefix + canonical: prefix + hooked for prefix, part in parts.items() for hooked, canonical in part.items()}


def device_of(model: LanguageModel) -> torch.device:
    """The device on which the model wants its tokens."""
    return next(model.parameters()).device


def find_site(model: LanguageModel, hook_name: str) -> Site:
    """Look a hook point up, by a name of either kind, and measure its width.

    Raises a ValueError when the model has no such hook point, or one of another shape; names like it are listed.
    """
    own, shape = shape_at(model, hook_name)
    if len(shape) != (4 if own.endswith(HEADS) else 3):
        raise ValueError(
            f"activations at {hook_name!r} have shape {tuple(shape)}; an SAE needs [batch, pos, d_in] "
            "(or hook_z, whose heads are flattened)"
        )
    # A bridge hands heads to hooks one by one, to an SAE in its place flat; SAELens's reshaping wants a name in _z.
    return Site(hook_name=own, d_in=shape[2:].numel(), reshape_activations="hook_z" if own.endswith("_z") else "none")


def shape_at(model: LanguageModel, hook_name: str) -> tuple[str, torch.Size]:
    """The model's own name of a hook point, and the shape of what passes there for one row of two tokens."""
    own = resolve_hook_name(model, hook_name)
    probe = torch.zeros(1, 2, dtype=torch.long, device=device_of(model))
    with torch.no_grad():
        _, cache = model.run_with_cache(probe, names_filter=[own])
    if own not in cache:
        raise ValueError(f"nothing passes through {hook_name!r} as one tensor; give the hook point of an output")
    return own, cache[own].shape


def site_at(model: LanguageModel, hook_name: str, head: int | None = None) -> Site:
    """A hook point, or a single head of it, as an SAE sees it. Raises a ValueError when the model has none."""
    if head is None:
        return find_site(model, hook_name)
    if isinstance(model, HookedProxyLM):
        raise ValueError("hook_head_index needs hook points with heads, which AutoModelForCausalLM lacks; leave it out")
    own, shape = shape_at(model, hook_name)
    if len(shape) == 3 and own.endswith(HEADS):  # a bridge that hands them to hooks flat
        shape = torch.Size((*shape[:2], shape[2] // model.cfg.d_head, model.cfg.d_head))
    if len(shape) != 4:
        raise ValueError(
            f"hook_head_index is {head}, but activations at {hook_name!r} have shape {tuple(shape)} and no heads; leave it out, "
            "or give hook_z, hook_q, hook_k or hook_v"
        )
    if not 0 <= head < shape[2]:
        raise ValueError(f"hook_head_index is {head}; {hook_name!r} has heads 0 to {shape[2] - 1}")
    return Site(hook_name=own, d_in=shape[3], reshape_activations="none")


def loader_kwargs(metadata: Any, name: str, model_class_name: str | None = None) -> dict[str, Any]:
    """What an SAE's metadata give to the loader of its model; of another name or class what means the same there."""
    kwargs = dict(metadata.model_from_pretrained_kwargs or {})
    if model_class_name not in (None, metadata.model_class_name or "HookedTransformer"):
        kwargs = {key: value for key, value in kwargs.items() if key in ("dtype", "torch_dtype")}
    if name != metadata.model_name:
        kwargs = {key: value for key, value in kwargs.items() if key not in WHICH_MODEL}
    return kwargs


def model_of(
    sae: SAE[Any], device: str, *, model_name: str | None = None, model_class_name: str | None = None
) -> tuple[LanguageModel, Site]:
    """The language model that an SAE's metadata name, or another name, folder or kind of it, and the SAE's hook point there.

    Class, data type, revision and whatever else the model was loaded with for the training are those of the metadata.

    Raises a ValueError or FileNotFoundError when the metadata are silent, or the model is missing or has another width there.
    """
    metadata = sae.cfg.metadata
    name = model_name or metadata.model_name
    if name is None or metadata.hook_name is None:
        raise ValueError(
            "the SAE's metadata has no model_name or no hook_name, so it is not known where to splice it in; give --model, "
            "or save the SAE with a hook_name"
        )
    kind = model_class_name or metadata.model_class_name or "HookedTransformer"
    kwargs = loader_kwargs(metadata, name, kind)
    model = load_model(name, device, model_class_name=kind, **kwargs)
    site = site_at(model, metadata.hook_name, metadata.hook_head_index)
    if site.d_in != sae.cfg.d_in:
        raise ValueError(
            f"the SAE has d_in {sae.cfg.d_in}, but {site.hook_name!r} of {name} has width {site.d_in}; give the model it "
            "was trained on with --model"
        )
    written, d_out = metadata.hook_name_out, getattr(sae.cfg, "d_out", None)
    if written is not None and d_out is not None and (there := find_site(model, written)).d_in != d_out:
        raise ValueError(
            f"the transcoder has d_out {d_out}, but {there.hook_name!r} of {name} has width {there.d_in}; give the model it was "
            "trained on with --model"
        )
    return model, site


def context_limit(model: LanguageModel) -> int | None:
    """Tokens in a row that the model reads at most; None where its config does not say."""
    config: Any = getattr(model, "cfg", None) or getattr(model.model, "config", None)
    return getattr(config, "n_ctx", None) or getattr(config, "max_position_embeddings", None)


def check_context(model: LanguageModel, context_size: int) -> None:
    """Raise a ValueError for rows that are longer than the model reads."""
    limit = context_limit(model)
    if limit is not None and context_size > limit:
        raise ValueError(f"context_size is {context_size}, but the model reads at most {limit} tokens; lower it")


def check_device(device: str) -> None:
    """Raise a ValueError for a device that this machine does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}); give another") from error


def synchronize(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if torch.device(device).type in ("cuda", "mps", "xpu"):
        torch.accelerator.synchronize(device)


def refuse_heads_of_a_bridge(model: LanguageModel, hook_name: str) -> None:
    """Raise a ValueError where SAELens's evaluation would not flatten heads: it goes by names that a bridge does not use."""
    if isinstance(model, SAETransformerBridge) and hook_name.endswith(HEADS):
        raise ValueError(
            f"SAELens's evaluation does not flatten the heads of {hook_name!r} under a TransformerBridge; evaluate with "
            "--model_class_name HookedTransformer (when training: --evaluate_every 0)"
        )
