"""The generating function, its nodes, and the cut to L terms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.generating import roots, truncated_C


def system(N, seed=0, scale=0.9):
    """Return a random A_bar with spectral radius about scale, B_bar, C."""
    generator = torch.Generator().manual_seed(seed)
    A, B, C = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((N, N), (N,), (N,))
    )
    return scale * A / torch.linalg.matrix_norm(A, 2), B, C


def powers(A, B, C, L):
    K, x = [], B
    for _ in range(L):
        K.append(C @ x)
        x = A @ x
    return torch.stack(K)


@settings(deadline=None, max_examples=20)
@given(N=st.integers(1, 6), L=st.integers(1, 40), weight=st.floats(0.01, 1.0))
def test_the_resolvent_on_a_circle_is_the_fft_of_the_kernel(N, L, weight):
    """C~ (I - z A)^-1 B at z = rho omega is the FFT of rho^l K_l, on the unit circle too."""
    A, B, C = system(N, seed=L)
    rho = weight ** (1 / L)
    C_tilde = truncated_C(A - torch.eye(N), C, L, weight).to(torch.complex128)
    matrices = torch.eye(N) - rho * roots(L)[:, None, None] * A
    states = torch.linalg.solve(matrices, B.to(matrices).expand(len(matrices), N))
    damped = rho ** torch.arange(L, dtype=torch.float64) * powers(A, B, C, L)
    assert torch.allclose(states @ C_tilde, torch.fft.rfft(damped), atol=1e-11)


@pytest.mark.parametrize("L", [1, 2, 7, 64, 1000, 2**20])
def test_roots_are_roots(L):
    z = roots(L)
    assert z.shape == (L // 2 + 1,)
    assert z[0] == 1
    assert (z.abs() - 1).abs().max() < 1e-15
    angle = -2 * math.pi * (L // 2) / L
    assert abs(z[-1].item() - complex(math.cos(angle), math.sin(angle))) < 1e-15
    assert (roots(L, torch.complex64) - z).abs().max() < 1e-7


@pytest.mark.parametrize("L", [*range(1, 40), 100, 1023, 1024, 1025])
def test_truncated_C_for_every_length(L):
    A, _, C = system(4, scale=0.99)
    eye = torch.eye(4, dtype=torch.float64)
    expected = C @ (eye - torch.linalg.matrix_power(A, L))
    assert torch.allclose(truncated_C(A - eye, C, L), expected, rtol=1e-11, atol=1e-12)


def test_truncated_C_broadcasts():
    A, _, C = system(4)
    E = torch.stack([A, A / 2, A / 3]) - torch.eye(4)  # (3, 4, 4)
    both = torch.stack([C, 2 * C])[:, None]  # (2, 1, 4)
    result = truncated_C(E, both, 21)
    assert result.shape == (2, 3, 4)
    assert torch.allclose(result[1, 2], truncated_C(E[2], 2 * C, 21))


def test_truncated_C_keeps_small_differences():
    E = torch.tensor([[-1e-10]])
    for L in (1, 3, 17, 5000):
        exact = -math.expm1(L * math.log1p(-1e-10))
        assert truncated_C(E, torch.ones(1), L).item() == pytest.approx(exact, rel=1e-6)


def test_truncated_C_has_a_gradient():
    A, _, C = system(3)
    inputs = [(A - torch.eye(3)).requires_grad_(), C.requires_grad_()]
    for L in (1, 16, 37):
        assert torch.autograd.gradcheck(lambda E, C, L=L: truncated_C(E, C, L), inputs)
        assert torch.autograd.gradgradcheck(lambda E, C, L=L: truncated_C(E, C, L), inputs)


A, _, C = system(3)
NAN = torch.full((3,), math.nan)
BAD = [
    (ValueError, "L", lambda: roots(0)),
    (TypeError, "L", lambda: roots("8")),
    (TypeError, "L", lambda: roots(True)),
    (TypeError, "dtype", lambda: roots(8, torch.float64)),
    (TypeError, "E", lambda: truncated_C(None, C, 4)),
    (ValueError, "E", lambda: truncated_C(A[:2], C, 4)),
    (ValueError, "C", lambda: truncated_C(A, C[:2], 4)),
    (ValueError, "C", lambda: truncated_C(A, NAN, 4)),
    (ValueError, "L", lambda: truncated_C(A, C, -1)),
    (TypeError, "L", lambda: truncated_C(A, C, 4.0)),
    (ValueError, "weight", lambda: truncated_C(A, C, 4, 1.5)),
    (ValueError, "weight", lambda: truncated_C(A, C, 4, 0.0)),
    (ValueError, "E, C", lambda: truncated_C(A.expand(2, 3, 3), C.expand(5, 3), 4)),
]


@pytest.mark.parametrize(("error", "name", "call"), BAD)
def test_bad_calls(error, name, call):
    with pytest.raises(error, match=f"^{name}: "):
        call()
