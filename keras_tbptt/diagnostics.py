"""How far back the gradient of a document's loss reaches, and what a window cuts off."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_tbptt._gradient_walk import GradientWalk
from keras_tbptt._inputs import ModelInputs
from keras_tbptt._replicas import check_one_device
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.serving._stream import check_single_steps
from keras_tbptt.types import Documents, Labels

# How many documents run side by side. Memory holds their states at all steps.
_ROWS = 64


@dataclass(frozen=True)
class GradientReach:
    """How a gradient fades with distance, and what is lost when it is cut.

    Distances are in steps. The state at distance k is the state before the last k steps of the
    document, so k steps lie between it and the loss. The state before the last step has distance 1.
    The initial state of a document of T steps has distance T. In a window of K steps, the gradient
    flows to the states at distances below K.

    Attributes:
        distances: int `[D]`. 1, 2, ... up to the longest document.
        documents: int `[D]`. How many documents are at least that long. The norms are over these
            documents.
        norms: float `[D]`. The norm of d loss / d state, over all state tensors together. The mean
            over documents.
        quartiles: float `[3, D]`. The 25th, 50th and 75th percentile of the same norm.
        truncated_norms: float `[D]`. The mean norm when the gradient is cut as the model cuts it. A
            document of T steps ends in a window of `(T - 1) % window + 1` steps. The gradient flows
            through this window and the full windows before it, `backprop_windows` in all. Reach
            `"all"` cuts nothing. Reach `"artbp"` cuts nothing on average.
        windows: int `[W]`. Numbers K: the gradient of the parameters is cut to the last K steps.
        relative_bias: float `[W]`. `|g_K - g| / |g|`, where g is the mean gradient over documents,
            and g_K is the same gradient cut to their last K steps.
        cosine: float `[W]`. The cosine between g_K and g.
        gradient: g, a float array for each trainable variable of the model.
        window: int. Steps in the model's own window.
        backprop_windows: int, `"all"` or `"artbp"`. The model's own reach, in windows.

    Example:

    ```python
    reach = keras_tbptt.diagnostics.gradient_reach(model, windows)
    share = reach.norms[29] / reach.norms[0]  # what is left of the gradient after 29 more steps
    ```
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
        """The factor beta by which the norm changes per step back. It is below 1 if norms fade.

        Ordinary least squares on the logarithms of the norms finds it (Aicher, Foti and Fox 2019,
        "Adaptively truncating backpropagation through time to control gradient bias", section 4).
        The fit uses the distances that at least half of the documents have and at which the norm
        has not vanished, and of these the second half. The value is NaN if fewer than two distances
        are left.
        """
        common = 2 * self.documents >= self.documents[0]
        # Near the smallest number of float32, components of the gradient become 0 one by one.
        # That is rounding, and not decay.
        float32 = np.finfo("float32")
        known = np.flatnonzero(common & (self.norms > float32.tiny / float32.eps))
        tail = known[len(known) // 2 :]
        if len(tail) < 2:
            return float("nan")
        return float(np.exp(np.polyfit(self.distances[tail], np.log(self.norms[tail]), 1)[0]))

    def recommended_window(self, tolerance: float = 0.1) -> int | None:
        """The smallest window whose gradient is close enough to the exact gradient.

        Args:
            tolerance: float >= 0. The largest relative bias that is allowed. Defaults to 0.1.

        Returns:
            The smallest of `windows` whose relative bias is at most `tolerance`, or None.
        """
        enough = self.windows[self.relative_bias <= tolerance]
        return int(enough.min()) if len(enough) else None

    def figure(self, path: str | os.PathLike | None = None) -> Any:
        """Draws norms by distance, and relative bias and cosine by window.

        Args:
            path: The file in which to save the figure, in the format of its extension. Defaults to
                None: it is not saved.

        Returns:
            A `matplotlib.figure.Figure` of two axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure  # optional, because only figures need it
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
    documents: DocumentWindows | Documents,
    labels: Labels | None = None,
    *,
    windows: Iterable[int] | None = None,
    offsets: Any = None,
    per_step: bool = False,
) -> GradientReach:
    """Measures how far back a model's gradient reaches, and the bias when it is cut.

    The loss is the one that the model was compiled with. It is taken once per document, at the last
    step, without dropout and without regularization. Documents run one step at a time, and the
    state before each step is kept. A walk from the last step to the first then gives the gradient
    at every state. On the way it gives the gradient of the parameters, cut to the last K steps.
    Relative bias and decay are defined as in Aicher, Foti and Fox 2019, "Adaptively truncating
    backpropagation through time to control gradient bias", arXiv 1905.07473, sections 3 and 4.

    The model does not change, neither its state nor its random generators. Memory holds the states
    of 64 documents at all of their steps, and one gradient per K.

    Args:
        model: A compiled model with stateful layers and one input `[lanes, window, ...]`, such as
            a `TBPTTModel`. If its outputs have a time axis, `[lanes, window, ...]`, only the last
            step counts.
        documents: `DocumentWindows` with labels, of any window and lanes, or documents in any
            form that `DocumentWindows` takes.
        labels: As in `DocumentWindows`. None if `documents` holds them. Defaults to None.
        windows: Optional ints >= 1. The values of K to report. Defaults to None: 1, 2, 3, 5, 10,
            20, 30, 50, ... and the longest document.
        offsets: As in `DocumentWindows`.
        per_step: As in `DocumentWindows`. If True, only the target of the last step counts.

    Returns:
        A `GradientReach`.

    Raises:
        ValueError: If the model has not been compiled with a loss, has no stateful layer, has a
            layer with `unroll=True`, or one that looks at other steps of a window; if there are no
            labels; or if a K is not an integer >= 1.

    Example:

    ```python
    reach = keras_tbptt.diagnostics.gradient_reach(model, documents[:64], labels[:64])
    reach.recommended_window(tolerance=0.1)  # 50
    reach.figure("reach.png")
    ```
    """
    check_one_device(model, "The gradient's reach")
    if getattr(model, "loss", None) is None:
        raise ValueError(
            "The model needs a loss to take the gradient of: call model.compile(optimizer, loss). "
            f"Received: model {model.name!r} without a loss"
        )
    if ModelInputs(model).named:
        raise ValueError(
            "The gradient's reach is measured for models of one input, not in a dict. "
            f"Received: model {model.name!r} with the inputs {[t.name for t in model.inputs]}"
        )
    check_single_steps(model, "The gradient's reach")
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
    if documents.has_unknown:
        raise ValueError(
            "The loss of each document's last target is needed: leave out documents in which it is "
            f"not known, weights per step and `lead_in`. Received: {documents!r}"
        )
    if documents.weights_differ:
        raise ValueError(
            "The gradient's reach is measured for a loss in which all outputs of a document count "
            f"alike: leave out weights of single outputs. Received: {documents!r}"
        )
    longest = int(documents.lengths.max())
    windows = _grid(longest) if windows is None else _checked(windows)
    stops = np.unique(np.append(np.minimum(windows, longest), longest))

    walk = GradientWalk(model, documents)
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
    """Relative bias and cosine, or NaN if there is no gradient to compare with."""
    cut, exact = cut.astype("float64"), exact.astype("float64")
    size = np.linalg.norm(exact)
    with np.errstate(invalid="ignore"):
        bias = np.linalg.norm(cut - exact) / size
        return float(bias), float(cut @ exact / (np.linalg.norm(cut) * size))
