"""Remembering with N numbers.

The best summary of the past in N numbers obeys a linear differential equation, whose
matrix we derive, check and use for four ideas of what best means.

Tangled from book/projection.md.
"""

import math

import torch
from torch import Tensor

from s4mini.checks import check_choice, check_int, check_positive, check_tensors

__all__ = [
    "legendre",
    "MEASURES",
    "domain",
    "reconstruct",
    "hippo",
    "laguerre",
    "fourier",
]


def legendre(N: int, xi: Tensor) -> Tensor:
    """Evaluate the first N Legendre polynomials.

    Args:
        N: how many, >= 1; their degrees are 0 to N - 1.
        xi: real tensor of any shape, dimensionless, usually in [-1, 1].

    Returns:
        (N, ...): P_n(xi) along the first axis, in the dtype of xi.

    Raises:
        TypeError: N is not an integer, or xi not a real floating tensor.
        ValueError: N < 1, or an entry of xi is not finite.

    Source: Szego 1939, section 4.5; book/projection.md.
    """
    N = check_int("N", N)
    check_tensors(xi=(xi, "real ..."))
    values = [torch.ones_like(xi), xi]
    for n in range(1, N - 1):
        following = (2 * n + 1) * xi * values[n] - n * values[n - 1]
        values.append(following / (n + 1))
    return torch.stack(values[:N])


#: The measures for which a HiPPO system is built.
MEASURES = ("legs", "legt", "lagt", "fout")


def _scaled_legendre(N: int, xi: Tensor) -> Tensor:
    """Scale Legendre polynomials to mean square one on [-1, 1]."""
    norms = (2 * torch.arange(N).to(xi) + 1).sqrt()  # (N,)
    return (norms * legendre(N, xi).movedim(0, -1)).movedim(-1, 0)


def _functions(measure: str, N: int, t: float, s: Tensor) -> Tensor:
    """Evaluate at times s the functions that x sums: (N, S)."""
    age = (t - s).clamp(min=0)
    match measure:
        case "legs":
            return _scaled_legendre(N, 1 - 2 * (age / t).clamp(max=1))
        case "legt":
            return _scaled_legendre(N, 1 - 2 * age.clamp(max=1))
        case "lagt":
            return laguerre(N, age)
        case _:
            return fourier(N, age)


def domain(measure: str, t: float) -> tuple[float, float]:
    """Say which times a memory can be asked about.

    Args:
        measure: "legs", "legt", "lagt" or "fout".
        t: the present, in units of time, > 0.

    Returns:
        The earliest time and the latest, which is t. For "legs" the earliest
        is 0; for the sliding windows "legt" and "fout" it is t - 1, which may
        lie before the start; for "lagt" it is minus infinity.

    Raises:
        TypeError: t is not a number.
        ValueError: the measure is unknown, or t is not one finite number > 0.

    Source: book/projection.md.
    """
    check_choice("measure", measure, MEASURES)
    check_positive("t", t)
    if shape := tuple(torch.as_tensor(t).shape):
        raise ValueError(f"t: expected one number, got {shape}")
    t = float(t)
    return {"legs": 0.0, "lagt": -math.inf}.get(measure, t - 1), t


def reconstruct(measure: str, x: Tensor, t: float, s: Tensor) -> Tensor:
    """Read past values of the input from the state.

    Args:
        measure: the measure that the state was made with.
        x: (..., N) real state at time t, in the unit of the input.
        t: the present, in units of time, > 0.
        s: (S,) real, the times to look back at: in [0, t] for "legs", in
            [t - 1, t] for "legt" and "fout", at most t for "lagt".

    Returns:
        (..., S): the projection held in x, at times s, in the dtype of x.

    Raises:
        TypeError: x or s is not a real floating tensor, or t no number.
        ValueError: the measure is unknown, t is not one number > 0, x or s
            has a wrong shape or entries that are not finite, or a time is
            outside the domain.

    Source: Gu et al. 2020, section 2; book/projection.md.
    """
    first, last = domain(measure, t)
    N = check_tensors(x=(x, "real ... N"), s=(s, "real S"))["N"]
    low, high = s.min().item(), s.max().item()
    slack = 1e-6 * last  # forgives rounding in s = k * dt
    if low < first - slack or high > last + slack:
        raise ValueError(f"s: expected times in [{first}, {last}], got {low} to {high}")
    return x @ _functions(measure, N, last, s).to(x)


