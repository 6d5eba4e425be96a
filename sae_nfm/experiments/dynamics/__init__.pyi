from .results import LEVELS as LEVELS
