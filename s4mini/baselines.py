"""What we compare with.

A claim of speed is a ratio, and a ratio is worth what its denominator is worth. Here
are the rivals: the LSSL, four kinds of attention, and the S4 kernel as it was first
published, each with a proof that it computes what it should.

Tangled from book/baselines.md.
"""

import functools
import math
from collections.abc import Callable
from inspect import unwrap

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from s4mini.checks import (
    check_choice,
    check_generator,
    check_int,
    check_step,
    check_tensors,
    checked,
)
from s4mini.convolve import causal_conv
from s4mini.discretization import discretize
from s4mini.lowrank import half_spectrum, nplr
from s4mini.memory import init_dt
from s4mini.projection import hippo

__all__ = [
    "lssl_kernel",
    "LSSLLayer",
    "attention",
    "fused_attention",
    "linear_attention",
    "orthogonal_features",
    "performer_attention",
    "ATTENTIONS",
    "TransformerLayer",
    "Stack",
    "Residual",
    "unit_circle_kernel",
    "PublishedKernel",
    "PlainBlock",
]


@checked(A_bar="... N N", B_bar="... N", C="... N", L="int >= 1")
def lssl_kernel(A_bar: Tensor, B_bar: Tensor, C: Tensor, L: int) -> Tensor:
    """Return the kernels of dense sampled systems, by doubling.

    Args:
        A_bar: (..., N, N) sampled state matrices, dimensionless.
        B_bar: (..., N) sampled input vectors, in state/input.
        C: (..., N) output vectors, in output/state.
        L: length of the kernel, >= 1.

    Returns:
        K (..., L), K_l = C A_bar^l B_bar, in output/input.

    Raises:
        TypeError: an argument is not a tensor of numbers, or L no integer.
        ValueError: shapes do not agree, an entry is not finite, or L < 1.

    Source: Gu et al. 2021, section 4; book/baselines.md.
    """
    power, X = A_bar, B_bar[..., None]  # (..., N, m), with power = A_bar^m
    while (m := X.shape[-1]) < L:
        X = torch.cat((X, power @ X[..., : L - m]), -1)
        if 2 * m < L:
            power = power @ power
    return (C[..., None, :] @ X)[..., 0, :]  # (..., L)


