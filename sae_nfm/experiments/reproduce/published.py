"""Published figures as numbers, from the text in which a table gives them.

Source: arXiv 2507.00269; W. Gurnee 2024, "SAE reconstruction errors are (empirically) pathological".
"""

import re
from dataclasses import dataclass

_PERCENT = r"([+-]?\d+(?:\.\d+)?) %"
_FIRST = re.compile(rf"{_PERCENT}(?: to {_PERCENT})?")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure: one number, or a range whose ends are apart."""

    low: float
    """The number, or the lower end."""
    high: float
    """The same number, or the upper end."""


PAPER_RATIO = Published(low=2.99, high=2.99)
"""KL of an SAE over that of an isotropic vector of equal distance, arXiv 2507.00269."""
GURNEE_RATIOS = Published(low=2.0, high=4.5)
"""The same, Gurnee 2024."""


def published_share(text: str) -> Published | None:
    """The percentage that a text begins with, or the range, as fractions; what follows explains it.

    "-51.6 % to -51.9 %" is -0.519 to -0.516; "-41.3 % (0.275 to 0.161)" is -0.413; "SAE 0.4" is no percentage: None.
    """
    found = _FIRST.match(text)
    if found is None:
        return None
    ends = [float(end) / 100 for end in found.groups() if end is not None]
    return Published(low=min(ends), high=max(ends))
