"""The embedded model: a small language model and tokens sampled from it, both inside the package.

Everything that needs a language model can be tried offline on it: `load_model` and `load_tokens` read files
that are installed with the package. How they were made stands in `data/README.md`; each step can be run:

    python docs/embedded_model/train_lm.py    text file        -> Hugging Face folder
    python docs/embedded_model/convert_lm.py     that folder      -> data/model, half precision
    python docs/embedded_model/sample.py      data/model       -> data/train.parquet, data/validation.parquet
    python docs/embedded_model/verbatim.py    tokens, corpus   -> longest passage that they share

Importing this package is cheap: torch and SAELens are imported when a loader is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_nfm.demo.model import load_model
    from sae_nfm.demo.tokens import load_tokens

__all__ = ["MODEL_NAME", "load_model", "load_tokens"]

MODEL_NAME = "sae-nfm-demo"
"""`model.cfg.model_name` of the embedded model, and `model_name` in the configs of SAEs trained on it."""

_LOADERS = {"load_model": "sae_nfm.demo.model", "load_tokens": "sae_nfm.demo.tokens"}


def __getattr__(name: str) -> Any:
    if name in _LOADERS:
        return getattr(import_module(_LOADERS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
