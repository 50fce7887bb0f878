"""Recurrence and convolution: sameness, linearity, time invariance, batches."""

import math

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from helpers import random_dense, signal
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.convolve import causal_conv, channel_conv, fft_length, krylov_kernel, scan
from s4mini.discretization import discretize

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
few = settings(deadline=None, max_examples=25)


def random_system(N, seed, dtype=torch.float64):
    A, B, C, x0 = random_dense(N, seed, dtype)
    return (*discretize(A, B, 0.1), C), x0


def tolerance(dtype):
    return 100 * torch.finfo(dtype).eps


@few
@given(
    N=st.integers(1, 9),
    L=st.integers(1, 70),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
)
def test_recurrence_is_convolution(N, L, seed, dtype):
    system, x0 = random_system(N, seed, dtype)
    u = signal(L, seed=seed, dtype=dtype)
    y, _ = scan(*system, u, x0)
    A_bar, _, C = system
    forced = causal_conv(u, krylov_kernel(*system, L))
    free = krylov_kernel(A_bar, A_bar @ x0, C, L)
    scale = max(forced.abs().max().item(), free.abs().max().item())
    assert y.dtype == forced.dtype == dtype
    assert (forced + free - y).abs().max() < tolerance(dtype) * scale


@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1000])
def test_kernel_is_the_powers(L):
    (A_bar, B_bar, C), _ = random_system(5, 1)
    K = krylov_kernel(A_bar, B_bar, C, L)
    assert K.shape == (L,)
    for power in {0, L // 2, L - 1}:
        expected = C @ torch.linalg.matrix_power(A_bar, power) @ B_bar
        assert torch.allclose(K[power], expected, rtol=1e-10, atol=1e-14)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 10**6))
def test_pieces_with_the_state_carried_are_the_whole(sizes, seed):
    system, x0 = random_system(4, seed)
    u = signal(sum(sizes), seed=seed)
    whole, x_whole = scan(*system, u, x0)
    pieces, x = [], x0
    for piece in u.split(sizes):
        y, x = scan(*system, piece, x)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(x, x_whole)


@few
@given(L=st.integers(1, 80), M=st.integers(1, 120), seed=st.integers(0, 10**6))
def test_convolution_agrees_with_numpy_whatever_the_lengths(L, M, seed):
    u, K = signal(L, seed=seed), signal(M, seed=seed + 1)
    expected = np.convolve(u.numpy(), K.numpy())[:L]
    assert np.abs(causal_conv(u, K).numpy()[: len(expected)] - expected).max() < 1e-11
    longer = torch.cat([K, torch.zeros(200, dtype=K.dtype)])
    assert (causal_conv(u, longer) - causal_conv(u, K)).abs().max() < 1e-11


@few
@given(L=st.integers(2, 60), delay=st.integers(1, 59), seed=st.integers(0, 10**6))
def test_convolution_is_linear_and_time_invariant(L, delay, seed):
    delay = min(delay, L - 1)
    u, v, K = signal(3, L, seed=seed)
    y = causal_conv(u, K)
    assert (causal_conv(2 * u - 3 * v, K) - 2 * y + 3 * causal_conv(v, K)).abs().max() < 1e-11
    late = torch.cat([torch.zeros(delay, dtype=u.dtype), u[:-delay]])
    expected = torch.cat([torch.zeros(delay, dtype=u.dtype), y[:-delay]])
    assert (causal_conv(late, K) - expected).abs().max() < 1e-11


def test_convolution_is_causal():
    u, K = signal(2, 50, seed=3)
    changed = u.clone()
    changed[30:] = 1e3
    assert (causal_conv(changed, K) - causal_conv(u, K))[:30].abs().max() < 1e-9


def test_convolution_commutes():
    u, K = signal(2, 33, seed=4)
    assert torch.allclose(causal_conv(u, K), causal_conv(K, u), rtol=0, atol=1e-12)