class LSSLLayer(nn.Module):
    """Run one dense state space system on each channel.

    Args:
        d_model: the number H of channels.
        d_state: the state size N of each.
        measure: the HiPPO matrix to begin with.
        dt_min: the smallest step at initialisation, > 0.
        dt_max: the largest step at initialisation.
        generator: the source of the random dt, C and D.

    Attributes:
        A: (N, N) state matrix of all channels, 1/time.
        B: (N,) input vector of all channels, state/(input * time).
        log_dt: (H,) logarithm of the step.
        C: (H, N) output vectors, scaled by N^-1/2.
        D: (H,) direct path.

    Raises:
        TypeError: a size is not an integer, or a step not a number.
        ValueError: a size or step is out of range, or the measure unknown.

    Source: Gu et al. 2021, section 4; book/baselines.md.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        measure: str = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        H, N = check_int("d_model", d_model), check_int("d_state", d_state)
        dtype = torch.get_default_dtype()
        A, B = hippo(measure, N)
        dt = init_dt(H, dt_min, dt_max, generator)
        C = torch.randn(H, N, generator=generator) / math.sqrt(N)
        self.A = nn.Parameter(A.to(dtype))
        self.B = nn.Parameter(B.to(dtype))
        self.log_dt = nn.Parameter(dt.log().to(dtype))
        self.C = nn.Parameter(C)
        self.D = nn.Parameter(torch.randn(H, generator=generator))

    def forward(self, u: Tensor) -> Tensor:
        """Map u (B, L, H) to y (B, L, H)."""
        check_tensors(u=(u, f"real B L {len(self.D)}"))
        A_bar, B_bar = discretize(self.A, self.B, self.log_dt.exp())
        K = unwrap(lssl_kernel)(A_bar, B_bar, self.C, u.shape[1])  # (H, L)
        return (causal_conv(u.mT, K) + self.D[:, None] * u.mT).mT


_HEADS = {"q": "real ... L d", "k": "real ... L d", "v": "real ... L e"}


def _check_axes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values with different batch axes."""
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise ValueError(
            "v: expected q, k and v with the same batch axes, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


@checked(**_HEADS)
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally with the softmax, storing all L x L weights.

    Args:
        q: (..., L, d) queries.
        k: (..., L, d) keys.
        v: (..., L, e) values.

    Returns:
        (..., L, e) averages of the values up to each step.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not agree, or an entry is not finite.

    Source: Vaswani et al. 2017, eq. 1; book/baselines.md.
    """
    _check_axes(q, k, v)
    L = q.shape[-2]
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    score = (q / math.sqrt(q.shape[-1])) @ k.mT  # (..., L, L)
    return score.masked_fill(future, -math.inf).softmax(-1) @ v


@checked(**_HEADS)
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally with the softmax, by PyTorch's fused program.

    Args:
        q: (..., L, d) queries.
        k: (..., L, d) keys.
        v: (..., L, e) values.

    Returns:
        (..., L, e), as from attention.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not agree, or an entry is not finite.

    Source: Dao et al. 2022; book/baselines.md.
    """
    _check_axes(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """Cut (..., L, d) into (..., L/c, c, d), with zeros at the end."""
    x = F.pad(x, (0, 0, 0, -x.shape[-2] % chunk))
    return x.unflatten(-2, (-1, chunk))


def _causal_average(f: Tensor, g: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Average v (..., L, e) with the weights f_i . g_j of j <= i."""
    L = v.shape[-2]
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1)  # (..., L, e + 1)
    f, g, v = (_chunked(x, min(chunk, L)) for x in (f, g, v))
    inside = (f @ g.mT).tril() @ v
    S = (g.mT @ v).cumsum(-3)  # (..., L/c, m, e + 1), after each chunk
    before = F.pad(S[..., :-1, :, :], (0, 0, 0, 0, 1, 0))
    y = (inside + f @ before).flatten(-3, -2)[..., :L, :]
    return y[..., :-1] / y[..., -1:]


@checked(**_HEADS, chunk="int >= 1")
def linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 128) -> Tensor:
    """Attend causally with the weights phi(q).phi(k), phi = elu + 1.

    Args:
        q: (..., L, d) queries.
        k: (..., L, d) keys.
        v: (..., L, e) values.
        chunk: steps treated at once; changes cost, not the result.

    Returns:
        (..., L, e) averages of the values up to each step.

    Raises:
        TypeError: an argument is not a floating tensor, or chunk no integer.
        ValueError: shapes do not agree, an entry is not finite, or
            chunk < 1.

    Source: Katharopoulos et al. 2020, eq. 7 and 9; book/baselines.md.
    """
    _check_axes(q, k, v)
    return _causal_average(F.elu(q) + 1, F.elu(k) + 1, v, chunk)


def orthogonal_features(m: int, d: int, generator: Generator | None = None) -> Tensor:
    """Draw m random directions, orthogonal within each block of d.

    Args:
        m: how many, >= 1.
        d: entries of each, >= 1.
        generator: the source of randomness; the global one if not given.

    Returns:
        W (m, d) of the default dtype; each row is normal of variance 1.

    Raises:
        TypeError: m or d is not an integer.
        ValueError: m or d is below 1.

    Source: Choromanski et al. 2021, section 2.4; book/baselines.md.
    """
    m, d = check_int("m", m), check_int("d", d)
    check_generator("generator", generator)
    blocks = torch.randn(-(-m // d), d, d, generator=generator)
    Q, R = torch.linalg.qr(blocks)
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sgn()[..., None, :]  # uniform
    lengths = torch.randn(m, d, generator=generator).norm(dim=-1)
    return lengths[:, None] * Q.mT.flatten(0, 1)[:m]


@checked(**_HEADS, W="real m d", chunk="int >= 1")
def performer_attention(
    q: Tensor, k: Tensor, v: Tensor, W: Tensor, chunk: int = 128
) -> Tensor:
    """Estimate causal softmax attention with positive random features.

    Args:
        q: (..., L, d) queries.
        k: (..., L, d) keys.
        v: (..., L, e) values.
        W: (m, d) random directions, from orthogonal_features.
        chunk: steps treated at once; changes cost, not the result.

    Returns:
        (..., L, e); the error shrinks like m^-1/2.

    Raises:
        TypeError: an argument is not a floating tensor, or chunk no integer.
        ValueError: shapes do not agree, an entry is not finite, or
            chunk < 1.

    Source: Choromanski et al. 2021, section 2; book/baselines.md.
    """
    _check_axes(q, k, v)
    q, k = (x * q.shape[-1] ** -0.25 for x in (q, k))
    f = q @ W.mT  # (..., L, m); |q|^2 / 2 cancels
    f = (f - f.amax(-1, keepdim=True).detach()).exp()
    g = (k @ W.mT - k.square().sum(-1, keepdim=True) / 2).exp()
    return _causal_average(f, g, v, chunk)


#: The kinds of attention that a TransformerLayer can have.
ATTENTIONS = ("softmax", "fused", "linear", "performer")


def _dense(d_in: int, d_out: int, generator: Generator | None) -> nn.Linear:
    """Make a linear map with weights of variance 1/d_in and no bias yet."""
    layer = nn.Linear(d_in, d_out)
    nn.init.normal_(layer.weight, std=d_in**-0.5, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


class TransformerLayer(nn.Module):
    """Mix steps by causal attention, then features by a small network.

    Args:
        d_model: the number H of features.
        heads: how many attentions share them; divides d_model.
        attention: "softmax", "fused", "linear" or "performer".
        features: random features of the Performer; 2 d_model/heads if None.
        generator: the source of the random initial values.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is below 1, heads does not divide d_model, or the
            kind of attention is unknown.

    Source: Vaswani et al. 2017, section 3; book/baselines.md.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        attention: str = "softmax",
        features: int | None = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        H, heads = check_int("d_model", d_model), check_int("heads", heads)
        check_choice("attention", attention, ATTENTIONS)
        check_generator("generator", generator)
        if H % heads:
            raise ValueError(f"heads: expected a divisor of d_model = {H}, got {heads}")
        self.heads, self.kind, d = heads, attention, H // heads
        m = check_int("features", 2 * d if features is None else features)
        self.norms = nn.ModuleList([nn.LayerNorm(H), nn.LayerNorm(H)])
        self.qkv = _dense(H, 3 * H, generator)
        self.out = _dense(H, H, generator)
        self.wide = _dense(H, 4 * H, generator)
        self.narrow = _dense(4 * H, H, generator)
        if attention == "performer":
            self.W: Tensor
            self.register_buffer("W", orthogonal_features(m, d, generator))

    def forward(self, u: Tensor) -> Tensor:
        """Map u (B, L, H) to the same shape."""
        check_tensors(u=(u, f"real B L {self.out.in_features}"))
        u = u + self._attend(self.norms[0](u))
        return u + self.narrow(F.gelu(self.wide(self.norms[1](u))))

    def _attend(self, u: Tensor) -> Tensor:
        """Attend with all heads: (B, L, H) to (B, L, H)."""
        qkv = self.qkv(u).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, d)
        y = self._attention()(q, k, v)
        return self.out(y.transpose(1, 2).flatten(-2))

    def _attention(self) -> Callable:
        """Return the function of q, k and v, without its checks."""
        if self.kind == "performer":
            return functools.partial(unwrap(performer_attention), W=self.W)
        return unwrap(
            {
                "softmax": attention,
                "fused": fused_attention,
                "linear": linear_attention,
            }[self.kind]
        )


class Stack(nn.Sequential):
    """Run layers one after the other; states that they return are dropped.

    Source: book/baselines.md.
    """

    def forward(self, u: Tensor) -> Tensor:
        """Map u as the first layer takes it to what the last one returns."""
        for layer in self:
            y = layer(u)
            u = y[0] if isinstance(y, tuple) else y
        return u


class Residual(Stack):
    """Add what comes in to what a stack of layers makes of it.

    Source: book/baselines.md.
    """

    def forward(self, u: Tensor) -> Tensor:
        """Map u (B, L, H) to the same shape."""
        return u + super().forward(u)


def _unit_circle(L: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return z = 2 (1 - w)/(1 + w) and 2/(1 + w) at w = exp(-2 pi i k/L)."""
    k = torch.arange(L // 2 + 1, dtype=torch.float64, device=like.device)
    angle = (-2 * math.pi / L * k).to(like.real.dtype)
    w = torch.polar(torch.ones_like(angle), angle)
    return 2 * (1 - w) / (1 + w), 2 / (1 + w)


def _direct_sums(v: Tensor, modes: Tensor, z: Tensor) -> Tensor:
    """Sum v / (z - mode) over modes and conjugates, all quotients stored."""
    v = torch.cat((v, v.conj()), -1)  # (..., a, b, 2n)
    modes = torch.cat((modes, modes.conj()), -1)[..., None, None, :, None]
    return (v[..., None] / (z - modes)).sum(-2)  # (..., a, b, M)


def _keops_sums(v: Tensor, modes: Tensor, z: Tensor) -> Tensor:
    """Sum the same fractions with KeOps, which stores no table."""
    from pykeops.torch import LazyTensor

    batch, n = v.shape[:-1], v.shape[-1]
    modes = modes[..., None, None, :].expand_as(v).reshape(-1, 1, n, 1)
    v = v.reshape(modes.shape)
    z = LazyTensor(z.expand(len(v), -1)[..., None, None].contiguous())
    upper = LazyTensor(v) / (z - LazyTensor(modes))
    lower = LazyTensor(v.conj_physical()) / (z - LazyTensor(modes.conj_physical()))
    return (upper + lower).sum(2).reshape(*batch, -1)  # (..., a, b, M)


def unit_circle_kernel(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C_tilde: Tensor,
    dt: float | Tensor,
    L: int,
    keops: bool = False,
) -> Tensor:
    """Return the S4 kernel in the complex form in which it was published.

    Args:
        Lambda: (..., n) complex eigenvalues, one of each conjugate pair.
        P: (..., n, r) complex low-rank factor.
        B: (..., n) complex input vector.
        C_tilde: (..., n) complex, C (I - A_bar^L).
        dt: step of the bilinear rule, a number or (...), in time, > 0.
        L: length of the kernel, >= 1.
        keops: whether KeOps adds up the fractions; all are stored if not.

    Returns:
        K (..., L) real. The batch axes of all arguments must be the same.

    Raises:
        TypeError: an argument is not a tensor of numbers, or L no integer.
        ValueError: shapes do not agree, an entry is not finite, or L or dt
            is out of range.
        ModuleNotFoundError: keops is True and pykeops is not installed.

    Source: Gu et al. 2022a, algorithm 1; book/baselines.md.
    """
    L = check_int("L", L)
    check_step("dt", dt)
    check_choice("keops", keops, (False, True))
    check_tensors(Lambda=(Lambda, "... n"), P=(P, "... n r"))
    check_tensors(Lambda=(Lambda, "... n"), B=(B, "... n"))
    check_tensors(Lambda=(Lambda, "... n"), C_tilde=(C_tilde, "... n"))
    sums = _keops_sums if keops else _direct_sums
    dt = torch.as_tensor(dt, dtype=Lambda.real.dtype, device=Lambda.device)
    return _unit_circle_kernel(Lambda, P, B, C_tilde, dt, L, sums)


def _unit_circle_kernel(
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C_tilde: Tensor,
    dt: Tensor,
    L: int,
    sums: Callable,
) -> Tensor:
    """Do the work of unit_circle_kernel; nothing is examined."""
    z, factor = _unit_circle(L, Lambda)
    rows = torch.cat((C_tilde[..., None, :], P.mH), -2)  # (..., 1 + r, n)
    columns = torch.cat((B[..., None, :], P.mT), -2)
    v = rows[..., :, None, :] * columns[..., None, :, :]
    k = sums(dt[..., None, None, None] * v, dt[..., None] * Lambda, z)
    while k.shape[-2] > 1:  # Woodbury, a column of P at a time
        fix = k[..., :-1, -1:, :] * k[..., -1:, :-1, :]
        k = k[..., :-1, :-1, :] - fix / (1 + k[..., -1:, -1:, :])
    return torch.fft.irfft(factor * k[..., 0, 0, :], n=L)


class PublishedKernel(nn.Module):
    """Hold the published kernel's parameters, for LegS in each channel.

    Args:
        d_model: the number H of channels.
        d_state: the state size N of each, even.
        keops: whether KeOps adds up the fractions; all are stored if not.
        generator: the source of the random dt and C.

    Attributes:
        Lambda, P, B, C: (H, N/2, ..., 2), real and imaginary parts; C is
            C (I - A_bar^L), which is what the official code learns.
        log_dt: (H,) logarithm of the step.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is out of range.

    Source: Gu et al. 2022a, algorithm 1; official S4 code; book/baselines.md.
    """

    Lambda: Tensor
    P: Tensor
    B: Tensor

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        keops: bool = False,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        H = check_int("d_model", d_model)
        N = check_int("d_state", d_state, minimum=2, even=True)
        dt = init_dt(H, 1e-3, 1e-1, generator)
        C = torch.randn(N // 2, 2, H, generator=generator).permute(2, 0, 1)
        self.keops = keops
        self.log_dt = nn.Parameter(dt.log().float())
        self.C = nn.Parameter(C.contiguous())
        Lambda, P, B, _ = half_spectrum(nplr("legs", N))
        for name, t in (("Lambda", Lambda), ("P", P), ("B", B)):
            t = torch.view_as_real(t.to(torch.complex64).resolve_conj())
            self.register_parameter(name, nn.Parameter(t.repeat(H, *[1] * t.ndim)))

    def forward(self, L: int) -> Tensor:
        """Return the kernels (H, L)."""
        parts = (self.Lambda, self.P, self.B, self.C)
        Lambda, P, B, C = (torch.view_as_complex(t) for t in parts)
        return unit_circle_kernel(Lambda, P, B, C, self.log_dt.exp(), L, self.keops)


class PlainBlock(nn.Module):
    """Convolve, mix and normalise, written as plainly as possible.

    Args:
        d_model: the number H of channels.
        kernel: a module that maps L to K (H, L), or a tensor (H, L), which
            becomes a parameter.
        generator: the source of the random initial values.

    Raises:
        TypeError: d_model is not an integer.
        ValueError: d_model < 1.

    Source: official S4 code; book/baselines.md.
    """

    def __init__(
        self,
        d_model: int,
        kernel: nn.Module | Tensor,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        H = check_int("d_model", d_model)
        check_generator("generator", generator)
        kernel = nn.Parameter(kernel) if isinstance(kernel, Tensor) else kernel
        self.kernel: nn.Module | Tensor = kernel
        self.D = nn.Parameter(torch.randn(H, generator=generator))
        self.mix = _dense(H, 2 * H, generator)
        self.norm = nn.LayerNorm(H)

    def forward(self, u: Tensor) -> Tensor:
        """Map u (B, L, H) to the same shape."""
        v, L = u.mT, u.shape[1]  # (B, H, L)
        kernel = self.kernel
        K = kernel[:, :L] if isinstance(kernel, Tensor) else kernel(L)
        y = torch.fft.rfft(v, n=2 * L) * torch.fft.rfft(K, n=2 * L)
        y = torch.fft.irfft(y, n=2 * L)[..., :L] + self.D[:, None] * v
        return self.norm(u + F.glu(self.mix(F.gelu(y).mT), dim=-1))
