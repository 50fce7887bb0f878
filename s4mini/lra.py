"""Lists and paths.

Nested lists to be evaluated, curves to be followed: two tasks of Long Range Arena that
can be made at home, and five networks of equal size that get equal seconds to learn
them.

Tangled from book/lra.md.
"""

import hashlib
import io
import math
import random
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4mini.baselines import Residual, TransformerLayer
from s4mini.bench import record_runs
from s4mini.checks import check_choice, check_int
from s4mini.data import Batch, SequenceData, Source, data_dir, load
from s4mini.images import ImageData, image_data
from s4mini.model import S4Config, S4Model, descend, parameter_groups, pool_steps
from s4mini.saving import write_atomically

__all__ = [
    "SYMBOLS",
    "evaluate_listops",
    "draw_listops",
    "SymbolData",
    "load_listops",
    "LISTOPS",
    "draw_pathfinder",
    "load_pathfinder",
    "PATHFINDER",
    "positions",
    "SequenceClassifier",
    "READERS",
    "make_reader",
    "accuracy",
    "train_reader",
    "TASKS",
    "record_readers",
]

#: The symbols of ListOps; their places are their numbers.
SYMBOLS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")

_END = SYMBOLS.index("]")


def _median(values: list[int]) -> int:
    """Return the median, rounded down."""
    values, half = sorted(values), len(values) // 2
    return (values[half] + values[-half - 1]) // 2


_RULES: dict[int, Callable[[list[int]], int]] = {
    10: min,
    11: max,
    12: _median,
    13: lambda values: sum(values) % 10,
}


def evaluate_listops(symbols: Sequence[int]) -> int:
    """Return the value of an expression, exactly.

    Args:
        symbols: the numbers of its symbols, in reading order.

    Returns:
        A digit, 0 to 9.

    Raises:
        ValueError: it is not one whole expression; says where it fails.

    Source: Nangia and Bowman 2018; book/lra.md.
    """
    stack: list[list[int]] = [[]]  # what each open list holds so far
    for at, symbol in enumerate(map(int, symbols)):
        if 0 <= symbol < 10:
            stack[-1].append(symbol)
        elif symbol in _RULES:
            stack.append([symbol])
        elif symbol == _END and len(stack) > 1 and len(stack[-1]) > 1:
            rule, *values = stack.pop()
            stack[-1].append(_RULES[rule](values))
        else:
            raise ValueError(f"symbols: unexpected {symbol} at position {at}")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(
            f"symbols: expected one whole expression, got {len(stack) - 1} "
            f"lists left open and {len(stack[0])} values"
        )
    return stack[0][0]


def _expression(
    rng: random.Random, limit: int, depth: int, arguments: int
) -> list[int] | None:
    """Draw an expression; None as soon as it reaches limit symbols."""
    symbols: list[int] = []
    wanted = [1]  # how many arguments each open list still wants
    while wanted and len(symbols) < limit:
        if wanted[-1] == 0:
            wanted.pop()
            symbols.append(_END)
            continue
        wanted[-1] -= 1
        if len(wanted) < depth and rng.random() <= 0.25:
            symbols.append(10 + int(4 * rng.random()))
            wanted.append(2 + int((arguments - 1) * rng.random()))
        else:
            symbols.append(int(10 * rng.random()))
    return None if wanted else symbols[:-1]  # the last closed no list


def draw_listops(
    rng: random.Random,
    length: int = 2000,
    depth: int = 10,
    arguments: int = 10,
) -> list[int]:
    """Draw an expression of more than length/4 symbols, but fewer than length.

    Args:
        rng: what to draw from; random.Random(seed) gives the same everywhere.
        length: how many symbols an expression does not reach, at least 8.
        depth: levels, a digit alone being the first, at least 2.
        arguments: how many a list has at most, at least 2.

    Returns:
        The numbers of its symbols.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: one is too small, or all expressions would be too short.

    Source: Tay et al. 2021; book/lra.md.
    """
    if not isinstance(rng, random.Random):
        kind = type(rng).__name__
        raise TypeError(f"rng: expected a random.Random, got {kind}")
    length = check_int("length", length, minimum=8)
    depth = check_int("depth", depth, minimum=2)
    arguments = check_int("arguments", arguments, minimum=2)
    longest = 1
    for _ in range(min(depth, 64) - 1):
        longest = 2 + arguments * longest
    if longest <= length // 4:
        raise ValueError(
            f"length: expected at most {4 * longest - 1} for this depth and "
            f"so many arguments, got {length}"
        )
    symbols = None
    while symbols is None or len(symbols) <= length // 4:
        symbols = _expression(rng, length, depth, arguments)
    return symbols


