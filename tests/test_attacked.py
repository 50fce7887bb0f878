"""What an attacker tries first: arguments of a wrong kind or size, damaged runs, odd terminals."""

import io
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from s4mini import baselines, cli, memory, selective
from s4mini.cauchy_sum import keops_available, nodes
from s4mini.convolve import causal_conv, krylov_kernel, scan
from s4mini.data import download, from_tensors, load
from s4mini.diagonal import s4d_kernel
from s4mini.discretization import discretize
from s4mini.generating import roots
from s4mini.kernel import dplr_kernel
from s4mini.layer import S4Layer
from s4mini.lowrank import half_spectrum, nplr
from s4mini.model import S4Config, S4Model
from s4mini.official import from_official, to_official
from s4mini.projection import hippo
from s4mini.recipes import READING, Recipe
from s4mini.saving import WEIGHTS
from s4mini.train import epoch_order, evaluate, fit, load_run

TINY = ["--size=4", "--d-model=4", "--n-layers=1", "--d-state=4", "--epoch-size=20", "--epochs=1"]
SMALL = S4Config(d_model=4, n_layers=1, d_state=4)

GENERATORS = [np.random.default_rng(0), np.random.RandomState(0), random.Random(0), 0, "seed"]
DRAWERS = {
    "S4Layer": lambda g: S4Layer(4, 8, generator=g),
    "reset_parameters": lambda g: S4Layer(4, 8).reset_parameters(g),
    "S4Model": lambda g: S4Model(SMALL, g),
    "init_dt": lambda g: memory.init_dt(4, 0.1, 0.2, g),
    "selective_copying": lambda g: selective.selective_copying(2, 9, generator=g),
    "SelectiveSSM": lambda g: selective.SelectiveSSM(4, generator=g),
    "LSSLLayer": lambda g: baselines.LSSLLayer(4, 8, generator=g),
    "orthogonal_features": lambda g: baselines.orthogonal_features(4, 8, g),
    "TransformerLayer": lambda g: baselines.TransformerLayer(8, generator=g),
    "PublishedKernel": lambda g: baselines.PublishedKernel(4, 8, generator=g),
    "PlainBlock": lambda g: baselines.PlainBlock(4, torch.ones(4, 9), g),
}


@pytest.mark.parametrize("name", DRAWERS)
@pytest.mark.parametrize("number", range(len(GENERATORS)))
def test_generators_of_others_are_named(name, number):
    with pytest.raises(TypeError, match=r"^generator: expected a torch.Generator"):
        DRAWERS[name](GENERATORS[number])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**64), ("seed", -1), ("epoch_size", 10**9), ("d_model", 10**9),
        ("n_layers", 10**9), ("d_state", 10**6), ("epochs", 10**12), ("batch_size", 0),
    ],
)  # fmt: skip
def test_numbers_out_of_range_at_the_command_line_and_in_python(field, value, capsys):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        Recipe("digits", **{field: value})
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", "digits", f"--{field.replace('_', '-')}={value}"])
    seen = capsys.readouterr()
    assert stopped.value.code == 2 and f"{field}: expected" in seen.err
    assert "Traceback" not in seen.err


