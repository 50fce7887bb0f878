"""Training.

A recipe names every number of a training run; the program of this chapter follows it on
one device or many, can be killed and resumed without changing the outcome, and starts
from the command line.

Tangled from book/train.md.
"""

import argparse
import io
import json
import logging
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from s4mini.checks import check_choice, check_int, check_positive
from s4mini.data import NAMES, SequenceData, load
from s4mini.model import S4Config, S4Model, parameter_groups
from s4mini.projection import MEASURES
from s4mini.tasks import S4Forecaster

__all__ = [
    "Recipe",
    "RECIPES",
    "override",
    "split_indices",
    "epoch_order",
    "build",
    "schedule",
    "Learner",
    "save_weights",
    "load_weights",
    "predict",
    "evaluate",
    "Result",
    "fit",
    "summarise",
    "main",
]


@dataclass(frozen=True)
class Recipe:
    """A training run, down to the last number that decides its outcome.

    Attributes:
        data: the data set, such as "cifar10" or "digits".
        gray: whether colours become grey levels.
        size: pixels a side after averaging; none: as they are.
        order: in which the pixels of an image are read.
        length: steps of a sequence of another kind; none: the data's own.
        horizon: steps to forecast; none: the data's own.
        examples: how many to make of made data; none: the data's own.
        d_model: channels H.
        n_layers: blocks.
        d_state: state size N of each channel, even.
        measure: what the layers' state matrices begin as.
        dropout: share of channels silenced in training, in [0, 1).
        norm: of each step, or of each channel over a batch.
        prenorm: whether a block's norm comes first.
        bidirectional: whether the layers see the future too.
        pool: what of a sequence is classified, its mean or its last step.
        dt_min: smallest step at initialisation.
        dt_max: largest step at initialisation.
        lr: largest learning rate.
        ssm_lr: the same for the parameters of the dynamics.
        weight_decay: per step and unit of learning rate.
        clip: largest norm of a gradient (all parameters together).
        schedule: of the learning rate, after the warm-up.
        warmup: share of all steps in which the learning rate rises.
        batch_size: examples for one step, over all devices.
        epochs: how often the model is validated.
        epoch_size: examples in an epoch; none: the training set once.
        validation: share of the training examples held out.
        precision: of all but the layers' kernels, which keep float32.
        seed: of the initial values, the order and the dropout.

    Source: book/train.md.
    """

    data: str
    gray: bool = False
    size: int | None = None
    order: str = "raster"
    length: int | None = None
    horizon: int | None = None
    examples: int | None = None
    d_model: int = 128
    n_layers: int = 4
    d_state: int = 64
    measure: str = "legs"
    dropout: float = 0.1
    norm: str = "layer"
    prenorm: bool = False
    bidirectional: bool = False
    pool: str = "mean"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    lr: float = 1e-2
    ssm_lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.05
    batch_size: int = 50
    epochs: int = 100
    epoch_size: int | None = None
    validation: float = 0.1
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_recipe(self)


_S4D = ("diag-legs", "diag-lin", "diag-inv", "diag-real")
_CHOICES = {
    "data": NAMES,
    "order": ("raster", "permuted", "bitreversal"),
    "measure": (*MEASURES, "random", *_S4D),
    "norm": ("layer", "batch"),
    "pool": ("mean", "last"),
    "schedule": ("cosine", "constant"),
    "precision": ("float32", "bfloat16"),
}
_OPTIONAL = ("size", "length", "horizon", "examples", "epoch_size")
_POSITIVE = ("lr", "ssm_lr", "clip", "dt_min", "dt_max", "validation")
_SHARES = ("dropout", "warmup", "validation")