_SPLITS = ("train", "validation", "test")


def _make(draw: Callable, seed: int, counts: Sequence[int], workers: int) -> list[list]:
    """Make all splits; how many processes do it makes no difference."""
    keys = [(seed, s, k) for s, n in enumerate(counts) for k in range(n)]
    if workers == 1:
        examples = iter([draw(*key) for key in keys])
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            made = pool.map(draw, *zip(*keys, strict=True), chunksize=250)
            examples = iter(list(made))
    return [list(islice(examples, n)) for n in counts]


def _kept(key: str, make: Callable[[], dict]) -> dict[str, np.ndarray]:
    """Return arrays made before, or make and keep them."""
    name = f"{hashlib.sha1(key.encode()).hexdigest()[:16]}.npz"
    path = data_dir() / "made" / name
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        path.unlink()  # damaged: make it again
    arrays, buffer = make(), io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        warnings.warn(f"not kept for the next time: {error}", stacklevel=2)
    return arrays


def _counts(
    examples: int | None, most: int, held: int, seed: int, workers: int
) -> tuple[int, int, int]:
    """Return how many examples to make of each split."""
    train = most if examples is None else check_int("examples", examples)
    if train > 10**7:
        raise ValueError(f"examples: expected at most 10**7, got {train}")
    if check_int("seed", seed, minimum=0) >= 2**32:
        raise ValueError(f"seed: expected less than 2**32, got {seed}")
    check_int("workers", workers)
    held = min(held, math.ceil(train / 10))
    return train, held, held


@dataclass(frozen=True, eq=False, kw_only=True)
class SymbolData(SequenceData):
    """Labelled sequences of symbols, of different lengths.

    Attributes:
        symbols: for each split, (n, L) uint8; beyond an example's end, the
            number of channels, which is no symbol.
        lengths: for each split, (n,) int64.

    Source: book/lra.md.
    """

    symbols: dict[str, Tensor] = field(repr=False)
    lengths: dict[str, Tensor] = field(repr=False)

    def draw(self, split: str, index: Tensor) -> Batch:
        symbols, n = self.symbols[split][index], self.channels
        one = torch.eye(n + 1, n, device=symbols.device)  # last row: zeros
        return Batch(
            one[symbols.long()],  # (B, L, n)
            self.labels[split][index],
            self.lengths[split][index],
        )


def _listops_example(
    length: int, seed: int, split: int, number: int
) -> tuple[bytes, int]:
    """Make one example: its symbols and its value."""
    rng = random.Random((seed << 34) + (split << 32) + number)
    symbols = draw_listops(rng, length)
    return bytes(symbols), evaluate_listops(symbols)


def _listops_arrays(draw: Callable, L: int, *rest) -> dict[str, np.ndarray]:
    """Make all splits: symbols padded, lengths, values."""
    arrays, end = {}, bytes([len(SYMBOLS)])
    for split, examples in zip(_SPLITS, _make(draw, *rest), strict=True):
        padded = b"".join(s.ljust(L, end) for s, _ in examples)
        arrays[f"{split}-symbols"] = np.frombuffer(padded, np.uint8).reshape(-1, L)
        arrays[f"{split}-lengths"] = np.array([len(s) for s, _ in examples])
        arrays[f"{split}-labels"] = np.array([value for _, value in examples])
    return arrays


def _column(arrays: dict[str, np.ndarray], what: str) -> dict[str, Tensor]:
    """Return one array of each split, as tensors."""
    return {s: torch.from_numpy(arrays[f"{s}-{what}"].copy()) for s in _SPLITS}


def load_listops(
    paths: Mapping[str, Path],
    length: int | None = None,
    examples: int | None = None,
    seed: int = 0,
    workers: int = 1,
) -> SymbolData:
    """Make nested lists of fewer than length (2000) symbols.

    Args:
        paths: none; nothing is read from published files.
        length: symbols that no expression reaches, above 7.
        examples: how many to train on (96,000); up to a tenth as many are
            made to validate and to test.
        seed: from which they are drawn, below 2**32.
        workers: processes that make them; the examples do not depend on it.
            More than one need a program that guards its main part by
            if __name__ == "__main__".

    Returns:
        The data set.

    Raises:
        TypeError: an option is of a wrong kind.
        ValueError: an option is out of range.

    Source: book/lra.md.
    """
    L = 2000 if length is None else check_int("length", length, minimum=8)
    if L > 10**5:
        raise ValueError(f"length: expected at most 10**5, got {L}")
    counts = _counts(examples, 96_000, 2000, seed, workers)
    draw = partial(_listops_example, L)
    arrays = _kept(
        f"listops 1 {L} {seed} {counts}",
        lambda: _listops_arrays(draw, L, seed, counts, workers),
    )
    n = len(SYMBOLS)
    return SymbolData(
        classes=tuple("0123456789"),
        length=L,
        mean=torch.zeros(n),
        std=torch.ones(n),
        labels=_column(arrays, "labels"),
        symbols=_column(arrays, "symbols"),
        lengths=_column(arrays, "lengths"),
    )


