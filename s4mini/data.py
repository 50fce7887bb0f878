"""Images as sequences.

How CIFAR-10, MNIST and a set of small digits are fetched, read, checked, and turned
into normalised sequences of pixels.

Tangled from book/data.md.
"""

import argparse
import gzip
import hashlib
import os
import struct
import sys
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

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
    "Batch",
    "SequenceData",
    "load",
    "download",
]

#: The data sets, by name.
NAMES = ("cifar10", "mnist", "digits")

_FOLDERS = {"cifar10": "cifar-10-batches-bin", "mnist": "mnist"}

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
}

_CLASSES = {
    "cifar10": tuple(
        "airplane automobile bird cat deer dog frog horse ship truck".split()
    ),
    "mnist": tuple("0123456789"),
    "digits": tuple("0123456789"),
}


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


def _paths(name: str, folder: str | Path | None) -> dict[str, Path]:
    """Return where each file of a data set is, packed by gzip or not."""
    root = Path(folder or data_dir()) / _FOLDERS[name]
    paths = {}
    for file in _SHA1[name]:
        packed = root / f"{file}.gz"
        paths[file] = packed if packed.exists() else root / file
    return paths


def available(name: str, folder: str | Path | None = None) -> bool:
    """Say whether all files of a data set are there.

    Args:
        name: "cifar10", "mnist" or "digits".
        folder: where to look; data_dir() by default.

    Returns:
        Whether load can find what it needs. The files are not read.

    Raises:
        ValueError: name is unknown.

    Source: book/data.md.
    """
    check_choice("name", name, NAMES)
    if name == "digits":
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
        name: "cifar10", "mnist" or "digits".
        folder: where to look; data_dir() by default.

    Returns:
        Whether every file, unpacked, has its official checksum. Always true
        of the digits, which come with scikit-learn.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: name is unknown, or a file cannot be unpacked.

    Source: book/data.md.
    """
    check_choice("name", name, NAMES)
    if name == "digits":
        return True
    return all(
        hashlib.sha1(_read(path)).hexdigest() == _SHA1[name][file]
        for file, path in _paths(name, folder).items()
    )


_TITLES = {
    "cifar10": "CIFAR-10",
    "mnist": "MNIST",
    "digits": "handwritten digits (scikit-learn)",
}


def _title(name: str, is_official: bool) -> str:
    """Return what a data set is to be called in a table."""
    if is_official:
        return _TITLES[name]
    remark = "not the official files: a recompressed or reordered copy"
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
    """Labelled images that are read as sequences.

    Attributes:
        name: "cifar10", "mnist" or "digits".
        title: what to call it in a table; says so if it is not official.
        classes: what label 0, 1, ... stands for.
        images: "train" and "test", each (n, W, W, channels) uint8.
        labels: "train" and "test", each (n,) int64.
        gray: whether colours become grey levels.
        size: pixels a side of an image when it is read.
        mean, std: (channels,) over the training set, in the pixels' unit.

    Source: book/data.md.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    images: dict[str, Tensor] = field(repr=False)
    labels: dict[str, Tensor] = field(repr=False)
    gray: bool
    size: int
    mean: Tensor
    std: Tensor

    @property
    def task(self) -> str:
        """What is to be predicted: "classify" or "forecast"."""
        return "classify"

    @property
    def channels(self) -> int:
        """How many numbers each step of a sequence holds."""
        return len(self.mean)

    @property
    def length(self) -> int:
        """The length L of a sequence."""
        return self.size**2

    def count(self, split: str) -> int:
        """How many examples a split has."""
        check_choice("split", split, tuple(self.labels))
        return len(self.labels[split])

    def batch(self, split: str, index: Tensor) -> Batch:
        """Return sequences u (B, L, channels) and their labels (B,).

        split is "train" or "test", index a tensor of B integers.
        """
        check_choice("split", split, tuple(self.images))
        _check_index(index, len(self.labels[split]))
        u = raster(self.images[split][index], self.gray, self.size)
        u = (u - self.mean) / self.std
        return Batch(u, self.labels[split][index])

    def pictures(self, u: Tensor) -> Tensor:
        """Undo batch: images (B, size, size, channels) between 0 and 1."""
        levels = (u * self.std + self.mean) / self.images["train"].max()
        return levels.unflatten(1, (self.size, self.size)).clamp(0, 1)

    def to(self, device: torch.device | str) -> "SequenceData":
        """Return the same data set on another device."""
        moved = {k: v.to(device) for k, v in self.images.items()}
        labels = {k: v.to(device) for k, v in self.labels.items()}
        mean, std = self.mean.to(device), self.std.to(device)
        return replace(self, images=moved, labels=labels, mean=mean, std=std)


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


