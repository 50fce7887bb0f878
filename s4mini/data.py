"""Data as sequences.

How eight data sets are fetched or made, read, checked, and turned into batches of one
kind: sequences, targets, lengths.

Tangled from book/data.md.
"""

import argparse
import gzip
import hashlib
import io
import math
import os
import random
import struct
import sys
import tarfile
import tempfile
import wave
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial
from http.client import HTTPException
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor

from s4mini.checks import check_choice, check_int

__all__ = [
    "NAMES",
    "data_dir",
    "available",
    "read_cifar10",
    "read_idx",
    "official",
    "raster",
    "reading_order",
    "Batch",
    "SequenceData",
    "ImageData",
    "load",
    "read_wav",
    "SoundData",
    "read_ett",
    "WindowData",
    "LISTOPS",
    "evaluate_listops",
    "draw_listops",
    "SymbolData",
    "draw_pathfinder",
    "download",
]

#: The data sets, by name.
NAMES = (
    "cifar10",
    "mnist",
    "digits",
    "speech",
    "etth1",
    "etth2",
    "listops",
    "pathfinder",
)

_IMAGES = ("cifar10", "mnist", "digits", "pathfinder")
_ETT = ("etth1", "etth2")
_MADE = ("listops", "pathfinder")
_HERE = ("digits", *_MADE)  # what needs no files

_FOLDERS = {
    "cifar10": "cifar-10-batches-bin",
    "mnist": "mnist",
    "speech": "fsdd/recordings",
    "etth1": "ETT-small",
    "etth2": "ETT-small",
}

_SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
_RECORDINGS = 50  # of each digit by each speaker
_SPEECH_SHA1 = "575d10204aa6565da0ad51913285d00b9aca4db4"

_SHA1 = {
    "cifar10": {
        "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
        "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
        "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
        "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
        "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
        "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
    },
    "mnist": {
        "train-images-idx3-ubyte": "c3557c10f29b266e19b3eeee1553c85e0ef4a8ea",
        "train-labels-idx1-ubyte": "adbf52269f5d842899f287c269e2883e40b4f6e2",
        "t10k-images-idx3-ubyte": "65e11ec1fd220343092a5070b58418b5c2644e26",
        "t10k-labels-idx1-ubyte": "a6d52cc628797e845885543326e9f10abb8a6f89",
    },
    "etth1": {"ETTh1.csv": "b22844d8be77297bde809d7ca0132f50fae8590b"},
    "etth2": {"ETTh2.csv": "3c8512146f103b53ca7a3948bff17d4f5699ed8e"},
}

_DIGITS = tuple("0123456789")
_CLASSES = {
    "cifar10": tuple(
        "airplane automobile bird cat deer dog frog horse ship truck".split()
    ),
    "pathfinder": ("apart", "joined"),
}  # of all others: the digits


