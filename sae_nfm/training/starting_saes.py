"""Other SAEs that `sae-nfm train` trains from or on: a warm start, a primary, and the base of a sequential NFM."""

from dataclasses import dataclass, fields
from typing import Any

from sae_lens import SAE, HookedSAETransformer, LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.saes.sae import SAEMetadata

from sae_nfm.architectures import (
    HIDDEN,
    PRIMARY_DIGEST,
    NFMTrainingFields,
    SequentialNFMTrainingSAEConfig,
    check_primary,
    primary_digest,
)
from sae_nfm.architectures.joint_config import ARCHITECTURE
from sae_nfm.convert import topk_by_name, warm_started
from sae_nfm.loading import load_sae
from sae_nfm.models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class OtherSAEs:
    """SAEs that the new one is trained from or on; the base of a sequential_nfm is named by --base."""

    warm_start: str | None = None
    """A TopK SAE (folder, or release:sae_id) whose encoder and decoder a joint_nfm begins with; the features (d_sae, k, ...)
    and, unless given, the hook point are its own."""
    primary: str | None = None
    """A joint_nfm or sequential_nfm (folder, or release:sae_id) that is spliced in, so that an SAE can be trained on one of its
    hook points: a secondary SAE, on its hidden code unless --hook_name names another, such as
    blocks.2.hook_resid_post.hook_nfm_linear."""
    adapter: bool = False
    """Save a sequential_nfm without its base, which is then looked for under the name given by --base."""

    def __post_init__(self) -> None:
        if self.warm_start is not None and self.primary is not None:
            raise ValueError(
                "--warm_start and --primary were both given; a secondary SAE has no warm start, leave one out"
            )

    def check(self, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
        """Raise a ValueError for options that the architecture cannot have."""
        architecture = cfg.sae.architecture()
        if self.warm_start is not None and architecture != ARCHITECTURE:
            raise ValueError(f"--warm_start is for --architecture {ARCHITECTURE}, this is {architecture}; leave it out")
        sequential = isinstance(cfg.sae, SequentialNFMTrainingSAEConfig)
        if self.adapter and not (sequential and cfg.sae.base):
            raise ValueError(f"--adapter is for a sequential_nfm with a --base, this is {architecture}; leave it out")
        if sequential and not cfg.sae.base:
            raise ValueError(
                "a sequential_nfm needs a base; name it with --base (a saved SAE's folder, or release:sae_id)"
            )


@dataclass(frozen=True, kw_only=True)
class LoadedSAEs:
    """The other SAEs of a run, loaded."""

    warm_start: SAE[Any] | None
    """What a joint_nfm begins as."""
    primary: SAE[Any] | None
    """What a secondary SAE is trained on."""

    def hook_name(self, cfg: LanguageModelSAERunnerConfig[Any]) -> str | None:
        """The hook point they imply."""
        if self.primary is not None:
            return f"{self.primary.cfg.metadata.hook_name}.{HIDDEN}"
        metadata = cfg.sae.metadata if self.warm_start is None else self.warm_start.cfg.metadata
        return metadata.hook_name

    def splice_in(self, model: LanguageModel | None) -> None:
        """Attach the primary to the model for good."""
        if self.primary is None:
            return
        if not isinstance(model, HookedSAETransformer):
            raise ValueError("--primary needs --model_class_name HookedTransformer, into which the primary is spliced")
        model.add_sae(self.primary)
        if self.primary.cfg.metadata.hook_name not in model.acts_to_saes:  # SAELens only logs a warning
            raise ValueError(
                f"the model has no hook point {self.primary.cfg.metadata.hook_name!r}, where the primary was trained; give its "
                "model with --model"
            )

    def starting_sae(self, cfg: LanguageModelSAERunnerConfig[Any], given: frozenset[str]) -> TrainingSAE[Any] | None:
        """The SAE that the runner is to begin with; None for a new one. `cfg.sae` becomes its config.

        Raises:
            ValueError: for options that contradict the SAE to start from.
        """
        if self.warm_start is None:
            return None
        own = {field.name for field in fields(NFMTrainingFields)}
        wanted = {f.name: getattr(cfg.sae, f.name) for f in fields(cfg.sae) if f.name in own | given | {"d_in"}}
        sae = warm_started(self.warm_start, seed=cfg.seed, **wanted)
        cfg.sae = sae.cfg
        return sae

    def sign(self, metadata: SAEMetadata) -> None:
        """Write down which primary a secondary SAE is of."""
        if self.primary is not None:
            setattr(metadata, PRIMARY_DIGEST, primary_digest(self.primary))


def load_others(named: OtherSAEs, cfg: LanguageModelSAERunnerConfig[Any]) -> LoadedSAEs:
    """Load the SAEs that were named.

    Raises:
        ValueError, FileNotFoundError: when one is missing, or does not suit the architecture.
    """
    named.check(cfg)
    primary = None if named.primary is None else load_sae(named.primary, device=str(cfg.device))
    if primary is not None:
        check_primary(primary)
    start = None if named.warm_start is None else topk_by_name(named.warm_start)
    return LoadedSAEs(warm_start=start, primary=primary)
