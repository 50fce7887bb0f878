"""The Cauchy sums by a program of Triton; without a GPU, in Triton's interpreter."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from helpers import signal

from s4mini import fused
from s4mini.cauchy_sum import damp, nodes
from s4mini.fused import fused_cauchy, triton_available
from s4mini.kernel import dplr_kernel
from s4mini.lowrank import half_spectrum, nplr

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def triton(monkeypatch):
    """Switch Triton's interpreter on where there is no GPU."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def system(*batch, k=4, n=3, L=9, seed=0, dtype=torch.complex128):
    """Return v, Lambda, x, y of random stable modes."""
    z = signal(*batch, k + 1, n, dtype=torch.complex128, seed=seed)
    Lambda = torch.complex(-0.1 - z[..., 0, :].real.abs(), 3 * z[..., 0, :].imag)
    parts = [t.to(DEVICE, dtype) for t in (z[..., 1:, :], Lambda)]
    return [*parts, *nodes(L, dtype.to_real(), DEVICE)]


def plain(v, Lambda, x, y):
    """Return the sums over the modes and their conjugates, in complex numbers."""
    upper = v @ (1 / (1j * x - y * Lambda[..., None]))
    return upper + v.conj() @ (1 / (1j * x - y * Lambda.conj()[..., None]))


def wide(tensors):
    return [t.to(torch.promote_types(t.dtype, torch.float64)) for t in tensors]


def compare(tensors, tolerance):
    """Assert that values and gradients are those of the complex sums."""
    results = []
    for function, given in ((fused_cauchy, tensors), (plain, wide(tensors))):
        leaves = [t.detach().clone().requires_grad_() for t in given[:2]]
        k = function(*leaves, *given[2:])
        g = signal(*k.shape, dtype=torch.complex128)
        results.append([k, *torch.autograd.grad(k, leaves, g.to(k))])
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@needs_triton
@pytest.mark.parametrize("L", [1, 2, 9, 300])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_values_and_gradients(triton, k, L):
    compare(system(2, k=k, n=2, L=L, seed=L), 1e-12)


@needs_triton
def test_single_precision(triton):
    tensors = system(2, dtype=torch.complex64)
    assert fused_cauchy(*tensors).dtype == torch.complex64
    compare(tensors, 1e-5)


@needs_triton
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("piece", [1, 2, 100])
def test_pieces_and_powers(triton, adjoint, piece):
    v, lam, x, y = system(2, k=3, n=5)
    w = torch.randn(2, 3, len(x), dtype=v.dtype).to(DEVICE) if adjoint else v
    for p in (1, 2, 3, 4):
        Psi = y ** (p - 1) / (1j * x - y * lam[..., None]) ** p
        expected = w @ (Psi.mH if adjoint else Psi)
        found = fused._start(w, lam, x, y, p, adjoint, piece)
        assert (found - expected).abs().max() < 1e-13 * expected.abs().max()


@needs_triton
def test_first_and_second_derivatives(triton):
    v, lam, x, y = system(k=2, n=2, L=3)
    leaves = [t.requires_grad_() for t in (v, lam)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda v, lam: fused_cauchy(v, lam, x, y), leaves)


@needs_triton
def test_third_derivative(triton):
    """Of the real part of a sum by a shift of its only mode."""
    v, lam, x, y = system(k=1, n=1, L=5)

    def along(function):
        a = torch.zeros((), dtype=torch.float64, device=DEVICE, requires_grad=True)
        value = function(v, lam + a, x, y).real.sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, a, create_graph=True)
        return value

    assert torch.allclose(along(fused_cauchy), along(plain), rtol=1e-11)


@needs_triton
def test_modes_on_the_axis_and_at_zero(triton):
    v, lam, x, y = system(n=3, L=8)
    lam = torch.complex(0 * lam.real, lam.imag)
    lam[0], lam[1] = 0, 2j  # an integrator, and one that meets a node of the circle
    modes, v = damp(lam.expand_as(v), v, 8)
    assert fused_cauchy(v, modes[0], x, y).isfinite().all()
    compare([v, modes[0], x, y], 1e-11)


@needs_triton
@pytest.mark.parametrize(("measure", "r"), [("legs", 1), ("legt", 2), ("random", 3)])
def test_kernels_of_dplr_kernel(triton, measure, r):
    half = half_spectrum(nplr("legs" if measure == "random" else measure, 6))
    P = signal(3, r, dtype=torch.complex128)
    P = P if measure == "random" else half.P
    parts = [t.to(DEVICE) for t in (half.Lambda, P, half.B, half.V[1])]
    for L in (7, 8):
        K = dplr_kernel(*parts, 0.1, L, backend="triton")
        expected = dplr_kernel(*parts, 0.1, L, backend="cauchy")
        assert (K - expected).abs().max() < 1e-12 * expected.abs().max()


@needs_triton
def test_second_derivatives_of_dplr_kernel(triton):
    half = half_spectrum(nplr("legs", 2))
    parts = [t.to(DEVICE).clone().requires_grad_() for t in (half.Lambda, half.P, half.B, half.B)]
    found = []
    for backend in ("triton", "cauchy"):
        K = dplr_kernel(*parts, 0.3, 4, backend)
        first = torch.autograd.grad(K.square().sum(), parts, create_graph=True)
        total = sum(g.abs().square().sum() for g in first)
        found.append(torch.autograd.grad(total, parts))
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)


