"""Does the beginning matter?.

A network with a state matrix that training may change in every entry is started from
HiPPO, from a random matrix, and from a random matrix with HiPPO's own eigenvalues. How
far apart do they end?

Tangled from book/ablation.md.
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from s4mini.baselines import LSSLLayer, Residual
from s4mini.bench import record_runs
from s4mini.checks import check_choice, check_int
from s4mini.data import SequenceData, load
from s4mini.layer import S4Layer
from s4mini.lra import SequenceClassifier, accuracy
from s4mini.model import descend
from s4mini.projection import hippo

__all__ = [
    "BEGINNINGS",
    "beginning",
    "dense_layer",
    "modes",
    "STRUCTURED",
    "make_start",
    "rightmost",
    "train_start",
    "record_starts",
]

#: What the dense matrix can begin with.
BEGINNINGS = ("hippo", "gaussian", "spectrum")


def beginning(
    name: str, N: int, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return a stable state matrix and an input vector to begin with.

    Args:
        name: "hippo"; "gaussian", normal entries, scaled and shifted;
            "spectrum", HiPPO's eigenvalues in a random orthogonal basis.
        N: the state size.
        generator: the source of randomness; the global one if not given.

    Returns:
        A (N, N) and B (N,), float64. The largest real part of an eigenvalue
        of A is -1, and B has length N.

    Raises:
        TypeError: N is not an integer.
        ValueError: the name is unknown, or N < 1.

    Source: after Gu et al. 2022a, section 4.4; book/ablation.md.
    """
    check_choice("name", name, BEGINNINGS)
    A, B = hippo("legs", check_int("N", N))
    if name == "hippo":
        return A, B
    G = torch.randn(N, N, generator=generator, dtype=A.dtype)
    b = torch.randn(N, generator=generator, dtype=A.dtype)
    if name == "gaussian":
        M = G * math.sqrt(N) / 2
        rightmost = torch.linalg.eigvals(M).real.max()
        A = M - (rightmost + 1) * torch.eye(N, dtype=A.dtype)
    else:
        Q, _ = torch.linalg.qr(G)
        A = Q @ (A.diagonal()[:, None] * Q.mT)
    return A, b * (B.norm() / b.norm())


def dense_layer(name: str, d_model: int, d_state: int) -> LSSLLayer:
    """Make an unconstrained layer with one of BEGINNINGS.

    Args:
        name: one of BEGINNINGS.
        d_model: the number H of channels.
        d_state: the state size N.

    Source: book/ablation.md.
    """
    layer = LSSLLayer(d_model, d_state)
    with torch.no_grad():
        A, B = beginning(name, d_state)
        layer.A.copy_(A)
        layer.B.copy_(B)
    return layer


