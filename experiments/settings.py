"""Trains several settings, each in a separate process, to compare ways to truncate."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from absl import flags

import keras_tbptt
from experiments import runner

flags.DEFINE_integer("seeds", 5, "How many seeds (0, 1, 2, ...) each row is trained with.", 1)
flags.DEFINE_integer(
    "jobs", 1, "How many rows train at once. Seconds are comparable with 1 only.", 1
)


@dataclass(frozen=True)
class Setting:
    """One way to truncate.

    Attributes:
        name: str. The name in tables.
        window: int. Steps in a window (K).
        window_loss: str. Where the loss is taken.
        backprop_windows: The reach, or None for the default of the window loss.
        data: str. The training set, if the experiment has several.
    """

    name: str
    window: int
    window_loss: str
    backprop_windows: int | str | None = None
    data: str = ""


def build_model(
    setting: Setting, steps: keras.KerasTensor, x: Any, units: int, forget_bias: float
) -> keras_tbptt.TBPTTModel:
    """Builds an LSTM and a sigmoid for a setting.

    Args:
        setting: The way to truncate.
        steps: The input of the model.
        x: The input of the LSTM.
        units: int. Units of the LSTM.
        forget_bias: float. The bias of the forget gate at the start. With ln T, a state lasts for
            about T steps (Tallec and Ollivier 2018, "Can recurrent neural networks warp time?",
            section 2).
    """
    pooled = setting.window_loss == "pooled"
    lstm = keras_tbptt.layers.LSTM(units, stateful=True, return_sequences=pooled)
    x = lstm(x)
    bias = lstm.cell.bias.numpy()
    bias[units : 2 * units] = forget_bias
    lstm.cell.bias.assign(bias)
    if pooled:
        x = keras_tbptt.layers.ConcatPooling(stateful=True)(x)
    return keras_tbptt.TBPTTModel(
        steps,
        keras.layers.Dense(1, activation="sigmoid")(x),
        window_loss=setting.window_loss,
        backprop_windows=setting.backprop_windows,
    )


def train(
    build: Callable[[], keras_tbptt.TBPTTModel],
    documents: Any,
    labels: np.ndarray,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> tuple[keras_tbptt.TBPTTModel, float]:
    """Trains a model on documents.

    Args:
        build: Builds the model. It is called after the seed is set.
        documents: Documents, as in `DocumentWindows`.
        labels: 0 or 1 for each document.
        epochs: int. Passes over the documents.
        learning_rate: float. The learning rate of Adam.
        seed: int. The seed of weights and of the order of documents.

    Returns:
        The model and the seconds that training took.
    """
    keras.utils.set_random_seed(seed)
    model = build()
    model.compile(
        keras.optimizers.Adam(learning_rate, clipnorm=1.0),
        "binary_crossentropy",
        steps_per_execution=16,
    )
    windows = keras_tbptt.DocumentWindows(
        documents,
        labels,
        window=model.window,
        lanes=model.lanes,
        packing="aligned",
        shuffle=True,
        seed=seed,
    )
    began = time.perf_counter()
    model.fit(windows, epochs=epochs, verbose=0)
    return model, time.perf_counter() - began


def run_each(
    work: Callable[..., dict[str, Any]],
    settings: Sequence[Setting],
    *arguments: Any,
    done: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
    """Runs `work(setting, seeds, *arguments)` for each setting, with a progress bar.

    Each setting has a separate process, because peak memory is counted per process.

    Args:
        work: A function at the top level of a module. It returns figures.
        settings: The settings to run.
        *arguments: Further arguments of `work`, which can be pickled.
        done: The figures that an earlier run yielded for the first settings. Defaults to none.

    Yields:
        The figures of each setting in order, with `setting` and `peak_rss_mb` added.
    """
    with (
        concurrent.futures.ProcessPoolExecutor(
            flags.FLAGS.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool,
        runner.progress_bar() as bar,
    ):
        task = bar.add_task("rows", total=len(settings))
        seeds = range(flags.FLAGS.seeds)
        yield from done
        bar.advance(task, len(done))
        left = settings[len(done) :]
        futures = [pool.submit(_alone, work, setting, seeds, *arguments) for setting in left]
        for setting, future in zip(left, futures, strict=True):
            bar.update(task, description=setting.name)
            yield {"setting": setting.name, **future.result()}
            bar.advance(task)


def _alone(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    runner.use_cores()
    return {**work(*arguments), "peak_rss_mb": runner.peak_rss_mb()}


def spread(values: Sequence[float]) -> str:
    """The mean of a figure over seeds, and its range, such as `0.98 (0.95-1.00)`.

    Args:
        values: The figure of each seed.
    """
    low, high = min(values), max(values)
    bounds = f" ({low:.2f}-{high:.2f})" if high - low >= 0.005 else ""
    return f"{np.mean(values):.2f}{bounds}"
