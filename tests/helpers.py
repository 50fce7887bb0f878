"""What several tests need: pages, signals, random systems, and the dense truth."""

import torch

from s4mini.convolve import krylov_kernel
from s4mini.discretization import discretize
from s4mini.lowrank import real_form
from s4mini.model import S4Config, S4Model

FRONT = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""  # ten lines

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of a whole recurrence


def signal(*shape, dtype=torch.float64, seed=1):
    """Return random numbers, the same for the same seed."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    """Return the largest difference, as a share of the largest entry of b."""
    return float(((a - b).abs().max() / b.abs().max()).detach())


def random_dense(N, seed=0, dtype=torch.float64):
    """Return A, B, C and a state x of a random stable system."""
    A, vectors = signal(N, N, dtype=dtype, seed=seed), signal(3, N, dtype=dtype, seed=seed + 1)
    return A / N**0.5 - 1.5 * torch.eye(N, dtype=dtype), *vectors


def random_half(*batch, n=4, r=1, seed=0):
    """Return Lambda, P, B, C of random stable half spectra."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*batch, n, r + 3, generator=generator, dtype=torch.complex128)
    Lambda = torch.complex(-0.05 - z[..., 0].real.abs(), 6 * z[..., 0].imag)
    return Lambda, z[..., 3:], z[..., 1], z[..., 2]


def dense_kernel(Lambda, P, B, C, dt, L):
    """Return the kernel of a half spectrum by the recurrence with dense matrices."""
    A, B, C = real_form(Lambda, P, B, C)
    return krylov_kernel(*discretize(A, B, float(dt)), C, L)


def make_model(seed=0, **options):
    """Return a small network in double precision, in evaluation mode."""
    usual = {"d_input": 2, "d_output": 3, "d_model": 6, "n_layers": 2, "d_state": 8}
    g = torch.Generator().manual_seed(seed)
    model = S4Model(S4Config(**usual | options), g).double()
    for _ in range(3):  # moves the running statistics of batch norm
        model(signal(4, 9, model.config.d_input, seed=7))
    return model.eval()
