"""What depends on the device: a training step as a GPU makes it, on tensors without numbers (which kernels it launches, and that
it never waits); the choice of a form by the rates of a device, and how these are measured.
"""

from functools import partial

import pytest
import torch
from builders import random_sae, training_config
from step_forms import for_every_architecture, step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_nfm.architectures import joint_training
from sae_nfm.kernels import device, dispatch
from sae_nfm.kernels.device import CPU


def device_types(arguments) -> set[str]:
    """Of all tensors but single numbers, which torch takes from anywhere."""
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return {tensor.device.type for tensor in tensors if tensor.ndim > 0}


class OneDevice(TorchDispatchMode):
    """Raises where an operation gets tensors of two devices; some of torch's copy silently then."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert len(device_types((args, kwargs))) <= 1, operation
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that would run, where "meta" is a device with Triton."""
    pytest.importorskip("triton", reason="Triton has no package for this platform")
    from sae_nfm.kernels import triton_sums

    names: list[str] = []

    def launch(kernel, *args):
        assert device_types(args) == {"meta"}, kernel
        names.append(kernel.__name__)

    monkeypatch.setattr(device, "TRITON_DEVICES", ("meta",))
    for name in ("launch", "_launch_blocks"):
        monkeypatch.setattr(triton_sums, name, launch)
    monkeypatch.setattr(triton_sums, "transpose", partial(launch, triton_sums._transpose))
    monkeypatch.setattr(joint_training, "sees_numbers", lambda *tensors: True)
    return names


@for_every_architecture
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("nfm_top_k", [None, 8])
def test_a_step_stays_on_its_device_and_waits_for_nothing(launched, architecture, rescale, nfm_top_k):
    """A number read back or a shape that depends on numbers, on a GPU a wait, is an error on "meta"."""
    settings = {"d_sae": 2048, "k": 16, "nfm_top_k": nfm_top_k, "rescale_acts_by_decoder_norm": rescale}
    sae = random_sae(training_config(architecture, **settings, kernel="sparse")).to("meta")
    with OneDevice():
        step(sae, torch.empty(24, 16, device="meta")).loss.backward()
    assert {parameter.grad.device.type for parameter in sae.parameters()} == {"meta"}
    assert {"_sum_by_token", "_sum_by_feature", "_dots", "_pool", "_grad_values", "_grad_V"} <= set(launched)
    assert {"_block_maxima", "_block_scores", "_transpose"} <= set(launched)
    # each weight's gradient, the decoders' together where they read the same; b_enc's, and that of the norms from both uses
    sums = 3 + (nfm_top_k is not None) + 1 + 2 * rescale
    assert launched.count("_sum_by_feature") == sums


def test_the_choice_follows_the_rates():
    flops, gathered = CPU
    crossing = round(1_000_000 * gathered / (2 * flops))
    assert dispatch.choose(1_000_000, crossing - 1, "cpu") == "sparse"
    assert dispatch.choose(1_000_000, crossing + 1, "cpu") == "dense"


@pytest.mark.parametrize(
    ("d_sae", "k", "on", "dtype", "expected"),
    [
        (8192, 32, "cpu", torch.float32, "sparse"),
        (50_000, 1024, "cpu", torch.float32, "sparse"),
        (50_000, 25_000, "cpu", torch.float32, "dense"),
        (50_000, 32, "mps", torch.float32, "dense"),
        # a GPU by its data sheet, as none is there
        (24_576, 32, "cuda", torch.float32, "sparse"),
        (50_000, 32, "cuda", torch.bfloat16, "sparse"),
        (50_000, 1024, "cuda", torch.bfloat16, "dense"),
        (50_000, 512, "cuda", torch.float32, "sparse"),
    ],
)
def test_the_choice_at_known_sizes(monkeypatch, d_sae, k, on, dtype, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.choose(d_sae, k, on, dtype) == expected


def test_rates_are_work_over_time(monkeypatch):
    """1 s for the product 2 * 8 * 4 * 16 FLOP, 2 s for 8 tokens' 3 rows of 4 float32."""
    for name, size in {"TOKENS": 8, "ACTIVE": 3, "FEATURES": 16, "WIDTH": 4}.items():
        monkeypatch.setattr(device, name, size)
    seconds = iter([1.0, 2.0])

    def timed(work, device):
        work()
        return next(seconds)

    monkeypatch.setattr(device, "_seconds", timed)
    before = torch.get_rng_state()
    assert device.measure_rates(torch.device("cpu"), torch.bfloat16) == (1024, 192)
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_of_float32_are_measured_in_float32_under_autocast(monkeypatch):
    for name, size in {"TOKENS": 8, "ACTIVE": 3, "FEATURES": 16, "WIDTH": 4}.items():
        monkeypatch.setattr(device, name, size)
    made = []

    def timed(work, device):
        made.append(work().dtype)
        return 1.0

    monkeypatch.setattr(device, "_seconds", timed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        device.measure_rates(torch.device("cpu"), torch.float32)
    assert made == [torch.float32, torch.float32]


def test_the_median_time_leaves_the_first_call_out(monkeypatch):
    monkeypatch.setattr(device, "LAUNCHES", 1)
    ticks = iter([0.0, 100.0, *(value for second in (1.0, 5.0, 3.0, 2.0, 4.0) for value in (0.0, second))])
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(ticks))
    assert device._seconds(lambda: torch.zeros(()), torch.device("cpu")) == 3.0
