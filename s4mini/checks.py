"""Errors that help.

How every function of the library examines its arguments, and what it says when one of
them is wrong.

Tangled from book/checks.md.
"""

import math
import operator
from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_int", "check_positive", "check_choice", "check_tensors"]


def check_int(name: str, value: int, minimum: int = 1, even: bool = False) -> int:
    """Return value as an int if it is one and allowed.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        minimum: the smallest value allowed.
        even: whether odd values are refused.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: value is not an integer, or is a bool.
        ValueError: value is below minimum, or odd where even is asked for.

    Source: book/checks.md.
    """
    parity = "an even integer" if even else "an integer"
    allowed = f"{parity} >= {minimum}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected {allowed}, got {kind} {value!r}")
    if number < minimum or (even and number % 2):
        raise ValueError(f"{name}: expected {allowed}, got {value}")
    return number


def check_positive(name: str, value: float | Tensor) -> None:
    """Refuse anything but finite real numbers above zero.

    Args:
        name: the argument's name, for the message.
        value: a number, or a real tensor of any shape.

    Raises:
        TypeError: value is neither a real number nor a floating tensor.
        ValueError: value, or an entry of it, is not finite or not above zero.

    Source: book/checks.md.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {value.dtype}")
        bad = value[~(value.isfinite() & (value > 0))]
        if bad.numel():
            raise ValueError(
                f"{name}: expected finite numbers > 0, got {bad[0].item()}"
            )
    elif isinstance(value, bool) or not isinstance(value, int | float):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a number > 0, got {kind}")
    elif not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def check_choice(name: str, value: object, allowed: Sequence) -> None:
    """Refuse a value that is not one of the allowed ones.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        allowed: the values allowed, in the order in which to list them.

    Raises:
        ValueError: value is none of them.

    Source: book/checks.md.
    """
    if value not in allowed:
        listed = ", ".join(repr(item) for item in allowed)
        raise ValueError(f"{name}: expected one of {listed}; got {value!r}")


def _fits(shape: Sequence[int], axes: list[str], sizes: dict) -> bool:
    """Compare a shape with axis names; bind the sizes of new letters."""
    batch = axes[:1] == ["..."]
    named = axes[1:] if batch else axes
    if len(shape) < len(named) or (not batch and len(shape) > len(named)):
        return False
    last = shape[len(shape) - len(named) :]
    for axis, size in zip(named, last, strict=True):
        wanted = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
        if size != wanted:
            return False
    return True


def _describe(axes: list[str], sizes: dict) -> str:
    """Write axis names as a shape, with the sizes that are known."""
    shape = ", ".join(axes) + ("," if len(axes) == 1 else "")
    known = [f"{a} = {sizes[a]}" for a in dict.fromkeys(axes) if a in sizes]
    return f"({shape})" + (f" with {', '.join(known)}" if known else "")


def _check_tensor(name: str, value: Tensor, pattern: str, sizes: dict) -> None:
    """Examine one tensor; bind the sizes of its axes."""
    real, axes = pattern.startswith("real "), pattern.split()
    axes = axes[1:] if real else axes
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a torch.Tensor, got {kind}")
    if not (value.is_floating_point() or (value.is_complex() and not real)):
        kinds = "floating" if real else "floating or complex"
        raise TypeError(f"{name}: expected a {kinds} tensor, got {value.dtype}")
    bound = dict(sizes)
    if not _fits(value.shape, axes, bound):
        wanted, given = _describe(axes, sizes), tuple(value.shape)
        raise ValueError(f"{name}: expected shape {wanted}, got {given}")
    if 0 in value.shape:
        raise ValueError(f"{name}: expected no empty axis, got {tuple(value.shape)}")
    if not value.isfinite().all():
        raise ValueError(f"{name}: expected finite entries, got NaN or inf")
    sizes.update(bound)


def check_tensors(**arguments: tuple[Tensor, str]) -> dict[str, int]:
    """Refuse tensors of a wrong kind or shape, or with NaN or inf in them.

    Args:
        arguments: name=(value, pattern). A pattern names the axes, such as
            "N N", "... N" or "real B L H"; a letter stands for one size in the
            whole call, a number for itself, a leading "..." for batch axes.

    Returns:
        The size of each letter.

    Raises:
        TypeError: a value is no tensor, or neither floating nor complex, or
            complex where the pattern begins with "real".
        ValueError: a shape does not match, an axis is empty, or an entry is
            not finite.

    Source: book/checks.md.
    """
    sizes: dict[str, int] = {}
    for name, (value, pattern) in arguments.items():
        _check_tensor(name, value, pattern, sizes)
    return sizes
