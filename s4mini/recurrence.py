"""Stepping in linear time.

One step of a structured system costs a number of operations proportional to its size,
and the state after a whole chunk needs no loop over the chunk.

Tangled from book/recurrence.md.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s4mini.checks import check_positive, check_tensors
from s4mini.kernel import dplr_difference, dplr_kernel

__all__ = [
    "dplr_step",
    "Increments",
    "dplr_increments",
    "state_as_input",
    "state_response",
    "check_lengths",
    "final_state",
]


def _low_rank(P: Tensor, x: Tensor) -> Tensor:
    """Return P* x of the full state, real, from a half state."""
    return 2 * (P.conj() * x[..., None]).sum(-2).real  # (..., r)


def _apply(Lambda: Tensor, P: Tensor, x: Tensor) -> Tensor:
    """Return A x = Lambda x - P (P* x) for a half state."""
    q = _low_rank(P, x)
    return Lambda * x - (P * q[..., None, :]).sum(-1)


def _solve(Lambda: Tensor, P: Tensor, half: Tensor, w: Tensor) -> Tensor:
    """Solve (I - half A) x = w for a half state x, by Woodbury."""
    R = 1 / (1 - half[..., None] * Lambda)  # (..., n)
    RP = R[..., None] * P  # (..., n, r)
    small = 2 * half[..., None, None] * (P.mH @ RP).real  # (..., r, r)
    small = small + torch.eye(P.shape[-1]).to(small)
    q = torch.linalg.inv(small) @ _low_rank(P, R * w)[..., None]
    return R * w - half[..., None] * (RP @ q.to(RP))[..., 0]


def _step(Lambda, P, B, C, dt, u, x):
    """Do one bilinear step without examining the arguments."""
    w = dt[..., None] * (_apply(Lambda, P, x) + B * u[..., None])
    x = x + _solve(Lambda, P, dt / 2, w)
    return 2 * (C * x).sum(-1).real, x


def _check_system(Lambda, P, B, C, dt, **batches) -> Tensor:
    """Examine a DPLR system and batch axes; return dt as a tensor."""
    check_tensors(
        Lambda=(Lambda, "... n"),
        P=(P, "... n r"),
        B=(B, "... n"),
        C=(C, "... n"),
    )
    check_positive("dt", dt)
    dt = torch.as_tensor(dt, dtype=Lambda.real.dtype, device=Lambda.device)
    shapes = {"Lambda": Lambda.shape[:-1], "P": P.shape[:-2]}
    shapes |= {"B": B.shape[:-1], "C": C.shape[:-1], "dt": dt.shape}
    _check_broadcast(**shapes, **batches)
    return dt


def _check_broadcast(**shapes: torch.Size) -> None:
    """Refuse batch axes that cannot be broadcast."""
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{k} {tuple(s)}" for k, s in shapes.items())
        raise ValueError(
            f"batch axes: expected shapes that broadcast, got {listed}"
        ) from None


def dplr_step(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: float | Tensor,
    u: Tensor,
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance a half-spectrum DPLR system by one bilinear step.

    The batch axes, written "...", need only broadcast with one another.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor; A = diag(Lambda) - P P*.
        B: (..., n) input vector.
        C: (..., n) output vector.
        dt: step (...), in the same unit of time, > 0.
        u: (...) the input of this step, real.
        x: (..., n) the state before it.

    Returns:
        y (...), the output 2 Re(C x) after the step, and x (..., n).

    Raises:
        TypeError: an argument is no tensor, or u is not real.
        ValueError: shapes do not agree, an entry is not finite, or dt <= 0.

    Source: Gu et al. 2022a, theorem 2; book/recurrence.md.
    """
    check_tensors(Lambda=(Lambda, "... n"), x=(x, "... n"), u=(u, "real ..."))
    dt = _check_system(Lambda, P, B, C, dt, u=u.shape, x=x.shape[:-1])
    return _step(Lambda, P, B, C, dt, u, x)


