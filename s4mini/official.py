"""Reading official checkpoints.

The official S4 code and this library train different parameters of the same functions.
This page converts one into the other, exactly.

Tangled from book/official.md.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from s4mini.checks import check_choice, check_int, check_number
from s4mini.layer import S4Layer
from s4mini.lowrank import real_form

__all__ = [
    "truncation",
    "times_matrix",
    "TRANSFORMS",
    "DEFAULTS",
    "ONLY",
    "NO_MATTER",
    "official_options",
    "official_tensors",
    "from_official",
    "assemble",
    "to_official",
    "OfficialBlock",
]


def truncation(Lambda: Tensor, P: Tensor, dt: Tensor, L: int) -> Tensor:
    """Return I - A_bar^L of H half spectra, in real coordinates.

    Args:
        Lambda: (H, n) eigenvalues, in 1/time, complex128.
        P: (H, n, r) low-rank factors; r may be 0.
        dt: (H,) steps, in time, float64.
        L: the length.

    Returns:
        (H, 2n, 2n), float64.

    Source: Gu et al. 2022a, algorithm 1, line 1; book/official.md.
    """
    A, *_ = real_form(Lambda, P, Lambda, Lambda)
    half = dt[:, None, None] / 2 * A
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    A_bar = torch.linalg.solve(eye - half, eye + half)
    return eye - torch.linalg.matrix_power(A_bar, L)


def times_matrix(C: Tensor, M: Tensor, inverse: bool = False) -> Tensor:
    """Multiply output vectors by a real matrix, or by its inverse.

    Args:
        C: (..., H, n) half spectra of output vectors, complex.
        M: (H, 2n, 2n) in real coordinates.
        inverse: whether to divide.

    Returns:
        (..., H, n), complex.

    Source: the real form of a half spectrum; book/official.md.
    """
    row = torch.cat((C.real, -C.imag), -1)[..., None]  # (..., H, 2n, 1)
    row = torch.linalg.solve(M.mT, row) if inverse else M.mT @ row
    real, imag = row[..., 0].chunk(2, -1)
    return torch.complex(real, -imag)


#: How the official code makes a positive number of a parameter.
TRANSFORMS = {
    "none": lambda v: v,
    "exp": torch.exp,
    "relu": lambda v: v.relu() + 1e-4,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
}
#: Options that change the function, with the official code's own defaults.
DEFAULTS: dict[str, Any] = {
    "mode": "dplr",
    "disc": "zoh",
    "dt_transform": "exp",
    "real_transform": "exp",
    "imag_transform": "none",
    "bandlimit": None,
    "bidirectional": False,
    "channels": 1,
    "dt_fast": False,
    "is_real": False,
}
#: Options that this library has no counterpart for, unless they are as here.
ONLY: dict[str, Any] = {
    "channels": 1,
    "dt_fast": False,
    "is_real": False,
    "gate": None,
    "bottleneck": None,
    "gate_act": None,
    "mult_act": None,
    "postact": None,
    "weight_norm": False,
    "swap_channels": False,
}
#: Options that do not change the function of the trained layer.
NO_MATTER = (
    "d_model d_state l_max n_ssm rank init measure deterministic dt_min dt_max "
    "dt_tie lr wd verbose backend transposed dropout tie_dropout drop_kernel "
    "initializer activation final_act kernel real_random real_scale imag_random "
    "imag_scale B_random B_init B_scale P_scale normalize"
).split()


def official_options(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Complete the options of an official layer; refuse those it cannot have.

    Args:
        config: the arguments that the official constructor was given; those
            that do not change a trained layer's function are passed over.

    Returns:
        The options that matter, completed.

    Raises:
        TypeError: config is not a mapping.
        ValueError: an option has no counterpart, or an unknown name or value.

    Source: official code, models/s4/s4.py; book/official.md.
    """
    if not isinstance(config, Mapping | None):
        kind = type(config).__name__
        raise TypeError(f"config: expected options by name, or None, got {kind}")
    for name in config or {}:
        check_choice("config", name, sorted({*DEFAULTS, *ONLY, *NO_MATTER}))
    options = DEFAULTS | dict(config or {})
    options["mode"] = options["mode"] or options.get("kernel")  # its newer name
    if options["bandlimit"] is not None:
        check_number("bandlimit", options["bandlimit"])
    for name, only in ONLY.items():
        found = options.get(name, only)
        if type(found) is not type(only) or found != only:
            raise ValueError(
                f"{name}: expected {only!r}, the only value that can be "
                f"represented here, got {found!r}"
            )
    choices = {
        "mode": ("dplr", "nplr", "s4", "s4d", "diag"),
        "disc": ("zoh", "bilinear"),
        "dt_transform": tuple(TRANSFORMS),
        "real_transform": tuple(TRANSFORMS),
        "imag_transform": tuple(TRANSFORMS),
        "bidirectional": (False, True),
    }
    for name, allowed in choices.items():
        check_choice(name, options[name], allowed)
    return options