def _check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe with which no run can end well."""
    for name, allowed in _CHOICES.items():
        check_choice(name, getattr(recipe, name), allowed)
    for name in ("d_model", "n_layers", "batch_size", "epochs"):
        check_int(name, getattr(recipe, name))
    for name in _OPTIONAL:
        if getattr(recipe, name) is not None:
            check_int(name, getattr(recipe, name))
    check_int("d_state", recipe.d_state, minimum=2, even=True)
    check_int("seed", recipe.seed, minimum=0)
    for name in (*_POSITIVE, "dropout", "weight_decay", "warmup"):
        if name in _POSITIVE or getattr(recipe, name) != 0:
            check_positive(name, getattr(recipe, name))
    for name in _SHARES:
        if getattr(recipe, name) >= 1:
            raise ValueError(
                f"{name}: expected a share < 1, got {getattr(recipe, name)}"
            )


_LRA = Recipe(
    "cifar10",
    n_layers=6,
    d_model=256,
    norm="batch",
    dropout=0.0,
    bidirectional=True,
    weight_decay=0.05,
    epochs=200,
    warmup=0.1,
)
_MNIST = Recipe("mnist", dropout=0.25, lr=5e-3, batch_size=128, epochs=20, warmup=0.3)
_ETT = Recipe(
    "etth1",
    length=720,
    horizon=720,
    n_layers=2,
    prenorm=True,
    dropout=0.25,
    weight_decay=0.0,
    schedule="constant",
    warmup=0.0,
    epochs=10,
)

#: The recipes that have a name.
RECIPES = {
    "digits": Recipe(
        "digits",
        d_model=32,
        n_layers=2,
        d_state=16,
        dropout=0.0,
        dt_min=3e-2,
        dt_max=1.0,
        epochs=12,
    ),
    "smnist-small": Recipe(
        "mnist", d_model=64, n_layers=2, epochs=10, epoch_size=10_000
    ),
    "scifar-live": Recipe(
        "cifar10",
        size=16,
        d_model=64,
        n_layers=3,
        d_state=32,
        dropout=0.0,
        epochs=8,
        epoch_size=4_000,
        warmup=0.1,
        validation=0.04,
    ),
    "scifar-small": Recipe("cifar10", batch_size=64),
    "scifar": Recipe(
        "cifar10",
        d_model=512,
        n_layers=6,
        bidirectional=True,
        weight_decay=0.05,
        epochs=200,
        warmup=0.005,
    ),
    "image": replace(_LRA, gray=True, d_model=512, dropout=0.1),
    "smnist": _MNIST,
    "pmnist": replace(_MNIST, order="permuted"),
    "speech": Recipe(
        "speech",
        n_layers=6,
        norm="batch",
        prenorm=True,
        batch_size=20,
        epochs=50,
    ),
    "ett-h1": _ETT,
    "ett-h2": replace(_ETT, data="etth2"),
    "listops": replace(_LRA, data="listops", d_state=4, batch_size=32, epochs=40),
    "pathfinder": replace(
        _LRA, data="pathfinder", prenorm=True, lr=4e-3, batch_size=64
    ),
}


def _parse(name: str, text: str, kind: object) -> object:
    """Read the text of one override as what its field is."""
    words = {"true": True, "false": False}
    if kind is bool and text.lower() in words:
        return words[text.lower()]
    if kind == int | None and text.lower() == "none":
        return None
    base = int if kind == int | None else kind
    if base is bool:
        raise ValueError(f"{name}: expected true or false, got {text!r}")
    try:
        return base(text)
    except ValueError:
        wanted = {int: "an integer", float: "a number"}[base]
        raise ValueError(f"{name}: expected {wanted}, got {text!r}") from None


def override(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """Change fields of a recipe from their text.

    Args:
        recipe: what to begin with; it stays as it is.
        changes: for each field to be changed, its new value as text, such as
            {"lr": "0.005", "bidirectional": "true"}.

    Returns:
        The changed recipe.

    Raises:
        ValueError: a field is unknown, or a text or value does not fit it.

    Source: book/train.md.
    """
    kinds = get_type_hints(Recipe)
    for name in changes:
        check_choice("setting", name, tuple(kinds))
    values = {n: _parse(n, text, kinds[n]) for n, text in changes.items()}
    return replace(recipe, **values)


def split_indices(n: int, validation: float = 0.1) -> tuple[Tensor, Tensor]:
    """Split the numbers of n examples into two random sets.

    Args:
        n: how many examples there are, at least 2.
        validation: the share of the second set, in (0, 1).

    Returns:
        Sorted numbers to train on, and to validate on; always the same.

    Raises:
        TypeError: n is not an integer, or validation not a number.
        ValueError: n < 2, or validation leaves one set empty.

    Source: book/train.md.
    """
    n = check_int("n", n, minimum=2)
    check_positive("validation", validation)
    held = round(n * validation)
    if not 0 < held < n:
        raise ValueError(
            f"validation: expected a share that leaves both sets non-empty "
            f"of {n} examples, got {validation}"
        )
    order = torch.randperm(n, generator=Generator().manual_seed(42))
    return order[held:].sort().values, order[:held].sort().values


def epoch_order(n: int, epoch: int, size: int, seed: int) -> Tensor:
    """Return which of n examples an epoch visits, in its order.

    Args:
        n: how many examples there are.
        epoch: which epoch, from 0.
        size: examples in an epoch.
        seed: of the whole run.

    Returns:
        (size,) integers below n. Over the run, every example is visited once
        before any is visited twice.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: n or size is below 1, or epoch or seed below 0.

    Source: book/train.md.
    """
    n, size = check_int("n", n), check_int("size", size)
    first = check_int("epoch", epoch, minimum=0) * size
    seed = check_int("seed", seed, minimum=0)
    passes = range(first // n, (first + size - 1) // n + 1)
    orders = [
        torch.randperm(n, generator=Generator().manual_seed(seed * 2**20 + p))
        for p in passes
    ]
    start = first - passes[0] * n
    return torch.cat(orders)[start : start + size]


def _share(part: Tensor, rank: int, world: int) -> tuple[Tensor, float]:
    """Return a device's share of a batch, and its weight."""
    mine = part[rank::world]
    if not len(mine):
        return part[:1], 0.0
    return mine, world * len(mine) / len(part)


class _Batches:
    """The batches of one epoch, drawn from a data set one by one."""

    def __init__(
        self,
        data: SequenceData,
        split: str,
        index: Tensor,
        size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.data, self.split, self.parts = data, split, index.split(size)
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[tuple, float]]:
        for part in self.parts:
            mine, weight = _share(part, self.rank, self.world)
            yield self.data.batch(self.split, mine), weight


