"""Tensors and SAEs by a short text that differs where they differ."""

import json
from collections.abc import Mapping
from typing import Any

from sae_lens import SAE
from torch import Tensor

from sae_nfm.loading.strict import sha256_of


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The first 16 digits of `loading.sha256_of` named tensors."""
    return sha256_of(tensors)[:16]


def describe(sae: SAE[Any], where: str = "") -> str:
    """An SAE by its weights and what its config says of how they are used."""
    config = {name: value for name, value in sae.cfg.to_dict().items() if name not in ("metadata", "device")}
    return f"SAE {digest(sae.state_dict())}{where}, config {json.dumps(config, sort_keys=True)}"