def load(
    name: str,
    gray: bool = False,
    size: int | None = None,
    folder: str | Path | None = None,
) -> SequenceData:
    """Read a data set of images and make sequences of it.

    Args:
        name: "cifar10", "mnist" or "digits".
        gray: whether colours become grey levels.
        size: average the images down to so many pixels a side.
        folder: where to look; data_dir() by default.

    Returns:
        The data set, in memory, on the CPU.

    Raises:
        FileNotFoundError: a file is missing; says which, and what to do.
        ModuleNotFoundError: the digits need scikit-learn.
        ValueError: name is unknown, size does not divide the width, or a file
            is truncated, too long, or mislabelled.

    Source: book/data.md.
    """
    check_choice("name", name, NAMES)
    check_choice("gray", gray, (False, True))
    if size is not None:
        check_int("size", size)
    readers = {"cifar10": _arrays_cifar10, "mnist": _arrays_mnist}
    arrays = readers.get(name, _arrays_digits)(folder)
    tensors = [torch.from_numpy(np.array(a, order="C")) for a in arrays]
    images = dict(zip(("train", "test"), tensors[0::2], strict=True))
    labels = dict(zip(("train", "test"), tensors[1::2], strict=True))
    side = images["train"].shape[1] if size is None else size
    mean, std = _moments(images["train"], gray, side)
    return SequenceData(
        name=name,
        title=_title(name, official(name, folder)),
        classes=_CLASSES[name],
        images=images,
        labels={split: y.long() for split, y in labels.items()},
        gray=gray,
        size=side,
        mean=mean,
        std=std,
    )


_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_MD5 = "md5:c32a1d4ab5d03f1284b67883e8d87530"
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}


def _unpack(archive: Path, names: list[str], folder: Path) -> None:
    """Take these members of a tar archive into a folder, whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        members = {Path(m.name).name: m for m in tar if m.isfile()}
        for name in names:
            if name not in members:
                raise ValueError(f"{archive}: has no file {name}")
            part = folder / f".{name}.part"
            part.write_bytes(tar.extractfile(members[name]).read())
            os.replace(part, folder / name)


def download(
    name: str, folder: str | Path | None = None, progress: bool = True
) -> Path:
    """Fetch a data set, unless it is there already.

    Args:
        name: "cifar10", "mnist" or "digits".
        folder: where to put it; data_dir() by default.
        progress: whether to show a progress bar.

    Returns:
        The folder in which load will find it.

    Raises:
        ModuleNotFoundError: pooch or tqdm is missing.
        OSError: the network or the disk fails.
        ValueError: name is unknown, or what arrived has a wrong checksum.

    Source: book/data.md.
    """
    folder = Path(folder or data_dir())
    if available(name, folder):
        return folder
    pooch, _ = _needs("pooch"), _needs("tqdm")
    root = folder / _FOLDERS[name]
    if name == "mnist":
        for file, md5 in _MNIST_MD5.items():
            pooch.retrieve(_MNIST_URL + file, md5, file, root, progressbar=progress)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
        archive = pooch.retrieve(
            _CIFAR10_URL, _CIFAR10_MD5, "a.tar.gz", part, progressbar=progress
        )
        _unpack(Path(archive), list(_SHA1[name]), root)
    return folder


def _main(argv: list[str] | None = None) -> int:
    """Download data sets from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m s4mini.data",
        description="Download the data sets that the book trains on.",
    )
    parser.add_argument(
        "name", nargs="*", help="cifar10, mnist or digits (default: all)"
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
