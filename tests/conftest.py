"""Triton kernels on CPU tensors, by Triton's interpreter."""

import importlib.util
import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before the first import of Triton


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """What `devices.uses_triton` decides goes to the kernels, as it would on a GPU."""
    from sae_nfm import devices

    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has no package for this platform")
    monkeypatch.setattr(devices, "TRITON_DEVICES", ("cpu",))
