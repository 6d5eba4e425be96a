"""`joint_nfm`, `sequential_nfm` and secondary SAEs as SAELens configs and modules."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
