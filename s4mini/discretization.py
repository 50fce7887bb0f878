"""From time to steps.

A computer sees samples. Four rules turn the differential equation into a recurrence,
and they differ in accuracy, in stability, and in what they assume about the input
between two samples.

Tangled from book/discretization.md.
"""

import torch
from torch import Tensor

from s4mini.checks import check_choice, check_step, check_tensors
from s4mini.ssm import expm, promote

__all__ = ["gbt", "zoh", "discretize"]


def _prepare(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return dt A and dt B with the batch axes of all three arguments."""
    check_tensors(A=(A, "... N N"), B=(B, "... N"))
    check_step("dt", dt)
    A, B = promote(A=A, B=B)
    dt = torch.as_tensor(dt, dtype=A.real.dtype, device=A.device)
    shapes = A.shape[:-2], B.shape[:-1], dt.shape
    try:
        batch = torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        given = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"dt: expected batch axes of A, B and dt that broadcast, got {given}"
        ) from error
    dtA = dt[..., None, None] * A  # (..., N, N)
    dtB = dt[..., None] * B  # (..., N)
    return dtA.expand(*batch, *A.shape[-2:]), dtB.expand(*batch, B.shape[-1])


def _check_alpha(name: str, alpha: float) -> None:
    """Refuse a weight that is no number in [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        kind = type(alpha).__name__
        raise TypeError(f"{name}: expected a number in [0, 1], got {kind}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {alpha}")


def gbt(
    A: Tensor, B: Tensor, dt: float | Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Sample x' = A x + B u by the generalised bilinear transform.

    Args:
        A: (..., N, N) state matrix, in 1/time.
        B: (..., N) input vector, in state/(input * time).
        dt: step > 0, a number or a tensor (...), in the same unit of time.
        alpha: weight in [0, 1] of the new end of the step; 0 is Euler's
            rule, 1 backward Euler, 1/2 the bilinear rule.

    Returns:
        A_bar (..., N, N), dimensionless, and B_bar (..., N), in state/input.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes do not fit, an argument is out of range, or
            I - alpha dt A is singular.

    Source: Gu et al. 2021, eq. 3; book/discretization.md.
    """
    _check_alpha("alpha", alpha)
    dtA, dtB = _prepare(A, B, dt)
    eye = torch.eye(dtA.shape[-1], dtype=dtA.dtype, device=dtA.device)
    right = torch.cat([eye + (1 - alpha) * dtA, dtB[..., None]], dim=-1)
    try:
        bars = torch.linalg.solve(eye - alpha * dtA, right)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            "dt: expected I - alpha dt A to be invertible, "
            f"got dt = {dt}, alpha = {alpha}"
        ) from error
    return bars[..., :-1], bars[..., -1]


def zoh(A: Tensor, B: Tensor, dt: float | Tensor) -> tuple[Tensor, Tensor]:
    """Sample x' = A x + B u exactly for an input held over each step.

    Args:
        A: (..., N, N) state matrix, in 1/time; may be singular.
        B: (..., N) input vector, in state/(input * time).
        dt: step > 0, a number or a tensor (...), in the same unit of time.

    Returns:
        A_bar (..., N, N), dimensionless, and B_bar (..., N), in state/input.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes do not fit, or dt is out of range.

    Source: the lemma that a hold is a state; book/discretization.md.
    """
    dtA, dtB = _prepare(A, B, dt)
    N = dtA.shape[-1]
    top = torch.cat([dtA, dtB[..., None]], dim=-1)  # (..., N, N + 1)
    block = torch.nn.functional.pad(top, (0, 0, 0, 1))  # a row of zeros
    exponential = expm(block)
    return exponential[..., :N, :N], exponential[..., :N, N]


_ALPHAS = {"euler": 0.0, "backward_euler": 1.0, "bilinear": 0.5}


def discretize(
    A: Tensor,
    B: Tensor,
    dt: float | Tensor,
    method: str | float = "bilinear",
) -> tuple[Tensor, Tensor]:
    """Sample x' = A x + B u at step dt by the rule named.

    Args:
        A: (..., N, N) state matrix, in 1/time.
        B: (..., N) input vector, in state/(input * time).
        dt: step > 0, a number or a tensor (...), in the same unit of time.
        method: "euler", "backward_euler", "bilinear", "zoh", or the weight
            alpha in [0, 1] of the generalised bilinear transform.

    Returns:
        A_bar (..., N, N), dimensionless, and B_bar (..., N), in state/input.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes do not fit, an argument is out of range, the
            method is unknown, or I - alpha dt A is singular.

    Source: Gu et al. 2022a, eq. 3; book/discretization.md.
    """
    if isinstance(method, str):
        check_choice("method", method, [*_ALPHAS, "zoh"])
        if method == "zoh":
            return zoh(A, B, dt)
        method = _ALPHAS[method]
    _check_alpha("method", method)
    return gbt(A, B, dt, method)
