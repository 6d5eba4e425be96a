from .results import PairRow as PairRow
from .results import PairsResult as PairsResult
from .run import PairsConfig as PairsConfig
from .run import Search as Search
from .run import run_pairs as run_pairs
from .run import search as search
