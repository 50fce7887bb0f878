"""Recipes.

Every number that decides how a training run ends, in one record that cannot be changed;
and the recipes that have a name.

Tangled from book/recipes.md.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from s4mini.checks import check_bool, check_choice, check_int, check_number, check_step
from s4mini.data import SequenceData, load, options_of
from s4mini.layer import STARTS
from s4mini.model import LARGEST, S4Config, S4Model
from s4mini.tasks import S4Forecaster

__all__ = [
    "Recipe",
    "RECIPES",
    "READING",
    "load_data",
    "build",
    "check_recipe",
    "sizes_of",
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

    Source: book/recipes.md.
    """

    data: str
    gray: bool = False
    size: int | None = None
    order: Literal["raster", "permuted", "bitreversal"] = "raster"
    length: int | None = None
    horizon: int | None = None
    examples: int | None = None
    d_model: int = 128
    n_layers: int = 4
    d_state: int = 64
    measure: str = "legs"
    dropout: float = 0.1
    norm: Literal["layer", "batch"] = "layer"
    prenorm: bool = False
    bidirectional: bool = False
    pool: Literal["mean", "last"] = "mean"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    lr: float = 1e-2
    ssm_lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    batch_size: int = 50
    epochs: int = 100
    epoch_size: int | None = None
    validation: float = 0.1
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_recipe(self)


_MOST = LARGEST | {
    "batch_size": 2**20,
    "epochs": 10**6,
    "epoch_size": 2**24,
    "length": 10**8,
    "horizon": 10**6,
    "examples": 10**7,
    "size": 2**14,
    "seed": 2**32 - 1,
}
_ABOVE_ZERO = ("lr", "ssm_lr", "clip", "dt_min", "dt_max", "validation")
_SHARES = ("dropout", "warmup", "validation")


def _check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe with which no run can end well."""
    for name, kind in get_type_hints(Recipe).items():
        value = getattr(recipe, name)
        if get_origin(kind) is Literal:
            check_choice(name, value, get_args(kind))
        elif kind is bool:
            check_bool(name, value)
        elif kind is float:
            _check_real(name, value)
        elif kind == int | None and value is None:
            continue
        elif kind in (int, int | None):
            _check_size(name, value)
    if not isinstance(recipe.data, str) or not recipe.data:
        raise TypeError(f"data: expected a name, got {recipe.data!r}")
    check_choice("measure", recipe.measure, STARTS)
    if recipe.dt_max < recipe.dt_min:
        raise ValueError(
            f"dt_max: expected at least dt_min = {recipe.dt_min}, got {recipe.dt_max}"
        )


def _check_size(name: str, value: int) -> None:
    """Refuse what is no integer within its range."""
    minimum = {"seed": 0, "d_state": 2}.get(name, 1)
    check_int(name, value, minimum, name == "d_state", _MOST[name])


def _check_real(name: str, value: float) -> None:
    """Refuse what is no finite number within its range."""
    number = check_number(name, value)
    if name in ("dt_min", "dt_max"):
        check_step(name, number)
    low = "> 0" if name in _ABOVE_ZERO else ">= 0"
    share = name in _SHARES
    if number < 0 or (number == 0 and low == "> 0") or (share and number >= 1):
        what = f"a number {low}{' and < 1' if share else ''}"
        raise ValueError(f"{name}: expected {what}, got {value}")


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

#: The options that say how a data set is read or made, and what is usual.
READING = {
    "gray": False,
    "size": None,
    "order": "raster",
    "length": None,
    "horizon": None,
    "examples": None,
}


def load_data(recipe: Recipe, workers: int = 1) -> SequenceData:
    """Read or make the data set of a recipe.

    Args:
        recipe: whose data.
        workers: processes that make what is made.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is no such data set, or it has no such option.

    Source: book/recipes.md.
    """
    known = options_of(recipe.data)
    options = {name: getattr(recipe, name) for name in READING}
    options = {k: v for k, v in options.items() if v != READING[k]}
    if "workers" in known:
        options["workers"] = workers
    return load(recipe.data, **options)


_MODEL = (
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

    Source: book/recipes.md.
    """
    check_recipe(recipe)
    config = S4Config(
        d_input=check_int("channels", channels),
        d_output=check_int("outputs", outputs),
        **{name: getattr(recipe, name) for name in _MODEL},
        pool=recipe.pool if horizon is None else "none",
    )
    model = S4Model(config, torch.Generator().manual_seed(recipe.seed))
    return model if horizon is None else S4Forecaster(model, horizon)


def check_recipe(recipe: Recipe) -> None:
    """Refuse what is not a recipe, such as the name of one.

    Args:
        recipe: what was given.

    Raises:
        TypeError: it is no Recipe.

    Source: book/recipes.md.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {recipe!r}")


def sizes_of(data: SequenceData) -> tuple[int, int, int | None]:
    """Return what build must be told of a data set.

    Args:
        data: the data set.

    Returns:
        Channels of the input, outputs, and steps to forecast or None.

    Source: book/recipes.md.
    """
    outputs = len(data.classes) or data.channels
    return data.channels, outputs, data.horizon
