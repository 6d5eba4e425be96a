"""Estimates and tests on arrays and data frames; nothing here sees a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