def data_dir() -> Path:
    """Return the folder in which data sets are looked for.

    Returns:
        $S4MINI_DATA where it is set, else s4mini in the user's cache folder.

    Source: book/data.md.
    """
    if given := os.environ.get("S4MINI_DATA"):
        return Path(given).expanduser()
    home = Path.home()
    local = os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")
    caches = {"darwin": home / "Library" / "Caches", "win32": Path(local)}
    usual = caches.get(sys.platform, home / ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME", usual)) / "s4mini"


def _files(name: str) -> list[str]:
    """Return the names of a data set's files."""
    if name != "speech":
        return list(_SHA1[name])
    return [
        f"{digit}_{speaker}_{k}.wav"
        for digit in range(10)
        for speaker in _SPEAKERS
        for k in range(_RECORDINGS)
    ]


def _paths(name: str, folder: str | Path | None) -> dict[str, Path]:
    """Return where each file of a data set is, packed by gzip or not."""
    root = Path(folder or data_dir()) / _FOLDERS[name]
    paths = {}
    for file in _files(name):
        packed = root / f"{file}.gz"
        paths[file] = packed if packed.exists() else root / file
    return paths


def available(name: str, folder: str | Path | None = None) -> bool:
    """Say whether all files of a data set are there.

    Args:
        name: one of NAMES.
        folder: where to look; data_dir() by default.

    Returns:
        Whether load can find what it needs. The files are not read.

    Raises:
        ValueError: name is unknown.

    Source: book/data.md.
    """
    check_choice("name", name, NAMES)
    if name in _HERE:
        return True
    return all(path.exists() for path in _paths(name, folder).values())


def _read(path: Path) -> bytes:
    """Return the content of a file, unpacked if it ends in .gz."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: not found; `make data` (or `python -m s4mini.data`) "
            "downloads it, S4MINI_DATA says where to look"
        )
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, found a broken one: {error}"
        ) from error


def _check_labels(path: Path, labels: np.ndarray) -> None:
    """Refuse labels that are not digits."""
    wrong = np.flatnonzero(labels > 9)
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"{path}: expected labels 0 to 9, found {labels[at]} at record {at}"
        )


_RECORDS = 10_000  # in each file
_RECORD = 1 + 3 * 32 * 32  # bytes


def read_cifar10(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one binary file of CIFAR-10.

    Args:
        path: data_batch_1.bin or one of its kind.

    Returns:
        images (10000, 32, 32, 3) and labels (10000,), both uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its length is not 10000 records, or a label is above 9.

    Source: Krizhevsky 2009; book/data.md.
    """
    path = Path(path)
    content = np.frombuffer(_read(path), dtype=np.uint8)
    if content.size != _RECORDS * _RECORD:
        raise ValueError(
            f"{path}: expected {_RECORDS * _RECORD} bytes "
            f"({_RECORDS} records of {_RECORD}), found {content.size}; "
            "delete it and download it again"
        )
    records = content.reshape(_RECORDS, _RECORD)
    labels, pixels = records[:, 0], records[:, 1:]
    _check_labels(path, labels)
    planes = pixels.reshape(_RECORDS, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), labels  # colour is the last axis


def read_idx(path: str | Path, axes: int) -> np.ndarray:
    """Read an idx file of bytes, packed by gzip or not.

    Args:
        path: the file; one that ends in .gz is unpacked.
        axes: how many axes its content must have, 3 for images.

    Returns:
        The content, uint8, with that many axes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or longer or shorter than it says.

    Source: LeCun et al. 1998; book/data.md.
    """
    path, axes = Path(path), check_int("axes", axes)
    content, start = _read(path), 4 + 4 * axes
    if len(content) < start:
        raise ValueError(
            f"{path}: expected a header of {start} bytes, found {len(content)}"
        )
    magic, *shape = struct.unpack(f">{1 + axes}I", content[:start])
    if magic != 0x0800 + axes:
        raise ValueError(
            f"{path}: expected magic number {0x0800 + axes}, found {magic}"
        )
    size = start + int(np.prod(shape, dtype=object))
    if len(content) != size:
        raise ValueError(
            f"{path}: expected {size} bytes, found {len(content)}; "
            "delete it and download it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _needs(module: str):
    """Import an optional module, or say how to get it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'this needs {module}: pip install "s4mini[train]"', name=module
        ) from error


def _arrays_cifar10(folder: str | Path | None) -> list[np.ndarray]:
    """Return train images, train labels, test images, test labels."""
    parts = [read_cifar10(p) for p in _paths("cifar10", folder).values()]
    images, labels = zip(*parts[:5], strict=True)
    return [np.concatenate(images), np.concatenate(labels), *parts[5]]


def _arrays_mnist(folder: str | Path | None) -> list[np.ndarray]:
    """Return train images, train labels, test images, test labels."""
    arrays = []
    for file, path in _paths("mnist", folder).items():
        arrays.append(read_idx(path, 3 if "images" in file else 1))
        if "labels" in file:
            _check_labels(path, arrays[-1])
            if len(arrays[-1]) != len(arrays[-2]):
                raise ValueError(
                    f"{path}: expected {len(arrays[-2])} labels, one for "
                    f"each image, found {len(arrays[-1])}"
                )
    return [a[..., None] if a.ndim == 3 else a for a in arrays]


def _arrays_digits(folder: str | Path | None) -> list[np.ndarray]:
    """Return train images, train labels, test images, test labels."""
    digits = _needs("sklearn.datasets").load_digits()
    images = digits.images[..., None].astype(np.uint8)  # levels 0 to 16
    labels = digits.target.astype(np.uint8)
    test = np.arange(len(images)) % 5 == 0
    return [images[~test], labels[~test], images[test], labels[test]]


def official(name: str, folder: str | Path | None = None) -> bool:
    """Say whether the files of a data set are those that were published.

    Args:
        name: one of NAMES.
        folder: where to look; data_dir() by default.

    Returns:
        Whether every file, unpacked, has its official checksum. Always true
        of the digits, which come with scikit-learn, and never of the sets
        that are made here.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: name is unknown, or a file cannot be unpacked.

    Source: book/data.md.
    """
    check_choice("name", name, NAMES)
    if name in _HERE:
        return name not in _MADE
    if name == "speech":
        digest = hashlib.sha1()
        for path in _paths(name, folder).values():
            digest.update(_read(path))
        return digest.hexdigest() == _SPEECH_SHA1
    return all(
        hashlib.sha1(_read(path)).hexdigest() == _SHA1[name][file]
        for file, path in _paths(name, folder).items()
    )


_TITLES = {
    "cifar10": "CIFAR-10",
    "mnist": "MNIST",
    "digits": "handwritten digits (scikit-learn)",
    "speech": "Free Spoken Digit Dataset",
    "etth1": "ETTh1",
    "etth2": "ETTh2",
    "listops": "ListOps",
    "pathfinder": "Pathfinder",
}


def _title(name: str, folder: str | Path | None) -> str:
    """Return what a data set is to be called in a table."""
    if official(name, folder):
        return _TITLES[name]
    remark = "not the official files: a recompressed or reordered copy"
    if name == "speech":
        remark = "not the recordings that the book was made with"
    if name in _MADE:
        how = {"listops": "to the rule of", "pathfinder": "after that of"}
        remark = f"made by s4mini, {how[name]} Long Range Arena"
    return f"{_TITLES[name]} ({remark})"


_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def raster(images: Tensor, gray: bool = False, size: int | None = None) -> Tensor:
    """Read images row by row.

    Args:
        images: (B, W, W, channels) pixels, uint8, square.
        gray: whether three colours become one grey level.
        size: pixels a side after averaging; must divide W. None: W.

    Returns:
        (B, size * size, channels or 1) float32, in the unit of the pixels.

    Raises:
        TypeError: images is not a uint8 tensor, or size not an integer.
        ValueError: the shape is another, or size does not divide W.

    Source: book/data.md.
    """
    _check_images(images)
    check_choice("gray", gray, (False, True))
    W = images.shape[1]
    size = W if size is None else check_int("size", size)
    if W % size:
        raise ValueError(f"size: expected a divisor of {W}, got {size}")
    u = images.float()
    if gray and u.shape[-1] == 3:
        u = (u @ u.new_tensor(_GREY))[..., None]
    q = W // size  # averages squares of q x q pixels
    if q > 1:
        u = u.unflatten(2, (size, q)).unflatten(1, (size, q)).mean(dim=(2, 4))
    return u.flatten(1, 2)  # (B, size * size, channels)


def _check_images(images: Tensor) -> None:
    """Refuse what is not a batch of square uint8 images."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = type(images).__name__
        kind = images.dtype if isinstance(images, Tensor) else kind
        raise TypeError(f"images: expected a uint8 tensor, got {kind}")
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != shape[2] or shape[3] not in (1, 3):
        raise ValueError(f"images: expected shape (B, W, W, 1 or 3), got {shape}")


_ORDERS = ("raster", "permuted", "bitreversal")


def reading_order(order: str, L: int) -> Tensor:
    """Return which pixel is read at each step.

    Args:
        order: "raster", "permuted" or "bitreversal".
        L: how many pixels there are.

    Returns:
        (L,) int64, a permutation of 0 ... L - 1; always the same.

    Raises:
        TypeError: L is not an integer.
        ValueError: order is unknown, or L < 1.

    Source: Gu et al. 2022 (official code); book/data.md.
    """
    check_choice("order", order, _ORDERS)
    L = check_int("L", L)
    if order == "permuted":
        drawn = np.random.RandomState(92916).permutation(L)
        return torch.from_numpy(drawn.astype(np.int64))
    if order == "raster":
        return torch.arange(L)
    m = (L - 1).bit_length()
    digits = (torch.arange(2**m)[:, None] >> torch.arange(m)) & 1  # (2^m, m)
    reverse = (digits << torch.arange(m).flip(0)).sum(1)
    return reverse[reverse < L]


class Batch(NamedTuple):
    """Some examples of a data set, drawn together.

    Attributes:
        u: (B, L, channels) float32 sequences; zero where an example has ended.
        target: (B,) int64 labels, or (B, horizon, channels) values to come.
        lengths: (B,) int64, how long each example is; None where all have L.

    Source: book/data.md.
    """

    u: Tensor
    target: Tensor
    lengths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SequenceData:
    """A data set that is read as sequences: what all kinds have in common.

    Attributes:
        name: one of NAMES.
        title: what to call it in a table; says so if it is not official.
        classes: what label 0, 1, ... stands for; empty in forecasting.
        length: the length L of a sequence, in steps.
        mean, std: (channels,) over the training set, in the data's unit.
        labels: for each split, (n,) int64; empty in forecasting.

    Source: book/data.md.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    length: int
    mean: Tensor
    std: Tensor
    labels: dict[str, Tensor] = field(repr=False)

    @property
    def task(self) -> str:
        """What is to be predicted: "classify" or "forecast"."""
        return "classify" if self.classes else "forecast"

    @property
    def channels(self) -> int:
        """How many numbers each step of a sequence holds."""
        return len(self.mean)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits: "train", "test", some "validation"."""
        return tuple(self._index())

    def count(self, split: str) -> int:
        """How many examples a split has."""
        check_choice("split", split, self.splits)
        return len(self._index()[split])

    def batch(self, split: str, index: Tensor) -> Batch:
        """Return the examples of a split that index (B,) numbers."""
        _check_index(index, self.count(split))
        return self._batch(split, index)

    def to(self, device: torch.device | str) -> "SequenceData":
        """Return the same data set on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: _on(v, device) for k, v in values.items()})

    def _index(self) -> dict[str, Tensor]:
        return self.labels  # or whatever has one entry for each example

    def _batch(self, split: str, index: Tensor) -> Batch:
        raise NotImplementedError("each kind of data set reads its own")


def _on(value: object, device: torch.device | str) -> object:
    """Move a tensor, or a dictionary of tensors, to a device."""
    if isinstance(value, dict):
        return {k: _on(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _check_index(index: Tensor, n: int) -> None:
    """Refuse what does not number some of n examples."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = type(index).__name__
        kind = index.dtype if isinstance(index, Tensor) else kind
        raise TypeError(f"index: expected a tensor of int64, got {kind}")
    if index.ndim != 1 or not len(index):
        shape = tuple(index.shape)
        raise ValueError(f"index: expected shape (B,), got {shape}")
    low, high = index.aminmax()
    if low < 0 or high >= n:
        raise ValueError(
            f"index: expected integers in 0 ... {n - 1}, got {low} to {high}"
        )


@dataclass(frozen=True, eq=False)
class ImageData(SequenceData):
    """Labelled images that are read as sequences.

    Attributes:
        images: for each split, (n, W, W, channels) uint8.
        gray: whether colours become grey levels.
        size: pixels a side of an image when it is read.
        steps: (L,) int64, which pixel is read at each step.
        order: "raster", "permuted" or "bitreversal".

    Source: book/data.md.
    """

    images: dict[str, Tensor] = field(repr=False)
    gray: bool
    size: int
    steps: Tensor = field(repr=False)
    order: str

    def pictures(self, u: Tensor) -> Tensor:
        """Undo batch: images (B, size, size, channels) between 0 and 1."""
        if self.order != "raster":
            u = u[:, self.steps.argsort()]
        levels = (u * self.std + self.mean) / self.images["train"].max()
        return levels.unflatten(1, (self.size, self.size)).clamp(0, 1)

    def _batch(self, split: str, index: Tensor) -> Batch:
        u = raster(self.images[split][index], self.gray, self.size)
        u = (u - self.mean) / self.std
        if self.order != "raster":
            u = u[:, self.steps]
        return Batch(u, self.labels[split][index])


def _moments(images: Tensor, gray: bool, size: int) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, float32."""
    total, squares, count = 0.0, 0.0, 0
    for part in images.split(5000):
        u = raster(part, gray, size).flatten(0, 1)
        total = total + u.sum(0, dtype=torch.float64)
        squares = squares + u.square().sum(0, dtype=torch.float64)
        count += len(u)
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


@dataclass(frozen=True)
class _Options:
    """What load was asked for, apart from the name and the folder."""

    gray: bool = False
    size: int | None = None
    order: str = "raster"
    length: int | None = None
    horizon: int = 96
    univariate: bool = True
    examples: int | None = None
    seed: int = 0
    workers: int = 1


_APPLY = {  # to which data sets each option applies
    "gray": _IMAGES,
    "size": _IMAGES,
    "order": _IMAGES,
    "length": ("speech", *_ETT, "listops"),
    "horizon": _ETT,
    "univariate": _ETT,
    "examples": _MADE,
    "seed": _MADE,
    "workers": _MADE,
}


def _check_options(name: str, options: _Options) -> None:
    """Refuse options of a wrong kind, or of another data set."""
    check_choice("gray", options.gray, (False, True))
    check_choice("order", options.order, _ORDERS)
    check_choice("univariate", options.univariate, (True, False))
    for option in ("size", "length", "examples"):
        if getattr(options, option) is not None:
            check_int(option, getattr(options, option))
    check_int("horizon", options.horizon)
    if check_int("seed", options.seed, minimum=0) >= 2**32:
        raise ValueError(f"seed: expected less than 2**32, got {options.seed}")
    check_int("workers", options.workers)
    for f in fields(options):
        given = getattr(options, f.name) != f.default
        if given and name not in _APPLY[f.name]:
            raise ValueError(
                f"{f.name}: an option of {', '.join(_APPLY[f.name])}; {name!r} has none"
            )


def load(
    name: str,
    gray: bool = False,
    size: int | None = None,
    folder: str | Path | None = None,
    *,
    order: str = "raster",
    length: int | None = None,
    horizon: int = 96,
    univariate: bool = True,
    examples: int | None = None,
    seed: int = 0,
    workers: int = 1,
) -> SequenceData:
    """Read or make a data set, as sequences.

    Args:
        name: one of NAMES.
        gray: of images: whether colours become grey levels.
        size: of images: average down to so many pixels a side.
        folder: where to look; data_dir() by default.
        order: of images: "raster", "permuted" or "bitreversal".
        length: of speech: cut to so many samples (8000, a second); of ETT:
            hours to look back on (384); of listops: symbols that no
            expression reaches, above 7 (2000).
        horizon: of ETT: hours to forecast.
        univariate: of ETT: the oil temperature alone, or all seven columns.
        examples: of listops, pathfinder: how many to train on; up to a tenth
            as many are made to validate and to test (96,000 and 160,000).
        seed: of listops, pathfinder: from which they are drawn.
        workers: of listops, pathfinder: processes that make them. The
            examples do not depend on it. More than one need a program that
            guards its main part by if __name__ == "__main__".

    Returns:
        The data set, in memory, on the CPU.

    Raises:
        FileNotFoundError: a file is missing; says which, and what to do.
        ModuleNotFoundError: the digits need scikit-learn.
        TypeError: an option is of a wrong kind.
        ValueError: name is unknown, an option has no meaning for it or does
            not fit it, or a file is truncated, too long, or corrupt.

    Source: book/data.md.
    """
    check_choice("name", name, NAMES)
    options = _Options(
        gray, size, order, length, horizon, univariate, examples, seed, workers
    )
    _check_options(name, options)
    return _LOADERS[name](name, folder, options)


def _image_data(
    name: str,
    folder: str | Path | None,
    images: dict[str, Tensor],
    labels: dict[str, Tensor],
    options: _Options,
) -> ImageData:
    """Make a data set of images."""
    W = images["train"].shape[1]
    size = W if options.size is None else options.size
    mean, std = _moments(images["train"], options.gray, size)
    return ImageData(
        name=name,
        title=_title(name, folder),
        classes=_CLASSES.get(name, _DIGITS),
        length=size**2,
        mean=mean,
        std=std,
        labels=labels,
        images=images,
        gray=options.gray,
        size=size,
        steps=reading_order(options.order, size**2),
        order=options.order,
    )


def _load_images(name: str, folder: str | Path | None, options: _Options) -> ImageData:
    """Read a data set of images from its files."""
    readers = {"cifar10": _arrays_cifar10, "mnist": _arrays_mnist}
    arrays = readers.get(name, _arrays_digits)(folder)
    tensors = [torch.from_numpy(np.array(a, order="C")) for a in arrays]
    images = dict(zip(("train", "test"), tensors[0::2], strict=True))
    labels = dict(zip(("train", "test"), tensors[1::2], strict=True))
    labels = {split: y.long() for split, y in labels.items()}
    return _image_data(name, folder, images, labels, options)


_LOADERS: dict[str, Callable[..., SequenceData]] = {
    "cifar10": _load_images,
    "mnist": _load_images,
    "digits": _load_images,
}


def read_wav(path: str | Path) -> np.ndarray:
    """Read a recording of one channel, 16 bits, 8000 samples a second.

    Args:
        path: the file.

    Returns:
        (n,) int16, the samples, at least one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a recording, or shorter than it says.

    Source: Jackson et al. 2018; book/data.md.
    """
    path = Path(path)
    try:
        with wave.open(io.BytesIO(_read(path))) as file:
            kind, n = file.getparams()[:3], file.getnframes()
            content = file.readframes(n)
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{path}: expected a WAV file, found a broken one: {error}"
        ) from error
    if kind != (1, 2, 8000):
        raise ValueError(
            f"{path}: expected 1 channel of 2 bytes at 8000 Hz, "
            f"found {kind[0]} of {kind[1]} at {kind[2]}"
        )
    if not n or len(content) != 2 * n:
        raise ValueError(
            f"{path}: expected {2 * n or 2} bytes of sound, "
            f"found {len(content)}; delete it and download it again"
        )
    return np.frombuffer(content, "<i2")


@dataclass(frozen=True, eq=False)
class SoundData(SequenceData):
    """Labelled recordings of different lengths.

    Attributes:
        samples: for each split, all its recordings end to end, int16.
        starts: for each split, (n,) int64, where each begins.
        lengths: for each split, (n,) int64, how long each is when read.

    Source: book/data.md.
    """

    samples: dict[str, Tensor] = field(repr=False)
    starts: dict[str, Tensor] = field(repr=False)
    lengths: dict[str, Tensor] = field(repr=False)

    def _batch(self, split: str, index: Tensor) -> Batch:
        samples, n = self.samples[split], self.lengths[split][index]
        at = torch.arange(self.length, device=samples.device)
        inside = at < n[:, None]  # (B, L)
        at = self.starts[split][index][:, None] + at
        u = samples[at.clamp(max=len(samples) - 1)].float()
        u = (u - self.mean) / self.std * inside
        return Batch(u[..., None], self.labels[split][index], n)


def _load_speech(name: str, folder: str | Path | None, options: _Options) -> SoundData:
    """Read the spoken digits."""
    L = 8000 if options.length is None else options.length
    samples, starts, lengths, labels = {}, {}, {}, {}
    paths = _paths(name, folder)
    for split, test in (("train", False), ("test", True)):
        files = [f for f in paths if (int(f[:-4].split("_")[2]) < 5) == test]
        sounds = [read_wav(paths[f]) for f in files]
        sizes = torch.tensor([len(s) for s in sounds])
        samples[split] = torch.from_numpy(np.concatenate(sounds))
        starts[split] = sizes.cumsum(0) - sizes
        lengths[split] = sizes.clamp(max=L)
        labels[split] = torch.tensor([int(f[0]) for f in files])
    std, mean = torch.std_mean(samples["train"].double(), correction=0)
    std = torch.where(std > 0, std, 1.0)
    return SoundData(
        name,
        _title(name, folder),
        _DIGITS,
        L,
        mean[None].float(),
        std[None].float(),
        labels,
        samples,
        starts,
        lengths,
    )


_LOADERS["speech"] = _load_speech

_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
_HOURS = 17_420  # rows in each file
_MONTH = 30 * 24  # hours


def read_ett(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of hourly loads and oil temperatures.

    Args:
        path: ETTh1.csv or ETTh2.csv.

    Returns:
        The times (17420,) datetime64, an hour apart, and the values
        (17420, 7) float64: HUFL, HULL, MUFL, MULL, LUFL, LULL, OT.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its columns, its number of rows or its times are others,
            or a value is not a finite number.

    Source: Zhou et al. 2021; book/data.md.
    """
    path = Path(path)
    try:
        head, *lines = _read(path).decode().split("\n")
        rows = [line.rstrip("\r").split(",") for line in lines[:-1]]
        times = np.array([row[0] for row in rows], dtype="datetime64[s]")
        values = np.array([row[1:] for row in rows], dtype=np.float64)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a time and 7 numbers a line: {error}"
        ) from error
    _check_ett(path, head.strip(), times, values, lines[-1:] == [""])
    return times, values


def _check_ett(
    path: Path, head: str, times: np.ndarray, values: np.ndarray, whole: bool
) -> None:
    """Refuse other columns, a missing row, a gap in time, or NaN."""
    columns = ",".join(("date", *_COLUMNS))
    if head != columns:
        raise ValueError(f"{path}: expected columns {columns}, found {head!r}")
    if not whole or values.shape != (_HOURS, len(_COLUMNS)):
        raise ValueError(
            f"{path}: expected {_HOURS} whole rows of {len(_COLUMNS)} "
            f"numbers, found {len(values)}; delete it and download it again"
        )
    bad = np.flatnonzero(np.diff(times) != np.timedelta64(3600, "s"))
    if bad.size:
        raise ValueError(f"{path}: expected an hour after {times[bad[0]]}")
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0, 0])
        raise ValueError(f"{path}: expected finite numbers, row {row} has not")


