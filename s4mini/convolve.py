"""A recurrence is a convolution.

The same outputs, computed in two ways: step by step with a state, or all at once with a
kernel and the fast Fourier transform. We prove that they agree, and find out what the
kernel costs.

Tangled from book/convolve.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s4mini.checks import check_int, check_tensors
from s4mini.ssm import promote

__all__ = ["scan", "krylov_kernel", "fft_length", "causal_conv", "channel_conv"]


def scan(
    A_bar: Tensor,
    B_bar: Tensor,
    C: Tensor,
    u: Tensor,
    x0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence x = A_bar x + B_bar u, y = C x over a sequence.

    Args:
        A_bar: (N, N) sampled state matrix, dimensionless.
        B_bar: (N,) sampled input vector, in state/input.
        C: (N,) output vector, in output/state; used without conjugation.
        u: (L,) inputs, real or complex.
        x0: (N,) state before the first input; zero if None.

    Returns:
        y (L,), the outputs, and the state (N,) after the last input.

    Raises:
        TypeError: an argument is no tensor in single or double precision.
        ValueError: shapes do not fit, or an entry is not finite.

    Source: Gu et al. 2022a, eq. 3; book/convolve.md.
    """
    check_tensors(A_bar=(A_bar, "N N"), B_bar=(B_bar, "N"), C=(C, "N"), u=(u, "L"))
    x0 = torch.zeros_like(B_bar) if x0 is None else x0
    check_tensors(B_bar=(B_bar, "N"), x0=(x0, "N"))
    A_bar, B_bar, C, u, x = promote(A_bar=A_bar, B_bar=B_bar, C=C, u=u, x0=x0)
    y = []
    for u_k in u:
        x = A_bar @ x + B_bar * u_k
        y.append(C @ x)
    return torch.stack(y), x


def krylov_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, L: int) -> Tensor:
    """Compute the kernel K_l = C A_bar^l B_bar for l = 0 ... L - 1.

    Args:
        A_bar: (N, N) sampled state matrix, dimensionless.
        B_bar: (N,) sampled input vector, in state/input.
        C: (N,) output vector, in output/state; used without conjugation.
        L: number of entries, at least 1.

    Returns:
        K (L,), in output/input; complex if an argument is.

    Raises:
        TypeError: an argument is no tensor in single or double precision,
            or L is no integer.
        ValueError: shapes do not fit, an entry is not finite, or L < 1.

    Source: Gu et al. 2022a, eq. 5; book/convolve.md.
    """
    L = check_int("L", L)
    check_tensors(A_bar=(A_bar, "N N"), B_bar=(B_bar, "N"), C=(C, "N"))
    power, B_bar, C = promote(A_bar=A_bar, B_bar=B_bar, C=C)
    X = B_bar[:, None]  # (N, m), with power = A_bar^m
    while X.shape[1] < L:
        X = torch.cat([X, power @ X], dim=1)
        power = power @ power
    return C @ X[:, :L]