def _check_is_recipe(recipe: Recipe) -> None:
    """Refuse what is not a recipe, such as the name of one."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {recipe!r}")


def build(
    recipe: Recipe, channels: int, outputs: int, horizon: int | None = None
) -> S4Model | S4Forecaster:
    """Return the model of a recipe, with its initial values.

    Args:
        recipe: how large, and from which seed.
        channels: of the input.
        outputs: classes, or channels to forecast.
        horizon: steps to forecast; None: classify.

    Returns:
        The model, in training mode, on the CPU.

    Raises:
        TypeError: recipe is not a Recipe, or a size not an integer.
        ValueError: a size is below 1.

    Source: book/train.md.
    """
    _check_is_recipe(recipe)
    names = (
        "d_model",
        "n_layers",
        "d_state",
        "measure",
        "dropout",
        "norm",
        "prenorm",
        "bidirectional",
        "dt_min",
        "dt_max",
    )
    config = S4Config(
        d_input=check_int("channels", channels),
        d_output=check_int("outputs", outputs),
        **{name: getattr(recipe, name) for name in names},
        pool=recipe.pool if horizon is None else "none",
    )
    model = S4Model(config, Generator().manual_seed(recipe.seed))
    return model if horizon is None else S4Forecaster(model, horizon)


def schedule(step: int, warmup: int, total: int, kind: str = "cosine") -> float:
    """Return the factor on the learning rate: a rise, then half a cosine.

    Args:
        step: from 0; past the end the factor of a cosine is 0.
        warmup: steps in which it rises.
        total: steps in all, more than warmup.
        kind: "cosine", or "constant" to stay at 1 after the rise.

    Returns:
        A number from 0 to 1, 1 at the end of the warm-up.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: step or warmup is below 0, total not above warmup, or
            kind unknown.

    Source: book/train.md.
    """
    step = check_int("step", step, minimum=0)
    warmup = check_int("warmup", warmup, minimum=0)
    total = check_int("total", total, minimum=warmup + 1)
    check_choice("kind", kind, _CHOICES["schedule"])
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / (total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def _optimiser(model: nn.Module, recipe: Recipe, epoch_size: int) -> dict:
    """Return AdamW with its groups and its schedule, as Lightning asks."""
    groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.ssm_lr)
    on_cuda = next(model.parameters()).is_cuda
    optimizer = torch.optim.AdamW(groups, fused=on_cuda)
    total = recipe.epochs * math.ceil(epoch_size / recipe.batch_size)
    warmup = int(recipe.warmup * total)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: schedule(t, warmup, total, recipe.schedule)
    )
    each_step = {"scheduler": rates, "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": each_step}


_TERMS = {"classify": ("loss", "accuracy"), "forecast": ("mse", "mae")}


def _terms(task: str, output: Tensor, target: Tensor) -> Tensor:
    """Return the loss and the second figure of a task, means, as (2,)."""
    output = output.float()  # whatever precision the network ran in
    if task == "classify":
        right = (output.argmax(dim=1) == target).float()
        return torch.stack((cross_entropy(output, target), right.mean()))
    return torch.stack((mse_loss(output, target), l1_loss(output, target)))


def _best(history: list[dict]) -> dict:
    """Return the first of the best epochs, judged on validation."""
    if "validation_mse" in history[0]:
        return min(history, key=lambda row: row["validation_mse"])
    return max(history, key=lambda row: row["validation_accuracy"])


def _check_data(recipe: Recipe, data: SequenceData) -> None:
    """Refuse data that the recipe does not ask for."""
    _check_is_recipe(recipe)
    if not isinstance(data, SequenceData):
        kind = type(data).__name__
        raise TypeError(f"data: expected a SequenceData, got {kind}")
    wanted, given = {"name": recipe.data}, {"name": data.name}
    for name in ("gray", "size", "order", "length", "horizon"):
        ours, theirs = getattr(recipe, name), getattr(data, name, None)
        if name == "size" and ours is None and theirs is not None:
            ours = data.images["train"].shape[1]
        if ours is not None and theirs is not None:
            wanted[name], given[name] = ours, theirs
    if wanted != given:
        raise ValueError(f"data: expected {wanted}, got {given}")


def _load(recipe: Recipe, workers: int = 1) -> SequenceData:
    """Read or make the data set of a recipe."""
    names = ("gray", "size", "order", "length", "horizon", "examples")
    usual = {"gray": False, "order": "raster"}
    options = {name: getattr(recipe, name) for name in names}
    options = {k: v for k, v in options.items() if v != usual.get(k)}
    if recipe.data in ("listops", "pathfinder"):  # which are made
        options["workers"] = workers
    return load(recipe.data, **options)


def _sizes(data: SequenceData) -> dict:
    """Return the sizes of a model of these data, as build wants them."""
    outputs = len(data.classes) or data.channels
    horizon = None if data.task == "classify" else data.horizon
    return {"channels": data.channels, "outputs": outputs, "horizon": horizon}


def _parts(recipe: Recipe, data: SequenceData) -> dict[str, tuple]:
    """Return split and examples that train, that decide, and that test."""
    every = {s: (s, torch.arange(data.count(s))) for s in data.splits}
    if "validation" in data.splits:  # it is official
        return every
    kept, held = split_indices(data.count("train"), recipe.validation)
    return every | {"train": ("train", kept), "validation": ("train", held)}


class Learner(pl.LightningModule):
    """A model, its data, and the rules by which a recipe trains it.

    Args:
        recipe: the run.
        data: what to train on; the test examples are not touched.

    Raises:
        TypeError: recipe is not a Recipe, or data not a data set.
        ValueError: the data are not those of the recipe.

    Source: book/train.md.
    """

    def __init__(self, recipe: Recipe, data: SequenceData) -> None:
        super().__init__()
        _check_data(recipe, data)
        self.recipe, self.data = recipe, data
        self.model = build(recipe, **_sizes(data))
        self.parts = _parts(recipe, data)
        self.epoch_size = recipe.epoch_size or len(self.parts["train"][1])
        self.history: list[dict] = []

    def setup(self, stage: str) -> None:
        self.data = self.data.to(self.trainer.strategy.root_device)

    def train_dataloader(self) -> _Batches:
        split, index = self.parts["train"]
        order = epoch_order(
            len(index), self.current_epoch, self.epoch_size, self.recipe.seed
        )
        return self._batches(split, index[order], self.recipe.batch_size)

    def val_dataloader(self) -> _Batches:
        return self._batches(*self.parts["validation"], 250)

    def _batches(self, split: str, index: Tensor, size: int) -> _Batches:
        rank, world = self.global_rank, self.trainer.world_size
        return _Batches(self.data, split, index, size, rank, world)

    def configure_optimizers(self) -> dict:
        return _optimiser(self.model, self.recipe, self.epoch_size)

    def on_train_epoch_start(self) -> None:
        seed = self.recipe.seed * 2**20 + self.current_epoch
        torch.manual_seed(seed + 2**40 * self.global_rank)
        self.sums = {k: torch.zeros(3, device=self.device) for k in _KINDS}
        self.started = time.perf_counter()

    def training_step(self, batch: tuple, number: int) -> Tensor:
        self.number = number
        self.loss = self._measure("train", *batch)
        return self.loss

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        self.norm = clip_grad_norm_(self.parameters(), gradient_clip_val)
        if not (self.norm.isfinite() & self.loss.isfinite()):
            what = f"loss {self.loss:g}, norm of its gradient {self.norm:g}"
            raise FloatingPointError(f"{what}, {_place(self)}")

    def on_validation_epoch_start(self) -> None:
        self.train_loss = self.sums["train"].tolist()  # waits for the device
        self.trained = time.perf_counter()

    def validation_step(self, batch: tuple, number: int) -> None:
        self._measure("validation", *batch)

    def _measure(self, kind: str, batch: tuple, weight: float) -> Tensor:
        terms = _forward(self, *batch)
        count = len(batch[1]) if weight else 0
        self.sums[kind][:2] += terms.detach() * count
        self.sums[kind][2] += count
        return terms[0] * weight

    def on_validation_epoch_end(self) -> None:
        self.history.append(_row(self))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["recipe"] = asdict(self.recipe)
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = checkpoint["history"]


_KINDS = ("train", "validation")


def _forward(module: Learner, u, target, lengths=None) -> Tensor:
    """Return the terms of a batch; say where numbers ceased to be finite."""
    try:
        output = module.model(u, lengths)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        raise FloatingPointError(f"{error}, {_place(module)}") from error
    return _terms(module.data.task, output, target)


def _place(module: Learner) -> str:
    """Say where a run is."""
    rate = module.optimizers().param_groups[0]["lr"]
    return (  # counted from 1
        f"at step {module.global_step + 1}, batch {module.number + 1} "
        f"of epoch {module.current_epoch + 1}, learning rate {rate:g}"
    )


def _row(module: Learner) -> dict:
    """Return what an epoch has come to, over all devices."""
    before = module.history[-1]["seconds"] if module.history else 0.0
    trained = module.trained - module.started
    row = {
        "epoch": module.current_epoch + 1,
        "examples": (module.current_epoch + 1) * module.epoch_size,
        "examples_per_second": module.epoch_size / trained,
        "seconds": before + time.perf_counter() - module.started,
    }
    for kind in _KINDS:
        sums = module.trainer.strategy.reduce(module.sums[kind], reduce_op="sum")
        *terms, count = sums.tolist()
        for name, value in zip(_TERMS[module.data.task], terms, strict=True):
            row[f"{kind}_{name}"] = value / count
    return row


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step, or leave it as it is."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        kept = "; the previous one is intact" if path.exists() else ""
        text = f"cannot be written: {error.strerror}{kept}"
        raise OSError(error.errno, text, str(path)) from error


class _WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, each written in one step."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write a checkpoint to path."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        _write(Path(path), buffer.getvalue())


def _sizes_of(model: S4Model | S4Forecaster) -> dict:
    """Return what build was given to make a model."""
    core, horizon = getattr(model, "model", model), None
    if isinstance(model, S4Forecaster):
        horizon = model.horizon
    return {
        "channels": core.config.d_input,
        "outputs": core.config.d_output,
        "horizon": horizon,
    }


def save_weights(
    model: S4Model | S4Forecaster, recipe: Recipe, path: str | Path
) -> None:
    """Write a model's weights and its recipe to a safetensors file.

    Args:
        model: as build makes it.
        recipe: what it was built from.
        path: where to; an older file is replaced in one step.

    Raises:
        OSError: the file cannot be written; an older one is then still whole.
        TypeError: model or recipe is of another kind.
        ValueError: the recipe does not describe the model.

    Source: book/train.md.
    """
    if not isinstance(model, S4Model | S4Forecaster):
        kind = type(model).__name__
        raise TypeError(f"model: expected one made by build, got {kind}")
    _check_is_recipe(recipe)
    sizes = _sizes_of(model)
    notes = {"recipe": json.dumps(asdict(recipe)), "sizes": json.dumps(sizes)}
    state, rebuilt = model.state_dict(), build(recipe, **sizes).state_dict()
    shapes = [{k: v.shape for k, v in s.items()} for s in (state, rebuilt)]
    if shapes[0] != shapes[1]:
        raise ValueError("recipe: expected what the model was built from")
    weights = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    _write(Path(path), save(weights, metadata=notes))


def load_weights(
    path: str | Path,
) -> tuple[S4Model | S4Forecaster, Recipe]:
    """Read what save_weights has written.

    Args:
        path: the file.

    Returns:
        The model, in evaluation mode, on the CPU; and its recipe.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or damaged.

    Source: book/train.md.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: not found")
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
        recipe = Recipe(**json.loads(notes["recipe"]))
        model = build(recipe, **json.loads(notes["sizes"]))
        model.load_state_dict(load_file(path))
    except Exception as error:
        raise ValueError(
            f"{path}: expected weights with their recipe: {error!r}"
        ) from error
    return model.eval(), recipe