@dataclass(frozen=True, eq=False)
class WindowData(SequenceData):
    """Windows of a series of which the continuation is to be forecast.

    Attributes:
        values: (T, channels) float32, the whole series, normalised.
        starts: for each split, (n,) int64, where each window begins.
        horizon: how many steps are to be forecast.
        columns: the name of each channel.

    Source: book/data.md.
    """

    values: Tensor = field(repr=False)
    starts: dict[str, Tensor] = field(repr=False)
    horizon: int
    columns: tuple[str, ...]

    def _index(self) -> dict[str, Tensor]:
        return self.starts

    def _batch(self, split: str, index: Tensor) -> Batch:
        first = self.starts[split][index][:, None]
        steps = torch.arange(self.length + self.horizon, device=first.device)
        window = self.values[first + steps]  # (B, L + horizon, channels)
        return Batch(window[:, : self.length], window[:, self.length :])


def _window_starts(L: int, horizon: int) -> dict[str, Tensor]:
    """Return where the windows of each split begin."""
    starts, begin = {}, L  # no target before hour L
    for split, month in (("train", 12), ("validation", 16), ("test", 20)):
        end = month * _MONTH
        if end - horizon < begin:
            raise ValueError(
                f"length, horizon: expected windows that fit into the {split} "
                f"split, got {L} and {horizon} hours"
            )
        starts[split] = torch.arange(begin - L, end - horizon - L + 1)
        begin = end
    return starts


