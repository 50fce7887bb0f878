"""Diagonal systems.

Without the low-rank term the kernel is a sum of damped oscillations, one batched matrix
product computes it, and as the state grows the term is missed less and less.

Tangled from book/diagonal.md.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from s4mini.checks import check_choice, check_int, check_positive, check_tensors
from s4mini.lowrank import half_spectrum, nplr
from s4mini.recurrence import _check_broadcast, check_lengths

__all__ = ["s4d_kernel", "s4d_init", "s4d_step", "s4d_response", "s4d_final_state"]


def _phi(z: Tensor) -> Tensor:
    """Return (e^z - 1) / z, which is 1 at z = 0."""
    small = z.abs() < 1e-3
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, series, torch.expm1(safe) / safe)


def _sampled(Lambda: Tensor, B: Tensor, dt: Tensor, method: str):
    """Return log A_bar, A_bar - 1 and B_bar, (..., n), in double precision."""
    z = dt.double()[..., None] * Lambda.to(torch.complex128)
    dtB = dt.double()[..., None] * B
    if method == "zoh":
        return z, torch.expm1(z), dtB * _phi(z)
    E = z / (1 - z / 2)
    return torch.log1p(E + 1e-15 * (E == -1)), E, dtB / (1 - z / 2)


def _powers(s: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return e^(s j), (..., n, count), for j = 0 ... count - 1, in dtype."""
    table, m = torch.ones_like(s, dtype=dtype)[..., None], 1
    while m < count:
        factor = (m * s).exp().to(dtype)[..., None]
        table, m = torch.cat((table, table * factor), -1), 2 * m
    return table[..., :count]


