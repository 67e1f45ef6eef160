"""Callbacks for stateful Keras models, this library's or anybody's."""

from __future__ import annotations

import functools
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt.model import TBPTTModel
from keras_tbptt.state import get_states, reset_states, set_states, state_variables
from keras_tbptt.windows import DocumentWindows


class ResetStates(keras.callbacks.Callback):
    """Resets each lane of a stock stateful model where the lane begins a document.

    Keras resets nothing between batches, epochs, or training and validation. With this callback
    each lane starts every document from the initial state, and validation has a state of its
    own: training goes on as though it had not happened.

    A `TBPTTModel` does all this by itself and needs no such callback.

    Args:
        windows: The `DocumentWindows` whose `dataset()` is given to `fit`, or to `evaluate` or
            `predict` outside of `fit`.
        validation: The `DocumentWindows` whose `dataset()` is the `validation_data` of `fit`.

    Raises:
        ValueError: When training begins, if it cannot be right: `steps_per_execution > 1`
            (Keras then calls no callback between batches), a model without stateful layers or
            with another batch size, another number of batches, or validation without
            `validation`; and after the first batch, if that did not come from
            `windows.dataset()` in its order (as when arrays are shuffled by `fit`).

    Example:

    ```python
    model.fit(train.dataset(), epochs=3, callbacks=[keras_tbptt.ResetStates(train)])
    ```
    """

    def __init__(self, windows: DocumentWindows, validation: DocumentWindows | None = None):
        super().__init__()
        for name, value in (("windows", windows), ("validation", validation)):
            if not isinstance(value, DocumentWindows) and (value is not None or name == "windows"):
                raise ValueError(
                    f"`{name}` must be keras_tbptt.DocumentWindows. Received: {name}={value!r}"
                )
        self.windows = windows
        self.validation = validation
        self._training = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Refuses what cannot be right."""
        self._training = False  # also after a training that an error ended
        self._check(self.windows)
        self._training = True

    def on_train_end(self, logs: Any = None) -> None:
        """Ends training."""
        self._training = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Takes the plan of the epoch that begins."""
        self._follow(self.windows)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Resets the lanes that begin a document in this window."""
        self._reset(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Refuses batches that are not the windows."""
        self._check_read(batch)

    def on_test_begin(self, logs: Any = None) -> None:
        """Sets the state of training aside, and refuses what Keras cannot count."""
        windows = self._begin_evaluation()
        outputs = getattr(self.model, "outputs", None) or []  # a subclassed model has none
        masked = any(getattr(output, "_keras_mask", None) is not None for output in outputs)
        if windows.per_step and masked:
            raise ValueError(
                "Keras divides the loss of masked outputs by the unmasked steps of each batch, so "
                "the loss is not the mean over steps. Padding has weight 0 already: build "
                f"Embedding with mask_zero=False. Received: model {self.model.name!r}"
            )

    def on_predict_begin(self, logs: Any = None) -> None:
        """Sets the state of training aside."""
        self._begin_evaluation()

    def _begin_evaluation(self) -> DocumentWindows:
        windows = self.validation if self._training else self.windows
        if windows is None:
            raise ValueError(
                "Validation inside `fit` needs its own boundaries: "
                "ResetStates(train, validation=valid). Received: validation=None"
            )
        self._check(windows)
        self._states, self._epoch = get_states(self.model), windows.epoch
        self._follow(windows)
        return windows

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Resets the lanes that begin a document in this window."""
        self._reset(batch)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Refuses batches that are not the windows."""
        self._check_read(batch)

    def on_test_end(self, logs: Any = None) -> None:
        """Gives training its state back."""
        set_states(self.model, self._states)
        self._following.epoch = self._epoch  # an evaluation is not an epoch of training

    on_predict_batch_begin = on_test_batch_begin
    on_predict_batch_end = on_test_batch_end
    on_predict_end = on_test_end

    def _check(self, windows: DocumentWindows) -> None:
        model = self.model
        if isinstance(model, TBPTTModel):
            raise ValueError(
                "A TBPTTModel resets its own lanes: leave ResetStates out. "
                f"Received: model {model.name!r}"
            )
        if model.steps_per_execution != 1:
            raise ValueError(
                "ResetStates needs steps_per_execution=1, because Keras calls no callback between "
                "the steps of one execution; a TBPTTModel has no such limit. "
                f"Received: steps_per_execution={model.steps_per_execution}"
            )
        lanes = state_variables(model)[0].shape[0]
        if lanes != windows.lanes:
            raise ValueError(
                f"The model's batch size must be the windows' lanes, {windows.lanes}. "
                f"Received: a model built for {lanes} rows"
            )
        steps = None if self._training else self.params.get("steps")
        if steps not in (None, len(windows)):
            raise ValueError(
                f"An epoch must be all {len(windows)} windows, in order: leave out "
                f"steps_per_epoch, and give Keras windows.dataset(). Received: steps={steps}"
            )

    def _follow(self, windows: DocumentWindows) -> None:
        self._following = windows
        self._starts = windows.starts
        self._handed_out = windows._handed_out

    def _reset(self, batch: int) -> None:
        lanes = self._starts[batch]
        if lanes.any():
            self._reset_lanes(lanes)

    def _check_read(self, batch: int) -> None:
        if batch == 0 and self._following._handed_out == self._handed_out:
            raise ValueError(
                "The batches do not come from the windows that ResetStates follows, so it cannot "
                "know where documents begin: give Keras windows.dataset() itself, not a copy, a "
                "cache or shuffled arrays of it. "
                f"Received: a first batch without a read of {self._following!r}"
            )

    @functools.cached_property
    def _reset_lanes(self) -> Any:
        return tf.function(lambda lanes: reset_states(self.model, lanes))