def _load_ett(name: str, folder: str | Path | None, options: _Options) -> WindowData:
    """Read a transformer's hours."""
    L = 384 if options.length is None else options.length
    starts = _window_starts(L, options.horizon)
    (path,) = _paths(name, folder).values()
    _, values = read_ett(path)
    kept = slice(-1, None) if options.univariate else slice(None)
    values, columns = values[:, kept], _COLUMNS[kept]
    train = values[: 12 * _MONTH]
    mean, std = train.mean(0), train.std(0)
    std[std == 0] = 1.0
    tensors = [torch.from_numpy(x).float() for x in (mean, std, (values - mean) / std)]
    return WindowData(
        name,
        _title(name, folder),
        (),
        L,
        tensors[0],
        tensors[1],
        {},
        tensors[2],
        starts,
        options.horizon,
        columns,
    )


_LOADERS |= {"etth1": _load_ett, "etth2": _load_ett}

#: The symbols of ListOps; their places are their numbers.
LISTOPS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")

_END = LISTOPS.index("]")


def _median(values: list[int]) -> int:
    """Return the median, rounded down."""
    values, half = sorted(values), len(values) // 2
    return (values[half] + values[-half - 1]) // 2


_RULES = {10: min, 11: max, 12: _median, 13: lambda values: sum(values) % 10}


