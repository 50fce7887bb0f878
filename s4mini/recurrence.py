"""Stepping in linear time.

One step of a structured system costs a number of operations proportional to its size,
and the state after a whole chunk needs no loop over the chunk.

Tangled from book/recurrence.md.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from s4mini.checks import check_step, check_tensors
from s4mini.generating import check_batch
from s4mini.kernel import dplr_kernel

__all__ = [
    "apply",
    "increments",
    "dplr_step",
    "to_real",
    "to_row",
    "to_half",
    "RealIncrements",
    "in_real",
    "advance",
    "state_as_input",
    "state_response",
    "state_after",
    "state_echo",
    "check_lengths",
    "final_state",
]


def apply(Lambda: Tensor, P: Tensor, x: Tensor) -> Tensor:
    """Return A x for a half state x.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair.
        P: (..., n, r) low-rank factor.
        x: (..., n) half state.

    Returns:
        (..., n) the same half of A x.

    Source: book/recurrence.md.
    """
    q = 2 * (P.conj() * x[..., None]).sum(-2).real  # (..., r), P* x in full
    return Lambda * x - (P * q[..., None, :]).sum(-1)


def increments(
    Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample a half-spectrum DPLR system: what one bilinear step changes.

    A step is x + E x - F 2 Re(G x) + B_bar u. Values are not examined, so that
    nothing waits for a device.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor; A = diag(Lambda) - P P*.
        B: (..., n) input vector.
        dt: (...) step, in the same unit of time, > 0.

    Returns:
        E (..., n) the diagonal part of A_bar - I, F (..., n, r) and
        G (..., r, n) the factors of its low-rank part, and B_bar (..., n) the
        sampled input vector.

    Source: Gu et al. 2022a, theorem 2; book/recurrence.md.
    """
    z, step = dt[..., None] * Lambda, dt[..., None, None]
    R = 1 / (1 - z / 2)  # (..., n)
    G = P.mH * R[..., None, :]
    small = step * (G @ P).real  # (..., r, r)
    small = small + torch.eye(P.shape[-1], dtype=dt.dtype, device=dt.device)
    F = step * R[..., None] * (P @ torch.linalg.inv_ex(small)[0].to(P))
    w = dt[..., None] * B
    B_bar = R * w - (F @ (G @ w[..., None]).real.to(F))[..., 0]
    return z * R, F, G, B_bar


def _check_system(Lambda, P, B, C, dt, **batches) -> Tensor:
    """Examine a DPLR system and batch axes; return dt as a tensor."""
    check_tensors(
        Lambda=(Lambda, "... n"),
        P=(P, "... n r"),
        B=(B, "... n"),
        C=(C, "... n"),
    )
    check_step("dt", dt)
    dt = torch.as_tensor(dt, dtype=Lambda.real.dtype, device=Lambda.device)
    shapes = {"Lambda": Lambda.shape[:-1], "P": P.shape[:-2]}
    shapes |= {"B": B.shape[:-1], "C": C.shape[:-1], "dt": dt.shape}
    check_batch(**(shapes | batches))
    return dt


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
    E, F, G, B_bar = increments(Lambda, P, B, dt)
    q = 2 * (G * x[..., None, :]).sum(-1).real  # (..., r)
    d = E * x - (F * q[..., None, :]).sum(-1) + B_bar * u[..., None]
    x = x + d
    return 2 * (C * x).sum(-1).real, x


def to_real(x: Tensor) -> Tensor:
    """Write a column in real coordinates.

    Args:
        x: (..., n) a half state or input vector.

    Returns:
        [Re x; Im x] (..., 2n).

    Source: book/recurrence.md.
    """
    x = x + 0j  # complex also where a caller's vector is real
    return torch.cat((x.real, x.imag), -1)


def to_row(c: Tensor) -> Tensor:
    """Write a row in real coordinates.

    Args:
        c: (..., n) an output vector.

    Returns:
        (..., 2n), whose product with to_real(x) is 2 Re(c x).

    Source: book/recurrence.md.
    """
    c = c + 0j
    return 2 * torch.cat((c.real, -c.imag), -1)


