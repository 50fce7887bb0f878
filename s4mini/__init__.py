"""s4mini: structured state space models, from the book that derives them.

HiPPO, S4 and deep learning on long sequences: from x' = Ax + Bu to a network
trained on real data, in a book whose every formula runs.

    >>> import torch
    >>> from s4mini import S4Layer
    >>> layer = S4Layer(d_model=8)
    >>> y, _ = layer(torch.randn(2, 1000, 8))  # (batch, time, channel)

What most people need:

    discretize        Sample x' = A x + B u at step dt by the rule named.
    scan              Run the recurrence x = A_bar x + B_bar u, y = C x over a sequence.
    krylov_kernel     Compute the kernel K_l = C A_bar^l B_bar for l = 0 ... L - 1.
    causal_conv       Convolve sequences with kernels; no output depends on a later input.
    MEASURES
    hippo             Build the state matrix and input vector of online projection.
    nplr              Split a HiPPO matrix into normal and low rank, and diagonalise.
    half_spectrum     Keep one mode of each conjugate pair.
    dplr_kernel       Return the convolution kernel of a diagonal plus low-rank system.
    s4d_kernel        Return the convolution kernel of a diagonal system.
    S4Layer           Run one structured state space system on each channel.
    S4Config          Everything that decides which function a network's weights describe.
    S4Block           Wrap an S4 layer: nonlinearity, mixing of channels, residual, norm.
    S4Model           Read a sequence with a stack of S4 blocks.
    parameter_groups  Sort parameters into three groups for an optimiser such as AdamW.
    S4Classifier      Name the class of a sequence. `forward` returns logits (B, K).
    S4Forecaster      Forecast the next steps of a signal from the steps so far.
    S4LanguageModel   Score each token as the next one. `forward` returns logits (B, L, V).
    Source            Where a data set comes from.
    load              Read or make a data set, as sequences.
    download          Fetch a data set, unless it is there already.
    Recipe            A training run, down to the last number that decides its outcome.
    RECIPES
    Learner           A model and the rules by which a recipe trains it.
    predict           Answer all examples of a split.
    evaluate          Measure a model on examples of a split.
    fit               Train a model by a recipe; choose on validation, test once.
    from_official     Make a layer of a state dict of the official code.

Everything else is reached through its module. Each module is a chapter of the book,
and ``help(s4mini.kernel)`` and the like tell more:

    ssm             State spaces
    discretization  From time to steps
    convolve        A recurrence is a convolution
    projection      Remembering with N numbers
    memory          What a fixed matrix remembers
    diagonalize     The eigenvectors of HiPPO
    lowrank         Normal plus low rank
    generating      From powers to a resolvent
    cauchy_sum      Sums of simple fractions
    kernel          The S4 kernel
    tables          The kernel by two tables
    fused           One program for the sums
    recurrence      Stepping in linear time
    diagonal        Diagonal systems
    layer           The layer
    saving          Saved, whole or not at all
    model           The network
    tasks           Three tasks
    data            Data as sequences
    images          Images as sequences
    recipes         Recipes
    train           Training
    cli             The command line
    baselines       What we compare with
    bench           How we measure
    speech          Spoken digits
    forecast        Hours to come
    lra             Lists and paths
    ablation        Does the beginning matter?
    filters         Kernels as pictures
    selective       A step that listens
    official        Reading official checkpoints
    checks          Errors that help
    figures         How the figures are drawn

Training needs ``pip install "s4mini[train]"``, the figures of the book need
``pip install "s4mini[book]"``; the rest needs torch and numpy only.
"""

