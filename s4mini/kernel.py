"""The S4 kernel.

The whole convolution kernel of a diagonal plus low-rank system, from sums of simple
fractions, a small correction and one inverse Fourier transform.

Tangled from book/kernel.md.
"""

import torch
from torch import Tensor

from s4mini.cauchy import _cauchy, _cauchy_naive, nodes
from s4mini.checks import check_choice, check_int, check_positive, check_tensors
from s4mini.generating import _check_batch, _power_row

__all__ = ["dplr_difference", "dplr_kernel"]


def _line_3(p: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return K_hat (..., M): take one column of P out at a time."""
    while p.shape[-2] > 1:
        corner = p[..., -1:, -1:, :]
        column, row = p[..., :-1, -1:, :], p[..., -1:, :-1, :]
        p = p[..., :-1, :-1, :] - y * column * row / (1 + y * corner)
    return torch.complex(y, x / 2) * p[..., 0, 0, :]


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
    z = dt[..., None] * Lambda
    R = 1 / (1 - z / 2)  # (..., n)
    dt = dt[..., None, None]
    left, right = R[..., None] * P, R.conj()[..., None] * P
    small = dt * (P.mH @ left).real  # (..., r, r)
    small = small + torch.eye(P.shape[-1], dtype=dt.dtype, device=dt.device)
    left = torch.cat((left.real, left.imag), -2)  # (..., 2n, r)
    right = torch.cat((right.real, right.imag), -2)
    return _blocks(z * R) - 2 * dt * (left @ torch.linalg.solve(small, right.mT))


def _alike(dt: float | Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Examine dt and the batch axes; give all one precision and device."""
    check_positive("dt", dt)
    kind, shapes = torch.complex64, {"dt": getattr(dt, "shape", ())}
    for name, value in tensors.items():
        kind = torch.promote_types(kind, value.dtype)
        shapes[name] = value.shape[: -2 if name == "P" else -1]
    _check_batch(**shapes)
    device = tensors["Lambda"].device
    dt = torch.as_tensor(dt, dtype=kind.to_real(), device=device)
    return dt, *(value.to(kind) for value in tensors.values())


def _line_1(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, L: int) -> Tensor:
    """Return C~ = C (I - A_bar^L), of the same half spectrum."""
    C = 2 * torch.cat((C.real, -C.imag), -1)  # real coordinates
    C = -_power_row(_difference(Lambda, P, dt), C, L)
    real, imag = C.tensor_split(2, -1)
    return torch.complex(real, -imag) / 2


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
    x: Tensor,
    y: Tensor,
    backend: str,
) -> Tensor:
    """Return the products p (..., 1 + r, 1 + r, M)."""
    rows, columns = _stack(C_tilde, P.mH), _stack(B, P.mT)
    v = rows[..., :, None, :] * columns[..., None, :, :]
    v = dt[..., None, None, None] * v  # (..., 1 + r, 1 + r, n)
    p = _BACKENDS[backend](v.flatten(-3, -2), dt[..., None] * Lambda, x, y)
    return p.unflatten(-2, v.shape[-3:-1])


_BACKENDS = {"torch": _cauchy, "naive": _cauchy_naive}
_BACKENDS["auto"] = _BACKENDS["torch"]


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
        backend: how the sums are done: "torch" in real numbers, "naive" in
            complex ones, "auto" the best there is.

    Returns:
        K (..., L) real, K_l = 2 Re(C A_bar^l B_bar), in output/input. Batch
        axes are broadcast.

    Raises:
        TypeError: an argument is not a tensor of numbers, or L no integer.
        ValueError: shapes do not agree, an entry is not finite, a real part
            of Lambda or L or dt is out of range, or the backend is unknown.

    Source: Gu et al. 2022a, algorithm 1; book/kernel.md.
    """
    check_choice("backend", backend, tuple(_BACKENDS))
    L = check_int("L", L)
    check_tensors(
        Lambda=(Lambda, "... n"),
        P=(P, "... n r"),
        B=(B, "... n"),
        C=(C, "... n"),
    )
    if (Lambda.real > 0).any():
        raise ValueError(
            "Lambda: expected real parts <= 0, got "
            f"{Lambda.real.max().item():.3g}: the system is unstable"
        )
    dt, Lambda, P, B, C = _alike(dt, Lambda=Lambda, P=P, B=B, C=C)
    with torch.autocast(Lambda.device.type, enabled=False):
        return _dplr_kernel(Lambda, P, B, C, dt, L, backend)


def _dplr_kernel(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    L: int,
    backend: str,
) -> Tensor:
    """Do the work of dplr_kernel; nothing is examined."""
    x, y = nodes(L, dt.dtype, dt.device)
    C_tilde = _line_1(Lambda, P, C, dt, L)
    p = _line_2(Lambda, P, B, C_tilde, dt, x, y, backend)
    K_hat = _line_3(p, x, y)
    return torch.fft.irfft(K_hat, n=L)
