"""The layer.

The structured system becomes a network layer: one system for each channel, and the same
output whether it is computed in parallel, step by step, or in chunks.

Tangled from book/layer.md.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple, Self
from weakref import WeakKeyDictionary

import torch
from torch import Generator, Tensor, nn

from s4mini.checks import (
    FLOATS,
    check_choice,
    check_dense,
    check_device,
    check_int,
    check_step,
    check_tensors,
)
from s4mini.convolve import channel_conv
from s4mini.diagonal import COMPLEX, finest, mode_sums, past, s4d_init, sample
from s4mini.kernel import backends, kernel_of
from s4mini.lowrank import half_spectrum, nplr, real_form
from s4mini.memory import init_dt
from s4mini.projection import MEASURES
from s4mini.recurrence import (
    RealIncrements,
    advance,
    check_lengths,
    in_real,
    increments,
    state_after,
    state_echo,
    to_half,
    to_real,
    to_row,
)

__all__ = [
    "DIAGONAL",
    "STARTS",
    "METHODS",
    "SLOWEST",
    "valid_steps",
    "clear_padding",
    "Systems",
    "Stepper",
    "kernels_kept",
    "layer_shapes",
    "S4Layer",
]

DIAGONAL = ("diag-legs", "diag-lin", "diag-inv", "diag-real")
STARTS = (*MEASURES, "random", *DIAGONAL)
METHODS = ("bilinear", "zoh")


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
    if measure in DIAGONAL:
        Lambda, B = s4d_init(measure.removeprefix("diag-"), N)
        return Lambda, None, B
    return half_spectrum(nplr(measure, N))[:3]


SLOWEST = 1e-5  # the smallest -Re Lambda to begin with, in 1/time


def valid_steps(u: Tensor, lengths: Tensor) -> Tensor:
    """Mark the steps that count.

    Args:
        u: (B, L, ...) sequences, padded at their ends.
        lengths: (B,) the steps of each that count.

    Returns:
        (B, L, 1, ...) booleans, with as many axes as u.

    Source: book/layer.md.
    """
    steps = torch.arange(u.shape[1], device=u.device)
    valid = steps < lengths[:, None]  # (B, L)
    return valid.view(valid.shape + (1,) * (u.ndim - 2))


def clear_padding(u: Tensor, lengths: Tensor | None) -> Tensor:
    """Set the steps of each sequence that do not count to zero.

    Args:
        u: (B, L, ...) sequences padded at their ends; NaN may stand there.
        lengths: (B,) the steps of each that count; None for all.

    Returns:
        As u. Nothing is examined, so that nothing waits.

    Source: book/layer.md.
    """
    if lengths is None:
        return u
    return torch.where(valid_steps(u, lengths), u, torch.zeros_like(u))


class Systems(NamedTuple):
    """H systems of one channel each, in half spectrum.

    Attributes:
        Lambda: (H, n) eigenvalues, in 1/time.
        P: (H, n, r) low-rank factors; None in diagonal systems.
        B: (H, n) input vectors.
        C: (H, n) output vectors, or (2, H, n) of past and future.
        dt: (H,) steps, in time.

    Source: book/layer.md.
    """

    Lambda: Tensor
    P: Tensor | None
    B: Tensor
    C: Tensor
    dt: Tensor

    def to(self, dtype: torch.dtype) -> "Systems":
        """Return the same in another precision, named by its real dtype."""
        P = None if self.P is None else self.P.to(COMPLEX[dtype])
        Lambda, B, C = (v.to(COMPLEX[dtype]) for v in (self.Lambda, self.B, self.C))
        return Systems(Lambda, P, B, C, self.dt.to(dtype))


def _kernels(systems: Systems, L: int, method: str, backend: str) -> Tensor:
    """Return the kernels (H, L), or (2, H, L) of past and future."""
    Lambda, P, B, C, dt = systems
    if P is not None:
        return kernel_of(Lambda, P, B, C, dt, L, backend)
    system = sample(Lambda, B, dt, method)
    return mode_sums(2 * C * system.B_bar, system, L, C.dtype)


def _sampled_step(systems: Systems, method: str) -> RealIncrements:
    """Return the sampled systems, for steps in real coordinates."""
    Lambda, P, B, _, dt = systems
    if P is not None:
        return in_real(*increments(Lambda, P, B, dt))
    _, E, B_bar = (v.to(B.dtype) for v in sample(Lambda, B, dt, method))
    return in_real(E, None, None, B_bar)


def _ends(systems: Systems, method: str, u, s, lengths) -> Tensor:
    """Return the states (B, H, N) after inputs u (B, L, H), from s."""
    if systems.P is None:
        x, m = s, lengths if lengths is None else lengths[:, None]
        x = x if x is None else to_half(x)
        system = sample(systems.Lambda, systems.B, systems.dt, method)
        return to_real(past(system, u.mT, x, m))
    s = s if s is None else s.transpose(0, 1)  # (H, B, N)
    u = u.permute(2, 0, 1)  # (H, B, L)
    return state_after(_sampled_step(systems, method), u, s, lengths).transpose(0, 1)


def _echoes(systems: Systems, method: str, s: Tensor, L: int) -> Tensor:
    """Return what states s (B, H, N) add to the next outputs (B, L, H)."""
    Lambda, P, B, C, dt = systems
    if P is None:
        system = sample(Lambda, B, dt, method)
        w = 2 * C * (1 + system.E) * to_half(s)
        return mode_sums(w, system, L, C.dtype).mT
    rows = state_echo(_sampled_step(systems, method), to_row(C), s.transpose(0, 1), L)
    return rows.permute(1, 2, 0)


class Stepper(nn.Module):
    """One step of a layer as it was when this was made.

    Later changes of the layer's parameters have no effect on it. Made by
    S4Layer.stepper().

    Args:
        step: the sampled systems of H channels.
        C: (H, N) their output rows, in real coordinates.
        D: (H,) direct paths.

    Source: book/layer.md.
    """

    same: Tensor
    other: Tensor
    F: Tensor | None
    G: Tensor | None
    B_bar: Tensor
    C: Tensor
    D: Tensor

    def __init__(self, step: RealIncrements, C: Tensor, D: Tensor) -> None:
        super().__init__()
        for name, value in (*step._asdict().items(), ("C", C), ("D", D)):
            self.register_buffer(name, value)

    def forward(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step.

        Args:
            u: (B, H) the input.
            state: (B, H, N) the state before it.

        Returns:
            y (B, H), and the state after the step.

        Raises:
            TypeError: u or the state is not of the stepper's dtype.
            ValueError: a shape is wrong.
        """
        _check_step(u, state, self.C.shape[1], self.D)
        step = RealIncrements(self.same, self.other, self.F, self.G, self.B_bar)
        v = u.to(self.D.dtype)
        state = advance(step, v, state)
        y = torch.addcmul(torch.linalg.vecdot(self.C, state), self.D, v)
        return y.to(u.dtype), state