class _Keeper(pl.Callback):
    """Write checkpoints, logs, and a line for each epoch."""

    def __init__(self, out: Path, lines: bool) -> None:
        self.out, self.lines = out, lines

    def on_train_start(self, trainer, module) -> None:
        if not module.history:
            trainer.save_checkpoint(self.out / "last.ckpt")

    def on_train_batch_end(self, trainer, module, *rest) -> None:
        if trainer.global_step % 50 == 1:
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            _log(
                trainer,
                {
                    "step_loss": module.loss.item(),
                    "rate": rate,
                    "gradient_norm": module.norm.item(),
                },
            )

    def on_train_epoch_end(self, trainer, module) -> None:
        row = module.history[-1]
        _log(trainer, {k: v for k, v in row.items() if k != "epoch"})
        if trainer.is_global_zero and _best(module.history) is row:
            save_weights(module.model, module.recipe, self.out / "best.safetensors")
        trainer.save_checkpoint(self.out / "last.ckpt")
        if self.lines and trainer.is_global_zero:
            print(_line(row, module.recipe.epochs), flush=True)

    def on_exception(self, trainer, module, exception) -> None:
        if isinstance(exception, KeyboardInterrupt):
            kept = f"{self.out} holds it after epoch {len(module.history)}"
            print(f"\ninterrupted; {kept}, resume it", file=sys.stderr)