LISTOPS = Source(
    "ListOps",
    load_listops,
    otherwise="made by s4mini, to the rule of Long Range Arena",
)

_SIDE = 32  # pixels
_ROOM = 3.0  # pixels between curves
_DOT = 1.7  # pixels more around a place for a dot
_DASH, _STEP = 1.5, 2.8  # pixels: a dash, and from one to the next
_PIXELS = np.add.outer((0.5 + np.arange(_SIDE)) * 1j, 0.5 + np.arange(_SIDE)).reshape(
    -1, 1
)  # their centres


def _curve(rng: np.random.RandomState, dashes: int) -> np.ndarray:
    """Draw a curve from 0: where its dashes start and end, in turn."""
    turned = np.exp(1j * np.cumsum(0.35 * rng.randn(dashes)))
    starts = _STEP * (np.cumsum(turned) - turned)
    return np.stack([starts, starts + _DASH * turned], axis=1).ravel()


def _distance(curve: np.ndarray) -> np.ndarray:
    """Return the distance of each pixel to the nearest dash of a curve."""
    p, q = curve[0::2], curve[1::2]
    w = (_PIXELS - p) / (q - p)  # (pixels, dashes)
    beyond = w.real - w.real.clip(0, 1)
    return _DASH * np.sqrt((beyond**2 + w.imag**2).min(axis=1))


def _place(
    rng: np.random.RandomState,
    dashes: int,
    taken: np.ndarray,
    starts: np.ndarray | None = None,
) -> np.ndarray | None:
    """Put a new curve where there is room; None if no trial finds any."""
    if starts is None:
        starts = _SIDE * (rng.rand(64) + 1j * rng.rand(64))
    turn = np.exp(2j * np.pi * rng.rand(64))
    z = starts[:, None] + turn[:, None] * _curve(rng, dashes)
    edge = np.minimum(z.real, z.imag), np.maximum(z.real, z.imag)
    z = z[(edge[0].min(1) > 2) & (edge[1].max(1) < _SIDE - 2)]
    at = z.imag.astype(int) * _SIDE + z.real.astype(int)
    z = z[(taken[at] > _ROOM).all(axis=1)]
    return z[0] if len(z) else None


def _near(distance: np.ndarray, dots: np.ndarray) -> np.ndarray:
    """Return the distance to curves, or to places for dots, if that is less."""
    return np.minimum(distance, abs(_PIXELS - dots).min(axis=1) - _DOT)


