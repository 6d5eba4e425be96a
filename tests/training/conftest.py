"""Fixtures of the tests of `sae-nfm train`."""

from small_training import shared

__all__ = ["shared"]
