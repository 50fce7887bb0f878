"""The network: steps and parallel mode, padding, groups of parameters, wrong calls."""

import itertools

import pytest
import torch

from s4mini.layer import S4Layer
from s4mini.model import S4Block, S4Model, TiedDropout, parameter_groups


def make(seed=0, **options):
    given = {"d_input": 2, "d_output": 3, "d_model": 6, "n_layers": 2, "d_state": 8}
    g = torch.Generator().manual_seed(seed)
    model = S4Model(**given | options, generator=g).double()
    for _ in range(3):  # moves the running statistics of batch norm
        model(signal(4, 9, given["d_input"], seed=7))
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
    yield ValueError, state._replace(count=-1)
    yield TypeError, state._replace(count="a")
    yield TypeError, state._replace(mean=None)
    yield TypeError, tuple(state)
    yield TypeError, None


@pytest.mark.parametrize("number", range(10))
def test_a_state_of_another_model_or_batch_is_refused(number):
    model = S4Model(3, 2, d_model=4, n_layers=2, d_state=8).eval()
    error, state = list(broken(model.initial_state(2)))[number]
    with pytest.raises(error, match=r"^state"):
        model.step(torch.zeros(2, 3), state)


def test_outputs_after_the_end_are_zero():
    model = S4Model(3, 2, d_model=4, n_layers=1, d_state=8, pool="none").eval()
    y = model(torch.randn(2, 9, 3), lengths=torch.tensor([4, 9]))
    assert (y[0, 4:] == 0).all() and (y[0, :4] != 0).all() and (y[1] != 0).all()
