"""A trained model -> a SavedModel in the layout that TF Serving mounts."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.client import grpc_request
from keras_tbptt.state import explicit_state, initial_states, state_variables
from keras_tbptt.text import WORDLESS, standardize


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    vectorizer: keras.layers.TextVectorization | None = None,
    version: int | None = None,
    keep: int | None = None,
    warmup_texts: Sequence[str] = (),
) -> pathlib.Path:
    """Exports a stateful model for TF Serving: `path/<version>/`.

    Every signature takes any batch and any number of steps, and reads them window by window, so in
    the memory of one window. Nothing is shared between requests: what a stream has read is in the
    `state` that the client keeps and sends back. The vocabulary is inside; the state of training,
    the optimizer and the training data are not.

    | signature | takes | returns |
    | --- | --- | --- |
    | `serving_default` | `text`, string `[batch]` | outputs |
    | `tokens` | `ids`, int32 `[batch, time]`, and `lengths`, int32 `[batch]` | outputs |
    | `stream` | `text`, `state`, and `start`, bool `[batch]` | outputs and `state` |
    | `stream_tokens` | `ids`, `lengths`, `state` and `start` | outputs and `state` |
    | `initial_state` | `batch_size`, int32 `[]` | `state` |

    Outputs are `probability`, float32 `[batch, ...]`, or the model's output names, if it has
    several outputs or its last layer is no sigmoid or softmax; each is read at the last step so
    far. Where the model reads floats, `ids` is `features`, float32 `[batch, time, F]`. Without a
    vectorizer nothing takes `text`, `serving_default` is what `tokens` would be, and `stream` what
    `stream_tokens` would be.

    `state` is float32 `[batch, S]`, one row a stream: the latest outputs and all of the model's
    recurrent state, each flat, in the order of `keras_tbptt.state.state_variables`. Where `start`
    is true the row is not read, and the stream begins anew. A piece without a word, or with
    `lengths` 0, leaves state and outputs as they are; outputs are zeros until a stream's first
    step. Pieces end between words.

    The version directory appears whole or not at all: it is written beside its place and renamed.

    Args:
        model: A functional model with stateful layers and one input of a fixed window, such as
            a `TBPTTModel`.
        path: The model's directory, which TF Serving mounts as `/models/<name>`.
        vectorizer: Turns texts into the ids that the model was trained on
            (`keras_tbptt.text.make_vectorizer`); None for a model that does not read text.
        version: int >= 1; None for one more than the largest there.
        keep: int >= 1, how many versions stay, the oldest being deleted once the new one is there;
            None for all.
        warmup_texts: Texts that TF Serving reads, by every signature that takes text, before it
            sends a client here (`assets.extra/tf_serving_warmup_requests`); at most 300. Needs
            `pip install 'keras-tbptt[serving]'`.

    Returns:
        The path of the version directory.

    Raises:
        ValueError: If the model has no stateful layer, the version is there already, or an argument
            is out of its range.
        OSError: If the directory cannot be written; nothing is left behind then.
    """
    if len(warmup_texts) > 300 or (warmup_texts and vectorizer is None):
        raise ValueError(
            "`warmup_texts` must be at most 300 texts, for a model exported with its vectorizer. "
            f"Received: {len(warmup_texts)} texts, vectorizer={vectorizer}"
        )
    if keep is not None and keep < 1:
        raise ValueError(f"`keep` must be at least 1, or None for all. Received: keep={keep}")
    path = pathlib.Path(path)
    served = tf.Module()
    served.weights = [weight.value for weight in model.weights]
    served.vectorizer = vectorizer
    served.endpoints = signatures(model, vectorizer)

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
            signatures=served.endpoints,
            options=tf.saved_model.SaveOptions(save_debug_info=False),
        )
        if warmup_texts:
            _write_warmup(partial, path.name, warmup_texts, _StreamState(model).width)
        partial.chmod(0o755)
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if keep is not None:
        versions = sorted((int(p.name), p) for p in path.iterdir() if p.name.isdigit())
        for _, old in versions[:-keep]:
            shutil.rmtree(old)
    return final


def write_models_config(path: str | os.PathLike, mount: str = "/models") -> pathlib.Path:
    """Writes `models.config`, with which TF Serving serves every model of a directory.

    Args:
        path: The directory that holds the models' directories, such as `"saved_models"`.
        mount: Where the server sees that directory.

    Returns:
        The path of the file, for the server's `--model_config_file`.
    """
    path = pathlib.Path(path)
    models = [p.name for p in sorted(path.iterdir()) if any(v.name.isdigit() for v in _folders(p))]
    entry = (
        '  config {{\n    name: "{0}"\n    base_path: "{1}/{0}"\n'
        '    model_platform: "tensorflow"\n  }}\n'
    )
    entries = "".join(entry.format(name, mount) for name in models)
    partial = path / ".models.config.partial"
    partial.write_text(f"model_config_list {{\n{entries}}}\n", encoding="utf-8")
    return partial.rename(path / "models.config")


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _write_warmup(version: pathlib.Path, name: str, texts: Sequence[str], width: int) -> None:
    from tensorflow_serving.apis import prediction_log_pb2

    folder = version / "assets.extra"
    folder.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / "tf_serving_warmup_requests")) as writer:
        for text in texts:
            stream = {"text": [text], "state": np.zeros([1, width], "float32"), "start": [True]}
            for request in (
                grpc_request(name, {"text": [text]}, "serving_default"),
                grpc_request(name, {"batch_size": 1}, "initial_state"),
                grpc_request(name, stream, "stream"),
            ):
                log = prediction_log_pb2.PredictionLog()
                log.predict_log.request.CopyFrom(request)
                writer.write(log.SerializeToString())


def signatures(
    model: keras.Model, vectorizer: keras.layers.TextVectorization | None
) -> dict[str, Callable]:
    """The functions that an export serves, by name (see `export_saved_model`).

    Args:
        model: A functional model with stateful layers and one input `[lanes, window, ...]`.
        vectorizer: Or None.
    """
    read, layout = document_reader(model), _StreamState(model)
    names = _output_names(model)
    given = model.inputs[0]
    name = "features" if keras.backend.is_float_dtype(given.dtype) else "ids"
    steps_spec = tf.TensorSpec([None, None, *given.shape[2:]], given.dtype, name=name)
    lengths_spec = tf.TensorSpec([None], tf.int32, name="lengths")
    text_spec = tf.TensorSpec([None], tf.string, name="text")
    state_spec = tf.TensorSpec([None, None], tf.float32, name="state")
    start_spec = tf.TensorSpec([None], tf.bool, name="start")
    vocabulary = _vocabulary(model)

    def named(outputs: Any) -> dict[str, tf.Tensor]:
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    def check_steps(steps: tf.Tensor, lengths: tf.Tensor, least: int) -> tf.Tensor:
        inside = (lengths >= least) & (lengths <= tf.shape(steps)[1])
        message = f"`lengths` must lie between {least} and the steps of `{name}`."
        checks = [_same_rows(name, steps, "lengths", lengths), _require(inside, message, lengths)]
        if name == "features":
            finite = tf.math.is_finite(steps)
            checks.append(_require(finite, "`features` must be finite.", steps))
        elif vocabulary is not None:
            known = (steps >= 0) & (steps < vocabulary)
            checks.append(_require(known, f"`ids` must lie between 0 and {vocabulary - 1}.", steps))
        return _after(checks, steps)

    def resume(steps: tf.Tensor, lengths: tf.Tensor, state: tf.Tensor, start: tf.Tensor) -> dict:
        outputs, states = layout.unpack(state, start)
        outputs, states = read(steps, lengths, outputs, states)
        return {**named(outputs), "state": layout.pack(outputs, states)}

    def check_state(rows: tf.Tensor, name: str, state: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
        width = tf.shape(state)[1]
        same = _same_rows(name, rows, "state", state), _same_rows(name, rows, "start", start)
        right = _require(width == layout.width, f"`state` must have {layout.width} columns.", width)
        state = _after([*same, right], state)
        used = tf.math.is_finite(state) | start[:, None]
        message = "`state` must be finite: send what the last reply had."
        return _after([_require(used, message, state)], state)

    @tf.function(input_signature=[steps_spec, lengths_spec])
    def tokens(steps, lengths):
        return named(read(check_steps(steps, lengths, least=1), lengths)[0])

    @tf.function(input_signature=[steps_spec, lengths_spec, state_spec, start_spec])
    def stream_tokens(steps, lengths, state, start):
        state = check_state(steps, name, state, start)
        return resume(check_steps(steps, lengths, least=0), lengths, state, start)

    @tf.function(input_signature=[text_spec])
    def serving_default(text):
        ids = vectorizer(text)
        return named(read(ids.to_tensor(), ids.row_lengths())[0])

    @tf.function(input_signature=[text_spec, state_spec, start_spec])
    def stream(text, state, start):
        state = check_state(text, "text", state, start)
        ids = vectorizer(text)
        lengths = tf.where(standardize(text) == WORDLESS, 0, tf.cast(ids.row_lengths(), "int32"))
        return resume(ids.to_tensor(), lengths, state, start)

    @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="batch_size")])
    def initial_state(batch_size):
        right = _require(batch_size >= 0, "`batch_size` must not be negative.", batch_size)
        return {"state": tf.repeat(layout.initial(), _after([right], batch_size), axis=0)}

    if vectorizer is None:
        return {"serving_default": tokens, "stream": stream_tokens, "initial_state": initial_state}
    return {
        "serving_default": serving_default,
        "tokens": tokens,
        "stream": stream,
        "stream_tokens": stream_tokens,
        "initial_state": initial_state,
    }


class _StreamState:
    """A model's state and latest outputs as one float32 tensor `[batch, width]`."""

    def __init__(self, model: keras.Model):
        self._model = model
        self._outputs = [_one_step(tensor, model) for tensor in keras.tree.flatten(model.output)]
        self._specs = [(tuple(t.shape[1:]), t.dtype) for t in self._outputs]
        self._specs += [(tuple(v.shape[1:]), v.dtype) for v in state_variables(model)]
        self._sizes = [math.prod(shape) for shape, _ in self._specs]
        self.width = sum(self._sizes)

    def initial(self) -> tf.Tensor:
        """`[1, width]`: before the first step."""
        zeros = [tf.zeros([1, *t.shape[1:]], t.dtype) for t in self._outputs]
        return self.pack(zeros, initial_states(self._model, 1))

    def pack(self, outputs: Any, states: list[tf.Tensor]) -> tf.Tensor:
        flat = [*keras.tree.flatten(outputs), *states]
        columns = [
            tf.reshape(tf.cast(tensor, "float32"), [-1, size])
            for tensor, size in zip(flat, self._sizes, strict=True)
        ]
        return tf.concat(columns, axis=1)

    def unpack(self, state: tf.Tensor, start: tf.Tensor) -> tuple[Any, list[tf.Tensor]]:
        state = tf.where(start[:, None], self.initial(), state)
        flat = [
            tf.cast(tf.reshape(column, [-1, *shape]), dtype)
            for column, (shape, dtype) in zip(
                tf.split(state, self._sizes, axis=1), self._specs, strict=True
            )
        ]
        outputs = keras.tree.pack_sequence_as(self._model.output, flat[: len(self._outputs)])
        return outputs, flat[len(self._outputs) :]


