"""The S4 kernel.

The whole convolution kernel of a diagonal plus low-rank system, from sums of simple
fractions, a small correction and one inverse Fourier transform.

Tangled from book/kernel.md.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s4mini.cauchy_sum import (
    _by_pieces,
    _cauchy_keops,
    _cauchy_naive,
    _damp,
    _pair_sums,
    keops_available,
    nodes,
)
from s4mini.checks import check_int, check_positive, check_tensors, values_can_be_read
from s4mini.generating import _check_batch, _PowerRow

__all__ = ["dplr_difference", "backends", "dplr_kernel"]


def _line_3(p: Tensor, x: Tensor, y: Tensor, tau: float) -> Tensor:
    """Return K_hat (..., M): take one column of P out at a time."""
    Y = torch.complex(y, tau / 2 * x)
    rows = [row.unbind(-2) for row in p.unbind(-3)]  # each entry (..., M)
    while len(rows) > 1:
        *rows, last = rows
        pivot = Y / (1 + Y * last[-1])
        rows = [
            [
                p_ab - pivot * row[-1] * p_jb
                for p_ab, p_jb in zip(row[:-1], last[:-1], strict=True)
            ]
            for row in rows
        ]
    return (1 + tau) * torch.complex(y, x / 2) * rows[0][0]


def _blocks(z: Tensor) -> Tensor:
    """Return the real matrix that multiplies [Re x; Im x] by z (..., n)."""
    z = torch.diag_embed(z)
    top = torch.cat((z.real, -z.imag), -1)
    return torch.cat((top, torch.cat((z.imag, z.real), -1)), -2)


def dplr_difference(Lambda: Tensor, P: Tensor, dt: float | Tensor) -> Tensor:
    """Return A_bar - I of a half spectrum, in real coordinates.

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time.
        P: (..., n, r) low-rank factor, the same modes.
        dt: step of the bilinear rule, a number or (...), in time, > 0.

    Returns:
        (..., 2n, 2n) real, dimensionless: the difference for the state
        [Re x; Im x], accurate also where dt is small.

    Raises:
        TypeError: an argument is not a tensor of numbers.
        ValueError: shapes do not agree, an entry is not finite, or dt <= 0.

    Source: book/kernel.md.
    """
    check_tensors(Lambda=(Lambda, "... n"), P=(P, "... n r"))
    dt, Lambda, P = _alike(dt, Lambda=Lambda, P=P)
    return _difference(Lambda, P, dt)


def _difference(Lambda: Tensor, P: Tensor, dt: Tensor) -> Tensor:
    """Do the work of dplr_difference; nothing is examined."""
    return _difference_and_sum(Lambda, P, dt)[0]


def _difference_and_sum(Lambda: Tensor, P: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return A_bar - I and A_bar + I, (..., 2n, 2n)."""
    z = dt[..., None] * Lambda
    R = 1 / (1 - z / 2)  # (..., n)
    dt = dt[..., None, None]
    left, right = R[..., None] * P, R.conj()[..., None] * P
    small = dt * (P.mH @ left).real  # (..., r, r)
    small = small + torch.eye(P.shape[-1], dtype=dt.dtype, device=dt.device)
    left = torch.cat((left.real, left.imag), -2)  # (..., 2n, r)
    right = torch.cat((right.real, right.imag), -2)
    low_rank = 2 * dt * (left @ torch.linalg.solve(small, right.mT))
    return _blocks(z * R) - low_rank, _blocks(2 * R) - low_rank


