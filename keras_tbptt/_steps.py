"""One step of training or evaluation: one window of every lane."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _batches, _keras
from keras_tbptt._reach import WindowHistory, backpropagate
from keras_tbptt._replicas import summed_over_replicas
from keras_tbptt._reporting import BatchLoss, batch_loss, uncounted_loss, weight_penalty
from keras_tbptt._shares import any_counts
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.layers import ConcatPooling
from keras_tbptt.layers._sampling_layer import mark_sampled, only_sampled, sampled_of, seen
from keras_tbptt.losses import FINAL_LOSSES
from keras_tbptt.optimizers import LazyAdam, sum_slices
from keras_tbptt.state import (
    call_masked,
    explicit_state,
    seed_variables,
    state_variables,
    stateful_layers,
)


class Found(NamedTuple):
    """What a step found: the outputs, and the loss of the batch.

    An output is None where only a sample of its classes was computed.
    """

    y_pred: Any
    loss: BatchLoss


def unpacked(
    model: keras.Model, data: Any, aligned: bool = False
) -> tuple[dict[str, tf.Tensor], Any, tf.Tensor]:
    """The parts of a batch, checked, in the form of the model.

    Args:
        model: A `TBPTTModel`.
        data: A batch `(x, y, sample_weight)`.
        aligned: bool. Whether documents must begin together in all lanes.

    Returns:
        Inputs with all lane flags, targets in the rank of the outputs, and weights.
    """
    x, y, sample_weight = _batches.unpack(data)
    y, sample_weight = _batches.as_outputs(y, sample_weight, model)
    x = check_lanes(model, x, aligned)
    if tf.nest.is_nested(x.get("known")):
        x["known"] = _keras.targets_like(model, x["known"], model.output)
    return x, y, sample_weight


def check_lanes(
    model: keras.Model, x: Mapping[str, tf.Tensor], aligned: bool = False
) -> dict[str, tf.Tensor]:
    """Checks that windows continue their lanes.

    Args:
        model: A `TBPTTModel`.
        x: Inputs and lane flags.
        aligned: bool. Whether documents must begin together in all lanes.

    Returns:
        Inputs with all lane flags.
    """
    checks = model.window_order.follow(x, aligned) if _batches.has_order(x) else []
    x = _batches.with_all_flags(x, model.all_lanes, model.window)
    with tf.control_dependencies(checks):
        return tf.nest.map_structure(tf.identity, dict(x))


def pooling_states(model: keras.Model) -> list[bool]:
    """For each state variable, whether it belongs to a pooling layer.

    Args:
        model: A built `keras.Model` with stateful layers.
    """
    return [
        isinstance(layer, ConcatPooling)
        for layer in stateful_layers(model)
        for _ in keras.tree.flatten(layer.states)
    ]


def run_window(model: keras.Model, x: Mapping[str, tf.Tensor], training: bool) -> Any:
    """The forward pass over one window of every lane, from the state as it is.

    Args:
        model: A `TBPTTModel`.
        x: Inputs and lane flags (see `DocumentWindows.dataset`).
        training: bool. Whether dropout and the like apply.

    Returns:
        The model's outputs.
    """
    with only_sampled(training and model.uses_samples_alone):
        y_pred = call_masked(model, x["inputs"], training, _real_steps(model, x))
    # Keras would weight the loss by the masks a second time.
    return keras.tree.map_structure(_without_mask, y_pred)


class ForwardOnly:
    """A window's loss without a gradient.

    Args:
        model: A `TBPTTModel`.
    """

    def __init__(self, model: keras.Model):
        self._model = model

    def __call__(self, x: Mapping[str, tf.Tensor], y: Any, weight: Any, share: Any) -> Found:
        """Runs a window of every lane.

        Args:
            x: Inputs and lane flags.
            y: Targets.
            weight: How much each row counts in the loss, weights of documents included.
            share: How much each row counts, without the weights of documents.
        """
        y_pred = run_window(self._model, x, training=False)
        return Found(
            y_pred, batch_loss(self._model, x["inputs"], y, y_pred, weight, share, training=False)
        )


class OneWindow:
    """The gradient of each window's loss, cut at the window's beginning.

    Args:
        model: A `TBPTTModel`.
    """

    def __init__(self, model: keras.Model):
        self._model = model
        self.history: WindowHistory | None = None

    def prepare(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Begins a training.

        Args:
            x: `tf.TensorSpec`s of the inputs and lane flags.
            y: `tf.TensorSpec`s of the targets.
            sample_weight: `tf.TensorSpec` of the weights.
        """

    def steps_in(self, windows: DocumentWindows) -> int:
        """How many steps the optimizer makes in an epoch.

        Args:
            windows: What is trained on.
        """
        return _learning_windows(self._model, windows)

    def learns(self, x: Mapping[str, tf.Tensor], share: Any) -> bool | tf.Tensor:
        """Whether there is anything to learn in a window.

        Args:
            x: Inputs and lane flags, of all replicas of this worker.
            share: How much each row counts, without the weights of documents.
        """
        if not self._model.may_only_run and "known" not in x:
            return True
        return self._model.replicas.any(any_counts(share))

    def __call__(
        self, x: Mapping[str, tf.Tensor], y: Any, weight: Any, share: Any, learns: bool | tf.Tensor
    ) -> Found:
        """Learns from a window of every lane.

        Args:
            x: Inputs and lane flags.
            y: Targets.
            weight: How much each row counts in the loss, weights of documents included.
            share: How much each row counts, without the weights of documents.
            learns: What `learns` has returned.
        """
        model = self._model
        build_optimizer(model)
        zero = tf.zeros([], keras.backend.floatx())
        return _if(
            learns,
            lambda: self._learn(x, y, weight, share),
            lambda: Found(seen(run_window(model, x, training=True)), BatchLoss(zero, zero, zero)),
        )

    def _learn(self, x: Mapping[str, tf.Tensor], y: Any, weight: Any, share: Any) -> Found:
        model = self._model
        with tf.GradientTape() as tape:
            y_pred = run_window(model, x, training=True)
            # With the penalties of now: the optimizer's step changes the weights.
            loss = batch_loss(model, x["inputs"], y, y_pred, weight, share, training=True)
            scaled = model.optimizer.scale_loss(loss.minimised)
        gradients = tape.gradient(scaled, model.trainable_variables)
        # An embedding's gradient comes in a slice for each word. Keras's optimizers would square
        # slices of the same word one by one, and clip by them, instead of by their sum.
        gradients = [
            g if g is None or lazy else tf.convert_to_tensor(g)
            for g, lazy in zip(gradients, _lazy(model), strict=True)
        ]
        _apply(model, gradients)
        return Found(seen(y_pred), loss)


