from .measure import secondary_rows as secondary_rows
from .training import TrainedSecondary as TrainedSecondary
from .training import activations_of as activations_of
from .training import default_k as default_k
from .training import secondary_config as secondary_config
