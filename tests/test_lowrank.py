"""Normal plus low rank, half spectra and their real form."""

import math

import pytest
import torch
from helpers import random_half, signal
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.lowrank import NPLR, half_spectrum, nplr, real_form
from s4mini.projection import MEASURES, hippo

RANK = {"legs": 1, "legt": 2, "lagt": 1, "fout": 1}


@pytest.mark.parametrize("measure", MEASURES)
def test_rebuilds_the_hippo_matrix_at_every_size(measure):
    for N in [*range(1, 129), *range(129, 257, 9), 255, 256]:
        A, B = hippo(measure, N)
        Lambda, P, b, V = nplr(measure, N)
        back = V @ (torch.diag(Lambda) - P @ P.mH) @ V.mH
        assert (back - A).norm() <= 1e-12 * A.norm()
        assert (V @ b - B).norm() <= 1e-12 * B.norm()
        assert (V.mH @ V - torch.eye(N)).norm() <= 1e-12


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [1, 2, 3, 16, 63, 64])
def test_shapes_order_and_phase(measure, N):
    system = nplr(measure, N)
    shapes = [tuple(field.shape) for field in system]
    assert shapes == [(N,), (N, RANK[measure]), (N,), (N, N)]
    assert all(field.dtype == torch.complex128 for field in system)
    assert (system.Lambda.real == (-0.5 if measure == "legs" else 0)).all()
    gaps = system.Lambda.imag.diff()
    double = measure == "fout" and N % 2 == 0
    assert (gaps > 0).sum() == len(gaps) - double and (gaps >= 0).all()
    assert torch.equal(system.Lambda, system.Lambda.flip(0).conj().resolve_conj())
    assert (system.B.real > 0).all() and system.B.imag.abs().max() < 1e-11
    if measure != "legt":
        assert torch.allclose(system.P[:, 0], system.B / math.sqrt(2), atol=1e-11)
    assert torch.allclose(system.V.flip(1).conj(), system.V, atol=1e-10)


def test_the_zero_modes_of_fourier():
    """The constant and the dead sine are one conjugate pair with eigenvalue zero."""
    system = nplr("fout", 10)
    assert torch.equal(system.Lambda[4:6], torch.zeros(2, dtype=torch.complex128))
    half = half_spectrum(system)
    assert half.Lambda[0] == 0 and (half.Lambda[1:].imag > 0).all()
    assert half.V[2:, 0].abs().max() == 0
    C = torch.arange(10.0, dtype=torch.float64)
    assert torch.allclose(2 * (C.to(half.V) @ half.V @ half.B).real, C @ hippo("fout", 10)[1])


def test_it_is_the_same_every_time():
    for first, second in zip(nplr("legs", 40), nplr("legs", 40), strict=True):
        assert torch.equal(first, second)


