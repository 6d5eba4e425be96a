from .published import GURNEE_RATIOS as GURNEE_RATIOS
from .published import PAPER_RATIO as PAPER_RATIO
from .published import Published as Published
from .published import published_share as published_share
from .rows import NOT_MEASURED as NOT_MEASURED
from .rows import SINGLE as SINGLE
from .rows import ReproducedRow as ReproducedRow