def _alike(dt: float | Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Examine dt and the batch axes; give all one precision."""
    check_positive("dt", dt)
    kind, shapes = torch.complex64, {"dt": getattr(dt, "shape", ())}
    for name, value in tensors.items():
        kind = torch.promote_types(kind, value.dtype)
        shapes[name] = value.shape[: -2 if name == "P" else -1]
    _check_batch(**shapes)
    device = tensors["Lambda"].device
    real = torch.float64 if kind == torch.complex128 else torch.float32
    dt = torch.as_tensor(dt, dtype=real, device=device)
    return dt, *(value.to(kind) for value in tensors.values())


def _cut(Lambda: Tensor, P: Tensor, dt: Tensor, C: Tensor, L: int) -> Tensor:
    """Return C (I - A_bar^L / e), of modes (h, n) and rows C (h, e, n)."""
    E, F = _difference_and_sum(Lambda, P, dt)
    row = 2 * torch.cat((C.real, -C.imag), -1)  # real coordinates
    d = row @ E if L % 2 else torch.zeros_like(row)
    if L > 1:
        d = d + _PowerRow.apply(E @ F, row + d, L // 2)
    real, imag = d.tensor_split(2, -1)  # of C (A_bar^L - I)
    weight = math.exp(-1)
    return (1 - weight) * C - weight / 2 * torch.complex(real, -imag)


def _line_1(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, L: int) -> Tensor:
    """Return C~ = C (I - A_bar^L / e), of the same half spectrum."""
    n, r = P.shape[-2:]
    shapes = Lambda.shape[:-1], P.shape[:-2], dt.shape
    batch = torch.broadcast_shapes(*shapes, C.shape[:-1])
    own = batch[len(batch) - max(map(len, shapes)) :]  # axes of the matrices
    system = (
        Lambda.expand(*own, n).reshape(-1, n),
        P.expand(*own, n, r).reshape(-1, n, r),
        dt.expand(own).reshape(-1),
    )
    C = C.expand(*batch, n).reshape(-1, len(system[0]), n).transpose(0, 1)
    C_tilde = _Line1.apply(*system, C, L)
    return C_tilde.transpose(0, 1).reshape(*batch, n)


def _split(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut Lambda (h, n) and all after it into pieces of a few channels."""
    n, cuda = tensors[0].shape[1], tensors[0].is_cuda
    size = max(1, (2**24 if cuda else 2**17) // (2 * n) ** 2)
    return list(zip(*(t.split(size) for t in tensors), strict=True))


class _Line1(torch.autograd.Function):
    """_cut in pieces, done again in the backward pass."""

    @staticmethod
    def forward(ctx, Lambda, P, dt, C, L):
        ctx.save_for_backward(Lambda, P, dt, C)
        ctx.L = L
        return torch.cat([_cut(*p, L) for p in _split(Lambda, P, dt, C)])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradients = []
        for *piece, given in _split(*ctx.saved_tensors, gradient):
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in piece]
                output = _cut(*inputs, ctx.L)
            gradients.append(torch.autograd.grad(output, inputs, given))
        return *map(torch.cat, zip(*gradients, strict=True)), None


def _stack(vector: Tensor, P: Tensor) -> Tensor:
    """Put a vector (..., n) above the rows of P (..., r, n)."""
    vector = vector[..., None, :]
    batch = torch.broadcast_shapes(vector.shape[:-2], P.shape[:-2])
    both = (t.expand(*batch, *t.shape[-2:]) for t in (vector, P))
    return torch.cat(tuple(both), -2)


def _products(
    Lambda: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, dt: Tensor, L: int
) -> tuple[Tensor, Tensor]:
    """Return weights (..., (1 + r)^2, n) and modes (..., n) of line 2."""
    rows, columns = _stack(C_tilde, P.mH), _stack(B, P.mT)
    modes, columns = _damp(
        dt[..., None, None] * Lambda[..., None, :],
        dt[..., None, None] * columns,
        L,
    )
    v = rows[..., :, None, :] * columns[..., None, :, :]
    return v.flatten(-3, -2), modes[..., 0, :]


def _piece(W, a, m, x, y, scratch, tau: float) -> Tensor:
    """Return lines 2 and 3 of one piece, (h, e, M)."""
    p = _pair_sums(W, a, m, x, y, scratch)
    r = math.isqrt(p.shape[-2])  # 1 + rank
    return _line_3(p.unflatten(-2, (r, r)), x, y, tau)


def _by_torch(Lambda, P, B, C_tilde, dt, L) -> Tensor:
    """Return K_hat (..., M) with real sums, in pieces."""
    v, modes = _products(Lambda, P, B, C_tilde, dt, L)
    function = partial(_piece, tau=math.tanh(0.5 / L))
    return _by_pieces(function, v, modes, *nodes(L, dt.dtype, dt.device))


def _in_complex(sums: Callable, Lambda, P, B, C_tilde, dt, L) -> Tensor:
    """Return K_hat (..., M) with complex sums and one correction."""
    v, modes = _products(Lambda, P, B, C_tilde, dt, L)
    x, y = nodes(L, dt.dtype, dt.device)
    p = sums(v, modes, x, y)
    r = math.isqrt(p.shape[-2])
    return _line_3(p.unflatten(-2, (r, r)), x, y, math.tanh(0.5 / L))


def _by_triton(Lambda, P, B, C_tilde, dt, L) -> Tensor:
    """Return K_hat (..., M) with the program of the chapter fused."""
    from s4mini.fused import _fused_spectrum

    shapes = Lambda.shape[:-1], P.shape[:-2], B.shape[:-1]
    batch = torch.broadcast_shapes(*shapes, C_tilde.shape[:-1], dt.shape)
    n, r = P.shape[-2:]
    Lambda, B, C_tilde = (
        t.expand(*batch, n).reshape(-1, n) for t in (Lambda, B, C_tilde)
    )
    P = P.expand(*batch, n, r).reshape(-1, n, r)
    dt = dt.expand(batch).reshape(-1)
    K_hat = _fused_spectrum(Lambda, P, B, C_tilde, dt, L)
    return K_hat.reshape(*batch, -1)


_BACKENDS = {
    "tables": None,  # needs no spectrum
    "torch": _by_torch,
    "triton": _by_triton,
    "keops": partial(_in_complex, _cauchy_keops),
    "naive": partial(_in_complex, _cauchy_naive),
}


def backends() -> dict[str, str]:
    """Return for each backend of the kernel why it cannot be used here.

    Returns:
        Names, with an empty string where nothing is in the way.

    Source: book/kernel.md.
    """
    from s4mini.fused import triton_available

    reasons = {"triton": triton_available(), "keops": keops_available()}
    return {name: reasons.get(name, "") for name in _BACKENDS}


def _choose(backend: str) -> Callable | None:
    """Return the backend of that name, or say which there are."""
    if backend == "auto":
        return _BACKENDS["tables"]
    if backend in ("tables", "torch", "naive"):
        return _BACKENDS[backend]
    reasons = backends()
    if not isinstance(backend, str) or reasons.get(backend, "?"):
        listed = ", ".join(
            repr(name) + (f" (not here: {why})" if why else "")
            for name, why in reasons.items()
        )
        raise ValueError(
            f"backend: expected 'auto' or one of {listed}; got {backend!r}"
        )
    return _BACKENDS[backend]


def dplr_kernel(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: float | Tensor,
    L: int,
    backend: str = "auto",
) -> Tensor:
    """Return the convolution kernel of a diagonal plus low-rank system.

    The system is A = diag(Lambda) - P P*, by one of each conjugate pair of
    modes. For LegS, and an output vector c (N,) of the original coordinates:

        half = half_spectrum(nplr("legs", N))
        C = c.to(half.V) @ half.V
        K = dplr_kernel(half.Lambda, half.P, half.B, C, dt, L)

    Args:
        Lambda: (..., n) eigenvalues, one of each conjugate pair, in 1/time,
            real part <= 0.
        P: (..., n, r) low-rank factor, in time^-1/2.
        B: (..., n) input vector, in state/(input * time).
        C: (..., n) output vector, in output/state.
        dt: step of the bilinear rule, a number or (...), in time, > 0.
        L: length of the kernel, >= 1.
        backend: "tables" multiplies two tables of powers, and is what "auto"
            takes; the others are Algorithm 1, with lines 2 and 3 done:
            "torch" in real numbers and in pieces, "triton" on a graphics
            processor, "keops" as a compiled formula, "naive" with complex
            tables.

    Returns:
        K (..., L) real, K_l = 2 Re(C A_bar^l B_bar), in output/input. Batch
        axes are broadcast.

    Raises:
        TypeError: an argument is not a tensor of numbers, or L no integer.
        ValueError: shapes do not agree, an entry is not finite, a real part
            of Lambda or L or dt is out of range, or the backend is unknown
            or cannot be used here.

    Source: Gu et al. 2022a, algorithm 1; book/kernel.md.
    """
    tables = backend in ("auto", "tables")
    if torch.compiler.is_dynamo_compiling() and not tables:  # left as it is
        whole = torch.compiler.disable(dplr_kernel)
        return whole(Lambda, P, B, C, dt, L, backend)
    L = check_int("L", L)
    check_tensors(
        Lambda=(Lambda, "... n"),
        P=(P, "... n r"),
        B=(B, "... n"),
        C=(C, "... n"),
    )
    if values_can_be_read() and (Lambda.real > 0).any():
        raise ValueError(
            "Lambda: expected real parts <= 0, got "
            f"{Lambda.real.max().item():.3g}: the system is unstable"
        )
    spectrum = _choose(backend)
    dt, Lambda, P, B, C = _alike(dt, Lambda=Lambda, P=P, B=B, C=C)
    with torch.autocast(Lambda.device.type, enabled=False):
        if spectrum is None:
            from s4mini.tables import table_kernel

            return table_kernel(Lambda, P, B, C, dt, L)
        return _dplr_kernel(Lambda, P, B, C, dt, L, spectrum)


def _dplr_kernel(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    L: int,
    spectrum: Callable = _by_torch,
) -> Tensor:
    """Do the work of dplr_kernel; nothing is examined."""
    C_tilde = _line_1(Lambda, P, C, dt, L)
    K_hat = spectrum(Lambda, P, B, C_tilde, dt, L)
    growth = torch.arange(L, device=dt.device, dtype=torch.float64) / L
    return torch.fft.irfft(K_hat, n=L).mul_(growth.exp().to(dt.dtype))
