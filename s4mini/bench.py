"""How we measure.

Time and memory of the kernel, the block, a step and a training step, ours and the
rivals' in turn, so that a ratio means something.

Tangled from book/bench.md.
"""

import ctypes
import datetime
import importlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Generator, Tensor, nn

from s4mini.baselines import (
    ATTENTIONS,
    LSSLLayer,
    PlainBlock,
    PublishedKernel,
    Stack,
    TransformerLayer,
)
from s4mini.cauchy_sum import keops_available
from s4mini.checks import check_choice, check_int, check_positive
from s4mini.layer import S4Layer
from s4mini.model import S4Block, S4Config, S4Model, parameter_groups
from s4mini.saving import write_atomically

__all__ = [
    "time_in_turn",
    "peak_memory",
    "keep_memory",
    "CONTESTANTS",
    "Case",
    "rivals",
    "prepare",
    "predicted_bytes",
    "run_case",
    "ratio_table",
    "reasons",
    "provenance",
    "write_record",
    "record_runs",
    "BenchOptions",
    "cases",
    "run_bench",
]


def _wait(device: str) -> None:
    """Wait until a device has done what was ordered."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_in_turn(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    seconds: float = 10.0,
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Time functions that have been called before, one after the other.

    Args:
        runs: what to call, by name; the first is what ratios refer to.
        rounds: how often at most each is called, >= 1.
        seconds: after these no further round begins, > 0.
        device: "cpu" or "cuda", which is waited for.

    Returns:
        For each name min_s and median_s, in seconds; ratio, the median over
        the rounds of its time divided by the first one's; and rounds.

    Raises:
        TypeError: rounds is no integer, or seconds no number.
        ValueError: rounds < 1, seconds <= 0, or the device is unknown.

    Source: book/bench.md.
    """
    check_int("rounds", rounds)
    check_positive("seconds", seconds)
    check_choice("device", device, ("cpu", "cuda"))
    times: dict[str, list[float]] = {name: [] for name in runs}
    first = times[next(iter(runs))]
    while len(first) < rounds and sum(map(sum, times.values())) < seconds:
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return {name: _figures(t, first) for name, t in times.items()}


def _figures(times: list[float], first: list[float]) -> dict[str, float]:
    """Return minimum, median and ratio of times taken in turn."""
    return {
        "min_s": min(times),
        "median_s": statistics.median(times),
        "ratio": statistics.median(t / f for t, f in zip(times, first, strict=True)),
        "rounds": len(times),
    }


def _resident() -> dict[str, int]:
    """Return the present and the highest size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {key: 1024 * int(found[key].split()[0]) for key in ("VmRSS", "VmHWM")}


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int | None:
    """Measure the extra memory at the peak of one call.

    Args:
        run: what to call, without arguments. Call it for the first time, in
            a fresh process: memory that an earlier call has left to the
            process is not seen to be taken again.
        device: "cpu" or "cuda".

    Returns:
        Bytes; None on a CPU where the system does not tell.

    Raises:
        ValueError: the device is unknown.

    Source: book/bench.md.
    """
    check_choice("device", device, ("cpu", "cuda"))
    if device == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated() - before
    try:  # lower the mark to the present size
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        before = _resident()["VmRSS"]
    except OSError:
        run()
        return None
    run()
    return _resident()["VmHWM"] - before


def keep_memory() -> bool:
    """Let this process keep the memory that its tensors give back.

    On Linux, glibc returns each large block to the system as soon as it is
    free, and a training step then pays for fresh pages at every tensor. Call
    this at the start of a program of your own; no other function of the
    library does, because the setting belongs to the whole process.

    Returns:
        Whether it is set: False where the C library is not glibc.

    Source: book/bench.md.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