def evaluate_listops(symbols: Sequence[int]) -> int:
    """Return the value of an expression, exactly.

    Args:
        symbols: the numbers of its symbols, in reading order.

    Returns:
        A digit, 0 to 9.

    Raises:
        ValueError: it is not one whole expression; says where it fails.

    Source: Nangia and Bowman 2018; book/data.md.
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

    Source: Tay et al. 2021; book/data.md.
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
_MOST = {"listops": (96_000, 2000), "pathfinder": (160_000, 20_000)}


def _part(draw: Callable, seed: int, keys: list[tuple[int, int]]) -> list:
    """Make the examples that have these splits and numbers."""
    return [draw(seed, split, number) for split, number in keys]


def _made(name: str, draw: Callable, options: _Options) -> dict[str, list]:
    """Make all splits; how many processes do it makes no difference."""
    most, held = _MOST[name]
    train = most if options.examples is None else options.examples
    held = min(held, math.ceil(train / 10))
    counts = dict(zip(_SPLITS, (train, held, held), strict=True))
    keys = [(s, k) for s, n in enumerate(counts.values()) for k in range(n)]
    make = partial(_part, draw, options.seed)
    if options.workers == 1:
        examples = iter(make(keys))
    else:
        parts = [keys[i : i + 250] for i in range(0, len(keys), 250)]
        context = get_context("spawn")
        with ProcessPoolExecutor(options.workers, context) as pool:
            done = list(pool.map(make, parts))
        examples = (example for part in done for example in part)
    return {s: [next(examples) for _ in range(n)] for s, n in counts.items()}


@dataclass(frozen=True, eq=False)
class SymbolData(SequenceData):
    """Labelled sequences of symbols, of different lengths.

    Attributes:
        symbols: for each split, (n, L) uint8; beyond an example's end, the
            number of channels, which is no symbol.
        lengths: for each split, (n,) int64.

    Source: book/data.md.
    """

    symbols: dict[str, Tensor] = field(repr=False)
    lengths: dict[str, Tensor] = field(repr=False)

    def _batch(self, split: str, index: Tensor) -> Batch:
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


def _load_listops(
    name: str, folder: str | Path | None, options: _Options
) -> SymbolData:
    """Make the nested lists."""
    L = 2000 if options.length is None else options.length
    made = _made(name, partial(_listops_example, L), options)
    symbols, lengths, labels = {}, {}, {}
    for split, examples in made.items():
        end = bytes([len(LISTOPS)])
        padded = b"".join(s.ljust(L, end) for s, _ in examples)
        array = np.frombuffer(padded, np.uint8).reshape(-1, L)
        symbols[split] = torch.from_numpy(array.copy())
        lengths[split] = torch.tensor([len(s) for s, _ in examples])
        labels[split] = torch.tensor([value for _, value in examples])
    mean, std = torch.zeros(len(LISTOPS)), torch.ones(len(LISTOPS))
    return SymbolData(
        name,
        _title(name, folder),
        _DIGITS,
        L,
        mean,
        std,
        labels,
        symbols,
        lengths,
    )


_LOADERS["listops"] = _load_listops

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


def _near(distance: np.ndarray, dots: Sequence[complex]) -> np.ndarray:
    """Return the distance to curves, or to places for dots, if that is less."""
    return np.minimum(distance, abs(_PIXELS - dots).min(axis=1) - _DOT)


def _two_curves(
    rng: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw curves a and b, and the distance of each pixel to all curves."""
    b = None
    while b is None:
        a = _place(rng, 9, np.full(_SIDE**2, np.inf))
        if a is None:
            continue
        distance, dots = _distance(a), a[[0, -1]]
        around = a[0] + abs(a[-1] - a[0]) * np.exp(2j * np.pi * rng.rand(64))
        b = _place(rng, 9, _near(distance, dots), around)
        if b is not None and abs(b[0] - a).min() < _ROOM + _DOT:
            b = None
    distance, dots = np.minimum(distance, _distance(b)), [*dots, b[0]]
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

    Source: after Linsley et al. 2018; book/data.md.
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


