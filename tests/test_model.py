"""The network: its configuration, steps, chunks and parallel mode, padding, wrong calls."""

import io
import itertools
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import make_model as make
from helpers import relative, signal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from s4mini.layer import S4Layer
from s4mini.model import (
    S4Block,
    S4Config,
    S4Model,
    TiedDropout,
    model_shapes,
    parameter_groups,
)

CASES = list(itertools.product(("mean", "last", "none"), ("layer", "batch"), (False, True)))


@pytest.mark.parametrize(("pool", "norm", "prenorm"), CASES)
def test_steps_are_forward(pool, norm, prenorm):
    model, u = make(pool=pool, norm=norm, prenorm=prenorm), signal(3, 17, 2)
    state = model.initial_state(3)
    for k in range(17):
        y, state = model.step(u[:, k], state)
        now = model(u[:, : k + 1])
        assert relative(y, now[:, -1] if pool == "none" else now) < 1e-9


@pytest.mark.parametrize(("pool", "norm", "prenorm"), CASES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding(pool, norm, prenorm, bidirectional):
    model = make(pool=pool, norm=norm, prenorm=prenorm, bidirectional=bidirectional)
    u, lengths = signal(3, 12, 2), torch.tensor([12, 1, 8])
    u[1, 1:], u[2, 8:] = float("nan"), 1e9
    y = model(u, lengths)
    for i, n in enumerate(lengths):
        alone = model(u[i : i + 1, :n])[0]
        assert relative(y[i, :n] if pool == "none" else y[i], alone) < 1e-9


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_padding_in_training(norm):
    """Statistics and gradients ignore the padding too."""
    model, lengths = make(norm=norm, dropout=0.0).train(), torch.tensor([12, 5])
    found = []
    for value in (0.0, 1e6):
        u = signal(2, 12, 2)
        u[1, 5:] = value
        model.zero_grad()
        model(u, lengths).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_every_parameter_learns():
    for norm, prenorm, both in itertools.product(("layer", "batch"), (0, 1), (0, 1)):
        model = make(norm=norm, prenorm=bool(prenorm), bidirectional=bool(both)).train()
        model(signal(2, 9, 2)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_tied_dropout():
    torch.manual_seed(0)
    drop, u = TiedDropout(0.3), torch.ones(200, 5, 50)
    y = drop(u)
    assert torch.equal(y, y[:, :1].expand(-1, 5, -1))  # one mask for all steps
    kept = (y[:, 0] != 0).double().mean()
    assert abs(kept - 0.7) < 0.02
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    assert torch.equal(drop.eval()(u), u) and torch.equal(TiedDropout(0.0)(u), u)
    assert drop.train()(u[:, 0]).shape == (200, 50)


def test_block_carries_a_state():
    config = S4Config(d_model=4, d_state=8, dropout=0.0)
    block = S4Block(config, torch.Generator().manual_seed(0)).double()
    u = signal(2, 11, 4)
    a, state = block.chunk(u[:, :4], block.layer.initial_state(2))
    b, state = block.chunk(u[:, 4:], state)
    assert relative(torch.cat((a, b), 1), block(u)) < 1e-10
    for call in (block.chunk, block.step):
        with pytest.raises(TypeError, match=r"^state: .*initial_state"):
            call(u if call == block.chunk else u[:, 0], None)


@pytest.mark.parametrize(("norm", "prenorm"), list(itertools.product(("layer", "batch"), (0, 1))))
def test_outputs_of_a_block_after_the_end_are_zero(norm, prenorm):
    config = S4Config(d_model=4, d_state=8, norm=norm, prenorm=bool(prenorm))
    block, u, lengths = S4Block(config).double(), signal(2, 11, 4), torch.tensor([11, 5])
    u[1, 5:] = math.nan
    for module in (block, block.eval()):
        y = module(u, lengths)
        assert (y[1, 5:] == 0).all() and (y[1, :5] != 0).all() and y.isfinite().all()
        y, _ = module.chunk(u, module.layer.initial_state(2), lengths)
        assert (y[1, 5:] == 0).all() and y.isfinite().all()


def test_state_dict_and_seed():
    model, u = make(seed=1), signal(2, 9, 2)
    assert torch.equal(make(seed=1)(u), model(u))
    other = make(seed=2)
    assert not torch.equal(other(u), model(u))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(u), model(u))


def test_mixed_precision():
    """Autocast keeps the model close to its full precision."""
    model, u = make().float(), signal(2, 30, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(u)
        y_step, _ = model.step(u[:, 0], model.initial_state(2))
    assert relative(y.float(), model(u)) < 0.1
    assert relative(y_step.float(), model(u[:, :1])) < 0.1


def test_rate_reaches_the_layers():
    model, t = make(dt_max=1e-2), torch.arange(600, dtype=torch.float64) / 100
    u = torch.stack((torch.sin(t), torch.cos(t / 2)), -1)[None]
    full = model(u)
    assert relative(model(u[:, ::2], rate=2.0), full) < 0.02


@pytest.mark.parametrize(("norm", "prenorm"), [("layer", False), ("batch", True)])
def test_parameter_groups(norm, prenorm):
    model = make(norm=norm, prenorm=prenorm)
    groups = {g["name"]: g for g in parameter_groups(model, 0.1, 0.2, 0.3)}
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert groups["weights"]["lr"] == 0.1 and groups["weights"]["weight_decay"] == 0.2
    assert groups["vectors"]["lr"] == 0.1 and groups["vectors"]["weight_decay"] == 0
    assert groups["dynamics"]["lr"] == 0.3 and groups["dynamics"]["weight_decay"] == 0
    ids = {name: {id(p) for p in g["params"]} for name, g in groups.items()}
    layer = next(m for m in model.modules() if isinstance(m, S4Layer))
    for name in ("log_dt", "log_decay", "frequency", "P", "B"):
        assert id(getattr(layer, name)) in ids["dynamics"]
    assert id(layer.C) in ids["vectors"] and id(layer.D) in ids["vectors"]
    assert id(model.encoder.weight) in ids["weights"]
    assert id(model.encoder.bias) in ids["vectors"]
    torch.optim.AdamW(parameter_groups(model)).step()


BAD_CONFIG = [
    (ValueError, "d_input", {"d_input": 0}),
    (TypeError, "d_output", {"d_output": None}),
    (TypeError, "d_output", {"d_output": True}),
    (ValueError, "d_model", {"d_model": -1}),
    (TypeError, "d_model", {"d_model": "8"}),
    (ValueError, "n_layers", {"n_layers": 0}),
    (ValueError, "d_state", {"d_state": 3}),
    (ValueError, "measure", {"measure": "x"}),
    (ValueError, "method", {"method": "zoh"}),
    (ValueError, "dropout", {"dropout": 1.0}),
    (ValueError, "dropout", {"dropout": -0.1}),
    (TypeError, "dropout", {"dropout": "0.1"}),
    (TypeError, "dropout", {"dropout": True}),
    (ValueError, "norm", {"norm": "group"}),
    (ValueError, "pool", {"pool": "max"}),
    (TypeError, "prenorm", {"prenorm": "False"}),
    (TypeError, "bidirectional", {"bidirectional": 2}),
    (TypeError, "tied", {"tied": 1}),
    (TypeError, "tokens", {"tokens": "yes"}),
    (ValueError, "dt_min", {"dt_min": 0}),
    (ValueError, "dt_max", {"dt_max": math.inf}),
    (TypeError, "dt_max", {"dt_max": torch.tensor(0.1)}),
    (ValueError, "dt_max", {"dt_min": 0.1, "dt_max": 0.01}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_CONFIG)
def test_bad_config(error, name, changed):
    with pytest.raises(error, match=f"^{name}: expected"):
        S4Config(**changed)
    with pytest.raises(error, match=f"^{name}: expected"):
        S4Config().replace(**changed)


def test_config_keeps_plain_numbers():
    config = S4Config(
        d_model=np.int64(5), dropout=np.float32(0.25), prenorm=np.True_, dt_min=np.float64(1e-3)
    )
    kinds = {name: type(value) for name, value in config.to_dict().items()}
    assert set(kinds.values()) == {int, float, bool, str}
    assert kinds["d_model"] is int and kinds["dropout"] is float and kinds["prenorm"] is bool
    assert S4Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "method='bilinear'" in repr(config) and hash(config) == hash(config.replace())


def test_config_names_unknown_and_missing_keys():
    given = S4Config().to_dict()
    with pytest.raises(ValueError, match="it has 'colour'"):
        S4Config.from_dict(given | {"colour": 1})
    del given["pool"]
    with pytest.raises(ValueError, match="it lacks 'pool'"):
        S4Config.from_dict(given)
    with pytest.raises(TypeError, match=r"^config"):
        S4Config.from_dict([1])
    with pytest.raises(TypeError, match="colour"):
        S4Config().replace(colour=1)
    with pytest.raises(TypeError, match="colour"):
        S4Config(colour=1)


def test_another_measure_has_its_own_method():
    config = S4Config(measure="diag-lin")
    assert config.method == "zoh" and config.replace(measure="legs").method == "bilinear"
    kept = config.replace(measure="diag-inv", method="bilinear")
    assert kept.method == "bilinear" and kept.replace(d_model=3).method == "bilinear"


@pytest.mark.parametrize("kind", [S4Block, S4Model])
def test_made_from_a_configuration_only(kind):
    with pytest.raises(TypeError, match=r"^config: expected an S4Config, got int"):
        kind(2)
    for generator in (0, "seed"):
        with pytest.raises(TypeError, match=r"^generator: .*manual_seed"):
            kind(S4Config(d_model=4), generator)


U = signal(2, 5, 2)
BAD_FORWARD = [
    (TypeError, "u", {"u": None}),
    (TypeError, "u", {"u": U.float()}),
    (ValueError, "u", {"u": U[0]}),
    (ValueError, "u", {"u": U[..., :1]}),
    (ValueError, "lengths", {"lengths": torch.tensor([5, 6])}),
    (TypeError, "lengths", {"lengths": [5, 5]}),
    (ValueError, "rate", {"rate": 0}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_FORWARD)
def test_bad_forward(error, name, changed):
    with pytest.raises(error, match=f"^{name}"):
        make()(**{"u": U} | changed)


def test_bad_other_calls():
    model = make()
    with pytest.raises(TypeError, match=r"^state: .*initial_state"):
        model.step(U[:, 0], None)
    with pytest.raises(ValueError, match=r"^state"):
        model.step(U[:, 0], model.initial_state(3))
    with pytest.raises(ValueError, match=r"^u"):
        model.step(U, model.initial_state(2))
    with pytest.raises(ValueError, match=r"^bidirectional"):
        make(bidirectional=True).initial_state(2)
    with pytest.raises(ValueError, match=r"^p"):
        TiedDropout(1.0)
    with pytest.raises(ValueError, match=r"^lr"):
        parameter_groups(model, lr=0.0)
    with pytest.raises(ValueError, match=r"^weight_decay"):
        parameter_groups(model, weight_decay=-1.0)
    with pytest.raises(TypeError, match=r"^model"):
        parameter_groups(None)


def tiny(generator=None, **options):
    usual = {"d_output": 2, "d_model": 6, "n_layers": 2, "d_state": 8}
    return S4Model(S4Config(**usual | options), generator).eval()


def broken(state):
    yield ValueError, replace(state, layers=state.layers[:1])
    yield ValueError, replace(state, layers=(state.layers[0], state.layers[1][:1]))
    yield ValueError, replace(state, mean=state.mean[:1])
    yield ValueError, replace(state, mean=state.mean[:, :1])
    yield ValueError, replace(state, count=state.count[None])
    yield ValueError, replace(state, count=state.count[:1])
    yield TypeError, replace(state, count=1)
    yield TypeError, replace(state, mean=None)
    yield TypeError, replace(state, mean=state.mean.double())
    yield TypeError, replace(state, mean=state.mean.long())
    yield TypeError, replace(state, mean=state.mean.to("meta"))
    yield TypeError, replace(state, count=state.count.to("meta"))
    yield ValueError, replace(state, layers=None)
    yield TypeError, (state.layers, state.mean, state.count)
    yield TypeError, None


@pytest.mark.parametrize("number", range(15))
def test_a_state_of_another_model_or_batch_is_refused(number):
    model = make(d_input=3, d_output=2, d_model=4).float().eval()
    error, state = list(broken(model.initial_state(2)))[number]
    with pytest.raises(error, match=r"^state"):
        model.step(torch.zeros(2, 3), state)


def others():
    """Models whose states are not those of tiny()."""
    yield from (tiny(pool=pool) for pool in ("last", "none"))
    yield from (tiny(n_layers=3), tiny(d_model=5), tiny(d_state=6), tiny().double())


def chunk_of_one(model, u, state):
    return model.chunk(u[:, None], state)


@pytest.mark.parametrize("number", range(6))
def test_a_state_is_of_one_model_and_pooling(number):
    model, other = tiny(), list(others())[number]
    for here, there in ((model, other), (other, model)):
        u = torch.zeros(2, 1, dtype=here.decoder.weight.dtype)
        for go_on in (here.step, here.stepper(), partial(chunk_of_one, here)):
            with pytest.raises((TypeError, ValueError), match=r"^state"):
                go_on(u, there.initial_state(2))


def test_outputs_after_the_end_are_zero():
    model = make(d_input=3, d_output=2, d_model=4, pool="none").float().eval()
    y = model(torch.randn(2, 9, 3), lengths=torch.tensor([4, 9]))
    assert (y[0, 4:] == 0).all() and (y[0, :4] != 0).all() and (y[1] != 0).all()


@settings(max_examples=15, deadline=None)
@given(
    pool=st.sampled_from(["mean", "last", "none"]),
    norm=st.sampled_from(["layer", "batch"]),
    prenorm=st.booleans(),
    tokens=st.booleans(),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    rate=st.sampled_from([1.0, 0.5, 2.0]),
)
def test_three_ways(pool, norm, prenorm, tokens, parts, seed, rate):
    """Whole, in chunks and in steps: outputs, states and gradients."""
    options = {"pool": pool, "norm": norm, "prenorm": prenorm, "tokens": tokens}
    g = torch.Generator().manual_seed(seed)
    config = S4Config(d_input=4, d_output=3, d_model=6, n_layers=2, d_state=8, **options)
    model = S4Model(config, g).double()
    L = sum(parts)
    u = torch.randint(4, (2, L), generator=g) if tokens else signal(2, L, 4, seed=seed)
    model(u)  # moves the running statistics of batch norm
    model.eval()

    whole = model(u, rate=rate)
    chunks, carried = [], model.initial_state(2)
    for part in u.split(parts, 1):
        y, carried = model.chunk(part, carried, rate=rate)
        chunks.append(y)
    steps, state = [], model.initial_state(2)
    for u_k in u.unbind(1):
        y, state = model.step(u_k, state, rate)
        steps.append(y)
    chunked = torch.cat(chunks, 1) if pool == "none" else chunks[-1]
    stepped = torch.stack(steps, 1) if pool == "none" else steps[-1]
    assert relative(chunked, whole) < 1e-9 and relative(stepped, whole) < 1e-9
    assert carried.mean.shape == state.mean.shape == (2, 6 if pool == "mean" else 0)
    for a, b in zip((*carried.layers, carried.mean), (*state.layers, state.mean), strict=True):
        assert not b.numel() or relative(a, b) < 1e-9
    assert carried.count.tolist() == state.count.tolist() == [L, L]

    parameters = list(model.parameters())
    found = [torch.autograd.grad(y.square().sum(), parameters) for y in (whole, chunked, stepped)]
    for exact, a, b in zip(*found, strict=True):
        scale = exact.abs().max() + 1e-12
        assert (a - exact).abs().max() < 1e-7 * scale
        assert (b - exact).abs().max() < 1e-7 * scale


@pytest.mark.parametrize("pool", ["mean", "last", "none"])
@pytest.mark.parametrize("tokens", [False, True])
def test_padded_chunks(pool, tokens):
    """In a batch of unequal chunks each sequence goes its own way."""
    g = torch.Generator().manual_seed(0)
    model = tiny(g, d_input=3, d_output=3, pool=pool, tokens=tokens).double()
    u = torch.randint(3, (2, 9), generator=g) if tokens else signal(2, 9, 3)
    lengths = [torch.tensor([4, 1]), torch.tensor([2, 5])]
    state, outputs = model.initial_state(2), []
    for part, n in zip(u.split([4, 5], 1), lengths, strict=True):
        part = part.clone()
        for i in (0, 1):
            part[i, int(n[i]) :] = -100 if tokens else float("nan")
        y, state = model.chunk(part, state, n)
        outputs.append(y)
    assert state.count.tolist() == [6, 6]
    for i in (0, 1):
        alone = torch.cat([p[i, : n[i]] for p, n in zip(u.split([4, 5], 1), lengths, strict=True)])
        whole = model(alone[None])[0]
        if pool == "none":
            y = torch.cat([y[i, : n[i]] for y, n in zip(outputs, lengths, strict=True)])
            assert all((y[i, n[i] :] == 0).all() for y, n in zip(outputs, lengths, strict=True))
        else:
            y = outputs[-1][i]
        assert relative(y, whole) < 1e-9


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_of_tokens(bidirectional):
    g = torch.Generator().manual_seed(0)
    model = tiny(g, d_input=7, bidirectional=bidirectional, tokens=True)
    u = torch.randint(7, (2, 9), generator=g)
    u[1, 4:] = -1
    y = model(u, torch.tensor([9, 4]))
    assert relative(y[1], model(u[1:, :4])[0]) < 1e-5
    assert torch.equal(model(u[:1].int()), model(u[:1]))


def test_tokens_are_a_linear_map_of_indicators():
    """An embedding is the linear encoder of one-hot vectors, without a bias."""
    g = torch.Generator().manual_seed(0)
    tokens = tiny(g, d_input=5, tokens=True).double()
    vectors = tiny(d_input=5).double()
    weights = tokens.state_dict()
    weights["encoder.weight"] = weights["encoder.weight"].T
    weights["encoder.bias"] = torch.zeros(6)
    vectors.load_state_dict(weights)
    u = torch.randint(5, (2, 9), generator=g)
    assert relative(tokens(u), vectors(torch.nn.functional.one_hot(u).double())) < 1e-12


def test_embedding_is_a_weight():
    model = tiny(d_input=5, tokens=True)
    groups = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(model)}
    assert id(model.encoder.weight) in groups["weights"]


IDS = torch.zeros(2, 5, dtype=torch.int64)
BAD_TOKENS = [
    (TypeError, "u", None),
    (TypeError, "u", IDS.float()),
    (TypeError, "u", IDS.bool()),
    (ValueError, "u", IDS[0]),
    (ValueError, "u", IDS[..., None]),
    (ValueError, "u", IDS[:, :0]),
    (ValueError, "u", IDS - 1),
    (ValueError, "u", IDS + 5),
]


@pytest.mark.parametrize(("error", "name", "u"), BAD_TOKENS)
def test_bad_tokens(error, name, u):
    model = tiny(d_input=5, tokens=True)
    with pytest.raises(error, match=f"^{name}: expected"):
        model(u)


def test_bad_chunks():
    model, both = make(), make(bidirectional=True)
    with pytest.raises(TypeError, match=r"^state: .*initial_state"):
        model.chunk(U, None)
    with pytest.raises(ValueError, match=r"^state"):
        model.chunk(U, model.initial_state(3))
    with pytest.raises(ValueError, match=r"^u"):
        model.chunk(U[..., :1], model.initial_state(2))
    with pytest.raises(ValueError, match=r"^lengths"):
        model.chunk(U, model.initial_state(2), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"^bidirectional"):
        both.chunk(U, model.initial_state(2))


MEASURES = ["legs", "legt", "lagt", "fout", "random", "diag-legs", "diag-lin", "diag-inv"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("measure", [*MEASURES, "diag-real"])
def test_systems_are_passed_on(measure, tied):
    model = make(measure=measure, tied=tied, pool="none")
    method = "bilinear" if measure.startswith("diag") else None
    other = make(measure=measure, tied=tied, method=method, pool="none")
    layers = [block.layer for block in model.blocks]
    assert all(x.measure == measure and x.tied is tied for x in layers)
    assert all(b.layer.method == "bilinear" for b in other.blocks)
    u = signal(2, 9, 2)
    for m in (model, other):
        a, state = m.chunk(u[:, :4], m.initial_state(2))
        steps = []
        for u_k in u[:, 4:].unbind(1):
            y, state = m.step(u_k, state)
            steps.append(y)
        assert relative(torch.cat((a, torch.stack(steps, 1)), 1), m(u)) < 1e-9


@pytest.mark.parametrize("pool", ["mean", "none"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_stepper(pool, norm):
    """The prepared step is the step; it is a copy, and examines shapes."""
    model, u = make(pool=pool, norm=norm, prenorm=True), signal(2, 12, 2)
    before = model(u)
    step, state = model.stepper(), model.initial_state(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    model.train()
    for u_k in u.unbind(1):
        y, state = step(u_k, state)
    assert relative(y, before[:, -1] if pool == "none" else before) < 1e-9
    for wrong in (u, u[:1, 0], u[:, 0, :1], u[:, 0].float()):
        with pytest.raises((TypeError, ValueError), match="expected"):
            step(wrong, state)
    with pytest.raises(ValueError, match=r"^bidirectional"):
        make(bidirectional=True).stepper()


@pytest.mark.parametrize("tokens", [False, True])
def test_stepper_exported_with_an_open_batch(tokens):
    g = torch.Generator().manual_seed(0)
    model = tiny(g, d_input=3, tokens=tokens)
    u = torch.randint(3, (5, 4), generator=g) if tokens else torch.randn(5, 4, 3, generator=g)
    B, file = torch.export.Dim("B", min=1), io.BytesIO()
    shapes = ({0: B}, [({0: B}, {0: B}), {0: B}, {0: B}])
    given = u[:, 0], model.initial_state(5)
    program = torch.export.export(model.stepper(), given, dynamic_shapes=shapes)
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (5, 1, 2):
        state = model.initial_state(batch)
        for u_k in u[:batch].unbind(1):
            y, state = loaded(u_k, state)
        assert relative(y, model(u[:batch])) < 1e-5


def test_a_state_is_saved_and_loaded_by_default():
    model, file = make(), io.BytesIO()
    _, state = model.chunk(signal(2, 5, 2), model.initial_state(2))
    torch.save(state, file)
    file.seek(0)
    again = torch.load(file)
    u = signal(2, 2, seed=4)
    assert torch.equal(model.step(u, again)[0], model.step(u, state)[0])
    assert not any(x.requires_grad for x in state.detach().layers)


def test_stepper_takes_what_step_takes_under_autocast():
    model, u = make().float(), signal(2, 30, 2).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        a, _ = model.step(u[:, 0], model.initial_state(2))
        b, _ = model.stepper()(u[:, 0], model.initial_state(2))
        c, _ = model.stepper()(u[:, 0].bfloat16(), model.initial_state(2))
    assert relative(b.float(), a.float()) < 0.05 and relative(c.float(), a.float()) < 0.05


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_checkpointing_changes_nothing(norm):
    found = []
    for flag in (False, True):
        model, u = make(norm=norm).train(), signal(2, 12, 2)
        model.checkpointing = flag
        torch.manual_seed(0)
        y = model(u, torch.tensor([12, 7]))
        y.square().sum().backward()
        averages = [v for k, v in model.state_dict().items() if "running" in k]
        found.append([y, *(p.grad for p in model.parameters()), *averages])
    for plain, saved in zip(*found, strict=True):
        assert (plain - saved).abs().max() <= 1e-12 * (plain.abs().max() + 1e-12)


def test_a_shared_parameter_is_in_one_group_once():
    model = tiny(d_input=5, d_output=5, tokens=True)
    model.decoder.weight = model.encoder.weight
    listed = [id(p) for g in parameter_groups(model) for p in g["params"]]
    assert len(listed) == len(set(listed)) == len(list(model.parameters()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("measure", [*MEASURES, "diag-real"])
def test_shapes_are_told_without_a_model(measure, both, tied):
    for norm, prenorm, tokens in itertools.product(("layer", "batch"), *[(False, True)] * 2):
        config = S4Config(
            d_input=3,
            d_output=2,
            d_model=5,
            n_layers=2,
            d_state=6,
            measure=measure,
            norm=norm,
            bidirectional=both,
            tied=tied,
            prenorm=prenorm,
            tokens=tokens,
        )
        state = S4Model(config).state_dict()
        real = {k: tuple(v.shape) for k, v in state.items() if not k.endswith("_extra_state")}
        assert dict(model_shapes(config)) == real


def test_a_refused_call_leaves_the_norm_alone():
    block = S4Block(S4Config(d_model=4, d_state=8, prenorm=True, norm="batch"))
    before = {k: v.clone() for k, v in block.state_dict().items()}
    u, state = torch.ones(2, 5, 4), block.layer.initial_state(2)
    for call in (
        lambda: block(u[..., :3]),
        lambda: block(u, torch.tensor([9, 1])),
        lambda: block.chunk(u, state[:1]),
        lambda: block.chunk(u, u),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


class Reads(TorchDispatchMode):
    """Count the operations after which Python waits for a value."""

    waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        booleans = any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for i in arg
        )
        self.count += name in self.waits or (name == "index" and booleans)
        return function(*args, **(kwargs or {}))


def test_the_counter_counts():
    x = torch.arange(4.0)
    for call in (lambda: x.sum().item(), lambda: bool(x.isfinite().all()), lambda: x[x > 1]):
        with Reads() as reads:
            call()
        assert reads.count > 0


@pytest.mark.parametrize(("norm", "prenorm"), [("layer", False), ("batch", True)])
@pytest.mark.parametrize("measure", ["legs", "legt", "random", "diag-lin"])
def test_a_pass_forward_and_back_reads_nothing(norm, prenorm, measure):
    """Lengths and tokens are looked at on the CPU only."""
    sizes = {"n_layers": 4, "dropout": 0.1}
    model = make(norm=norm, prenorm=prenorm, measure=measure, **sizes).train()
    u = signal(2, 12, 2)
    with Reads() as reads:
        model(u).square().sum().backward()
    assert reads.count == 0
    with Reads() as masked, torch.no_grad():  # as on a device, where nothing is looked at
        valid = torch.arange(12) < torch.tensor([12, 7])[:, None]
        model.blocks[0].norm(u[..., :1].expand(-1, -1, 6), valid.sum(1))
    assert masked.count == 0
