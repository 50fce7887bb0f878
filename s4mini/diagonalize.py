"""The eigenvectors of HiPPO.

The eigenvectors of the LegS matrix are whole numbers times square roots, known in
closed form. They are also useless in floating point, and this page measures how
useless.

Tangled from book/diagonalize.md.
"""

from math import comb

import torch
from torch import Tensor

from s4mini.checks import check_int

__all__ = ["legs_eigenvectors"]


def legs_eigenvectors(N: int) -> tuple[Tensor, Tensor]:
    """Return the exact eigenvectors of LegS and their inverse, rounded.

    Args:
        N: state size, 1 to 512; beyond, entries leave the range of float64.

    Returns:
        V (N, N) and W (N, N), float64, dimensionless, lower triangular: in
        exact arithmetic W V = I and A V = V diag(-1, ..., -N). Each entry
        is accurate to its last digits; products of them are not, from
        N = 20 on.

    Raises:
        TypeError: N is not an integer.
        ValueError: N < 1 or N > 512.

    Source: Gu et al. 2022a, lemma 3.2, scaled; book/diagonalize.md.
    """
    N = check_int("N", N)
    if N > 512:
        raise ValueError(f"N: expected at most 512, got {N}")
    rows = [[float(comb(n + j, 2 * j)) for j in range(N)] for n in range(N)]
    inverse = [[float(_ballot(j, k)) for k in range(N)] for j in range(N)]
    n = torch.arange(N, dtype=torch.float64)
    sign, root = 1 - 2 * n.remainder(2), (2 * n + 1).sqrt()
    V = torch.tensor(rows, dtype=torch.float64) * (sign * root)[:, None]
    W = torch.tensor(inverse, dtype=torch.float64) * sign[:, None] / root
    return V, W


def _ballot(j: int, k: int) -> int:
    """Return (2k+1)/(j+k+1) times C(2j, j-k), a whole number."""
    if k > j:
        return 0
    return (2 * k + 1) * comb(2 * j, j - k) // (j + k + 1)
