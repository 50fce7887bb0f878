"""The network.

Layers stacked into blocks, blocks into a model that reads a sequence and answers once,
or at every step, in parallel or one sample at a time.

Tangled from book/model.md.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from s4mini.checks import check_choice, check_int, check_positive, check_tensors
from s4mini.layer import S4Layer, mask_padding

__all__ = ["TiedDropout", "S4Block", "ModelState", "S4Model", "parameter_groups"]


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
        measure: the HiPPO matrix to begin with, "legs".
        bidirectional: whether the layer sees the future too.
        dt_min: the smallest step at initialisation, > 0.
        dt_max: the largest step at initialisation.
        generator: the source of the random initial values.

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
    ) -> None:
        super().__init__()
        _check_share("dropout", dropout)
        self.prenorm = prenorm
        self.layer = S4Layer(
            d_model, d_state, measure, dt_min, dt_max, bidirectional, generator
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
        v = self.norm(u, lengths) if self.prenorm else u
        v, state = self.layer(v, state, lengths, rate)
        u = u + self._pointwise(v)
        return u if self.prenorm else self.norm(u, lengths), state

    def step(
        self, u: Tensor, state: Tensor, rate: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take one step: u (B, H) and a state to y (B, H) and a state."""
        v = self.norm(u) if self.prenorm else u
        v, state = self.layer.step(v, state, rate)
        u = u + self._pointwise(v)
        return u if self.prenorm else self.norm(u), state

    def _pointwise(self, v: Tensor) -> Tensor:
        """Return what follows the layer, before the residual is added."""
        v = self.dropout(F.gelu(v))
        return self.dropout(F.glu(self.mix(v), dim=-1))


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
    """What a model remembers between two steps.

    Attributes:
        layers: the state of each layer, complex (B, H, N/2).
        mean: (B, H) the mean of the features so far, for pool "mean".
        count: the number of steps so far.

    Source: book/model.md.
    """

    layers: tuple[Tensor, ...]
    mean: Tensor
    count: int


class S4Model(nn.Module):
    """Read a sequence with a stack of S4 blocks.

    Args:
        d_input: features of the input at each step.
        d_output: outputs, for the whole sequence or for each step.
        d_model: the number H of channels inside.
        n_layers: the number of blocks.
        d_state: the state size N of each channel, even.
        measure: the HiPPO matrix to begin with, "legs".
        dropout: the share of channels silenced in training, in [0, 1).
        norm: "layer" or "batch".
        prenorm: whether each block's norm comes first instead of last.
        bidirectional: whether the layers see the future too.
        dt_min: the smallest step at initialisation, > 0.
        dt_max: the largest step at initialisation.
        pool: "mean" or "last" for one output, "none" for one at each step.
        generator: the source of the random initial values.

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
    ) -> None:
        super().__init__()
        check_choice("pool", pool, ("mean", "last", "none"))
        self.d_input, self.pool = check_int("d_input", d_input), pool
        d_output = check_int("d_output", d_output)
        H = check_int("d_model", d_model)
        blocks = [
            S4Block(
                H,
                d_state,
                dropout,
                norm,
                prenorm,
                measure,
                bidirectional,
                dt_min,
                dt_max,
                generator,
            )
            for _ in range(check_int("n_layers", n_layers))
        ]
        self.encoder = _linear(d_input, H, generator)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(H) if prenorm else nn.Identity()
        self.decoder = _linear(H, d_output, generator)

    def forward(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """Map sequences to outputs, in parallel over time.

        Args:
            u: (B, L, d_input) the input.
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
        if lengths is not None:
            u = mask_padding(u, lengths)
        u = self._encode(u, "B L")
        for block in self.blocks:
            u, _ = block(u, None, lengths, rate)
        y = self.decoder(_pool(self.norm(u), self.pool, lengths))
        padded = self.pool == "none" and lengths is not None
        return mask_padding(y, lengths) if padded else y

    def _encode(self, u: Tensor, axes: str) -> Tensor:
        """Examine u, and map it to the channels."""
        check_tensors(u=(u, f"real {axes} {self.d_input}"))
        dtype = self.encoder.weight.dtype
        mixed = torch.is_autocast_enabled(u.device.type)
        if u.dtype != dtype and not mixed:
            raise TypeError(f"u: expected {dtype} like the model, got {u.dtype}")
        return self.encoder(u)

    def initial_state(self, batch: int) -> ModelState:
        """Return the state of a fresh start for a batch of sequences."""
        layers = [block.layer.initial_state(batch) for block in self.blocks]
        mean = self.decoder.weight.new_zeros(batch, self.decoder.in_features)
        return ModelState(tuple(layers), mean, 0)

    def step(
        self, u: Tensor, state: ModelState, rate: float = 1.0
    ) -> tuple[Tensor, ModelState]:
        """Take one step: u (B, d_input) to the output so far, and a state.

        In evaluation mode (`model.eval()`) the last output is that of
        `forward`; in training mode dropout draws anew at each step.
        """
        u, layers = self._encode(u, "B"), []
        self._check_state(state, len(u))
        for block, x in zip(self.blocks, state.layers, strict=True):
            u, x = block.step(u, x, rate)
            layers.append(x)
        u, count = self.norm(u), state.count + 1
        mean = state.mean + (u - state.mean) / count
        y = self.decoder(mean if self.pool == "mean" else u)
        return y, ModelState(tuple(layers), mean, count)

    def _check_state(self, state: ModelState, batch: int) -> None:
        """Refuse a state that is not of this model and batch."""
        if not isinstance(state, ModelState):
            kind = type(state).__name__
            raise TypeError(
                "state: expected a ModelState, such as "
                f"model.initial_state(batch), got {kind}"
            )
        given = [tuple(getattr(x, "shape", ())) for x in state.layers]
        layer = self.blocks[0].layer
        shape = (batch, layer.d_model, layer.d_state // 2)
        if given != [shape] * len(self.blocks):
            raise ValueError(
                f"state.layers: expected {len(self.blocks)} of shape {shape}, "
                f"got {given}"
            )
        mean = (state.mean, f"real {batch} {layer.d_model}")
        check_tensors(**{"state.mean": mean})
        check_int("state.count", state.count, minimum=0)


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
