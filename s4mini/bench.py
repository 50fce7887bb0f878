"""How we measure.

Time and memory of the kernel, the layer and a training step, for every backend and
every rival, measured so that a ratio means something. The same functions run on this
page and from the command line.

Tangled from book/bench.md.
"""

import argparse
import datetime
import importlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from s4mini.baselines import (
    ATTENTIONS,
    LSSLLayer,
    TransformerLayer,
    _direct_sums,
    _keops_sums,
    _unit_circle_kernel,
)
from s4mini.checks import check_choice, check_int, check_positive
from s4mini.kernel import backends, dplr_kernel
from s4mini.layer import S4Layer
from s4mini.lowrank import half_spectrum, nplr
from s4mini.memory import init_dt
from s4mini.model import S4Block, S4Config, S4Model, parameter_groups

__all__ = [
    "time_runs",
    "peak_memory",
    "REFERENCES",
    "Case",
    "rivals",
    "prepare",
    "predicted_bytes",
    "measure_case",
    "free_bytes",
    "run_case",
    "ratio_table",
    "provenance",
    "run_bench",
]


def _wait(device: str) -> None:
    """Wait until a device has done what was ordered."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_runs(
    run: Callable[[], object],
    repeat: int = 7,
    budget: float = 10.0,
    device: str = "cpu",
) -> dict[str, float]:
    """Time a function that has been called before.

    Args:
        run: what to call, without arguments.
        repeat: how often at most, >= 1.
        budget: seconds after which no further call begins, > 0.
        device: "cpu" or "cuda", which is waited for.

    Returns:
        median_s, low_s and high_s, the median and the quartiles in seconds,
        and runs, how many calls they come from.

    Raises:
        TypeError: repeat is no integer, or budget no number.
        ValueError: repeat < 1, budget <= 0, or the device is unknown.

    Source: book/bench.md.
    """
    check_int("repeat", repeat)
    check_positive("budget", budget)
    check_choice("device", device, ("cpu", "cuda"))
    seconds: list[float] = []
    while len(seconds) < repeat and sum(seconds) < budget:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(seconds * 2, n=4, method="inclusive")
    return {"median_s": middle, "low_s": low, "high_s": high, "runs": len(seconds)}


def _resident() -> tuple[int, int]:
    """Return the present and the highest size of this process, in bytes."""
    try:
        text = Path("/proc/self/status").read_text("ascii")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return 0, peak
    lines = dict(line.split(":", 1) for line in text.splitlines())
    present, peak = (lines[key].split()[0] for key in ("VmRSS", "VmHWM"))
    return 1024 * int(present), 1024 * int(peak)


def peak_memory(run: Callable[[], object], device: str = "cpu") -> int:
    """Measure the extra memory at the peak of one call.

    Args:
        run: what to call, without arguments. Call it for the first time, in
            a fresh process: memory that an earlier call has left to the
            process is not seen to be taken again.
        device: "cpu" or "cuda".

    Returns:
        Bytes. On a CPU without Linux's /proc an upper bound.

    Raises:
        ValueError: the device is unknown.

    Source: book/bench.md.
    """
    check_choice("device", device, ("cpu", "cuda"))
    _wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        _wait(device)
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError):  # lower the mark to the present size
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    before, _ = _resident()
    run()
    return _resident()[1] - before


#: What can be measured, each with the one that ratios refer to.
REFERENCES = {
    "forward": "torch",
    "kernel": "torch",
    "layer": "torch",
    "step": "torch",
    "lssl": "S4",
    "attention": "softmax",
}


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        what: "forward", "kernel", "layer", "step", "lssl" or "attention".
        name: the backend or the rival.
        H: channels, >= 1.
        L: steps of a sequence, >= 1.
        N: state size, even; for "lssl" it is H, or H/4 for "S4-small".
        batch: sequences at once.
        depth: layers, for "step" and "attention".

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is out of range, or what is unknown.

    Source: book/bench.md.
    """

    what: str
    name: str
    H: int
    L: int
    N: int = 64
    batch: int = 1
    depth: int = 1

    def __post_init__(self) -> None:
        check_choice("what", self.what, tuple(REFERENCES))
        for size in ("H", "L", "batch", "depth"):
            check_int(size, getattr(self, size))
        check_int("N", self.N, minimum=2, even=True)
        if self.what == "lssl":
            check_int("H", self.H, minimum=8, even=True)
        if self.what == "attention" and self.H % 4:
            raise ValueError(
                f"H: expected a multiple of 4, one for each head, got {self.H}"
            )


