"""Sums of simple fractions.

For a diagonal matrix the resolvent is a sum of simple fractions. Here it is written
without a pole at the nodes, and in real numbers only.

Tangled from book/cauchy.md.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s4mini.checks import check_int, check_tensors
from s4mini.generating import _check_batch

__all__ = ["nodes", "cauchy_naive", "cauchy"]


def nodes(
    L: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the real coordinates of the roots of unity.

    Args:
        L: length of the sequence, >= 1.
        dtype: float32 or float64.
        device: where to put them.

    Returns:
        x = 2 sin(theta/2) and y = cos(theta/2), each (L // 2 + 1,), for
        theta = 2 pi k / L; each entry rounded once, y exactly 0 at Nyquist.

    Raises:
        TypeError: L is no integer, or dtype is not real floating.
        ValueError: L < 1.

    Source: book/cauchy.md.
    """
    L = check_int("L", L)
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    k = torch.arange(L // 2 + 1, dtype=torch.float64, device=device)
    x = 2 * torch.sin(math.pi / L * k)
    y = torch.sin(math.pi / (2 * L) * (L - 2 * k))
    return x.to(dtype), y.to(dtype)


def _checked(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Examine the arguments of a sum and give them one precision."""
    check_tensors(
        v=(v, "... k n"),
        Lambda=(Lambda, "... n"),
        x=(x, "real M"),
        y=(y, "real M"),
    )
    kind = torch.promote_types(v.dtype, Lambda.dtype)
    kind = torch.promote_types(kind, torch.promote_types(x.dtype, y.dtype))
    kind = torch.promote_types(kind, torch.complex64)
    real = kind.to_real()
    _check_batch(v=v.shape[:-2], Lambda=Lambda.shape[:-1])
    return v.to(kind), Lambda.to(kind), x.to(real), y.to(real)


def cauchy_naive(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sum v / (i x - y Lambda) over conjugate pairs, in complex numbers.

    Args:
        v: (..., k, n) complex weights of k sums.
        Lambda: (..., n) complex, one of each conjugate pair.
        x: (M,) real.
        y: (M,) real, of the same dtype as x.

    Returns:
        (..., k, M) complex: the sums over the n modes and their conjugates.

    Raises:
        TypeError: an argument is not a tensor of the kind above.
        ValueError: shapes do not agree, or an entry is not finite.

    Source: Gu et al. 2022a, algorithm 1, line 2; book/cauchy.md.
    """
    return _cauchy_naive(*_checked(v, Lambda, x, y))


def _cauchy_naive(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Do the work of cauchy_naive; nothing is examined."""
    upper = v @ (1 / (1j * x - y * Lambda[..., None]))  # (..., n, M)
    lower = v.conj() @ (1 / (1j * x - y * Lambda.conj()[..., None]))
    return upper + lower


def _features(a: Tensor, m: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return H and G, (h, n, M), of modes a, m (h, n) at nodes x, y (M,)."""
    a, m, y2 = a[..., None], m[..., None], y * y
    D = m * y2 - x * x
    g = torch.addcmul(D * D, (2 * a) ** 2, (x * y) ** 2).reciprocal_()
    return D.mul_(g), g.mul_(y2)


def _weights(v: Tensor, Lambda: Tensor) -> Tensor:
    """Return the real weights (..., 2k, 2n) of the features."""
    Lambda = Lambda[..., None, :]  # (..., 1, n)
    up, four_a = v * Lambda, 4 * Lambda.real
    u = v.real.expand_as(up)
    m = Lambda.real**2 + Lambda.imag**2
    real = torch.cat((2 * up.real, -four_a * m * u), -1)
    imag = torch.cat((2 * u, -four_a * (v * Lambda.conj()).real), -1)
    return torch.cat((real, imag), -2)


def _tiles(h: int, n: int, M: int, cuda: bool) -> Iterator:
    """Cut h channels and M nodes into pieces whose features stay in cache."""
    limit = 2**24 if cuda else 2**17  # entries of one feature
    width = min(M, max(1, limit // n))
    step = max(1, limit // (n * width))
    for i in range(0, h, step):
        for j in range(0, M, width):
            yield slice(i, i + step), slice(j, j + width)


class _PairSums(torch.autograd.Function):
    """S = W [H; G], with the features made piece by piece, twice."""

    @staticmethod
    def forward(ctx, W, a, m, x, y):
        ctx.save_for_backward(W, a, m, x, y)
        (h, n), M = a.shape, len(x)
        S = W.new_empty(h, W.shape[1], M)
        for i, j in _tiles(h, n, M, W.is_cuda):
            H, G = _features(a[i], m[i], x[j], y[j])
            S[i, :, j] = torch.baddbmm(W[i, :, :n] @ H, W[i, :, n:], G)
        return S

    @staticmethod
    @once_differentiable
    def backward(ctx, dS):
        W, a, m, x, y = ctx.saved_tensors
        (h, n), M = a.shape, len(x)
        dW, da, dm = (torch.zeros_like(t) for t in (W, a, m))
        for i, j in _tiles(h, n, M, W.is_cuda):
            H, G = _features(a[i], m[i], x[j], y[j])
            dSi = dS[i, :, j]
            dW[i, :, :n] += dSi @ H.mT
            dW[i, :, n:] += dSi @ G.mT
            dH, dG = W[i, :, :n].mT @ dSi, W[i, :, n:].mT @ dSi
            T = torch.addcmul(H * dH, G, dG)
            dm[i] += (G * dH).sum(-1) - 2 * (H.mul_(T) @ (y[j] * y[j]))
            da[i] -= 8 * a[i] * (G.mul_(T) @ (x[j] * x[j]))
        return dW, da, dm, None, None


def cauchy(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sum v / (i x - y Lambda) over conjugate pairs, in real numbers.

    Args:
        v: (..., k, n) complex weights of k sums.
        Lambda: (..., n) complex, one of each conjugate pair.
        x: (M,) real.
        y: (M,) real, of the same dtype as x.

    Returns:
        (..., k, M) complex: the sums over the n modes and their conjugates.

    Raises:
        TypeError: an argument is not a tensor of the kind above.
        ValueError: shapes do not agree, or an entry is not finite.

    Source: Gu et al. 2022a, algorithm 1, line 2; book/cauchy.md.
    """
    return _cauchy(*_checked(v, Lambda, x, y))


def _cauchy(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Do the work of cauchy; nothing is examined."""
    k, n = v.shape[-2:]
    W = _weights(v, Lambda)  # (..., 2k, 2n)
    lead = W.ndim - 1 - Lambda.ndim  # axes in front that Lambda lacks
    Lambda = Lambda.expand(*W.shape[lead:-2], n).reshape(-1, n)  # (h, n)
    rows = W.reshape(-1, len(Lambda), 2 * k, 2 * n).transpose(0, 1)
    S = _PairSums.apply(
        rows.reshape(len(Lambda), -1, 2 * n),
        Lambda.real,
        Lambda.real**2 + Lambda.imag**2,
        x,
        y,
    )
    S = S.reshape(len(Lambda), -1, 2 * k, len(x)).transpose(0, 1)
    S = S.reshape(*W.shape[:-1], len(x))  # (..., 2k, M)
    return torch.complex(y * S[..., :k, :], x * S[..., k:, :])
