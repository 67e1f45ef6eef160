"""A model run over whole documents and streams, with its state outside, as graph functions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._inputs import ModelInputs, static_layers
from keras_tbptt._masks import forgetful_layers
from keras_tbptt._replicas import check_one_device
from keras_tbptt._tensors import (
    has_time_axis,
    last_real_steps,
    of_rank,
    without_padding,
    without_time_axis,
)
from keras_tbptt.state import explicit_state, initial_states, state_variables


def functional(model: keras.Model) -> keras.Model:
    """The model itself, or a functional model of the layers of a `Sequential`.

    Args:
        model: A functional or built `Sequential` model.

    Raises:
        ValueError: If the model runs on several replicas.
    """
    check_one_device(model, "An export, a generation or a forecast")
    if isinstance(model, keras.Sequential):  # which has no symbolic `output`
        return keras.Model(model.inputs, model.outputs[0])
    return model


# Layers that make one step of several, or of all in a window.
_ACROSS_STEPS = (
    keras.layers.Conv1D,
    keras.layers.Conv1DTranspose,
    keras.layers.SeparableConv1D,
    keras.layers.DepthwiseConv1D,
    keras.layers.AveragePooling1D,
    keras.layers.MaxPooling1D,
    keras.layers.GlobalAveragePooling1D,
    keras.layers.GlobalMaxPooling1D,
    keras.layers.Attention,
    keras.layers.AdditiveAttention,
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
)


def layers_across_steps(model: keras.Model) -> list[str]:
    """Names of the layers whose results depend on where a document is cut.

    Args:
        model: A functional model.
    """
    inputs = ModelInputs(model)
    apart = static_layers(model, [*inputs.static.values()])
    window, forgetful = inputs.window, forgetful_layers(model, inputs.window, apart)
    return [
        layer.name
        for layer in _keras.flatten_layers(model)
        if (
            isinstance(layer, _ACROSS_STEPS)
            and any(t.shape[1:2] == (window,) for tensors in _keras.calls(layer) for t in tensors)
            and getattr(layer, "kernel_size", None) != (1,)
        )
        or any(layer is one for one in forgetful)  # two nested models may use one name
    ]


def check_single_steps(model: keras.Model, what: str) -> None:
    """Refuses layers whose results depend on where a document is cut.

    Args:
        model: A functional model.
        what: What runs it one step at a time, as the subject of a sentence.

    Raises:
        ValueError: If there are any.
    """
    found = layers_across_steps(model)
    if found:
        raise ValueError(
            f"{what} runs a model one step at a time, but layers of this model look at other steps "
            "of a window, or begin anew in each: let stateful recurrent layers alone carry what "
            f"came before. Received: layers {found} of model {model.name!r}"
        )


def warn_of_windows(model: keras.Model) -> None:
    """Warns of layers whose results depend on where a document is cut.

    Args:
        model: A functional model.
    """
    window = ModelInputs(model).window
    found = layers_across_steps(model)
    if found:
        warnings.warn(
            "These layers look at other steps of a window, so a stream gives the figures of a "
            f"whole document only if each piece but the last has {window} steps. "
            f"Received: layers {found} of model {model.name!r}",
            stacklevel=3,
        )


def at_every_step(model: keras.Model, last_step: bool = False) -> list[bool]:
    """Which outputs are given at every step, in the order of `keras.tree.flatten`.

    Args:
        model: A functional model with stateful layers.
        last_step: bool. Whether outputs with a time axis are given at the last step alone.
            Defaults to False.
    """
    window = ModelInputs(model).window
    outputs = keras.tree.flatten(model.output)
    return [has_time_axis(output, window) and not last_step for output in outputs]


class DocumentRunner:
    """Runs a model over whole documents inside a `tf.function`, window by window.

    It needs the memory of one window, and that of the outputs.

    Args:
        model: A functional model with stateful layers.
        last_step: bool. Whether outputs with a time axis are given at the last step alone. Defaults
            to False: they are given at every step.
    """

    def __init__(self, model: keras.Model, last_step: bool = False):
        self._model = model
        self._call = explicit_state(model)
        self._inputs = ModelInputs(model)
        self._window = self._inputs.window
        self._every = at_every_step(model, last_step)
        self._each_step, self._latest = self._split(keras.tree.flatten(model.output))

    def run(
        self,
        inputs: Any,
        lengths: tf.Tensor,
        latest: Sequence[tf.Tensor] | None = None,
        states: Sequence[tf.Tensor] | None = None,
    ) -> tuple[Any, list[tf.Tensor]]:
        """Runs the next steps of each document.

        Args:
            inputs: What the model takes, for any batch and time: ids or features
                `[batch, time, ...]`, right-padded; static inputs `[batch, ...]`.
            lengths: Integers `[batch]`. A document of length 0 is left as it is.
            latest: What each document has come to: the outputs that are not given at every step,
                flat, each `[batch, ...]`. Defaults to None: zeros.
            states: Its states, each `[batch, ...]` in the order of `state_variables`. Defaults to
                None: the initial state.

        Returns:
            `(outputs, states)`, in the structure of the model's outputs and as `states`. Outputs
            given at every step are `[batch, time, ...]`, zero at padding. The others and the states
            are `[batch, ...]`, after the last step of each document.
        """
        tensors = self._inputs.by_name(inputs)
        inputs = {n: tf.cast(tensors[n], own.dtype) for n, own in self._inputs.tensors.items()}
        [first, *_] = self._inputs.steps
        batch, time = tf.shape(inputs[first])[0], tf.shape(inputs[first])[1]
        lengths = tf.cast(lengths, "int32")
        if latest is None:
            shapes = [without_time_axis(output, self._window) for output in self._latest]
            latest = [tf.zeros([batch, *one.shape[1:]], one.dtype) for one in shapes]
        if states is None:
            states = initial_states(self._model, batch)
        longest = tf.reduce_max(tf.pad(lengths, [[1, 0]]))  # 0 for a batch without a row
        windows = (longest + self._window - 1) // self._window
        each_step = [
            tf.TensorArray(output.dtype, windows, element_shape=[None, *output.shape[1:]])
            for output in self._each_step
        ]

        def next_window(index: tf.Tensor, arrays: list, latest: list, states: list) -> tuple:
            new, *carried = self._run_window(inputs, lengths, index * self._window, latest, states)
            arrays = [array.write(index, one) for array, one in zip(arrays, new, strict=True)]
            return index + 1, arrays, *carried

        _, each_step, last, new_states = tf.while_loop(
            lambda index, *_: index < windows,
            next_window,
            (0, each_step, list(latest), list(states)),
            shape_invariants=(
                tf.TensorShape([]),
                [tf.TensorShape([]) for _ in each_step],
                [_any_batch(tensor) for tensor in latest],
                [_any_batch(state) for state in states],
            ),
            parallel_iterations=1,
        )
        joined = [_joined(array, batch, time) for array in each_step]
        of = {True: iter(joined), False: iter(last)}
        outputs = [next(of[every]) for every in self._every]
        return keras.tree.pack_sequence_as(self._model.output, outputs), new_states

    def _run_window(
        self,
        inputs: dict[str, tf.Tensor],
        lengths: tf.Tensor,
        start: tf.Tensor,
        latest: list[tf.Tensor],
        states: list[tf.Tensor],
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], list[tf.Tensor]]:
        # Documents that have ended are left out: they cost nothing, and cuDNN refuses fully masked
        # rows.
        rows = tf.where(lengths > start)
        real = tf.minimum(tf.gather_nd(lengths, rows) - start, self._window)
        mask = tf.sequence_mask(real, self._window)

        def of_window(steps: tf.Tensor) -> tf.Tensor:
            rank, shape = steps.shape.rank, [None, self._window, *steps.shape[2:]]
            part = tf.gather_nd(steps[:, start : start + self._window], rows)
            missing = self._window - tf.shape(part)[1]
            part = tf.ensure_shape(
                tf.pad(part, [[0, 0], [0, missing], *[[0, 0]] * (rank - 2)]), shape
            )
            # Whatever the request is padded with: an embedding may make its own mask, from zeros.
            return tf.where(of_rank(mask, rank), part, tf.zeros_like(part))

        part = self._inputs.map(
            self._inputs.as_given(inputs), of_window, lambda static: tf.gather_nd(static, rows)
        )
        before = [tf.gather_nd(state, rows) for state in states]
        outputs, new_states = self._call(part, before, mask=mask)
        each_step, new_latest = self._split(keras.tree.flatten(outputs))
        each_step = without_padding(each_step, self._each_step, real, self._window)
        new_latest = last_real_steps(new_latest, self._latest, real, self._window)
        blank = [tf.zeros([tf.shape(lengths)[0], *one.shape[1:]], one.dtype) for one in each_step]
        return keras.tree.map_structure(
            lambda old, new: tf.tensor_scatter_nd_update(old, rows, new),
            (blank, latest, states),
            (each_step, new_latest, new_states),
        )

    def _split(self, outputs: list) -> tuple[list, list]:
        """Those of a flat list of outputs that are given at every step, and the others."""
        pairs = list(zip(outputs, self._every, strict=True))
        return [one for one, every in pairs if every], [one for one, every in pairs if not every]


class StreamState:
    """A model's state and latest outputs as one float32 tensor `[batch, width]`.

    Outputs that are given at every step belong to a piece of a stream, so they are left out.

    Args:
        model: A functional model with stateful layers.
        last_step: bool. As in `DocumentRunner`. Defaults to False.

    Attributes:
        width: int. Columns of the tensor.
    """

    def __init__(self, model: keras.Model, last_step: bool = False):
        self._model = model
        self._every = at_every_step(model, last_step)
        window = ModelInputs(model).window
        self._latest = [without_time_axis(t, window) for t in self._latest_of(model.output)]
        self._specs = [(tuple(t.shape[1:]), t.dtype) for t in self._latest]
        self._specs += [(tuple(v.shape[1:]), v.dtype) for v in state_variables(model)]
        self._sizes = [math.prod(shape) for shape, _ in self._specs]
        self.width = sum(self._sizes)

    def initial(self) -> tf.Tensor:
        """`[1, width]`: before the first step."""
        zeros = [tf.zeros([1, *t.shape[1:]], t.dtype) for t in self._latest]
        return self._side_by_side([*zeros, *initial_states(self._model, 1)])

    def pack(self, outputs: Any, states: list[tf.Tensor]) -> tf.Tensor:
        """Side by side, each flat.

        Args:
            outputs: In the model's structure, as `DocumentRunner.run` returns them.
            states: In the order of `state_variables`, each `[batch, ...]`.
        """
        return self._side_by_side([*self._latest_of(outputs), *states])

    def unpack(self, state: tf.Tensor, start: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """Latest outputs and states, as `DocumentRunner.run` takes them.

        Args:
            state: float32 `[batch, width]`.
            start: bool `[batch]`. Rows that begin at the initial state instead.
        """
        state = tf.where(start[:, None], self.initial(), state)
        flat = [
            tf.cast(tf.reshape(column, [-1, *shape]), dtype)
            for column, (shape, dtype) in zip(
                tf.split(state, self._sizes, axis=1), self._specs, strict=True
            )
        ]
        return flat[: len(self._latest)], flat[len(self._latest) :]

    def _latest_of(self, outputs: Any) -> list:
        pairs = zip(keras.tree.flatten(outputs), self._every, strict=True)
        return [output for output, every in pairs if not every]

    def _side_by_side(self, flat: list[tf.Tensor]) -> tf.Tensor:
        columns = [
            tf.reshape(tf.cast(tensor, "float32"), [-1, size])
            for tensor, size in zip(flat, self._sizes, strict=True)
        ]
        return tf.concat(columns, axis=1)


def _joined(windows: tf.TensorArray, batch: tf.Tensor, time: tf.Tensor) -> tf.Tensor:
    """Windows `[batch, window, ...]` one after another, as `[batch, time, ...]` with zeros behind.

    Args:
        windows: One output of each window.
        batch: int `[]`.
        time: int `[]`.
    """
    shape = windows.element_shape[1:]
    # Not by `stack`, which knows no batch where there is no window.
    stacked = tf.raw_ops.TensorListStack(
        input_handle=windows.flow,
        element_shape=tf.stack([batch, *shape]),
        element_dtype=windows.dtype,
    )
    row = tf.transpose(stacked, [1, 0, *range(2, len(shape) + 2)])
    row = tf.reshape(row, [batch, tf.shape(stacked)[0] * shape[0], *shape[1:]])[:, :time]
    missing = time - tf.shape(row)[1]
    return tf.pad(row, [[0, 0], [0, missing], *[[0, 0]] * (len(shape) - 1)])


def _any_batch(tensor: Any) -> tf.TensorShape:
    return tf.TensorShape([None, *tensor.shape[1:]])
