from .run import ReproduceConfig as ReproduceConfig
from .run import run_reproduce as run_reproduce
