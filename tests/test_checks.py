"""Arguments that must be refused, and what is said of them."""

import inspect
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from s4mini.checks import (
    STEPS,
    check_bool,
    check_choice,
    check_device,
    check_generator,
    check_int,
    check_number,
    check_path,
    check_positive,
    check_step,
    check_tensors,
    checked,
)

BAD_INTEGERS = [
    (TypeError, 1.0, {}, "N: expected an integer >= 1, got float 1.0"),
    (TypeError, True, {}, "N: expected an integer >= 1, got bool True"),
    (TypeError, "4", {}, "N: expected an integer >= 1, got str '4'"),
    (ValueError, 0, {}, "N: expected an integer >= 1, got 0"),
    (ValueError, 3, {"minimum": 4}, "N: expected an integer >= 4, got 3"),
    (ValueError, 7, {"even": True}, "N: expected an even integer >= 1, got 7"),
    (ValueError, 2**31, {}, "N: expected at most 2147483647, got 2147483648"),
    (ValueError, 9, {"maximum": 8}, "N: expected at most 8, got 9"),
]


@pytest.mark.parametrize(("error", "value", "options", "message"), BAD_INTEGERS)
def test_integers_refused(error, value, options, message):
    with pytest.raises(error) as caught:
        check_int("N", value, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [1, np.int64(7), torch.tensor(3), 2**31 - 1])
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
        (ValueError, 10**400),
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


@pytest.mark.parametrize("value", [1e308, 1e-300, 1e17, torch.tensor([1.0, 1e30]), 0, math.nan])
def test_steps_that_cannot_be_computed_with(value):
    with pytest.raises(ValueError, match=r"^dt: expected"):
        check_step("dt", value)


def test_steps_accepted():
    kinds = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for value in (1, *STEPS, np.float32(0.1), *(torch.tensor(0.1, dtype=kind) for kind in kinds)):
        check_step("dt", value)
    check_step("dt", torch.tensor(STEPS))


@pytest.mark.parametrize(
    ("error", "value"), [(TypeError, 5), (TypeError, None), (TypeError, b"x"), (ValueError, "")]
)
def test_what_is_no_path(error, value):
    with pytest.raises(error, match=r"^out: expected a path"):
        check_path("out", value)
    assert check_path("out", "a/b") == check_path("out", Path("a", "b")) == Path("a/b")


@pytest.mark.parametrize(
    ("error", "value"),
    [(TypeError, 0.5), (TypeError, True), (ValueError, "gpu"), (ValueError, ""), (ValueError, -1)],
)
def test_what_is_no_device(error, value):
    with pytest.raises(error, match=r"^device: expected a device"):
        check_device("device", value)
    for device in ("cpu", torch.device("cpu"), "meta", None):
        check_device("device", device)


def test_numpy_numbers_are_numbers():
    for value in (np.float32(0.5), np.float64(0.5), np.int64(2)):
        found = check_positive("dt", value)
        assert type(found) is float and found == float(value)
        assert type(check_number("x", value)) is float
    assert check_bool("tied", np.True_) is True


@pytest.mark.parametrize("value", ["0.1", True, None, 1j, torch.tensor(0.1), [0.1]])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"^dropout: expected a number in \[0, 1\)"):
        check_number("dropout", value, below=1)


@pytest.mark.parametrize("value", [-1e-9, 1.0, math.nan, math.inf, 10**400])
def test_numbers_out_of_range(value):
    with pytest.raises(ValueError, match=r"^dropout: expected a number in \[0, 1\)"):
        check_number("dropout", value, below=1)


@pytest.mark.parametrize("value", ["False", 0, 1, None, torch.tensor(True)])
def test_what_is_no_truth_value(value):
    with pytest.raises(TypeError, match=r"^prenorm: expected True or False"):
        check_bool("prenorm", value)


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


@pytest.mark.parametrize("value", [0, "seed", np.random.default_rng(0), random.Random(0)])
def test_what_is_no_generator(value):
    with pytest.raises(TypeError, match=r"^generator: expected a torch\.Generator.*or None, got"):
        check_generator("generator", value)
    check_generator("generator", None)
    check_generator("generator", torch.Generator())


