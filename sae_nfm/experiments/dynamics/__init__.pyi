from .transitions import LEVELS as LEVELS