def test_frequencies():
    frequency = nplr("legs", 64).Lambda.imag
    assert abs(frequency[32] - 0.264) < 1e-3
    assert abs(frequency[-1] / (64**2 / math.pi) - 1) < 1e-3


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [2, 4, 30, 64])
def test_half_spectrum_keeps_the_upper_half(measure, N):
    system = nplr(measure, N)
    half = half_spectrum(system)
    assert isinstance(half, NPLR)
    assert half.V.shape == (N, N // 2) and half.P.shape == (N // 2, RANK[measure])
    assert (half.Lambda.imag >= 0).all()
    x = signal(N, seed=N)
    kept = half.V.mH @ x.to(half.V)
    assert torch.allclose(2 * (half.V @ kept).real, x, atol=1e-12)


def test_half_spectrum_in_any_order():
    Lambda, P, B, V = nplr("legs", 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    half = half_spectrum(NPLR(Lambda[order], P[order], B[order], V[:, order]))
    assert torch.allclose(2 * (half.V @ half.B).real, hippo("legs", 8)[1])


@pytest.mark.parametrize("N", [2, 6, 32, 64])
def test_real_form_has_the_same_transfer_function(N):
    A, B = hippo("legs", N)
    C = signal(N, seed=N)
    half = half_spectrum(nplr("legs", N))
    a, b, c = real_form(half.Lambda, half.P, half.B, C.to(half.V) @ half.V)
    assert a.dtype == b.dtype == c.dtype == torch.float64
    eye = torch.eye(N, dtype=torch.complex128)
    for s in (0.0, 0.3j, 1 + 2j, 100j, 1e4j):
        truth = C.to(eye) @ torch.linalg.solve(s * eye - A, B.to(eye))
        again = c.to(eye) @ torch.linalg.solve(s * eye - a, b.to(eye))
        assert abs(truth - again) < 1e-9 * (1 + abs(truth))


@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_real_form_of_any_rank(n, r, seed):
    """The real form and the doubled complex system have one transfer function."""
    Lambda, P, B, C = random_half(n=n, r=r, seed=seed)
    a, b, c = real_form(Lambda, P, B, C)
    whole = [torch.cat((z, z.conj())) for z in (Lambda, P, B, C)]
    s = torch.eye(2 * n, dtype=torch.complex128) * 1.5j
    A = torch.diag(whole[0]) - whole[1] @ whole[1].mH
    truth = whole[3] @ torch.linalg.solve(s - A, whole[2])
    again = c.to(s) @ torch.linalg.solve(s - a, b.to(s))
    assert abs(truth - again) < 1e-8 * (1 + abs(truth))


@given(st.integers(1, 8), st.integers(1, 3), st.floats(0.01, 100), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_stable_for_every_P(n, r, size, seed):
    Lambda, P, _, _ = random_half(n=n, r=r, seed=seed)
    A, _, _ = real_form(Lambda, size * P, Lambda, Lambda)
    margin = 1e-9 * A.norm()
    assert torch.linalg.eigvals(A).real.max() <= Lambda.real.max() + margin


def test_real_form_batches_dtypes_and_gradients():
    half = random_half(5, 4, n=3, r=2, seed=1)
    A, B, C = real_form(*half)
    assert A.shape == (5, 4, 6, 6) and B.shape == C.shape == (5, 4, 6)
    single = real_form(*(z[2, 3] for z in half))
    for many, one in zip((A, B, C), single, strict=True):  # to four rounding units
        assert (many[2, 3] - one).abs().max() <= 4 * 2.0**-53 * one.abs().max()
    low = real_form(*(z.to(torch.complex64) for z in half))
    assert all(z.dtype == torch.float32 for z in low)
    leaves = [z[0, 0].detach().requires_grad_() for z in half]
    assert torch.autograd.gradcheck(real_form, leaves)


def test_real_form_has_second_derivatives():
    half = random_half(n=2, seed=3)
    assert torch.autograd.gradgradcheck(real_form, [z.requires_grad_() for z in half])


def test_real_form_takes_real_vectors():
    Lambda, P, B, C = random_half(n=3, seed=2)
    mixed = real_form(Lambda, P.real, B.real, C.real)
    same = real_form(Lambda, P.real + 0j, B.real + 0j, C.real + 0j)
    for first, second in zip(mixed, same, strict=True):
        assert (first - second).abs().max() <= 4 * 2.0**-53 * second.abs().max()


L, P, B, V = nplr("legs", 4)
h = half_spectrum(nplr("legs", 4))
BAD = [
    (lambda: nplr("laguerre", 4), ValueError, "measure"),
    (lambda: nplr("legs", 0), ValueError, "N"),
    (lambda: nplr("legs", 2.5), TypeError, "N"),
    (lambda: nplr("legs", False), TypeError, "N"),
    (lambda: half_spectrum(nplr("legs", 1)), ValueError, "N"),
    (lambda: half_spectrum(nplr("legs", 7)), ValueError, "N"),
    (lambda: half_spectrum(NPLR(L + 1j, P, B, V)), ValueError, "Lambda"),
    (lambda: half_spectrum(NPLR(L.imag.abs() * 1j, P, B, V)), ValueError, "Lambda"),
    (lambda: half_spectrum(NPLR(L, P, B + 1j, V)), ValueError, "B"),
    (lambda: half_spectrum(NPLR(L, P, B, V * 1j)), ValueError, "V"),
    (lambda: half_spectrum(NPLR(None, P, B, V)), TypeError, "Lambda"),
    (lambda: half_spectrum(NPLR(L, P[:, 0], B, V)), ValueError, "P"),
    (lambda: half_spectrum(NPLR(L, P, B[:2], V)), ValueError, "B"),
    (lambda: half_spectrum(NPLR(L, P, B * math.nan, V)), ValueError, "B"),
    (lambda: half_spectrum(h), ValueError, "V"),
    (lambda: real_form([1j], h.P, h.B, h.B), TypeError, "Lambda"),
    (lambda: real_form(torch.arange(2), h.P, h.B, h.B), TypeError, "Lambda"),
    (lambda: real_form(h.Lambda / 0, h.P, h.B, h.B), ValueError, "Lambda"),
    (lambda: real_form(h.Lambda, h.B, h.B, h.B), ValueError, "P"),
    (lambda: real_form(h.Lambda, P, h.B, h.B), ValueError, "P"),
    (lambda: real_form(h.Lambda, h.P, B, h.B), ValueError, "B"),
    (lambda: real_form(h.Lambda, h.P, h.B, h.B[:1]), ValueError, "C"),
    (lambda: real_form(h.Lambda, h.P, h.B, 1.0), TypeError, "C"),
    (lambda: real_form(h.Lambda, h.P, h.B, h.B.real.half()), TypeError, "C"),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_calls_are_refused(call, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        call()


def test_what_is_no_system_is_refused():
    with pytest.raises(TypeError, match="system: expected an NPLR, got NoneType"):
        half_spectrum(None)