def _two_curves(
    rng: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw curves a and b, and the distance of each pixel to all curves."""
    while True:
        a = _place(rng, 9, np.full(_SIDE**2, np.inf))
        if a is None:
            continue
        distance, dots = _distance(a), a[[0, -1]]
        around = a[0] + abs(a[-1] - a[0]) * np.exp(2j * np.pi * rng.rand(64))
        b = _place(rng, 9, _near(distance, dots), around)
        if b is not None and abs(b[0] - a).min() >= _ROOM + _DOT:
            break
    distance, dots = np.minimum(distance, _distance(b)), np.append(dots, b[0])
    for _ in range(6):
        other = _place(rng, 4, _near(distance, dots))
        if other is not None:
            distance = np.minimum(distance, _distance(other))
    return a, b, distance


def draw_pathfinder(rng: np.random.RandomState) -> tuple[np.ndarray, int]:
    """Draw an image of two long curves, some short ones, and two dots.

    Args:
        rng: what to draw from. Its stream of numbers is the same in every
            version of NumPy; pixels may differ in the last digit rounded.

    Returns:
        The image (32, 32) uint8, and 1 if the dots mark one curve, else 0.

    Raises:
        TypeError: rng is no RandomState.

    Source: after Linsley et al. 2018; book/lra.md.
    """
    if not isinstance(rng, np.random.RandomState):
        kind = type(rng).__name__
        raise TypeError(f"rng: expected a numpy RandomState, got {kind}")
    a, b, distance = _two_curves(rng)
    label = int(rng.rand() < 0.5)
    dots = np.array([a[0], a[-1] if label else b[0]])
    bright = 0.8 * (1.0 - distance).clip(0, 1)
    dot = (2.2 - abs(_PIXELS - dots).min(axis=1)).clip(0, 1)
    image = np.round(255 * np.maximum(bright, dot)).astype(np.uint8)
    return image.reshape(_SIDE, _SIDE), label


def _pathfinder_example(seed: int, split: int, number: int) -> tuple[np.ndarray, int]:
    """Make one example."""
    return draw_pathfinder(np.random.RandomState([seed, split, number]))


def _pathfinder_arrays(*rest) -> dict[str, np.ndarray]:
    """Make all splits: images and labels."""
    arrays = {}
    made = _make(_pathfinder_example, *rest)
    for split, examples in zip(_SPLITS, made, strict=True):
        arrays[f"{split}-images"] = np.stack([x for x, _ in examples])[..., None]
        arrays[f"{split}-labels"] = np.array([label for _, label in examples])
    return arrays


def load_pathfinder(
    paths: Mapping[str, Path],
    size: int | None = None,
    order: str = "raster",
    examples: int | None = None,
    seed: int = 0,
    workers: int = 1,
) -> ImageData:
    """Make images of curves.

    Args:
        paths: none; nothing is read from published files.
        size, order: as of all images.
        examples: how many to train on (160,000); up to a tenth as many are
            made to validate and to test.
        seed, workers: as load_listops.

    Returns:
        The data set.

    Raises:
        TypeError: an option is of a wrong kind.
        ValueError: an option is out of range.

    Source: book/lra.md.
    """
    counts = _counts(examples, 160_000, 20_000, seed, workers)
    arrays = _kept(
        f"pathfinder 1 {seed} {counts}",
        lambda: _pathfinder_arrays(seed, counts, workers),
    )
    return image_data(
        _column(arrays, "images"),
        _column(arrays, "labels"),
        ("apart", "joined"),
        size=size,
        order=order,
    )


PATHFINDER = Source(
    "Pathfinder",
    load_pathfinder,
    otherwise="made by s4mini, after that of Long Range Arena",
)


def positions(L: int, H: int) -> Tensor:
    """Return sines and cosines that tell the steps of a sequence apart.

    Args:
        L: steps.
        H: channels, even.

    Returns:
        (L, H), between -1 and 1.

    Source: Vaswani et al. 2017, section 3.5; book/lra.md.
    """
    omega = 10.0 ** (-8 * torch.arange(H // 2) / H)
    angle = torch.arange(L)[:, None] * omega  # (L, H/2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)


class SequenceClassifier(nn.Module):
    """Encode, pass through causal layers, average over steps, decode.

    Args:
        layers: each maps (B, L, H) to the same shape, causally.
        channels: of the input.
        d_model: the number H of channels inside.
        classes: how many scores are returned.
        placed: whether positions are added after the encoder.

    Source: book/lra.md.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        channels: int,
        d_model: int,
        classes: int,
        placed: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(channels, d_model)
        self.layers, self.placed = nn.ModuleList(layers), placed
        self.decoder = nn.Linear(d_model, classes)

    def forward(self, u: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map u (B, L, channels) to scores (B, classes)."""
        u = self.encoder(u)
        u = u + positions(*u.shape[1:]).to(u) if self.placed else u
        for layer in self.layers:
            u = layer(u)
        return self.decoder(pool_steps(u, "mean", lengths))


#: The networks that are compared.
READERS = ("s4", "s4d", "transformer", "linear", "lstm")


def make_reader(name: str, channels: int, classes: int) -> nn.Module:
    """Make one of the networks, of about 15,000 parameters.

    Args:
        name: one of READERS.
        channels: of the input.
        classes: how many scores it returns.

    Raises:
        ValueError: the name is unknown.

    Source: book/lra.md.
    """
    check_choice("name", name, READERS)
    if name in ("s4", "s4d"):
        measure, N = ("legs", 24) if name == "s4" else ("diag-lin", 32)
        return S4Model(
            S4Config(
                d_input=channels,
                d_output=classes,
                d_model=40,
                n_layers=2,
                d_state=N,
                measure=measure,
                dropout=0.0,
                prenorm=True,
            )
        )
    if name == "lstm":
        H = 30
        layers: list[nn.Module] = [
            Residual(nn.LayerNorm(H), nn.LSTM(H, H, batch_first=True)) for _ in range(2)
        ]
    else:
        kind, H = "fused" if name == "transformer" else "linear", 24
        layers = [TransformerLayer(H, 4, kind) for _ in range(2)]
    return SequenceClassifier(layers, channels, H, classes, name != "lstm")


@torch.no_grad()
def accuracy(
    model: nn.Module, data: SequenceData, split: str, index: Tensor
) -> tuple[float, float]:
    """Return the share of examples that are right, and its standard error.

    Args:
        model: maps (u, lengths) to scores.
        data: with labels.
        split: from which the examples are.
        index: (n,) their numbers.

    Source: book/lra.md.
    """
    right, training = 0, model.training
    model.eval()
    for part in index.split(64):
        u, target, lengths = data.batch(split, part)
        right += (model(u, lengths).argmax(-1) == target).sum().item()
    model.train(training)
    share = right / len(index)
    return share, math.sqrt(share * (1 - share) / len(index))


_RATES = {"s4": 1e-2, "s4d": 1e-2, "transformer": 2e-3, "linear": 2e-3, "lstm": 5e-3}


@torch.random.fork_rng()  # the caller's numbers go on where they were
def train_reader(
    name: str,
    data: SequenceData,
    seconds: float,
    seed: int = 0,
    looks: int = 4,
    held: int = 250,
) -> tuple[nn.Module, dict]:
    """Train a network for so many seconds of one processor.

    Args:
        name: one of READERS.
        data: with labels.
        seconds: of the process's own time, validation not counted.
        seed: of the weights and the batches.
        looks: how often it is validated.
        held: examples of the validation split that are looked at.

    Returns:
        The last model, and a record of the run: its curve, its steps.

    Source: book/lra.md.
    """
    torch.manual_seed(seed)
    model = make_reader(name, data.channels, len(data.classes))
    groups = parameter_groups(model, _RATES[name], 0.01, 1e-3)
    optimizer, rates = torch.optim.AdamW(groups), [g["lr"] for g in groups]
    split = "validation" if "validation" in data.splits else "train"
    held, n = min(held, data.count(split)), data.count("train")
    n -= held if split == "train" else 0  # the last are held out
    shown = data.count(split) - held + torch.arange(held)
    batch, steps, used = 2**13 // data.length, 0, 0.0
    losses: list[float] = []
    curve: list[dict] = []
    start = time.time()
    while used < seconds:
        before, share = time.process_time(), used / seconds
        heat = min(1.0, 10 * share + 0.01) * (1 + math.cos(math.pi * share)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * heat
        u, target, lengths = data.batch("train", torch.randint(n, (batch,)))
        loss = F.cross_entropy(model(u, lengths), target)
        losses.append(descend(model, loss, optimizer))
        steps += 1
        used += time.process_time() - before
        if used >= seconds * (len(curve) + 1) / looks:
            found, _ = accuracy(model, data, split, shown)
            curve.append(
                {
                    "seconds": used,
                    "step": steps,
                    "validation": found,
                    "loss": sum(losses) / len(losses),
                }
            )
            losses = []
    return model, {
        "model": name,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": used,
        "wall": time.time() - start,
        "curve": curve,
    }


#: The tasks of the recorded runs, and how each data set is made or read.
TASKS: dict[str, dict] = {
    "listops": {"length": 256, "examples": 5_000},
    "cifar10": {"gray": True, "size": 16},
    "pathfinder": {"examples": 5_000},
}


def record_readers(
    out: str | Path,
    task: str,
    seconds: float = 60.0,
    seed: int = 0,
    tested: int = 1000,
) -> None:
    """Train and test all networks on a task; add them to a file of results.

    Args:
        out: the file, such as results/lra.json; runs that it holds already
            are kept, and not made again.
        task: one of TASKS.
        seconds: for each network.
        seed: of the weights and the batches.
        tested: examples of the test split, at most.

    Source: book/lra.md.
    """
    check_choice("task", task, tuple(TASKS))
    data = load(task, **TASKS[task])
    index = torch.arange(min(tested, data.count("test")))

    def run(name: str) -> dict:
        model, record = train_reader(name, data, seconds, seed)
        share, error = accuracy(model, data, "test", index)
        guess = data.labels["test"][index].bincount().max().item() / len(index)
        return {
            "task": task,
            "data": data.title,
            "length": data.length,
            "accuracy": share,
            "error": error,
            "guess": guess,
            "tested": len(index),
        } | record

    call = f"lra.record_readers({str(out)!r}, TASK, {seconds}, {seed}, {tested})"
    record_runs(
        out,
        call,
        seed,
        {},
        [
            ({"task": task, "model": name, "seed": seed}, partial(run, name))
            for name in READERS
        ],
    )
