"""A splice with a secondary SAE in place of the hidden code."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from typing_extensions import override

from sae_nfm.architectures import NFMPaths, Secondary, check_secondary, place_secondary, through
from sae_nfm.interventions.intervene import Splice, Trace
from sae_nfm.models import LanguageModel


@dataclass(frozen=True, kw_only=True)
class SecondarySplice(Splice):
    """An SAE in place of its hook point, a secondary SAE in place of its hidden code.

    Raises:
        ValueError: as `Splice` and `attach_secondary`.
    """

    secondary: SAE[Any]
    """The secondary SAE."""
    error_term: bool = False
    """Whether what the secondary SAE does not reconstruct is added."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_secondary(self.sae, self.secondary)

    @property
    @override
    def identity(self) -> str:
        with self._attached():
            return super().identity

    @override
    @contextmanager
    def on(self, model: LanguageModel, generator: torch.Generator | None = None) -> Generator[Trace]:
        with self._attached(), super().on(model, generator) as trace:
            yield trace

    @override
    def reconstruct(self, x: Float[Tensor, "rows pos d"]) -> Float[Tensor, "rows pos d"]:
        with self._attached():
            return super().reconstruct(x)

    def _attached(self) -> AbstractContextManager[Any]:
        assert isinstance(
            self.sae, NFMPaths
        )  # `check_secondary`, whose digest takes seconds for a large SAE, is done once
        return place_secondary(self.sae, Secondary(sae=self.secondary, error_term=self.error_term, through=through))