NO_NUMBERS = [
    torch.eye(2).to_sparse(),
    torch.eye(2).to(torch.float8_e4m3fn),
    torch.empty(2, 2, device="meta"),
    torch.eye(2).bool(),
    torch.nested.nested_tensor([torch.eye(2)], layout=torch.jagged),
]


@pytest.mark.parametrize("number", range(len(NO_NUMBERS)))
def test_tensors_that_cannot_be_computed_with(number):
    for call in (lambda x: check_tensors(A=(x, "N N")), lambda x: check_positive("A", x)):
        with pytest.raises(TypeError, match=r"^A: expected a .*tensor.*, got"):
            call(NO_NUMBERS[number])


@checked(A="... n n", B="... n", dt="positive", N="int >= 2", way="zoh | bilinear", both="bool")
def example(A, B=None, dt=0.1, *, N=4, way="zoh", both=False):
    """Say what came."""
    return A, B, dt, N, way, both


def test_checked_passes_on_what_was_given():
    A = torch.eye(3)
    assert example(A)[1:] == (None, 0.1, 4, "zoh", False)
    found = example(A, ones(3), np.float32(0.5), N=np.int64(7), both=np.True_)
    assert [type(x) for x in found[2:]] == [float, int, str, bool]
    assert example.__name__ == "example" and example.__doc__ == "Say what came."
    assert list(inspect.signature(example).parameters) == ["A", "B", "dt", "N", "way", "both"]
    assert example.__wrapped__(None)[0] is None


@pytest.mark.parametrize(
    ("error", "name", "change"),
    [
        (TypeError, "A", {"A": None}),
        (ValueError, "A", {"A": ones(2, 3)}),
        (ValueError, "B", {"B": ones(2)}),
        (ValueError, "dt", {"dt": 0}),
        (TypeError, "dt", {"dt": True}),
        (TypeError, "N", {"N": 2.0}),
        (ValueError, "N", {"N": 1}),
        (ValueError, "way", {"way": "euler"}),
        (TypeError, "both", {"both": 1}),
    ],
)
def test_checked_refuses(error, name, change):
    with pytest.raises(error, match=f"^{name}: expected"):
        example(**{"A": torch.eye(3)} | change)


def test_checked_and_wrong_calls():
    with pytest.raises(TypeError, match="missing a required argument: 'A'"):
        example()
    with pytest.raises(TypeError, match="colour"):
        example(torch.eye(3), colour=1)
    with pytest.raises(TypeError, match="has no argument 'Q'"):
        checked(Q="N")(lambda A: A)


@checked(x="n", dt="positive")
def scaled(x, dt):
    return (dt * x).square().sum()


def test_values_are_not_read_inside_transforms():
    x, dt = torch.tensor([1.0, 2.0]), torch.tensor(0.5)
    assert torch.equal(torch.func.grad(scaled)(x, dt), 0.5 * x)
    assert torch.allclose(torch.func.hessian(scaled)(x, dt), 0.5 * torch.eye(2))
    assert torch.equal(torch.func.jacfwd(scaled)(x, dt), 0.5 * x)
    each = torch.func.vmap(scaled, in_dims=(0, None))(torch.stack((x, -x)), dt)
    assert torch.equal(each, scaled(x, dt).expand(2))
    with pytest.raises(ValueError, match=r"^x: expected shape"):
        torch.func.vmap(scaled, in_dims=(0, None))(torch.ones(2, 3, 3), dt)
    with pytest.raises(ValueError, match=r"^x: expected finite"):  # read again afterwards
        scaled(x * math.nan, dt)


def test_values_are_not_read_while_compiling():
    x, dt = torch.tensor([1.0, 2.0]), torch.tensor(0.5)
    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, dt), scaled(x, dt))

    class Scaled(torch.nn.Module):
        def forward(self, x, dt):
            return scaled(x, dt)

    program = torch.export.export(Scaled(), (x, dt)).module()
    assert torch.equal(program(-x, dt), scaled(x, dt))
