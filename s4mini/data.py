"""Data as sequences.

What a data set is to this book: sequences, targets and lengths; where its files lie,
how they are fetched whole or not at all, and how one knows that they are the official
ones.

Tangled from book/data.md.
"""

import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from http.client import HTTPException
from importlib import import_module
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import IO, Any, NamedTuple, Self, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor
from torch.utils.data import Dataset

from s4mini.checks import check_choice, check_device, check_path

__all__ = [
    "Batch",
    "SequenceData",
    "TensorData",
    "from_tensors",
    "Split",
    "whole",
    "data_dir",
    "Source",
    "contents",
    "HOMES",
    "NAMES",
    "SOURCES",
    "source",
    "available",
    "options_of",
    "load",
    "official",
    "needs",
    "download",
]


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


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceData:
    """A data set that is read as sequences: what all kinds have in common.

    Attributes:
        name: by which it is loaded.
        title: what to call it in a table; says so if it is not official.
        classes: what label 0, 1, ... stands for; empty in forecasting.
        length: the length L of a sequence, in steps.
        mean, std: (channels,) over the training set, in the data's unit.
        labels: for each split, (n,) int64; empty in forecasting.
        horizon: how many steps are to be forecast; None: labels are.

    Source: book/data.md.
    """

    name: str = ""
    title: str = ""
    classes: tuple[str, ...] = ()
    length: int
    mean: Tensor
    std: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict, repr=False)
    horizon: int | None = None

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
        return tuple(self.index())

    def count(self, split: str) -> int:
        """How many examples a split has."""
        check_choice("split", split, self.splits)
        return len(self.index()[split])

    def batch(self, split: str, index: Tensor) -> Batch:
        """Return the examples of a split that index (B,) numbers."""
        _check_index(index, self.count(split))
        return self.draw(split, index)

    def to(self, device: torch.device | str) -> Self:
        """Return the same data set on another device."""
        check_device("device", device)
        values = {f.name: _on(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **values)

    def index(self) -> dict[str, Tensor]:
        """Return, for each split, something with an entry for each example."""
        return self.labels

    def draw(self, split: str, index: Tensor) -> Batch:
        """Make a batch; each kind of data set has its own way."""
        raise NotImplementedError("each kind of data set reads its own")


def _on(value: Any, device: torch.device | str) -> Any:
    """Move a tensor, or those of a dictionary or a tuple, to a device."""
    if isinstance(value, dict):
        return {k: _on(v, device) for k, v in value.items()}
    if isinstance(value, Batch):
        return Batch(*(_on(v, device) for v in value))
    return value.to(device) if isinstance(value, Tensor) else value


def _check_index(index: Tensor, n: int) -> None:
    """Refuse what does not number some of n examples."""
    if not isinstance(index, Tensor) or index.dtype != torch.int64:
        kind = getattr(index, "dtype", type(index).__name__)
        raise TypeError(f"index: expected a tensor of int64, got {kind}")
    if index.ndim != 1 or not len(index):
        shape = tuple(index.shape)
        raise ValueError(f"index: expected shape (B,), got {shape}")
    low, high = index.aminmax()
    if low < 0 or high >= n:
        raise ValueError(
            f"index: expected integers in 0 ... {n - 1}, got {low} to {high}"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class TensorData(SequenceData):
    """A data set of ready tensors.

    Attributes:
        tensors: for each split, all its examples in one batch.

    Source: book/data.md.
    """

    tensors: dict[str, Batch] = field(repr=False)

    def index(self) -> dict[str, Tensor]:
        return {split: u for split, (u, *_) in self.tensors.items()}

    def draw(self, split: str, index: Tensor) -> Batch:
        u, target, n = self.tensors[split]
        return Batch(u[index], target[index], None if n is None else n[index])


def from_tensors(
    title: str, *, train: tuple, test: tuple, validation: tuple | None = None
) -> TensorData:
    """Make a data set of tensors.

    Args:
        title: what to call it in a table.
        train: (u, target) or (u, target, lengths): u (n, L, channels)
            floating; target (n,) int64 labels from 0 on, or
            (n, horizon, channels) values; lengths (n,) from 1 to L.
        test: in the same form.
        validation: in the same form; None: a share of train is held out.

    Returns:
        The data set. Nothing is normalised: u stays as it is.

    Raises:
        TypeError: a value is not a tensor of the kind wanted.
        ValueError: sizes differ, a value is not finite, or a length or label
            out of range.

    Source: book/data.md.
    """
    given = {"train": train, "validation": validation, "test": test}
    if validation is None:
        del given["validation"]
    splits = {split: _as_batch(split, parts) for split, parts in given.items()}
    for split, batch in splits.items():
        _check_tensors(split, *batch, splits["train"].u.shape[1:])
        first = splits["train"]
        for name, ours, theirs in (
            ("u", batch.u, first.u),
            ("target", batch.target, first.target),
        ):
            kinds = [(x.dtype, *x.shape[1:]) for x in (theirs, ours)]
            if kinds[0] != kinds[1]:
                raise ValueError(
                    f"{split}: expected {name} of {kinds[0]} for each example, "
                    f"as train has, got {kinds[1]}"
                )
    u, target, _ = splits["train"]
    classes: tuple[str, ...] = ()
    if target.ndim == 1:
        most = max(int(part.target.max()) for part in splits.values())
        classes = tuple(str(k) for k in range(most + 1))
    channels = u.shape[-1]
    return TensorData(
        name="own",
        title=title,
        classes=classes,
        length=u.shape[1],
        mean=torch.zeros(channels),
        std=torch.ones(channels),
        labels={s: p.target for s, p in splits.items()} if classes else {},
        horizon=None if classes else target.shape[1],
        tensors=splits,
    )


def _as_batch(split: str, parts: tuple | None) -> Batch:
    """Refuse anything but two or three tensors."""
    if isinstance(parts, tuple | list) and len(parts) in (2, 3):
        batch = Batch(*parts)
        if all(isinstance(x, Tensor) for x in batch if x is not None):
            return batch
        got = ", ".join(type(x).__name__ for x in parts)
    else:
        got = type(parts).__name__
    raise TypeError(
        f"{split}: expected tensors (u, target) or (u, target, lengths), got {got}"
    )


def _check_tensors(
    split: str,
    u: Tensor,
    target: Tensor,
    lengths: Tensor | None,
    shape: tuple[int, ...],
) -> None:
    """Refuse tensors that are no split of a data set."""
    if not u.is_floating_point() or u.ndim != 3 or u.shape[1:] != shape:
        raise ValueError(
            f"{split}: expected floating u (n, L, channels) with "
            f"{tuple(shape)} as train has, got {u.dtype} {tuple(u.shape)}"
        )
    counts = len(u), len(target), len(u if lengths is None else lengths)
    if len(set(counts)) > 1 or not len(u):
        raise ValueError(f"{split}: expected equal counts > 0, got {counts}")
    labels = target.ndim == 1 and target.dtype == torch.int64
    values = target.ndim == 3 and target.is_floating_point()
    if not labels and not values:
        raise ValueError(
            f"{split}: expected int64 labels (n,) or floating values (n, "
            f"horizon, channels), got {target.dtype} {tuple(target.shape)}"
        )
    if not u.isfinite().all() or (values and not target.isfinite().all()):
        raise ValueError(f"{split}: expected finite numbers, got NaN or inf")
    if labels and target.min() < 0:
        raise ValueError(f"{split}: expected labels >= 0, got {target.min()}")
    if lengths is not None and not 1 <= lengths.min() <= lengths.max() <= shape[0]:
        raise ValueError(f"{split}: expected lengths from 1 to {shape[0]}")


class Split(Dataset):
    """Examples of one split, as torch.utils.data knows them.

    Args:
        data: the data set.
        split: such as "train".
        index: (n,) which examples of it; None: all.

    Raises:
        ValueError: the split is unknown, or an index out of range.

    Source: book/data.md.
    """

    def __init__(
        self, data: SequenceData, split: str, index: Tensor | None = None
    ) -> None:
        index = torch.arange(data.count(split)) if index is None else index
        _check_index(index, data.count(split))
        self.data, self.split, self.index = data, split, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple:
        """Return one example: u (L, channels), its target, and its length."""
        parts = self.__getitems__([number])
        return tuple(x[0] for x in parts if x is not None)

    def __getitems__(self, numbers: list[int]) -> Batch:
        """Return a batch; DataLoader asks for it with collate_fn=whole."""
        return self.data.draw(self.split, self.index[torch.as_tensor(numbers)])


def whole(batch: Any) -> Any:
    """Leave a batch as it was drawn: what DataLoader calls collate_fn.

    Source: book/data.md.
    """
    return batch


def _root(folder: str | Path | None) -> Path:
    """Return the folder that was named, or the usual one."""
    return data_dir() if folder is None else check_path("folder", folder)


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


@dataclass(frozen=True)
class Source:
    """Where a data set comes from.

    Attributes:
        title: what its authors call it.
        read: makes a SequenceData of the paths of the files, by name, and of
            the options that this data set has.
        folder: in which the files lie, within data_dir().
        files: their names, unpacked; none where nothing is read from files.
        url: where they are published: an archive, or, with {} for the name
            of a file, the files themselves.
        digests: SHA-1 of each file; or, under "all", of all one by one.
        otherwise: what to call files that have other checksums, or a set
            that was made here.

    Source: book/data.md.
    """

    title: str
    read: Callable[..., SequenceData]
    folder: str = ""
    files: tuple[str, ...] = ()
    url: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = ""

    def paths(self, folder: str | Path | None = None) -> dict[str, Path]:
        """Return where each file is, packed by gzip or not."""
        root = _root(folder) / self.folder
        packed = {f: root / f"{f}.gz" for f in self.files}
        return {f: p if p.exists() else root / f for f, p in packed.items()}

    def official(self, paths: Mapping[str, Path]) -> bool:
        """Say whether these files, unpacked, have the published checksums."""
        if not self.digests:
            return not self.otherwise
        found, every = {}, hashlib.sha1()
        for file, path in paths.items():
            content = contents(path)
            every.update(content)
            found[file] = hashlib.sha1(content).hexdigest()
        found["all"] = every.hexdigest()
        return all(found[file] == sum for file, sum in self.digests.items())


def contents(path: str | Path, most: int = 2**28) -> bytes:
    """Return the content of a file, unpacked if its name ends in .gz.

    Args:
        path: the file.
        most: bytes that it can hold by its format.

    Returns:
        All of it.

    Raises:
        FileNotFoundError: there is no such file; says what to do.
        ValueError: it is a broken gzip file, or holds more.

    Source: book/data.md.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: not found; `s4mini data` downloads what the book "
            "trains on, S4MINI_DATA says where to look"
        )
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read(most + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, found a broken one: {error}"
        ) from error
    if len(content) > most:
        raise ValueError(f"{path}: expected at most {most} bytes, found more")
    return content


#: In which module the record of which data set stands.
HOMES = {
    "cifar10": "images:CIFAR10",
    "mnist": "images:MNIST",
    "digits": "images:DIGITS",
    "speech": "speech:SPEECH",
    "etth1": "forecast:ETTH1",
    "etth2": "forecast:ETTH2",
    "listops": "lra:LISTOPS",
    "pathfinder": "lra:PATHFINDER",
}

#: The data sets of this book, by name.
NAMES = tuple(HOMES)

#: Records that you add; one of a known name goes before the book's.
SOURCES: dict[str, Source] = {}


def source(name: str) -> Source:
    """Return the record of a data set.

    Args:
        name: one of NAMES, or what you put into SOURCES.

    Returns:
        Its record.

    Raises:
        ValueError: there is none of that name; names the nearest.

    Source: book/data.md.
    """
    check_choice("name", name, tuple({**HOMES, **SOURCES}))
    if name in SOURCES:
        return SOURCES[name]
    return resolve_name(f"s4mini.{HOMES[name]}")


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
    return all(p.exists() for p in source(name).paths(folder).values())


def options_of(name: str) -> tuple[str, ...]:
    """Tell which options a data set has.

    Args:
        name: one of NAMES.

    Returns:
        Their names, as load takes them.

    Raises:
        ValueError: name is unknown.

    Source: book/data.md.
    """
    return tuple(signature(source(name).read).parameters)[1:]


def load(
    name: str, *, folder: str | Path | None = None, **options: object
) -> SequenceData:
    """Read or make a data set, as sequences.

    Args:
        name: one of NAMES.
        folder: where to look; data_dir() by default.
        options: of this data set, as options_of(name) lists them and
            help(source(name).read) explains; images have gray, size and
            order, for example.

    Returns:
        The data set, in memory, on the CPU.

    Raises:
        FileNotFoundError: a file is missing; says which, and what to do.
        ModuleNotFoundError: the digits need scikit-learn.
        TypeError: an option is of a wrong kind.
        ValueError: name is unknown, it has no such option, a value does not
            fit, or a file is truncated, too long, or corrupt.

    Source: book/data.md.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            near = get_close_matches(option, known, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{option}: {name} has no such option, only "
                f"{', '.join(known) or 'none'}{meant}"
            )
    found = source(name)
    paths = found.paths(folder)
    data = found.read(paths, **options)
    remark = "" if found.official(paths) else f" ({found.otherwise})"
    return replace(data, name=name, title=f"{found.title}{remark}")


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
    found = source(name)
    return found.official(found.paths(folder))


def needs(module: str) -> ModuleType:
    """Import an optional module, or say how to get it.

    Args:
        module: its name.

    Returns:
        The module.

    Raises:
        ModuleNotFoundError: it is not installed; says with which extra.

    Source: book/data.md.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'this needs {module}: pip install "s4mini[train]"', name=module
        ) from error


def _open(url: str, have: int):
    """Ask for what follows the first bytes; None if nothing does."""
    request = Request(url, headers={"User-Agent": "s4mini"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        return urlopen(request, timeout=60)
    except HTTPError as error:
        if have and error.code == 416:  # nothing is missing
            return None
        raise OSError(f"{url}: the server says {error}") from error
    except (URLError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OSError(f"{url}: cannot be reached: {reason}") from error


def _receive(url: str, part: Path, progress: bool) -> None:
    """Append to a file what it still lacks of what is at url."""
    answer = _open(url, part.stat().st_size if part.exists() else 0)
    if answer is None:
        return
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        have = file.tell()
        size = int(answer.headers.get("Content-Length", 0)) + have
        bar = needs("tqdm").tqdm(
            total=size or None,
            initial=have,
            unit="B",
            unit_scale=True,
            desc=part.name[1:-5],
            disable=not progress,
        )
        with bar:
            try:
                while block := answer.read(2**16):
                    bar.update(file.write(block))
            except HTTPException as error:
                raise OSError(f"{url}: {type(error).__name__}") from error
        if file.tell() < size:
            raise OSError(
                f"{url}: the connection broke after {file.tell()} of {size} "
                "bytes; the same command goes on from there"
            )


def _unpack(archive: Path, names: tuple[str, ...], folder: Path) -> None:
    """Take these members of a tar archive into a folder."""
    missing = set(names)
    try:
        with gzip.open(archive) as file:  # its own checksum stands at its end
            for _ in range(2**11):  # 2 GB: none is larger
                if not file.read(2**20):
                    break
            else:
                raise ValueError(f"{archive.name}: larger than it can be")
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in missing:
                    if member.size > 2**28:
                        raise ValueError(f"{archive.name}: {name} is too large")
                    content = cast(IO[bytes], tar.extractfile(member))  # of a file
                    (folder / name).write_bytes(content.read())
                    missing.remove(name)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{archive.name}: a broken archive: {error}") from error
    if missing:
        raise ValueError(f"{archive.name}: has no file {min(missing)}")


def _fetch(found: Source, root: Path, made: Path, progress: bool) -> None:
    """Put whole files into the folder made, from their site."""
    if "{}" not in found.url:
        part = root / f".{Path(found.url).name}.part"
        _receive(found.url, part, progress)
        try:
            _unpack(part, found.files, made)
        finally:
            part.unlink()
        return
    packed = ".gz" if found.url.endswith(".gz") else ""
    for file in found.files:
        part = root / f".{file}{packed}.part"
        _receive(found.url.format(file), part, progress)
        os.replace(part, made / f"{file}{packed}")


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
        ModuleNotFoundError: filelock or tqdm is missing.
        OSError: the network or the disk fails; try again to go on.
        ValueError: name is unknown, or what arrived has a wrong checksum or
            is not what it should be.

    Source: book/data.md.
    """
    folder = _root(folder)
    if available(name, folder):
        return folder
    found, lock = source(name), needs("filelock").FileLock
    root = folder / found.folder
    root.mkdir(parents=True, exist_ok=True)
    with lock(root / f".{name}.lock"):
        for left in root.glob(".new-*"):  # by a process that was killed
            shutil.rmtree(left)
        if not available(name, folder):  # while this one waited
            with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as new:
                _fetch(found, root, Path(new), progress)
                _place(found, Path(new), root)
    return folder


def _place(found: Source, new: Path, root: Path) -> None:
    """Give files their names, if they are the published ones."""
    paths = replace(found, folder="").paths(new)
    if not found.official(paths):
        raise ValueError(
            f"{found.url}: expected checksum {min(found.digests.values())} "
            "and so on, found another: not the published files"
        )
    for path in paths.values():
        os.replace(path, root / path.name)
