"""Ways to run an SAE in which what is computed may not depend on the numbers: its dense form, with the usual outcome."""

import copy

import pytest
import torch
from builders import ARCHITECTURES, D_MODEL, inference_sae, random_activations, random_sae, training_config
from sae_lens.saes.sae import TrainStepInput
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, said once a process

SPARSE = {"kernel": "sparse", "dtype": "float64"}


@pytest.fixture(
    params=[
        ("joint_nfm", None, True),
        ("joint_nfm", 3, False),
        ("sequential_nfm", None, False),
        ("sequential_nfm", 3, True),
    ],
    ids=["joint, in training", "joint, the strongest", "sequential", "sequential, in training, the strongest"],
)
def sae(request):
    """One whose kernel is "sparse", as "auto" makes it from 1,024 features on."""
    architecture, nfm_top_k, training = request.param
    made = random_sae if training else inference_sae
    found = made(training_config(architecture, nfm_top_k=nfm_top_k, **SPARSE))
    if hasattr(found, "nfm_scale"):
        found.nfm_scale.fill_(2.0)  # as after a first step
    return found


def x_of(rows: int = 5):
    return random_activations(rows=rows).double()


def by_backward(f, x, tangent):
    """The directional derivative of a function by backward passes alone."""
    jacobian = torch.autograd.functional.jacobian(f, x)
    return torch.einsum("oixk,xk->oi", jacobian, tangent)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_and_vmap(sae, gradients):
    x, tangent = x_of(), torch.linspace(-1, 1, 5 * D_MODEL, dtype=torch.float64).reshape(5, D_MODEL)
    acts = sae.encode(x).detach()
    along = torch.zeros_like(acts)
    along[acts != 0] = torch.linspace(-1, 1, int((acts != 0).sum()), dtype=torch.float64)
    expected, decoded = by_backward(sae, x, tangent), by_backward(sae.decode, acts, along)
    plain, plainly_decoded = sae(x), sae.decode(acts)
    with torch.set_grad_enabled(gradients):
        for f, at, direction, value, derivative in (
            (sae, x, tangent, plain, expected),
            (sae.decode, acts, along, plainly_decoded, decoded),
        ):
            out, changes = jvp(f, (at,), (direction,))
            torch.testing.assert_close((out, changes), (value, derivative))
            with forward_ad.dual_level():
                dual = f(forward_ad.make_dual(at, direction))
                torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, derivative)
            torch.testing.assert_close(vmap(f)(at), value)
            torch.testing.assert_close(jacfwd(f)(at[0]), jacrev(f)(at[0]))
        torch.testing.assert_close(vmap(sae.encode)(x), acts)


def test_gradients_of_a_functional_call(sae):
    x = x_of()
    parameters = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    found = grad(lambda given: functional_call(sae, given, (x,)).square().sum())(parameters)
    for parameter in sae.parameters():
        parameter.requires_grad_()
    expected = torch.autograd.grad(
        sae(x).square().sum(), list(sae.parameters()), allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(list(found.values()), list(expected))


def training_step(sae, x):
    return sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=False)
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("nfm_top_k", [None, 3])
def test_a_training_step(architecture, nfm_top_k):
    sae, x = random_sae(training_config(architecture, nfm_top_k=nfm_top_k, **SPARSE)), x_of()
    loss = training_step(sae, x).loss  # the first step of a sequential NFM finds its scale
    (gradient,) = torch.autograd.grad(training_step(sae, x.requires_grad_()).loss, x)
    x.requires_grad_(False)
    value, change = jvp(lambda at: training_step(sae, at).loss, (x,), (gradient,))
    torch.testing.assert_close((value, change), (loss, gradient.square().sum()))
    both = vmap(lambda at: training_step(sae, at).loss)(torch.stack([x, x]))
    torch.testing.assert_close(both, loss.expand(2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("nfm_top_k", [None, 3])
def test_second_derivatives(architecture, nfm_top_k):
    sae = random_sae(training_config(architecture, nfm_top_k=nfm_top_k, **SPARSE))
    x = x_of(2)
    acts = sae.encode(x).detach()
    active = acts != 0

    def decoded(values):
        return sae.decode(torch.zeros_like(acts).masked_scatter(active, values))

    values = acts[active].requires_grad_()
    assert torch.autograd.gradgradcheck(decoded, values, fast_mode=True)
    training_step(sae, x)
    weight = sae.W_lin.detach()[:4].clone().requires_grad_()

    def loss(rows):
        given = dict(sae.named_parameters()) | {"W_lin": torch.cat([rows, sae.W_lin.detach()[4:]])}
        with torch.nn.utils.stateless._reparametrize_module(sae, given):
            return training_step(sae, x).loss

    assert torch.autograd.gradgradcheck(loss, weight, fast_mode=True)


def test_without_numbers(sae):
    """On the meta device and of fake tensors: shapes and types alone."""
    x = x_of()
    elsewhere = copy.deepcopy(sae).to("meta")
    assert elsewhere(x.to("meta")).shape == x.shape
    assert elsewhere.decode(elsewhere.encode(x.to("meta"))).dtype == torch.float64
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert sae(mode.from_tensor(x)).shape == x.shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_step_on_the_meta_device(architecture):
    sae = random_sae(training_config(architecture, **SPARSE))
    if hasattr(sae, "nfm_scale"):
        pytest.skip("its first step reads the scale of activations")
    training_step(sae.to("meta"), x_of().to("meta")).loss.backward()
    assert sae.W_lin.grad.device.type == "meta"


def test_a_copy_with_or_without_gradients_is_the_same_sae(sae):
    x = x_of()
    expected = sae(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(sae)(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(sae(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by", ["to", "own method", "module around it"])
def test_another_data_type_is_that_of_the_whole_sae(sae, dtype, by):
    x, other = x_of(), copy.deepcopy(sae)
    if by == "to":
        other.to(dtype)
    elif by == "own method":
        other = other.half() if dtype == torch.float16 else other.bfloat16()
    else:
        torch.nn.Sequential(torch.nn.Identity(), other).to(dtype)
    assert other.dtype == dtype
    assert str(dtype).endswith(other.cfg.dtype)
    assert other(x).dtype == dtype
    # selections differ where features are near to one another: the mean, in which few tokens matter
    assert (other(x).double() - sae(x)).abs().mean() < 0.1 * sae(x).abs().mean()
