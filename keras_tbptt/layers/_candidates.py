"""The candidates of a sampled softmax: which classes are drawn, and what their logits are."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.layers._cpu_loop import first_order_only

# The logits of so many rows and a thousand candidates fit into the cache of a core.
_ROWS_PER_GROUP = 1024


class LogUniform:
    """Draws distinct classes: class k with a chance that falls as 1 / (k + 1).

    A draw gives class k with probability log((k + 2) / (k + 1)) / log(classes + 1), as in
    `tf.random.log_uniform_candidate_sampler`. The number of draws is fixed, and a class that is
    drawn again is dropped. So a class is among the candidates with probability
    1 - (1 - p) ** draws, exactly.

    TensorFlow's sampler draws from a generator that no checkpoint holds. This one draws from a
    seed.

    Args:
        classes: int. Number of classes.
        samples: int < classes. How many distinct classes are drawn on average.

    Attributes:
        draws: int. How many classes are drawn, repetitions included.
    """

    def __init__(self, classes: int, samples: int):
        self.draws = _draws(classes, samples)
        self._classes = classes

    def draw(self, seed: tf.Tensor) -> tf.Tensor:
        """Draws candidates: the same ones for the same seed.

        Args:
            seed: Integers `[2]`.

        Returns:
            int64 `[S]`: distinct classes.
        """
        # In float64: float32 would never draw some classes of a large vocabulary.
        uniform = tf.random.stateless_uniform([self.draws], tf.cast(seed, "int32"), dtype="float64")
        drawn = tf.cast(tf.exp(uniform * np.log(self._classes + 1.0)) - 1, "int64")
        return tf.unique(tf.minimum(drawn, self._classes - 1))[0]

    def log_chance(self, classes: tf.Tensor) -> tf.Tensor:
        """The log of the probability that a class is among the candidates.

        Args:
            classes: Integers of any shape.

        Returns:
            float32, in the shape of `classes`.
        """
        once = tf.math.log1p(1 / (tf.cast(classes, "float64") + 1)) / np.log(self._classes + 1.0)
        return tf.cast(tf.math.log(-tf.math.expm1(self.draws * tf.math.log1p(-once))), "float32")


@functools.lru_cache
def _draws(classes: int, samples: int) -> int:
    """The smallest number of draws that give `samples` distinct classes on average."""
    once = np.log1p(1 / np.arange(1, classes + 1)) / np.log(classes + 1)
    log_missed = np.log1p(-once)

    def distinct(draws: int) -> float:
        return float(-np.expm1(draws * log_missed).sum())

    low, high = 0, samples
    while distinct(high) < samples:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if distinct(middle) < samples else (low, middle)
    return high


def candidate_logits(
    inputs: tf.Tensor,
    kernel: keras.Variable | tf.Tensor,
    bias: keras.Variable | None,
    targets: tf.Tensor,
    candidates: tf.Tensor,
    sampler: LogUniform,
) -> tf.Tensor:
    """The logit of the target, and one for all candidates. Their softmax loss is the sampled one.

    The second logit is the log of the sum of the exponentials of the candidates' logits, so a
    softmax of the two gives the target the probability that a softmax of them all would. The loss
    is that of `tf.nn.sampled_softmax_loss(..., remove_accidental_hits=True)`, which returns the
    loss alone. With logits, Keras's own loss can be taken, with its weights and reduction. Kernel
    and bias get `tf.IndexedSlices` as gradients.

    Args:
        inputs: Float tensor `[rows, units]`.
        kernel: Variable `[classes, units]`; with LoRA, a tensor, whose gradient is dense.
        bias: Variable `[classes]`, or None.
        targets: int64 `[rows]`.
        candidates: int64 `[S]`. Distinct classes, shared by all rows.
        sampler: What drew the candidates.

    Returns:
        float32 `[rows, 2]`: first the target, then the candidates.
    """
    # Gathered from the variables themselves, so that their gradients come in slices.
    table = kernel.value if isinstance(kernel, keras.Variable) else kernel
    own, others = (
        tf.cast(tf.gather(table, classes), inputs.dtype) for classes in (targets, candidates)
    )
    own_shift, shift = -sampler.log_chance(targets), -sampler.log_chance(candidates)
    if bias is not None:
        own_shift += tf.cast(tf.gather(bias.value, targets), "float32")
        shift += tf.cast(tf.gather(bias.value, candidates), "float32")
    target = tf.reduce_sum(tf.cast(inputs * own, "float32"), axis=-1) + own_shift
    sizes = _group_sizes(inputs.shape[0])
    groups = zip(tf.split(inputs, sizes), tf.split(targets, sizes), strict=True)
    rest = [_log_sum_exp(x, others, shift, of_x, candidates) for x, of_x in groups]
    return tf.stack([target, tf.concat(rest, axis=0)], axis=1)


def _group_sizes(rows: int | None) -> list[int] | int:
    """Rows in groups that stay in a cache and run side by side; one group if a GPU runs them."""
    if rows is None or tf.config.list_logical_devices("GPU"):
        return 1
    groups = -(-rows // _ROWS_PER_GROUP)
    return [rows // groups + (g < rows % groups) for g in range(groups)]


@tf.custom_gradient
def _log_sum_exp(
    inputs: tf.Tensor, kernel: tf.Tensor, shift: tf.Tensor, targets: tf.Tensor, classes: tf.Tensor
) -> tuple:
    """The log of the sum of the exponentials of all logits of a row but the target's.

    Gradients of a softmax need several arrays of the size of the logits. This needs one.

    Args:
        inputs: `[rows, units]`.
        kernel: `[S, units]`.
        shift: float32 `[S]`. What is added to the logits.
        targets: Integers `[rows]`.
        classes: Integers `[S]`.

    Returns:
        float32 `[rows]`, and its gradient.
    """
    logits = tf.cast(tf.matmul(inputs, kernel, transpose_b=True), "float32") + shift
    logits = tf.where(targets[:, None] == classes, -1e9, logits)
    highest = tf.reduce_max(logits, axis=1, keepdims=True)
    parts = tf.exp(logits - highest)
    total = tf.reduce_sum(parts, axis=1, keepdims=True)

    def gradient(upstream: tf.Tensor) -> list[tf.Tensor | None]:
        scale = upstream[:, None] / total
        chances = tf.cast(parts, inputs.dtype)
        # Rows of the small factors are scaled, instead of rows of all chances.
        dinputs = scale * tf.cast(tf.matmul(chances, kernel), "float32")
        scaled = tf.cast(scale * tf.cast(inputs, "float32"), inputs.dtype)
        dkernel = tf.matmul(chances, scaled, transpose_a=True)
        dshift = tf.matmul(scale, parts, transpose_a=True)[0]
        found = (tf.cast(dinputs, inputs.dtype), dkernel, dshift)
        return [*map(first_order_only, found), None, None]

    return (highest + tf.math.log(total))[:, 0], gradient