def rivals(what: str) -> dict[str, str]:
    """List who can be measured here.

    Args:
        what: one of REFERENCES.

    Returns:
        name -> "" where it can, else the reason why not.

    Raises:
        ValueError: what is unknown.

    Source: book/bench.md.
    """
    check_choice("what", what, tuple(REFERENCES))
    if what == "lssl":
        return dict.fromkeys(("S4", "S4-small", "LSSL"), "")
    if what == "attention":
        return dict.fromkeys(("S4", *ATTENTIONS), "")
    found = backends()
    if not found["triton"] and not torch.cuda.is_available():
        found["triton"] = "interpreted, which says nothing about its speed"
    if what in ("forward", "kernel"):
        found |= {"published": "", "published-keops": found["keops"]}
    return found


def _random(shape: tuple, generator: Generator, device: str) -> Tensor:
    """Draw normal numbers on the CPU, so that every device has the same."""
    return torch.randn(shape, generator=generator).to(device)


def _prepare_kernel(
    case: Case, device: str, generator: Generator
) -> Callable[[], object]:
    """Return a function that computes the kernels of a case."""
    modes = half_spectrum(nplr("legs", case.N))
    system = [t.expand(case.H, *t.shape) for t in modes[:3]]
    dt = init_dt(case.H, 1e-3, 1e-1, generator).to(device, torch.float32)
    C = _random((*system[2].shape, 2), generator, device)
    C = torch.view_as_complex(C)
    inputs = [t.to(device, torch.complex64, copy=True) for t in (*system, C)]
    inputs = [t.requires_grad_() for t in (*inputs, dt)]
    weight = _random((case.H, case.L), generator, device)
    kernel = _kernel(case)

    def forward():
        with torch.no_grad():
            return kernel(*inputs, case.L)

    def both():
        return torch.autograd.grad(kernel(*inputs, case.L), inputs, weight)

    return forward if case.what == "forward" else both


def _kernel(case: Case) -> Callable:
    """Return the kernel function of a backend or of the published form."""
    if case.name.startswith("published"):
        sums = _keops_sums if case.name.endswith("keops") else _direct_sums
        return lambda *inputs: _unit_circle_kernel(*inputs, sums)
    return lambda *inputs: dplr_kernel(*inputs, backend=case.name)


