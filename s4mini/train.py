"""Training.

A loop of fifteen lines that trains; the same by Lightning, which adds what a long run
needs; and what must be right so that a killed run ends like one that was left alone.

Tangled from book/train.md.
"""

import io
import json
import logging
import math
import os
import pickle
import platform
import shlex
import signal
import statistics
import struct
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import grad_norm, rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss, mse_loss
from torch.utils.data import DataLoader, Sampler, TensorDataset

from s4mini.checks import (
    check_bool,
    check_choice,
    check_int,
    check_path,
    check_positive,
)
from s4mini.data import (
    NAMES,
    SOURCES,
    SequenceData,
    Split,
    from_tensors,
    options_of,
    whole,
)
from s4mini.layer import kernels_kept
from s4mini.model import S4Model, parameter_groups
from s4mini.recipes import READING, Recipe, build, check_recipe, load_data, sizes_of
from s4mini.saving import saved_class, write_atomically
from s4mini.tasks import S4Forecaster

__all__ = [
    "split_indices",
    "epoch_order",
    "schedule",
    "share",
    "EpochBatches",
    "RecipeData",
    "parts_of",
    "FIGURES",
    "Learner",
    "quietly",
    "WholeFiles",
    "KeepBest",
    "Lines",
    "best_of",
    "is_first",
    "only_writer",
    "predict",
    "evaluate",
    "Result",
    "as_data",
    "fit",
    "load_run",
    "summarise",
]


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
        size: examples in an epoch, at most 2**24.
        seed: of the whole run, below 2**32.

    Returns:
        (size,) integers below n. Over the run, every example is visited once
        before any is visited twice.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: one is out of range.

    Source: book/train.md.
    """
    n, size = check_int("n", n), check_int("size", size, maximum=2**24)
    first = check_int("epoch", epoch, minimum=0) * size
    seed = check_int("seed", seed, minimum=0, maximum=2**32 - 1)
    passes = range(first // n, (first + size - 1) // n + 1)
    orders = [
        torch.randperm(n, generator=Generator().manual_seed(seed * 2**20 + p))
        for p in passes
    ]
    start = first - passes[0] * n
    return torch.cat(orders)[start : start + size]


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
    check_choice("kind", kind, ("cosine", "constant"))
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / (total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def share(part: Tensor, rank: int, world: int) -> tuple[Tensor, float]:
    """Return a device's share of a batch, and its weight.

    Args:
        part: (b,) the examples of the batch.
        rank: which device, from 0.
        world: how many devices.

    Returns:
        Its examples, at least one, and the weight of their mean loss.

    Source: book/train.md.
    """
    mine = part[rank::world]
    if not len(mine):
        return part[:1], 0.0
    return mine, world * len(mine) / len(part)


class EpochBatches(Sampler[list[int]]):
    """The batches of an epoch, or this device's share of them.

    Args:
        n: examples there are.
        batch_size: of them in a batch, over all devices.
        size: examples in an epoch; None: all.
        seed: of the order; None: in their own.
        rank: which device this is.
        world: how many there are.

    Source: book/train.md.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        size: int | None = None,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.n, self.batch_size, self.size = n, batch_size, size or n
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch; Lightning says which it is."""
        self.epoch = epoch

    def parts(self) -> tuple[Tensor, ...]:
        """Return the whole batches of the epoch."""
        order = torch.arange(self.n)
        if self.seed is not None:
            order = epoch_order(self.n, self.epoch, self.size, self.seed)
        return order.split(self.batch_size)

    def __len__(self) -> int:
        return math.ceil(self.size / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for part in self.parts():
            yield share(part, self.rank, self.world)[0].tolist()

    def weight(self, number: int) -> float:
        """Return the weight of this device's share of a batch."""
        rest = self.size - number * self.batch_size
        part = torch.arange(min(self.batch_size, rest))
        return share(part, self.rank, self.world)[1]


