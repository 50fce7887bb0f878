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
from s4mini.kernel import dplr_kernel
from s4mini.memory import init_dt
from s4mini.nplr import half_spectrum, nplr
from s4mini.recurrence import check_lengths, dplr_step, final_state, state_response

__all__ = ["two_sided_conv", "mask_padding", "S4Layer"]


def _parameter(value: Tensor) -> nn.Parameter:
    """Make a parameter of the default dtype; complex numbers become pairs."""
    real = torch.view_as_real(value) if value.is_complex() else value
    return nn.Parameter(real.to(torch.get_default_dtype()).clone())


def _full_precision(method):
    """Switch autocast off inside a method of a layer."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with torch.autocast(self.D.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapped


class _Systems(nn.Module):
    """Hold the parameters of H systems, one for each channel."""

    def __init__(self, H, N, measure, dt_min, dt_max, bidirectional, generator) -> None:
        super().__init__()
        self.d_model, self.d_state = H, N
        self.bidirectional = bidirectional
        system = half_spectrum(nplr(measure, N))
        shape = (2, H, N // 2) if bidirectional else (H, N // 2)
        dt = init_dt(H, dt_min, dt_max, generator)
        C = torch.randn(shape, dtype=torch.complex128, generator=generator)
        D = torch.randn(H, dtype=torch.float64, generator=generator)
        decay = -system.Lambda.real
        self.log_dt = _parameter(dt.log())  # (H,)
        self.log_decay = _parameter(decay.log().expand(H, -1))  # (H, N/2)
        self.frequency = _parameter(system.Lambda.imag.expand(H, -1))
        self.P = _parameter(system.P.expand(H, -1, -1))  # (H, N/2, r, 2)
        self.B = _parameter(system.B.expand(H, -1))  # (H, N/2, 2)
        self.C = _parameter(C)  # (H, N/2, 2) or (2, H, N/2, 2)
        self.D = _parameter(D)  # (H,)

    def extra_repr(self) -> str:
        """Describe the sizes in print."""
        both = ", bidirectional=True" if self.bidirectional else ""
        return f"{self.d_model}, d_state={self.d_state}{both}"

    def system(self, rate: float = 1.0) -> tuple[Tensor, ...]:
        """Return Lambda, P, B, C, complex, and dt * rate, per channel."""
        if isinstance(rate, Tensor):
            raise TypeError("rate: expected a number > 0, got a Tensor")
        check_positive("rate", rate)
        Lambda = torch.complex(-self.log_decay.exp(), self.frequency)
        P, B, C = map(torch.view_as_complex, (self.P, self.B, self.C))
        return Lambda, P, B, C, self.log_dt.exp() * rate

    @_full_precision
    def kernel(self, L: int, rate: float = 1.0) -> Tensor:
        """Return the kernels (H, L), or (2, H, L) of past and future.

        They are the response to an impulse without the direct path D.
        """
        Lambda, P, B, C, dt = self.system(rate)
        return dplr_kernel(Lambda, P, B, C, dt, L)


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


def _check_state(layer: _Systems, state: Tensor, batch: int) -> None:
    """Examine a carried state."""
    if layer.bidirectional:
        raise ValueError(
            "bidirectional: expected False where a state is carried or a "
            "step taken, because the future is not known, got True"
        )
    if state is None:
        raise TypeError(
            "state: expected a tensor, such as layer.initial_state(batch), got None"
        )
    sizes = f"{batch} {layer.d_model} {layer.d_state // 2}"
    check_tensors(state=(state, sizes))
    dtype = layer.D.dtype.to_complex()
    if state.dtype != dtype:
        raise TypeError(f"state: expected {dtype}, got {state.dtype}")


class S4Layer(_Systems):
    """Run one structured state space system on each channel.

    Args:
        d_model: the number H of channels.
        d_state: the state size N of each, even, >= 2.
        measure: the HiPPO matrix to begin with, "legs".
        dt_min: the smallest step at initialisation, > 0. A channel of step
            dt remembers for about 1/dt samples: choose 1/L or less.
        dt_max: the largest step at initialisation.
        bidirectional: whether a second kernel looks at the future.
        generator: the source of the random dt, C and D.

    Attributes:
        log_dt: (H,) logarithm of the step.
        log_decay: (H, N/2); Re Lambda = -exp(log_decay), 1/time.
        frequency: (H, N/2) Im Lambda, 1/time.
        P: (H, N/2, r, 2) low-rank factor; last axis real, imaginary part.
        B: (H, N/2, 2) input vector, likewise.
        C: (H, N/2, 2) output vector, or (2, H, N/2, 2) of past and future.
        D: (H,) direct path.

    Raises:
        TypeError: a size is not an integer, or a step not a number.
        ValueError: d_state is odd, the measure is unknown, or the steps are
            not 0 < dt_min <= dt_max.

    Source: Gu et al. 2022a, section 3.4; book/layer.md.
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
    ) -> None:
        H = check_int("d_model", d_model)
        N = check_int("d_state", d_state, minimum=2, even=True)
        check_choice("bidirectional", bidirectional, (False, True))
        super().__init__(H, N, measure, dt_min, dt_max, bidirectional, generator)

    @_full_precision
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

    def _carry(self, u, state, lengths, rate):
        """Return the outputs due to a state, and the state afterwards."""
        Lambda, P, B, C, dt = self.system(rate)
        free = state_response(Lambda, P, C, dt, state, u.shape[-1])
        lengths = None if lengths is None else lengths[:, None]
        return free, final_state(Lambda, P, B, dt, u, state, lengths)

    @_full_precision
    def step(
        self, u: Tensor, state: Tensor, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one step: u (B, H) and a state to y (B, H) and a state."""
        u = _check_input(self, u, "B")
        _check_state(self, state, len(u))
        Lambda, P, B, C, dt = self.system(rate)
        y, state = dplr_step(Lambda, P, B, C, dt, u, state)
        return y + self.D * u, state

    def initial_state(self, batch: int) -> Tensor:
        """Return the state of a fresh start: complex zeros (B, H, N/2)."""
        shape = check_int("batch", batch), self.d_model, self.d_state // 2
        state = self.D.new_zeros(shape, dtype=self.D.dtype.to_complex())
        _check_state(self, state, batch)
        return state