def _log(trainer: pl.Trainer, values: dict) -> None:
    """Add values to all logs."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
        logger.save()


def _line(row: dict, epochs: int) -> str:
    """Describe an epoch in one line."""
    figures = ", ".join(
        f"{name.replace('_', ' ')} {row[name]:.4g}"
        for name in row
        if name.startswith(_KINDS)
    )
    pace = f"{row['examples_per_second']:.0f} examples/s"
    left = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    done = f"epoch {row['epoch']:3} of {epochs}"
    return f"{done}: {figures}; {pace}, {_duration(left)} left"


def _duration(seconds: float) -> str:
    """Write a time as a reader would."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s"


class _Bar(pl.Callback):
    """Show how far a run is, its rate, and the time that remains."""

    def on_train_start(self, trainer, module) -> None:
        self.bar = tqdm(
            total=trainer.max_epochs * module.epoch_size,
            initial=len(module.history) * module.epoch_size,
            desc=module.recipe.data,
            unit=" examples",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer, module, outputs, batch, *rest):
        self.bar.update(len(batch[0][1]) * trainer.world_size)

    def on_train_epoch_end(self, trainer, module) -> None:
        row = module.history[-1]
        self.bar.n = row["examples"]
        name = "mse" if "validation_mse" in row else "accuracy"
        value = f"{row[f'validation_{name}']:.4g}"
        self.bar.set_postfix({f"validation {name}": value})

    def teardown(self, trainer, module, stage) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def _read_checkpoint(path: Path, recipe: Recipe) -> dict:
    """Return a checkpoint if it can be read and belongs to the recipe."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found, nothing to resume")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs, _ = checkpoint["recipe"], checkpoint["history"]
    except Exception as error:
        raise ValueError(
            f"{path}: not a whole checkpoint of this program: {error!r}"
        ) from error
    for name, ours in asdict(recipe).items():
        if theirs.get(name) != ours:
            raise ValueError(
                f"{path}: is of a run with {name} = {theirs.get(name)!r}, not {ours!r}"
            )
    return checkpoint


def _check_output(output: Tensor, target: Tensor, data: SequenceData) -> None:
    """Refuse a model whose answers do not fit the data."""
    wanted = tuple(target.shape)
    if data.task == "classify":
        wanted = len(target), len(data.classes)
    if output.shape != wanted:
        raise ValueError(
            f"model: expected outputs of shape {wanted} for {data.name}, got "
            f"{tuple(output.shape)}"
        )


def _outputs(
    model: nn.Module,
    data: SequenceData,
    split: str,
    index: Tensor,
    size: int,
) -> tuple[Tensor, Tensor]:
    """Return a model's outputs and the targets, on the CPU."""
    pairs, training = [], model.training
    model.eval()
    with torch.no_grad():
        for part in index.split(size):
            u, target, lengths = data.batch(split, part)
            output = model(u, lengths)
            _check_output(output, target, data)
            pairs.append((output.cpu(), target.cpu()))
    model.train(training)
    outputs, targets = zip(*pairs, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def predict(
    model: nn.Module, data: SequenceData, split: str, batch_size: int = 250
) -> Tensor:
    """Answer all examples of a split.

    Args:
        model: as build makes it; its mode is restored afterwards.
        data: on the model's device.
        split: such as "test".
        batch_size: examples at a time.

    Returns:
        On the CPU: (n,) the most probable label of each, or its forecast.

    Raises:
        TypeError: batch_size is not an integer.
        ValueError: split is unknown, or batch_size below 1.

    Source: book/train.md.
    """
    index = torch.arange(data.count(split))
    size = check_int("batch_size", batch_size)
    outputs, _ = _outputs(model, data, split, index, size)
    return outputs.argmax(dim=1) if data.task == "classify" else outputs


def evaluate(
    model: nn.Module,
    data: SequenceData,
    split: str = "test",
    index: Tensor | None = None,
) -> dict[str, float]:
    """Measure a model on examples of a split.

    Args:
        model: as build makes it; its mode is restored afterwards.
        data: on the model's device.
        split: such as "test".
        index: which examples of it; None: all.

    Returns:
        {"loss": cross-entropy in nats, "accuracy": share of right answers},
        or of forecasts {"mse": …, "mae": …}, in the data's standardised unit.

    Raises:
        ValueError: split is unknown, or the model's outputs do not fit the
            data.

    Source: book/train.md.
    """
    if index is None:
        index = torch.arange(data.count(split))
    terms = _terms(data.task, *_outputs(model, data, split, index, 250))
    return dict(zip(_TERMS[data.task], terms.tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Result:
    """What a run has come to.

    Attributes:
        recipe: what was followed.
        data: what the data set is to be called in a table.
        parameters: how many numbers the model has learnt.
        device: where it ran.
        history: a dict for each epoch: epoch, examples, seconds, examples per
            second, and for train and validation loss and accuracy, or mse
            and mae.
        validation: the figures of the best epoch, whose weights are kept.
        test: those of the same weights on the test split; None if the run is
            unfinished.
        folder: where the files are.
        model: with the best epoch's weights, in evaluation mode, on the CPU.
        guesses: its labels or forecasts for the test split, or None.

    Source: book/train.md.
    """

    recipe: Recipe
    data: str
    parameters: int
    device: str
    history: list[dict] = field(repr=False)
    validation: dict[str, float]
    test: dict[str, float] | None
    folder: Path
    model: nn.Module = field(repr=False)
    guesses: Tensor | None = field(repr=False)

    @property
    def validation_accuracy(self) -> float | None:
        """The accuracy on validation; None for forecasts."""
        return self.validation.get("accuracy")

    @property
    def test_accuracy(self) -> float | None:
        """The accuracy on test; None for forecasts and unfinished runs."""
        return self.test and self.test.get("accuracy")

    def to_json(self) -> str:
        """Return everything but the model, as text."""
        names = (
            "data",
            "parameters",
            "device",
            "validation",
            "test",
            "test_accuracy",
            "history",
        )
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": pl.__version__,
        }
        content = {name: getattr(self, name) for name in names}
        content |= {
            "recipe": asdict(self.recipe),
            "seed": self.recipe.seed,
            "command": shlex.join(sys.argv),
            "versions": versions,
        }
        return json.dumps(content, indent=1)


_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}


def _trainer(
    recipe: Recipe,
    out: Path,
    first: int,
    epochs: int,
    progress: str,
    machines: dict,
) -> pl.Trainer:
    """Return Lightning's loop, set to be quiet."""
    on_cuda = torch.cuda.is_available()
    keeper = _Keeper(out, lines=progress == "lines")
    return pl.Trainer(
        accelerator="cuda" if on_cuda else "cpu",
        sync_batchnorm=on_cuda and recipe.norm == "batch",
        precision=_PRECISIONS[recipe.precision],
        max_epochs=epochs,
        gradient_clip_val=recipe.clip,
        callbacks=[keeper, *([_Bar()] if progress == "bar" else [])],
        logger=_loggers(out, f"from-epoch-{first}"),
        plugins=[_WholeFiles()],
        **_OURS,
        **machines,
    )


_OURS = {  # what Lightning would do, and this chapter does
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "reload_dataloaders_every_n_epochs": 1,
    "use_distributed_sampler": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}


def _loggers(out: Path, version: str) -> list:
    """Return what writes the logs; hush Lightning's own words."""
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.WARNING)
    kinds = {"log": CSVLogger, "tensorboard": TensorBoardLogger}
    return [kind(out, name=k, version=version) for k, kind in kinds.items()]


