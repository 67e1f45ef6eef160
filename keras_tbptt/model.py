"""TBPTTModel: a functional Keras model trained by truncated backpropagation through time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.layers import ConcatPooling
from keras_tbptt.losses import FINAL_LOSSES, check_window_loss, window_weights
from keras_tbptt.optimizers import LazyAdam
from keras_tbptt.reach import WindowHistory, backpropagate, check_backprop_windows
from keras_tbptt.state import (
    explicit_state,
    preserve_states,
    reset_states,
    seed_variables,
    state_variables,
    stateful_layers,
)
from keras_tbptt.windows import DocumentWindows


@keras.saving.register_keras_serializable(package="keras_tbptt")
class TBPTTModel(keras.Model):
    """A functional model with stateful layers that learns documents window by window.

    `fit`, `evaluate` and `predict` are Keras's own and take `DocumentWindows`. For each window of
    a batch, `train_step` resets the lanes that begin a document, runs the window from the state
    that the window before left, takes the loss and one optimizer step, and leaves the state to
    the next window. How far back the gradient reaches is `backprop_windows`; with 1, no gradient
    crosses from window to window (BPTT(h; h') with h = h' = window: Williams and Peng 1990, "An
    efficient gradient-based algorithm for on-line training of recurrent network trajectories",
    section 3).

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
        window_loss: Where the loss is taken: `"per_window"`, `"final_only"`, `"linear_gain"` or
            `"pooled"` (see `keras_tbptt.losses.window_weights`). With `"final_only"` and
            `"pooled"`, windows in which no lane ends its document do no backward pass. `"pooled"`
            needs a `keras_tbptt.layers.ConcatPooling(stateful=True)` before the head: the
            gradient crosses from window to window through what it pools, and through no
            recurrent state.
        backprop_windows: The reach, in windows.
            An int n >= 1: each window's loss flows back through its last n windows (h = n * window,
            h' = window).
            `"all"`: the exact gradient of whole documents. Windows are read forwards, keeping the
            state at their boundaries, and when the documents of all lanes have ended they are read
            once more backwards, with the same dropout, for one optimizer step; so in the memory of
            a few windows. It needs windows with `packing="aligned"`, since no weight may change
            within a document.
            `"artbp"`: the gradient is cut at a random boundary, and what crosses one is
            multiplied by 1 / (1 - cut_probability), so that it is unbiased (Tallec and Ollivier
            2017, "Unbiasing truncated backpropagation through time", section 4). One optimizer
            step for the windows between two cuts, which are common to all lanes.
            None: `"all"` for `"pooled"`, else 1.
        cut_probability: float in (0, 1), the chance that `"artbp"` cuts at a boundary; the mean
            reach is 1 / cut_probability windows.
        burn_in: int >= 0: windows at a document's beginning that are only read forwards, to give
            the state a start (R2D2: Kapturowski et al. 2019, "Recurrent experience replay in
            distributed reinforcement learning", section 3), counted in full windows. A
            document's last window always counts.
        **kwargs: Further arguments of a functional `keras.Model`, such as `trainable`.

    Raises:
        ValueError: If the input's batch shape is not fixed, there is no stateful layer or one
            that reads backwards, `window_loss` or `backprop_windows` is unknown, or
            `"pooled"` finds nothing that pools.

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
        backprop_windows: int | str | None = None,
        cut_probability: float = 0.25,
        burn_in: int = 0,
        **kwargs: Any,
    ):
        check_window_loss(window_loss)
        if backprop_windows is None:
            backprop_windows = "all" if window_loss == "pooled" else 1
        check_backprop_windows(backprop_windows, cut_probability)
        if not isinstance(burn_in, int) or burn_in < 0:
            raise ValueError(f"`burn_in` must be an integer >= 0. Received: burn_in={burn_in!r}")
        super().__init__(inputs, outputs, name=name, **kwargs)
        self.window_loss = window_loss
        self.backprop_windows = backprop_windows
        self.cut_probability = cut_probability
        self.burn_in = burn_in
        self._history: WindowHistory | None = None
        self._saves_states = False
        if backprop_windows == "artbp":
            self._cuts = keras.random.SeedGenerator()
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
        self._pools = [
            isinstance(layer, ConcatPooling)
            for layer in stateful_layers(self)
            for _ in keras.tree.flatten(layer.states)
        ]
        if window_loss == "pooled" and not any(self._pools):
            raise ValueError(
                'window_loss="pooled" needs a keras_tbptt.layers.ConcatPooling(stateful=True) '
                "between the recurrent layers (return_sequences=True) and the head. "
                f"Received: layers {[layer.name for layer in self.layers]}"
            )
        self._unmasked_layers = [
            layer.name
            for layer in self.layers
            if isinstance(layer, (keras.layers.RNN, ConcatPooling))
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
        if self.backprop_windows != 1:
            if kwargs.setdefault("jit_compile", False) is True:
                raise ValueError(
                    "XLA cannot compile a history of windows: leave jit_compile out, or set "
                    "backprop_windows=1. Received: jit_compile=True, "
                    f"backprop_windows={self.backprop_windows!r}"
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
        packing = getattr(x, "packing", "aligned")
        if self.backprop_windows == "all" and packing != "aligned":
            raise ValueError(
                'backprop_windows="all" takes one step for all lanes when their documents have '
                'ended: give it DocumentWindows(..., packing="aligned"). '
                f"Received: packing={packing!r}"
            )
        x = self._windows_dataset(x, needs_labels=True)
        if self.backprop_windows != 1:
            self._history_of(self._kept_of(*_unpack(x.element_spec))).clear()
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
        with preserve_states(self), _preserve_epoch(x), _single_steps(self):
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

    def optimizer_steps(self, windows: DocumentWindows) -> int:
        """How many steps the optimizer takes in an epoch, as learning rate schedules count them.

        Args:
            windows: The `DocumentWindows` to be trained on.

        Returns:
            int: the windows in which any lane learns; with `backprop_windows="all"` the groups of
            documents, and with `"artbp"` the expected number.
        """
        plan = windows.plan
        if self.backprop_windows == "all":
            return int(plan.starts.any(axis=1).sum())
        if self.backprop_windows == "artbp":
            return max(1, round(self.cut_probability * len(windows)))
        learns = plan.ends if self.window_loss in FINAL_LOSSES else plan.length > 0
        if self.burn_in:
            learns = learns & (plan.ends | (plan.offset >= self.burn_in * self.window))
        return int(learns.any(axis=1).sum())

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Learns from one window of every lane.

        Args:
            data: A batch `(x, y, sample_weight)` of `DocumentWindows.dataset(flags=True)`.

        Returns:
            A dict of the metrics' values.
        """
        x, y, sample_weight = _unpack(data)
        reset_states(self, x["starts"])
        share = self._share(x, per_step=_is_per_step(data))
        learns = tf.reduce_any(share > 0)
        if self.backprop_windows != 1:
            return self._train_step_with_reach(x, y, sample_weight, share, learns)

        def learn():
            with tf.GradientTape() as tape:
                y_pred = self._read(x, training=True)
                loss = self.compute_loss(
                    x["inputs"], y, y_pred, sample_weight * share, training=True
                )
                scaled = self.optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, self.trainable_variables)
            # An embedding's gradient comes in a slice a word read. Keras's optimizers would square,
            # and clip by, slices of the same word one by one instead of their sum.
            if not isinstance(self.optimizer, LazyAdam):
                gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
            self.optimizer.apply(gradients, self.trainable_variables)
            return loss, y_pred

        def read():
            return tf.zeros([], keras.backend.floatx()), self._read(x, training=True)

        if self._may_only_read:
            # Variables cannot be made inside a branch of tf.cond.
            self.optimizer.build(self.trainable_variables)
            loss, y_pred = tf.cond(learns, learn, read)
        else:
            loss, y_pred = learn()
        self._track_loss(loss, share)
        return self.compute_metrics(x["inputs"], y, y_pred, sample_weight * share)

    def _train_step_with_reach(
        self, x: Any, y: Any, sample_weight: tf.Tensor, share: tf.Tensor, learns: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Reads a window, keeps what it takes to read it again, and learns when it is time."""
        weight = sample_weight * share
        window = self._kept_of(x, y, weight)
        history = self._history_of(window)
        history.append(window)
        y_pred = self._read(x, training=True)
        loss = self.compute_loss(x["inputs"], y, y_pred, weight, training=True)

        sliding = isinstance(self.backprop_windows, int)
        crossing = 1.0
        if not sliding:
            learns = tf.reduce_all(x["ends"] | (x["lengths"] == 0))  # in every lane
        if self.backprop_windows == "artbp":
            draw = keras.random.uniform([], seed=self._cuts)
            learns |= tf.cast(draw, "float32") < self.cut_probability
            crossing = 1 / (1 - self.cut_probability)
        crossings = [
            crossing if pools or self.window_loss != "pooled" else 0.0 for pools in self._pools
        ]

        def learn():
            gradients = backpropagate(
                history,
                self._read_again,
                [variable.value for variable in self.trainable_variables],
                window["states"],
                crossings,
                slices=isinstance(self.optimizer, LazyAdam),
            )
            self.optimizer.apply(gradients, self.trainable_variables)
            if not sliding:
                history.clear()
            return True

        self.optimizer.build(self.trainable_variables)
        tf.cond(learns, learn, lambda: False)
        self._track_loss(loss, share)
        return self.compute_metrics(x["inputs"], y, y_pred, weight)

    def _read_again(
        self, window: Mapping[str, Any], back: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The loss of a window that was read `back` windows ago, and the state after it."""
        newest = tf.cast(back == 0, window["weight"].dtype)
        weight = window["weight"]
        if isinstance(self.backprop_windows, int):
            weight *= newest
        y_pred, new_states = explicit_state(self)(
            window["inputs"], window["states"], True, self._mask(window), window["seeds"]
        )
        y_pred = keras.tree.map_structure(_unmasked, y_pred, self.output)
        loss = self.compute_loss(window["inputs"], window["y"], y_pred, weight, training=True)
        loss -= (1 - tf.cast(newest, loss.dtype)) * self._penalty(loss)  # once in a step
        return self.optimizer.scale_loss(loss), new_states

    def _kept_of(self, x: Mapping[str, Any], y: Any, weight: Any) -> dict[str, Any]:
        """What it takes to read a window again, before it is read."""
        return {
            **{name: x[name] for name in ("inputs", "starts", "lengths")},
            "states": [tf.identity(variable.value) for variable in state_variables(self)],
            "seeds": [tf.identity(variable.value) for variable in seed_variables(self)],
            "y": y,
            "weight": weight,
        }

    def _history_of(self, window: Any) -> WindowHistory:
        """The history for windows like this; inside a graph too, variables are made outside."""
        spec = [(tensor.shape, tensor.dtype) for tensor in tf.nest.flatten(window)]
        if self._history is None or self._history.spec != spec:
            limit = self.backprop_windows if isinstance(self.backprop_windows, int) else None
            specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), window)
            with tf.init_scope():
                self._history = WindowHistory(specs, limit)
        return self._history

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

    def save(
        self,
        filepath: str | os.PathLike,
        overwrite: bool = True,
        zipped: bool | None = None,
        include_states: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model as a `.keras` file, as `keras.Model.save` does.

        Args:
            filepath: As in `keras.Model.save`.
            overwrite: As in `keras.Model.save`.
            zipped: As in `keras.Model.save`.
            include_states: Whether the file carries, beside weights and optimizer, what Keras
                leaves out: the recurrent state of every lane, and the state of the random
                generators of dropout and of `"artbp"`. `keras.saving.load_model` brings back what
                the file has.
            **kwargs: Further arguments of `keras.Model.save`.
        """
        self._saves_states = include_states
        try:
            super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
        finally:
            self._saves_states = False

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Saves what belongs to the model and to none of its layers, for Keras.

        Args:
            store: Where to.
        """
        super().save_own_variables(store)
        if self._saves_states:
            for name, variable in self._carried().items():
                store[name] = variable

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` saved, for Keras.

        Args:
            store: Where from.

        Raises:
            ValueError: If it holds the states of a model of other lanes or layers.
        """
        saved = {name: np.asarray(store[name]) for name in store.keys()}
        states = {name: saved.pop(name) for name in list(saved) if not name.isdigit()}
        super().load_own_variables(saved)
        if not states:
            return
        carried = self._carried()
        expected = {name: tuple(variable.shape) for name, variable in carried.items()}
        received = {name: value.shape for name, value in states.items()}
        if expected != received:
            raise ValueError(
                f"The states in the file are those of a model of other lanes or layers: this one "
                f"has {expected}. Load a file that was saved without include_states=True. "
                f"Received: {received}"
            )
        for name, variable in carried.items():
            variable.assign(states[name])

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was when it was saved.

        Args:
            config: From `get_compile_config`.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def get_config(self) -> dict[str, Any]:
        """The model's configuration, for `from_config` and `.keras` files."""
        return {
            **super().get_config(),
            "window_loss": self.window_loss,
            "backprop_windows": self.backprop_windows,
            "cut_probability": self.cut_probability,
            "burn_in": self.burn_in,
        }

    def _carried(self) -> dict[str, keras.Variable]:
        """What `save` includes on request, by the names in the file."""
        kinds = {"state": state_variables(self), "seed": seed_variables(self)}
        return {f"{kind}_{i}": v for kind, found in kinds.items() for i, v in enumerate(found)}

    def _read(self, x: Mapping[str, tf.Tensor], training: bool) -> Any:
        y_pred = self(x["inputs"], training=training, mask=self._mask(x))
        # Without their masks, by which Keras would weigh the loss a second time.
        return keras.tree.map_structure(tf.identity, y_pred)

    def _mask(self, x: Mapping[str, tf.Tensor]) -> tf.Tensor | None:
        # An idle lane keeps one step, its own row's, as cuDNN refuses fully masked rows.
        if self._unmasked_layers:
            return None
        return tf.sequence_mask(tf.maximum(x["lengths"], 1), self.window)

    def _share(self, x: Mapping[str, tf.Tensor], per_step: bool) -> tf.Tensor:
        """How much each lane's window counts in training: `[lanes]` or `[lanes, window]`."""
        share = window_weights(self.window_loss, x, self.window, per_step=per_step)
        if self.burn_in:
            warm = x["ends"] | (x["offsets"] >= self.burn_in * self.window)
            share *= tf.cast(warm[:, None] if per_step else warm, share.dtype)
        return share

    @property
    def window_history(self) -> WindowHistory | None:
        """The windows that the next step's gradient may flow back to; None with reach 1."""
        return self._history

    @property
    def _may_only_read(self) -> bool:
        """Whether there may be windows in which no lane has anything to learn from."""
        return self.window_loss in FINAL_LOSSES or self.burn_in > 0

    def _track_loss(self, loss: tf.Tensor, share: tf.Tensor) -> None:
        """Adds a batch to the reported loss: its mean over what counts, not over all lanes."""
        penalty = self._penalty(loss)
        total = tf.cast(tf.reduce_sum(share), loss.dtype)
        mean = (loss - penalty) * tf.math.divide_no_nan(tf.cast(tf.size(share), loss.dtype), total)
        self._loss_tracker.update_state(mean + penalty, sample_weight=total)

    def _penalty(self, loss: tf.Tensor) -> tf.Tensor:
        """What regularisation adds to the loss."""
        terms = [tf.cast(term, loss.dtype) for term in self.losses]
        return tf.add_n(terms) if terms else tf.zeros_like(loss)

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


@contextlib.contextmanager
def _single_steps(model: keras.Model) -> Iterator[None]:
    """Keras's `predict` would build the model once for each of `steps_per_execution`."""
    steps, model.steps_per_execution = model.steps_per_execution, 1
    try:
        yield
    finally:
        model.steps_per_execution = steps


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


def _unmasked(tensor: tf.Tensor, symbolic: keras.KerasTensor) -> tf.Tensor:
    """Without its mask, and of the shape that the model's own batch gives it."""
    return tf.ensure_shape(tf.identity(tensor), symbolic.shape)


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