class _Stack(nn.Module):
    """Layers one after the other; states that layers return are dropped."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, u: Tensor) -> Tensor:
        for layer in self.layers:
            u = layer(u)
            u = u[0] if isinstance(u, tuple) else u
        return u


def _module(case: Case, generator: Generator) -> nn.Module:
    """Make the network of a case."""
    H, N, random = case.H, case.N, {"generator": generator}
    if case.what == "step":
        config = S4Config(d_output=10, d_model=H, n_layers=case.depth, d_state=N)
        return S4Model(config, generator)
    if case.what == "layer":
        return _Stack([S4Layer(H, N, **random)])
    if case.what == "lssl":
        if case.name == "LSSL":
            return _Stack([LSSLLayer(H, H, **random)])
        N = H if case.name == "S4" else H // 8 * 2
        return _Stack([S4Layer(H, N, **random)])
    if case.name == "S4":
        config = S4Config(d_model=H, d_state=N, dropout=0.0)
        return _Stack([S4Block(config, generator) for _ in range(case.depth)])
    kind = {"attention": case.name}
    return _Stack([TransformerLayer(H, **kind, **random) for _ in range(case.depth)])


def _prepare_network(
    case: Case, device: str, generator: Generator
) -> Callable[[], object]:
    """Return a function that trains the network of a case for one step."""
    module = _module(case, generator).to(device)
    for part in module.modules():
        if isinstance(part, S4Layer) and case.what in ("layer", "step"):
            part.backend = case.name
    features = 1 if case.what == "step" else case.H
    u = _random((case.batch, case.L, features), generator, device)
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=1e-3)

    def step():
        optimizer.zero_grad()
        module(u).square().mean().backward()
        if case.what != "layer":
            optimizer.step()

    return step


def prepare(case: Case, device: str = "cpu", seed: int = 0) -> Callable[[], object]:
    """Return a function without arguments that does what a case measures.

    Args:
        case: what to prepare.
        device: "cpu" or "cuda".
        seed: of all random numbers.

    Returns:
        The function; its parameters and inputs are made already.

    Raises:
        ValueError: the case names nobody who can take part here.

    Source: book/bench.md.
    """
    check_choice("device", device, ("cpu", "cuda"))
    known = rivals(case.what)
    check_choice("name", case.name, tuple(known))
    if known[case.name]:
        raise ValueError(f"name: {case.name} is absent: {known[case.name]}")
    generator = torch.Generator().manual_seed(seed)
    make = _prepare_network
    if case.what in ("forward", "kernel"):
        make = _prepare_kernel
    return make(case, device, generator)


def predicted_bytes(case: Case) -> int:
    """Estimate the extra memory of a case, before it is run.

    Args:
        case: what would be measured.

    Returns:
        Bytes, right within a factor of about two where they are many.

    Source: book/bench.md.
    """
    H, L, N, M = case.H, case.L, case.N, case.L // 2 + 1
    data = 4 * H * L * case.batch * case.depth
    if case.what in ("forward", "kernel"):
        back = case.what == "kernel"
        kernels = (48 if back else 24) * 4 * H * L
        tables = {"published": 32 * (6 if back else 2), "naive": 8 * 4}
        return kernels + tables.get(case.name, 0) * H * N * M
    if case.what == "lssl" and case.name == "LSSL":
        powers = 2 * math.ceil(math.log2(max(L, 2))) + 6
        return 4 * H * H * (powers * H + 4 * L) + 8 * data
    naive = 32 * H * N * M * case.depth if case.name == "naive" else 0
    weights = 4 * case.batch * case.depth * 4 * L * L
    softmax = 5 * weights if case.name == "softmax" else 0
    return 40 * data + naive + softmax


def measure_case(
    case: Case,
    device: str = "cpu",
    repeat: int = 7,
    budget: float = 10.0,
    seed: int = 0,
) -> dict[str, float]:
    """Measure a case in this process.

    Args:
        case: what to measure.
        device: "cpu" or "cuda".
        repeat: timed calls at most, >= 1.
        budget: seconds after which no further call begins, > 0.
        seed: of all random numbers.

    Returns:
        What time_runs returns, and memory_bytes.

    Raises:
        ValueError: an argument is out of range, or the rival is absent.

    Source: book/bench.md.
    """
    small = replace(case, H=min(case.H, 8), L=min(case.L, 32), batch=1)
    prepare(small, device, seed)()
    run = prepare(case, device, seed)
    memory = peak_memory(run, device)
    return time_runs(run, repeat, budget, device) | {"memory_bytes": memory}


def _context() -> multiprocessing.context.BaseContext:
    """Return a way to start processes that have imported PyTorch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    modules = ["s4mini", "s4mini.baselines", "torch._dynamo"]
    context.set_forkserver_preload(modules)
    return context


