"""The features as each path of an SAE reads them, and what a path writes when they are changed.

    path          hook point          reads                                writes (or pools)
    direct        hook_sae_recons     f                                    f W_dec
    linear        hook_nfm_linear     f_n                                  f_n W_lin
    square        hook_nfm_square     f                                    (f^2 / c) U
    interaction   hook_nfm_pooled     f_n                                  z

f is what passes `hook_sae_acts_post`, f_n its n largest entries (`nfm_top_k`; all where it is None). Where several are equal
at the edge of the n, the SAE may read another of them.
"""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]
from sae_lens.saes.topk_sae import act_times_W_dec
from torch import Tensor

from sae_nfm.architectures import NFMPaths
from sae_nfm.kernels import POOLS, reference

Path = Literal["direct", "linear", "square", "interaction"]
PATHS: tuple[Path, ...] = get_args(Path)
FEATURES = "hook_sae_acts_post"
HOOK_OF_PATH: dict[Path, str] = {
    "direct": "hook_sae_recons",
    "linear": "hook_nfm_linear",
    "square": "hook_nfm_square",
    "interaction": "hook_nfm_pooled",
}
"""Where a change of what a path reads is put into effect."""

Features = Float[Tensor, "rows pos d_sae"]


class FeatureReads:
    """The features of one pass through an SAE, and as each path reads them after the edits so far."""

    def __init__(self, sae: SAE[Any], features: Features) -> None:
        self.sae, self.features = sae, features
        self._read = dict[Path, Tensor]()

    def by(self, path: Path) -> Features:
        """As a path reads them: zero where it does not."""
        if path not in self._read:
            n = None if path in ("direct", "square") else self.sae.cfg.nfm_top_k
            self._read[path] = self.features if n is None else _strongest(self.features, n)
        return self._read[path]

    def change(self, path: Path, read: Features) -> Float[Tensor, "rows pos width"]:
        """Let a path read other features; what that adds at its hook point."""
        before, self._read[path] = self.by(path), read
        if path == "direct":
            return _direct(self.sae, before, read)
        sae = read_by_paths(self.sae)
        if path == "linear":
            return reference.weighted_rows(read - before, sae.W_lin)
        if path == "square":
            c = sae.cfg.square_scale
            return reference.square_output(read, sae.U, c) - reference.square_output(before, sae.U, c)
        pool = POOLS[sae.cfg.head]
        return pool(read, sae.V) - pool(before, sae.V)


def read_by_paths(sae: SAE[Any]) -> NFMPaths:
    """The SAE, when its paths read features in the units of `hook_sae_acts_post`.

    Raises:
        ValueError: for an SAE without an NFM, or one in training that reads them in units of its own.
    """
    if not isinstance(sae, NFMPaths):
        raise ValueError(
            f"an SAE of the architecture {sae.cfg.architecture()!r} has a direct path only; give a joint_nfm or "
            "sequential_nfm SAE"
        )
    if isinstance(sae, TrainingSAE) and hasattr(sae, "nfm_scale"):
        raise ValueError(
            "this SAE is in training and reads features in units of its own (nfm_scale); save it with save_inference_model "
            "and load that"
        )
    return sae


def _strongest(features: Features, n: int) -> Features:
    read = reference.top_n(features, n)
    return torch.zeros_like(features).scatter(-1, read.indices, read.values)


def _direct(sae: SAE[Any], before: Features, after: Features) -> Float[Tensor, "rows pos d_in"]:
    if not isinstance(sae, NFMPaths):
        rescale = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        return act_times_W_dec(after - before, sae.W_dec, rescale)
    with _disable_hooks(sae):  # what the direct path is, the architecture says
        return sae.decode_paths(after).direct - sae.decode_paths(before).direct
