"""Arguments that must be refused, and what is said of them."""

import math

import numpy as np
import pytest
import torch

from s4mini.checks import check_choice, check_int, check_positive, check_tensors

BAD_INTEGERS = [
    (TypeError, 1.0, {}, "N: expected an integer >= 1, got float 1.0"),
    (TypeError, True, {}, "N: expected an integer >= 1, got bool True"),
    (TypeError, "4", {}, "N: expected an integer >= 1, got str '4'"),
    (ValueError, 0, {}, "N: expected an integer >= 1, got 0"),
    (ValueError, 3, {"minimum": 4}, "N: expected an integer >= 4, got 3"),
    (ValueError, 7, {"even": True}, "N: expected an even integer >= 1, got 7"),
]


@pytest.mark.parametrize(("error", "value", "options", "message"), BAD_INTEGERS)
def test_integers_refused(error, value, options, message):
    with pytest.raises(error) as caught:
        check_int("N", value, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [1, np.int64(7), torch.tensor(3), 10**12])
def test_integers_accepted(value):
    number = check_int("N", value)
    assert type(number) is int and number == int(value)


@pytest.mark.parametrize(
    ("error", "value"),
    [
        (ValueError, 0),
        (ValueError, -1.0),
        (ValueError, math.nan),
        (ValueError, math.inf),
        (TypeError, "0.1"),
        (TypeError, True),
        (TypeError, None),
        (TypeError, 1j),
        (TypeError, torch.tensor([1])),
        (TypeError, torch.tensor([1j])),
        (ValueError, torch.tensor([0.1, 0.0])),
        (ValueError, torch.tensor([0.1, math.nan])),
        (ValueError, torch.tensor([0.1, math.inf])),
    ],
)
def test_positive_refused(error, value):
    with pytest.raises(error, match=r"^dt: expected"):
        check_positive("dt", value)


def test_positive_accepted():
    for value in (1, 1e-300, torch.tensor(0.1), torch.rand(2, 3) + 0.1):
        check_positive("dt", value)


def test_choices_are_listed():
    with pytest.raises(ValueError, match=r"measure: expected one of 'legs', 'legt'; got 'leg'"):
        check_choice("measure", "leg", ["legs", "legt"])
    check_choice("measure", "legs", ["legs", "legt"])


ones = torch.ones


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"A": (np.eye(2), "N N")}, "A: expected a torch.Tensor, got ndarray"),
        (TypeError, {"A": (ones(2, 2).int(), "N N")}, "A: expected a floating or complex tensor"),
        (TypeError, {"A": (ones(2, 2) + 0j, "real N N")}, "A: expected a floating tensor"),
        (ValueError, {"A": (ones(2, 3), "N N")}, r"A: expected shape (N, N), got (2, 3)"),
        (ValueError, {"A": (ones(2), "... N N")}, r"A: expected shape (..., N, N), got (2,)"),
        (ValueError, {"u": (ones(5, 3), "B L 2")}, r"u: expected shape (B, L, 2), got (5, 3)"),
        (ValueError, {"u": (ones(5, 3), "B 2")}, r"u: expected shape (B, 2), got (5, 3)"),
        (ValueError, {"A": (ones(0, 0), "N N")}, "A: expected no empty axis"),
        (ValueError, {"A": (ones(1) * math.nan, "N")}, "A: expected finite entries"),
        (
            ValueError,
            {"A": (torch.eye(4), "N N"), "B": (ones(3), "N")},
            "B: expected shape (N,) with N = 4, got (3,)",
        ),
    ],
)
def test_tensors_refused(error, arguments, message):
    with pytest.raises(error) as caught:
        check_tensors(**arguments)
    assert str(caught.value).startswith(message)


def test_tensors_bind_sizes():
    sizes = check_tensors(
        A=(ones(7, 3, 2, 2), "... N N"), B=(ones(2) + 1j, "N"), u=(ones(5, 9, 4), "real B L H")
    )
    assert sizes == {"N": 2, "B": 5, "L": 9, "H": 4}
