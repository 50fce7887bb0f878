"""The kernel as one program of Triton; without a GPU, in Triton's interpreter."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from s4mini import fused
from s4mini.fused import fused_spectrum, triton_available
from s4mini.kernel import dplr_kernel
from s4mini.lowrank import half_spectrum, nplr

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def triton(monkeypatch):
    """Switch Triton's interpreter on where there is no GPU, and choose small blocks."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(fused, "_BLOCK", {1: 8, 2: 4})


def system(h, n, r, seed=0, dtype=torch.complex128):
    """Return Lambda, P, B, C_tilde, dt of random stable systems."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(h, n, r + 3, generator=generator, dtype=torch.complex128)
    Lambda = torch.complex(-z[..., 0].real.abs(), 5 * z[..., 0].imag)
    dt = torch.rand(h, generator=generator, dtype=torch.float64) + 0.1
    tensors = [t.to(DEVICE, dtype) for t in (Lambda, z[..., 3:], z[..., 1], z[..., 2])]
    return [*tensors, dt.to(DEVICE, dtype.to_real())]


def reference(Lambda, P, B, C_tilde, dt, L):
    """Return K_hat (h, M) in X and Y, with all fractions and an r x r solve."""
    Lambda, P, B, C_tilde = (t.cpu().to(torch.complex128) for t in (Lambda, P, B, C_tilde))
    theta = 2 * math.pi / L * torch.arange(L // 2 + 1).double()
    tau, rho = math.tanh(0.5 / L), math.exp(-1 / L)
    s, c = (theta / 2).sin(), (theta / 2).cos()
    X, Y = 2 * torch.complex(tau * c, s), torch.complex(c, tau * s)
    rows = torch.cat((C_tilde[:, None], P.mH), 1)  # (h, 1 + r, n)
    columns = torch.cat((B[:, None], P.mT), 1)
    dt = dt.cpu().double()[:, None, None, None]
    v = (dt * rows[:, :, None] * columns[:, None])[..., None]
    lam = (dt * Lambda[:, None, None])[..., None]
    p = (v / (X - Y * lam) + v.conj() / (X - Y * lam.conj())).sum(-2).movedim(-1, 1)
    middle = torch.eye(P.shape[-1]) + Y[:, None, None] * p[..., 1:, 1:]
    y = torch.linalg.solve(middle, p[..., 1:, 0])
    inner = p[..., 0, 0] - Y * (p[..., 0, 1:] * y).sum(-1)
    return 2 / (1 + rho) * torch.complex(c, s) * inner


def compare(tensors, L, tolerance):
    """Assert that values and gradients are the reference's."""
    results = []
    for function in (fused_spectrum, reference):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        K_hat = function(*leaves, L).cpu()
        generator = torch.Generator().manual_seed(L)
        G = torch.randn(K_hat.shape, generator=generator, dtype=torch.complex128)
        grads = torch.autograd.grad(K_hat, leaves, G.to(K_hat))
        results.append([t.cpu() for t in (K_hat, *grads)])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@needs_triton
@pytest.mark.parametrize(
    ("h", "n", "r", "L"),
    [
        (1, 1, 1, 1),
        (2, 2, 1, 2),
        (2, 3, 1, 9),
        (1, 2, 1, 33),
        (1, 1, 2, 1),
        (1, 2, 2, 2),
        (2, 2, 2, 9),
    ],
)
def test_values_and_gradients(triton, h, n, r, L):
    compare(system(h, n, r, seed=L), L, 1e-12)


@needs_triton
def test_single_precision(triton):
    tensors = system(2, 2, 1, dtype=torch.complex64)
    K_hat = fused_spectrum(*tensors, 9)
    assert K_hat.dtype == torch.complex64 and K_hat.shape == (2, 5)
    compare(tensors, 9, 1e-5)


@needs_triton
@pytest.mark.parametrize("r", [1, 2])
def test_finite_differences(triton, r):
    tensors = [t.requires_grad_() for t in system(1, 1, r)]
    assert torch.autograd.gradcheck(lambda *t: fused_spectrum(*t, 2), tensors, fast_mode=True)


@needs_triton
def test_modes_on_the_axis_and_at_zero(triton):
    Lambda, P, B, C, dt = system(1, 3, 1)
    Lambda = torch.complex(0 * Lambda.real, Lambda.imag)
    Lambda[0, 0] = 0  # an integrator
    Lambda[0, 1] = 2j / dt[0]  # meets a node of L = 8 on the unit circle
    assert fused_spectrum(Lambda, P, B, C, dt, 8).isfinite().all()
    compare([Lambda, P, B, C, dt], 8, 1e-11)


@needs_triton
@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_kernels_of_dplr_kernel(triton, measure):
    half = half_spectrum(nplr(measure, 6))
    parts = [t.to(DEVICE) for t in (half.Lambda, half.P, half.B, half.V[1])]
    for L in (7, 8):
        K = dplr_kernel(*parts, 0.1, L, backend="triton")
        expected = dplr_kernel(*parts, 0.1, L, backend="cauchy")
        assert (K - expected).abs().max() < 1e-12 * expected.abs().max()


@needs_triton
def test_the_same_digits_each_time(triton):
    rows = fused._mode_rows(*system(1, 2, 1, dtype=torch.complex64))
    G = fused._spectrum(rows, 17)
    assert torch.equal(G, fused._spectrum(rows, 17))
    assert torch.equal(fused._gradient(G, rows, 17), fused._gradient(G, rows, 17))


