"""What an exported model serves, with requests checked: its signatures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt import _keras
from keras_tbptt._inputs import ModelInputs, check_order
from keras_tbptt._window_checks import embeddings_of_ids
from keras_tbptt.serving._generation import Generator, excluded_ids
from keras_tbptt.serving._stream import DocumentRunner, StreamState, at_every_step
from keras_tbptt.text import WORDLESS, check_ragged, separator_of, standardize, uses_standardize

_TEXT = tf.TensorSpec([None], tf.string, name="text")
_LENGTHS = tf.TensorSpec([None], tf.int32, name="lengths")
_STATE = tf.TensorSpec([None, None], tf.float32, name="state")
_START = tf.TensorSpec([None], tf.bool, name="start")
_BATCH_SIZE = tf.TensorSpec([], tf.int32, name="batch_size")
_STOP_IDS = tf.TensorSpec([None], tf.int32, name="stop")
_STOP_WORDS = tf.TensorSpec([None], tf.string, name="stop")
_SAMPLING = (
    tf.TensorSpec([], tf.int32, name="steps"),
    tf.TensorSpec([], tf.float32, name="temperature"),
    tf.TensorSpec([], tf.int32, name="top_k"),
    tf.TensorSpec([], tf.float32, name="top_p"),
    tf.TensorSpec([], tf.int32, name="seed"),
)


def signatures(
    model: keras.Model,
    vectorizer: keras.layers.TextVectorization | None,
    last_step: bool = False,
    generation: bool = False,
) -> dict[str, tf.types.experimental.PolymorphicFunction]:
    """The functions that an export serves, by name (see `export_saved_model`).

    Args:
        model: A functional model with stateful layers.
        vectorizer: Turns texts into ids; None for a model that does not take text.
        last_step: bool. As in `DocumentRunner`. Defaults to False.
        generation: bool. Whether prompts can be continued. Defaults to False.

    Raises:
        ValueError: If the model has no stateful layer, an input has a name that the export uses,
            there is text for several inputs per step, or as `output_names` and `Generator`.
    """
    served = _Served(model, vectorizer, last_step)
    tokens = _graph_function(served.tokens, *served.inputs, _LENGTHS)
    stream_tokens = _graph_function(served.stream_tokens, *served.inputs, _LENGTHS, _STATE, _START)
    found = {
        "serving_default": tokens,
        "tokens": tokens,
        "stream": stream_tokens,
        "stream_tokens": stream_tokens,
        "initial_state": _graph_function(served.initial_state, _BATCH_SIZE),
    }
    if vectorizer is not None:
        found["serving_default"] = _graph_function(served.text, _TEXT, *served.static)
        found["stream"] = _graph_function(served.stream_text, _TEXT, *served.static, _STATE, _START)
    if generation:
        generated = _ServedGeneration(model, vectorizer, served)
        found["generate_tokens"] = _graph_function(
            generated.tokens, *served.inputs, _LENGTHS, _STOP_IDS, *_SAMPLING
        )
        if vectorizer is not None:
            found["generate"] = _graph_function(generated.text, _TEXT, _STOP_WORDS, *_SAMPLING)
    return found


class _Served:
    """The bodies of the signatures.

    Args:
        model: As in `signatures`.
        vectorizer: As in `signatures`.
        last_step: As in `signatures`.

    Attributes:
        inputs: The `tf.TensorSpec`s of the model's inputs.
        static: Those of whole documents.
    """

    def __init__(
        self,
        model: keras.Model,
        vectorizer: keras.layers.TextVectorization | None,
        last_step: bool,
    ):
        self._form = ModelInputs(model)
        specs = {name: _spec(name, self._form) for name in self._form.tensors}
        self.inputs = [*specs.values()]
        self.static = [specs[name] for name in self._form.static]
        _check_names(self.inputs)
        if vectorizer is not None:
            check_ragged(vectorizer)
        if vectorizer is not None and len(self._form.steps) > 1:
            raise ValueError(
                "A text gives one input per step, so a vectorizer needs a model with one such "
                f"input, beside static ones. Received: inputs per step {[*self._form.steps]}"
            )
        self._vectorizer = vectorizer
        if vectorizer is not None:
            _check_vocabulary(vectorizer, model, self._form)
        self._with_lengths = any(at_every_step(model, last_step))
        own = {"state", "lengths"} if self._with_lengths else {"state"}
        self._names = output_names(model, taken=own)
        self._runner = DocumentRunner(model, last_step)
        self._layout = StreamState(model, last_step)
        self._embeddings = {
            name: embeddings_of_ids(model, [tensor]) for name, tensor in self._form.tensors.items()
        }
        # What `keras_tbptt.text.standardize` makes of a text without a word.
        self._adds_a_word = vectorizer is not None and len(vectorizer([""])[0]) > 0
        self._knows_wordless = self._adds_a_word and uses_standardize(vectorizer)

    def tokens(self, *given: tf.Tensor) -> dict[str, tf.Tensor]:
        """Whole documents of ids or features: inputs and lengths."""
        *inputs, lengths = given
        outputs, _ = self._runner.run(self.checked(inputs, lengths, least=1), lengths)
        return self._named(outputs, lengths)

    def stream_tokens(self, *given: tf.Tensor) -> dict[str, tf.Tensor]:
        """The next ids or features of streams: inputs, lengths, state and start."""
        *inputs, lengths, state, start = given
        state = self._checked_state(inputs[0], self.inputs[0].name, state, start)
        return self._go_on(self.checked(inputs, lengths, least=0), lengths, state, start)

    def text(self, text: tf.Tensor, *static: tf.Tensor) -> dict[str, tf.Tensor]:
        """Whole texts."""
        ids, lengths = self.as_ids(text)
        outputs, _ = self._runner.run(self._with_static(ids, static, lengths), lengths)
        return self._named(outputs, lengths)

    def as_ids(self, text: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Ids `[batch, time]` and lengths int32 `[batch]` of whole texts."""
        ids = self._vectorizer(text)
        lengths = tf.cast(ids.row_lengths(), "int32")
        check = _require(lengths > 0, "Every text must have at least one step.", lengths)
        return _after([check], tf.cast(ids.to_tensor(), "int32")), lengths

    def stream_text(self, text: tf.Tensor, *given: tf.Tensor) -> dict[str, tf.Tensor]:
        """The next text of streams: text, static inputs, state and start."""
        *static, state, start = given
        state = self._checked_state(text, "text", state, start)
        ids = self._vectorizer(text)
        lengths = tf.cast(ids.row_lengths(), "int32")
        if self._adds_a_word:
            wordless = standardize(text) == WORDLESS if self._knows_wordless else text == ""
            lengths = tf.where(wordless, 0, lengths)
        inputs = self._with_static(ids.to_tensor(), static, lengths)
        return self._go_on(inputs, lengths, state, start)

    def initial_state(self, batch_size: tf.Tensor) -> dict[str, tf.Tensor]:
        """The state before the first step."""
        check = _require(batch_size >= 0, "`batch_size` must not be negative.", batch_size)
        return {"state": tf.repeat(self._layout.initial(), _after([check], batch_size), axis=0)}

    def _named(self, outputs: Any, lengths: tf.Tensor) -> dict[str, tf.Tensor]:
        named = dict(zip(self._names, keras.tree.flatten(outputs), strict=True))
        return {**named, "lengths": tf.identity(lengths)} if self._with_lengths else named

    def _go_on(
        self, inputs: Any, lengths: tf.Tensor, state: tf.Tensor, start: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        outputs, states = self._runner.run(inputs, lengths, *self._layout.unpack(state, start))
        return {**self._named(outputs, lengths), "state": self._layout.pack(outputs, states)}

    def checked(self, inputs: Sequence[tf.Tensor], lengths: tf.Tensor, least: int) -> Any:
        """What the model takes, for use only once it has been checked."""
        by_name = dict(zip(self._form.tensors, inputs, strict=True))
        times = tf.stack([tf.shape(by_name[name])[1] for name in self._form.steps])
        named = " and ".join(f"`{self._spec_of(name).name}`" for name in self._form.steps)
        inside = (lengths >= least) & (lengths <= tf.reduce_min(times))
        message = f"`lengths` must lie between {least} and the steps of {named}."
        checks = [_require(inside, message, lengths)]
        for name, tensor in by_name.items():
            checks += self._checks_of(name, tensor, lengths)
        return self._form.as_given({n: _after(checks, tensor) for n, tensor in by_name.items()})

    def _with_static(self, ids: tf.Tensor, static: Sequence[tf.Tensor], lengths: tf.Tensor) -> Any:
        """What the model takes, with its static inputs checked."""
        by_name = dict(zip(self._form.static, static, strict=True))
        checks = [c for n, tensor in by_name.items() for c in self._checks_of(n, tensor, lengths)]
        [name] = self._form.steps
        return self._form.as_given({name: _after(checks, ids), **by_name})

    def _checks_of(self, name: str, given: tf.Tensor, lengths: tf.Tensor) -> list[tf.Operation]:
        """The checks of one input."""
        called, static = f"`{self._spec_of(name).name}`", name in self._form.static
        checks = [_same_rows(called[1:-1], given, "lengths", lengths)]
        if given.dtype.is_floating:
            checks.append(_require(tf.math.is_finite(given), f"{called} must be finite.", given))
            return checks
        for embedding in self._embeddings[name]:
            largest = embedding.input_dim - 1
            known = (given >= 0) & (given <= largest)
            checks.append(_require(known, f"{called} must lie between 0 and {largest}.", given))
            if embedding.mask_zero and not static:
                real = tf.sequence_mask(lengths, tf.shape(given)[1])
                message = f"Id 0 is padding to this model: {called} must be at least 1."
                checks.append(_require((given > 0) | ~real, message, given))
        return checks

    def _spec_of(self, name: str) -> tf.TensorSpec:
        return self.inputs[list(self._form.tensors).index(name)]

    def _checked_state(
        self, rows: tf.Tensor, name: str, state: tf.Tensor, start: tf.Tensor
    ) -> tf.Tensor:
        same = _same_rows(name, rows, "state", state), _same_rows(name, rows, "start", start)
        width, columns = self._layout.width, tf.shape(state)[1]
        right = _require(columns == width, f"`state` must have {width} columns.", columns)
        state = _after([*same, right], state)
        used = tf.math.is_finite(state) | start[:, None]
        message = "`state` must be finite: send what the last reply had."
        return _after([_require(used, message, state)], state)


class _ServedGeneration:
    """The bodies of the signatures that continue prompts.

    Args:
        model: As in `signatures`.
        vectorizer: As in `signatures`.
        served: The other signatures of the model.

    Raises:
        ValueError: As `Generator`; or if the vocabulary is not the model's.
    """

    def __init__(
        self,
        model: keras.Model,
        vectorizer: keras.layers.TextVectorization | None,
        served: _Served,
    ):
        self._generator = Generator(model)
        self._served = served
        self._excluded = excluded_ids(self._generator, vectorizer)
        if vectorizer is not None:
            self._words = tf.constant(vectorizer.get_vocabulary())
            self._separator = separator_of(vectorizer)

    def tokens(
        self, ids: tf.Tensor, lengths: tf.Tensor, stop: tf.Tensor, *sampling: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Continues prompts of ids."""
        classes = self._generator.classes
        known = (stop >= 0) & (stop < classes)
        check = _require(known, f"`stop` must lie between 0 and {classes - 1}.", stop)
        ids = self._served.checked([ids], lengths, least=1)
        texts, drawn = self._run(ids, lengths, _after([check], stop), *sampling)
        return {"ids": texts, "lengths": drawn}

    def text(self, text: tf.Tensor, stop: tf.Tensor, *sampling: tf.Tensor) -> dict[str, tf.Tensor]:
        """Continues prompts of text."""
        ids, lengths = self._served.as_ids(text)
        same = stop[:, None] == self._words
        check = _require(tf.reduce_any(same, axis=1), "`stop` must be words of the model.", stop)
        stop = _after([check], tf.argmax(same, axis=1, output_type="int32"))
        texts, drawn = self._run(ids, lengths, stop, *sampling)
        words = tf.RaggedTensor.from_tensor(tf.gather(self._words, texts), drawn)
        return {"text": tf.strings.reduce_join(words, axis=1, separator=self._separator)}

    def _run(
        self,
        ids: tf.Tensor,
        lengths: tf.Tensor,
        stop: tf.Tensor,
        steps: tf.Tensor,
        temperature: tf.Tensor,
        top_k: tf.Tensor,
        top_p: tf.Tensor,
        seed: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        warm = tf.math.is_finite(temperature) & (temperature > 0)
        checks = [
            _require(steps > 0, "`steps` must be at least 1.", steps),
            _require(warm, "`temperature` must be finite and above 0.", temperature),
            _require(top_k >= 0, "`top_k` must be at least 1, or 0 for all.", top_k),
            _require((top_p > 0) & (top_p <= 1), "`top_p` must be in (0, 1].", top_p),
        ]
        return self._generator.run(
            _after(checks, ids),
            lengths,
            steps,
            temperature,
            top_k,
            top_p,
            stop,
            tf.constant(self._excluded),
            tf.stack([0, seed]),
        )


def _spec(name: str, form: ModelInputs) -> tf.TensorSpec:
    """An input of a signature: named after the model's, where the model has several."""
    tensor = form.tensors[name]
    if name in form.static:
        return tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype, name=name)
    if not form.named:
        name = "features" if keras.backend.is_float_dtype(tensor.dtype) else "ids"
    return tf.TensorSpec([None, None, *tensor.shape[2:]], tensor.dtype, name=name)


def _check_vocabulary(
    vectorizer: keras.layers.TextVectorization, model: keras.Model, form: ModelInputs
) -> None:
    """Refuses words that the model has no row for, and text for a model of features."""
    [tensor] = form.steps.values()
    words = vectorizer.vocabulary_size()
    rows = [layer.input_dim for layer in embeddings_of_ids(model, [tensor])]
    if len(tensor.shape) > 2 or min(rows, default=words) < words:
        raise ValueError(
            "The vectorizer must be the one that the model was trained with: the model needs an "
            f"id per step, and a row of its embedding for each word. Received: {words} words, "
            f"an input of shape {tensor.shape}, embeddings of {rows} rows"
        )


def _check_names(inputs: Sequence[tf.TensorSpec]) -> None:
    own = {"text", "lengths", "state", "start", "batch_size", "new_state"}
    wrong = [spec.name for spec in inputs if spec.name in own or not spec.name.isidentifier()]
    if wrong:
        raise ValueError(
            "The inputs of an export are named after the model's inputs: choose names that are "
            f"Python identifiers, and none of {sorted(own)}. Received: inputs {wrong}"
        )


def _graph_function(
    serve: Callable, *specs: tf.TensorSpec
) -> tf.types.experimental.PolymorphicFunction:
    """A graph function that names an input of the wrong rank, which TF Serving does not check."""

    @tf.function(input_signature=specs, autograph=False)
    def function(*given):
        return serve(
            *(tf.ensure_shape(t, spec.shape) for t, spec in zip(given, specs, strict=True))
        )

    return function


def _require(condition: tf.Tensor, message: str, received: tf.Tensor) -> tf.Operation:
    received = [f"{message} Received:", received]
    return tf.debugging.Assert(tf.reduce_all(condition), received, summarize=8)


def _after(checks: list[tf.Operation], tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, for use only once the checks have passed."""
    with tf.control_dependencies(checks):
        return tf.identity(tensor)


def _same_rows(name: str, tensor: tf.Tensor, other_name: str, other: tf.Tensor) -> tf.Operation:
    rows, other_rows = tf.shape(tensor)[0], tf.shape(other)[0]
    message = f"`{name}` and `{other_name}` must have the same number of rows."
    return _require(rows == other_rows, message, tf.stack([rows, other_rows]))


def output_names(model: keras.Model, taken: Collection[str]) -> list[str]:
    """Names the model's outputs, in the order in which `keras.tree.flatten` gives them.

    Args:
        model: A functional model.
        taken: Names that the signature needs for itself.

    Returns:
        `["probability"]` for one sigmoid or softmax layer; else the keys of the dict of outputs, or
        the names of the layers that give the outputs.

    Raises:
        ValueError: If two outputs have one name, an output has none, or a name is taken.
    """
    outputs = keras.tree.flatten(model.output)
    activation = getattr(_keras.producer(outputs[0]), "activation", None)
    if len(outputs) == 1 and getattr(activation, "__name__", "") in ("sigmoid", "softmax"):
        return ["probability"]
    check_order(model.output, "outputs")
    names = sorted(model.output) if isinstance(model.output, dict) else model.output_names
    if len(set(names)) != len(outputs):
        raise ValueError(
            "Every output needs a name of its own: give the model a flat dict of outputs. "
            f"Received: {len(outputs)} outputs with the names {names}"
        )
    for name in names:
        if name in taken:
            raise ValueError(
                f"An output cannot be named {name!r}, because the export uses this name: "
                "rename the output's layer, or its key in the dict of outputs. "
                f"Received: outputs {names}"
            )
    return names
