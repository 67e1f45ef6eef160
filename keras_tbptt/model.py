"""TBPTTModel: a functional Keras model trained by truncated backpropagation through time."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _batches, _keras
from keras_tbptt._masks import off_time_layers
from keras_tbptt._order import WindowOrder
from keras_tbptt._reporting import output_losses, penalty, report
from keras_tbptt._steps import OneWindow, SeveralWindows
from keras_tbptt.layers import ConcatPooling
from keras_tbptt.losses import FINAL_LOSSES, check_window_loss, window_weights
from keras_tbptt.reach import WindowHistory, check_backprop_windows
from keras_tbptt.state import (
    call_masked,
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
        inputs: Any = None,
        outputs: Any = None,
        name: str | None = None,
        *,
        window_loss: str = "per_window",
        backprop_windows: int | str | None = None,
        cut_probability: float = 0.25,
        burn_in: int = 0,
        **kwargs: Any,
    ):
        if inputs is None or outputs is None:
            raise ValueError(
                "A TBPTTModel is a functional model: call super().__init__(inputs, outputs) with "
                "symbolic tensors, from keras.Input(batch_shape=(lanes, window)) on, instead of "
                f"writing call(). Received: inputs={inputs}, outputs={outputs}"
            )
        original = _keras.original_of_clone(outputs)
        if isinstance(original, TBPTTModel):
            window_loss, backprop_windows = original.window_loss, original.backprop_windows
            cut_probability, burn_in = original.cut_probability, original.burn_in
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
        self._saves_states = False
        self._fitted_windows: DocumentWindows | None = None
        self._cuts = keras.random.SeedGenerator() if backprop_windows == "artbp" else None
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
        self.pools = [
            isinstance(layer, ConcatPooling)
            for layer in stateful_layers(self)
            for _ in keras.tree.flatten(layer.states)
        ]
        if window_loss == "pooled" and not any(self.pools):
            raise ValueError(
                'window_loss="pooled" needs a keras_tbptt.layers.ConcatPooling(stateful=True) '
                "between the recurrent layers (return_sequences=True) and the head. "
                f"Received: layers {[layer.name for layer in self.layers]}"
            )
        self._order = WindowOrder(self.lanes)
        one = backprop_windows == 1
        self._learn = OneWindow(self) if one else SeveralWindows(self, self._cuts)

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
        callbacks: Any = None,
        initial_epoch: int = 0,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains on `DocumentWindows`, with Keras's own `fit`.

        Args:
            x: `DocumentWindows` with labels; their `dataset(flags=True)`; or a `tf.data.Dataset` of
                batches like those, for lanes of your own. Such batches may leave out the flags that
                the window loss does not need.
            *args: As in `keras.Model.fit`.
            validation_data: `DocumentWindows` with labels, or None.
            class_weight: Optional dict of class index to weight, multiplied into the weights of
                the documents; the labels must be class indices or one-hot vectors.
            callbacks: As in `keras.Model.fit`.
            initial_epoch: int. Epoch at which to start; the windows take the order of that epoch.
                With 0 they go on from their own `epoch`, so that a second `fit` has new orders.
            **kwargs: Further arguments of `keras.Model.fit`.

        Returns:
            The `keras.callbacks.History` of the run.

        Raises:
            ValueError: If the windows do not fit the model, or have no labels.
            tf.errors.InvalidArgumentError: If the windows of a lane do not follow each other.
        """
        source = _source(x)
        if self.backprop_windows == "all" and source is not None and source.packing != "aligned":
            raise ValueError(
                'backprop_windows="all" takes one step for all lanes when their documents have '
                'ended: give it DocumentWindows(..., packing="aligned"). '
                f"Received: packing={source.packing!r}"
            )
        dataset = self._windows_dataset(x, learns=True)
        flags, y, sample_weight = _batches.unpack(dataset.element_spec)
        flags = _batches.with_all_flags(flags, self.lanes, self.window)
        y = _batches.as_outputs(y, sample_weight, self.outputs)
        self._learn.prepare(flags, y, sample_weight)
        kwargs.setdefault("shuffle", False)  # Keras warns that it cannot shuffle a dataset
        if class_weight is not None:
            dataset = dataset.map(_batches.class_weigher(class_weight, dataset.element_spec))
        if validation_data is not None:
            steps = kwargs.get("validation_steps")
            validation_data = self._windows_dataset(validation_data, steps=steps)
        if source is not None:
            callbacks = _with_callback(callbacks, _FirstEpoch(source, initial_epoch))
        self._order.clear()
        self._fitted_windows = source
        try:
            return super().fit(
                dataset,
                *args,
                validation_data=validation_data,
                callbacks=callbacks,
                initial_epoch=initial_epoch,
                **kwargs,
            )
        finally:
            self._fitted_windows = None

    def evaluate(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Loss and metrics over documents, each counted once, at its last real step.

        With a target per step every real step counts. The state of training is kept apart.

        Args:
            x: `DocumentWindows` with labels, their `dataset(flags=True)`, or batches of your own
                (see `fit`).
            *args: As in `keras.Model.evaluate`.
            **kwargs: As in `keras.Model.evaluate`.

        Returns:
            As `keras.Model.evaluate`; NaN, with a warning, if no document ended in batches of
            your own.

        Raises:
            ValueError: If the windows do not fit the model, have no labels, or no document ends in
                the first `steps` of them.
            tf.errors.InvalidArgumentError: If the windows of a lane do not follow each other.
        """
        dataset = self._windows_dataset(x, steps=kwargs.get("steps"))
        # In `fit` Keras would go on in the middle of the data where `validation_steps` ended.
        kwargs.pop("_use_cached_eval_dataset", None)
        with self._apart(x):
            results = super().evaluate(dataset, *args, **kwargs)
        if not self._loss_metric.count.numpy():
            warnings.warn(
                "No document with a weight ended in the evaluation, so it has no figures: evaluate "
                f"more windows. Received: {x!r} with {kwargs}",
                stacklevel=2,
            )
            results = keras.tree.map_structure(lambda _: float("nan"), results)
        return results

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predictions for every row of every window; see `predict_documents` for documents.

        The state of training is kept apart.

        Args:
            x: `DocumentWindows`, their `dataset(flags=True)`, or batches of your own (see `fit`).
            *args: As in `keras.Model.predict`.
            **kwargs: As in `keras.Model.predict`.

        Returns:
            Arrays `[windows * lanes, ...]`, each read at the window's last real step.

        Raises:
            ValueError: If the windows do not fit the model.
            tf.errors.InvalidArgumentError: If the windows of a lane do not follow each other.
        """
        dataset = self._windows_dataset(x, needs_labels=False)
        with self._apart(x), _single_steps(self):
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
        x, y, sample_weight = self._begin(data, aligned=self.backprop_windows == "all")
        share = self._share(x, per_step=_batches.is_per_step(sample_weight))
        weight = sample_weight * share
        learnt = self._learn(x, y, weight, share)
        report(self._loss_metric, learnt.loss, learnt.penalty, share)
        return self.compute_metrics(x["inputs"], y, learnt.y_pred, weight)

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Runs one window of every lane, and counts the documents that end in it.

        Args:
            data: A batch `(x, y, sample_weight)` of `DocumentWindows.dataset(flags=True)`.

        Returns:
            A dict of the metrics' values.
        """
        x, y, sample_weight = self._begin(data)
        per_step = _batches.is_per_step(sample_weight)
        share = window_weights(
            "per_window" if per_step else "final_only", x, self.window, per_step=per_step
        )
        weight = sample_weight * share
        y_pred = self.run_window(x, training=False)
        with output_losses(self, share):
            loss = self.compute_loss(x["inputs"], y, y_pred, weight, training=False)
        report(self._loss_metric, loss, penalty(self, loss), share)
        return self.compute_metrics(x["inputs"], y, y_pred, weight)

    def predict_step(self, data: Any) -> Any:
        """Predicts one window of every lane.

        Args:
            data: A batch of `DocumentWindows.dataset(flags=True)`.

        Returns:
            The model's outputs, at the last real step of the window where they have a time axis.
        """
        x = self._begin_lanes(data[0] if isinstance(data, tuple) else data)
        last = tf.maximum(x["lengths"] - 1, 0)

        def last_step(tensor: tf.Tensor) -> tf.Tensor:
            if tensor.shape.rank < 3 or tensor.shape[1] != self.window:
                return tensor
            return tf.gather(tensor, last, axis=1, batch_dims=1)

        return keras.tree.map_structure(last_step, self.run_window(x, training=False))

    def run_window(self, x: Mapping[str, tf.Tensor], training: bool) -> Any:
        """The forward pass over one window of every lane, from the state as it is.

        Args:
            x: Inputs and lane flags (see `DocumentWindows.dataset`).
            training: bool, whether dropout and the like apply.

        Returns:
            The model's outputs.
        """
        y_pred = call_masked(self, x["inputs"], training, self.real_steps(x))
        # Without their masks, by which Keras would weigh the loss a second time.
        return keras.tree.map_structure(tf.identity, y_pred)

    def real_steps(self, x: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Which steps of a window are no padding, and in no idle lane.

        Args:
            x: Lane flags, `"lengths"` among them.

        Returns:
            bool `[lanes, window]`.
        """
        return tf.sequence_mask(x["lengths"], self.window)

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
        if not self.optimizer.built:
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

    @property
    def may_only_run(self) -> bool:
        """Whether there may be windows in which no lane has anything to learn from."""
        return self.window_loss in FINAL_LOSSES or self.burn_in > 0

    @property
    def window_history(self) -> WindowHistory | None:
        """The windows that the next step's gradient may flow back to; None with reach 1."""
        return self._learn.history

    @property
    def window_order(self) -> WindowOrder:
        """The place that training has come to in the document of each lane."""
        return self._order

    @property
    def _loss_metric(self) -> keras.metrics.Mean:
        return next(metric for metric in self.metrics if metric.name == "loss")

    def _flags_needed(self, learns: bool, per_step: bool) -> list[str]:
        """What the window loss and the reach need to know of a window, beside its start."""
        if not learns:
            return [] if per_step else ["ends"]
        final, linear = self.window_loss in FINAL_LOSSES, self.window_loss == "linear_gain"
        needed = ["ends"] if final or self.burn_in or self.backprop_windows != 1 else []
        needed += ["positions"] if linear or self.burn_in else []
        return needed + (["totals"] if linear else [])

    def _begin(self, data: Any, aligned: bool = False) -> tuple[dict[str, Any], Any, tf.Tensor]:
        """The parts of a batch, with all flags, once the lanes that begin a document are reset."""
        x, y, sample_weight = _batches.unpack(data)
        y = _batches.as_outputs(y, sample_weight, self.outputs)
        return self._begin_lanes(x, aligned), y, sample_weight

    def _begin_lanes(self, x: Mapping[str, tf.Tensor], aligned: bool = False) -> dict[str, Any]:
        checks = []
        if _batches.has_order(x):
            checks += self._order.follow(x, aligned)
        x = _batches.with_all_flags(x, self.lanes, self.window)
        with tf.control_dependencies(checks):
            x = {name: tf.identity(value) for name, value in x.items()}
        reset_states(self, x["starts"])
        return x

    def _share(self, x: Mapping[str, tf.Tensor], per_step: bool) -> tf.Tensor:
        """How much each lane's window counts in training: `[lanes]` or `[lanes, window]`."""
        share = window_weights(self.window_loss, x, self.window, per_step=per_step)
        if self.burn_in:
            warm = x["ends"] | (x["positions"] >= self.burn_in * self.window)
            share *= tf.cast(warm[:, None] if per_step else warm, share.dtype)
        return share

    @contextlib.contextmanager
    def _apart(self, x: Any) -> Iterator[None]:
        """Running windows without learning leaves training where it is."""
        windows = [w for w in (_source(x), self._fitted_windows) if w is not None]
        epochs, order = [w.epoch for w in windows], self._order.get()
        self._order.clear()
        try:
            with preserve_states(self):
                yield
        finally:
            self._order.set(order)
            for w, epoch in zip(windows, epochs, strict=True):
                w.epoch = epoch

    def _windows_dataset(
        self, x: Any, learns: bool = False, needs_labels: bool = True, steps: int | None = None
    ) -> tf.data.Dataset:
        """What `fit`, `evaluate` or `predict` is given, as batches that fit the model."""
        if isinstance(x, DocumentWindows):
            self._check_windows(x)
            if needs_labels and not x.has_labels:
                raise ValueError(
                    "Training and evaluation need labels: DocumentWindows(documents, labels, ...). "
                    f"Received: {x!r} without labels"
                )
            dataset = x.dataset(flags=True)
        else:
            dataset = x
        spec = getattr(dataset, "element_spec", None)
        flags = spec[0] if isinstance(spec, tuple) else spec
        if not isinstance(dataset, tf.data.Dataset) or not _batches.has_flags(flags):
            raise ValueError(
                "A TBPTTModel runs windows of documents: pass keras_tbptt.DocumentWindows, or "
                "their dataset(flags=True). "
                f"Received: {type(x).__name__} of {spec}"
            )
        source = _source(x)
        if dataset is x and source is not None:
            self._check_windows(source)
        if steps is not None and source is not None and not source.per_step:
            if not source.ends[:steps].any():
                raise ValueError(
                    "No document ends in the windows to evaluate, so there would be no figures: "
                    f"evaluate more of them. Received: steps={steps}, {source!r}"
                )
        if needs_labels:
            flags, y, sample_weight = _batches.unpack(spec)
            per_step = _batches.is_per_step(sample_weight)
            needed = self._flags_needed(learns, per_step)
            if learns and "lengths" in flags and not per_step:
                needed.append("totals")
            _batches.check_flags(flags, needed)
            _batches.check_targets(y, sample_weight, self.outputs, self.window)
        return dataset

    def _check_windows(self, windows: DocumentWindows) -> None:
        expected = tuple(self.inputs[0].shape)
        received = (windows.lanes, windows.window, *windows.feature_shape)
        if expected != received:
            raise ValueError(
                f"The model's batch shape is {expected}, so the windows need "
                f"lanes={expected[0]}, window={expected[1]} and steps of shape {expected[2:]}. "
                f"Received: windows of batch shape {received}"
            )
        for layer in _embeddings_of_ids(self, self.inputs):
            if windows.max_id is None or windows.max_id >= layer.input_dim:
                raise ValueError(
                    f"The ids must be integers below the vocabulary of layer {layer.name!r}, "
                    f"input_dim={layer.input_dim}. Received: "
                    + ("floats" if windows.max_id is None else f"id {windows.max_id}")
                )
            if layer.mask_zero and windows.min_id == 0:
                raise ValueError(
                    f"Layer {layer.name!r} has mask_zero=True and takes id 0 for padding, but the "
                    "documents contain it: let ids begin at 1, or leave mask_zero out (a "
                    f"TBPTTModel masks padding by itself). Received: id 0 in {windows!r}"
                )
        off = off_time_layers(self, self.window)
        if windows.has_padding and off:
            raise ValueError(
                "A layer would run over the padding of last windows, because its steps are not the "
                "window's: remove strides and pooling before it, or give it documents that fill "
                f"their windows. Received: layers {off} of model {self.name!r}, {windows!r}"
            )


class _FirstEpoch(keras.callbacks.Callback):
    """Sets the epoch whose order the windows take first, after Keras has looked at a batch."""

    def __init__(self, windows: DocumentWindows, initial_epoch: int):
        super().__init__()
        self._windows = windows
        self._epoch = initial_epoch or windows.epoch

    def on_train_begin(self, logs: Any = None) -> None:
        self._windows.epoch = self._epoch


def _with_callback(callbacks: Any, first: keras.callbacks.Callback) -> Any:
    """What `fit` takes as `callbacks`, with one more, called before the others."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks.callbacks.insert(0, first)
        return callbacks
    return [first, *keras.tree.flatten(callbacks or [])]


def _source(x: Any) -> DocumentWindows | None:
    """The windows that `x` is, or is the dataset of."""
    return x if isinstance(x, DocumentWindows) else getattr(x, "source", None)


def _embeddings_of_ids(
    model: keras.Model, ids: Sequence[keras.KerasTensor]
) -> list[keras.layers.Embedding]:
    """The embeddings that look up the model's ids as they are, in nested models too."""
    known, found = {id(tensor) for tensor in ids}, []
    for layer in model.layers:
        for tensors in _keras.calls(layer):
            taken = [id(tensor) in known for tensor in tensors]
            if isinstance(layer, keras.layers.Embedding) and any(taken):
                found.append(layer)
            elif isinstance(layer, keras.Model) and any(taken):
                inner = [t for t, is_ids in zip(layer.inputs, taken, strict=True) if is_ids]
                found += _embeddings_of_ids(layer, inner)
    return found


@contextlib.contextmanager
def _single_steps(model: keras.Model) -> Iterator[None]:
    """Keras's `predict` would build the model once for each of `steps_per_execution`."""
    steps, model.steps_per_execution = model.steps_per_execution, 1
    try:
        yield
    finally:
        model.steps_per_execution = steps
