"""The HiPPO matrix and the reading of its state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.projection import MEASURES, domain, fourier, hippo, laguerre, legendre, reconstruct
from s4mini.ssm import expm, response


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
    assert torch.allclose(A.diagonal(), -torch.arange(1, N + 1, dtype=A.dtype), rtol=1e-15)
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


@pytest.mark.parametrize("N", [1, 4, 12])
@pytest.mark.parametrize("clock", ["log t", "t", "3 log t", "t + log t", "log(exp t - 1)"])
def test_legs_runs_on_any_clock(N, clock):
    """x' = a'(t) (A x + B u), by central differences of quadrature in sigma."""
    nodes, weights = quadrature(80)
    sigma, t, h = (nodes + 1) / 2, 2.0, 1e-4

    def moment(t):  # the time s of each sigma = e^{a(s) - a(t)}
        match clock:
            case "log t":
                return t * sigma, 1 / t
            case "t":
                return t + sigma.log(), 1.0
            case "3 log t":
                return t * sigma ** (1 / 3), 3 / t
            case "log(exp t - 1)":
                return (1 + sigma * math.expm1(t)).log(), math.exp(t) / math.expm1(t)
            case _:  # s e^s = sigma t e^t, by Newton's method
                target = sigma * t * math.exp(t)
                s = torch.full_like(sigma, t)
                for _ in range(60):
                    s = s - (s - target * torch.exp(-s)) / (1 + s)
                return s, 1 + 1 / t

    def coefficients(t):
        u = torch.exp(-((moment(t)[0] - 1.5) ** 2))
        return norms(N) * (legendre(N, nodes) @ (weights * u))

    slope = (coefficients(t + h) - coefficients(t - h)) / (2 * h)
    A, B = hippo("legs", N)
    right = moment(t)[1] * (A @ coefficients(t) + B * math.exp(-0.25))
    assert (slope - right).abs().max() < (1e-4 if clock == "3 log t" else 1e-6)


@pytest.mark.parametrize("N", [1, 2, 7, 64])
def test_gradient_of_legs_is_between_one_and_n_over_t(N):
    xi = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    size = (norms(N)[:, None] * legendre(N, xi)).norm(dim=0)
    assert size.min() >= 1 and size.max() <= N * (1 + 1e-12)
    assert torch.allclose(size[[0, -1]], torch.full((2,), float(N), dtype=xi.dtype))


@pytest.mark.parametrize("N", [2, 3, 4])
def test_legt_delays_with_the_order_of_the_pade_approximation(N):
    A, B = hippo("legt", N)
    b = B * (-1.0) ** torch.arange(N)
    z = torch.tensor([0.4j, 0.2j], dtype=torch.complex128)
    delay = response(A, B, z) @ b.to(z.dtype)
    first, second = (delay - torch.exp(-z)).abs().tolist()
    assert abs(math.log2(first / second) - 2 * N) < 0.3


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


# The other measures.


def functions(measure, N, r):
    """What the state is meant to hold the input against, at ages r."""
    if measure == "legt":
        return norms(N)[:, None] * legendre(N, 1 - 2 * r)
    return laguerre(N, r) if measure == "lagt" else fourier(N, r)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [1, 2, 3, 64, 1024])
def test_every_size_and_measure_is_there(measure, N):
    A, B = hippo(measure, N)
    assert A.shape == (N, N) and B.shape == (N,)
    assert A.dtype == B.dtype == torch.float64
    assert A.isfinite().all() and B.isfinite().all()
    assert not (torch.signbit(A) & (A == 0)).any()
    A += 1.0  # a fresh tensor, not a shared one
    assert not torch.equal(A, hippo(measure, N)[0])


@pytest.mark.parametrize("N", [1, 2, 5, 33])
def test_legt_is_the_legendre_memory_unit(N):
    A, B = hippo("legt", N)
    n, k = np.arange(N)[:, None], np.arange(N)
    lmu = (2 * n + 1) * np.where(n < k, -1.0, (-1.0) ** (n - k + 1))
    D = ((-1.0) ** n * np.sqrt(2 * n + 1))[:, 0]
    assert np.abs(D[:, None] * A.numpy() / D - lmu).max() < 1e-11
    assert np.abs(D * B.numpy() - ((2 * n + 1) * (-1.0) ** n)[:, 0]).max() < 1e-12


@pytest.mark.parametrize("N", [1, 4, 9])
def test_lagt_entries(N):
    A, B = hippo("lagt", N)
    assert np.array_equal(A.numpy(), np.eye(N) / 2 - np.tril(np.ones((N, N))))
    assert np.array_equal(B.numpy(), np.ones(N))


def test_fout_entries():
    A, B = hippo("fout", 3)
    root, turn = 2 * math.sqrt(2), 2 * math.pi
    expected = [[-2, -root, 0], [-root, -4, -turn], [0, turn, 0]]
    assert torch.allclose(A, torch.tensor(expected, dtype=A.dtype))
    assert torch.allclose(B, torch.tensor([2, root, 0], dtype=B.dtype))
    for N in (4, 10):
        even, odd = hippo("fout", N), hippo("fout", N - 1)
        kept = [i for i in range(N) if i != 1]
        assert torch.allclose(even[0][kept][:, kept], odd[0], rtol=1e-15)
        assert not even[0][1].any() and not even[0][:, 1].any()
        assert even[1][1] == 0 and torch.allclose(even[1][kept], odd[1], rtol=1e-15)


@pytest.mark.parametrize("measure", ["legt", "lagt", "fout"])
@pytest.mark.parametrize("N", [1, 2, 7, 32, 129])
def test_energy_never_grows(measure, N):
    """A + A* + B B* is zero, or minus the square of what leaves LegT's window."""
    A, B = hippo(measure, N)
    rest = A + A.T + torch.outer(B, B)
    if measure == "legt":
        b = B * (-1.0) ** torch.arange(N)
        rest += torch.outer(b, b)
    assert rest.abs().max() < 1e-11 * N**2


