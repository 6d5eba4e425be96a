"""One torch thread a process, caches of its own, Triton kernels on CPU tensors, and what is trained once for the whole run."""

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock
from packaging.version import Version

# read when torch, datasets and huggingface_hub are imported: the tests' processes share the cores, threads that wait leave them
# to others, and no home directory is written to or has what an earlier run left
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sae-nfm-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before the first import of Triton

MOST_PROCESSES = 4
"""Each holds torch, SAELens and a few small models: 1 to 1.5 GB."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A process for each core that this one may use, within reason (`-n auto`)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_PROCESSES, usable)


@pytest.fixture(scope="session")
def once(request, tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`once(name, make)`: a folder that `make` fills, made by the first process that asks and read by all."""
    base = tmp_path_factory.getbasetemp()
    shared = (
        base.parent if hasattr(request.config, "workerinput") else base
    )  # a process of pytest-xdist's has a folder in it

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                unfinished = shared / f"{name}.unfinished"
                make(unfinished)
                unfinished.rename(shared / name)
        return shared / name

    return folder


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """What `device.uses_triton` decides goes to the kernels, as it would on a GPU."""

    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has no package for this platform")
    if Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of Triton before 3.7 fails with numpy from 2.4: arrays of one number as int()")
    from sae_nfm.kernels import device

    monkeypatch.setattr(device, "TRITON_DEVICES", ("cpu",))
