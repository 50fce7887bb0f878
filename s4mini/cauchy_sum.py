"""Sums of simple fractions.

For a diagonal matrix the resolvent is a sum of simple fractions. Here it is written
without a pole at the nodes, and with half of the modes.

Tangled from book/cauchy_sum.md.
"""

import importlib.util
import math
import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

from s4mini.checks import check_choice, check_device, check_int, check_tensors
from s4mini.generating import check_batch

__all__ = ["nodes", "damp", "cauchy", "keops_available"]


def nodes(
    L: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the real coordinates of the roots of unity.

    Args:
        L: length of the sequence, >= 1.
        dtype: float32 or float64.
        device: where to put them.

    Returns:
        x = 2 sin(theta/2) and y = cos(theta/2), each (L // 2 + 1,), for
        theta = 2 pi k / L; each entry rounded once, y exactly 0 at Nyquist.

    Raises:
        TypeError: L is no integer, or dtype is not real floating.
        ValueError: L < 1.

    Source: book/cauchy_sum.md.
    """
    L = check_int("L", L)
    check_device("device", device)
    if not getattr(dtype, "is_floating_point", False):
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    k = torch.arange(L // 2 + 1, dtype=torch.float64, device=device)
    x = 2 * torch.sin(math.pi / L * k)
    y = torch.sin(math.pi / (2 * L) * (L - 2 * k))
    return x.to(dtype), y.to(dtype)


def damp(Lambda: Tensor, v: Tensor, L: int) -> tuple[Tensor, Tensor]:
    """Return the modes and weights with which a sum has no pole.

    With tau = tanh(1/2L), and z = exp(-1/L - i theta), the fractions
    v / ((1 - z) - (1 + z) Lambda / 2) are those of the result at the real
    nodes of exp(-i theta), times (1 + tau) exp(i theta / 2).

    Args:
        Lambda: (..., n) eigenvalues times the step, real part <= 0.
        v: (..., n) weights; batch axes are broadcast.
        L: length of the sequence, >= 1.

    Returns:
        Lambda' (..., n) with a real part below zero, and v' (..., n).

    Raises:
        TypeError: Lambda or v is not a tensor of numbers, or L no integer.
        ValueError: shapes do not agree, an entry is not finite, or L < 1.

    Source: book/cauchy_sum.md.
    """
    L = check_int("L", L)
    check_tensors(Lambda=(Lambda, "... n"), v=(v, "... n"))
    check_batch(Lambda=Lambda.shape[:-1], v=v.shape[:-1])
    tau = math.tanh(0.5 / L)
    factor = 1 / (1 - tau / 2 * Lambda)
    return (Lambda - 2 * tau) * factor, v * factor


def cauchy(
    v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor, backend: str = "torch"
) -> Tensor:
    """Sum v / (i x - y Lambda) over conjugate pairs.

    Args:
        v: (..., k, n) complex weights of k sums.
        Lambda: (..., n) complex, one of each conjugate pair.
        x: (M,) real.
        y: (M,) real, of the same dtype as x.
        backend: "torch", with a table of n M numbers, or "keops", a
            compiled formula that stores none.

    Returns:
        (..., k, M) complex: the sums over the n modes and their conjugates.

    Raises:
        TypeError: an argument is not a tensor of the kind above.
        ValueError: shapes do not agree, an entry is not finite, or the
            backend is unknown or cannot be used here.

    Source: Gu et al. 2022a, algorithm 1, line 2; book/cauchy_sum.md.
    """
    check_tensors(
        v=(v, "... k n"), Lambda=(Lambda, "... n"), x=(x, "real M"), y=(y, "real M")
    )
    check_batch(v=v.shape[:-2], Lambda=Lambda.shape[:-1])
    check_choice("backend", backend, ("torch", "keops"))
    kind = torch.complex64
    for given in (v, Lambda, x, y):  # the highest precision wins
        kind = torch.promote_types(kind, given.dtype)
    v, Lambda, real = v.to(kind), Lambda.to(kind), kind.to_real()
    x, y = x.to(real), y.to(real)
    if backend == "torch":
        return _by_table(v, Lambda, x, y)
    if reason := keops_available():
        raise ValueError(f"backend: 'keops' cannot be used here: {reason}")
    return _by_keops(v, Lambda, x, y)


def _by_table(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Do the work of cauchy with one feature for each mode and node."""
    a, size = Lambda.real[..., None], Lambda.abs()[..., None]
    phi = 1 / torch.complex((y * size) ** 2 - x**2, -2 * a * (x * y))
    cross = (v * Lambda.conj()[..., None, :]).real
    W = torch.cat((v.real.expand_as(cross), cross), -2)  # (..., 2k, n)
    p = torch.complex(W @ phi.real, W @ phi.imag)  # (..., 2k, M)
    re, cross = p.chunk(2, -2)
    return 2 * (1j * x * re - y * cross)


def _by_keops(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Do the work of cauchy by KeOps, which stores no table."""
    from pykeops.torch import LazyTensor

    k, n = v.shape[-2:]
    batch = torch.broadcast_shapes(v.shape[:-2], Lambda.shape[:-1])
    modes = Lambda[..., None, :].expand(*batch, k, n).reshape(-1, 1, n, 1)
    v = v.expand(*batch, k, n).reshape(modes.shape).contiguous()
    grid = x.to(v.dtype), y.to(v.dtype)
    x, y = (t.expand(len(v), -1)[..., None, None].contiguous() for t in grid)
    x, y = LazyTensor(1j * x), LazyTensor(y)
    p = LazyTensor(v) / (x - y * LazyTensor(modes))
    p += LazyTensor(v.conj_physical()) / (x - y * LazyTensor(modes.conj_physical()))
    return p.sum(2).reshape(*batch, k, -1)  # (..., k, M)


def _unwritable(folder: Path) -> str:
    """Return why nothing can be written to a folder, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"KeOps keeps its programs in {folder}: {error.strerror}"


def keops_available() -> str:
    """Return why KeOps cannot be used here, or an empty string.

    Source: book/cauchy_sum.md.
    """
    if importlib.util.find_spec("pykeops") is None:
        return 'pykeops is not installed: pip install "s4mini[keops]"'
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        return "KeOps needs a C++ compiler, and none was found"
    usual = os.path.join(os.path.expanduser("~"), ".cache")
    return _unwritable(Path(os.environ.get("KEOPS_CACHE_FOLDER", usual)))
