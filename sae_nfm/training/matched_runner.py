"""SAELens's runner for several SAEs, made fair: a learning rate for each, and random draws that do not depend on the others.

Batches are shuffled with torch's global random state, and dropout draws from it too: an SAE with dropout would change what all
SAEs see next. Here a training step draws from a state of its own, made of seed and step and the same for every SAE, so that
the stream's state is the same whoever trains.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from sae_lens import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig, SAETrainer, TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor
from typing_extensions import override

STEPS_PER_SEED = 2**32
"""More than any run has: the seeds of the steps of two runs do not meet."""


class MatchedRunner(MultiSAETrainingRunner):
    """SAELens's runner for several SAEs.

    Args:
        cfg: SAELens's configuration; its learning rate is nobody's.
        learning_rates: peak of Adam's learning rate, by name.
        decoder_rates: factor on each of Adam's steps of W_dec, by name.
        overrides: as for SAELens's runner.
    """

    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        learning_rates: Mapping[str, float],
        decoder_rates: Mapping[str, float],
        **overrides: Any,
    ) -> None:
        super().__init__(cfg, **overrides)
        self._learning_rates, self._decoder_rates = learning_rates, decoder_rates

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, TrainingSAE[Any]]:
        for name, one in trainer.trainers.items():
            if one.n_training_samples == 0:  # else the checkpoint has set the rates
                _set_learning_rate(one, self._learning_rates[name])
            multiply_decoder_steps(one, self._decoder_rates[name])
            _draw_apart(one, self.cfg.seed)
        return super()._run_with_interruption_handling(trainer)


def _set_learning_rate(trainer: SAETrainer[Any, Any], learning_rate: float) -> None:
    """Take optimizer and schedule from a trainer made with that rate; it decays as a share of it."""
    cfg = replace(trainer.cfg, lr=learning_rate, lr_end=learning_rate / 10)
    made = SAETrainer(cfg, trainer.sae, iter(()))
    trainer.cfg, trainer.optimizer, trainer.lr_scheduler = made.cfg, made.optimizer, made.lr_scheduler


def multiply_decoder_steps(trainer: SAETrainer[Any, Any], factor: float) -> None:
    """Make each of Adam's steps of W_dec longer: what a learning rate multiplied by `factor` would do to it alone."""
    if factor == 1:
        return
    W_dec: Tensor = trainer.sae.W_dec
    before = torch.empty_like(W_dec)

    def keep(*_: Any) -> None:
        before.copy_(W_dec.detach())

    def lengthen(*_: Any) -> None:
        W_dec.data.add_(W_dec.detach() - before, alpha=factor - 1)

    trainer.optimizer.register_step_pre_hook(keep)
    trainer.optimizer.register_step_post_hook(lengthen)


def _draw_apart(trainer: SAETrainer[Any, Any], seed: int) -> None:
    """Let a step draw from a state made of seed and step, and leave the state of the stream as it was."""
    step: Callable[[Tensor], Any] = trainer.step

    def step_apart(batch: Tensor) -> Any:
        with temporary_seed(seed * STEPS_PER_SEED + trainer.n_training_steps):
            return step(batch)

    trainer.step = step_apart  # pyright: ignore[reportAttributeAccessIssue]
