"""What an MLP reads and what it writes, as hook points: between them a transcoder is trained and put in the MLP's place.

    blocks.9.mlp.hook_in      what the MLP multiplies its weights with: behind the normalisation and its weight
    blocks.9.hook_mlp_out     what it adds to the residual stream (a bridge's own name: blocks.9.mlp.hook_out)

`ln2.hook_normalized` is in front of the normalisation's weight, unless that is folded into the MLP; where a second normalisation
follows the MLP (Gemma 2), `hook_mlp_out` is behind it. So hook points are not believed by their names: the model's own MLP, run
on what passes the one, has to give what passes the other.
"""

import re
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor

from sae_nfm.models.load import LanguageModel, Site, context_limit, device_of, find_site

PROBED = 32
"""Tokens of the row that the MLP is tried on."""
SAME = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative difference of two ways to compute one thing, by type; 0.03 of shorter ones."""


@torch.no_grad()
def mlp_sites(model: LanguageModel, hook_name: str, hook_name_out: str | None = None) -> tuple[Site, Site]:
    """The hook points of what an MLP reads and writes, the first by any name that the model knows, the second found unless given.

    Raises a ValueError, which names the hook points that are, where the two are not the input and output of one MLP.
    """
    if isinstance(model, HookedProxyLM):
        raise ValueError(
            "a transcoder needs a hook point of what an MLP reads, which model_class_name AutoModelForCausalLM lacks; give "
            "HookedTransformer or TransformerBridge"
        )
    if not hasattr(model, "acts_to_saes"):
        raise ValueError(
            f"{type(model).__name__} has no hook point of what an MLP reads; load the model with sae_nfm's load_model (and give "
            "it as override_model)"
        )
    read = find_site(model, hook_name)
    place = re.fullmatch(r"blocks\.(\d+)\..+", read.hook_name)
    mlp = None if place is None else getattr(model.blocks[int(place[1])], "mlp", None)
    if place is None or mlp is None:
        raise ValueError(
            f"hook_name is {hook_name!r}, and a transcoder reads the input of an MLP, of which there is none; give one such as "
            "blocks.2.mlp.hook_in"
        )
    block = f"blocks.{place[1]}."
    inside = [f"{block}mlp.hook_out", f"{block}hook_mlp_out"]
    right = find_site(model, f"{block}mlp.hook_in"), find_site(model, next(n for n in inside if _knows(model, n)))
    written = right[1] if hook_name_out is None else find_site(model, hook_name_out)
    passed = _passed(model, sorted({site.hook_name for site in (read, written, *right)}))

    def holds(one: Site, other: Site) -> bool:
        x, y = passed[one.hook_name], passed[other.hook_name]
        if x.ndim != 3 or x.shape[-1] != right[0].d_in:
            return False
        made = mlp(x)
        if not isinstance(made, Tensor) or made.shape != y.shape:
            return False
        return bool((made - y).norm() <= SAME.get(y.dtype, 0.03) * y.norm())

    if not holds(*right):
        raise ValueError(
            f"what the MLP makes of {right[0].hook_name!r} is not what passes {right[1].hook_name!r} of this model (a second "
            "normalisation may follow it); load it with model_class_name TransformerBridge, or take another model"
        )
    if holds(read, written):
        return read, written
    wrong_in = not holds(read, right[1])
    name, given, wanted = ("hook_name", hook_name, right[0]) if wrong_in else ("hook_name_out", hook_name_out, right[1])
    what = "reads" if wrong_in else "writes"
    raise ValueError(
        f"{name} is {given!r}, which is not what the MLP of block {place[1]} {what}; give {wanted.hook_name!r}"
    )


def _knows(model: Any, name: str) -> bool:
    return name in model.hook_dict


def _passed(model: Any, names: list[str]) -> dict[str, Tensor]:
    n = min(PROBED, context_limit(model) or PROBED)
    tokens = torch.arange(n, device=device_of(model))[None] * 7 % model.cfg.d_vocab
    _, cache = model.run_with_cache(tokens, names_filter=names)
    return {name: cache[name] for name in names}


def pair_hooks(runner: Any) -> None:
    """Let a runner of SAELens that trains a transcoder read input and output in one pass of the model, side by side.

    Its store then yields both hook points of the same tokens, which are shuffled together. Runners of other SAEs are left alone.

    Raises a ValueError for hook points that are not those of an MLP, or where SAELens would read another store.
    """
    several = getattr(runner, "saes", None)
    if several is not None:
        for name, sae in several.items():
            if hasattr(sae, "halves"):
                raise ValueError(
                    f"{name!r} is a transcoder, and SAELens's runner for several SAEs gives each one hook point; train it with "
                    "its runner for one SAE, or `sae-nfm train`"
                )
        return
    sae, cfg, store = runner.sae, runner.cfg, runner.activations_store
    if not hasattr(sae, "halves") or getattr(store, "serves_side_by_side", False):
        return
    if cfg.use_cached_activations:
        raise ValueError(
            "use_cached_activations reads one hook point, and a transcoder is trained on two; give --activations, a cache of "
            "both that `sae-nfm cache` wrote"
        )
    if cfg.hook_head_index is not None:
        raise ValueError(f"hook_head_index is {cfg.hook_head_index}, and an MLP has no heads; leave it out")
    model = getattr(runner.model, "_orig_mod", runner.model)
    read, written = mlp_sites(model, cfg.hook_name, sae.cfg.hook_name_out)
    for name, given, site in (("d_in", sae.cfg.d_in, read), ("d_out", sae.cfg.d_out, written)):
        if given != site.d_in:
            raise ValueError(f"{name} is {given}, but {site.hook_name!r} has width {site.d_in}; give that width")
    cfg.hook_name = read.hook_name
    sae.cfg.metadata.hook_name_out = sae.cfg.hook_name_out = cfg.sae.hook_name_out = written.hook_name
    sae.cfg.metadata.hook_head_index_out = None
    store.hook_name, store._hook_names = read.hook_name, [read.hook_name, written.hook_name]
    store._hook_d_ins = {read.hook_name: read.d_in, written.hook_name: written.d_in}
    store._hook_head_indices = {}
    store.serves_side_by_side = True
    runner.evaluator = None  # SAELens's, with wandb, would put it in place of what it reads
