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

from s4mini.checks import check_int, check_number
from s4mini.layer import S4Layer
from s4mini.lowrank import real_form

__all__ = [
    "truncation",
    "times_matrix",
    "TRANSFORMS",
    "DEFAULTS",
    "ONLY",
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
    "kernel": None,
}


def official_options(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Complete the options of an official layer; refuse those it cannot have.

    Args:
        config: the arguments that the official constructor was given; those
            that do not change a trained layer's function are passed over.

    Returns:
        The options that matter, completed.

    Raises:
        TypeError: config is not a mapping.
        ValueError: an option has no counterpart, or an unknown value.

    Source: official code, models/s4/s4.py; book/official.md.
    """
    if not isinstance(config, Mapping | None):
        kind = type(config).__name__
        raise TypeError(f"config: expected options by name, or None, got {kind}")
    options = DEFAULTS | dict(config or {})
    if options["bandlimit"] is not None:
        check_number("bandlimit", options["bandlimit"])
    for name, only in ONLY.items():
        if options.get(name, only) != only:
            raise ValueError(
                f"{name}: expected {only!r}, the only value that can be "
                f"represented here, got {options[name]!r}"
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
        if options[name] not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}: expected one of {listed}; got {options[name]!r}")
    return options


def _cpu_tensor(key: str, state: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor of a state dict, on the CPU."""
    value = state[key]
    if not isinstance(value, Tensor) or value.is_meta:
        kind = "device meta" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"state: expected a tensor with values {key}, got {kind}")
    return value.detach().cpu()


def official_tensors(state: Mapping[str, Tensor], diagonal: bool) -> dict[str, Tensor]:
    """Pick the tensors of an official layer, in double precision.

    Args:
        state: the state dict of an official FFTConv, or of an S4Block.
        diagonal: whether the layer is S4D, without a low-rank term.

    Returns:
        Their values by name, without prefixes.

    Raises:
        TypeError: state is not a mapping, or a value not a tensor with values.
        ValueError: a tensor is missing, or has a shape that does not fit.

    Source: official code, models/s4/s4.py; book/official.md.
    """
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise TypeError(f"state: expected a state dict of tensors, got {kind}")
    prefix = "layer." if "layer.D" in state else ""
    wanted = ["inv_dt", "A_real", "A_imag", "B", "C"]
    keys = {"D": "D"} | {name: f"kernel.{name}" for name in wanted}
    if not diagonal:
        keys |= {"P": "kernel.P", "l_kernel": "kernel.l_kernel"}
    absent = [prefix + key for key in keys.values() if prefix + key not in state]
    if absent:
        raise ValueError(
            f"state: expected the tensors of an official S4 layer, without "
            f"{', '.join(absent)}; got {', '.join(sorted(state)[:12]) or 'none'}"
        )
    found = {name: _cpu_tensor(prefix + key, state) for name, key in keys.items()}
    for name in ("D", "A_real"):
        if found[name].ndim != 2:
            shape = tuple(found[name].shape)
            raise ValueError(f"state: expected {keys[name]} of two axes, got {shape}")
    (H,), (S, n) = found["D"].shape[1:], found["A_real"].shape
    shapes = {
        "inv_dt": ((H, 1), (H, n)),
        "A_imag": ((S, n),),
        "B": ((1, S, n, 2),),
        "C": ((1, H, n, 2), (2, H, n, 2)),
        "D": ((1, H),),
    }
    for name, allowed in shapes.items():
        if tuple(found[name].shape) not in allowed:
            raise ValueError(
                f"state: expected {keys[name]} of shape "
                f"{' or '.join(map(str, allowed))}, got {tuple(found[name].shape)}"
            )
    if H % S:
        raise ValueError(f"state: expected systems that divide {H} channels, got {S}")
    return {k: v if k == "l_kernel" else v.double() for k, v in found.items()}


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
        A layer with the same outputs, for sequences up to the official
        layer's l_max.

    Raises:
        TypeError: state is no state dict, or config not a mapping.
        ValueError: a tensor is missing or of a wrong shape, or an option has
            no counterpart here.

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
    steps = TRANSFORMS[options["dt_transform"]](found["inv_dt"])  # (H, 1) or (H, n)
    Lambda = -torch.complex(
        TRANSFORMS[options["real_transform"]](found["A_real"]),
        TRANSFORMS[options["imag_transform"]](found["A_imag"]),
    ).repeat(H // S, 1)  # channel h uses system h mod S
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
        The tensors, for an FFTConv made with n_ssm = H and default transforms.

    Raises:
        TypeError: layer is not an S4Layer, or l_max not an integer.
        ValueError: a frequency is above zero where the official code stores
            none, or l_max < 1.

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
        options = dict(config or {})
        for name, only in (("activation", "gelu"), ("final_act", "glu")):
            if options.get(name, only) != only:
                raise ValueError(f"{name}: expected {only!r}, got {options[name]!r}")
        self.layer = from_official(state, config, dtype=dtype)
        H = self.layer.d_model
        self.output_linear = nn.Linear(H, 2 * H, dtype=dtype)
        for name in ("weight", "bias"):
            key, own = f"output_linear.0.{name}", getattr(self.output_linear, name)
            if key not in state or state[key].shape != own.shape:
                got = tuple(state[key].shape) if key in state else "none"
                raise ValueError(f"state: expected {key} {tuple(own.shape)}, got {got}")
            own.data.copy_(state[key])

    def forward(self, u: Tensor) -> Tensor:
        """Return the outputs (B, L, H) of an input (B, L, H)."""
        y = F.gelu(self.layer(u, return_state=False))
        return F.glu(self.output_linear(y), -1)
