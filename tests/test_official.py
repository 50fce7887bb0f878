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
        assert close(OfficialBlock(state, config)(u), y)
        return
    layer = from_official(state, config)
    assert close(layer(u, return_state=False), y)
    if layer.bidirectional:
        return
    x, pieces = None, []
    for piece in u.split([1, 7, 30, u.shape[1] - 38], 1):
        found, x = layer(piece, x)
        pieces.append(found)
    assert close(torch.cat(pieces, 1), y)
    x, rows, step = layer.initial_state(len(u)), [], layer.stepper()
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
        assert close(second, first, 1e-9)


def test_single_precision_is_a_choice():
    state, config, u, y = read(FILES[[f.stem for f in FILES].index("legs")])
    layer = from_official(state, config, dtype=torch.float32)
    assert layer.D.dtype == torch.float32
    assert close(layer(u.float(), return_state=False).double(), y, 1e-4)


def test_what_is_not_an_official_layer_is_refused():
    state, config, *_ = read(FILES[[f.stem for f in FILES].index("legs")])
    with pytest.raises(ValueError, match=r"without kernel\.C"):
        from_official({k: v for k, v in state.items() if k != "kernel.C"}, config)
    with pytest.raises(ValueError, match="official S4 layer"):
        from_official(S4Layer(4, 8).state_dict())
    with pytest.raises(ValueError, match=r"kernel\.B of shape"):
        from_official(state | {"kernel.B": state["kernel.B"][:, :2]}, config)
    with pytest.raises(ValueError, match="bidirectional"):
        from_official(state, config | {"bidirectional": True})
    wrong = {"gate": 2, "bottleneck": 2, "channels": 2, "dt_fast": True, "is_real": True}
    wrong |= {"disc": "dss", "real_transform": "cube", "mode": "conv"}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected"):
            from_official(state, config | {name: value})
    with pytest.raises(ValueError, match="l_max"):
        to_official(S4Layer(2, 4), 0)
    with pytest.raises(ValueError, match="final_act"):
        OfficialBlock(state, config | {"activation": "gelu", "final_act": None})
    with pytest.raises(ValueError, match=r"output_linear\.0\.weight"):
        OfficialBlock({f"layer.{k}": v for k, v in state.items()}, config | {"activation": "gelu"})