def fft_length(n: int) -> int:
    """Return a length >= n for which the fast Fourier transform is fast.

    Args:
        n: the smallest length allowed, at least 1.

    Source: book/convolve.md.
    """
    odd = (1, 3, 5, 7, 9, 15)
    return min(m << ((n - 1) // m).bit_length() for m in odd)


def causal_conv(u: Tensor, K: Tensor) -> Tensor:
    """Convolve sequences with kernels; no output depends on a later input.

    Args:
        u: (..., L) inputs, real or complex; the last axis is time.
        K: (..., M) kernels, real or complex, whose batch axes broadcast with
            those of u. Entries beyond L have no effect; a shorter kernel
            counts as continued by zeros.

    Returns:
        y (..., L) with y_k = sum of K_l u_{k-l} over l <= k.

    Raises:
        TypeError: an argument is no tensor in single or double precision.
        ValueError: an entry is not finite, or the batch axes do not
            broadcast.

    Source: Gu et al. 2022a, section 2.4; book/convolve.md.
    """
    check_tensors(u=(u, "... L"), K=(K, "... M"))
    u, K = promote(u=u, K=K)
    try:
        torch.broadcast_shapes(u.shape[:-1], K.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"K: expected batch axes that broadcast with those of u, got "
            f"{tuple(K.shape)} for u {tuple(u.shape)}"
        ) from error
    L, n = u.shape[-1], fft_length(2 * u.shape[-1] - 1)
    if u.is_complex() or K.is_complex():
        product = torch.fft.fft(u, n) * torch.fft.fft(K[..., :L], n)
        return torch.fft.ifft(product, n)[..., :L]
    product = torch.fft.rfft(u, n) * torch.fft.rfft(K[..., :L], n)
    return torch.fft.irfft(product, n)[..., :L]


class _Convolution(torch.autograd.Function):
    """y of T(g, u, c): u (B, L, H), c (H, m) on a circle of n entries."""

    @staticmethod
    def forward(u: Tensor, c: Tensor, n: int) -> Tensor:
        L, c_hat, y = u.shape[1], torch.fft.rfft(c, n), torch.empty_like(u)
        padded = u.new_zeros(u.shape[2], n)  # one sequence, (H, n)
        for u_b, y_b in zip(u, y, strict=True):
            padded[:, :L] = u_b.T
            y_hat = torch.fft.rfft(padded).mul_(c_hat)
            y_b.copy_(torch.fft.irfft(y_hat, n)[:, :L].T)
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        u, c, ctx.n = inputs
        ctx.save_for_backward(u, c)

    @staticmethod
    def backward(ctx, g):
        return *_Gradients.apply(g, *ctx.saved_tensors, ctx.n), None

    @staticmethod
    def vmap(info, in_dims, u, c, n):
        u, c = _channels_last(info.batch_size, in_dims, u, c)
        y = _Convolution.apply(u, c, n)  # (B, L, V H)
        return y.unflatten(-1, (info.batch_size, -1)), 2


class _Gradients(torch.autograd.Function):
    """The other two faces: the derivatives of T by u and by c."""

    @staticmethod
    def forward(g: Tensor, u: Tensor, c: Tensor, n: int):
        L, c_hat = u.shape[1], torch.fft.rfft(c, n).conj_physical()
        du, total = torch.empty_like(u), torch.zeros_like(c_hat)
        padded = u.new_zeros(2, u.shape[2], n)
        for g_b, u_b, du_b in zip(g, u, du, strict=True):
            padded[0, :, :L], padded[1, :, :L] = g_b.T, u_b.T
            g_hat, u_hat = torch.fft.rfft(padded)
            total.addcmul_(u_hat.conj_physical_(), g_hat)
            du_b.copy_(torch.fft.irfft(g_hat.mul_(c_hat), n)[:, :L].T)
        return du, torch.fft.irfft(total, n)[:, : c.shape[1]].contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.n = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, a, b):  # of <du, a> + <dc, b> = T(g, a, c) + T(g, u, b)
        g, u, c = ctx.saved_tensors
        y = _Convolution.apply(a, c, ctx.n) + _Convolution.apply(u, b, ctx.n)
        du, _ = _Gradients.apply(g, u, b, ctx.n)
        _, dc = _Gradients.apply(g, a, c, ctx.n)
        return y, du, dc, None

    @staticmethod
    def vmap(info, in_dims, g, u, c, n):
        size = info.batch_size
        g, u, c = _channels_last(size, in_dims, g, u, c)
        du, dc = _Gradients.apply(g, u, c, n)
        return (du.unflatten(-1, (size, -1)), dc.unflatten(0, (size, -1))), (2, 0)


def _channels_last(size: int, in_dims: tuple, *tensors: Tensor) -> list[Tensor]:
    """Fold an axis of vmap into the channels: (B, L, V H) and (V H, m)."""
    moved = []
    for dim, t in zip(in_dims, tensors, strict=False):
        t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
        kernel = t.ndim == 3  # (V, H, m); else (V, B, L, H)
        moved.append(t.flatten(0, 1) if kernel else t.movedim(0, 2).flatten(2))
    return moved


def channel_conv(u: Tensor, K: Tensor, D: Tensor | None = None) -> Tensor:
    """Convolve each channel of a batch with its own kernel.

    Shapes and dtypes are examined, values are not.

    Args:
        u: (B, L, H) the input, real.
        K: (H, L) kernels of the present and the past; or (2, H, L), with those
            of the future, which begin with the next sample, as K[1].
        D: (H,) weights of the present sample, the direct path; none if None.

    Returns:
        (B, L, H), y_k = D u_k + sum_j K_j u_{k-j}, and for two directions also
        sum_j K[1]_j u_{k+1+j}.

    Raises:
        TypeError: dtypes differ, or are neither single nor double precision.
        ValueError: a shape is wrong.

    Source: Gu et al. 2022a, section 2.4; book/convolve.md.
    """
    L, H = u.shape[-2:] if u.ndim == 3 else (0, 0)
    if u.ndim != 3 or K.shape not in ((H, L), (2, H, L)):
        raise ValueError(
            "u, K: expected (B, L, H) and (H, L) or (2, H, L), got "
            f"{tuple(u.shape)} and {tuple(K.shape)}"
        )
    if D is not None and D.shape != (H,):
        raise ValueError(f"D: expected ({H},), got {tuple(D.shape)}")
    kinds = {t.dtype for t in (u, K, D) if t is not None}
    if len(kinds) > 1 or not kinds <= {torch.float32, torch.float64}:
        raise TypeError(
            "u, K, D: expected one dtype, float32 or float64, got "
            + ", ".join(sorted(map(str, kinds)))
        )
    n = fft_length(max(1, (2 * L - 1 if K.ndim == 2 else 2 * L)))
    past = K if K.ndim == 2 else K[0]
    if D is not None:
        past = past + F.pad(D[:, None], (0, L - 1))
    c = (
        past
        if K.ndim == 2
        else torch.cat((F.pad(past, (0, n - 2 * L)), K[1].flip(-1)), -1)
    )  # (H, L), or (H, n) with the future at the end of the circle
    if u.is_cuda or torch.compiler.is_compiling():
        y_hat = torch.fft.rfft(u.mT, n) * torch.fft.rfft(c, n)
        return torch.fft.irfft(y_hat, n)[..., :L].mT
    return _Convolution.apply(u, c, n)
