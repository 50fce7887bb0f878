"""Measurements: what they count, what they leave out, and what they leave behind."""

import json
import platform
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace

import pytest
import torch

from s4mini import bench, cli
from s4mini.bench import (
    CONTESTANTS,
    BenchOptions,
    Case,
    cases,
    keep_memory,
    peak_memory,
    predicted_bytes,
    prepare,
    provenance,
    ratio_table,
    rivals,
    run_bench,
    run_case,
    time_in_turn,
)
from s4mini.figures import recorded

MEMORY_IS_TOLD = peak_memory(lambda: None) is not None
needs_memory = pytest.mark.skipif(not MEMORY_IS_TOLD, reason="the system does not tell")


# Time


def test_minimum_median_and_ratio_within_rounds(monkeypatch):
    # rounds of (1, 2), (3, 9), (2, 4) seconds: the ratios are 2, 3, 2
    clock = iter([0, 1, 10, 12, 20, 23, 30, 39, 40, 42, 50, 54])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = time_in_turn({"a": lambda: None, "b": lambda: None}, 3, 100)
    assert found["a"] == {"min_s": 1, "median_s": 2, "ratio": 1, "rounds": 3}
    assert found["b"] == {"min_s": 2, "median_s": 4, "ratio": 2, "rounds": 3}


def test_functions_are_called_in_turn():
    order = []
    runs = {name: (lambda n=name: order.append(n)) for name in "abc"}
    time_in_turn(runs, rounds=3)
    assert "".join(order) == "abcabcabc"


def test_the_limit_ends_the_rounds_and_there_is_always_one(monkeypatch):
    clock = iter(range(0, 1000, 2))  # each call takes two seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = time_in_turn({"a": lambda: None}, rounds=100, seconds=5)
    assert found["a"]["rounds"] == 3
    assert time_in_turn({"a": lambda: None}, 100, 1)["a"]["rounds"] == 1


# Memory


# Each in a process of its own: what an earlier test has left is not taken again.
PEAKS = {
    "64": "lambda: torch.ones(64, 2**18).sum()",
    "256": "lambda: torch.ones(256, 2**18).sum()",
    "64, after a larger peak": "lambda: torch.ones(64, 2**18).sum()",
}


@needs_memory
@pytest.mark.parametrize("what", PEAKS)
def test_the_peak_is_seen_although_the_tensor_is_gone(what):
    earlier = "torch.ones(2**26).sum()\n" if "larger" in what else ""
    program = "import torch\nfrom s4mini.bench import peak_memory\n" + earlier
    program += f"print(peak_memory({PEAKS[what]}))"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert abs(int(found.stdout) / 2**20 - int(what.split(",")[0])) < 8


@needs_memory
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("kernel", H=16, L=1024, threads=1), "direct"),
        (Case("lssl", H=96, L=256, threads=1), "LSSL"),
        (Case("attention", H=32, L=1024, threads=1), "softmax"),
    ],
)
def test_predictions(case, name):
    extra = bench._elsewhere("_measure_memory", case, name, "cpu", 0)
    assert 0.3 < predicted_bytes(case, name) / extra < 3


def test_predictions_follow_the_tables():
    def grows(what, name, **change):
        small = Case(what, H=64, L=4096)
        return predicted_bytes(replace(small, **change), name) / predicted_bytes(small, name)

    assert grows("kernel", "direct", N=128) == 2
    assert grows("attention", "softmax", L=8192) == 4
    assert grows("lssl", "LSSL", H=128) == 8
    assert predicted_bytes(Case("kernel", H=512, L=2**16), "ours") == 0


FAULTS = """
import resource, sys, torch
def fill(n=20):
    for _ in range(n):
        torch.ones(2**24)  # 64 MiB: beyond every threshold of glibc
def faults():
    fill()  # until the heap is as large as it will be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEPT = {
    "by a call": "from s4mini.bench import keep_memory\nfaults(), keep_memory(), faults()",
    "by the program": """
