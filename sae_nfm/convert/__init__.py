"""Checkpoints of other packages as SAELens folders."""

from sae_nfm.convert.adapter import load_adapter, save_adapter, write_adapter
from sae_nfm.convert.files import damage_explained, read_json
from sae_nfm.convert.saelens import fold_normalisation
from sae_nfm.convert.warm_start import topk_by_name, warm_started

__all__ = [
    "damage_explained",
    "fold_normalisation",
    "load_adapter",
    "read_json",
    "save_adapter",
    "topk_by_name",
    "warm_started",
    "write_adapter",
]
