"""The network.

Layers stacked into blocks, blocks into a model that reads a sequence and answers once,
or at every step, in parallel, one sample at a time, or in chunks; and three tasks for
it.

Tangled from book/model.md.
"""

import contextlib
import copy
import importlib
import inspect
import io
import json
import math
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from s4mini.checks import check_choice, check_int, check_positive, check_tensors
from s4mini.layer import S4Layer, _check_input, _check_state, mask_padding

__all__ = [
    "TiedDropout",
    "S4Block",
    "ModelState",
    "S4Model",
    "ModelStepper",
    "parameter_groups",
    "S4Classifier",
    "S4Forecaster",
    "S4LanguageModel",
]


def _check_share(name: str, value: float) -> None:
    """Refuse anything but a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a number in [0, 1), got {kind}")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


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
        _check_share("p", p)
        self.p = p

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


class _SequenceNorm(nn.Module):
    """Normalise channels: each step by itself, or over all valid steps."""

    def __init__(self, kind: str, d_model: int) -> None:
        super().__init__()
        check_choice("norm", kind, ("layer", "batch"))
        norms = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        self.kind, self.norm = kind, norms[kind](d_model)

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map u (B, L, H), or one step (B, H), to the same shape."""
        if self.kind == "layer":
            return self.norm(u)
        if lengths is None:
            return self.norm(u.reshape(-1, u.shape[-1])).view(u.shape)
        steps = torch.arange(u.shape[1], device=u.device)
        valid = steps < lengths[:, None]  # (B, L)
        y = self.norm(u[valid])  # (number of valid steps, H)
        out = y.new_zeros(u.shape)
        out[valid] = y
        return out


def _check_generator(generator: Generator | None) -> None:
    """Refuse what is no source of random numbers, such as a seed."""
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            "generator: expected a torch.Generator, such as torch.Generator()"
            f".manual_seed(0), or None, got {type(generator).__name__}"
        )


def _linear(d_in: int, d_out: int, generator: Generator | None) -> nn.Linear:
    """Make a linear map, drawn from the generator."""
    linear = nn.utils.skip_init(nn.Linear, d_in, d_out)
    bound = 1 / math.sqrt(d_in)
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    return linear