def _split(L: int) -> tuple[int, int]:
    """Return M, a power of two near the root of L, and ceil(L / M)."""
    M = 2 ** ((L - 1).bit_length() // 2)
    return M, -(-L // M)


def _tables(s: Tensor, L: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return e^(s j), (..., n, M), and e^(s M i), (..., n, ceil(L / M))."""
    M, J = _split(L)
    return _powers(s, M, dtype), _powers(M * s, J, dtype)


def _pieces(h: int, width: int, cuda: bool) -> Iterator[slice]:
    """Cut h channels into pieces whose tables are small."""
    step = max(1, (2**24 if cuda else 2**16) // width)
    return (slice(i, i + step) for i in range(0, h, step))


class _PowerSums(torch.autograd.Function):
    """K_l = Re sum_n w_n e^(s_n l), with tables made piece by piece, twice."""

    @staticmethod
    def forward(ctx, w, s, L):
        (h, n), (M, J) = w.shape, _split(L)
        ctx.save_for_backward(w, s)
        K = w.real.new_empty(h, L)
        for c in _pieces(h, n * (M + J), w.is_cuda):
            inner, outer = _tables(s[c], L, w.dtype)
            left = w[c, :, None] * outer  # (c, n, J)
            left = torch.cat((left.real, -left.imag), 1)  # (c, 2n, J)
            right = torch.cat((inner.real, inner.imag), 1)  # (c, 2n, M)
            K[c] = (left.mT @ right).flatten(-2)[:, :L]
        return K

    @staticmethod
    @once_differentiable
    def backward(ctx, dK):
        w, s = ctx.saved_tensors
        (h, n), L = w.shape, dK.shape[-1]
        M, J = _split(L)
        g = F.pad(dK, (0, J * M - L)).view(h, J, M)
        j = torch.arange(M, dtype=dK.dtype, device=dK.device)
        iM = M * torch.arange(J, dtype=dK.dtype, device=dK.device)
        dw, ds = torch.empty_like(w), torch.empty_like(s)
        for c in _pieces(h, 2 * n * (M + J), w.is_cuda):
            inner, outer = _tables(s[c], L, w.dtype)
            both = torch.cat((inner, j * inner), 1)  # (c, 2n, M)
            both = torch.cat((both.real, both.imag), 1) @ g[c].mT
            both = torch.complex(*both.chunk(2, 1))  # (c, 2n, J)
            plain, times_j = both.chunk(2, 1)
            dw[c] = (outer * plain).sum(-1).conj()
            slope = (outer * (iM * plain + times_j)).sum(-1)
            ds[c] = (w[c] * slope).conj()
        return dw, ds, None


def _power_sums(w: Tensor, s: Tensor, L: int) -> Tensor:
    """Return Re sum_n w_n e^(s_n l), (..., L); batch axes broadcast."""
    w, s = torch.broadcast_tensors(w, s)
    n, batch = w.shape[-1], w.shape[:-1]
    K = _PowerSums.apply(w.reshape(-1, n), s.reshape(-1, n), L)
    return K.reshape(*batch, L)


def _examined(
    method: str, dt: float | Tensor, batches: dict, **tensors: Tensor
) -> list[Tensor]:
    """Examine a diagonal system; return dt and the tensors, of one kind."""
    check_choice("method", method, ("zoh", "bilinear"))
    check_tensors(**{k: (v, "... n") for k, v in tensors.items()})
    check_positive("dt", dt)
    Lambda, kind = tensors["Lambda"], torch.complex64
    if (Lambda.real > 0).any():
        raise ValueError(
            "Lambda: expected real parts <= 0, got "
            f"{Lambda.real.max().item():.3g}: the system is unstable"
        )
    for value in tensors.values():
        kind = torch.promote_types(kind, value.dtype)
    dt = torch.as_tensor(dt, dtype=kind.to_real(), device=Lambda.device)
    shapes = {k: v.shape[:-1] for k, v in tensors.items()}
    _check_broadcast(**shapes, dt=dt.shape, **batches)
    return [dt, *(value.to(kind) for value in tensors.values())]


def s4d_kernel(
    Lambda: Tensor,
    B: Tensor,
    C: Tensor,
    dt: float | Tensor,
    L: int,
    method: str = "zoh",
) -> Tensor:
    """Return the convolution kernel of a diagonal system.

    The batch axes, written "...", need only broadcast with one another.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time,
            real part <= 0.
        B: (..., n) input vector, in state/(input * time).
        C: (..., n) output vector, in output/state.
        dt: step, a number or (...), in time, > 0.
        L: length of the kernel, >= 1.
        method: how to sample, "zoh" or "bilinear".

    Returns:
        K (..., L) real, K_l = 2 Re(C A_bar^l B_bar), in output/input.

    Raises:
        TypeError: an argument is not a tensor of numbers, or L no integer.
        ValueError: shapes do not agree, an entry is not finite, a real part
            of Lambda or L or dt is out of range, or the method is unknown.

    Source: Gu et al. 2022, S4D, section 3; book/diagonal.md.
    """
    L = check_int("L", L)
    dt, Lambda, B, C = _examined(method, dt, {}, Lambda=Lambda, B=B, C=C)
    with torch.autocast(Lambda.device.type, enabled=False):
        return _s4d_kernel(Lambda, B, C, dt, L, method)


def _s4d_kernel(Lambda, B, C, dt, L, method):
    """Do the work of s4d_kernel; nothing is examined."""
    s, _, B_bar = _sampled(Lambda, B, dt, method)
    return _power_sums((2 * C * B_bar).to(C.dtype), s, L)


def s4d_init(init: str, N: int) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and input vector of a diagonal system.

    Args:
        init: "legs", the normal part of LegS; "inv", a formula close to it;
            "lin", frequencies spaced evenly; "real", decays only.
        N: state size, even, >= 2; n = N/2 modes are returned.

    Returns:
        Lambda (n,) and B (n,), complex128: one of each conjugate pair. B is
        V* B for "legs", and 1 for the others.

    Raises:
        TypeError: N is not an integer.
        ValueError: init is unknown, or N is odd or < 2.

    Source: Gu et al. 2022, S4D, section 4; book/diagonal.md.
    """
    check_choice("init", init, ("legs", "lin", "inv", "real"))
    N = check_int("N", N, minimum=2, even=True)
    if init == "legs":
        half = half_spectrum(nplr("legs", N))
        return half.Lambda, half.B
    n = torch.arange(N // 2, dtype=torch.float64)
    decay, frequency = torch.full_like(n, 0.5), math.pi * n
    if init == "inv":
        frequency = N / math.pi * (N / (2 * n + 1) - 1)
    elif init == "real":
        decay, frequency = n + 1, torch.zeros_like(n)
    Lambda = torch.complex(-decay, frequency)
    return Lambda, torch.ones_like(Lambda)


def s4d_step(
    Lambda: Tensor,
    B: Tensor,
    C: Tensor,
    dt: float | Tensor,
    u: Tensor,
    x: Tensor,
    method: str = "zoh",
) -> tuple[Tensor, Tensor]:
    """Advance a diagonal system by one step.

    The batch axes, written "...", need only broadcast with one another.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time,
            real part <= 0.
        B: (..., n) input vector.
        C: (..., n) output vector.
        dt: step (...), in the same unit of time, > 0.
        u: (...) the input of this step, real.
        x: (..., n) the state before it.
        method: how to sample, "zoh" or "bilinear".

    Returns:
        y (...), the output 2 Re(C x) after the step, and x (..., n).

    Raises:
        TypeError: an argument is no tensor, or u is not real.
        ValueError: shapes do not agree, an entry is not finite, dt or a real
            part of Lambda is out of range, or the method is unknown.

    Source: Gu et al. 2022, S4D, section 3; book/diagonal.md.
    """
    check_tensors(u=(u, "real ..."))
    dt, Lambda, B, C, x = _examined(
        method, dt, {"u": u.shape}, Lambda=Lambda, B=B, C=C, x=x
    )
    return _s4d_step(Lambda, B, C, dt, u, x, method)


def _s4d_step(Lambda, B, C, dt, u, x, method):
    """Do the work of s4d_step; nothing is examined."""
    _, E, B_bar = (v.to(C.dtype) for v in _sampled(Lambda, B, dt, method))
    x = x + (E * x + B_bar * u[..., None])
    return 2 * (C * x).sum(-1).real, x


def s4d_response(
    Lambda: Tensor,
    C: Tensor,
    dt: float | Tensor,
    x: Tensor,
    L: int,
    method: str = "zoh",
) -> Tensor:
    """Return the next L outputs that a state causes without any input.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time,
            real part <= 0.
        C: (..., n) output vector.
        dt: step (...), > 0.
        x: (..., n) the state before the first of them.
        L: how many outputs, >= 1.
        method: how to sample, "zoh" or "bilinear".

    Returns:
        (..., L), the numbers 2 Re(C A_bar^(k+1) x) for k = 0 ... L-1.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: shapes do not agree, an entry is not finite, a number is
            out of range, or the method is unknown.

    Source: book/diagonal.md.
    """
    L = check_int("L", L)
    dt, Lambda, C, x = _examined(method, dt, {}, Lambda=Lambda, C=C, x=x)
    with torch.autocast(Lambda.device.type, enabled=False):
        return _s4d_response(Lambda, C, dt, x, L, method)


def _s4d_response(Lambda, C, dt, x, L, method):
    """Do the work of s4d_response; nothing is examined."""
    s, _, _ = _sampled(Lambda, Lambda, dt, method)
    return _power_sums((2 * C * s.exp() * x).to(C.dtype), s, L)


def _newest_first(u: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse time, beginning with the last step that counts; then zeros."""
    if lengths is None:
        return u.flip(-1)
    L = u.shape[-1]
    index = lengths[..., None] - 1 - torch.arange(L, device=u.device)
    u, index = torch.broadcast_tensors(u, index)
    moved = u.gather(-1, index.clamp(min=0))
    return torch.where(index >= 0, moved, torch.zeros_like(u))


def _s4d_final_state(Lambda, B, dt, u, x0, lengths, method):
    """Do the work of s4d_final_state; nothing is examined."""
    s, _, B_bar = _sampled(Lambda, B, dt, method)
    L = u.shape[-1]
    M, J = _split(L)
    inner, outer = _tables(s, L, B.dtype)
    v = F.pad(_newest_first(u, lengths), (0, J * M - L))
    v = v.to(B.real.dtype).unflatten(-1, (J, M))
    v = torch.complex(v @ inner.real.mT, v @ inner.imag.mT)  # (..., J, n)
    x = B_bar.to(B.dtype) * (v * outer.mT).sum(-2)
    if x0 is not None:
        steps = L if lengths is None else lengths[..., None]
        x = x + (s * steps).exp().to(B.dtype) * x0
    return x


def s4d_final_state(
    Lambda: Tensor,
    B: Tensor,
    dt: float | Tensor,
    u: Tensor,
    x0: Tensor | None = None,
    lengths: Tensor | None = None,
    method: str = "zoh",
) -> Tensor:
    """Return the state after a chunk of input, without a loop over its steps.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time,
            real part <= 0.
        B: (..., n) input vector.
        dt: step (...), > 0.
        u: (..., L) the inputs of the chunk, real.
        x0: (..., n) the state before the chunk; zero if not given.
        lengths: (...) how many of the L steps to take, integers in 1 ... L;
            all if not given.
        method: how to sample, "zoh" or "bilinear".

    Returns:
        (..., n) the half state after the chunk, complex.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: shapes do not agree, an entry is not finite, a number or
            a length is out of range, or the method is unknown.

    Source: book/diagonal.md.
    """
    L = check_tensors(u=(u, "real ... L"))["L"]
    tensors = {"Lambda": Lambda, "B": B}
    tensors |= {} if x0 is None else {"x0": x0}
    batches = {"u": u.shape[:-1]}
    if lengths is not None:
        check_lengths(lengths, L)
        batches["lengths"] = lengths.shape
    dt, Lambda, B, *rest = _examined(method, dt, batches, **tensors)
    x0 = rest[0] if rest else None
    with torch.autocast(Lambda.device.type, enabled=False):
        return _s4d_final_state(Lambda, B, dt, u, x0, lengths, method)
