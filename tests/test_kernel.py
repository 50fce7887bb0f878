"""The kernel of a diagonal plus low-rank system."""

import math
import sys

import mpmath
import pytest
import torch
from helpers import dense_kernel, random_half, relative, signal
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.cauchy_sum import keops_available
from s4mini.convolve import krylov_kernel
from s4mini.discretization import discretize
from s4mini.kernel import backends, dplr_kernel
from s4mini.lowrank import half_spectrum, nplr
from s4mini.projection import hippo

kernel = sys.modules["s4mini.kernel"]  # the module, whatever the package calls so


def legs(N, seed=0):
    """Return the LegS half spectrum with a random C, and C itself."""
    modes, C = half_spectrum(nplr("legs", N)), signal(N, seed=seed)
    return (modes.Lambda, modes.P, modes.B, C.to(modes.V) @ modes.V), C


@pytest.mark.parametrize("backend", ["auto", "cauchy"])
@pytest.mark.parametrize("dt", [1e-3, 1e-1])
@pytest.mark.parametrize("N", [2, 4, 16, 64])
def test_legs_against_the_dense_recurrence(N, dt, backend):
    system, C = legs(N)
    slow = krylov_kernel(*discretize(*hippo("legs", N), dt), C, 1000)
    for L in (1, 2, 3, 15, 16, 17, 1000):
        K = dplr_kernel(*system, dt, L, backend)
        assert K.shape == (L,) and K.dtype == torch.float64
        assert relative(K, slow[:L]) < 1e-12


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 6),
    r=st.integers(1, 3),
    L=st.integers(1, 70),
    dt=st.floats(1e-4, 1.0),
    seed=st.integers(0, 999),
)
def test_any_rank_and_length(n, r, L, dt, seed):
    system = random_half(n=n, r=r, seed=seed)
    for backend in ("tables", "cauchy"):
        K, slow = dplr_kernel(*system, dt, L, backend), dense_kernel(*system, dt, L)
        scale = max(slow.abs().max().item(), 1e-3 * dt)  # small by cancellation
        assert (K - slow).abs().max() < 1e-10 * scale


