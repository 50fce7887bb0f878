"""Training.

A recipe names every number of a training run; the program of this chapter follows it,
can be stopped and resumed without changing the outcome, and starts from the command
line.

Tangled from book/train.md.
"""

import argparse
import json
import logging
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_type_hints

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from s4mini.checks import check_choice, check_int, check_positive
from s4mini.data import NAMES, SequenceData, load
from s4mini.model import S4Model, parameter_groups

__all__ = [
    "Recipe",
    "RECIPES",
    "override",
    "split_indices",
    "epoch_order",
    "build",
    "schedule",
    "SequenceClassifier",
    "save_weights",
    "load_weights",
    "predict",
    "Result",
    "fit",
    "main",
]


@dataclass(frozen=True)
class Recipe:
    """A training run, down to the last number that decides its outcome.

    Attributes:
        data: "cifar10", "mnist" or "digits".
        gray: whether colours become grey levels.
        size: pixels a side after averaging; None: as they are.
        d_model: channels H.
        n_layers: blocks.
        d_state: state size N of each channel, even.
        dropout: share of channels silenced in training, in [0, 1).
        norm: "layer" or "batch".
        prenorm: whether a block's norm comes first.
        bidirectional: whether the layers see the future too.
        dt_min, dt_max: range of the steps at initialisation.
        lr: largest learning rate.
        ssm_lr: the same for the parameters of the dynamics.
        weight_decay: per step and unit of learning rate.
        clip: the largest norm of a gradient (all parameters together).
        batch_size: examples for one step.
        epochs: how often the model is validated.
        epoch_size: examples in an epoch; None: the training set once.
        warmup: share of all steps in which the learning rate rises.
        validation: share of the training images held out.
        seed: of the initial values, the order and the dropout.

    Source: book/train.md.
    """

    data: str
    gray: bool = False
    size: int | None = None
    d_model: int = 128
    n_layers: int = 4
    d_state: int = 64
    dropout: float = 0.1
    norm: str = "layer"
    prenorm: bool = False
    bidirectional: bool = False
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    lr: float = 1e-2
    ssm_lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    batch_size: int = 50
    epochs: int = 100
    epoch_size: int | None = None
    warmup: float = 0.05
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_recipe(self)