class Increments(NamedTuple):
    """A sampled system as the change that one step makes.

    A step is x + E x - F 2 Re(G x) + B_bar u. Without a low-rank term F and
    G are None.

    Attributes:
        E: (..., n) the diagonal part of A_bar - I.
        F: (..., n, r) and
        G: (..., r, n) the factors of its low-rank part.
        B_bar: (..., n) the sampled input vector.

    Source: book/recurrence.md.
    """

    E: Tensor
    F: Tensor | None
    G: Tensor | None
    B_bar: Tensor


def dplr_increments(
    Lambda: Tensor, P: Tensor, B: Tensor, dt: float | Tensor
) -> Increments:
    """Prepare the bilinear step of a half-spectrum DPLR system.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor; A = diag(Lambda) - P P*.
        B: (..., n) input vector.
        dt: step (...), in the same unit of time, > 0.

    Returns:
        E (..., n), F (..., n, r), G (..., r, n), B_bar (..., n).

    Raises:
        TypeError: an argument is no tensor of numbers.
        ValueError: shapes do not agree, an entry is not finite, or dt <= 0.

    Source: book/recurrence.md.
    """
    dt = _check_system(Lambda, P, B, B, dt)
    R = 1 / (1 - dt[..., None] / 2 * Lambda)  # (..., n)
    G, step = P.mH * R[..., None, :], dt[..., None, None]
    small = step * (G @ P).real
    small = small + torch.eye(P.shape[-1]).to(small)  # (..., r, r)
    F = step * R[..., None] * (P @ torch.linalg.inv(small).to(P))
    E = dt[..., None] * Lambda * R
    B_bar = _solve(Lambda, P, dt / 2, dt[..., None] * B)
    return Increments(E, F, G, B_bar)


def _advance(step: Increments, u: Tensor, x: Tensor) -> Tensor:
    """Return the state after a step; nothing is examined."""
    d = step.E * x + step.B_bar * u[..., None]
    if step.F is not None:
        q = 2 * (step.G @ x[..., None]).real  # (..., r, 1)
        d = d - (step.F @ q.to(x))[..., 0]
    return x + d


def state_as_input(Lambda: Tensor, P: Tensor, dt: float | Tensor, x: Tensor) -> Tensor:
    """Return the input vector whose kernel is the response to a state.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor.
        dt: step (...), > 0.
        x: (..., n) the state.

    Returns:
        (..., n) the vector (I + dt/2 A) x / dt.

    Raises:
        TypeError: an argument is no floating or complex tensor.
        ValueError: shapes do not agree, an entry is not finite, or dt <= 0.

    Source: book/recurrence.md.
    """
    check_tensors(Lambda=(Lambda, "... n"), x=(x, "... n"))
    dt = _check_system(Lambda, P, Lambda, Lambda, dt, x=x.shape[:-1])
    return x / dt[..., None] + _apply(Lambda, P, x) / 2


def state_response(
    Lambda: Tensor,
    P: Tensor,
    C: Tensor,
    dt: float | Tensor,
    x: Tensor,
    L: int,
    backend: str = "auto",
) -> Tensor:
    """Return the next L outputs that a state causes without any input.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor.
        C: (..., n) output vector.
        dt: step (...), > 0.
        x: (..., n) the state before the first of them.
        L: how many outputs, >= 1.
        backend: how the kernel's sums are done, as in dplr_kernel.

    Returns:
        (..., L), the numbers C A_bar^(k+1) x for k = 0 ... L-1, real.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: shapes do not agree, an entry is not finite, dt <= 0, or
            L < 1.

    Source: book/recurrence.md.
    """
    B = state_as_input(Lambda, P, dt, x)
    return dplr_kernel(Lambda, P, B, C, dt, L, backend)


def _powers(Lambda, P, dt, count):
    """Return A_bar^m - I in real coordinates, for m = 1, 2, 4, ..."""
    E = [dplr_difference(Lambda, P, dt)]  # (..., 2n, 2n)
    for _ in range(count - 1):
        E.append(2 * E[-1] + E[-1] @ E[-1])
    return E


