"""One program for the sums.

The Cauchy sums of the kernel, and their derivatives of any order, by a single GPU
program that stores no table; so far it has run in Triton's interpreter only.

Tangled from book/fused.md.
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor

from s4mini.checks import check_tensors
from s4mini.generating import check_batch

__all__ = ["tl", "triton_available", "fused_cauchy"]

#: What stands for triton.language until that is imported.
tl = SimpleNamespace(constexpr="constexpr")


def _program(
    w,
    Lambda,
    x,
    y,
    out,
    k,
    n,
    M,
    PIECE,
    P: tl.constexpr,
    ADJOINT: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store k sums over a piece of the inputs, at a block of the outputs."""
    h, piece = tl.program_id(0).to(tl.int64), tl.program_id(2)
    j = tl.arange(0, K)[:, None]
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if ADJOINT:
        inputs, outputs = M, n
    else:
        inputs, outputs = n, M
    near = tl.minimum(lane, outputs - 1)  # beyond the end: load, do not store
    w += 2 * (h * k + tl.minimum(j, k - 1)) * inputs
    re = tl.zeros((K, BLOCK), w.dtype.element_ty)
    im = re
    for i in range(piece * PIECE, tl.minimum(inputs, (piece + 1) * PIECE)):
        if ADJOINT:
            mode, node = near, i
        else:
            mode, node = i, near
        X, Y, mode = tl.load(x + node), tl.load(y + node), 2 * (h * n + mode)
        a, b = -Y * tl.load(Lambda + mode), X - Y * tl.load(Lambda + mode + 1)
        scale = 1 / (a * a + b * b)
        a, b = a * scale, -b * scale  # 1 / (i x - y lambda)
        s, t = a, b
        for _ in tl.static_range(P - 1):
            s, t = Y * (s * a - t * b), Y * (s * b + t * a)
        if ADJOINT:
            t = -t
        u, v = tl.load(w + 2 * i), tl.load(w + 2 * i + 1)
        re = re + u * s - v * t
        im = im + u * t + v * s
    to = 2 * (((piece * tl.num_programs(0) + h) * k + j) * outputs + lane)
    inside = (j < k) & (lane < outputs)
    tl.store(out + to, re, mask=inside)
    tl.store(out + to + 1, im, mask=inside)


@lru_cache
def _compiled():
    """Import Triton, and hand the program to it."""
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_program)


def _interpreted() -> bool:
    """Tell whether Triton is asked to interpret its programs."""
    value = os.environ.get("TRITON_INTERPRET", "0").lower()
    return value in ("1", "true", "yes", "on", "y")


