"""What a model, or a model on several replicas, cannot be compiled with."""

from __future__ import annotations

import re
import warnings
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._replicas import copies
from keras_tbptt._sampling import last_layers
from keras_tbptt.layers._sampling_layer import SamplingLayer
from keras_tbptt.state import initial_states

_OF_A_DEVICE = ("gradient_accumulation_steps", "ema_overwrite_frequency")


def check_optimizer_keys(model: keras.Model) -> None:
    """Refuses a `MultiOptimizer` of which an optimizer would update nothing.

    Keras would give the weights that it was meant for to the default optimizer.

    Args:
        model: A compiled `TBPTTModel`.

    Raises:
        ValueError: If a key of its `OptimizerMap` is the path of no weight.
    """
    paths = [variable.path for variable in model.variables]
    keys = _keras.keys_of_optimizers(model.optimizer)
    wrong = [key for key in keys if not any(re.fullmatch(key, path) for path in paths)]
    if wrong:
        raise ValueError(
            "Each key of an OptimizerMap must be the path of a weight or a pattern of paths, such "
            f"as 'lstm/.*': give the layer that name. Received: {wrong}; the weights are {paths}"
        )


def check_trainable(model: keras.Model) -> None:
    """Refuses weights that were frozen when the optimizer was built, and are trainable now.

    A step that is traced would go on without them, and another one fail.

    Args:
        model: A compiled `TBPTTModel`.

    Raises:
        ValueError: If there are any.
    """
    unknown = _keras.unknown_to(model.optimizer, model.trainable_variables)
    if unknown:
        raise ValueError(
            "Layers have become trainable since the model was compiled: call `compile` again. "
            f"Received: {[variable.path for variable in unknown]}"
        )


def warn_of_learnt_states(model: keras.Model) -> None:
    """Warns of weights that a state begins with, because a reset takes no gradient.

    Args:
        model: A compiled `TBPTTModel`.
    """
    with tf.GradientTape() as tape:
        states = initial_states(model)
    variables = model.trainable_variables
    gradients = tape.gradient(states, [v.value for v in variables])
    found = [v.path for v, g in zip(variables, gradients, strict=True) if g is not None]
    if found:
        warnings.warn(
            "The state of a document begins with weights that do not learn, because no gradient "
            f"flows through a reset: set trainable=False for them. Received: {found}",
            stacklevel=2,
        )


def check_optimizer(model: keras.Model) -> None:
    """Refuses an optimizer that is not of the replicas, or that each would use on its own.

    Args:
        model: A compiled `TBPTTModel` that was built under a strategy.

    Raises:
        ValueError: If there is such an optimizer.
    """
    optimizer, replicas = model.optimizer, model.replicas
    if optimizer is None:
        return
    every = _keras.unwrapped(optimizer)
    if any(_keras.strategy_of(each) is not replicas.strategy for each in every):
        raise ValueError(
            "The optimizer does not belong to the strategy of the model: make it, and call "
            f"compile, within strategy.scope(). Received: {optimizer!r} of another scope"
        )
    if replicas.count == 1:
        return
    wrong = [
        f"{name}={value!r}"
        for each in every
        for name in _OF_A_DEVICE
        if (value := getattr(each, name, None))
    ]
    if wrong:
        raise ValueError(
            "Keras would do this on each replica before gradients are summed up: leave it out, or "
            f"train on one device. Received: {', '.join(wrong)}"
        )


def check_jit(model: keras.Model) -> None:
    """Refuses XLA where it cannot compile a step.

    Args:
        model: A `TBPTTModel`.

    Raises:
        ValueError: If the gradient flows through several windows, or there are several replicas.
    """
    strategy = model.replicas.strategy
    if model.backprop_windows != 1 or strategy is not None:
        raise ValueError(
            "XLA cannot compile a gradient through several windows, or steps of several replicas: "
            "leave jit_compile out, or set backprop_windows=1 and use one device. "
            "Received: jit_compile=True, "
            f"backprop_windows={model.backprop_windows!r}, strategy={strategy}"
        )


