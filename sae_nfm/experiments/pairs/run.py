"""The job of `sae-nfm pairs`: from an SAE without interactions to a joint_nfm that begins with the pairs it leaves over.

    activations -> code and error of the features alone -> composite features taken apart -> pairs, the strongest first
    -> joint_nfm: the same features, a bilinear head that has these pairs, composite features anew

Training goes on with `sae-nfm train --from_pretrained_path OUTPUT/sae`. In the output folder: results.json and sae/.
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import SAE
from scipy import sparse
from torch import Tensor

from sae_nfm.analysis import Composites, FoundPairs, composites, feature_directions, found_pairs, read_activations
from sae_nfm.analysis.pair_search import FEWEST_TOGETHER
from sae_nfm.architectures import JointNFMSAE
from sae_nfm.common import ShortRepr, check_numbers, check_output, check_positive, provenance, publishing
from sae_nfm.common.options import SavedSAEOptions
from sae_nfm.common.results import RESULTS_FILENAME
from sae_nfm.convert import check_takes_pairs, with_pairs
from sae_nfm.data import ActivationCache, held_out_rows, open_dataset, own_text
from sae_nfm.experiments.pairs.results import PairRow, PairsResult
from sae_nfm.loading import digest, load_sae
from sae_nfm.models import check_context, check_device, is_samples, model_of

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SavedSAEOptions):
    """Which SAE, on what, and where the results go."""

    sae: str
    """Folder of the SAE: topk, staged_topk, or joint_nfm without linear path; or release:sae_id."""
    activations: str | None = None
    """Folder of `sae-nfm cache` or `sae-nfm synthetic` with the activations it was trained on."""
    dataset: str | None = None
    """Training text or tokens, as `sae-nfm train` takes them, in place of activations; by default text sampled from the model."""
    tokens: int = 100_000
    """Tokens to search, at most."""
    context_size: int | None = None
    """Tokens per row; the one in the SAE's metadata unless given."""
    pairs: int = 96
    """Pairs to keep: the width of the head."""
    rounds: int = 3
    """Rounds in which pairs are added."""
    refinement_steps: int = 5
    """Refinements of the code that is searched."""
    seed: int = 0
    """Of the weights of features that begin anew."""
    output: str = "runs/pairs"
    """Folder for results.json and the SAE."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_positive(self, "tokens", "pairs", "rounds")
        if self.activations is not None and self.dataset is not None:
            raise ValueError(
                f"dataset is {self.dataset!r}, and the cache {self.activations!r} has its own rows; leave one out"
            )
        check_numbers(self)


def run_pairs(cfg: PairsConfig, *, command: str | None = None) -> PairsResult:
    """Find pairs, and save them with an SAE that has them.

    Raises:
        ValueError, FileNotFoundError: for an SAE, model, text or cache that does not work; nothing is written then.
    """
    check_output(cfg.output)
    check_device(cfg.device)
    sae = load_sae(cfg.sae, device=cfg.device).eval()
    check_takes_pairs(sae)
    x = _activations(cfg, sae)
    found = search(sae, x, cfg.pairs, rounds=cfg.rounds, refinement_steps=cfg.refinement_steps)
    pairs, parts = found.pairs, found.composites.parts.tolil().rows
    if not len(pairs.features):
        raise ValueError(
            f"no two features of {cfg.sae!r} fire together on {FEWEST_TOGETHER} of {len(x):,} tokens; raise tokens = {cfg.tokens}"
        )
    result = PairsResult(
        tokens=len(x),
        fvu=found.error_energy / found.variance,
        pairs=tuple(
            PairRow(
                first=int(first),
                second=int(second),
                together=int(pairs.together[number]),
                share=float(pairs.energy[number] / found.variance),
                size=float(np.linalg.norm(pairs.directions[number])),
            )
            for number, (first, second) in enumerate(pairs.features)
        ),
        composites={int(c): tuple(map(int, parts[c])) for c in found.composites.composite.nonzero()[:, 0]},
        folder=str(Path(cfg.output) / "sae"),
        provenance=provenance(cfg, command=command, sae=digest(sae.state_dict())),
    )
    joint = found.started(sae, cfg.seed)
    with publishing(cfg.output, "pairs", command=command) as made:
        joint.save_model(made.folder / "sae")
        result.save(made.folder / RESULTS_FILENAME)
    return result


@dataclass(frozen=True, kw_only=True, repr=False)
class Search(ShortRepr):
    """What a search found in activations."""

    pairs: FoundPairs
    composites: Composites
    error_energy: float
    """Squared error of the features alone, over all tokens."""
    variance: float
    """Squared distance of the activations from their mean, over all tokens."""

    def started(self, sae: SAE[Any], seed: int = 0) -> JointNFMSAE:
        """A joint_nfm with the SAE's features that begins with these pairs; composite features begin anew."""
        features, directions = torch.from_numpy(self.pairs.features), torch.from_numpy(self.pairs.directions)
        return with_pairs(sae, features, directions, renewed=self.composites.composite, seed=seed)


