"""Normal plus low rank.

The HiPPO matrices cannot safely be made diagonal, but after adding a matrix of rank one
or two they can: by a unitary change of basis that loses no accuracy at any size.

Tangled from book/lowrank.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from s4mini.checks import check_int, check_tensors
from s4mini.projection import hippo
from s4mini.ssm import promote

__all__ = ["NPLR", "nplr", "half_spectrum", "real_form"]


def _low_rank_part(measure: str, B: Tensor) -> Tensor:
    """Return the real factor P (N, r) of a measure."""
    n = torch.arange(len(B), dtype=B.dtype)
    match measure:
        case "legs":
            return (n + 0.5).sqrt()[:, None]
        case "legt":
            odd = n % 2
            return (2 * n + 1).sqrt()[:, None] * torch.stack((1 - odd, odd), 1)
        case "lagt":
            return torch.full_like(B, 0.5).sqrt()[:, None]
        case _:
            return (B / 2**0.5)[:, None]  # fout


class NPLR(NamedTuple):
    """A system in the basis in which A is diagonal minus low rank.

    In the original coordinates the state matrix is
    V (diag(Lambda) - P P*) V*, and the input vector V B.

    Attributes:
        Lambda: (N,) eigenvalues of the normal part, by rising imaginary part.
        P: (N, r) the low-rank factor.
        B: (N,) the input vector.
        V: (N, N) unitary, the eigenvectors in its columns.

    Source: Gu et al. 2022a, eq. 6; book/lowrank.md.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor
    V: Tensor


def nplr(measure: str, N: int) -> NPLR:
    """Split a HiPPO matrix into normal and low rank, and diagonalise.

    Args:
        measure: of the HiPPO matrix: "legs", "legt", "lagt" or "fout".
        N: state size, >= 1.

    Returns:
        Lambda (N,), P (N, r), B (N,), V (N, N), complex128: dimensionless
        for "legs", else per time (P: per root of time). r is 2 for "legt",
        else 1. Re Lambda is -1/2 for "legs", else exactly 0. An output vector
        C of the original coordinates becomes C.to(V) @ V.

    Raises:
        TypeError: N is not an integer.
        ValueError: the measure is unknown, or N < 1.

    Source: Gu et al. 2022a, Theorem 1, with Q = P. It does not cover
    "fout", for which see Gu et al. 2023; book/lowrank.md.
    """
    A, B = hippo(measure, N)
    P = _low_rank_part(measure, B)  # (N, r)
    S = A + P @ P.T
    S = (S - S.T) / 2  # drops -I/2 of LegS, and rounding
    nu, V = torch.linalg.eigh(-1j * S)
    nu = (nu - nu.flip(0)) / 2  # conjugate pairs, exactly
    if measure == "fout" and N % 2 == 0:
        nu, V = _pair_zeros(nu, V)
    V = V * torch.sgn(V.mH @ B.to(V))  # phase: V* B > 0
    real = torch.full_like(nu, -0.5 if measure == "legs" else 0)
    return NPLR(torch.complex(real, nu), V.mH @ P.to(V), V.mH @ B.to(V), V)


def _pair_zeros(nu: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Make the two zero modes of FouT a conjugate pair."""
    n, V = len(nu) // 2, V.clone()
    V[:, n - 1 : n + 1] = 0
    V[0, n - 1 : n + 1] = 0.5**0.5
    V[1, n - 1 : n + 1] = torch.tensor([-1j, 1j]).to(V) * 0.5**0.5
    nu[n - 1 : n + 1] = 0
    return nu, V


def half_spectrum(system: NPLR) -> NPLR:
    """Keep one mode of each conjugate pair.

    Args:
        system: all N modes of a real system, N even.

    Returns:
        The N/2 modes with the larger Im Lambda of each pair; P (N/2, r),
        B (N/2,), V (N, N/2). The output of the whole system is 2 Re(C x) of
        this half.

    Raises:
        TypeError: system is not an NPLR, or a field not a floating or complex
            tensor.
        ValueError: a shape is wrong, N is odd, or the modes do not come in
            pairs.

    Source: book/lowrank.md.
    """
    if not isinstance(system, NPLR):
        kind = type(system).__name__
        raise TypeError(f"system: expected an NPLR, got {kind}")
    Lambda, P, B, V = system
    sizes = check_tensors(Lambda=(Lambda, "N"), P=(P, "N r"), B=(B, "N"), V=(V, "N N"))
    N = check_int("N", sizes["N"], minimum=2, even=True)
    order = (Lambda + 0j).imag.argsort(stable=True)
    low, high = order[: N // 2].flip(0), order[N // 2 :]
    for name, z in {"Lambda": Lambda, "B": B, "V": V.mT}.items():
        gap = (z[low].conj() - z[high]).abs().max()
        if gap > 1e-6 * z.abs().max():
            raise ValueError(
                f"{name}: expected modes in conjugate pairs, got a pair "
                f"that differs by {gap.item():.2g}"
            )
    return NPLR(Lambda[high], P[high], B[high], V[:, high])


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

    Source: book/lowrank.md.
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
