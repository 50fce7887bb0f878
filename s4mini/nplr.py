"""Normal plus low rank.

The HiPPO matrix cannot safely be made diagonal, but after adding a matrix of rank one
it can: by a unitary change of basis that loses no accuracy at any size.

Tangled from book/nplr.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from s4mini.checks import check_choice, check_int, check_tensors
from s4mini.hippo import hippo
from s4mini.ssm import promote

__all__ = ["NPLR", "nplr", "half_spectrum", "real_form"]


class NPLR(NamedTuple):
    """A system in the basis in which A is diagonal minus low rank.

    In the original coordinates the state matrix is
    V (diag(Lambda) - P P*) V*, and the input vector V B.

    Attributes:
        Lambda: (N,) eigenvalues of the normal part, by rising imaginary part.
        P: (N, r) the low-rank factor.
        B: (N,) the input vector.
        V: (N, N) unitary, the eigenvectors in its columns.

    Source: Gu et al. 2022a, Theorem 1; book/nplr.md.
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
        An output vector C of the original coordinates becomes C.to(V) @ V.

    Raises:
        TypeError: N is not an integer.
        ValueError: the measure is unknown, or N < 1.

    Source: Gu et al. 2022a, Theorem 1; book/nplr.md.
    """
    check_choice("measure", measure, ("legs",))
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
        TypeError: system is not an NPLR, or a field not a floating or complex
            tensor.
        ValueError: a shape is wrong, N is odd, or the modes do not come in
            pairs.

    Source: book/nplr.md.
    """
    if not isinstance(system, NPLR):
        kind = type(system).__name__
        raise TypeError(f"system: expected an NPLR, got {kind}")
    Lambda, P, B, V = system
    sizes = check_tensors(Lambda=(Lambda, "N"), P=(P, "N r"), B=(B, "N"), V=(V, "N N"))
    N = check_int("N", sizes["N"], minimum=2, even=True)
    keep = (Lambda + 0j).imag > 0
    above = int(keep.sum())
    if 2 * above != N:
        raise ValueError(
            f"Lambda: expected {N // 2} of {N} modes above the real axis, got {above}"
        )
    return NPLR(Lambda[keep], P[keep], B[keep], V[:, keep])


def _parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, also of a real tensor."""
    return z.real, z.imag if z.is_complex() else torch.zeros_like(z)


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
    half = {"Lambda": Lambda, "P": P, "B": B, "C": C}
    axes = {"P": "... n r"}
    check_tensors(**{k: (z, axes.get(k, "... n")) for k, z in half.items()})
    Lambda, P, B, C = promote(**half)
    a, b = map(torch.diag_embed, _parts(Lambda))
    rotation = torch.cat((torch.cat((a, -b), -1), torch.cat((b, a), -1)), -2)
    P = torch.cat(_parts(P), -2)  # (..., 2n, r)
    re, im = _parts(C)
    A = rotation - 2 * P @ P.mT
    return A, torch.cat(_parts(B), -1), 2 * torch.cat((re, -im), -1)
