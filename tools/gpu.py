"""Measure what waits for a graphics processor, in one command and ten minutes.

    python tools/gpu.py                the tests, the bench, a piece of sequential CIFAR-10, pages
    python tools/gpu.py --rehearse     the same in miniature, without one

It needs no network. Each part has a process and a limit of its own, so that one that
fails or lasts does not take the others along. What it leaves: results/bench-cuda.json,
results/gpu.json (a row for each part, and what TF32 does to the kernel), and the run
runs/scifar, which the next call continues and `s4mini fit scifar --resume` ends.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from s4mini.bench import Case, prepare, provenance, time_in_turn
from s4mini.kernel import dplr_kernel
from s4mini.lowrank import half_spectrum, nplr
from s4mini.saving import write_atomically

ROOT = Path(__file__).resolve().parents[1]
TESTS = [f"tests/test_{name}.py" for name in ("gpu", "kernel", "fused")]
PAGES = [f"book/{name}.md" for name in ("tables", "kernel", "cauchy_sum", "fused", "scifar")]


def parts(rehearse: bool, results: Path, runs: Path) -> list[tuple[str, int, list[str]]]:
    """Return name, limit in seconds and command of each part."""
    test = [sys.executable, "-m", "pytest", "-q", "-n", "0"]
    program = [sys.executable, "-m", "s4mini.cli"]
    what = ["kernel", "backends", "block", "training", "lssl", "attention"]
    bench = ["bench", "--what", *what, "--rounds", "5", "--seconds", "2"]
    bench += ["--device", "cpu" if rehearse else "cuda", "--out", str(results / "bench-cuda.json")]
    fit = ["fit", "scifar", "--out", str(runs / "scifar"), "--progress", "lines"]
    fit += ["--precision", "bfloat16"]
    if rehearse:
        bench += ["--quick"]
        fit += ["--size", "8", "--d-model", "8", "--n-layers", "1", "--epoch-size", "50"]
        fit += ["--epochs", "2"]
    if (runs / "scifar").exists():
        fit += ["--resume"]
    return [
        ("tests", 120, [*test, *(TESTS[:1] if rehearse else TESTS)]),
        ("bench", 210, [*program, *bench]),
        ("scifar", 150, [*program, *fit]),
        ("pages", 90, [*test, *(PAGES[:1] if rehearse else PAGES)]),
    ]


def run(command: list[str], limit: int, log: Path) -> dict:
    """Run a part; at its limit end it as Ctrl-C would, which a run survives."""
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    said = log.read_text("utf8", "replace").strip().splitlines()
    seconds = round(time.monotonic() - start, 1)
    return {"code": process.returncode, "seconds": seconds, "last": said[-1] if said else ""}


def tf32(device: str, sizes: list[tuple[int, int]]) -> list[dict]:
    """Time the kernel's products with and without TF32, and say what digits it costs."""
    rows, modes = [], half_spectrum(nplr("legs", 64))
    before = torch.get_float32_matmul_precision()
    for H, L in sizes:
        C = torch.randn(H, 32, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
        exact = dplr_kernel(modes.Lambda, modes.P, modes.B, C, 0.01, L)
        system = [t.to(device, torch.complex64) for t in (modes.Lambda, modes.P, modes.B, C)]
        step = prepare(Case("kernel", H=H, L=L), "ours", device)
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            error = (dplr_kernel(*system, 0.01, L).cpu() - exact).abs().max() / exact.abs().max()
            time_in_turn({"ours": step}, 2, 10, device)  # the first calls compile and choose
            figures = time_in_turn({"ours": step}, 7, 2, device)["ours"]
            rows.append({"H": H, "L": L, "precision": precision, "error": error.item()} | figures)
    torch.set_float32_matmul_precision(before)
    return rows


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--rehearse", action="store_true", help="in miniature, on any machine")
    rehearse = options.parse_args().rehearse
    if not rehearse and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device here; --rehearse does without", file=sys.stderr)
        return 2
    base = ROOT / "_build" / "rehearsal" if rehearse else ROOT
    results, runs, logs = base / "results", base / "runs", ROOT / "_build" / "gpu"
    for folder in (results, runs, logs):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    device = "cpu" if rehearse else "cuda"
    found = provenance(shlex.join(["python", "tools/gpu.py", *sys.argv[1:]]), 0, device)
    found |= {"parts": {}, "tf32": []}
    for name, limit, command in parts(rehearse, results, runs):
        print(f"{name}: at most {limit} s", flush=True)
        found["parts"][name] = run(command, limit, logs / f"{name}.log")
        print(f"  {found['parts'][name]}", flush=True)
        write_atomically(results / "gpu.json", (json.dumps(found, indent=1) + "\n").encode())
    sizes = [(8, 64)] if rehearse else [(H, L) for H in (128, 512) for L in (1024, 4096, 16384)]
    found["tf32"] = tf32(device, sizes)
    write_atomically(results / "gpu.json", (json.dumps(found, indent=1) + "\n").encode())
    print(f"{results / 'gpu.json'}; what each part said: {logs}")
    stopped = {"scifar": 143}  # it lasts longer than its limit, and goes on next time
    return int(any(p["code"] not in (0, stopped.get(n, 0)) for n, p in found["parts"].items()))


if __name__ == "__main__":
    sys.exit(main())