def _forced(powers, B_bar, u):
    """Return the real state that an input leaves, from zero, in a tree."""
    L, N = u.shape[-1], B_bar.shape[-1]
    m = min(L.bit_length() - 1, N.bit_length())
    W = B_bar[..., None]  # (..., N, 1)
    for E in powers[:m]:
        W = torch.cat((W + E @ W, W), -1)  # (..., N, 2^m)
    blocks = F.pad(u, (-L % 2**m, 0)).unflatten(-1, (-1, 2**m))
    z = blocks @ W.mT  # (..., J, N), one partial state for each block
    for E in powers[m:]:
        if z.shape[-2] > 1:
            z = F.pad(z, (0, 0, z.shape[-2] % 2, 0))
            old, new = z[..., 0::2, :], z[..., 1::2, :]
            z = old + old @ E.mT + new
    return z[..., 0, :]


def _align_right(u: Tensor, lengths: Tensor) -> Tensor:
    """Move the first lengths samples to the end; zeros before them."""
    L = u.shape[-1]
    index = torch.arange(L, device=u.device) - (L - lengths[..., None])
    u, index = torch.broadcast_tensors(u, index)
    moved = u.gather(-1, index.clamp(min=0))
    return torch.where(index >= 0, moved, torch.zeros_like(u))


def _free(powers, s, lengths):
    """Return A_bar^lengths s for a real state s, by binary digits."""
    for i, E in enumerate(powers):
        moved = s + (E @ s[..., None])[..., 0]
        s = torch.where((lengths >> i)[..., None] % 2 == 1, moved, s)
    return s


def check_lengths(lengths: Tensor, L: int) -> None:
    """Refuse anything but integers between 1 and the number of steps.

    Args:
        lengths: a tensor of integers, of any shape.
        L: the number of steps there are.

    Raises:
        TypeError: lengths is not a tensor of integers.
        ValueError: a length is not in 1 ... L.

    Source: book/recurrence.md.
    """
    kinds = (torch.int32, torch.int64)
    if not isinstance(lengths, Tensor) or lengths.dtype not in kinds:
        kind = type(lengths).__name__
        kind = lengths.dtype if isinstance(lengths, Tensor) else kind
        raise TypeError(
            f"lengths: expected a torch.Tensor of int64 or int32, got {kind}"
        )
    bad = lengths[(lengths < 1) | (lengths > L)]
    if bad.numel():
        raise ValueError(
            f"lengths: expected integers in 1 ... {L}, got {bad[0].item()}"
        )


def _final_state(Lambda, P, B, dt, u, x0, lengths):
    """Return the state after a chunk, without examining the arguments."""
    powers = _powers(Lambda, P, dt, u.shape[-1].bit_length())
    B_bar = _solve(Lambda, P, dt / 2, dt[..., None] * B)
    if lengths is None:
        lengths = torch.tensor(u.shape[-1], device=u.device)
    else:
        u = _align_right(u, lengths)
    s = _forced(powers, _real(B_bar), u)
    if x0 is not None:
        s = s + _free(powers, _real(x0), lengths)
    return torch.complex(*s.chunk(2, -1))


def _real(x):
    """Write a half state in real coordinates, [Re x; Im x]."""
    x = x + 0j  # complex also where a caller's vector is real
    return torch.cat((x.real, x.imag), -1)


def final_state(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    dt: float | Tensor,
    u: Tensor,
    x0: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return the state after a chunk of input, without a loop over its steps.

    The batch axes of u are the result's; those of the others broadcast.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor.
        B: (..., n) input vector.
        dt: step (...), > 0.
        u: (..., L) the inputs of the chunk, real.
        x0: (..., n) the state before the chunk; zero if not given.
        lengths: (...) how many of the L steps to take, integers in 1 ... L;
            all if not given.

    Returns:
        (..., n) the half state after the chunk, complex.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: shapes do not agree, an entry is not finite, dt <= 0, or a
            length is not in 1 ... L.

    Source: book/recurrence.md.
    """
    L = check_tensors(u=(u, "real ... L"))["L"]
    batches = {"u": u.shape[:-1]}
    if x0 is not None:
        check_tensors(Lambda=(Lambda, "... n"), x0=(x0, "... n"))
        batches["x0"] = x0.shape[:-1]
    if lengths is not None:
        check_lengths(lengths, L)
        batches["lengths"] = lengths.shape
    dt = _check_system(Lambda, P, B, B, dt, **batches)
    return _final_state(Lambda, P, B, dt, u, x0, lengths)
