"""Classifier, forecaster, language model: what they answer, and what they refuse."""

import subprocess
import sys
import warnings

import pytest
import torch
from helpers import make_model as make
from helpers import relative, signal

from s4mini.layer import S4Layer
from s4mini.model import S4Config, S4Model
from s4mini.tasks import (
    PlainStepper,
    S4Classifier,
    S4Forecaster,
    S4LanguageModel,
    draw,
    export_onnx,
    export_program,
)

U = signal(2, 5, 2)
IDS = torch.zeros(2, 5, dtype=torch.int64)


def classifier():
    return S4Classifier(make(), ("a", "b", "c"))


def forecaster(horizon=4, **options):
    return S4Forecaster(make(pool="none", **options), horizon)


def speaker(seed=0, V=6, **options):
    g = torch.Generator().manual_seed(seed)
    usual = {"pool": "none", "tokens": True, "d_model": 8, "d_state": 8, "n_layers": 2}
    config = S4Config(d_input=V, d_output=V, **usual | options)
    return S4LanguageModel(S4Model(config, g)).double().eval()


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
        lambda: S4LanguageModel(
            S4Model(S4Config(d_input=3, d_output=4, d_model=4, pool="none", tokens=True))
        ),
    ),
    (TypeError, "state", lambda: forecaster().forecast(None)),
    (ValueError, "state", lambda: forecaster().forecast(make(d_model=4).initial_state(2))),
    (TypeError, "u", lambda: forecaster()(None)),
    (ValueError, "u", lambda: forecaster()(U[..., :1])),
    (ValueError, "lengths", lambda: forecaster()(U, torch.tensor([6, 1]))),
    (TypeError, "lengths", lambda: forecaster()(U, 5)),
    (ValueError, "bidirectional", lambda: forecaster(bidirectional=True).initial_state(1)),
    (ValueError, "top_k", lambda: speaker().generate(IDS, 3, top_k=0)),
    (TypeError, "top_k", lambda: speaker().generate(IDS, 3, top_k=2.0)),
    (ValueError, "lengths", lambda: speaker().generate(IDS, 3, lengths=torch.tensor([0, 5]))),
    (ValueError, "lengths", lambda: speaker().generate(IDS, 3, lengths=torch.tensor([1]))),
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


def test_prompts_of_different_lengths():
    """A padded prompt is continued as it is alone."""
    model, g = speaker(), torch.Generator().manual_seed(0)
    prompt, lengths = torch.randint(6, (4, 9), generator=g), torch.tensor([9, 1, 4, 8])
    for i, n in enumerate(lengths):
        prompt[i, n:] = -100  # no token at all
    together = model.generate(prompt, 10, temperature=0, lengths=lengths)
    for i, n in enumerate(lengths):
        alone = model.generate(prompt[i : i + 1, :n], 10, temperature=0)
        assert torch.equal(together[i : i + 1], alone)


def test_top_k():
    model, prompt = speaker(), torch.tensor([[0, 5, 1]]).expand(500, 3)
    best = model(prompt[:1])[0, -1].topk(2).indices.tolist()
    drawn = model.generate(prompt, 1, torch.Generator().manual_seed(0), top_k=2)[:, 0]
    assert set(drawn.tolist()) == set(best)
    assert torch.equal(
        model.generate(prompt[:1], 9, top_k=1), model.generate(prompt[:1], 9, temperature=0)
    )
    logits = torch.randn(50, 6)
    a, b = (draw(logits, 1.0, k, torch.Generator().manual_seed(1)) for k in (None, 6))
    assert torch.equal(a, b)


def test_without_a_generator_draws_come_from_the_global_stream():
    model, prompt, found = speaker(), torch.tensor([[0, 5, 1]]), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(prompt, 15))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_stepper_of_a_task():
    model, u = speaker(), torch.tensor([[0, 3, 5, 1]])
    step, state = model.stepper(), model.initial_state(1)
    for u_k in u.unbind(1):
        y, state = step(u_k, state)
    assert relative(y, model(u)[:, -1]) < 1e-9


