"""Normal plus low rank.

The HiPPO matrix cannot safely be made diagonal, but after adding a matrix of rank one
it can: by a unitary change of basis that loses no accuracy at any size.

Tangled from book/nplr.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from s4mini.checks import check_int, check_tensors
from s4mini.hippo import hippo

__all__ = ["NPLR", "half_spectrum", "nplr", "real_form"]


class NPLR(NamedTuple):
    """A system in the basis in which A is diagonal minus low rank.

    A = V (diag(Lambda) - P P*) V*, and the input vector is V B.

    Attributes:
        Lambda: (N,) eigenvalues of the normal part, by rising imaginary part.
        P: (N, r) the low-rank factor.
        B: (N,) the input vector.
        V: (N, N) unitary, the eigenvectors in its columns.

    Source: Gu et al. 2022a, theorem 1; book/nplr.md.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def nplr(measure: str, N: int) -> NPLR:
    """Split a HiPPO matrix into normal and low rank, and diagonalise.

    Args:
        measure: the measure of the HiPPO matrix, "legs".
        N: state size, >= 1.

    Returns:
        Lambda (N,), P (N, 1), B (N,), V (N, N), complex128, dimensionless.
        A real output vector C of the original coordinates becomes C @ V.

    Raises:
        TypeError: N is not an integer.
        ValueError: the measure is unknown, or N < 1.

    Source: Gu et al. 2022a, theorem 1 and appendix C; book/nplr.md.
    """
    A, B = hippo(measure, N)
    n = torch.arange(len(B), dtype=A.dtype)
    P = (n + 0.5).sqrt()[:, None]  # (N, 1)
    S = A + P @ P.T
    S = (S - S.T) / 2  # drops the -I/2, and rounding
    omega, V = torch.linalg.eigh(-1j * S)
    omega = (omega - omega.flip(0)) / 2  # conjugate pairs, exactly
    V = V * torch.sgn(V.mH @ B.to(V))  # phase: V* B > 0
    Lambda = torch.complex(torch.full_like(omega, -0.5), omega)
    return NPLR(Lambda, V.mH @ P.to(V), V.mH @ B.to(V), V)


def half_spectrum(system: NPLR) -> NPLR:
    """Keep one mode of each conjugate pair.

    Args:
        system: all N modes of a real system, N even.

    Returns:
        The N/2 modes with Im Lambda > 0; P (N/2, r), B (N/2,), V (N, N/2).
        The output of the whole system is 2 Re(C x) of this half.

    Raises:
        TypeError: a field is not a floating or complex tensor.
        ValueError: a shape is wrong, N is odd, or the modes do not come in
            pairs.

    Source: book/nplr.md.
    """
    Lambda, P, B, V = system
    sizes = check_tensors(Lambda=(Lambda, "N"), P=(P, "N r"), B=(B, "N"), V=(V, "N N"))
    N = check_int("N", sizes["N"], minimum=2, even=True)
    keep = (Lambda + 0j).imag > 0
    if 2 * int(keep.sum()) != N:
        raise ValueError(
            f"Lambda: expected {N // 2} modes above the real axis, "
            f"got {int(keep.sum())}"
        )
    return NPLR(Lambda[keep], P[keep], B[keep], V[:, keep])


def real_form(
    Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write a half spectrum as a real system of twice the size.

    Args:
        Lambda: (..., n) eigenvalues, one of each pair, in 1/time.
        P: (..., n, r) low-rank factor.
        B: (..., n) input vector.
        C: (..., n) output vector.

    Returns:
        A (..., 2n, 2n), B (..., 2n), C (..., 2n), real: the same system with
        the state [Re x; Im x].

    Raises:
        TypeError: an argument is not a floating or complex tensor.
        ValueError: shapes do not agree, or an entry is not finite.

    Source: book/nplr.md.
    """
    check_tensors(
        Lambda=(Lambda, "... n"),
        P=(P, "... n r"),
        B=(B, "... n"),
        C=(C, "... n"),
    )
    Lambda, P, B, C = (z if z.is_complex() else z + 0j for z in (Lambda, P, B, C))
    a, b = torch.diag_embed(Lambda.real), torch.diag_embed(Lambda.imag)
    top, bottom = torch.cat((a, -b), -1), torch.cat((b, a), -1)
    P = torch.cat((P.real, P.imag), -2)  # (..., 2n, r)
    A = torch.cat((top, bottom), -2) - 2 * P @ P.mT
    B = torch.cat((B.real, B.imag), -1)
    return A, B, 2 * torch.cat((C.real, -C.imag), -1)