def _load_pathfinder(
    name: str, folder: str | Path | None, options: _Options
) -> ImageData:
    """Make the images of curves."""
    check_choice("gray", options.gray, (False,))
    made = _made(name, _pathfinder_example, options)
    images = {
        split: torch.from_numpy(np.stack([image for image, _ in examples]))
        for split, examples in made.items()
    }
    labels = {
        split: torch.tensor([label for _, label in examples])
        for split, examples in made.items()
    }
    images = {split: x[..., None] for split, x in images.items()}
    return _image_data(name, folder, images, labels, options)


_LOADERS["pathfinder"] = _load_pathfinder

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
_SPEECH_URL = (
    "https://github.com/Jakobovski/free-spoken-digit-dataset"
    "/archive/refs/tags/v1.0.10.tar.gz"
)
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"
_ETT_MD5 = {
    "ETTh1.csv": "8381763947c85f4be6ac456c508460d6",
    "ETTh2.csv": "51a229a3fc13579dd939364fefe9c7ab",
}


def _receive(url: str, part: Path, progress: bool) -> None:
    """Append to a file what it still lacks of what is at url."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"User-Agent": "s4mini"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        answer = urlopen(request, timeout=60)
    except HTTPError as error:
        if have and error.code == 416:  # nothing is missing
            return
        raise
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        have = file.tell()
        size = int(answer.headers.get("Content-Length", 0)) + have
        bar = _needs("tqdm").tqdm(
            total=size or None,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=part.name[1:-5],
            disable=not progress,
        )
        with bar:
            while block := answer.read(2**16):
                bar.update(file.write(block))
        if file.tell() < size:
            raise OSError(
                f"{url}: the connection broke after {file.tell()} of {size} "
                "bytes; the same command goes on from there"
            )


def _fetch(url: str, target: Path, md5: str | None, progress: bool) -> None:
    """Download a file, whole and with the right checksum, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        _receive(url, part, progress)
    except HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error
    if md5 is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            part.unlink()
            raise ValueError(f"{url}: expected checksum {md5}, found {found}")
    os.replace(part, target)


