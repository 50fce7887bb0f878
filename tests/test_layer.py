"""The layer: one output in every mode, lengths, directions, rates, and wrong calls."""

import copy
import io
import warnings

import pytest
import torch
from helpers import TOLERANCE, relative, signal
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.convolve import krylov_kernel, scan
from s4mini.discretization import discretize
from s4mini.layer import S4Layer, kernels_kept
from s4mini.lowrank import half_spectrum, nplr, real_form
from s4mini.memory import init_dt
from s4mini.projection import hippo

LOW_RANK = ("legs", "legt", "lagt", "fout", "random")
DIAGONAL = ("diag-legs", "diag-lin", "diag-inv", "diag-real")
MEASURES = LOW_RANK + DIAGONAL


def make(H=4, N=8, dtype=torch.float64, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    return S4Layer(H, N, generator=g, **options).to(dtype)


def stepwise(layer, u, state=None, rate=1.0):
    state = layer.initial_state(len(u)) if state is None else state
    y = []
    for u_k in u.unbind(1):
        y_k, state = layer.step(u_k, state, rate)
        y.append(y_k)
    return torch.stack(y, 1), state


def in_chunks(layer, u, sizes, state=None):
    state, y = layer.initial_state(len(u)) if state is None else state, []
    for part in u.split(sizes, 1):
        y_part, state = layer(part, state)
        y.append(y_part)
    return torch.cat(y, 1), state


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("N", [2, 8, 64])
@pytest.mark.parametrize("L", [1, 2, 31, 200])
def test_convolution_is_recurrence(dtype, N, L):
    layer, u = make(N=N, dtype=dtype), signal(2, L, 4, dtype=dtype)
    y, x_rest = layer(u)
    y_steps, x_steps = stepwise(layer, u)
    y_carried, x = layer(u, layer.initial_state(2))
    assert y.shape == u.shape and y.dtype == dtype
    assert relative(x_rest, x_steps) < TOLERANCE[dtype]
    assert torch.equal(layer(u, return_state=False), y)
    assert relative(y, y_steps) < TOLERANCE[dtype]
    assert relative(y_carried, y_steps) < TOLERANCE[dtype]
    assert relative(x, x_steps) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("N", [2, 32])
def test_every_measure(dtype, measure, N):
    """One output and one state in all modes, from a state that is not zero."""
    layer = make(3, N, dtype, measure=measure)
    u = signal(2, 67, 3, dtype=dtype)
    _, start = layer(signal(2, 40, 3, dtype=dtype, seed=9), layer.initial_state(2))
    y, x = layer(u, start)
    for y_other, x_other in (stepwise(layer, u, start), in_chunks(layer, u, [1, 32, 34], start)):
        assert relative(y_other, y) < TOLERANCE[dtype]
        assert relative(x_other, x) < TOLERANCE[dtype]


@st.composite
def cases(draw):
    """Return settings of a layer, chunk sizes (odd, even, one) and a batch size."""
    measure = draw(st.sampled_from(MEASURES))
    method = draw(st.sampled_from([None, "bilinear"] + ["zoh"] * (measure in DIAGONAL)))
    dts = sorted(draw(st.floats(1e-4, 0.5)) for _ in range(2))
    chosen = {
        "H": draw(st.integers(1, 4)),
        "N": 2 * draw(st.integers(1, 9)),
        "seed": draw(st.integers(0, 99)),
        "measure": measure,
        "method": method,
        "tied": draw(st.booleans()),
        "dt_min": dts[0],
        "dt_max": dts[1],
    }
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    return chosen, sizes, draw(st.integers(1, 3)), draw(st.sampled_from([0.5, 1.0, 3.0]))


@settings(deadline=None, max_examples=40)
@given(case=cases(), trained=st.booleans(), dtype=st.sampled_from(list(TOLERANCE)))
def test_all_modes_agree(case, trained, dtype):
    """For any settings, lengths and chunks, before and after training, values and states."""
    chosen, sizes, batch, rate = case
    layer = make(dtype=dtype, **chosen)
    if trained:
        train(layer, 3)
    u = signal(batch, sum(sizes), layer.d_model, dtype=dtype)
    with torch.no_grad():
        y, _ = layer(u, rate=rate)
        state, parts = layer.initial_state(batch), []
        for part in u.split(sizes, 1):
            y_part, state = layer(part, state, rate=rate)
            parts.append(y_part)
        y_steps, x_steps = stepwise(layer, u, rate=rate)
        step, x_fast, fast = layer.stepper(rate), layer.initial_state(batch), []
        for u_k in u.unbind(1):
            y_k, x_fast = step(u_k, x_fast)
            fast.append(y_k)
    assert relative(torch.cat(parts, 1), y) < TOLERANCE[dtype]
    assert relative(y_steps, y) < TOLERANCE[dtype]
    assert relative(torch.stack(fast, 1), y) < TOLERANCE[dtype]
    assert relative(state, x_steps) < TOLERANCE[dtype]
    assert relative(x_fast, x_steps) < TOLERANCE[dtype]


def gradients(layer, loss):
    layer.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_agree(measure, tied):
    """Through convolution, steps and chunks, for every parameter."""
    layer, u = make(measure=measure, tied=tied), signal(2, 21, 4)
    first = gradients(layer, layer(u)[0].square().sum())
    steps = gradients(layer, stepwise(layer, u)[0].square().sum())
    a, state = layer(u[:, :8], layer.initial_state(2))
    b, _ = layer(u[:, 8:], state)
    chunks = gradients(layer, a.square().sum() + b.square().sum())
    for g, h, k in zip(first, steps, chunks, strict=True):
        assert relative(h, g) < 1e-9 and relative(k, g) < 1e-9


def train(layer, steps=5):
    shape, dtype = (2, 20, layer.d_model), layer.D.dtype
    u, target = signal(*shape, dtype=dtype), signal(*shape, dtype=dtype, seed=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(u)[0] - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_after_training_and_reload(bidirectional, measure):
    """Still one output, on longer inputs too, and the same after a round trip."""
    layer = make(bidirectional=bidirectional, measure=measure)
    train(layer)
    u = signal(2, 150, 4)
    if not bidirectional:
        assert relative(layer(u)[0], stepwise(layer, u)[0]) < 1e-10
    state_dict = layer.state_dict()
    assert all(not v.is_complex() for v in state_dict.values())
    other = make(seed=5, bidirectional=bidirectional, measure=measure)
    other.load_state_dict(state_dict)
    assert torch.equal(other(u)[0], layer(u)[0])


@pytest.mark.parametrize("measure", MEASURES)
def test_always_stable(measure):
    """Random parameters, however large, give eigenvalues in the left half plane."""
    layer = make(H=16, N=8, measure=measure)
    before = layer.system()[0]
    assert before.real.max() < 0
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    Lambda, P, B, C, _ = layer.system()
    P = torch.zeros_like(B)[..., None] if P is None else P
    A, _, _ = real_form(Lambda, P, B, C)
    assert torch.linalg.eigvals(A).real.max() < 0


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fout"])
@pytest.mark.parametrize("N", [4, 32])
def test_begins_as_its_measure(measure, N):
    """The first kernel is that of the HiPPO matrix, up to the stated decay."""
    layer = make(2, N, measure=measure, dt_min=0.05, dt_max=0.05)
    modes, (A, B) = half_spectrum(nplr(measure, N)), hippo(measure, N)
    reads = signal(2, N)
    with torch.no_grad():
        layer.C.copy_(torch.view_as_real(reads.to(modes.V) @ modes.V))
    K, dt = layer.kernel(300).detach(), layer.log_dt.exp()[0].item()
    for k, c in zip(K, reads, strict=True):
        exact = krylov_kernel(*discretize(A, B, dt), c, 300)
        # the kernel carries exp(-1e-5 t), and the parameters were single precision once
        bound = 1e-5 * (1 + 300 * dt if measure != "legs" else 1)
        assert relative(k, exact) < bound


def test_shapes_tied_and_untied():
    for measure, r in (("legs", 1), ("legt", 2), ("random", 1), ("diag-inv", None)):
        for tied in (False, True):
            layer = make(5, 8, measure=measure, tied=tied)
            rows = 1 if tied else 5
            assert layer.log_decay.shape == layer.frequency.shape == (rows, 4)
            assert layer.B.shape == (rows, 4, 2) and layer.C.shape == (5, 4, 2)
            assert layer.P is None if r is None else layer.P.shape == (rows, 4, r, 2)
            assert [v.shape[0] for v in layer.system() if v is not None] == [5] * (
                4 + (r is not None)
            )
            assert measure in repr(layer) and ("tied" in repr(layer)) == tied
    assert make(measure="diag-lin").method == "zoh" and make().method == "bilinear"
    one, two = (make(measure="diag-lin", method=m).kernel(9) for m in ("zoh", "bilinear"))
    assert relative(one, two) > 1e-4


def test_tied_channels_are_one_system():
    """With one C and dt, tied channels give one output; training keeps them tied."""
    layer = make(tied=True, dt_min=0.1, dt_max=0.1)
    with torch.no_grad():
        layer.C.copy_(layer.C[:1].expand_as(layer.C))
    K = layer.kernel(30)
    assert (K - K[:1]).abs().max() < 1e-15
    train(layer)
    Lambda, P, B, _, _ = layer.system()
    assert all((v == v[:1]).all() for v in (Lambda, P, B))


@pytest.mark.parametrize("measure", MEASURES)
def test_stepper_is_frozen_and_needs_no_gradient(measure):
    layer, u = make(measure=measure), signal(2, 4)
    step, state = layer.stepper(), signal(2, 4, 8)
    before = step(u, state)
    assert not any(v.requires_grad for v in before) and not list(step.parameters())
    train(layer, 1)
    after = step(u, state)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert relative(layer.step(u, state)[0], before[0]) > 1e-6
    again = make(measure=measure, seed=7).stepper()
    again.load_state_dict(step.state_dict())
    assert torch.equal(again(u, state)[0], before[0])


@pytest.mark.parametrize("measure", ["legt", "diag-legs"])
def test_stepper_exports(measure):
    """torch.export, saved, loaded, and run with other numbers of examples."""
    layer = make(measure=measure, dtype=torch.float32)
    step, u = layer.stepper(), signal(3, 4, dtype=torch.float32)
    state, batch, file = layer.initial_state(3), torch.export.Dim("batch", min=1), io.BytesIO()
    program = torch.export.export(step, (u, state), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for _ in range(3):
        for found, expected in zip(loaded(u, state), step(u, state), strict=True):
            assert torch.allclose(found, expected, atol=1e-6)
        _, state = step(u, state)
    assert torch.allclose(loaded(u[:1], state[:1])[0], step(u[:1], state[:1])[0], atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(step, (u, state))
        assert torch.allclose(traced(u[:1], state[:1])[0], step(u[:1], state[:1])[0], atol=1e-6)


class Around(torch.nn.Module):
    """A layer with something to compile on both sides."""

    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.after = torch.nn.Linear(4, 4), layer, torch.nn.Linear(4, 4)

    def forward(self, u):
        return self.after(torch.nn.functional.gelu(self.layer(self.before(u))[0]))


@pytest.mark.parametrize("measure", ["legs", "legt", "diag-lin"])
def test_compiled(measure):
    """torch.compile gives the same values and gradients, in one graph."""
    torch._dynamo.reset()
    layer, u = make(measure=measure, dtype=torch.float32), signal(2, 30, 4, dtype=torch.float32)
    network = Around(layer)
    y = network(u)
    first = gradients(network, y.sum())
    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return graph

    z = torch.compile(network, backend=collect, fullgraph=True)(u)
    assert torch.allclose(z, y, atol=1e-6)
    assert len(graphs) == 1
    for a, b in zip(gradients(network, z.sum()), first, strict=True):
        assert relative(a, b) < 1e-5
    step, state = layer.stepper(), layer.initial_state(2)
    whole = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.allclose(whole(u[:, 0], state)[0], step(u[:, 0], state)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("measure", ["legs", "legt", "diag-lin"])
@pytest.mark.parametrize("return_state", [False, True])
def test_layer_exports(measure, return_state):
    """The whole layer in one graph, for any number of examples."""
    layer, u = make(measure=measure, dtype=torch.float32), signal(3, 20, 4, dtype=torch.float32)
    state, batch = signal(3, 4, 8, dtype=torch.float32), torch.export.Dim("batch", min=1)
    options = {"return_state": return_state}
    shapes = {"u": {0: batch}, "state": {0: batch}, "return_state": None}
    program = torch.export.export(layer, (u, state), options, dynamic_shapes=shapes).module()
    found, expected = (f(u[:2], state[:2], **options) for f in (program, layer))
    pairs = zip(found, expected, strict=True) if return_state else ((found, expected),)
    for a, b in pairs:
        assert relative(a, b) < 1e-5


def as_function(layer):
    """Return outputs and states as a function of input and parameters, and these."""
    names = [name for name, _ in layer.named_parameters()]

    def run(u, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (u,))

    return run, [p.detach().clone().requires_grad_() for p in layer.parameters()]


@pytest.mark.parametrize("measure", ["legs", "legt", "diag-lin"])
def test_second_derivatives(measure):
    """Of outputs and states, by every parameter and the input, against differences."""
    layer, u = make(1, 4, measure=measure), signal(1, 3, 1).requires_grad_()
    run, values = as_function(layer)
    inputs = u, *values
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("measure", ["legs", "legt", "diag-lin"])
def test_function_transforms(measure):
    """vmap is a loop, and jacrev gives what autograd gives."""
    layer, u = make(2, 4, measure=measure), signal(2, 6, 2)
    run, values = as_function(layer)
    others = [1.1 * v.detach() for v in values]
    together = torch.func.vmap(run, (None, *[0] * len(values)))(
        u, *map(torch.stack, zip(values, others, strict=True))
    )
    for i, one in enumerate((run(u, *values), run(u, *others))):
        for found, expected in zip(together, one, strict=True):
            assert relative(found[i], expected) < 1e-12
    place = [name for name, _ in layer.named_parameters()].index("frequency")
    y, x = torch.func.jacrev(run, 1 + place)(u, *values)
    outputs, states = run(u, *values)
    for row, expected in ((y[1, 4, 0], outputs[1, 4, 0]), (x[0, 1, 2], states[0, 1, 2])):
        assert (
            relative(row, torch.autograd.grad(expected, values[place], retain_graph=True)[0])
            < 1e-12
        )


def test_never_mutates():
    layer, u = make(), signal(1, 9, 4)
    before = copy.deepcopy(layer.state_dict())
    for L in (9, 3, 7):
        layer(u[:, :L], layer.initial_state(1))
        layer.step(u[:, 0], layer.initial_state(1))
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("measure", ["legs", "diag-lin"])
def test_kept_kernels_are_fresh(measure):
    """The same tensor while nothing moves; after any change in place, the kernel of now."""
    layer, u = make(measure=measure), signal(1, 9, 4)
    with torch.no_grad(), kernels_kept():
        first = layer.kernel(9)
        assert layer.kernel(9) is first
        assert layer.kernel(9, 2.0) is not first and layer.kernel(8).shape == (4, 8)
        with torch.enable_grad():
            train(layer, 1)
            assert layer.kernel(9).requires_grad
        second, y = layer.kernel(9), layer(u, return_state=False)
        layer.load_state_dict(make(measure=measure, seed=8).state_dict())
        third = layer.kernel(9)
    assert layer.kernel(9) is not third
    trained = make(measure=measure)
    train(trained, 1)
    assert torch.equal(second, trained.kernel(9)) and relative(first, second) > 1e-3
    assert torch.equal(y, trained(u, return_state=False))
    assert torch.equal(third, make(measure=measure, seed=8).kernel(9))


def own_system(rows=(), n=3, r=2):
    g = torch.Generator().manual_seed(4)
    z = torch.randn(*rows, n, r + 2, dtype=torch.complex128, generator=g)
    Lambda = torch.complex(-z[..., 0].real.exp(), z[..., 0].imag)
    return Lambda, z[..., 1:-1] if r else None, z[..., -1]


@pytest.mark.parametrize("rows", [(), (2,)])
@pytest.mark.parametrize("r", [0, 1, 3])
def test_own_system(rows, r):
    """from_system begins with the numbers given, and forgets them when trained, not when reset."""
    Lambda, P, B = own_system(rows, r=r)
    layer = S4Layer.from_system(Lambda, P, B, 2, dtype=torch.float64)
    found = layer.system()
    for v, value in zip(found[:3], (Lambda, P, B), strict=True):
        assert v is None if value is None else relative(v, value.expand_as(v)) < 1e-14
    train(layer, 1)
    assert relative(layer.system().B, found.B) > 1e-3
    layer.reset_parameters()
    assert torch.equal(layer.system().B, found.B)
    other = S4Layer.from_system(Lambda, P, B, 2, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.kernel(9), layer.kernel(9))


BAD_OWN = [
    (ValueError, "Lambda", lambda s: (-s[0], s[1], s[2])),
    (ValueError, "Lambda", lambda s: (s[0].expand(3, 3), s[1], s[2])),
    (ValueError, "Lambda, B|B", lambda s: (s[0], s[1], s[2][:2])),
    (ValueError, "Lambda, P|P", lambda s: (s[0], s[1][:2], s[2])),
    (TypeError, "B", lambda s: (s[0], s[1], None)),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_OWN)
def test_bad_own_system(error, name, changed):
    with pytest.raises(error, match=rf"^({name})\b"):
        S4Layer.from_system(*changed(own_system()), 2)
    with pytest.raises(TypeError, match="stray"):
        S4Layer.from_system(*own_system(), 2, stray=1)


@pytest.mark.parametrize("measure", [*MEASURES, "own"])
def test_dense(measure):
    """The dense recurrence in real coordinates gives the layer's outputs and states."""
    layer = (
        S4Layer.from_system(*own_system(), 3, dtype=torch.float64)
        if measure == "own"
        else make(3, measure=measure)
    )
    u = signal(1, 40, 3)
    y, state = layer(u)
    for h, (A, B, C) in enumerate(zip(*layer.dense(), strict=True)):
        sampled = discretize(A, B, layer.log_dt[h].exp(), layer.method)
        y_h, x_h = scan(*sampled, C, u[0, :, h])
        assert relative(y[0, :, h], y_h + layer.D[h] * u[0, :, h]) < 1e-11
        assert relative(state[0, h], x_h) < 1e-11


@pytest.mark.parametrize("measure", ["legs", "diag-lin"])
def test_without_a_batch(measure):
    layer, u = make(measure=measure), signal(1, 12, 4)
    y, state = layer(u)
    one, x = layer(u[0])
    assert torch.equal(one, y[0]) and torch.equal(x, state[0])
    assert torch.equal(layer(u[0], return_state=False), y[0])
    assert torch.equal(layer(u[0], x)[0], layer(u, state)[0][0])
    with pytest.raises(ValueError, match=r"^state"):
        layer(u[0], state)


@pytest.mark.parametrize("measure", ["legs", "diag-lin"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_empty_batch(measure, bidirectional):
    """No examples are no error: in parallel, with a state, stepping, and backwards."""
    layer, u = make(measure=measure, bidirectional=bidirectional), signal(0, 7, 4)
    y, state = layer(u)
    assert y.shape == (0, 7, 4) and state.shape == (0, 4, 0 if bidirectional else 8)
    y.sum().backward()
    assert (layer.D.grad == 0).all() and (layer.C.grad == 0).all()
    if bidirectional:
        return
    y, state = layer(u, layer.initial_state(0), torch.zeros(0, dtype=torch.int64))
    assert y.shape == (0, 7, 4) and state.shape == (0, 4, 8)
    for step in (layer.step, layer.stepper()):
        y, state = step(u[:, 0], state)
        assert y.shape == (0, 4) and state.shape == (0, 4, 8)


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
    assert layer.initial_state(2).dtype == torch.float64
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
    (ValueError, "measure", {"measure": "diag-fout"}),
    (ValueError, "method", {"method": "zoh"}),
    (ValueError, "method", {"method": "zoh", "measure": "random"}),
    (ValueError, "method", {"method": "euler", "measure": "diag-lin"}),
    (ValueError, "tied", {"tied": "yes"}),
    (ValueError, "backend", {"backend": "fast"}),
    (ValueError, "backend", {"backend": "cauchy", "measure": "diag-lin"}),
]


@pytest.mark.parametrize(("error", "name", "changed"), BAD_LAYER)
def test_bad_layer(error, name, changed):
    with pytest.raises(error, match=f"^{name}"):
        S4Layer(**{"d_model": 4, "d_state": 8} | changed)


U = signal(2, 6, 4)
STATE = torch.zeros(2, 4, 8, dtype=torch.float64)
BAD_FORWARD = [
    (TypeError, "u", {"u": [1.0]}),
    (TypeError, "u", {"u": U + 0j}),
    (TypeError, "u", {"u": U.float()}),
    (ValueError, "u", {"u": U[0, 0]}),
    (ValueError, "u", {"u": U[..., :3]}),
    (ValueError, "u", {"u": U[:, :0]}),
    (ValueError, "state", {"state": STATE[:1]}),
    (ValueError, "state", {"state": STATE[..., :3]}),
    (TypeError, "state", {"state": STATE + 0j}),
    (TypeError, "state", {"state": STATE.float()}),
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
        layer.initial_state(-1)
    both = make(bidirectional=True)
    calls = [
        lambda: both.step(U[:, 0], STATE),
        lambda: both(U, STATE),
        lambda: both.initial_state(2),
        lambda: both.stepper(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^bidirectional"):
            call()


def test_bad_stepper():
    step = make().stepper()
    for name, u, state in (
        ("state", U[:, 0], STATE[:1]),
        ("u", U, STATE),
        ("state", U[:, 0], STATE[..., :3]),
        ("u", U[:, 0, :3], STATE),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected \("):
            step(u, state)
    with pytest.raises(TypeError, match=r"^state: .*complex"):
        step(U[:, 0], STATE + 0j)
    with pytest.raises(TypeError, match=r"^u: expected torch.float64"):
        step(U[:, 0].float(), STATE)
    with pytest.raises(ValueError, match=r"^rate"):
        make().stepper(rate=0.0)


def test_bad_helpers():
    with pytest.raises(ValueError, match=r"^H"):
        init_dt(0, 0.1, 0.2)
    with pytest.raises(ValueError, match=r"^L"):
        make().kernel(0)


def test_flags_and_rates_are_not_guessed():
    with pytest.raises(ValueError, match="bidirectional: expected one of False, True"):
        S4Layer(4, 8, bidirectional="no")
    with pytest.raises(TypeError, match="rate: expected a number > 0, got a Tensor"):
        S4Layer(4, 8)(torch.zeros(1, 3, 4), rate=torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"measure: expected one of 'legs', 'legt', .*; got 'legz'"
    ):
        S4Layer(4, 8, measure="legz")
