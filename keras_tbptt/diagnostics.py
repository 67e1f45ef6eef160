"""How far back the gradient of a document's loss reaches, and what a window cuts off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.state import explicit_state, initial_states, seed_variables

# Documents that are read side by side: their states at all steps are kept in memory.
_ROWS = 64


@dataclass(frozen=True)
class GradientReach:
    """How a gradient fades with distance, and what is lost where it is cut.

    Distances are in steps: the state at distance k is the one with which k steps of the document
    are still to be read, so that k steps lie between it and the loss. The state just before the
    last step has distance 1, the initial state of a document of T steps distance T. A window of
    K steps carries the gradient to the states at distances below K.

    Attributes:
        distances: int `[D]`: 1, 2, ... up to the longest document.
        documents: int `[D]`: how many documents are that long; the norms are over these.
        norms: float `[D]`: the norm of d loss / d state, all state tensors together, mean over
            documents.
        quartiles: float `[3, D]`: the same norm's 25th, 50th and 75th percentile.
        truncated_norms: float `[D]`: the mean norm when the gradient is cut as the model cuts
            it: a document of T steps ends in a window of `(T - 1) % window + 1` steps, and the
            gradient goes through that one and the full windows before it, `backprop_windows` in
            all. Where the reach is `"all"` nothing is cut, nor on average with `"artbp"`.
        windows: int `[W]`: numbers of last steps K that the gradient over the parameters was cut
            to.
        relative_bias: float `[W]`: `|g_K - g| / |g|`, where g is the mean gradient over documents
            and g_K that of their last K steps.
        cosine: float `[W]`: the cosine between g_K and g.
        gradient: g, a float array per trainable variable of the model.
        window: int, steps in the model's own window.
        backprop_windows: The model's own reach, in windows: int, `"all"` or `"artbp"`.
    """

    distances: np.ndarray
    documents: np.ndarray
    norms: np.ndarray
    quartiles: np.ndarray
    truncated_norms: np.ndarray
    windows: np.ndarray
    relative_bias: np.ndarray
    cosine: np.ndarray
    gradient: list[np.ndarray]
    window: int
    backprop_windows: int | str

    @property
    def decay_rate(self) -> float:
        """What the norm is multiplied with per step further back: beta, below 1 where it fades.

        By ordinary least squares on the logarithms of the norms (Aicher, Foti and Fox 2019,
        "Adaptively truncating backpropagation through time to control gradient bias", section 4),
        over the second half of the distances that at least half of the documents have and at
        which the norm has not vanished. NaN where that leaves fewer than two.
        """
        common = 2 * self.documents >= self.documents[0]
        # Near float32's smallest number its components vanish one by one, which is no decay.
        float32 = np.finfo("float32")
        known = np.flatnonzero(common & (self.norms > float32.tiny / float32.eps))
        tail = known[len(known) // 2 :]
        if len(tail) < 2:
            return float("nan")
        return float(np.exp(np.polyfit(self.distances[tail], np.log(self.norms[tail]), 1)[0]))

    def recommended_window(self, tolerance: float = 0.1) -> int | None:
        """The smallest window whose gradient is near enough to the exact one.

        Args:
            tolerance: float >= 0, the relative bias that is allowed.

        Returns:
            The smallest of `windows` whose relative bias is at most that, or None.
        """
        enough = self.windows[self.relative_bias <= tolerance]
        return int(enough.min()) if len(enough) else None

    def figure(self, path: str | os.PathLike | None = None) -> Any:
        """Draws norms by distance, and relative bias and cosine by window.

        Args:
            path: Where to save the figure too, in the format that its ending names; None for
                nowhere.

        Returns:
            A `matplotlib.figure.Figure` of two axes.

        Raises:
            ImportError: Without matplotlib.
        """
        try:
            from matplotlib.figure import Figure  # an extra: nothing else here needs it
        except ImportError as error:
            raise ImportError(
                f"The figure needs matplotlib: pip install 'keras-tbptt[plots]'. Received: {error}"
            ) from error

        figure = Figure(figsize=(10, 3.6), layout="constrained")
        fading, cut = figure.subplots(1, 2)
        drawn = np.where(self.quartiles > 0, self.quartiles, np.nan)
        fading.fill_between(self.distances, drawn[0], drawn[2], alpha=0.2, label="quartiles")
        for norms, label in ((self.norms, "exact"), (self.truncated_norms, "truncated")):
            style = "-" if label == "exact" else "--"
            fading.plot(self.distances, np.where(norms > 0, norms, np.nan), style, label=label)
        fading.set(xlabel="steps before the loss", ylabel="norm of d loss / d state", yscale="log")
        cut.plot(self.windows, self.relative_bias, "o-", label="relative bias")
        cut.plot(self.windows, self.cosine, "s--", label="cosine")
        cut.set(xlabel="steps that the gradient goes through", xscale="log")
        for axes in (fading, cut):
            axes.axvline(self.window, color="grey", linestyle=":", label=f"window {self.window}")
            axes.grid(alpha=0.3)
            axes.legend()
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def gradient_reach(
    model: keras.Model,
    documents: Any,
    labels: Any = None,
    *,
    windows: Iterable[int] | None = None,
    offsets: Any = None,
    per_step: bool = False,
) -> GradientReach:
    """Measures how far back a model's gradient reaches, and the bias of cutting it.

    The loss is the one that the model was compiled with, of whole documents, taken once, at the
    last step; without dropout, and without what regularisation adds. Documents are read one step at
    a time, keeping the state before each, and walked through again backwards, which gives the
    gradient at every state and, on the way, the gradient over the parameters cut to the last K
    steps. Relative bias, and the decay by which it can be judged, are those of Aicher, Foti and
    Fox 2019, "Adaptively truncating backpropagation through time to control gradient bias",
    arXiv 1905.07473, sections 3 and 4.

    Nothing of the model is changed: neither its state nor its random generators. The memory
    is that of the states of 64 documents at all of their steps, and of one gradient per K.

    Args:
        model: A compiled model with stateful layers and one input `[lanes, window, ...]`, such as
            a `TBPTTModel`. Of outputs `[lanes, window, ...]` the last step is read.
        documents: `DocumentWindows` with labels, of any window and lanes, or documents in any
            form that `DocumentWindows` takes.
        labels: As in `DocumentWindows`; None if `documents` holds them.
        windows: ints >= 1, the K's to report; None for 1, 2, 3, 5, 10, 20, 30, 50, ... and the
            longest document.
        offsets: As in `DocumentWindows`.
        per_step: As in `DocumentWindows`; then the target of the last step is what counts.

    Returns:
        A `GradientReach`.

    Raises:
        ValueError: If the model has not been compiled with a loss, has no stateful layer or one
            with `unroll=True`, there are no labels, or a K is no integer >= 1.

    Example:

    ```python
    reach = keras_tbptt.diagnostics.gradient_reach(model, documents[:64], labels[:64])
    reach.recommended_window(tolerance=0.1)  # 50
    reach.figure("reach.png")
    ```
    """
    if getattr(model, "loss", None) is None:
        raise ValueError(
            "The gradient is that of the model's loss: call model.compile(optimizer, loss) first. "
            f"Received: model {model.name!r} without a loss"
        )
    window = model.inputs[0].shape[1]
    if not isinstance(documents, DocumentWindows):
        documents = DocumentWindows(
            documents, labels, window=window, lanes=1, offsets=offsets, per_step=per_step
        )
    if not documents.has_labels:
        raise ValueError(
            "The loss needs labels: gradient_reach(model, documents, labels). "
            f"Received: {documents!r} without labels"
        )
    longest = int(documents.lengths.max())
    windows = _grid(longest) if windows is None else _checked(windows)
    stops = np.unique(np.append(np.minimum(windows, longest), longest))

    walk = _walk(model, documents)
    norms = np.full([documents.num_documents, longest], np.nan)
    sums: list[Any] = [0.0] * len(stops)
    by_length = np.argsort(documents.lengths, kind="stable")
    for rows in np.split(by_length, range(_ROWS, len(by_length), _ROWS)):
        found, gradients = walk(rows, stops)
        norms[rows, : found.shape[1]] = found
        sums = [old + new for old, new in zip(sums, gradients, strict=True)]

    distances = np.arange(1, longest + 1)
    norms[distances > documents.lengths[:, None]] = np.nan
    reach = getattr(model, "backprop_windows", 1)
    kept = 1.0
    if isinstance(reach, int):
        kept = distances < ((documents.lengths - 1) % window + 1 + (reach - 1) * window)[:, None]
    means = dict(zip(stops.tolist(), sums, strict=True))
    exact = means[longest]
    compared = [_compare(means[min(k, longest)], exact) for k in windows.tolist()]
    relative_bias, cosine = np.transpose(compared)
    shapes = [tuple(variable.shape) for variable in model.trainable_variables]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(exact / documents.num_documents, ends[:-1])
    return GradientReach(
        distances=distances,
        documents=np.isfinite(norms).sum(axis=0),
        norms=np.nanmean(norms, axis=0),
        quartiles=np.nanpercentile(norms, [25, 50, 75], axis=0),
        truncated_norms=np.nanmean(norms * kept, axis=0),
        windows=windows,
        relative_bias=relative_bias,
        cosine=cosine,
        gradient=[part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)],
        window=window,
        backprop_windows=reach,
    )


def _grid(longest: int) -> np.ndarray:
    """1, 2, 3, 5, 10, 20, 30, 50, ... below `longest`, and `longest`."""
    grid = [digit * 10**zeros for zeros in range(len(str(longest))) for digit in (1, 2, 3, 5)]
    return np.array([k for k in grid if k < longest] + [longest])


def _checked(windows: Iterable[int]) -> np.ndarray:
    grid = np.asarray(list(windows))
    if grid.ndim != 1 or not len(grid) or grid.dtype.kind not in "iu" or grid.min() < 1:
        raise ValueError(
            f"`windows` must be integers >= 1, at least one. Received: windows={grid.tolist()}"
        )
    return np.unique(grid)


def _compare(cut: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Relative bias and cosine; NaN where there is no gradient to compare with."""
    cut, exact = cut.astype("float64"), exact.astype("float64")
    size = np.linalg.norm(exact)
    with np.errstate(invalid="ignore"):
        return np.linalg.norm(cut - exact) / size, cut @ exact / (np.linalg.norm(cut) * size)


