"""Deep linear networks: the laws of their starts, and what stands before and after a
layer."""

import math

import numpy as np
import pytest
import torch

import ngdcore as ngd

WIDTHS = [30, 50, 40, 20]


@pytest.mark.parametrize(
    "law, spread",
    [
        ("gaussian", lambda a, b: 1 / math.sqrt(a)),
        ("glorot", lambda a, b: math.sqrt(2 / (a + b))),
        ("uniform", lambda a, b: 1 / math.sqrt(3 * a)),
    ],
)
def test_a_law_has_its_spread(law, spread):
    """Root mean squares of 800 entries or more: 10 % are four standard deviations."""
    for layer in ngd.models.DeepLinear(WIDTHS, init=law, seed=1):
        b, a = layer.weight.shape
        size = layer.weight.square().mean().sqrt()
        assert abs(float(size) / spread(a, b) - 1) < 0.1
    if law == "uniform":
        assert layer.weight.abs().max() < 1 / math.sqrt(a)


def test_uniform_is_the_law_of_torch():
    """The bound that torch.nn.Linear takes, reached by neither and nearly by both."""
    theirs = torch.nn.Linear(50, 40, bias=False).weight.abs().max()
    ours = ngd.models.DeepLinear([50, 40], init="uniform")[0].weight.abs().max()
    for largest in (theirs, ours):
        assert 0.98 < float(largest) * math.sqrt(50) <= 1


@pytest.mark.parametrize("numpy", [False, True])
def test_before_and_after_make_the_map(numpy):
    net = ngd.models.DeepLinear(WIDTHS, init="gaussian", seed=2)
    W = [layer.weight.detach() for layer in net]
    kind = [w.numpy() for w in W] if numpy else W
    A, B = ngd.models.before_and_after(kind)
    assert all(isinstance(m, np.ndarray) == numpy for m in A + B)
    for i, (a, b) in enumerate(zip(A, B)):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert torch.allclose(a, net.before(i)) and torch.allclose(b, net.after(i))
        assert torch.allclose(b @ W[i] @ a, net.map())


def test_before_and_after_give_the_velocity_of_the_map():
    """Against forward differentiation of the product."""
    W = [p.detach() for p in ngd.models.DeepLinear(WIDTHS, "glorot").parameters()]
    moves = [torch.randn_like(w) for w in W]

    def product(*w):
        return torch.linalg.multi_dot(w[::-1])

    expected = torch.func.jvp(product, tuple(W), tuple(moves))[1]
    A, B = ngd.models.before_and_after(W)
    found = sum(b @ m @ a for a, b, m in zip(A, B, moves))
    assert torch.allclose(found, expected)
    assert not torch.allclose(found, B[0] @ moves[0] @ A[0])


def test_before_and_after_of_one_layer_and_of_float32():
    one = torch.ones(2, 3)
    A, B = ngd.models.before_and_after([one])
    assert torch.equal(A[0], torch.eye(3)) and torch.equal(B[0], torch.eye(2))
    assert A[0].dtype == torch.float32


@pytest.mark.parametrize("shapes", [[], [(3, 2), (4, 2)], [(3, 2), (3, 2)]])
def test_weights_that_do_not_follow_one_another(shapes):
    with pytest.raises(ValueError, match="do not follow one another"):
        ngd.models.before_and_after([torch.ones(shape) for shape in shapes])
