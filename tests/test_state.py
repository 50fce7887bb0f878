"""No function leaves the process other than it found it: each is called, and all is looked at."""

import contextlib
import inspect
import logging
import os
import random
import signal
import sys
import threading
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Generator

import s4mini
from s4mini import bench, data, model, recipes
from s4mini.cauchy_sum import nodes
from s4mini.diagonal import sample
from s4mini.lowrank import half_spectrum, nplr
from s4mini.official import to_official
from s4mini.recurrence import in_real, increments
from s4mini.ssm import SSM

go = pytest.importorskip("plotly.graph_objects")
go.Figure().to_plotly_json()  # the first one sets filters of warnings
for name in ("sklearn.datasets", "pykeops"):  # their import changes the environment and the path
    with contextlib.suppress(ModuleNotFoundError):
        import_module(name)

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.stem for p in (ROOT / "s4mini").glob("*.py") if p.stem != "__init__")
MEANT = {  # they set the process, and say so: test_bench and test_figures ask them
    "bench.keep_memory",
    "figures.use_style",
}
# They make modules, whose initial values come from PyTorch's own numbers, as those of
# torch.nn's do, or train one that was made: these numbers go on, and nothing else changes.
DRAW = {
    "ablation.dense_layer",
    "ablation.make_start",
    "forecast.make_forecaster",
    "lra.make_reader",
    "speech.make_listener",
    "speech.train_listener",
}
LONG = {  # they train for minutes, by the functions that are called here
    "ablation.record_starts",
    "forecast.record_forecasts",
    "forecast.run_forecasts",
    "lra.record_readers",
    "speech.record_speech",
    "speech.run_speech",
}
FUNCTIONS = [
    f"{module}.{name}"
    for module in MODULES
    for name in import_module(f"s4mini.{module}").__all__
    if inspect.isfunction(getattr(import_module(f"s4mini.{module}"), name))
    and f"{module}.{name}" not in MEANT | LONG
]


def state():
    """Return all that belongs to the process and not to a caller."""
    probe = torch.tensor(1e-310, dtype=torch.float64) * 1  # zero where denormals are flushed
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "denormals": bool(probe != 0),
        "numbers of torch": torch.get_rng_state().tolist(),
        "numbers of NumPy": str(np.random.get_state()),
        "numbers of Python": random.getstate(),
        "rules of NumPy": (np.geterr(), np.get_printoptions()),
        "streams": (sys.stdout, sys.stderr, sys.stdin, sys.__stdout__),
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "path": list(sys.path),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
        "log levels": [logging.getLogger(n).level for n in ("", "lightning.pytorch", "torch")],
        "umask": umask(),
    }


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def unchanged(before):
    after = state()
    return [name for name in before if before[name] != after[name]]


double = torch.float64
Lambda, P, B, V = half_spectrum(nplr("legs", 8))
C, dt = torch.ones(4, dtype=Lambda.dtype), torch.tensor(0.1, dtype=double)
A, b = s4mini.hippo("legs", 4)
SYSTEM = SSM(A, b, b, 0.0)
STEP = in_real(*increments(Lambda, P, B, dt))
u, qkv = torch.ones(2, 9, dtype=double), torch.ones(1, 2, 9, 4)
OWN = (torch.ones(4, 5, 1), torch.arange(4))
SMALL = recipes.Recipe(
    "digits", size=4, d_model=4, n_layers=1, d_state=4, epochs=1, epoch_size=20, batch_size=10
)
CASE = bench.Case("kernel", 2, 8, 16)


def digits():
    return data.load("digits", size=4)


def trained(out):
    return import_module("s4mini.train").fit(SMALL, out, digits(), progress="none")


def written(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name


def small():
    return model.S4Model(model.S4Config(d_model=4, n_layers=1, d_state=4), Generator())


H = model.S4Config(d_model=4, n_layers=1, d_state=4)


def refused(call):
    with pytest.raises((ValueError, OSError, TypeError)):
        call()


def tried(call):
    """Call what may be refused on this machine."""
    with contextlib.suppress(ValueError, OSError, TypeError, RuntimeError, IndexError, ImportError):
        call()


def sounds(folder):
    """Return one silent recording of a second's eighth for each file name."""
    import wave

    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(2000))
    return {f"{d}_x_{k}.wav": folder / "a.wav" for d in (0, 1) for k in (1, 7)}


def entered(context):
    with context:
        pass


def hours():
    """Return a data set of forecasts, as long as a day and a half."""
    u = torch.sin(torch.arange(36.0)).expand(4, 36)[..., None]
    return data.from_tensors("x", train=(u, u[:, :3]), validation=(u, u[:, :3]), test=(u, u[:, :3]))


