"""Errors that help.

How every function of the library examines its arguments, and what it says when one of
them is wrong.

Tangled from book/checks.md.
"""

import functools
import inspect
import math
import operator
import os
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

__all__ = [
    "check_int",
    "check_number",
    "check_bool",
    "check_positive",
    "check_dense",
    "FLOATS",
    "values_can_be_read",
    "STEPS",
    "check_step",
    "check_generator",
    "check_path",
    "check_device",
    "check_choice",
    "check_tensors",
    "checked",
]


def check_int(
    name: str,
    value: int,
    minimum: int = 1,
    even: bool = False,
    maximum: int = 2**31 - 1,
) -> int:
    """Return value as an int if it is one and allowed.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        minimum: the smallest value allowed.
        even: whether odd values are refused.
        maximum: the largest value allowed; by default that of 32 bits, which
            no axis of a tensor here comes near.

    Returns:
        The value as a Python int.

    Raises:
        TypeError: value is not an integer, or is a bool.
        ValueError: value is below minimum or above maximum, or odd where even
            is asked for.

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
    if number > maximum:
        raise ValueError(f"{name}: expected at most {maximum}, got {value}")
    return number


def _as_float(value: Real) -> float:
    """Return a number as a float; an integer too large for one is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_number(
    name: str, value: float, minimum: float = 0.0, below: float = math.inf
) -> float:
    """Return value as a float if it is a number in [minimum, below).

    Args:
        name: the argument's name, for the message.
        value: what was given.
        minimum: the smallest value allowed.
        below: the bound that is not allowed itself.

    Returns:
        The value as a Python float.

    Raises:
        TypeError: value is not a real number, or is a bool.
        ValueError: value is NaN, or outside [minimum, below).

    Source: book/checks.md.
    """
    allowed = f"a number in [{minimum:g}, {below:g})"
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected {allowed}, got {kind} {value!r}")
    if not minimum <= _as_float(value) < below:
        raise ValueError(f"{name}: expected {allowed}, got {value}")
    return float(value)


def check_bool(name: str, value: bool) -> bool:
    """Return value as a bool if it is one.

    Args:
        name: the argument's name, for the message.
        value: what was given.

    Returns:
        The value as a Python bool.

    Raises:
        TypeError: value is anything else, such as 1 or "False".

    Source: book/checks.md.
    """
    if not isinstance(value, bool | np.bool_):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected True or False, got {kind} {value!r}")
    return bool(value)


def check_positive(name: str, value: float | Tensor) -> float | Tensor:
    """Return finite real numbers above zero; refuse anything else.

    Args:
        name: the argument's name, for the message.
        value: a number, or a real tensor of any shape.

    Returns:
        The number as a Python float, or the tensor.

    Raises:
        TypeError: value is neither a real number nor a floating tensor.
        ValueError: value, or an entry of it, is not finite or not above zero.

    Source: book/checks.md.
    """
    if isinstance(value, Tensor):
        _check_dtype(name, value, real=True)
        good = value.isfinite() & (value > 0)
        if values_can_be_read() and not good.all():
            bad = value[~good][0].item()
            raise ValueError(f"{name}: expected finite numbers > 0, got {bad}")
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a number > 0, got {kind}")
    if not 0 < _as_float(value) < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return float(value)


def check_dense(name: str, value: Tensor) -> None:
    """Refuse a tensor whose entries do not lie in a grid.

    Args:
        name: the argument's name, for the message.
        value: a tensor of any dtype.

    Raises:
        TypeError: it is sparse or nested.

    Source: book/checks.md.
    """
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else value.layout
        raise TypeError(f"{name}: expected a dense tensor, got {kind}")


#: The kinds of numbers that tensors of parameters can hold.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


def _check_dtype(name: str, value: Tensor, real: bool) -> None:
    """Refuse a tensor that cannot be computed with."""
    if value.dtype not in (FLOATS if real else FLOATS + _COMPLEX):
        kinds = "floating" if real else "floating or complex"
        raise TypeError(f"{name}: expected a {kinds} tensor, got {value.dtype}")
    check_dense(name, value)
    if value.is_meta and not torch.compiler.is_compiling():
        raise TypeError(f"{name}: expected a tensor with values, got device meta")