import sys as _sys
from importlib import import_module as _import_module
from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from s4mini.convolve import causal_conv as causal_conv
    from s4mini.convolve import krylov_kernel as krylov_kernel
    from s4mini.convolve import scan as scan
    from s4mini.data import Source as Source
    from s4mini.data import download as download
    from s4mini.data import load as load
    from s4mini.diagonal import s4d_kernel as s4d_kernel
    from s4mini.discretization import discretize as discretize
    from s4mini.kernel import dplr_kernel as dplr_kernel
    from s4mini.layer import S4Layer as S4Layer
    from s4mini.lowrank import half_spectrum as half_spectrum
    from s4mini.lowrank import nplr as nplr
    from s4mini.model import S4Block as S4Block
    from s4mini.model import S4Config as S4Config
    from s4mini.model import S4Model as S4Model
    from s4mini.model import parameter_groups as parameter_groups
    from s4mini.official import from_official as from_official
    from s4mini.projection import MEASURES as MEASURES
    from s4mini.projection import hippo as hippo
    from s4mini.recipes import RECIPES as RECIPES
    from s4mini.recipes import Recipe as Recipe
    from s4mini.tasks import S4Classifier as S4Classifier
    from s4mini.tasks import S4Forecaster as S4Forecaster
    from s4mini.tasks import S4LanguageModel as S4LanguageModel
    from s4mini.train import Learner as Learner
    from s4mini.train import evaluate as evaluate
    from s4mini.train import fit as fit
    from s4mini.train import predict as predict

_HOMES = {
    "discretize": "discretization",
    "scan": "convolve",
    "krylov_kernel": "convolve",
    "causal_conv": "convolve",
    "MEASURES": "projection",
    "hippo": "projection",
    "nplr": "lowrank",
    "half_spectrum": "lowrank",
    "dplr_kernel": "kernel",
    "s4d_kernel": "diagonal",
    "S4Layer": "layer",
    "S4Config": "model",
    "S4Block": "model",
    "S4Model": "model",
    "parameter_groups": "model",
    "S4Classifier": "tasks",
    "S4Forecaster": "tasks",
    "S4LanguageModel": "tasks",
    "Source": "data",
    "load": "data",
    "download": "data",
    "Recipe": "recipes",
    "RECIPES": "recipes",
    "Learner": "train",
    "predict": "train",
    "evaluate": "train",
    "fit": "train",
    "from_official": "official",
}
_MODULES = (
    "ssm",
    "discretization",
    "convolve",
    "projection",
    "memory",
    "diagonalize",
    "lowrank",
    "generating",
    "cauchy_sum",
    "kernel",
    "tables",
    "fused",
    "recurrence",
    "diagonal",
    "layer",
    "saving",
    "model",
    "tasks",
    "data",
    "images",
    "recipes",
    "train",
    "cli",
    "baselines",
    "bench",
    "speech",
    "forecast",
    "lra",
    "ablation",
    "filters",
    "selective",
    "official",
    "checks",
    "figures",
)
_NEEDS = {
    "train": ("filelock", "lightning"),
}
_EXTRAS = {"matplotlib": "book", "plotly": "book", "sympy": "book", "triton": "triton"}


def __getattr__(name: str):
    if name == "__version__":
        return _version("s4mini")
    if name == "__all__" and _sys._getframe(1).f_globals.get("__name__") != "pydoc":
        return _face()  # told to help() too, it would print every class in full
    module = _HOMES.get(name, name)
    if module not in _MODULES:
        raise AttributeError(f"module 's4mini' has no attribute {name!r}")
    try:
        found = _import_module(f"s4mini.{module}")
    except ModuleNotFoundError as error:
        needed = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(needed, "train")
        said = f's4mini.{name} needs {needed}: pip install "s4mini[{extra}]"'
        raise ModuleNotFoundError(said, name=error.name) from error
    return getattr(found, name) if name in _HOMES else found


def _face() -> list[str]:
    here = {home for home, needed in _NEEDS.items() if all(map(_find_spec, needed))}
    return [name for name, home in _HOMES.items() if home in here or home not in _NEEDS]


def __dir__() -> list[str]:
    return sorted([*_face(), "__version__"])
