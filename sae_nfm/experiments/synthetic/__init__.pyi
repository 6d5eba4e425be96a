from .measure import recovery as recovery
from .results import PairScore as PairScore
from .results import RecoveryResult as RecoveryResult
from .results import RecoveryRow as RecoveryRow