class RecipeData(pl.LightningDataModule):
    """A data set in the batches of a recipe.

    Args:
        recipe: how large batches and epochs are, and what is held out.
        data: the data set.

    Raises:
        TypeError: recipe or data is of another kind.
        ValueError: there are too few examples to hold some out.

    Source: book/train.md.
    """

    def __init__(self, recipe: Recipe, data: SequenceData) -> None:
        super().__init__()
        check_recipe(recipe)
        if not isinstance(data, SequenceData):
            kind = type(data).__name__
            raise TypeError(f"data: expected a SequenceData, got {kind}")
        self.recipe, self.data = recipe, data
        self.parts = parts_of(recipe, data)
        self.epoch_size = recipe.epoch_size or len(self.parts["train"][1])

    def setup(self, stage: str) -> None:
        """Move the data to the device, once."""
        self.data = self.data.to(self._runner().strategy.root_device)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of an epoch; its order is the epoch's."""
        recipe = self.recipe
        return self._loader("train", recipe.batch_size, self.epoch_size, recipe.seed)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of what is held out."""
        return self._loader("validation", 250)

    def _runner(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("RecipeData: expected to be used by a Trainer")
        return self.trainer

    def _loader(
        self, kind: str, size: int, epoch: int | None = None, seed: int | None = None
    ) -> DataLoader:
        split, trainer = Split(self.data, *self.parts[kind]), self._runner()
        rank, world = trainer.global_rank, trainer.world_size
        batches = EpochBatches(len(split), size, epoch, seed, rank, world)
        return DataLoader(
            split,
            batch_sampler=batches,
            collate_fn=whole,
            generator=Generator(),  # so that it draws no number of ours
        )


def parts_of(recipe: Recipe, data: SequenceData) -> dict[str, tuple[str, Tensor]]:
    """Return split and examples that train, that decide, and that test.

    Args:
        recipe: what share is held out where no split is official.
        data: the data set.

    Returns:
        For "train", "validation" and "test" the split and its examples.

    Source: book/train.md.
    """
    every = {s: (s, torch.arange(data.count(s))) for s in data.splits}
    if "validation" in data.splits:  # it is official
        return every
    kept, held = split_indices(data.count("train"), recipe.validation)
    return every | {"train": ("train", kept), "validation": ("train", held)}


FIGURES = {"classify": ("loss", "accuracy"), "forecast": ("mse", "mae")}


def _terms(output: Tensor, target: Tensor) -> Tensor:
    """Return the loss and the second figure of a task, means, as (2,)."""
    output = output.float()  # whatever precision the network ran in
    if target.ndim == 1:
        right = (output.argmax(dim=1) == target).float()
        return torch.stack((cross_entropy(output, target), right.mean()))
    return torch.stack((mse_loss(output, target), l1_loss(output, target)))


class Learner(pl.LightningModule):
    """A model and the rules by which a recipe trains it.

    It works in any Trainer, with any callback and logger; it logs
    "train_loss", "validation_loss" and the second figure of its task. A batch
    is (u, target) or (u, target, lengths).

    Args:
        recipe: the run.
        channels: of the input.
        outputs: classes, or channels to forecast.
        horizon: steps to forecast; None: classify.

    Raises:
        TypeError: recipe is not a Recipe, or a size not an integer.
        ValueError: a size is below 1.

    Source: book/train.md.
    """

    def __init__(
        self,
        recipe: Recipe,
        channels: int,
        outputs: int,
        horizon: int | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = build(recipe, channels, outputs, horizon)
        self.names = FIGURES["forecast" if horizon else "classify"]
        self.history: list[dict] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with its three groups, and the schedule."""
        recipe, batches = self.recipe, self.trainer.estimated_stepping_batches
        groups = parameter_groups(
            self.model, recipe.lr, recipe.weight_decay, recipe.ssm_lr
        )
        on_cuda = next(self.parameters()).is_cuda
        optimizer = torch.optim.AdamW(groups, fused=on_cuda)
        epochs = self.trainer.max_epochs or -1  # what the Trainer was told
        each = batches / epochs if epochs > 0 and math.isfinite(batches) else 1
        total = max(1, round(each * recipe.epochs))
        warmup = min(int(recipe.warmup * total), total - 1)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda t: schedule(t, warmup, total, recipe.schedule)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": rates, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        """Seed dropout for this epoch."""
        seed = self.recipe.seed % 2**32 * 2**20 + self.current_epoch
        torch.manual_seed(seed + 2**53 * self.global_rank)
        self.started = time.perf_counter()

    def training_step(self, batch: tuple, number: int) -> Tensor:
        """Return the loss of a batch, times the weight of its share."""
        sampler = getattr(self.trainer.train_dataloader, "batch_sampler", None)
        weight = getattr(sampler, "weight", lambda number: 1.0)(number)
        return self._measure("train", batch, weight) * weight

    def validation_step(self, batch: tuple, number: int) -> None:
        """Log the figures of a batch."""
        loader = self.trainer.val_dataloaders
        sampler = getattr(loader, "batch_sampler", None)
        weight = getattr(sampler, "weight", lambda number: 1.0)(number)
        self._measure("validation", batch, weight)

    def _measure(self, kind: str, batch: tuple, weight: float) -> Tensor:
        u, target, lengths = (*batch, None)[:3]
        try:
            output = self.model(u, lengths)
        except ValueError as error:
            if "finite" not in str(error):
                raise
            raise FloatingPointError(f"{error}, {_place(self)}") from error
        terms = _terms(output, target)
        figures = dict(zip(self.names, terms.detach(), strict=True))
        figures = {f"{kind}_{k}": v for k, v in figures.items()}
        figures[f"{kind}_loss"] = terms[0].detach()
        # Lightning takes the devices' mean of this integer, rounded down
        count = len(target) * self.trainer.world_size if weight else 0
        self.log_dict(
            figures,
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=count,
            prog_bar=True,
        )
        return terms[0]

    def on_before_optimizer_step(self, optimizer) -> None:
        """Log the norm of the gradient; stop where it is no number."""
        norm = grad_norm(self, 2)["grad_2.0_norm_total"]
        if not math.isfinite(norm):
            raise FloatingPointError(f"norm of the gradient {norm:g}, {_place(self)}")
        self.log("gradient_norm", norm)

    def on_train_epoch_end(self) -> None:
        """Add a line to the history."""
        found = self.trainer.callback_metrics
        before = self.history[-1]["seconds"] if self.history else 0.0
        spent = time.perf_counter() - self.started
        row = {"epoch": self.current_epoch + 1, "seconds": before + spent}
        module = getattr(self.trainer, "datamodule", None)
        if size := getattr(module, "epoch_size", None):
            row["examples"] = row["epoch"] * size
            row["examples_per_second"] = size / spent
        for kind in ("train", "validation"):
            for name in dict.fromkeys(("loss", *self.names)):
                if f"{kind}_{name}" in found:
                    row[f"{kind}_{name}"] = found[f"{kind}_{name}"].item()
        for name, value in row.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} {value:g}, {_place(self)}")
        self.history.append(row)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep the recipe and the history."""
        checkpoint["recipe"] = asdict(self.recipe)
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take the history up again."""
        self.history = checkpoint["history"]


def _place(module: Learner) -> str:
    """Say where a run is."""
    rate = module.trainer.optimizers[0].param_groups[0]["lr"]
    return (
        f"at step {module.global_step + 1} in epoch "
        f"{module.current_epoch + 1}, learning rate {rate:g}"
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Lightning from talking about itself, for a while.

    Returns:
        A context; warnings filters and levels are restored behind it.

    Source: book/train.md.
    """
    loggers = [logging.getLogger(f"lightning.{p}") for p in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for about in (
            ".*LeafSpec",
            ".*bucket view strides",
            ".*does not have many workers",
            ".*logs directory .* exists",
            ".*exists and is not empty",
            ".*log_every_n_steps",
            ".*GPU available but not used",
        ):
            warnings.filterwarnings("ignore", about)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, each written in one step.

    Source: book/train.md.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        """Write a checkpoint to path."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getvalue())


class KeepBest(pl.callbacks.Checkpoint):
    """Write the model of the best epoch.

    Args:
        out: the folder of the run.

    Source: book/train.md.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_epoch_end(self, trainer, module) -> None:
        """Compare the epoch that has ended; Learner has described it."""
        best = best_of(module.history)
        if trainer.is_global_zero and best is module.history[-1]:
            module.model.save_pretrained(self.out)


class Lines(pl.callbacks.Checkpoint):
    """Say a line for each epoch, when everything of it is kept.

    Source: book/train.md.
    """

    def on_train_epoch_end(self, trainer, module) -> None:
        """Print the last line of the history."""
        if trainer.is_global_zero:
            line = _line(module.history[-1], module.recipe.epochs)
            print(line, flush=True)


def best_of(history: list[dict]) -> dict:
    """Return the first of the best epochs, judged on validation.

    Args:
        history: a dict for each epoch.

    Returns:
        That of the highest accuracy, or of the least error.

    Source: book/train.md.
    """
    if "validation_mse" in history[0]:
        return min(history, key=lambda row: row["validation_mse"])
    return max(history, key=lambda row: row["validation_accuracy"])


def _line(row: dict, epochs: int) -> str:
    """Describe an epoch in one line."""
    skip = ("epoch", "seconds", "examples", "examples_per_second")
    figures = ", ".join(
        f"{k.replace('_', ' ')} {v:.4g}" for k, v in row.items() if k not in skip
    )
    left = row["seconds"] / row["epoch"] * (epochs - row["epoch"])
    done = f"epoch {row['epoch']:3} of {epochs}"
    return f"{done}: {figures}; {row['examples_per_second']:.0f} examples/s, {left:.0f} s left"


def is_first() -> bool:
    """Say whether this is the first of the processes of a run.

    Source: book/train.md.
    """
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Be the one process that writes to a folder.

    Args:
        out: the folder; it is made if it is missing.

    Returns:
        A context in which nobody else is.

    Raises:
        BlockingIOError: another process is; says which.

    Source: book/train.md.
    """
    if not is_first():  # the first process holds it for all
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(out / ".lock"), out / ".writer"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = note.read_text() if note.exists() else "unknown"
        raise BlockingIOError(
            f"{out}: process {who} writes to this folder; wait for it, or "
            "choose another"
        ) from None
    try:
        note.write_text(str(os.getpid()))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


class _Stop(BaseException):
    """A signal asks to stop."""


class _StopBetweenBatches(pl.Callback):
    """Keep a signal until a batch has ended."""

    number: int | None = None

    def hear(self, number: int, frame: object) -> None:
        """Take note of a signal; obey the second at once."""
        if self.number is not None:
            raise _Stop
        self.number = number

    def obey(self) -> None:
        """Stop, if that was asked for."""
        if self.number is not None:
            raise _Stop

    def on_train_batch_start(self, *_: object) -> None:
        self.obey()

    def on_validation_batch_start(self, *_: object) -> None:
        self.obey()


@contextmanager
def _signals(out: Path) -> Iterator[_StopBetweenBatches]:
    """Turn SIGINT and SIGTERM into a stop that says what is kept."""
    asked, numbers = _StopBetweenBatches(), (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, asked.hear) for number in numbers}
    try:
        yield asked
        asked.obey()
    except (_Stop, SystemExit):  # Lightning obeys SIGTERM by SystemExit
        if asked.number is None:
            raise
        kept = "the last" if (out / "last.ckpt").exists() else "no"
        said = f"interrupted; {out} holds {kept} whole epoch, resume it"
        if is_first():
            print(f"\n{said}", file=sys.stderr)
        if asked.number == signal.SIGINT:
            raise KeyboardInterrupt(said) from None
        raise SystemExit(143) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"model: expected a torch.nn.Module, got {kind}")
    pairs, training = [], model.training
    model.eval()
    with torch.no_grad(), kernels_kept():
        for part in index.split(size):
            u, target, lengths = data.batch(split, part)
            output = model(u, lengths)
            _check_output(output, target, data)
            pairs.append((output.cpu(), target.cpu()))
    model.train(training)
    outputs, targets = zip(*pairs, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def _numbers(data: SequenceData, split: str) -> Tensor:
    """Return the numbers of all examples of a split."""
    if not isinstance(data, SequenceData):
        kind = type(data).__name__
        raise TypeError(f"data: expected a SequenceData, got {kind}")
    return torch.arange(data.count(split))


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
    index = _numbers(data, split)
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
    every = _numbers(data, split)
    index = every if index is None else index
    if not isinstance(index, Tensor):
        raise TypeError(f"index: expected a tensor, got {type(index).__name__}")
    terms = _terms(*_outputs(model, data, split, index, 250))
    return dict(zip(FIGURES[data.task], terms.tolist(), strict=True))


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
        return self.test.get("accuracy") if self.test else None

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


_DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _check_whole(kept: dict, module: nn.Module) -> None:
    """Refuse a checkpoint in which something is missing or does not fit."""
    done, weights = kept["epoch"] + 1, kept["state_dict"]
    if [row["epoch"] for row in kept["history"]] != list(range(1, done + 1)):
        raise ValueError(f"its history has not the {done} epochs it tells")
    sizes = {name: v.shape for name, v in weights.items()}
    if sizes != {name: v.shape for name, v in module.state_dict().items()}:
        raise ValueError("its weights are not those of the model")
    if not all(v.isfinite().all() for v in weights.values()):
        raise ValueError("a weight is not finite")
    (optimizer,), (rates,) = kept["optimizer_states"], kept["lr_schedulers"]
    learnt = sum(len(group["params"]) for group in optimizer["param_groups"])
    if learnt != len(list(module.parameters())):
        raise ValueError("its optimiser is not that of the model")
    if rates["last_epoch"] != kept["global_step"] or not kept["loops"]["fit_loop"]:
        raise ValueError("its counts of steps differ")


@contextmanager
def _as_one_line(path: Path) -> Iterator[None]:
    """Say in one line whatever a damaged checkpoint makes of reading it."""
    try:
        yield
    except _DAMAGE as error:
        said = str(error).split("\n")[0]
        raise ValueError(
            f"{path}: not a whole checkpoint of this program: {said}"
        ) from error


def _check_same(what: object, recipe: Recipe, path: Path, theirs: dict) -> None:
    """Refuse a recipe other than the one of which a file says it was followed."""
    for name, ours in asdict(recipe).items():
        if name != "epochs" and theirs.get(name, ours) != ours:
            raise ValueError(
                f"{what}: expected {name} = {theirs[name]!r}, as in {path}, "
                f"got {ours!r}"
            )


def _read_checkpoint(path: Path, recipe: Recipe, module: nn.Module) -> dict:
    """Return a checkpoint if it can be read and belongs to the recipe."""
    with _as_one_line(path):
        with zipfile.ZipFile(path) as parts:  # it has a checksum for each part
            if part := parts.testzip():
                raise ValueError(f"{part} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs = dict(checkpoint["recipe"])
    _check_same("recipe", recipe, path, theirs)
    with _as_one_line(path):
        _check_whole(checkpoint, module)
    return checkpoint


_OwnData = SequenceData | Mapping | pl.LightningDataModule


def as_data(data: _OwnData) -> SequenceData:
    """Take a data set, or tensors of your own.

    Args:
        data: a SequenceData; or {"train": …, "test": …} and, if there is one,
            "validation", each a TensorDataset or tuple of (u, target) or
            (u, target, lengths), as from_tensors explains; or a
            LightningDataModule whose loaders give such batches, which are
            drawn once, in the order of their data sets, and kept.

    Returns:
        The data set.

    Raises:
        TypeError: data is of another kind.
        ValueError: a split is missing or unknown, or the tensors do not fit
            together.

    Source: book/train.md.
    """
    if isinstance(data, SequenceData):
        return data
    if isinstance(data, pl.LightningDataModule):
        return from_tensors("own data", **_drawn(data))
    if not isinstance(data, Mapping):
        kind = type(data).__name__
        raise TypeError(
            f"data: expected a SequenceData, or train and test tensors by "
            f"name, got {kind}"
        )
    if not {"train", "test"} <= set(data) <= {"train", "test", "validation"}:
        found = ", ".join(map(repr, data)) or "none"
        raise ValueError(
            f"data: expected 'train', 'test' and, perhaps, 'validation', got {found}"
        )
    parts = {
        name: x.tensors if isinstance(x, TensorDataset) else x
        for name, x in data.items()
    }
    return from_tensors("own data", **parts)


def _drawn(module: pl.LightningDataModule) -> dict[str, tuple[Tensor, ...]]:
    """Return all that the loaders of a data module give, split by split."""
    module.prepare_data()
    for stage in ("fit", "test"):
        module.setup(stage)
    loaders = {"train": module.train_dataloader(), "test": module.test_dataloader()}
    if is_overridden("val_dataloader", module, pl.LightningDataModule):
        loaders["validation"] = module.val_dataloader()
    return {split: _in_order(split, loader) for split, loader in loaders.items()}


def _in_order(split: str, loader: DataLoader) -> tuple[Tensor, ...]:
    """Return a loader's examples in the order of its data set."""
    if not isinstance(loader, DataLoader):
        raise TypeError(f"{split}: expected a DataLoader, got {type(loader).__name__}")
    plain = DataLoader(loader.dataset, 250, collate_fn=loader.collate_fn)
    columns = list(zip(*plain, strict=True))
    if len({u.shape[1:] for u in columns[0]}) > 1:
        raise ValueError(f"{split}: expected sequences padded to one length")
    return tuple(torch.cat(column) for column in columns)


def _check_data(recipe: Recipe, data: SequenceData) -> Recipe:
    """Refuse other options than the recipe's; name own data as what it is."""
    known = options_of(data.name) if data.name in (*NAMES, *SOURCES) else ()
    told: dict[str, Any] = {}
    for name, usual in READING.items():
        ours, theirs = getattr(recipe, name), getattr(data, name, None)
        if data.name != recipe.data:  # the recipe's options are those of another
            told[name] = theirs if name in known and theirs is not None else usual
        elif name not in known and ours != usual:
            raise ValueError(
                f"{name}: expected {usual!r}, as {data.name} has no such option, "
                f"got {ours!r}"
            )
        elif name in known and None not in (ours, theirs) and ours != theirs:
            raise ValueError(f"data: expected {name} = {ours!r}, got {theirs!r}")
    return replace(recipe, data=data.name, **told)


def fit(
    recipe: Recipe,
    out: str | Path,
    data: _OwnData | None = None,
    until: int | None = None,
    resume: bool = False,
    progress: str = "lines",
    devices: int = 1,
    nodes: int = 1,
    strategy: str = "auto",
    logger: Logger | None = None,
) -> Result:
    """Train a model by a recipe; choose on validation, test once.

    Args:
        recipe: what to do.
        out: folder for checkpoints, logs and the result.
        data: the data set, if it has been loaded already, or your own: any
            SequenceData, {"train": …, "test": …}, or a LightningDataModule,
            as as_data explains. The record then says so, and the recipe's
            options of a named data set are left out of it.
        until: stop after this epoch, as if interrupted; None: at the end.
        resume: whether to go on with the run in out; a recipe with more
            epochs extends it.
        progress: "bar", "lines" (one for each epoch), or "none".
        devices: how many of each machine; above 1 in scripts only, which
            Lightning starts once for each.
        nodes: how many machines, which share the folder out.
        strategy: "auto", or "ddp" for gradients averaged over devices.
        logger: one of Lightning's, beside those that write to out.

    Returns:
        The result; also written to out/result.json when the run is finished.
        With several devices, only the first process tests.

    Raises:
        BlockingIOError: another process writes to out.
        FileExistsError: out holds a run already, and resume is false.
        FileNotFoundError: the data, a run to resume, or the checkpoint of a
            finished one is not there.
        FloatingPointError: the loss is no longer a number.
        OSError: a file cannot be written; the previous one is intact.
        TypeError: recipe is not a Recipe, a count not an integer, or another
            argument of a wrong kind.
        ValueError: progress or strategy is unknown, a count < 1 or more than
            there is, an option of the recipe is none of the data's, or the run
            in out has another recipe or a damaged checkpoint.

    Source: book/train.md.
    """
    check_recipe(recipe)
    check_bool("resume", resume)
    check_choice("progress", progress, ("bar", "lines", "none"))
    if not isinstance(logger, Logger | None):
        kind = type(logger).__name__
        raise TypeError(f"logger: expected one of Lightning's, or None, got {kind}")
    machines = _machines(devices, nodes, strategy)
    last = recipe.epochs if until is None else check_int("until", until)
    out = check_path("out", out)
    if not resume and is_first() and (out / "recipe.json").exists():
        raise FileExistsError(
            f"{out}: holds a run already; resume it, or choose another folder"
        )
    if resume and not (out / "recipe.json").exists():
        raise FileNotFoundError(f"{out}: holds no run, nothing to resume")
    if resume and (out / "result.json").exists() and not (out / "last.ckpt").exists():
        raise FileNotFoundError(
            f"{out / 'last.ckpt'}: not found, but the run was finished; it would "
            "begin anew over what it left"
        )
    data = load_data(recipe) if data is None else as_data(data)
    recipe = _check_data(recipe, data)
    module, batches = Learner(recipe, *sizes_of(data)), RecipeData(recipe, data)
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    apart = torch.random.fork_rng(used)  # the caller's numbers go on where they were
    with only_writer(out), _signals(out) as asked, apart:
        if resume:
            theirs = asdict(_recipe_in(out))
            _check_same("recipe", recipe, out / "recipe.json", theirs)
        at = out / "last.ckpt" if resume and (out / "last.ckpt").exists() else None
        if at:
            module.history = _read_checkpoint(at, recipe, module)["history"]
        if is_first():
            content = json.dumps(asdict(recipe), indent=1)
            write_atomically(out / "recipe.json", f"{content}\n".encode())
        if len(module.history) < min(last, recipe.epochs):
            first, upto = len(module.history), min(last, recipe.epochs)
            with quietly():
                trainer = _trainer(
                    recipe, out, first, upto, progress, machines, logger, asked
                )
                _run(trainer, module, batches, at)
        return _finish(module, data, out, devices * nodes)


def _machines(devices: int, nodes: int, strategy: str) -> dict:
    """Return the machines in Lightning's words."""
    check_choice("strategy", strategy, ("auto", "ddp"))
    asked = check_int("devices", devices) * check_int("nodes", nodes)
    most = torch.cuda.device_count() or max(os.cpu_count() or 1, 2)
    if devices > most:
        raise ValueError(f"devices: expected at most {most} here, got {devices}")
    if nodes > 1 and not {"MASTER_ADDR", "SLURM_JOB_ID"} & set(os.environ):
        raise ValueError(
            f"nodes: expected torchrun or srun to start each of {nodes} "
            "machines, but neither MASTER_ADDR nor SLURM_JOB_ID is set"
        )
    tasks = os.environ.get("SLURM_NTASKS", "")
    if tasks.isdigit() and int(tasks) > 1 and "SLURM_PROCID" not in os.environ:
        raise ValueError(
            f"SLURM_NTASKS is {tasks}, but this is one process: start it by "
            "srun, or unset SLURM_NTASKS"
        )
    if tasks.isdigit() and int(tasks) not in (1, asked):
        raise ValueError(
            f"devices, nodes: expected {tasks} processes, as Slurm has, got {asked}"
        )
    return {"devices": devices, "num_nodes": nodes, "strategy": strategy}


def _trainer(
    recipe: Recipe,
    out: Path,
    first: int,
    epochs: int,
    progress: str,
    machines: dict,
    logger: Logger | None,
    asked: pl.Callback,
) -> pl.Trainer:
    """Return Lightning's Trainer for a recipe."""
    on_cuda = torch.cuda.is_available()
    version = f"from-epoch-{first}"
    loggers = [
        CSVLogger(out, name="log", version=version),
        TensorBoardLogger(out, name="tensorboard", version=version),
        *([logger] if logger is not None else []),
    ]
    callbacks = [
        asked,
        LearningRateMonitor(),
        KeepBest(out),
        ModelCheckpoint(
            out,
            filename="last",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
            every_n_epochs=1,
        ),
        *([Lines()] if progress == "lines" else []),
    ]
    narrow = recipe.precision == "bfloat16"
    return pl.Trainer(
        accelerator="cuda" if on_cuda else "cpu",
        sync_batchnorm=on_cuda and recipe.norm == "batch",
        precision="bf16-mixed" if narrow else "32-true",
        max_epochs=epochs,
        gradient_clip_val=recipe.clip,
        callbacks=callbacks,
        logger=loggers,
        plugins=[WholeFiles()],
        enable_progress_bar=progress == "bar",
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **machines,
    )


def _run(trainer: pl.Trainer, module: Learner, batches: RecipeData, at) -> None:
    """Let Lightning run; if numbers fail, say what is kept."""
    try:
        trainer.fit(module, batches, ckpt_path=at, weights_only=True)
    except FloatingPointError as error:
        kept = f"the run is kept after epoch {len(module.history)}"
        raise FloatingPointError(f"{error}; {kept}") from error


def _recipe_in(folder: Path) -> Recipe:
    """Read the recipe of a run."""
    path = folder / "recipe.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; not the folder of a run")
    try:
        return Recipe(**json.loads(path.read_text("utf8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a recipe: {error}") from error


def _recorded_in(folder: Path) -> tuple[Path, dict] | None:
    """Return what the record of a run says of its recipe, and where."""
    if (path := folder / "result.json").exists():
        try:
            return path, dict(json.loads(path.read_text("utf8"))["recipe"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: not the record of a run: {error}") from error
    if (path := folder / "last.ckpt").exists():
        with _as_one_line(path):
            kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            return path, dict(kept["recipe"])
    return None


def load_run(folder: str | Path) -> tuple[S4Model | S4Forecaster, Recipe]:
    """Read the model and the recipe of a run.

    Args:
        folder: of the run.

    Returns:
        The model of the best epoch, in evaluation mode, on the CPU; the recipe.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: folder is not a path.
        ValueError: a file is damaged, or the recipe is not the one that the
            record of the run, result.json or last.ckpt, says was followed.

    Source: book/train.md.
    """
    folder = check_path("folder", folder)
    recipe = _recipe_in(folder)
    if told := _recorded_in(folder):
        _check_same(folder / "recipe.json", recipe, *told)
    forecasts = saved_class(folder) == "S4Forecaster"
    kind = S4Forecaster if forecasts else S4Model
    return kind.from_pretrained(folder), recipe


def _finish(module: Learner, data: SequenceData, out: Path, world: int) -> Result:
    """Take the best weights; test them if the run is at its end."""
    recipe, history = module.recipe, module.history
    model, _ = load_run(out)
    test = guesses = None
    if len(history) >= recipe.epochs and is_first():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        every = torch.arange(data.count("test"))
        found = _outputs(model.to(device), data.to(device), "test", every, 250)
        test = dict(zip(FIGURES[data.task], _terms(*found).tolist(), strict=True))
        guesses = found[0].argmax(1) if data.task == "classify" else found[0]
    row = best_of(history)
    result = Result(
        recipe,
        data.title,
        sum(p.numel() for p in model.parameters()),
        _device_name(world),
        history,
        {k: row[f"validation_{k}"] for k in FIGURES[data.task]},
        test,
        out,
        model.cpu(),
        guesses,
    )
    if test is not None:
        write_atomically(out / "result.json", f"{result.to_json()}\n".encode())
    return result


def _device_name(world: int = 1) -> str:
    """Say in words what fit runs on."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return f"{world} x {name}" if world > 1 else name
    threads = torch.get_num_threads() * world
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


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
    tests = [result.test for result in results if result.test is not None]
    if len(tests) < len(results):
        raise ValueError("results: expected finished runs, got an unfinished")
    return {
        "seeds": seeds,
        "validation": _spread([r.validation for r in results]),
        "test": _spread(tests),
    }


def _spread(figures: list[dict[str, float]]) -> dict[str, dict]:
    """Return mean and standard deviation of each figure."""
    columns = {name: [row[name] for row in figures] for name in figures[0]}
    return {
        name: {"mean": statistics.mean(v), "sd": statistics.stdev(v)}
        for name, v in columns.items()
    }
