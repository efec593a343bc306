"""Winograd's way to a 3x3 convolution is the convolution."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saltflat.lean import winograd
from saltflat.lean.convolution import Fixed
from saltflat.lean.packed import Packed, supported
from saltflat.lean.winograd import A_T, B_T, G, Winograd, pays

pytestmark = pytest.mark.skipif(not supported(torch.float32), reason="this machine has no oneDNN")
ONE = [1, 1]


def off(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def test_the_three_matrices_give_a_correlation_exactly():
    """In one dimension and float64: Aᵀ [(G g) ⊙ (Bᵀ d)], for every pair of unit vectors."""
    a, b, g = (torch.tensor(side, dtype=torch.float64) for side in (A_T, B_T, G))
    found = torch.einsum("it,tk,td->ikd", a, g, b)
    expected = torch.zeros(4, 3, 6, dtype=torch.float64)
    for i in range(4):
        for k in range(3):
            expected[i, k, i + k] = 1
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 3), channels=st.integers(1, 20), out=st.integers(1, 20), height=st.integers(1, 3),
    width=st.integers(1, 3), seed=st.integers(0, 99), bias=st.booleans(), branch=st.booleans(), relu=st.booleans(),
)  # fmt: skip
def test_it_is_the_convolution(n, channels, out, height, width, seed, bias, branch, relu):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, 4 * height, 4 * width, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.randn(out, channels, 3, 3, generator=generator)
    b = torch.randn(out, generator=generator) if bias else None
    r = torch.randn(n, out, 4 * height, 4 * width, generator=generator) if branch else None
    exact = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), padding=1)
    exact = exact if r is None else exact + r
    found = Winograd(weight, x.shape)(x, b, r, relu)
    size = exact.norm()
    assert (found - (exact.relu() if relu else exact)).norm() < 3e-5 * size
    assert found.stride(1) == 1 or out == 1  # channels-last


def test_what_it_is_given_stays_and_batches_may_be_of_another_size():
    weight, x, r = torch.randn(8, 8, 3, 3), torch.randn(4, 8, 8, 8), torch.randn(4, 8, 8, 8)
    x, r = (t.contiguous(memory_format=torch.channels_last) for t in (x, r))
    before = [t.clone() for t in (x, r, weight)]
    times = Winograd(weight, x.shape)
    for rows in (4, 1, 3):
        assert (
            off(times(x[:rows], None, r[:rows], True), F.relu(F.conv2d(x[:rows], weight, padding=1) + r[:rows])) < 1e-4
        )
    assert all(torch.equal(one, other) for one, other in zip((x, r, weight), before, strict=True))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"padding": [0, 0]}, False),
        ({"stride": [2, 2]}, False),
        ({"dilation": [2, 2]}, False),
        ({"groups": 2}, False),
        ({"shape": (1, 512, 4, 6)}, False),
        ({"shape": (1, 512, 7, 4)}, False),
        ({"weight": (512, 512, 1, 1)}, False),
        ({"weight": (512, 64, 3, 3)}, False),
        ({"weight": (64, 512, 3, 3)}, False),
        ({"dtype": torch.bfloat16}, False),
    ],
    ids=str,
)
def test_where_it_is_used(change, expected):
    usual = {"padding": ONE, "stride": ONE, "dilation": ONE, "groups": 1}
    sizes = {"weight": (512, 512, 3, 3), "shape": (2, 512, 4, 8), "dtype": torch.float32} | change
    weight = torch.empty(sizes["weight"], dtype=sizes["dtype"])
    settings = {name: change.get(name, value) for name, value in usual.items()}
    assert pays(weight, **settings, shape=torch.Size(sizes["shape"])) is expected


def test_a_convolution_with_many_channels_takes_it_where_the_map_allows_and_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(winograd, "CHANNELS", 8)
    module = nn.Conv2d(8, 16, 3, padding=1)
    fixed = Fixed(module, None, relu=True, dtype=torch.float32)
    for size, kind in ((8, Winograd), (6, Packed)):
        x, r = torch.randn(2, 8, size, size, requires_grad=True), torch.randn(2, 16, size, size, requires_grad=True)
        g = torch.randn(2, 16, size, size)
        found = torch.autograd.grad(fixed(x, r), (x, r), g)
        expected = torch.autograd.grad(F.relu(module(x) + r), (x, r), g)
        assert all(off(one, other) < 1e-4 for one, other in zip(found, expected, strict=True))
        assert type(fixed.forwards[x.shape[2:]]) is type(fixed.backwards[x.shape[2:]]) is kind
