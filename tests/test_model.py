"""The network: steps, chunks and parallel mode, padding, tasks, saving, wrong calls."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.layer import S4Layer
from s4mini.model import (
    S4Block,
    S4Classifier,
    S4Forecaster,
    S4LanguageModel,
    S4Model,
    TiedDropout,
    parameter_groups,
)


def make(seed=0, **options):
    usual = {"d_input": 2, "d_output": 3, "d_model": 6, "n_layers": 2, "d_state": 8}
    g = torch.Generator().manual_seed(seed)
    model = S4Model(**usual | options, generator=g).double()
    for _ in range(3):  # moves the running statistics of batch norm
        model(signal(4, 9, model.d_input, seed=7))
    return model.eval()


def signal(*shape, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def relative(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


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
    block = S4Block(4, 8, generator=torch.Generator().manual_seed(0)).double()
    u = signal(2, 11, 4)
    whole, none = block(u)
    a, state = block(u[:, :4], block.layer.initial_state(2))
    b, state = block(u[:, 4:], state)
    assert none is None and relative(torch.cat((a, b), 1), whole) < 1e-10


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


BAD_MODEL = [
    (ValueError, "d_input", {"d_input": 0}),
    (TypeError, "d_output", {"d_output": None}),
    (ValueError, "d_model", {"d_model": -1}),
    (ValueError, "n_layers", {"n_layers": 0}),
    (ValueError, "d_state", {"d_state": 3}),
    (ValueError, "measure", {"measure": "x"}),
    (ValueError, "dropout", {"dropout": 1.0}),
    (ValueError, "dropout", {"dropout": -0.1}),
    (TypeError, "dropout", {"dropout": "0.1"}),
    (ValueError, "norm", {"norm": "group"}),
    (ValueError, "pool", {"pool": "max"}),
    (ValueError, "dt_max", {"dt_min": 1.0}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_MODEL)
def test_bad_model(error, name, changed):
    with pytest.raises(error, match=f"^{name}"):
        S4Model(**{"d_input": 2, "d_output": 3, "d_model": 4} | changed)


U = signal(2, 5, 2)
BAD_FORWARD = [
    (TypeError, "u", {"u": None}),
    (TypeError, "u", {"u": U.float()}),
    (ValueError, "u", {"u": U[0]}),
    (ValueError, "u", {"u": U[..., :1]}),
    (ValueError, "u", {"u": U * float("inf")}),
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


def broken(state):
    yield ValueError, state._replace(layers=state.layers[:1])
    yield ValueError, state._replace(layers=(state.layers[0], state.layers[1][:1]))
    yield ValueError, state._replace(mean=state.mean[:1])
    yield ValueError, state._replace(mean=state.mean[:, :1])
    yield ValueError, state._replace(mean=state.mean * float("nan"))
    yield ValueError, state._replace(count=state.count - 1)
    yield ValueError, state._replace(count=state.count[:1])
    yield TypeError, state._replace(count=1)
    yield TypeError, state._replace(mean=None)
    yield TypeError, tuple(state)
    yield TypeError, None


@pytest.mark.parametrize("number", range(11))
def test_a_state_of_another_model_or_batch_is_refused(number):
    model = S4Model(3, 2, d_model=4, n_layers=2, d_state=8).eval()
    error, state = list(broken(model.initial_state(2)))[number]
    with pytest.raises(error, match=r"^state"):
        model.step(torch.zeros(2, 3), state)


def test_outputs_after_the_end_are_zero():
    model = S4Model(3, 2, d_model=4, n_layers=1, d_state=8, pool="none").eval()
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
    model = S4Model(4, 3, 6, 2, 8, generator=g, **options).double()
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
    for a, b in zip((*carried.layers, carried.mean), (*state.layers, state.mean), strict=True):
        assert relative(a, b) < 1e-9
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
    model = S4Model(3, 3, 6, 2, 8, pool=pool, tokens=tokens, generator=g).double().eval()
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
    model = S4Model(7, 2, 6, 2, 8, bidirectional=bidirectional, tokens=True, generator=g).eval()
    u = torch.randint(7, (2, 9), generator=g)
    u[1, 4:] = -1
    y = model(u, torch.tensor([9, 4]))
    assert relative(y[1], model(u[1:, :4])[0]) < 1e-5
    assert torch.equal(model(u[:1].int()), model(u[:1]))


def test_tokens_are_a_linear_map_of_indicators():
    """An embedding is the linear encoder of one-hot vectors, without a bias."""
    g = torch.Generator().manual_seed(0)
    tokens = S4Model(5, 2, 6, 1, 8, tokens=True, generator=g).double().eval()
    vectors = S4Model(5, 2, 6, 1, 8).double().eval()
    weights = tokens.state_dict()
    weights["encoder.weight"] = weights["encoder.weight"].T
    weights["encoder.bias"] = torch.zeros(6)
    vectors.load_state_dict(weights)
    u = torch.randint(5, (2, 9), generator=g)
    assert relative(tokens(u), vectors(torch.nn.functional.one_hot(u).double())) < 1e-12


def test_embedding_is_a_weight():
    model = S4Model(5, 2, 6, 1, 8, tokens=True)
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
    model = S4Model(5, 2, 4, 1, 8, tokens=True)
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
    for generator in (0, "seed"):
        with pytest.raises(TypeError, match=r"^generator: .*manual_seed"):
            S4Model(2, 3, 4, generator=generator)
        with pytest.raises(TypeError, match=r"^generator: .*manual_seed"):
            S4Block(4, generator=generator)
    with pytest.raises(ValueError, match=r"^tokens"):
        S4Model(2, 3, 4, tokens="yes")


def classifier():
    return S4Classifier(make(), ("a", "b", "c"))


def forecaster(horizon=4, **options):
    return S4Forecaster(make(pool="none", **options), horizon)


def speaker(seed=0, V=6, **options):
    g = torch.Generator().manual_seed(seed)
    options = {"pool": "none", "tokens": True, "d_model": 8, "d_state": 8} | options
    return S4LanguageModel(S4Model(V, V, n_layers=2, generator=g, **options)).double().eval()


def test_classifier():
    model, u, lengths = classifier(), signal(4, 9, 2), torch.tensor([9, 3, 5, 1])
    names, p = model.predict(u, lengths)
    assert torch.allclose(p, model(u, lengths).softmax(-1)) and not p.requires_grad
    assert names == [model.classes[i] for i in model(u, lengths).argmax(1)]
    y, state = model.chunk(u[:, :4], model.initial_state(4))
    for u_k in u[:, 4:].unbind(1):
        y, state = model.step(u_k, state)
    assert relative(y, model(u)) < 1e-9


@pytest.mark.parametrize(("d_input", "d_output"), [(1, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("horizon", [1, 6])
def test_forecaster(d_input, d_output, horizon):
    model = forecaster(horizon, d_input=d_input, d_output=d_output)
    u = signal(2, 11, d_input)
    y = model(u)
    assert y.shape == (2, horizon, d_output)
    padded = torch.cat((u, torch.zeros(2, horizon, d_input).double()), 1)
    assert relative(y, model.model(padded)[:, 11:]) < 1e-12
    state = model.initial_state(2)
    for part in u.split([3, 8], 1):
        state = model.observe(part, state)
    kept = [x.clone() for x in state.layers]
    assert relative(model.forecast(state), y) < 1e-9
    assert relative(model.forecast(state), y) < 1e-9  # a forecast changes nothing
    assert all(torch.equal(a, b) for a, b in zip(kept, state.layers, strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_forecasts_of_padded_contexts(bidirectional):
    model, u = forecaster(5, bidirectional=bidirectional), signal(3, 10, 2)
    lengths = torch.tensor([10, 1, 6])
    for i, n in enumerate(lengths):
        u[i, n:] = float("nan")
    y = model(u, lengths)
    for i, n in enumerate(lengths):
        assert relative(y[i], model(u[i : i + 1, :n])[0]) < 1e-9


def test_language_model_is_causal():
    model, g = speaker(), torch.Generator().manual_seed(0)
    u = torch.randint(6, (1, 12), generator=g)
    other = u.clone()
    other[0, 7] = (u[0, 7] + 1) % 6
    a, b = model(u), model(other)
    assert a.shape == (1, 12, 6)
    assert relative(b[:, :7], a[:, :7]) < 1e-12 and relative(b[:, 7:], a[:, 7:]) > 1e-6


def test_generate_draws_from_the_model():
    """The frequencies of what is drawn are those of the chain rule."""
    model, g = speaker(V=3), torch.Generator().manual_seed(0)
    prompt = torch.tensor([[2, 1]])
    drawn = model.generate(prompt.expand(20000, 2), 2, g)
    with torch.no_grad():
        first = model(prompt)[0, -1].softmax(0)
        second = [model(torch.tensor([[2, 1, a]]))[0, -1].softmax(0) for a in range(3)]
    expected = first[:, None] * torch.stack(second)  # (3, 3)
    counts = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9).view(3, 3)
    deviation = (expected * (1 - expected) / 20000).sqrt()
    assert ((counts / 20000 - expected).abs() < 5 * deviation).all()


def test_generate_is_reproducible_and_leaves_the_mode():
    model, prompt = speaker(dropout=0.5).train(), torch.tensor([[0, 5, 1]])
    runs = [model.generate(prompt, 15, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert model.training and runs[0].shape == (1, 15)
    cold = model.generate(prompt, 15, torch.Generator().manual_seed(3), temperature=1e-6)
    assert torch.equal(cold, model.generate(prompt, 15, temperature=0))


BAD_TASKS = [
    (TypeError, "model", lambda: S4Classifier(None, ["a"])),
    (TypeError, "model", lambda: S4Forecaster(torch.nn.Linear(1, 1), 3)),
    (TypeError, "model", lambda: S4LanguageModel(3)),
    (ValueError, "model.pool", lambda: S4Classifier(make(pool="none"), ["a", "b", "c"])),
    (ValueError, "classes", lambda: S4Classifier(make(), ["a"])),
    (TypeError, "classes", lambda: S4Classifier(make(), "abc")),
    (TypeError, "classes", lambda: S4Classifier(make(), [0, 1, 2])),
    (TypeError, "classes", lambda: S4Classifier(make(), None)),
    (ValueError, "model.pool", lambda: S4Forecaster(make(), 3)),
    (ValueError, "model.tokens", lambda: S4Forecaster(speaker().model, 3)),
    (ValueError, "horizon", lambda: forecaster(0)),
    (TypeError, "horizon", lambda: forecaster(2.0)),
    (ValueError, "model.pool", lambda: speaker(pool="mean")),
    (ValueError, "model.tokens", lambda: S4LanguageModel(make(d_output=2, pool="none"))),
    (ValueError, "model.bidirectional", lambda: speaker(bidirectional=True)),
    (
        ValueError,
        "model.d_output",
        lambda: S4LanguageModel(S4Model(3, 4, 4, pool="none", tokens=True)),
    ),
    (TypeError, "state", lambda: forecaster().forecast(None)),
    (ValueError, "state", lambda: forecaster().forecast(make(d_model=4).initial_state(2))),
    (TypeError, "u", lambda: forecaster()(None)),
    (ValueError, "u", lambda: forecaster()(U[..., :1])),
    (ValueError, "lengths", lambda: forecaster()(U, torch.tensor([6, 1]))),
    (TypeError, "lengths", lambda: forecaster()(U, 5)),
    (ValueError, "bidirectional", lambda: forecaster(bidirectional=True).initial_state(1)),
    (TypeError, "generator", lambda: speaker().generate(IDS, 3)),
    (TypeError, "generator", lambda: speaker().generate(IDS, 3, 0)),
    (ValueError, "steps", lambda: speaker().generate(IDS, 0, temperature=0)),
    (ValueError, "temperature", lambda: speaker().generate(IDS, 3, temperature=-1.0)),
    (TypeError, "temperature", lambda: speaker().generate(IDS, 3, temperature="hot")),
    (ValueError, "prompt", lambda: speaker().generate(IDS[0], 3, temperature=0)),
    (ValueError, "prompt", lambda: speaker().generate(IDS + 6, 3, temperature=0)),
    (TypeError, "prompt", lambda: speaker().generate([0, 1], 3, temperature=0)),
]


@pytest.mark.parametrize(("error", "name", "call"), BAD_TASKS)
def test_bad_tasks(error, name, call):
    with pytest.raises(error, match=f"^{name}"):
        call()


SAVED = [
    (lambda: make(norm="batch", prenorm=True, dt_min=3e-3), signal(2, 9, 2)),
    (lambda: make(bidirectional=True).float(), signal(2, 9, 2).float()),
    (classifier, signal(2, 9, 2)),
    (forecaster, signal(2, 9, 2)),
    (speaker, torch.tensor([[0, 3, 5, 1]])),
]


@pytest.mark.parametrize(("build", "u"), SAVED)
def test_saved_and_loaded(build, u, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "new")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    again = type(model).from_pretrained(str(tmp_path / "new"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert type(again) is type(model) and not again.training
    assert again.config == model.config
    assert torch.equal(again(u), model(u))
    assert {p.suffix for p in (tmp_path / "new").iterdir()} == {".json", ".safetensors", ".md"}
    # what was loaded can be trained, changed and saved once more, over the old files
    with torch.no_grad():
        next(again.parameters()).mul_(0.5)
    again.save_pretrained(tmp_path / "new")
    third = type(model).from_pretrained(tmp_path / "new")
    assert torch.equal(third(u), again(u)) and not torch.equal(third(u), model(u))


def test_folders_that_cannot_be_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found"):
        S4Model.from_pretrained(tmp_path / "nowhere")
    model = make()
    model.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, content = config.read_text(), weights.read_bytes()

    def refuse(error, match, kind=S4Model):
        with pytest.raises(error, match=match):
            kind.from_pretrained(tmp_path)
        config.write_text(text)
        weights.write_bytes(content)

    refuse(ValueError, "expected a saved S4Forecaster, found S4Model", S4Forecaster)
    weights.write_bytes(content[:-100])
    refuse(ValueError, "expected a whole S4Model")
    weights.write_bytes(b"")
    refuse(ValueError, "expected a whole S4Model")
    weights.unlink()
    refuse(FileNotFoundError, "model.safetensors: not found")
    config.unlink()
    refuse(FileNotFoundError, "config.json: not found")
    config.write_text(text[:40])
    refuse(ValueError, "config.json: expected JSON")
    config.write_text("[1, 2]")
    refuse(ValueError, "config.json: expected JSON")
    given = json.loads(text)
    for change, match in [
        ({"class": None}, "found None"),
        ({"colour": 1}, "it has .colour."),
        ({"d_model": 10}, "expected a whole S4Model"),
        ({"n_layers": 1}, "expected a whole S4Model"),
        ({"n_layers": 3}, "expected a whole S4Model"),
        ({"pool": "max"}, "expected a whole S4Model: pool"),
        ({"dtype": "int8"}, "dtype: expected one of 'float32', 'float64'"),
    ]:
        config.write_text(json.dumps(given | change))
        refuse(ValueError, match)
    with pytest.raises(ValueError, match=r"^parameters: .*bfloat16"):
        model.bfloat16().save_pretrained(tmp_path)
    assert S4Model.from_pretrained(tmp_path).config["d_model"] == 6  # still whole


def test_saving_without_the_extra(tmp_path):
    program = f"""
