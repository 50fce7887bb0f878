"""State spaces.

A linear state space model is a differential equation whose state sums up the past of
its input. We solve it, and read its output as a convolution of the input with one fixed
function.

Tangled from book/ssm.md.
"""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from s4mini.checks import check_tensors

__all__ = ["SSM", "promote", "expm", "impulse_response", "change_basis", "response"]


class SSM(NamedTuple):
    """A linear state space model x' = A x + B u, y = C x + D u.

    Attributes:
        A: (N, N) state matrix, in 1/time.
        B: (N,) input vector, in state/(input * time).
        C: (N,) output vector, in output/state; used without conjugation.
        D: direct term, in output/input; a number or a tensor without axes.

    Source: Gu et al. 2022a, eq. 1; book/ssm.md.
    """

    A: Tensor
    B: Tensor
    C: Tensor
    D: float | Tensor = 0.0


_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def promote(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the smallest dtype that holds them all.

    Args:
        tensors: name=tensor, in single or double precision, real or complex.

    Returns:
        The tensors in the order given, all of one dtype.

    Raises:
        TypeError: a value is no tensor, or of another dtype.

    Source: book/ssm.md.
    """
    for name, value in tensors.items():
        kind = getattr(value, "dtype", type(value).__name__)
        if not isinstance(value, Tensor) or kind not in _DTYPES:
            raise TypeError(
                f"{name}: expected a tensor in single or double precision, "
                f"real or complex, got {kind}"
            )
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    return tuple(value.to(dtype) for value in tensors.values())


def _check_system(system: SSM) -> None:
    """Refuse what is not a state space model of finite numbers."""
    if not isinstance(system, SSM):
        kind = type(system).__name__
        raise TypeError(f"system: expected an SSM, got {kind}")
    A, B, C, D = system
    check_tensors(A=(A, "N N"), B=(B, "N"), C=(C, "N"))
    D = torch.as_tensor(D)
    if D.ndim or not D.isfinite():
        raise ValueError(f"D: expected one finite number, got {D.tolist()}")


def expm(M: Tensor) -> Tensor:
    """Exponentiate square matrices.

    Args:
        M: (..., N, N) matrices, dimensionless, real or complex.

    Returns:
        (..., N, N) exponentials.

    Raises:
        TypeError: M is no tensor in single or double precision.
        ValueError: M is not square, or not finite.

    Source: Higham 2008, section 10.3; book/ssm.md.
    """
    check_tensors(M=(M, "... N N"))
    (M,) = promote(M=M)
    norm = M.detach().abs().sum(dim=-2).amax(dim=-1)
    halvings = (torch.frexp(norm).exponent + 1).clamp(min=0)
    halvings = halvings[..., None, None]
    small = M * 2.0**-halvings  # norm <= 1/2
    E = eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    for j in range(14, 0, -1):
        E = eye + small @ E / j  # Horner's scheme for the series
    for j in range(int(halvings.max())):
        E = torch.where(halvings > j, E @ E, E)
    return E


def impulse_response(system: SSM, t: Tensor) -> Tensor:
    """Evaluate the impulse response C e^{tA} B, without the term D.

    Args:
        system: the state space model, with N states.
        t: (T,) times >= 0, real, in the unit of time of 1/A.

    Returns:
        (T,) values, in output/(input * time); complex if the system is.

    Raises:
        TypeError: system is no SSM, or t is no real floating tensor.
        ValueError: the system's shapes do not fit, or a time is negative.

    Source: book/ssm.md.
    """
    _check_system(system)
    check_tensors(t=(t, "real T"))
    if (t < 0).any():
        raise ValueError(f"t: expected times >= 0, got {t.min().item()}")
    A, B, C = promote(A=system.A, B=system.B, C=system.C)
    t = t.to(A.real.dtype)
    exponentials = expm(t[:, None, None] * A)  # (T, N, N)
    return exponentials @ B @ C


def change_basis(system: SSM, V: Tensor) -> SSM:
    """Write a system in the coordinates in which its state is V^-1 x.

    Args:
        system: the state space model, with N states.
        V: (N, N) invertible matrix, real or complex; its columns are the new
            basis vectors in the old coordinates.

    Returns:
        The system (V^-1 A V, V^-1 B, C V, D), in the common dtype.

    Raises:
        TypeError: system is no SSM, or V is no floating or complex tensor.
        ValueError: shapes do not fit, or V is singular.

    Source: Gu et al. 2022a, Lemma 3.1; book/ssm.md.
    """
    _check_system(system)
    check_tensors(A=(system.A, "N N"), V=(V, "N N"))
    A, B, C, V = promote(A=system.A, B=system.B, C=system.C, V=V)
    right = torch.cat([A @ V, B[:, None]], dim=1)  # (N, N + 1)
    try:
        new = torch.linalg.solve(V, right)
    except torch.linalg.LinAlgError as error:
        raise ValueError("V: expected an invertible matrix") from error
    return SSM(new[:, :-1], new[:, -1], C @ V, system.D)


def response(A: Tensor, B: Tensor, z: Tensor) -> Tensor:
    """Evaluate the state's response (zI - A)^-1 B to an input e^{zt}.

    Args:
        A: (N, N) state matrix, in 1/time.
        B: (N,) input vector, in state/(input * time).
        z: (Z,) numbers, in 1/time, none an eigenvalue of A.

    Returns:
        (Z, N) complex: the state is response * e^{zt}. Its product with C
        is the transfer function.

    Raises:
        TypeError: an argument is no tensor in single or double precision.
        ValueError: shapes do not fit, or z holds an eigenvalue of A.

    Source: book/ssm.md.
    """
    check_tensors(A=(A, "N N"), B=(B, "N"), z=(z, "Z"))
    i = torch.tensor(1j, dtype=torch.complex64)
    A, B, z, _ = promote(A=A, B=B, z=z, i=i)  # complex, whatever z is
    eye = torch.eye(len(B), dtype=A.dtype, device=A.device)
    M = z[:, None, None] * eye - A  # (Z, N, N)
    try:
        return torch.linalg.solve(M, B.expand(len(z), -1))
    except torch.linalg.LinAlgError as error:
        raise ValueError("z: expected no eigenvalue of A") from error
