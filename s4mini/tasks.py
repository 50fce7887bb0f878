"""Three tasks.

A classifier, a forecaster and a language model: one network, three questions.

Tangled from book/tasks.md.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from s4mini.checks import check_choice, check_generator, check_int, check_number
from s4mini.layer import Stepper, clear_padding
from s4mini.model import ModelState, ModelStepper, S4Model, pool_steps
from s4mini.saving import Savable

__all__ = [
    "Task",
    "StreamingTask",
    "S4Classifier",
    "S4Forecaster",
    "draw",
    "S4LanguageModel",
    "PlainStepper",
    "OLDEST_OPSET",
    "export_program",
    "export_onnx",
]


class Task(Savable):
    """Hold a model, and run it as it runs. The base of the tasks.

    Args:
        model: what answers.

    Raises:
        TypeError: model is not an S4Model.

    Source: book/tasks.md.
    """

    def __init__(self, model: S4Model) -> None:
        super().__init__()
        if not isinstance(model, S4Model):
            kind = type(model).__name__
            raise TypeError(f"model: expected an S4Model, got {kind}")
        self.model = model

    def initial_state(self, batch: int) -> ModelState:
        """Return the state of a fresh start for a batch of sequences."""
        return self.model.initial_state(batch)

    def own_arguments(self) -> dict:
        """Return what the task was made with beside its model."""
        return {}

    def arguments(self) -> dict:
        """Return all that decides what the weights mean, as plain values."""
        return {"model": self.model.arguments(), **self.own_arguments()}

    @classmethod
    def shapes(cls, arguments: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Tell the name and shape of each tensor of such a task."""
        for name, shape in S4Model.shapes(arguments["model"]):
            yield f"model.{name}", shape

    @classmethod
    def blank(cls, arguments: dict) -> Self:
        """Make a task whose tensors will be replaced."""
        own = {key: value for key, value in arguments.items() if key != "model"}
        return cls(S4Model.blank(arguments["model"]), **own)