def test_batch_axes_broadcast():
    u, K = signal(2, 3, 20, seed=5), signal(3, 11, seed=6)
    y = causal_conv(u, K)
    assert y.shape == u.shape
    for i in range(2):
        for j in range(3):
            assert torch.allclose(y[i, j], causal_conv(u[i, j], K[j]), rtol=0, atol=1e-13)
    assert causal_conv(u[0, 0], K).shape == (3, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    u, K = signal(9, dtype=dtype), signal(9, seed=2, dtype=dtype)
    assert causal_conv(u, K).dtype == dtype
    assert causal_conv(u.to(torch.complex128), K).dtype == torch.complex128
    assert causal_conv(u.to(torch.complex64), K.real.float()).dtype in (
        torch.complex64,
        torch.complex128,
    )


def test_a_complex_system_takes_real_inputs():
    system, x0 = random_system(3, 2, torch.complex128)
    y, x = scan(*system, torch.ones(5))
    assert y.dtype == x.dtype == torch.complex128
    real, _ = random_system(3, 2)
    assert scan(*real, torch.ones(5).double(), x0)[0].is_complex()


def test_output_vector_is_not_conjugated():
    one = torch.ones(1, dtype=torch.complex128)
    assert krylov_kernel(one[None] / 2, one, 1j * one, 2).tolist() == [1j, 0.5j]


def test_unit_delay_and_arguments_are_left_alone():
    A_bar = torch.diag(torch.ones(3), -1)
    B_bar, C = torch.eye(4)[0], torch.eye(4)[3]
    u, x0 = torch.arange(1.0, 7.0), torch.zeros(4)
    y, x = scan(A_bar, B_bar, C, u, x0)
    assert y.tolist() == [0, 0, 0, 1, 2, 3] and x.tolist() == [6, 5, 4, 3]
    assert krylov_kernel(A_bar, B_bar, C, 6).tolist() == [0, 0, 0, 1, 0, 0]
    assert x0.tolist() == [0] * 4 and u.tolist() == [1, 2, 3, 4, 5, 6]


def test_gradients():
    (A_bar, B_bar, C), x0 = random_system(3, 7)
    u = signal(6, seed=1)
    inputs = [x.requires_grad_() for x in (A_bar, B_bar, C, u, x0)]
    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradcheck(lambda *s: krylov_kernel(*s, 5), inputs[:3])
    assert torch.autograd.gradcheck(causal_conv, (u, signal(4, seed=2).requires_grad_()))


def test_fast_lengths():
    for n in [*range(1, 3000), 10**6, 10**6 + 3]:
        found = fft_length(n)
        assert n <= found <= max(1.25 * n, n + 1)
        while found % 2 == 0:
            found //= 2
        assert found in (1, 3, 5, 7, 9, 15)


# --- bad calls

(A_bar, B_bar, C), x0 = random_system(3, 0)
u = torch.ones(5, dtype=torch.float64)
BAD = [
    (TypeError, "A_bar: ", lambda: scan([[1.0]], B_bar, C, u)),
    (TypeError, "A_bar: ", lambda: scan(A_bar.half(), B_bar, C, u)),
    (ValueError, "A_bar: ", lambda: scan(A_bar[:2], B_bar, C, u)),
    (ValueError, "A_bar: ", lambda: krylov_kernel(A_bar[None], B_bar, C, 5)),
    (ValueError, "B_bar: ", lambda: scan(A_bar, B_bar[:2], C, u)),
    (TypeError, "B_bar: ", lambda: scan(A_bar, 1.0, C, u)),
    (ValueError, "C: ", lambda: scan(A_bar, B_bar, C[None], u)),
    (ValueError, "C: ", lambda: krylov_kernel(A_bar, B_bar, C * math.nan, 5)),
    (TypeError, "u: ", lambda: scan(A_bar, B_bar, C, [1.0, 2.0])),
    (TypeError, "u: ", lambda: scan(A_bar, B_bar, C, torch.ones(5).int())),
    (ValueError, "u: ", lambda: scan(A_bar, B_bar, C, u[None])),
    (ValueError, "u: ", lambda: scan(A_bar, B_bar, C, u[:0])),
    (ValueError, "u: ", lambda: scan(A_bar, B_bar, C, u * math.inf)),
    (ValueError, "x0: ", lambda: scan(A_bar, B_bar, C, u, x0[:2])),
    (TypeError, "x0: ", lambda: scan(A_bar, B_bar, C, u, 0.0)),
    (ValueError, "L: ", lambda: krylov_kernel(A_bar, B_bar, C, 0)),
    (TypeError, "L: ", lambda: krylov_kernel(A_bar, B_bar, C, 5.0)),
    (TypeError, "L: ", lambda: krylov_kernel(A_bar, B_bar, C, True)),
    (TypeError, "u: ", lambda: causal_conv(5, u)),
    (TypeError, "u: ", lambda: causal_conv(u.bfloat16(), u)),
    (ValueError, "u: ", lambda: causal_conv(torch.tensor(1.0), u)),
    (ValueError, "u: ", lambda: causal_conv(u * math.nan, u)),
    (TypeError, "K: ", lambda: causal_conv(u, u.half())),
    (TypeError, "K: ", lambda: causal_conv(u, None)),
    (ValueError, "K: ", lambda: causal_conv(u, u[:0])),
    (ValueError, "K: ", lambda: causal_conv(torch.ones(2, 3, 5), torch.ones(2, 5))),
]


@pytest.mark.parametrize(("error", "start", "call"), BAD)
def test_bad_call(error, start, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(start)


# The layer's convolution


def dense(u, K, D):
    """The layer's convolution as matrices, in double precision."""
    L = u.shape[1]
    lag = torch.arange(L)[:, None] - torch.arange(L)
    past = K if K.ndim == 2 else K[0]
    T = torch.where(lag >= 0, past[:, lag.clamp(min=0)], 0.0)  # (H, L, L)
    if K.ndim == 3:
        T = T + torch.where(lag < 0, K[1][:, (-lag - 1).clamp(min=0)], 0.0)
    return torch.einsum("hkj,bjh->bkh", T, u) + D * u


def layer_inputs(B, L, H, directions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (H, L) if directions == 1 else (2, H, L)
    made = ((B, L, H), shape, (H,))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in made]


@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize(("B", "L", "H"), [(1, 1, 1), (2, 2, 3), (3, 7, 2), (2, 100, 4), (0, 5, 2)])
def test_the_layers_convolution_is_a_matrix(B, L, H, directions):
    u, K, D = layer_inputs(B, L, H, directions)
    expected = dense(u, K, D)
    assert torch.allclose(channel_conv(u, K, D), expected, rtol=0, atol=1e-12)
    assert torch.allclose(channel_conv(u, K), expected - D * u, rtol=0, atol=1e-12)
    single = channel_conv(*(t.float() for t in (u, K, D))).double()
    bound = 1e-6 * (K.norm() + D.norm()) * (u.norm() + 1)
    assert B == 0 or (single - expected).abs().max() < bound


@pytest.mark.parametrize("directions", (1, 2))
def test_the_layers_convolution_under_transforms(directions):
    u, K, D = layer_inputs(2, 6, 3, directions)
    jacobian = torch.func.jacrev(channel_conv, argnums=(0, 1, 2))(u, K, D)
    expected = torch.func.jacrev(dense, argnums=(0, 1, 2))(u, K, D)
    for found, wanted in zip(jacobian, expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)

    def loss(function):
        return lambda u, K, D: function(u, K, D).pow(3).sum()

    for argnums in (0, 1, 2):
        second = torch.func.jacrev(torch.func.jacrev(loss(channel_conv), argnums), argnums)
        wanted = torch.func.jacrev(torch.func.jacrev(loss(dense), argnums), argnums)
        assert torch.allclose(second(u, K, D), wanted(u, K, D), atol=1e-10)
    many = torch.stack((u, 2 * u, -u))
    for dims, args in (((0, None, None), (many, K, D)), ((0, None, 0), (many, K, D.expand(3, -1)))):
        found = torch.func.vmap(channel_conv, dims)(*args)
        assert torch.allclose(found, torch.stack([dense(v, K, D) for v in many]), atol=1e-12)
    kernels = torch.stack((K, -K, 3 * K), -1)
    found = torch.func.vmap(channel_conv, (None, -1, None))(u, kernels, D)
    wanted = torch.stack([dense(u, k, D) for k in kernels.unbind(-1)])
    assert torch.allclose(found, wanted, atol=1e-12)


def test_the_layers_convolution_is_compiled_and_exported():
    u, K, D = (t.float() for t in layer_inputs(2, 9, 3, 1))
    expected = channel_conv(u, K, D)
    compiled = torch.compile(channel_conv, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(u, K, D), expected, atol=1e-5)

    class Module(torch.nn.Module):
        def forward(self, u, K, D):
            return channel_conv(u, K, D)

    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        Module(), (u, K, D), dynamic_shapes={"u": {0: batch}, "K": None, "D": None}
    )
    more = torch.randn(5, 9, 3)
    assert torch.allclose(program.module()(more, K, D), channel_conv(more, K, D), atol=1e-5)


def test_the_layers_convolution_is_checkpointed():
    u, K, D = (t.requires_grad_() for t in layer_inputs(2, 9, 3, 1))
    again = torch.utils.checkpoint.checkpoint(channel_conv, u, K, D, use_reentrant=False)
    found = torch.autograd.grad(again.pow(2).sum(), (u, K, D))
    wanted = torch.autograd.grad(dense(u, K, D).pow(2).sum(), (u, K, D))
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (ValueError, {"u": torch.ones(3, 4)}),
        (ValueError, {"K": torch.ones(3, 5)}),
        (ValueError, {"K": torch.ones(3, 3, 4)}),
        (ValueError, {"D": torch.ones(4)}),
        (TypeError, {"K": torch.ones(3, 4).double()}),
        (
            TypeError,
            {
                k: v.half()
                for k, v in (
                    ("u", torch.ones(2, 4, 3)),
                    ("K", torch.ones(3, 4)),
                    ("D", torch.ones(3)),
                )
            },
        ),
    ],
)
def test_the_layers_convolution_names_what_is_wrong(error, change):
    good = {"u": torch.ones(2, 4, 3), "K": torch.ones(3, 4), "D": torch.ones(3)}
    with pytest.raises(error, match="|".join(change)):
        channel_conv(**(good | change))
