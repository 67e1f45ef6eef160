"""generate: a trained stateful model continues prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import text
from keras_tbptt._graphs import kept_with
from keras_tbptt._window_checks import check_windows
from keras_tbptt.data._documents import check_values, flatten
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.serving._generation import Generator, excluded_ids
from keras_tbptt.serving._stream import functional


def generate(
    model: keras.Model,
    prompts: Any,
    steps: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Any = None,
    seed: int | None = None,
    vectorizer: keras.layers.TextVectorization | None = None,
) -> list[Any]:
    """Continues prompts, one step at a time, each drawn from the model's prediction.

    The model is the one that was trained, with any number of lanes. It is not rebuilt, and the
    state of its training is not used. Prompts run window by window. Then a loop in one TensorFlow
    graph runs one step of all prompts at a time. The first call for a model compiles that graph.

    Args:
        model: A `TBPTTModel`, or a functional or `Sequential` model with stateful layers. It takes
            ids `[lanes, window]` and gives logits or probabilities of the next id, for each step or
            for the last one: `[lanes, window, classes]` or `[lanes, classes]`.
        prompts: At least one prompt, each at least one step long: a list of int arrays `[T]`; with
            `vectorizer` a list of str.
        steps: int >= 1. The most steps that are drawn for each prompt.
        temperature: float > 0. Logits are divided by it: below 1 likely steps become likelier.
            Defaults to 1.
        top_k: Optional int >= 1. Only the k likeliest steps may be drawn (Fan et al. 2018,
            "Hierarchical neural story generation", section 5.4). 1 takes the likeliest.
        top_p: Optional float in (0, 1]. Only the likeliest steps whose probabilities add up to it
            may be drawn (Holtzman et al. 2020, "The curious case of neural text degeneration",
            section 3.1). With `top_k`, of those k.
        stop: Optional id, or list of ids, that ends a text; with `vectorizer` a word or a list of
            words. It is not returned. Defaults to None: every text has `steps` steps.
        seed: int >= 0. The same seed draws the same steps. Defaults to None: it is drawn from
            Python's `random`, which `keras.utils.set_random_seed` seeds.
        vectorizer: The `TextVectorization` of the model's ids (`keras_tbptt.text.make_vectorizer`).

    Returns:
        The new steps of each prompt, without the prompt: a list of int32 arrays `[at most steps]`;
        with `vectorizer` a list of str. Padding is never drawn, and with `vectorizer` neither are
        unknown words.

    Raises:
        ValueError: If a prompt is empty or has an id that the model does not know, an argument is
            out of its range, or the model cannot run one step at a time.

    Example:

    ```python
    (words,) = keras_tbptt.generate(
        model, ["To be"], steps=50, temperature=0.8, vectorizer=vectorizer
    )
    ```
    """
    _check_arguments(steps, temperature, top_k, top_p, seed)
    generator = _generator_of(model)
    excluded = excluded_ids(generator, vectorizer)
    stop = [] if stop is None else [stop] if isinstance(stop, (str, int, np.integer)) else stop
    if vectorizer is not None:
        prompts, stop = _as_ids(prompts, stop, vectorizer)
    ids, lengths = _checked_prompts(prompts, generator.model)
    stop_ids = np.asarray(stop).reshape(-1)
    if stop_ids.size and (
        stop_ids.dtype.kind not in "iu"
        or not 0 <= stop_ids.min() <= stop_ids.max() < generator.classes
    ):
        raise ValueError(
            "`stop` must be ids that the model can draw (words need `vectorizer`), integers "
            f"below {generator.classes}. Received: stop={stop_ids.tolist()}"
        )
    drawn, counts = generator.compiled(
        ids,
        lengths,
        tf.constant(steps),
        tf.constant(temperature, "float32"),
        tf.constant(top_k or 0),
        tf.constant(1.0 if top_p is None else top_p, "float32"),
        tf.constant(stop_ids, tf.int32),
        tf.constant(excluded),
        tf.constant([0, random.randint(0, 2**31 - 1) if seed is None else seed], "int32"),
    )
    texts = [row[:count] for row, count in zip(drawn.numpy(), counts.numpy(), strict=True)]
    return texts if vectorizer is None else [text.decode(vectorizer, row) for row in texts]


class _CompiledGenerator(Generator):
    """A `Generator` with its graph."""

    def __init__(self, model: keras.Model):
        super().__init__(model)
        self.model = model
        self.compiled = tf.function(self.run, reduce_retracing=True, autograph=False)


def _generator_of(model: keras.Model) -> _CompiledGenerator:
    return kept_with(model, "generator", lambda: _CompiledGenerator(functional(model)))


def _check_arguments(steps: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> None:
    for name, value, least in (("steps", steps, 1), ("top_k", top_k, 1), ("seed", seed, 0)):
        if value is None and name != "steps":
            continue
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not least <= value < 2**31:
            raise ValueError(f"`{name}` must be an integer >= {least}. Received: {name}={value!r}")
    number = isinstance(temperature, (int, float, np.integer, np.floating))
    smallest = np.finfo("float32").tiny  # below it TensorFlow computes with 0
    if not number or not np.isfinite(temperature) or temperature < smallest:
        raise ValueError(
            "`temperature` must be finite and above 0; for the likeliest step at each place give "
            f"top_k=1. Received: temperature={temperature!r}"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1]. Received: top_p={top_p!r}")


def _as_ids(
    prompts: Any, stop: Sequence[Any], vectorizer: keras.layers.TextVectorization
) -> tuple[Any, list[int]]:
    """Prompts and stop words as ids."""
    if isinstance(prompts, (str, bytes)):
        raise ValueError(f"`prompts` must be a list of texts. Received: prompts={prompts!r}")
    known = {word: i for i, word in enumerate(vectorizer.get_vocabulary())}
    unknown = [word for word in stop if word not in known]
    if unknown:
        raise ValueError(
            f"`stop` must be words of the vocabulary. Received: {unknown[0]!r}, which is none"
        )
    return text.encode(vectorizer, prompts), [known[word] for word in stop]


def _checked_prompts(prompts: Any, model: keras.Model) -> tuple[tf.Tensor, tf.Tensor]:
    """Prompts as ids `[batch, longest]` and lengths `[batch]`, both int32."""
    values, offsets = flatten(prompts, name="prompts")
    check_values(values, "prompts", ids=True)
    lanes, window = model.inputs[0].shape
    check_windows(DocumentWindows(values, offsets=offsets, window=window, lanes=lanes), model)
    ragged = tf.RaggedTensor.from_row_splits(tf.constant(values, "int32"), offsets)
    return ragged.to_tensor(), tf.cast(ragged.row_lengths(), "int32")
