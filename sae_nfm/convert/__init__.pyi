from .adapter import load_adapter as load_adapter
from .adapter import save_adapter as save_adapter
from .adapter import write_adapter as write_adapter
from .files import damage_explained as damage_explained
from .files import read_json as read_json
from .warm_start import fold_normalisation as fold_normalisation
from .warm_start import topk_by_name as topk_by_name
from .warm_start import warm_started as warm_started
