"""Bases, measures, steps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.memory import basis, init_dt, measure
from s4mini.projection import MEASURES, fourier, hippo, laguerre, legendre
from s4mini.ssm import expm


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("N", [1, 2, 3, 16])
def test_basis_is_the_matrix_exponential(name, N):
    ages = torch.tensor([0.0, 1.0, 0.3, 5.0], dtype=torch.float64)  # in any order
    A, B = hippo(name, N)
    k = basis(name, N, ages)
    assert k.shape == (N, 4)
    for i, r in enumerate(ages):
        assert (k[:, i] - expm(r * A) @ B).abs().max() < 1e-12


@pytest.mark.parametrize(("name", "span"), [("legs", 30), ("lagt", 100), ("fout", 20)])
@pytest.mark.parametrize("N", [1, 2, 6])
def test_basis_is_orthonormal_for_its_measure(name, span, N):
    nodes, weights = np.polynomial.legendre.leggauss(24)
    r = (torch.tensor((nodes + 1) / 2) + torch.arange(span)[:, None]).flatten()
    w = torch.tensor(weights / 2).repeat(span)
    k = basis(name, N, r)
    omega = torch.ones_like(r) if name == "fout" else measure(name, r)
    expected = torch.eye(N, dtype=torch.float64)
    if name == "fout" and N % 2 == 0:
        expected[1, 1] = 0
    assert ((k * w / omega) @ k.T - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["legt", "fout"])
def test_batched_ages_are_as_exact_as_single_ones(name):
    A, B = hippo(name, 64)  # torch.matrix_exp is off by 1e-12 and more here
    ages = torch.tensor([0.001, 0.01, 0.1, 1.0], dtype=torch.float64)
    for r, k in zip(ages, basis(name, 64, ages).T, strict=True):
        half = expm(r / 2 * A)
        assert (half @ (half @ B) - k).abs().max() < 1e-13 * B.abs().max() * 64


def test_windows_fill_as_N_grows():
    nodes, weights = np.polynomial.legendre.leggauss(64)
    r, w = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
    norms = (2 * torch.arange(3, dtype=torch.float64) + 1).sqrt()
    limits = {"legt": norms[:, None] * legendre(3, 1 - 2 * r), "fout": fourier(3, r)}
    for name, limit in limits.items():
        errors = [((basis(name, N, r)[:3] - limit) ** 2 @ w).max() for N in (5, 21, 85)]
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        late = basis(name, 85, torch.tensor([2.0, 3.0], dtype=torch.float64))[:3]
        assert late.abs().max() < 0.2


@given(st.integers(1, 30), st.floats(0, 50))
@settings(deadline=None, max_examples=25)
def test_closed_forms_move_as_the_system_does(N, r):
    ages = torch.tensor([r, r + 0.25], dtype=torch.float64)
    for name in ("legs", "lagt"):
        k = basis(name, N, ages)
        flow = expm(0.25 * hippo(name, N)[0])
        assert (flow @ k[:, 0] - k[:, 1]).abs().max() < 1e-11


def test_basis_keeps_dtype_and_large_sizes():
    ages = torch.linspace(0, 2, 3)
    for name in MEASURES:
        assert basis(name, 4, ages).dtype == torch.float32
        assert measure(name, ages).dtype == torch.float32
    big = basis("legs", 1024, ages.double())
    assert big.isfinite().all() and abs(big[1023, 0] - math.sqrt(2047)) < 1e-9
    assert torch.equal(basis("lagt", 9, ages), laguerre(9, ages))


def test_measures_and_their_mass():
    r = torch.linspace(0, 40, 400001, dtype=torch.float64)
    for name in ("legs", "legt", "fout"):
        assert abs(torch.trapezoid(measure(name, r), r) - 1) < 1e-3
    assert (measure("lagt", r) == 1).all()
    assert measure("fout", torch.ones(2, 3)).shape == (2, 3)


@given(st.integers(1, 50), st.floats(1e-6, 1), st.floats(1, 1e4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_steps_lie_between_their_bounds(H, low, ratio, seed):
    dt = init_dt(H, low, low * ratio, torch.Generator().manual_seed(seed))
    again = init_dt(H, low, low * ratio, torch.Generator().manual_seed(seed))
    assert dt.shape == (H,) and dt.dtype == torch.float64 and torch.equal(dt, again)
    assert (dt >= low * (1 - 1e-9)).all() and (dt <= low * ratio * (1 + 1e-9)).all()


def test_steps_are_log_uniform():
    dt = init_dt(20000, 1e-3, 1e-1, torch.Generator().manual_seed(0))
    place = ((dt.log() - math.log(1e-3)) / math.log(100)).sort().values
    assert (place - (torch.arange(20000) + 0.5) / 20000).abs().max() < 0.02
    assert torch.allclose(init_dt(3, 0.1, 0.1), torch.full((3,), 0.1, dtype=torch.float64))


r = torch.linspace(0, 1, 4)
BAD = [
    (lambda: basis("cheb", 4, r), ValueError, "measure"),
    (lambda: basis("legs", 0, r), ValueError, "N"),
    (lambda: basis("legs", 2.0, r), TypeError, "N"),
    (lambda: basis("legs", 2, r - 0.1), ValueError, "t"),
    (lambda: basis("legt", 2, r / 0), ValueError, "t"),
    (lambda: basis("fout", 2, r[None]), ValueError, "t"),
    (lambda: basis("fout", 2, 0.5), TypeError, "t"),
    (lambda: basis("lagt", 2, r + 0j), TypeError, "t"),
    (lambda: measure("cheb", r), ValueError, "measure"),
    (lambda: measure("legs", -r - 1), ValueError, "t"),
    (lambda: measure("legs", r * math.nan), ValueError, "t"),
    (lambda: measure("legs", [0.0]), TypeError, "t"),
    (lambda: init_dt(0, 0.1, 0.2), ValueError, "H"),
    (lambda: init_dt(2.5, 0.1, 0.2), TypeError, "H"),
    (lambda: init_dt(2, 0.0, 0.2), ValueError, "dt_min"),
    (lambda: init_dt(2, "a", 0.2), TypeError, "dt_min"),
    (lambda: init_dt(2, 0.1, math.inf), ValueError, "dt_max"),
    (lambda: init_dt(2, 0.1, 0.05), ValueError, "dt_max"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_calls_are_refused(call, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        call()


def test_an_unknown_measure_lists_the_known():
    with pytest.raises(ValueError, match=", ".join(map(repr, MEASURES))):
        basis("legz", 4, r)