def _check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe with which no run can end well."""
    check_choice("data", recipe.data, NAMES)
    check_choice("norm", recipe.norm, ("layer", "batch"))
    for name in ("d_model", "n_layers", "batch_size", "epochs"):
        check_int(name, getattr(recipe, name))
    for name in ("size", "epoch_size"):
        if getattr(recipe, name) is not None:
            check_int(name, getattr(recipe, name))
    check_int("d_state", recipe.d_state, minimum=2, even=True)
    check_int("seed", recipe.seed, minimum=0)
    for name in ("lr", "ssm_lr", "clip", "dt_min", "dt_max", "validation"):
        check_positive(name, getattr(recipe, name))
    for name in ("dropout", "weight_decay", "warmup"):
        if getattr(recipe, name) != 0:
            check_positive(name, getattr(recipe, name))
    for name in ("dropout", "warmup", "validation"):
        if getattr(recipe, name) >= 1:
            raise ValueError(
                f"{name}: expected a share < 1, got {getattr(recipe, name)}"
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
    "scifar": Recipe("cifar10", batch_size=64),
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


class _Batches:
    """The batches of one epoch, drawn from a data set one by one."""

    def __init__(self, data: SequenceData, index: Tensor, batch_size: int) -> None:
        self.data, self.parts = data, index.split(batch_size)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.parts:
            yield self.data.batch("train", part)


def _check_is_recipe(recipe: Recipe) -> None:
    """Refuse what is not a recipe, such as the name of one."""
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {recipe!r}")


def build(recipe: Recipe, channels: int, classes: int) -> S4Model:
    """Return the model of a recipe, with its initial values.

    Args:
        recipe: how large, and from which seed.
        channels: of the input.
        classes: of the output.

    Returns:
        The model, in training mode, on the CPU.

    Raises:
        TypeError: recipe is not a Recipe, or a size not an integer.
        ValueError: a size is below 1.

    Source: book/train.md.
    """
    _check_is_recipe(recipe)
    return S4Model(
        check_int("channels", channels),
        check_int("classes", classes),
        d_model=recipe.d_model,
        n_layers=recipe.n_layers,
        d_state=recipe.d_state,
        dropout=recipe.dropout,
        norm=recipe.norm,
        prenorm=recipe.prenorm,
        bidirectional=recipe.bidirectional,
        dt_min=recipe.dt_min,
        dt_max=recipe.dt_max,
        generator=Generator().manual_seed(recipe.seed),
    )


def schedule(step: int, warmup: int, total: int) -> float:
    """Return the factor on the learning rate: a rise, then half a cosine.

    Args:
        step: from 0; past the end the factor is 0.
        warmup: steps in which it rises.
        total: steps in all, more than warmup.

    Returns:
        A number from 0 to 1, 1 at the end of the warm-up.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: step or warmup is below 0, or total not above warmup.

    Source: book/train.md.
    """
    step = check_int("step", step, minimum=0)
    warmup = check_int("warmup", warmup, minimum=0)
    total = check_int("total", total, minimum=warmup + 1)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / (total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done))


def _optimiser(model: S4Model, recipe: Recipe, epoch_size: int) -> dict:
    """Return AdamW with its groups and its schedule, as Lightning asks."""
    groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.ssm_lr)
    optimizer = torch.optim.AdamW(groups)
    total = recipe.epochs * math.ceil(epoch_size / recipe.batch_size)
    warmup = int(recipe.warmup * total)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, warmup, total)
    )
    each_step = {"scheduler": rates, "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": each_step}


def _check_data(recipe: Recipe, data: SequenceData) -> None:
    """Refuse data that the recipe does not ask for."""
    _check_is_recipe(recipe)
    if not isinstance(data, SequenceData):
        kind = type(data).__name__
        raise TypeError(f"data: expected a SequenceData, got {kind}")
    side = recipe.size or data.images["train"].shape[1]
    wanted = recipe.data, recipe.gray, side
    given = data.name, data.gray, data.size
    if wanted != given:
        raise ValueError(f"data: expected (name, gray, size) {wanted}, got {given}")


class SequenceClassifier(pl.LightningModule):
    """A model, its data, and the rules by which a recipe trains it.

    Args:
        recipe: the run.
        data: what to train on; the test images are not touched.

    Raises:
        TypeError: recipe is not a Recipe, or data not a SequenceData.
        ValueError: the data are not those of the recipe.

    Source: book/train.md.
    """

    def __init__(self, recipe: Recipe, data: SequenceData) -> None:
        super().__init__()
        _check_data(recipe, data)
        self.recipe, self.data = recipe, data
        self.model = build(recipe, len(data.mean), len(data.classes))
        n = len(data.labels["train"])
        self.index, self.held_out = split_indices(n, recipe.validation)
        self.epoch_size = recipe.epoch_size or len(self.index)
        self.history: list[dict] = []

    def setup(self, stage: str) -> None:
        self.data = self.data.to(self.trainer.strategy.root_device)

    def train_dataloader(self) -> _Batches:
        order = epoch_order(
            len(self.index),
            self.current_epoch,
            self.epoch_size,
            self.recipe.seed,
        )
        return _Batches(self.data, self.index[order], self.recipe.batch_size)

    def val_dataloader(self) -> _Batches:
        return _Batches(self.data, self.held_out, 250)

    def configure_optimizers(self) -> dict:
        return _optimiser(self.model, self.recipe, self.epoch_size)

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.recipe.seed * 2**20 + self.current_epoch)
        self.started = time.perf_counter()
        self.sums = {k: torch.zeros(3, device=self.device) for k in _KINDS}

    def training_step(self, batch: tuple, number: int) -> Tensor:
        loss = self._loss("train", *batch[:2])
        _check_loss(self, loss, number)
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: tuple, number: int) -> None:
        self._loss("validation", *batch[:2])

    def _loss(self, kind: str, u: Tensor, target: Tensor) -> Tensor:
        logits = self.model(u)
        loss, count = cross_entropy(logits, target), len(target)
        right = (logits.argmax(dim=1) == target).sum()
        self.sums[kind][0] += loss.detach() * count
        self.sums[kind][1] += right
        self.sums[kind][2] += count
        return loss

    def on_validation_epoch_end(self) -> None:
        row = _row(self)
        self.history.append(row)
        self.log_dict({k: float(v) for k, v in row.items() if k != "epoch"})

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["recipe"] = asdict(self.recipe)
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.history = checkpoint["history"]


_KINDS = ("train", "validation")


def _row(module: SequenceClassifier) -> dict:
    """Return what an epoch has come to, as plain numbers."""
    before = module.history[-1] if module.history else {"seconds": 0.0}
    row = {
        "epoch": module.current_epoch,
        "images": (module.current_epoch + 1) * module.epoch_size,
    }
    for kind in _KINDS:
        loss, right, count = module.sums[kind].tolist()
        row[f"{kind}_loss"] = loss / count
        row[f"{kind}_accuracy"] = right / count
    spent = time.perf_counter() - module.started
    row["seconds"] = before["seconds"] + spent
    return row


def _check_loss(module: SequenceClassifier, loss: Tensor, batch: int) -> None:
    """Stop the run if the loss is not finite; say where it was."""
    if not loss.isfinite():
        rate = module.optimizers().param_groups[0]["lr"]
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {module.global_step}, "
            f"batch {batch} of epoch {module.current_epoch}, rate {rate:g}"
        )


def save_weights(model: S4Model, recipe: Recipe, path: str | Path) -> None:
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
    if not isinstance(model, S4Model) or not isinstance(recipe, Recipe):
        kinds = f"{type(model).__name__} and {type(recipe).__name__}"
        raise TypeError(f"expected an S4Model and a Recipe, got {kinds}")
    sizes = {"channels": model.d_input, "classes": model.decoder.out_features}
    notes = {"recipe": json.dumps(asdict(recipe)), "sizes": json.dumps(sizes)}
    state, rebuilt = model.state_dict(), build(recipe, **sizes).state_dict()
    shapes = [{k: v.shape for k, v in s.items()} for s in (state, rebuilt)]
    if shapes[0] != shapes[1]:
        raise ValueError("recipe: expected the one that the model was built from")
    weights = {name: v.detach().contiguous() for name, v in state.items()}
    part = Path(path).with_suffix(".part")
    save_file(weights, part, metadata=notes)
    os.replace(part, path)


def load_weights(path: str | Path) -> tuple[S4Model, Recipe]:
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
            f"{path}: expected weights with their recipe: {error}"
        ) from error
    return model.eval(), recipe


class _Keeper(pl.Callback):
    """Write the two files after each epoch, and say how it went."""

    def __init__(self, out: Path, lines: bool) -> None:
        self.out, self.lines = out, lines

    def on_train_epoch_end(self, trainer, module) -> None:
        row = module.history[-1]
        earlier = [r["validation_accuracy"] for r in module.history[:-1]]
        if row["validation_accuracy"] > max(earlier, default=-1.0):
            save_weights(module.model, module.recipe, self.out / "best.safetensors")
        trainer.save_checkpoint(self.out / "last.ckpt")
        if self.lines:
            print(
                f"epoch {row['epoch'] + 1:3} of {module.recipe.epochs}: "
                f"loss {row['train_loss']:.3f}, "
                f"validation {row['validation_accuracy']:6.1%}, "
                f"{row['seconds']:5.0f} s",
                flush=True,
            )


def _read_checkpoint(path: Path, recipe: Recipe) -> dict:
    """Return a checkpoint if it can be read and belongs to the recipe."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found, nothing to resume")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs = checkpoint["recipe"]
    except Exception as error:
        raise ValueError(f"{path}: not a whole checkpoint: {error}") from error
    for name, ours in asdict(recipe).items():
        if theirs.get(name) != ours:
            raise ValueError(
                f"{path}: is of a run with {name} = {theirs.get(name)!r}, not {ours!r}"
            )
    return checkpoint


