"""A trained model -> a SavedModel in the layout that TF Serving mounts."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._files import partial_directory, write_whole
from keras_tbptt._inputs import ModelInputs
from keras_tbptt._requests import grpc_request, serving_extra
from keras_tbptt._resizing import LOOKUPS
from keras_tbptt.serving._signatures import signatures
from keras_tbptt.serving._stream import StreamState, functional, warn_of_windows


def export_saved_model(
    model: keras.Model,
    path: str | os.PathLike,
    vectorizer: keras.layers.TextVectorization | None = None,
    version: int | None = None,
    keep: int | None = None,
    warmup_texts: Sequence[str] = (),
    *,
    last_step: bool = False,
    generation: bool = False,
) -> pathlib.Path:
    """Exports a stateful model for TF Serving: `path/<version>/`.

    Every signature takes any batch and any number of steps, and runs them window by window, in the
    memory of one window and of the outputs. Nothing is shared between requests: what a stream has
    read is in the `state` that the client keeps and sends back. The vocabulary is inside; the state
    of training, the optimizer and the training data are not.

    | signature | takes | returns |
    | --- | --- | --- |
    | `serving_default` | `text`, string `[batch]` | outputs |
    | `tokens` | `ids`, int32 `[batch, time]`, and `lengths`, int32 `[batch]` | outputs |
    | `stream` | `text`, `state`, and `start`, bool `[batch]` | outputs and `state` |
    | `stream_tokens` | `ids`, `lengths`, `state` and `start` | outputs and `state` |
    | `initial_state` | `batch_size`, int32 `[]` | `state` |
    | `generate` | `text`, `stop`, string `[n]`, and the settings | `text` |
    | `generate_tokens` | `ids`, `lengths`, `stop`, int32 `[n]`, and the settings | the same two |

    The last two are there with `generation=True`. They continue prompts, as `keras_tbptt.generate`
    does. The settings are scalars: `steps` (int32), `temperature` (float32), `top_k` (int32, 0 for
    all), `top_p` (float32, 1 for all) and `seed` (int32).

    Outputs are named `probability`, or by the model's output names if it has several outputs or its
    last layer is not a sigmoid or softmax. An output with a time axis is `[batch, time, ...]`:
    every step of the request, zero at padding. The reply then has `lengths` too, int32 `[batch]`,
    the real steps of each row: for texts, their words. Any other output is `[batch, ...]`, at the
    last step so far. Where the model reads floats, `ids` is `features`, float32 `[batch, time, F]`.
    A model of several inputs has an input of its own name for each in their place; a static one is
    `[batch, ...]`, and goes with `text` too, and with every piece of a stream.
    Without a vectorizer no signature takes `text`: `serving_default` does what `tokens` does, and
    `stream` what `stream_tokens` does.

    `state` is float32 `[batch, S]`, one row a stream: the latest outputs, except those given at
    every step, and all of the model's recurrent state, each flat, in the order of
    `keras_tbptt.state.state_variables`. Where `start` is true the row is not read, and the stream
    begins anew. A piece without a word, or with `lengths` 0, leaves the state and these outputs as
    they are; they are zeros until a stream's first step. Pieces end between words.

    The version directory appears whole or not at all: it is written beside its place and renamed.
    Several exports into one directory at once each get a version.

    Args:
        model: A functional or `Sequential` model with stateful layers and a fixed window, such as a
            `TBPTTModel`.
        path: The model's directory, which TF Serving mounts as `/models/<name>`.
        vectorizer: Turns texts into the ids that the model was trained on
            (`keras_tbptt.text.make_vectorizer`); None for a model that does not read text.
        version: int >= 1; None for one more than the largest there.
        keep: int >= 1, how many versions stay, the oldest being deleted once the new one is there;
            None for all.
        warmup_texts: Texts that TF Serving reads, by every signature that takes text, before it
            sends a client here (`assets.extra/tf_serving_warmup_requests`); at most 300. Needs
            `pip install 'keras-tbptt[serving]'`.
        last_step: bool. Whether outputs with a time axis are returned at the last step so far
            alone, `[batch, ...]`, and without `lengths`. Defaults to False.
        generation: bool. Whether the export can continue prompts. The model must be one that
            `keras_tbptt.generate` takes. Defaults to False.

    Returns:
        The path of the version directory.

    Raises:
        ImportError: If there are warm-up texts and the extra `serving` is not installed.
        ValueError: If the model has no stateful layer, an input has a name of the export's own,
            there is a vectorizer for several inputs per step, or one that pads its rows, an output
            is named `state`, or `lengths` where the reply has it, two outputs have one name, the
            version already exists, or an argument is out of range.
        OSError: If the directory cannot be written; nothing is left behind then.

    Example:

    ```python
    path = keras_tbptt.export_saved_model(model, "saved_models/imdb", vectorizer)
    served = tf.saved_model.load(path).signatures["serving_default"]
    served(text=tf.constant(["I love this film."]))["probability"]
    ```
    """
    if len(warmup_texts) > 300 or (warmup_texts and vectorizer is None):
        raise ValueError(
            "`warmup_texts` must be at most 300 texts, for a model exported with its vectorizer. "
            f"Received: {len(warmup_texts)} texts, vectorizer={vectorizer}"
        )
    if keep is not None and keep < 1:
        raise ValueError(f"`keep` must be at least 1, or None for all. Received: keep={keep}")
    whole = isinstance(version, (int, np.integer)) and not isinstance(version, bool)
    if version is not None and not (whole and version >= 1):
        raise ValueError(
            "`version` must be an integer >= 1, or None for the next. "
            f"Received: version={version!r}"
        )
    path = pathlib.Path(path)
    model = functional(model)
    warn_of_windows(model)
    served = tf.Module()
    served.weights = [weight.value for weight in model.weights]
    served.vectorizer = vectorizer
    served.lookups = [one for one in _keras.flatten_layers(model) if isinstance(one, LOOKUPS)]
    served.endpoints = signatures(model, vectorizer, last_step, generation)
    warmup = _warmup_requests(path.name, warmup_texts, model, StreamState(model, last_step).width)

    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            if version is not None and (path / str(version)).exists():
                raise _version_exists(path, version)
            partial = stack.enter_context(partial_directory(path, ".export-"))
        except OSError as error:
            raise OSError(
                f"The export directory cannot be written: choose one that can. "
                f"Received: path={str(path)!r} ({error.strerror})"
            ) from error
        tf.saved_model.save(
            served,
            str(partial),
            signatures=served.endpoints,
            options=tf.saved_model.SaveOptions(save_debug_info=False),
        )
        if warmup:
            _write_warmup(partial, warmup)
        partial.chmod(0o755)
        final = _publish(partial, path, version)
    if keep is not None:  # a version that was asked for stays, however old its number
        _delete(path, [v for v in _versions(path)[:-keep] if v != version])
    return final


def _versions(path: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def _version_exists(path: pathlib.Path, version: int) -> ValueError:
    return ValueError(
        f"Version {version} already exists: choose another, or None for the next. "
        f"Received: version={version}, path={str(path)!r}"
    )


def _publish(partial: pathlib.Path, path: pathlib.Path, version: int | None) -> pathlib.Path:
    """Renames a finished export to the directory of its version, None for the next one."""
    while True:
        # The next version is known only now, because other exports may end while this one saves.
        chosen = 1 + max(_versions(path), default=0) if version is None else version
        try:
            return partial.rename(path / str(chosen))
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if version is not None:
                raise _version_exists(path, version) from error


def _delete(path: pathlib.Path, versions: Sequence[int]) -> None:
    """Deletes versions, each of which disappears at once."""
    if not versions:
        return
    with tempfile.TemporaryDirectory(prefix=".deleted-", dir=path) as deleted:
        for version in versions:
            # Another export may have deleted the version already.
            with contextlib.suppress(FileNotFoundError):
                (path / str(version)).rename(pathlib.Path(deleted) / str(version))


def write_models_config(path: str | os.PathLike, mount: str = "/models") -> pathlib.Path:
    """Writes `models.config`, with which TF Serving serves every model of a directory.

    Args:
        path: The directory that holds the models' directories, such as `"saved_models"`.
        mount: Where the server sees that directory.

    Returns:
        The path of the file, for the server's `--model_config_file`.

    Example:

    ```python
    keras_tbptt.write_models_config("saved_models")
    # docker run -v $PWD/saved_models:/models ... --model_config_file=/models/models.config
    ```
    """
    path = pathlib.Path(path)
    models = [p.name for p in sorted(path.iterdir()) if any(v.name.isdigit() for v in _folders(p))]
    entry = (
        '  config {{\n    name: "{0}"\n    base_path: "{1}/{0}"\n'
        '    model_platform: "tensorflow"\n  }}\n'
    )
    entries = "".join(entry.format(name, mount) for name in models)
    return write_whole(path / "models.config", f"model_config_list {{\n{entries}}}\n".encode())


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _write_warmup(version: pathlib.Path, requests: Sequence[bytes]) -> None:
    folder = version / "assets.extra"
    folder.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / "tf_serving_warmup_requests")) as writer:
        for request in requests:
            writer.write(request)


def _warmup_requests(
    name: str, texts: Sequence[str], model: keras.Model, width: int
) -> list[bytes]:
    """A `PredictionLog` of every signature that takes text, for each text."""
    if not texts:
        return []
    with serving_extra("`warmup_texts`"):
        from tensorflow_serving.apis import prediction_log_pb2

    static = {
        name: np.zeros([1, *tensor.shape[1:]], tensor.dtype)
        for name, tensor in ModelInputs(model).static.items()
    }
    records = []
    for text in texts:
        given = {"text": [text], **static}
        stream = {**given, "state": np.zeros([1, width], "float32"), "start": [True]}
        for request in (
            grpc_request(name, given, "serving_default"),
            grpc_request(name, {"batch_size": 1}, "initial_state"),
            grpc_request(name, stream, "stream"),
        ):
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.CopyFrom(request)
            records.append(log.SerializeToString())
    return records
