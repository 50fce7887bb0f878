"""The selective layer: scans against loops, wrong arguments, shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s4mini.selective import SelectiveSSM, compose, linear_scan, selective_copying


def loop(a, b):
    x, states = torch.zeros_like(b[:, 0]), []
    for k in range(b.shape[1]):
        x = a[:, k] * x + b[:, k]
        states.append(x)
    return torch.stack(states, 1)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
def test_a_scan_is_the_loop(L, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 2, L, 3, dtype=torch.float64, generator=generator)
    expected = loop(a, b)
    scale = loop(a.abs(), b.abs()).amax()  # what rounding is relative to
    assert (linear_scan(a, b, chunk) - expected).abs().max() <= 1e-14 * scale
    factors, terms = compose(a, b)
    x0 = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    started = loop(a, torch.cat((b[:, :1] + a[:, :1] * x0[:, None], b[:, 1:]), 1))
    bound = 1e-14 * (scale + (factors.abs() * x0.abs()[:, None]).amax())
    assert (factors * x0[:, None] + terms - started).abs().max() <= bound


@pytest.mark.parametrize("selective", (True, False))
def test_the_layer_has_all_derivatives(selective):
    torch.manual_seed(0)
    layer = SelectiveSSM(2, 3, selective).double()
    v = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, v)
    assert torch.autograd.gradgradcheck(layer, v)
    layer(v).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_the_answers_are_the_marked_tokens_in_their_order():
    tokens, answers = selective_copying(50, 20, 3, 5, torch.Generator().manual_seed(0))
    assert tokens.shape == (50, 23) and answers.shape == (50, 3)
    assert (tokens[:, 20:] == 6).all() and tokens[:, :20].max() == 5
    found = torch.stack([row[row < 5] for row in tokens])
    assert (found == answers).all()


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (ValueError, "L", lambda: selective_copying(1, 3, marked=4)),
        (TypeError, "count", lambda: selective_copying(1.5, 3)),
        (ValueError, "chunk", lambda: linear_scan(torch.ones(1, 2), torch.ones(1, 2), 0)),
        (ValueError, "b", lambda: linear_scan(torch.ones(1, 2), torch.ones(1, 3))),
        (TypeError, "a", lambda: linear_scan([1.0], torch.ones(1, 1))),
        (ValueError, "d_state", lambda: SelectiveSSM(4, 0)),
        (ValueError, "v", lambda: SelectiveSSM(4)(torch.ones(2, 3, 5))),
    ],
)
def test_wrong_arguments_are_named(error, named, call):
    with pytest.raises(error, match=rf"\b{named}\b"):
        call()
