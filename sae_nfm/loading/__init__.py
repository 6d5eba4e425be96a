"""Weights, digests and SAEs by name: what every package needs of torch and SAELens."""

from sae_nfm.loading.saelens import load_sae, quiet_saelens
from sae_nfm.loading.strict import SAVE_AGAIN, check_folder, check_state_dict, describe, digest, sha256_of, write_note

__all__ = [
    "SAVE_AGAIN",
    "check_folder",
    "check_state_dict",
    "describe",
    "digest",
    "load_sae",
    "quiet_saelens",
    "sha256_of",
    "write_note",
]
