"""The losses that Keras reports, as means over what counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._replicas import summed_over_replicas
from keras_tbptt._tensors import of_rank


class BatchLoss(NamedTuple):
    """The loss of a batch, to be minimised and to be reported.

    Attributes:
        minimised: A scalar, Keras's mean over the batch, with penalties.
        mean: A scalar, the mean over what counts, with penalties.
        count: A scalar, how much that is.
    """

    minimised: tf.Tensor
    mean: tf.Tensor
    count: tf.Tensor


def penalty(model: keras.Model, loss: tf.Tensor) -> tf.Tensor:
    """What regularisation adds to the loss, with the weights as they are now.

    Args:
        model: The model, just after it was called.
        loss: A scalar, for its dtype.
    """
    terms = [tf.cast(term, loss.dtype) for term in model.losses]
    return tf.add_n(terms) if terms else tf.zeros_like(loss)


def weight_penalty(model: keras.Model, loss: tf.Tensor) -> tf.Tensor:
    """The part of `penalty` that depends on weights alone, and not on a window.

    Args:
        model: The model.
        loss: A scalar, for its dtype.
    """
    weights = [weight for weight in model.trainable_weights if weight.regularizer is not None]
    terms = [tf.cast(weight.regularizer(weight), loss.dtype) for weight in weights]
    return tf.add_n(terms) if terms else tf.zeros_like(loss)


def batch_loss(
    model: keras.Model, x: Any, y: Any, y_pred: Any, weight: Any, share: Any, training: bool
) -> BatchLoss:
    """The loss of a batch; the losses of single outputs are counted as means over what counts.

    `compute_loss` itself would count each batch by its lanes, whatever they hold.

    Args:
        model: A compiled model with a metric `"loss"`, which the caller updates afterwards.
        x: Its inputs.
        y: Targets.
        y_pred: Outputs.
        weight: How much each row counts, `[lanes]` or `[lanes, window]`, with the weights of
            documents; in the structure of the outputs where they count in different places.
        share: As `weight`, without the weights of documents.
        training: bool. Whether outputs of a training call are sampled.
    """
    trackers = _keras.output_losses(model)  # none before the first call
    before = [(tf.identity(each.total), tf.identity(each.count)) for each in trackers]
    each = _weights_of_losses(model, y, y_pred, weight)
    loss = model.compute_loss(x, y, y_pred, each, training=training)
    added = penalty(model, loss)
    reported = _of_all_replicas(model, added)
    trackers = _keras.output_losses(model)
    before = before or [(tf.zeros([]), tf.zeros([]))] * len(trackers)

    own = tf.nest.is_nested(share)

    def by_output(given: Any) -> list[_keras.OutputLoss]:
        given = given if own else keras.tree.map_structure(lambda _: given, y_pred)
        return _keras.losses_of(model, y, given)

    # Keras divides some losses by the weights of documents too, so those count by these.
    outputs = [
        weighted if weighted.divides_by_weights else shared
        for shared, weighted in zip(by_output(share), by_output(weight), strict=True)
    ]
    for tracker, (total, count), output in zip(trackers, before, outputs, strict=False):
        counted = tf.cast(tf.reduce_sum(output.value), tracker.count.dtype)
        rows = tf.cast(tf.size(output.value), counted.dtype)
        lanes = output.value.shape[0]  # by which Keras multiplies each mean
        mean = (tracker.total - total) / lanes
        if not output.is_sum:
            mean *= counted if output.divides_by_weights else rows
        tracker.total.assign(total + mean)
        tracker.count.assign(count + counted)

    divided = any(output.divides_by_weights for output in outputs)
    summed = any(output.is_sum for output in outputs)
    if trackers and (own or divided or summed):
        return BatchLoss(loss, *_sum_of_means(model, outputs, trackers, before, reported))
    share = outputs[0].value if outputs else tf.nest.flatten(share)[0]
    count = tf.cast(tf.reduce_sum(share), loss.dtype)
    rows = tf.cast(tf.size(share), loss.dtype)
    mean = loss * model.replicas.count - added  # Keras divides the loss by it
    if not divided:
        mean *= tf.math.divide_no_nan(1.0 if summed else rows, count)
    return BatchLoss(loss, mean + reported, count)


def _weights_of_losses(model: keras.Model, y: Any, y_pred: Any, weight: Any) -> Any:
    """Weights in the shape of each loss, which may have more axes than rows and steps.

    Keras would multiply weights `[lanes]` along the last axis of a loss `[lanes, horizon]`.
    """
    outputs, weights = keras.tree.flatten(y_pred), keras.tree.flatten(weight)
    ranks = [0 if output is None else output.shape.rank - 1 for output in outputs]
    of_output = weights if len(weights) > 1 else weights * len(outputs)
    if all(r <= w.shape.rank for r, w in zip(ranks, of_output, strict=True)):
        return weight
    targets = keras.tree.flatten(y)
    if len(targets) != len(outputs):
        return weight
    for entry in _keras.losses_of(model, y, keras.tree.pack_sequence_as(y_pred, range(len(ranks)))):
        i = entry.value
        shape = entry.shape(targets[i], outputs[i])
        if shape is not None and len(shape) > of_output[i].shape.rank:
            of_output[i] = tf.broadcast_to(of_rank(of_output[i], len(shape)), shape)
    return keras.tree.pack_sequence_as(y_pred, of_output)


def _of_all_replicas(model: keras.Model, added: tf.Tensor) -> tf.Tensor:
    """The mean penalty of the replicas, which count alike in it, whatever their targets."""
    of_weights = sum(weight.regularizer is not None for weight in model.trainable_weights)
    if model.replicas.count == 1 or len(model.losses) == of_weights:
        return added  # that of weights is the same on each
    return summed_over_replicas([added])[0] / model.replicas.count


def uncounted_loss(
    model: keras.Model, x: Any, y: Any, y_pred: Any, weight: Any, training: bool
) -> tf.Tensor:
    """The loss of a batch that was counted before.

    Args:
        model: As in `batch_loss`, which was called on it before.
        x: As in `batch_loss`.
        y: As in `batch_loss`.
        y_pred: As in `batch_loss`.
        weight: As in `batch_loss`.
        training: As in `batch_loss`.
    """
    counted = model.metrics_variables  # a compute_loss of the user's own may update any metric
    before = [tf.identity(variable.value) for variable in counted]
    each = _weights_of_losses(model, y, y_pred, weight)
    loss = model.compute_loss(x, y, y_pred, each, training=training)
    for variable, value in zip(counted, before, strict=True):
        variable.assign(value)
    return loss


def _sum_of_means(
    model: keras.Model, outputs: Any, trackers: Any, before: Any, added: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """What makes the reported loss the sum of the outputs' means, and how much it counts.

    Outputs count in different places, so no mean of batches is a mean over what counts: the means
    of the outputs so far are added up, and the difference to the sum before goes to the loss.
    """
    tracker = next(metric for metric in model.metrics if metric.name == "loss")
    factors = [1.0 if output.factor is None else output.factor for output in outputs]
    pairs = list(zip(factors, before, trackers, strict=True))
    old = sum(f * tf.math.divide_no_nan(total, count) for f, (total, count), _ in pairs)
    new = sum(f * tf.math.divide_no_nan(t.total.value, t.count.value) for f, _, t in pairs)
    count = tf.add_n([tf.reduce_sum(output.value) for output in outputs])
    count = tf.cast(count, added.dtype)
    past = tf.cast(tracker.count.value, added.dtype)
    change = tf.cast(new, added.dtype) * (past + count) - tf.cast(old, added.dtype) * past
    return tf.math.divide_no_nan(change, count) + added, count