def check_losses(model: keras.Model, y: Any, sample_weight: Any) -> None:
    """Refuses losses in which rows cannot count by their weights, or targets meet other outputs.

    Args:
        model: A compiled `TBPTTModel`.
        y: `tf.TensorSpec`s of the targets, in the structure of the outputs.
        sample_weight: `tf.TensorSpec`s of their weights.

    Raises:
        ValueError: If there is such a loss.
    """
    outputs = keras.tree.flatten(model.output)
    targets, weights = keras.tree.flatten(y), keras.tree.flatten(sample_weight)
    if len(targets) != len(outputs):
        return  # which Keras says in its own words
    last = list(last_layers(outputs))
    places = keras.tree.pack_sequence_as(model.output, range(len(outputs)))
    for entry in _keras.losses_of(model, y, places):
        target, output = targets[entry.value], outputs[entry.value]
        weight = weights[entry.value if len(weights) > 1 else 0]
        if target is None or isinstance(last[entry.value], SamplingLayer):
            continue  # which says itself what it cannot be trained with
        if getattr(entry.loss, "ignore_class", None) is not None:
            raise ValueError(
                "`ignore_class` divides by a count that padding is part of: leave it out, and give "
                "those steps or documents a weight of 0. "
                f"Received: ignore_class={entry.loss.ignore_class}"
            )
        if getattr(entry.loss, "reduction", "sum") in (None, "none"):
            raise ValueError(
                "A loss must be reduced to one number: leave `reduction` out. "
                f"Received: {entry.loss!r} with reduction={entry.loss.reduction!r}"
            )
        ones = [1] * (len(output.shape) - len(target.shape))
        if entry.pairs_elements and not _may_be([*target.shape, *ones], output.shape):
            raise ValueError(
                "Each number of an output needs a target of its own, or the loss would compare it "
                f"with that of another. Received: targets of shape {target.shape}, an output of "
                f"shape {output.shape}, and the loss {entry.loss.name!r}"
            )
        shape = entry.shape(target, output)
        allowed = [output.shape[:-1], (*output.shape[:-1], 1), weight.shape]
        if shape is not None and not any(_may_be(shape, each) for each in allowed):
            raise ValueError(
                "A loss must give a number for each row of an output, or for each of its steps if "
                "it has a target per step, because they count by their weights: leave out the mean "
                f"over them. Received: a loss {entry.loss.name!r} of shape {shape}, an output of "
                f"shape {output.shape}"
            )


def _may_be(shape: Any, other: Any) -> bool:
    """Whether two shapes can be the same, as far as they are known."""
    return len(shape) == len(other) and all(
        None in (one, two) or one == two for one, two in zip(shape, other, strict=True)
    )


def check_metrics(model: keras.Model, y: Any) -> None:
    """Refuses functions that give one number for a batch, which cannot leave idle rows out.

    Args:
        model: A `TBPTTModel` whose metrics are built.
        y: `tf.TensorSpec`s of the targets.

    Raises:
        ValueError: If a metric is such a function.
    """
    scalar = _keras.scalar_metrics(model, y)
    if scalar:
        raise ValueError(
            "A function as a metric must give a number for each row, because rows count by their "
            "weights: leave out the mean over the batch, or use a keras.metrics.Metric. "
            f"Received: {scalar}"
        )


def check_compiled(model: keras.Model) -> None:
    """Refuses losses and metrics that the sum of the replicas would not be right for.

    Args:
        model: A `TBPTTModel` whose losses and metrics are built.

    Raises:
        ValueError: If there are such losses or metrics.
    """
    local = len(copies(model.trainable_variables[0])) if model.trainable_variables else 1
    outside = [v.path for v in model.metrics_variables if len(copies(v)) != local]
    if outside:
        raise ValueError(
            "The metrics do not belong to the strategy of the model: make them within "
            f"strategy.scope(). Received: {outside}"
        )
    if model.replicas.count == 1:
        return
    for output in _keras.losses_of(model, None, model.output):
        if output.divides_by_weights:
            raise ValueError(
                'A loss with reduction="mean_with_sample_weight" would divide by the weights of '
                'each replica alone: use reduction="sum_over_batch_size". '
                f"Received: {output.loss!r}"
            )