STEPPED = {  # what has a stepper, in single precision
    "layer": lambda g: S4Layer(4, 16, "legt", generator=g),
    "diagonal": lambda g: S4Layer(4, 16, "diag-lin", generator=g),
    "pooled": lambda g: S4Model(
        S4Config(d_input=2, d_output=5, d_model=16, n_layers=2, d_state=8), g
    ),
    "tokens": lambda g: speaker(V=5, n_layers=1).float(),
}
ALONE = """
import sys
sys.modules["s4mini"] = None  # importing it fails
import torch
for path in sys.argv[1:]:
    step, (u, state) = torch.export.load(path + ".pt2").module(), torch.load(path + ".in")
    found = []
    for u_k in u:
        y, *state = step(u_k, *state)
        found.append(y)
    torch.save((torch.stack(found), state), path + ".out")
"""


def stepped(name, length, batch):
    """Return a stepper in evaluation mode, inputs, and what it makes of them."""
    g = torch.Generator().manual_seed(0)
    step = STEPPED[name](g).eval().stepper()
    plain = PlainStepper(step)
    shape = length, *plain.example(batch).shape
    whole = plain.example(1).dtype == torch.int64
    u = torch.randint(5, shape, generator=g) if whole else torch.randn(shape, generator=g)
    state, found = plain.start(batch), []
    with torch.no_grad():
        for u_k in u:
            y, *state = plain(u_k, *state)
            found.append(y)
    return step, u, torch.stack(found), state


def test_programs_run_where_the_package_is_not(tmp_path):
    """Exported, saved, and read for other numbers of sequences by a process without s4mini."""
    expected = {}
    for name, batch in zip(STEPPED, (1, 2, 3, 1), strict=True):
        step, u, *expected[name] = stepped(name, 20, batch)
        torch.export.save(export_program(step), tmp_path / f"{name}.pt2")
        torch.save((u, PlainStepper(step).start(batch)), tmp_path / f"{name}.in")
    paths = [str(tmp_path / name) for name in STEPPED]
    subprocess.run([sys.executable, "-c", ALONE, *paths], check=True, cwd=tmp_path)
    for name, (y, state) in expected.items():
        found, after = torch.load(tmp_path / f"{name}.out")
        assert relative(found, y) < 1e-6
        for a, b in zip(after, state, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_steps_run_in_onnx(tmp_path):
    """A thousand steps of another runtime; then the linear maps of a model in eight bits."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    for name in ("layer", "diagonal", "pooled"):
        step, u, y, state = stepped(name, 1000, 2)
        plain, small, start = tmp_path / name, tmp_path / "small", PlainStepper(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.write_bytes(export_onnx(step, opset=20 if name == "layer" else 18))
        files = [(plain, 1e-5)]
        if name == "pooled":
            quantization.quantize_dynamic(plain, small)
            assert small.stat().st_size < plain.stat().st_size
            files.append((small, 0.1))
        for path, tolerance in files:
            session = runtime.InferenceSession(path)
            assert [x.name for x in session.get_inputs()] == ["u", *start.names()]
            other, found = [x.numpy() for x in start.start(2)], []
            for u_k in u:
                given = dict(zip(("u", *start.names()), (u_k.numpy(), *other), strict=True))
                z, *other = session.run(None, given)
                found.append(torch.from_numpy(z))
            assert relative(torch.stack(found), y) < tolerance
            assert relative(torch.from_numpy(other[0]), state[0]) < tolerance


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, r"^opset: expected 18 \.\.\. \d+, got 3$", lambda s: export_onnx(s, 3)),
        (ValueError, r"^opset: .* got 99$", lambda s: export_onnx(s, 99)),
        (TypeError, "^opset", lambda s: export_onnx(s, "18")),
        (TypeError, "^opset", lambda s: export_onnx(s, True)),
        (TypeError, "^stepper: .* got S4Model", lambda s: export_onnx(s.model)),
        (TypeError, "^stepper: .* got function", lambda s: export_program(signal)),
        (TypeError, "^batch", lambda s: PlainStepper(s).start(1.5)),
    ],
)
def test_wrong_exports_are_named(error, match, call):
    pytest.importorskip("onnxscript")
    with pytest.raises(error, match=match):
        call(make().stepper())


def test_a_missing_onnx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript: pip install \"s4mini\[onnx\]\""):
        export_onnx(make().stepper())
