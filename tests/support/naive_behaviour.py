"""KL, CE and FVU by a naive float64 loop."""

import math

import numpy as np
import torch
from builders import CONTEXT, D_VOCAB, HOOK

# The reference runs in float64 from the same float32 logits and activations: what differs is float32 log-softmax.
CLOSE = {"rel": 1e-5, "abs": 1e-7}


def random_tokens(rows: int = 5) -> torch.Tensor:
    tokens = torch.randint(1, D_VOCAB, (rows, CONTEXT), generator=torch.Generator().manual_seed(4))
    tokens[:, 0] = 0
    tokens[1, 7] = 0  # a BOS in the middle of a row
    return tokens


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(value - top) for value in logits))
    return [value - top - total for value in logits]


@torch.no_grad()
def rows_by_hand(model, tokens, replace) -> dict[str, list[float]]:
    """The figures of each counted token: `replace` maps its activation to what goes in its place."""
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    x, x_hat = cache[HOOK], cache[HOOK].clone()
    places = [(r, p) for r in range(len(tokens)) for p in range(1, CONTEXT) if tokens[r, p] != 0]
    for place in places:
        x_hat[place] = replace(x[place])
    special = [(r, p) for r in range(len(tokens)) for p in range(CONTEXT) if (r, p) not in places]
    assert all(torch.equal(x[place], x_hat[place]) for place in special)
    original = model(tokens)
    changed = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda value, hook: x_hat)])
    names = ("row", "position", "kl_nats", "ce_nats", "ce_delta_nats", "error_norm", "error_energy", "cosine", "x_norm")
    found = {name: [] for name in names}
    for r, p in places:
        log_p, log_q = log_softmax(original[r, p].tolist()), log_softmax(changed[r, p].tolist())
        ce, ce_original = (-logs[tokens[r, p + 1]] if p + 1 < CONTEXT else math.nan for logs in (log_q, log_p))
        a, b = x[r, p].tolist(), x_hat[r, p].tolist()
        energy, norm, norm_hat = sum((v - u) ** 2 for u, v in zip(a, b, strict=True)), math.hypot(*a), math.hypot(*b)
        cosine = sum(u * v for u, v in zip(a, b, strict=True)) / norm / norm_hat
        kl = sum(math.exp(s) * (s - t) for s, t in zip(log_p, log_q, strict=True))
        values = (r, p, kl, ce, ce - ce_original, math.sqrt(energy), energy, cosine, norm)
        for name, value in zip(names, values, strict=True):
            found[name].append(value)
    return found


@torch.no_grad()
def by_hand(model, tokens, sae, replace) -> dict[str, float]:
    """The averages."""
    rows = rows_by_hand(model, tokens, replace)
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    chosen = cache[HOOK][rows["row"], rows["position"]]
    centred = chosen.double() - chosen.double().mean(0)
    return {
        "fvu": sum(rows["error_energy"]) / float(centred.square().sum()),
        "kl_nats": np.mean(rows["kl_nats"]),
        "ce_nats": np.nanmean(rows["ce_nats"]),
        "ce_delta_nats": np.nanmean(rows["ce_delta_nats"]),
        "l0": sum(int((sae.encode(x[None]) > 0).sum()) for x in chosen) / len(chosen),
        "tokens": len(chosen),
    }