HALF = (*half_spectrum(nplr("legs", 8))[:3], torch.ones(4, dtype=torch.complex128))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("seed", lambda: epoch_order(3, 0, 3, 2**32)),
        ("size", lambda: epoch_order(3, 0, 10**9, 0)),
        ("n_layers", lambda: S4Config(n_layers=10**9)),
        ("d_model", lambda: S4Config(d_model=10**9)),
        ("d_state", lambda: S4Config(d_state=2**14)),
        ("N", lambda: hippo("legs", 2**70)),
        ("N", lambda: hippo("legs", -1)),
        ("L", lambda: krylov_kernel(torch.eye(2), torch.ones(2), torch.ones(2), 2**70)),
        ("L", lambda: krylov_kernel(torch.eye(2), torch.ones(2), torch.ones(2), -1)),
        ("L", lambda: S4Layer(4, 8).kernel(-3)),
        ("batch", lambda: S4Layer(4, 8).initial_state(-1)),
        ("dt_max", lambda: S4Config(dt_min=0.5, dt_max=0.1)),
        ("dt_max", lambda: S4Layer(4, 8, dt_min=0.5, dt_max=0.1)),
        ("dt_min", lambda: S4Layer(4, 8, dt_min=10**400)),
        ("dt_max", lambda: S4Layer(4, 8, dt_max=1e308)),
        ("dt_min", lambda: S4Config(dt_min=1e-300)),
        ("dt_max", lambda: Recipe("digits", dt_max=1e308)),
        ("rate", lambda: S4Layer(4, 8)(torch.ones(1, 3, 4), rate=1e308)),
        ("dt", lambda: discretize(*hippo("legs", 4), 1e308)),
        ("dt", lambda: dplr_kernel(*HALF, 1e308, 9)),
        ("dt", lambda: s4d_kernel(HALF[0], HALF[2], HALF[3], torch.tensor(1e308).double(), 9)),
    ],
)
def test_counts_and_sizes_out_of_range(name, call):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call()


def test_the_largest_seed_trains(tmp_path):
    recipe = Recipe(
        "digits", size=4, d_model=4, n_layers=1, d_state=4, epochs=1, epoch_size=9, seed=2**32 - 1
    )
    assert fit(recipe, tmp_path, progress="none").test is not None
    assert len(epoch_order(5, 10**9, 7, 2**32 - 1)) == 7


U = torch.randn(2, 10, 4)
ODD = {
    "sparse": U.to_sparse(),
    "nested": torch.nested.nested_tensor([U[0], U[1, :5]], layout=torch.jagged),
    "meta": U.to("meta"),
    "float8": U.to(torch.float8_e4m3fn),
    "integers": U.long(),
    "complex": U + 0j,
    "array": U.numpy(),
}
LAYER, MODEL = S4Layer(4, 8), S4Model(S4Config(d_input=4, d_model=4, n_layers=1, d_state=4))
READERS = {
    "layer": LAYER,
    "model": MODEL,
    "causal_conv": lambda u: causal_conv(u, torch.ones(10, 4)),
    "scan": lambda u: scan(torch.eye(3), torch.ones(3), torch.ones(3), u),
}
COMPLEX_TOO = {("causal_conv", "complex"), ("scan", "complex")}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_nothing_can_be_computed_with(reader, kind):
    if (reader, kind) in COMPLEX_TOO:
        return
    with pytest.raises((TypeError, ValueError), match=r"^u: expected"):
        READERS[reader](ODD[kind])


@pytest.mark.parametrize("kind", ["meta", "float8", "integers", "complex", "array"])
def test_steps_of_odd_tensors(kind):
    x, u = LAYER.initial_state(2), ODD[kind][:, 0]
    for step in (LAYER.step, LAYER.stepper()):
        with pytest.raises((TypeError, ValueError), match=r"^u: expected"):
            step(u, x)
        with pytest.raises((TypeError, ValueError), match=r"^state: expected"):
            step(U[:, 0], ODD[kind])
    with pytest.raises((TypeError, ValueError), match=r"^u: expected"):
        MODEL.step(u, MODEL.initial_state(2))


def test_half_precision_is_mixed_with_nothing():
    half, brain, single = torch.ones(9).half(), torch.ones(9).bfloat16(), torch.ones(9)
    for pair in ((half, brain), (half, half), (half, single), (single, brain)):
        with pytest.raises(TypeError, match=r"^[uK]: expected a tensor in single or double"):
            causal_conv(*pair)
    with pytest.raises(TypeError, match=r"^A_bar: expected a tensor in single or double"):
        krylov_kernel(torch.eye(9).half(), brain, single, 4)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_number_of_numpy_is_a_number(kind):
    dt, (Lambda, P, B, _) = kind(0.25), half_spectrum(nplr("legs", 8))
    C = torch.ones(4, dtype=Lambda.dtype)
    for call in (
        lambda dt: dplr_kernel(Lambda, P, B, C, dt, 5),
        lambda dt: s4d_kernel(Lambda, B, C, dt, 5),
        lambda dt: discretize(*hippo("legs", 4), dt)[0],
    ):
        assert torch.equal(call(dt), call(0.25))
    assert S4Config(dt_max=dt).dt_max == 0.25 and type(S4Config(dt_max=dt).dt_max) is float