def _check_like(name: str, value: Tensor, D: Tensor, *allowed: torch.dtype) -> None:
    """Refuse anything but a dense tensor of these dtypes where D is."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a tensor of {allowed[0]}, got {kind}")
    check_dense(name, value)
    if value.dtype not in allowed:
        raise TypeError(f"{name}: expected {allowed[0]}, got {value.dtype}")
    if value.device != D.device:
        raise ValueError(f"{name}: expected a tensor on {D.device}, got {value.device}")


def _check_step(u: Tensor, state: Tensor, N: int, D: Tensor) -> None:
    """Examine a step of as many channels as D has, of N coefficients each."""
    H, wide = len(D), torch.promote_types(D.dtype, torch.float32)
    _check_like("u", u, D, wide, torch.bfloat16, torch.float16)
    if state is None:
        raise TypeError(
            "state: expected a tensor, such as layer.initial_state(batch), got None"
        )
    _check_like("state", state, D, wide)
    if u.ndim != 2 or u.shape[1] != H:
        raise ValueError(f"u: expected (B, {H}), got {tuple(u.shape)}")
    _check_state(state, u.shape[0], H, N)


def _check_lengths(lengths: Tensor, u: Tensor) -> None:
    """Examine lengths; values on a CPU only, because another device would wait."""
    known = isinstance(lengths, Tensor) and lengths.dtype in (torch.int32, torch.int64)
    if not known or (lengths.is_cpu and not torch.compiler.is_compiling()):
        check_lengths(lengths, u.shape[1])
    if lengths.shape != u.shape[:1]:
        raise ValueError(
            f"lengths: expected shape ({len(u)},), got {tuple(lengths.shape)}"
        )


def _check_state(state: Tensor, batch: int, H: int, N: int) -> None:
    """Examine the shape of a state."""
    if state.shape != (batch, H, N):
        raise ValueError(
            f"state: expected ({batch}, {H}, {N}), got {tuple(state.shape)}"
        )


_KEPT: ContextVar[WeakKeyDictionary | None] = ContextVar("kept", default=None)


@contextmanager
def kernels_kept() -> Iterator[None]:
    """Make each kernel once, while models are only evaluated.

    In this context a layer keeps the kernels it makes while gradients are
    disabled. One whose parameters have changed is made anew.

    Source: book/layer.md.
    """
    token = _KEPT.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _KEPT.reset(token)


def _recall(owner: nn.Module, key: tuple, make: Callable[[], Tensor]) -> Tensor:
    """Return make(), or what it gave for the same key and parameters."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return make()
    if (store := _KEPT.get()) is None:
        return make()
    parameters = list(owner.parameters())
    if any(type(p) is not nn.Parameter or p.is_inference() for p in parameters):
        return make()  # a function transform, or made without a count
    version = tuple((p.data_ptr(), p.dtype, p._version) for p in parameters)
    kept = store.setdefault(owner, {})
    if key not in kept or kept[key][0] != version:
        kept[key] = version, make()
    return kept[key][1]


