"""State spaces: the solution, the change of coordinates, the matrix exponential."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers import random_dense, signal
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.ssm import SSM, change_basis, expm, impulse_response, promote, response

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
few = settings(deadline=None, max_examples=20)


def random_system(N, seed, dtype=torch.float64):
    return SSM(*random_dense(N, seed, dtype)[:3])


def random_matrix(N, seed, dtype=torch.complex128):
    M = signal(N, N, dtype=dtype, seed=1000 + seed)
    return M + 3 * math.sqrt(N) * torch.eye(N, dtype=dtype)


# --- the matrix exponential


@few
@given(N=st.integers(1, 12), seed=st.integers(0, 10**6), scale=st.floats(-12, 3))
def test_expm_agrees_with_scipy(N, seed, scale):
    M = random_system(N, seed, torch.complex128).A * 2.0**scale
    expected = scipy.linalg.expm(M.numpy())
    assert np.abs(expm(M).numpy() - expected).max() <= 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_expm_of_a_rotation_at_every_scale(dtype):
    # torch.linalg.matrix_exp has a wrong coefficient for some of these (pytorch 196592).
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=dtype)
    for angle in np.logspace(-8, 1, 40):
        M = angle * turn
        angle = M[1, 0].real.item()
        error = abs(expm(M)[0, 0].item() - math.cos(angle))
        assert error < 8 * max(angle, 1) * torch.finfo(dtype).eps


def test_expm_of_a_nilpotent_matrix_is_its_polynomial():
    for t in np.logspace(-4, 1, 11):
        J = torch.diag(torch.full((8,), t, dtype=torch.float64), 1)
        expected = [t**j / math.factorial(j) for j in range(9)]
        assert torch.allclose(expm(J)[0], torch.tensor(expected).double(), rtol=1e-14)


def test_expm_of_a_batch_is_the_batch_of_exponentials():
    # Products are summed in another order in a batch. The exponential of M changes by
    # about ||M|| roundings, and each of up to 16 squarings doubles an error at most.
    scales = 10.0 ** torch.arange(-4.0, 3.0, dtype=torch.float64)
    batch = torch.stack([random_system(5, k).A * scale for k, scale in enumerate(scales)])
    together = expm(batch)
    assert torch.allclose(expm(batch.reshape(7, 1, 5, 5))[:, 0], together, rtol=1e-13, atol=0)
    for M, E, scale in zip(batch, together, scales, strict=True):
        ulps = 64 * max(1.0, scale.item()) * torch.finfo(M.dtype).eps
        assert (E - expm(M)).abs().max() <= ulps * E.abs().max()


def test_expm_of_zero_and_its_gradient():
    assert torch.allclose(expm(torch.zeros(3, 3)), torch.eye(3), rtol=0, atol=1e-7)
    M = random_system(3, 0, torch.complex128).A.requires_grad_()
    assert torch.autograd.gradcheck(expm, (M,))


# --- the impulse response


@few
@given(N=st.integers(1, 10), seed=st.integers(0, 10**6))
def test_modes_and_any_basis_give_the_same_response(N, seed):
    system = random_system(N, seed)
    t = torch.linspace(0, 4, 21, dtype=torch.float64)
    K = impulse_response(system, t)
    moved = impulse_response(change_basis(system, random_matrix(N, seed)), t)
    assert moved.is_complex() and not K.is_complex()
    assert (moved - K).abs().max() < 1e-10 * max(K.abs().max().item(), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_respected(dtype):
    system = random_system(4, 0, dtype)
    for t in (torch.ones(3), torch.ones(3, dtype=torch.float64)):
        assert impulse_response(system, t).dtype == dtype
    assert change_basis(system, torch.eye(4, dtype=dtype)).A.dtype == dtype
    assert expm(system.A).dtype == dtype


def test_at_zero_the_response_is_c_times_b():
    system = random_system(6, 3)
    K = impulse_response(system, torch.zeros(1, dtype=torch.float64))
    assert torch.allclose(K[0], system.C @ system.B, rtol=1e-14)


def test_output_vector_is_not_conjugated():
    one = torch.ones(1, dtype=torch.complex128)
    system = SSM(-one[None], one, 1j * one)
    assert impulse_response(system, torch.zeros(1))[0].item() == 1j


def test_double_damped_spring_has_the_hand_made_response():
    A = torch.tensor([[0.0, 1.0], [-4.0, -5.0]], dtype=torch.float64)  # poles -1, -4
    B, C = torch.eye(2, dtype=torch.float64).flip(0)
    t = torch.linspace(0, 5, 50, dtype=torch.float64)
    expected = (torch.exp(-t) - torch.exp(-4 * t)) / 3
    assert torch.allclose(impulse_response(SSM(A, B, C), t), expected, atol=1e-15)


def test_impulse_response_has_gradients():
    A, B, C, _ = random_system(3, 1)
    t = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (A, B, C)]
    assert torch.autograd.gradcheck(lambda *s: impulse_response(SSM(*s), t), inputs)


# --- the response to an exponential


@few
@given(N=st.integers(1, 8), seed=st.integers(0, 10**6), imag=st.floats(-9, 9))
def test_response_solves_the_equation(N, seed, imag):
    A, B, _, _ = random_system(N, seed)
    z = torch.tensor([complex(0.5, imag)], dtype=torch.complex128)
    X = response(A, B, z)[0]
    assert (z[0] * X - A @ X.real - 1j * (A @ X.imag) - B).abs().max() < 1e-11


def test_response_is_the_transform_of_the_impulse_response():
    system = random_system(5, 4)._replace(C=torch.eye(5, dtype=torch.float64)[2])
    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(200))
    r, w = 30 * (nodes + 1), 30 * weights  # to age 60
    K = impulse_response(system, r)
    z = torch.tensor([0.0, 0.7, 0.2], dtype=torch.float64) + 1j * torch.tensor([0.0, 0.0, 2.5])
    integral = (w * K * torch.exp(-z[:, None] * r)).sum(-1)
    assert (response(system.A, system.B, z)[:, 2] - integral).abs().max() < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
def test_response_is_complex_and_as_precise_as_its_arguments(dtype):
    A, B, _, _ = random_system(3, 0, dtype)
    double = dtype in (torch.float64, torch.complex128)
    expected = torch.complex128 if double else torch.complex64
    assert response(A, B, torch.ones(2)).dtype == expected
    assert response(A, B, torch.ones(2) + 1j).shape == (2, 3)


def test_response_has_gradients():
    A, B, _, _ = random_system(3, 1)
    z = torch.tensor([1j, 0.5], dtype=torch.complex128)
    assert torch.autograd.gradcheck(response, [x.requires_grad_() for x in (A, B, z)])


# --- the change of coordinates


@few
@given(N=st.integers(1, 8), seed=st.integers(0, 10**6))
def test_conjugation_is_a_group_action(N, seed):
    system = random_system(N, seed)
    V, W = random_matrix(N, seed), random_matrix(N, seed + 1)
    twice = change_basis(change_basis(system, V), W)
    once = change_basis(system, V @ W)
    back = change_basis(twice, torch.linalg.inv(V @ W))
    for one, other in zip((*twice[:3], *back[:3]), (*once[:3], *system[:3]), strict=True):
        assert (one - other).abs().max() < 1e-9


def test_the_direct_term_is_kept():
    assert change_basis(random_system(2, 0)._replace(D=0.25), torch.eye(2)).D == 0.25
    assert random_system(2, 0).D == 0.0


def test_promote_finds_the_common_type():
    a, b, c = promote(a=torch.ones(1), b=torch.ones(2).double(), c=torch.ones(3) + 0j)
    assert a.dtype == b.dtype == c.dtype == torch.complex128
    assert promote(a=torch.ones(1))[0].dtype == torch.float32


# --- bad calls

good = random_system(3, 0)
nan = torch.full((3,), math.nan, dtype=torch.float64)
times = torch.ones(2)
BAD = [
    (TypeError, "system: ", lambda: impulse_response(tuple(good), times)),
    (TypeError, "system: ", lambda: change_basis([good.A, good.B], torch.eye(3))),
    (TypeError, "A: ", lambda: impulse_response(SSM([[1.0]], good.B, good.C), times)),
    (TypeError, "A: ", lambda: impulse_response(good._replace(A=torch.eye(3).int()), times)),
    (TypeError, "A: ", lambda: impulse_response(SSM(*(x.half() for x in good[:3])), times)),
    (ValueError, "A: ", lambda: impulse_response(good._replace(A=torch.ones(3, 2)), times)),
    (ValueError, "A: ", lambda: impulse_response(good._replace(A=good.A[None]), times)),
    (ValueError, "B: ", lambda: impulse_response(good._replace(B=torch.ones(2)), times)),
    (ValueError, "B: ", lambda: impulse_response(good._replace(B=nan), times)),
    (ValueError, "C: ", lambda: impulse_response(good._replace(C=torch.ones(3, 1)), times)),
    (ValueError, "D: ", lambda: impulse_response(good._replace(D=math.inf), times)),
    (ValueError, "D: ", lambda: change_basis(good._replace(D=torch.ones(1)), torch.eye(3))),
    (TypeError, "t: ", lambda: impulse_response(good, 1.0)),
    (TypeError, "t: ", lambda: impulse_response(good, torch.ones(2) + 0j)),
    (TypeError, "t: ", lambda: impulse_response(good, torch.arange(3))),
    (ValueError, "t: ", lambda: impulse_response(good, torch.tensor(1.0))),
    (ValueError, "t: ", lambda: impulse_response(good, torch.ones(0))),
    (ValueError, "t: ", lambda: impulse_response(good, torch.tensor([1.0, -0.5]))),
    (ValueError, "t: ", lambda: impulse_response(good, nan)),
    (TypeError, "V: ", lambda: change_basis(good, [[1.0]])),
    (ValueError, "V: ", lambda: change_basis(good, torch.eye(2))),
    (ValueError, "V: ", lambda: change_basis(good, torch.ones(3, 3))),
    (TypeError, "V: ", lambda: change_basis(good, torch.eye(3, dtype=torch.bfloat16))),
    (TypeError, "M: ", lambda: expm(1.0)),
    (TypeError, "M: ", lambda: expm(torch.eye(2).half())),
    (ValueError, "M: ", lambda: expm(torch.ones(2, 3))),
    (ValueError, "M: ", lambda: expm(torch.full((2, 2), math.inf))),
    (TypeError, "z: ", lambda: response(good.A, good.B, 1j)),
    (ValueError, "z: ", lambda: response(good.A, good.B, torch.ones(()))),
    (ValueError, "z: ", lambda: response(torch.eye(3), torch.ones(3), torch.ones(2))),
    (ValueError, "A: ", lambda: response(good.A[:2], good.B, torch.ones(2))),
    (ValueError, "B: ", lambda: response(good.A, good.B[:2], torch.ones(2))),
    (TypeError, "a: ", lambda: promote(a=torch.ones(1).bfloat16())),
    (TypeError, "a: ", lambda: promote(a=torch.arange(3))),
    (TypeError, "a: ", lambda: promote(a=1.0)),
]


@pytest.mark.parametrize(("error", "start", "call"), BAD)
def test_bad_call(error, start, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(start)
