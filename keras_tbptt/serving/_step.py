"""The next steps of streams in fixed shapes, for runtimes that are slow at loops or have none."""

from __future__ import annotations

import keras
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._inputs import ModelInputs
from keras_tbptt._resizing import resized_copy
from keras_tbptt._tensors import last_real_steps, of_rank, without_padding
from keras_tbptt.serving._signatures import output_names, signatures
from keras_tbptt.serving._stream import StreamState, at_every_step
from keras_tbptt.state import explicit_state


class FixedStep:
    """The next steps of streams as a graph function of fixed shapes, without loops, in float32.

    Args:
        model: A functional model.
        window: int >= 1. Steps of a call.
        lanes: int >= 1. Streams of a call.
        last_step: bool. As in `DocumentRunner`.

    Attributes:
        inputs: The `tf.TensorSpec`s of what the function takes: the model's inputs, `lengths`,
            `state` and `start`.
        weights: The variables that the function uses.
        function: The function. It returns a dict of the outputs and `new_state`.
        any_shapes: The model's `stream` signature, which does the same for any shapes.

    Raises:
        ValueError: If `window` or `lanes` is no such number, as `signatures` and `output_names`, if
            the model cannot be resized, or if its window cannot be told from other axes.
    """

    def __init__(self, model: keras.Model, window: int, lanes: int, last_step: bool):
        for name, size in {"window": window, "lanes": lanes}.items():
            if type(size) is not int or size < 1:
                raise ValueError(
                    f"`{name}` must be an integer of at least 1. Received: {name}={size}"
                )
        self.any_shapes = signatures(model, None, last_step)["stream"]
        given = [spec.name for spec in self.any_shapes.input_signature]
        self._names = output_names(model, taken={"new_state", *given})
        twin = resized_copy(model, lanes, window, in_float32=True)
        for layer in _keras.flatten_layers(twin):
            # Our own layers then run Keras's code, too.
            if isinstance(layer, keras.layers.RNN):
                layer.unroll = True
        self._form = ModelInputs(twin)
        self._every = at_every_step(twin, last_step)
        if self._every != at_every_step(model, last_step) or (
            # A window of one step has no padding, so it needs no mask.
            window > 1 and [*self._form.static] != [*ModelInputs(model).static]
        ):
            raise ValueError(
                "`window` must not be the size of another axis of the model's inputs and outputs, "
                "because the two could not be told apart: choose another window. "
                f"Received: window={window}, inputs of shapes "
                f"{[tuple(t.shape) for t in model.inputs]}, outputs of shapes "
                f"{[tuple(t.shape) for t in keras.tree.flatten(model.output)]}"
            )
        self._window = window
        self._symbolic = keras.tree.flatten(twin.output)
        self._structure = twin.output
        self._layout = StreamState(twin, last_step)
        self._call = explicit_state(twin)
        self.weights = [weight.value for weight in twin.weights]
        *inputs, _, _, _ = given
        self.inputs = [
            tf.TensorSpec(tensor.shape, tensor.dtype, name=name)
            for name, tensor in zip(inputs, self._form.tensors.values(), strict=True)
        ] + [
            tf.TensorSpec([lanes], tf.int32, name="lengths"),
            tf.TensorSpec([lanes, self._layout.width], tf.float32, name="state"),
            tf.TensorSpec([lanes], tf.bool, name="start"),
        ]
        self.function = tf.function(self._run, input_signature=self.inputs, autograph=False)

    def _run(self, *given: tf.Tensor) -> dict[str, tf.Tensor]:
        *inputs, lengths, state, start = given
        latest, states = self._layout.unpack(state, start)
        mask = tf.sequence_mask(lengths, self._window) if self._window > 1 else None
        by_name = dict(zip(self._form.tensors, inputs, strict=True))
        outputs, after = self._call(self._form.as_given(by_name), states, mask=mask)
        outputs = self._read(keras.tree.flatten(outputs), lengths, latest)
        after = [_where_busy(lengths, new, old) for new, old in zip(after, states, strict=True)]
        packed = self._layout.pack(keras.tree.pack_sequence_as(self._structure, outputs), after)
        return {**dict(zip(self._names, outputs, strict=True)), "new_state": packed}

    def _read(
        self, outputs: list[tf.Tensor], lengths: tf.Tensor, latest: list[tf.Tensor]
    ) -> list[tf.Tensor]:
        """Outputs of every step, zero at padding; the others at the last step so far."""
        every = without_padding(outputs, self._symbolic, lengths, self._window)
        last = last_real_steps(outputs, self._symbolic, lengths, self._window)
        before = iter(latest)
        return [
            steps if timed else _where_busy(lengths, at_last, next(before))
            for timed, steps, at_last in zip(self._every, every, last, strict=True)
        ]


def _where_busy(lengths: tf.Tensor, new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
    """What lanes with steps have come to, and what the others had."""
    return tf.where(of_rank(lengths > 0, new.shape.rank), new, old)
