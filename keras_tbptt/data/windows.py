"""DocumentWindows: documents as lanes of windows, in Keras batches."""

from __future__ import annotations

import copy
import functools
import operator
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tbptt._shares import evaluation_shares, multiplied, shares
from keras_tbptt.data._description import DescribesDocuments
from keras_tbptt.data._flat import FlatDocuments, NextStep
from keras_tbptt.data._packing import PACKINGS, Plan
from keras_tbptt.data._pipeline import WindowPipeline, at_least
from keras_tbptt.losses import WindowLoss, check_window_loss
from keras_tbptt.types import Documents, Labels


class DocumentWindows(DescribesDocuments):
    """Documents of any length as batches of fixed-shape windows.

    Each document is split into windows of `window` consecutive steps. The last window is
    right-padded with zeros. A batch has `lanes` rows: a lane processes one document after another.
    Every step of every document appears exactly once in an epoch, in order, in one lane.
    (`mean_window` makes the lengths of windows random; `stretch` takes a part of a long document.)

    - `packing="packed"`: each lane runs on independently. When a document ends, the lane's next
      window begins the next document. Few lanes are ever idle.
    - `packing="aligned"`: `lanes` documents of similar window counts begin together. With
      `window_loss="final_only"` their last windows then coincide, and the windows before need no
      backward pass.

    With `shuffle=True` the documents take a new order in every epoch; windows are never shuffled.
    The order is a function of `(seed, epoch)` alone, the same on every machine. The number of
    windows is the same in every epoch. `epoch` is the index of the coming epoch. It rises by one
    when a dataset hands out the last window of an epoch, and you may set it.

    Args:
        documents: A list of arrays, each integer ids `[T]` or floats `[T, F]`; or a
            `tf.RaggedTensor`; or a finite `tf.data.Dataset` of `document` or
            `(document, label)`, all of which is read into memory (`DocumentStream` does not); or,
            with `offsets`, one flat array `[sum of T]` or
            `[sum of T, F]`, which may be a `numpy.memmap`; or, with `lengths`, a padded array. Id 0
            is padding to `Embedding(mask_zero=True)`. For a model with several inputs per step, a
            dict of input names to any of these; documents have the same lengths in all of them.
        labels: One label per document: an array `[documents, ...]` (binary, class index, vector
            or regression). With `per_step=True` one target array `[T, ...]` per document, in the
            form of `documents`. For a model with several outputs, a dict of these, or for a list of
            outputs a tuple or a list of these (a list with as many entries as there are documents
            is one label per document). A float target that is NaN is not known: it counts nowhere.
            Defaults to None: the windows are for prediction.
        window: int >= 1. Steps in a window (K).
        lanes: int >= 1. Rows in a batch. If there are more lanes than documents, some are idle.
        packing: `"packed"` or `"aligned"`. Defaults to `"packed"`.
        shuffle: bool. Whether the documents take a new order in every epoch. Defaults to False.
        seed: int >= 0. Defaults to None: it is drawn from Python's `random`, which
            `keras.utils.set_random_seed` seeds. `ExactBackup` replaces a drawn seed with the seed
            of the checkpoint when it resumes.
        weights: Optional floats `[documents]` >= 0. How much each document counts. With
            `per_step=True` they may also be one per step, in the form of `documents`: a step of
            weight 0, or False in a mask, counts nowhere. For several outputs that count in
            different places, a dict or a tuple of these like `labels`. Defaults to 1.
        static: Optional dict of input names to arrays `[documents, ...]`, integers or floats: what
            belongs to a whole document, such as a user's id. Its row goes with each window of the
            document. The documents then need names too: `{"tokens": documents}`.
        offsets: Optional ints `[documents + 1]`: document i is
            `documents[offsets[i]:offsets[i + 1]]`.
        lengths: Optional ints `[documents]` from 1 to `longest`: `documents`, and targets per step,
            are arrays `[documents, longest, ...]`, padded at the end, and document i is
            `documents[i, :lengths[i]]`. An array that begins or ends a document with a zero step is
            refused without `lengths`, because that step may be padding.
        per_step: bool. Whether `labels` holds a target per step. For several outputs of which only
            some have one, a dict or a tuple of bools like `labels`. Defaults to False.
        lead_in: Optional int >= 0, or ints `[documents]`: the first steps of each document, which
            only give the state a start and count nowhere. A validation series that follows the
            training series in time is both, one after the other, with the training part as its
            lead-in. Needs a target per step. Defaults to None: every step counts.
        streams: bool. Whether all documents are run together, as one long sequence, and cut into
            `lanes` contiguous streams of equal length, up to one step. Each stream is then a
            document. Within a stream the state is carried from one document to the next. Every
            lane is busy, however few documents there are, and no step is dropped. This needs a
            target per step. Defaults to False.
        mean_window: Optional int >= 2. Windows then have random lengths around it, drawn anew in
            every epoch from `(seed, epoch)`. `window`, at least 1.25 times as long, is the longest
            length. Most windows are about `mean_window` long; one in twenty is about half as long
            (Merity et al. 2018, "Regularizing and optimizing LSTM language models", section 4.1). A
            window counts by its steps (`keras_tbptt.losses.window_weights`), which is the paper's
            learning rate in proportion to length. Every document keeps its number of windows.
        stretch: Optional int >= 1. In an epoch, a document longer than this many windows
            contributes only a random stretch of this length, which starts from the initial state.
            Its beginning is drawn from `(seed, epoch)`. With `mean_window` the stretch has
            `stretch * mean_window` steps. `TBPTTModel(burn_in=...)` gives the state a start; it
            counts `window` steps each. `evaluate` and `predict_documents` use the stretches of the
            coming epoch, too: for whole documents give them windows without `stretch`.

    Raises:
        ValueError: If there are no documents, a document is empty, lengths disagree, an array may
            be padded, a float is not finite, an id is negative, an integer does not fit int32,
            an argument is out of its range, or `streams` comes with labels or weights of documents.

    Example:

    ```python
    windows = keras_tbptt.DocumentWindows([[3, 1, 4], [1, 5]], [0, 1], window=2, lanes=2)
    len(windows)        # 2 windows in an epoch
    windows.starts      # [[True, True], [False, False]]
    windows.ends        # [[False, True], [True, False]]
    windows.batch_shape # (2, 2)
    tokens = keras.Input(batch_shape=windows.batch_shape, dtype="int32")
    ```
    """

    def __init__(
        self,
        documents: Documents,
        labels: Labels | None = None,
        *,
        window: int,
        lanes: int,
        packing: str = "packed",
        shuffle: bool = False,
        seed: int | None = None,
        weights: Any = None,
        static: Any = None,
        offsets: Any = None,
        lengths: Any = None,
        per_step: Any = False,
        lead_in: Any = None,
        streams: bool = False,
        mean_window: int | None = None,
        stretch: int | None = None,
    ):
        self.window = at_least("window", window, 1)
        self.lanes = at_least("lanes", lanes, 1)
        _check_plan(packing, window, mean_window, stretch)
        self.packing = packing
        self.shuffle = bool(shuffle)
        self.seed = random.randint(0, 2**31 - 1) if seed is None else at_least("seed", seed, 0)
        self._seed_drawn = seed is None
        self.mean_window, self.stretch = mean_window, stretch
        self.epoch = 0
        self._handed_out = 0  # windows of `dataset()`, over all epochs; with flags the last alone

        self._flat = FlatDocuments(
            documents,
            labels,
            weights,
            static=static,
            offsets=offsets,
            lengths=lengths,
            per_step=per_step,
            lead_in=lead_in,
            streams=self.lanes if streams else None,
        )
        self.streams = bool(streams)
        self._lay_out()

    def _lay_out(self) -> None:
        self._layout = PACKINGS[self.packing](
            self._flat.lengths, self.window, self.lanes, self.mean_window, self.stretch
        )

    @classmethod
    def next_step(
        cls,
        sequences: Documents,
        *,
        window: int,
        lanes: int,
        streams: bool | None = None,
        target: str | None = None,
        offsets: Any = None,
        **kwargs: Any,
    ) -> DocumentWindows:
        """Windows whose target at each step is the step after it, for language models and series.

        The targets are the documents themselves, one step on, so nothing is stored twice. A
        document of T steps gives T - 1 inputs, each with a target: its last step is a target only.

        Args:
            sequences: Documents, in any form that `DocumentWindows` takes; or one array `[T]` of
                ids, which may be a `numpy.memmap`; or a dict of arrays `[T, ...]`, one of which at
                least is `[T]`.
            window: int >= 1. Steps in a window (K).
            lanes: int >= 1. Rows in a batch.
            streams: Optional bool. Whether the sequences are run together, in order, and cut into
                `lanes` contiguous streams, as in the recipes for Penn Treebank (Zaremba et al.
                2014, "Recurrent neural network regularization", section 4.1). Streams have equal
                lengths, up to one step, and carry the state from one sequence to the next. The last
                target of a stream is the first input of the next stream, so each step but the first
                of all is predicted exactly once. Defaults to None: True for one array `[T]`, or a
                dict of such, else False.
            target: Optional str. With several inputs, the one whose next step is the target.
            offsets: As in `DocumentWindows`.
            **kwargs: Further arguments of `DocumentWindows`, except `labels` and `per_step`.

        Returns:
            `DocumentWindows` with a target per step: int32 `[lanes, window]`, or float32
            `[lanes, window, F]`.

        Raises:
            ValueError: As for `DocumentWindows`, or if a document has only one step.

        Example:

        ```python
        train = keras_tbptt.DocumentWindows.next_step(ids, window=20, lanes=20)
        x, y, weight = next(iter(train.dataset()))  # y[:, :-1] equals x[:, 1:]
        ```
        """
        steps = _steps_of_one_sequence(sequences)
        if steps is not None and offsets is None:
            offsets = [0, steps]
            streams = True if streams is None else streams
        return cls(
            sequences,
            NextStep(target),
            window=window,
            lanes=lanes,
            streams=bool(streams),
            offsets=offsets,
            per_step=True,
            **kwargs,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the cache of plans, which cannot be pickled."""
        return {name: value for name, value in vars(self).items() if name != "_plans"}

    def __repr__(self) -> str:
        """The class and its sizes."""
        return (
            f"<DocumentWindows documents={self.num_documents} steps={self.num_steps} "
            f"window={self.window} lanes={self.lanes} packing={self.packing} windows={len(self)}>"
        )

    @property
    def known(self) -> Any:
        """int64 `[windows, lanes]`: how many targets count in each window of the coming epoch.

        The label of a document is a target of each of its windows. Where outputs count in different
        places, the numbers are in the structure of the labels.
        """
        return self._flat.counts(self.plan, self.window)

    @property
    def plan(self) -> Plan:
        """What each lane processes in the coming epoch."""
        return self._plan_of(self.epoch)

    @property
    def starts(self) -> np.ndarray:
        """bool `[steps, lanes]`: where documents begin in the coming epoch."""
        return self.plan.starts

    @property
    def ends(self) -> np.ndarray:
        """bool `[steps, lanes]`: where documents end in the coming epoch."""
        return self.plan.ends

    def dataset(
        self,
        flags: bool = False,
        window_loss: WindowLoss = "per_window",
        *,
        evaluation: bool = False,
    ) -> tf.data.Dataset:
        """The windows of an epoch as Keras batches; iterating again gives the next epoch.

        Args:
            flags: bool. Whether `x` carries what a `TBPTTModel` needs beside its inputs. Defaults
                to False.
            window_loss: str. Which windows count (see `keras_tbptt.losses`) when a stock model
                trains. A `TBPTTModel` has a window loss of its own, so `flags=True` ignores this
                one. Defaults to `"per_window"`.
            evaluation: bool. Whether the batches are for evaluating a stock model. Each document
                then counts once, at its last window, and with `per_step=True` each real step
                counts once. The weights are scaled so that the loss that Keras reports, a mean over
                the rows of all batches, is the mean over documents (steps). `weighted_metrics`
                are means over documents, too; `metrics` ignore the weights, so they count every
                row. Targets per step need outputs without a mask. Defaults to False.

        Returns:
            A `tf.data.Dataset` of `(x, y, sample_weight)`, or without labels of `(x,)`, with the
            known cardinality `len(self)`. It prefetches by itself.
            `x` is int32 ids `[lanes, window]` or floats `[lanes, window, F]`. With `flags=True` it
            is a dict of these as `"inputs"` and, each `[lanes]`: `"starts"` and `"ends"` (bool),
            `"lengths"` (int32, real steps of the window), `"positions"` (int32, steps of the
            document before it) and `"totals"` (int32, steps of the document). With `stretch` they
            refer to the stretch. With named inputs the ids or floats are a dict by name, and static
            inputs are `[lanes, ...]`.
            `y` is `[lanes, ...]`, or `[lanes, window, ...]` with `per_step=True`; for several
            outputs a dict or a tuple of these, as `labels` was.
            Where `has_unknown`, `x` has `"known"` too, bool in the shape of `sample_weight`, and a
            target that is not known is 0.
            `sample_weight` is float32 `[lanes]`, or `[lanes, window]` with `per_step=True`. It is
            zero for idle lanes, padding and targets that are not known. Where outputs count in
            different places, weights and `"known"` are in the structure of `y`.

        Raises:
            ValueError: If `window_loss` is unknown, or `evaluation=True` comes without labels,
                with `flags=True` or with a `window_loss`.
        """
        check_window_loss(window_loss)
        scale = _evaluation_scale(self, flags, window_loss) if evaluation else None
        batch = self._flat.batch(self.plan, 0, self.window)
        spec = tf.nest.map_structure(lambda array: tf.TensorSpec(array.shape, array.dtype), batch)
        weigh = None
        if not flags:
            weigh = functools.partial(_stock_batch, window_loss, self.window, scale)
        return WindowPipeline(self, spec, weigh).dataset()

    def with_lanes(self, lanes: int) -> DocumentWindows:
        """The same documents for another number of lanes, which share the memory of these.

        Args:
            lanes: int >= 1. Rows of a batch.

        Returns:
            `DocumentWindows` at the beginning of the coming epoch.

        Raises:
            ValueError: If the documents are streams, which were cut for the lanes that there are.

        Example:

        ```python
        wide = model.resized(lanes=256)
        wide.compile(loss=model.loss)
        wide.evaluate(test.with_lanes(256))
        ```
        """
        if self.streams:
            raise ValueError(
                "Streams are cut for their number of lanes: make the windows anew, with other "
                f"lanes. Received: {self!r}"
            )
        other = copy.copy(self)
        vars(other).pop("_plans", None)
        other.lanes = at_least("lanes", lanes, 1)
        other.place = other.begin()
        other._lay_out()
        return other

    def whole(self, documents: Any) -> tuple:
        """Whole documents side by side, aligned at their ends.

        Args:
            documents: ints `[rows]`. Which documents.

        Returns:
            `(inputs, real, y, weights)`.
            `inputs` is int32 ids `[rows, longest]` or floats `[rows, longest, F]`. A shorter
            document repeats its first step in front. With named inputs it is a dict by name, and
            static inputs are `[rows, ...]`.
            `real` is bool `[rows, longest]`, False for the repeated steps.
            `y` is the labels `[rows, ...]`, with `per_step=True` those of the last steps, or None.
            `weights` is float32 `[rows]`.
        """
        return self._flat.whole(documents)

    @functools.cached_property
    def _plans(self) -> Callable[[tuple[int, int], bool], Plan]:
        return functools.lru_cache(maxsize=2)(self._layout.plan)

    def _plan_of(self, epoch: int) -> Plan:
        return self._plans((self.seed, epoch if self.draws else 0), self.shuffle)

    def _read(self, epoch: np.int64, step: np.int64) -> list[np.ndarray]:
        return tf.nest.flatten(self._flat.batch(self._plan_of(int(epoch)), int(step), self.window))

    def _hand_out(self, epoch: np.int64, step: np.int64) -> np.int64:
        self._handed_out += 1
        if step == len(self) - 1:
            self.epoch = int(epoch) + 1
        return step


def _steps_of_one_sequence(sequences: Any) -> int | None:
    """The length of one long sequence, or None if there are documents."""
    named = isinstance(sequences, Mapping)
    arrays = list(sequences.values()) if named else [sequences]
    if not all(isinstance(array, (np.ndarray, tf.Tensor)) for array in arrays):
        return None
    flat = [len(array) for array in arrays if len(array.shape) == 1 and array.dtype != object]
    return flat[0] if flat else None


def _check_plan(packing: str, window: int, mean_window: int | None, stretch: int | None) -> None:
    if packing not in PACKINGS:
        raise ValueError(
            f"`packing` must be one of {tuple(PACKINGS)}. Received: packing={packing!r}"
        )
    if mean_window is not None and 1.25 * at_least("mean_window", mean_window, 2) > window:
        raise ValueError(
            "`window` is the longest that a window can be, and must leave room for lengths "
            "around `mean_window`: at least 1.25 times as much. "
            f"Received: window={window}, mean_window={mean_window}"
        )
    if stretch is not None:
        at_least("stretch", stretch, 1)


def _evaluation_scale(windows: DocumentWindows, flags: bool, window_loss: str) -> Any:
    """The rows that Keras divides a loss by, as a share of what an evaluation counts, by output."""
    if flags:
        raise ValueError(
            "`evaluation=True` is for stock Keras models. A TBPTTModel counts documents by "
            "itself: leave out `evaluation`. Received: flags=True, evaluation=True"
        )
    if window_loss != "per_window":
        raise ValueError(
            "`evaluation=True` counts each document at its last window: leave out "
            f"`window_loss`. Received: window_loss={window_loss!r}, evaluation=True"
        )
    if not windows.has_labels:
        raise ValueError(
            "An evaluation needs labels: DocumentWindows(documents, labels, ...). "
            f"Received: {windows!r} without labels"
        )

    def scale(known: np.ndarray, per_step: bool) -> float:
        rows = len(windows) * windows.lanes * (windows.window if per_step else 1)
        return rows / (known if per_step else known[windows.ends]).sum()

    known = windows.known
    if not tf.nest.is_nested(known):
        return scale(known, windows.per_step is True)
    per_step = windows.per_step
    if not tf.nest.is_nested(per_step):
        per_step = tf.nest.map_structure(lambda _: per_step, known)
    return tf.nest.map_structure(scale, known, per_step)


def _stock_batch(
    window_loss: WindowLoss, window: int, scale: Any, x: Mapping[str, Any], *targets: Any
) -> tuple:
    """A batch for a model that knows nothing of windows: the weights say which count."""
    if not targets:
        return (x["inputs"],)
    y, sample_weight = targets
    if scale is None:
        weights = shares(window_loss, x, window, sample_weight)
        return x["inputs"], y, multiplied(sample_weight, weights)
    weights = evaluation_shares(x, window, sample_weight)
    weights = tf.nest.map_structure(operator.mul, weights, scale)
    return x["inputs"], y, multiplied(sample_weight, weights)
