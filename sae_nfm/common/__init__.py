"""Files written whole, saved results, provenance, options, checks, tables; free of torch and SAELens."""

from sae_nfm.common.checks import check_choice, check_positive
from sae_nfm.common.files import (
    check_output,
    discard_unstarted,
    partial_folder,
    publish,
    whole,
    write_json,
    written_whole,
)
from sae_nfm.common.hub_errors import LOG_IN, explained
from sae_nfm.common.provenance import provenance
from sae_nfm.common.tables import aligned, listed

__all__ = [
    "LOG_IN",
    "aligned",
    "check_choice",
    "check_output",
    "check_positive",
    "discard_unstarted",
    "explained",
    "listed",
    "partial_folder",
    "provenance",
    "publish",
    "whole",
    "write_json",
    "written_whole",
]