_BROKEN = tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error


def _unpack(archive: Path, names: list[str], folder: Path) -> None:
    """Take these members of a tar archive into a folder."""
    missing = set(names)
    try:
        with gzip.open(archive) as file:  # its own checksum stands at its end
            while file.read(2**20):
                pass
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in missing:
                    content = tar.extractfile(member).read()
                    (folder / name).write_bytes(content)
                    missing.remove(name)
    except _BROKEN as error:
        raise ValueError(f"{archive.name}: a broken archive: {error}") from error
    if missing:
        raise ValueError(f"{archive.name}: has no file {min(missing)}")


def _fetch_archive(name: str, root: Path, progress: bool) -> None:
    """Download and unpack CIFAR-10 or the spoken digits."""
    url, md5 = (_CIFAR10_URL, _CIFAR10_MD5)
    if name == "speech":
        url, md5 = (_SPEECH_URL, None)
    root.mkdir(parents=True, exist_ok=True)
    archive = root / f"{name}.tar.gz"
    _fetch(url, archive, md5, progress)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".part-") as part:
            _unpack(archive, _files(name), Path(part))
            for path in Path(part).iterdir() if name == "speech" else ():
                read_wav(path)
            for file in _files(name):
                os.replace(Path(part, file), root / file)
    finally:
        archive.unlink()