class StreamingTask(Task):
    """A task whose outputs are the model's outputs, at every step.

    Source: book/tasks.md.
    """

    def forward(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """Return the model's outputs; arguments as in S4Model.forward."""
        return self.model(u, lengths, rate)

    def chunk(
        self,
        u: Tensor,
        state: ModelState,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> tuple[Tensor, ModelState]:
        """Run the next steps in parallel, as S4Model.chunk does."""
        return self.model.chunk(u, state, lengths, rate)

    def step(
        self, u: Tensor, state: ModelState, rate: float = 1.0
    ) -> tuple[Tensor, ModelState]:
        """Take one step, as S4Model.step does."""
        return self.model.step(u, state, rate)

    def stepper(self, rate: float = 1.0) -> ModelStepper:
        """Return the step as the model is now, prepared for many steps."""
        return self.model.stepper(rate)


class S4Classifier(StreamingTask):
    """Name the class of a sequence. `forward` returns logits (B, K).

    Args:
        model: with one output for each class, pooled.
        classes: the K names, in the order of the outputs: a list or tuple.

    Raises:
        TypeError: model is not an S4Model, or classes no list of names.
        ValueError: the model does not pool, or has not K outputs.

    Source: book/tasks.md.
    """

    def __init__(self, model: S4Model, classes: list[str] | tuple[str, ...]) -> None:
        super().__init__(model)
        check_choice("model.pool", model.config.pool, ("mean", "last"))
        _check_classes(classes, model.config.d_output)
        self.classes = tuple(classes)

    def own_arguments(self) -> dict:
        """Return the names."""
        return {"classes": list(self.classes)}

    @torch.no_grad()
    def predict(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> tuple[list[str], Tensor]:
        """Return the most probable names, and all probabilities (B, K).

        The model's mode counts: in training mode dropout is active.
        """
        probabilities = self(u, lengths, rate).softmax(-1)
        best = probabilities.argmax(-1).tolist()
        return [self.classes[i] for i in best], probabilities


def _check_classes(classes: list[str] | tuple[str, ...], K: int) -> None:
    """Refuse anything but K names."""
    listed = isinstance(classes, list | tuple)
    if not listed or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes: expected a list of names, got {classes!r}")
    if len(classes) != K:
        raise ValueError(
            f"classes: expected {K} names, one for each output of the model, "
            f"got {len(classes)}"
        )


class S4Forecaster(Task):
    """Forecast the next steps of a signal from the steps so far.

    Args:
        model: with an output at each step: pool "none", no tokens.
        horizon: how many steps are forecast.

    Raises:
        TypeError: model is not an S4Model, or horizon not an integer.
        ValueError: the model pools or reads tokens, or horizon < 1.

    Source: Gu et al. 2022a, section 4.3; book/tasks.md.
    """

    def __init__(self, model: S4Model, horizon: int) -> None:
        super().__init__(model)
        check_choice("model.pool", model.config.pool, ("none",))
        check_choice("model.tokens", model.config.tokens, (False,))
        self.horizon = check_int("horizon", horizon)

    def own_arguments(self) -> dict:
        """Return the horizon."""
        return {"horizon": self.horizon}

    def forward(
        self, u: Tensor, lengths: Tensor | None = None, rate: float = 1.0
    ) -> Tensor:
        """Map the context u (B, L, d_input) to (B, horizon, d_output).

        With lengths (B,), the forecast begins after each one's last step.
        """
        self.model.check_input(u, lengths)
        u = F.pad(clear_padding(u, lengths), (0, 0, 0, self.horizon))
        if lengths is None:
            return self.model(u, None, rate)[:, -self.horizon :]
        y = self.model(u, lengths + self.horizon, rate)
        after = torch.arange(self.horizon, device=u.device)
        rows = torch.arange(u.shape[0], device=u.device)[:, None]
        return y[rows, lengths[:, None] + after]  # (B, horizon, d_output)

    def observe(
        self,
        u: Tensor,
        state: ModelState,
        lengths: Tensor | None = None,
        rate: float = 1.0,
    ) -> ModelState:
        """Return the state after the next steps u (B, L, d_input)."""
        return self.model.chunk(u, state, lengths, rate)[1]

    def forecast(self, state: ModelState, rate: float = 1.0) -> Tensor:
        """Map a state to what follows: (B, horizon, d_output)."""
        batch = state.mean.shape[0] if isinstance(state, ModelState) else 0
        shape = batch, self.horizon, self.model.config.d_input
        u = self.model.decoder.weight.new_zeros(shape)
        return self.model.chunk(u, state, None, rate)[0]


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Draw a token for each row of logits.

    Args:
        logits: (B, V) scores of the V tokens.
        temperature: what they are divided by, >= 0; 0 takes the likeliest.
        top_k: how many of the likeliest can be drawn; None for all.
        generator: the source of the draws; None for PyTorch's own.

    Returns:
        (B,) int64 tokens.

    Source: book/tasks.md.
    """
    if temperature == 0 or logits.shape[0] == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        last = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    p = ((logits - logits.amax(-1, True)) / temperature).softmax(-1)
    device = logits.device if generator is None else generator.device
    drawn = torch.multinomial(p.to(device), 1, generator=generator)[:, 0]
    return drawn.to(logits.device)


class S4LanguageModel(StreamingTask):
    """Score each token as the next one. `forward` returns logits (B, L, V).

    The logits at a step are about the token of the step after it.

    Args:
        model: causal, of tokens, with an output for each token at each step:
            S4Config(d_input=V, d_output=V, pool="none", tokens=True, ...).

    Raises:
        TypeError: model is not an S4Model.
        ValueError: the model is of another kind than that.

    Source: Gu et al. 2022a, section 4.3; book/tasks.md.
    """

    def __init__(self, model: S4Model) -> None:
        super().__init__(model)
        c = model.config
        check_choice("model.pool", c.pool, ("none",))
        check_choice("model.tokens", c.tokens, (True,))
        check_choice("model.d_output", c.d_output, (c.d_input,))
        check_choice("model.bidirectional", c.bidirectional, (False,))

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        steps: int,
        generator: Generator | None = None,
        temperature: float = 1.0,
        *,
        top_k: int | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Continue sequences of tokens, one step of the recurrence for each.

        Args:
            prompt: (B, L) the tokens so far, at least one.
            steps: how many to add.
            generator: the source of the draws; None for PyTorch's own.
            temperature: what the logits are divided by, >= 0; 0 takes the
                likeliest token and draws nothing.
            top_k: how many of the likeliest tokens can be drawn; None for all.
            lengths: (B,) how many tokens of each prompt count, in 1 ... L.

        Returns:
            (B, steps) the tokens that follow each prompt. The mode of the
            model is "evaluation" meanwhile, and restored afterwards.

        Raises:
            TypeError: an argument is of a wrong kind.
            ValueError: steps or top_k < 1, temperature < 0, or prompt or
                lengths of another shape or out of range.
        """
        steps = check_int("steps", steps)
        _check_draw(generator, temperature, top_k)
        self.model.check_input(prompt, lengths, name="prompt")
        training = self.training
        self.eval()
        try:
            state, step = self.initial_state(prompt.shape[0]), self.stepper()
            logits, state = self.chunk(prompt, state, lengths)
            logits, drawn = pool_steps(logits, "last", lengths), []
            for k in range(steps):
                drawn.append(draw(logits, temperature, top_k, generator))
                if k < steps - 1:
                    logits, state = step(drawn[-1], state)
            return torch.stack(drawn, 1)
        finally:
            self.train(training)


def _check_draw(generator, temperature, top_k) -> None:
    """Refuse a wrong temperature, count or source of draws."""
    check_number("temperature", temperature)
    if top_k is not None:
        check_int("top_k", top_k)
    check_generator("generator", generator)


class PlainStepper(nn.Module):
    """One step whose state is plain tensors, as other programs know them.

    Args:
        stepper: what stepper() of a layer, model or task returns.

    Raises:
        TypeError: stepper is something else.

    Source: book/tasks.md.
    """

    def __init__(self, stepper: Stepper | ModelStepper) -> None:
        super().__init__()
        if not isinstance(stepper, Stepper | ModelStepper):
            raise TypeError(
                "stepper: expected what stepper() of a layer, model or task "
                f"returns, got {type(stepper).__name__}"
            )
        self.stepper = stepper

    def start(self, batch: int) -> tuple[Tensor, ...]:
        """Return the state of a fresh start, tensor by tensor."""
        if isinstance(self.stepper, Stepper):
            C = self.stepper.C
            return (C.new_zeros(check_int("batch", batch, minimum=0), *C.shape),)
        state = self.stepper.model.initial_state(batch)
        return (*state.layers, state.mean, state.count)

    def names(self) -> list[str]:
        """Return what the tensors of a state are called."""
        if isinstance(self.stepper, Stepper):
            return ["state"]
        layers = range(len(self.stepper.steppers))
        return [*(f"state_{i}" for i in layers), "mean", "count"]

    def example(self, batch: int) -> Tensor:
        """Return an input: zeros, or the first token."""
        if isinstance(self.stepper, Stepper):
            return self.stepper.D.new_zeros(batch, len(self.stepper.D))
        c, weight = self.stepper.model.config, self.stepper.model.decoder.weight
        if c.tokens:
            return torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return weight.new_zeros(batch, c.d_input)

    def forward(self, u: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Take one step: an input and a state to the output and a state."""
        if isinstance(self.stepper, Stepper):
            return self.stepper(u, *state)
        *layers, mean, count = state
        y, after = self.stepper(u, ModelState(tuple(layers), mean, count))
        return (y, *after.layers, after.mean, after.count)


OLDEST_OPSET = 18  # of ONNX, in which the operators of a step exist


def _open_batch(plain: PlainStepper) -> tuple[tuple, tuple]:
    """Return arguments for an export, and which of their axes are open."""
    B = torch.export.Dim("B", min=1)
    state = plain.start(2)
    return (plain.example(2), *state), ({0: B}, tuple({0: B} for _ in state))


def export_program(stepper: Stepper | ModelStepper) -> torch.export.ExportedProgram:
    """Write a step down, for PyTorch without this library.

    Args:
        stepper: what stepper() of a layer, model or task returns.

    Returns:
        A program of an input and a state, tensor by tensor, for any number of
        sequences; torch.export.save writes it to a file.

    Raises:
        TypeError: stepper is something else.

    Source: book/tasks.md.
    """
    plain = PlainStepper(stepper)
    given, axes = _open_batch(plain)
    return torch.export.export(plain, given, dynamic_shapes=axes)


def export_onnx(stepper: Stepper | ModelStepper, opset: int = OLDEST_OPSET) -> bytes:
    """Write a step down in ONNX, for runtimes without PyTorch.

    Args:
        stepper: what stepper() of a layer, model or task returns.
        opset: which version of ONNX's operators to use.

    Returns:
        The content of a file. Inputs are "u" and "state", or "state_0", ...,
        "mean" and "count"; outputs "y" and "next_state", or "next_state_0",
        ..., "next_mean" and "next_count".

    Raises:
        TypeError: stepper is something else, or opset not an integer.
        ValueError: opset is older than these operators, or newer than the
            installed onnx.
        ModuleNotFoundError: onnx or onnxscript is not installed.

    Source: book/tasks.md.
    """
    plain = PlainStepper(stepper)
    newest = _needs_onnx()
    if check_int("opset", opset) not in range(OLDEST_OPSET, newest + 1):
        raise ValueError(f"opset: expected {OLDEST_OPSET} ... {newest}, got {opset}")
    given, axes = _open_batch(plain)
    names = plain.names()
    program = torch.onnx.export(
        plain,
        given,
        dynamic_shapes=axes,
        opset_version=opset,
        verbose=False,
        input_names=["u", *names],
        output_names=["y", *(f"next_{name}" for name in names)],
    )
    return cast(Any, program).model_proto.SerializeToString()


def _needs_onnx() -> int:
    """Return the newest opset that is installed, or say what is missing."""
    try:
        import_module("onnxscript")
        return import_module("onnx").defs.onnx_opset_version()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'export_onnx needs {error.name}: pip install "s4mini[onnx]"',
            name=error.name,
        ) from error
