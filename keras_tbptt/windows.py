"""Documents -> lanes of windows, as Keras batches."""

from __future__ import annotations

import functools
import random
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tbptt import documents as forms
from keras_tbptt.losses import check_window_loss, window_weights
from keras_tbptt.packing import IDLE, PACKINGS, Plan


class DocumentWindows:
    """Documents of any length as batches of fixed-shape windows, for truncated backpropagation.

    Each document is split into windows of `window` consecutive steps, the last one right-padded
    with zeros, and the batch has `lanes` rows: a lane reads one document after another. Every
    step of every document appears exactly once an epoch, in order, in one lane. (Windows of random
    lengths, and reading only a stretch of a long document, are `mean_window` and `stretch`.)

    - `packing="packed"`: lanes run on independently; where a document ends, the lane's next
      window begins the next document. Hardly a lane is ever idle.
    - `packing="aligned"`: `lanes` documents of similar window counts begin together. With
      `window_loss="final_only"` a whole batch then learns at once, and the windows before need no
      backward pass.

    With `shuffle=True` the documents, never the windows, take a new order every epoch. The order
    is a function of `(seed, epoch)` alone, the same on every machine; the number of windows is the
    same in every epoch. `epoch` is the index of the coming epoch: it rises by one when the last
    window of an epoch has been read, and may be set. `reads` counts the windows read so far.

    Args:
        documents: A list of arrays, each integer ids `[T]` or floats `[T, F]`; or a
            `tf.RaggedTensor`; or a finite `tf.data.Dataset` of `document` or
            `(document, label)`; or, with `offsets`, one flat array `[sum of T]` or
            `[sum of T, F]`, which may be a `numpy.memmap`. Id 0 is padding to
            `Embedding(mask_zero=True)`.
        labels: One label per document: an array `[documents, ...]` (binary, class id, vector
            or regression), or a dict of those for a model with a dict of outputs. With
            `per_step=True` one target array `[T, ...]` per document, in the form that
            `documents` has. None where nothing is to be learnt.
        window: int >= 1, steps in a window (K).
        lanes: int >= 1, rows in a batch. More lanes than documents leaves lanes idle.
        packing: `"packed"` or `"aligned"`.
        shuffle: bool, whether the documents take a new order every epoch.
        seed: int >= 0, or None to draw one from Python's `random` (which
            `keras.utils.set_random_seed` seeds). `ExactBackup` replaces a drawn seed with the seed
            of the checkpoint when it resumes.
        weights: Optional floats `[documents]` >= 0: how much each document counts.
        offsets: Optional ints `[documents + 1]`: document i is
            `documents[offsets[i]:offsets[i + 1]]`.
        per_step: bool, whether `labels` holds a target per step.
        mean_window: Optional int >= 2: windows have random lengths around it, drawn anew every
            epoch from `(seed, epoch)`, and `window`, at least 1.25 times as long, is the longest
            that one can be. Most are about as long, one in twenty is about half as long (Merity et
            al. 2018, "Regularizing and optimizing LSTM language models", section 4.1). A window
            counts by its steps (`keras_tbptt.losses.window_weights`), which is the paper's learning
            rate in proportion to length. Every document keeps its number of windows.
        stretch: Optional int >= 1: of a document longer than so many windows, only a random
            stretch of that length is read in an epoch, from the initial state on; where it
            begins is drawn from `(seed, epoch)`. With `mean_window` the stretch has
            `stretch * mean_window` steps. `TBPTTModel(burn_in=...)` gives its state a start, and
            counts `window` steps each. `evaluate` and `predict_documents` read the coming epoch's
            stretches, too: give them windows without `stretch` for whole documents.

    Raises:
        ValueError: If there are no documents, a document is empty, lengths disagree, a float
            is not finite, an id is negative, or an argument is out of its range.

    Example:

    ```python
    windows = keras_tbptt.DocumentWindows([[3, 1, 4], [1, 5]], [0, 1], window=2, lanes=2)
    len(windows)        # 2 windows in an epoch
    windows.starts      # [[True, True], [False, False]]
    windows.ends        # [[False, True], [True, False]]
    ```
    """

    def __init__(
        self,
        documents: Any,
        labels: Any = None,
        *,
        window: int,
        lanes: int,
        packing: str = "packed",
        shuffle: bool = False,
        seed: int | None = None,
        weights: Any = None,
        offsets: Any = None,
        per_step: bool = False,
        mean_window: int | None = None,
        stretch: int | None = None,
    ):
        self.window = _at_least("window", window, 1)
        self.lanes = _at_least("lanes", lanes, 1)
        if packing not in PACKINGS:
            raise ValueError(
                f"`packing` must be one of {tuple(PACKINGS)}. Received: packing={packing!r}"
            )
        self.packing = packing
        self.shuffle = bool(shuffle)
        self.seed = random.randint(0, 2**31 - 1) if seed is None else _at_least("seed", seed, 0)
        self._seed_drawn = seed is None
        self.per_step = bool(per_step)
        self.mean_window, self.stretch = mean_window, stretch
        if mean_window is not None and 1.25 * _at_least("mean_window", mean_window, 2) > window:
            raise ValueError(
                "`window` is the longest that a window can be, and must leave room for lengths "
                "around `mean_window`: at least 1.25 times as much. "
                f"Received: window={window}, mean_window={mean_window}"
            )
        if stretch is not None:
            _at_least("stretch", stretch, 1)
        self.epoch = 0
        self.reads = 0

        if isinstance(documents, tf.data.Dataset):
            documents, labels = forms.read_dataset(documents, labels)
        self._values, self._offsets = forms.flatten(documents, offsets)
        forms.check_values(self._values)
        self._filler = forms.first_nonzero(self._values, self._offsets[0])
        lengths = np.diff(self._offsets)
        take = functools.partial(_targets if per_step else _labels, lengths, offsets)
        if isinstance(labels, Mapping):
            self._targets = {
                name: take(value, f"labels[{name!r}]") for name, value in labels.items()
            }
        else:
            self._targets = None if labels is None else take(labels, "labels")
        self._weights = _weights(weights, len(lengths))
        self._layout = PACKINGS[packing](lengths, self.window, self.lanes, mean_window, stretch)
        self._plan = functools.lru_cache(maxsize=2)(self._layout.plan)

    def __len__(self) -> int:
        """Windows (batches) in an epoch."""
        return self._layout.steps

    def __repr__(self) -> str:
        """Sizes at a glance."""
        return (
            f"<DocumentWindows documents={self.num_documents} steps={self.num_steps} "
            f"window={self.window} lanes={self.lanes} packing={self.packing} windows={len(self)}>"
        )

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self._offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 `[documents]`: the steps of each document."""
        return np.diff(self._offsets)

    @property
    def num_steps(self) -> int:
        """How many real steps (tokens) are read in an epoch."""
        return int(self._layout.lengths.sum())

    @property
    def packing_efficiency(self) -> float:
        """Real steps over all steps of an epoch's windows, in (0, 1]."""
        return self.num_steps / (len(self) * self.lanes * self.window)

    @property
    def has_labels(self) -> bool:
        """Whether there is anything to learn from."""
        return self._targets is not None

    @property
    def has_padding(self) -> bool:
        """Whether any document's last window is padded."""
        return self.mean_window is not None or bool((self._layout.lengths % self.window).any())

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of one step: `()` for ids, `(F,)` for features."""
        return tuple(self._values.shape[1:])

    @functools.cached_property
    def max_id(self) -> int | None:
        """The largest id, or None where the documents are floats."""
        if self._values.dtype.kind == "f":
            return None
        return max(int(part.max()) for _, part in forms.chunks(self._values))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of documents, labels and weights, in hexadecimal."""
        targets = [t for t in tf.nest.flatten(self._targets) if t is not None]
        return forms.fingerprint([self._values, self._offsets, self._weights, *targets])

    @property
    def plan(self) -> Plan:
        """What each lane reads in the coming epoch."""
        return self._plan_of(self.epoch)

    @property
    def starts(self) -> np.ndarray:
        """bool `[steps, lanes]`: where documents begin in the coming epoch."""
        return self.plan.starts

    @property
    def ends(self) -> np.ndarray:
        """bool `[steps, lanes]`: where documents end in the coming epoch."""
        return self.plan.ends

    def dataset(self, flags: bool = False, window_loss: str = "per_window") -> tf.data.Dataset:
        """The windows of an epoch as Keras batches; iterating again gives the next epoch.

        Args:
            flags: Whether `x` carries what a `TBPTTModel` needs beside its inputs.
            window_loss: Which windows count (see `keras_tbptt.losses`), for a model that knows
                nothing of windows. With `flags=True` the model applies its own instead.

        Returns:
            A `tf.data.Dataset` of known cardinality, `len(self)`, of `(x, y, sample_weight)`, or
            of `(x,)` without labels. `x` is `[lanes, window]` int32 ids or
            `[lanes, window, F]` floats; with `flags=True` a dict of it as `"inputs"` and, each
            `[lanes]`, `"starts"` and `"ends"` (bool), `"lengths"` (int32, real steps of the
            window), `"offsets"` (int32, steps of the document before it) and `"totals"` (int32,
            steps of the document); with `stretch` these speak of the stretch. `y` is
            `[lanes, ...]`, or `[lanes, window, ...]` with `per_step=True`. `sample_weight` is
            float32 `[lanes]`, or `[lanes, window]` with `per_step=True`; zero where a lane is idle
            or a step is padding.
        """
        check_window_loss(window_loss)
        structure = self._batch(self.plan, 0)
        flat = tf.nest.flatten(structure)
        # TensorFlow keeps every function that a graph calls, and all it refers to, for ever.
        this, count = weakref.ref(self), len(self)

        def read(epoch, step):
            read_now = lambda *place: this()._read(*place)  # noqa: E731
            tensors = tf.numpy_function(read_now, [epoch, step], [a.dtype for a in flat])
            tensors = [tf.ensure_shape(t, a.shape) for t, a in zip(tensors, flat, strict=True)]
            return tf.nest.pack_sequence_as(structure, tensors)

        def strip(x, y=None, sample_weight=None):
            if y is None:
                return (x["inputs"],)
            weights = window_weights(window_loss, x, self.window, self.per_step)
            return x["inputs"], y, sample_weight * weights

        def coming_epoch(_):
            epoch = tf.numpy_function(lambda: np.int64(this().epoch), [], tf.int64)
            return tf.data.Dataset.range(count).map(functools.partial(read, epoch))

        windows = tf.data.Dataset.range(1).flat_map(coming_epoch)
        if not flags:
            windows = windows.map(strip)
        windows = windows.apply(tf.data.experimental.assert_cardinality(count))
        # With autotuning, letting go of an iterator waits until the tuner's sleep ends: 5, 10, 20,
        # 41 s after it began.
        options = tf.data.Options()
        options.autotune.enabled = False
        windows = windows.prefetch(8).with_options(options)
        windows.shuffle = _refuse_shuffle
        windows.source = self
        return windows

    def whole(self, documents: Any) -> tuple:
        """Documents unsplit and side by side, so that they end together.

        Args:
            documents: ints `[rows]`: which documents.

        Returns:
            `(steps, real, y, weights)`. `steps` is `[rows, longest]` int32 ids or
            `[rows, longest, F]` floats, in which a shorter document repeats its first step in
            front; `real` is bool `[rows, longest]`, False there; `y` holds the labels
            `[rows, ...]`, with `per_step=True` those of the last steps, or is None; `weights` is
            float32 `[rows]`.
        """
        documents = np.asarray(documents)
        begin, end = self._offsets[documents, None], self._offsets[documents + 1, None]
        position = end + np.arange(-(end - begin).max(), 0)
        real = position >= begin
        steps = _padded(self._values, np.maximum(position, begin), np.ones_like(real))
        labelled = end[:, 0] - 1 - self._offsets[0] if self.per_step else documents
        y = tf.nest.map_structure(lambda t: None if t is None else t[labelled], self._targets)
        return steps, real, y, self._weights[documents]

    def _plan_of(self, epoch: int) -> Plan:
        drawn = self.shuffle or self.mean_window is not None or self.stretch is not None
        return self._plan((self.seed, epoch if drawn else 0), self.shuffle)

    def _read(self, epoch: np.int64, step: np.int64) -> list[np.ndarray]:
        plan = self._plan_of(int(epoch))
        self.reads += 1
        if step == len(self) - 1:
            self.epoch = int(epoch) + 1
        return tf.nest.flatten(self._batch(plan, int(step)))

    def _batch(self, plan: Plan, step: int) -> tuple:
        document, length = plan.document[step], plan.length[step]
        busy = document != IDLE
        first = self._offsets[document] + plan.begin[step]
        # An idle lane repeats a real step that is no padding: cuDNN refuses fully masked rows.
        begin = np.where(busy, first + plan.offset[step], self._filler)
        real = np.arange(self.window) < np.maximum(length, 1)[:, None]  # [lanes, window]
        position = np.where(real, begin[:, None] + np.arange(self.window), self._filler)
        x = {
            "inputs": _padded(self._values, position, real),
            "starts": plan.starts[step],
            "ends": plan.ends[step],
            "lengths": length.astype("int32"),
            "offsets": plan.offset[step].astype("int32"),
            "totals": plan.total[step].astype("int32"),
        }
        if self._targets is None:
            return (x,)
        weight = np.where(busy, self._weights[document], 0).astype("float32")
        if self.per_step:
            weight = weight[:, None] * real
            position = position - self._offsets[0]
            y = tf.nest.map_structure(lambda t: _padded(t, position, real), self._targets)
        else:
            y = tf.nest.map_structure(lambda t: t[document], self._targets)
        return x, y, weight.astype("float32")


