"""The HiPPO matrix and the reading of its state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.hippo import MEASURES, hippo, legendre, reconstruct


def quadrature(N):
    """Nodes on [-1, 1], and weights of the mean, exact for products of N polynomials."""
    nodes, weights = np.polynomial.legendre.leggauss(N + 1)
    return torch.tensor(nodes), torch.tensor(weights) / 2


def norms(N):
    return (2 * torch.arange(N, dtype=torch.float64) + 1).sqrt()


@pytest.mark.parametrize("N", [1, 2, 3, 64, 300])
def test_legendre_is_orthogonal_and_one_at_one(N):
    nodes, weights = quadrature(N)
    phi = norms(N)[:, None] * legendre(N, nodes)
    gram = (phi * weights) @ phi.T
    assert (gram - torch.eye(N)).abs().max() < 1e-11
    assert torch.allclose(legendre(N, torch.ones(())), torch.ones(N))


def test_legendre_against_numpy_with_shape_and_dtype():
    xi = torch.linspace(-1, 1, 12).reshape(3, 4)
    values = legendre(9, xi)
    assert values.shape == (9, 3, 4) and values.dtype == torch.float32
    for n in range(9):
        expected = np.polynomial.legendre.Legendre.basis(n)(xi.double().numpy())
        assert np.abs(values[n].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("N", [1, 2, 3, 64, 1024])
def test_hippo_entries(N):
    A, B = hippo("legs", N)
    assert A.shape == (N, N) and B.shape == (N,)
    assert A.dtype == B.dtype == torch.float64
    n = np.arange(N)
    outer = np.sqrt(2 * n + 1)[:, None] * np.sqrt(2 * n + 1)
    expected = np.where(n[:, None] > n, -outer, np.where(n[:, None] == n, -(n + 1.0), 0))
    assert np.abs(A.numpy() - expected).max() <= 1e-12 * N
    assert torch.equal(A.diagonal(), -torch.arange(1, N + 1, dtype=A.dtype))
    assert not torch.signbit(A[torch.triu(torch.ones(N, N), 1) > 0]).any()


@pytest.mark.parametrize("N", [1, 2, 5, 32, 200])
def test_constant_input_is_at_rest(N):
    A, B = hippo("legs", N)
    assert (A[:, 0] + B).abs().max() < 1e-12  # x = e_0 with u = 1


@pytest.mark.parametrize("N", [1, 5, 33, 257])
def test_gram_matrix_is_the_identity(N):
    A, B = hippo("legs", N)
    M = A + torch.eye(N) / 2
    assert (M + M.T + torch.outer(B, B)).abs().max() < 1e-11 * N


def test_derivative_of_the_coefficients():
    """t dx/dt = A x + B u for u = sin, by central differences of quadrature."""
    N, t, h = 12, 2.0, 1e-4
    nodes, weights = quadrature(60)

    def project(t):
        return norms(N) * (legendre(N, nodes) @ (weights * torch.sin(t * (nodes + 1) / 2)))

    slope = (project(t + h) - project(t - h)) / (2 * h)
    A, B = hippo("legs", N)
    assert (t * slope - A @ project(t) - B * math.sin(t)).abs().max() < 1e-7


@given(st.integers(1, 40), st.floats(0.01, 100), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_reading_then_projecting_returns_the_state(N, t, seed):
    x = torch.randn(3, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nodes, weights = quadrature(N)
    past = reconstruct("legs", x, t, t * (nodes + 1) / 2)
    again = (past * weights) @ legendre(N, nodes).T * norms(N)
    assert past.shape == (3, N + 1)
    assert (again - x).abs().max() < 1e-10


def test_reconstruct_depends_on_the_ratio_of_times_only():
    x = torch.arange(1.0, 6.0)
    s = torch.linspace(0, 1, 7)
    near, far = reconstruct("legs", x, 1, s), reconstruct("legs", x, 50, 50 * s)
    assert near.dtype == torch.float32
    assert torch.allclose(near, far, atol=1e-4)
    ends = reconstruct("legs", x.double(), 3.0, torch.tensor([0.0, 3.0]))
    signs = (-1.0) ** torch.arange(5)
    assert torch.allclose(ends[1], (x.double() * norms(5)).sum())
    assert torch.allclose(ends[0], (x.double() * norms(5) * signs).sum())


def test_reconstruct_forgives_rounding_and_has_gradients():
    dt, L = 0.1, 1000
    s = torch.arange(L + 1) * dt  # single precision: may pass t by a rounding error
    x = torch.ones(4, requires_grad=True)
    reconstruct("legs", x, L * dt, s).sum().backward()
    assert x.grad.isfinite().all()


x, s = torch.ones(4), torch.linspace(0, 1, 5)
BAD = [
    (lambda: hippo("legt", 4), ValueError, "measure"),
    (lambda: hippo("LegS", 4), ValueError, "measure"),
    (lambda: hippo(None, 4), ValueError, "measure"),
    (lambda: hippo("legs", 0), ValueError, "N"),
    (lambda: hippo("legs", -3), ValueError, "N"),
    (lambda: hippo("legs", 4.0), TypeError, "N"),
    (lambda: hippo("legs", True), TypeError, "N"),
    (lambda: legendre(0, s), ValueError, "N"),
    (lambda: legendre("3", s), TypeError, "N"),
    (lambda: legendre(3, 0.5), TypeError, "xi"),
    (lambda: legendre(3, torch.arange(3)), TypeError, "xi"),
    (lambda: legendre(3, s + 0j), TypeError, "xi"),
    (lambda: legendre(3, s / 0), ValueError, "xi"),
    (lambda: reconstruct("fout", x, 1.0, s), ValueError, "measure"),
    (lambda: reconstruct("legs", [1.0], 1.0, s), TypeError, "x"),
    (lambda: reconstruct("legs", x + 0j, 1.0, s), TypeError, "x"),
    (lambda: reconstruct("legs", x * math.nan, 1.0, s), ValueError, "x"),
    (lambda: reconstruct("legs", torch.ones(()), 1.0, s), ValueError, "x"),
    (lambda: reconstruct("legs", x, 0.0, s), ValueError, "t"),
    (lambda: reconstruct("legs", x, -1.0, s), ValueError, "t"),
    (lambda: reconstruct("legs", x, math.inf, s), ValueError, "t"),
    (lambda: reconstruct("legs", x, "1", s), TypeError, "t"),
    (lambda: reconstruct("legs", x, 1.0, 0.5), TypeError, "s"),
    (lambda: reconstruct("legs", x, 1.0, s[:, None]), ValueError, "s"),
    (lambda: reconstruct("legs", x, 1.0, torch.empty(0)), ValueError, "s"),
    (lambda: reconstruct("legs", x, 0.9, s), ValueError, "s"),
    (lambda: reconstruct("legs", x, 1.0, s - 0.1), ValueError, "s"),
    (lambda: reconstruct("legs", x, torch.ones(2), s), ValueError, "t"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_calls_are_refused(call, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        call()


def test_an_unknown_measure_lists_the_known():
    with pytest.raises(ValueError, match=", ".join(map(repr, MEASURES))):
        hippo("legz", 4)
