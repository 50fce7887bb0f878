"""A step that listens.

What came after S4, derived from what the book has: let the step depend on the input,
and a memory learns what to ignore.

Tangled from book/selective.md.
"""

from inspect import unwrap

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from s4mini.checks import check_generator, check_int, checked

__all__ = ["selective_copying", "compose", "linear_scan", "SelectiveSSM"]


def selective_copying(
    count: int,
    L: int,
    marked: int = 4,
    kinds: int = 8,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw examples of selective copying.

    Args:
        count: the number of examples.
        L: the number of tokens before the questions, at least marked.
        marked: how many of them are to be repeated.
        kinds: how many kinds of marked tokens there are: 0 ... kinds - 1;
            noise is the token kinds, a question is the token kinds + 1.
        generator: the source of randomness.

    Returns:
        tokens (count, L + marked) and answers (count, marked), integers.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is below 1, or L < marked.

    Source: Gu and Dao 2024, section 4.1.1; book/selective.md.
    """
    count, kinds = check_int("count", count), check_int("kinds", kinds)
    marked = check_int("marked", marked)
    L = check_int("L", L, minimum=marked)
    check_generator("generator", generator)
    answers = torch.randint(kinds, (count, marked), generator=generator)
    where = torch.rand(count, L, generator=generator).topk(marked).indices
    tokens = torch.full((count, L + marked), kinds)
    tokens.scatter_(1, where.sort().values, answers)
    tokens[:, L:] = kinds + 1
    return tokens, answers


def compose(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Compose each step x -> a x + b with all steps before it, along axis 1.

    Args:
        a: (B, L, ...) the factors.
        b: (B, L, ...) the terms, of the same shape.

    Returns:
        Factors and terms of the composites, same shapes: the state after
        step k is factors[:, k] x_0 + terms[:, k].

    Source: Blelloch 1990; book/selective.md.
    """
    k = 1
    while k < a.shape[1]:
        later, earlier = a[:, k:], slice(None, -k)
        b = torch.cat((b[:, :k], later * b[:, earlier] + b[:, k:]), 1)
        a = torch.cat((a[:, :k], later * a[:, earlier]), 1)
        k *= 2
    return a, b


@checked(a="...", b="...", chunk="int >= 1")
def linear_scan(a: Tensor, b: Tensor, chunk: int = 16) -> Tensor:
    """Run x_k = a_k x_{k-1} + b_k from rest, along axis 1, in chunks.

    Args:
        a: (B, L, ...) the factors.
        b: (B, L, ...) the terms, of the same shape.
        chunk: the steps in a chunk; it changes the cost and not the result.

    Returns:
        (B, L, ...) the states.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: the shapes differ, an entry is not finite, or chunk < 1.

    Source: Dao and Gu 2024, section 6; book/selective.md.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(
            f"b: expected the shape (B, L, ...) of a, {tuple(a.shape)}, "
            f"got {tuple(b.shape)}"
        )
    L = b.shape[1]
    rest = (0, 0) * (b.ndim - 2) + (0, -L % chunk)
    a, b = (F.pad(t, rest).unflatten(1, (-1, chunk)) for t in (a, b))
    a, b = (t.transpose(1, 2) for t in (a, b))  # (B, M, J, ...)
    a, b = compose(a, b)
    _, ends = compose(a[:, -1], b[:, -1])  # (B, J, ...)
    before = torch.cat((torch.zeros_like(ends[:, :1]), ends[:, :-1]), 1)
    x = a * before[:, None] + b
    return x.transpose(1, 2).flatten(1, 2)[:, :L]


class SelectiveSSM(nn.Module):
    """Run diagonal systems whose step, B and C are functions of the input.

    Args:
        d_model: the number H of channels.
        d_state: the number N of real modes of each.
        selective: whether they depend on the input; fixed otherwise.
        generator: the source of the initial values of B and C where they
            are fixed.

    Source: Gu and Dao 2024, algorithm 2, with the exact hold of the input;
    book/selective.md.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        selective: bool = True,
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        H, N = check_int("d_model", d_model), check_int("d_state", d_state)
        check_generator("generator", generator)
        rates = torch.arange(1.0, N + 1).log().expand(H, N)
        self.log_rate = nn.Parameter(rates.clone())  # (H, N)
        self.bias = nn.Parameter(torch.full((H,), -2.0))  # a step of 0.13
        self.D = nn.Parameter(torch.ones(H))
        if selective:
            self.step_B_C = nn.Linear(H, H + 2 * N)
        else:
            fixed = torch.randn(2, N, generator=generator)
            self.B_C = nn.Parameter(fixed)
        self.selective, self.d_state = selective, N

    def coefficients(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return step (B, L, H), B and C (B, L, N) of an input (B, L, H)."""
        H, N = v.shape[-1], self.d_state
        if self.selective:
            step, B, C = self.step_B_C(v).split((H, N, N), -1)
        else:
            step = torch.zeros_like(v)
            B, C = self.B_C.expand(*v.shape[:2], 2, N).unbind(-2)
        return F.softplus(step + self.bias), B, C

    def forward(self, v: Tensor) -> Tensor:
        """Return the outputs (B, L, H) of an input (B, L, H)."""
        if v.ndim != 3 or v.shape[-1] != len(self.D):
            expected = f"(B, L, {len(self.D)})"
            raise ValueError(f"v: expected {expected}, got {tuple(v.shape)}")
        step, B, C = self.coefficients(v)
        rate = self.log_rate.exp()  # (H, N)
        exponent = -step[..., None] * rate  # (B, L, H, N)
        written = -torch.expm1(exponent) / rate * B[:, :, None]
        x = unwrap(linear_scan)(exponent.exp(), written * v[..., None])
        return (x * C[:, :, None]).sum(-1) + self.D * v