@torch.no_grad()
def search(
    sae: SAE[Any], x: Float[Tensor, "tokens d_in"], n: int, *, rounds: int = 3, refinement_steps: int = 5
) -> Search:
    """The n pairs of features whose products explain most of what the features alone leave of activations.

    Raises a ValueError as `check_takes_pairs`.
    """
    check_takes_pairs(sae)
    code, error = _code(sae, x, refinement_steps)
    directions = feature_directions(sae).detach().float().cpu()
    apart = composites(directions, torch.from_numpy(code.sum(0) > 0))
    return Search(
        pairs=found_pairs(*apart.apart(code, error), n, rounds),
        composites=apart,
        error_energy=float((error.astype(np.float64) ** 2).sum()),
        variance=float((x - x.mean(0)).double().square().sum()),
    )


def _activations(cfg: PairsConfig, sae: SAE[Any]) -> Tensor:
    """Activations of the training text, [tokens, d_in]."""
    cache = None if cfg.activations is None else ActivationCache(cfg.activations)
    samples = cfg.activations if cfg.activations is not None and is_samples(cfg.activations) else None
    model, site = model_of(sae, cfg.device, model_name=cfg.model or samples)  # a folder of samples may have been moved
    context_size = cfg.context_size or (cache.identity.context_size if cache else sae.cfg.metadata.context_size) or 256
    check_context(model, context_size)
    if cache is not None:
        cache.check(model, [site.hook_name], context_size)
    if cache is not None:
        dataset = cache.dataset()
    elif cfg.dataset is not None:
        dataset = open_dataset(cfg.dataset, split="train")
    else:
        dataset = own_text(cfg.model or sae.cfg.metadata.model_name, "train")
    rows = held_out_rows(model, dataset, context_size, cfg.tokens)
    return read_activations(model, sae, rows.tokens, cache=cache)[0]


def _code(sae: SAE[Any], x: Tensor, refinement_steps: int) -> tuple[sparse.csr_array, NDArray[np.float32]]:
    """The code, and what its features leave of the activations without an interaction path."""
    sae = deepcopy(sae)
    if hasattr(sae.cfg, "refinement_steps"):
        sae.cfg.refinement_steps = refinement_steps
    directions, nothing = feature_directions(sae), torch.zeros(1, sae.cfg.d_sae, device=sae.device)
    bias, codes, errors = sae.decode(nothing), list[sparse.csr_array](), list[Tensor]()
    for part in x.split(TOKENS_AT_ONCE):
        own = sae.encode(part)
        own = own.to_dense() if own.is_sparse else own
        codes.append(sparse.csr_array(own.float().cpu().numpy()))
        errors.append((part - bias - own @ directions).float().cpu())
    return sparse.csr_array(sparse.vstack(codes)), torch.cat(errors).numpy()
