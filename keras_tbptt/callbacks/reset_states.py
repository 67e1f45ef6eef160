"""Callbacks for stateful Keras models: a `keras.Model` of any kind."""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.model import TBPTTModel
from keras_tbptt.state import get_states, reset_states, set_states, state_variables


class ResetStates(keras.callbacks.Callback):
    """Resets each lane of a stock stateful model where the lane begins a document.

    Keras resets no state between batches or epochs, and validation overwrites the state of
    training. With this callback, each lane starts every document from the initial state. An
    evaluation or a prediction has a state of its own: afterwards the callback restores the state of
    training and `windows.epoch`.

    A `TBPTTModel` does all this by itself and needs no such callback.

    Args:
        windows: `DocumentWindows`, whose `dataset()` is given to `fit`, or to `evaluate` or
            `predict` outside of `fit`. A `.map(...)` may follow the dataset; nothing that shuffles,
            caches or reads ahead may.
            If you make lanes of your own: a bool array `[windows, lanes]`, True where a document
            begins, or any object with such an array as its attribute `starts`, which is read when
            an epoch begins. The callback then checks the number of windows and lanes. It cannot
            check that the batches come in this order.
        validation: The same for the `validation_data` of `fit`. Defaults to None: no validation.

    Raises:
        ValueError: When the callback is made, if an argument is invalid.
            When training or an evaluation begins, if it cannot be correct:
            `steps_per_execution > 1` (Keras then calls no callback between batches), a model
            without stateful layers or with another batch size, another number of batches,
            validation without `validation`, or the evaluation of targets per step on outputs with
            a mask.
            After a batch that did not come from `windows.dataset()` in order, for example because
            `fit` shuffles arrays or something behind the dataset reads ahead.
            After an evaluation of only some windows.

    Example:

    ```python
    model.fit(train.dataset(), epochs=3, callbacks=[keras_tbptt.ResetStates(train)])
    ```
    """

    def __init__(self, windows: Any, validation: Any = None):
        super().__init__()
        _read_starts(windows, "windows")
        if validation is not None:
            _read_starts(validation, "validation")
        self.windows = windows
        self.validation = validation
        self._training = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuses a training that cannot be correct."""
        self._training = False  # an error may have ended the training before
        self._begin(self.windows)
        self._training = True

    def on_train_end(self, logs: Any = None) -> None:
        """Ends training."""
        self._training = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Reads the boundaries of the epoch that begins."""
        self._follow(self.windows, self.params.get("steps"))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Resets the lanes that begin a document in this window."""
        self._reset(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Refuses a batch that is not the window of this place."""
        self._check_batch(batch)

    def on_test_begin(self, logs: Any = None) -> None:
        """Saves the state of training, and refuses outputs that Keras counts wrongly."""
        windows = self._begin_evaluation()
        outputs = getattr(self.model, "outputs", None) or []  # a subclassed model has none
        masked = any(getattr(output, "_keras_mask", None) is not None for output in outputs)
        if masked and getattr(windows, "per_step", False):
            raise ValueError(
                "Keras divides the loss of masked outputs by the unmasked steps of each batch, so "
                "the loss is not the mean over steps. Padding has weight 0 already: build "
                f"Embedding with mask_zero=False. Received: model {self.model.name!r}"
            )

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Resets the lanes that begin a document in this window."""
        self._reset(batch)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Refuses a batch that is not the window of this place."""
        self._check_batch(batch)

    def on_test_end(self, logs: Any = None) -> None:
        """Restores the state of training."""
        self._end_evaluation(stopped=self.model.stop_evaluating)

    def on_predict_begin(self, logs: Any = None) -> None:
        """Saves the state of training."""
        self._begin_evaluation()

    on_predict_batch_begin = on_test_batch_begin
    on_predict_batch_end = on_test_batch_end

    def on_predict_end(self, logs: Any = None) -> None:
        """Restores the state of training."""
        self._end_evaluation(stopped=self.model.stop_predicting)

    def _begin(self, windows: Any) -> None:
        model = self.model
        if isinstance(model, TBPTTModel):
            raise ValueError(
                "A TBPTTModel resets its own lanes: leave ResetStates out. "
                f"Received: model {model.name!r}"
            )
        if model.distribute_strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "ResetStates resets the lanes of one device: train a TBPTTModel, which runs on "
                f"several. Received: model {model.name!r} on "
                f"{model.distribute_strategy.num_replicas_in_sync} replicas"
            )
        if model.steps_per_execution != 1:
            raise ValueError(
                "ResetStates needs steps_per_execution=1, because Keras calls no callback between "
                "the steps of one execution; a TBPTTModel has no such limit. "
                f"Received: steps_per_execution={model.steps_per_execution}"
            )
        # Inside `fit`, `params` are those of training, also during validation.
        self._follow(windows, None if self._training else self.params.get("steps"))

    def _begin_evaluation(self) -> Any:
        windows = self.validation if self._training else self.windows
        if windows is None:
            raise ValueError(
                "Validation inside `fit` needs its own boundaries: "
                "ResetStates(train, validation=valid). Received: validation=None"
            )
        self._begin(windows)
        self._states = get_states(self.model)
        self._epoch = getattr(windows, "epoch", None)
        return windows

    def _end_evaluation(self, stopped: bool) -> None:
        set_states(self.model, self._states)
        windows = self._following
        if isinstance(windows, DocumentWindows):
            # An evaluation is no epoch of training, and may run in the middle of one.
            windows.epoch, windows._handed_out = self._epoch, self._handed_out
        if not stopped:
            self._check_steps(self._batches)

    def _follow(self, windows: Any, steps: int | None) -> None:
        """Takes the boundaries of the windows that come next."""
        self._following = windows
        self._starts = _read_starts(windows, "windows")
        self._handed_out = getattr(windows, "_handed_out", None)
        self._batches = 0
        rows, lanes = state_variables(self.model)[0].shape[0], self._starts.shape[1]
        if rows != lanes:
            raise ValueError(
                f"The model's batch size must be the windows' lanes, {lanes}. "
                f"Received: a model built for {rows} rows"
            )
        if steps is not None:
            self._check_steps(steps)

    def _check_steps(self, steps: int) -> None:
        if steps != len(self._starts):
            raise ValueError(
                f"An epoch must be all {len(self._starts)} windows, in order: leave out "
                "steps_per_epoch and validation_steps, and give Keras windows.dataset(). "
                f"Received: steps={steps}"
            )

    def _reset(self, batch: int) -> None:
        if batch >= len(self._starts):
            raise ValueError(
                f"There is no window {batch + 1}: an epoch must be all {len(self._starts)} "
                "windows, once. With `.repeat()`, give Keras steps_per_epoch=len(windows). "
                f"Received: more than {len(self._starts)} batches"
            )
        lanes = self._starts[batch]
        if lanes.any():
            self._reset_lanes(lanes)

    def _check_batch(self, batch: int) -> None:
        self._batches = batch + 1
        if not isinstance(self._following, DocumentWindows):
            return
        handed_out = self._following._handed_out - self._handed_out
        received = f"Received: {handed_out} windows of {self._following!r} for {batch + 1} batches"
        if handed_out < batch + 1:
            raise ValueError(
                "The batches do not come from the windows that ResetStates follows, so it cannot "
                "know where documents begin: give Keras windows.dataset() itself, not a copy, a "
                f"cache or shuffled arrays of it. {received}"
            )
        if handed_out > batch + 1:
            raise ValueError(
                "Something behind windows.dataset() reads ahead, so ResetStates cannot know the "
                "order: leave out shuffle, batch and prefetch (the dataset prefetches by itself); "
                f"`.map` is fine. {received}"
            )

    @functools.cached_property
    def _reset_lanes(self) -> Any:
        return tf.function(lambda lanes: reset_states(self.model, lanes), autograph=False)


def _read_starts(windows: Any, name: str) -> np.ndarray:
    """Where documents begin: bool `[windows, lanes]`."""
    starts = np.asarray(getattr(windows, "starts", windows))
    if starts.dtype != bool or starts.ndim != 2:
        raise ValueError(
            f"`{name}` must be keras_tbptt.DocumentWindows, or say where documents begin by a bool "
            "array [windows, lanes], itself or as its attribute `starts`. "
            f"Received: {type(windows).__name__}, dtype={starts.dtype}, shape={starts.shape}"
        )
    return starts