def _child(pipe, case: dict, options: dict, threads: int | None) -> None:
    """Measure a case, in a process of its own, and send the result."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        row = measure_case(Case(**case), **options) | {"status": "measured"}
    except Exception as error:  # whatever it was, the others go on
        reason = str(error).strip().split("\n")[0]
        reason = f"{type(error).__name__}: {reason}"
        row = {"status": "failed", "reason": reason}
    pipe.send_bytes(json.dumps(row).encode())


def free_bytes(device: str = "cpu") -> int:
    """Return how much memory is free on a device.

    Args:
        device: "cpu" or "cuda".

    Returns:
        Bytes; all of the machine's where the system tells no more.

    Raises:
        ValueError: the device is unknown.

    Source: book/bench.md.
    """
    check_choice("device", device, ("cpu", "cuda"))
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _receive(process, pipe, timeout: float) -> dict:
    """Wait for the row of a child; end the child if it takes too long."""
    if pipe.poll(timeout):
        with suppress(EOFError):
            row = json.loads(pipe.recv_bytes())
            process.join()
            return row
        process.join()
        reason = f"the process ended with exit code {process.exitcode}"
        if process.exitcode == -9:
            reason = "the process was killed, as happens when memory runs out"
        return {"status": "failed", "reason": reason}
    process.kill()
    process.join()
    return {"status": "skipped", "reason": f"took longer than {timeout:g} s"}


def run_case(
    case: Case,
    device: str = "cpu",
    repeat: int = 7,
    budget: float = 10.0,
    seed: int = 0,
    timeout: float = 300.0,
    memory_limit: int | None = None,
    threads: int | None = None,
) -> dict:
    """Measure a case in a process of its own, if it fits.

    Args:
        case: what to measure.
        device: "cpu" or "cuda".
        repeat: timed calls at most, >= 1.
        budget: seconds after which no further call begins, > 0.
        seed: of all random numbers.
        timeout: seconds after which the process is ended, > 0.
        memory_limit: bytes; four fifths of what is free if None.
        threads: of PyTorch on the CPU; its own choice if None.

    Returns:
        The fields of the case; status, "measured", "skipped" or "failed",
        with a reason; and, where measured, what measure_case returns.

    Raises:
        ValueError: an argument is out of range.

    Source: book/bench.md.
    """
    check_positive("timeout", timeout)
    check_int("repeat", repeat)
    check_positive("budget", budget)
    if memory_limit is None:
        memory_limit = free_bytes(device) * 4 // 5
    needed = predicted_bytes(case)
    if needed > memory_limit:
        reason = (
            f"would need about {needed / 2**30:.1f} GiB of memory, "
            f"the limit is {memory_limit / 2**30:.1f} GiB"
        )
        return asdict(case) | {"status": "skipped", "reason": reason}
    options = {"device": device, "repeat": repeat, "budget": budget, "seed": seed}
    return asdict(case) | _in_child(asdict(case), options, threads, timeout)


def _in_child(case: dict, options: dict, threads: int | None, timeout: float):
    """Start a process for a case, and return its row."""
    child = importlib.import_module("s4mini.bench")._child
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    arguments = theirs, case, options, threads
    process = context.Process(target=child, args=arguments, daemon=True)
    process.start()
    theirs.close()
    return _receive(process, ours, timeout)


def _cells(row: dict, base: dict | None) -> list[str]:
    """Return the cells of one row of the table of ratios."""
    cells = [str(row[key]) for key in ("what", "H", "L", "name")]
    if row["status"] != "measured":
        return [*cells, f"{row['status']}: {row['reason']}", "", "", ""]
    low, high = (1e3 * row[key] for key in ("low_s", "high_s"))
    cells.append(f"{1e3 * row['median_s']:.3g} ({low:.3g} to {high:.3g})")
    cells.append(f"{row['memory_bytes'] / 2**20:.1f}")
    if base is None or base["status"] != "measured":
        return [*cells, "", ""]
    for key in ("median_s", "memory_bytes"):
        cells.append(f"{row[key] / base[key]:.3g}" if base[key] > 0 else "")
    return cells


def ratio_table(rows: Sequence[dict]) -> str:
    """Return rows as a Markdown table, with ratios to each group's reference.

    Args:
        rows: as run_case returns them.

    Returns:
        The table; rows of equal what, H, L and N form a group. The last two
        columns are time and memory divided by those of the reference.

    Source: book/bench.md.
    """
    head = ("what", "H", "L", "name", "time (ms), quartiles", "memory (MiB)")
    head = [*head, "time ratio", "memory ratio"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        same = [
            r
            for r in rows
            if all(r[key] == row[key] for key in ("what", "H", "L", "N"))
            and r["name"] == REFERENCES[row["what"]]
        ]
        cells = _cells(row, same[0] if same else None)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _processor() -> str:
    """Return the name of the CPU."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def provenance(
    command: str, seed: int, device: str = "cpu", threads: int | None = None
) -> dict:
    """Describe how a measurement was made, for a file in results/.

    Args:
        command: the command that makes it.
        seed: of all random numbers.
        device: "cpu" or "cuda".
        threads: of PyTorch on the CPU; its own choice if None.

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
            versions[name] = __import__(name).__version__
    cuda = device == "cuda"
    return {
        "command": command,
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "versions": versions | ({"cuda": torch.version.cuda} if cuda else {}),
        "seed": seed,
        "threads": threads or torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _save(path: Path, content: dict) -> None:
    """Replace a JSON file in one step, or leave it as it is."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(content, indent=1) + "\n", "utf8")
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m s4mini.bench",
        description="Measure time and memory of S4 and its rivals.",
    )
    add, many, one = parser.add_argument, {"nargs": "+"}, "default %(default)s"
    kinds = ", ".join(REFERENCES)
    add("--what", **many, default=list(REFERENCES), help=f"from {kinds}")
    add("--names", **many, help="backends or rivals; default all here")
    add("--H", **many, type=int, default=[128, 256, 512], help="channels")
    add("--L", **many, type=int, default=[1024, 4096, 16384], help="steps")
    add("--N", type=int, default=64, help=f"state size; {one}")
    add("--batch", type=int, default=8, help=f"sequences; {one}")
    add("--depth", type=int, default=2, help=f"layers of a network; {one}")
    add("--device", default="cpu", help=f"cpu or cuda; {one}")
    add("--threads", type=int, help="of PyTorch on the CPU")
    add("--repeat", type=int, default=7, help=f"timed calls; {one}")
    add("--budget", type=float, default=10.0, help=f"their seconds; {one}")
    add("--timeout", type=float, default=300.0, help=f"of a case; {one} s")
    add("--memory", type=float, help="limit in GiB; default 4/5 of the free")
    add("--seed", type=int, default=0, help=f"of all random numbers; {one}")
    add("--quick", action="store_true", help="tiny sizes, to see it run")
    add("--out", type=Path, help="JSON file to write")
    return parser