def _plainly(device: torch.device):
    """Return a context in which autocast leaves the arithmetic alone."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _kept_apart(value: Tensor) -> Tensor:
    """Return a tensor in full precision, on the CPU, without its past."""
    return value.detach().cpu().to(torch.complex128)


def layer_shapes(
    d_model: int, d_state: int, measure: str, bidirectional: bool, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Tell the name and shape of each tensor of a layer.

    Args:
        d_model, d_state, measure, bidirectional, tied: as in S4Layer.

    Returns:
        The shapes, as in the layer's state_dict.

    Source: book/layer.md.
    """
    H, n, rows = d_model, d_state // 2, 1 if tied else d_model
    rank = 1 + (measure == "legt")
    low_rank = {} if measure in DIAGONAL else {"P": (rows, n, rank, 2)}
    return {
        "log_dt": (H,),
        "log_decay": (rows, n),
        "frequency": (rows, n),
        **low_rank,
        "B": (rows, n, 2),
        "C": (2, H, n, 2) if bidirectional else (H, n, 2),
        "D": (H,),
        "kind": (2,),
    }


class S4Layer(nn.Module):
    """Run one structured state space system on each channel.

    Args:
        d_model: the number H of channels.
        d_state: the state size N of each, even, >= 2.
        measure: the system to begin with: "legs", "legt", "lagt", "fout" or
            "random" with a low-rank term; "diag-legs", "diag-inv",
            "diag-lin" or "diag-real" without one (S4D).
        dt_min: the smallest step at initialisation, > 0. A channel of step
            dt remembers for about 1/dt samples: choose 1/L or less.
        dt_max: the largest step at initialisation.
        bidirectional: whether a second kernel looks at the future.
        generator: the source of the random dt, C and D.
        method: how to sample: "bilinear", the default with a low-rank term
            and the only choice there, or "zoh", the default without.
        tied: whether all channels share Lambda, P and B.
        backend: how the kernel is computed, as in dplr_kernel; "auto" in a
            diagonal layer.
        device: where the parameters are.
        dtype: of the parameters, a floating one.

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
        kind: (2,) measure and method as numbers: weights of one kind do not
            load into a layer of another.

    Raises:
        TypeError: a size is not an integer, or a step not a number.
        ValueError: d_state is odd, a name is unknown or does not fit the
            measure, or the steps are not 0 < dt_min <= dt_max.

    Source: Gu et al. 2022a, section 3.4; Gu et al. 2022, S4D; book/layer.md.
    """

    log_dt: Tensor
    log_decay: Tensor
    frequency: Tensor
    P: Tensor | None
    B: Tensor
    C: Tensor
    D: Tensor
    kind: Tensor
    own: tuple[Tensor, Tensor | None, Tensor] | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = H = check_int("d_model", d_model)
        self.d_state = check_int("d_state", d_state, minimum=2, even=True)
        check_choice("measure", measure, STARTS)
        check_choice("bidirectional", bidirectional, (False, True))
        check_choice("tied", tied, (False, True))
        diagonal = measure in DIAGONAL
        methods = (None, "bilinear", "zoh") if diagonal else (None, "bilinear")
        check_choice("method", method, methods)
        check_choice("backend", backend, ("auto", *(() if diagonal else backends())))
        check_choice("dtype", dtype, (None, *FLOATS))
        check_device("device", device)
        self.measure, self.bidirectional, self.tied = measure, bidirectional, tied
        self.method = method or ("zoh" if diagonal else "bilinear")
        self.backend, self.dts, self.own = backend, (dt_min, dt_max), None
        shapes = layer_shapes(H, d_state, measure, bidirectional, tied)
        for name, shape in shapes.items():
            blank = torch.empty(shape, device=device, dtype=dtype)
            if name == "kind":
                self.register_buffer(name, blank)
            else:
                self.register_parameter(name, nn.Parameter(blank))
        if diagonal:
            self.register_parameter("P", None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Begin anew: draw dt, C and D, and return to the first system."""
        n, (dt_min, dt_max) = self.d_state // 2, self.dts
        with torch.device("cpu"):
            dt = init_dt(self.d_model, dt_min, dt_max, generator)
            C = torch.randn(
                self.C.shape[:-1], dtype=torch.complex128, generator=generator
            )
            D = torch.randn(self.d_model, dtype=torch.float64, generator=generator)
            Lambda, P, B = self.own or _first_modes(self.measure, 2 * n, generator)
            kind = torch.tensor(self._codes())
        self.kind.copy_(kind)
        self.log_dt.copy_(dt.log())
        self.log_decay.copy_((-Lambda.real).clamp(min=SLOWEST).log())
        self.frequency.copy_(Lambda.imag)
        self.D.copy_(D)
        for own, value in ((self.P, P), (self.B, B), (self.C, C)):
            if own is not None and value is not None:
                own.copy_(torch.view_as_real(value.resolve_conj()))

    def extra_repr(self) -> str:
        """Describe the layer in print."""
        shown = f"{self.d_model}, d_state={self.d_state}, measure={self.measure!r}"
        shown += f", method={self.method!r}"
        if self.backend != "auto":
            shown += f", backend={self.backend!r}"
        flags = "bidirectional", "tied"
        return shown + "".join(f", {k}=True" for k in flags if getattr(self, k))

    def system(self, rate: float = 1.0) -> Systems:
        """Return Lambda, P, B, C, complex, and dt * rate, per channel."""
        if isinstance(rate, Tensor):
            raise TypeError("rate: expected a number > 0, got a Tensor")
        check_step("rate", rate)
        wide = torch.promote_types(self.D.dtype, torch.float32)
        decay = self.log_decay.to(wide).exp()
        Lambda = torch.complex(-decay, self.frequency.to(wide))
        B, C = (torch.complex(*v.to(wide).unbind(-1)) for v in (self.B, self.C))
        P = None
        if self.P is not None:
            P = torch.complex(*self.P.to(wide).unbind(-1)).expand(self.d_model, -1, -1)
        Lambda, B = Lambda.expand(self.d_model, -1), B.expand(self.d_model, -1)
        return Systems(Lambda, P, B, C, self.log_dt.to(wide).exp() * rate)

    def kernel(self, L: int, rate: float = 1.0) -> Tensor:
        """Return the kernels (H, L), or (2, H, L) of past and future.

        They are the response to an impulse without the direct path D.
        """
        L = check_int("L", L)

        def make() -> Tensor:
            with _plainly(self.D.device):
                return _kernels(self.system(rate), L, self.method, self.backend)

        return _recall(self, (L, rate), make)

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
        rate: float = 1.0,
        *,
        return_state: bool = True,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Run a batch of sequences, in parallel over time.

        Args:
            u: (B, L, H) the input, or (L, H) without a batch.
            state: (B, H, N) the state before it; rest if None.
            lengths: (B,) the steps of each sequence that count, integers in
                1 ... L; the outputs after them are zero.
            rate: how many steps of the training data one step here spans: 2
                for data of half the sampling frequency.
            return_state: whether the state is wanted. Without it the outputs
                cost less, and come alone.

        Returns:
            y (B, L, H), and the state (B, H, N) after the last step that
            counts; of a bidirectional layer an empty one, (B, H, 0).

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: a shape, a length or the rate is wrong, or a
                bidirectional layer is given a state.
        """
        self.check_input(u, state, lengths)
        if u.ndim == 2:
            s = state if state is None else state[None]
            if not return_state:
                return self.forward(u[None], s, None, rate, return_state=False)[0]
            y, s = self.forward(u[None], s, None, rate)
            return y[0], s[0]
        K = self.kernel(u.shape[1], rate)
        with _plainly(u.device):
            v = clear_padding(u.to(K.dtype), lengths)
            y = channel_conv(v, K, self.D.to(K.dtype))
            if state is not None:
                y = y + _echoes(self.system(rate), self.method, state, u.shape[1])
            y = clear_padding(y, lengths).to(u.dtype)
            if not return_state:
                return y
            if self.bidirectional:
                return y, v.new_zeros(len(u), self.d_model, 0)
            return y, _ends(self.system(rate), self.method, v, state, lengths)

    def initial_state(self, batch: int) -> Tensor:
        """Return the state of a fresh start: zeros (B, H, N)."""
        self._check_causal()
        shape = check_int("batch", batch, minimum=0), self.d_model, self.d_state
        wide = torch.promote_types(self.D.dtype, torch.float32)
        return torch.zeros(shape, dtype=wide, device=self.D.device)

    def step(
        self, u: Tensor, state: Tensor, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one step: u (B, H) and a state to y (B, H) and a state."""
        self._check_causal()
        systems = self.system(rate)
        wide = systems.dt.dtype
        _check_step(u, state, self.d_state, self.D)
        with _plainly(u.device):
            v = u.to(wide)
            state = advance(_sampled_step(systems, self.method), v, state)
            y = (to_row(systems.C) * state).sum(-1) + self.D.to(wide) * v
        return y.to(u.dtype), state

    @torch.no_grad()
    def stepper(self, rate: float = 1.0) -> Stepper:
        """Return the step as the layer is now, prepared for many samples."""
        self._check_causal()
        systems = self.system(rate)
        dtype, fine = systems.dt.dtype, systems.to(finest(self.D.device))
        step = _sampled_step(fine, self.method).to(dtype)
        return Stepper(
            step, to_row(fine.C).to(dtype), self.D.detach().to(dtype).clone()
        )

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (H, N, N), B (H, N), C (H, N) in real coordinates.

        The state of the layer is the state of x' = A x + B u, y = C x.
        """
        Lambda, P, B, C, _ = self.system()
        return real_form(Lambda, B[..., None] * 0 if P is None else P, B, C)

    def check_input(
        self, u: Tensor, state: Tensor | None, lengths: Tensor | None
    ) -> None:
        """Examine shapes and dtypes, but no values."""
        H, wide = self.d_model, torch.promote_types(self.D.dtype, torch.float32)
        half = torch.bfloat16, torch.float16
        _check_like("u", u, self.D, self.D.dtype, wide, *half)
        if u.ndim not in (2, 3) or u.shape[-1] != H or u.shape[-2] == 0:
            raise ValueError(
                f"u: expected (B, L, {H}) or (L, {H}), L >= 1, got {tuple(u.shape)}"
            )
        if u.ndim == 2 and lengths is not None:
            raise ValueError(f"u: expected (B, L, {H}) with lengths, got 2 axes")
        if lengths is not None:
            _check_lengths(lengths, u)
        if state is not None:
            self._check_causal()
            _check_like("state", state, self.D, wide)
            batched = state if u.ndim == 3 else state[None]
            _check_state(batched, u.shape[0] if u.ndim == 3 else 1, H, self.d_state)

    def _check_causal(self) -> None:
        """Refuse a layer that looks at the future."""
        if self.bidirectional:
            raise ValueError(
                "bidirectional: expected False where a state is carried or a "
                "step taken, because the future is not known, got True"
            )

    @classmethod
    def from_system(
        cls, Lambda: Tensor, P: Tensor | None, B: Tensor, d_model: int, **options
    ) -> Self:
        """Make a layer that begins with a system of your own.

        Args:
            Lambda: (n,) eigenvalues, one of each conjugate pair, in 1/time,
                real parts <= 0; or (H, n), one row for each channel.
            P: (n, r) low-rank factor of A = diag(Lambda) - P P*, or (H, n, r);
                None without one.
            B: (n,) input vector, or (H, n).
            d_model: the number H of channels.
            options: all other arguments of S4Layer but d_state and measure.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: shapes do not fit, or a real part is above zero.
        """
        check_tensors(Lambda=(Lambda, "... n"), B=(B, "... n"))
        P = None if P is not None and P.shape[-1] == 0 else P
        if P is not None:
            check_tensors(Lambda=(Lambda, "... n"), P=(P, "... n r"))
        if ((Lambda + 0j).real > 0).any():
            raise ValueError("Lambda: expected real parts <= 0, got one above")
        wanted = options.pop("device", None), options.pop("generator", None)
        start = "diag-lin" if P is None else "random"
        options |= {"device": "meta", "generator": Generator()}  # drawn again below
        layer = cls(d_model, 2 * B.shape[-1], start, **options)
        rows = len(layer.B)
        for name, v, own in (("Lambda", Lambda, 1), ("P", P, 2), ("B", B, 1)):
            if v is not None and v.shape[:-own] not in ((), (1,), (rows,)):
                raise ValueError(
                    f"{name}: expected one system or {rows}, got {tuple(v.shape)}"
                )
        if P is not None:
            shape = rows, *P.shape[-2:], 2
            layer.P = nn.Parameter(layer.B.new_empty(shape))
        own_P = None if P is None else _kept_apart(P)
        layer.measure, layer.own = "own", (_kept_apart(Lambda), own_P, _kept_apart(B))
        layer.to_empty(device=wanted[0] or torch.get_default_device())
        layer.reset_parameters(wanted[1])
        return layer

    def _codes(self) -> list[int]:
        """Return measure and method as numbers, for state_dict."""
        measure = -1 if self.own else STARTS.index(self.measure)
        return [measure, METHODS.index(self.method)]

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        """Refuse parameters that mean something else here."""
        found = state_dict.get(prefix + "kind", self.kind)
        codes = [-2 if v != v else round(v) for v in found.tolist()]
        if codes == self._codes():
            return super()._load_from_state_dict(state_dict, prefix, *rest)
        names = ("own", *STARTS), METHODS
        met = [
            repr(known[i]) if 0 <= i < len(known) else "an unknown one"
            for known, i in zip(names, (codes[0] + 1, codes[-1]), strict=True)
        ]
        rest[-1].append(
            f"{prefix}measure, method: expected {self.measure!r}, {self.method!r}, "
            f"got the weights of a layer with {met[0]}, {met[1]}"
        )
