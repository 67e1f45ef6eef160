"""What `fit`, `evaluate` and `predict` are given, as batches that fit the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._shares import is_per_step
from keras_tbptt._window_checks import check_classes, check_replicas, check_windows
from keras_tbptt.data._source import WindowSource
from keras_tbptt.data.stream import DocumentStream
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.losses import FINAL_LOSSES

# All that `DocumentWindows.dataset(flags=True)` gives; batches of other origin may have fewer.
_ORDER = ("lengths", "ends", "positions", "totals")


def source_of(x: Any) -> WindowSource | None:
    """The windows that `x` is, or is the dataset of; None for batches of other origin.

    Args:
        x: What `fit`, `evaluate` or `predict` is given.
    """
    return x if isinstance(x, WindowSource) else getattr(x, "source", None)


@contextlib.contextmanager
def errors_of(*given: Any) -> Iterator[None]:
    """Raises the error of a stream that cannot be read, and not what TensorFlow makes of it.

    Args:
        *given: What a model runs on.
    """
    try:
        yield
    except tf.errors.OpError as error:
        for source in map(source_of, given):
            failure = getattr(source, "failure", None)
            if failure is not None:
                raise failure from None
            if isinstance(source, DocumentStream) and "was expected to contain" in str(error):
                raise ValueError(
                    "The stream does not have the windows that were counted: `parse` or the "
                    "records have changed. Delete the file of `count`, and count again. "
                    f"Received: {source!r}"
                ) from None
        raise


def as_dataset(
    x: Any,
    model: keras.Model,
    learns: bool = False,
    needs_labels: bool = True,
    steps: int | None = None,
) -> tf.data.Dataset:
    """Checks that windows fit a model, before anything runs.

    Args:
        x: `DocumentWindows` or a `DocumentStream`, their `dataset(flags=True)`, or a
            `tf.data.Dataset` of such batches.
        model: A `TBPTTModel`.
        learns: bool. Whether the model is trained on them.
        needs_labels: bool. Whether they must have labels.
        steps: Optional int. How many windows are evaluated; None for all.

    Returns:
        A dataset of batches with flags.

    Raises:
        ValueError: If the windows do not fit the model, lack labels or a flag, or no document ends
            in the windows to evaluate.
    """
    if tf.distribute.has_strategy():
        raise ValueError(
            "A TBPTTModel enters the scope of its strategy by itself: build and compile it within "
            "strategy.scope(), and call fit, evaluate and predict outside of the scope. "
            f"Received: a call within the scope of {tf.distribute.get_strategy()}"
        )
    source = source_of(x)
    if source is not None:
        check_windows(source, model)
        check_replicas(source, model)
        if needs_labels and not source.has_labels:
            raise ValueError(
                "Training and evaluation need labels: DocumentWindows(documents, labels, ...). "
                f"Received: {source!r} without labels"
            )
        if (
            steps is not None
            and isinstance(source, DocumentWindows)
            and source.per_step is not True
            and not source.ends[:steps].any()
        ):
            raise ValueError(
                "No document ends in the windows to evaluate, so there would be no figures: "
                f"evaluate more of them. Received: steps={steps}, {source!r}"
            )
        if learns and model.backprop_windows == "all" and source.packing != "aligned":
            raise ValueError(
                'backprop_windows="all" makes one step for all lanes when their documents have '
                'ended: give it DocumentWindows(..., packing="aligned"). '
                f"Received: packing={source.packing!r}"
            )
    dataset = x
    if isinstance(source, DocumentStream):
        replicas = model.replicas
        dataset = source.dataset_of_worker(replicas.worker, replicas.workers, one_pass=not learns)
    elif source is not None and x is source:
        dataset = source.dataset(flags=True)
    spec = getattr(dataset, "element_spec", None)
    flags = spec[0] if isinstance(spec, tuple) else spec
    if not isinstance(dataset, tf.data.Dataset) or not has_flags(flags):
        raise ValueError(
            "A TBPTTModel runs windows of documents: pass keras_tbptt.DocumentWindows or "
            f"DocumentStream, or their dataset(flags=True). Received: {type(x).__name__} of {spec}"
        )
    if source is None and model.jit_compile is True and has_order(flags):
        raise ValueError(
            "XLA drops the check that the windows of a lane follow each other: compile the model "
            "without jit_compile, or give it DocumentWindows or a DocumentStream. "
            f"Received: jit_compile=True, and batches of another {type(x).__name__}"
        )
    if needs_labels:
        check_classes(source, model)
        flags, y, sample_weight = unpack(spec)
        per_step = all(map(is_per_step, tf.nest.flatten(sample_weight)))
        _check_flags(flags, _flags_needed(flags, model, learns, per_step))
        _check_targets(y, sample_weight, model)
    return dataset


@contextlib.contextmanager
def to_the_end() -> Iterator[None]:
    """Keras warns at the end of data of unknown length, which is what an evaluation waits for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data", UserWarning)
        yield