def predict(
    model: S4Model, data: SequenceData, split: str, batch_size: int = 250
) -> Tensor:
    """Label all examples of a data set.

    Args:
        model: the classifier; its mode is restored afterwards.
        data: on the model's device.
        split: "train" or "test".
        batch_size: examples at a time.

    Returns:
        (n,) the most probable label of each, on the CPU.

    Raises:
        TypeError: batch_size is not an integer.
        ValueError: split is unknown, or batch_size below 1.

    Source: book/train.md.
    """
    check_choice("split", split, ("train", "test"))
    n, size = len(data.labels[split]), check_int("batch_size", batch_size)
    training = model.training
    model.eval()
    with torch.no_grad():
        parts = [
            model(data.batch(split, index)[0]).argmax(dim=1).cpu()
            for index in torch.arange(n).split(size)
        ]
    model.train(training)
    return torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Result:
    """What a run has come to.

    Attributes:
        recipe: what was followed.
        data: what the data set is to be called in a table.
        parameters: how many numbers the model has learnt.
        device: where it ran.
        history: a dict for each epoch: epoch, images, seconds, and loss and
            accuracy for train and validation.
        validation_accuracy: of the best epoch, whose weights are kept.
        test_accuracy: of the same weights; None if the run is unfinished.
        folder: where the files are.
        model: with the best epoch's weights, in evaluation mode, on the CPU.
        guesses: (n,) its labels for the test images, or None.

    Source: book/train.md.
    """

    recipe: Recipe
    data: str
    parameters: int
    device: str
    history: list[dict] = field(repr=False)
    validation_accuracy: float
    test_accuracy: float | None
    folder: Path
    model: S4Model = field(repr=False)
    guesses: Tensor | None = field(repr=False)

    def to_json(self) -> str:
        """Return everything but the model, as text."""
        names = (
            "data",
            "parameters",
            "device",
            "history",
            "validation_accuracy",
            "test_accuracy",
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


def _trainer(
    recipe: Recipe, out: Path, first: int, epochs: int, progress: str
) -> pl.Trainer:
    """Return Lightning's loop, set to be quiet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_epochs=epochs,
        gradient_clip_val=recipe.clip,
        callbacks=[_Keeper(out, lines=progress == "lines")],
        logger=CSVLogger(out, name="log", version=f"from-epoch-{first}"),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress == "bar",
    )


def _device_name() -> str:
    """Say in words what fit runs on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def fit(
    recipe: Recipe,
    out: str | Path,
    data: SequenceData | None = None,
    until: int | None = None,
    resume: bool = False,
    progress: str = "lines",
) -> Result:
    """Train a model by a recipe; choose on validation, test once.

    Args:
        recipe: what to do.
        out: folder for checkpoints, logs and the result.
        data: the data set, if it has been loaded already.
        until: stop after this epoch, as if interrupted; None: at the end.
        resume: whether to go on with the run in out.
        progress: "bar", "lines" (one for each epoch), or "none".

    Returns:
        The result; also written to out/result.json when the run is finished.

    Raises:
        FileExistsError: out holds a run already, and resume is false.
        FileNotFoundError: the data, or a run to resume, is not there.
        FloatingPointError: the loss is no longer a number.
        TypeError: recipe is not a Recipe, or until not an integer.
        ValueError: progress is unknown, until < 1, or the run in out has
            another recipe or a damaged checkpoint.

    Source: book/train.md.
    """
    check_choice("progress", progress, ("bar", "lines", "none"))
    _check_is_recipe(recipe)
    epochs = recipe.epochs
    if until is not None:
        epochs = min(epochs, check_int("until", until))
    out = Path(out)
    last, first = out / "last.ckpt", 0
    if resume:
        first = len(_read_checkpoint(last, recipe)["history"])
    elif last.exists():
        raise FileExistsError(
            f"{out}: holds a run already; resume it, or choose another folder"
        )
    if data is None:
        data = load(recipe.data, recipe.gray, recipe.size)
    module = SequenceClassifier(recipe, data)
    out.mkdir(parents=True, exist_ok=True)
    if first < epochs:
        trainer = _trainer(recipe, out, first, epochs, progress)
        at = last if resume else None
        with warnings.catch_warnings():  # of Lightning, about itself
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            trainer.fit(module, ckpt_path=at, weights_only=True)
    history = module.history or _read_checkpoint(last, recipe)["history"]
    return _finish(recipe, out, data, history)


def _finish(
    recipe: Recipe, out: Path, data: SequenceData, history: list[dict]
) -> Result:
    """Take the best weights; test them if the run is at its end."""
    model, _ = load_weights(out / "best.safetensors")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    guesses = accuracy = None
    if len(history) == recipe.epochs:
        guesses = predict(model.to(device), data.to(device), "test")
        right = guesses == data.labels["test"].cpu()
        accuracy = right.double().mean().item()
    result = Result(
        recipe,
        data.title,
        sum(p.numel() for p in model.parameters()),
        _device_name(),
        history,
        max(row["validation_accuracy"] for row in history),
        accuracy,
        out,
        model.cpu(),
        guesses,
    )
    if accuracy is not None:
        (out / "result.json").write_text(result.to_json() + "\n", "utf8")
    return result


def _parser() -> argparse.ArgumentParser:
    """Return the reader of the command line."""
    parser = argparse.ArgumentParser(
        prog="s4mini-train",
        description="Train S4 on images read pixel by pixel.",
        epilog="Example: s4mini-train digits --epochs 5 --set lr=0.005",
    )
    add = parser.add_argument
    add("recipe", nargs="?", help="name of a recipe; --list shows them")
    add("--list", action="store_true", help="show the recipes and stop")
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
    add("--epochs", metavar="N", help="the recipe with N epochs")
    add("--seed", metavar="N", help="the recipe with another seed")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="the recipe with another value; may be repeated",
    )
    add(
        "--lines",
        action="store_true",
        help="a line for each epoch instead of a progress bar",
    )
    return parser