def document_reader(model: keras.Model) -> Callable[..., tuple[Any, list[tf.Tensor]]]:
    """The model as a graph function over whole documents, in the memory of one window.

    Args:
        model: A functional model with stateful layers and one input `[lanes, window, ...]`.

    Returns:
        A function `(steps, lengths, outputs=None, states=None) -> (outputs, states)` to be used
        inside a `tf.function`: `steps` is `[batch, time, ...]` ids or features, right-padded, of
        any batch and time; `lengths` is an integer tensor `[batch]`; `outputs` has the structure of
        the model's outputs, `[batch, ...]`, read at each document's last step; `states` are
        `[batch, ...]` in the order of `state_variables`. Those given are what a document has come
        to before these steps; where there are none, `lengths` 0, they come back as they are.
    """
    call = explicit_state(model)
    window = model.inputs[0].shape[1]
    step_shape = model.inputs[0].shape[2:]

    def read(steps: tf.Tensor, lengths: tf.Tensor, outputs: Any = None, states: Any = None) -> Any:
        batch, time = tf.shape(steps)[0], tf.shape(steps)[1]
        steps = tf.cast(steps, model.inputs[0].dtype)
        lengths = tf.cast(lengths, "int32")
        windows = -(-time // window)
        padding = [[0, 0], [0, windows * window - time]] + [[0, 0]] * len(step_shape)
        steps = tf.pad(steps, padding)
        symbolic = keras.tree.map_structure(lambda t: _one_step(t, model), model.output)
        if outputs is None:
            outputs = keras.tree.map_structure(
                lambda tensor: tf.zeros([batch, *tensor.shape[1:]], tensor.dtype), symbolic
            )
        if states is None:
            states = initial_states(model, batch)

        def body(index, outputs, states):
            part = steps[:, index * window : (index + 1) * window]
            part = tf.ensure_shape(part, [None, window, *step_shape])
            left = lengths - index * window
            # A document that has ended reads one step more, of which nothing is kept: cuDNN
            # refuses fully masked rows.
            real = tf.clip_by_value(left, 1, window)
            mask = tf.sequence_mask(real, window)
            part = tf.where(_like(mask & (left < 1)[:, None], part), tf.ones_like(part), part)
            new_outputs, new_states = call(part, states, mask=mask)
            new_outputs = keras.tree.map_structure(
                lambda tensor, one: _last_step(tensor, one, real), new_outputs, symbolic
            )
            keep = lambda new, old: tf.where(_like(left > 0, new), new, old)  # noqa: E731
            return (
                index + 1,
                keras.tree.map_structure(keep, new_outputs, outputs),
                [keep(new, old) for new, old in zip(new_states, states, strict=True)],
            )

        return tf.while_loop(
            lambda index, *_: index < windows,
            body,
            (0, outputs, states),
            shape_invariants=(
                tf.TensorShape([]),
                keras.tree.map_structure(_any_batch, symbolic),
                [_any_batch(state) for state in states],
            ),
            parallel_iterations=1,
        )[1:]

    return read


def _one_step(tensor: keras.KerasTensor, model: keras.Model) -> keras.KerasTensor:
    """An output of the model without its time axis, if it has one."""
    if len(tensor.shape) > 2 and tensor.shape[1] == model.inputs[0].shape[1]:
        return keras.KerasTensor((tensor.shape[0], *tensor.shape[2:]), tensor.dtype)
    return tensor


def _last_step(tensor: tf.Tensor, one: keras.KerasTensor, real: tf.Tensor) -> tf.Tensor:
    if tensor.shape.rank == len(one.shape):
        return tensor
    return tf.gather(tensor, real - 1, axis=1, batch_dims=1)


def _vocabulary(model: keras.Model) -> int | None:
    """How many ids the model's embedding has, if its input goes into one."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Embedding) and layer.input is model.inputs[0]:
            return layer.input_dim
    return None


def _require(condition: tf.Tensor, message: str, received: tf.Tensor) -> tf.Operation:
    received = [f"{message} Received:", received]
    return tf.debugging.Assert(tf.reduce_all(condition), received, summarize=8)


def _after(checks: list[tf.Operation], tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, for use only once the checks have passed."""
    with tf.control_dependencies(checks):
        return tf.identity(tensor)


def _same_rows(name: str, tensor: tf.Tensor, other_name: str, other: tf.Tensor) -> tf.Operation:
    rows, other_rows = tf.shape(tensor)[0], tf.shape(other)[0]
    message = f"`{name}` and `{other_name}` must have the same number of rows."
    return _require(rows == other_rows, message, tf.stack([rows, other_rows]))


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