def _device_name(world: int = 1) -> str:
    """Say in words what fit runs on."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return f"{world} x {name}" if world > 1 else name
    threads = torch.get_num_threads() * world
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def fit(
    recipe: Recipe,
    out: str | Path,
    data: SequenceData | None = None,
    until: int | None = None,
    resume: bool = False,
    progress: str = "lines",
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
) -> Result:
    """Train a model by a recipe; choose on validation, test once.

    Args:
        recipe: what to do.
        out: folder for checkpoints, logs and the result.
        data: the data set, if it has been loaded already.
        until: stop after this epoch, as if interrupted; None: at the end.
        resume: whether to go on with the run in out.
        progress: "bar", "lines" (one for each epoch), or "none".
        devices: how many of each machine; above 1 in scripts only, which
            Lightning starts once for each.
        nodes: how many machines, which share the folder out.
        strategy: "auto", or "ddp" for gradients averaged over devices.

    Returns:
        The result; also written to out/result.json when the run is finished.
        With several devices, only the first process tests.

    Raises:
        FileExistsError: out holds a run already, and resume is false.
        FileNotFoundError: the data, or a run to resume, is not there.
        FloatingPointError: the loss is no longer a number.
        OSError: a file cannot be written; the previous one is intact.
        TypeError: recipe is not a Recipe, or a count not an integer.
        ValueError: progress or strategy is unknown, a count < 1, or the run
            in out has another recipe or a damaged checkpoint.

    Source: book/train.md.
    """
    check_choice("progress", progress, ("bar", "lines", "none"))
    machines = _machines(devices, nodes, strategy)
    _check_is_recipe(recipe)
    epochs = recipe.epochs
    if until is not None:
        epochs = min(epochs, check_int("until", until))
    out = Path(out)
    first = _epochs_done(recipe, out, resume)
    module = Learner(recipe, _load(recipe) if data is None else data)
    out.mkdir(parents=True, exist_ok=True)
    if first < epochs:
        trainer = _trainer(recipe, out, first, epochs, progress, machines)
        _run(trainer, module, out / "last.ckpt", resume)
    else:
        module.history = _read_checkpoint(out / "last.ckpt", recipe)["history"]
    return _finish(module, out, devices * nodes)


def _machines(devices: int, nodes: int, strategy: str) -> dict:
    """Return the machines in Lightning's words."""
    check_choice("strategy", strategy, ("auto", "ddp"))
    return {
        "devices": check_int("devices", devices),
        "num_nodes": check_int("nodes", nodes),
        "strategy": strategy,
    }


def _epochs_done(recipe: Recipe, out: Path, resume: bool) -> int:
    """Return how many epochs lie behind; refuse to overwrite a run."""
    if resume:
        return len(_read_checkpoint(out / "last.ckpt", recipe)["history"])
    if (out / "last.ckpt").exists():
        raise FileExistsError(
            f"{out}: holds a run already; resume it, or choose another folder"
        )
    return 0


def _run(trainer: pl.Trainer, module: Learner, last: Path, resume: bool) -> None:
    """Let Lightning run; if numbers fail, say what is kept."""
    at = last if resume else None
    with warnings.catch_warnings():  # of Lightning and DDP, about themselves
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        warnings.filterwarnings("ignore", ".*bucket view strides")
        warnings.filterwarnings("ignore", ".*logs directory .* exists")
        try:
            trainer.fit(module, ckpt_path=at, weights_only=True)
        except FloatingPointError as error:
            kept = f"{last} holds the run after epoch {len(module.history)}"
            raise FloatingPointError(f"{error}; {kept}") from error