def _refuse_shuffle(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "Windows must not be shuffled: a lane reads its documents in order. Shuffle documents "
        "instead, with DocumentWindows(..., shuffle=True). Received: dataset().shuffle(...)"
    )


def _padded(values: np.ndarray, position: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Gathers `[lanes, window, ...]` from `values`, zero where a step is not real."""
    rows = np.asarray(values[position])
    rows = rows.astype("float32" if rows.dtype.kind == "f" else "int32", copy=False)
    rows[~real] = 0
    return rows


def _labels(lengths: np.ndarray, _: Any, labels: Any, name: str) -> np.ndarray:
    """One label per document, `[documents, ...]`."""
    labels = np.asarray(labels)
    if labels.ndim == 0 or len(labels) != len(lengths):
        raise ValueError(
            f"`{name}` must have one label per document ({len(lengths)} documents). "
            f"Received: labels of shape {labels.shape}"
        )
    return _finite(labels, name)


def _targets(lengths: np.ndarray, offsets: Any, targets: Any, name: str) -> np.ndarray:
    """One target per step, flat: `[sum of T, ...]`."""
    values, offsets = forms.flatten(targets, offsets, name)
    if not np.array_equal(np.diff(offsets), lengths):
        raise ValueError(
            f"`{name}` must have one target per step of each document ({len(lengths)} documents, "
            f"{lengths.sum()} steps). Received: {len(offsets) - 1} rows, "
            f"{np.diff(offsets).sum()} steps"
        )
    return _finite(values[offsets[0] : offsets[-1]], name)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise ValueError(
            f"`{name}` must be finite numbers. Received: dtype={values.dtype}, with "
            f"{'values that are not finite' if values.dtype.kind == 'f' else 'no numbers'}"
        )
    return values.astype("float32") if values.dtype.kind == "f" else values.astype("int32")


def _weights(weights: Any, documents: int) -> np.ndarray:
    if weights is None:
        return np.ones(documents, "float32")
    weights = np.asarray(weights, "float32")
    if weights.shape != (documents,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(
            f"`weights` must be one finite number >= 0 per document ({documents} documents). "
            f"Received: weights of shape {weights.shape}, min={weights.min(initial=0)}"
        )
    return weights


def _at_least(name: str, value: int, least: int) -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer >= {least}. Received: {name}={value!r}")
    return int(value)