def triton_available() -> str:
    """Return why Triton's programs cannot run here, or "" if they can.

    Returns:
        An empty string if Triton is installed and there is a CUDA device, or
        if its interpreter is switched on; otherwise the reason.

    Source: book/fused.md.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    if _interpreted() or torch.cuda.is_available():
        return ""
    return "there is no CUDA device (TRITON_INTERPRET=1 runs it without one)"


def _start(
    w: Tensor, Lambda: Tensor, x: Tensor, y: Tensor, p: int, adjoint: bool, piece: int
) -> Tensor:
    """Run the program for all channels, blocks and pieces, and add the pieces."""
    elsewhere = "" if w.is_cuda or _interpreted() else f"the tensors are on {w.device}"
    if reason := triton_available() or elsewhere:
        raise RuntimeError(f"fused_cauchy: {reason}")
    (h, k, _), n, M = w.shape, Lambda.shape[1], len(x)
    inputs, outputs = (M, n) if adjoint else (n, M)
    K = 1 << (k - 1).bit_length()
    block = min(max(1, 512 // K), 1 << (outputs - 1).bit_length())
    grid = h, -(-outputs // block), -(-inputs // piece)
    out = w.new_empty(grid[2], h, k, outputs)
    pairs = (torch.view_as_real(t.resolve_conj().contiguous()) for t in (w, Lambda))
    with torch.cuda.device_of(w):
        _compiled()[grid](
            *pairs,
            x.contiguous(),
            y.contiguous(),
            torch.view_as_real(out),
            k,
            n,
            M,
            piece,
            p,
            adjoint,
            K,
            block,
            num_warps=1,
        )
    return out.sum(0)


# In a notebook the name is another: a second definition of a name undoes the first.
@torch.library.custom_op(f"{__name__.replace('.', '_')}::cauchy_sums", mutates_args=())
def _sums(
    w: Tensor, Lambda: Tensor, x: Tensor, y: Tensor, p: int, adjoint: bool
) -> Tensor:
    """Return S_p of w (h, k, n), or T_p of w (h, k, M); Lambda is (h, n)."""
    return _start(w, Lambda, x, y, p, adjoint, piece=256)


@_sums.register_fake
def _shape(w, Lambda, x, y, p, adjoint):
    """Return an empty result."""
    return w.new_empty(*w.shape[:2], Lambda.shape[1] if adjoint else len(x))


def _keep(ctx, inputs, output) -> None:
    """Keep the inputs for the backward pass; nothing else."""
    *tensors, ctx.p, ctx.adjoint = inputs
    ctx.save_for_backward(*tensors)


def _faces(ctx, arrived: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of w and Lambda: the faces of the form t_p."""
    w, *at = ctx.saved_tensors
    v, g = (arrived, w) if ctx.adjoint else (w, arrived)
    of_w = _sums(arrived, *at, ctx.p, not ctx.adjoint)
    of_Lambda = ctx.p * (v.conj() * _sums(g, *at, ctx.p + 1, True)).sum(1)
    return of_w, of_Lambda, None, None, None, None


_sums.register_autograd(_faces, setup_context=_keep)


def fused_cauchy(v: Tensor, Lambda: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sum v / (i x - y Lambda) over conjugate pairs, by a program of Triton.

    Args:
        v: (..., k, n) complex weights of k sums.
        Lambda: (..., n) complex, one of each conjugate pair, of v's dtype.
        x: (M,) real, of that precision.
        y: (M,) real, of the same dtype as x.

    Returns:
        (..., k, M) complex: the sums over the n modes and their conjugates,
        differentiable any number of times in v and Lambda, not in x and y.

    Raises:
        RuntimeError: Triton is not installed, or cannot run where the
            tensors are.
        TypeError: an argument is not a tensor of the kind above.
        ValueError: shapes do not agree, or an entry is not finite.

    Source: Gu et al. 2022a, algorithm 1, line 2; book/fused.md.
    """
    shapes = {"v": (v, "... k n"), "Lambda": (Lambda, "... n")}
    check_tensors(**shapes, x=(x, "real M"), y=(y, "real M"))
    check_batch(v=v.shape[:-2], Lambda=Lambda.shape[:-1])
    _alike(v=v, Lambda=Lambda, x=x, y=y)
    batch = torch.broadcast_shapes(v.shape[:-2], Lambda.shape[:-1])
    v, Lambda = (torch.cat((t, t.conj()), -1) for t in (v, Lambda))
    modes = Lambda.expand(*batch, -1).reshape(-1, Lambda.shape[-1])
    w = v.expand(*batch, -1, -1).reshape(len(modes), *v.shape[-2:])
    return _sums(w, modes, x, y, 1, False).reshape(*batch, -1, len(x))


def _alike(**tensors: Tensor) -> None:
    """Refuse precisions and devices that differ from those of x."""
    x = tensors["x"]
    for name, t in tensors.items():
        kind = (
            x.dtype if name in "xy" else torch.promote_types(x.dtype, torch.complex64)
        )
        if (t.dtype, t.device) != (kind, x.device):
            raise TypeError(
                f"{name}: expected {kind} on {x.device}, got {t.dtype} on {t.device}"
            )
