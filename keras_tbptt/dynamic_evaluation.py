"""Dynamic evaluation: a model that learns from the text it is evaluated on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._replicas import check_one_device
from keras_tbptt._reporting import batch_loss, penalty
from keras_tbptt._steps import Found, run_window
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.model import TBPTTModel


def evaluate_dynamically(
    model: TBPTTModel,
    windows: DocumentWindows,
    *,
    learning_rate: float,
    decay: float = 0.0,
    statistics: DocumentWindows | None = None,
    epsilon: float = 1e-3,
    verbose: Any = 0,
) -> dict[str, float]:
    """Evaluates a model that adapts to the text: scores each window, then learns from it.

    Each window is scored by the weights as they are, before the model has learnt from it. Then one
    gradient step follows, so that what recurs in a text is better predicted the next time (Krause
    et al. 2018, "Dynamic evaluation of neural sequence models"). A weight w with the
    gradient g, and its value w0 from training, becomes

        w - learning_rate * g / (r + epsilon) + decay * min(r / mean(r), 1 / decay) * (w0 - w)

    where r is the root mean square of the weight's gradients over `statistics`: the paper's RMS
    rule. Without `statistics` this is gradient descent with decay:

        w - learning_rate * g + decay * (w0 - w)

    The model runs without dropout, and its gradient reaches over one window, whatever
    `backprop_windows` says. The model is left as it was: weights, state and optimizer, after an
    error too.

    Args:
        model: A compiled `TBPTTModel`. With one lane (`TBPTTModel.resized`) the text is processed
            in order, so that the model has learnt from all that came before.
        windows: `DocumentWindows` with a target per step.
        learning_rate: float > 0. To be chosen on validation text.
        decay: float >= 0, below 1. Defaults to 0: nothing pulls weights back.
        statistics: Optional `DocumentWindows` of training text with a target per step, for r: some
            hundred windows are enough. Defaults to None.
        epsilon: float > 0. Added to r. Defaults to 1e-3.
        verbose: As in `keras.Model.evaluate`.

    Returns:
        A dict of the loss and the metrics, as `keras.Model.evaluate(return_dict=True)` gives.

    Raises:
        ValueError: If the windows do not fit the model or have no target per step, an argument is
            out of its range, or the model trains in float16, in which gradients underflow.

    Example:

    ```python
    one = model.resized(lanes=1, window=5)
    one.compile(loss="sparse_categorical_crossentropy", metrics=[keras_tbptt.metrics.Perplexity()])
    test = keras_tbptt.DocumentWindows.next_step(ids, window=5, lanes=1)
    keras_tbptt.evaluate_dynamically(one, test, learning_rate=0.1)["perplexity"]
    ```
    """
    _check(model, windows, learning_rate, decay, statistics, epsilon)
    variables = model.trainable_variables
    scales: list[Any] = [None] * len(variables)
    if statistics is not None:
        gradients = _SquaredGradients(model)
        with _evaluates_by(model, gradients):
            model.evaluate(statistics, verbose=0)
        scales = gradients.root_means()
    trained = [variable.numpy() for variable in variables]
    step = _LearnsFromEach(model, trained, scales, learning_rate, decay, epsilon)
    try:
        with _evaluates_by(model, step):
            return model.evaluate(windows, verbose=verbose, return_dict=True)
    finally:
        for variable, value in zip(variables, trained, strict=True):
            variable.assign(value)


class _RunsWithGradient:
    """A window's loss, with its gradient, in the place of `_steps.ForwardOnly`."""

    def __init__(self, model: TBPTTModel):
        self._model = model

    def __call__(self, x: Mapping[str, tf.Tensor], y: Any, weight: Any, share: Any) -> Found:
        """Runs a window of every lane, and uses the gradient of its loss."""
        model = self._model
        with tf.GradientTape() as tape:
            y_pred = run_window(model, x, training=False)
            loss = batch_loss(model, x["inputs"], y, y_pred, weight, share, training=False)
            # The decay takes the place of the penalties.
            learnt = loss.minimised - penalty(model, loss.minimised)
        gradients = tape.gradient(learnt, model.trainable_variables)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._use(i, tf.cast(tf.convert_to_tensor(gradient), "float32"))
        return Found(y_pred, loss)

    def _use(self, index: int, gradient: tf.Tensor) -> None:
        raise NotImplementedError


