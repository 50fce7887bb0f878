"""One program for the kernel.

Cauchy sums, Woodbury correction and phase factor in a single GPU program, and their
gradient in a second one; so far both have run in Triton's interpreter only.

Tangled from book/fused.md.
"""

import math
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from torch import Tensor

from s4mini.checks import check_int, check_positive, check_tensors

__all__ = ["tl", "triton_available", "fused_spectrum"]


@lru_cache(maxsize=16)
def _points(L: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Z = 2 tanh((1/L + i theta)/2), (M, 2) real, each rounded once."""
    k = torch.arange(L // 2 + 1, dtype=torch.float64)
    s = torch.sin(math.pi / L * k)
    c = torch.sin(math.pi / (2 * L) * (L - 2 * k))  # 0 at Nyquist
    tau = math.tanh(1 / (2 * L))
    below = c * c + (tau * s) ** 2
    Z = torch.stack((tau / below, (1 - tau**2) * s * c / below), -1)
    return (2 * Z).to(device, dtype)  # (M, 2)


#: What the programs use of triton.language, until that takes its place.
tl = SimpleNamespace(constexpr="constexpr", static_range=range)
_PROGRAMS: list[Callable] = []  # functions still to be handed to Triton


def _program(function: Callable) -> Callable:
    """Keep a function, to be handed to Triton when it is needed."""
    _PROGRAMS.append(function)
    return function


def _compile() -> None:
    """Import Triton, and put its programs in the place of the functions."""
    import triton
    import triton.language

    globals()["tl"] = triton.language
    while _PROGRAMS:
        function = _PROGRAMS.pop()
        globals()[function.__name__] = triton.jit(function)


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


@_program
def _mul(x, y):
    """Return the product of two complex numbers, each a pair."""
    return x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]


@_program
def _add(x, y):
    """Return the sum of two pairs."""
    return x[0] + y[0], x[1] + y[1]


@_program
def _neg(x):
    """Return minus a pair."""
    return -x[0], -x[1]


@_program
def _conj(x):
    """Return the complex conjugate of a pair."""
    return x[0], -x[1]


@_program
def _over_one_plus(x, y):
    """Return x / (1 + y) for pairs x and y."""
    re, im = 1 + y[0], y[1]
    g = 1 / (re * re + im * im)
    return _mul(x, (re * g, -im * g))


@_program
def _features_at(z, a, b):
    """Return F and Q of the modes a +- i b at the points z."""
    w = z[0] - a
    re = w * w + (b - z[1]) * (b + z[1])
    im = w * (z[1] + z[1])
    g = 1 / (re * re + im * im)
    Q = re * g, -im * g
    return _mul((w, z[1]), Q), Q


def _mode_rows(
    Lambda: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, dt: Tensor
) -> Tensor:
    """Return the rows of all modes, (h, n, 7 + 2 r) real."""
    h, n = Lambda.shape
    parts = [torch.view_as_real(t.resolve_conj()) for t in (Lambda, B, C_tilde, P)]
    parts[3] = parts[3].flatten(-2)  # (h, n, 2 r)
    return torch.cat((*parts, dt[:, None, None].expand(h, n, 1)), -1)


@_program
def _load(pointer, i):
    """Load complex number i."""
    return tl.load(pointer + 2 * i), tl.load(pointer + 2 * i + 1)


@_program
def _load_mode(row, R: tl.constexpr):
    """Return a, b, the row entries and the column entries of a mode."""
    dt = tl.load(row + 6 + 2 * R)
    a, b = _load(row, 0)
    rows, columns = (_load(row, 2),), (_load(row, 1),)
    for j in tl.static_range(R):
        p = _load(row, 3 + j)
        rows += (_conj(p),)
        columns += (p,)
    return dt * a, dt * b, rows, columns


@_program
def _accumulate(q, F, Q, b, rows, columns, R: tl.constexpr):
    """Return q with a mode added: u F - t b Q for each product."""
    total = ()
    for j in tl.static_range(1 + R):
        for k in tl.static_range(1 + R):
            u, t = _mul(rows[j], columns[k])
            s, (re, im) = t * b, q[j * (1 + R) + k]
            re = re + u * F[0] - s * Q[0]  # two fused operations
            im = im + u * F[1] - s * Q[1]
            total += ((re, im),)
    return total


@_program
def _sums(row, n, z, R: tl.constexpr):
    """Return the products q at the points z, over n modes."""
    zero = 0 * z[0]
    q, twice = (), ()
    for _ in tl.static_range((1 + R) * (1 + R)):
        q += ((zero, zero),)
    scale = 2 * tl.load(row + 6 + 2 * R)
    for _ in range(n):
        a, b, rows, columns = _load_mode(row, R)
        F, Q = _features_at(z, a, b)
        q = _accumulate(q, F, Q, b, rows, columns, R)
        row += 7 + 2 * R
    for j in tl.static_range((1 + R) * (1 + R)):
        twice += ((scale * q[j][0], scale * q[j][1]),)
    return twice


@_program
def _column(q, R: tl.constexpr):
    """Return y = -(I + q11)^-1 q10, r pairs, of the products q."""
    if R == 1:
        y = (_over_one_plus(_neg(q[2]), q[3]),)
    else:
        f = _neg(_over_one_plus(q[5], q[8]))  # column 2 taken out
        y1 = _add(q[3], _mul(f, q[6]))
        y1 = _over_one_plus(_neg(y1), _add(q[4], _mul(f, q[7])))
        y2 = _add(q[6], _mul(q[7], y1))
        y = (y1, _over_one_plus(_neg(y2), q[8]))
    return y


@_program
def _load_block(pointer, k, M, other):
    """Load complex numbers k, with `other` in place of those past M."""
    re = tl.load(pointer + 2 * k, mask=k < M, other=other)
    im = tl.load(pointer + 2 * k + 1, mask=k < M, other=0.0)
    return re, im


@_program
def _place(M, BLOCK: tl.constexpr):
    """Return the channel, the number of the block, and its nodes."""
    blocks = (M + BLOCK - 1) // BLOCK
    channel = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    return channel, block, block * BLOCK + tl.arange(0, BLOCK)


@_program
def _forward(rows, Z, K, h, n, M, R: tl.constexpr, BLOCK: tl.constexpr):
    """Store K_hat of one channel and one block of nodes."""
    channel, _, k = _place(M, BLOCK)
    z = _load_block(Z, k, M, 1.0)
    q = _sums(rows + channel * n * (7 + 2 * R), n, z, R)
    y, total = _column(q, R), q[0]
    for j in tl.static_range(R):
        total = _add(total, _mul(q[1 + j], y[j]))
    total = _mul((1 + z[0] / 2, z[1] / 2), total)
    tl.store(K + 2 * (channel * M + k), total[0], mask=k < M)
    tl.store(K + 2 * (channel * M + k) + 1, total[1], mask=k < M)


_BLOCK = {1: 256, 2: 128}  # nodes a program, by rank


def _launch(program: str, rows: Tensor, L: int, *tensors: Tensor) -> None:
    """Start a program for all channels and blocks of nodes."""
    _compile()
    h, n, width = rows.shape
    R, M = (width - 7) // 2, L // 2 + 1
    Z = _points(L, rows.dtype, rows.device)
    grid = (h * -(-M // _BLOCK[R]),)
    with torch.cuda.device_of(rows):
        globals()[program][grid](
            rows,
            Z,
            *tensors,
            h,
            n,
            M,
            R,
            _BLOCK[R],
            num_warps=1,
            enable_fp_fusion=True,
        )


@_program
def _adjoints(q, g, R: tl.constexpr):
    """Return the gradients of the products q, by that of the bracket."""
    if R == 1:
        turned = (q[0], q[2], q[1], q[3])
    else:
        turned = (q[0], q[3], q[6], q[1], q[4], q[7], q[2], q[5], q[8])
    x, y, dq = _column(turned, R), _column(q, R), ()
    for j in tl.static_range(1 + R):
        if j > 0:
            left = _mul(g, _conj(x[j - 1]))
        else:
            left = g
        dq += (left,)
        for k in tl.static_range(R):
            dq += (_mul(left, _conj(y[k])),)
    return dq


@_program
def _to_features(dq, F, Q, b, rows, columns, R: tl.constexpr):
    """Return gradients of u, s (numbers) and F, Q (blocks)."""
    zero = 0 * Q[0]
    dF, dQ, du, ds = (zero, zero), (zero, zero), (), ()
    for j in tl.static_range(1 + R):
        for k in tl.static_range(1 + R):
            u, t = _mul(rows[j], columns[k])
            s, d = t * b, dq[j * (1 + R) + k]
            du += (tl.sum(d[0] * F[0] + d[1] * F[1], 0),)
            ds += (-tl.sum(d[0] * Q[0] + d[1] * Q[1], 0),)
            dF = dF[0] + u * d[0], dF[1] + u * d[1]
            dQ = dQ[0] - s * d[0], dQ[1] - s * d[1]
    return du, ds, dF, dQ


@_program
def _to_mode(F, Q, dF, dQ, b):
    """Return the gradients of a and b, with s held fixed."""
    dF, dQ = _conj(dF), _conj(dQ)
    J = _add(_mul(dF, F), _mul(dQ, Q))
    FJ, QJ, dFQ = _mul(F, J), _mul(Q, J), _mul(dF, Q)
    return tl.sum(2 * FJ[0] - dFQ[0], 0), -2 * b * tl.sum(QJ[0], 0)


@_program
def _to_weights(du, ds, b, rows, columns, R: tl.constexpr):
    """Return the gradient of v, what b gains, and sum(u du + s ds)."""
    dv, db, linear = (), 0 * b, 0 * b
    for j in tl.static_range(1 + R):
        for k in tl.static_range(1 + R):
            u, t = _mul(rows[j], columns[k])
            x, y = du[j * (1 + R) + k], ds[j * (1 + R) + k]
            dv += ((x, b * y),)
            db += t * y
            linear += u * x + t * b * y
    return dv, db, linear


@_program
def _dot(entries, dv, first: tl.constexpr, step: tl.constexpr, R: tl.constexpr):
    """Return the sum of conj(entries[k]) * dv[first + k * step]."""
    total = _mul(_conj(entries[0]), dv[first])
    for k in tl.static_range(R):
        term = _mul(_conj(entries[1 + k]), dv[first + (1 + k) * step])
        total = _add(total, term)
    return total


@_program
def _store(pointer, i, x):
    """Store complex number i."""
    tl.store(pointer + 2 * i, x[0])
    tl.store(pointer + 2 * i + 1, x[1])


@_program
def _store_mode(out, da, db, dv, linear, rows, columns, dt, R: tl.constexpr):
    """Store the gradient of a row, in the order of the row."""
    _store(out, 0, (dt * da, dt * db))
    _store(out, 1, _dot(rows, dv, 0, 1 + R, R))  # B
    _store(out, 2, _dot(columns, dv, 0, 1, R))  # C
    for j in tl.static_range(R):
        column = _dot(rows, dv, 1 + j, 1 + R, R)
        row = _dot(columns, dv, (1 + j) * (1 + R), 1, R)
        _store(out, 3 + j, _add(column, _conj(row)))
    tl.store(out + 6 + 2 * R, linear / dt)


@_program
def _mode_gradient(dq, z, row, out, R: tl.constexpr):
    """Store a block's share of the gradient of one row."""
    a, b, rows, columns = _load_mode(row, R)
    F, Q = _features_at(z, a, b)
    du, ds, dF, dQ = _to_features(dq, F, Q, b, rows, columns, R)
    da, db = _to_mode(F, Q, dF, dQ, b)
    dv, more, linear = _to_weights(du, ds, b, rows, columns, R)
    db += more
    linear += a * da + b * db
    dt = tl.load(row + 6 + 2 * R)
    _store_mode(out, da, db, dv, linear, rows, columns, dt, R)


@_program
def _backward(rows, Z, G, shares, h, n, M, R: tl.constexpr, BLOCK: tl.constexpr):
    """Store one block's share of the gradient of a channel's rows."""
    channel, block, k = _place(M, BLOCK)
    z = _load_block(Z, k, M, 1.0)
    g = _load_block(G + 2 * channel * M, k, M, 0.0)
    row = rows + channel * n * (7 + 2 * R)
    out = shares + (block * h + channel) * n * (7 + 2 * R)
    scale = 2 * tl.load(row + 6 + 2 * R)
    g = _mul(g, (scale * (1 + z[0] / 2), -scale * z[1] / 2))
    dq = _adjoints(_sums(row, n, z, R), g, R)
    for _ in range(n):
        _mode_gradient(dq, z, row, out, R)
        row += 7 + 2 * R
        out += 7 + 2 * R


@torch.library.custom_op("s4mini::fused_spectrum", mutates_args=())
def _spectrum(rows: Tensor, L: int) -> Tensor:
    """Return K_hat (h, M) complex of the rows (h, n, 7 + 2 r) of modes."""
    K_hat = rows.new_empty(len(rows), L // 2 + 1, 2)
    _launch("_forward", rows.contiguous(), L, K_hat)
    return torch.view_as_complex(K_hat)


@_spectrum.register_fake
def _spectrum_shape(rows: Tensor, L: int) -> Tensor:
    return rows.new_empty(len(rows), L // 2 + 1, dtype=rows.dtype.to_complex())


@torch.library.custom_op("s4mini::fused_gradient", mutates_args=())
def _gradient(G: Tensor, rows: Tensor, L: int) -> Tensor:
    """Return the gradient of the rows, by that of K_hat, G (h, M)."""
    G = torch.view_as_real(G.resolve_conj().contiguous())
    R = (rows.shape[-1] - 7) // 2
    blocks = -(-(L // 2 + 1) // _BLOCK[R])
    shares = rows.new_empty(blocks, *rows.shape)
    _launch("_backward", rows.contiguous(), L, G, shares)
    return shares.sum(0)


@_gradient.register_fake
def _gradient_shape(G: Tensor, rows: Tensor, L: int) -> Tensor:
    return torch.empty_like(rows)


def _keep(ctx, inputs, output) -> None:
    """Keep the rows for the backward pass; nothing else."""
    rows, ctx.L = inputs
    ctx.save_for_backward(rows)


def _pull_back(ctx, G: Tensor) -> tuple[Tensor, None]:
    """Return the gradients of rows and L."""
    return _gradient(G, *ctx.saved_tensors, ctx.L), None


_spectrum.register_autograd(_pull_back, setup_context=_keep)


def _no_second(ctx, *gradients: Tensor) -> None:
    """Refuse a second derivative."""
    raise NotImplementedError(
        "fused_spectrum: has no second derivative; dplr_kernel with another backend has"
    )


_gradient.register_autograd(_no_second)


def fused_spectrum(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C_tilde: Tensor,
    dt: Tensor,
    L: int,
) -> Tensor:
    """Return the spectrum of h kernels, by one program of Triton.

    The kernel is K_l = e^(l/L) irfft(K_hat)_l, if C_tilde is
    C (I - A_bar^L / e).

    Args:
        Lambda: (h, n) eigenvalues, one of each conjugate pair, in 1/time,
            real part <= 0.
        P: (h, n, r) low-rank factor, r = 1 or 2, in time^-1/2.
        B: (h, n) input vectors, in state/(input * time).
        C_tilde: (h, n) truncated output vectors, in output/state.
        dt: (h,) real, steps of the bilinear rule, in time, > 0.
        L: length of the kernel, >= 1.

    Returns:
        K_hat (h, L // 2 + 1) complex, in output/input, differentiable once
        in all tensors: the generating function at e^(-1/L - 2 pi i k/L).

    Raises:
        RuntimeError: Triton is not installed, or cannot run where the
            tensors are.
        TypeError: an argument is not a tensor of numbers, or L no integer.
        ValueError: shapes or devices do not agree, an entry is not finite,
            or the rank, a real part of Lambda, dt or L is out of range.

    Source: Gu et al. 2022a, algorithm 1; book/fused.md.
    """
    L, tensors = check_int("L", L), (Lambda, P, B, C_tilde, dt)
    _check_system(*tensors)
    _check_device(*tensors)
    kind = torch.complex64
    for t in tensors:
        kind = torch.promote_types(kind, t.dtype)
    complexes = (t.to(kind) for t in tensors[:4])
    return _fused_spectrum(*complexes, dt.to(kind.to_real()), L)


def _fused_spectrum(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C_tilde: Tensor,
    dt: Tensor,
    L: int,
) -> Tensor:
    """Do the work of fused_spectrum; nothing is examined."""
    return _spectrum(_mode_rows(Lambda, P, B, C_tilde, dt), L)


def _check_system(
    Lambda: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, dt: Tensor
) -> None:
    """Refuse shapes and values that fused_spectrum cannot use."""
    sizes = check_tensors(
        Lambda=(Lambda, "h n"),
        P=(P, "h n r"),
        B=(B, "h n"),
        C_tilde=(C_tilde, "h n"),
        dt=(dt, "real h"),
    )
    check_positive("dt", dt)
    if sizes["r"] not in _BLOCK:
        raise ValueError(f"P: expected rank 1 or 2, got {sizes['r']}")
    if (Lambda.real > 0).any():
        raise ValueError(
            "Lambda: expected real parts <= 0, got "
            f"{Lambda.real.max().item():.3g}: the system is unstable"
        )


def _check_device(*tensors: Tensor) -> None:
    """Refuse tensors where Triton cannot run."""
    reason = triton_available()
    devices = {str(t.device) for t in tensors}
    if not reason and devices == {"cpu"} and not _interpreted():
        reason = "the tensors are on the CPU"
    if reason:
        raise RuntimeError(
            f"fused_spectrum: {reason}; "
            'dplr_kernel with backend="cauchy" runs everywhere'
        )
    if len(devices) > 1:
        listed = ", ".join(sorted(devices))
        raise ValueError(f"Lambda, P, B, C_tilde, dt: on {listed}")


def _assembly(program: str, R: int, capability: int = 90) -> str:
    """Return the machine code of a program, for a GPU of NVIDIA.

    The GPU need not be there; Triton must not be interpreting.
    """
    _compile()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = globals()[program]
    kinds = {"h": "i32", "n": "i32", "M": "i32"}
    kinds |= {"R": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(
        function,
        {name: kinds.get(name, "*fp32") for name in function.arg_names},
        {"R": R, "BLOCK": _BLOCK[R]},
    )
    options = {"num_warps": 1, "enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, 32)
    return compile(source, target=target, options=options).asm["sass"]