def to_half(s: Tensor) -> Tensor:
    """Read a column in real coordinates.

    Args:
        s: [Re x; Im x] (..., 2n).

    Returns:
        x (..., n), complex.

    Source: book/recurrence.md.
    """
    return torch.complex(*(part.contiguous() for part in s.chunk(2, -1)))


class RealIncrements(NamedTuple):
    """Increments in real coordinates, N = 2n.

    Attributes:
        same: (..., N) what multiplies a coordinate, and
        other: (..., N) its counterpart in the other half, in E x.
        F: (..., r, N) and
        G: (..., r, N) the low-rank part, or None.
        B_bar: (..., N) the sampled input vector.

    Source: book/recurrence.md.
    """

    same: Tensor
    other: Tensor
    F: Tensor | None
    G: Tensor | None
    B_bar: Tensor

    def to(self, dtype: torch.dtype) -> "RealIncrements":
        """Return the same in another dtype."""
        F, G = (v if v is None else v.to(dtype) for v in (self.F, self.G))
        same, other, B_bar = (v.to(dtype) for v in (self.same, self.other, self.B_bar))
        return RealIncrements(same, other, F, G, B_bar)


def in_real(
    E: Tensor, F: Tensor | None, G: Tensor | None, B_bar: Tensor
) -> RealIncrements:
    """Write increments of a half spectrum in real coordinates.

    Args:
        E, F, G, B_bar: as increments returns them; a diagonal system has
            None for F and G.

    Returns:
        The same, N = 2n.

    Source: book/recurrence.md.
    """
    same, other = torch.cat((E.real,) * 2, -1), torch.cat((-E.imag, E.imag), -1)
    if F is not None and G is not None:
        F, G = to_real(F.mT), to_row(G)
    return RealIncrements(same, other, F, G, to_real(B_bar))


