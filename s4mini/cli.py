"""The command line.

One program, `s4mini`: its options are the fields of the records that the pages before
have defined, and nothing that a user can do wrong ends in a traceback.

Tangled from book/cli.md.
"""

import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

__all__ = ["read_recipe", "FitOptions", "EvaluateOptions", "DataOptions", "main"]

if TYPE_CHECKING:
    from s4mini.recipes import Recipe
    from s4mini.train import Result


def read_recipe(name: str) -> "Recipe":
    """Return a recipe by its name, or from a file.

    Args:
        name: one of RECIPES, a file of JSON, or the folder of a run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such recipe, or the file holds none.

    Source: book/cli.md.
    """
    from s4mini.checks import check_choice
    from s4mini.recipes import RECIPES, Recipe

    path = Path(name, "recipe.json") if Path(name).is_dir() else Path(name)
    if name in RECIPES or path.suffix != ".json":
        check_choice("recipe", name, tuple(RECIPES))
        return RECIPES[name]
    try:
        return Recipe(**json.loads(path.read_text("utf8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a recipe: {error}") from error


@dataclass(frozen=True)
class FitOptions:
    """Where and how to train.

    Attributes:
        out: folder for logs and weights; none: runs/RECIPE.
        resume: go on with the run in the folder; more epochs extend it.
        until: stop after this epoch, to be resumed later.
        seeds: run so many, counted from the recipe's, in folders of their
            own; give mean and standard deviation.
        progress: how to show it; none: a bar at a terminal, else lines.
        devices: GPUs, or processes without one, on each machine.
        nodes: machines; start the same command on each by torchrun or srun.
        strategy: with ddp each device takes a share of every batch.

    Source: book/cli.md.
    """

    out: Path | None = None
    resume: bool = False
    until: int | None = None
    seeds: int = 1
    progress: Literal["bar", "lines", "none"] | None = None
    devices: int = 1
    nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure.

    Attributes:
        split: the examples to measure on.
        json: print JSON instead of words.

    Source: book/cli.md.
    """

    split: Literal["test", "validation"] = "test"
    json: bool = False


@dataclass(frozen=True)
class DataOptions:
    """Where to put data sets.

    Attributes:
        folder: none: S4MINI_DATA, or the user's cache.

    Source: book/cli.md.
    """

    folder: Path | None = None


def _parse(record: Any, argv: list[str], prog: str) -> Any:
    """Return a record with the options of a command line put in."""
    import tyro

    plain = (tyro.conf.OmitArgPrefixes,)
    prog = f"s4mini {prog}"
    return tyro.cli(type(record), default=record, args=argv, prog=prog, config=plain)


def _first(argv: list[str], what: str, usage: str) -> tuple[str, list[str]]:
    """Take the word a command begins with; a call for help needs none."""
    if argv in (["-h"], ["--help"]):
        return what.upper(), argv
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"{what}: expected one; usage: s4mini {usage}")
    return argv[0], argv[1:]


def _fit(argv: list[str]) -> None:
    """Train by a recipe, select on validation, test."""
    from s4mini.recipes import Recipe

    usage = "fit RECIPE [options]; `s4mini list` names them"
    name, rest = _first(argv, "recipe", usage)

    @dataclass(frozen=True)
    class Fit:
        """Train by a recipe, select on validation, test once."""

        run: FitOptions
        recipe: Recipe

    begun = Fit(FitOptions(), read_recipe("digits" if rest is argv else name))
    given = _parse(begun, rest, f"fit {name}")
    _fit_seeds(given.recipe, given.run.out or Path("runs", Path(name).stem), given.run)


def _fit_seeds(recipe: "Recipe", out: Path, options: FitOptions) -> None:
    """Train with one seed or several, and print what it came to."""
    from s4mini.checks import check_int

    seeds = check_int("seeds", options.seeds, maximum=1000)
    if seeds > 1 and options.devices * options.nodes > 1:
        raise ValueError("seeds: expected 1 with several devices")
    if seeds == 1:
        _show(_fit_one(recipe, out, options, options.resume))
        return
    results = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        folder = out / f"seed-{seed}"
        resume = options.resume and (folder / "recipe.json").exists()
        one = replace(recipe, seed=seed)
        results.append(_fit_one(one, folder, options, resume))
        _show(results[-1])
    if all(result.test for result in results):
        _summarise(results, out)


def _fit_one(
    recipe: "Recipe", out: Path, options: FitOptions, resume: bool
) -> "Result":
    """Train with one seed."""
    from s4mini.recipes import load_data
    from s4mini.train import fit

    shown = options.progress or ("bar" if sys.stderr.isatty() else "lines")
    return fit(
        recipe,
        out,
        load_data(recipe, os.cpu_count() or 1),
        until=options.until,
        resume=resume,
        progress=shown,
        devices=options.devices,
        nodes=options.nodes,
        strategy=options.strategy,
    )


def _summarise(results: "list[Result]", out: Path) -> None:
    """Write and print mean and standard deviation over the seeds."""
    from s4mini.saving import write_atomically
    from s4mini.train import summarise

    summary = summarise(results)
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
    print(f"mean and standard deviation of {len(results)} seeds")
    for kind in ("validation", "test"):
        parts = (
            f"{k} {v['mean']:.4f} ± {v['sd']:.4f}" for k, v in summary[kind].items()
        )
        print(f"{kind:12}{', '.join(parts)}")


def _show(result: "Result") -> None:
    """Print what a run has come to, in the first process only."""
    from s4mini.train import is_first

    if not is_first():
        return
    print(
        f"{result.data}: seed {result.recipe.seed}, "
        f"{result.parameters:,} parameters, {result.device}"
    )
    print(f"{'validation':12}{_figures(result.validation)}")
    print(f"{'test':12}{_figures(result.test) if result.test else 'unfinished'}")
    print(f"{'files in':12}{result.folder}")


def _figures(figures: dict[str, float]) -> str:
    """Write figures in one line."""
    return ", ".join(
        f"{name} {value:.2%}" if name == "accuracy" else f"{name} {value:.4f}"
        for name, value in figures.items()
    )


def _evaluate(argv: list[str]) -> None:
    """Measure the best weights of a run."""
    from s4mini.recipes import load_data
    from s4mini.train import evaluate, load_run, parts_of

    name, rest = _first(argv, "folder", "evaluate FOLDER [options]")
    options = _parse(EvaluateOptions(), rest, f"evaluate {name}")
    model, recipe = load_run(name)
    data = load_data(recipe, os.cpu_count() or 1)
    split, index = parts_of(recipe, data)[options.split]
    figures = evaluate(model, data, split, index)
    if options.json:
        found = {"data": data.title, "split": options.split, "examples": len(index)}
        print(json.dumps(found | figures))
    else:
        print(f"{data.title}: {len(index):,} examples of {options.split}")
        print(_figures(figures))


def _data(argv: list[str]) -> None:
    """Download data sets: all, or those that are named."""
    from s4mini.checks import check_choice
    from s4mini.data import NAMES, download

    names = [word for word in argv if word in NAMES]
    rest = [word for word in argv if word not in NAMES]
    if rest and not rest[0].startswith("-"):
        check_choice("name", rest[0], NAMES)
    options = _parse(DataOptions(), rest, "data [NAME ...]")
    for name in names or NAMES:
        print(f"{name}: ready in {download(name, options.folder)}")


def _list(argv: list[str]) -> None:
    """Show the recipes, or one in full."""
    from s4mini.recipes import RECIPES

    if argv and not argv[0].startswith("-"):
        for name, value in asdict(read_recipe(argv[0])).items():
            print(f"{name:15}{json.dumps(value)}")
        return
    print(f"{'RECIPE':14}{'DATA':12}{'BLOCKS':>8}  STATE  BATCH EPOCHS")
    for name, r in RECIPES.items():
        blocks = f"{r.n_layers} x {r.d_model}"
        sizes = f"{r.d_state:>7}{r.batch_size:>7}{r.epochs:>7}"
        print(f"{name:14}{r.data:12}{blocks:>8}{sizes}")


def _bench(argv: list[str]) -> None:
    """Measure speed and memory on this machine."""
    from s4mini.bench import BenchOptions, ratio_table, reasons, run_bench

    options = _parse(BenchOptions(), argv, "bench")
    content = run_bench(options, f"s4mini bench {shlex.join(argv)}".rstrip())
    print(ratio_table(content["rows"]), *reasons(content["rows"]), sep="\n")


_COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "list": (_list, "recipes"),
    "fit": (_fit, "train"),
    "evaluate": (_evaluate, "train"),
    "data": (_data, "data"),
    "bench": (_bench, "bench"),
}

_USAGE = """\
usage: s4mini COMMAND ...

Train and measure structured state space models (S4).

  s4mini list [RECIPE]             the recipes, or one in full
  s4mini fit RECIPE [options]      train; seconds on a laptop for `digits`
  s4mini evaluate FOLDER           measure the best weights of a run
  s4mini data [NAME ...]           download data sets
  s4mini bench [options]           measure speed and memory

`s4mini COMMAND --help` tells more; `s4mini --version` which version this is.

examples:
  s4mini fit digits --lr 0.005 --out runs/slow
  s4mini fit runs/slow/recipe.json --out runs/again
  s4mini fit digits --resume --epochs 20       go on, or extend
  s4mini fit digits --seeds 3                  mean and deviation
  s4mini fit scifar --devices 4 --strategy ddp
"""


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Let a block end before Ctrl-C is obeyed; a second one is obeyed at once."""
    heard, usual = [], signal.default_int_handler

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        signal.signal(signal.SIGINT, usual)

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if heard:
        raise KeyboardInterrupt


@contextmanager
def _any_terminal() -> Iterator[None]:
    """Let printing succeed in any terminal, and without one."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        try:
            sys.stdout = sys.stdout or nowhere
            sys.stderr = sys.stderr or nowhere
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="replace")
            yield
        finally:
            sys.stdout, sys.stderr = before


def main(argv: list[str] | None = None) -> int:
    """Train, measure, list or download from the command line.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0; 1 after a message; 130 after Ctrl-C; 141 when the
        reader of the output has gone.

    Raises:
        SystemExit: the arguments cannot be read, help was asked for, or
            the process was told to stop (143).

    Source: book/cli.md.
    """
    program, argv = argv is None, sys.argv[1:] if argv is None else list(argv)
    with _any_terminal():
        try:
            return _run(argv, program)
        except BrokenPipeError:  # of `s4mini list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except KeyboardInterrupt as stopped:
            if not stopped.args:  # else fit has said what is kept
                print("s4mini: interrupted", file=sys.stderr)
            return 130
        except ModuleNotFoundError as error:
            needed = f'this needs {error.name}: pip install "s4mini[train]"'
            said = str(error) if "pip install" in str(error) else needed
        except (OSError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            said = str(error)
        print(f"s4mini: {said}", file=sys.stderr)
        return 1


def _run(argv: list[str], program: bool) -> int:
    """Find the command, and do what it says; program: the process is its own."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"s4mini {version('s4mini')}")
        return 0
    with _ctrl_c_waits():
        from s4mini.checks import check_choice

        check_choice("command", argv[0], tuple(_COMMANDS))
        run, module = _COMMANDS[argv[0]]
        import_module(f"s4mini.{module}")
        if program and argv[0] == "fit":
            from s4mini.bench import keep_memory

            keep_memory()
    run(argv[1:])
    sys.stdout.flush()
    return 0


# A notebook's __name__ is __main__ too, but a notebook has no __file__.
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())
