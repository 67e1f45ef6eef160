"""Forecasts of several steps: a trained model's outputs are its next inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt._graphs import kept_with
from keras_tbptt._inputs import ModelInputs
from keras_tbptt._tensors import has_time_axis
from keras_tbptt._window_checks import check_windows, embeddings_of_ids
from keras_tbptt.data._documents import as_array, check_values, read_dataset
from keras_tbptt.data._inputs import documents_by_name, static_by_name
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.serving._stream import DocumentRunner, check_single_steps, functional
from keras_tbptt.types import Documents


def forecast(
    model: keras.Model,
    documents: Documents,
    steps: int,
    *,
    target: str | None = None,
    future: Mapping[str, Any] | None = None,
    static: Any = None,
    offsets: Any = None,
    lengths: Any = None,
) -> np.ndarray:
    """Forecasts the steps after each document, by a model that predicts the next one.

    The model runs each document window by window. Its last output is the forecast of the first
    step, and the next input; so it goes on, one step at a time, with the state carried from step to
    step, as a network that generates a sequence does (Graves 2013, "Generating sequences with
    recurrent neural networks", section 2). Errors add up from step to step. The model is not
    rebuilt, and its state of training is not touched.

    Args:
        model: A functional model with stateful layers whose one output is the next step of one of
            its float inputs, `[lanes, window, F]` or `[lanes, F]`, such as a `TBPTTModel` trained
            on `DocumentWindows.next_step`.
        documents: What came before, in any form that `DocumentWindows` takes, any number at once.
        steps: int >= 1. How many steps to forecast.
        target: Optional str. With several inputs per step, the one that the output is the next step
            of.
        future: Optional dict of names to arrays `[documents, steps, ...]`: the other inputs per
            step, at the steps that are forecast, such as the hour of the day. The values at the
            last step are not used.
        static: As in `DocumentWindows`.
        offsets: As in `DocumentWindows`.
        lengths: As in `DocumentWindows`.

    Returns:
        float32 `[documents, steps, F]`.

    Raises:
        ValueError: If the documents do not fit the model, its output is not the next step of an
            input, values of `future` are missing, an argument is out of its range, or a layer looks
            at other steps of the window, such as a convolution.

    Example:

    ```python
    windows = keras_tbptt.DocumentWindows.next_step(series, window=50, lanes=8)
    ...
    keras_tbptt.forecast(model, [series[0]], steps=24)  # [1, 24, 1]
    ```
    """
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"`steps` must be an integer >= 1. Received: steps={steps!r}")
    forecaster = _forecaster_of(model, target)
    form = forecaster.form
    if isinstance(documents, tf.data.Dataset):
        documents, _ = read_dataset(documents, None)
    check_windows(
        DocumentWindows(
            documents,
            static=static,
            offsets=offsets,
            lengths=lengths,
            window=form.window,
            lanes=form.lanes,
        ),
        forecaster.model,
    )
    inputs, bounds = documents_by_name(documents, offsets, lengths)
    rows = len(bounds) - 1
    given = {}
    for name, own in zip(form.steps, _in_order(form.steps, inputs), strict=True):
        values = np.asarray(own.values[bounds[0] : bounds[-1]])
        given[name] = tf.RaggedTensor.from_row_splits(values, bounds - bounds[0]).to_tensor()
    for name, own in static_by_name(static, rows, inputs if form.named else None).items():
        given[name] = tf.constant(own.values)
    ahead = _checked_future(future or {}, forecaster, rows, int(steps))
    return forecaster.compiled(
        given, tf.constant(np.diff(bounds), "int32"), ahead, tf.constant(int(steps))
    ).numpy()


class _Forecaster:
    """The graph that forecasts.

    Args:
        model: As in `forecast`.
        target: As in `forecast`.

    Raises:
        ValueError: As `forecast`, for these arguments.
    """

    def __init__(self, model: keras.Model, target: str | None):
        self.model = functional(model)
        self.form = ModelInputs(self.model)
        self.target = self._target_of(target)
        check_single_steps(self.model, "A forecast")
        self._runner = DocumentRunner(self.model, last_step=True)
        self.compiled = tf.function(self.run, reduce_retracing=True, autograph=False)
        self._check_single_steps()

    def run(
        self,
        inputs: dict[str, tf.Tensor],
        lengths: tf.Tensor,
        future: dict[str, tf.Tensor],
        steps: tf.Tensor,
    ) -> tf.Tensor:
        """Forecasts.

        Args:
            inputs: Name to tensor, `[batch, time, ...]` or static `[batch, ...]`.
            lengths: int32 `[batch]`.
            future: Name to tensor `[batch, steps, ...]`.
            steps: int32 scalar.

        Returns:
            float32 `[batch, steps, F]`.
        """
        output, states = self._runner.run(self.form.as_given(inputs), lengths)
        static = {name: inputs[name] for name in self.form.static}
        size = self.form.tensors[self.target].shape[2]
        written = tf.TensorArray("float32", steps, element_shape=[None, size])

        def go_on(step: tf.Tensor, latest: tf.Tensor, states: Any, written: Any) -> tuple:
            covariates = {name: values[:, step : step + 1] for name, values in future.items()}
            piece = {self.target: latest[:, None], **covariates, **static}
            output, states = self._runner.run(
                self.form.as_given(piece), tf.ones_like(lengths), None, states
            )
            latest = _only(output)
            return step + 1, latest, states, written.write(step + 1, latest)

        latest = _only(output)
        any_batch = [tf.TensorShape([None, *state.shape[1:]]) for state in states]
        written = tf.while_loop(
            lambda step, *_: step < steps - 1,
            go_on,
            (0, latest, states, written.write(0, latest)),
            shape_invariants=(
                tf.TensorShape([]),
                tf.TensorShape([None, size]),
                any_batch,
                tf.TensorShape([]),
            ),
            parallel_iterations=1,
        )[-1]
        return tf.transpose(written.stack(), [1, 0, 2])

    def _target_of(self, target: str | None) -> str:
        """The name of the input that the output is the next step of."""
        if target is None and len(self.form.steps) == 1:
            [target] = self.form.steps
        if target not in self.form.steps:
            raise ValueError(
                "`target` must name the input per step that the output is the next step of. "
                f"Received: target={target!r}, inputs per step {[*self.form.steps]}"
            )
        given, outputs = self.form.tensors[target], keras.tree.flatten(self.model.output)
        own = [t.shape[2:] if has_time_axis(t, self.form.window) else t.shape[1:] for t in outputs]
        floats = keras.backend.is_float_dtype(given.dtype)
        if len(outputs) != 1 or not floats or len(given.shape) != 3 or own != [given.shape[2:]]:
            raise ValueError(
                "A forecast needs a model with one output, the next step of a float input "
                "[lanes, window, F], of as many numbers. "
                f"Received: input {target!r} of shape {tuple(given.shape)}, dtype={given.dtype}, "
                f"outputs of shapes {[tuple(t.shape) for t in outputs]}"
            )
        return target

    def _check_single_steps(self) -> None:
        """Runs a window at once and step by step, and compares what comes out."""
        rng, window = np.random.default_rng(0), self.form.window
        inputs = {}
        for name, own in self.form.tensors.items():
            shape = (2, *own.shape[1:])
            floats = keras.backend.is_float_dtype(own.dtype)
            values = rng.normal(size=shape) if floats else np.ones(shape)
            inputs[name] = values.astype("float32" if floats else "int32")

        @tf.function(autograph=False)
        def outputs() -> tuple[tf.Tensor, tf.Tensor]:
            full, one = tf.fill([2], window), tf.ones([2], "int32")
            at_once, _ = self._runner.run(self.form.as_given(inputs), full)
            states, alone = None, None
            first, states = self._runner.run(self._at(inputs, 0), one)
            _, alone, _ = tf.while_loop(
                lambda step, *_: step < window,
                lambda step, _, states: (
                    step + 1,
                    *_with_only(self._runner.run(self._at(inputs, step), one, None, states)),
                ),
                (1, _only(first), states),
                shape_invariants=(
                    tf.TensorShape([]),
                    tf.TensorShape([None, *_only(first).shape[1:]]),
                    [tf.TensorShape([None, *state.shape[1:]]) for state in states],
                ),
            )
            return _only(at_once), alone

        at_once, alone = (tensor.numpy() for tensor in outputs())
        half = self.model.compute_dtype in ("float16", "bfloat16")
        tolerance = (0.05 if half else 1e-3) * max(1.0, np.abs(at_once).max())
        if not np.allclose(at_once, alone, rtol=0, atol=tolerance):
            raise ValueError(
                "A forecast runs a model one step at a time, but a layer of this model looks at "
                "other steps of the window, such as a convolution: let recurrent layers alone "
                "carry what came before. Received: outputs that differ by "
                f"{np.abs(at_once - alone).max():.3g} in model {self.model.name!r}"
            )

    def _at(self, inputs: dict[str, Any], step: Any) -> Any:
        """The inputs of one step."""
        tensors = {name: tf.constant(value) for name, value in inputs.items()}
        return self.form.map(
            self.form.as_given(tensors), lambda steps: tf.gather(steps, [step], axis=1)
        )


def _only(output: Any) -> tf.Tensor:
    """float32 `[batch, F]`: the one output of a model."""
    return tf.cast(keras.tree.flatten(output)[0], "float32")


def _with_only(found: tuple[Any, list[tf.Tensor]]) -> tuple[tf.Tensor, list[tf.Tensor]]:
    return _only(found[0]), found[1]


def _forecaster_of(model: keras.Model, target: str | None) -> _Forecaster:
    return kept_with(model, ("forecaster", target), lambda: _Forecaster(model, target))


def _in_order(steps: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Any]:
    """The inputs of documents in the order of the model's; the only one has no name."""
    return [inputs.get(name, inputs.get("")) for name in steps]


def _checked_future(
    future: Mapping[str, Any], forecaster: _Forecaster, rows: int, steps: int
) -> dict[str, tf.Tensor]:
    """The other inputs per step, at the steps that are forecast."""
    others = {name: t for name, t in forecaster.form.steps.items() if name != forecaster.target}
    arrays = {name: as_array(values) for name, values in future.items()}
    expected = {name: (rows, steps, *t.shape[2:]) for name, t in others.items()}
    received = {name: None if a is None else a.shape for name, a in arrays.items()}
    if expected != received:
        raise ValueError(
            "`future` must have the other inputs per step, at each step that is forecast: arrays "
            f"of shapes {expected}. Received: shapes {received}"
        )
    for name, array in arrays.items():
        floats = keras.backend.is_float_dtype(others[name].dtype)
        check_values(array, f"future[{name!r}]", ids=not floats)
        for layer in embeddings_of_ids(forecaster.model, [others[name]]):
            least = 1 if layer.mask_zero else 0
            if array.min() < least or array.max() >= layer.input_dim:
                raise ValueError(
                    f"`future[{name!r}]` must be ids from {least} to {layer.input_dim - 1}, which "
                    f"layer {layer.name!r} looks up. Received: ids from {array.min()} to "
                    f"{array.max()}"
                )
    return {name: tf.cast(array, others[name].dtype) for name, array in arrays.items()}
