"""Measurements: what they count, what they skip, and what they leave behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from s4mini import bench
from s4mini.bench import (
    REFERENCES,
    Case,
    free_bytes,
    measure_case,
    peak_memory,
    predicted_bytes,
    prepare,
    provenance,
    ratio_table,
    rivals,
    run_bench,
    run_case,
    time_runs,
)
from s4mini.figures import recorded

LINUX = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


# Time


def test_median_and_quartiles(monkeypatch):
    clock = iter([0, 1, 10, 13, 20, 22, 30, 34, 40, 45])  # 1, 3, 2, 4, 5 seconds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timing = time_runs(lambda: None, repeat=5, budget=100)
    assert timing["median_s"] == 3 and timing["runs"] == 5
    assert 1 <= timing["low_s"] <= 2.5 and 3.5 <= timing["high_s"] <= 5


def test_one_call_is_its_own_quartile():
    timing = time_runs(lambda: None, repeat=1)
    assert timing["low_s"] == timing["median_s"] == timing["high_s"] > 0


def test_the_budget_ends_the_calls():
    assert time_runs(lambda: time.sleep(0.02), repeat=100, budget=0.05)["runs"] == 3


# Memory


@pytest.mark.skipif(not LINUX, reason="the peak cannot be reset here")
def test_the_peak_is_seen_although_the_tensor_is_gone():
    for mebibytes in (64, 256):
        extra = peak_memory(lambda n=mebibytes: torch.ones(n, 2**18).sum())
        assert abs(extra / 2**20 - mebibytes) < 8


@pytest.mark.skipif(not LINUX, reason="the peak cannot be reset here")
def test_an_earlier_peak_does_not_count():
    torch.ones(2**26).sum()  # 256 MiB
    assert peak_memory(lambda: torch.ones(2**24).sum()) < 80 * 2**20


def test_free_memory_is_some_of_the_machines():
    assert 2**20 < free_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Cases


@pytest.mark.parametrize("what", REFERENCES)
def test_everyone_who_is_here_can_be_prepared(what):
    known = rivals(what)
    assert REFERENCES[what] in known and not known[REFERENCES[what]]
    assert "auto" not in known
    for name, reason in known.items():
        case = Case(what, name, H=8, L=20, N=4, batch=2)
        if reason:
            with pytest.raises(ValueError, match=f"^name: {name} is absent"):
                prepare(case)
        elif "keops" not in name:  # which compiles for a minute
            prepare(case)()


def test_backends_compute_the_same_gradients():
    results = [prepare(Case("kernel", n, H=3, L=50, N=8))() for n in ("torch", "naive")]
    for one, two in zip(*results, strict=True):
        assert (one - two).abs().max() < 1e-4 * two.abs().max()


def test_the_seed_decides():
    case = Case("forward", "torch", H=3, L=50, N=8)
    assert torch.equal(prepare(case, seed=1)(), prepare(case, seed=1)())
    assert not torch.equal(prepare(case, seed=1)(), prepare(case, seed=2)())


def test_a_training_step_changes_the_parameters():
    case = Case("lssl", "LSSL", H=8, L=16)
    torch.manual_seed(0)
    step = prepare(case)
    module = step.__closure__[[*step.__code__.co_freevars].index("module")].cell_contents
    before = [p.clone() for p in module.parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_equal_parameters_of_the_dense_rival():
    def count(name):
        module = bench._module(Case("lssl", name, H=128, L=16), torch.Generator())
        return sum(p.numel() for p in module.parameters())

    assert 0.4 < count("S4-small") / count("LSSL") < 0.7


@pytest.mark.parametrize(
    "case",
    [
        Case("kernel", "published", H=16, L=1024),
        Case("forward", "naive", H=32, L=2048),
        Case("lssl", "LSSL", H=96, L=256),
        Case("attention", "softmax", H=32, L=1024),
    ],
    ids=lambda c: f"{c.what}-{c.name}",
)
@pytest.mark.skipif(not LINUX, reason="the peak cannot be reset here")
def test_predictions(case):
    row = run_case(case, repeat=1, threads=1)
    assert row["status"] == "measured", row
    assert 0.4 < predicted_bytes(case) / row["memory_bytes"] < 3


def test_predictions_follow_the_tables():
    def grows(what, name, **change):
        small = dict(H=64, L=4096, N=64)
        return predicted_bytes(Case(what, name, **small | change)) / predicted_bytes(
            Case(what, name, **small)
        )

    assert grows("kernel", "published", N=128) == pytest.approx(2, rel=0.1)
    assert grows("kernel", "torch", N=128) == 1
    assert grows("attention", "softmax", L=8192) > 3.5
    assert grows("attention", "fused", L=8192) == 2
    assert grows("lssl", "LSSL", H=512) > 100


# A process for each case


def test_a_row_says_what_was_measured():
    case = Case("forward", "torch", H=2, L=10, N=4)
    row = run_case(case, repeat=2, threads=1)
    assert {key: row[key] for key in asdict(case)} == asdict(case)
    assert row["status"] == "measured" and row["runs"] == 2
    assert row["memory_bytes"] >= 0 and row["low_s"] <= row["median_s"] <= row["high_s"]
    json.dumps(row)


def test_what_does_not_fit_is_not_run():
    row = run_case(Case("kernel", "published", H=512, L=4096), memory_limit=2**30)
    assert row["status"] == "skipped" and "would need about" in row["reason"]
    assert "the limit is 1.0 GiB" in row["reason"]


def test_what_takes_too_long_is_ended():
    start = time.perf_counter()
    row = run_case(Case("lssl", "LSSL", H=128, L=2**14), timeout=0.5)
    assert row["status"] == "skipped" and row["reason"] == "took longer than 0.5 s"
    assert time.perf_counter() - start < 60


def test_an_error_in_the_child_is_a_row():
    row = run_case(Case("kernel", "nobody", H=2, L=10, N=4))
    assert row["status"] == "failed" and row["reason"].startswith("ValueError: name: ")


class Dead:
    exitcode = -signal.SIGKILL

    def join(self):
        pass


def test_a_killed_child_is_a_row():
    ours, theirs = bench._context().Pipe(duplex=False)
    theirs.close()
    row = bench._receive(Dead(), ours, 1.0)
    assert row["status"] == "failed" and "killed" in row["reason"]


# Tables and files


def row(name, median=1.0, memory=2**20, **more):
    case = asdict(Case("kernel", name, H=4, L=10, N=4))
    timing = {"median_s": median, "low_s": median, "high_s": median, "runs": 1}
    return case | timing | {"memory_bytes": memory, "status": "measured"} | more


def test_ratios_are_to_the_reference_of_the_group():
    table = ratio_table([row("torch", 0.5), row("naive", 2.0, 2**23), row("torch", 9, H=5)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[2][-2:] == ["1", "1"] and lines[3][-2:] == ["4", "8"]
    assert lines[4][-2:] == ["1", "1"]
    assert len({len(line) for line in lines}) == 1


def test_what_was_not_measured_says_why():
    absent = row("naive") | {"status": "skipped", "reason": "too large"}
    for rows in ([absent], [row("torch"), absent], [absent | {"name": "torch"}, row("naive")]):
        assert "skipped: too large" in ratio_table(rows)


def test_a_measurement_without_memory_has_no_memory_ratio():
    table = ratio_table([row("torch", memory=0), row("naive")])
    assert table.splitlines()[3].endswith("| 1 |  |")


def test_provenance_is_what_a_recorded_figure_needs(tmp_path, monkeypatch):
    import s4mini

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(s4mini, "__file__", str(tmp_path / "s4mini" / "__init__.py"))
    content = provenance("make tea", seed=3, threads=2)
    (tmp_path / "results" / "tea.json").write_text(json.dumps(content))
    assert recorded("tea")["threads"] == 2
    assert content["versions"]["torch"] == torch.__version__


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    bench._save(path, {"a": 1})
    with pytest.raises(TypeError):
        bench._save(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# The command line


def test_a_run_leaves_a_file(tmp_path, capsys):
    out = tmp_path / "tiny.json"
    options = ["--quick", "--what", "forward", "attention", "--names", "torch", "fused"]
    assert run_bench([*options, "--threads", "1", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["command"].startswith("python -m s4mini.bench --quick --what forward")
    assert [r["name"] for r in content["rows"]] == ["torch", "fused"]
    printed = capsys.readouterr().out
    assert "| forward | 16 | 128 | torch |" in printed
    for name, reason in content["absent"].items():
        assert f"absent: {name}: {reason}" in printed


def test_the_module_can_be_run():
    command = [sys.executable, "-m", "s4mini.bench", "--quick", "--what", "layer"]
    done = subprocess.run([*command, "--names", "torch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| layer | 16 | 128 | torch |" in done.stdout
    assert "1/1" in done.stderr  # the progress bar
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--what kernle", "--what: expected one of 'forward', 'kernel'"),
        ("--what kernel --names tritn", "--names: expected one of 'torch'"),
        ("--what lssl --names torch", "--names: expected one of 'S4'"),
        ("--device tpu", "--device: expected one of 'cpu', 'cuda'; got 'tpu'"),
        ("--out /nowhere/a.json", "--out: there is no folder /nowhere"),
        ("--quick --N 7", ""),
        ("--N 7", "N: expected an even integer"),
        ("--H 0", "H: expected an integer >= 1"),
        ("--what attention --H 6", "H: expected a multiple of 4"),
        ("--repeat 0", "--repeat: expected an integer >= 1, got 0"),
        ("--timeout -1", "--timeout: expected a finite number > 0, got -1"),
        ("--memory 0", "--memory: expected a finite number > 0"),
        ("--threads 0", "--threads: expected an integer >= 1"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    options, message, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "run_case", lambda *a: row("torch"))
    status = run_bench(options.split())
    assert status == (1 if message else 0)
    if message:
        assert f"s4mini.bench: {message}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    assert run_bench(["--device", "cuda"]) == 1
    assert "finds no CUDA device" in capsys.readouterr().err


def test_the_file_is_written_after_every_case(tmp_path, monkeypatch):
    out, seen = tmp_path / "a.json", []

    def run_case(case, *rest):
        if seen:
            assert len(json.loads(out.read_text())["rows"]) == len(seen)
        seen.append(case)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return row("torch")

    monkeypatch.setattr(bench, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        run_bench(["--what", "forward", "--names", "torch", "--out", str(out)])
    assert len(json.loads(out.read_text())["rows"]) == 2


def test_all_failed_is_an_error(monkeypatch):
    failed = row("torch") | {"status": "failed", "reason": "why"}
    monkeypatch.setattr(bench, "run_case", lambda *a: failed)
    assert run_bench(["--quick", "--what", "forward"]) == 1


# Bad calls


def test_bad_calls_are_refused():
    case = Case("kernel", "torch", H=4, L=10)
    calls = [
        (ValueError, "what", lambda: Case("kernl", "torch", 4, 10)),
        (TypeError, "H", lambda: Case("kernel", "torch", 4.0, 10)),
        (ValueError, "N", lambda: Case("kernel", "torch", 4, 10, 5)),
        (ValueError, "H", lambda: Case("attention", "softmax", 6, 10)),
        (ValueError, "H", lambda: Case("lssl", "S4", 4, 10)),
        (ValueError, "what", lambda: rivals("all")),
        (ValueError, "name", lambda: prepare(Case("lssl", "torch", 8, 10))),
        (ValueError, "device", lambda: prepare(case, "tpu")),
        (ValueError, "device", lambda: peak_memory(print, "tpu")),
        (ValueError, "device", lambda: free_bytes("tpu")),
        (ValueError, "repeat", lambda: time_runs(print, 0)),
        (TypeError, "budget", lambda: time_runs(print, 1, "1")),
        (ValueError, "timeout", lambda: run_case(case, timeout=0)),
        (ValueError, "repeat", lambda: run_case(case, repeat=0)),
        (ValueError, "device", lambda: provenance("", 0, "tpu")),
        (ValueError, "repeat", lambda: measure_case(case, repeat=0)),
    ]
    for kind, name, call in calls:
        with pytest.raises(kind, match=f"^{name}: "):
            call()