@pytest.mark.parametrize("flag", ["prenorm", "bidirectional", "tied", "tokens"])
@pytest.mark.parametrize("value", ["False", "yes", 2, 1, None])
def test_a_word_or_a_number_is_no_flag(flag, value):
    with pytest.raises(TypeError, match=f"^{flag}: expected True or False"):
        S4Config(**{flag: value})


OWN = (torch.randn(4, 5, 1), torch.arange(4))
SPLITS = "train", "validation", "test"
PLAIN = Recipe("digits", size=4, d_model=4, n_layers=1, d_state=4, epochs=1, epoch_size=20)


def fitted(**given):
    return fit(PLAIN, **{"out": "never", "progress": "none"} | given)


STATE = to_official(S4Layer(2, 4))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(
            ("dtype", lambda d=d: S4Layer(4, 8, dtype=d))
            for d in ("float32", 3, torch.int64, float)
        ),
        *(("device", lambda d=d: S4Layer(4, 8, device=d)) for d in ("gpu", "", -1, 0.5)),
        *(("dtype", lambda d=d: from_official(STATE, dtype=d)) for d in ("double", torch.int64)),
        *(("state", lambda s=s: from_official(s)) for s in (None, 3, "x", {}, {"D": None})),
        ("state", lambda: from_official(STATE | {"kernel.C": 3})),
        ("state", lambda: from_official(STATE | {"D": STATE["D"][0]})),
        ("config", lambda: from_official(STATE, 3)),
        ("bandlimit", lambda: from_official(STATE, {"bandlimit": "x"})),
        ("layer", lambda: to_official(None)),
        ("l_max", lambda: to_official(S4Layer(2, 4), 2.5)),
        ("dtype", lambda: nodes(8, "float32")),
        ("device", lambda: nodes(8, device="gpu")),
        ("dtype", lambda: roots(8, None)),
        ("device", lambda: load("digits").to("gpu")),
        ("folder", lambda: load("mnist", folder=3)),
        ("folder", lambda: download("mnist", "")),
        ("train", lambda: from_tensors("x", train=3, test=3)),
        ("test", lambda: from_tensors("x", train=(U, U), test=(U,))),
        ("validation", lambda: from_tensors("x", train=(U, U), test=(U, U), validation=())),
        *(("out", lambda out=out: fitted(out=out)) for out in (5, "", None, b"x")),
        *(("logger", lambda x=x: fitted(logger=x)) for x in (3, "csv", True, [])),
        *(("data", lambda x=x: fitted(data=x)) for x in ({}, {"train": OWN}, 3, "digits")),
        ("data", lambda: fitted(data={"train": OWN, "test": OWN, "dev": OWN})),
        ("train", lambda: fitted(data={"train": OWN[0], "test": OWN})),
        ("resume", lambda: fitted(resume="yes")),
        ("folder", lambda: load_run(None)),
        ("folder", lambda: MODEL.save_pretrained("")),
        ("folder", lambda: S4Model.from_pretrained(3)),
        ("model", lambda: evaluate(None, load("digits"))),
        ("data", lambda: evaluate(MODEL, "digits")),
        ("index", lambda: evaluate(MODEL, load("digits"), "test", [1])),
    ],
)
def test_odd_arguments_are_named(name, call):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        call()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main(["fit", "digits", *TINY, f"--out={out}", "--progress=none"]) == 0
    return out


def without(name):
    return lambda kept: kept.pop(name)


def reshaped(kept):
    name = next(iter(kept["state_dict"]))
    kept["state_dict"][name] = torch.ones(1, 2, 3)


def renamed(kept):
    kept["state_dict"]["other"] = kept["state_dict"].popitem()[1]