@needs_triton
def test_batch_axes_broadcast(triton):
    v, lam, x, y = system(2, 3)
    k = fused_cauchy(v, lam[0], x, y)
    assert k.shape == (2, 3, 4, 5)
    assert torch.allclose(k[1, 2], fused_cauchy(v[1, 2], lam[0, 2], x, y), rtol=1e-12)
    assert torch.allclose(k, plain(v, lam[0], x, y), rtol=1e-12)


@needs_triton
def test_the_same_digits_each_time(triton):
    v, lam, x, y = system(2, dtype=torch.complex64)
    g = fused._start(v, lam, x, y, 1, False, 2)
    assert torch.equal(g, fused._start(v, lam, x, y, 1, False, 2))
    adjoint = [fused._start(g, lam, x, y, 1, True, 2) for _ in range(2)]
    assert torch.equal(*adjoint)


@needs_triton
def test_views_and_conjugates_are_read_as_they_are(triton):
    v, lam, x, y = system(2)
    odd = [v.conj(), lam.mT.contiguous().mT, x.flip(0).flip(0), y[::1]]
    copies = [t.resolve_conj().clone() for t in odd]
    assert torch.equal(fused_cauchy(*odd), fused_cauchy(*copies))
    leaf, again = (lam.clone().requires_grad_() for _ in range(2))
    k = fused_cauchy(v, leaf, x, y)
    (k.conj() * k).real.sum().backward()  # a conjugate gradient arrives
    plain(v, again, x, y).abs().square().sum().backward()
    assert torch.allclose(leaf.grad, again.grad, rtol=1e-10)


@needs_triton
def test_the_operator_keeps_its_promises(triton):
    v, lam, x, y = system(1)
    g = fused._sums(v, lam, x, y, 1, False)
    for w, adjoint in ((v, False), (g, True)):
        leaves = [t.clone().requires_grad_() for t in (w, lam)]
        torch.library.opcheck(fused._sums, (*leaves, x, y, 1, adjoint))


@needs_triton
def test_one_graph_when_compiled(triton):
    v, lam, x, y = system(2)

    def loss(v, lam):
        return torch.view_as_real(fused_cauchy(v, lam, x, y)).sin().sum()

    leaves = [t.requires_grad_() for t in (v, lam)]
    one = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    two = loss(*leaves)
    assert torch.allclose(one, two)
    both = (torch.autograd.grad(value, leaves) for value in (one, two))
    assert all(torch.allclose(p, q) for p, q in zip(*both, strict=True))


def run_python(code):
    """Run code in a process of its own, without the interpreter; return what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


MACHINE_CODE = """
import json
from s4mini.fused import _compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

program, found = _compiled(), []
integers = {"k": "i32", "n": "i32", "M": "i32", "PIECE": "i32"}
for K in (4, 16):
    for P in (1, 2, 3):
        for adjoint in (False, True):
            known = {"P": P, "ADJOINT": adjoint, "K": K, "BLOCK": 512 // K}
            kinds = {name: integers.get(name, "*fp32") for name in program.arg_names}
            source = ASTSource(program, kinds | dict.fromkeys(known, "constexpr"), known)
            target, options = GPUTarget("cuda", 90, 32), {"num_warps": 1}
            found.append(compile(source, target=target, options=options).asm["sass"])
print(json.dumps(found))
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
    with pytest.raises(RuntimeError, match="fused_cauchy: Triton is not installed"):
        fused_cauchy(*system(1))


@needs_triton
def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "no CUDA device" in triton_available()
    with pytest.raises(RuntimeError, match="no CUDA device"):
        fused_cauchy(*(t.cpu() for t in system(1)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_available() == ""


@needs_triton
def test_tensors_on_the_cpu_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="the tensors are on cpu"):
        fused_cauchy(*(t.cpu() for t in system(1)))


@pytest.mark.parametrize(
    ("i", "value", "error", "message"),
    [
        (0, lambda t: t[0, 0], ValueError, "^v: expected shape"),
        (0, lambda t: t[..., :2], ValueError, "^Lambda: expected shape"),
        (0, lambda t: t * math.nan, ValueError, "^v: expected finite"),
        (0, lambda t: t.to(torch.complex64), TypeError, "^v: expected torch.complex128"),
        (1, lambda t: t[:1].expand(3, 3), ValueError, "^v, Lambda: expected batch axes"),
        (1, lambda t: t.tolist(), TypeError, "^Lambda: "),
        (1, lambda t: t.real, TypeError, "^Lambda: expected torch.complex128"),
        (2, lambda t: t[None], ValueError, "^x: expected shape"),
        (2, lambda t: t + 0j, TypeError, "^x: expected a floating tensor"),
        (3, lambda t: t[:2], ValueError, "^y: expected shape"),
        (3, lambda t: t.float(), TypeError, "^y: expected torch.float64"),
    ],
)
def test_bad_arguments(i, value, error, message):
    arguments = [t.cpu() for t in system(2)]
    arguments[i] = value(arguments[i])
    with pytest.raises(error, match=message):
        fused_cauchy(*arguments)
