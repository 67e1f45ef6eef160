"""TBPTTModel: a functional Keras model trained by truncated backpropagation through time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt import _batches, _keras
from keras_tbptt._compiled import check_jit, check_optimizer_keys, check_trainable
from keras_tbptt._inputs import ModelInputs, static_layers
from keras_tbptt._masks import forgetful_layers
from keras_tbptt._on_replicas import StepsOnReplicas, loss_metric
from keras_tbptt._prediction import without_training
from keras_tbptt._reach import WindowHistory, check_backprop_windows
from keras_tbptt._shares import evaluation_shares, multiplied, shares
from keras_tbptt._steps import (
    ForwardOnly,
    OneWindow,
    SeveralWindows,
    pooling_states,
    unpacked,
)
from keras_tbptt.data._source import WindowSource
from keras_tbptt.data.stream import DocumentStream
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.losses import FINAL_LOSSES, WindowLoss, check_window_loss


def _read_only(name: str, doc: str) -> Any:
    """An attribute that the constructor sets: a change would reach no step that is traced."""
    return property(lambda self: getattr(self, name), doc=doc)


@keras.saving.register_keras_serializable(package="keras_tbptt")
class TBPTTModel(StepsOnReplicas):
    """A functional model with stateful layers that learns documents window by window.

    `fit`, `evaluate` and `predict` are Keras's own and take `DocumentWindows`. For each window of a
    batch, `train_step` resets the lanes that begin a document, runs the window from the state that
    the window before left, takes the loss, and makes one optimizer step. `backprop_windows` says
    how far back the gradient reaches. With 1, no gradient crosses from window to window: this is
    BPTT(h; h') with h = h' = window (Williams and Peng 1990, "An efficient gradient-based algorithm
    for on-line training of recurrent network trajectories", section 3).

    The model masks padding by itself: every recurrent layer at any depth gets the window's mask.

    The loss that is minimised is Keras's mean over the batch. Each lane has the weight of its
    document times `keras_tbptt.losses.window_weights`, so idle lanes and windows that do not count
    add nothing. The loss that is reported, and the losses of single outputs, are means over the
    windows that count. `evaluate`, and the validation inside `fit`, count each document once, at
    its last real step. They leave the state of training as it was.

    Args:
        inputs: A `keras.Input` of `batch_shape=(lanes, window)` for ids or
            `(lanes, window, F)` for features.
        outputs: The output tensor, or a list or dict of several: `[lanes, ...]`, or
            `[lanes, window, ...]` for a target per step.
        name: Optional str.
        window_loss: Where the loss is taken: `"per_window"`, `"final_only"`, `"linear_gain"` or
            `"pooled"` (see `keras_tbptt.losses.window_weights`). With `"final_only"` and
            `"pooled"`, windows in which no document ends have no backward pass. `"pooled"` needs a
            `keras_tbptt.layers.ConcatPooling(stateful=True)` before the head: the gradient
            crosses from window to window through the pooled values, and through no recurrent
            state. Defaults to `"per_window"`.
        backprop_windows: The reach, in windows. Defaults to 1, for `"pooled"` to `"all"`.
            An int n >= 1: each window's loss flows back through its last n windows (h = n * window,
            h' = window).
            `"all"`: the exact gradient of whole documents. Windows run forwards, and the state at
            their boundaries is kept. When the documents of all lanes have ended, the windows run
            once more, from the last to the first, with the same dropout, for one optimizer step.
            This takes the memory of a few windows. It needs windows with `packing="aligned"`,
            because no weight may change within a document.
            `"artbp"`: the gradient is cut at a random boundary, and multiplied by
            1 / (1 - cut_probability) at each boundary that it crosses, so that it is unbiased
            (Tallec and Ollivier 2017, "Unbiasing truncated backpropagation through time",
            section 4). All windows between two cuts, which all lanes share, make one optimizer
            step.
        cut_probability: float in (0, 1). The chance that `"artbp"` cuts at a boundary. The mean
            reach is 1 / cut_probability windows. Defaults to 0.25.
        burn_in: int >= 0. How many windows at the beginning of a document only run forwards, to
            give the state a start, counted in full windows (R2D2: Kapturowski et al. 2019,
            "Recurrent experience replay in distributed reinforcement learning", section 3). A
            document's last window always counts. Defaults to 0.
        **kwargs: Further arguments of a functional `keras.Model`, such as `trainable`.

    Raises:
        ValueError: If the input's batch shape is not fixed, there is no stateful layer or one that
            runs backwards, `window_loss` or `backprop_windows` is unknown, or `"pooled"` finds
            no pooling layer.

    Example:

    ```python
    tokens = keras.Input(batch_shape=train.batch_shape, dtype="int32")
    x = keras.layers.Embedding(20_000, 100)(tokens)
    x = keras_tbptt.layers.LSTM(256, stateful=True)(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x)
    model = keras_tbptt.TBPTTModel(tokens, outputs, window_loss="per_window")
    model.compile("adam", "binary_crossentropy", weighted_metrics=["accuracy"])
    model.fit(train, validation_data=valid, epochs=3)
    ```
    """

    window_loss = _read_only("_window_loss", "Where the loss is taken.")
    backprop_windows = _read_only("_backprop_windows", "The reach, in windows.")
    cut_probability = _read_only("_cut_probability", 'How often `"artbp"` cuts at a boundary.')
    burn_in = _read_only("_burn_in", "Windows of a document that only run forwards.")

    def __init__(
        self,
        inputs: Any = None,
        outputs: Any = None,
        name: str | None = None,
        *,
        window_loss: WindowLoss = "per_window",
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
        check_backprop_windows(backprop_windows, cut_probability, burn_in)
        super().__init__(inputs, outputs, name=name, **kwargs)
        self._window_loss, self._backprop_windows = window_loss, backprop_windows
        self._cut_probability, self._burn_in = cut_probability, burn_in
        _warn_of_forgetful_layers(self)
        self._cuts = keras.random.SeedGenerator() if backprop_windows == "artbp" else None
        if window_loss == "pooled" and not any(pooling_states(self)):
            raise ValueError(
                'window_loss="pooled" needs a keras_tbptt.layers.ConcatPooling(stateful=True) '
                "between the recurrent layers (return_sequences=True) and the head. "
                f"Received: layers {[layer.name for layer in self.layers]}"
            )
        self._evaluate: Callable = ForwardOnly(self)
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

        A metric without weights would count idle lanes and windows that do not end a document.
        Therefore `metrics` become `weighted_metrics`.

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
        # Keras's own default uses XLA on GPUs, which drops every check of a step.
        if kwargs.setdefault("jit_compile", False) is True:
            check_jit(self)
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
        """Trains on `DocumentWindows` or a `DocumentStream`, with Keras's own `fit`.

        Args:
            x: `DocumentWindows` or a `DocumentStream` with labels; their `dataset(flags=True)`; or
                a `tf.data.Dataset` of batches like those, for lanes of your own. Such batches may
                leave out the flags that the window loss does not need.
            *args: As in `keras.Model.fit`.
            validation_data: `DocumentWindows` or a `DocumentStream` with labels, or None.
            class_weight: Optional dict of class index to weight, multiplied into the weights of
                the documents; the labels must be class indices or one-hot vectors.
            callbacks: As in `keras.Model.fit`.
            initial_epoch: int. Epoch at which to start; the windows take the order of that epoch.
                With 0 they go on from their own `epoch`, so that a second `fit` has new orders; a
                stream goes on with the next documents.
            **kwargs: Further arguments of `keras.Model.fit`.

        Returns:
            The `keras.callbacks.History` of the run.

        Raises:
            ValueError: If the windows do not fit the model, or have no labels, or the length of an
                epoch of a stream is not known, or a key of an `OptimizerMap` is the path of no
                weight.
            RecordError: If a record of a stream cannot be read.
            tf.errors.InvalidArgumentError: If the windows of a lane do not follow each other.
        """
        if self.compiled and self.optimizer is not None:
            check_optimizer_keys(self)
            check_trainable(self)
        source = _batches.source_of(x)
        dataset = _batches.as_dataset(x, self, learns=True)
        if isinstance(source, DocumentStream):
            kwargs["steps_per_epoch"] = _steps_of(source, kwargs.get("steps_per_epoch"))
        elif isinstance(source, DocumentWindows):
            _warn_of_idle_lanes(source)
        flags, y, sample_weight = self.prepare(dataset, learns=True)
        self._learn.prepare(flags, y, sample_weight)
        kwargs.setdefault("shuffle", False)  # Keras warns that it cannot shuffle a dataset
        if class_weight is not None:
            dataset = dataset.map(_batches.class_weigher(class_weight, dataset.element_spec))
        if validation_data is not None:
            steps = kwargs.get("validation_steps")
            validation_data = _batches.as_dataset(validation_data, self, steps=steps)
        if source is not None:
            callbacks = _with_callback(callbacks, _FirstPlace(source, initial_epoch))
        self.window_order.clear()
        self.fitted_windows = source
        try:
            with _batches.errors_of(source, validation_data):
                return super().fit(
                    dataset,
                    *args,
                    validation_data=validation_data,
                    callbacks=callbacks,
                    initial_epoch=initial_epoch,
                    **kwargs,
                )
        finally:
            self.fitted_windows = None

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
        dataset = _batches.as_dataset(x, self, steps=kwargs.get("steps"))
        self.prepare(dataset)
        with without_training(self, x), _batches.errors_of(x), _batches.to_the_end():
            results = super().evaluate(dataset, *args, **kwargs)
        if not loss_metric(self).count.numpy():
            warnings.warn(
                "No document with a weight ended in the evaluation, so it has no figures: evaluate "
                f"more windows. Received: {x!r} with {kwargs}",
                stacklevel=2,
            )
            results = keras.tree.map_structure(lambda _: float("nan"), results)
        return results

    def optimizer_steps(self, windows: DocumentWindows) -> int:
        """How many steps the optimizer makes in an epoch, for learning-rate schedules.

        Args:
            windows: The `DocumentWindows` to train on.

        Returns:
            int: the windows in which any lane learns; with `backprop_windows="all"` the groups of
            documents, and with `"artbp"` the expected number.
        """
        if not isinstance(windows, DocumentWindows):
            raise ValueError(
                "A stream does not know in which windows there is something to learn: with "
                'window_loss="per_window" it is every window, steps_per_epoch of them. '
                f"Received: {windows!r}"
            )
        return self._learn.steps_in(windows)

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Learns from one window of every lane.

        Args:
            data: A batch `(x, y, sample_weight)` of `DocumentWindows.dataset(flags=True)`.

        Returns:
            A dict of the metrics' values.
        """
        x, y, weight = unpacked(self, data, aligned=self.backprop_windows == "all")
        share = shares(self.window_loss, x, self.window, weight, self.burn_in)
        learns = self._learn.learns(x, share)

        def learn(learns: bool | tf.Tensor) -> dict[str, tf.Tensor]:
            return self.on_replicas(
                functools.partial(self._learn, learns=learns),
                x,
                y,
                multiplied(weight, share),
                share,
            )

        if self.replicas.strategy is None or learns is True:
            return learn(learns)
        # Outside of the replicas, which must sum up their gradients all together or not at all.
        return tf.cond(learns, lambda: learn(True), lambda: learn(False))

    def test_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Runs one window of every lane, and counts the documents that end in it.

        Args:
            data: A batch `(x, y, sample_weight)` of `DocumentWindows.dataset(flags=True)`.

        Returns:
            A dict of the metrics' values.
        """
        x, y, weight = unpacked(self, data)
        share = evaluation_shares(x, self.window, weight)
        return self.on_replicas(self._evaluate, x, y, multiplied(weight, share), share)

    def evaluates_by(self, step: Callable) -> Callable:
        """Sets what runs a window in `evaluate`, for other kinds of evaluation.

        Args:
            step: A function as `_steps.ForwardOnly`.

        Returns:
            What did so before.
        """
        before, self._evaluate = self._evaluate, step
        self.test_function = None  # its graph holds the old one
        return before

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> None:
        """The outputs carry no mask: a prediction stands for the window or the document.

        Args:
            inputs: The model's inputs.
            previous_mask: Their mask.
        """
        return None

    def get_config(self) -> dict[str, Any]:
        """The model's configuration, for `from_config` and `.keras` files."""
        return {
            **super().get_config(),
            "window_loss": self.window_loss,
            "backprop_windows": self.backprop_windows,
            "cut_probability": self.cut_probability,
            "burn_in": self.burn_in,
        }

    @property
    def may_only_run(self) -> bool:
        """Whether there may be windows in which no lane has anything to learn from."""
        return self.window_loss in FINAL_LOSSES or self.burn_in > 0

    @property
    def window_history(self) -> WindowHistory | None:
        """The windows that the next step's gradient may flow back to; None with reach 1."""
        return self._learn.history


def _warn_of_forgetful_layers(model: TBPTTModel) -> None:
    apart = static_layers(model, [*ModelInputs(model).static.values()])
    found = [layer.name for layer in forgetful_layers(model, model.window, apart)]
    if found:
        warnings.warn(
            "These recurrent layers are not stateful, so they begin anew in every window, and what "
            "they give depends on where a document is cut: give them stateful=True. "
            f"Received: layers {found} of model {model.name!r}",
            stacklevel=3,
        )


def _warn_of_idle_lanes(windows: DocumentWindows) -> None:
    if windows.per_step and 8 * windows.num_documents < windows.lanes:
        warnings.warn(
            "Most lanes have nothing to do, because a lane runs one document at a time: use fewer "
            "lanes, or cut long sequences into a stream for each lane with "
            f"streams=True. Received: {windows!r}",
            stacklevel=3,
        )


def _steps_of(stream: DocumentStream, steps_per_epoch: int | None) -> int:
    """Batches in an epoch of `fit`."""
    if steps_per_epoch is None and stream.counts is None:
        raise ValueError(
            "A stream has no end: give fit steps_per_epoch=..., or call stream.count() before, "
            f"which reads all documents once. Received: steps_per_epoch=None, {stream!r}"
        )
    return len(stream) if steps_per_epoch is None else steps_per_epoch


class _FirstPlace(keras.callbacks.Callback):
    """Sets the place that the windows begin at, after Keras has looked at a batch."""

    def __init__(self, windows: WindowSource, initial_epoch: int):
        super().__init__()
        self._windows = windows
        if initial_epoch:
            windows.epoch = initial_epoch
        self._place = windows.begin()

    def on_train_begin(self, logs: Any = None) -> None:
        self._windows.place = self._place


def _with_callback(callbacks: Any, first: keras.callbacks.Callback) -> Any:
    """What `fit` takes as `callbacks`, with one more, called before the others."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        others = [each for each in callbacks.callbacks if not isinstance(each, _FirstPlace)]
        callbacks.callbacks[:] = [first, *others]  # a list that an earlier `fit` had, has its place
        return callbacks
    return [first, *keras.tree.flatten(callbacks or [])]