def values_can_be_read() -> bool:
    """Say whether tensors have values to look at now.

    Returns:
        False while torch.compile or torch.export trace a function, and inside
        the transforms of torch.func; True otherwise.

    Source: book/checks.md.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


#: The smallest and the largest time step that functions here compute with.
STEPS = 1e-16, 1e16


def check_step(name: str, value: float | Tensor) -> float | Tensor:
    """Return time steps that can be computed with; refuse others.

    Args:
        name: the argument's name, for the message.
        value: a number, or a real tensor of any shape.

    Returns:
        The number as a Python float, or the tensor.

    Raises:
        TypeError: value is neither a real number nor a floating tensor.
        ValueError: value, or an entry of it, is outside STEPS, or NaN.

    Source: book/checks.md.
    """
    low, high = STEPS
    if isinstance(value, Tensor):
        _check_dtype(name, value, real=True)
        if not values_can_be_read():
            return value
        wide = value.double() if value.itemsize < 4 else value
        bad = wide[~((wide >= low) & (wide <= high))].tolist()
    else:
        value = check_positive(name, value)
        bad = [] if low <= value <= high else [value]
    if bad:
        raise ValueError(
            f"{name}: expected a step in [{low:g}, {high:g}], got {bad[0]:g}"
        )
    return value


def check_generator(name: str, value: Generator | None) -> None:
    """Refuse what is no source of random numbers of PyTorch.

    Args:
        name: the argument's name, for the message.
        value: what was given; None stands for PyTorch's own.

    Raises:
        TypeError: it is anything else.

    Source: book/checks.md.
    """
    if value is not None and not isinstance(value, Generator):
        raise TypeError(
            f"{name}: expected a torch.Generator, such as torch.Generator()"
            f".manual_seed(0), or None, got {type(value).__name__}"
        )


def check_path(name: str, value: str | os.PathLike) -> Path:
    """Return a path; refuse what names none.

    Args:
        name: the argument's name, for the message.
        value: a string or an object such as Path.

    Returns:
        The path.

    Raises:
        TypeError: value is of another kind.
        ValueError: it is empty, or no system could have such a path.

    Source: book/checks.md.
    """
    if not isinstance(value, str | os.PathLike):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a path, got {kind} {value!r}")
    text = os.fspath(value)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"{name}: expected a path, got {text!r}")
    return Path(text)


def check_device(name: str, value: torch.device | str | int | None) -> None:
    """Refuse what is no device of this machine.

    Args:
        name: the argument's name, for the message.
        value: what was given; None stands for PyTorch's default.

    Raises:
        TypeError: value is of another kind.
        ValueError: there is no such device.

    Source: book/checks.md.
    """
    known = isinstance(value, torch.device | str | int | None)
    if not known or isinstance(value, bool):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a device such as 'cpu', got {kind}")
    if torch.compiler.is_compiling():
        return
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        said = f"{name}: expected a device of this machine, such as 'cpu', got"
        raise ValueError(f"{said} {value!r}") from error


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
        near = get_close_matches(str(value), [str(item) for item in allowed], 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: expected one of {listed}; got {value!r}{meant}")


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
    _check_dtype(name, value, real)
    bound = dict(sizes)
    if not _fits(value.shape, axes, bound):
        wanted, given = _describe(axes, sizes), tuple(value.shape)
        raise ValueError(f"{name}: expected shape {wanted}, got {given}")
    if 0 in value.shape:
        raise ValueError(f"{name}: expected no empty axis, got {tuple(value.shape)}")
    if values_can_be_read() and not value.isfinite().all():
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


def _check_argument(name: str, value: Any, rule: str, sizes: dict) -> Any:
    """Examine one argument by its rule; return it, numbers as plain ones."""
    if rule == "positive":
        return check_positive(name, value)
    if rule == "bool":
        return check_bool(name, value)
    if found := re.fullmatch(r"(int|even) >= (-?\d+)", rule):
        return check_int(name, value, int(found[2]), even=found[1] == "even")
    if "|" in rule:
        check_choice(name, value, [word.strip() for word in rule.split("|")])
    else:
        _check_tensor(name, value, rule, sizes)
    return value


_P = ParamSpec("_P")
_R = TypeVar("_R")


def checked(**rules: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a decorator that examines a function's arguments.

    Args:
        rules: name="rule" for each argument to examine: a shape pattern as in
            check_tensors, "positive", "int >= 1", "even >= 2", "bool", or a
            choice such as "zoh | bilinear". Letters of patterns mean the same
            size in the whole call. An argument whose default is None is
            examined only if it is not None.

    Returns:
        The decorator. The function without checks is its `__wrapped__`.

    Raises:
        TypeError: a rule names no argument of the function.

    Source: book/checks.md.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        known = signature.parameters
        if unknown := set(rules) - set(known):
            where = f"{function.__name__} has no argument"
            raise TypeError(f"{where} {min(unknown)!r}")

        @functools.wraps(function)
        def examined(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            sizes: dict[str, int] = {}
            given = bound.arguments
            for name, rule in rules.items():
                value = given.get(name, known[name].default)
                if value is not None or known[name].default is not None:
                    given[name] = _check_argument(name, value, rule, sizes)
            return function(*bound.args, **bound.kwargs)

        return examined

    return decorate
