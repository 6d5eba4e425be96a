"""A training step as a GPU makes it, on tensors without numbers: which kernels it launches, on what, and that it never waits."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from builders import random_sae, training_config
from step_forms import for_every_architecture, step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae_nfm.kernels import devices


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
    from sae_nfm.kernels import triton_pairs, triton_sums  # both before either is changed: `launch` has a name in each

    names: list[str] = []

    def launch(kernel, *args):
        assert device_types(args) == {"meta"}, kernel
        names.append(kernel.__name__)

    monkeypatch.setattr(devices, "TRITON_DEVICES", ("meta",))
    for module, name in ((triton_sums, "launch"), (triton_sums, "_launch_blocks"), (triton_pairs, "launch")):
        monkeypatch.setattr(module, name, launch)
    monkeypatch.setattr(triton_sums, "transpose", partial(launch, triton_sums._transpose))
    # torch has no autocast for "meta"
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, **kwargs: nullcontext())
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
