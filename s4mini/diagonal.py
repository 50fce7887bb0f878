"""Diagonal systems.

Without the low-rank term the kernel is a sum of damped oscillations, one batched matrix
product computes it, and as the state grows the term is missed less and less.

Tangled from book/diagonal.md.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s4mini.checks import check_choice, check_int, check_step, check_tensors
from s4mini.generating import check_batch
from s4mini.lowrank import half_spectrum, nplr
from s4mini.recurrence import check_lengths

__all__ = [
    "Sampled",
    "COMPLEX",
    "finest",
    "sample",
    "power_sums",
    "mode_sums",
    "s4d_kernel",
    "s4d_init",
    "s4d_step",
    "s4d_response",
    "past",
    "s4d_final_state",
]


def _phi(z: Tensor) -> Tensor:
    """Return (e^z - 1) / z, which is 1 at z = 0."""
    small = z.abs() < 1e-3
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    safe = torch.where(small, torch.ones_like(z), z)
    return torch.where(small, series, torch.expm1(safe) / safe)


class Sampled(NamedTuple):
    """A sampled diagonal system, in the finest precision of its device.

    Attributes:
        s: (..., n) the logarithm of A_bar.
        E: (..., n) A_bar - 1.
        B_bar: (..., n) the sampled input vector.

    Source: book/diagonal.md.
    """

    s: Tensor
    E: Tensor
    B_bar: Tensor


COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def finest(device: torch.device) -> torch.dtype:
    """Return the finest floating dtype of a device.

    Args:
        device: where the numbers are.

    Returns:
        float64, or float32 for a device that lacks it.

    Source: book/diagonal.md.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def sample(Lambda: Tensor, B: Tensor, dt: Tensor, method: str) -> Sampled:
    """Sample a diagonal system; values are not examined.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        B: (..., n) input vector.
        dt: (...) step, > 0.
        method: "zoh" or "bilinear".

    Returns:
        s, E and B_bar, (..., n) each.

    Source: book/diagonal.md.
    """
    wide = finest(dt.device)
    z = dt.to(wide)[..., None] * Lambda.to(COMPLEX[wide])
    dtB = dt.to(wide)[..., None] * B
    if method == "zoh":
        return Sampled(z, torch.expm1(z), dtB * _phi(z))
    E = z / (1 - z / 2)
    return Sampled(torch.log1p(E + 1e-15 * (E == -1)), E, dtB / (1 - z / 2))


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


def power_sums(w: Tensor, s: Tensor, L: int) -> Tensor:
    """Return Re sum_n w_n e^(s_n l) for l = 0 ... L - 1.

    Args:
        w: (..., n) weights, complex.
        s: (..., n) logarithms of the ratios, better in a finer precision.
        L: how many, >= 1.

    Returns:
        (..., L) real, in the precision of w; batch axes broadcast.

    Source: book/diagonal.md.
    """
    inner, outer = _tables(s, L, w.dtype)
    left = w[..., None] * outer  # (..., n, J)
    left = torch.cat((left.real, -left.imag), -2)  # (..., 2n, J)
    right = torch.cat((inner.real, inner.imag), -2)  # (..., 2n, M)
    return (left.mT @ right).flatten(-2)[..., :L]


def mode_sums(w: Tensor, system: Sampled, L: int, dtype: torch.dtype) -> Tensor:
    """Return Re sum_n w_n A_bar_n^l for l = 0 ... L - 1.

    Args:
        w: (..., n) weights, in the precision of the system.
        system: what sample gives.
        L: how many, >= 1.
        dtype: complex dtype of the sums.

    Returns:
        (..., L) real.

    Source: book/diagonal.md.
    """
    first = w.sum(-1, keepdim=True).to(dtype).real
    if L == 1:
        return first
    w = (w * (1 + system.E)).to(dtype)
    return torch.cat((first, power_sums(w, system.s, L - 1)), -1)


def _examined(
    method: str, dt: float | Tensor, batches: dict, **tensors: Tensor
) -> list[Tensor]:
    """Examine a diagonal system; return dt and the tensors, of one kind."""
    check_choice("method", method, ("zoh", "bilinear"))
    check_tensors(**{k: (v, "... n") for k, v in tensors.items()})
    check_step("dt", dt)
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
    check_batch(**(shapes | {"dt": dt.shape} | batches))
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
    system = sample(Lambda, B, dt, method)
    with torch.autocast(B.device.type, enabled=False):
        return mode_sums(2 * C * system.B_bar, system, L, C.dtype)


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
    _, E, B_bar = (v.to(C.dtype) for v in sample(Lambda, B, dt, method))
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
    system = sample(Lambda, Lambda, dt, method)
    with torch.autocast(x.device.type, enabled=False):
        return mode_sums(2 * C * (1 + system.E) * x, system, L, C.dtype)


def _newest_first(u: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse time, beginning with the last step that counts; then zeros."""
    if lengths is None:
        return u.flip(-1)
    L = u.shape[-1]
    index = lengths[..., None] - 1 - torch.arange(L, device=u.device)
    u, index = torch.broadcast_tensors(u, index)
    moved = u.gather(-1, index.clamp(min=0))
    return torch.where(index >= 0, moved, torch.zeros_like(u))


def past(
    system: Sampled, u: Tensor, x: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Return the state after a chunk; values are not examined.

    Args:
        system: what sample gives.
        u: (..., L) the inputs of the chunk.
        x: (..., n) the state before it; zero if None.
        lengths: (...) the steps to take, in 0 ... L; all if None.

    Returns:
        (..., n) complex, in the precision of u.

    Source: book/diagonal.md.
    """
    kind, L = COMPLEX[u.dtype], u.shape[-1]
    A_bar, v = (1 + system.E).to(kind), _newest_first(u, lengths)
    total = v[..., :1].to(kind)  # (..., 1): the newest; then the older ones
    if L > 1:
        M, J = _split(L - 1)
        inner, outer = _tables(system.s, L - 1, kind)
        v = F.pad(v[..., 1:], (0, J * M - L + 1)).unflatten(-1, (J, M))
        v = torch.complex(v @ inner.real.mT, v @ inner.imag.mT)  # (..., J, n)
        total = total + A_bar * (v * outer.mT).sum(-2)
    made = system.B_bar.to(kind) * total
    if x is None:
        return made
    steps = torch.tensor(L) if lengths is None else lengths[..., None]
    kept = (system.s * (steps - 1).clamp(min=0)).exp().to(kind) * A_bar * x
    return made + torch.where(steps > 0, kept, x)


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
    system, u = sample(Lambda, B, dt, method), u.to(B.real.dtype)
    with torch.autocast(u.device.type, enabled=False):
        return past(system, u, x0, lengths)
