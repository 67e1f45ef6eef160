"""The losses that Keras reports, as means over what counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_tbptt import _keras


def penalty(model: keras.Model, loss: tf.Tensor) -> tf.Tensor:
    """What regularisation adds to the loss, with the weights as they are now.

    Args:
        model: The model, just after it was called.
        loss: A scalar, for its dtype.
    """
    terms = [tf.cast(term, loss.dtype) for term in model.losses]
    return tf.add_n(terms) if terms else tf.zeros_like(loss)


def report(tracker: keras.metrics.Mean, loss: tf.Tensor, added: tf.Tensor, share: tf.Tensor):
    """Adds a batch to the reported loss: its mean over what counts, not over all lanes.

    Args:
        tracker: The metric of the loss.
        loss: A scalar, Keras's mean over the batch, with penalties.
        added: A scalar, the penalties in it.
        share: How much each row of the batch counts, `[lanes]` or `[lanes, window]`.
    """
    total = tf.cast(tf.reduce_sum(share), loss.dtype)
    mean = (loss - added) * tf.math.divide_no_nan(tf.cast(tf.size(share), loss.dtype), total)
    tracker.update_state(mean + added, sample_weight=total)


@contextlib.contextmanager
def output_losses(model: keras.Model, share: tf.Tensor | None) -> Iterator[None]:
    """Within this context, the losses of single outputs are counted as `report` counts the loss.

    `compute_loss` itself would count each batch by its lanes, whatever they hold.

    Args:
        model: The model whose `compute_loss` is called once within the context.
        share: As in `report`; None to count nothing.
    """
    before = {
        id(tracker): (tf.identity(tracker.total), tf.identity(tracker.count))
        for tracker in _keras.output_losses(model)
    }
    yield
    for tracker in _keras.output_losses(model):
        total, count = before.get(id(tracker), (0.0, 0.0))
        if share is None:
            tracker.total.assign(total)
            tracker.count.assign(count)
            continue
        steps = share.shape[1] if share.shape.rank == 2 else 1
        tracker.total.assign(total + (tracker.total - total) * steps)
        tracker.count.assign(count + tf.cast(tf.reduce_sum(share), tracker.count.dtype))
