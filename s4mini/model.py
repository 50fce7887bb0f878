"""The network.

Layers stacked into blocks, blocks into a model that reads a sequence and answers once,
or at every step, in parallel, one sample at a time, or in chunks.

Tangled from book/model.md.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from dataclasses import replace as replaced
from functools import partial
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from s4mini.checks import (
    check_bool,
    check_choice,
    check_dense,
    check_generator,
    check_int,
    check_number,
    check_positive,
    check_step,
    values_can_be_read,
)
from s4mini.layer import STARTS, S4Layer, clear_padding, layer_shapes, valid_steps
from s4mini.saving import Savable

__all__ = [
    "TiedDropout",
    "SequenceNorm",
    "LARGEST",
    "S4Config",
    "S4Block",
    "pool_steps",
    "ModelState",
    "S4Model",
    "model_shapes",
    "ModelStepper",
    "parameter_groups",
    "descend",
]


class TiedDropout(nn.Module):
    """Silence random channels of a sequence, each for the whole sequence.

    Args:
        p: the share of channels silenced in training, in [0, 1).

    Raises:
        TypeError: p is not a number.
        ValueError: p is not in [0, 1).

    Source: Gu et al. 2022 (official S4 code); book/model.md.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = check_number("p", p, below=1)

    def extra_repr(self) -> str:
        """Describe the module in print."""
        return f"p={self.p}"

    def forward(self, u: Tensor) -> Tensor:
        """Map u (B, L, H), or one step (B, H), to the same shape."""
        if u.ndim not in (2, 3):
            raise ValueError(f"u: expected 2 or 3 axes, got {tuple(u.shape)}")
        if not self.training or self.p == 0:
            return u
        shape = (u.shape[0], *[1] * (u.ndim - 2), u.shape[-1])
        keep = torch.rand(shape, device=u.device) >= self.p
        return u * keep.to(u) / (1 - self.p)


def _moments(u: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance (H,) of u (B, L, H) where valid, and the count."""
    n = valid.sum()
    mean = torch.where(valid, u, 0).sum((0, 1)) / n
    variance = torch.where(valid, u - mean, 0).square().sum((0, 1)) / n
    return mean, variance, n


def _batch_norm(norm: nn.BatchNorm1d, u: Tensor, valid: Tensor) -> Tensor:
    """Do in training what a batch norm does, for the valid steps of u."""
    v = u.to(norm.weight.dtype)
    mean, variance, n = _moments(v, valid)
    unbiased, weight = variance * n / (n - 1).clamp(min=1), norm.momentum or 0.0
    with torch.no_grad():
        norm.get_buffer("running_mean").lerp_(mean, weight)
        norm.get_buffer("running_var").lerp_(unbiased, weight)
        norm.get_buffer("num_batches_tracked").add_(1)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return ((v - mean) * scale + norm.bias).to(u.dtype)


class SequenceNorm(nn.Module):
    """Normalise channels: each step by itself, or over all valid steps.

    Args:
        kind: "layer" or "batch".
        d_model: the number H of channels.

    Raises:
        ValueError: kind is neither.

    Source: book/model.md.
    """

    def __init__(self, kind: str, d_model: int) -> None:
        super().__init__()
        check_choice("norm", kind, ("layer", "batch"))
        norms = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        self.kind, self.norm = kind, norms[kind](d_model)

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map u (B, L, H), or one step (B, H), to the same shape."""
        if self.kind == "layer":
            return self.norm(u)
        if self.training and lengths is not None:
            return _batch_norm(self.norm, u, valid_steps(u, lengths))
        return self.norm(u.reshape(-1, u.shape[-1])).view(u.shape)


#: The largest sizes that a configuration may ask for.
LARGEST = {
    "d_input": 2**24,
    "d_output": 2**24,
    "d_model": 2**16,
    "n_layers": 2**10,
    "d_state": 2**13,
}


@dataclass(frozen=True, kw_only=True)
class S4Config:
    """Everything that decides which function a network's weights describe.

    Args:
        d_input: features of the input at each step, or, with tokens, how many
            different tokens there are.
        d_output: outputs, for the whole sequence or for each step.
        d_model: the number H of channels inside.
        n_layers: the number of blocks.
        d_state: the state size N of each channel, even.
        measure: the system to begin with, "legs" or another of S4Layer.
        method: how to sample the systems, as in S4Layer; None stands for the
            measure's usual one, and is replaced by its name.
        dropout: the share of channels silenced in training, in [0, 1).
        norm: "layer" or "batch".
        prenorm: whether each block's norm comes first instead of last.
        bidirectional: whether the layers see the future too.
        tied: whether all channels of a layer share one system but for dt, C
            and D.
        dt_min: the smallest step at initialisation, > 0.
        dt_max: the largest step at initialisation, >= dt_min.
        pool: "mean" or "last" for one output, "none" for one at each step.
        tokens: whether the input is integers 0 ... d_input - 1 of shape
            (B, L) instead of vectors (B, L, d_input).

    Raises:
        TypeError: a value is of a wrong kind.
        ValueError: a value is not one of those allowed.

    Source: Gu et al. 2022a, section 3.4; book/model.md.
    """

    d_input: int = 1
    d_output: int = 1
    d_model: int = 128
    n_layers: int = 4
    d_state: int = 64
    measure: str = "legs"
    method: str | None = None
    dropout: float = 0.1
    norm: str = "layer"
    prenorm: bool = False
    bidirectional: bool = False
    tied: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    pool: str = "mean"
    tokens: bool = False

    def __post_init__(self) -> None:
        for name, value in _plain(self).items():
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, examined like the first."""
        if "measure" in changes:  # another measure has a usual method of its own
            changes = {"method": None} | changes
        return replaced(self, **changes)

    def to_dict(self) -> dict:
        """Return the fields as plain Python values, such as JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: dict) -> Self:
        """Return the configuration of which to_dict returned this."""
        _check_keys(given, {field.name for field in fields(cls)})
        return cls(**given)


