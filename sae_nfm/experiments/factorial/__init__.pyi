from .results import PRIMARY_SCALE as PRIMARY_SCALE
from .run import FactorialConfig as FactorialConfig
from .run import factorial as factorial
from .stimuli import FEWEST_SENTENCES as FEWEST_SENTENCES
from .stimuli import load_stimuli as load_stimuli
