"""Saved, whole or not at all.

A file written in one step; weights that carry their meaning with them; and a reader
that believes nothing before it has looked.

Tangled from book/saving.md.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from s4mini.checks import check_path

__all__ = [
    "write_atomically",
    "write_together",
    "WEIGHTS",
    "CONFIG",
    "Savable",
    "saved_class",
]

_COUNTER = count()  # tells the threads of one process apart


def _alive(process: int) -> bool:
    """Say whether a process of this number runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it runs, and is not ours
        return True
    return True


def _remove_stale(path: Path) -> None:
    """Remove what writers that were killed have left beside a file."""
    if os.name != "posix":  # elsewhere signal 0 is a signal
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = re.fullmatch(r".*\.(\d+)-\d+\.tmp", left.name)
        if owner and not _alive(int(owner[1])):
            left.unlink(missing_ok=True)


def _write_beside(path: Path, data: bytes) -> Path:
    """Write data to a new file beside path, down to the disk; name it."""
    _remove_stale(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{next(_COUNTER)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with open(os.open(beside, flags, 0o666), "wb") as file:  # less the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return beside


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file in one step: others see the old content or the new.

    Args:
        path: where to; the folder must be there. A link is followed.
        data: the whole content.

    Raises:
        OSError: it cannot be written; the old file is then untouched.

    Source: book/saving.md.
    """
    path = Path(os.path.realpath(path))
    write_together(path.parent, {path.name: data})


def write_together(folder: str | Path, files: dict[str, bytes]) -> None:
    """Replace files of a folder so that they agree whenever one looks.

    Args:
        folder: where to; it is made if it is not there.
        files: name -> content. The first one is what counts; the others repeat
            parts of it, and may be missing for a moment.

    Raises:
        OSError: a file cannot be written; the old files are then untouched.
        ValueError: a name is not a plain file name, or there is none.

    Source: book/saving.md.
    """
    folder = check_path("folder", folder)
    for name in files:
        if name != Path(name).name or not name:
            raise ValueError(f"files: expected plain names, got {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    beside: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            beside[folder / name] = _write_beside(folder / name, data)
        for copy in [*beside][1:]:
            copy.unlink(missing_ok=True)
        for path in [*beside]:
            os.replace(beside[path], path)
            del beside[path]
    finally:
        for left in beside.values():
            left.unlink(missing_ok=True)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, where that can be asked for."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Savable(nn.Module):
    """A module that can be saved to a folder and loaded from it.

    Source: book/saving.md.
    """

    def arguments(self) -> dict:
        """Return all that decides what the weights mean, as plain values."""
        raise NotImplementedError

    @classmethod
    def shapes(cls, arguments: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Tell the name and shape of each tensor; () is an integer."""
        raise NotImplementedError

    @classmethod
    def blank(cls, arguments: dict) -> Self:
        """Make a module whose tensors will be replaced, whatever they are."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the module to a folder.

        Args:
            folder: where to; it is made if it is not there. A model that is
                there already is replaced in one step; other files stay.

        Raises:
            ModuleNotFoundError: safetensors is missing.
            OSError: a file cannot be written; the old ones are then untouched.
            ValueError: the parameters are not all float32 or all float64, or
                the module is not what its arguments say.
        """
        write_together(folder, _serialised(self))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what save_pretrained has written; no network is asked.

        Args:
            folder: a folder on this machine.

        Returns:
            The module, in evaluation mode, on the CPU.

        Raises:
            FileNotFoundError: the folder, or the file in it, is missing.
            ModuleNotFoundError: safetensors is missing.
            ValueError: it holds another class, or is damaged.
        """
        return _load(cls, check_path("folder", folder))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload the module to the Hugging Face Hub.

        Args:
            repo_id: "owner/name"; it is made if it is not there.
            private: whether others may not see it.

        Returns:
            The address of what was uploaded.

        Raises:
            ModuleNotFoundError: huggingface_hub or safetensors is missing.
        """
        hub = _optional("huggingface_hub")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            hub.create_repo(repo_id, private=private, exist_ok=True)
            done = hub.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(done)


def _optional(name: str) -> ModuleType:
    """Import what only saving, loading and sharing need."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'this needs {name}: pip install "s4mini[train]"', name=name
        ) from error


_PRECISIONS = {torch.float32: "float32", torch.float64: "float64"}
_CODES = {"float32": "F32", "float64": "F64"}


def _shared(module: nn.Module) -> dict[str, str]:
    """Name the parameters that stand in two places: second -> first."""
    first: dict[int, str] = {}
    pairs = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        if (home := first.setdefault(id(value), name)) != name:
            pairs[name] = home
    return pairs


def _precision(module: nn.Module) -> str:
    """Name the one precision of all parameters."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(_PRECISIONS):
        found = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"parameters: expected all float32 or all float64, got {found}"
        )
    return _PRECISIONS[dtypes.pop()]


def _serialised(module: Savable) -> dict[str, bytes]:
    """Return the files of a module, the one that counts first."""
    note = {
        "class": type(module).__name__,
        "dtype": _precision(module),
        "arguments": module.arguments(),
        "shared": _shared(module),
    }
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in module.state_dict().items()
        if name not in note["shared"] and not name.endswith("_extra_state")
    }
    header = {
        name: (_code(value), tuple(value.shape)) for name, value in tensors.items()
    }
    _compare(type(module), note, header)
    text = json.dumps(note, indent=2, allow_nan=False)
    notes = {"format": "pt", "s4mini": text, "sha256": _digest(text, tensors)}
    weights = _optional("safetensors.torch").save(tensors, metadata=notes)
    return {WEIGHTS: weights, CONFIG: f"{text}\n".encode()}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """Return the checksum of a note and the tensors that it is about."""
    every = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        every.update(f"\n{name}\n".encode())
        every.update(value.flatten().view(torch.uint8).numpy().data)
    return every.hexdigest()