#: What can be measured, and who takes part; ratios refer to the first.
CONTESTANTS = {
    "kernel": ("ours", "floor", "keops", "direct"),
    "block": ("ours", "free", "keops"),
    "step": ("stepper", "floor", "step", "LSTM"),
    "training": ("ours", "LSTM"),
    "lssl": ("S4", "S4-small", "LSSL"),
    "attention": ("S4", *ATTENTIONS),
    "backends": ("tables", "cauchy", "keops", "triton"),
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        what: a key of CONTESTANTS.
        H: channels, >= 1.
        L: steps of a sequence, >= 1.
        N: state size, even; "lssl" has H, or H/4, instead.
        batch: sequences at once.
        depth: layers, for "training" and "attention".
        threads: of PyTorch on the CPU; its own choice if None.
        keep: whether the process keeps its memory, as by keep_memory.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is out of range, or what is unknown.

    Source: book/bench.md.
    """

    what: str
    H: int
    L: int
    N: int = 64
    batch: int = 1
    depth: int = 1
    threads: int | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        check_choice("what", self.what, tuple(CONTESTANTS))
        for size in ("H", "L", "batch", "depth"):
            check_int(size, getattr(self, size))
        check_int("N", self.N, minimum=2, even=True)
        if self.threads is not None:
            check_int("threads", self.threads)
        if self.what == "lssl" and (self.H % 8 or self.H < 8):
            raise ValueError(f"H: expected a multiple of 8, got {self.H}")
        if self.what == "attention" and self.H % 4:
            raise ValueError(f"H: expected a multiple of 4, got {self.H}")


def _gradients(
    run: Callable[[], Tensor], inputs: Sequence[Tensor], generator: Generator
) -> Callable[[], object]:
    """Return a function that runs forward and backward."""
    w: list[Tensor] = []  # drawn at the first call, which measures memory

    def both() -> object:
        y = run()
        w[:] = w or [torch.randn(y.shape, generator=generator).to(y)]
        return torch.autograd.grad(y, inputs, w)

    return both


def _training(
    module: nn.Module, u: Tensor, generator: Generator
) -> Callable[[], object]:
    """Return a function that trains a module for one step."""
    w: list[Tensor] = []
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        y = module(u)
        w[:] = w or [torch.randn(y.shape, generator=generator).to(y)]
        torch.autograd.backward([y], w)
        optimizer.step()

    return step


def _module(case: Case, name: str, generator: Generator) -> nn.Module:
    """Make the network of a contestant."""
    H, N, depth, g = case.H, case.N, case.depth, generator
    ours = S4Config(d_output=10, dropout=0.0, d_model=H, n_layers=depth, d_state=N)
    if case.what == "block":
        if name == "ours":
            return S4Block(ours, g)
        if name == "keops":
            return PlainBlock(H, PublishedKernel(H, N, keops=True, generator=g), g)
        return PlainBlock(H, torch.randn(H, case.L, generator=g), g)
    if case.what == "lssl":
        if name == "LSSL":
            return LSSLLayer(H, H, generator=g)
        return Stack(S4Layer(H, H if name == "S4" else H // 4, generator=g))
    if name == "ours":
        return S4Model(ours, g)
    if name == "LSTM":
        return Stack(nn.LSTM(1, H, depth, batch_first=True), nn.Linear(H, 10))
    if name == "S4":
        return Stack(*(S4Block(ours, g) for _ in range(depth)))
    return Stack(*(TransformerLayer(H, 4, name, generator=g) for _ in range(depth)))


def _kernel(case: Case, name: str, device: str, generator: Generator):
    """Return a function that computes H kernels and their gradients."""
    if name == "floor":
        sizes = (math.isqrt(case.L), case.N), (case.N, math.isqrt(case.L))
        tables = [
            torch.randn(case.H, *size, generator=generator).to(device) for size in sizes
        ]
        tables = [t.requires_grad_() for t in tables]
        return _gradients(lambda: tables[0] @ tables[1], tables, generator)
    if name == "ours" or case.what == "backends":
        backend = "auto" if name == "ours" else name
        layer = S4Layer(case.H, case.N, backend=backend, generator=generator).to(device)
        learnt = [p for name, p in layer.named_parameters() if name != "D"]
        return _gradients(lambda: layer.kernel(case.L), learnt, generator)
    rival = PublishedKernel(case.H, case.N, name == "keops", generator).to(device)
    return _gradients(lambda: rival(case.L), list(rival.parameters()), generator)


def _steps(case: Case, name: str, device: str, generator: Generator):
    """Return a function that takes L single steps."""
    u = torch.randn(case.batch, case.H, generator=generator).to(device)
    layer = S4Layer(case.H, case.N, generator=generator).to(device)
    cell = nn.LSTMCell(case.H, case.H).to(device)
    state = layer.initial_state(case.batch)
    takes: dict[str, tuple[Callable, object]] = {
        "step": (layer.step, state),
        "stepper": (layer.stepper(), state),
        "floor": (lambda u, s: (None, s * 0.5 + 1), torch.zeros_like(state)),
        "LSTM": (lambda u, s: (None, cell(u, s)), (u, u)),
    }
    take, first = takes[name]

    @torch.no_grad()
    def run() -> None:
        s = first
        for _ in range(case.L):
            _, s = take(u, s)

    return run


def rivals(what: str) -> dict[str, str]:
    """List who can be measured here.

    Args:
        what: a key of CONTESTANTS.

    Returns:
        name -> "" where it can, else the reason why not.

    Raises:
        ValueError: what is unknown.

    Source: book/bench.md.
    """
    check_choice("what", what, tuple(CONTESTANTS))
    gpu = "" if torch.cuda.is_available() else "there is no CUDA device"
    absent = {"keops": keops_available(), "triton": gpu}
    return {name: absent.get(name, "") for name in CONTESTANTS[what]}


def prepare(
    case: Case, name: str, device: str = "cpu", seed: int = 0
) -> Callable[[], object]:
    """Return a function without arguments that does what a case measures.

    Args:
        case: what to prepare.
        name: which of the contestants.
        device: "cpu" or "cuda".
        seed: of all random numbers.

    Returns:
        The function; its parameters and inputs are made already.

    Raises:
        ValueError: the case has no such contestant here.

    Source: book/bench.md.
    """
    check_choice("device", device, ("cpu", "cuda"))
    reasons = rivals(case.what)
    check_choice("name", name, tuple(reasons))
    if reasons[name]:
        raise ValueError(f"name: {name} is absent: {reasons[name]}")
    generator = torch.Generator().manual_seed(seed)
    if case.what in ("kernel", "backends", "step"):
        make = _steps if case.what == "step" else _kernel
        return make(case, name, device, generator)
    module = _module(case, name, generator).to(device)
    features = 1 if case.what == "training" else case.H
    u = torch.randn(case.batch, case.L, features, generator=generator).to(device)
    if case.what != "block":
        return _training(module, u, generator)
    u.requires_grad_()
    inputs = u, *module.parameters()
    return _gradients(lambda: module(u), inputs, generator)


def predicted_bytes(case: Case, name: str) -> int:
    """Estimate the large tables of a contestant, before it is run.

    Args:
        case: what would be measured.
        name: which of the contestants.

    Returns:
        Bytes, right within a factor of about two; 0 for those who store no
        table that is much larger than their inputs.

    Source: book/bench.md.
    """
    H, L = case.H, case.L
    if name in ("direct", "cauchy"):
        return (192 if name == "direct" else 32) * H * case.N * (L // 2 + 1)
    if name == "LSSL":
        return 4 * (2 * (L - 1).bit_length() + 6) * H**3
    if name == "softmax":
        return 80 * case.batch * case.depth * L * L
    return 0


def _measure_memory(case: Case, name: str, device: str, seed: int) -> int | None:
    """Return peak_memory of a contestant; to be called in a fresh process.

    A small case goes first, so that programs are loaded and compiled.
    """
    _settle(case)
    small = replace(case, H=8, L=min(case.L, 32), batch=1)
    prepare(small, name, device, seed)()
    return peak_memory(prepare(case, name, device, seed), device)


def _measure_times(case: Case, names: Sequence[str], device: str, seed: int, **limits):
    """Return time_in_turn of contestants, in a process that may be changed."""
    _settle(case)
    runs = {name: prepare(case, name, device, seed) for name in names}
    for run in runs.values():
        run()
    return time_in_turn(runs, device=device, **limits)


def _settle(case: Case) -> None:
    """Give this process the threads and the memory of a case."""
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    if case.keep:
        keep_memory()


def _elsewhere(function: str, case: Case, *args, **options):
    """Call a function of this module, on a case, in a new process."""
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        preload = ["s4mini.baselines", "s4mini.model", "torch._dynamo"]
        context.set_forkserver_preload(preload)
    module = importlib.import_module("s4mini.bench")
    work, case = getattr(module, function), module.Case(**asdict(case))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, case, *args, **options).result()


def run_case(
    case: Case,
    device: str = "cpu",
    rounds: int = 7,
    seconds: float = 10.0,
    memory: float = 4.0,
    seed: int = 0,
    names: Sequence[str] = (),
) -> list[dict]:
    """Measure the contestants of a case, each where it can.

    Args:
        case: what to measure.
        device: "cpu" or "cuda".
        rounds: how often at most each is timed, >= 1.
        seconds: after these no further round begins, > 0.
        memory: the largest tables allowed, in GiB, > 0.
        seed: of all random numbers.
        names: some of the contestants; all if empty.

    Returns:
        A row for each: name, the fields of the case, and what time_in_turn
        returns with memory_bytes, or the reason why there is no figure.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: an argument is out of range.

    Source: book/bench.md.
    """
    check_int("rounds", rounds)
    check_positive("seconds", seconds)
    check_positive("memory", memory)
    for name in names:
        check_choice("names", name, CONTESTANTS[case.what])
    found = {}
    for name, reason in rivals(case.what).items():
        if not names or name in names:
            found[name] = _first_call(case, name, reason, device, memory, seed)
    here = [name for name, figures in found.items() if "reason" not in figures]
    limits = {"rounds": rounds, "seconds": seconds}
    times = _elsewhere("_measure_times", case, here, device, seed, **limits)
    return [
        {"name": name} | asdict(case) | figures | times.get(name, {})
        for name, figures in found.items()
    ]


def _first_call(case, name, reason, device, memory, seed) -> dict:
    """Return memory_bytes of a contestant, or the reason why there is none."""
    needed = predicted_bytes(case, name) / 2**30
    if not reason and needed > memory:
        reason = f"would need about {needed:.2g} GiB"
    if reason:
        return {"reason": reason}
    try:
        extra = _elsewhere("_measure_memory", case, name, device, seed)
    except Exception as error:  # whatever it was, the others go on
        text = str(error).strip().split("\n")[0]
        return {"reason": f"{type(error).__name__}: {text}"}
    return {"memory_bytes": extra}


def ratio_table(rows: Sequence[dict]) -> str:
    """Return rows as a Markdown table.

    Args:
        rows: as run_case returns them.

    Returns:
        The table. Its ratio is to the first contestant of the case; a
        contestant without figures is not shown.

    Source: book/bench.md.
    """
    lines = [
        "| what | H, L, N | batch, threads | who | min, median (ms) | ratio | MiB |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        if "reason" in row:
            continue
        size = ", ".join(str(row[key]) for key in "HLN")
        how = f"{row['batch']}, {row['threads'] or 'all'}"
        how += ", memory kept" if row["keep"] else ""
        low, middle = (1e3 * row[key] for key in ("min_s", "median_s"))
        extra = row["memory_bytes"]
        cells = [row["what"], size, how, row["name"], f"{low:.3g}, {middle:.3g}"]
        cells += [f"{row['ratio']:.2f}"]
        cells += ["" if extra is None else f"{extra / 2**20:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons(rows: Sequence[dict]) -> list[str]:
    """Say what was not measured, and why.

    Args:
        rows: as run_case returns them.

    Returns:
        A line for each contestant without figures.

    Source: book/bench.md.
    """
    return [
        f"not measured: {r['what']} {r['H']}, {r['L']}, {r['N']} {r['name']}: {r['reason']}"
        for r in rows
        if "reason" in r
    ]


def provenance(command: str, seed: int, device: str = "cpu") -> dict:
    """Describe how a measurement was made, for a file in results/.

    Args:
        command: the command that makes it.
        seed: of all random numbers.
        device: "cpu" or "cuda".

    Returns:
        command, device, versions, seed, threads, cores and date.

    Raises:
        ValueError: the device is unknown.

    Source: book/bench.md.
    """
    check_choice("device", device, ("cpu", "cuda"))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }
    for name in ("pykeops", "triton"):
        with suppress(ImportError):
            versions[name] = importlib.import_module(name).__version__
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
    return {
        "command": command,
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "versions": versions,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_record(out: str | Path, call: str, seed: int, content: dict) -> None:
    """Write what was measured, and how, to a file, in one step.

    Args:
        out: the file, such as results/speech.json.
        call: module and function that measured it, with its arguments, such
            as "speech.record_speech('results/speech.json')".
        seed: of all random numbers.
        content: what was measured, as values that JSON knows.

    Raises:
        OSError: the file cannot be written.

    Source: book/bench.md.
    """
    module, _, function = call.partition(".")
    command = f'python -c "from s4mini.{module} import *; {function}"'
    text = json.dumps(provenance(command, seed) | content, indent=1) + "\n"
    write_atomically(out, text.encode())


def record_runs(
    out: str | Path,
    call: str,
    seed: int,
    content: dict,
    runs: Sequence[tuple[dict, Callable[[], dict]]],
) -> None:
    """Make the runs that a file does not hold yet, and add each to it.

    Args:
        out: the file; the runs that it holds are kept.
        call: as in write_record.
        seed: as in write_record.
        content: what the file shall say beside the runs.
        runs: for each run the entries that tell it from others, and a
            function that makes its record, those entries included.

    Source: book/bench.md.
    """
    path = Path(out)
    held = json.loads(path.read_text("utf8"))["runs"] if path.exists() else []
    for known, make in runs:
        if not any(known.items() <= run.items() for run in held):
            held.append(make())
            write_record(out, call, seed, content | {"runs": held})


@dataclass(frozen=True)
class BenchOptions:
    """What to measure, and how.

    Args:
        what: some of CONTESTANTS; all if empty.
        quick: whether all sizes are tiny, to see that it runs.
        device: "cpu" or "cuda".
        rounds: how often at most each contestant is timed, >= 1.
        seconds: of a case, after which no further round begins, > 0.
        memory: the largest tables allowed, in GiB, > 0.
        seed: of all random numbers.
        out: JSON file to write, in a folder that exists.

    Raises:
        TypeError: a value is of a wrong kind.
        ValueError: a value is not one of those allowed.

    Source: book/bench.md.
    """

    what: tuple[str, ...] = ()
    quick: bool = False
    device: str = "cpu"
    rounds: int = 7
    seconds: float = 6.0
    memory: float = 4.0
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        for what in self.what:
            check_choice("what", what, tuple(CONTESTANTS))
        check_choice("device", self.device, ("cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: PyTorch finds no CUDA device here")
        check_int("rounds", self.rounds)
        check_positive("seconds", self.seconds)
        check_positive("memory", self.memory)
        if self.out is not None and not Path(self.out).resolve().parent.is_dir():
            raise ValueError(f"out: there is no folder {Path(self.out).parent}")


def cases(options: BenchOptions) -> list[Case]:
    """Return the cases that options ask for.

    Args:
        options: what to measure, and how large it may be.

    Returns:
        The cases, in the order in which they are measured.

    Source: book/bench.md.
    """
    sizes = [(128, 1024), (128, 4096), (128, 16384), (512, 1024), (512, 4096)]
    found = [Case("kernel", *size, threads=1) for size in sizes]
    found += [Case("kernel", *size) for size in (sizes[0], sizes[4])]
    found += [Case("kernel", *sizes[0], N=N, threads=1) for N in (16, 256)]
    for N in (16, 64, 256):
        lengths = (256, 1024, 4096, 16384, 65536)
        found += [Case("backends", 8, L, N=N, threads=1) for L in lengths]
    blocks = [(128, 256), *(sizes[i] for i in (0, 1, 3))]
    found += [Case("block", *size, batch=8) for size in blocks]
    found += [Case("block", *sizes[0], batch=8, threads=1)]
    for batch in (1, 4, 16, 64):
        found.append(Case("step", 512, 50, batch=batch, threads=1))
    for keep in (False, True):
        found.append(Case("training", 128, 1440, batch=50, depth=2, keep=keep))
    found.append(Case("training", 512, 1024, batch=8, depth=2, keep=True))
    found += [Case("lssl", H, 1024) for H in (64, 128, 256)]
    found += [Case("attention", 256, L) for L in (1024, 4096)]
    if options.what:
        found = [case for case in found if case.what in options.what]
    if options.quick:
        tiny = (replace(case, H=8, L=32, N=8, batch=2) for case in found)
        found = list(dict.fromkeys(tiny))
    return found


def run_bench(
    options: BenchOptions,
    command: str = "s4mini.bench.run_bench",
    report: Callable[[str], None] = print,
) -> dict:
    """Measure, and keep a file up to date after every case.

    Args:
        options: what, and how.
        command: what the file is to give as its origin.
        report: is called with a line of text before each case.

    Returns:
        What provenance returns, and the rows.

    Raises:
        OSError: the file cannot be written.

    Source: book/bench.md.
    """
    content = provenance(command, options.seed, options.device) | {"rows": []}
    limits = {k: getattr(options, k) for k in ("rounds", "seconds", "memory", "seed")}
    found = cases(options)
    for i, case in enumerate(found, 1):
        report(f"{i}/{len(found)} {case}")
        content["rows"] += run_case(case, options.device, **limits)
        if options.out is not None:
            text = json.dumps(content, indent=1) + "\n"
            write_atomically(options.out, text.encode())
    return content