def _walk(model: keras.Model, documents: DocumentWindows) -> Callable:
    """The walk through whole documents, forwards and backwards in windows of one step.

    Returns:
        A function `(rows, stops) -> (norms, gradients)`: `rows` says which documents, `stops` are
        distances, ascending; `norms` is `[rows, time]` by distance, `gradients` a flat array per
        stop, summed over the rows.
    """
    call = explicit_state(model)
    variables = [variable.value for variable in model.trainable_variables]

    def read(steps, real, index, states):
        # Keras refuses a number of steps other than the model's own only where it can see it.
        step = tf.raw_ops.PlaceholderWithDefault(
            input=steps[:, index : index + 1], shape=[None, None, *steps.shape[2:]]
        )
        seeds = [variable.value for variable in seed_variables(model)]  # with these it is pure
        outputs, new_states = call(tf.cast(step, model.inputs[0].dtype), states, seeds=seeds)
        # In front of a document its lane waits, whether a mask could reach the layer or not.
        real = real[:, index]
        states = [
            tf.ensure_shape(tf.where(_like(real, old), new, old), old.shape)
            for new, old in zip(new_states, states, strict=True)
        ]
        return outputs, states

    def read_forward(steps, real):
        time = tf.shape(steps)[1]
        states = initial_states(model, tf.shape(steps)[0])
        kept = [tf.TensorArray(s.dtype, time, element_shape=s.shape) for s in states]

        def body(index, states, kept):
            kept = [array.write(index, s) for array, s in zip(kept, states, strict=True)]
            return index + 1, read(steps, real, index, states)[1], kept

        kept = tf.while_loop(lambda index, *_: index < time, body, (0, states, kept))[2]
        return [array.stack() for array in kept]

    def walk_back(tape, targets, upstream, gradients, states):
        found = tape.gradient(
            targets,
            [*variables, *states],
            output_gradients=upstream,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        added = [_add(old, new) for old, new in zip(gradients, found, strict=False)]
        return added, found[len(variables) :]

    def losses_of(y, y_pred):
        # Row by row, so that a loss is a document's own whatever the reduction over a batch.
        def one(row):
            y, y_pred = keras.tree.map_structure(lambda t: t[None], row)
            return tf.cast(model.compute_loss(y=y, y_pred=y_pred, training=False), "float32")

        return tf.map_fn(one, (y, y_pred), fn_output_signature=tf.float32)

    def last_step(output, symbolic):
        timed = symbolic.shape[1:2] == model.inputs[0].shape[1:2] and len(symbolic.shape) > 2
        return output[:, -1] if timed else output

    def begin(steps, real, y, weights):
        """Reads forwards, and takes the gradient through the last step."""
        kept = read_forward(steps, real)
        states = [array[-1] for array in kept]
        with tf.GradientTape() as tape:
            tape.watch(states)
            outputs, _ = read(steps, real, tf.shape(steps)[1] - 1, states)
            flat = zip(keras.tree.flatten(outputs), model.outputs, strict=True)
            y_pred = keras.tree.pack_sequence_as(outputs, [last_step(*pair) for pair in flat])
        with tf.GradientTape() as loss_tape:
            loss_tape.watch(y_pred)
            losses = losses_of(y, y_pred) * weights
        # By the prediction, on which no penalty of the weights depends.
        by_prediction = loss_tape.gradient(
            losses, y_pred, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        gradients, upstream = walk_back(
            tape,
            tf.nest.flatten(y_pred),
            tf.nest.flatten(by_prediction),
            [tf.zeros(variable.shape, variable.dtype) for variable in variables],
            states,
        )
        return kept, gradients, upstream, _norm(upstream)

    def go_on(steps, real, kept, gradients, upstream, begin, end):
        """Walks from distance `begin` to distance `end`."""
        time = tf.shape(steps)[1]

        def body(distance, gradients, upstream, norms):
            states = [array[time - distance] for array in kept]
            with tf.GradientTape() as tape:
                tape.watch(states)
                _, new_states = read(steps, real, time - distance, states)
            gradients, upstream = walk_back(tape, new_states, upstream, gradients, states)
            norms = norms.write(distance - begin - 1, _norm(upstream))
            return distance + 1, gradients, upstream, norms

        norms = tf.TensorArray("float64", end - begin, element_shape=[None])
        _, gradients, upstream, norms = tf.while_loop(
            lambda distance, *_: distance <= end, body, (begin + 1, gradients, upstream, norms)
        )
        return gradients, upstream, norms.stack()

    # Traced once, for any number of rows and steps.
    steps, real, y, weights = documents.whole([0])
    steps, real = _spec(steps, 2), _spec(real, 2)
    y, weights = tf.nest.map_structure(lambda array: _spec(array, 1), (y, weights))
    begin = tf.function(begin).get_concrete_function(steps, real, y, weights)
    place = tf.TensorSpec([], tf.int32)
    go_on = tf.function(go_on).get_concrete_function(
        steps, real, *begin.structured_outputs[:3], place, place
    )

    def walk(rows, stops):
        batch = tf.nest.map_structure(tf.constant, documents.whole(rows))
        kept, gradients, upstream, norm = begin(*batch)
        norms, flat, reached = [norm[None]], [], 1
        for stop in np.minimum(stops, len(kept[0])).tolist():
            if stop > reached:
                gradients, upstream, found = go_on(
                    *batch[:2], kept, gradients, upstream, tf.constant(reached), tf.constant(stop)
                )
                norms.append(found)
                reached = stop
            flat.append(np.concatenate([g.numpy().ravel() for g in gradients]))
        return np.concatenate(norms).T, flat

    return walk


def _spec(array: np.ndarray, free: int) -> tf.TensorSpec:
    """For arrays like this with the first `free` dimensions of any size."""
    return tf.TensorSpec([None] * free + list(array.shape[free:]), array.dtype)


def _add(total: tf.Tensor, gradient: tf.Tensor | tf.IndexedSlices) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):  # an embedding's: a few rows of many
        return tf.tensor_scatter_nd_add(total, gradient.indices[:, None], gradient.values)
    return total + gradient


def _norm(gradients: Sequence[tf.Tensor]) -> tf.Tensor:
    """One norm per row, `[rows]`, of all tensors together."""
    # In float64, where the square of the smallest float32 is no zero.
    rows = [tf.reshape(tf.cast(g, "float64"), [tf.shape(g)[0], -1]) for g in gradients]
    return tf.norm(tf.concat(rows, axis=1), axis=1)


def _like(rows: tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    return tf.reshape(rows, [-1] + [1] * (tensor.shape.rank - 1))