class S4Block(nn.Module):
    """Wrap an S4 layer: nonlinearity, mixing of channels, residual, norm.

    Args:
        d_model: the number H of channels.
        d_state: the state size N of each channel, even.
        dropout: the share of channels silenced in training, in [0, 1).
        norm: "layer" or "batch".
        prenorm: whether the norm comes first instead of last.
        measure: the system to begin with, "legs" or another of S4Layer.
        bidirectional: whether the layer sees the future too.
        dt_min: the smallest step at initialisation, > 0.
        dt_max: the largest step at initialisation.
        generator: the source of the random initial values.
        method: how to sample the systems, as in S4Layer.
        tied: whether all channels of a layer share one system but for dt, C
            and D.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is not one of those allowed.

    Source: Gu et al. 2022a, section 3.4; book/model.md.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        dropout: float = 0.0,
        norm: str = "layer",
        prenorm: bool = False,
        measure: str = "legs",
        bidirectional: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        generator: Generator | None = None,
        *,
        method: str | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        _check_share("dropout", dropout)
        _check_generator(generator)
        self.prenorm = prenorm
        self.layer = S4Layer(
            d_model,
            d_state,
            measure,
            dt_min,
            dt_max,
            bidirectional,
            generator,
            method=method,
            tied=tied,
        )
        self.norm = _SequenceNorm(norm, d_model)
        self.dropout = TiedDropout(dropout)
        self.mix = _linear(d_model, 2 * d_model, generator)

    def forward(
        self,
        u: Tensor,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Map u (B, L, H) to the same shape; the rest as in S4Layer."""
        self._examine(u, state, lengths)
        v = self.norm(u, lengths) if self.prenorm else u
        v, state = self.layer(v, state, lengths, rate)
        u = u + self._pointwise(v)
        return u if self.prenorm else self.norm(u, lengths), state

    def step(
        self, u: Tensor, state: Tensor, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one step: u (B, H) and a state to y (B, H) and a state."""
        return self._step(u, state, partial(self.layer.step, rate=rate))

    def _step(self, u, state, take):
        """Take one step; take is how to step the layer."""
        v = self.norm(u) if self.prenorm else u
        v, state = take(v, state)
        u = u + self._pointwise(v)
        return u if self.prenorm else self.norm(u), state

    def _examine(self, u, state, lengths) -> None:
        """Refuse wrong input before the norm's averages have seen it."""
        valid = u if lengths is None else mask_padding(u, lengths)
        _check_input(self.layer, valid, "B L")
        if state is not None:
            _check_state(self.layer, state, len(u))

    def _pointwise(self, v: Tensor) -> Tensor:
        """Return what follows the layer, before the residual is added."""
        v = self.dropout(F.gelu(v))
        return self.dropout(F.glu(self.mix(v), dim=-1))


def _encoder(
    tokens: bool, d_input: int, H: int, generator: Generator | None
) -> nn.Module:
    """Make the map from the input to the channels."""
    check_choice("tokens", tokens, (False, True))
    if not tokens:
        return _linear(d_input, H, generator)
    table = nn.utils.skip_init(nn.Embedding, d_input, H)
    nn.init.normal_(table.weight, generator=generator)
    return table


def _check_tokens(name: str, u: Tensor, axes: str, size: int) -> None:
    """Refuse anything but integers in 0 ... size - 1."""
    if not isinstance(u, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(u).__name__}")
    if u.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected integers, int64 or int32, got {u.dtype}")
    if u.ndim != len(axes.split()) or 0 in u.shape:
        wanted = ", ".join(axes.split())
        raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(u.shape)}")
    low, high = (int(v) for v in u.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected 0 ... {size - 1}, got {low} to {high}")


def _mask(u: Tensor, lengths: Tensor | None) -> Tensor:
    """Set padding to zero, in vectors (B, L, H) or tokens (B, L)."""
    if lengths is None:
        return u
    if isinstance(u, Tensor) and u.ndim == 2:
        return mask_padding(u[..., None], lengths)[..., 0]
    return mask_padding(u, lengths)


def _pool(u: Tensor, pool: str, lengths: Tensor | None) -> Tensor:
    """Pool u (B, L, H), zero after lengths, over time."""
    if pool == "none":
        return u
    if pool == "last":
        last = -1 if lengths is None else lengths - 1
        return u[torch.arange(len(u), device=u.device), last]
    if lengths is None:
        return u.mean(1)
    return mask_padding(u, lengths).sum(1) / lengths[:, None]


class ModelState(NamedTuple):
    """What a model remembers of the steps so far.

    Attributes:
        layers: the state of each layer, complex (B, H, N/2).
        mean: (B, H) the mean of the features so far, for pool "mean".
        count: (B,) int64, the steps so far.

    Source: book/model.md.
    """

    layers: tuple[Tensor, ...]
    mean: Tensor
    count: Tensor


def _add_to_mean(
    state: ModelState, average: Tensor, n: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and count after n (B,) more steps of this average."""
    count = state.count + n  # (B,)
    share = n.to(state.mean) / count
    return state.mean + share[:, None] * (average - state.mean), count


class _Saved(nn.Module):
    """A module that knows the arguments it was made with, its config."""

    config: dict

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and arguments to a folder.

        Args:
            folder: where to; it is made if it is not there, and a model that
                is there already is replaced.

        Raises:
            ModuleNotFoundError: huggingface_hub or safetensors is missing.
            OSError: the folder or a file cannot be written.
            ValueError: the parameters are not all float32 or all float64.
        """
        _save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what save_pretrained has written; no network is asked.

        Args:
            folder: a folder on this machine.

        Returns:
            The model, in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: the folder, or a file in it, is missing.
            ModuleNotFoundError: huggingface_hub or safetensors is missing.
            ValueError: it holds another class, or a file is damaged.
        """
        return _load(cls, Path(folder))


def _arguments(given: dict) -> dict:
    """Return those of __init__'s arguments that a config keeps."""
    left_out = ("self", "__class__", "generator")
    return {k: v for k, v in given.items() if k not in left_out}


class _Network(_Saved):
    """Encoder, blocks and decoder, without the ways to run them."""

    def __init__(self, d_input, d_output, blocks, prenorm, tokens, generator):
        super().__init__()
        self.d_input = check_int("d_input", d_input)
        self.d_output = check_int("d_output", d_output)
        self.tokens, H = tokens, blocks[0].layer.d_model
        self.encoder = _encoder(tokens, d_input, H, generator)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(H) if prenorm else nn.Identity()
        self.decoder = _linear(H, d_output, generator)

    def _encode(self, u: Tensor, axes: str) -> Tensor:
        """Examine u, and map it to the channels."""
        if self.tokens:
            _check_tokens("u", u, axes, self.d_input)
            return self.encoder(u)
        check_tensors(u=(u, f"real {axes} {self.d_input}"))
        dtype = self.encoder.weight.dtype
        mixed = torch.is_autocast_enabled(u.device.type)
        if u.dtype != dtype and not mixed:
            raise TypeError(f"u: expected {dtype} like the model, got {u.dtype}")
        return self.encoder(u)

    def _features(self, u, state, lengths, rate):
        """Return the decoder's input at each step, and the layers' states."""
        u = self._encode(_mask(u, lengths), "B L")
        states = [None] * len(self.blocks)
        if state is not None:
            self._check_state(state, len(u))
            states = list(state.layers)
        for i, block in enumerate(self.blocks):
            u, states[i] = block(u, states[i], lengths, rate)
        return self.norm(u), tuple(states)

    def _check_state(self, state: ModelState, batch: int) -> None:
        """Refuse a state that is not of this model and batch."""
        _check_model_state(state, batch, [b.layer for b in self.blocks])


def _check_model_state(state: ModelState, batch: int, layers: list[S4Layer]) -> None:
    """Refuse a state that is not of these layers and this batch."""
    if not isinstance(state, ModelState):
        kind = type(state).__name__
        raise TypeError(
            "state: expected a ModelState, such as "
            f"model.initial_state(batch), got {kind}"
        )
    given = [tuple(getattr(x, "shape", ())) for x in state.layers]
    shape = (batch, layers[0].d_model, layers[0].d_state // 2)
    if given != [shape] * len(layers):
        raise ValueError(
            f"state.layers: expected {len(layers)} of shape {shape}, got {given}"
        )
    mean = (state.mean, f"real {batch} {layers[0].d_model}")
    check_tensors(**{"state.mean": mean})
    _check_tokens("state.count", state.count, "B", 2**63)
    if len(state.count) != batch:
        raise ValueError(
            f"state.count: expected shape ({batch},), got {tuple(state.count.shape)}"
        )


class S4Model(_Network):
    """Read a sequence with a stack of S4 blocks.

    Args:
        d_input: features of the input at each step, or, with tokens, how many
            different tokens there are.
        d_output: outputs, for the whole sequence or for each step.
        d_model: the number H of channels inside.
        n_layers: the number of blocks.
        d_state: the state size N of each channel, even.
        measure: the system to begin with, "legs" or another of S4Layer.
        dropout: the share of channels silenced in training, in [0, 1).
        norm: "layer" or "batch".
        prenorm: whether each block's norm comes first instead of last.
        bidirectional: whether the layers see the future too.
        dt_min: the smallest step at initialisation, > 0.
        dt_max: the largest step at initialisation.
        pool: "mean" or "last" for one output, "none" for one at each step.
        generator: the source of the random initial values.
        method: how to sample the systems, as in S4Layer.
        tied: whether all channels of a layer share one system but for dt, C
            and D.
        tokens: whether the input is integers 0 ... d_input - 1 of shape
            (B, L) instead of vectors (B, L, d_input).

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is not one of those allowed.

    Source: Gu et al. 2022a, section 3.4; book/model.md.
    """

    def __init__(
        self,
        d_input: int,
        d_output: int,
        d_model: int = 128,
        n_layers: int = 4,
        d_state: int = 64,
        measure: str = "legs",
        dropout: float = 0.1,
        norm: str = "layer",
        prenorm: bool = False,
        bidirectional: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        pool: str = "mean",
        generator: Generator | None = None,
        *,
        method: str | None = None,
        tied: bool = False,
        tokens: bool = False,
    ) -> None:
        config = _arguments(locals())
        check_choice("pool", pool, ("mean", "last", "none"))
        check_int("d_input", d_input)
        blocks = [
            S4Block(
                d_model,
                d_state,
                dropout,
                norm,
                prenorm,
                measure,
                bidirectional,
                dt_min,
                dt_max,
                generator,
                method=method,
                tied=tied,
            )
            for _ in range(check_int("n_layers", n_layers))
        ]
        super().__init__(d_input, d_output, blocks, prenorm, tokens, generator)
        self.pool, self.config = pool, config

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
            ValueError: a shape, a length or the rate is wrong, or an entry
                that counts is not finite.
        """
        u, _ = self._features(u, None, lengths, rate)
        y = self.decoder(_pool(u, self.pool, lengths))
        return _mask(y, lengths) if self.pool == "none" else y

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
        if state is None:
            self._check_state(state, 0)
        u, layers = self._features(u, state, lengths, rate)
        n = lengths
        if n is None:
            n = torch.full_like(state.count, u.shape[1])
        mean, count = _add_to_mean(state, _pool(u, "mean", lengths), n)
        pooled = mean if self.pool == "mean" else _pool(u, self.pool, lengths)
        y = self.decoder(pooled)
        y = _mask(y, lengths) if self.pool == "none" else y
        return y, ModelState(layers, mean, count)

    def step(
        self, u: Tensor, state: ModelState, rate: float = 1.0
    ) -> tuple[Tensor, ModelState]:
        """Take one step: u (B, d_input) to the output so far, and a state.

        Tokens are of shape (B,). In evaluation mode (`model.eval()`) the last
        output is that of `forward`; in training mode dropout draws anew at
        each step.
        """
        u = self._encode(u, "B")
        self._check_state(state, len(u))
        takes = [partial(block.layer.step, rate=rate) for block in self.blocks]
        return self._step(u, state, takes)

    def _step(self, u, state, takes):
        """Take one step; takes are the ways to step each layer."""
        layers = []
        for block, x, take in zip(self.blocks, state.layers, takes, strict=True):
            u, x = block._step(u, x, take)
            layers.append(x)
        u = self.norm(u)
        one = torch.ones_like(state.count)
        mean, count = _add_to_mean(state, u, one)
        y = self.decoder(mean if self.pool == "mean" else u)
        return y, ModelState(tuple(layers), mean, count)

    def stepper(self, rate: float = 1.0) -> "ModelStepper":
        """Return the step as the model is now, prepared for many steps."""
        return ModelStepper(self, rate)

    def initial_state(self, batch: int) -> ModelState:
        """Return the state of a fresh start for a batch of sequences."""
        layers = [block.layer.initial_state(batch) for block in self.blocks]
        mean = self.decoder.weight.new_zeros(batch, self.decoder.in_features)
        count = torch.zeros(batch, dtype=torch.int64, device=mean.device)
        return ModelState(tuple(layers), mean, count)


def _check_shapes(model: S4Model, u: Tensor, state: ModelState) -> None:
    """Examine shapes and dtype of a step, but no values."""
    B = len(state.mean)
    wanted = (B,) if model.tokens else (B, model.d_input)
    if u.shape != wanted:
        raise ValueError(f"u: expected {wanted}, got {tuple(u.shape)}")
    dtype = model.encoder.weight.dtype
    if not model.tokens and u.dtype != dtype:
        raise TypeError(f"u: expected {dtype}, got {u.dtype}")


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
        layers = [block.layer for block in self.model.blocks]
        self.steppers = nn.ModuleList(x.stepper(rate) for x in layers)

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
        _check_shapes(self.model, u, state)
        return self.model._step(self.model.encoder(u), state, self.steppers)


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
    if weight_decay != 0 and not 0 < weight_decay < math.inf:
        raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay}")
    groups = {
        "weights": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "vectors": {"params": [], "lr": lr, "weight_decay": 0.0},
        "dynamics": {"params": [], "lr": ssm_lr, "weight_decay": 0.0},
    }
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            groups[_group(module, name, parameter)]["params"].append(parameter)
    return [{"name": k, **g} for k, g in groups.items() if g["params"]]


def _group(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Name the group that a parameter of a module belongs to."""
    if isinstance(module, S4Layer):
        return "vectors" if name in ("C", "D") else "dynamics"
    return "vectors" if parameter.ndim < 2 else "weights"


class _Task(_Saved):
    """Hold a model, and run it as it runs."""

    def __init__(self, model: S4Model) -> None:
        super().__init__()
        if not isinstance(model, S4Model):
            kind = type(model).__name__
            raise TypeError(f"model: expected an S4Model, got {kind}")
        self.model = model
        self.config = {"model": model.config}

    def initial_state(self, batch: int) -> ModelState:
        """Return the state of a fresh start for a batch of sequences."""
        return self.model.initial_state(batch)


class _ModelTask(_Task):
    """A task whose outputs are the model's outputs."""

    def forward(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """Return the model's outputs; arguments as in S4Model.forward."""
        return self.model(u, lengths, rate)

    def chunk(
        self,
        u: Tensor,
        state: ModelState,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, ModelState]:
        """Run the next steps in parallel, as S4Model.chunk does."""
        return self.model.chunk(u, state, lengths, rate)

    def step(
        self, u: Tensor, state: ModelState, rate: float = 1.0
    ) -> tuple[Tensor, ModelState]:
        """Take one step, as S4Model.step does."""
        return self.model.step(u, state, rate)


class S4Classifier(_ModelTask):
    """Name the class of a sequence. `forward` returns logits (B, K).

    Args:
        model: with one output for each class, pooled.
        classes: the K names, in the order of the outputs: a list or tuple.

    Raises:
        TypeError: model is not an S4Model, or classes no list of names.
        ValueError: the model does not pool, or has not K outputs.

    Source: book/model.md.
    """

    def __init__(self, model: S4Model, classes: list[str] | tuple[str, ...]) -> None:
        super().__init__(model)
        check_choice("model.pool", model.pool, ("mean", "last"))
        listed = isinstance(classes, list | tuple)
        if not listed or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes: expected a list of names, got {classes!r}")
        if len(classes) != model.d_output:
            raise ValueError(
                f"classes: expected {model.d_output} names, one for each "
                f"output of the model, got {len(classes)}"
            )
        self.classes = tuple(classes)
        self.config["classes"] = list(classes)

    @torch.no_grad()
    def predict(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> tuple[list[str], Tensor]:
        """Return the most probable names, and all probabilities (B, K).

        The model's mode counts: in training mode dropout is active.
        """
        probabilities = self(u, lengths, rate).softmax(-1)
        best = probabilities.argmax(-1).tolist()
        return [self.classes[i] for i in best], probabilities


class S4Forecaster(_Task):
    """Forecast the next steps of a signal from the steps so far.

    Args:
        model: with an output at each step: pool "none", no tokens.
        horizon: how many steps are forecast.

    Raises:
        TypeError: model is not an S4Model, or horizon not an integer.
        ValueError: the model pools or reads tokens, or horizon < 1.

    Source: Gu et al. 2022a, section 4.3; book/model.md.
    """

    def __init__(self, model: S4Model, horizon: int) -> None:
        super().__init__(model)
        check_choice("model.pool", model.pool, ("none",))
        check_choice("model.tokens", model.tokens, (False,))
        self.horizon = self.config["horizon"] = check_int("horizon", horizon)

    def forward(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """Map the context u (B, L, d_input) to (B, horizon, d_output).

        With lengths (B,), the forecast begins after each one's last step.
        """
        check_tensors(u=(_mask(u, lengths), "real B L C"))
        if lengths is None:
            u = F.pad(u, (0, 0, 0, self.horizon))
            return self.model(u, None, rate)[:, -self.horizon :]
        u = F.pad(_mask(u, lengths), (0, 0, 0, self.horizon))
        y = self.model(u, lengths + self.horizon, rate)
        after = torch.arange(self.horizon, device=u.device)
        rows = torch.arange(len(u), device=u.device)[:, None]
        return y[rows, lengths[:, None] + after]  # (B, horizon, d_output)

    def observe(
        self,
        u: Tensor,
        state: ModelState,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> ModelState:
        """Return the state after the next steps u (B, L, d_input)."""
        return self.model.chunk(u, state, lengths, rate)[1]

    def forecast(self, state: ModelState, rate: float = 1.0) -> Tensor:
        """Map a state to what follows: (B, horizon, d_output)."""
        batch = len(state.mean) if isinstance(state, ModelState) else 0
        self.model._check_state(state, batch)
        shape = batch, self.horizon, self.model.d_input
        u = self.model.decoder.weight.new_zeros(shape)
        return self.model.chunk(u, state, None, rate)[0]


def _check_sampling(generator: Generator | None, temperature: float) -> None:
    """Refuse a wrong temperature, or a draw without a source."""
    if temperature != 0:
        check_positive("temperature (or 0)", temperature)
        _check_generator(generator)
        if generator is None:
            raise TypeError(
                "generator: expected a torch.Generator to draw from, unless "
                "temperature is 0, got None"
            )


def _draw(logits: Tensor, generator: Generator | None, temperature: float) -> Tensor:
    """Draw a token (B,) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = ((logits - logits.amax(-1, True)) / temperature).softmax(-1)
    p = p.to(generator.device)  # the same draws on every machine
    drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
    return drawn.to(logits.device)


class S4LanguageModel(_ModelTask):
    """Score each token as the next one. `forward` returns logits (B, L, V).

    The logits at a step are about the token of the step after it.

    Args:
        model: causal, of tokens, with an output for each token at each step:
            S4Model(V, V, ..., pool="none", tokens=True).

    Raises:
        TypeError: model is not an S4Model.
        ValueError: the model is of another kind than that.

    Source: Gu et al. 2022a, section 4.3; book/model.md.
    """

    def __init__(self, model: S4Model) -> None:
        super().__init__(model)
        check_choice("model.pool", model.pool, ("none",))
        check_choice("model.tokens", model.tokens, (True,))
        check_choice("model.d_output", model.d_output, (model.d_input,))
        bidirectional = model.blocks[0].layer.bidirectional
        check_choice("model.bidirectional", bidirectional, (False,))

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        steps: int,
        generator: Generator | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Continue sequences of tokens, one step of the recurrence for each.

        Args:
            prompt: (B, L) the tokens so far, at least one.
            steps: how many to add.
            generator: the source of the draws.
            temperature: what the logits are divided by, >= 0; 0 takes the
                likeliest token and draws nothing.

        Returns:
            (B, steps) the tokens that follow. The mode of the model is
            "evaluation" meanwhile, and restored afterwards.

        Raises:
            TypeError: an argument is of a wrong kind, or there is no
                generator to draw from.
            ValueError: steps < 1, temperature < 0, or prompt has another
                shape or unknown tokens.
        """
        steps = check_int("steps", steps)
        _check_sampling(generator, temperature)
        _check_tokens("prompt", prompt, "B L", self.model.d_input)
        training = self.training
        self.eval()
        try:
            return self._generate(prompt, steps, generator, temperature)
        finally:
            self.train(training)

    def _generate(self, prompt, steps, generator, temperature):
        """Read the prompt as one chunk, then draw and step."""
        state, step = self.initial_state(len(prompt)), self.model.stepper()
        logits, state = self.chunk(prompt, state)
        drawn = [_draw(logits[:, -1], generator, temperature)]
        for _ in range(steps - 1):
            logits, state = step(drawn[-1], state)
            drawn.append(_draw(logits, generator, temperature))
        return torch.stack(drawn, 1)


def _optional(name: str):
    """Import what only saving and loading need."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'this needs {name}: pip install "s4mini[train]"', name=name
        ) from error


def _complete(kind: type, config: dict) -> dict:
    """Return a config, if it has all that the class needs and no more."""
    needed = set(inspect.signature(kind).parameters) - {"generator"}
    found = set(config) - {"class", "dtype"}
    for text, names in {"lacks": needed - found, "has": found - needed}.items():
        if names:
            raise ValueError(
                f"config.json: expected the arguments of {kind.__name__}; it "
                f"{text} {sorted(names)[0]!r}"
            )
    return config


@cache
def _hub_class(kind: type[_Saved]) -> type[_Saved]:
    """Return the class with the mixin of the Hugging Face Hub."""
    _optional("safetensors")
    mixin = _optional("huggingface_hub").PyTorchModelHubMixin
    whole = partial(_complete, S4Model)
    coders = {S4Model: (lambda m: m.config, lambda c: S4Model(**whole(c)))}

    class Hub(mixin, kind, library_name="s4mini", coders=coders):
        pass

    return Hub


def _view(module: nn.Module, kind: type) -> nn.Module:
    """Return the same module, tensors and all, as one of another class."""
    view = object.__new__(kind)
    view.__dict__.update(module.__dict__)
    view.__dict__.pop("_hub_mixin_config", None)
    return view


_PRECISIONS = {torch.float32: "float32", torch.float64: "float64"}


def _save(module: _Saved, folder: Path) -> None:
    """Write a module's weights and config to a folder."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(_PRECISIONS):
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"parameters: expected all float32 or all float64, got {found}"
        )
    name = type(module).__name__
    about = {"class": name, "dtype": _PRECISIONS[dtypes.pop()]}
    hub = _hub_class(type(module))
    hub.save_pretrained(_view(module, hub), folder, config=module.config | about)


def _read_config(kind: type[_Saved], folder: Path) -> dict:
    """Return a folder's config if it is complete and of this class."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: not found; from_pretrained reads a folder "
                "that save_pretrained has written"
            )
    try:
        config = dict(json.loads((folder / "config.json").read_text("utf8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: expected JSON: {error}") from error
    found = config.get("class")
    if found != kind.__name__:
        raise ValueError(f"{folder}: expected a saved {kind.__name__}, found {found}")
    check_choice("dtype", config.get("dtype"), [*_PRECISIONS.values()])
    try:
        return _complete(kind, config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _check_kinds(folder: Path, dtype: str) -> None:
    """Refuse weights that are not of the precision that the config states."""
    wanted = {"float32": "F32", "float64": "F64"}[dtype]
    path = folder / "model.safetensors"
    with _optional("safetensors").safe_open(path, "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
    if kinds - {"I64"} != {wanted}:  # counters of batch norm are integers
        raise ValueError(f"{path}: expected {dtype}, got {', '.join(sorted(kinds))}")


def _load(kind: type[_Saved], folder: Path) -> _Saved:
    """Make a module from the folder that _save has written."""
    hub = _hub_class(kind)
    config = _read_config(kind, folder)
    broken = _optional("safetensors").SafetensorError
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, config["dtype"]))
        with (
            torch.random.fork_rng(devices=[]),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            _check_kinds(folder, config["dtype"])
            module = hub.from_pretrained(folder, strict=True)
    except (broken, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: expected a whole {kind.__name__}: {error}"
        ) from error
    finally:
        torch.set_default_dtype(before)
    if not all(p.isfinite().all() for p in module.parameters()):
        raise ValueError(f"{folder}: expected finite weights, got NaN or inf")
    return _view(module, kind)
