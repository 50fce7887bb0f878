"""Discretisation: orders, stability, batches, the gate."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.discretization import discretize, gbt, zoh

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
METHODS = ["euler", "backward_euler", "bilinear", "zoh", 0.7]
few = settings(deadline=None, max_examples=20)


def random_pair(N, seed, dtype=torch.float64, batch=()):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, N, N, generator=generator, dtype=dtype) / N**0.5
    B = torch.randn(*batch, N, generator=generator, dtype=dtype)
    return A - 2 * torch.eye(N, dtype=dtype), B


def test_names_are_weights():
    A, B = random_pair(4, 0)
    for name, alpha in {"euler": 0, "backward_euler": 1.0, "bilinear": 0.5}.items():
        for one, other in zip(discretize(A, B, 0.1, name), gbt(A, B, 0.1, alpha), strict=True):
            assert torch.allclose(one, other, rtol=1e-14)
    for one, other in zip(discretize(A, B, 0.1), gbt(A, B, 0.1, 0.5), strict=True):
        assert torch.allclose(one, other, rtol=1e-14)


@few
@given(N=st.integers(1, 8), seed=st.integers(0, 10**6), alpha=st.floats(0, 1))
def test_gbt_solves_its_defining_equation(N, seed, alpha):
    A, B = random_pair(N, seed)
    dt, eye = 0.3, torch.eye(N, dtype=torch.float64)
    A_bar, B_bar = gbt(A, B, dt, alpha)
    left = eye - alpha * dt * A
    assert torch.allclose(left @ A_bar, eye + (1 - alpha) * dt * A, rtol=0, atol=1e-12)
    assert torch.allclose(left @ B_bar, dt * B, rtol=0, atol=1e-12)


@few
@given(N=st.integers(1, 8), seed=st.integers(0, 10**6), dt=st.floats(1e-4, 10))
def test_zoh_is_the_exponential_and_its_integral(N, seed, dt):
    A, B = random_pair(N, seed, torch.complex128)
    A_bar, B_bar = zoh(A, B, dt)
    E = scipy.linalg.expm(dt * A.numpy())
    F = np.linalg.solve(A.numpy(), (E - np.eye(N)) @ B.numpy())
    assert np.abs(A_bar.numpy() - E).max() < 1e-12 * max(1, np.abs(E).max())
    assert np.abs(B_bar.numpy() - F).max() < 1e-11 * max(1, np.abs(F).max())


def test_zoh_of_a_singular_matrix():
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)  # a double integrator
    A_bar, B_bar = zoh(A, torch.tensor([0.0, 1.0], dtype=torch.float64), 0.5)
    expected = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(A_bar, expected, rtol=0, atol=1e-15)
    assert torch.allclose(B_bar, torch.tensor([0.125, 0.5], dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("dt", [1e-6, 1e-4, 1e-3, 1e-2, 0.1])
def test_zoh_does_not_cancel_in_single_precision(dt):
    _, B_bar = zoh(torch.tensor([[-0.5]]), torch.ones(1), dt)
    assert abs(B_bar.item() / (math.expm1(-0.5 * dt) / -0.5) - 1) < 3e-7


@pytest.mark.parametrize("method", METHODS)
def test_a_hold_is_a_state(method):
    """Every rule treats a held input as one more state, at rest."""
    A, B = random_pair(4, 8, torch.complex128)
    M = torch.zeros(5, 5, dtype=A.dtype)
    M[:4, :4], M[:4, 4] = A, B
    A_bar, B_bar = discretize(A, B, 0.3, method)
    block, _ = discretize(M, torch.zeros(5), 0.3, method)
    assert torch.allclose(block[:4, :4], A_bar, rtol=0, atol=1e-13)
    assert torch.allclose(block[:4, 4], B_bar, rtol=0, atol=1e-13)
    assert torch.allclose(block[4], torch.eye(5, dtype=A.dtype)[4], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("backward_euler", 1), (0.7, 1), (0.5, 2)]
)
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_order_of_the_whole_step(method, order, u):
    """The state after a time of 1, from a start and a held input."""
    A, B = random_pair(5, 7)
    counts = np.array([64, 128, 256])

    def run(n, method):
        A_bar, B_bar = discretize(A, B, 1 / n, method)
        x = torch.ones(5, dtype=A.dtype) * (1 - u)
        for _ in range(n):
            x = A_bar @ x + B_bar * u
        return x

    exact = run(64, "zoh")
    assert (run(128, "zoh") - exact).abs().max() < 1e-13
    errors = [(run(n, method) - exact).abs().max().item() for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.1


@few
@given(
    real=st.floats(-1e3, -1e-3),
    imag=st.floats(-1e3, 1e3),
    dt=st.floats(1e-3, 1e2),
    alpha=st.floats(0.5, 1),
)
def test_stable_stays_stable(real, imag, dt, alpha):
    A = torch.tensor([[complex(real, imag)]], dtype=torch.complex128)
    B = torch.ones(1, dtype=torch.complex128)
    assert gbt(A, B, dt, alpha)[0].abs().item() < 1
    assert zoh(A, B, dt)[0].abs().item() < 1


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_the_single_calls(method):
    A, B = random_pair(3, 1, batch=(4, 1))
    B = B.expand(4, 5, 3)
    dt = torch.rand(5, generator=torch.Generator().manual_seed(0)) + 0.05
    A_bar, B_bar = discretize(A, B, dt, method)
    assert A_bar.shape == (4, 5, 3, 3) and B_bar.shape == (4, 5, 3)
    for i in range(4):
        for j in range(5):
            one = discretize(A[i, 0], B[i, j], dt[j].item(), method)
            assert torch.allclose(A_bar[i, j], one[0], rtol=1e-12)
            assert torch.allclose(B_bar[i, j], one[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_batch_axes_may_come_from_any_argument(method):
    A, B = random_pair(3, 2)
    for a, b, dt in [(A, B, torch.ones(2)), (A.expand(2, 3, 3), B, 1.0), (A, B.expand(2, 3), 1.0)]:
        A_bar, B_bar = discretize(a, b, dt, method)
        assert A_bar.shape == (2, 3, 3) and B_bar.shape == (2, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_is_that_of_the_matrices(dtype, method):
    A, B = random_pair(3, 3, dtype)
    for dt in (0.1, 1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)):
        A_bar, B_bar = discretize(A, B, dt, method)
        assert A_bar.dtype == B_bar.dtype == dtype
    assert discretize(A, B.to(torch.complex128), 0.1, method)[0].dtype == torch.complex128


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    A, B = random_pair(3, 4, torch.complex128)
    dt = torch.tensor([0.1, 0.5], dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (A, B, dt)]
    assert torch.autograd.gradcheck(lambda *a: discretize(*a, method), inputs)


def test_only_the_product_with_the_step_matters():
    A, B = random_pair(4, 5)
    for method in METHODS:
        for one, other in zip(
            discretize(A, B, 0.5, method), discretize(A / 4, B / 4, 2.0, method), strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-13)


@few
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.integers(0, 10**6))
def test_a_gated_recurrence_is_backward_euler_with_steps_exp_z(gates, seed):
    z = torch.tensor(gates, dtype=torch.float64)
    u = torch.randn(len(z), generator=torch.Generator().manual_seed(seed)).double()
    A, B = -torch.ones(1, 1).double(), torch.ones(1).double()
    A_bar, B_bar = discretize(A, B, torch.exp(z), "backward_euler")
    gated = ours = torch.zeros(1, dtype=torch.float64)
    for k in range(len(z)):
        gated = torch.sigmoid(-z[k]) * gated + torch.sigmoid(z[k]) * u[k]
        ours = A_bar[k] @ ours + B_bar[k] * u[k]
    assert torch.allclose(gated, ours, rtol=1e-12, atol=1e-14)


# --- bad calls

A, B = random_pair(3, 0)
eye, one = torch.eye(2), torch.ones(2)
BAD = [
    (TypeError, "A: ", lambda: discretize([[1.0]], B, 0.1)),
    (TypeError, "A: ", lambda: zoh(torch.eye(3).int(), B, 0.1)),
    (TypeError, "A: ", lambda: gbt(A.half(), B.half(), 0.1, 0.5)),
    (ValueError, "A: ", lambda: discretize(A[:2], B, 0.1)),
    (ValueError, "A: ", lambda: discretize(A * math.nan, B, 0.1)),
    (ValueError, "A: ", lambda: discretize(torch.ones(0, 0), torch.ones(0), 0.1)),
    (TypeError, "B: ", lambda: discretize(A, 1.0, 0.1)),
    (ValueError, "B: ", lambda: discretize(A, B[:2], 0.1)),
    (ValueError, "B: ", lambda: discretize(A, B[:, None], 0.1)),
    (ValueError, "dt: ", lambda: discretize(A, B, 0.0)),
    (ValueError, "dt: ", lambda: discretize(A, B, -1)),
    (ValueError, "dt: ", lambda: zoh(A, B, math.nan)),
    (ValueError, "dt: ", lambda: gbt(A, B, math.inf, 0.5)),
    (ValueError, "dt: ", lambda: discretize(A, B, torch.tensor([0.1, 0.0]))),
    (TypeError, "dt: ", lambda: discretize(A, B, "0.1")),
    (TypeError, "dt: ", lambda: discretize(A, B, True)),
    (TypeError, "dt: ", lambda: discretize(A, B, torch.tensor(1))),
    (TypeError, "dt: ", lambda: discretize(A, B, torch.tensor(1j))),
    (ValueError, "dt: ", lambda: discretize(A.expand(2, 3, 3), B, torch.ones(5))),
    (ValueError, "dt: ", lambda: discretize(A.expand(2, 3, 3), B.expand(4, 3), 0.1)),
    (ValueError, "dt: ", lambda: discretize(2 * eye, one, 1.0)),
    (ValueError, "dt: ", lambda: gbt(eye, one, torch.tensor([0.5, 1.0]), 1.0)),
    (ValueError, "method: ", lambda: discretize(A, B, 0.1, "trapezoid")),
    (ValueError, "method: ", lambda: discretize(A, B, 0.1, 1.5)),
    (ValueError, "method: ", lambda: discretize(A, B, 0.1, math.nan)),
    (TypeError, "method: ", lambda: discretize(A, B, 0.1, None)),
    (TypeError, "method: ", lambda: discretize(A, B, 0.1, True)),
    (ValueError, "alpha: ", lambda: gbt(A, B, 0.1, -0.1)),
    (TypeError, "alpha: ", lambda: gbt(A, B, 0.1, "bilinear")),
]


@pytest.mark.parametrize(("error", "start", "call"), BAD)
def test_bad_call(error, start, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(start)


def test_an_unknown_method_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"'euler', 'backward_euler', 'bilinear', 'zoh'"):
        discretize(A, B, 0.1, "exact")
