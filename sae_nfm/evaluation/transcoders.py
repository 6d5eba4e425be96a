"""What `sae-nfm evaluate` measures of a transcoder: in place of the MLP that it stands for, and beside an affine map.

SAELens's `run_evals` puts an SAE in place of what it reads, and so would put a transcoder in place of the MLP's input. Here it is
in place of the output, its skip kept. Names are SAELens's where they mean the same; counted are tokens that are neither special
nor in position 0, as by `evaluate`.

The control of a transcoder's error is the best affine map of the input alone, by least squares: a reconstruction no better than
that says nothing of features. It is fitted on the first half of the tokens, and both are measured on the second.
"""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from torch.nn import functional as F

from sae_nfm.evaluation.fidelity import outcomes
from sae_nfm.interventions import Intervention, Splice
from sae_nfm.interventions.equal_norm_controls import Activations, anchors
from sae_nfm.models import LanguageModel, counted_tokens, reconstruction, resolve_hook_name

PER_DIMENSION = 10
"""Tokens for each number that one output of the affine map is fitted by; with fewer its error on others is too high."""
SPLICED, ABLATED = "sae", "zero"


@torch.no_grad()
def evaluate_transcoder(
    model: LanguageModel, sae: SAE[Any], store: Any, n_spliced: int, n_rows: int
) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Metrics by group, and what has to be known of them.

    Args:
        store: gives batches of tokens.
        n_spliced: batches for KL and cross-entropy.
        n_rows: batches for everything else, those that follow.
    """
    metadata = sae.cfg.metadata
    names = [resolve_hook_name(model, str(name)) for name in (metadata.hook_name, metadata.hook_name_out)]
    metrics = _spliced(model, sae, store, n_spliced, names[1])
    x, y, acts = _rows(model, sae, store, n_rows, names)
    made = torch.cat([reconstruction(sae, part[None], {})[0].float() for part in x.split(1024)])
    variance = ExplainedVarianceCalculator()
    variance.add_batch(made, y)
    metrics["reconstruction_quality"] = {
        "explained_variance": float(variance.compute()),
        "mse": float((made - y).square().sum(-1).mean()),
        "cossim": float(F.cosine_similarity(made, y, dim=-1).mean()),
    }
    metrics["sparsity"] = {"l0": float(acts[0] / len(x)), "l1": float(acts[1] / len(x))}
    half = len(x) // 2
    controls = {"affine": affine_map(x[:half], y[:half])(x[half:]), "transcoder": made[half:]}
    metrics["beside_the_best_affine_map"] = {"tokens_fitted": float(half), "tokens": float(len(x) - half)} | {
        f"fvu_{name}": fvu(y[half:], one) for name, one in controls.items()
    }
    notes = [
        "a transcoder takes the place of what the MLP writes; tokens in position 0 and special ones are not counted",
        "the affine map of the input was fitted on the first half of the tokens; its error, as the transcoder's beside it, is of "
        "the second half",
    ]
    if half < PER_DIMENSION * (sae.cfg.d_in + 1):
        notes.append(
            f"the affine map was fitted on {half:,} tokens, fewer than {PER_DIMENSION} for each of the {sae.cfg.d_in + 1} "
            "numbers of an output, so that its error is too high; give more batches (--n-eval-sparsity-variance-batches)"
        )
    return metrics, tuple(notes)


def affine_map(x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"]) -> Any:
    """The function x -> x A + b of least squared error on these tokens, float64 inside."""
    means = x.double().mean(0), y.double().mean(0)
    A = torch.linalg.lstsq(x.double() - means[0], y.double() - means[1], driver="gelsd").solution

    def function(other: Float[Tensor, "others d_in"]) -> Float[Tensor, "others d_out"]:
        return ((other.double() - means[0]) @ A + means[1]).to(y.dtype)

    return function


def fvu(y: Float[Tensor, "tokens d"], made: Float[Tensor, "tokens d"]) -> float:
    """Squared error over squared distance from the mean."""
    return float((y - made).double().square().sum() / (y - y.mean(0)).double().square().sum())


def _spliced(
    model: LanguageModel, sae: SAE[Any], store: Any, n_batches: int, written: str
) -> dict[str, dict[str, float]]:
    d_out = getattr(sae.cfg, "d_out", sae.cfg.d_in)
    nowhere = Activations(
        hook_name=written, mean=torch.zeros(d_out), covariance=torch.zeros(d_out, d_out), tokens=0, head=None
    )
    arms: dict[str, Intervention] = {SPLICED: Splice(sae=sae), ABLATED: anchors(nowhere)["zero"]}
    sums = defaultdict[tuple[str, str], float](float)
    for _ in range(n_batches):
        for name, outcome in outcomes(model, store.get_batch_tokens(), arms, with_acts=False):
            sums[name, "tokens"] += len(outcome.kl_nats)
            sums[name, "kl"] += float(outcome.kl_nats.double().sum())
            sums[name, "next"] += int(outcome.has_next.sum())
            for what, values in (("ce", outcome.ce_nats), ("delta", outcome.ce_delta_nats)):
                sums[name, what] += float(values[outcome.has_next].double().sum())
    kl = {name: sums[name, "kl"] / sums[name, "tokens"] for name in arms}
    ce = {name: sums[name, "ce"] / sums[name, "next"] for name in arms}
    original = ce[SPLICED] - sums[SPLICED, "delta"] / sums[SPLICED, "next"]
    return {
        "model_behavior_preservation": {
            "kl_div_with_ablation": kl[ABLATED],
            "kl_div_with_sae": kl[SPLICED],
            "kl_div_score": 1 - kl[SPLICED] / kl[ABLATED],
        },
        "model_performance_preservation": {
            "ce_loss_with_ablation": ce[ABLATED],
            "ce_loss_with_sae": ce[SPLICED],
            "ce_loss_without_sae": original,
            "ce_loss_score": (ce[ABLATED] - ce[SPLICED]) / (ce[ABLATED] - original),
        },
    }


def _rows(
    model: Any, sae: SAE[Any], store: Any, n_batches: int, names: list[str]
) -> tuple[Float[Tensor, "tokens d_in"], Float[Tensor, "tokens d_out"], tuple[float, float]]:
    """Input, output, and how many features are active in all, and their sum; a row that comes again (short text) once."""
    parts, active, total, seen = list[tuple[Tensor, Tensor]](), 0.0, 0.0, set[tuple[int, ...]]()
    layers = [extract_stop_at_layer_from_tlens_hook_name(name) for name in names]
    stop = None if None in layers else max(layer for layer in layers if layer is not None)
    for _ in range(n_batches):
        rows = [row for row in store.get_batch_tokens() if tuple(row.tolist()) not in seen]
        seen.update(tuple(row.tolist()) for row in rows)
        if not rows:
            continue
        batch = torch.stack(rows)
        counted = counted_tokens(model, batch)
        _, cache = model.run_with_cache(batch, names_filter=names, stop_at_layer=stop, prepend_bos=False)
        x, y = (cache[name][counted] for name in names)
        acts = sae.encode(x).to_dense()
        active, total = active + float((acts != 0).sum()), total + float(acts.abs().sum(dtype=torch.float64))
        parts.append((x.float(), y.float()))
    x, y = (torch.cat(several) for several in zip(*parts, strict=True))
    return x, y, (active, total)
