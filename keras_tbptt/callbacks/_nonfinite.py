"""Finds the window, lanes and documents that made a loss or a weight not finite."""

from __future__ import annotations

from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _batches
from keras_tbptt._steps import run_window
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.model import TBPTTModel
from keras_tbptt.state import preserve_states, reset_states, state_variables


def all_finite(variables: Iterable[tf.Variable]) -> bool:
    """Whether no variable contains a NaN or an infinity.

    Args:
        variables: `tf.Variable`s of any dtype. Integers are finite.

    Returns:
        bool.
    """
    floats = [v for v in variables if v.dtype.is_floating]
    return all(bool(tf.reduce_all(tf.math.is_finite(v))) for v in floats)


def find_cause(
    model: keras.Model, windows: DocumentWindows, begin: tuple[int, int], end: tuple[int, int]
) -> str:
    """Trains again from a finite state, window by window, until something is not finite.

    Args:
        model: `keras.Model` with its weights, optimizer and states as they were at `begin`. It is
            trained.
        windows: `DocumentWindows`. What the model is trained on.
        begin: `(epoch, window)`, the `windows.epoch` and the index of the first window.
        end: `(epoch, window)`, where the search stops.

    Returns:
        A phrase that names the window, its lanes and their documents.
    """
    train_step = tf.function(model.train_step, autograph=False)
    kept = [v.value for v in (*model.trainable_variables, *state_variables(model))]
    model.reset_metrics()
    for epoch in range(begin[0], end[0] + 1):
        windows.epoch = epoch
        plan = windows.plan
        for window, data in enumerate(windows.dataset(flags=isinstance(model, TBPTTModel))):
            if (epoch, window) < begin:
                continue
            if (epoch, window) >= end:
                break
            reset_states(model, plan.starts[window])
            before = [value.numpy() for value in kept]
            loss = train_step(data)["loss"]
            if np.isfinite(loss) and all_finite(v.value for v in model.trainable_variables):
                continue
            for variable, value in zip(kept, before, strict=True):
                variable.assign(value)
            lanes, why = _lanes(model, data, plan.document[window] >= 0)
            return (
                f"window {window + 1} of {len(windows)}, "
                f"lanes {lanes.tolist()} ({why}), where documents "
                f"{plan.document[window, lanes].tolist()} continue from steps "
                f"{(plan.begin + plan.offset)[window, lanes].tolist()}"
            )
    return "no window: training again from the last checkpoint stayed finite"


def _lanes(model: keras.Model, data: tuple, busy: np.ndarray) -> tuple[np.ndarray, str]:
    """The lanes that cause it, and why, before the model is trained on the window."""
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    y, weight = _batches.as_outputs(y, weight, model)
    with preserve_states(model):
        if isinstance(model, TBPTTModel):
            y_pred = run_window(model, x, training=False)
        else:
            y_pred = model(x, training=False)
    y_pred = keras.tree.map_structure(tf.identity, y_pred)  # drops Keras masks

    def loss_of(lane: int) -> float:
        # In every row, because weights of 0 for the others would not help: 0 * inf is NaN.
        alone = [
            keras.tree.map_structure(lambda t: tf.gather(t, [lane] * len(busy)), part)
            for part in (y, y_pred, weight)
        ]
        return float(model.compute_loss(None, *alone, training=False))

    losses = np.array([loss_of(lane) if busy[lane] else 0.0 for lane in range(len(busy))])
    outputs = [np.isfinite(t).reshape(len(busy), -1).all(1) for t in keras.tree.flatten(y_pred)]
    bad = np.flatnonzero(busy & ~(np.isfinite(losses) & np.all(outputs, axis=0)))
    if len(bad):
        return bad, "whose outputs or losses are not finite"
    why = "whose loss is the largest; the loss was finite, the weight update was not"
    return np.array([losses.argmax()]), why
