"""The kernel by two tables."""

import pytest
import torch
from helpers import dense_kernel, random_half, signal

from s4mini.discretization import discretize
from s4mini.lowrank import half_spectrum, nplr, real_form
from s4mini.projection import hippo
from s4mini.tables import grow_rows, krylov_tables, real_columns, real_rows, table_kernel

MEASURES = ("legs", "legt", "lagt", "fout")


def random_system(*batch, n=4, r=1, seed=0, dtype=torch.complex128):
    """Return Lambda, P, B, C, dt of random stable half spectra."""
    system = random_half(*batch, n=n, r=r, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    dt = torch.rand(batch, generator=generator, dtype=torch.float64) / 5 + 0.01
    return [*(t.to(dtype) for t in system), dt.to(dtype.to_real())]


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("L", [1, 2, 3, 17, 64, 333])
def test_kernel_is_the_recurrence(n, r, L):
    system = random_system(n=n, r=r, seed=10 * n + r)
    exact = dense_kernel(*system, L)
    assert (table_kernel(*system, L) - exact).abs().max() < 1e-11 * exact.abs().max()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dt", [1e-4, 1e-3, 1e-2, 1e-1, 1.0])
def test_accuracy(measure, dt):
    """Against the dense recurrence, relative to the largest entry."""
    half, L = half_spectrum(nplr(measure, 64)), 4096
    C = signal(64)
    A_bar, X = discretize(*hippo(measure, 64), dt)
    X, E = X[:, None], A_bar - torch.eye(64, dtype=torch.float64)
    while X.shape[1] < L:
        X, E = torch.cat((X, X + E @ X), 1), 2 * E + E @ E
    exact = C @ X[:, :L]
    system = half.Lambda, half.P, half.B, C.to(half.V) @ half.V
    for dtype, bound in (
        (torch.float64, 1e-11),
        (torch.float32, 1e-5 if measure == "fout" else 5e-6),
    ):
        parts = [t.to(dtype.to_complex()) for t in system]
        K = table_kernel(*parts, torch.tensor(dt, dtype=dtype), L)
        assert K.dtype == dtype
        assert (K - exact).abs().max() < bound * exact.abs().max()


@pytest.mark.parametrize("r", [1, 2])
def test_columns_and_power(r):
    Lambda, P, B, C, dt = random_system(2, r=r)
    starts = torch.stack((B, C), -1)
    X, E = krylov_tables(Lambda, P, starts, dt, 8)
    for h in range(2):
        A, b, _ = real_form(Lambda[h], P[h], B[h], C[h])
        c = real_columns(C[h][:, None])[:, 0]
        for a, start in enumerate((b, c)):
            A_bar, x = discretize(A, start, dt[h].item())
            for j in range(8):
                assert torch.allclose(X[h, :, 2 * j + a], x, atol=1e-12)
                x = A_bar @ x
        power = torch.linalg.matrix_power(A_bar, 8) - torch.eye(8)
        assert torch.allclose(E[h], power, atol=1e-11)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_rows(count):
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(2, 3, 3, dtype=torch.float64, generator=generator) / 5
    R = torch.randn(2, 2, 3, dtype=torch.float64, generator=generator)
    A, table = E + torch.eye(3), grow_rows(R, E, count)
    for i in range(count):
        power = torch.linalg.matrix_power(A, i)
        assert torch.allclose(table[:, 2 * i : 2 * i + 2], R @ power, atol=1e-12)


def test_a_row_times_a_column_is_twice_the_real_part():
    c, x = signal(2, 5, dtype=torch.complex128)
    found = real_rows(c[None]) @ real_columns(x[:, None])
    assert torch.allclose(found[0, 0], 2 * (c * x).sum().real)


@pytest.mark.parametrize("more_B", [(), (4,), (2, 4)])
@pytest.mark.parametrize("more_C", [(), (2,), (2, 1)])
def test_batch_axes(more_B, more_C):
    Lambda, P, B, C, dt = random_system(3)
    generator = torch.Generator().manual_seed(5)
    B = B * torch.randn(*more_B, 1, 1, dtype=torch.float64, generator=generator)
    C = C * torch.randn(*more_C, 1, 1, dtype=torch.float64, generator=generator)
    try:
        batch = torch.broadcast_shapes(B.shape, C.shape)[:-1]
    except RuntimeError:
        pytest.skip("these do not broadcast")
    K = table_kernel(Lambda, P, B, C, dt, 20)
    assert K.shape == (*batch, 20)
    whole = [t.expand(*batch, 4).reshape(-1, 4) for t in (Lambda, B, C)]
    P, dt = P.expand(*batch, 4, 1).reshape(-1, 4, 1), dt.expand(batch).reshape(-1)
    for h, row in enumerate(K.reshape(-1, 20)):
        one = table_kernel(whole[0][h], P[h], whole[1][h], whole[2][h], dt[h], 20)
        assert torch.allclose(row, one, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("L", [1, 6, 40])
@pytest.mark.parametrize("r", [1, 2])
def test_first_and_second_derivatives(L, r):
    inputs = [t.requires_grad_() for t in random_system(2, n=2, r=r)]
    assert torch.autograd.gradcheck(lambda *t: table_kernel(*t, L), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: table_kernel(*t, L), inputs)


def test_functional_transforms():
    system = random_system(3)

    def loss(C):
        return table_kernel(*system[:3], C, system[4], 70).square().sum()

    C = system[3].clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(C), C)
    assert torch.allclose(torch.func.grad(loss)(system[3]), expected, rtol=1e-10)

    def of_dt(dt):
        return table_kernel(*system[:4], dt, 70)

    J = torch.func.jacrev(of_dt)(system[4])
    expected = torch.autograd.functional.jacobian(of_dt, system[4])
    assert torch.allclose(J, expected, rtol=1e-10, atol=1e-12)
    one = torch.func.vmap(lambda *t: table_kernel(*t, 70))(*system)
    assert torch.allclose(one, table_kernel(*system, 70), rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore")
def test_compile_and_export():
    system = random_system(2, dtype=torch.complex64)

    def run(*t):
        return table_kernel(*t, 100)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    C = system[3].clone().requires_grad_()
    K = compiled(*system[:3], C, system[4])
    K.sum().backward()
    assert torch.allclose(K, run(*system), atol=1e-5)
    assert C.grad.abs().max() > 0

    class Kernel(torch.nn.Module):
        def forward(self, *t):
            return run(*t)

    exported = torch.export.export(Kernel(), tuple(system)).module()
    assert torch.allclose(exported(*system), run(*system), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_hold_no_subnormal_numbers(dtype):
    """A system that forgets fast: rows decay through all magnitudes, down to zero."""
    E = -torch.eye(2, dtype=dtype)[None] * torch.tensor([0.999, 0.5], dtype=dtype)
    rows = grow_rows(torch.ones(1, 1, 2, dtype=dtype), E, 600)
    size = rows.abs()
    assert (size[0, -1] == 0).all() if dtype == torch.float32 else (size[0, -1, 0] == 0)
    assert not ((size > 0) & (size < torch.finfo(dtype).tiny)).any()
    exact = 0.5 ** torch.arange(100, dtype=torch.float64)
    assert torch.allclose(rows[0, :100, 1].double(), exact, rtol=0, atol=1e-6)