def advance(step: RealIncrements, u: Tensor, s: Tensor) -> Tensor:
    """Take one step in real coordinates.

    Args:
        step: the sampled system, batch axes "...".
        u: (...) the input, real.
        s: (..., N) the state before it.

    Returns:
        (..., N) the state after it.

    Source: book/recurrence.md.
    """
    d = torch.addcmul(step.B_bar * u[..., None], step.same, s)
    # From here on in place: new memory costs more than the arithmetic.
    d.addcmul_(step.other, s.roll(s.shape[-1] // 2, -1))
    if step.F is not None and step.G is not None:
        for F, G in zip(step.F.unbind(-2), step.G.unbind(-2), strict=True):
            d.addcmul_(F, torch.linalg.vecdot(G, s)[..., None], value=-1)
    return d.add_(s)


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
    return x / dt[..., None] + apply(Lambda, P, x) / 2


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


def _difference(step: RealIncrements) -> Tensor:
    """Write A_bar - I as a matrix (..., N, N)."""
    n = step.same.shape[-1] // 2
    turn = torch.diag_embed(step.same[..., :n]), torch.diag_embed(step.other[..., n:])
    top = torch.cat((turn[0], -turn[1]), -1)
    E = torch.cat((top, torch.cat(turn[::-1], -1)), -2)
    return E if step.F is None or step.G is None else E - step.F.mT @ step.G


def _powers(step: RealIncrements, count: int) -> list[Tensor]:
    """Return A_bar^m - I, each (..., N, N), for m = 1, 2, 4, ..."""
    E = [_difference(step)]
    for _ in range(count - 1):
        E.append(2 * E[-1] + E[-1] @ E[-1])
    return E


def _forced(E, B_bar, u):
    """Return the states (..., b, N) that inputs (..., b, L) leave, in a tree."""
    L, N = u.shape[-1], B_bar.shape[-1]
    m = min(L.bit_length() - 1, N.bit_length())
    W = B_bar[..., None]  # (..., N, 1)
    for E_m in E[:m]:
        W = torch.cat((W + E_m @ W, W), -1)  # (..., N, 2^m)
    blocks = F.pad(u, (-L % 2**m, 0)).unflatten(-1, (-1, 2**m))
    z = blocks @ W[..., None, :, :].mT  # (..., b, J, N): a state for each block
    for E_m in E[m:]:
        if z.shape[-2] > 1:
            z = F.pad(z, (0, 0, z.shape[-2] % 2, 0))
            old, new = z[..., 0::2, :], z[..., 1::2, :]
            z = old + (old.flatten(-3, -2) @ E_m.mT).view(old.shape) + new
    return z[..., 0, :]


def _align_right(u, lengths):
    """Move the first lengths samples to the end; zeros before them."""
    L = u.shape[-1]
    index = torch.arange(L, device=u.device) - (L - lengths[..., None])
    u, index = torch.broadcast_tensors(u, index)
    moved = u.gather(-1, index.clamp(min=0))
    return torch.where(index >= 0, moved, torch.zeros_like(u))


def _free(E, s, lengths):
    """Return A_bar^lengths s for states s (..., b, N), by binary digits."""
    for i, E_m in enumerate(E):
        moved = s + s @ E_m.mT
        s = torch.where((lengths >> i)[..., None] % 2 == 1, moved, s)
    return s


def state_after(
    step: RealIncrements, u: Tensor, s: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """Return the states after chunks of input, in real coordinates.

    Values are not examined; lengths are taken as the nearest in 0 ... L.

    Args:
        step: the sampled systems, batch axes "...".
        u: (..., b, L) b inputs to each system.
        s: (..., b, N) the states before them; zero if None.
        lengths: (..., b) how many of the L steps to take; all if None.

    Returns:
        (..., b, N) the states afterwards.

    Source: book/recurrence.md.
    """
    L = u.shape[-1]
    E = _powers(step, L.bit_length())
    if lengths is None:
        lengths = torch.tensor(L, device=u.device)
    else:
        lengths = lengths.clamp(0, L)
        u = _align_right(u, lengths)
    forced = _forced(E, step.B_bar, u)
    return forced if s is None else forced + _free(E, s, lengths)


def state_echo(step: RealIncrements, C: Tensor, s: Tensor, L: int) -> Tensor:
    """Return the next L outputs that states cause, in real coordinates.

    Args:
        step: the sampled systems, batch axes "...".
        C: (..., N) their output rows, from to_row.
        s: (..., b, N) b states of each system.
        L: how many outputs, >= 1.

    Returns:
        (..., b, L), the numbers C A_bar^(k+1) s for k = 0 ... L-1.

    Source: book/recurrence.md.
    """
    E, R, M, m = _difference(step), C[..., None, :], 2 ** ((L - 1).bit_length() // 2), 1
    X = s.mT + E @ s.mT  # (..., N, b)
    while m < M:
        X = torch.cat((X, X + E @ X), -1)  # (..., N, m b)
        E, m = 2 * E + E @ E, 2 * m
    while R.shape[-2] * M < L:
        R = torch.cat((R, R + R @ E), -2)
        E = 2 * E + E @ E
    y = (R @ X).unflatten(-1, (M, -1)).flatten(-3, -2)  # (..., J M, b)
    return y[..., :L, :].mT


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
        kind = getattr(lengths, "dtype", type(lengths).__name__)
        raise TypeError(
            f"lengths: expected a torch.Tensor of int64 or int32, got {kind}"
        )
    bad = lengths[(lengths < 1) | (lengths > L)]
    if bad.numel():
        raise ValueError(
            f"lengths: expected integers in 1 ... {L}, got {bad[0].item()}"
        )


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
    step = in_real(*increments(Lambda, P, B, dt))
    s = None if x0 is None else to_real(x0)[..., None, :]
    lengths = None if lengths is None else lengths[..., None]
    return to_half(state_after(step, u[..., None, :], s, lengths)[..., 0, :])