@needs_triton
def test_views_and_conjugates_are_read_as_they_are(triton):
    Lambda, P, B, C, dt = system(2, 3, 1)
    odd = [Lambda.mT.contiguous().mT, P.conj(), B.flip(0).flip(0), C.conj(), dt[:1].expand(2)]
    plain = [t.resolve_conj().clone() for t in odd]
    assert torch.equal(fused_spectrum(*odd, 5), fused_spectrum(*plain, 5))
    leaf = Lambda.clone().requires_grad_()
    K_hat = fused_spectrum(leaf, P, B, C, dt, 5)
    (K_hat.conj() * K_hat).real.sum().backward()  # a conjugate gradient arrives
    again = Lambda.cpu().clone().requires_grad_()
    reference(again, P, B, C, dt, 5).abs().square().sum().backward()
    assert torch.allclose(leaf.grad.cpu(), again.grad, rtol=1e-10)


@needs_triton
def test_operators_keep_their_promises(triton):
    rows = fused._mode_rows(*system(1, 2, 1)).requires_grad_()
    G = fused._spectrum(rows, 5).detach()
    torch.library.opcheck(fused._spectrum, (rows, 5))
    torch.library.opcheck(fused._gradient, (G, rows.detach(), 5))


@needs_triton
def test_one_graph_when_compiled(triton):
    def loss(*tensors):
        return torch.fft.irfft(fused._fused_spectrum(*tensors, 9), n=9).sin().sum()

    tensors = [t.requires_grad_() for t in system(1, 2, 1)]
    one = torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors)
    two = loss(*tensors)
    assert torch.allclose(one, two)
    both = (torch.autograd.grad(value, tensors) for value in (one, two))
    assert all(torch.allclose(p, q) for p, q in zip(*both, strict=True))


@needs_triton
def test_no_second_derivative(triton):
    tensors = [t.requires_grad_() for t in system(1, 1, 1)]
    K_hat = fused_spectrum(*tensors, 3)
    (gradient,) = torch.autograd.grad(K_hat.abs().square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.autograd.grad(gradient.abs().square().sum(), tensors[:1])


@pytest.mark.parametrize("L", [1, 2, 3, 64, 1001, 10**6])
def test_points(L):
    Z = torch.view_as_complex(fused._points(L, torch.float64, torch.device("cpu")))
    tau = math.tanh(0.5 / L)
    assert Z.shape == (L // 2 + 1,) and (Z.real > 0).all() and (Z.imag >= 0).all()
    assert math.isclose(Z[0].real, 2 * tau, rel_tol=1e-14) and Z[0].imag == 0
    distance = (Z - (tau + 1 / tau)).abs()
    assert torch.allclose(distance, torch.tensor(1 / tau - tau, dtype=torch.float64), rtol=1e-12)
    if L % 2 == 0:
        assert Z[-1].imag == 0 and math.isclose(Z[-1].real, 2 / tau, rel_tol=1e-14)


def run_python(code):
    """Run code in a process of its own, without the interpreter; return what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


MACHINE_CODE = """
import json, sys
from s4mini.fused import _assembly
names = [(p, R) for p in ("_forward", "_backward") for R in (1, 2)]
print(json.dumps([_assembly(*name) for name in names]))
"""


@needs_triton
def test_compiles_for_a_gpu_without_spills():
    """What the interpreter accepts the compiler may refuse; no GPU is needed to ask it."""
    for code in json.loads(run_python(MACHINE_CODE)):
        assert "FFMA" in code and "STL" not in code and "LDL" not in code


def test_importing_does_not_import_triton():
    code = "import sys, s4mini, s4mini.fused as f; f.triton_available()"
    assert run_python(f"{code}; print('triton' in sys.modules)") == "False"


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert triton_available() == "Triton is not installed"
    with pytest.raises(RuntimeError, match=r"Triton is not installed; dplr_kernel .*cauchy"):
        fused_spectrum(*system(1, 1, 1), 3)


@needs_triton
def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no CUDA device" in triton_available()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        fused_spectrum(*system(1, 1, 1), 3)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_available() == ""


@needs_triton
def test_tensors_on_the_cpu_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="the tensors are on the CPU"):
        fused_spectrum(*(t.cpu() for t in system(1, 1, 1)), 3)


def replaced(i, value):
    """Return good arguments with one of them replaced."""
    arguments = [*(t.cpu() for t in system(2, 3, 1)), 9]
    arguments[i] = value(arguments[i])
    return arguments


@pytest.mark.parametrize(
    ("i", "value", "error", "message"),
    [
        (0, lambda t: t[0], ValueError, "^Lambda: expected shape"),
        (0, lambda t: -t, ValueError, "^Lambda: expected real parts <= 0"),
        (0, lambda t: t.tolist(), TypeError, "^Lambda: "),
        (1, lambda t: t[..., 0], ValueError, "^P: expected shape"),
        (1, lambda t: t[..., :0], ValueError, "^P: expected no empty axis"),
        (1, lambda t: t.expand(2, 3, 3), ValueError, "^P: expected rank 1 or 2, got 3"),
        (2, lambda t: t[:, :2], ValueError, "^B: expected shape"),
        (3, lambda t: t * math.nan, ValueError, "^C_tilde: expected finite"),
        (4, lambda t: t[:1], ValueError, "^dt: expected shape"),
        (4, lambda t: t + 0j, TypeError, "^dt: expected a floating tensor"),
        (4, lambda t: 0 * t, ValueError, "^dt: expected finite numbers > 0"),
        (5, lambda L: 0, ValueError, "^L: "),
        (5, lambda L: 9.0, TypeError, "^L: "),
    ],
)
def test_bad_arguments(i, value, error, message):
    with pytest.raises(error, match=message):
        fused_spectrum(*replaced(i, value))
