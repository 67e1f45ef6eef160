"""Predictions of documents by a stateful model, apart from its training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _batches, _keras
from keras_tbptt._inputs import ModelInputs, check_order
from keras_tbptt._order import WindowOrder
from keras_tbptt._replicas import Replicas
from keras_tbptt._resizing import resized_copy
from keras_tbptt._saving import SavesStates
from keras_tbptt._steps import check_lanes, run_window
from keras_tbptt._tensors import has_time_axis, without_padding
from keras_tbptt.data._packing import Plan
from keras_tbptt.data._source import WindowSource
from keras_tbptt.data.stream import DocumentStream
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.state import (
    preserve_states,
    reset_states,
    seed_variables,
    state_variables,
)
from keras_tbptt.types import Documents

# Products of more lanes gain nothing on CPUs, and need more memory.
_WIDE = 256

# Fewer windows are run sooner than a model for other lanes is built and traced.
_WORTH_A_MODEL = 500


class PredictsDocuments(SavesStates):
    """A functional model with stateful layers that runs documents window by window.

    Args:
        *args: As in a functional `keras.Model`.
        **kwargs: As in a functional `keras.Model`.

    Attributes:
        lanes: int. Rows of a batch, on each replica of a `tf.distribute` strategy.
        window: int. Steps in a window.
        replicas: The replicas that the model runs on.
        window_order: The place in its document that each lane has come to in training.
        fitted_windows: The windows that `fit` is training on; None outside of `fit`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_order(self.output, "outputs")
        self.supports_masking = True
        form = ModelInputs(self)
        self.lanes, self.window = form.lanes, form.window
        state_variables(self)  # raises an error if there are none
        self.replicas = Replicas(_keras.take_strategy(self), self.lanes)
        self.replicas.with_seeds_of_their_own(seed_variables(self))
        self.window_order = WindowOrder(self.all_lanes)
        self.fitted_windows: WindowSource | None = None

    @property
    def all_lanes(self) -> int:
        """Rows of a batch: the lanes of all replicas."""
        return self.lanes * self.replicas.count

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predictions for every row of every window; see `predict_documents` for documents.

        The state of training is kept apart.

        Args:
            x: `DocumentWindows`, their `dataset(flags=True)`, or batches of your own (see `fit`).
            *args: As in `keras.Model.predict`.
            **kwargs: As in `keras.Model.predict`.

        Returns:
            Arrays `[windows * lanes, ...]`, or with a time axis `[windows * lanes, window, ...]`,
            zero at padding and in idle lanes.

        Raises:
            ValueError: If the windows do not fit the model.
            tf.errors.InvalidArgumentError: If the windows of a lane do not follow each other.
        """
        if isinstance(_batches.source_of(x), DocumentStream) and self.replicas.workers > 1:
            raise ValueError(
                "Each worker reads other documents of a stream, so none could return all "
                f"predictions: predict on one device. Received: {self.replicas.workers} workers"
            )
        dataset = _batches.as_dataset(x, self, needs_labels=False)
        with _batches.errors_of(x), _batches.to_the_end():
            with without_training(self, x), _single_steps(self):
                return super().predict(dataset, *args, **kwargs)

    def predict_documents(
        self,
        documents: DocumentWindows | Documents,
        offsets: Any = None,
        verbose: Any = 0,
        lengths: Any = None,
        *,
        static: Any = None,
        last_step: bool = False,
    ) -> Any:
        """One prediction per document, or one per step for outputs with a time axis.

        The prediction of a document depends on nothing but the document: not on the lanes, the
        window, or what else is predicted with it. Many documents are therefore run in more lanes
        than the model was built for, if all of its layers are those of Keras and of this library.

        Args:
            documents: `DocumentWindows` that fit the model, or documents in any form that
                `DocumentWindows` takes, without labels.
            offsets: As in `DocumentWindows`.
            verbose: As in `keras.Model.predict`.
            lengths: As in `DocumentWindows`.
            static: As in `DocumentWindows`.
            last_step: bool. Whether outputs with a time axis are returned at the last step of each
                document alone. Defaults to False.

        Returns:
            An array `[documents, ...]` in the order given, read at the last real step of each
            document. For an output with a time axis, a list of arrays `[T, ...]`: every real step
            of every document. For several outputs the structure of the model's outputs, of these.

        Raises:
            ValueError: If the documents do not fit the model.

        Example:

        ```python
        tags = tagger.predict_documents([[3, 1, 4], [1, 5]])  # arrays [3, tags] and [2, tags]
        ```
        """
        if isinstance(documents, DocumentStream):
            raise ValueError(
                "The predictions of a stream may not fit into memory: give a part of its documents "
                f"as DocumentWindows, or call predict on batches. Received: {documents!r}"
            )
        if isinstance(documents, DocumentWindows):
            if any(given is not None for given in (offsets, lengths, static)):
                raise ValueError(
                    "DocumentWindows have their own `offsets`, `lengths` and `static`: leave them "
                    f"out. Received: {documents!r} with one of them"
                )
        else:
            documents = DocumentWindows(
                documents,
                static=static,
                offsets=offsets,
                lengths=lengths,
                window=self.window,
                lanes=self.all_lanes,
            )
        model, lanes = self, self._lanes_for(documents)
        if lanes > self.lanes:
            with contextlib.suppress(ValueError):  # a layer may be made for one batch shape alone
                model, documents = self.resized(lanes=lanes), documents.with_lanes(lanes)
        plan = documents.plan
        rows = model.predict(documents, verbose=verbose)

        def in_order(rows: np.ndarray, output: keras.KerasTensor) -> Any:
            rows = rows.reshape(*plan.ends.shape, *rows.shape[1:])
            if not has_time_axis(output, self.window):
                ended = rows[plan.ends]
                result = np.empty_like(ended)
                result[plan.document[plan.ends]] = ended
                return result
            steps, offsets = _real_steps(rows, plan)
            return steps[offsets[1:] - 1] if last_step else np.split(steps, offsets[1:-1])

        return keras.tree.map_structure(in_order, rows, self.output)

    def _lanes_for(self, windows: DocumentWindows) -> int:
        """In how many lanes documents are predicted soonest, each on its own."""
        # A copy of any other class may lack what its configuration does not tell.
        known = all(
            type(layer).__module__.startswith("keras_tbptt.") or _keras.is_of_keras(layer)
            for layer in (self, *_keras.flatten_layers(self))
        )
        fits = (windows.lanes, windows.window) == (self.lanes, self.window)
        # Streams are cut, and stretches drawn, for the lanes that there are.
        bound = windows.streams or windows.stretch is not None
        one_graph = self.replicas.strategy is None and not self.run_eagerly
        if not (known and fits and one_graph) or bound or len(windows) < _WORTH_A_MODEL:
            return self.lanes
        # In more lanes, the longest document would be left to run alone.
        counts = -(-windows.lengths // self.window)
        return max(self.lanes, min(int(counts.sum() // counts.max()), _WIDE))

    def resized(self, lanes: int | None = None, window: int | None = None) -> PredictsDocuments:
        """The same model for another number of lanes or steps, with copies of the weights.

        A model is trained on many lanes. One long sequence, such as the test text of a language
        model, runs on one lane.

        Args:
            lanes: Optional int >= 1. Rows of a batch. Defaults to None: as this model.
            window: Optional int >= 1. Steps in a window. Defaults to None: as this model.

        Returns:
            A model of the same class, not compiled yet, in its initial state.

        Raises:
            ValueError: If a layer is made for this batch shape alone.

        Example:

        ```python
        one = model.resized(lanes=1)
        one.compile(loss=model.loss)
        test = DocumentWindows.next_step(ids, window=one.window, lanes=1)
        one.evaluate(test)
        ```
        """
        return resized_copy(self, lanes or self.lanes, window or self.window)

    def predict_step(self, data: Any) -> Any:
        """Predicts one window of every lane.

        Args:
            data: A batch of `DocumentWindows.dataset(flags=True)`.

        Returns:
            The model's outputs, `[lanes, ...]` or with a time axis `[lanes, window, ...]`, zero
            at padding.
        """
        x = check_lanes(self, data[0] if isinstance(data, tuple) else data)

        def predict(x: Mapping[str, tf.Tensor]) -> Any:
            reset_states(self, x["starts"])
            outputs = run_window(self, x, training=False)
            return without_padding(outputs, self.outputs, x["lengths"], self.window)

        return self.replicas.gathered(self.replicas.run(predict, x))


def _real_steps(rows: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The real steps of all documents, one after another, and the offsets of the documents.

    Args:
        rows: `[windows, lanes, window, ...]`.
        plan: Which steps these are.
    """
    totals = np.zeros(plan.document.max() + 1, "int64")
    totals[plan.document[plan.ends]] = plan.total[plan.ends]
    offsets = np.append(0, np.cumsum(totals))
    busy = plan.length > 0
    steps = np.arange(rows.shape[2])
    real = steps < plan.length[busy][:, None]  # [busy windows, window]
    begin = offsets[plan.document[busy]] + plan.offset[busy]
    flat = np.empty((offsets[-1], *rows.shape[3:]), rows.dtype)
    flat[(begin[:, None] + steps)[real]] = rows[busy][real]
    return flat, offsets


@contextlib.contextmanager
def without_training(model: PredictsDocuments, x: Any) -> Iterator[None]:
    """Leaves training where it is: states, the place of each lane, the place of windows.

    Args:
        model: The model that runs within the context.
        x: What it runs on.
    """
    sources = (_batches.source_of(x), model.fitted_windows)
    places = [(windows, windows.place) for windows in sources if windows is not None]
    try:
        with model.window_order.apart(), preserve_states(model):
            yield
    finally:
        for windows, place in places:
            windows.place = place


@contextlib.contextmanager
def _single_steps(model: keras.Model) -> Iterator[None]:
    """Keras's `predict` would build the model once for each of `steps_per_execution`."""
    steps, model.steps_per_execution = model.steps_per_execution, 1
    try:
        yield
    finally:
        model.steps_per_execution = steps