from s4mini import cli
cli._COMMANDS["fit"] = (lambda argv: faults()), "checks"
sys.argv = ["s4mini", "fit"]
cli.main(["fit"])  # a function of another program: the process is not its own
cli.main()
""",
}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize("how", KEPT)
def test_memory_that_is_kept_costs_no_new_pages(how):
    command = [sys.executable, "-c", FAULTS + KEPT[how]]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    given_back, kept = map(int, found.stdout.split())
    assert kept < given_back / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(bench.platform, "libc_ver", lambda: ("", ""))
    assert keep_memory() is False


# Cases


@pytest.mark.parametrize("what", CONTESTANTS)
def test_everyone_who_is_here_can_be_prepared(what):
    reasons = rivals(what)
    assert not reasons[CONTESTANTS[what][0]]  # ratios refer to it
    case = Case(what, H=8, L=20, N=4, batch=2, depth=2)
    for name, reason in reasons.items():
        if reason:
            with pytest.raises(ValueError, match=f"^name: {name} is absent"):
                prepare(case, name)
        elif name != "keops":  # which compiles for a minute
            prepare(case, name)()


def test_the_seed_decides():
    case = Case("kernel", H=3, L=50, N=8)
    one, two, other = (prepare(case, "ours", seed=s)() for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_gradient_from_above_does_not_decay():
    seen = []
    K = torch.ones(3, 4000, requires_grad=True)
    K.register_hook(seen.append)
    bench._gradients(lambda: K * 1, [K], torch.Generator().manual_seed(0))()
    assert 0.8 < seen[0][:, 2000:].std() / seen[0][:, :2000].std() < 1.25


@pytest.mark.parametrize(
    ("what", "name"), [("training", "ours"), ("training", "LSTM"), ("lssl", "LSSL")]
)
def test_a_training_step_changes_the_parameters(what, name):
    torch.manual_seed(0)
    step = prepare(Case(what, H=8, L=16, N=4, batch=2), name)
    module = step.__closure__[[*step.__code__.co_freevars].index("module")].cell_contents
    before = [p.clone() for p in module.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_equal_parameters_of_the_dense_rival():
    def count(name):
        module = bench._module(Case("lssl", H=128, L=16), name, torch.Generator())
        return sum(p.numel() for p in module.parameters())

    assert 0.4 < count("S4-small") / count("LSSL") < 0.7


# A process for each case


def test_a_row_says_what_was_measured():
    case = Case("step", H=4, L=5, N=4, batch=3, threads=1)
    rows = run_case(case, rounds=2)
    assert [row["name"] for row in rows] == list(CONTESTANTS["step"])
    for row in rows:
        assert {key: row[key] for key in asdict(case)} == asdict(case)
        assert row["rounds"] == 2 and 0 < row["min_s"] <= row["median_s"]
        assert row["memory_bytes"] is None or row["memory_bytes"] >= 0
    assert rows[0]["ratio"] == 1
    json.dumps(rows)


def test_one_that_fails_does_not_end_the_others(monkeypatch):
    real = bench._elsewhere

    def killed(function, case, name, *args, **options):
        if function == "_measure_memory" and name == "LSTM":
            raise BrokenProcessPool("terminated abruptly")
        return real(function, case, name, *args, **options)

    monkeypatch.setattr(bench, "_elsewhere", killed)
    case = Case("step", H=4, L=5, N=4, threads=1)
    rows = run_case(case, rounds=1, names=("stepper", "LSTM"))
    assert [row["name"] for row in rows] == ["stepper", "LSTM"]
    assert "median_s" in rows[0]
    assert rows[1]["reason"] == "BrokenProcessPool: terminated abruptly"


def test_what_does_not_fit_is_not_run():
    rows = run_case(Case("attention", H=4, L=64, threads=1), rounds=1, memory=1e-6)
    absent = [row for row in rows if "reason" in row]
    assert [row["name"] for row in absent] == ["softmax"]
    assert absent[0]["reason"].startswith("would need about")
    assert "median_s" not in absent[0]


# Tables and files


def row(name, median=1.0, memory=2**20, **more):
    figures = {"min_s": median, "median_s": median, "ratio": median, "rounds": 1}
    return (
        {"name": name}
        | asdict(Case("kernel", H=4, L=10))
        | figures
        | {"memory_bytes": memory}
        | more
    )


def test_a_table_shows_what_was_measured_and_nothing_else():
    absent = {"name": "direct"} | asdict(Case("kernel", H=4, L=10)) | {"reason": "too large"}
    lines = ratio_table([row("ours"), absent, row("keops", 2.0, None, keep=True)]).splitlines()
    assert len(lines) == 4 and "direct" not in "".join(lines)
    assert (
        lines[3] == "| kernel | 4, 10, 64 | 1, all, memory kept | keops | 2e+03, 2e+03 | 2.00 |  |"
    )
    assert len({line.count("|") for line in lines}) == 1


def test_provenance_is_what_a_recorded_figure_needs(tmp_path, monkeypatch):
    import s4mini

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(s4mini, "__file__", str(tmp_path / "s4mini" / "__init__.py"))
    (tmp_path / "results" / "tea.json").write_text(json.dumps(provenance("make tea", seed=3)))
    assert recorded("tea")["versions"]["torch"] == torch.__version__


def test_the_file_is_written_after_every_case(tmp_path, monkeypatch):
    out, seen = tmp_path / "a.json", []

    def stopped(case, *args, **limits):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(case)
        return [row("ours")]

    monkeypatch.setattr(bench, "run_case", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_bench(BenchOptions(out=out), report=lambda line: None)
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert list(tmp_path.iterdir()) == [out]


def test_quick_is_the_same_cases_in_tiny():
    full, quick = cases(BenchOptions()), cases(BenchOptions(quick=True))
    assert {c.what for c in full} == {c.what for c in quick} == set(CONTESTANTS)
    assert max(c.H * c.L for c in quick) < 1000
    assert {c.what for c in cases(BenchOptions(what=("step",)))} == {"step"}


# The command line


def test_the_command_measures(tmp_path):
    out = tmp_path / "tiny.json"
    options = ["--quick", "--what", "step", "--rounds", "1", "--out", str(out)]
    command = [sys.executable, "-m", "s4mini.cli", "bench", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| step | 8, 32, 8 | 2, 1 | stepper |" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    content = json.loads(out.read_text())
    assert content["command"].startswith("s4mini bench --quick --what step")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--what kernle", "what: expected one of 'kernel', 'block'"),
        ("--device tpu", "device: expected one of 'cpu', 'cuda'; got 'tpu'"),
        ("--out /nowhere/a.json", "out: there is no folder /nowhere"),
        ("--rounds 0", "rounds: expected an integer >= 1, got 0"),
        ("--seconds -1", "seconds: expected a finite number > 0, got -1"),
        ("--memory 0", "memory: expected a finite number > 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    options, message, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "run_case", lambda *a, **k: pytest.fail("measured"))
    monkeypatch.setenv("COLUMNS", "200")  # so that no message is wrapped
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *options.split()])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    with pytest.raises(ValueError, match=r"^device: PyTorch finds no CUDA"):
        BenchOptions(device="cuda")


# Bad calls


def test_bad_calls_are_refused():
    case = Case("kernel", H=4, L=10)
    calls = [
        (ValueError, "what", lambda: Case("kernl", 4, 10)),
        (TypeError, "H", lambda: Case("kernel", 4.0, 10)),
        (ValueError, "N", lambda: Case("kernel", 4, 10, 5)),
        (ValueError, "H", lambda: Case("attention", 6, 10)),
        (ValueError, "H", lambda: Case("lssl", 4, 10)),
        (ValueError, "threads", lambda: Case("kernel", 4, 10, threads=0)),
        (ValueError, "what", lambda: rivals("all")),
        (ValueError, "name", lambda: prepare(case, "LSTM")),
        (ValueError, "device", lambda: prepare(case, "ours", "tpu")),
        (ValueError, "device", lambda: peak_memory(print, "tpu")),
        (ValueError, "rounds", lambda: time_in_turn({"a": print}, 0)),
        (TypeError, "seconds", lambda: time_in_turn({"a": print}, 1, "1")),
        (ValueError, "seconds", lambda: run_case(case, seconds=0)),
        (ValueError, "rounds", lambda: run_case(case, rounds=0)),
        (ValueError, "names", lambda: run_case(case, names=("LSTM",))),
        (ValueError, "device", lambda: provenance("", 0, "tpu")),
    ]
    for kind, name, call in calls:
        with pytest.raises(kind, match=f"^{name}: "):
            call()
