"""Effects of features and pairs on a target, by token, prompt and corpus."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
