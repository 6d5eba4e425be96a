"""Which features of each token are largest: the encoder's product [n_tokens, d_sae], and the selection from it.

The product is made for some tokens at a time, in memory that all of them use. The selection has two stages: there are k
entries as large as any in the k blocks of largest maximum. On CPU the product is made for some features at a time too, so
that bias, scale and block maxima are computed while a piece is in the cache, and the columns left over from the division
into blocks are candidates of their own. On a GPU with Triton one kernel reads the product once, for the maxima, and another
one the members of the chosen blocks.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_nfm.kernels.device import product_dtype, promoted_dtype, uses_triton

TOKENS_AT_ONCE = {"cpu": 512, "cuda": 4096}
"""Tokens whose scores [tokens, d_sae] exist at one time. CPU: measured, fewer read W_enc too often. CUDA: a guess."""
FEATURES_AT_ONCE = 4096
"""Features in one product on CPU, a power of two. Measured."""
LONGEST = 32
"""Columns in a block at most, a power of two. Measured: 64 makes no difference at 65,536 features."""


def hidden_pre(
    sae_in: Float[Tensor, "*batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
) -> Float[Tensor, "*batch d_sae"]:
    """The pre-activations of all features, `(x W_enc + b_enc) * scale`."""
    unscaled = sae_in @ W_enc + b_enc
    return unscaled if scale is None else unscaled * scale


@torch.no_grad()
def top_hidden_pre(
    sae_in: Float[Tensor, "n_tokens d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    scale: Float[Tensor, " d_sae"] | None,
    k: int,
) -> tuple[Int[Tensor, "n_tokens k"], Float[Tensor, "n_tokens k"]]:
    """Indices and values of the k largest entries of `hidden_pre`, in no order; among equal ones any choice is valid."""
    device = sae_in.device.type
    # cast here: autocast would remember its copy of W_enc, made without gradient, for later uses of the parameter
    sae_in, W_enc = (tensor.to(product_dtype(sae_in)) for tensor in (sae_in, W_enc))
    at_once = max(1, min(len(sae_in), TOKENS_AT_ONCE.get(device, len(sae_in))))
    if uses_triton(sae_in):
        return _joined([_top_by_triton(tokens, W_enc, b_enc, scale, k) for tokens in sae_in.split(at_once)])
    memory = sae_in.new_empty(at_once, len(b_enc), dtype=promoted_dtype(sae_in, b_enc, scale))
    blocks = Blocks(memory, k) if device == "cpu" else None
    found: list[tuple[Tensor, Tensor]] = []
    for tokens in sae_in.split(at_once):
        scores = memory[: len(tokens)]
        if blocks is None:
            _score(tokens, W_enc, b_enc, scale, out=scores)
            indices = scores.topk(k, dim=-1, sorted=False).indices
        else:
            for columns in blocks.pieces:
                part_scale = None if scale is None else scale[columns]
                _score(tokens, W_enc[:, columns], b_enc[columns], part_scale, out=scores[:, columns])
                blocks.note_maxima(scores, columns)
            indices = blocks.top(scores)
        found.append((indices, scores.gather(-1, indices)))
    return _joined(found)


def largest(scores: Float[Tensor, "n_tokens d_sae"], k: int) -> Int[Tensor, "n_tokens k"]:
    """Where the k largest scores of each token are, in no order."""
    if scores.device.type != "cpu":
        return scores.topk(k, dim=-1, sorted=False).indices
    blocks = Blocks(scores, k)
    for columns in blocks.pieces:
        blocks.note_maxima(scores, columns)
    return blocks.top(scores)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    indices, values = zip(*parts, strict=True)
    return parts[0] if len(parts) == 1 else (torch.cat(indices), torch.cat(values))


def _top_by_triton(sae_in: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The product as the library of the device makes it, then the two stages of the selection."""
    from sae_nfm.kernels import triton_sums

    product, d_sae = sae_in @ W_enc, len(b_enc)
    n_blocks = math.ceil(d_sae / _block_size(d_sae, k))
    maxima = product.new_empty(len(product), n_blocks, dtype=promoted_dtype(product, b_enc, scale))
    triton_sums.block_maxima(product, b_enc, scale, maxima)
    blocks = maxima.topk(k, dim=-1, sorted=False).indices
    candidates = triton_sums.block_scores(product, b_enc, scale, blocks, n_blocks)
    values, position = candidates.topk(k, dim=-1, sorted=False)
    size = candidates.shape[-1] // k
    indices = blocks.gather(-1, position // size) + position % size * n_blocks
    # a score of -inf may be that of no column at all
    return indices.clamp_(max=d_sae - 1), values


def _block_size(d_sae: int, k: int) -> int:
    """Columns in a block, a power of two near sqrt(d_sae / k): as many maxima as candidates."""
    return max(1, min(LONGEST, 2 ** round(math.log2(d_sae / k) / 2)))


def _score(sae_in: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, *, out: Tensor) -> None:
    if out.dtype == sae_in.dtype:
        torch.mm(sae_in, W_enc, out=out)
    elif out.dtype == b_enc.dtype:
        out.copy_(sae_in @ W_enc)
    else:
        out.copy_(hidden_pre(sae_in, W_enc, b_enc, scale))
        return
    out.add_(b_enc)
    if scale is not None:
        out.mul_(scale)


class Blocks:
    """The columns of scores [n_tokens, d_sae] in pieces, each divided into blocks of one size; a block's columns are spread
    evenly over its piece. What does not fill a block is left over, always in the last piece.
    """

    def __init__(self, memory: Float[Tensor, "n_tokens d_sae"], k: int) -> None:
        d_sae = memory.shape[1]
        self.k = k
        self.size = min(FEATURES_AT_ONCE, _block_size(d_sae, k))
        """Columns in a block. Blocks of less than 4 do not pay."""
        self.pieces = [slice(at, min(at + FEATURES_AT_ONCE, d_sae)) for at in range(0, d_sae, FEATURES_AT_ONCE)]
        steps = [(piece.stop - piece.start) // self.size for piece in self.pieces]
        self.first = torch.cat([at.start + torch.arange(step) for at, step in zip(self.pieces, steps, strict=True)])
        self.step = torch.tensor(steps).repeat_interleave(torch.tensor(steps))
        self.left_over = torch.arange(self.pieces[-1].start + self.size * steps[-1], d_sae)
        self.maxima = memory.new_empty(len(memory), len(self.first))

    def note_maxima(self, scores: Float[Tensor, "n_tokens d_sae"], piece: slice) -> None:
        """Find the largest entry of every block of a piece."""
        if self.size < 4:
            return
        n_blocks, at = (piece.stop - piece.start) // self.size, piece.start // self.size
        blocks = scores[:, piece.start : piece.start + self.size * n_blocks].unflatten(-1, (self.size, n_blocks))
        torch.amax(blocks, dim=1, out=self.maxima[: len(scores), at : at + n_blocks])

    def top(self, scores: Float[Tensor, "n_tokens d_sae"]) -> Int[Tensor, "n_tokens k"]:
        """Where the k largest entries of each row are, once the maxima of all pieces are noted."""
        if self.size < 4:
            return scores.topk(self.k, dim=-1, sorted=False).indices
        best = self.maxima[: len(scores)].topk(self.k, dim=-1, sorted=False).indices
        members = self.first[best][..., None] + self.step[best][..., None] * torch.arange(self.size)
        candidates = torch.cat([members.flatten(1), self.left_over.expand(len(scores), -1)], dim=-1)
        return candidates.gather(-1, scores.gather(-1, candidates).topk(self.k, dim=-1, sorted=False).indices)