@pytest.mark.parametrize("measure", ["legt", "lagt", "fout"])
@pytest.mark.parametrize("N", [1, 2, 5, 12])
def test_functions_are_orthonormal_and_read_what_was_written(measure, N):
    nodes, weights = np.polynomial.legendre.leggauss(120)
    span = 100.0 if measure == "lagt" else 1.0
    r, w = torch.tensor((nodes + 1) / 2 * span), torch.tensor(weights / 2 * span)
    phi = functions(measure, N, r)
    empty = measure == "fout" and N % 2 == 0
    identity = torch.eye(N, dtype=torch.float64)
    if empty:
        identity[1, 1] = 0
    assert ((phi * w) @ phi.T - identity).abs().max() < 1e-8
    t = 200.0
    x = torch.randn(2, N, generator=torch.Generator().manual_seed(N), dtype=torch.float64)
    past = reconstruct(measure, x, t, t - r)
    assert ((past * w) @ phi.T - x @ identity).abs().max() < 1e-8


@pytest.mark.parametrize("N", [2, 5, 8])
def test_windows_keep_what_they_can_read(N):
    """x' = A x + B u holds for the coefficients of polynomials, and of waves."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r, w = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)

    def polynomial(s):
        return sum((s / 3) ** j for j in range(N))

    def wave(s):
        return 0.3 + (N > 2) * torch.cos(2 * math.pi * s + 1)

    for measure, u in (("legt", polynomial), ("fout", wave)):
        k, h = functions(measure, N, r), 1e-4
        before, x, after = ((k * w) @ u(t - r) for t in (2 - h, 2, 2 + h))
        A, B = hippo(measure, N)
        now = u(torch.tensor(2.0, dtype=torch.float64))
        assert ((after - before) / (2 * h) - A @ x - B * now).abs().max() < 1e-5


def test_legt_moments_are_exact_beyond_its_degree():
    N = 5
    A, B = hippo("legt", N)
    nodes, weights = quadrature(20)
    moment = torch.linalg.solve(-A, B)
    for j in range(2 * N - 1):
        truth = functions("legt", N, (nodes + 1) / 2) @ (weights * ((nodes + 1) / 2) ** j)
        good = 2 * N - 1 - j
        assert (moment - truth)[:good].abs().max() < 1e-9
        moment = torch.linalg.solve(-A, (j + 1) * moment)


def test_laguerre_functions():
    special = pytest.importorskip("scipy.special")
    r = torch.tensor([0.0, 0.3, 7.0, 90.0], dtype=torch.float64)
    values = laguerre(40, r)
    for n in range(40):
        expected = special.eval_laguerre(n, r.numpy()) * np.exp(-r.numpy() / 2)
        assert np.abs(values[n].numpy() - expected).max() < 1e-11
    far = laguerre(1024, torch.tensor([1600.0, 1e5], dtype=torch.float64))
    assert far.isfinite().all() and far[-1, 0].abs() > 1e-4 and not far[:, 1].any()
    A, B = hippo("lagt", 1024)  # e^{rA} B at r = 2, by the exponential
    assert (expm(2 * A) @ B - laguerre(1024, 2 * B[:1])[:, 0]).abs().max() < 1e-8
    assert laguerre(3, torch.ones(2, 5)).shape == (3, 2, 5)


@pytest.mark.parametrize("measure", MEASURES)
def test_domain_is_what_reconstruct_accepts(measure):
    first, last = domain(measure, 3.0)
    assert last == 3.0 and first == {"legs": 0, "lagt": -math.inf}.get(measure, 2.0)
    x = torch.ones(4, dtype=torch.float64)
    low = max(first, -50.0)
    assert reconstruct(measure, x, 3.0, torch.linspace(low, last, 9)).isfinite().all()
    with pytest.raises(ValueError, match=r"^s: "):
        reconstruct(measure, x, 3.0, torch.tensor([last + 0.01]))
    if first > -math.inf:
        with pytest.raises(ValueError, match=r"^s: "):
            reconstruct(measure, x, 3.0, torch.tensor([first - 0.01]))


x, s = torch.ones(4), torch.linspace(0, 1, 5)
BAD = [
    (lambda: hippo("legd", 4), ValueError, "measure"),
    (lambda: hippo("lagt", 0), ValueError, "N"),
    (lambda: hippo("fout", 2.0), TypeError, "N"),
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
    (lambda: reconstruct("cheb", x, 1.0, s), ValueError, "measure"),
    (lambda: reconstruct("legt", x, 2.0, s), ValueError, "s"),
    (lambda: reconstruct("fout", x, 1.5, s), ValueError, "s"),
    (lambda: reconstruct("fout", x, 0.9, s), ValueError, "s"),
    (lambda: reconstruct("lagt", x, 0.9, s), ValueError, "s"),
    (lambda: reconstruct("lagt", x, 1.0, s / 0), ValueError, "s"),
    (lambda: domain("cheb", 1.0), ValueError, "measure"),
    (lambda: domain("legt", 0.0), ValueError, "t"),
    (lambda: domain("legt", torch.ones(3)), ValueError, "t"),
    (lambda: domain("legt", None), TypeError, "t"),
    (lambda: laguerre(0, s), ValueError, "N"),
    (lambda: laguerre(3, -1 - s), ValueError, "r"),
    (lambda: laguerre(3, 1.0), TypeError, "r"),
    (lambda: fourier(-1, s), ValueError, "N"),
    (lambda: fourier(3, s * math.inf), ValueError, "r"),
    (lambda: fourier(3, s + 0j), TypeError, "r"),
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
