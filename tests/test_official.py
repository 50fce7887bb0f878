"""Layers and blocks trained by the official code: the same outputs, in every mode."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from s4mini.layer import S4Layer
from s4mini.official import OfficialBlock, from_official, to_official

FILES = sorted((Path(__file__).parent / "official").glob("*.safetensors"))


def read(path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return state, config, tensors["u"], tensors["y"]


def close(found, wanted, tolerance=1e-10):
    return (found - wanted).abs().max() < tolerance * wanted.abs().max()


def test_there_are_ten():
    assert len(FILES) == 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_official_outputs(path):
    state, config, u, y = read(path)
    if path.stem.startswith("block"):
        block = OfficialBlock(state, config)
        layer, whole, chunk = block.layer, block, block.chunk
    else:
        layer = chunk = from_official(state, config)
        whole, block = (lambda u: layer(u, return_state=False)), None
    assert close(whole(u), y)
    if layer.bidirectional:
        return
    step = block.step if block else layer.stepper()
    x, pieces = None, []
    for piece in u.split([1, 7, 30, u.shape[1] - 38], 1):
        found, x = chunk(piece, x)
        pieces.append(found)
    assert close(torch.cat(pieces, 1), y)
    x, rows = layer.initial_state(len(u)), []
    for u_t in u.unbind(1):
        found, x = step(u_t, x)
        rows.append(found)
    assert close(torch.stack(rows, 1), y)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_there_and_back(path):
    state, config, u, _ = read(path)
    layer = from_official(state, config)
    plain = {"mode": "s4d", "disc": layer.method} if layer.P is None else {}
    plain["bidirectional"] = layer.bidirectional
    for l_max in (None, u.shape[1]):
        again = from_official(to_official(layer, l_max), plain)
        first, second = (net(u, return_state=False) for net in (layer, again))
        assert close(second, first)


def test_single_precision_is_a_choice():
    state, config, u, y = read(FILES[[f.stem for f in FILES].index("legs")])
    layer = from_official(state, config, dtype=torch.float32)
    assert layer.D.dtype == torch.float32
    assert close(layer(u.float(), return_state=False).double(), y, 1e-4)


STATE, CONFIG, *_ = read(FILES[[f.stem for f in FILES].index("legs")])
DIAGONAL, *_ = read(FILES[[f.stem for f in FILES].index("s4d-inv")])
C, LENGTH = "kernel.C", "kernel.l_kernel"
BAD_STATES = [
    (TypeError, r"state: .* got NoneType", None, {}),
    (ValueError, r"none named kernel\.C\b", {k: v for k, v in STATE.items() if k != C}, {}),
    (ValueError, "official code's version 4", S4Layer(4, 8).state_dict(), {}),
    (ValueError, r"prefixes 'a\.0\.layer\.'", {f"a.0.layer.{k}": v for k, v in STATE.items()}, {}),
    (ValueError, r"kernel\.B of shape", STATE | {"kernel.B": STATE["kernel.B"][:, :2]}, {}),
    (ValueError, r"kernel\.P of shape", STATE | {"kernel.P": STATE["kernel.P"][:, :2]}, {}),
    (ValueError, r"D of two axes", STATE | {"D": STATE["D"][0]}, {}),
    (ValueError, r"finite entries in kernel\.C", STATE | {C: STATE[C] / 0}, {}),
    (TypeError, r"floating-point numbers in kernel\.C", STATE | {C: STATE[C].long()}, {}),
    (TypeError, r"got ndarray", STATE | {"D": STATE["D"].numpy()}, {}),
    (ValueError, r"length in kernel\.l_kernel", STATE | {LENGTH: torch.tensor(-1)}, {}),
    (TypeError, r"integer in kernel\.l_kernel", STATE | {LENGTH: torch.tensor(9.0)}, {}),
    (ValueError, r"^mode: expected 'dplr'", STATE, {"mode": "s4d"}),
    (ValueError, r"mode is 's4d'", DIAGONAL, {}),
    (ValueError, r"^bidirectional", STATE, {"bidirectional": True}),
    (ValueError, r"^dt_transform: .* positive", STATE, {"dt_transform": "none"}),
    (ValueError, r"^real_transform: .* positive", STATE, {"real_transform": "none"}),
    (ValueError, r"^config: .* mean 'bidirectional'", STATE, {"bidirectonal": True}),
    (TypeError, r"^config", STATE, ["mode"]),
]


@pytest.mark.parametrize(("error", "match", "state", "config"), BAD_STATES)
def test_what_is_not_an_official_layer_is_refused(error, match, state, config):
    with pytest.raises(error, match=match):
        from_official(state, config)


def test_what_has_no_counterpart_is_refused():
    wrong = {"gate": 2, "bottleneck": 2, "channels": 2, "dt_fast": True, "is_real": True}
    wrong |= {"disc": "dss", "real_transform": "cube", "mode": "conv"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            from_official(STATE, CONFIG | {name: value})
    with pytest.raises(ValueError, match="l_max"):
        to_official(S4Layer(2, 4), 0)
    with pytest.raises(ValueError, match="final_act"):
        OfficialBlock(STATE, CONFIG | {"activation": "gelu", "final_act": None})
    with pytest.raises(ValueError, match=r"output_linear\.0\.weight"):
        OfficialBlock({f"layer.{k}": v for k, v in STATE.items()}, CONFIG | {"activation": "gelu"})


def test_the_newer_name_of_the_mode():
    one, other = (
        from_official(DIAGONAL, {"disc": "bilinear"} | names)
        for names in ({"mode": "s4d"}, {"mode": None, "kernel": "s4d"})
    )
    assert torch.equal(one.kernel(9), other.kernel(9))
