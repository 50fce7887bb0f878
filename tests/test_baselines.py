"""The rivals compute what they should."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.baselines import (
    ATTENTIONS,
    LSSLLayer,
    TransformerLayer,
    _direct_sums,
    attention,
    fused_attention,
    linear_attention,
    lssl_kernel,
    orthogonal_features,
    performer_attention,
    unit_circle_kernel,
)
from s4mini.cauchy_sum import keops_available
from s4mini.convolve import krylov_kernel, scan
from s4mini.discretization import discretize
from s4mini.kernel import dplr_kernel
from s4mini.lowrank import half_spectrum, nplr, real_form
from s4mini.projection import hippo


def heads(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=dtype, generator=generator) for _ in range(3)]


def quadratic(f, g, v):
    weight = (f @ g.mT).tril()
    return (weight / weight.sum(-1, keepdim=True)) @ v


# The dense layer


@settings(deadline=None, max_examples=30)
@given(N=st.integers(1, 8), L=st.integers(1, 70), seed=st.integers(0, 99))
def test_doubling_is_the_krylov_kernel(N, L, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B = hippo("legs", N)
    dt = torch.rand(3, dtype=A.dtype, generator=generator) + 1e-3
    C = torch.randn(3, N, dtype=A.dtype, generator=generator)
    A_bar, B_bar = discretize(A, B, dt)
    K = lssl_kernel(A_bar, B_bar, C, L)
    for h in range(3):
        slow = krylov_kernel(A_bar[h], B_bar[h], C[h], L)
        assert (K[h] - slow).abs().max() < 1e-12 * max(1, slow.abs().max())


def test_dense_layer_is_a_recurrence_in_single_precision():
    layer = LSSLLayer(2, 16, generator=torch.Generator().manual_seed(0))
    u = heads(1, 300, 2, dtype=torch.float32)[0]
    y = layer(u)
    A_bar, B_bar = discretize(layer.A, layer.B, layer.log_dt.exp())
    for h in range(2):
        slow, _ = scan(A_bar[h], B_bar[h], layer.C[h], u[0, :, h])
        slow = slow + layer.D[h] * u[0, :, h]
        assert (y[0, :, h] - slow).abs().max() < 1e-4 * slow.abs().max()


def test_gradients_of_the_dense_kernel():
    A, B = hippo("legs", 3)
    A_bar, B_bar = discretize(A, B, torch.tensor([0.1, 0.7], dtype=A.dtype))
    inputs = [t.clone().requires_grad_() for t in (A_bar, B_bar, B_bar.flip(-1))]
    assert torch.autograd.gradcheck(lambda *t: lssl_kernel(*t, 11), inputs)


def test_every_parameter_of_the_dense_layer_is_trained():
    layer = LSSLLayer(3, 4, generator=torch.Generator().manual_seed(0))
    layer(heads(2, 20, 3, dtype=torch.float32)[0]).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


# Attention


@pytest.mark.parametrize("L", [1, 2, 17, 64])
def test_attention_by_hand(L):
    q, k, v = heads(2, L, 4)
    y = attention(q, k, v)
    for i in range(L):
        weight = torch.exp(k[:, : i + 1] @ q[:, i, :, None] / 2)  # sqrt(4)
        slow = (weight * v[:, : i + 1]).sum(1) / weight.sum(1)
        assert torch.allclose(y[:, i], slow, atol=1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("L", [1, 2, 100, 257])
def test_fused_is_plain(L, dtype, limit):
    inputs = [t.requires_grad_() for t in heads(2, 3, L, 8, dtype=dtype)]
    results = []
    for f in (attention, fused_attention):
        y = f(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for one, two in zip(*results, strict=True):
        assert (one - two).abs().max() < limit * max(1, one.abs().max())


@settings(deadline=None, max_examples=30)
@given(L=st.integers(1, 50), chunk=st.integers(1, 60), seed=st.integers(0, 99))
def test_linear_attention_is_the_quadratic_form_of_its_kernel(L, chunk, seed):
    q, k, v = heads(2, L, 5, seed=seed)
    slow = quadratic(F.elu(q) + 1, F.elu(k) + 1, v)
    assert torch.allclose(linear_attention(q, k, v, chunk), slow, atol=1e-10)


@settings(deadline=None, max_examples=20)
@given(L=st.integers(1, 50), chunk=st.integers(1, 60), m=st.integers(1, 9))
def test_performer_is_the_quadratic_form_of_its_features(L, chunk, m):
    q, k, v = heads(2, L, 4)
    W = orthogonal_features(m, 4, torch.Generator().manual_seed(m)).double()
    f, g = (torch.exp(x / 4**0.25 @ W.T - x.square().sum(-1, True) / 4) for x in (q, k))
    y = performer_attention(q, k, v, W, chunk)
    assert torch.allclose(y, quadratic(f, g, v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("f", [linear_attention, performer_attention])
def test_gradients_of_chunked_attention(f):
    inputs = [t.requires_grad_() for t in heads(1, 7, 3)]
    W = orthogonal_features(4, 3, torch.Generator().manual_seed(0)).double()
    more = (W,) if f is performer_attention else ()
    assert torch.autograd.gradcheck(lambda *t: f(*t, *more, chunk=3), inputs)


def test_random_features_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    q, k = 0.3 * torch.randn(2, 6, generator=generator)
    W = orthogonal_features(2**17, 6, generator)
    f, g = (torch.exp(W @ x - x @ x / 2) for x in (q, k))
    estimate, spread = (f * g).mean(), (f * g).std() / math.sqrt(len(W))
    assert abs(estimate - torch.exp(q @ k)) < 6 * spread


def test_the_error_of_random_features_falls_like_their_root():
    q, k, v = heads(2, 40, 8, dtype=torch.float32)
    q, k = 0.3 * q, 0.3 * k
    exact, error = attention(q, k, v), {}
    generator = torch.Generator().manual_seed(0)
    for m in (32, 2048):
        square = 0
        for _ in range(8):
            W = orthogonal_features(m, 8, generator)
            square += (performer_attention(q, k, v, W) - exact).square().mean().item()
        error[m] = math.sqrt(square)
    slope = math.log(error[2048] / error[32]) / math.log(64)
    assert -0.6 < slope < -0.4


@pytest.mark.parametrize(("m", "d"), [(1, 1), (3, 8), (8, 8), (20, 8)])
def test_directions_are_orthogonal_and_of_the_right_length(m, d):
    W = orthogonal_features(m, d, torch.Generator().manual_seed(0))
    assert W.shape == (m, d)
    for block in W.split(d):
        gram = block @ block.T
        assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-4
    many = orthogonal_features(20000, d, torch.Generator().manual_seed(1))
    assert abs(many.square().sum(1).mean() / d - 1) < 0.05
    assert (many.mean(0)).abs().max() < 0.05


def test_large_queries_and_keys_do_not_overflow():
    q, k, v = heads(1, 50, 64, dtype=torch.float32)
    W = orthogonal_features(128, 64, torch.Generator().manual_seed(0))
    assert performer_attention(5 * q, 3 * k, v, W).isfinite().all()


# Layers


def layers(H=8):
    generator = torch.Generator().manual_seed(0)
    yield "LSSL", LSSLLayer(H, 6, generator=generator)
    for kind in ATTENTIONS:
        yield kind, TransformerLayer(H, 2, kind, generator=generator)


@pytest.mark.parametrize(("name", "layer"), list(layers()))
def test_layers_do_not_look_ahead(name, layer):
    layer = layer.double()
    u = heads(1, 23, 8)[0].requires_grad_()
    for k in (0, 11, 22):
        (slope,) = torch.autograd.grad(layer(u)[0, k].sum(), u)
        assert slope[0, k + 1 :].abs().sum() < 1e-9, name
        assert slope[0, k].abs().max() > 1e-3


@pytest.mark.parametrize(("name", "layer"), list(layers()))
def test_layers_keep_the_shape_and_treat_sequences_alone(name, layer):
    u = heads(3, 9, 8, dtype=torch.float32)[0]
    y = layer(u)
    assert y.shape == u.shape and y.isfinite().all()
    assert torch.allclose(layer(u[1:2]), y[1:2], atol=1e-5)
    assert layer(u[:, :1]).shape == (3, 1, 8)


def test_the_seed_decides():
    one, two = (
        TransformerLayer(8, 2, "performer", generator=torch.Generator().manual_seed(4))
        for _ in range(2)
    )
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# The kernel as published


def published(measure="legs", N=16, dt=0.01, L=64, dtype=torch.complex128):
    """Return the arguments of unit_circle_kernel, and the kernel."""
    modes = half_spectrum(nplr(measure, N))
    generator = torch.Generator().manual_seed(N)
    C = torch.randn(N // 2, dtype=torch.complex128, generator=generator)
    A, B, dense = real_form(*modes[:3], C)
    A_bar, _ = discretize(A, B, dt)
    dense = dense - dense @ torch.linalg.matrix_power(A_bar, L)
    C_tilde = torch.complex(dense[: N // 2], -dense[N // 2 :]) / 2
    system = [t.to(dtype) for t in (*modes[:3], C_tilde)]
    return system, dplr_kernel(*modes[:3], C, dt, L)


@pytest.mark.parametrize("N", [2, 16, 64])
@pytest.mark.parametrize("L", [1, 2, 15, 256])
def test_published_kernel_is_the_kernel(N, L):
    system, K = published(N=N, L=L)
    slow = unit_circle_kernel(*system, 0.01, L)
    assert slow.shape == (L,)
    assert (slow - K).abs().max() < 1e-9 * K.abs().max()


def test_published_kernel_of_rank_two():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 5, dtype=torch.complex128, generator=generator)
    Lambda = torch.complex(-0.1 - z[..., 0].real.abs(), z[..., 0].imag)
    P, B, C = z[..., 3:], z[..., 1], z[..., 2]
    dt = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    A, B_real, C_real = real_form(Lambda, P, B, C)
    A_bar, _ = discretize(A, B_real, dt)
    dense = C_real - (C_real[:, None] @ torch.linalg.matrix_power(A_bar, 31))[:, 0]
    C_tilde = torch.complex(dense[:, :4], -dense[:, 4:]) / 2
    slow = unit_circle_kernel(Lambda, P, B, C_tilde, dt, 31)
    K = dplr_kernel(Lambda, P, B, C, dt, 31)
    assert (slow - K).abs().max() < 1e-10 * K.abs().max()


def test_published_kernel_is_finite_in_single_precision_and_so_are_its_gradients():
    for L in (2, 64, 1024):
        system, K = published(N=64, L=L, dtype=torch.complex64)
        inputs = [t.requires_grad_() for t in system]
        slow = unit_circle_kernel(*inputs, 0.01, L)
        assert (slow - K).abs().max() < 1e-2 * K.abs().max()
        grads = torch.autograd.grad(slow.square().sum(), inputs)
        assert all(g.isfinite().all() for g in grads)


def test_the_table_of_quotients_is_stored():
    v = torch.randn(2, 2, 2, 8, dtype=torch.complex64, requires_grad=True)
    modes = torch.randn(2, 8, dtype=torch.complex64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        _direct_sums(v, modes, torch.randn(33, dtype=torch.complex64))
    assert sum(kept) >= 2 * 16 * 33  # at least every z - mode


@pytest.mark.skipif(bool(keops_available()), reason=keops_available())
def test_published_kernel_with_keops():
    system, K = published(L=64, dtype=torch.complex64)
    fast = unit_circle_kernel(*(t[None] for t in system), 0.01, 64, keops=True)
    assert fast.shape == (1, 64)
    assert (fast[0] - K).abs().max() < 1e-3 * K.abs().max()


# Bad calls


def test_bad_calls_are_refused():
    q, k, v = heads(2, 5, 4)
    ones = torch.ones(4, dtype=torch.complex128)
    calls = [
        (ValueError, "k", lambda: attention(q, k[..., :3], v)),
        (ValueError, "v", lambda: attention(q, k, v[:, :3])),
        (ValueError, "v", lambda: fused_attention(q, k, v[:1])),
        (TypeError, "q", lambda: linear_attention(q + 0j, k, v)),
        (ValueError, "chunk", lambda: linear_attention(q, k, v, 0)),
        (TypeError, "chunk", lambda: linear_attention(q, k, v, 2.5)),
        (ValueError, "W", lambda: performer_attention(q, k, v, q[0, :, :3])),
        (ValueError, "q", lambda: attention(q * math.nan, k, v)),
        (ValueError, "m", lambda: orthogonal_features(0, 4)),
        (ValueError, "heads", lambda: TransformerLayer(8, 3)),
        (ValueError, "attention", lambda: TransformerLayer(8, 2, "flash")),
        (ValueError, "features", lambda: TransformerLayer(8, 2, "performer", 0)),
        (TypeError, "d_model", lambda: TransformerLayer(8.0)),
        (ValueError, "u", lambda: TransformerLayer(8)(q)),
        (ValueError, "u", lambda: LSSLLayer(8)(q)),
        (TypeError, "d_state", lambda: LSSLLayer(8, "4")),
        (ValueError, "measure", lambda: LSSLLayer(8, 4, "nobody")),
        (ValueError, "B_bar", lambda: lssl_kernel(torch.eye(3), torch.ones(2), torch.ones(2), 4)),
        (ValueError, "L", lambda: lssl_kernel(torch.eye(2), torch.ones(2), torch.ones(2), 0)),
        (ValueError, "dt", lambda: unit_circle_kernel(ones, ones[:, None], ones, ones, 0.0, 4)),
        (ValueError, "B", lambda: unit_circle_kernel(ones, ones[:, None], ones[:2], ones, 1, 4)),
        (ValueError, "keops", lambda: unit_circle_kernel(ones, ones[:, None], ones, ones, 1, 4, 2)),
    ]
    for kind, name, call in calls:
        with pytest.raises(kind, match=f"^{name}: "):
            call()
