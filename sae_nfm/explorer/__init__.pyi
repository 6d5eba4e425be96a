from .assemble import ExplorerSizes as ExplorerSizes
from .data import Explorer as Explorer
from .file import FILENAME as FILENAME
from .run import explore as explore
