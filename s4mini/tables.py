"""The kernel by two tables.

The kernel of a diagonal plus low-rank system as the product of a table of rows and a
table of columns, in real numbers, without roots of unity, Cauchy sums or a Fourier
transform.

Tangled from book/tables.md.
"""

import math

import torch
from torch import Tensor

__all__ = ["real_columns", "real_rows", "krylov_tables", "grow_rows", "table_kernel"]


class _Square(torch.autograd.Function):
    """Map E = A - I to A A - I = 2 E + E E; E is (h, N, N)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(E: Tensor) -> Tensor:
        return torch.bmm(E, E).add_(E, alpha=2)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, G: Tensor) -> Tensor:
        (E,) = ctx.saved_tensors
        both = torch.bmm(G, E.mT).add_(torch.bmm(E.mT, G))
        return both.add_(G, alpha=2)


def _increments(Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
    """Return d (..., n), F (..., n, r), G (..., r, n), B_bar (..., n, q)."""
    z, step = dt[..., None] * Lambda, dt[..., None, None]
    R = (1 / (1 - z / 2))[..., None]  # (..., n, 1)
    small = step * (P.mH @ (R * P)).real  # (..., r, r)
    small = small + torch.eye(P.shape[-1], dtype=dt.dtype, device=dt.device)
    F = step * R * (P @ torch.linalg.inv(small).to(P))
    G = P.mH * R.mT
    b = step * B
    B_bar = R * b - F @ (G @ b).real.to(F)
    return z * R[..., 0], F, G, B_bar


def real_columns(z: Tensor) -> Tensor:
    """Write half states in real coordinates.

    Args:
        z: (..., n, k) complex, k states as columns.

    Returns:
        (..., 2n, k) real, [Re; Im].

    Source: book/tables.md.
    """
    return torch.cat((z.real, z.imag), -2)


def real_rows(z: Tensor) -> Tensor:
    """Write output vectors for real coordinates.

    Args:
        z: (..., k, n) complex, k half spectra as rows.

    Returns:
        (..., k, 2n) real, 2 [Re, -Im].

    Source: book/tables.md.
    """
    return 2 * torch.cat((z.real, -z.imag), -1)


def _turn(re: Tensor, im: Tensor, X: Tensor) -> Tensor:
    """Multiply columns X (..., 2n, k) by the diagonal re + i im, (..., n)."""
    same, other = torch.cat((re, re), -1), torch.cat((im, -im), -1)
    return same[..., None] * X + (other[..., None] * X).roll(re.shape[-1], -2)


def krylov_tables(
    Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor, M: int
) -> tuple[Tensor, Tensor]:
    """Return the columns A_bar^j B_bar for j < M, and A_bar^M - I.

    Nothing is examined; all batch axes are the same.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor, in time^-1/2.
        B: (..., n, q) input vectors, in state/(input * time).
        dt: (...) step of the bilinear rule, in time; its dtype is the result's.
        M: a power of two.

    Returns:
        X (..., 2n, M q), column j q + a is A_bar^j B_bar[a] in the real
        coordinates [Re; Im], and A_bar^M - I, (..., 2n, 2n).

    Source: book/tables.md.
    """
    wide = torch.complex128
    d, F, G, B_bar = _increments(Lambda.to(wide), P.to(wide), B.to(wide), dt.double())
    T = torch.cat((real_columns(B_bar), real_columns(F)), -1).to(dt.dtype)
    Wt, q = real_rows(G).mT.to(dt.dtype), B_bar.shape[-1]
    for _ in range(M.bit_length() - 1):
        re, im = d.real.to(dt.dtype), d.imag.to(dt.dtype)
        X, V = T.split((q, Wt.shape[-1]), -1)
        T = torch.cat((X, T + _turn(re, im, T) - V @ (Wt.mT @ T), V), -1)
        Wt = torch.cat((Wt, Wt + _turn(re, -im, Wt)), -1)
        d, q = 2 * d + d * d, 2 * q
    re, im = d.real.to(dt.dtype), d.imag.to(dt.dtype)
    X, V = T.split((q, Wt.shape[-1]), -1)
    eye = torch.eye(T.shape[-2], dtype=dt.dtype, device=dt.device)
    return X, _turn(re, im, eye) - V @ Wt.mT


class _Rows(torch.autograd.Function):
    """Map R (h, k, N) and E = A - I to R, R A, ..., R A^(count - 1)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(R: Tensor, E: Tensor, count: int) -> Tensor:
        rows, kind = [R], torch.finfo(R.dtype)
        for _ in range(count - 1):
            later = torch.bmm(rows[-1], E).add_(rows[-1])
            rows.append(torch.nn.functional.hardshrink(later, kind.tiny / kind.eps))
        return torch.cat(rows, -2)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.k = inputs[0].shape[-2]
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx, G: Tensor):
        (E, rows), total = ctx.saved_tensors, list(G.split(ctx.k, -2))
        for i in range(len(total) - 1, 0, -1):
            total[i - 1] = total[i - 1] + total[i] + torch.bmm(total[i], E.mT)
        G = torch.cat(total, -2)
        del total  # as large as G
        dE = torch.bmm(rows[:, : -ctx.k].mT, G[:, ctx.k :])
        return G[:, : ctx.k], dE, None