def download(
    name: str, folder: str | Path | None = None, progress: bool = True
) -> Path:
    """Fetch a data set, unless it is there already.

    Args:
        name: one of NAMES. Nothing is fetched for those that are made.
        folder: where to put it; data_dir() by default.
        progress: whether to show a progress bar.

    Returns:
        The folder in which load will find it.

    Raises:
        ModuleNotFoundError: tqdm is missing.
        OSError: the network or the disk fails; try again to go on.
        ValueError: name is unknown, or what arrived has a wrong checksum or
            is not what it should be.

    Source: book/data.md.
    """
    folder = Path(folder or data_dir())
    if available(name, folder):
        return folder
    _needs("tqdm")
    root = folder / _FOLDERS[name]
    if name in ("cifar10", "speech"):
        _fetch_archive(name, root, progress)
        return folder
    url, sums = (_MNIST_URL, _MNIST_MD5)
    if name in _ETT:
        url, sums = _ETT_URL, {f: _ETT_MD5[f] for f in _files(name)}
    for file, md5 in sums.items():
        if not (root / file).exists():
            _fetch(url + file, root / file, md5, progress)
    return folder


def _main(argv: list[str] | None = None) -> int:
    """Download data sets from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m s4mini.data",
        description="Download the data sets that the book trains on.",
    )
    parser.add_argument(
        "name",
        nargs="*",
        help=f"any of {', '.join(NAMES)} (default: all)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=data_dir(),
        help="where to put them (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    for name in options.name or NAMES:
        try:
            download(name, options.folder)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"{name}: ready in {options.folder}")
    return 0


# A notebook's __name__ is __main__ too, but a notebook has no __file__.
if __name__ == "__main__" and "__file__" in globals():
    raise SystemExit(_main())
