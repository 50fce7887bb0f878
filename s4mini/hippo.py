"""Remembering with N numbers.

The best polynomial summary of everything seen so far obeys a linear differential
equation, whose matrix we derive, check and use.

Tangled from book/hippo.md.
"""

import torch
from torch import Tensor

from s4mini.checks import check_choice, check_int, check_positive, check_tensors

__all__ = ["legendre", "MEASURES", "reconstruct", "hippo"]


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

    Source: Szego 1939, section 4.5; book/hippo.md.
    """
    N = check_int("N", N)
    check_tensors(xi=(xi, "real ..."))
    values = [torch.ones_like(xi), xi]
    for n in range(1, N - 1):
        following = (2 * n + 1) * xi * values[n] - n * values[n - 1]
        values.append(following / (n + 1))
    return torch.stack(values[:N])


MEASURES = ("legs",)


def reconstruct(measure: str, x: Tensor, t: float, s: Tensor) -> Tensor:
    """Read past values of the input from the state.

    Args:
        measure: the measure that the state was made with, "legs".
        x: (..., N) real state at time t, in the unit of the input.
        t: the present, in units of time, > 0.
        s: (S,) real, the times to look back at, each in [0, t].

    Returns:
        (..., S): the projection held in x, at times s, in the dtype of x.

    Raises:
        TypeError: x or s is not a real floating tensor, or t no number.
        ValueError: the measure is unknown, t is not one number > 0, x or s
            has a wrong shape or entries that are not finite, or a time is
            outside [0, t].

    Source: Gu et al. 2020, section 2; book/hippo.md.
    """
    check_choice("measure", measure, MEASURES)
    check_positive("t", t)
    if torch.as_tensor(t).ndim:
        raise ValueError(f"t: expected one number, got {tuple(t.shape)}")
    N = check_tensors(x=(x, "real ... N"), s=(s, "real S"))["N"]
    slack = 1e-6 * t  # forgives rounding in s = k * dt
    if s.min() < -slack or s.max() > t + slack:
        low, high = s.min().item(), s.max().item()
        raise ValueError(f"s: expected times in [0, {float(t)}], got {low} to {high}")
    xi = (2 * s / t - 1).clamp(-1, 1).to(x.dtype)
    norms = (2 * torch.arange(N).to(xi) + 1).sqrt()
    return (x * norms) @ legendre(N, xi)


def hippo(measure: str, N: int) -> tuple[Tensor, Tensor]:
    """Build the state matrix and input vector of online projection.

    Args:
        measure: which part of the past counts; "legs" weighs all of it alike.
        N: how many coefficients the state holds, >= 1.

    Returns:
        A (N, N) and B (N,), float64, dimensionless, all eigenvalues of A
        below zero.

    Raises:
        TypeError: N is not an integer.
        ValueError: the measure is unknown, or N < 1.

    Source: Gu et al. 2022a, eq. 2 (with the sign of x' = Ax + Bu);
        book/hippo.md.
    """
    check_choice("measure", measure, MEASURES)
    N = check_int("N", N)
    n = torch.arange(N, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    below = torch.tril(-torch.outer(B, B), diagonal=-1)
    return below - torch.diag(n + 1), B
