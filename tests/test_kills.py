"""Runs that are killed by SIGKILL, at random moments and at each write, and go on.

A few of the kills are made each time; `pytest --slow` makes all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOMENTS, WRITES = 30, 60
ROOT = Path(__file__).resolve().parents[1]

# Forks before anything has started a thread: each run is a child that can be killed.
PROGRAM = r"""
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from s4mini.data import load
from s4mini.recipes import Recipe
from s4mini.train import fit

root, kind, numbers = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
recipe = Recipe("digits", size=4, d_model=4, n_layers=1, d_state=4, epochs=3, epoch_size=100)
data = load("digits", size=4)


def start(out, at=0):
    # train in a child, on from what is there; die at the at-th call that changes the folder
    child = os.fork()
    if child:
        return child
    seen = 0

    def count(event, arguments=()):
        nonlocal seen
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.fsync"):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, os.fsync = os.fsync, lambda descriptor: (count("os.fsync"), fsync(descriptor))
    status = 1
    try:
        sys.addaudithook(count)
        fit(recipe, out, data, resume=(out / "recipe.json").exists(), progress="none")
        status = 0
    finally:
        os._exit(status)


def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def figures(out):
    result = json.loads((out / "result.json").read_text())
    clocks = ("seconds", "examples_per_second")
    history = [[v for k, v in row.items() if k not in clocks] for row in result["history"]]
    return [history, sorted(result["test"].items())]


began = time.monotonic()
assert end(start(root / "alone")) == 0
spent, found = time.monotonic() - began, {"alone": figures(root / "alone")}
for number in numbers:
    out, killed = root / str(number), False
    if kind == "writes":
        killed = end(start(out, number)) == -signal.SIGKILL
    else:
        child, draw = start(out), random.Random(number)
        time.sleep(draw.uniform(0, spent))
        os.kill(child, signal.SIGKILL)
        killed = end(child) == -signal.SIGKILL
    if (out / "model.safetensors").exists():
        from s4mini.train import load_run
        load_run(out)
    assert end(start(out)) == 0, number
    assert not list(out.rglob("*.tmp")), number
    found[number] = figures(out) if killed else "alive"
print(json.dumps(found))
"""


def shares(kind, few, count):
    """Return what to kill: a few numbers, and in slow tests all others by tens."""
    rest = [n for n in range(1, count + 1) if n not in few]
    parts = [rest[i : i + 10] for i in range(0, len(rest), 10)]
    return [
        pytest.param(kind, few, id=f"{kind}-few"),
        *(
            pytest.param(kind, part, id=f"{kind}-{part[0]}", marks=pytest.mark.slow)
            for part in parts
        ),
    ]


@pytest.mark.parametrize(
    ("kind", "numbers"), [*shares("moments", [1, 2], MOMENTS), *shares("writes", [9, 27], WRITES)]
)
def test_a_killed_run_goes_on_to_the_same_figures(tmp_path, kind, numbers):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), kind, json.dumps(numbers)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    (history, test), alive = found.pop("alone"), 0
    for number, ended in found.items():
        if ended == "alive":
            alive += 1
            continue
        for ours, theirs in zip(ended[0], history, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6), number
        assert [k for k, _ in ended[1]] == [k for k, _ in test]
        assert [v for _, v in ended[1]] == pytest.approx([v for _, v in test], abs=1e-6)
    if kind == "writes" and min(numbers) < 10:
        assert alive == 0, "the run has as many writes"
