"""Training of secondary SAEs and of their controls, with SAELens's own runner.

    hidden code             h = z W_1 + b_1 of the primary, which a secondary SAE is for
    permuted hidden code    each dimension of h permuted among the tokens of a batch: its distribution stays, what the
                            dimensions do together goes. What such an SAE explains owes nothing to structure across dimensions
    linear path             what the linear integration path writes
    residual                what the primary reads

All are TopK SAEs of one expansion (features per dimension), one learning rate and one stream of tokens. With k near the number of
dimensions any code reconstructs well (the paper's k = 250 of 300 is such a one), hence several k for the hidden code and the
permuted one; the other two are trained at the smallest.

An arm ends in `<folder>/<source>/k<k>`, written whole by `matched_training`: interrupted, it goes on, to the same bits.

Source: arXiv 2507.00269, secondary SAE; the permuted control is this package's own.
"""

import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge, TopKTrainingSAEConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from sae_nfm.architectures import HIDDEN, PRIMARY_DIGEST, check_primary, primary_digest
from sae_nfm.common import read_json
from sae_nfm.data import ActivationCache
from sae_nfm.experiments.secondary.results import TrainedOn
from sae_nfm.models import HookFunction, site_at, splice, tokens_read
from sae_nfm.training import StreamConfig, TrainingArm, train_arms

CODES: tuple[TrainedOn, ...] = ("hidden code", "permuted hidden code")
HOOKS: dict[TrainedOn, str] = {
    "hidden code": HIDDEN,
    "permuted hidden code": HIDDEN,
    "linear path": "hook_nfm_linear",
    "residual": "hook_sae_input",
}
"""Hook points of the primary at which these pass."""


@dataclass(frozen=True, kw_only=True)
class TrainedSecondary:
    """A trained SAE and what it was trained on."""

    trained_on: TrainedOn
    k: int
    sae: SAE[Any]

    @property
    def name(self) -> str:
        """Unique name."""
        return f"{self.trained_on}, k {self.k}"


def train_secondaries(
    stream: StreamConfig,
    expansion: int,
    ks: Sequence[int],
    learning_rate: float,
    model: HookedSAETransformer | SAETransformerBridge,
    primary: SAE[Any],
    dataset: Any,
    folder: Path,
    cache: ActivationCache | None = None,
) -> list[TrainedSecondary]:
    """Train a secondary SAE and its controls, those that are not finished.

    `ks` are the active features a token, for the hidden code and the permuted one; the other controls take the smallest. The hook
    name of the stream is the primary's, and the cache's. Without a linear path in the primary that control is left out.

    Raises:
        ValueError: for a primary without a hidden code, a k with too few features, or a folder with SAEs that were trained on
            another primary or otherwise.
    """
    checked = check_primary(primary)
    known = primary_digest(primary)
    refuse_other_primary(folder, known)
    site = site_at(model, stream.hook_name, primary.cfg.metadata.hook_head_index)
    trained: list[TrainedSecondary] = []
    for trained_on, hook in HOOKS.items():
        if hook not in checked.hook_dict:
            continue
        is_code = trained_on in CODES
        d_in = checked.cfg.nfm_dim if is_code else site.d_in
        arms = {
            f"k{k}": TrainingArm(
                name=f"k{k}", family=f"k{k}", sae=secondary_config(k, d_in, expansion, stream.device, known)
            )
            for k in (ks if is_code else [min(ks)])
        }
        if trained_on == "residual":
            for arm in arms.values():
                arm.sae.reshape_activations = site.reshape_activations
        target = folder / trained_on.replace(" ", "-")
        with activations_of(model, primary, trained_on, stream.seed) as hook_name:
            at = replace(stream, hook_name=hook_name)
            train_arms(at, arms, dict.fromkeys(arms, learning_rate), model, dataset, target, cache)
        for name, arm in arms.items():
            sae = SAE.load_from_disk(target / name, device=stream.device).eval()
            trained.append(TrainedSecondary(trained_on=trained_on, k=int(getattr(arm.sae, "k", 0)), sae=sae))
    return trained


def refuse_other_primary(folder: Path, known: str) -> None:
    """Raise a ValueError where a folder has SAEs that were trained on another primary than the one of this digest."""
    for path in sorted(folder.glob(f"*/*/{SAE_CFG_FILENAME}")):
        found = read_json(path)["metadata"].get(PRIMARY_DIGEST)
        if found != known:
            raise ValueError(
                f"{str(path.parent)!r} was trained on another primary ({PRIMARY_DIGEST} {found}, this one's is {known}); give "
                "another output folder"
            )


def secondary_config(k: int, d_in: int, expansion: int, device: str, known: str) -> TopKTrainingSAEConfig:
    """A TopK SAE of `expansion` features a dimension, which says in its metadata what primary it is for, by its digest."""
    d_sae = expansion * d_in
    if not 1 <= k <= d_sae:
        raise ValueError(
            f"k is {k}, and {expansion} features for each of {d_in} dimensions are {d_sae}; give a k up to that"
        )
    return TopKTrainingSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        device=device,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(**{PRIMARY_DIGEST: known}),
    )


@contextmanager
def activations_of(
    model: HookedSAETransformer | SAETransformerBridge, primary: SAE[Any], trained_on: TrainedOn, seed: int
) -> Generator[str]:
    """Within it these activations pass through the hook point of the model whose name is given.

    The primary is spliced in meanwhile, unless it is the residual that is trained on. The seed is that of the permutation.
    """
    metadata = primary.cfg.metadata
    if (
        trained_on == "residual" and metadata.hook_head_index is None
    ):  # else what the primary reads is seen in its splice only
        yield site_at(model, str(metadata.hook_name)).hook_name
        return
    with splice(model, primary) as found, tokens_read(model) as read:

        def permute(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            read.check_shape(value)
            return permuted(value, read.counted_on(value.device), _generator_for(read.ids_on(value.device), seed))

        functions: dict[str, HookFunction] = {HIDDEN: permute} if trained_on == "permuted hidden code" else {}
        with found.hooks(functions):
            yield found.prefix + HOOKS[trained_on]


def _generator_for(tokens: Int[Tensor, "rows pos"], seed: int) -> torch.Generator:
    """The same for the same tokens, so that a training that was interrupted goes on as it would have."""
    entropy = [seed, zlib.crc32(tokens.cpu().numpy().tobytes())]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))


def permuted(
    hidden: Float[Tensor, "*batch nfm_dim"], counted: Bool[Tensor, "*batch"], generator: torch.Generator
) -> Float[Tensor, "*batch nfm_dim"]:
    """Each dimension permuted among the counted tokens, independently (generator: on the CPU); the others keep what they have."""
    taking_part = hidden[counted]
    order = torch.rand(taking_part.shape, generator=generator).argsort(dim=0).to(hidden.device)
    dealt = hidden.clone()
    dealt[counted] = taking_part.gather(0, order)
    return dealt


def default_k(nfm_dim: int) -> Sequence[int]:
    """An eighth of the dimensions, and the paper's 250 of 300."""
    return max(1, nfm_dim // 8), max(1, round(nfm_dim * 250 / 300))
