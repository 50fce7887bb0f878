"""The recurrence: against dense matrices, in chunks, and called wrongly."""

import pytest
import torch
from helpers import TOLERANCE, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.convolve import causal_conv, scan
from s4mini.discretization import discretize
from s4mini.kernel import dplr_kernel
from s4mini.lowrank import half_spectrum, nplr, real_form
from s4mini.projection import hippo
from s4mini.recurrence import (
    advance,
    check_lengths,
    dplr_step,
    final_state,
    in_real,
    increments,
    state_as_input,
    state_response,
    to_half,
    to_real,
)


def system(N, r, dtype=torch.float64, seed=0, batch=()):
    """Return Lambda, P, B, C, x0 of LegS, or of LegS with more random columns in P."""
    g = torch.Generator().manual_seed(seed)
    s = half_spectrum(nplr("legs", N))
    P = torch.randn(*batch, N // 2, r, dtype=s.P.dtype, generator=g)
    P[..., 0] = s.P[:, 0]
    C, x0 = (torch.randn(*batch, N // 2, dtype=s.B.dtype, generator=g) for _ in range(2))
    parts = (s.Lambda.expand(*batch, -1), P, s.B.expand(*batch, -1), C, x0)
    return [v.to(dtype.to_complex()) for v in parts]


def dense(Lambda, P, B, C, x0, dt, u):
    """Run the dense recurrence in double precision, in real coordinates."""
    wide = torch.complex128
    A, B, C = real_form(Lambda.to(wide), P.to(wide), B.to(wide), C.to(wide))
    x = torch.cat((x0.real, x0.imag)).double()
    y, x = scan(*discretize(A, B, dt), C, u.double(), x)
    return y, torch.complex(*x.chunk(2))


def steps(Lambda, P, B, C, x, dt, u):
    y = []
    for u_k in u.unbind(-1):
        y_k, x = dplr_step(Lambda, P, B, C, dt, u_k, x)
        y.append(y_k)
    return torch.stack(y, -1), x


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("N", [2, 64])
@pytest.mark.parametrize("L", [1, 2, 33, 130])
def test_against_dense(dtype, r, N, L):
    Lambda, P, B, C, x0 = system(N, r, dtype)
    dt = 0.03
    u = torch.randn(L, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y, x = dense(Lambda, P, B, C, x0, dt, u)
    y_steps, x_steps = steps(Lambda, P, B, C, x0, dt, u)
    y_chunk = causal_conv(u, dplr_kernel(Lambda, P, B, C, dt, L))
    y_chunk = y_chunk + state_response(Lambda, P, C, dt, x0, L)
    x_chunk = final_state(Lambda, P, B, dt, u, x0)
    assert y_steps.dtype == y_chunk.dtype == dtype
    assert x_steps.dtype == x_chunk.dtype == dtype.to_complex()
    for found, truth in ((y_steps, y), (y_chunk, y), (x_steps, x), (x_chunk, x)):
        assert relative(found, truth) < TOLERANCE[dtype]


@settings(deadline=None, max_examples=15)
@given(data=st.data(), L=st.integers(1, 70), N=st.sampled_from([2, 6, 16]))
def test_lengths_and_chunks(data, L, N):
    """Each sequence stops at its own length; any cut gives the same state."""
    batch = 3
    Lambda, P, B, C, _ = system(N, 1)
    g = torch.Generator().manual_seed(L)
    u = torch.randn(batch, L, dtype=torch.float64, generator=g)
    x0 = torch.randn(batch, N // 2, dtype=torch.complex128, generator=g)
    lengths = torch.tensor([data.draw(st.integers(1, L)) for _ in range(batch)])
    x = final_state(Lambda, P, B, 0.1, u, x0, lengths)
    for i, length in enumerate(lengths):
        _, truth = steps(Lambda, P, B, C, x0[i], 0.1, u[i, :length])
        assert relative(x[i], truth) < 1e-11
    cut = data.draw(st.integers(0, L - 1))
    state = final_state(Lambda, P, B, 0.1, u[:, :cut], x0) if cut else x0
    state = final_state(Lambda, P, B, 0.1, u[:, cut:], state)
    assert relative(state, final_state(Lambda, P, B, 0.1, u, x0)) < 1e-11


def test_padding_does_not_matter():
    Lambda, P, B, _, x0 = system(8, 1)
    u = torch.randn(2, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([20, 11])
    other = u.clone()
    other[1, 11:] = 1e6
    a = final_state(Lambda, P, B, 0.1, u, x0, lengths)
    assert torch.equal(a, final_state(Lambda, P, B, 0.1, other, x0, lengths))


def test_batch_axes_broadcast():
    """H systems and a batch of states, as a layer uses them."""
    H, Bt, L = 3, 2, 12
    Lambda, P, B, C, _ = system(4, 2, batch=(H,))
    g = torch.Generator().manual_seed(0)
    u = torch.randn(Bt, H, L, dtype=torch.float64, generator=g)
    x0 = torch.randn(Bt, H, 2, dtype=torch.complex128, generator=g)
    dt = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    y, x = steps(Lambda, P, B, C, x0, dt, u)
    assert y.shape == (Bt, H, L) and x.shape == (Bt, H, 2)
    for b in range(Bt):
        for h in range(H):
            one = (Lambda[h], P[h], B[h], C[h], x0[b, h], dt[h], u[b, h])
            y_one, x_one = dense(*one)
            assert relative(y[b, h], y_one) < 1e-11
            assert relative(x[b, h], x_one) < 1e-11
    assert relative(final_state(Lambda, P, B, dt, u, x0), x) < 1e-11


def test_gradients():
    Lambda, P, B, C, x0 = (v.requires_grad_() for v in system(4, 2))
    dt = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    u = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u.requires_grad_()

    def step(Lambda, P, B, C, dt, u, x0):
        return dplr_step(Lambda, P, B, C, dt, u[0], x0)

    assert torch.autograd.gradcheck(step, (Lambda, P, B, C, dt, u, x0))
    assert torch.autograd.gradcheck(final_state, (Lambda, P, B, dt, u, x0))


def test_state_is_an_input():
    """One impulse through B' leaves the state of one step of rest."""
    Lambda, P, B, C, x = system(8, 2)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, rest = dplr_step(Lambda, P, B, C, 0.3, zero, x)
    column = state_as_input(Lambda, P, 0.3, x)
    _, impulse = dplr_step(Lambda, P, column, C, 0.3, one, torch.zeros_like(x))
    assert relative(impulse, rest) < 1e-12


LAMBDA, P, B, C, X = system(4, 1)
U = torch.ones(5, dtype=torch.float64)
BAD_STEP = [
    (TypeError, "Lambda", {"Lambda": [1j]}),
    (ValueError, "P", {"P": P[:1]}),
    (ValueError, "B", {"B": B[:1]}),
    (ValueError, "C", {"C": C * float("nan")}),
    (ValueError, "dt", {"dt": 0.0}),
    (ValueError, "dt", {"dt": torch.tensor([0.1, -0.1])}),
    (TypeError, "dt", {"dt": "0.1"}),
    (TypeError, "u", {"u": U[0] + 0j}),
    (TypeError, "u", {"u": 1.0}),
    (ValueError, "u", {"u": U[0] * float("inf")}),
    (ValueError, "x", {"x": X[:1]}),
    (ValueError, "Lambda, P, B, C, dt, u, x", {"u": U[:2], "x": X.expand(3, -1)}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_STEP)
def test_bad_step(error, name, changed):
    good = {"Lambda": LAMBDA, "P": P, "B": B, "C": C, "dt": 0.1, "u": U[0], "x": X}
    dplr_step(**good)
    with pytest.raises(error, match=f"^{name}"):
        dplr_step(**good | changed)


BAD_FINAL = [
    (TypeError, "u", {"u": U + 0j}),
    (TypeError, "x0", {"x0": [0.0]}),
    (ValueError, "x0", {"x0": X[:1]}),
    (ValueError, "dt", {"dt": -1.0}),
    (TypeError, "lengths", {"lengths": 3}),
    (TypeError, "lengths", {"lengths": torch.tensor(3.0)}),
    (ValueError, "lengths", {"lengths": torch.tensor(6)}),
    (ValueError, "lengths", {"lengths": torch.tensor(0)}),
    (ValueError, "Lambda, P, B, C, dt, u, x0", {"u": U.expand(2, -1), "x0": X.expand(3, -1)}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_FINAL)
def test_bad_final_state(error, name, changed):
    good = {"Lambda": LAMBDA, "P": P, "B": B, "dt": 0.1, "u": U}
    final_state(**good)
    with pytest.raises(error, match=f"^{name}"):
        final_state(**good | changed)


def test_bad_response():
    with pytest.raises(ValueError, match=r"^L"):
        state_response(LAMBDA, P, C, 0.1, X, 0)
    with pytest.raises(ValueError, match=r"^dt"):
        state_as_input(LAMBDA, P, 0.0, X)
    with pytest.raises(ValueError, match=r"^x"):
        state_as_input(LAMBDA, P, 0.1, X * float("nan"))
    with pytest.raises(ValueError, match=r"^lengths"):
        check_lengths(torch.tensor([3, 9]), 8)


@pytest.mark.parametrize("r", [1, 2, 3])
def test_prepared_step(r):
    """The prepared step is the step, in both precisions, with batch axes."""
    for dtype, tolerance in TOLERANCE.items():
        Lambda, P, B, C, x = system(8, r, dtype, batch=(3,))
        dt = torch.tensor([0.01, 0.1, 2.0], dtype=dtype)
        prepared = in_real(*increments(Lambda, P, B, dt))
        assert prepared.F.shape == prepared.G.shape == (3, r, 8)
        u = torch.randn(5, 3, dtype=dtype, generator=torch.Generator().manual_seed(2))
        truth = x.expand(5, 3, 4)
        state = to_real(truth)
        for _ in range(4):
            _, truth = dplr_step(Lambda, P, B, C, dt, u, truth)
            state = advance(prepared, u, state)
        assert relative(to_half(state), truth) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("measure", ["legt", "lagt", "fout"])
@pytest.mark.parametrize("L", [1, 2, 33, 130])
def test_other_measures_against_dense(dtype, measure, L):
    """The HiPPO matrices without any decay of their own, in original coordinates."""
    A, B = hippo(measure, 16)
    s, g = half_spectrum(nplr(measure, 16)), torch.Generator().manual_seed(4)
    c, u = (torch.randn(n, dtype=torch.float64, generator=g) for n in (16, L))
    dt, start = 0.03, torch.randn(16, dtype=torch.float64, generator=g)
    if measure == "fout":
        start[1] = 0  # the coordinate that nothing reaches
    y, x = scan(*discretize(A, B, dt), c, u, start)
    kind = dtype.to_complex()
    Lambda, P, B, C = (v.to(kind) for v in (*s[:3], c.to(s.V) @ s.V))
    x0, u = (s.V.mH @ start.to(s.V)).to(kind), u.to(dtype)
    y_steps, x_steps = steps(Lambda, P, B, C, x0, dt, u)
    y_chunk = causal_conv(u, dplr_kernel(Lambda, P, B, C, dt, L))
    y_chunk = y_chunk + state_response(Lambda, P, C, dt, x0, L)
    x_chunk = final_state(Lambda, P, B, dt, u, x0)
    for found in (y_steps, y_chunk):
        assert relative(found, y) < TOLERANCE[dtype]
    for found in (x_steps, x_chunk):
        assert relative(2 * (s.V @ found.to(s.V)).real, x) < TOLERANCE[dtype]
