"""s4mini: structured state space models, from the book that derives them.

A book that starts with x' = Ax + Bu and ends with a network trained on real
images, in which every formula runs, and the small library that is woven from
it.

Each module is a chapter of the book:

    checks       Errors that help
    ssm          State spaces
    discretize   From time to steps
    convolve     A recurrence is a convolution
    hippo        Remembering with N numbers
    memory       What a fixed matrix remembers
    diagonalize  The eigenvectors of HiPPO
    nplr         Normal plus low rank
    generating   From powers to a resolvent
    cauchy       Sums of simple fractions
    kernel       The S4 kernel
    fused        One program for the kernel
    recurrence   Stepping in linear time
    diagonal     Diagonal systems
    layer        The layer
    model        The network
    data         Data as sequences
    train        Training
    baselines    What we compare with
    bench        How we measure
    figures      How the figures are drawn

``help(s4mini.kernel)`` and the like tell more. Every public name can be imported from
here or from its module:

    >>> import torch
    >>> from s4mini import S4Layer
    >>> layer = S4Layer(d_model=8)
    >>> y, _ = layer(torch.randn(2, 1000, 8))  # (batch, time, channel)

``train`` needs ``pip install "s4mini[train]"``, ``figures`` needs
``pip install "s4mini[book]"``; the rest needs torch and numpy only, but for
``data``, which downloads and finds the digits with what ``train`` needs.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version

from s4mini.baselines import (
    ATTENTIONS,
    LSSLLayer,
    TransformerLayer,
    attention,
    fused_attention,
    linear_attention,
    lssl_kernel,
    orthogonal_features,
    performer_attention,
    unit_circle_kernel,
)
from s4mini.cauchy import cauchy, cauchy_naive, damp, keops_available, nodes
from s4mini.checks import check_choice, check_int, check_positive, check_tensors
from s4mini.convolve import causal_conv, krylov_kernel, scan
from s4mini.diagonal import (
    s4d_final_state,
    s4d_init,
    s4d_kernel,
    s4d_response,
    s4d_step,
)
from s4mini.diagonalize import legs_eigenvectors
from s4mini.discretize import discretize, gbt, zoh
from s4mini.fused import fused_spectrum, tl, triton_available
from s4mini.generating import generating_function, roots, truncated_C
from s4mini.hippo import (
    MEASURES,
    domain,
    fourier,
    hippo,
    laguerre,
    legendre,
    reconstruct,
)
from s4mini.kernel import backends, dplr_difference, dplr_kernel
from s4mini.layer import S4Layer, Stepper, mask_padding, two_sided_conv
from s4mini.memory import basis, init_dt, measure
from s4mini.model import (
    ModelState,
    ModelStepper,
    S4Block,
    S4Classifier,
    S4Forecaster,
    S4LanguageModel,
    S4Model,
    TiedDropout,
    parameter_groups,
)
from s4mini.nplr import NPLR, half_spectrum, nplr, real_form
from s4mini.recurrence import (
    Increments,
    check_lengths,
    dplr_increments,
    dplr_step,
    final_state,
    state_as_input,
    state_response,
)
from s4mini.ssm import SSM, change_basis, expm, impulse_response, promote

__all__ = [
    "check_int",
    "check_positive",
    "check_choice",
    "check_tensors",
    "SSM",
    "promote",
    "expm",
    "impulse_response",
    "change_basis",
    "gbt",
    "zoh",
    "discretize",
    "scan",
    "krylov_kernel",
    "causal_conv",
    "legendre",
    "MEASURES",
    "domain",
    "reconstruct",
    "hippo",
    "laguerre",
    "fourier",
    "measure",
    "basis",
    "init_dt",
    "legs_eigenvectors",
    "NPLR",
    "nplr",
    "half_spectrum",
    "real_form",
    "generating_function",
    "roots",
    "truncated_C",
    "nodes",
    "damp",
    "cauchy_naive",
    "cauchy",
    "keops_available",
    "dplr_difference",
    "backends",
    "dplr_kernel",
    "tl",
    "triton_available",
    "fused_spectrum",
    "dplr_step",
    "Increments",
    "dplr_increments",
    "state_as_input",
    "state_response",
    "check_lengths",
    "final_state",
    "s4d_kernel",
    "s4d_init",
    "s4d_step",
    "s4d_response",
    "s4d_final_state",
    "two_sided_conv",
    "mask_padding",
    "Stepper",
    "S4Layer",
    "TiedDropout",
    "S4Block",
    "ModelState",
    "S4Model",
    "ModelStepper",
    "parameter_groups",
    "S4Classifier",
    "S4Forecaster",
    "S4LanguageModel",
    "lssl_kernel",
    "LSSLLayer",
    "attention",
    "fused_attention",
    "linear_attention",
    "orthogonal_features",
    "performer_attention",
    "ATTENTIONS",
    "TransformerLayer",
    "unit_circle_kernel",
]

# Names that are imported when first asked for: module, and the extra that it needs.
_LAZY = {
    "NAMES": ("data", "train"),
    "data_dir": ("data", "train"),
    "available": ("data", "train"),
    "read_cifar10": ("data", "train"),
    "read_idx": ("data", "train"),
    "official": ("data", "train"),
    "raster": ("data", "train"),
    "reading_order": ("data", "train"),
    "Batch": ("data", "train"),
    "SequenceData": ("data", "train"),
    "ImageData": ("data", "train"),
    "load": ("data", "train"),
    "read_wav": ("data", "train"),
    "SoundData": ("data", "train"),
    "read_ett": ("data", "train"),
    "WindowData": ("data", "train"),
    "LISTOPS": ("data", "train"),
    "evaluate_listops": ("data", "train"),
    "draw_listops": ("data", "train"),
    "SymbolData": ("data", "train"),
    "draw_pathfinder": ("data", "train"),
    "download": ("data", "train"),
    "Recipe": ("train", "train"),
    "RECIPES": ("train", "train"),
    "override": ("train", "train"),
    "split_indices": ("train", "train"),
    "epoch_order": ("train", "train"),
    "build": ("train", "train"),
    "schedule": ("train", "train"),
    "Learner": ("train", "train"),
    "save_weights": ("train", "train"),
    "load_weights": ("train", "train"),
    "predict": ("train", "train"),
    "evaluate": ("train", "train"),
    "Result": ("train", "train"),
    "fit": ("train", "train"),
    "summarise": ("train", "train"),
    "main": ("train", "train"),
    "time_runs": ("bench", "train"),
    "peak_memory": ("bench", "train"),
    "REFERENCES": ("bench", "train"),
    "Case": ("bench", "train"),
    "rivals": ("bench", "train"),
    "prepare": ("bench", "train"),
    "predicted_bytes": ("bench", "train"),
    "measure_case": ("bench", "train"),
    "free_bytes": ("bench", "train"),
    "run_case": ("bench", "train"),
    "ratio_table": ("bench", "train"),
    "provenance": ("bench", "train"),
    "run_bench": ("bench", "train"),
    "COLORS": ("figures", "book"),
    "use_style": ("figures", "book"),
    "show": ("figures", "book"),
    "recorded": ("figures", "book"),
}


def __getattr__(name):
    if name == "__version__":
        return _version("s4mini")
    module, extra = _LAZY.get(name, (name, None))
    if module not in {home for home, _ in _LAZY.values()}:
        raise AttributeError(f"module 's4mini' has no attribute {name!r}")
    try:
        found = _import_module(f"s4mini.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f's4mini.{name} needs {error.name}: pip install "s4mini[{extra or "book"}]"',
            name=error.name,
        ) from error
    return getattr(found, name) if name in _LAZY else found