class SeveralWindows:
    """The gradient of each window's loss through the windows before it (see `backprop_windows`).

    Args:
        model: A `TBPTTModel`.
        cuts: What draws the cuts of `"artbp"`; None for a reach without chance.
    """

    def __init__(self, model: keras.Model, cuts: keras.random.SeedGenerator | None):
        self._model = model
        self._cuts = cuts
        self._sliding = isinstance(model.backprop_windows, int)
        self.history: WindowHistory | None = None
        self._histories: dict[tuple, WindowHistory] = {}  # a step keeps that of its trace

    def prepare(self, x: Any, y: Any, sample_weight: Any) -> None:
        """Begins a training without windows to look back to.

        Args:
            x: `tf.TensorSpec`s of the inputs and lane flags.
            y: `tf.TensorSpec`s of the targets.
            sample_weight: `tf.TensorSpec` of the weights.
        """
        self._history_of(self._kept_of(x, y, sample_weight)).clear()

    def steps_in(self, windows: DocumentWindows) -> int:
        """How many steps the optimizer makes in an epoch; the expected number where cuts are drawn.

        Args:
            windows: What is trained on.
        """
        if self._sliding:
            return _learning_windows(self._model, windows)
        if self._cuts is not None:
            plan = windows.plan
            certain = int((plan.ends | (plan.length == 0)).all(axis=1).sum())  # as in `learns`
            drawn = self._model.cut_probability * (len(windows) - certain)
            return max(1, certain + round(drawn))
        return int(windows.starts.any(axis=1).sum())

    def learns(self, x: Mapping[str, tf.Tensor], share: Any) -> bool | tf.Tensor:
        """Whether it is time to learn.

        Args:
            x: Inputs and lane flags, of all replicas.
            share: How much each row counts, without the weights of documents.
        """
        replicas = self._model.replicas
        if self._sliding:
            return replicas.any(any_counts(share))
        learns = replicas.all(tf.reduce_all(x["ends"] | (x["lengths"] == 0)))  # in every lane
        if self._cuts is not None:
            draw = keras.random.uniform([], seed=self._cuts)
            learns |= tf.cast(draw, "float32") < self._model.cut_probability
        return learns

    def __call__(
        self, x: Mapping[str, tf.Tensor], y: Any, weight: Any, share: Any, learns: bool | tf.Tensor
    ) -> Found:
        """Runs a window, keeps what it takes to run it again, and learns when it is time.

        Args:
            x: Inputs and lane flags.
            y: Targets.
            weight: How much each row counts in the loss, weights of documents included.
            share: How much each row counts, without the weights of documents.
            learns: What `learns` has returned.
        """
        model = self._model
        window = self._kept_of(x, y, weight)
        history = self._history_of(window)
        history.append(window)
        y_pred = run_window(model, x, training=True)
        loss = batch_loss(model, x["inputs"], y, y_pred, weight, share, training=True)

        crossing = 1.0 if self._cuts is None else 1 / (1 - model.cut_probability)
        pooled = model.window_loss == "pooled"
        crossings = [crossing if pools or not pooled else 0.0 for pools in pooling_states(model)]

        def learn() -> bool:
            gradients = backpropagate(
                history,
                self._run_again,
                [variable.value for variable in model.trainable_variables],
                window["states"],
                crossings,
                slices=_lazy(model),
            )
            _apply(model, gradients)
            if not self._sliding:
                history.clear()
            return True

        build_optimizer(model)
        _if(learns, learn, lambda: False)
        return Found(seen(y_pred), loss)

    def _run_again(
        self, window: Mapping[str, Any], back: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The loss of a window that was run `back` windows ago, and the state after it."""
        model = self._model
        y_pred, new_states = explicit_state(model)(
            window["inputs"], window["states"], True, _real_steps(model, window), window["seeds"]
        )
        y_pred = keras.tree.map_structure(_of_shape, y_pred, model.output)
        given = window["inputs"], window["y"], y_pred, window["weight"]
        loss = uncounted_loss(model, *given, training=True)
        newest = tf.cast(back == 0, loss.dtype)
        if self._sliding:  # the losses of the others were learnt from before
            loss *= newest
        else:
            once = weight_penalty(model, loss) / model.replicas.count  # in a step, of all replicas
            loss -= (1 - newest) * once
        return model.optimizer.scale_loss(loss), new_states

    def _kept_of(self, x: Mapping[str, Any], y: Any, weight: Any) -> dict[str, Any]:
        """What it takes to run a window again, before it is run."""
        model = self._model
        return {
            **{name: x[name] for name in ("inputs", "starts", "lengths")},
            "states": [tf.identity(variable.value) for variable in state_variables(model)],
            "seeds": [tf.identity(variable.value) for variable in seed_variables(model)],
            "y": y,
            "weight": weight,
        }

    def _history_of(self, window: Any) -> WindowHistory:
        """The history for windows like this; inside a graph too, variables are made outside."""
        specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), window)
        key = tuple(tf.nest.flatten(specs))
        if key not in self._histories:
            limit = self._model.backprop_windows if self._sliding else None
            with tf.init_scope(), model_scope(self._model):
                self._histories[key] = WindowHistory(specs, limit)
        self.history = self._histories[key]
        return self.history


def model_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """Where a model's variables are made: on all of its replicas.

    Args:
        model: A `TBPTTModel`.
    """
    strategy = model.replicas.strategy
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def build_optimizer(model: keras.Model) -> None:
    """Makes the optimizer's variables, which cannot be made inside a branch of `tf.cond`.

    Args:
        model: A compiled model.
    """
    if not model.optimizer.built:
        with tf.init_scope():
            model.optimizer.build(model.trainable_variables)


def _if(condition: bool | tf.Tensor, yes: Callable, no: Callable) -> Any:
    if isinstance(condition, bool):
        return yes() if condition else no()
    return tf.cond(condition, yes, no)


def _lazy(model: keras.Model) -> list[bool]:
    """For each variable, whether its optimizer updates only the rows that were used."""
    optimizer, variables = model.optimizer, model.trainable_variables
    return [isinstance(_keras.optimizer_of(optimizer, v), LazyAdam) for v in variables]


def _apply(model: keras.Model, gradients: list[Any]) -> None:
    """Makes an optimizer step. Gradients are summed over replicas before they are clipped."""
    optimizer, variables = model.optimizer, model.trainable_variables
    if model.replicas.count == 1:
        optimizer.apply(gradients, variables)
    else:
        # A word that occurs several times is sent once.
        each = [sum_slices(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients]
        _keras.apply_summed(optimizer, summed_over_replicas(each), variables)


def _real_steps(model: keras.Model, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """bool `[lanes, window]`: the steps that are no padding, and in no idle lane."""
    return tf.sequence_mask(x["lengths"], model.window)


def _learning_windows(model: keras.Model, windows: DocumentWindows) -> int:
    """In how many windows of the coming epoch any lane has something to learn."""
    plan = windows.plan
    learns = plan.ends if model.window_loss in FINAL_LOSSES else plan.length > 0
    if model.burn_in:
        learns = learns & (plan.ends | (plan.offset >= model.burn_in * model.window))
    if windows.has_unknown:
        known = tf.nest.flatten(windows.known)
        learns = learns & np.any([each > 0 for each in known], axis=0)
    return int(learns.any(axis=1).sum())


def _without_mask(tensor: tf.Tensor, shape: Any = None) -> tf.Tensor:
    """A copy of an output without its mask, which can still be sampled."""
    return mark_sampled(_keras.without_mask(tensor, shape), sampled_of(tensor))


def _of_shape(tensor: tf.Tensor, symbolic: keras.KerasTensor) -> tf.Tensor:
    """Without its mask, and of the shape that the model's own batch gives it."""
    return _without_mask(tensor, symbolic.shape)