def modes(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the diagonal form of a real system, one of each pair.

    Args:
        A: (N, N) real, with N independent eigenvectors.
        B: (N,) real.

    Returns:
        Lambda (n,) with imaginary parts >= 0, V^-1 B (n,), halved where the
        eigenvalue is real, and V (N, n).

    Source: book/ablation.md.
    """
    Lambda, V = torch.linalg.eig(A)
    b = torch.linalg.solve(V, B.to(V.dtype))
    kept = Lambda.imag >= 0
    half = torch.where(Lambda.imag == 0, 0.5, 1.0)
    return Lambda[kept], (half * b)[kept], V[:, kept]


#: Structured layers and what they begin with.
STRUCTURED = ("s4-hippo", "s4-random", "s4d-gaussian")


def make_start(
    name: str,
    channels: int,
    classes: int,
    d_model: int = 32,
    d_state: int = 32,
    n_layers: int = 2,
) -> SequenceClassifier:
    """Make a network of layers with one of the beginnings.

    Args:
        name: one of BEGINNINGS or STRUCTURED.
        channels: of the input.
        classes: how many scores are returned.
        d_model: the number H of channels inside.
        d_state: the state size N.
        n_layers: how many layers.

    Raises:
        ValueError: the name is unknown.

    Source: book/ablation.md.
    """
    check_choice("name", name, BEGINNINGS + STRUCTURED)
    layers: list[nn.Module] = []
    for _ in range(n_layers):
        if name in BEGINNINGS:
            layer: nn.Module = dense_layer(name, d_model, d_state)
        elif name == "s4d-gaussian":
            Lambda, b, _ = modes(*beginning("gaussian", d_state))
            layer = S4Layer.from_system(
                Lambda, None, b, d_model, method="bilinear", tied=True
            )
        else:
            measure = "legs" if name == "s4-hippo" else "random"
            layer = S4Layer(d_model, d_state, measure, tied=True)
        mix = nn.Linear(d_model, 2 * d_model)
        norm = nn.LayerNorm(d_model)
        layers.append(Residual(norm, layer, nn.GELU(), mix, nn.GLU()))
    return SequenceClassifier(layers, channels, d_model, classes)


_DYNAMICS = ("A", "B", "P", "log_dt", "log_decay", "frequency")


def rightmost(model: nn.Module) -> float | None:
    """Return the largest real part of an eigenvalue of all dense A.

    Args:
        model: with LSSLLayers; None is returned if it has none.

    Source: book/ablation.md.
    """
    found = [
        torch.linalg.eigvals(m.A.detach().double()).real.max().item()
        for m in model.modules()
        if isinstance(m, LSSLLayer)
    ]
    return max(found, default=None)


@torch.random.fork_rng()  # the caller's numbers go on where they were
def train_start(
    name: str,
    data: SequenceData,
    seed: int,
    epochs: int,
    images: int = 2560,
    held: int = 1000,
    batch: int = 32,
    d_model: int = 32,
    n_layers: int = 2,
) -> dict:
    """Train one beginning; follow both accuracies from epoch to epoch.

    Args:
        name: as in make_start.
        data: with labels.
        seed: of the beginning, the weights and the order of the images.
        epochs: how often each image is seen.
        images: the first so many of the training split are learned.
        held: the last so many are for validation.
        batch: images a step.
        d_model: channels inside.
        n_layers: how many layers.

    Returns:
        The record of the run.

    Raises:
        ValueError: a dense system has become so unstable that its kernel is
            not finite.

    Source: book/ablation.md.
    """
    torch.manual_seed(seed)
    model = make_start(
        name, data.channels, len(data.classes), d_model, n_layers=n_layers
    )
    slow = [p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] in _DYNAMICS]
    rest = [p for p in model.parameters() if all(p is not q for q in slow)]
    optimizer = torch.optim.Adam(
        [{"params": slow, "lr": 1e-3}, {"params": rest, "lr": 5e-3}]
    )
    last = torch.arange(data.count("train") - held, data.count("train"))
    record: dict = {
        "start": name,
        "seed": seed,
        "images": images,
        "held": held,
        "before": rightmost(model),
        "curve": [],
    }
    wall, used = time.time(), time.process_time()
    for epoch in range(1, epochs + 1):
        right = 0
        for index in torch.randperm(images).split(batch):
            u, target, lengths = data.batch("train", index)
            scores = model(u, lengths)
            loss = F.cross_entropy(scores, target)
            right += (scores.argmax(-1) == target).sum().item()
            descend(model, loss, optimizer)
        share, error = accuracy(model, data, "train", last)
        record["curve"].append(
            {
                "epoch": epoch,
                "train": right / images,
                "validation": share,
                "error": error,
            }
        )
    return record | {
        "after": rightmost(model),
        "wall": time.time() - wall,
        "seconds": time.process_time() - used,
    }


def record_starts(
    out: str | Path,
    seed: int,
    names: tuple[str, ...] = BEGINNINGS,
    epochs: int = 4,
) -> None:
    """Train beginnings on CIFAR-10 at 16 x 16; add them to a file of results.

    Args:
        out: the file, such as results/ablation.json; runs that it holds
            already are kept, and not made again.
        seed: of each run.
        names: of BEGINNINGS and STRUCTURED.
        epochs: as in train_start.

    Source: book/ablation.md.
    """
    data = load("cifar10", size=16)
    call = f"ablation.record_starts({str(out)!r}, SEED, NAMES, {epochs})"
    runs = [
        ({"start": name, "seed": seed}, partial(train_start, name, data, seed, epochs))
        for name in names
    ]
    about = {"data": data.title, "length": data.length}
    record_runs(out, call, seed, about, runs)