class _SquaredGradients(_RunsWithGradient):
    """Sums up the squares of each weight's gradients."""

    def __init__(self, model: TBPTTModel):
        super().__init__(model)
        self._sums = [tf.Variable(tf.zeros(v.shape)) for v in model.trainable_variables]
        self._count = tf.Variable(0.0)

    def __call__(self, x: Mapping[str, tf.Tensor], y: Any, weight: Any, share: Any) -> Found:
        """Runs a window of every lane, and adds the squares of its gradient."""
        self._count.assign_add(1.0)
        return super().__call__(x, y, weight, share)

    def _use(self, index: int, gradient: tf.Tensor) -> None:
        self._sums[index].assign_add(tf.square(gradient))

    def root_means(self) -> list[np.ndarray]:
        """The root mean square of each weight's gradients."""
        return [np.sqrt(total.numpy() / self._count.numpy()) for total in self._sums]


class _LearnsFromEach(_RunsWithGradient):
    """Takes a step after each window."""

    def __init__(
        self,
        model: TBPTTModel,
        trained: list[np.ndarray],
        scales: list[Any],
        learning_rate: float,
        decay: float,
        epsilon: float,
    ):
        super().__init__(model)
        given = [scale for scale in scales if scale is not None]
        # A mean over all weights of the model, as in the paper.
        mean = sum(s.sum() for s in given) / max(1, sum(s.size for s in given)) or 1.0
        self._trained = [tf.constant(value) for value in trained]
        self._rates: list[Any] = []
        self._decays: list[Any] = []
        for scale in scales:
            if scale is None:
                self._rates.append(tf.constant(learning_rate, "float32"))
                self._decays.append(tf.constant(decay, "float32"))
            else:
                self._rates.append(tf.constant(learning_rate / (scale + epsilon), "float32"))
                self._decays.append(tf.constant(np.minimum(decay * scale / mean, 1), "float32"))
        self._decay = decay

    def _use(self, index: int, gradient: tf.Tensor) -> None:
        variable = self._model.trainable_variables[index]
        change = -self._rates[index] * gradient
        if self._decay:
            away = tf.cast(self._trained[index] - variable.value, "float32")
            change += self._decays[index] * away
        variable.assign_add(tf.cast(change, variable.dtype))


@contextlib.contextmanager
def _evaluates_by(model: TBPTTModel, step: Callable) -> Iterator[None]:
    """Within this context, `evaluate` runs each window by `step`."""
    before = model.evaluates_by(step)
    try:
        yield
    finally:
        model.evaluates_by(before)


def _check(
    model: Any, windows: Any, learning_rate: Any, decay: Any, statistics: Any, epsilon: Any
) -> None:
    if not isinstance(model, TBPTTModel) or not model.compiled:
        raise ValueError(
            "Dynamic evaluation needs a compiled TBPTTModel: call model.compile(loss=...). "
            f"Received: {model!r}"
        )
    check_one_device(model, "Dynamic evaluation")
    half = [each.name for each in _keras.flatten_layers(model) if each.compute_dtype == "float16"]
    if half:
        raise ValueError(
            "Gradients underflow in float16: build the model in float32 or mixed_bfloat16. "
            f"Received: layers {half} that compute in float16"
        )
    for name, given in (("windows", windows), ("statistics", statistics)):
        timed = isinstance(given, DocumentWindows) and given.per_step is True
        if given is not None and not timed:
            raise ValueError(
                f"`{name}` must be DocumentWindows with a target per step "
                f"(DocumentWindows.next_step, or per_step=True). Received: {given!r}"
            )
    for name, value in (("learning_rate", learning_rate), ("decay", decay), ("epsilon", epsilon)):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}")
    ranges = (
        ("learning_rate", learning_rate, learning_rate > 0, "above 0"),
        ("decay", decay, 0 <= decay < 1, "in [0, 1)"),
        ("epsilon", epsilon, epsilon > 0, "above 0"),
    )
    for name, value, right, wanted in ranges:
        if not right or not np.isfinite(value):
            raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")
