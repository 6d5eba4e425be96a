"""`sequential_nfm` in training: the NFM learns the residual of a base that stays as it is.

Nothing of the base takes part in the backward pass, and the optimizer keeps no state for it. Its inputs are raw, so the NFM
finds the scale s of activations in its first step and works in its units, `s * nfm(f / s)`: learning rates then mean what they
mean for SAEs on normalised activations. Saving for inference folds s in.
"""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import SAEMetadata, TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_nfm.architectures.nfm_paths import TrainedPaths
from sae_nfm.architectures.sequential_config import (
    ARCHITECTURE,
    SequentialNFMTrainingSAEConfig,
    as_base,
    base_config,
    check_base,
    load_base,
)
from sae_nfm.architectures.sequential_sae import SequentialNFM, fold_scale
from sae_nfm.kernels import reference
from sae_nfm.loading import refuse_not_finite, sha256_of, write_note


class SequentialNFMTrainingSAE(TrainedPaths, SequentialNFM, TrainingSAE[SequentialNFMTrainingSAEConfig]):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Sequential NFM-SAE in training, on the squared error of the sum of all paths."""

    cfg: SequentialNFMTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    nfm_scale: Tensor
    """The scale s of activations, E|x| / sqrt(d_in); 0 before the first step, which finds it."""
    _folded = False
    """Whether the weights were loaded with s folded in."""

    @classmethod
    def wrap(
        cls, base: SAE[Any], *, norm_scaling_factor: float | None = None, **fields: Any
    ) -> "SequentialNFMTrainingSAE":
        """An NFM to be trained on an SAE that is at hand: `SAETrainingRunner(cfg, override_sae=...)`, with `cfg.sae = sae.cfg`.

        Args:
            base: for inference or in training; it is copied.
            norm_scaling_factor: what its inputs were multiplied with in training, where that is not folded into it.
            fields: those of `SequentialNFMTrainingSAEConfig`, such as nfm_dim.

        Raises a ValueError for an SAE that cannot be a base.
        """
        prepared = as_base(base, norm_scaling_factor)
        same = ("d_in", "d_sae", "dtype", "device", "reshape_activations")
        own: dict[str, Any] = {name: getattr(base.cfg, name) for name in same}
        own["metadata"] = SAEMetadata(**(base.cfg.metadata.to_dict() | {"training_architecture": ARCHITECTURE}))
        tensors = prepared.state_dict()
        described: dict[str, Any] = {"base_config": base_config(prepared), "base_sha256": sha256_of(tensors)}
        sae = cls(SequentialNFMTrainingSAEConfig(**(own | fields | described)))
        sae.base.load_state_dict(tensors)
        return sae

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("nfm_scale", torch.zeros((), dtype=self.dtype, device=self.device))
        self.base.requires_grad_(self.cfg.train_base)

    @override
    def _make_base(self) -> SAE[Any]:
        cfg = self.cfg
        if not cfg.base or self.device.type == "meta":  # its weights come with the NFM's
            return super()._make_base()
        base = load_base(cfg.base, cfg.base_norm_scaling_factor, cfg.dtype, str(self.device))
        check_base(base.state_dict(), cfg.base_sha256, cfg.base)
        return base

    def unfreeze(self, *, l1_coefficient: float | None = None) -> None:
        """Train the base too from now on: a joint fine-tune, with the optimizer that the next training makes.

        `l1_coefficient` weights the L1 norm of the features; a ValueError where a standard, gated or jumprelu base lacks it.
        """
        given = self.cfg.l1_coefficient
        self.cfg.l1_coefficient = given if l1_coefficient is None else l1_coefficient
        self.cfg.check_sparsity()
        self.cfg.train_base = True
        self.base.requires_grad_(True)

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": self.cfg.l1_coefficient or 0.0} if self.cfg.train_base else {}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The base's features, twice: nothing reads pre-activations."""
        acts = SequentialNFM.encode(self, x)
        return acts, acts

    @override
    def encode(self, x: Tensor) -> Tensor:
        return self.encode_with_hidden_pre(x)[0]

    @override
    def _read(self, acts: reference.Acts) -> reference.Acts:
        return reference.with_values(acts, lambda f: f / self._scale())

    @override
    def _written(self, path: Tensor) -> Tensor:
        return path * self._scale()

    def _scale(self) -> Tensor:
        return torch.where(self.nfm_scale > 0, self.nfm_scale, 1.0)

    @torch.no_grad()
    def _find_scale(self, sae_in: Tensor) -> None:
        """Set s; weights that were loaded with an s folded in go to the new units, the same function."""
        scale = sae_in.norm(dim=-1).mean().to(self.nfm_scale) / self.cfg.d_in**0.5
        self.nfm_scale.copy_(scale)
        if self._folded:
            weights = {name: getattr(self, name) for name in ("V", "U", "b_lin", "W_2", "b_2") if hasattr(self, name)}
            unfolded: dict[str, Any] = dict(weights) | {"nfm_scale": 1 / scale}
            fold_scale(unfolded)
            for name, weight in weights.items():
                weight.copy_(unfolded[name])
            self._folded = False

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self.nfm_scale > 0:
            if not self.cfg.base:  # it may never have been loaded
                self._check_base({f"base.{name}": tensor for name, tensor in self.base.state_dict().items()})
            self._find_scale(step_input.sae_in)
        with self._training_step():
            output = super().training_forward_pass(step_input)
            paths = self._taken_paths()
        self._add_metrics(output, step_input, paths)
        return output

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        coefficient = step_input.coefficients.get("l1", 0.0)
        if not coefficient:
            return {}
        return {"l1_loss": coefficient * (feature_acts.abs() * self.W_dec.norm(dim=-1)).sum(dim=-1).mean()}

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        self._folded = "nfm_scale" not in state_dict
        if self._folded:
            state_dict["nfm_scale"] = torch.zeros((), dtype=self.dtype)
        super().process_state_dict_for_loading(state_dict)

    @override
    def _check_base(self, state_dict: dict[str, Any]) -> None:
        if not self.cfg.train_base:
            super()._check_base(state_dict)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        fold_scale(state_dict)
        super().process_state_dict_for_saving_inference(state_dict)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save the inference SAE as SAELens does, self-contained, with a README.md that says what loads it."""
        refuse_not_finite(self.state_dict(), "the SAE to save")
        self._describe_base()
        saved = super().save_inference_model(path)
        write_note(path)
        return saved
