"""Files written whole, saved results, what is said of hub errors."""

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

__all__ = [
    "LOG_IN",
    "check_output",
    "discard_unstarted",
    "explained",
    "partial_folder",
    "publish",
    "whole",
    "write_json",
    "written_whole",
]
