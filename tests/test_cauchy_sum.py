"""Sums of fractions over conjugate pairs."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.cauchy_sum import cauchy, damp, nodes
from s4mini.generating import roots

chapter = sys.modules["s4mini.cauchy_sum"]  # s4mini.cauchy_sum is the function


def sums(*batch, k=3, n=4, seed=0, dtype=torch.complex128):
    """Return random weights (*batch, k, n) and stable modes (*batch, n)."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(*batch, k, n, generator=generator, dtype=torch.complex128)
    z = torch.randn(*batch, n, generator=generator, dtype=torch.complex128)
    Lambda = torch.complex(-0.1 - z.real.abs(), 5 * z.imag)
    return v.to(dtype), Lambda.to(dtype)


def plain(v, Lambda, x, y):
    """The fractions of all modes and their conjugates, one by one."""
    both, weights = torch.cat((Lambda, Lambda.conj()), -1), torch.cat((v, v.conj()), -1)
    both = both[..., None, :, None]
    return (weights[..., None] / (1j * x - y * both)).sum(-2)


def close(p, q, tolerance=1e-13):
    return (p - q).abs().max() <= tolerance * q.abs().max()


@pytest.mark.parametrize("L", [1, 2, 3, 8, 15, 1000, 10**6])
def test_nodes_are_halves_of_the_roots_angles(L):
    x, y = nodes(L)
    assert x.shape == y.shape == (L // 2 + 1,)
    assert ((y + 0.5j * x) ** 2 - roots(L).conj()).abs().max() < 1e-14
    assert (x >= 0).all() and (y >= 0).all()
    if L % 2 == 0:
        assert y[-1] == 0 and x[-1] == 2
    small = nodes(L, torch.float32)
    assert torch.equal(small[0], x.float()) and torch.equal(small[1], y.float())


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 9), k=st.integers(1, 5), L=st.integers(1, 60), seed=st.integers(0, 99))
def test_real_and_complex_sums_agree(n, k, L, seed):
    grid = nodes(L)
    v, Lambda = sums(2, k=k, n=n, seed=seed)
    assert close(cauchy(v, Lambda, *grid), plain(v, Lambda, *grid), 1e-12)


def test_the_sum_is_over_pairs():
    v, Lambda = sums()
    x, y = nodes(10)
    both, weights = torch.cat((Lambda, Lambda.conj())), torch.cat((v, v.conj()), -1)
    expected = (weights[:, :, None] / (1j * x - y * both[:, None])).sum(1)
    assert close(cauchy(v, Lambda, x, y), expected)


@pytest.mark.parametrize(
    ("batch_v", "batch_modes", "batch"),
    [((), (3,), (3,)), ((2, 3), (3,), (2, 3)), ((2, 3), (), (2, 3)),
     ((2, 3), (1,), (2, 3)), ((2, 1), (3,), (2, 3)), ((), (2, 3), (2, 3))],
)  # fmt: skip
def test_batch_axes_broadcast(batch_v, batch_modes, batch):
    v, _ = sums(*batch_v)
    _, Lambda = sums(*batch_modes)
    grid = nodes(9)
    p = cauchy(v, Lambda, *grid)
    assert p.shape == (*batch, 3, 5)
    assert close(p, plain(v, Lambda, *grid))


def test_gradients():
    v, Lambda = sums(2, 3, k=2, n=3)
    inputs = [v.requires_grad_(), Lambda[0].clone().requires_grad_()]
    for L in (4, 7):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda v, m, L=L: cauchy(v, m, *nodes(L)), inputs)


def test_backends():
    v, Lambda = sums()
    with pytest.raises(ValueError, match=r"^backend: "):
        cauchy(v, Lambda, *nodes(4), backend="nave")
    if chapter.keops_available():
        with pytest.raises(ValueError, match=r"^backend: 'keops' cannot be used here"):
            cauchy(v, Lambda, *nodes(4), backend="keops")
    else:
        p = cauchy(v, Lambda, *nodes(9), backend="keops")
        assert close(p, cauchy(v, Lambda, *nodes(9)))


def test_single_precision():
    v, Lambda = sums(k=4, n=32)
    exact = cauchy(v, Lambda, *nodes(5000))
    p = cauchy(v.to(torch.complex64), Lambda.to(torch.complex64), *nodes(5000, torch.float32))
    assert p.dtype == torch.complex64
    assert close(p.to(exact), exact, 1e-5)


def test_the_highest_precision_wins():
    v, Lambda = sums()
    p = cauchy(v.to(torch.complex64), Lambda, *nodes(4, torch.float32))
    assert p.dtype == torch.complex128


V, M = sums()
X, Y = nodes(6)
BAD = [
    (TypeError, "v", (V.tolist(), M, X, Y)),
    (ValueError, "v", (V[0], M[0], X, Y)),
    (ValueError, "Lambda", (V, M[:2], X, Y)),
    (ValueError, "Lambda", (V, M * math.inf, X, Y)),
    (ValueError, "v, Lambda", (V.expand(2, 3, 4), M.expand(5, 4), X, Y)),
    (TypeError, "x", (V, M, X + 0j, Y)),
    (ValueError, "y", (V, M, X, Y[:2])),
    (ValueError, "y", (V, M, X, Y * math.nan)),
]


@pytest.mark.parametrize(("error", "name", "arguments"), BAD)
def test_bad_sums(error, name, arguments):
    with pytest.raises(error, match=f"^{name}: "):
        cauchy(*arguments)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (ValueError, "L", (0,)),
        (TypeError, "L", (2.5,)),
        (TypeError, "dtype", (8, torch.complex64)),
        (TypeError, "dtype", (8, torch.int64)),
    ],
)
def test_bad_nodes(error, name, arguments):
    with pytest.raises(error, match=f"^{name}: "):
        nodes(*arguments)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 6), L=st.integers(1, 60), seed=st.integers(0, 99), axis=st.booleans())
def test_damped_modes_are_the_sums_on_the_smaller_circle(n, L, seed, axis):
    v, Lambda = sums(k=1, n=n, seed=seed)
    v = v[0]
    if axis:  # undamped, and one mode at zero
        Lambda = 1j * Lambda.imag
        Lambda[0] = 0
    moved, weight = damp(Lambda, v, L)
    assert (moved.real < 0).all()
    x, y = nodes(L)
    z = math.exp(-1 / L) * roots(L)
    direct = (v[:, None] / ((1 - z) - (1 + z) * Lambda[:, None] / 2)).sum(0)
    phase = (1 + math.tanh(0.5 / L)) * torch.complex(y, x / 2)
    through = phase * (weight[:, None] / (1j * x - y * moved[:, None])).sum(0)
    assert (through - direct).abs().max() < 1e-11 * direct.abs().max()


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "L", (M, V[0], 2.5)),
        (ValueError, "L", (M, V[0], 0)),
        (TypeError, "Lambda", (None, V[0], 8)),
        (ValueError, "Lambda, v", (M.expand(3, 4), V[0].expand(2, 4), 8)),
        (ValueError, "v", (M, V[0, :2], 8)),
    ],
)
def test_bad_damping(error, name, arguments):
    with pytest.raises(error, match=f"^{name}: "):
        damp(*arguments)
