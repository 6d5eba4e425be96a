"""Inference through the decoder as its definition says it, in plain loops: one token at a time, in float64, J entry by entry."""

from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor


def inferred(sae: SAE[Any], x: Tensor, stages: int, steps: int) -> tuple[Tensor, Tensor]:
    """Activations [rows, d_sae] of an SAE in float64, and for which rows the definition leaves no choice open.

    It does where a path with `nfm_top_k` reads fewer features than were chosen, but more than are > 0: which of the others are
    "the n largest" is then open.
    """
    found = [_of_token(sae, row, stages, steps) for row in x]
    return torch.stack([f for f, _ in found]), torch.tensor([clear for _, clear in found])


def _of_token(sae: Any, x: Tensor, stages: int, steps: int) -> tuple[Tensor, bool]:
    d_sae = sae.cfg.d_sae
    w_lin = sae.W_lin if sae.cfg.use_linear_path else torch.zeros_like(sae.W_dec)
    sequential = hasattr(sae, "base")
    host = sae.base if sequential else sae
    rescaled, scale = getattr(host.cfg, "rescale_acts_by_decoder_norm", False), 1.0
    n = [float(sae.W_dec[i].norm()) if rescaled else 1.0 for i in range(d_sae)]

    def D(f: Tensor) -> Tensor:
        among = torch.zeros_like(f).index_fill(0, torch.tensor(support, dtype=torch.long), 1e-300)
        # features that were chosen are larger than all others
        return sum(path for path in sae.decode_paths((f + among)[None]) if path is not None)[0]

    support: list[int] = []

    if sequential:
        f = host.encode(x[None])[0].clone()  # what it leaves for decode belongs to this token
        x_n = x
        support += [i for i in range(d_sae) if f[i] != 0]
        scale = {"constant_norm_rescale": float(x.norm()) / len(x) ** 0.5, "layer_norm": float(x.std())}.get(
            host.cfg.normalize_activations, 1.0
        )
    else:
        x_n = sae.run_time_activation_norm_fn_in(x[None])[0]
        s = x_n - sae.b_dec if sae.cfg.apply_b_dec_to_input else x_n
        f = torch.zeros(d_sae, dtype=x.dtype)
    if not sequential and getattr(sae.cfg, "encoder", "topk") == "jumprelu":
        for i in range(d_sae):
            score = n[i] * float(s @ sae.W_enc[:, i] + sae.b_enc[i])
            if score > max(0.0, float(sae.threshold[i])):
                support.append(i)
                f[i] = score
    elif not sequential:
        k = sae.cfg.k
        nothing = D(torch.zeros(d_sae, dtype=x.dtype))
        candidates = range(d_sae)
        for t in range(1, stages + 1):
            y = D(f) - nothing
            score = [n[i] * float((s - y) @ sae.W_enc[:, i] + sae.b_enc[i]) for i in range(d_sae)]
            if t == 1 and sae.cfg.selection_candidates is not None:
                candidates = sorted(range(d_sae), key=lambda i: -score[i])[: sae.cfg.selection_candidates]
            free = sorted((i for i in candidates if i not in support), key=lambda i: -score[i])
            for i in free[: t * k // stages - (t - 1) * k // stages]:
                support.append(i)
                f[i] = max(score[i], 0.0)
    column = [float((scale * sae.W_dec[i] / n[i] + w_lin[i]).square().sum()) for i in range(d_sae)]
    read = getattr(sae.cfg, "nfm_top_k", None) or 0
    clear = True
    for _ in range(steps):
        clear = clear and (read >= len(support) or int((f > 0).sum()) >= read)
        r = x_n - D(f)
        J = torch.autograd.functional.jacobian(D, f)  # [d_in, d_sae]
        d = torch.zeros_like(f)
        for i in support:
            d[i] = (J[:, i] @ r) / column[i]
        q = J @ d
        a = min(max(float(r @ q) / float(q @ q), 0.0), 1.0) if float(q @ q) > 0 else 0.0
        moved = (f + a * d).clamp(min=0)
        if (x_n - D(moved)).square().sum() < r.square().sum():
            f = moved
    return f, clear
