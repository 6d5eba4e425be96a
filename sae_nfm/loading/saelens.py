"""SAEs by the names that users give them: a folder, or release:sae_id."""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY

from sae_nfm.common import explained, read_json, reading
from sae_nfm.loading.strict import SAVE_AGAIN


def load_sae(sae: str, sae_id: str | None = None, device: str = "cpu", dtype: str | None = None) -> SAE[Any]:
    """A saved SAE by its folder, or a released one by release and id.

    `sae` is a folder, or release:sae_id, or a release with `sae_id` beside it. Unless a dtype is given, parameters have the
    folder's own, and float32 for a release.

    Raises a ValueError or FileNotFoundError when there is none.
    """
    folder = Path(sae)
    if sae_id is None and folder.is_dir():
        if not (folder / SAE_CFG_FILENAME).is_file():
            inside = sorted(str(path.parent) for path in folder.glob(f"*/**/{SAE_CFG_FILENAME}"))
            remedy = f"give one of {', '.join(inside[:4])}" if inside else "give the folder of a saved SAE"
            raise FileNotFoundError(f"{sae!r} has no {SAE_CFG_FILENAME}, so no SAE is saved there; {remedy}")
        with reading(folder, "a saved SAE that loads", remedy=SAVE_AGAIN):
            architecture = read_json(folder / SAE_CFG_FILENAME).get("architecture")
            if architecture not in (None, *SAE_CLASS_REGISTRY):
                known = ", ".join(SAE_CLASS_REGISTRY)
                raise ValueError(
                    f"its architecture is {architecture!r}; import the package that has it, known are {known}"
                )
            return SAE.load_from_disk(folder, device=device, dtype=dtype)
    release, name = (sae, sae_id) if sae_id is not None else sae.partition(":")[::2]
    if not name:
        raise FileNotFoundError(f"{sae!r} is no folder; give that of a saved SAE, or release:sae_id of a released one")
    with explained(f"the SAE {release}:{name}"):
        return SAE.from_pretrained(release, name, device=device, dtype=dtype or "float32")


EXPECTED_WARNINGS = (
    "The training dataset contains fewer samples",  # rows are counted as if each were one token
    "Dataset is not tokenized",
    "pretokenized dataset has context_size",
    "To copy construct from a tensor",
)


EXPECTED_MESSAGES = ("You just passed in a ", "override_")
"""Of runners that are given a model and a data set, which their config then does not describe: ours does."""


@contextmanager
def quiet_saelens() -> Generator[None]:
    """Hide what SAELens says about data sets and overrides that are used as intended."""

    def unexpected(entry: logging.LogRecord) -> bool:
        return not entry.getMessage().startswith(EXPECTED_MESSAGES)

    logger = logging.getLogger("sae_lens")
    logger.addFilter(unexpected)
    try:
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=rf"\s*{message}")
            yield
    finally:
        logger.removeFilter(unexpected)
