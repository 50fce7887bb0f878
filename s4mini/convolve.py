"""A recurrence is a convolution.

The same outputs, computed in two ways: step by step with a state, or all at once with a
kernel and the fast Fourier transform. We prove that they agree, and find out what the
kernel costs.

Tangled from book/convolve.md.
"""

import torch
from torch import Tensor

from s4mini.checks import check_int, check_tensors
from s4mini.ssm import promote

__all__ = ["scan", "krylov_kernel", "causal_conv"]


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


def _fft_length(n: int) -> int:
    """Return a length >= n for which the fast Fourier transform is fast."""
    odd = (1, 3, 5, 9, 15)
    return min(m << ((n - 1) // m).bit_length() for m in odd)


def _convolve(u: Tensor, K: Tensor) -> Tensor:
    """Convolve causally, without a look at the arguments."""
    L = u.shape[-1]
    K = K[..., :L]
    n = _fft_length(L + K.shape[-1] - 1)
    if u.is_complex() or K.is_complex():
        product = torch.fft.fft(u, n) * torch.fft.fft(K, n)
        return torch.fft.ifft(product, n)[..., :L]
    product = torch.fft.rfft(u, n) * torch.fft.rfft(K, n)
    return torch.fft.irfft(product, n)[..., :L]


def causal_conv(u: Tensor, K: Tensor) -> Tensor:
    """Convolve sequences with kernels; no output sees a later input.

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
    return _convolve(u, K)