def _legs(N: int) -> tuple[Tensor, Tensor]:
    """Build A and B of LegS, of all the past alike."""
    n = torch.arange(N, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    below = torch.tril(-torch.outer(B, B), diagonal=-1)
    return below - torch.diag(n + 1), B


def hippo(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """Build the state matrix and input vector of online projection.

    Args:
        measure: which part of the past counts, and in which functions it is
            kept. "legs": all of it alike, Legendre polynomials, x' = (A x +
            B u) / t. "legt", "fout": the last unit of time, Legendre
            polynomials or Fourier waves. "lagt": Laguerre functions of the
            age. The last three obey x' = A x + B u.
        N: how many coefficients the state holds, >= 1. The state of "fout"
            is constant, (nothing,) cosine 1, sine 1, cosine 2, ...; the
            second entry is always zero, and present if N is even only.

    Returns:
        A (N, N) and B (N,), float64: dimensionless for "legs", in 1/time
        otherwise. No eigenvalue of A has a real part above zero, and only
        the empty entry of "fout" one of zero.

    Raises:
        TypeError: N is not an integer.
        ValueError: the measure is unknown, or N < 1.

    Source: Gu et al. 2022a, eq. 2 (LegS); Gu et al. 2020, theorem 1 (LegT)
        and the tilted form in its appendix, not theorem 1 (LagT); Gu et al.
        2023 (FouT), all with the sign of x' = Ax + Bu; book/projection.md.
    """
    check_choice("measure", measure, MEASURES)
    N = check_int("N", N)
    match measure:
        case "legs":
            return _legs(N)
        case "legt":
            return _legt(N)
        case "lagt":
            return _lagt(N)
        case _:
            return _fout(N)


def _legt(N: int) -> tuple[Tensor, Tensor]:
    """Build A and B of LegT, the sliding window of length one."""
    n = torch.arange(N)
    B = (2 * n.double() + 1).sqrt()
    odd = (n[:, None] - n).remainder(2) == 1
    above = n > n[:, None]
    outer = torch.outer(B, B)
    return torch.where(odd & above, outer, -outer), B


def laguerre(N: int, r: Tensor) -> Tensor:
    """Evaluate the first N Laguerre functions, exp(-r/2) L_n(r).

    Args:
        N: how many, >= 1.
        r: real tensor of any shape, ages >= 0, in units of time.

    Returns:
        (N, ...): the functions along the first axis, in the dtype of r.

    Raises:
        TypeError: N is not an integer, or r not a real floating tensor.
        ValueError: N < 1, or an entry of r is negative or not finite.

    Source: Szego 1939, section 5.1; book/projection.md.
    """
    N = check_int("N", N)
    check_tensors(r=(r, "real ..."))
    if (r < 0).any():
        raise ValueError(f"r: expected ages >= 0, got {r.min().item()}")
    now, before = torch.ones_like(r), torch.zeros_like(r)
    log_scale, values = -r / 2, []  # e^{-r/2} alone would underflow
    for n in range(N):
        values.append(now * log_scale.exp())
        after = ((2 * n + 1 - r) * now - n * before) / (n + 1)
        size = torch.maximum(now.abs(), after.abs()).clamp(min=1)
        now, before = after / size, now / size
        log_scale = log_scale + size.log()
    return torch.stack(values)


def _lagt(N: int) -> tuple[Tensor, Tensor]:
    """Build A and B of LagT, of Laguerre functions."""
    ones = torch.ones(N, N, dtype=torch.float64)
    return torch.eye(N, dtype=ones.dtype) / 2 - ones.tril(), ones[0].clone()


def fourier(N: int, r: Tensor) -> Tensor:
    """Evaluate the first N functions of the Fourier basis on [0, 1].

    Args:
        N: how many, >= 1.
        r: real tensor of any shape, ages, in units of time.

    Returns:
        (N, ...), in the dtype of r: the constant 1, then sqrt(2) cos 2 pi j r
        and sqrt(2) sin 2 pi j r for j = 1, 2, ...; if N is even, a zero
        function stands second.

    Raises:
        TypeError: N is not an integer, or r not a real floating tensor.
        ValueError: N < 1, or an entry of r is not finite.

    Source: book/projection.md.
    """
    N = check_int("N", N)
    check_tensors(r=(r, "real ..."))
    values = [torch.ones_like(r)] + [torch.zeros_like(r)] * (1 - N % 2)
    for j in range(1, (N + 1) // 2):
        angle = 2 * math.pi * j * r
        values += [math.sqrt(2) * angle.cos(), math.sqrt(2) * angle.sin()]
    return torch.stack(values)


def _fout(N: int) -> tuple[Tensor, Tensor]:
    """Build A and B of FouT, the Fourier basis on a window of length one."""
    p = fourier(N, torch.zeros((), dtype=torch.float64))
    S = torch.zeros(N, N, dtype=torch.float64)
    for j in range(1, (N + 1) // 2):
        cosine = 2 * j - N % 2
        S[cosine, cosine + 1] = -2 * math.pi * j
        S[cosine + 1, cosine] = 2 * math.pi * j
    return S - 2 * torch.outer(p, p), 2 * p