def _changes(options: argparse.Namespace) -> dict[str, str]:
    """Return the overrides of a command line."""
    changes = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
        changes[name] = value
    for name in ("epochs", "seed"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    return changes


def main(argv: list[str] | None = None) -> int:
    """Train a recipe from the command line.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        The exit status: 0, or 1 after a message.

    Raises:
        SystemExit: the arguments cannot be read, or help was asked for.

    Source: book/train.md.
    """
    options = _parser().parse_args(argv)
    if options.list or options.recipe is None:
        for name, recipe in RECIPES.items():
            print(
                f"{name:14}{recipe.data}, {recipe.n_layers} layers of "
                f"{recipe.d_model}, N = {recipe.d_state}, batches of "
                f"{recipe.batch_size}, {recipe.epochs} epochs"
            )
        return 0
    try:
        check_choice("recipe", options.recipe, tuple(RECIPES))
        recipe = override(RECIPES[options.recipe], _changes(options))
        result = fit(
            recipe,
            options.out or Path("runs", options.recipe),
            until=options.until,
            resume=options.resume,
            progress="lines" if options.lines else "bar",
        )
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        print(f"s4mini-train: {error}", file=sys.stderr)
        return 1
    test = result.test_accuracy
    print(result.data)
    print(f"validation  {result.validation_accuracy:.2%}")
    print("unfinished" if test is None else f"test        {test:.2%}")
    print(f"files in    {result.folder}")
    return 0


# A notebook's __name__ is __main__ too, but a notebook has no __file__.
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(main())