def _cases(options: argparse.Namespace) -> tuple[list[Case], dict[str, str]]:
    """Return the cases of a command line, and the absent with reasons."""
    cases, absent = [], {}
    for what in options.what:
        known = rivals(what)
        absent |= {name: why for name, why in known.items() if why}
        names = [n for n in known if not known[n]]
        if options.names is not None:
            names = [n for n in names if n in options.names]
        lengths = {"lssl": options.L[:1], "attention": options.L[:2]}
        one = what in ("forward", "kernel", "lssl")
        for H in options.H:
            for L in lengths.get(what, options.L):
                for name in names:
                    size = (H, L, options.N, 1 if one else options.batch)
                    deep = what in ("step", "attention")
                    depth = options.depth if deep else 1
                    cases.append(Case(what, name, *size, depth))
    return cases, absent


def _examine(options: argparse.Namespace) -> None:
    """Refuse options that could only fail later."""
    known: dict[str, str] = {}
    for what in options.what:
        check_choice("--what", what, tuple(REFERENCES))
        known |= rivals(what)
    for name in options.names or ():
        check_choice("--names", name, tuple(known))
        if known[name]:
            raise ValueError(f"--names: {name} is absent: {known[name]}")
    check_choice("--device", options.device, ("cpu", "cuda"))
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: PyTorch finds no CUDA device here")
    for name in ("budget", "timeout", "memory"):
        if getattr(options, name) is not None:
            check_positive(f"--{name}", getattr(options, name))
    check_int("--repeat", options.repeat)
    if options.threads is not None:
        check_int("--threads", options.threads)
    if options.out is not None and not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out: there is no folder {options.out.parent}")


def _run_all(options: argparse.Namespace, content: dict) -> None:
    """Measure all cases, and keep the file up to date."""
    cases, content["absent"] = _cases(options)
    limit = options.memory and int(options.memory * 2**30)
    bar = tqdm(cases, unit="case", dynamic_ncols=True)
    for case in bar:
        bar.set_description(f"{case.what} {case.name} H={case.H} L={case.L}")
        row = run_case(
            case,
            options.device,
            options.repeat,
            options.budget,
            options.seed,
            options.timeout,
            limit,
            options.threads,
        )
        content["rows"].append(row)
        if options.out is not None:
            _save(options.out, content)


def run_bench(argv: Sequence[str] | None = None) -> int:
    """Measure from the command line.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0; 1 after a message, or if all cases failed.

    Raises:
        SystemExit: the arguments cannot be read, or help was asked for.

    Source: book/bench.md.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    if options.quick:
        options.H, options.L, options.N, options.batch = [16], [128], 8, 2
        options.repeat = min(options.repeat, 2)
    command = f"python -m s4mini.bench {shlex.join(argv)}".rstrip()
    try:
        _examine(options)
        content = provenance(command, options.seed, options.device, options.threads)
        content["rows"] = []
        _run_all(options, content)
    except (OSError, ValueError, TypeError) as error:
        print(f"s4mini.bench: {error}", file=sys.stderr)
        return 1
    print(ratio_table(content["rows"]))
    for name, reason in content["absent"].items():
        print(f"absent: {name}: {reason}")
    return int(all(row["status"] == "failed" for row in content["rows"]))


# A notebook's __name__ is __main__ too, but a notebook has no __file__.
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(run_bench())
