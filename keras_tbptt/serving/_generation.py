"""A graph function that continues prompts one step at a time, with the state outside."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt._tensors import has_time_axis
from keras_tbptt._window_checks import embeddings_of_ids
from keras_tbptt.serving._stream import DocumentRunner, check_single_steps
from keras_tbptt.state import explicit_state, initial_states


class Generator:
    """Continues prompts inside a `tf.function`, for any number of prompts at once.

    Args:
        model: A functional model of ids `[lanes, window]` with stateful layers, whose one output is
            logits or probabilities of the next id.

    Attributes:
        classes: int. The ids that the model can draw.
        padding: bool. Whether id 0 is padding to the model.

    Raises:
        ValueError: If the model has no such input or output, or gives other outputs one step at a
            time than window by window.
    """

    def __init__(self, model: keras.Model):
        given, outputs = model.inputs, keras.tree.flatten(model.output)
        if len(given) != 1 or len(given[0].shape) != 2 or given[0].dtype not in _INTEGERS:
            raise ValueError(
                "Generation needs a model of ids: one integer input [lanes, window]. "
                f"Received: inputs {[(tuple(t.shape), t.dtype) for t in given]}"
            )
        self._window = given[0].shape[1]
        self._timed = has_time_axis(outputs[0], self._window)
        if (
            len(outputs) != 1
            or len(outputs[0].shape) != 2 + self._timed
            or outputs[0].shape[-1] < 2
        ):
            raise ValueError(
                "Generation needs a model with one output, logits or probabilities of the next id: "
                "[lanes, window, classes] or [lanes, classes]. "
                f"Received: outputs of shapes {[tuple(t.shape) for t in outputs]}"
            )
        self.classes = int(outputs[0].shape[-1])
        embeddings = embeddings_of_ids(model, given)
        self.padding = any(layer.mask_zero for layer in embeddings)
        for layer in embeddings:
            if layer.input_dim < self.classes:
                raise ValueError(
                    "The model must be able to read every id that it draws: give the embedding a "
                    f"row for each class. Received: {self.classes} classes, layer {layer.name!r} "
                    f"with input_dim={layer.input_dim}"
                )
        check_single_steps(model, "Generation")
        self._model = model
        self._dtype = given[0].dtype
        self._runner = DocumentRunner(model, last_step=True)
        self._call = explicit_state(model)
        self._gives_probabilities = self._look_at_outputs()

    def run(
        self,
        ids: tf.Tensor,
        lengths: tf.Tensor,
        steps: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
        stop: tf.Tensor,
        excluded: tf.Tensor,
        seed: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws the steps after each prompt.

        Args:
            ids: int32 `[batch, time]`. Prompts, right-padded.
            lengths: int32 `[batch]`, at least 1.
            steps: int32 scalar. The most steps that are drawn.
            temperature: float32 scalar > 0.
            top_k: int32 scalar; 0 for all classes.
            top_p: float32 scalar in (0, 1].
            stop: int32 `[n]`. Ids that end a text.
            excluded: bool `[classes]`. Ids that are never drawn.
            seed: int32 `[2]`.

        Returns:
            `(ids, lengths)`: int32 `[batch, drawn steps]`, 0 from the end of each text on, and
            int32 `[batch]`.
        """
        outputs, states = self._runner.run(ids, lengths)
        shut = tf.where(excluded, -np.inf, 0.0)
        batch = tf.shape(ids)[0]

        def draw(step: tf.Tensor, logits: tf.Tensor, states: Any, running: Any, written: Any):
            now = tf.random.experimental.stateless_fold_in(seed, step)
            drawn = _draw(logits + shut, temperature, top_k, top_p, now)
            running &= ~tf.reduce_any(drawn[:, None] == stop, axis=1)
            # Not a TensorArray: TensorFlow logs an error where it transposes integers on a CPU.
            written = tf.concat([written, tf.where(running, drawn, -1)[:, None]], axis=1)
            outputs, states = self._one_step(drawn, states)
            return step + 1, self._logits(outputs), states, running, written

        any_batch = [tf.TensorShape([None, *state.shape[1:]]) for state in states]
        texts = tf.while_loop(
            lambda step, _1, _2, running, _3: (step < steps) & tf.reduce_any(running),
            draw,
            (
                0,
                self._logits(outputs),
                states,
                tf.fill([batch], True),
                tf.zeros([batch, 0], "int32"),
            ),
            shape_invariants=(
                tf.TensorShape([]),
                tf.TensorShape([None, self.classes]),
                any_batch,
                tf.TensorShape([None]),
                tf.TensorShape([None, None]),
            ),
            parallel_iterations=1,
        )[-1]
        real = texts >= 0
        return tf.where(real, texts, 0), tf.reduce_sum(tf.cast(real, "int32"), axis=1)

    def _one_step(self, ids: tf.Tensor, states: Any) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Outputs `[batch, classes]` and states after one more step."""
        step = tf.cast(ids[:, None], self._dtype)
        # Keras would refuse one step where it can see that the model was built for a window.
        step = tf.raw_ops.PlaceholderWithDefault(input=step, shape=[None, 1])
        outputs, states = self._call(step, states)
        outputs = keras.tree.flatten(outputs)[0]
        return tf.ensure_shape(outputs[:, -1] if self._timed else outputs, [None, self.classes]), [
            tf.ensure_shape(new, [None, *old.shape[1:]])
            for new, old in zip(states, initial_states(self._model, 1), strict=True)
        ]

    def _logits(self, outputs: Any) -> tf.Tensor:
        """float32 `[batch, classes]`."""
        outputs = tf.cast(keras.tree.flatten(outputs)[0], "float32")
        # Some class is drawn even if all that may be drawn have underflowed to 0.
        smallest = np.finfo("float32").tiny
        return tf.math.log(tf.maximum(outputs, smallest)) if self._gives_probabilities else outputs

    def _look_at_outputs(self) -> bool:
        """Runs a random window at once and step by step, and compares what comes out.

        Returns:
            Whether outputs are probabilities.
        """
        ids = np.random.default_rng(0).integers(self.padding, self.classes, (2, self._window))
        ids = ids.astype("int32")

        @tf.function(autograph=False)
        def outputs() -> tuple[tf.Tensor, tf.Tensor]:
            at_once, _ = self._runner.run(tf.constant(ids), tf.fill([2], self._window))
            states = initial_states(self._model, 2)
            _, alone, _ = tf.while_loop(
                lambda step, *_: step < self._window,
                lambda step, _, states: (
                    step + 1,
                    *self._one_step(tf.gather(ids, step, axis=1), states),
                ),
                (0, tf.zeros([2, self.classes], self._model.outputs[0].dtype), states),
                shape_invariants=(
                    tf.TensorShape([]),
                    tf.TensorShape([None, self.classes]),
                    [tf.TensorShape([None, *state.shape[1:]]) for state in states],
                ),
            )
            return keras.tree.flatten(at_once)[0], alone

        at_once, alone = (tf.cast(tensor, "float32").numpy() for tensor in outputs())
        if not (np.isfinite(at_once) | np.isneginf(at_once)).all():  # which a logit may be
            raise ValueError(
                "The model gives outputs that are no numbers: load its weights again, or train it "
                f"with a lower learning rate. Received: model {self._model.name!r}"
            )
        half = self._model.compute_dtype in ("float16", "bfloat16")
        tolerance = (0.05 if half else 1e-3) * max(1.0, np.abs(at_once).max())
        if not np.allclose(at_once, alone, rtol=0, atol=tolerance, equal_nan=True):
            raise ValueError(
                "Generation runs a model one step at a time, but a layer of this model looks at "
                "other steps of the window, such as a convolution: let recurrent layers alone "
                "carry what came before. Received: outputs that differ by "
                f"{np.abs(at_once - alone).max():.3g} in model {self._model.name!r}"
            )
        sums = at_once.sum(axis=-1)
        return bool((at_once >= 0).all() and (np.abs(sums - 1) < 0.05).all())


def excluded_ids(
    generator: Generator, vectorizer: keras.layers.TextVectorization | None
) -> np.ndarray:
    """Which ids are never drawn: padding, and with a vocabulary the unknown word.

    Args:
        generator: What draws.
        vectorizer: The vocabulary, or None.

    Returns:
        bool `[classes]`.

    Raises:
        ValueError: If the vocabulary has not one word for each class.
    """
    excluded = np.zeros(generator.classes, bool)
    excluded[:1] = generator.padding
    if vectorizer is None:
        return excluded
    words = vectorizer.vocabulary_size()
    if words != generator.classes:
        raise ValueError(
            "The vocabulary must be the one that the model was trained on, with a word for each "
            f"class. Received: a vocabulary of {words}, {generator.classes} classes"
        )
    excluded[:2] = True
    return excluded


_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")


def _draw(
    logits: tf.Tensor, temperature: tf.Tensor, top_k: tf.Tensor, top_p: tf.Tensor, seed: tf.Tensor
) -> tf.Tensor:
    """One id for each row of logits, int32 `[batch]`."""
    # All at most 0, so that no temperature makes one infinite.
    logits = (logits - tf.reduce_max(logits, axis=-1, keepdims=True)) / temperature
    classes = logits.shape[-1]

    def from_all() -> tf.Tensor:
        return tf.random.stateless_categorical(logits, 1, seed, dtype="int32")[:, 0]

    def from_the_likeliest() -> tf.Tensor:
        kept = tf.where(top_k > 0, tf.minimum(top_k, classes), classes)
        values, ids = tf.math.top_k(logits, kept)
        before = tf.cumsum(tf.nn.softmax(values), axis=-1, exclusive=True)
        # Rounding may bring the sum to 1 before the last class.
        values = tf.where((before < top_p) | (top_p >= 1), values, -np.inf)
        place = tf.random.stateless_categorical(values, 1, seed, dtype="int32")
        return tf.gather(ids, place, batch_dims=1)[:, 0]

    return tf.cond((top_k > 0) | (top_p < 1), from_the_likeliest, from_all)
