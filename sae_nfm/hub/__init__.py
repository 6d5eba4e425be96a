"""Releases, model cards, pushing to and pulling from the hub."""

from sae_nfm.hub.card import CardSAE, model_card
from sae_nfm.hub.directory import PACKAGED, register_packaged_releases
from sae_nfm.hub.release import PackageSource, Release, release_entry, write_releases
from sae_nfm.hub.run_folder import REPORT_FILENAME, RESULTS_FILENAME

__all__ = [
    "PACKAGED",
    "REPORT_FILENAME",
    "RESULTS_FILENAME",
    "CardSAE",
    "PackageSource",
    "Release",
    "model_card",
    "register_packaged_releases",
    "release_entry",
    "write_releases",
]
