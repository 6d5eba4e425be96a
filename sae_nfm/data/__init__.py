"""From a text file, parquet, Arrow or hub data set to rows of tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
