"""What a comparison is about to do, and about how long it will take: said before it starts.

A forward pass of the language model and one training step of every arm are timed, and multiplied by what is left to do.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_nfm.architectures import random_initialisation, refined
from sae_nfm.models import synchronize
from sae_nfm.training import TrainingArm

ROWS_TIMED = 4
"""Rows of tokens in the forward pass that is timed."""
BESIDE_THE_ARMS = 2
"""Forward passes of an evaluation beside those of the SAEs: the model as it is, and the mean of its activations."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What things cost on this machine."""

    read_seconds: float
    """Activations of one training token: of the language model up to the hook point, or of a cache."""
    forward_seconds: float
    """The whole language model, for one token."""
    step_seconds: Mapping[str, float]
    """One training step, by arm."""
    refine_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Encoding and decoding of one token with refinements, by arm."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """SAEs that are trained together on one stream of activations, and then evaluated."""

    what: str
    arms: tuple[str, ...]
    """Those that are not yet finished."""
    tokens: int
    """Activations that each is trained on."""
    held_out_tokens: int
    done: Mapping[str, int] = field(default_factory=dict[str, int])
    """Of these, by arm, where an interruption left a checkpoint; arms of one number go on together."""
    refined: bool = False
    """Whether each is evaluated once more, with refinements."""

    def seconds(self, costs: Costs, batch_size: int) -> float:
        """Expected."""
        if not self.arms:
            return 0.0
        left = {name: max(0, self.tokens - self.done.get(name, 0)) for name in self.arms}
        training = sum(set(left.values())) * costs.read_seconds
        training += sum(max(1, tokens // batch_size) * costs.step_seconds[name] for name, tokens in left.items())
        passes = len(self.arms) * (1 + self.refined) + BESIDE_THE_ARMS
        refining = sum(costs.refine_seconds[name] for name in self.arms) if self.refined else 0.0
        return training + self.held_out_tokens * (costs.forward_seconds * passes + refining)


def measured_costs(
    arms: Mapping[str, TrainingArm],
    tokens: Int[Tensor, "rows pos"],
    *,
    read: Callable[[], Float[Tensor, "rows pos *site"]],
    forward: Callable[[Int[Tensor, "rows pos"]], object],
    batch_size: int,
    device: str,
    refinement_steps: int = 0,
) -> Costs:
    """Time each once, after once that does not count; the caller's random state is left as it was.

    Args:
        tokens: some rows of the text, for the whole language model.
        read: activations of as many rows, as training reads them.
        forward: the whole language model.
    """
    with temporary_seed(0):
        with torch.no_grad():
            x = read().flatten(0, 1).flatten(1).to(device, torch.float32)
            read_seconds = _seconds(read, device) / len(x)
            forward_seconds = _seconds(partial(forward, tokens), device) / tokens.numel()
        batch = x[torch.arange(batch_size, device=x.device) % len(x)]
        return Costs(
            read_seconds=read_seconds,
            forward_seconds=forward_seconds,
            step_seconds={name: _step_seconds(arm, batch, device) for name, arm in arms.items()},
            refine_seconds={name: _refine_seconds(arm, x, refinement_steps) for name, arm in arms.items()}
            if refinement_steps
            else {},
        )


@torch.no_grad()
def _refine_seconds(arm: TrainingArm, x: Float[Tensor, "tokens d_in"], steps: int) -> float:
    cfg = replace(arm.sae, normalize_activations="none")  # what its weights would have folded in
    sae = refined(random_initialisation(cfg, 0), steps)
    sae.turn_off_forward_pass_hook_z_reshaping()
    return _seconds(lambda: sae.decode(sae.encode(x)), str(x.device)) / len(x)


def _step_seconds(arm: TrainingArm, batch: Float[Tensor, "tokens d_in"], device: str) -> float:
    settings = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**9,
        device=device,
        autocast=False,
        lr=1e-4,
        lr_end=1e-4,
        train_batch_size_samples=len(batch),
    )
    trainer = SAETrainer(settings, random_initialisation(arm.sae, 0), iter(()))
    return _seconds(partial(trainer.step, batch), device)


def _seconds(job: Callable[[], object], device: str) -> float:
    """Of the second of two calls."""
    job()
    synchronize(device)
    begin = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - begin


def words(steps: Sequence[Step], costs: Costs, batch_size: int) -> str:
    """The plan as it is printed."""
    width = max(len(step.what) for step in steps)
    lines = [f"{'':{width}}  SAEs to train  tokens each  expected"]
    for step in steps:
        seconds = step.seconds(costs, batch_size)
        expected = duration(seconds) if step.arms else "finished"
        begun = Counter(step.done[name] for name in step.arms if name in step.done)
        told = "".join(f"; {n} from {tokens:,} on" for tokens, n in sorted(begun.items()))
        lines.append(f"{step.what:{width}}  {len(step.arms):13}  {step.tokens:11,}  {expected:>8}{told}")
    total = sum(step.seconds(costs, batch_size) for step in steps)
    lines.append(
        f"About {duration(total)} on this machine if it does nothing else. The SAEs of a line train side by side on one "
        "stream of activations. It can be interrupted at any time: the same command goes on."
    )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