def _check_keys(given: dict, known: set[str]) -> None:
    """Refuse a dictionary with a key too many or too few."""
    if not isinstance(given, dict):
        raise TypeError(f"config: expected a dict, got {type(given).__name__}")
    for text, names in {"lacks": known - set(given), "has": set(given) - known}.items():
        if names:
            name = min(names, key=str)
            raise ValueError(
                f"config: expected the fields of S4Config; it {text} {name!r}"
            )


def _plain(c: S4Config) -> dict:
    """Return the fields of a configuration, examined, as plain values."""
    check_choice("measure", c.measure, STARTS)
    methods = ["bilinear"]
    if c.measure.startswith("diag-"):
        methods.insert(0, "zoh")
    method = methods[0] if c.method is None else c.method
    check_choice("method", method, methods)
    check_choice("norm", c.norm, ("layer", "batch"))
    check_choice("pool", c.pool, ("mean", "last", "none"))
    found: dict[str, Any] = {}
    for name, most in LARGEST.items():
        even = name == "d_state"
        found[name] = check_int(name, getattr(c, name), 2 if even else 1, even, most)
    for name in ("prenorm", "bidirectional", "tied", "tokens"):
        found[name] = check_bool(name, getattr(c, name))
    for name in ("dt_min", "dt_max"):
        check_step(name, check_number(name, getattr(c, name)))
        found[name] = float(getattr(c, name))
    if c.dt_max < c.dt_min:
        raise ValueError(
            f"dt_max: expected a number >= dt_min = {c.dt_min}, got {c.dt_max}"
        )
    found["dropout"] = check_number("dropout", c.dropout, below=1)
    return found | {"method": method}


def _check_made_from(config: S4Config, generator: Generator | None) -> None:
    """Refuse what is no configuration, or no source of random numbers."""
    if not isinstance(config, S4Config):
        kind = type(config).__name__
        raise TypeError(f"config: expected an S4Config, got {kind}")
    check_generator("generator", generator)


def _linear(d_in: int, d_out: int, generator: Generator | None) -> nn.Linear:
    """Make a linear map, drawn from the generator."""
    linear = nn.utils.skip_init(nn.Linear, d_in, d_out)
    bound = 1 / math.sqrt(d_in)
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    return linear


def _layer(c: S4Config, generator: Generator | None) -> S4Layer:
    """Make the layer of a block."""
    return S4Layer(
        d_model=c.d_model,
        d_state=c.d_state,
        measure=c.measure,
        dt_min=c.dt_min,
        dt_max=c.dt_max,
        bidirectional=c.bidirectional,
        generator=generator,
        method=c.method,
        tied=c.tied,
    )


