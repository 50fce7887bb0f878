"""Kernels as pictures.

An image read pixel by pixel has rows again when the kernel is cut into rows. What has a
trained network made of its kernels, and what were they before?

Tangled from book/filters.md.
"""

import torch
from torch import Tensor

from s4mini.checks import check_int
from s4mini.model import S4Model

__all__ = ["wind", "energy_within", "rows_to_half", "layer_kernels"]


def wind(K: Tensor, width: int) -> Tensor:
    """Cut kernels into rows: the present at the lower right.

    Args:
        K: (..., L) kernels; L a multiple of width.
        width: pixels in a row.

    Returns:
        (..., L / width, width), the weight of each pixel in the last output.

    Raises:
        ValueError: L is not a multiple of width.

    Source: Gu et al. 2022a, figure 2; book/filters.md.
    """
    check_int("width", width)
    if K.shape[-1] % width:
        raise ValueError(f"K: expected a multiple of {width} steps, got {K.shape[-1]}")
    return K.flip(-1).unflatten(-1, (-1, width))


def energy_within(K: Tensor, width: int) -> Tensor:
    """Return the share of a kernel's energy within so many rows.

    Args:
        K: (..., L) kernels; L a multiple of width.
        width: pixels in a row.

    Returns:
        (..., L / width), within 1, 2, ... rows; rises to 1.

    Raises:
        ValueError: L is not a multiple of width.

    Source: book/filters.md.
    """
    energy = wind(K.double().square(), width).sum(-1).flip(-1).cumsum(-1)
    return energy / energy[..., -1:]


def rows_to_half(K: Tensor, width: int) -> Tensor:
    """Return in how many rows half of each kernel's energy lies.

    Args:
        K: (..., L) kernels; L a multiple of width.
        width: pixels in a row.

    Returns:
        (...) int64, at least 1.

    Source: book/filters.md.
    """
    return (energy_within(K, width) < 0.5).sum(-1) + 1


@torch.no_grad()
def layer_kernels(model: S4Model, L: int) -> list[Tensor]:
    """Return the kernels (H, L) of each block, without the direct paths.

    Args:
        model: causal.
        L: steps.

    Raises:
        ValueError: the model is bidirectional: each kernel is then two.

    Source: book/filters.md.
    """
    if model.config.bidirectional:
        raise ValueError("model: expected a causal one, got a bidirectional")
    return [block.layer.kernel(L) for block in model.stack]
