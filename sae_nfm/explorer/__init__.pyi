from .assemble import ExplorerSizes as ExplorerSizes
from .results import FILENAME as FILENAME
from .results import Explorer as Explorer
from .run import explore as explore
