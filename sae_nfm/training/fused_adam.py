"""SAELens's Adam in torch's fused form, where an architecture of this package is trained with `kernel` "auto" or "sparse".

The trainer of SAELens makes torch's Adam as it is by default: on CPU a dozen passes over each weight and its moments, with
temporaries of its size. Fused, it is one pass. The update is the same up to rounding. `kernel="dense"` leaves the optimizer as
SAELens makes it.
"""

from collections.abc import Callable
from typing import Any

import torch
from sae_lens import SAETrainer

FUSED_ON = ("cpu", "cuda")
"""Devices whose torch has the fused form."""


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let an Adam that has made no step yet work in the fused form; one that was given a form keeps it."""
    for group in optimizer.param_groups:
        on_device = all(weight.device.type in FUSED_ON for weight in group["params"])
        if on_device and group["fused"] is None and group["foreach"] is None:
            group["fused"] = True


def layer_trainer(layer: Callable[[type, str, Callable[[Any], Any]], None], architectures: frozenset[str]) -> None:
    """Fuse the Adam of SAELens's trainer where it trains one of `architectures`; `layer(class, method, make)` installs."""

    def initialise(original: Any) -> Any:
        def init_with_fused_adam(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            cfg = self.sae.cfg
            if cfg.architecture() in architectures and cfg.kernel != "dense":
                fuse(self.optimizer)

        return init_with_fused_adam

    layer(SAETrainer, "__init__", initialise)
