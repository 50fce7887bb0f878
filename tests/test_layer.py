"""The layer: one output in every mode, lengths, directions, rates, and wrong calls."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.layer import S4Layer, mask_padding, two_sided_conv
from s4mini.memory import init_dt

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def make(H=4, N=8, dtype=torch.float64, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    return S4Layer(H, N, generator=g, **options).to(dtype)


def signal(*shape, dtype=torch.float64, seed=1):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


def stepwise(layer, u, state=None, rate=1.0):
    state = layer.initial_state(len(u)) if state is None else state
    y = []
    for u_k in u.unbind(1):
        y_k, state = layer.step(u_k, state, rate)
        y.append(y_k)
    return torch.stack(y, 1), state


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("N", [2, 8, 64])
@pytest.mark.parametrize("L", [1, 2, 31, 200])
def test_convolution_is_recurrence(dtype, N, L):
    layer, u = make(N=N, dtype=dtype), signal(2, L, 4, dtype=dtype)
    y, none = layer(u)
    y_steps, x_steps = stepwise(layer, u)
    y_carried, x = layer(u, layer.initial_state(2))
    assert none is None and y.shape == u.shape and y.dtype == dtype
    assert relative(y, y_steps) < TOLERANCE[dtype]
    assert relative(y_carried, y_steps) < TOLERANCE[dtype]
    assert relative(x, x_steps) < TOLERANCE[dtype]


@settings(deadline=None, max_examples=15)
@given(chunks=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_chunks(chunks):
    layer, u = make(), signal(2, sum(chunks), 4)
    state, parts = layer.initial_state(2), []
    for part in u.split(chunks, 1):
        y, state = layer(part, state)
        parts.append(y)
    assert relative(torch.cat(parts, 1), layer(u)[0]) < 1e-10
    assert relative(state, layer(u, layer.initial_state(2))[1]) < 1e-10


def gradients(layer, loss):
    layer.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in layer.parameters()]


def test_gradients_agree():
    """Through convolution, steps and chunks, for every parameter."""
    layer, u = make(), signal(2, 21, 4)
    first = gradients(layer, layer(u)[0].square().sum())
    steps = gradients(layer, stepwise(layer, u)[0].square().sum())
    a, state = layer(u[:, :8], layer.initial_state(2))
    b, _ = layer(u[:, 8:], state)
    chunks = gradients(layer, a.square().sum() + b.square().sum())
    for g, h, k in zip(first, steps, chunks, strict=True):
        assert relative(h, g) < 1e-9 and relative(k, g) < 1e-9


def train(layer, steps=5):
    u, target = signal(2, 20, 4), signal(2, 20, 4, seed=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(u)[0] - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_after_training_and_reload(bidirectional):
    """Still one output, on longer inputs too, and the same after a round trip."""
    layer = make(bidirectional=bidirectional)
    train(layer)
    u = signal(2, 150, 4)
    if not bidirectional:
        assert relative(layer(u)[0], stepwise(layer, u)[0]) < 1e-10
    state_dict = layer.state_dict()
    assert all(not v.is_complex() for v in state_dict.values())
    other = make(seed=5, bidirectional=bidirectional)
    other.load_state_dict(state_dict)
    assert torch.equal(other(u)[0], layer(u)[0])


def test_always_stable():
    """Random parameters, however large, give eigenvalues in the left half plane."""
    from s4mini.nplr import real_form

    layer = make(H=16, N=8)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    Lambda, P, B, C, _ = layer.system()
    A, _, _ = real_form(Lambda, P, B, C)
    assert torch.linalg.eigvals(A).real.max() < 0


def test_never_mutates():
    layer, u = make(), signal(1, 9, 4)
    before = copy.deepcopy(layer.state_dict())
    for L in (9, 3, 7):
        layer(u[:, :L], layer.initial_state(1))
        layer.step(u[:, 0], layer.initial_state(1))
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_lengths(bidirectional):
    """Valid outputs and states are those of the sequence alone, whatever the padding."""
    layer, u = make(bidirectional=bidirectional), signal(3, 20, 4)
    lengths = torch.tensor([20, 1, 13])
    u[1, 1:], u[2, 13:] = float("nan"), 1e9
    state = None if bidirectional else layer.initial_state(3)
    y, x = layer(u, state, lengths)
    for i, n in enumerate(lengths):
        state = None if bidirectional else layer.initial_state(1)
        alone, x_alone = layer(u[i : i + 1, :n], state)
        assert relative(y[i, :n], alone[0]) < 1e-10
        assert (y[i, n:] == 0).all()
        assert bidirectional or relative(x[i], x_alone[0]) < 1e-10
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("L", [1, 2, 7])
def test_two_directions(L):
    layer, u = make(bidirectional=True), signal(2, L, 4)
    K = layer.kernel(L)
    truth = layer.D * u
    for k in range(L):
        for j in range(L):
            weight = K[0, :, k - j] if j <= k else K[1, :, j - k - 1]
            truth[:, k] = truth[:, k] + weight * u[:, j]
    assert relative(layer(u)[0], truth) < 1e-12


def test_rate():
    """Every other sample of a smooth signal, at rate two, gives every other output."""
    layer = make(dt_max=1e-2)
    t = torch.arange(800, dtype=torch.float64)[:, None] / 100
    u = torch.sin(t * torch.tensor([1.0, 2.0, 0.5, 1.5], dtype=torch.float64))[None]
    full, half = layer(u)[0][:, ::2], layer(u[:, ::2], rate=2.0)[0]
    assert relative(half, full) < 0.02
    assert relative(layer(u[:, ::2])[0], full) > 0.2
    assert relative(stepwise(layer, u[:, ::2], rate=2.0)[0], half) < 1e-10


def test_mixed_precision():
    """Autocast does not reach the kernel; half precision inputs are accepted."""
    layer, u = make(dtype=torch.float32), signal(2, 30, 4, dtype=torch.float32)
    y, _ = layer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(u)[0], y)
    assert relative(layer(u.bfloat16())[0], y) < 0.05


def test_generator_and_dtype():
    assert torch.equal(make(seed=3).C, make(seed=3).C)
    assert not torch.equal(make(seed=3).C, make(seed=4).C)
    dt = init_dt(4000, 1e-3, 1e-1, torch.Generator().manual_seed(0))
    assert dt.min() >= 1e-3 and dt.max() <= 1e-1
    assert abs(dt.log().mean().exp() - 1e-2) < 5e-4
    layer = make(dtype=torch.float64)
    assert layer.initial_state(2).dtype == torch.complex128
    assert layer.kernel(5).dtype == torch.float64


BAD_LAYER = [
    (TypeError, "d_model", {"d_model": 2.0}),
    (ValueError, "d_model", {"d_model": 0}),
    (ValueError, "d_state", {"d_state": 7}),
    (ValueError, "d_state", {"d_state": 0}),
    (ValueError, "measure", {"measure": "legz"}),
    (ValueError, "dt_min", {"dt_min": 0.0}),
    (ValueError, "dt_max", {"dt_min": 0.2, "dt_max": 0.1}),
    (TypeError, "dt_max", {"dt_max": "0.1"}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_LAYER)
def test_bad_layer(error, name, changed):
    with pytest.raises(error, match=f"^{name}"):
        S4Layer(**{"d_model": 4, "d_state": 8} | changed)


U = signal(2, 6, 4)
STATE = torch.zeros(2, 4, 4, dtype=torch.complex128)
BAD_FORWARD = [
    (TypeError, "u", {"u": [1.0]}),
    (TypeError, "u", {"u": U + 0j}),
    (TypeError, "u", {"u": U.float()}),
    (ValueError, "u", {"u": U[0]}),
    (ValueError, "u", {"u": U[..., :3]}),
    (ValueError, "u", {"u": U[:, :0]}),
    (ValueError, "u", {"u": U * float("nan")}),
    (ValueError, "state", {"state": STATE[:1]}),
    (ValueError, "state", {"state": STATE[..., :3]}),
    (TypeError, "state", {"state": STATE.real}),
    (TypeError, "state", {"state": STATE.to(torch.complex64)}),
    (TypeError, "lengths", {"lengths": [6, 6]}),
    (TypeError, "lengths", {"lengths": torch.tensor([6.0, 6.0])}),
    (ValueError, "lengths", {"lengths": torch.tensor([6])}),
    (ValueError, "lengths", {"lengths": torch.tensor([7, 1])}),
    (ValueError, "lengths", {"lengths": torch.tensor([6, 0])}),
    (ValueError, "u", {"u": U[0], "lengths": torch.tensor([6])}),
    (ValueError, "rate", {"rate": 0.0}),
    (ValueError, "rate", {"rate": -1.0}),
    (TypeError, "rate", {"rate": None}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_FORWARD)
def test_bad_forward(error, name, changed):
    with pytest.raises(error, match=f"^{name}"):
        make()(**{"u": U} | changed)


def test_bad_step():
    layer = make()
    with pytest.raises(TypeError, match=r"^state: .*initial_state"):
        layer.step(U[:, 0], None)
    with pytest.raises(ValueError, match=r"^state"):
        layer.step(U[:, 0], STATE[:1])
    with pytest.raises(ValueError, match=r"^u"):
        layer.step(U, STATE)
    with pytest.raises(ValueError, match=r"^rate"):
        layer.step(U[:, 0], STATE, rate=0.0)
    with pytest.raises(ValueError, match=r"^batch"):
        layer.initial_state(0)
    both = make(bidirectional=True)
    calls = [
        lambda: both.step(U[:, 0], STATE),
        lambda: both(U, STATE),
        lambda: both.initial_state(2),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^bidirectional"):
            call()


def test_bad_helpers():
    with pytest.raises(ValueError, match=r"^K"):
        two_sided_conv(U[0, :, 0], signal(3, 6))
    with pytest.raises(ValueError, match=r"^K"):
        two_sided_conv(U[0, :, 0], signal(2, 5))
    with pytest.raises(TypeError, match=r"^u"):
        mask_padding(None, torch.tensor([1]))
    with pytest.raises(ValueError, match=r"^H"):
        init_dt(0, 0.1, 0.2)
    with pytest.raises(ValueError, match=r"^L"):
        make().kernel(0)


def test_flags_and_rates_are_not_guessed():
    with pytest.raises(ValueError, match="bidirectional: expected one of False, True"):
        S4Layer(4, 8, bidirectional="no")
    with pytest.raises(TypeError, match="rate: expected a number > 0, got a Tensor"):
        S4Layer(4, 8)(torch.zeros(1, 3, 4), rate=torch.tensor(1.0))
    with pytest.raises(ValueError, match="measure: expected one of 'legs'; got 'legt'"):
        S4Layer(4, 8, measure="legt")
