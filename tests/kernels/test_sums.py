"""Sums over the active entries: each other's derivatives, and one sum for all reads of a weight."""

import pytest
import torch
from kernel_inputs import Operations, random_acts, randoms
from torch.autograd import gradcheck, gradgradcheck

from sae_nfm.kernels import sums


def made():
    acts, (by_token, weight) = random_acts(), randoms((6, 3), (11, 3))
    return acts.indices, acts.values, by_token, weight


@pytest.mark.parametrize("routed", [True, False])
def test_each_one_s_gradients_are_the_other_two_as_often_as_one_likes(routed):
    indices, values, by_token, weight = made()
    routing = sums.route(indices, 11)
    given = routing if routed else None
    for function, inputs in (
        (lambda v, w: sums.Rows.apply(indices, v, w, given, None), (values, weight)),
        (lambda g, w: sums.Dots.apply(indices, g, w, given, None), (by_token, weight)),
        (lambda v, g: sums.ByFeature.apply(indices, v, g, routing), (values, by_token)),
    ):
        inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


def read_twice(indices, values, by_token, weight, shared):
    """A weight read as rows, and again by what these make of its dot products."""
    if shared:
        both = sums.Shared(weight)
        rows, dots = both.rows, both.dots
    else:
        rows = lambda i, v: sums.Rows.apply(i, v, weight, None, None)  # noqa: E731
        dots = lambda i, g: sums.Dots.apply(i, g, weight, None, None)  # noqa: E731
    first = rows(indices[:, :2], values[:, :2])
    strengths = dots(indices[:, 2:], by_token - first)
    return first + rows(indices[:, 2:], strengths.relu())


def test_a_shared_weight_has_the_same_gradient_by_one_sum():
    indices, values, by_token, weight = (t if t.dtype == torch.long else t.detach().double() for t in made())
    found, n_sums = [], []
    for shared in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in (values, by_token, weight)]
        output = read_twice(indices, *inputs, shared)
        with Operations() as operations:
            found.append(torch.autograd.grad(output.square().sum(), inputs))
        n_sums.append(operations.count["argsort"] + operations.count["sort"])
    torch.testing.assert_close(*found)
    assert n_sums == [1, 3]


def test_a_pass_that_does_not_want_a_shared_weight_leaves_nothing_for_the_next():
    indices, values, by_token, weight = made()
    inputs = [tensor.detach().double().requires_grad_() for tensor in (values, by_token, weight)]
    loss = read_twice(indices, *inputs, shared=True).square().sum()
    (expected,) = torch.autograd.grad(loss, inputs[2], retain_graph=True)
    torch.autograd.grad(loss, inputs[:2], retain_graph=True)
    (again,) = torch.autograd.grad(loss, inputs[2], retain_graph=True)
    assert torch.equal(again, expected)
    loss.backward()
    assert torch.equal(inputs[2].grad, expected)


def test_second_derivatives_of_a_shared_weight():
    indices, values, by_token, weight = made()
    found = []
    for shared in (True, False):
        inputs = [tensor.detach().double().requires_grad_() for tensor in (values, by_token, weight)]
        first = torch.autograd.grad(read_twice(indices, *inputs, shared).square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(one.square().sum() for one in first), inputs))
    torch.testing.assert_close(*found)