def _finish(module: Learner, out: Path, world: int) -> Result:
    """Take the best weights; test them if the run is at its end."""
    recipe, data, history = module.recipe, module.data, module.history
    model, _ = load_weights(out / "best.safetensors")
    test = guesses = None
    if len(history) == recipe.epochs and rank_zero_only.rank == 0:
        test, guesses = _test(model, data)
    prefix, row = "validation_", _best(history)
    result = Result(
        recipe,
        data.title,
        sum(p.numel() for p in model.parameters()),
        _device_name(world),
        history,
        {k.removeprefix(prefix): v for k, v in row.items() if prefix in k},
        test,
        out,
        model.cpu(),
        guesses,
    )
    if test is not None:
        _write(out / "result.json", f"{result.to_json()}\n".encode())
    return result


def _test(model: nn.Module, data: SequenceData) -> tuple[dict, Tensor]:
    """Return figures and guesses, from one look at the test split."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    every = torch.arange(data.count("test"))
    outputs, targets = _outputs(model.to(device), data.to(device), "test", every, 250)
    terms = _terms(data.task, outputs, targets).tolist()
    guesses = outputs.argmax(1) if data.task == "classify" else outputs
    return dict(zip(_TERMS[data.task], terms, strict=True)), guesses


def summarise(results: list[Result]) -> dict:
    """Give mean and standard deviation over runs with several seeds.

    Args:
        results: finished runs, at least two, whose recipes differ in their
            seeds alone.

    Returns:
        "seeds", and for "validation" and "test" each figure as "mean", "sd".

    Raises:
        ValueError: there are fewer than two, a run is unfinished, a seed
            occurs twice, or the recipes differ in more than their seeds.

    Source: book/train.md.
    """
    seeds = [result.recipe.seed for result in results]
    recipes = {replace(result.recipe, seed=0) for result in results}
    if len(set(seeds)) < max(2, len(seeds)) or len(recipes) != 1:
        raise ValueError(
            "results: expected two or more runs of one recipe with different "
            f"seeds, got seeds {seeds} of {len(recipes)} recipes"
        )
    if any(result.test is None for result in results):
        raise ValueError("results: expected finished runs, got an unfinished")
    return {
        "seeds": seeds,
        "validation": _spread([r.validation for r in results]),
        "test": _spread([r.test for r in results]),
    }


def _spread(figures: list[dict[str, float]]) -> dict[str, dict]:
    """Return mean and standard deviation of each figure."""
    columns = {name: [row[name] for row in figures] for name in figures[0]}
    return {
        name: {"mean": statistics.mean(v), "sd": statistics.stdev(v)}
        for name, v in columns.items()
    }


def _field_help() -> dict[str, str]:
    """Return what Recipe's docstring says of each field."""
    _, _, text = (Recipe.__doc__ or "").partition("Attributes:")
    lines = (line.strip().partition(": ") for line in text.splitlines())
    return {name: said.rstrip(".") for name, colon, said in lines if colon}


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of a recipe but its data."""
    group = parser.add_argument_group(
        "the recipe with another value",
        "`s4mini list RECIPE` shows the values of a recipe",
    )
    names = {int: "N", float: "X", int | None: "N|none"}
    said = _field_help()
    for name, kind in get_type_hints(Recipe).items():
        option, text = f"--{name.replace('_', '-')}", said.get(name)
        if kind is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text)
        elif name != "data":
            metavar = names.get(kind) or "|".join(_CHOICES[name])
            group.add_argument(option, metavar=metavar, help=text)


def _changes(options: argparse.Namespace) -> dict[str, str]:
    """Return the overrides of a command line."""
    names = get_type_hints(Recipe)
    given = {name: getattr(options, name, None) for name in names}
    return {k: str(v) for k, v in given.items() if v is not None}


_EPILOG = """\
examples:
  s4mini list                           what can be trained
  s4mini fit digits                     train; seconds on a laptop
  s4mini fit digits --lr 0.005 --out runs/slow
  s4mini fit scifar --resume            go on where it was stopped or killed
  s4mini fit digits --seeds 3           three seeds: mean and deviation
  s4mini fit scifar --devices 4 --strategy ddp
  s4mini evaluate runs/digits           the figures on the test split