def grow_rows(R: Tensor, E: Tensor, count: int) -> Tensor:
    """Return the rows R A^i for i < count, given E = A - I.

    Args:
        R: (h, k, N) rows to begin with.
        E: (h, N, N) the matrix less the identity.
        count: how many powers; there may be some more.

    Returns:
        (h, k * count or more, N): row i k + a is R[a] A^i.

    Source: book/tables.md.
    """
    while count > 32:
        R, E, count = _Rows.apply(R, E, 2), _Square.apply(E), -(-count // 2)
    return _Rows.apply(R, E, count)


def _beside(v: Tensor, batch: torch.Size) -> tuple[Tensor, torch.Size]:
    """Return v (..., n) as (h, q, n), and its axes in front of the batch."""
    extra = v.shape[: max(0, v.ndim - 1 - len(batch))]
    v = v.expand(*extra, *batch, v.shape[-1])
    return v.reshape(extra.numel(), batch.numel(), -1).transpose(0, 1), extra


def _batch(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor) -> torch.Size:
    """Return the batch axes of the system, without those of one vector alone."""
    shapes = [Lambda.shape[:-1], P.shape[:-2], dt.shape]
    inner = max(map(len, shapes))
    vectors = [v.shape[:-1] for v in (B, C)]
    if min(map(len, vectors)) <= inner:  # else both have more: a full batch
        vectors = [s[max(0, len(s) - inner) :] for s in vectors]
    return torch.broadcast_shapes(*shapes, *vectors)


def _product(L: int, M: int, Lambda, P, B, C, dt) -> Tensor:
    """Return kernels (outputs, inputs, h, L) of h systems; M columns begin X."""
    X, E = krylov_tables(Lambda, P, B.mT, dt, M)
    if L > M:
        X, M = torch.cat((X, torch.bmm(E, X).add_(X)), -1), 2 * M
        E = _Square.apply(E)
    R = grow_rows(real_rows(C).to(dt.dtype), E, -(-L // M))
    K = (R @ X).unflatten(-1, (M, -1)).unflatten(-3, (-1, C.shape[-2]))
    return K.permute(2, 4, 0, 1, 3).flatten(-2)[..., :L]


def table_kernel(
    Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, L: int
) -> Tensor:
    """Return the kernel of a diagonal plus low-rank system, by two tables.

    Nothing is examined; `dplr_kernel` does that.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time,
            real part <= 0.
        P: (..., n, r) low-rank factor, in time^-1/2.
        B: (..., n) input vector, in state/(input * time).
        C: (..., n) output vector, in output/state.
        dt: (...) step of the bilinear rule, in time, > 0.
        L: length of the kernel, >= 1.

    Returns:
        K (..., L) real, of the dtype of dt, K_l = 2 Re(C A_bar^l B_bar), in
        output/input. Batch axes are broadcast.

    Source: book/tables.md.
    """
    n, r = P.shape[-2:]
    batch = _batch(Lambda, P, B, C, dt)
    (B, inputs), (C, outputs) = _beside(B, batch), _beside(C, batch)
    Lambda = Lambda.expand(*batch, n).reshape(-1, n)
    P, dt = P.expand(*batch, n, r).reshape(-1, n, r), dt.expand(batch).reshape(-1)

    M = 1 << max(0, min(round(math.log2(L) / 2) - 1, int(math.log2(2 * n / r))))
    piece = 128 if dt.is_cpu else len(dt)
    parts = zip(*(t.split(piece) for t in (Lambda, P, B, C, dt)), strict=True)
    K = torch.cat([_product(L, M, *part) for part in parts], 2)
    return K.reshape(*(outputs or inputs), *batch, L)