import sys
sys.modules["huggingface_hub"] = None
from s4mini.model import S4Model
model = S4Model(1, 1, 4, 1, 8)
for call in (model.save_pretrained, S4Model.from_pretrained):
    try:
        call({str(tmp_path)!r})
    except ModuleNotFoundError as error:
        assert "huggingface_hub" in str(error) and "s4mini[train]" in str(error), error
    else:
        raise AssertionError("worked without huggingface_hub")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_method_that_does_not_fit():
    with pytest.raises(ValueError, match=r"^method"):
        make(method="zoh")
    with pytest.raises(ValueError, match=r"^tied"):
        make(tied=2)


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
def test_stepper_can_be_exported(tokens):
    g = torch.Generator().manual_seed(0)
    model = S4Model(3, 2, 6, 2, 8, tokens=tokens, generator=g).eval()
    u = torch.randint(3, (2, 4), generator=g) if tokens else torch.randn(2, 4, 3, generator=g)
    state = model.initial_state(2)
    program = torch.export.export(model.stepper(), (u[:, 0], state)).module()
    for u_k in u.unbind(1):
        y, state = program(u_k, state)
    assert relative(y, model(u)) < 1e-5


def test_a_refused_call_leaves_the_norm_alone():
    block = S4Block(4, 8, prenorm=True, norm="batch")
    before = {k: v.clone() for k, v in block.state_dict().items()}
    nan, u = torch.full((2, 5, 4), math.nan), torch.ones(2, 5, 4)
    for wrong in ({"u": nan}, {"u": u, "lengths": torch.tensor([9, 1])}, {"u": u, "state": nan}):
        with pytest.raises((ValueError, TypeError)):
            block(**wrong)
    assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items())


def test_a_config_that_lacks_an_argument_is_refused(tmp_path):
    S4Model(2, 3, 4, 1, 4, pool="last").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text("utf8"))
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "pool"}), "utf8")
    with pytest.raises(ValueError, match="lacks 'pool'"):
        S4Model.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["integers", "nan"])
def test_weights_of_another_kind_are_refused(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    S4Model(2, 3, 4, 1, 4).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if damage == "integers":
        weights = {k: v.to(torch.int64) for k, v in weights.items()}
    else:
        weights = {k: v * math.nan for k, v in weights.items()}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"expected (float32|finite weights)"):
        S4Model.from_pretrained(tmp_path)
