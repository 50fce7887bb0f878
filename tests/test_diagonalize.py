"""The eigenvectors of LegS in closed form."""

from fractions import Fraction
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.diagonalize import _ballot, legs_eigenvectors
from s4mini.projection import hippo


@given(st.integers(0, 80), st.integers(0, 80))
@settings(deadline=None, max_examples=60)
def test_right_and_left_eigenvectors_in_whole_numbers(n, j):
    """The two telescoping sums of the proofs, and that W is whole."""
    total = sum((2 * k + 1) * (-1) ** k * comb(k + j, 2 * j) for k in range(n))
    assert total == (-1) ** n * (j - n) * comb(n + j, 2 * j)
    k = min(n, j)
    exact = Fraction((2 * k + 1) * comb(2 * j, j - k), j + k + 1)
    assert _ballot(j, k) == exact
    tail = sum(_ballot(j, i) for i in range(k + 1, j + 1))
    assert tail == (j - k) * exact / (2 * k + 1)


@pytest.mark.parametrize("N", [1, 2, 3, 9, 40])
def test_the_inverse_in_whole_numbers(N):
    for j in range(N):
        for i in range(N):
            terms = ((-1) ** (j + k) * _ballot(j, k) * comb(k + i, 2 * i) for k in range(N))
            assert sum(terms) == (i == j)


@pytest.mark.parametrize("N", [1, 2, 5, 8])
def test_diagonalises_legs(N):
    A, B = hippo("legs", N)
    V, W = legs_eigenvectors(N)
    eigenvalues = -torch.arange(1, N + 1, dtype=torch.float64)
    assert (A @ V - V * eigenvalues).abs().max() < 1e-13 * V.abs().max() * N
    assert torch.allclose(W @ V, torch.eye(N, dtype=V.dtype), atol=1e-9)
    b = torch.tensor([(-1.0) ** j * comb(2 * j, j) for j in range(N)])
    assert torch.allclose(W @ B, b.double(), rtol=1e-12)


@pytest.mark.parametrize("N", [1, 17, 100])
def test_shape_type_and_triangles(N):
    for M in legs_eigenvectors(N):
        assert M.shape == (N, N) and M.dtype == torch.float64
        assert torch.equal(M, M.tril()) and (M.diagonal() != 0).all()
    small, large = legs_eigenvectors(N), legs_eigenvectors(N + 3)
    for few, many in zip(small, large, strict=True):
        assert torch.equal(few, many[:N, :N])


def test_entries_are_finite_and_accurate_where_they_are_huge():
    V, W = legs_eigenvectors(200)
    assert V.isfinite().all() and W.isfinite().all()
    exact = Fraction(comb(199 + 89, 2 * 89)) ** 2 * 399
    assert abs(Fraction(V[199, 89].item()) ** 2 / exact - 1) < 2**-49
    exact = Fraction(_ballot(199, 10)) ** 2 / 21
    assert abs(Fraction(W[199, 10].item()) ** 2 / exact - 1) < 2**-49


def test_largest_size():
    V, W = legs_eigenvectors(512)
    assert V.isfinite().all() and W.isfinite().all()


@pytest.mark.parametrize("N", [4, 16, 64, 150])
def test_condition_number_against_its_bound(N):
    V, W = legs_eigenvectors(N)
    kappa = (V.norm(dim=0) * W.norm(dim=1)).sum().item()
    at_3 = sum(comb(N - 1 + j, 2 * j) * comb(2 * j, j) for j in range(N))
    assert (2 * N - 1) ** 0.5 * at_3 / N <= kappa <= 4 * N * at_3


BAD = [
    (0, ValueError),
    (-3, ValueError),
    (513, ValueError),
    (2.0, TypeError),
    (True, TypeError),
    (None, TypeError),
    ("4", TypeError),
]


@pytest.mark.parametrize(("N", "error"), BAD)
def test_bad_calls_are_refused(N, error):
    with pytest.raises(error, match=r"^N: "):
        legs_eigenvectors(N)