def _cpu_tensor(key: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor of a state dict, on the CPU."""
    value = state[key]
    if not isinstance(value, Tensor) or value.is_meta:
        kind = "device meta" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"state: expected a tensor with values {key}, got {kind}")
    if value.is_floating_point() == (whole := key.endswith("l_kernel")):
        kind = "an integer" if whole else "floating-point numbers"
        raise TypeError(f"state: expected {kind} in {key}, got {value.dtype}")
    if not value.isfinite().all():
        raise ValueError(f"state: expected finite entries in {key}, got NaN or inf")
    return value.detach().cpu()


def _refuse_keys(state: Mapping[str, Tensor], absent: list[str]) -> None:
    """Say what a state dict lacks, and where it might be."""
    message = (
        "state: expected the tensors of an S4 layer of the official code's "
        f"version 4, got none named {', '.join(absent)}"
    )
    found = [k for k in map(str, state) if k.endswith("kernel.inv_dt")]
    inside = [k.removesuffix("kernel.inv_dt") for k in found]
    if inside and not {"", "layer."} & {*inside}:
        listed = ", ".join(map(repr, inside[:4]))
        message += f"; give the part under one of the prefixes {listed}, without it"
    elif {key.rpartition(".")[2] for key in absent} == {"P", "l_kernel"}:
        message += "; a diagonal layer's mode is 's4d'"
    else:
        message += f" among {', '.join(sorted(map(str, state))[:12]) or 'none'}"
    raise ValueError(message)


def official_tensors(state: Mapping[str, Tensor], diagonal: bool) -> dict[str, Tensor]:
    """Pick the tensors of an official layer, in double precision.

    Args:
        state: the state dict of an official FFTConv, or of an S4Block.
        diagonal: whether the layer is S4D, without a low-rank term.

    Returns:
        Their values by name, without prefixes.

    Raises:
        TypeError: state is not a mapping, or a value not a tensor with values.
        ValueError: a tensor is missing, has a shape that does not fit or an
            entry that is not finite; or a diagonal layer has a low-rank term.

    Source: official code, models/s4/s4.py; book/official.md.
    """
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise TypeError(f"state: expected a state dict of tensors, got {kind}")
    prefix = "layer." if "layer.D" in state else ""
    wanted = ["inv_dt", "A_real", "A_imag", "B", "C"]
    wanted += [] if diagonal else ["P", "l_kernel"]
    keys = {"D": "D"} | {name: f"kernel.{name}" for name in wanted}
    absent = [prefix + key for key in keys.values() if prefix + key not in state]
    if absent:
        _refuse_keys(state, absent)
    if diagonal and prefix + "kernel.P" in state:
        raise ValueError(
            "mode: expected 'dplr' for a layer with kernel.P, got a diagonal one"
        )
    found = {name: _cpu_tensor(prefix + key, state) for name, key in keys.items()}
    _check_shapes(found, keys)
    return {k: v if k == "l_kernel" else v.double() for k, v in found.items()}


def _check_shapes(found: dict[str, Tensor], keys: dict[str, str]) -> None:
    """Compare the shapes of an official layer's tensors with one another."""
    for name in ("D", "A_real"):
        if found[name].ndim != 2:
            shape = tuple(found[name].shape)
            raise ValueError(f"state: expected {keys[name]} of two axes, got {shape}")
    (H,), (S, n) = found["D"].shape[1:], found["A_real"].shape
    rank = len(found["P"]) if "P" in found and found["P"].ndim else 0
    shapes = {
        "inv_dt": ((H, 1), (H, n)),
        "A_imag": ((S, n),),
        "B": ((1, S, n, 2),),
        "C": ((1, H, n, 2), (2, H, n, 2)),
        "D": ((1, H),),
        "P": ((rank, S, n, 2),),
        "l_kernel": ((),),
    }
    for name, value in found.items():
        allowed = shapes.get(name, (value.shape,))
        if tuple(value.shape) not in allowed:
            raise ValueError(
                f"state: expected {keys[name]} of shape "
                f"{' or '.join(map(str, allowed))}, got {tuple(value.shape)}"
            )
    if H % S:
        raise ValueError(f"state: expected systems that divide {H} channels, got {S}")
    if "l_kernel" in found and (L := found["l_kernel"].item()) not in range(2**31):
        raise ValueError(f"state: expected a length in kernel.l_kernel, got {L}")


def _positive(option: str, options: dict, found: dict, name: str) -> Tensor:
    """Return a parameter as its transform makes it, all entries above zero."""
    value = TRANSFORMS[options[option]](found[name])
    if not (value > 0).all():
        raise ValueError(
            f"{option}: expected one that makes kernel.{name} positive, "
            f"got {options[option]!r}"
        )
    return value


def from_official(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> S4Layer:
    """Make a layer of a state dict of the official code.

    Args:
        state: of an official FFTConv or S4Block.
        config: what its constructor was given; see official_options.
        dtype: of the layer's parameters; double precision keeps all digits.

    Returns:
        A layer with the outputs that the official one has before its
        activation, for sequences (B, L, H) up to its l_max.

    Raises:
        TypeError: state is no state dict, or config not a mapping.
        ValueError: a tensor is missing or of a wrong shape, or an option has
            no counterpart here, or a transform gives a number that is not
            positive where one has to be.

    Source: official code, models/s4/s4.py; book/official.md.
    """
    options = official_options(config)
    diagonal = options["mode"] in ("s4d", "diag")
    found = official_tensors(state, diagonal)
    H, S = found["inv_dt"].shape[0], found["A_real"].shape[0]
    if (found["C"].shape[0] == 2) != options["bidirectional"]:
        raise ValueError(
            f"bidirectional: got {options['bidirectional']}, but kernel.C has "
            f"{found['C'].shape[0]} output vectors a channel"
        )
    complex_ = {k: torch.view_as_complex(found[k]) for k in ("B", "C")}
    steps = _positive("dt_transform", options, found, "inv_dt")  # (H, 1) or (H, n)
    decay = _positive("real_transform", options, found, "A_real")
    turn = TRANSFORMS[options["imag_transform"]](found["A_imag"])
    Lambda = -torch.complex(decay, turn).repeat(H // S, 1)  # h uses system h mod S
    dt, ratio = steps[:, 0], steps / steps[:, :1]
    root = ratio.sqrt()
    B = complex_["B"][0].repeat(H // S, 1) * root
    P = torch.zeros(H, Lambda.shape[1], 0, dtype=Lambda.dtype)
    if not diagonal:
        P = torch.view_as_complex(found["P"]).movedim(0, -1)  # (S, n, r)
        P = P.repeat(H // S, 1, 1) * root[..., None]
    C = complex_["C"] * root
    if options["bandlimit"] is not None:
        turns = steps * Lambda.imag.abs() / (2 * torch.pi)  # a sample
        C = C * (turns < options["bandlimit"] / 2)
    Lambda = Lambda * ratio
    if not diagonal and (L := int(found["l_kernel"])):
        C = times_matrix(C, truncation(Lambda, P, dt, L), inverse=True)
    return assemble(
        Lambda,
        None if diagonal else P,
        B,
        C,
        found["D"][0],
        dt,
        options["disc"] if diagonal else "bilinear",
        dtype,
    )


def assemble(
    Lambda: Tensor,
    P: Tensor | None,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt: Tensor,
    method: str,
    dtype: torch.dtype,
) -> S4Layer:
    """Make a layer with these systems, one for each channel.

    Args:
        Lambda: (H, n) eigenvalues, real parts < 0, in 1/time.
        P: (H, n, r) low-rank factors, or None.
        B: (H, n) input vectors.
        C: (1, H, n) output vectors, or (2, H, n) of past and future.
        D: (H,) direct paths.
        dt: (H,) steps, in time.
        method: "bilinear" or "zoh".
        dtype: of the parameters.

    Source: book/layer.md; book/official.md.
    """
    layer = S4Layer.from_system(
        Lambda,
        P,
        B,
        len(D),
        bidirectional=len(C) == 2,
        method=method,
        dtype=dtype,
        generator=Generator(),  # what it draws is replaced below
    )
    with torch.no_grad():
        layer.log_dt.copy_(dt.log())
        layer.log_decay.copy_((-Lambda.real).log())
        layer.C.copy_(torch.view_as_real(C if len(C) == 2 else C[0]))
        layer.D.copy_(D)
    return layer


def to_official(layer: S4Layer, l_max: int | None = None) -> dict[str, Tensor]:
    """Write a layer as a state dict of the official FFTConv.

    Args:
        layer: any layer; its method must be what the official layer uses.
        l_max: the length of the official kernel; C is stored for None.

    Returns:
        The tensors, for an FFTConv of the same sizes and direction, made with
        default transforms, n_ssm=None, and mode="s4d", disc=layer.method if
        the layer is diagonal. A second direction is a second row of C.

    Raises:
        TypeError: layer is not an S4Layer, or l_max not an integer.
        ValueError: l_max < 1.

    Source: official code, models/s4/s4.py; book/official.md.
    """
    if not isinstance(layer, S4Layer):
        raise TypeError(f"layer: expected an S4Layer, got {type(layer).__name__}")
    if l_max is not None:
        check_int("l_max", l_max)
    with torch.no_grad():
        Lambda, P, B, C, dt = layer.system()
    # The kept half is free: where a frequency is positive, keep its conjugate.
    flip = Lambda.imag > 0
    Lambda, B, C = (torch.where(flip, v.conj(), v) for v in (Lambda, B, C))
    state = {
        "D": layer.D.detach()[None],
        "kernel.inv_dt": dt.log()[:, None],
        "kernel.A_real": (-Lambda.real).log(),
        "kernel.A_imag": -Lambda.imag,
        "kernel.B": torch.view_as_real(B.resolve_conj())[None],
    }
    if P is not None:
        P = torch.where(flip[..., None], P.conj(), P)
        state["kernel.P"] = torch.view_as_real(P.movedim(-1, 0).contiguous())
        state["kernel.l_kernel"] = torch.tensor(l_max or 0)
        if l_max:
            wide = Lambda.to(torch.complex128), P.to(torch.complex128)
            M = truncation(*wide, dt.double(), l_max)
            C = times_matrix(C.to(torch.complex128), M).to(C.dtype)
    C = C if C.ndim == 3 else C[None]
    state["kernel.C"] = torch.view_as_real(C.resolve_conj())
    return {name: value.clone() for name, value in state.items()}


class OfficialBlock(nn.Module):
    """Do what the official S4Block does in evaluation.

    Args:
        state: its state dict.
        config: what its constructor was given.
        dtype: of the parameters.

    Raises:
        ValueError: as from_official; or the activations are not the
            defaults, GELU and a gated linear unit.

    Source: official code, models/s4/s4.py; book/official.md.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.layer = from_official(state, config, dtype=dtype)
        options = dict(config or {})
        for name, only in (("activation", "gelu"), ("final_act", "glu")):
            if options.get(name, only) != only:
                raise ValueError(f"{name}: expected {only!r}, got {options[name]!r}")
        H = self.layer.d_model
        self.output_linear = nn.Linear(H, 2 * H, dtype=dtype)
        for name in ("weight", "bias"):
            key, own = f"output_linear.0.{name}", getattr(self.output_linear, name)
            got = _cpu_tensor(key, state) if key in state else torch.empty(0)
            if got.shape != own.shape:
                found = tuple(got.shape) if key in state else "none"
                expected = f"{key} of shape {tuple(own.shape)}"
                raise ValueError(f"state: expected {expected}, got {found}")
            own.data.copy_(got)

    def after(self, y: Tensor) -> Tensor:
        """Return what follows the layer: activation, linear map and gate."""
        return F.glu(self.output_linear(F.gelu(y)), -1)

    def forward(self, u: Tensor) -> Tensor:
        """Return the outputs (B, L, H) of an input (B, L, H)."""
        return self.after(self.layer(u, return_state=False))

    def chunk(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the outputs of the next steps, and the state after them."""
        y, state = self.layer(u, state)
        return self.after(y), state

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step: u (B, H) and a state to y (B, H) and a state."""
        y, state = self.layer.step(u, state)
        return self.after(y), state
