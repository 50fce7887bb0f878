"""From powers to a resolvent.

The kernel is a sequence of matrix powers. Its generating function is a matrix inverse,
and its values at the roots of unity give all powers back at once.

Tangled from book/generating.md.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from s4mini.checks import check_device, check_int, check_positive, check_tensors

__all__ = ["roots", "check_batch", "truncated_C"]


def roots(
    L: int,
    dtype: torch.dtype = torch.complex128,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the roots of unity at which a real FFT of length L sits.

    Args:
        L: length of the sequence, >= 1.
        dtype: complex64 or complex128.
        device: where to put them.

    Returns:
        (L // 2 + 1,) the points exp(-2 pi i k / L), each rounded once.

    Raises:
        TypeError: L is no integer, or dtype is not complex.
        ValueError: L < 1.

    Source: Gu et al. 2022a, lemma C.2; book/generating.md.
    """
    L = check_int("L", L)
    check_device("device", device)
    if not getattr(dtype, "is_complex", False):
        raise TypeError(f"dtype: expected a complex dtype, got {dtype}")
    k = torch.arange(L // 2 + 1, dtype=torch.float64, device=device)
    theta = 2 * math.pi * k / L
    return torch.polar(torch.ones_like(theta), -theta).to(dtype)


def check_batch(**shapes: Sequence[int]) -> None:
    """Refuse batch axes that cannot be broadcast.

    Args:
        shapes: the batch axes of each argument, by its name.

    Raises:
        ValueError: they do not agree; the message names all arguments.

    Source: book/generating.md.
    """
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        given = ", ".join(str(tuple(shape)) for shape in shapes.values())
        raise ValueError(
            f"{', '.join(shapes)}: expected batch axes that agree, got {given}"
        ) from None


def truncated_C(E: Tensor, C: Tensor, L: int, weight: float = 1.0) -> Tensor:
    """Return C~ = C (I - weight A_bar^L), given E = A_bar - I.

    Args:
        E: (..., N, N) the state matrix less the identity, dimensionless.
        C: (..., N) output vector; batch axes are broadcast.
        L: length of the kernel, >= 1.
        weight: rho^L at nodes of radius rho, in (0, 1]; 1 on the unit circle.

    Returns:
        C~ (..., N), in the units of C.

    Raises:
        TypeError: E or C is not a tensor of numbers, or L no integer.
        ValueError: shapes do not agree, an entry is not finite, L < 1, or
            the weight is not in (0, 1].

    Source: Gu et al. 2022a, algorithm 1, line 1; book/generating.md.
    """
    L = check_int("L", L)
    check_tensors(E=(E, "... N N"), C=(C, "... N"))
    check_batch(E=E.shape[:-2], C=C.shape[:-1])
    check_positive("weight", weight)
    if weight > 1:
        raise ValueError(f"weight: expected a number in (0, 1], got {weight}")
    kind = torch.promote_types(E.dtype, C.dtype)
    E, C = E.to(kind), C.to(kind)
    row = C[..., None, :]  # one row of each matrix
    power = torch.zeros_like(row @ E) if L % 2 == 0 else row @ E
    n = L
    while n := n // 2:
        E = 2 * E + E @ E  # A_bar^2 - I
        if n % 2:
            power = power + (row + power) @ E
    return (1 - weight) * C - weight * power[..., 0, :]
