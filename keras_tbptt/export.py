"""A trained model -> a SavedModel in the layout that TF Serving mounts."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt.state import explicit_state, initial_states


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    vectorizer: keras.layers.TextVectorization,
    version: int | None = None,
) -> pathlib.Path:
    """Exports a stateful text model for TF Serving: `path/<version>/`.

    The signature `serving_default` takes `text`, a string tensor `[batch]` of any size, and
    returns float32 `probability` `[batch, ...]` (the model's output names instead, if it has
    several outputs or its last layer is no sigmoid or softmax). Every request starts from the
    initial state, reads its texts window by window, so in the memory of one window, and gives
    each text's prediction at its own last word. The vocabulary is inside; the state of training,
    the optimizer and the training data are not.

    The version directory appears whole or not at all: it is written beside its place and renamed.

    Args:
        model: A functional model with stateful layers and one input of a fixed window, such as
            a `TBPTTModel`.
        path: The model's directory, which TF Serving mounts as `/models/<name>`.
        vectorizer: Turns texts into the ids that the model was trained on
            (`keras_tbptt.text.make_vectorizer`).
        version: int >= 1; None for one more than the largest there.

    Returns:
        The path of the version directory.

    Raises:
        ValueError: If the model has no stateful layer, or the version is there already.
        OSError: If the directory cannot be written; nothing is left behind then.
    """
    path = pathlib.Path(path)
    read = document_reader(model)
    names = _output_names(model)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def serving_default(text: tf.Tensor) -> dict[str, tf.Tensor]:
        ids = vectorizer(text)
        outputs = read(ids.to_tensor(), ids.row_lengths())
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    served = tf.Module()
    served.weights = [weight.value for weight in model.weights]
    served.vectorizer = vectorizer
    served.serving_default = serving_default

    try:
        path.mkdir(parents=True, exist_ok=True)
        if version is None:
            version = 1 + max((int(p.name) for p in path.iterdir() if p.name.isdigit()), default=0)
        final = path / str(version)
        if final.exists():
            raise ValueError(
                f"Version {version} is there already: choose another, or None for the next. "
                f"Received: version={version}, path={str(path)!r}"
            )
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{version}-", dir=path))
    except OSError as error:
        raise OSError(
            f"The export directory cannot be written: choose one that can. "
            f"Received: path={str(path)!r} ({error.strerror})"
        ) from error
    try:
        tf.saved_model.save(
            served,
            str(partial),
            signatures={"serving_default": serving_default},
            options=tf.saved_model.SaveOptions(save_debug_info=False),
        )
        partial.chmod(0o755)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def document_reader(model: keras.Model) -> Callable[[tf.Tensor, tf.Tensor], Any]:
    """The model as a graph function over whole documents, in the memory of one window.

    Args:
        model: A functional model with stateful layers and one input `[lanes, window, ...]`.

    Returns:
        A function `(steps, lengths) -> outputs` to be used inside a `tf.function`: `steps` is
        `[batch, time, ...]` ids or features, right-padded, of any batch and time; `lengths` is
        an integer tensor `[batch]`; `outputs` has the structure of the model's outputs,
        `[batch, ...]`, read at each document's last step.
    """
    call = explicit_state(model)
    window = model.inputs[0].shape[1]
    step_shape = model.inputs[0].shape[2:]

    def read(steps: tf.Tensor, lengths: tf.Tensor) -> Any:
        batch, time = tf.shape(steps)[0], tf.shape(steps)[1]
        steps = tf.cast(steps, model.inputs[0].dtype)
        lengths = tf.cast(lengths, "int32")
        windows = -(-time // window)
        padding = [[0, 0], [0, windows * window - time]] + [[0, 0]] * len(step_shape)
        steps = tf.pad(steps, padding)

        def body(index, outputs, states):
            part = steps[:, index * window : (index + 1) * window]
            part = tf.ensure_shape(part, [None, window, *step_shape])
            left = lengths - index * window
            # A document that has ended reads one step more, of which nothing is kept: cuDNN
            # refuses fully masked rows.
            mask = tf.sequence_mask(tf.clip_by_value(left, 1, window), window)
            part = tf.where(_like(mask & (left < 1)[:, None], part), tf.ones_like(part), part)
            new_outputs, new_states = call(part, states, mask=mask)
            keep = lambda new, old: tf.where(_like(left > 0, new), new, old)  # noqa: E731
            return (
                index + 1,
                keras.tree.map_structure(keep, new_outputs, outputs),
                [keep(new, old) for new, old in zip(new_states, states, strict=True)],
            )

        outputs = keras.tree.map_structure(
            lambda tensor: tf.zeros([batch, *tensor.shape[1:]], tensor.dtype), model.output
        )
        states = initial_states(model, batch)
        return tf.while_loop(
            lambda index, *_: index < windows,
            body,
            (0, outputs, states),
            shape_invariants=(
                tf.TensorShape([]),
                keras.tree.map_structure(_any_batch, model.output),
                [_any_batch(state) for state in states],
            ),
        )[1]

    return read


def _like(rows: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    missing = tensor.shape.rank - rows.shape.rank
    return tf.reshape(rows, tf.concat([tf.shape(rows), [1] * missing], axis=0))


def _any_batch(tensor: Any) -> tf.TensorShape:
    return tf.TensorShape([None, *tensor.shape[1:]])


def _output_names(model: keras.Model) -> list[str]:
    outputs = keras.tree.flatten(model.output)
    activation = getattr(outputs[0]._keras_history.operation, "activation", None)
    if len(outputs) == 1 and getattr(activation, "__name__", "") in ("sigmoid", "softmax"):
        return ["probability"]
    if isinstance(model.output, dict):
        return sorted(model.output)
    return model.output_names
