"""The layer.

The structured system becomes a network layer: one system for each channel, and the same
output whether it is computed in parallel, step by step, or in chunks.

Tangled from book/layer.md.
"""

import functools

import torch
from torch import Generator, Tensor, nn

from s4mini.checks import check_choice, check_int, check_positive, check_tensors
from s4mini.convolve import causal_conv
from s4mini.diagonal import (
    _sampled,
    s4d_final_state,
    s4d_init,
    s4d_kernel,
    s4d_response,
    s4d_step,
)
from s4mini.kernel import _BACKENDS, dplr_kernel
from s4mini.lowrank import half_spectrum, nplr
from s4mini.memory import init_dt
from s4mini.projection import MEASURES
from s4mini.recurrence import (
    Increments,
    _advance,
    check_lengths,
    dplr_increments,
    dplr_step,
    final_state,
    state_response,
)

__all__ = ["two_sided_conv", "mask_padding", "Stepper", "S4Layer"]

_DIAGONAL = ("diag-legs", "diag-lin", "diag-inv", "diag-real")
_MEASURES = (*MEASURES, "random", *_DIAGONAL)


def _random_modes(N, generator):
    """Draw S - I/2 - P P^T and B; return Lambda, P, B of half its modes."""
    numbers = torch.randn(N, N + 2, dtype=torch.float64, generator=generator)
    S, (P, B) = numbers[:, :N], numbers[:, N:].T
    omega, V = torch.linalg.eigh(-0.5j * (S - S.T))
    omega, V = omega[N // 2 :], V[:, N // 2 :]
    V = V * torch.sgn(V.mH @ B.to(V))  # phase: V* B > 0
    Lambda = torch.complex(torch.full_like(omega, -0.5), omega)
    return Lambda, V.mH @ P.to(V)[:, None], V.mH @ B.to(V)


def _first_modes(measure, N, generator):
    """Return Lambda (n,), P (n, r) or None, B (n,) to begin with."""
    if measure == "random":
        return _random_modes(N, generator)
    if measure in _DIAGONAL:
        Lambda, B = s4d_init(measure.removeprefix("diag-"), N)
        return Lambda, None, B
    return half_spectrum(nplr(measure, N))[:3]


_SLOWEST = 1e-5  # the smallest -Re Lambda to begin with, in 1/time


def _parameter(value: Tensor) -> nn.Parameter:
    """Make a parameter of the default dtype; complex numbers become pairs."""
    real = torch.view_as_real(value) if value.is_complex() else value
    return nn.Parameter(real.to(torch.get_default_dtype()).clone())


def _as_it_is(method):
    """Keep autocast and torch.compile out of a method of a layer."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(wrapped)(self, *args, **kwargs)
        with torch.autocast(self.D.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapped


class _Systems(nn.Module):
    """Hold the parameters of H systems, one for each channel."""

    def __init__(self, H, N, measure, dts, generator, both, tied) -> None:
        super().__init__()
        self.d_model, self.d_state, self.measure = H, N, measure
        self.bidirectional, self.tied = both, tied
        self.method, self.backend = "bilinear", "auto"
        shape, rows = ((2,) if both else ()) + (H, N // 2), 1 if tied else H
        dt = init_dt(H, *dts, generator)
        C = torch.randn(shape, dtype=torch.complex128, generator=generator)
        D = torch.randn(H, dtype=torch.float64, generator=generator)
        Lambda, P, B = _first_modes(measure, N, generator)
        decay = (-Lambda.real).clamp(min=_SLOWEST)
        self.log_dt = _parameter(dt.log())  # (H,)
        self.log_decay = _parameter(decay.log().expand(rows, -1))
        self.frequency = _parameter(Lambda.imag.expand(rows, -1))
        P = None if P is None else _parameter(P.expand(rows, -1, -1))
        self.register_parameter("P", P)  # (H or 1, N/2, r, 2)
        self.B = _parameter(B.expand(rows, -1))  # (H or 1, N/2, 2)
        self.C = _parameter(C)  # (H, N/2, 2) or (2, H, N/2, 2)
        self.D = _parameter(D)  # (H,)

    def extra_repr(self) -> str:
        """Describe the layer in print."""
        shown = [f"{self.d_model}, d_state={self.d_state}"]
        shown += [f"measure={self.measure!r}"]
        shown += [f"{k}=True" for k in ("bidirectional", "tied") if getattr(self, k)]
        return ", ".join(shown)

    def system(self, rate: float = 1.0) -> tuple[Tensor | None, ...]:
        """Return Lambda, P, B, C, complex, and dt * rate, per channel.

        P is None in a diagonal layer.
        """
        if isinstance(rate, Tensor):
            raise TypeError("rate: expected a number > 0, got a Tensor")
        check_positive("rate", rate)
        Lambda = torch.complex(-self.log_decay.exp(), self.frequency)
        P = None if self.P is None else torch.view_as_complex(self.P)
        B, C = map(torch.view_as_complex, (self.B, self.C))
        Lambda, P, B = (
            v if v is None else v.expand(self.d_model, *v.shape[1:])
            for v in (Lambda, P, B)
        )
        return Lambda, P, B, C, self.log_dt.exp() * rate

    @_as_it_is
    def kernel(self, L: int, rate: float = 1.0) -> Tensor:
        """Return the kernels (H, L), or (2, H, L) of past and future.

        They are the response to an impulse without the direct path D.
        """
        Lambda, P, B, C, dt = self.system(rate)
        if P is None:
            return s4d_kernel(Lambda, B, C, dt, L, self.method)
        return dplr_kernel(Lambda, P, B, C, dt, L, self.backend)


def two_sided_conv(u: Tensor, K: Tensor) -> Tensor:
    """Convolve with one kernel of the past and one of the future.

    Args:
        u: (..., L) the input, real.
        K: (2, ..., L) the kernels: K[0] weighs the present and the past,
            K[1] the future, beginning with the next sample.

    Returns:
        (..., L), y_k = sum_j K[0]_j u_{k-j} + sum_j K[1]_j u_{k+1+j}.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes do not agree, or an entry is not finite.

    Source: book/layer.md.
    """
    L = check_tensors(u=(u, "real ... L"), K=(K, "real ... L"))["L"]
    if K.ndim < 2 or len(K) != 2:
        raise ValueError(f"K: expected shape (2, ..., L), got {tuple(K.shape)}")
    circular = torch.cat((K[0], K[1].flip(-1)), -1)  # (..., 2 L)
    y_hat = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(circular)
    return torch.fft.irfft(y_hat, n=2 * L)[..., :L]


def mask_padding(u: Tensor, lengths: Tensor) -> Tensor:
    """Set the steps of each sequence that are padding to zero.

    Args:
        u: (B, L, H) sequences, padded at their ends; NaN may stand there.
        lengths: (B,) the steps of each that count, integers in 1 ... L.

    Returns:
        (B, L, H), zero where a step does not count.

    Raises:
        TypeError: u is not a tensor, or lengths not one of integers.
        ValueError: a shape is wrong, or a length is not in 1 ... L.

    Source: book/layer.md.
    """
    if not isinstance(u, Tensor):
        raise TypeError(f"u: expected a tensor, got {type(u).__name__}")
    if u.ndim != 3:
        raise ValueError(f"u: expected (B, L, H), got {tuple(u.shape)}")
    check_lengths(lengths, u.shape[1])
    if lengths.shape != u.shape[:1]:
        raise ValueError(
            f"lengths: expected shape ({len(u)},), got {tuple(lengths.shape)}"
        )
    steps = torch.arange(u.shape[1], device=u.device)
    valid = (steps < lengths[:, None])[..., None]  # (B, L, 1)
    return torch.where(valid, u, torch.zeros_like(u))


def _check_input(layer: _Systems, u: Tensor, axes: str) -> Tensor:
    """Examine u; return it in the layer's dtype."""
    check_tensors(u=(u, f"real {axes} {layer.d_model}"))
    dtype, low = layer.D.dtype, (torch.float16, torch.bfloat16)
    if u.dtype not in (dtype, *low):
        raise TypeError(f"u: expected {dtype} like the layer, got {u.dtype}")
    return u.to(dtype)


def _check_causal(layer: _Systems) -> None:
    """Refuse a layer that looks at the future."""
    if layer.bidirectional:
        raise ValueError(
            "bidirectional: expected False where a state is carried or a "
            "step taken, because the future is not known, got True"
        )


def _check_state(layer: _Systems, state: Tensor, batch: int) -> None:
    """Examine a carried state."""
    _check_causal(layer)
    if state is None:
        raise TypeError(
            "state: expected a tensor, such as layer.initial_state(batch), got None"
        )
    sizes = f"{batch} {layer.d_model} {layer.d_state // 2}"
    check_tensors(state=(state, sizes))
    dtype = layer.D.dtype.to_complex()
    if state.dtype != dtype:
        raise TypeError(f"state: expected {dtype}, got {state.dtype}")


class Stepper(nn.Module):
    """One step of a layer as it was when this was made.

    Later changes of the layer's parameters have no effect on it. Made by
    S4Layer.stepper().

    Args:
        step: the sampled systems of H channels.
        C: (H, n) output vectors, complex.
        D: (H,) direct paths.

    Source: book/layer.md.
    """

    def __init__(self, step: Increments, C: Tensor, D: Tensor) -> None:
        super().__init__()
        for name, value in (*step._asdict().items(), ("C", C), ("D", D)):
            self.register_buffer(name, value)

    def forward(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            u: (B, H) the input.
            state: (B, H, n) complex, the state before it.

        Returns:
            y (B, H), and the state after the step.

        Raises:
            TypeError: u has not the dtype of the layer.
            ValueError: a shape is wrong.
        """
        H, n = self.C.shape
        if u.shape[1:] != (H,) or state.shape != (u.shape[0], H, n):
            raise ValueError(
                f"u, state: expected shapes (B, {H}) and (B, {H}, {n}), got "
                f"{tuple(u.shape)} and {tuple(state.shape)}"
            )
        if u.dtype != self.D.dtype:
            raise TypeError(f"u: expected {self.D.dtype}, got {u.dtype}")
        step = Increments(self.E, self.F, self.G, self.B_bar)
        state = _advance(step, u, state)
        return 2 * (self.C * state).sum(-1).real + self.D * u, state


class _Recurrent(_Systems):
    """The part of the layer that deals with states."""

    def initial_state(self, batch: int) -> Tensor:
        """Return the state of a fresh start: complex zeros (B, H, N/2)."""
        shape = check_int("batch", batch), self.d_model, self.d_state // 2
        state = self.D.new_zeros(shape, dtype=self.D.dtype.to_complex())
        _check_state(self, state, batch)
        return state

    @_as_it_is
    def step(
        self, u: Tensor, state: Tensor, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one step: u (B, H) and a state to y (B, H) and a state."""
        u = _check_input(self, u, "B")
        _check_state(self, state, len(u))
        Lambda, P, B, C, dt = self.system(rate)
        if P is None:
            y, state = s4d_step(Lambda, B, C, dt, u, state, self.method)
        else:
            y, state = dplr_step(Lambda, P, B, C, dt, u, state)
        return y + self.D * u, state

    @torch.no_grad()
    def stepper(self, rate: float = 1.0) -> Stepper:
        """Return the step as the layer is now, prepared for many samples."""
        _check_causal(self)
        Lambda, P, B, C, dt = self.system(rate)
        kind, wide = C.dtype, torch.complex128
        if P is None:
            _, E, B_bar = _sampled(Lambda, B, dt, self.method)
            made = E, None, None, B_bar
        else:
            wider = (v.to(wide) for v in (Lambda, P, B))
            made = dplr_increments(*wider, dt.double())
        made = (v if v is None else v.to(kind).contiguous() for v in made)
        return Stepper(Increments(*made), C.clone(), self.D.detach().clone())

    def _carry(self, u, state, lengths, rate):
        """Return the outputs due to a state, and the state afterwards."""
        Lambda, P, B, C, dt = self.system(rate)
        L = u.shape[-1]
        lengths = None if lengths is None else lengths[:, None]
        if P is None:
            free = s4d_response(Lambda, C, dt, state, L, self.method)
            return free, s4d_final_state(Lambda, B, dt, u, state, lengths, self.method)
        free = state_response(Lambda, P, C, dt, state, L, self.backend)
        return free, final_state(Lambda, P, B, dt, u, state, lengths)


class S4Layer(_Recurrent):
    """Run one structured state space system on each channel.

    Args:
        d_model: the number H of channels.
        d_state: the state size N of each, even, >= 2.
        measure: the system to begin with: "legs", "legt", "lagt", "fout" or
            "random" with a low-rank term; "diag-legs", "diag-lin",
            "diag-inv" or "diag-real" without one (S4D).
        dt_min: the smallest step at initialisation, > 0. A channel of step
            dt remembers for about 1/dt samples: choose 1/L or less.
        dt_max: the largest step at initialisation.
        bidirectional: whether a second kernel looks at the future.
        generator: the source of the random dt, C and D.
        method: how to sample: "bilinear", the default with a low-rank term
            and the only choice there, or "zoh", the default without.
        tied: whether all channels share Lambda, P and B.
        backend: how the sums of the kernel are done, as in dplr_kernel;
            "auto" in a diagonal layer.

    Attributes:
        log_dt: (H,) logarithm of the step.
        log_decay: (H, N/2); Re Lambda = -exp(log_decay), 1/time.
        frequency: (H, N/2) Im Lambda, 1/time.
        P: (H, N/2, r, 2) low-rank factor; last axis real, imaginary part.
            None in a diagonal layer.
        B: (H, N/2, 2) input vector, likewise. In a tied layer 1 stands for H
            in these four.
        C: (H, N/2, 2) output vector, or (2, H, N/2, 2) of past and future.
        D: (H,) direct path.

    Raises:
        TypeError: a size is not an integer, or a step not a number.
        ValueError: d_state is odd, a name is unknown or does not fit the
            measure, or the steps are not 0 < dt_min <= dt_max.

    Source: Gu et al. 2022a, section 3.4; Gu et al. 2022, S4D; book/layer.md.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        measure: str = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bidirectional: bool = False,
        generator: Generator | None = None,
        *,
        method: str | None = None,
        tied: bool = False,
        backend: str = "auto",
    ) -> None:
        H = check_int("d_model", d_model)
        N = check_int("d_state", d_state, minimum=2, even=True)
        check_choice("measure", measure, _MEASURES)
        check_choice("bidirectional", bidirectional, (False, True))
        check_choice("tied", tied, (False, True))
        diagonal = measure in _DIAGONAL
        methods = (None, "bilinear", "zoh") if diagonal else (None, "bilinear")
        check_choice("method", method, methods)
        backends = ("auto",) if diagonal else ("auto", *_BACKENDS)
        check_choice("backend", backend, backends)
        dts = dt_min, dt_max
        super().__init__(H, N, measure, dts, generator, bidirectional, tied)
        self.method = method or ("zoh" if diagonal else "bilinear")
        self.backend = backend

    @_as_it_is
    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Run a batch of sequences, in parallel over time.

        Args:
            u: (B, L, H) the input.
            state: (B, H, N/2) the state before it. Without one the start is
                zero, and no final state is computed.
            lengths: (B,) the steps of each sequence that count, integers in
                1 ... L; the outputs after them are zero.
            rate: how many steps of the training data one step here spans: 2
                for data of half the sampling frequency.

        Returns:
            y (B, L, H), and the state after the last step that counts, or
            None.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: a shape, a length or the rate is wrong, an entry is
                not finite, or a bidirectional layer is given a state.
        """
        if lengths is not None:
            u = mask_padding(u, lengths)
        u = _check_input(self, u, "B L").mT  # (B, H, L)
        if state is not None:
            _check_state(self, state, len(u))
        K = self.kernel(u.shape[-1], rate)
        conv = two_sided_conv if self.bidirectional else causal_conv
        y = (conv(u, K) + self.D[:, None] * u).mT  # (B, L, H)
        if state is not None:
            free, state = self._carry(u, state, lengths, rate)
            y = y + free.mT
        return y if lengths is None else mask_padding(y, lengths), state