def _code(value: Tensor) -> str:
    """Name a tensor's kind as safetensors does."""
    name = str(value.dtype).removeprefix("torch.")
    return _CODES.get(name, "I64" if name == "int64" else name)


def _compare(kind: type[Savable], note: dict, header: dict) -> None:
    """Refuse a header that is not that of a module of these arguments."""
    shared, left = dict(note["shared"]), dict(header)
    for name, shape in kind.shapes(note["arguments"]):
        code = "I64" if shape == () else _CODES[note["dtype"]]
        home = shared.get(name, name)
        if home not in header:
            raise ValueError(f"expected a tensor {name}, found none")
        if header[home] != (code, shape):
            found = " of shape ".join(map(str, header[home]))
            raise ValueError(f"{name}: expected {code} of shape {shape}, got {found}")
        left.pop(home, None)
        shared.pop(name, None)
    if left or shared:
        raise ValueError(f"expected no tensor {min(left or shared)}")


def _read_note(path: Path, text: str | None) -> dict:
    """Return the note of a weights file, if it is whole."""
    note = json.loads(text or "null")
    wanted = {"class": str, "dtype": str, "arguments": dict, "shared": dict}
    if not isinstance(note, dict) or set(note) != set(wanted):
        raise ValueError(f"expected a note with {', '.join(wanted)}")
    for key, kind in wanted.items():
        if not isinstance(note[key], kind):
            raise ValueError(f"{key}: expected {kind.__name__}, got {note[key]!r}")
    if note["dtype"] not in _CODES:
        allowed = " or ".join(_CODES)
        raise ValueError(f"dtype: expected {allowed}, got {note['dtype']!r}")
    copy = path.with_name(CONFIG)
    try:
        agrees = not copy.exists() or json.loads(copy.read_text("utf8")) == note
    except (ValueError, RecursionError):  # it is damaged
        agrees = False
    if not agrees:
        raise ValueError(f"{CONFIG} says other than the note in {WEIGHTS}")
    return note


_DAMAGE = AttributeError, KeyError, RecursionError, TypeError, ValueError


_S = TypeVar("_S", bound=Savable)


def _weights_in(folder: Path) -> Path:
    """Return the weights file of a folder; say why it cannot be read."""
    path = folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: not found; from_pretrained reads a folder that "
            "save_pretrained has written"
        )
    path.open("rb").close()  # its error names the reason; safetensors' does not
    return path


def _load(kind: type[_S], folder: Path) -> _S:
    """Make a module from the folder that it was saved to."""
    library, path = _optional("safetensors"), _weights_in(folder)
    try:
        with library.safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            note = _read_note(path, notes.get("s4mini"))
            if note["class"] != kind.__name__:
                raise ValueError(
                    f"expected a saved {kind.__name__}, found {note['class']}"
                )
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {
                name: (part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
            _compare(kind, note, header)
            # copies: a file's tensors may begin at an address that complex
            # arithmetic cannot use, and live in a file that someone may change
            tensors = {name: file.get_tensor(name).clone() for name in header}
        _check_values(tensors)
        found = _digest(notes["s4mini"], tensors)
        if (wanted := notes.get("sha256", found)) != found:
            raise ValueError(f"expected contents of SHA-256 {wanted}, found {found}")
        module = kind.blank(note["arguments"])
        _fill(module, tensors, note["shared"])
    except (*_DAMAGE, library.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
    return module.eval()


def _check_values(tensors: dict[str, Tensor]) -> None:
    """Refuse NaN, infinities, and variances below zero."""
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or inf")
        if name.endswith("running_var") and (value < 0).any():
            raise ValueError(f"{name}: expected no variance below zero")
        if value.ndim == 0 and value < 0:
            raise ValueError(f"{name}: expected a count, got {value.item()}")


def _check_kind(name: str, value: Tensor, own: Tensor) -> None:
    """Refuse weights that mean something else than the configuration says."""
    if name.endswith(".kind") and not torch.equal(value.to(own), own):
        raise ValueError(
            f"{name}: expected {own.tolist()} as the configuration says, "
            f"got {value.tolist()}"
        )


def _fill(module: nn.Module, tensors: dict[str, Tensor], shared: dict) -> None:
    """Put tensors in the places of a module's own."""
    for name, value in tensors.items():
        home, _, leaf = name.rpartition(".")
        owner = module.get_submodule(home)
        _check_kind(name, value, getattr(owner, leaf))
        is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(value) if is_parameter else value)
    for name, first in shared.items():
        home, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(home), leaf, module.get_parameter(first))


def saved_class(folder: str | Path) -> str:
    """Tell of which class the module is that was saved to a folder.

    Args:
        folder: a folder on this machine.

    Returns:
        The name of the class, as the note in the weights file says it.

    Raises:
        FileNotFoundError: the folder, or the file in it, is missing.
        ModuleNotFoundError: safetensors is missing.
        ValueError: the file is damaged.

    Source: book/saving.md.
    """
    library, path = _optional("safetensors"), _weights_in(check_path("folder", folder))
    try:
        with library.safe_open(path, "pt") as file:
            return _read_note(path, (file.metadata() or {}).get("s4mini"))["class"]
    except (*_DAMAGE, library.SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error
