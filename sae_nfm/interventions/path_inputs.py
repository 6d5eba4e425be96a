"""What each path of an SAE reads, and what it writes when that is changed.

    path          reads, at                                   writes (or pools), at
    direct        f      hook_sae_acts_post                   f W_dec          hook_sae_recons
    linear        f_n    hook_nfm_linear_in                   f_n W_lin        hook_nfm_linear
    square        f      hook_nfm_square_in                   (f^2 / c) U      hook_nfm_square
    interaction   f_n    hook_nfm_interaction_in              z                hook_nfm_pooled

f_n are the n largest entries of f (`nfm_top_k`; all where it is None).
"""

from typing import Any, Literal, get_args

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
READ_AT: dict[Path, str] = {
    "direct": FEATURES,
    "linear": "hook_nfm_linear_in",
    "square": "hook_nfm_square_in",
    "interaction": "hook_nfm_interaction_in",
}
"""Where what a path reads passes."""
WRITTEN_AT: dict[Path, str] = {
    "direct": "hook_sae_recons",
    "linear": "hook_nfm_linear",
    "square": "hook_nfm_square",
    "interaction": "hook_nfm_pooled",
}
"""Where a change of what a path reads is put into effect: other tokens keep their bits."""

Features = Float[Tensor, "rows pos d_sae"]


class PathReads(dict[Path, Tensor]):
    """What each path reads in one pass through an SAE, [rows, pos, d_sae], after the edits so far: zero where it does not."""

    def change(self, sae: SAE[Any], path: Path, read: Features) -> Float[Tensor, "rows pos width"]:
        """Let a path read other features; what that adds where it writes."""
        before, self[path] = self[path], read
        if path == "direct":
            return _direct(sae, before, read)
        sae = read_by_paths(sae)
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


def _direct(sae: SAE[Any], before: Features, after: Features) -> Float[Tensor, "rows pos d_in"]:
    if not isinstance(sae, NFMPaths):
        rescale = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        return act_times_W_dec(after - before, sae.W_dec, rescale)
    with _disable_hooks(sae):  # what the direct path is, the architecture says
        return sae.decode_paths(after).direct - sae.decode_paths(before).direct
