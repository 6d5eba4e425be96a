"""KL, CE and FVU of a spliced SAE over held-out documents."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