@pytest.mark.parametrize("dt", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("L", [256, 1000, 4096, 16384])
def test_single_precision(L, dt):
    system, _ = legs(64)
    exact = dplr_kernel(*system, dt, L)
    K = dplr_kernel(*(t.to(torch.complex64) for t in system), dt, L)
    assert K.dtype == torch.float32
    assert relative(K.double(), exact) < 5e-6


def test_channels_with_their_own_step():
    system = random_half(5, r=2)
    dt = torch.logspace(-3, 0, 5, dtype=torch.float64)
    K = dplr_kernel(*system, dt, 50)
    for h in range(5):
        one = [t[h] for t in system]
        assert relative(K[h], dense_kernel(*one, dt[h].item(), 50)) < 1e-11


def test_batch_axes_broadcast():
    Lambda, P, B, C = random_half(3, r=2)
    directions = torch.stack((C, -2 * C))  # (2, 3, n)
    examples = torch.stack((B, 3 * B, B, B))[:, None]  # (4, 1, 3, n)
    dt = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    K = dplr_kernel(Lambda, P, examples, directions, dt, 20)
    assert K.shape == (4, 2, 3, 20)
    assert torch.allclose(K[1, 1], -6 * dplr_kernel(Lambda, P, B, C, dt, 20))
    K = dplr_kernel(Lambda[0], P[0], B[0], C[0], dt, 20)
    assert torch.allclose(K[2], dplr_kernel(Lambda[0], P[0], B[0], C[0], 0.3, 20))


@pytest.mark.parametrize("backend", ["tables", "cauchy"])
@pytest.mark.parametrize("L", [1, 2, 5, 20])
def test_gradients(L, backend):
    system = random_half(2, n=2, r=2)
    dt = torch.tensor([0.1, 0.8], dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (*system, dt)]
    assert torch.autograd.gradcheck(lambda *t: dplr_kernel(*t, L, backend), inputs)
    if L in (2, 5):
        assert torch.autograd.gradgradcheck(lambda *t: dplr_kernel(*t, L, backend), inputs)


def test_gradients_of_the_backends_agree_in_single_precision():
    system, _ = legs(64)
    grads = []
    for backend, dtype in (("tables", torch.complex64), ("cauchy", torch.complex128)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in system]
        dplr_kernel(*inputs, 0.01, 512, backend).square().sum().backward()
        grads.append([t.grad.to(torch.complex128) for t in inputs])
    for one, two in zip(*grads, strict=True):
        assert relative(one, two) < 1e-4


@pytest.mark.parametrize(
    ("measure", "N", "dt", "L"),
    [("legs", 16, 1e-2, 40), ("legt", 8, 1e-1, 65), ("lagt", 16, 1e-3, 33), ("fout", 8, 1e-1, 64)],
)
def test_against_fifty_digits(measure, N, dt, L):
    """The recurrence, where no floating-point reference is trusted."""
    half = half_spectrum(nplr(measure, N))
    C = signal(N, seed=N)
    with mpmath.workdps(50):
        A, B = (mpmath.matrix(t.tolist()) for t in hippo(measure, N))
        step, eye = A * (mpmath.mpf(dt) / 2), mpmath.eye(N)
        inverse = (eye - step) ** -1
        A_bar, x = inverse * (eye + step), inverse * (B * dt)
        row, truth = mpmath.matrix([C.tolist()]), []
        for _ in range(L):
            truth.append(float((row * x)[0]))
            x = A_bar * x
    system = half.Lambda, half.P, half.B, C.to(half.V) @ half.V
    for backend in ("tables", "cauchy"):
        K = dplr_kernel(*system, dt, L, backend)
        assert relative(K, torch.tensor(truth, dtype=torch.float64)) < 1e-13


def test_small_steps_keep_their_digits():
    """The difference from the identity is not found by subtraction."""
    system = random_half(r=1)
    for backend in ("tables", "cauchy"):
        exact = dplr_kernel(*system, 1e-7, 9, "tables")
        single = dplr_kernel(*(t.to(torch.complex64) for t in system), 1e-7, 9, backend)
        assert relative(single.double(), exact) < 3e-6


def test_a_length_is_a_piece_of_a_longer_one():
    system = random_half(r=2)
    K = dplr_kernel(*system, 0.01, 1000)
    for L in (1, 2, 99, 512):
        assert torch.allclose(dplr_kernel(*system, 0.01, L), K[:L], atol=1e-13)


def test_a_very_long_kernel():
    system = random_half(n=2)
    K = dplr_kernel(*(t.to(torch.complex64) for t in system), 1e-4, 10**6)
    assert relative(K[:1000].double(), dplr_kernel(*system, 1e-4, 1000)) < 1e-5


def test_autocast_is_switched_off():
    system = [t.to(torch.complex64) for t in legs(16)[0]]
    plain = dplr_kernel(*system, 0.01, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dplr_kernel(*system, 0.01, 64), plain)


def test_inputs_are_left_alone():
    system = random_half(2)
    before = [t.clone() for t in system]
    dplr_kernel(*system, 0.1, 30)
    assert all(torch.equal(a, b) for a, b in zip(system, before, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["tables", "cauchy"])
def test_on_a_gpu(backend):
    system, _ = legs(64)
    exact = dplr_kernel(*system, 0.01, 1000)
    K = dplr_kernel(*(t.cuda() for t in system), 0.01, 1000, backend)
    assert K.is_cuda and relative(K.cpu(), exact) < 1e-12


GOOD = dict(zip(("Lambda", "P", "B", "C"), random_half(3), strict=True), dt=0.1, L=8)
BAD = [
    (TypeError, "Lambda", {"Lambda": [1.0]}),
    (TypeError, "P", {"P": torch.ones(3, 4, 1, dtype=torch.int64)}),
    (ValueError, "P", {"P": torch.ones(4)}),
    (ValueError, "P", {"P": torch.ones(3, 5, 1)}),
    (ValueError, "B", {"B": torch.ones(3, 5)}),
    (ValueError, "C", {"C": torch.full((3, 4), math.nan)}),
    (ValueError, "dt, Lambda, P, B, C", {"B": torch.ones(2, 4)}),
    (ValueError, "dt, Lambda, P, B, C", {"dt": torch.ones(2)}),
    (ValueError, "dt", {"dt": 0.0}),
    (ValueError, "dt", {"dt": torch.tensor([0.1, -0.1, 0.1])}),
    (ValueError, "dt", {"dt": math.inf}),
    (TypeError, "dt", {"dt": torch.tensor(0.1 + 0j)}),
    (TypeError, "dt", {"dt": "small"}),
    (TypeError, "L", {"L": 8.0}),
    (TypeError, "L", {"L": True}),
    (ValueError, "L", {"L": 0}),
    (ValueError, "backend", {"backend": "fast"}),
]


@pytest.mark.parametrize(("kind", "name", "change"), BAD)
def test_bad_calls(kind, name, change):
    with pytest.raises(kind, match=f"^{name}: "):
        dplr_kernel(**{**GOOD, **change})


def test_an_unknown_backend_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"'auto' or one of 'tables', 'cauchy', 'triton'.*'keops'"):
        dplr_kernel(**GOOD, backend="cuda")


def test_an_unstable_system_is_refused():
    half = half_spectrum(nplr("legs", 8))
    with pytest.raises(ValueError, match=r"Lambda: expected real parts <= 0, got 0\.5"):
        dplr_kernel(-half.Lambda, half.P, half.B, half.B, 0.1, 8)


MEASURES = ("legs", "legt", "lagt", "fout")


def states(A, B, dt, L):
    """Return A_bar^l B_bar for l < L, by doubling."""
    A_bar, B_bar = discretize(A, B, dt)
    X, E = B_bar[:, None], A_bar - torch.eye(len(B), dtype=A.dtype)
    while X.shape[1] < L:
        X, E = torch.cat((X, X + E @ X), 1), 2 * E + E @ E
    return X[:, :L]


@settings(deadline=None, max_examples=60)
@given(
    measure=st.sampled_from(MEASURES),
    N=st.sampled_from((2, 4, 6, 16, 64)),
    L=st.one_of(st.integers(1, 40), st.sampled_from((999, 1000, 1024, 4096))),
    dt=st.floats(1e-4, 1e-1),
    backend=st.sampled_from(("tables", "cauchy")),
    seed=st.integers(0, 999),
)
def test_every_measure_size_step_and_length(measure, N, L, dt, backend, seed):
    half = half_spectrum(nplr(measure, N))
    C = signal(N, seed=seed)
    X = states(*hippo(measure, N), dt, L)
    possible = C.norm() * X.norm(dim=0).max()
    system = half.Lambda, half.P, half.B, C.to(half.V) @ half.V
    K = dplr_kernel(*system, dt, L, backend)
    assert (K - C @ X).abs().max() < 1e-12 * possible
    single = dplr_kernel(*(t.to(torch.complex64) for t in system), dt, L, backend)
    assert (single - C @ X).abs().max() < 3e-6 * possible


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_where_the_real_part_is_zero(measure):
    half = half_spectrum(nplr(measure, 6))
    C = torch.ones(3, dtype=torch.complex128)
    frequency = half.Lambda.imag.clone().requires_grad_()
    inputs = [t.clone().requires_grad_() for t in (half.P, half.B, C)]

    def run(frequency, P, B, C):
        Lambda = torch.complex(half.Lambda.real, frequency)
        return dplr_kernel(Lambda, P, B, C, 0.05, 21)

    assert torch.autograd.gradcheck(run, (frequency, *inputs))


def test_an_integrator():
    """A mode at zero without a low-rank term sums up its input for ever."""
    zero, one = torch.zeros(1, dtype=torch.complex128), torch.ones(1, dtype=torch.complex128)
    for L in (1, 2, 7, 1000):
        K = dplr_kernel(zero, zero[:, None], one, one, 0.1, L)
        assert torch.allclose(K, torch.full((L,), 0.2).double(), atol=1e-13)


def test_modes_that_meet_a_node():
    """Undamped modes exactly at nodes of the unit circle."""
    L, dt = 24, 0.5
    theta = 2 * math.pi * torch.tensor([0, 3, 7, 11], dtype=torch.float64) / L
    Lambda = 2j / dt * torch.tan(theta / 2)
    _, P, B, C = random_half()
    for scale in (0, 1):
        system = Lambda, scale * P, B, C
        assert relative(dplr_kernel(*system, dt, L), dense_kernel(*system, dt, L)) < 1e-12


@pytest.mark.parametrize("backend", ["tables", "cauchy"])
def test_output_vectors_of_many_channels(backend):
    """Two output vectors share the system of each of forty channels."""
    Lambda, P, B, _ = random_half(40, n=64)
    C = torch.stack([random_half(40, n=64, seed=s)[3] for s in (1, 2)])
    K = dplr_kernel(Lambda, P, B, C, 0.01, 33, backend)
    for h in (0, 15, 16, 39):
        for e in (0, 1):
            one = dplr_kernel(Lambda[h], P[h], B[h], C[e, h], 0.01, 33, backend)
            assert torch.allclose(K[e, h], one, rtol=1e-9, atol=1e-12)


def test_memory_has_no_entry_for_each_mode_and_node():
    """What is kept for the backward pass has no entry per mode and node."""
    system = [t.requires_grad_() for t in random_half(64, n=32)]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    L = 4096
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dplr_kernel(*system, 0.01, L)
    table = 64 * 32 * (L // 2 + 1) * 16
    assert sum(kept.values()) < table / 2


@pytest.mark.skipif(bool(keops_available()), reason=keops_available())
def test_keops_agrees():
    """Values, and the gradient by C; each kind of sum is compiled once, slowly."""
    Lambda, P, B, C = (t.to(torch.complex64) for t in random_half(3, n=5, r=1))
    found = []
    for backend in ("keops", "cauchy"):
        leaf = C.clone().requires_grad_()
        K = dplr_kernel(Lambda, P, B, leaf, 0.1, 31, backend)
        K.square().sum().backward()
        found.append((K.detach(), leaf.grad))
    for one, two in zip(*found, strict=True):
        assert relative(one, two) < 1e-5


def test_backends_say_why_not(monkeypatch):
    reasons = backends()
    assert set(reasons) == {"tables", "cauchy", "triton", "keops"}
    assert reasons["tables"] == reasons["cauchy"] == ""
    monkeypatch.setattr(kernel, "keops_available", lambda: "there is no compiler")
    assert backends()["keops"] == "there is no compiler"
    with pytest.raises(ValueError, match=r"'keops' \(not here: there is no compiler\)"):
        dplr_kernel(**GOOD, backend="keops")


def test_torch_compile_leaves_it_as_it_is():
    system = [t.to(torch.complex64) for t in random_half()]
    C = system[3].clone().requires_grad_()

    def run(C):
        return 2 * dplr_kernel(*system[:3], C, 0.1, 20, "cauchy")

    compiled = torch.compile(run, backend="aot_eager")(C)
    compiled.sum().backward()
    assert torch.equal(compiled, run(C))
    assert C.grad.abs().max() > 0