def has_flags(x: Any) -> bool:
    """Whether a batch says where documents begin.

    Args:
        x: The inputs of a batch, or their `tf.TensorSpec`s.
    """
    return isinstance(x, Mapping) and {"inputs", "starts"} <= set(x)


def has_order(x: Mapping[str, Any]) -> bool:
    """Whether a batch says enough to check that each window follows the one before.

    Args:
        x: The inputs of a batch with flags.
    """
    return set(_ORDER) <= set(x)


def unpack(data: Any) -> tuple[Mapping[str, tf.Tensor], Any, tf.Tensor]:
    """The three parts of a batch to learn from.

    Args:
        data: `(x, y, sample_weight)`, or its `tf.TensorSpec`s.

    Raises:
        ValueError: If one is missing.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if not has_flags(x) or y is None or sample_weight is None:
        raise ValueError(
            "A batch for a TBPTTModel must be (x, y, sample_weight) as "
            "DocumentWindows.dataset(flags=True) makes them. "
            f"Received: x={x}, y={y}, sample_weight={sample_weight}"
        )
    return x, y, sample_weight


def with_all_flags(x: Mapping[str, tf.Tensor], lanes: int, window: int) -> dict[str, tf.Tensor]:
    """Fills in the flags that a batch of other origin may leave out: its windows are full.

    Args:
        x: The inputs of a batch, with flags of which `as_dataset` has made sure.
        lanes: int, rows of a batch.
        window: int, steps in a window.
    """
    full = tf.fill([lanes], window)
    flags = {
        "lengths": full,
        "positions": tf.zeros([lanes], tf.int32),
        "totals": full,
        "ends": tf.zeros([lanes], tf.bool),
    }
    return {**flags, **x}


def as_outputs(y: Any, sample_weight: Any, model: keras.Model) -> tuple[Any, Any]:
    """Targets, and their weights where outputs have their own, in the form of the outputs.

    A target per step gets the rank of its output: `[lanes, window]` becomes `[lanes, window, 1]`.
    Keras would squeeze the output instead, and take the mean over the window.

    Args:
        y: Targets, or their `tf.TensorSpec`s.
        sample_weight: Their weights, or the `tf.TensorSpec`s.
        model: A functional model.

    Raises:
        ValueError: If outputs have their own weights, and not each output has a target.
    """
    own = tf.nest.is_nested(sample_weight)
    if own or len(tf.nest.flatten(y)) == len(model.outputs):
        y = _keras.targets_like(model, y, model.output)
    if own:
        sample_weight = _keras.targets_like(model, sample_weight, model.output)
    targets, weights = _pairs(y, sample_weight)
    if len(targets) != len(model.outputs):
        return y, sample_weight
    flat = [
        _in_rank_of(target, output) if is_per_step(weight) else target
        for target, weight, output in zip(targets, weights, model.outputs, strict=True)
    ]
    return keras.tree.pack_sequence_as(model.output, flat), sample_weight


def _pairs(y: Any, sample_weight: Any) -> tuple[list[Any], list[Any]]:
    """Each target, and its weight."""
    targets, weights = keras.tree.flatten(y), keras.tree.flatten(sample_weight)
    return targets, weights if tf.nest.is_nested(sample_weight) else weights * len(targets)


def _in_rank_of(target: Any, output: keras.KerasTensor) -> Any:
    if target.shape.rank != len(output.shape) - 1 or output.shape[-1] != 1:
        return target
    if isinstance(target, tf.TensorSpec):
        return tf.TensorSpec([*target.shape, 1], target.dtype)
    return target[..., None]


def class_weigher(class_weight: Mapping[int, float], spec: tuple) -> Callable:
    """Multiplies the weight of a label's class into a batch's sample weights.

    Args:
        class_weight: Class index to weight.
        spec: `tf.TensorSpec`s of `(x, y, sample_weight)`.

    Raises:
        ValueError: If there are several outputs, or a key is no class index.
    """
    label = spec[1]
    if not isinstance(label, tf.TensorSpec):
        raise ValueError(
            "`class_weight` works with one output; give `weights` to DocumentWindows instead. "
            f"Received: labels {label}"
        )
    for index, weight in class_weight.items():
        whole = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
        if not whole or index < 0 or not np.isfinite(weight) or weight < 0:
            raise ValueError(
                "`class_weight` must map class indices >= 0 to finite weights >= 0. "
                f"Received: class_weight={dict(class_weight)!r}"
            )
    table = np.ones(max(class_weight, default=0) + 1, "float32")
    for index, weight in class_weight.items():
        table[index] = weight

    def weigh(x: Any, y: tf.Tensor, sample_weight: tf.Tensor) -> tuple:
        index = y
        if y.shape.rank > sample_weight.shape.rank:
            index = y[..., 0] if y.shape[-1] == 1 else tf.argmax(y, axis=-1)
        index = tf.cast(index, "int32")
        known = (index >= 0) & (index < len(table))
        weights = tf.where(known, tf.gather(table, tf.where(known, index, 0)), 1.0)
        return x, y, sample_weight * weights

    return weigh


def _flags_needed(
    given: Mapping[str, Any], model: keras.Model, learns: bool, per_step: bool
) -> list[str]:
    """What the window loss and the reach need to know of a window, beside its start."""
    if not learns:
        return [] if per_step else ["ends"]
    final, linear = model.window_loss in FINAL_LOSSES, model.window_loss == "linear_gain"
    needed = ["ends"] if final or model.burn_in or model.backprop_windows != 1 else []
    needed += ["positions"] if linear or model.burn_in else []
    needed += ["totals"] if linear or ("lengths" in given and not per_step) else []
    return needed


def _check_flags(given: Mapping[str, Any], needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(
            f"The batches need the flags {missing} too: see DocumentWindows.dataset. "
            f"Received: x with {sorted(given)}"
        )


def _check_targets(y: Any, sample_weight: Any, model: keras.Model) -> None:
    """Refuses targets that cannot be compared with the outputs."""
    y, sample_weight = as_outputs(y, sample_weight, model)
    targets, weights = _pairs(y, sample_weight)
    if len(targets) != len(model.outputs):
        return  # Keras names the structures.
    for target, weight, output in zip(targets, weights, model.outputs, strict=True):
        timed = len(output.shape) > 1 and output.shape[1] == model.window
        received = f"Received: targets of shape {target.shape}, an output of shape {output.shape}"
        if is_per_step(weight) and not timed:
            raise ValueError(
                "A target per step needs an output per step, [lanes, window, ...]: build the last "
                f"recurrent layer with return_sequences=True. {received}"
            )
        if is_per_step(weight) and len(output.shape) == 2:
            raise ValueError(
                "An output per step needs a last axis, [lanes, window, 1]: end the model with "
                f"Dense(1), and without squeezing. {received}"
            )
        if not is_per_step(weight) and timed and len(output.shape) > 2:
            raise ValueError(
                "The output has a time axis, and the labels have none: give a target per step with "
                "DocumentWindows(..., per_step=True), or build the last recurrent layer with "
                f"return_sequences=False. {received}"
            )