def spoken(folder):
    path = sounds(folder)["0_x_1.wav"]
    paths = {f"0_x_{k}.wav": path for k in range(50)}
    return import_module("s4mini.speech").load_speech(paths, length=400)


def listener():
    with torch.random.fork_rng(devices=[]):
        return import_module("s4mini.speech").make_listener("waveform")


ONE = torch.tensor([0])


# How to call each function with little; t is a fresh folder.
CALLS = {
    "ablation.beginning": lambda f, t: f("gaussian", 4, Generator()),
    "ablation.dense_layer": lambda f, t: f("gaussian", 2, 4),
    "ablation.modes": lambda f, t: f(A, b),
    "ablation.make_start": lambda f, t: f("gaussian", 1, 2, 4, 4, 1),
    "ablation.rightmost": lambda f, t: f(small()),
    "ablation.train_start": lambda f, t: f("gaussian", digits(), 0, 1, 32, 32, 16, 4, 1),
    "baselines.lssl_kernel": lambda f, t: f(A / 9, b, torch.ones(4, dtype=double), 5),
    "baselines.attention": lambda f, t: f(qkv, qkv, qkv),
    "baselines.fused_attention": lambda f, t: f(qkv, qkv, qkv),
    "baselines.linear_attention": lambda f, t: f(qkv, qkv, qkv),
    "baselines.orthogonal_features": lambda f, t: f(4, 4, Generator()),
    "baselines.performer_attention": lambda f, t: f(qkv, qkv, qkv, torch.ones(4, 4)),
    "baselines.unit_circle_kernel": lambda f, t: f(Lambda, P, B, C, 0.1, 8),
    "bench.time_in_turn": lambda f, t: f({"a": lambda: 1}, rounds=1, seconds=0.01),
    "bench.peak_memory": lambda f, t: f(lambda: torch.ones(9)),
    "bench.rivals": lambda f, t: f("kernel"),
    "bench.prepare": lambda f, t: f(CASE, "ours")(),
    "bench.predicted_bytes": lambda f, t: f(CASE, "ours"),
    "bench.run_case": lambda f, t: f(CASE, rounds=1, seconds=0.01, names=["ours"]),
    "bench.ratio_table": lambda f, t: f([]),
    "bench.reasons": lambda f, t: f([]),
    "bench.provenance": lambda f, t: f("a command", 0),
    "bench.cases": lambda f, t: f(bench.BenchOptions(quick=True)),
    "bench.run_bench": lambda f, t: f(
        bench.BenchOptions(what=("step",), quick=True, rounds=1, seconds=0.01),
        report=lambda line: None,
    ),
    "bench.write_record": lambda f, t: f(t / "a.json", "call()", 0, {}),
    "bench.record_runs": lambda f, t: f(t / "a.json", "call()", 0, {}, [({"n": 1}, dict)]),
    "cauchy_sum.nodes": lambda f, t: f(8),
    "cauchy_sum.damp": lambda f, t: f(Lambda, C[None], 8),
    "cauchy_sum.cauchy": lambda f, t: f(C[None], Lambda, *nodes(8)),
    "cauchy_sum.keops_available": lambda f, t: f(),
    "checks.check_int": lambda f, t: f("N", 3),
    "checks.check_number": lambda f, t: f("x", 3),
    "checks.check_bool": lambda f, t: f("x", True),
    "checks.check_positive": lambda f, t: f("x", 3),
    "checks.check_step": lambda f, t: f("dt", u),
    "checks.check_path": lambda f, t: f("out", t),
    "checks.check_device": lambda f, t: (f("device", "cpu"), refused(lambda: f("device", "gpu"))),
    "checks.check_dense": lambda f, t: f("x", u),
    "checks.values_can_be_read": lambda f, t: f(),
    "checks.check_generator": lambda f, t: f("g", None),
    "checks.check_choice": lambda f, t: f("x", 1, (1, 2)),
    "checks.check_tensors": lambda f, t: f(u=(u, "B L")),
    "checks.checked": lambda f, t: f(value="int >= 1")(lambda value: value)(3),
    "cli.read_recipe": lambda f, t: f("digits"),
    "cli.main": lambda f, t: (f(["list"]), f(["no such command"])),
    "convolve.scan": lambda f, t: f(A / 9, b, b, u[0]),
    "convolve.krylov_kernel": lambda f, t: f(A / 9, b, b, 5),
    "convolve.fft_length": lambda f, t: f(7),
    "convolve.causal_conv": lambda f, t: f(u, u),
    "convolve.channel_conv": lambda f, t: f(u[..., None], u[:1]),
    "data.from_tensors": lambda f, t: f("x", train=OWN, test=OWN),
    "data.whole": lambda f, t: f(data.Batch(u, u)),
    "data.data_dir": lambda f, t: f(),
    "data.contents": lambda f, t: f(written(t, "a", b"x")),
    "data.source": lambda f, t: f("digits"),
    "data.available": lambda f, t: f("mnist", t),
    "data.options_of": lambda f, t: f("mnist"),
    "data.load": lambda f, t: f("digits"),
    "data.official": lambda f, t: f("digits"),
    "data.needs": lambda f, t: f("json"),
    "data.download": lambda f, t: f("digits", t),
    "diagonal.finest": lambda f, t: f(torch.device("cpu")),
    "diagonal.sample": lambda f, t: f(Lambda, B, dt, "zoh"),
    "diagonal.power_sums": lambda f, t: f(C, Lambda / 9, 5),
    "diagonal.mode_sums": lambda f, t: f(C, sample(Lambda, B, dt, "zoh"), 5, torch.complex128),
    "diagonal.s4d_kernel": lambda f, t: f(Lambda, B, C, 0.1, 5),
    "diagonal.s4d_init": lambda f, t: f("lin", 4),
    "diagonal.s4d_step": lambda f, t: f(Lambda, B, C, 0.1, u[0, 0], C),
    "diagonal.s4d_response": lambda f, t: f(Lambda, C, 0.1, C, 5),
    "diagonal.past": lambda f, t: f(sample(Lambda, B, dt, "zoh"), u[0], None, None),
    "diagonal.s4d_final_state": lambda f, t: f(Lambda, B, 0.1, u[0]),
    "diagonalize.legs_eigenvectors": lambda f, t: f(4),
    "discretization.gbt": lambda f, t: f(A, b, 0.1, 0.5),
    "discretization.zoh": lambda f, t: f(A, b, 0.1),
    "discretization.discretize": lambda f, t: f(A, b, 0.1),
    "figures.take_controls": lambda f, t: f(go.Figure()),
    "figures.show": lambda f, t: f(go.Figure(), "nothing"),
    "figures.packed": lambda f, t: f(u),
    "figures.playable": lambda f, t: f("remember", {}, Figure(), "nothing"),
    "figures.result_path": lambda f, t: f("remember"),
    "figures.recorded": lambda f, t: f("remember"),
    "filters.wind": lambda f, t: f(u, 3),
    "filters.energy_within": lambda f, t: f(u, 3),
    "filters.rows_to_half": lambda f, t: f(u, 3),
    "filters.layer_kernels": lambda f, t: f(small(), 9),
    "forecast.last_value": lambda f, t: f(u, 2),
    "forecast.last_day": lambda f, t: f(torch.ones(1, 48), 2),
    "forecast.make_forecaster": lambda f, t: f("linear", 36, 3),
    "forecast.forecast_errors": lambda f, t: f(lambda v: v[:, :3], hours(), "test"),
    "forecast.train_forecaster": lambda f, t: f("linear", hours(), 0, steps=2, every=1),
    "forecast.read_ett": lambda f, t: refused(lambda: f(written(t, "a.csv", b"date"))),
    "forecast.load_ett": lambda f, t: refused(lambda: f({"a": written(t, "a.csv", b"date")})),
    "fused.fused_cauchy": lambda f, t: tried(lambda: f(C[None], Lambda, *nodes(8))),
    "fused.triton_available": lambda f, t: f(),
    "generating.roots": lambda f, t: f(8),
    "generating.truncated_C": lambda f, t: f(A / 9, b, 5),
    "generating.check_batch": lambda f, t: f(a=(1, 2), b=(2,)),
    "images.read_cifar10": lambda f, t: refused(lambda: f(written(t, "a.bin", b"x"))),
    "images.check_labels": lambda f, t: f("a", np.arange(3)),
    "images.read_idx": lambda f, t: f(written(t, "a", bytes([0, 0, 8, 1, 0, 0, 0, 1, 7])), 1),
    "images.raster": lambda f, t: f(torch.zeros(1, 4, 4, 1, dtype=torch.uint8), size=2),
    "images.reading_order": lambda f, t: f("permuted", 9),
    "images.image_data": lambda f, t: f(
        dict.fromkeys(("train", "test"), torch.zeros(2, 4, 4, 1, dtype=torch.uint8)),
        dict.fromkeys(("train", "test"), torch.arange(2)),
        ("a", "b"),
    ),
    "kernel.backends": lambda f, t: f(),
    "kernel.dplr_kernel": lambda f, t: f(Lambda, P, B, C, 0.1, 9),
    "kernel.kernel_of": lambda f, t: f(Lambda, P, B, C, torch.tensor(0.1).double(), 9),
    "layer.valid_steps": lambda f, t: f(u[..., None], torch.tensor([3, 9])),
    "layer.clear_padding": lambda f, t: f(u[..., None], torch.tensor([3, 9])),
    "layer.layer_shapes": lambda f, t: f(4, 8, "legs", False, False),
    "layer.kernels_kept": lambda f, t: entered(f()),
    "lowrank.nplr": lambda f, t: f("legs", 8),
    "lowrank.half_spectrum": lambda f, t: f(nplr("legt", 8)),
    "lowrank.real_form": lambda f, t: f(Lambda, P, B, C),
    "lra.draw_listops": lambda f, t: f(random.Random(0), 40),
    "lra.evaluate_listops": lambda f, t: f([7]),
    "lra.draw_pathfinder": lambda f, t: f(np.random.RandomState(0)),
    "lra.load_listops": lambda f, t: f({}, length=60, examples=4),
    "lra.load_pathfinder": lambda f, t: f({}, examples=4),
    "lra.positions": lambda f, t: f(4, 4),
    "lra.make_reader": lambda f, t: f("s4", 1, 2),
    "lra.accuracy": lambda f, t: f(recipes.build(SMALL, 1, 10), digits(), "test", ONE),
    "lra.train_reader": lambda f, t: f("lstm", digits(), seconds=0.01, looks=1, held=8),
    "memory.measure": lambda f, t: f("legs", u[0]),
    "memory.basis": lambda f, t: f("legs", 4, u[0]),
    "memory.init_dt": lambda f, t: f(4, 0.1, 0.2, Generator()),
    "model.pool_steps": lambda f, t: f(u[..., None], "mean"),
    "model.model_shapes": lambda f, t: list(f(H)),
    "model.parameter_groups": lambda f, t: f(small()),
    "model.descend": lambda f, t: (lambda w: f(w, w.weight.sum(), torch.optim.SGD([w.weight])))(
        torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")
    ),
    "official.truncation": lambda f, t: tried(lambda: f(Lambda[None], P[None], dt[None], 8)),
    "official.times_matrix": lambda f, t: tried(lambda: f(C, torch.eye(8).to(C))),
    "official.official_options": lambda f, t: f(None),
    "official.official_tensors": lambda f, t: tried(
        lambda: f(to_official(s4mini.S4Layer(4, 8, generator=Generator())), False)
    ),
    "official.assemble": lambda f, t: f(
        Lambda.expand(2, 4),
        P.expand(2, 4, 1),
        B.expand(2, 4),
        C.expand(1, 2, 4),
        torch.ones(2),
        dt.expand(2),
        "bilinear",
        torch.float64,
    ),
    "official.to_official": lambda f, t: f(s4mini.S4Layer(4, 8, generator=Generator())),
    "official.from_official": lambda f, t: f(
        to_official(s4mini.S4Layer(4, 8, generator=Generator()))
    ),
    "projection.legendre": lambda f, t: f(4, u[0]),
    "projection.laguerre": lambda f, t: f(4, u[0]),
    "projection.fourier": lambda f, t: f(4, u[0]),
    "projection.domain": lambda f, t: f("legs", 1.0),
    "projection.reconstruct": lambda f, t: f("legs", b, 1.0, u[0]),
    "projection.hippo": lambda f, t: f("fout", 4),
    "recipes.load_data": lambda f, t: f(SMALL),
    "recipes.build": lambda f, t: f(SMALL, 1, 10),
    "recipes.check_recipe": lambda f, t: f(SMALL),
    "recipes.sizes_of": lambda f, t: f(digits()),
    "recurrence.apply": lambda f, t: f(Lambda, P, C),
    "recurrence.increments": lambda f, t: f(Lambda, P, B, dt),
    "recurrence.dplr_step": lambda f, t: f(Lambda, P, B, C, 0.1, u[0, 0], C),
    "recurrence.to_real": lambda f, t: f(C),
    "recurrence.to_row": lambda f, t: f(C),
    "recurrence.to_half": lambda f, t: f(torch.ones(8)),
    "recurrence.in_real": lambda f, t: f(*increments(Lambda, P, B, dt)),
    "recurrence.advance": lambda f, t: f(STEP, u[0, 0], torch.ones(8, dtype=double)),
    "recurrence.state_as_input": lambda f, t: f(Lambda, P, 0.1, C),
    "recurrence.state_response": lambda f, t: f(Lambda, P, C, 0.1, C, 5),
    "recurrence.state_after": lambda f, t: f(STEP, u, None, None),
    "recurrence.state_echo": lambda f, t: f(STEP, torch.ones(8).double(), STEP.B_bar[None], 5),
    "recurrence.check_lengths": lambda f, t: f(torch.tensor([1]), 3),
    "recurrence.final_state": lambda f, t: f(Lambda, P, B, 0.1, u[0]),
    "saving.write_atomically": lambda f, t: f(t / "a", b"x"),
    "saving.write_together": lambda f, t: f(t, {"a": b"x", "b": b"y"}),
    "saving.saved_class": lambda f, t: (small().save_pretrained(t), f(t)),
    "selective.selective_copying": lambda f, t: f(2, 9, generator=Generator()),
    "selective.compose": lambda f, t: f(u, u),
    "selective.linear_scan": lambda f, t: f(u, u),
    "speech.read_wav": lambda f, t: f(sounds(t)["0_x_1.wav"]),
    "speech.load_speech": lambda f, t: f(sounds(t)),
    "speech.resampled": lambda f, t: f(spoken(t), 1, 2),
    "speech.cepstrum": lambda f, t: f(np.ones(2000, dtype=np.float32)),
    "speech.make_listener": lambda f, t: f("cepstrum"),
    "speech.held_out": lambda f, t: f(spoken(t)),
    "speech.answers": lambda f, t: f(listener(), spoken(t), "train", ONE),
    "speech.share_right": lambda f, t: f(listener(), spoken(t), "train", ONE),
    "speech.half_rate": lambda f, t: f(listener(), spoken(t), spoken(t)),
    "speech.train_listener": lambda f, t: f(listener(), spoken(t), 1),
    "speech.warped": lambda f, t: f(100.0, 8000.0, 0.5),
    "ssm.promote": lambda f, t: f(A=A),
    "ssm.response": lambda f, t: tried(lambda: f(A, b, C)),
    "ssm.expm": lambda f, t: f(A),
    "ssm.impulse_response": lambda f, t: f(SYSTEM, u[0]),
    "ssm.change_basis": lambda f, t: f(SYSTEM, torch.eye(4, dtype=double)),
    "tables.krylov_tables": lambda f, t: f(Lambda, P, B[:, None], dt, 4),
    "tables.real_columns": lambda f, t: f(C[:, None]),
    "tables.real_rows": lambda f, t: f(C[None]),
    "tables.grow_rows": lambda f, t: tried(lambda: f(u[:1, :4], torch.eye(4).double(), 2)),
    "tables.table_kernel": lambda f, t: f(Lambda, P, B, C, dt, 9),
    "tasks.export_program": lambda f, t: f(small().stepper()),
    "tasks.export_onnx": lambda f, t: tried(lambda: f(small().stepper())),
    "tasks.draw": lambda f, t: f(torch.ones(2, 3), generator=Generator()),
    "train.split_indices": lambda f, t: f(10),
    "train.epoch_order": lambda f, t: f(10, 0, 4, 0),
    "train.schedule": lambda f, t: f(1, 2, 9),
    "train.share": lambda f, t: f(torch.arange(4), 0, 2),
    "train.parts_of": lambda f, t: f(SMALL, digits()),
    "train.quietly": lambda f, t: entered(f()),
    "train.best_of": lambda f, t: f([{"validation_accuracy": 0.5}]),
    "train.is_first": lambda f, t: f(),
    "train.only_writer": lambda f, t: entered(f(t)),
    "train.predict": lambda f, t: f(recipes.build(SMALL, 1, 10), digits(), "test"),
    "train.evaluate": lambda f, t: f(recipes.build(SMALL, 1, 10), digits(), "test"),
    "train.as_data": lambda f, t: f({"train": OWN, "test": OWN}),
    "train.fit": lambda f, t: f(SMALL, t, digits(), progress="none"),
    "train.load_run": lambda f, t: (trained(t), f(t)),
    "train.summarise": lambda f, t: refused(lambda: f([])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_leaves_the_process_as_it_was(name, tmp_path):
    module, _, function = name.partition(".")
    assert name in CALLS, f"{name}: write a call of it into CALLS"
    called = getattr(import_module(f"s4mini.{module}"), function)
    before = state()
    CALLS[name](called, tmp_path)
    assert unchanged(before) == (["numbers of torch"] if name in DRAW else [])


def test_each_call_is_of_a_function():
    assert set(CALLS) <= set(FUNCTIONS)
