"""Loading a language model, naming its hook points, splicing an SAE into it."""

from sae_nfm.models.compatibility import check_context, check_device, model_of, refuse_heads_of_a_bridge, site_at
from sae_nfm.models.load import OFFLINE, LanguageModel, Site, device_of, find_site, load_model
from sae_nfm.models.local_hf import config_fields, is_folder
from sae_nfm.models.splicing import (
    Attached,
    HookFunction,
    SpecialTokens,
    TokensRead,
    claimed,
    counted_tokens,
    is_special,
    keeping,
    reconstruction,
    special_token_ids,
    splice,
    tokens_read,
    writing,
)

__all__ = [
    "OFFLINE",
    "Attached",
    "HookFunction",
    "LanguageModel",
    "Site",
    "SpecialTokens",
    "TokensRead",
    "check_context",
    "check_device",
    "claimed",
    "config_fields",
    "counted_tokens",
    "device_of",
    "find_site",
    "is_folder",
    "is_special",
    "keeping",
    "load_model",
    "model_of",
    "reconstruction",
    "refuse_heads_of_a_bridge",
    "site_at",
    "special_token_ids",
    "splice",
    "tokens_read",
    "writing",
]
