"""Diagonal systems: against dense matrices and the direct sum, in chunks, and called wrongly."""

import math

import pytest
import torch
from helpers import TOLERANCE, relative, signal
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.convolve import causal_conv, krylov_kernel, scan
from s4mini.diagonal import (
    _phi,
    _tables,
    power_sums,
    s4d_final_state,
    s4d_init,
    s4d_kernel,
    s4d_response,
    s4d_step,
)
from s4mini.discretization import discretize
from s4mini.lowrank import nplr, real_form
from s4mini.projection import hippo

INITS, METHODS = ("legs", "lin", "inv", "real"), ("zoh", "bilinear")
WIDE = torch.complex128


def complex_normal(*shape, seed=0, dtype=WIDE):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=WIDE, generator=g).to(dtype)


def dense(Lambda, B, C, dt, method):
    """Return the sampled system in real coordinates, in double precision."""
    Lambda, B, C = (v.to(WIDE) for v in (Lambda, B, C))
    A, B, C = real_form(Lambda, torch.zeros_like(B)[..., None], B, C)
    return *discretize(A, B, float(dt), method), C


def stepwise(Lambda, B, C, dt, u, x, method):
    y = []
    for u_k in u.unbind(-1):
        y_k, x = s4d_step(Lambda, B, C, dt, u_k, x, method)
        y.append(y_k)
    return torch.stack(y, -1), x


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("N", [2, 8, 64])
def test_initialisations(init, N):
    Lambda, B = s4d_init(init, N)
    assert Lambda.shape == B.shape == (N // 2,)
    assert Lambda.dtype == B.dtype == WIDE
    assert (Lambda.real < 0).all() and (Lambda.imag >= 0).all()
    n = torch.arange(N // 2)
    if init == "legs":
        whole = nplr("legs", N)
        assert torch.equal(Lambda, whole.Lambda[N // 2 :])
        assert torch.equal(B, whole.B[N // 2 :])
    elif init == "real":
        assert torch.equal(Lambda.real, -(n + 1.0).double())
        assert (Lambda.imag == 0).all()
    else:
        assert (Lambda.real == -0.5).all() and (B == 1).all()
        law = math.pi * n if init == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
        assert (Lambda.imag - law).abs().max() < 1e-4 * (1 + law.max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("L", [1, 2, 33, 130])
def test_every_mode_against_dense(method, init, dtype, L):
    kind = dtype.to_complex()
    Lambda, B = (v.to(kind) for v in s4d_init(init, 16))
    C, x0 = complex_normal(2, 8, dtype=kind)
    u, dt = signal(L, dtype=dtype), 0.03
    start = torch.cat((x0.real, x0.imag)).double()
    system = dense(Lambda, B, C, torch.tensor(dt, dtype=dtype), method)
    y, x = scan(*system, u.double(), start)
    x = torch.complex(*x.chunk(2))
    y_steps, x_steps = stepwise(Lambda, B, C, dt, u, x0, method)
    y_chunk = causal_conv(u, s4d_kernel(Lambda, B, C, dt, L, method))
    y_chunk = y_chunk + s4d_response(Lambda, C, dt, x0, L, method)
    x_chunk = s4d_final_state(Lambda, B, dt, u, x0, method=method)
    assert y_steps.dtype == y_chunk.dtype == dtype
    assert x_steps.dtype == x_chunk.dtype == kind
    for found, truth in ((y_steps, y), (y_chunk, y), (x_steps, x), (x_chunk, x)):
        assert relative(found, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("L", [1, 2, 15, 16, 1000, 16384])
def test_single_precision(method, init, L):
    """Below 2e-6 of the largest entry, for all sizes, steps and lengths."""
    for N in (4, 16, 64):
        Lambda, B = (v.to(torch.complex64) for v in s4d_init(init, N))
        C = complex_normal(4, N // 2, seed=N, dtype=torch.complex64)
        for dt in torch.tensor([1e-4, 1e-3, 1e-2, 1e-1]):
            K = s4d_kernel(Lambda, B, C, dt, L, method)
            wide = (v.to(WIDE) for v in (Lambda, B, C))
            assert relative(K, s4d_kernel(*wide, dt.double(), L, method)) < 2e-6


def test_a_slow_mode_keeps_its_phase():
    """The reference has each power from an exponential of its own."""
    lam, one = torch.tensor([-1e-6 + 3.7j]), torch.ones(1, dtype=torch.complex64)
    dt, L = torch.tensor(0.1), 50_000
    z = dt.double() * lam.to(WIDE)
    phase = (torch.expm1(z) / lam).angle()
    truth = 2 * (z * torch.arange(L) + 1j * phase).exp().real * (torch.expm1(z) / lam).abs()
    assert relative(s4d_kernel(lam, one, one, dt, L), truth) < 1e-6


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 9), L=st.integers(1, 400), h=st.integers(1, 4), seed=st.integers(0, 99))
def test_tables_against_direct_sum(n, L, h, seed):
    w, s = complex_normal(2, h, n, seed=seed)
    s = torch.complex(-s.real.abs() / 20, s.imag)
    powers = (s[..., None] * torch.arange(L)).exp()
    truth = (w[..., None] * powers).sum(-2).real
    scale = (w[..., None] * powers).abs().sum(-2).max()
    assert (power_sums(w, s, L) - truth).abs().max() < 1e-12 * scale


@pytest.mark.parametrize("L", [1, 2, 5, 16, 17])
def test_gradients(L):
    w, s = complex_normal(2, 3, 4)
    s = torch.complex(-s.real.abs(), s.imag)
    inputs = [v.requires_grad_() for v in (w, s)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda w, s: power_sums(w, s, L), inputs)
    x0 = complex_normal(4, seed=3).requires_grad_()
    u = signal(2, L).requires_grad_()
    dt = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    Lambda, B = (v.clone().requires_grad_() for v in s4d_init("lin", 8))
    for method in METHODS:

        def state(f, B, dt, u, x0, method=method):
            Lambda = torch.complex(f.new_full((4,), -0.5), f)
            return s4d_final_state(Lambda, B, dt, u, x0, method=method)

        f = Lambda.imag.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(state, (f, B, dt, u, x0))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_at_special_values(method):
    """At z = 0, where the quotient has no value, and z = -2, where A_bar = 0."""
    C = complex_normal(1, seed=2)
    for value in (0.0, -2.0, -1e-9, -1e-4, -1.0001e-3):
        a = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        f = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        if value == 0.0:  # only the frequency may move: a positive real part is refused
            a = a.detach()
        moving = [v for v in (a, f) if v.requires_grad]

        def kernel(*moved, a=a):
            a, f = moved if len(moved) == 2 else (a, moved[0])
            return s4d_kernel(torch.complex(a, f), torch.ones(1), C, 1.0, 5, method)

        K = kernel(*moving)
        K.sum().backward()
        assert all(v.grad.isfinite().all() for v in moving)
        if value == 0.0 or value < -1e-5:
            assert torch.autograd.gradcheck(kernel, moving)
            assert torch.autograd.gradgradcheck(kernel, moving)


@pytest.mark.parametrize("L", [1, 2, 3, 17])
def test_second_derivatives_where_a_mode_forgets_at_once(L):
    """At z = -2 the bilinear A_bar is zero and has no logarithm; the powers are smooth."""
    decay = torch.tensor([-4.0, -1.0], dtype=torch.float64, requires_grad=True)
    dt = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    B, C, x0 = complex_normal(3, 2).unbind()
    u = signal(2, 1, L).requires_grad_()
    lengths = torch.tensor([L, (L + 1) // 2])[:, None]

    def system(decay):
        return torch.complex(decay, torch.zeros_like(decay))

    def kernel(decay, dt):
        return s4d_kernel(system(decay), B, C, dt, L, "bilinear")

    def response(decay, dt):
        return s4d_response(system(decay), C, dt, x0, L, "bilinear")

    def state(decay, dt, u):
        return s4d_final_state(system(decay), B, dt, u, x0, lengths, "bilinear")

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(kernel, (decay, dt)) and check(response, (decay, dt))
        assert check(state, (decay, dt, u))


def test_phi():
    mpmath = pytest.importorskip("mpmath")
    for value in (0j, 1e-12 + 1e-9j, -9.9e-4 + 1e-5j, 1e-3j, -1.1e-3 + 0j, -0.05 + 130j, -800 + 3j):
        z = torch.tensor(value, dtype=WIDE)
        with mpmath.workdps(40):
            truth = mpmath.expm1(value) / mpmath.mpc(value) if value else mpmath.mpf(1)
        assert abs(complex(_phi(z)) - complex(truth)) < 4e-16 * abs(complex(truth)) + 1e-17


def test_zero_decay():
    """Undamped modes are allowed, and a mode at zero is an integrator."""
    zero, one = torch.zeros(1, dtype=WIDE), torch.ones(1, dtype=WIDE)
    for method in METHODS:
        K = s4d_kernel(zero, one, one, 0.25, 40, method)
        assert torch.allclose(K, torch.full_like(K, 0.5), atol=1e-15)
        K = s4d_kernel(zero + 2j, one, one, 0.25, 4000, method)
        assert abs(K[2000:].abs().max() / K[:2000].abs().max() - 1) < 1e-3


@pytest.mark.parametrize("N", [4, 32, 128])
def test_the_limit_theorem(N):
    """G_norm = G / (2 - b), and the modulus of 1 - b, in the original coordinates."""
    A, B = hippo("legs", N)
    for Omega in (0.2, 5.0, 60.0):
        M = 1j * Omega * torch.eye(N, dtype=WIDE) - A
        G = torch.linalg.solve(M, B.to(M))
        G_norm = torch.linalg.solve(M - torch.outer(B, B) / 2, B.to(M) / 2)
        b = B.to(G) @ G
        assert abs((1 - b).abs() - Omega / math.hypot(Omega, N)) < 1e-11
        assert relative(G_norm * (2 - b), G) < 1e-10


def test_the_diagonal_system_follows_legs():
    """For a slow input the coefficients agree, and the more the larger N."""
    t = torch.arange(800, dtype=torch.float64) / 100
    u, errors = torch.sin(t) + torch.cos(2 * t), []
    for N in (32, 128):
        A_bar, B_bar = discretize(*hippo("legs", N), 0.01)
        C = torch.zeros(N, dtype=torch.float64)
        C[2] = 1
        truth = causal_conv(u, krylov_kernel(A_bar, B_bar, C, 800))
        Lambda, B = s4d_init("legs", N)
        V = nplr("legs", N).V[:, N // 2 :]
        K = s4d_kernel(Lambda, B / 2, V[2], 0.01, 800, "bilinear")
        errors.append(relative(causal_conv(u, K)[400:], truth[400:]))
    assert errors[0] < 0.1 and errors[1] < 0.35 * errors[0]


@settings(deadline=None, max_examples=20)
@given(data=st.data(), L=st.integers(1, 70), method=st.sampled_from(METHODS))
def test_lengths_and_chunks(data, L, method):
    """Each sequence stops at its own length; any cut gives the same state and output."""
    lengths = torch.tensor([data.draw(st.integers(1, L)) for _ in range(3)])
    Lambda, B = s4d_init("inv", 8)
    dt = torch.tensor([0.01, 0.2], dtype=torch.float64)  # two channels
    u, x0 = signal(3, 2, L), complex_normal(3, 2, 4)
    x = s4d_final_state(Lambda, B, dt, u, x0, lengths[:, None], method)
    assert x.shape == (3, 2, 4)
    for i, n in enumerate(lengths):
        alone = s4d_final_state(Lambda, B, dt, u[i, :, :n], x0[i], method=method)
        assert relative(x[i], alone) < 1e-11
    cut = int(lengths[0])
    state = s4d_final_state(Lambda, B, dt, u[..., :cut], x0, method=method)
    if cut < L:
        state = s4d_final_state(Lambda, B, dt, u[..., cut:], state, method=method)
    assert relative(state, s4d_final_state(Lambda, B, dt, u, x0, method=method)) < 1e-11


def test_memory_kept():
    """Between the passes the short tables are kept, not the n L powers."""
    kept = {}

    def pack(v):
        kept[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    w, s = complex_normal(2, 16, 32)
    s = torch.complex(-s.real.abs(), s.imag)
    inputs = w.to(torch.complex64).requires_grad_(), s.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        power_sums(*inputs, 4096)
    columns = sum(kept.values()) / (16 * 32 * 8)  # of single precision
    assert columns < 10 * (64 + 64) < 4096 / 3
    inner, outer = _tables(s, 4096, WIDE)
    assert inner.shape[-1] == outer.shape[-1] == 64


def test_function_transforms():
    """vmap of grad, and jacrev, agree with a loop over autograd."""
    w, s = complex_normal(2, 5, 4)
    s = torch.complex(-s.real.abs(), s.imag)

    def loss(f, w, s):
        return power_sums(w, torch.complex(s.real, f), 9).square().sum()

    slopes = torch.func.vmap(torch.func.grad(loss))(s.imag, w, s)
    for slope, *row in zip(slopes, w, s, strict=True):
        leaf = row[1].imag.clone().requires_grad_()
        assert relative(slope, torch.autograd.grad(loss(leaf, *row), leaf)[0]) < 1e-12
    jacobian = torch.func.jacrev(lambda f: power_sums(w[0], torch.complex(s[0].real, f), 9))
    assert jacobian(s[0].imag).shape == (9, 4)


def test_broadcasting_and_autocast():
    Lambda, B = s4d_init("legs", 8)
    C, dt = complex_normal(2, 3, 4), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    K = s4d_kernel(Lambda, B, C, dt, 20)
    assert K.shape == (2, 3, 20)
    for i in range(2):
        for j in range(3):
            assert relative(K[i, j], s4d_kernel(Lambda, B, C[i, j], float(dt[j]), 20)) < 1e-13
    low = [v.to(torch.complex64) for v in (Lambda, B, C)]
    plain = s4d_kernel(*low, 0.1, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(s4d_kernel(*low, 0.1, 20), plain)


LAMBDA, ONE = s4d_init("legs", 8)
U, X = signal(2, 6), complex_normal(2, 4)
KERNEL = {"Lambda": LAMBDA, "B": ONE, "C": ONE, "dt": 0.1, "L": 6}
STEP = {"Lambda": LAMBDA, "B": ONE, "C": ONE, "dt": 0.1, "u": U[:, 0], "x": X}
RESPONSE = {"Lambda": LAMBDA, "C": ONE, "dt": 0.1, "x": X, "L": 6}
FINAL = {"Lambda": LAMBDA, "B": ONE, "dt": 0.1, "u": U, "x0": X}
CALLS = [(s4d_kernel, KERNEL), (s4d_step, STEP), (s4d_response, RESPONSE), (s4d_final_state, FINAL)]
BAD = [
    (TypeError, "Lambda", {"Lambda": [1.0]}),
    (ValueError, "Lambda", {"Lambda": LAMBDA * float("nan")}),
    (ValueError, "Lambda", {"Lambda": LAMBDA + 1}),
    (ValueError, "dt", {"dt": 0.0}),
    (ValueError, "dt", {"dt": torch.tensor([0.1, -0.1])}),
    (TypeError, "dt", {"dt": "1"}),
    (ValueError, "method", {"method": "euler"}),
    (ValueError, "Lambda, .*dt.*", {"dt": torch.ones(3), "Lambda": LAMBDA.expand(2, 4)}),
    (ValueError, "B", {"B": ONE[:3]}),
    (ValueError, "C", {"C": ONE[:3]}),
    (TypeError, "C", {"C": 1.0}),
    (ValueError, "L", {"L": 0}),
    (TypeError, "L", {"L": 2.0}),
    (TypeError, "u", {"u": U + 0j}),
    (ValueError, "u", {"u": U * float("inf")}),
    (ValueError, "x", {"x": X[:, :3]}),
    (ValueError, "x0", {"x0": X[:, :3]}),
    (TypeError, "x", {"x": None}),
]

CASES = [
    (function, good, *case)
    for function, good in CALLS
    for case in BAD
    if case[2].keys() <= good.keys() | {"method"}
]


@pytest.mark.parametrize(("function", "good", "error", "name", "changed"), CASES)
def test_bad_calls(function, good, error, name, changed):
    function(**good)
    with pytest.raises(error, match=f"^{name}: "):
        function(**good | changed)


def test_bad_lengths_and_inits():
    for error, bad in (
        (ValueError, torch.tensor([7, 1])),
        (ValueError, torch.tensor([0, 1])),
        (TypeError, torch.tensor([1.0, 2.0])),
        (TypeError, [1, 2]),
    ):
        with pytest.raises(error, match=r"^lengths: "):
            s4d_final_state(**FINAL, lengths=bad)
    with pytest.raises(ValueError, match=r"^init: expected one of 'legs', 'lin', 'inv', 'real'"):
        s4d_init("legz", 8)
    with pytest.raises(ValueError, match=r"^N: "):
        s4d_init("lin", 7)
    with pytest.raises(TypeError, match=r"^N: "):
        s4d_init("lin", 8.0)
