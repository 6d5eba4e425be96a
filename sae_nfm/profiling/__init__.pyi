from .requirements import dry_run as dry_run
from .requirements import load_experiment as load_experiment
from .results import TOPK as TOPK
from .run import SpeedConfig as SpeedConfig
from .run import measure_speed as measure_speed