DAMAGE = {
    "a half": lambda raw: raw[: len(raw) // 2],
    "nothing": lambda raw: b"",
    "a text": lambda raw: b"text",
    "a bit": lambda raw: raw[:9000] + bytes([raw[9000] ^ 1]) + raw[9001:],
    "code": lambda raw: b"cos\nsystem\n(S'true'\ntR.",
    "no history": without("history"),
    "short history": lambda kept: kept["history"].clear(),
    "no recipe": without("recipe"),
    "no epoch": without("epoch"),
    "epoch of another kind": lambda kept: kept.update(epoch="one"),
    "no weights": without("state_dict"),
    "weights of another shape": reshaped,
    "weights of other names": renamed,
    "no optimiser": without("optimizer_states"),
    "no schedule": without("lr_schedulers"),
    "no loops": without("loops"),
    "optimiser of another kind": lambda kept: kept.update(optimizer_states=[{"state": 3}]),
    "weights that are no numbers": lambda kept: [
        v.fill_(math.nan) for v in kept["state_dict"].values() if v.is_floating_point()
    ],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_run_is_one_line(run, tmp_path, capsys, how):
    for path in run.iterdir():
        if path.is_file() and path.name != "result.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "last.ckpt"
    content = path.read_bytes()
    if how in ("a half", "nothing", "a text", "a bit", "code"):
        path.write_bytes(DAMAGE[how](content))
    else:
        kept = torch.load(io.BytesIO(content), weights_only=True)
        DAMAGE[how](kept)
        torch.save(kept, path)
    damaged = path.read_bytes()
    command = ["fit", "digits", *TINY[:-1], "--epochs=2", "--resume", f"--out={tmp_path}"]
    code = cli.main([*command, "--progress=none"])
    seen = capsys.readouterr()
    assert code == 1 and len(seen.err.splitlines()) == 1, seen.err
    assert seen.err.startswith(f"s4mini: {path}: not a whole checkpoint"), seen.err
    assert path.read_bytes() == damaged and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", ["recipe.json", "config.json", WEIGHTS])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"data": 3}', None])
def test_a_damaged_file_beside_the_weights_is_one_line(run, tmp_path, capsys, name, content):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code = cli.main(["evaluate", str(tmp_path)])
    seen = capsys.readouterr()
    if name == "config.json" and content is None:  # it repeats what the weights' file says
        assert code == 0
        return
    assert code == 1 and len(seen.err.splitlines()) == 1 and name in seen.err, seen.err


def test_an_edited_recipe_is_not_believed(run, tmp_path, capsys):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    edited = json.loads((tmp_path / "recipe.json").read_text()) | {"size": 8}
    (tmp_path / "recipe.json").write_text(json.dumps(edited))
    for record in ("result.json", "last.ckpt"):
        assert cli.main(["evaluate", str(tmp_path)]) == 1
        told = f"{tmp_path / 'recipe.json'}: expected size = 4, as in {tmp_path / record}, got 8"
        assert capsys.readouterr().err == f"s4mini: {told}\n"
        (tmp_path / record).unlink()


def test_another_recipe_does_not_go_on_with_a_run(run, capsys):
    for option, said in (("--d-model=8", "d_model = 4"), ("--lr=0.5", "lr = 0.01")):
        command = ["fit", "digits", *TINY, option, "--resume", f"--out={run}", "--progress=none"]
        assert cli.main(command) == 1
        assert (
            f"recipe: expected {said}, as in {run / 'recipe.json'}, got" in capsys.readouterr().err
        )


def test_options_of_a_named_data_set_are_not_recorded_of_ones_own(tmp_path):
    recipe = replace(PLAIN, gray=True, order="permuted", length=7, horizon=3, examples=9)
    result = fit(recipe, tmp_path, dict.fromkeys(SPLITS, OWN), progress="none")
    told = json.loads((tmp_path / "recipe.json").read_text())
    assert result.recipe == Recipe(**told) == replace(Recipe(**told), **READING, data="own")
    with pytest.raises(ValueError, match=r"^length: expected None, as digits has no such option"):
        fit(replace(PLAIN, length=7), tmp_path / "b", load("digits", size=4), progress="none")


def test_unreadable_weights_say_so(tmp_path):
    (tmp_path / WEIGHTS).mkdir()  # not even root can read a folder as a file
    with pytest.raises(OSError, match=WEIGHTS) as caught:
        S4Model.from_pretrained(tmp_path)
    assert "no such file" not in str(caught.value).lower()


@pytest.mark.parametrize("stream", ["ascii", "closed"])
def test_training_ends_well_in_any_terminal(tmp_path, monkeypatch, stream):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii") if stream == "ascii" else None
    monkeypatch.setattr(sys, "stdout", terminal)
    command = ["fit", "digits", *TINY, "--seeds=2", f"--out={tmp_path}", "--progress=lines"]
    assert cli.main(command) == 0
    assert set(json.loads((tmp_path / "summary.json").read_text())["seeds"]) == {0, 1}
    if terminal is not None:
        terminal.flush()
        assert b"epoch   1 of 1" in terminal.buffer.getvalue()


def test_empty_sets_are_refused(tmp_path):
    u, y = torch.randn(3, 5, 1), torch.arange(3)
    with pytest.raises(ValueError, match=r"^train: expected equal counts > 0"):
        from_tensors("x", train=(u[:0], y[:0]), test=(u, y))
    with pytest.raises(ValueError, match=r"^test: expected equal counts > 0"):
        from_tensors("x", train=(u, y), test=(u[:0], y[:0]))
    with pytest.raises(ValueError, match=r"^split: expected one of"):
        load("digits").batch("dev", y)


def test_keops_without_a_writable_folder_is_not_available(monkeypatch):
    pytest.importorskip("pykeops")
    if keops_available():
        pytest.skip(keops_available())
    monkeypatch.delenv("KEOPS_CACHE_FOLDER", raising=False)
    monkeypatch.setenv("HOME", "/proc/none")
    assert keops_available().startswith("KeOps keeps its programs in /proc/none/.cache: ")
    monkeypatch.setenv("KEOPS_CACHE_FOLDER", "/proc/none/keops")
    assert "/proc/none/keops" in keops_available()


BARE = """
import torch
from s4mini import S4Config, S4Layer, S4Model
layer = S4Layer(d_model=8, d_state=64)
y, state = layer(torch.randn(2, 100, 8))
y.sum().backward()
layer.stepper()(torch.randn(2, 8), state)
S4Model(S4Config(d_input=3, d_output=10, d_model=8, n_layers=1))(torch.randn(2, 9, 3))
try:
    S4Layer(8, backend="keops").kernel(9)
except ValueError as error:
    assert "KeOps needs a C++ compiler" in str(error), error
else:
    raise AssertionError("KeOps without a compiler")
import s4mini.cli as cli
assert cli.main(["list"]) == 0
assert cli.main(["data", "mnist"]) == 1
raise SystemExit(cli.main(["fit", "digits", *{tiny}, "--out={out}", "--progress=lines"]))
"""


def test_without_compiler_home_or_network(tmp_path):
    program = BARE.replace("{tiny}", repr(TINY)).replace("{out}", str(tmp_path / "run"))
    keep = {k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "OMP_NUM_THREADS")}
    nowhere = {"HOME": "/proc/none", "PATH": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=keep | nowhere, capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "test " in done.stdout and (tmp_path / "run" / "result.json").exists()
    (line,) = (x for x in done.stderr.splitlines() if x.startswith("s4mini: "))
    assert "/proc/none" in line and "Traceback" not in done.stderr


INTERRUPTED = """
import os, signal, sys
from s4mini.cli import main  # loads nothing that takes long
assert not {"torch", "numpy", "lightning"} & set(sys.modules)
times = COUNT
def hook(event, arguments):
    global times
    if event == "import" and arguments[0].startswith("torch.") and times:
        times -= 1
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hook)
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background
raise SystemExit(main(["list"]))
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_torch_is_imported_is_one_line(times):
    program = INTERRUPTED.replace("COUNT", str(times))
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert (done.stdout, done.stderr) == ("", "s4mini: interrupted\n")