Several machines: start the same command on each by torchrun or Slurm, with
--nodes N --devices M; the folder must be the same for all.
Data: `s4mini data` fetches them; S4MINI_DATA says where they are.
"""


def _parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(
        prog="s4mini",
        epilog=_EPILOG,
        allow_abbrev=False,
        description="Train and measure structured state space models (S4).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text, add in (
        ("list", "show the recipes, or one in full", _add_list),
        ("fit", "train by a recipe, select on validation, test", _add_fit),
        ("evaluate", "measure a trained model", _add_evaluate),
    ):
        said = f"{text[0].upper()}{text[1:]}."
        add(commands.add_parser(name, help=text, description=said, allow_abbrev=False))
    return parser


def _add_list(parser: argparse.ArgumentParser) -> None:
    """Describe `s4mini list`."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE")
    parser.set_defaults(run=_run_list)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Describe `s4mini evaluate`."""
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="the folder of a run, or a file best.safetensors",
    )
    add(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="what to measure on (default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run_evaluate)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    """Describe `s4mini fit`."""
    parser.usage = "s4mini fit RECIPE [options] [--FIELD VALUE …]"
    parser.set_defaults(run=_run_fit)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a name that `s4mini list` shows")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for logs and weights (default: runs/RECIPE)",
    )
    add("--resume", action="store_true", help="go on with the run in DIR")
    add(
        "--until", type=int, metavar="N", help="stop after epoch N, to be resumed later"
    )
    add(
        "--seeds",
        type=int,
        metavar="N",
        default=1,
        help="run N seeds, counted from the recipe's, in folders of their "
        "own; give mean and standard deviation",
    )
    add(
        "--progress",
        choices=("bar", "lines", "none"),
        help="how to show it (default: bar at a terminal, else lines)",
    )
    _add_machines(parser)
    _add_overrides(parser)


def _add_machines(parser: argparse.ArgumentParser) -> None:
    """Describe on what `s4mini fit` runs."""
    add = parser.add_argument
    add(
        "--devices",
        type=int,
        metavar="N",
        default=1,
        help="GPUs, or processes without one, on each machine (default: 1)",
    )
    add("--nodes", type=int, metavar="N", default=1, help="machines (default: 1)")
    add(
        "--strategy",
        choices=("auto", "ddp"),
        default="auto",
        help="ddp: each device takes a share of every batch",
    )


def _run_list(options: argparse.Namespace) -> None:
    """Print a line for each recipe, or a line for each field of one."""
    if options.recipe is not None:
        said = _field_help()
        for name, value in asdict(_named(options.recipe)).items():
            value = "none" if value is None else str(value).lower()
            print(f"{name:15}{value:10}  {said.get(name, '')}".rstrip())
        return
    rows = [("RECIPE", "DATA", "BLOCKS", "STATE", "BATCH", "EPOCHS")]
    for name, r in RECIPES.items():
        rows.append(
            (
                name,
                r.data,
                f"{r.n_layers} x {r.d_model}",
                r.d_state,
                r.batch_size,
                r.epochs,
            )
        )
    for name, data, blocks, *sizes in rows:
        numbers = "".join(f"{size:>7}" for size in sizes)
        print(f"{name:14}{data:12}{blocks:>8}{numbers}")


def _named(name: str) -> Recipe:
    """Return the recipe of a name, or list those there are."""
    check_choice("recipe", name, tuple(RECIPES))
    return RECIPES[name]


def _run_fit(options: argparse.Namespace) -> None:
    """Train a recipe with one seed or several, and print what it came to."""
    recipe = override(_named(options.recipe), _changes(options))
    out = options.out or Path("runs", options.recipe)
    seeds = check_int("seeds", options.seeds)
    if seeds == 1:
        _show(_fit_one(recipe, out, options))
        return
    if options.devices * options.nodes > 1:
        raise ValueError("seeds: expected 1 with several devices")
    results = []
    for seed in range(recipe.seed, recipe.seed + seeds):
        one = replace(recipe, seed=seed)
        results.append(_fit_one(one, out / f"seed-{seed}", options))
        _show(results[-1])
    if all(result.test for result in results):
        summary = summarise(results)
        _write(out / "summary.json", json.dumps(summary, indent=1).encode())
        _show_summary(summary)


def _fit_one(recipe: Recipe, out: Path, options: argparse.Namespace) -> Result:
    """Train with one seed; --resume starts seeds not yet begun."""
    several = options.seeds > 1
    begun = (out / "last.ckpt").exists()
    shown = options.progress or ("bar" if sys.stderr.isatty() else "lines")
    return fit(
        recipe,
        out,
        _load(recipe, os.cpu_count() or 1),
        until=options.until,
        progress=shown,
        resume=options.resume and (begun or not several),
        devices=options.devices,
        nodes=options.nodes,
        strategy=options.strategy,
    )


def _show(result: Result) -> None:
    """Print what a run has come to, in the first process only."""
    if rank_zero_only.rank:
        return
    print(
        f"{result.data}: seed {result.recipe.seed}, "
        f"{result.parameters:,} parameters, {result.device}"
    )
    rows = {"validation": result.validation, "test": result.test}
    for kind, figures in rows.items():
        print(f"{kind:12}{_figures(figures) if figures else 'unfinished'}")
    print(f"{'files in':12}{result.folder}")


def _figures(figures: dict[str, float]) -> str:
    """Write figures in one line."""
    return ", ".join(
        f"{name} {value:.2%}" if name == "accuracy" else f"{name} {value:.4f}"
        for name, value in figures.items()
    )


def _show_summary(summary: dict) -> None:
    """Print mean and standard deviation over seeds."""
    print(f"mean and standard deviation of {len(summary['seeds'])} seeds")
    for kind in ("validation", "test"):
        parts = (
            f"{name} {100 * v['mean']:.2f} ± {100 * v['sd']:.2f} %"
            if name == "accuracy"
            else f"{name} {v['mean']:.4f} ± {v['sd']:.4f}"
            for name, v in summary[kind].items()
        )
        print(f"{kind:12}{', '.join(parts)}")


def _run_evaluate(options: argparse.Namespace) -> None:
    """Measure the weights of a run on a split, and print the figures."""
    path = options.checkpoint
    model, recipe = load_weights(path / "best.safetensors" if path.is_dir() else path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = _load(recipe, os.cpu_count() or 1)
    split, index = _parts(recipe, data)[options.split]
    figures = evaluate(model.to(device), data.to(device), split, index)
    if options.json:
        print(
            json.dumps(
                {
                    "data": data.title,
                    "split": options.split,
                    "examples": len(index),
                    **figures,
                }
            )
        )
    else:
        print(f"{data.title}: {len(index):,} examples of {options.split}")
        print(_figures(figures))


def main(argv: list[str] | None = None) -> int:
    """Train, measure or list from the command line.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 after a message.

    Raises:
        SystemExit: the arguments cannot be read, or help was asked for.

    Source: book/train.md.
    """
    try:
        options = _parser().parse_args(argv)
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # of `s4mini list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (
        OSError,
        ValueError,
        TypeError,
        ArithmeticError,
        ModuleNotFoundError,
    ) as error:
        print(f"s4mini: {error}", file=sys.stderr)
        return 1
    return 0


# A notebook's __name__ is __main__ too, but a notebook has no __file__.
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())
