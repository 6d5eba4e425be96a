"""Pairs of features that an SAE's code leaves over, and a joint_nfm that begins with them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
