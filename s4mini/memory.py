"""What a fixed matrix remembers.

A state space model with a constant matrix also projects its past, onto functions that
the matrix itself draws. This chapter finds them, says how far back they reach, and how
to choose the step.

Tangled from book/memory.md.
"""

import math

import torch
from torch import Generator, Tensor

from s4mini.checks import (
    check_choice,
    check_generator,
    check_int,
    check_number,
    check_step,
    check_tensors,
)
from s4mini.projection import MEASURES, hippo, laguerre, legendre
from s4mini.ssm import expm

__all__ = ["measure", "basis", "init_dt"]


def measure(measure: str, t: Tensor) -> Tensor:
    """Evaluate the weight that a memory gives to each age.

    Args:
        measure: "legs", "legt", "lagt" or "fout".
        t: real tensor of any shape, ages >= 0, in units of time.

    Returns:
        The weights, of the shape and dtype of t, in 1/time.

    Raises:
        TypeError: t is not a real floating tensor.
        ValueError: the measure is unknown, or an age is negative or not
            finite.

    Source: Gu et al. 2023; book/memory.md.
    """
    check_choice("measure", measure, MEASURES)
    check_tensors(t=(t, "real ..."))
    if (t < 0).any():
        raise ValueError(f"t: expected ages >= 0, got {t.min().item()}")
    if measure == "legs":
        return torch.exp(-t)
    if measure == "lagt":
        return torch.ones_like(t)
    return (t <= 1).to(t.dtype)


def basis(measure: str, N: int, t: Tensor) -> Tensor:
    """Evaluate the functions e^{tA} B that a state holds against its past.

    Args:
        measure: "legs" (without its factor 1/t), "legt", "lagt" or "fout".
        N: how many coefficients the state holds, >= 1.
        t: (T,) real, ages >= 0, in units of time.

    Returns:
        (N, T) values in 1/time, in the dtype of t. Closed forms for "legs"
        and "lagt"; a matrix exponential for each age otherwise.

    Raises:
        TypeError: N is not an integer, or t not a real floating tensor.
        ValueError: the measure is unknown, N < 1, or t has a wrong shape,
            or an age that is negative or not finite.

    Source: Gu et al. 2023; book/memory.md.
    """
    check_choice("measure", measure, MEASURES)
    N = check_int("N", N)
    check_tensors(t=(t, "real T"))
    if (t < 0).any():
        raise ValueError(f"t: expected ages >= 0, got {t.min().item()}")
    if measure == "lagt":
        return laguerre(N, t)
    if measure == "legs":
        norms, fade = (2 * torch.arange(N).to(t) + 1).sqrt(), torch.exp(-t)
        return norms[:, None] * fade * legendre(N, 2 * fade - 1)
    A, B = (X.to(t.device) for X in hippo(measure, N))
    k = expm(t.double()[:, None, None] * A) @ B  # (T, N)
    return k.T.to(t.dtype)


def init_dt(
    H: int, dt_min: float, dt_max: float, generator: Generator | None = None
) -> Tensor:
    """Draw one step size for each channel, log-uniformly.

    Args:
        H: how many, >= 1.
        dt_min: the smallest step, > 0, in the unit of time of A.
        dt_max: the largest step, >= dt_min.
        generator: the source of randomness; the global one if not given.

    Returns:
        (H,) steps, float64.

    Raises:
        TypeError: H is not an integer, a bound not a number, or generator
            not one of PyTorch's.
        ValueError: H < 1, dt_min <= 0, or dt_max < dt_min.

    Source: Gu et al. 2022 (official S4 code); book/memory.md.
    """
    H = check_int("H", H)
    for name, bound in {"dt_min": dt_min, "dt_max": dt_max}.items():
        check_step(name, check_number(name, bound))
    check_generator("generator", generator)
    if dt_max < dt_min:
        raise ValueError(
            f"dt_max: expected a number >= dt_min = {dt_min}, got {dt_max}"
        )
    a, b = math.log(dt_min), math.log(dt_max)
    where = torch.rand(H, dtype=torch.float64, generator=generator)
    return (a + (b - a) * where).exp()
