"""The S4 kernel.

The whole convolution kernel of a diagonal plus low-rank system, from sums of simple
fractions, a small correction and one inverse Fourier transform.

Tangled from book/kernel.md.
"""

import math

import torch
from torch import Tensor

from s4mini.cauchy_sum import cauchy, damp, keops_available, nodes
from s4mini.checks import check_int, check_step, check_tensors, values_can_be_read
from s4mini.generating import check_batch, truncated_C
from s4mini.lowrank import real_form

__all__ = ["backends", "dplr_kernel", "kernel_of"]


def _line_1(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, L: int) -> Tensor:
    """Return C~ = C (I - A_bar^L / e), of the same half spectrum."""
    A, _, row = real_form(*(t.to(torch.complex128) for t in (Lambda, P, C, C)))
    half = dt.double()[..., None, None] / 2 * A
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    E = 2 * torch.linalg.solve(eye - half, half)
    real, imag = truncated_C(E, row, L, math.exp(-1)).chunk(2, -1)
    return torch.complex(real, -imag).to(C) / 2


def _stack(vector: Tensor, P: Tensor) -> Tensor:
    """Put a vector (..., n) above the rows of P (..., r, n)."""
    vector = vector[..., None, :]
    batch = torch.broadcast_shapes(vector.shape[:-2], P.shape[:-2])
    both = (t.expand(*batch, *t.shape[-2:]) for t in (vector, P))
    return torch.cat(tuple(both), -2)


def _line_2(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C_tilde: Tensor,
    dt: Tensor,
    L: int,
    backend: str,
) -> Tensor:
    """Return k (..., 1 + r, 1 + r, M), by sums over the pairs."""
    rows, columns = _stack(C_tilde, P.mH), _stack(B, P.mT)
    step = dt[..., None, None]
    modes, columns = damp(step * Lambda[..., None, :], step * columns, L)
    v = rows[..., :, None, :] * columns[..., None, :, :]
    x, y = nodes(L, dt.dtype, dt.device)
    sums = v.flatten(-3, -2), modes[..., 0, :], x, y
    if backend == "triton":
        from s4mini.fused import fused_cauchy

        k = fused_cauchy(*sums)
    else:
        k = cauchy(*sums, "keops" if backend == "keops" else "torch")
    return k.unflatten(-2, v.shape[-3:-1])


def _line_3(k: Tensor, x: Tensor, y: Tensor, tau: float) -> Tensor:
    """Return K_hat (..., M): take one column of P out at a time."""
    Y = torch.complex(y, tau / 2 * x)
    rows = [list(row.unbind(-2)) for row in k.unbind(-3)]  # each entry (..., M)
    while len(rows) > 1:
        *rows, last = rows
        pivot = Y / (1 + Y * last[-1])
        rows = [
            [
                k_ab - pivot * row[-1] * k_jb
                for k_ab, k_jb in zip(row[:-1], last[:-1], strict=True)
            ]
            for row in rows
        ]
    return (1 + tau) * torch.complex(y, x / 2) * rows[0][0]


def backends() -> dict[str, str]:
    """Return for each backend of the kernel why it cannot be used here.

    Returns:
        Names, with an empty string where nothing is in the way.

    Source: book/kernel.md.
    """
    from s4mini.fused import triton_available

    return {
        "tables": "",
        "cauchy": "",
        "triton": triton_available(),
        "keops": keops_available(),
    }


def _choose(backend: str) -> str:
    """Return the backend of that name, or say which there are."""
    if backend == "auto":
        return "tables"
    if backend in ("tables", "cauchy"):
        return backend
    reasons = backends()
    if not isinstance(backend, str) or reasons.get(backend, "?"):
        listed = ", ".join(
            repr(name) + (f" (not here: {why})" if why else "")
            for name, why in reasons.items()
        )
        raise ValueError(
            f"backend: expected 'auto' or one of {listed}; got {backend!r}"
        )
    return backend


def _damped(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    L: int,
    backend: str,
) -> Tensor:
    """Return the kernel by Algorithm 1 on the smaller circle."""
    C_tilde = _line_1(Lambda, P, C, dt, L)
    k = _line_2(Lambda, P, B, C_tilde, dt, L, backend)
    K_hat = _line_3(k, *nodes(L, dt.dtype, dt.device), math.tanh(0.5 / L))
    growth = torch.arange(L, device=dt.device, dtype=torch.float64) / L
    return torch.fft.irfft(K_hat, n=L) * growth.exp().to(dt.dtype)


def _alike(dt: float | Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Examine dt and the batch axes; give all one precision."""
    check_step("dt", dt)
    kind, shapes = torch.complex64, {"dt": getattr(dt, "shape", ())}
    for name, value in tensors.items():
        kind = torch.promote_types(kind, value.dtype)
        shapes[name] = value.shape[: -2 if name == "P" else -1]
    check_batch(**shapes)
    device = tensors["Lambda"].device
    real = torch.float64 if kind == torch.complex128 else torch.float32
    dt = torch.as_tensor(dt, dtype=real, device=device)
    return dt, *(value.to(kind) for value in tensors.values())


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
            takes; the others are Algorithm 1, with line 2 done by "cauchy"
            with plain tensors, "keops" as a compiled formula, "triton" as
            a program for a graphics processor.

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
    L = check_int("L", L)
    check_tensors(
        Lambda=(Lambda, "... n"), P=(P, "... n r"), B=(B, "... n"), C=(C, "... n")
    )
    if values_can_be_read() and (Lambda.real > 0).any():
        raise ValueError(
            "Lambda: expected real parts <= 0, got "
            f"{Lambda.real.max().item():.3g}: the system is unstable"
        )
    dt, Lambda, P, B, C = _alike(dt, Lambda=Lambda, P=P, B=B, C=C)
    return kernel_of(Lambda, P, B, C, dt, L, backend)


def kernel_of(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    L: int,
    backend: str = "auto",
) -> Tensor:
    """Do the work of dplr_kernel. No value is looked at, so nothing waits.

    Args:
        Lambda, P, B, C: as in dplr_kernel, all of one precision.
        dt: (...) steps of the bilinear rule, in that precision.
        L: length of the kernel, >= 1.
        backend: as in dplr_kernel.

    Returns:
        K (..., L) real, in output/input.

    Source: book/kernel.md.
    """
    tables = backend in ("auto", "tables")
    if torch.compiler.is_dynamo_compiling() and not tables:  # left as it is
        whole = torch.compiler.disable(kernel_of)
        return whole(Lambda, P, B, C, dt, L, backend)
    backend = _choose(backend)
    with torch.autocast(Lambda.device.type, enabled=False):
        if backend == "tables":
            from s4mini.tables import table_kernel

            return table_kernel(Lambda, P, B, C, dt, L)
        return _damped(Lambda, P, B, C, dt, L, backend)
