"""TBPTTModel: a functional Keras model trained by truncated backpropagation through time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.losses import check_window_loss, window_weights
from keras_tbptt.state import preserve_states, reset_states, state_variables
from keras_tbptt.windows import DocumentWindows


@keras.saving.register_keras_serializable(package="keras_tbptt")
class TBPTTModel(keras.Model):
    """A functional model with stateful layers that learns documents window by window.

    `fit`, `evaluate` and `predict` are Keras's own and take `DocumentWindows`. For each window of
    a batch, `train_step` resets the lanes that begin a document, runs the window from the state
    that the window before left, takes the loss and one optimizer step, and leaves the state to
    the next window; no gradient crosses it (BPTT(h; h') with h = h' = window: Williams and Peng
    1990, "An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories", section 3).

    The loss that is minimised is Keras's: a mean over the batch, where each lane has the weight of
    its document times what `keras_tbptt.losses.window_weights` gives its window; so a lane that
    is idle, or waits for its last window, adds nothing. The loss that is reported is the mean over
    the windows that count. `evaluate`, and the validation inside `fit`, count each document
    once, at its own last real step, and leave the state of training as it was. (The losses of
    single outputs that Keras reports beside it are means over all windows.)

    Args:
        inputs: A `keras.Input` of `batch_shape=(lanes, window)` for ids or
            `(lanes, window, F)` for features.
        outputs: The output tensor, or a list or dict of several: `[lanes, ...]`, or
            `[lanes, window, ...]` for a target per step.
        name: Optional str.
        window_loss: Where the loss is taken: `"per_window"` or `"final_only"`. With
            `"final_only"`, windows in which no lane ends its document do no backward pass.
        **kwargs: Further arguments of a functional `keras.Model`, such as `trainable`.

    Raises:
        ValueError: If the input's batch shape is not fixed, there is no stateful layer or one
            that reads backwards, or `window_loss` is unknown.

    Example:

    ```python
    tokens = keras.Input(batch_shape=(64, 30), dtype="int32")
    x = keras.layers.Embedding(20_000, 100, mask_zero=True)(tokens)
    x = keras.layers.LSTM(256, stateful=True)(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras_tbptt.TBPTTModel(tokens, outputs, window_loss="per_window")
    model.compile("adam", "binary_crossentropy", weighted_metrics=["accuracy"])
    model.fit(train, validation_data=valid, epochs=3)
    ```
    """

    def __init__(
        self,
        inputs: Any,
        outputs: Any,
        name: str | None = None,
        *,
        window_loss: str = "per_window",
        **kwargs: Any,
    ):
        check_window_loss(window_loss)
        super().__init__(inputs, outputs, name=name, **kwargs)
        self.window_loss = window_loss
        self.supports_masking = True
        shapes = [tuple(tensor.shape) for tensor in self.inputs]
        if len(shapes) != 1 or len(shapes[0]) < 2 or None in shapes[0][:2]:
            raise ValueError(
                "The model must have one input of a fixed batch shape: "
                "keras.Input(batch_shape=(lanes, window)). "
                f"Received: inputs of shapes {shapes}"
            )
        self.lanes, self.window = shapes[0][:2]
        state_variables(self)
        self._unmasked_layers = [
            layer.name
            for layer in self.layers
            if isinstance(layer, keras.layers.RNN)
            and not _is_masked(layer._inbound_nodes[0].input_tensors[0])
        ]

    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Configures training, as `keras.Model.compile` does; every metric is weighted.

        A metric without weights would count idle lanes and windows that do not end a document,
        so `metrics` are taken for `weighted_metrics`.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: As in `keras.Model.compile`.
            loss_weights: As in `keras.Model.compile`.
            metrics: Metrics, if `weighted_metrics` is None.
            weighted_metrics: Metrics.
            **kwargs: Further arguments of `keras.Model.compile`.

        Raises:
            ValueError: If both `metrics` and `weighted_metrics` are given.
        """
        if metrics is not None and weighted_metrics is not None:
            raise ValueError(
                "Every metric of a TBPTTModel is weighted: put them all into `weighted_metrics`. "
                f"Received: metrics={metrics}, weighted_metrics={weighted_metrics}"
            )
        super().compile(
            optimizer,
            loss,
            loss_weights,
            weighted_metrics=metrics if weighted_metrics is None else weighted_metrics,
            **kwargs,
        )

    def fit(
        self,
        x: Any = None,
        *args: Any,
        validation_data: Any = None,
        class_weight: Mapping[int, float] | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains on `DocumentWindows`, with Keras's own `fit`.

        Args:
            x: `DocumentWindows` with labels, or its `dataset(flags=True)`.
            *args: As in `keras.Model.fit`.
            validation_data: `DocumentWindows` with labels, or None.
            class_weight: Optional dict of class index to weight, multiplied into the weights of
                the documents; the labels must be class indices or one-hot vectors.
            **kwargs: Further arguments of `keras.Model.fit`.

        Returns:
            The `keras.callbacks.History` of the run.

        Raises:
            ValueError: If the windows do not fit the model, or have no labels.
        """
        x = self._windows_dataset(x, needs_labels=True)
        kwargs.setdefault("shuffle", False)  # Keras warns that it cannot shuffle a dataset
        if class_weight is not None:
            x = x.map(_class_weigher(class_weight, x.element_spec))
        if validation_data is not None:
            validation_data = self._windows_dataset(validation_data, needs_labels=True)
        return super().fit(x, *args, validation_data=validation_data, **kwargs)

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Loss and metrics over documents, each counted once, at its last real step.

        With a target per step every real step counts. The state of training is kept apart.

        Args:
            x: `DocumentWindows` with labels, or its `dataset(flags=True)`.
            *args: As in `keras.Model.evaluate`.
            **kwargs: As in `keras.Model.evaluate`.

        Returns:
            As `keras.Model.evaluate`.

        Raises:
            ValueError: If the windows do not fit the model, or have no labels.
        """
        dataset = self._windows_dataset(x, needs_labels=True)
        with preserve_states(self), _preserve_epoch(x):
            return super().evaluate(dataset, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predictions for every row of every window; see `predict_documents` for documents.

        The state of training is kept apart.

        Args:
            x: `DocumentWindows`, its `dataset(flags=True)`, or whatever `keras.Model.predict`
                takes in batches of `[lanes, window, ...]`.
            *args: As in `keras.Model.predict`.
            **kwargs: As in `keras.Model.predict`.

        Returns:
            Arrays `[steps * lanes, ...]`, each read at the window's last real step where the
            rows are windows of documents.
        """
        dataset = self._windows_dataset(x) if isinstance(x, DocumentWindows) else x
        with preserve_states(self), _preserve_epoch(x):
            return super().predict(dataset, *args, **kwargs)

    def predict_documents(self, documents: Any, offsets: Any = None, verbose: Any = 0) -> Any:
        """One prediction per document, read at its own last real step.

        The prediction of a document depends on nothing but the document: not on the lanes, the
        window, or what else is predicted with it.

        Args:
            documents: `DocumentWindows` that fit the model, or documents in any form that
                `DocumentWindows` takes, without labels.
            offsets: As in `DocumentWindows`.
            verbose: As in `keras.Model.predict`.

        Returns:
            An array `[documents, ...]` in the order given; for several outputs the structure of
            the model's outputs, of such arrays.

        Raises:
            ValueError: If the documents do not fit the model.
        """
        if not isinstance(documents, DocumentWindows):
            documents = DocumentWindows(
                documents, window=self.window, lanes=self.lanes, offsets=offsets
            )
        plan = documents.plan
        rows = self.predict(documents, verbose=verbose)

        def in_order(rows: np.ndarray) -> np.ndarray:
            ended = rows.reshape(*plan.ends.shape, *rows.shape[1:])[plan.ends]
            result = np.empty_like(ended)
            result[plan.document[plan.ends]] = ended
            return result

        return keras.tree.map_structure(in_order, rows)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Learns from one window of every lane.

        Args:
            data: A batch `(x, y, sample_weight)` of `DocumentWindows.dataset(flags=True)`.

        Returns:
            A dict of the metrics' values.
        """
        x, y, sample_weight = _unpack(data)
        reset_states(self, x["starts"])
        share = window_weights(self.window_loss, x, self.window, per_step=_is_per_step(data))

        def learn():
            with tf.GradientTape() as tape:
                y_pred = self._read(x, training=True)
                loss = self.compute_loss(
                    x["inputs"], y, y_pred, sample_weight * share, training=True
                )
                scaled = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return loss, y_pred

        def read():
            return tf.zeros([], keras.backend.floatx()), self._read(x, training=True)

        if self.window_loss == "final_only":
            # Variables cannot be made inside a branch of tf.cond.
            self.optimizer.build(self.trainable_variables)
            loss, y_pred = tf.cond(tf.reduce_any(share > 0), learn, read)
        else:
            loss, y_pred = learn()
        self._track_loss(loss, share)
        return self.compute_metrics(x["inputs"], y, y_pred, sample_weight * share)

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Reads one window of every lane, and counts the documents that end in it.

        Args:
            data: A batch `(x, y, sample_weight)` of `DocumentWindows.dataset(flags=True)`.

        Returns:
            A dict of the metrics' values.
        """
        x, y, sample_weight = _unpack(data)
        reset_states(self, x["starts"])
        per_step = _is_per_step(data)
        share = window_weights(
            "per_window" if per_step else "final_only", x, self.window, per_step=per_step
        )
        y_pred = self._read(x, training=False)
        loss = self.compute_loss(x["inputs"], y, y_pred, sample_weight * share, training=False)
        self._track_loss(loss, share)
        return self.compute_metrics(x["inputs"], y, y_pred, sample_weight * share)

    def predict_step(self, data: Any) -> Any:
        """Predicts one window of every lane.

        Args:
            data: A batch of `DocumentWindows.dataset(flags=True)`, or of plain inputs.

        Returns:
            The model's outputs, at the last real step of the window where they have a time axis.
        """
        x = data[0] if isinstance(data, tuple) else data
        if not _has_flags(x):
            return super().predict_step(data)
        reset_states(self, x["starts"])
        last = tf.maximum(x["lengths"] - 1, 0)

        def last_step(tensor: tf.Tensor) -> tf.Tensor:
            if tensor.shape.rank < 3 or tensor.shape[1] != self.window:
                return tensor
            return tf.gather(tensor, last, axis=1, batch_dims=1)

        return keras.tree.map_structure(last_step, self._read(x, training=False))

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """The outputs carry no mask: a prediction stands for the window or the document.

        Args:
            inputs: The model's inputs.
            previous_mask: Their mask.
        """
        return None

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was when it was saved.

        Args:
            config: From `get_compile_config`.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """The model's configuration, for `from_config` and `.keras` files."""
        return {**super().get_config(), "window_loss": self.window_loss}

    def _read(self, x: Mapping[str, tf.Tensor], training: bool) -> Any:
        # An idle lane keeps one step, its own row's, as cuDNN refuses fully masked rows.
        mask = None
        if not self._unmasked_layers:
            mask = tf.sequence_mask(tf.maximum(x["lengths"], 1), self.window)
        y_pred = self(x["inputs"], training=training, mask=mask)
        # Without their masks, by which Keras would weigh the loss a second time.
        return keras.tree.map_structure(tf.identity, y_pred)

    def _track_loss(self, loss: tf.Tensor, share: tf.Tensor) -> None:
        """Adds a batch to the reported loss: its mean over what counts, not over all lanes."""
        penalty = tf.add_n(
            [tf.cast(term, loss.dtype) for term in self.losses] or [tf.zeros_like(loss)]
        )
        total = tf.cast(tf.reduce_sum(share), loss.dtype)
        mean = (loss - penalty) * tf.math.divide_no_nan(tf.cast(tf.size(share), loss.dtype), total)
        self._loss_tracker.update_state(mean + penalty, sample_weight=total)

    def _windows_dataset(self, windows: Any, needs_labels: bool = False) -> tf.data.Dataset:
        if isinstance(windows, tf.data.Dataset):
            spec = windows.element_spec
            if _has_flags(spec[0] if isinstance(spec, tuple) else spec):
                return windows
        if not isinstance(windows, DocumentWindows):
            raise ValueError(
                "A TBPTTModel reads windows of documents: pass keras_tbptt.DocumentWindows, or "
                "its dataset(flags=True). "
                f"Received: {type(windows).__name__}"
            )
        self._check_windows(windows)
        if needs_labels and not windows.has_labels:
            raise ValueError(
                "Training and evaluation need labels: DocumentWindows(documents, labels, ...). "
                f"Received: {windows!r} without labels"
            )
        return windows.dataset(flags=True)

    def _check_windows(self, windows: DocumentWindows) -> None:
        expected = tuple(self.inputs[0].shape)
        received = (windows.lanes, windows.window, *windows.feature_shape)
        if expected != received:
            raise ValueError(
                f"The model's batch shape is {expected}, so the windows need "
                f"lanes={expected[0]}, window={expected[1]} and steps of shape {expected[2:]}. "
                f"Received: windows of batch shape {received}"
            )
        for layer in self.layers:
            if isinstance(layer, keras.layers.Embedding) and layer.input is self.inputs[0]:
                if windows.max_id is None or windows.max_id >= layer.input_dim:
                    raise ValueError(
                        f"The ids must be integers below the vocabulary of layer {layer.name!r}, "
                        f"input_dim={layer.input_dim}. Received: "
                        + ("floats" if windows.max_id is None else f"id {windows.max_id}")
                    )
        if windows.has_padding and self._unmasked_layers:
            raise ValueError(
                "A recurrent layer would read the padding of last windows, because no mask reaches "
                "it: use Embedding(mask_zero=True), and between it and the input only layers that "
                f"pass a mask on. Received: layers {self._unmasked_layers} of model {self.name!r}, "
                f"{windows!r}"
            )


@contextlib.contextmanager
def _preserve_epoch(windows: Any) -> Iterator[None]:
    """Reading training windows without training on them is no epoch of theirs."""
    epoch = getattr(windows, "epoch", None)
    try:
        yield
    finally:
        if epoch is not None:
            windows.epoch = epoch


def _has_flags(x: Any) -> bool:
    return isinstance(x, Mapping) and "starts" in x


def _unpack(data: Any) -> tuple[Mapping[str, tf.Tensor], Any, tf.Tensor]:
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if not _has_flags(x) or y is None or sample_weight is None:
        raise ValueError(
            "A batch for a TBPTTModel must be (x, y, sample_weight) as "
            "DocumentWindows.dataset(flags=True) makes them. "
            f"Received: x={x}, y={y}, sample_weight={sample_weight}"
        )
    return x, y, sample_weight


def _is_per_step(data: Any) -> bool:
    return data[2].shape.rank == 2


def _is_masked(tensor: keras.KerasTensor) -> bool:
    """Whether a mask given with the model's input, or made on the way, reaches `tensor`."""
    if getattr(tensor, "_keras_mask", None) is not None:
        return True
    operation, node_index, _ = tensor._keras_history
    if isinstance(operation, keras.layers.InputLayer):
        return True
    if not getattr(operation, "supports_masking", False):
        return False
    return all(_is_masked(t) for t in operation._inbound_nodes[node_index].input_tensors)


def _class_weigher(class_weight: Mapping[int, float], spec: tuple):
    """Multiplies the weight of a label's class into a batch's sample weights."""
    label = spec[1]
    if not isinstance(label, tf.TensorSpec):
        raise ValueError(
            "`class_weight` works with one output; give `weights` to DocumentWindows instead. "
            f"Received: labels {label}"
        )
    table = np.ones(max(class_weight) + 1, "float32")
    for index, weight in class_weight.items():
        table[index] = weight

    def weigh(x, y, sample_weight):
        index = y
        if y.shape.rank > sample_weight.shape.rank:
            index = y[..., 0] if y.shape[-1] == 1 else tf.argmax(y, axis=-1)
        index = tf.minimum(tf.cast(index, "int32"), len(table))
        weights = tf.gather(tf.concat([table, [1.0]], 0), index)
        return x, y, sample_weight * weights

    return weigh
