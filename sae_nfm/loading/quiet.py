"""SAELens without its warnings about uses that are intended."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager

EXPECTED_WARNINGS = (
    "The training dataset contains fewer samples",  # rows are counted as if each were one token
    "Dataset is not tokenized",
    "pretokenized dataset has context_size",
    "To copy construct from a tensor",
)


@contextmanager
def quiet_saelens() -> Generator[None]:
    """Hide what SAELens's activation store says about data sets that are used as intended."""
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=rf"\s*{message}")
        yield