def _check_shape(name: str, u: Tensor, axes: str, sizes: dict) -> None:
    """Refuse a tensor of another shape; axes without a size may be any."""
    if not isinstance(u, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(u).__name__}")
    wanted = [sizes.get(axis) for axis in axes.split()]
    fits = len(wanted) == u.ndim and all(
        w is None or w == size for w, size in zip(wanted, u.shape, strict=True)
    )
    if not fits or ("L" in axes.split() and u.shape[1] == 0):
        shape = ", ".join(str(sizes.get(axis, axis)) for axis in axes.split())
        raise ValueError(f"{name}: expected shape ({shape}), got {tuple(u.shape)}")


def _check_range(name: str, value: Tensor, low: int, high: int) -> None:
    """Refuse integers (on the CPU) outside low ... high."""
    if value.device.type != "cpu" or not value.numel() or not values_can_be_read():
        return
    least, most = (int(v) for v in value.aminmax())
    if least < low or most > high:
        raise ValueError(f"{name}: expected {low} ... {high}, got {least} to {most}")


def _check_integers(name: str, value: Tensor) -> None:
    """Refuse a tensor that is not of integers."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name}: expected integers, int64 or int32, got {kind}")


def _check_lengths(lengths: Tensor | None, u: Tensor) -> None:
    """Refuse lengths that are not those of the sequences u (B, L, ...)."""
    if lengths is not None:
        _check_integers("lengths", lengths)
        _check_shape("lengths", lengths, "B", {"B": u.shape[0]})
        _check_range("lengths", lengths, 1, u.shape[1])


class S4Block(nn.Module):
    """Wrap an S4 layer: nonlinearity, mixing of channels, residual, norm.

    Args:
        config: its sizes and choices.
        generator: the source of the random initial values.

    Raises:
        TypeError: an argument is of a wrong kind.

    Source: Gu et al. 2022a, section 3.4; book/model.md.
    """

    def __init__(self, config: S4Config, generator: Generator | None = None) -> None:
        super().__init__()
        _check_made_from(config, generator)
        H, self.prenorm = config.d_model, config.prenorm
        self.layer = _layer(config, generator)
        self.norm = SequenceNorm(config.norm, H)
        self.dropout = TiedDropout(config.dropout)
        self.mix = _linear(H, 2 * H, generator)

    def forward(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """Map whole sequences u (B, L, H) to the same shape."""
        self._check(u, lengths)
        run = partial(self.layer, lengths=lengths, rate=rate, return_state=False)
        return self._around(lambda v: (run(v), None), u, lengths)[0]

    def chunk(
        self,
        u: Tensor,
        state: Tensor,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Map the next steps u (B, L, H) and a state to outputs and a state."""
        self._check(u, lengths)
        _check_state(self.layer, "state", state, u.shape[0])
        run = partial(self.layer, state=state, lengths=lengths, rate=rate)
        return self._around(run, u, lengths)

    def step(
        self, u: Tensor, state: Tensor, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one step: u (B, H) and a state to y (B, H) and a state."""
        return self.around_step(partial(self.layer.step, rate=rate), u, state)

    def around_step(
        self, take: Callable, u: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take one step, with take as the layer's own."""
        return self._around(partial(take, state=state), u)

    def _around(self, run, u, lengths=None):
        """Do what stands around the layer; run is how to run it."""
        u = clear_padding(u, lengths)
        v = self.norm(u, lengths) if self.prenorm else u
        v, state = run(v.to(self.layer.D.dtype))  # autocast may have narrowed it
        v = u + self.after_layer(v)
        v = v if self.prenorm else self.norm(v, lengths)
        return clear_padding(v, lengths), state

    def after_layer(self, v: Tensor) -> Tensor:
        """Return what follows the layer, before the residual is added."""
        v = self.dropout(F.gelu(v))
        return self.dropout(F.glu(self.mix(v), dim=-1))

    def _check(self, u: Tensor, lengths: Tensor | None) -> None:
        """Refuse wrong input before a norm's averages have seen it."""
        _check_shape("u", u, "B L H", {"H": self.layer.d_model})
        _check_lengths(lengths, u)


def _check_state(layer: S4Layer, name: str, state: Tensor, batch: int) -> None:
    """Refuse a state that is not of this layer and batch."""
    if layer.bidirectional:
        raise ValueError(
            "bidirectional: expected False where a state is carried or a step "
            "taken, because the future is not known, got True"
        )
    if not isinstance(state, Tensor):
        kind = type(state).__name__
        raise TypeError(
            f"{name}: expected a tensor, such as initial_state(batch), got {kind}"
        )
    wanted = batch, layer.d_model, layer.d_state
    if state.shape != wanted:
        raise ValueError(f"{name}: expected shape {wanted}, got {tuple(state.shape)}")
    if not state.is_floating_point():
        raise TypeError(f"{name}: expected a real tensor, got {state.dtype}")


def _encoder(c: S4Config, generator: Generator | None) -> nn.Module:
    """Make the map from the input to the channels."""
    if not c.tokens:
        return _linear(c.d_input, c.d_model, generator)
    table = nn.utils.skip_init(nn.Embedding, c.d_input, c.d_model)
    nn.init.normal_(table.weight, generator=generator)
    return table


def _check_vectors(name: str, u: Tensor, axes: str, c: S4Config, dtype) -> None:
    """Refuse anything but vectors of d_input features, like the model."""
    _check_shape(name, u, f"{axes} C", {"C": c.d_input})
    mixed = torch.is_autocast_enabled(u.device.type) and u.is_floating_point()
    if u.dtype != dtype and not mixed:
        raise TypeError(f"{name}: expected {dtype} like the model, got {u.dtype}")


def _check_tokens(
    name: str, u: Tensor, lengths: Tensor | None, axes: str, size
) -> None:
    """Refuse anything but integers in 0 ... size - 1."""
    _check_integers(name, u)
    _check_shape(name, u, axes, {})
    _check_range(name, clear_padding(u, lengths), 0, size - 1)


def pool_steps(u: Tensor, pool: str, lengths: Tensor | None = None) -> Tensor:
    """Pool over time.

    Args:
        u: (B, L, H) features.
        pool: "mean", "last" or "none".
        lengths: (B,) the steps of each sequence that count; None for all.

    Returns:
        (B, H), or u itself for "none".

    Source: book/model.md.
    """
    if pool == "none":
        return u
    if pool == "last":
        last = -1 if lengths is None else lengths - 1
        return u[torch.arange(u.shape[0], device=u.device), last]
    if lengths is None:
        return u.mean(1)
    return clear_padding(u, lengths).sum(1) / lengths[:, None]


@dataclass(frozen=True)
class ModelState:
    """What a model remembers of the steps so far.

    Args:
        layers: the state of each layer, as its initial_state has it.
        mean: (B, H) the mean of the features so far; (B, 0) of a model that
            pools otherwise.
        count: (B,) int64, the steps so far.

    Source: book/model.md.
    """

    layers: tuple[Tensor, ...]
    mean: Tensor
    count: Tensor

    def detach(self) -> Self:
        """Return the same state, cut off from the graph of its past."""
        layers = tuple(x.detach() for x in self.layers)
        return type(self)(layers, self.mean.detach(), self.count)


# so that torch.export can write a program that takes a state, and torch.load
# reads one with its defaults
torch.export.register_dataclass(
    ModelState, serialized_type_name="s4mini.model.ModelState"
)
torch.serialization.add_safe_globals([ModelState])


def _add_to_mean(
    state: ModelState, average: Tensor, n: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and count after n (B,) more steps of this average."""
    count = state.count + n  # (B,)
    share, average = n.to(state.mean) / count, average[:, : state.mean.shape[1]]
    return state.mean + share[:, None] * (average - state.mean), count


def _mean_width(c: S4Config) -> int:
    """Tell how many means a state holds for each sequence."""
    return c.d_model if c.pool == "mean" else 0


def _check_like(name: str, value: Tensor, weight: Tensor) -> None:
    """Refuse a tensor of another precision or device than the model's."""
    if (value.dtype, value.device) != (weight.dtype, weight.device):
        wanted = f"{weight.dtype} on {weight.device}"
        raise TypeError(
            f"{name}: expected {wanted}, like the model, got {value.dtype} on "
            f"{value.device}"
        )


def _check_model_state(model: "S4Model", state: ModelState, batch: int) -> None:
    """Refuse a state that is not of this model and this batch."""
    if not isinstance(state, ModelState):
        kind = type(state).__name__
        raise TypeError(
            "state: expected a ModelState, such as "
            f"model.initial_state(batch), got {kind}"
        )
    listed = isinstance(state.layers, tuple | list)
    if not listed or len(state.layers) != len(model.stack):
        found = len(state.layers) if listed else type(state.layers).__name__
        raise ValueError(
            f"state.layers: expected {len(model.stack)} tensors, got {found}"
        )
    for block, x in zip(model.stack, state.layers, strict=True):
        _check_state(block.layer, "state.layers", x, batch)
    sizes = {"B": batch, "H": _mean_width(model.config)}
    _check_shape("state.mean", state.mean, "B H", sizes)
    _check_like("state.mean", state.mean, model.decoder.weight)
    _check_integers("state.count", state.count)
    _check_shape("state.count", state.count, "B", sizes)
    if state.count.device != state.mean.device:
        where = state.count.device
        raise TypeError(
            f"state.count: expected a tensor on {state.mean.device}, got {where}"
        )


class S4Model(Savable):
    """Read a sequence with a stack of S4 blocks.

    Args:
        config: its sizes and choices.
        generator: the source of the random initial values.

    Attributes:
        config: what it was made from.
        checkpointing: whether training keeps the input of each block only, and
            computes the rest again in the backward pass. Off at first.

    Raises:
        TypeError: an argument is of a wrong kind.

    Source: Gu et al. 2022a, section 3.4; book/model.md.
    """

    def __init__(self, config: S4Config, generator: Generator | None = None) -> None:
        super().__init__()
        _check_made_from(config, generator)
        self.config, self.checkpointing = config, False
        blocks = [S4Block(config, generator) for _ in range(config.n_layers)]
        self.encoder = _encoder(config, generator)
        self.blocks = nn.ModuleList(blocks)
        H = config.d_model
        self.norm = nn.LayerNorm(H) if config.prenorm else nn.Identity()
        self.decoder = _linear(H, config.d_output, generator)

    @property
    def stack(self) -> list[S4Block]:
        """The blocks, in order."""
        return cast(list[S4Block], list(self.blocks))

    def forward(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """Map whole sequences to outputs, in parallel over time.

        Args:
            u: (B, L, d_input) the input, or (B, L) tokens.
            lengths: (B,) the steps of each sequence that count, integers in
                1 ... L.
            rate: how many steps of the training data one step here spans: 2
                for data of half the sampling frequency.

        Returns:
            (B, d_output), or (B, L, d_output) without pooling, zero after
            lengths.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: a shape or the rate is wrong; or, on the CPU, a length
                or a token is out of range.
        """
        u = self._encode(u, lengths)
        for block in self.stack:
            if self.checkpointing and torch.is_grad_enabled():
                u = _checkpointed(block, u, lengths, rate)
            else:
                u = block(u, lengths, rate)
        return self._decode(self.norm(u), lengths)

    def chunk(
        self,
        u: Tensor,
        state: ModelState,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, ModelState]:
        """Map the next steps to outputs, in parallel, from a carried state.

        Args:
            u: (B, L, d_input) the next L steps, or (B, L) tokens.
            state: of the steps before, or `initial_state(B)`.
            lengths: (B,) the steps of each sequence that count.
            rate: as in `forward`.

        Returns:
            What `forward` would give on all the steps so far: the pooled
            output (B, d_output), or the outputs (B, L, d_output) of these
            steps; and the state after the last step that counts. As with
            `step`, the model must be in evaluation mode for that.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: as in `forward`; or the state is not of this model and
                batch, or the model is bidirectional.
        """
        u, layers = self._encode(u, lengths), []
        _check_model_state(self, state, u.shape[0])
        for block, x in zip(self.stack, state.layers, strict=True):
            u, x = block.chunk(u, x, lengths, rate)
            layers.append(x)
        u = self.norm(u)
        n = torch.full_like(state.count, u.shape[1]) if lengths is None else lengths
        mean, count = _add_to_mean(state, pool_steps(u, "mean", lengths), n)
        y = self._decode(u, lengths, mean)
        return y, ModelState(tuple(layers), mean, count)

    def step(
        self, u: Tensor, state: ModelState, rate: float = 1.0
    ) -> tuple[Tensor, ModelState]:
        """Take one step: u (B, d_input) to the output so far, and a state.

        Tokens are of shape (B,). In evaluation mode (`model.eval()`) the last
        output is that of `forward`; in training mode dropout draws anew at
        each step.
        """
        takes = [partial(block.layer.step, rate=rate) for block in self.stack]
        return self.step_with(takes, u, state)

    def step_with(
        self, takes: Sequence[Callable], u: Tensor, state: ModelState
    ) -> tuple[Tensor, ModelState]:
        """Take one step; takes are the ways to step each layer."""
        self.check_input(u, axes="B")
        _check_model_state(self, state, u.shape[0])
        u, layers = self.encoder(u), []
        for block, take, x in zip(self.stack, takes, state.layers, strict=True):
            u, x = block.around_step(take, u, x)
            layers.append(x)
        u = self.norm(u)
        mean, count = _add_to_mean(state, u, torch.ones_like(state.count))
        y = self.decoder(mean if self.config.pool == "mean" else u)
        return y, ModelState(tuple(layers), mean, count)

    def stepper(self, rate: float = 1.0) -> "ModelStepper":
        """Return the step as the model is now, prepared for many steps."""
        return ModelStepper(self, rate)

    def initial_state(self, batch: int) -> ModelState:
        """Return the state of a fresh start for a batch of sequences."""
        layers = [block.layer.initial_state(batch) for block in self.stack]
        mean = self.decoder.weight.new_zeros(batch, _mean_width(self.config))
        count = torch.zeros(batch, dtype=torch.int64, device=mean.device)
        return ModelState(tuple(layers), mean, count)

    def check_input(
        self,
        u: Tensor,
        lengths: Tensor | None = None,
        name: str = "u",
        axes: str = "B L",
    ) -> None:
        """Refuse input of another shape or kind than the model reads."""
        c, weight = self.config, self.encoder.weight
        if isinstance(u, Tensor):
            check_dense(name, u)
            if u.device != weight.device:
                on = weight.device
                raise ValueError(f"{name}: expected a tensor on {on}, got {u.device}")
            if u.ndim > 1:
                _check_lengths(lengths, u)
        if c.tokens:
            _check_tokens(name, u, lengths, axes, c.d_input)
        else:
            _check_vectors(name, u, axes, c, weight.dtype)

    def _encode(self, u: Tensor, lengths: Tensor | None) -> Tensor:
        """Examine the input, clear its padding, map it to the channels."""
        self.check_input(u, lengths)
        return self.encoder(clear_padding(u, lengths))

    def _decode(self, u, lengths, mean=None):
        """Map features (B, L, H) to outputs; the mean may be known."""
        pool = self.config.pool
        if pool == "none":
            return clear_padding(self.decoder(u), lengths)
        known = pool == "mean" and mean is not None
        return self.decoder(mean if known else pool_steps(u, pool, lengths))

    def arguments(self) -> dict:
        """Return the configuration as plain values.

        Raises:
            ValueError: a layer has been put in that the configuration does
                not describe, such as one from S4Layer.from_system.
        """
        told = self.config.measure, self.config.method
        for i, block in enumerate(self.stack):
            found = block.layer.measure, block.layer.method
            if found != told:
                raise ValueError(
                    f"blocks.{i}.layer: expected measure, method = {told} as the "
                    f"configuration says, got {found}"
                )
        return self.config.to_dict()

    @classmethod
    def shapes(cls, arguments: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Tell the name and shape of each tensor of such a model."""
        return model_shapes(S4Config.from_dict(arguments))

    @classmethod
    def blank(cls, arguments: dict) -> Self:
        """Make a model whose tensors will be replaced."""
        config = S4Config.from_dict(arguments)
        model = cls(config.replace(d_state=2), Generator())  # cheap to begin
        model.config = config
        for block in model.stack:
            block.layer.d_state = config.d_state
        return model


def _norm_shapes(kind: str, H: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tell the tensors of a norm."""
    names = ["weight", "bias"]
    names += ["running_mean", "running_var"] if kind == "batch" else []
    yield from ((name, (H,)) for name in names)
    if kind == "batch":
        yield "num_batches_tracked", ()


def model_shapes(c: S4Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tell the name and shape of each tensor of a model, one by one.

    Args:
        c: the model's configuration.

    Returns:
        An iterator of (name, shape), as in the model's state_dict.

    Source: book/model.md.
    """
    H = c.d_model
    if c.tokens:
        yield "encoder.weight", (c.d_input, H)
    else:
        yield "encoder.weight", (H, c.d_input)
        yield "encoder.bias", (H,)
    for i in range(c.n_layers):
        layer = layer_shapes(H, c.d_state, c.measure, c.bidirectional, c.tied)
        for name, shape in layer.items():
            yield f"blocks.{i}.layer.{name}", shape
        for name, shape in _norm_shapes(c.norm, H):
            yield f"blocks.{i}.norm.norm.{name}", shape
        yield f"blocks.{i}.mix.weight", (2 * H, H)
        yield f"blocks.{i}.mix.bias", (2 * H,)
    if c.prenorm:
        yield from ((f"norm.{name}", shape) for name, shape in _norm_shapes("layer", H))
    yield "decoder.weight", (c.d_output, H)
    yield "decoder.bias", (c.d_output,)


@contextmanager
def _averages_rest(norm: nn.Module) -> Iterator[None]:
    """Keep the running averages of a batch norm as they are."""
    if not isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm):
        yield
        return
    momentum, norm.momentum = norm.momentum, 0.0
    try:
        yield
    finally:
        norm.momentum = momentum


def _checkpointed(block: S4Block, u, lengths, rate) -> Tensor:
    """Run a block so that its backward pass runs it once more."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _averages_rest(block.norm.norm)

    return checkpoint(block, u, lengths, rate, use_reentrant=False, context_fn=contexts)


class ModelStepper(nn.Module):
    """One step of a model as it was when this was made.

    Made by S4Model.stepper(); in evaluation mode, without gradients of the
    systems. Later changes of the model have no effect on it.

    Args:
        model: what to step.
        rate: as in S4Model.forward.

    Raises:
        ValueError: the model is bidirectional, or the rate is wrong.

    Source: book/model.md.
    """

    def __init__(self, model: S4Model, rate: float = 1.0) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        steppers = (block.layer.stepper(rate) for block in self.model.stack)
        self.steppers = nn.ModuleList(steppers)
        self.eval()

    def forward(self, u: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """Take one step, as S4Model.step does.

        Args:
            u: (B, d_input), or tokens (B,).
            state: a ModelState of the same batch.

        Returns:
            The output so far, and the next state.

        Raises:
            TypeError: u has not the dtype of the model.
            ValueError: u or the state is of another shape or batch.
        """
        return self.model.step_with(list(self.steppers), u, state)


def parameter_groups(
    model: nn.Module,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    ssm_lr: float = 1e-3,
) -> list[dict]:
    """Sort parameters into three groups for an optimiser such as AdamW.

    Args:
        model: any module with S4 layers in it.
        lr: learning rate of all but the state space parameters, > 0.
        weight_decay: decay of the weights of linear maps, >= 0.
        ssm_lr: learning rate of the parameters of the dynamics, > 0.

    Returns:
        A list of dicts with "name", "params", "lr" and "weight_decay".

    Raises:
        TypeError: model is not a module, or a rate not a number.
        ValueError: a rate is not above zero, or weight_decay is below it.

    Source: Gu et al. 2022 (official S4 code); book/model.md.
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model: expected a torch.nn.Module, got {kind}")
    check_positive("lr", lr)
    check_positive("ssm_lr", ssm_lr)
    check_number("weight_decay", weight_decay)
    groups: dict[str, dict] = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "vectors": {"params": [], "lr": lr, "weight_decay": 0.0},
        "dynamics": {"params": [], "lr": ssm_lr, "weight_decay": 0.0},
    }
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:  # one that is shared counts once
                seen.add(id(parameter))
                kind = _group(module, name, parameter)
                groups[kind]["params"].append(parameter)
    return [{"name": k, **g} for k, g in groups.items() if g["params"]]


def _group(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Name the group that a parameter of a module belongs to."""
    if isinstance(module, S4Layer):
        return "vectors" if name in ("C", "D") else "dynamics"
    return "vectors" if parameter.ndim < 2 else "weights"


def descend(
    model: nn.Module,
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> float:
    """Take one step down a loss, along its gradient clipped to norm one.

    Args:
        model: whose parameters are moved.
        loss: a number that was computed by it.
        optimizer: of these parameters.
        schedule: of the learning rates, moved on by a step.

    Returns:
        The loss, before the step.

    Source: book/model.md.
    """
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if schedule is not None:
        schedule.step()
    return loss.item()
