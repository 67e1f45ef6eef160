import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tbptt
from keras_tbptt import DocumentWindows, TBPTTModel, generate
from keras_tbptt.state import get_states

CLASSES = 12
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8, 9, 7]]

RECURRENT = {
    "lstm": lambda **kw: keras.layers.LSTM(8, **kw),
    "our lstm": lambda **kw: keras_tbptt.layers.LSTM(8, **kw),
    "gru": lambda **kw: keras.layers.GRU(8, **kw),
    "cells": lambda **kw: keras.layers.RNN(
        [keras.layers.GRUCell(8), keras.layers.LSTMCell(8)], **kw
    ),
}


def language_model(
    recurrent="our lstm",
    lanes=4,
    window=3,
    activation=None,
    per_step=True,
    cls=TBPTTModel,
    **kwargs,
):
    keras.utils.set_random_seed(3)
    tokens = keras.Input(batch_shape=(lanes, window), dtype="int32")
    wide = {"embeddings_initializer": keras.initializers.RandomNormal(stddev=1.0)}
    x = keras.layers.Embedding(CLASSES, 6, **wide, **kwargs)(tokens)
    x = keras.layers.Dropout(0.5)(x)
    x = RECURRENT[recurrent](stateful=True, return_sequences=per_step)(x)
    wide = keras.initializers.RandomNormal(stddev=2.0)
    return cls(tokens, keras.layers.Dense(CLASSES, activation, kernel_initializer=wide)(x))


@pytest.mark.parametrize("recurrent", RECURRENT)
@pytest.mark.parametrize(
    ("lanes", "window", "activation", "mask_zero"), [(4, 3, None, False), (1, 7, "softmax", True)]
)
def test_each_step_is_that_of_the_model_on_the_growing_text(
    recurrent, lanes, window, activation, mask_zero
):
    model = language_model(recurrent, lanes, window, activation, mask_zero=mask_zero)
    generated = generate(model, PROMPTS, 9, top_k=1)
    texts = [list(prompt) for prompt in PROMPTS]
    for _ in range(9):
        for text, steps in zip(texts, model.predict_documents(texts), strict=True):
            text.append(int(np.argmax(steps[-1][mask_zero:])) + mask_zero)
    for prompt, text, new in zip(PROMPTS, texts, generated, strict=True):
        assert new.dtype == np.int32
        assert text[len(prompt) :] == new.tolist()


def test_a_model_of_the_last_step_generates_too():
    model = language_model(per_step=False)
    expected = generate(language_model(), PROMPTS, 5, top_k=1)
    for row, other in zip(generate(model, PROMPTS, 5, top_k=1), expected, strict=True):
        assert row.tolist() == other.tolist()


def test_stock_models_and_half_precision_generate():
    expected = [row.tolist() for row in generate(language_model(), PROMPTS, 5, top_k=1)]
    stock = language_model(cls=keras.Model)
    assert [row.tolist() for row in generate(stock, PROMPTS, 5, top_k=1)] == expected
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        half = language_model()
    finally:
        keras.config.set_dtype_policy("float32")
    assert len(generate(half, PROMPTS, 5)[0]) == 5


def test_a_sequential_model_compiles_once():
    layers = language_model(cls=keras.Model).layers[1:]
    model = keras.Sequential([keras.Input(batch_shape=(4, 3), dtype="int32"), *layers])
    first = generate(model, PROMPTS, 4, seed=1)
    _, graphs = model._tbptt_graphs
    second = generate(model, PROMPTS, 4, seed=1)
    assert len(graphs) == 1 and model._tbptt_graphs[1] is graphs
    assert [row.tolist() for row in first] == [row.tolist() for row in second]


def test_generation_and_prediction_use_the_weights_that_lora_adds():
    model, merged = language_model(), language_model()
    head = model.layers[-1]
    model.predict_documents(PROMPTS)
    before = generate(model, PROMPTS, 8, top_k=1)
    head.enable_lora(2)
    rng = np.random.default_rng(0)
    for kernel in (head.lora_kernel_a, head.lora_kernel_b):
        kernel.assign(rng.normal(0, 3, kernel.shape))
    merged.layers[-1].set_weights([head.kernel, head.bias])  # with what LoRA adds
    after, expected = (generate(one, PROMPTS, 8, top_k=1) for one in (model, merged))
    assert [row.tolist() for row in after] == [row.tolist() for row in expected]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))
    ours, theirs = (one.predict_documents(PROMPTS) for one in (model, merged))
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(our, their, atol=1e-5)


def test_training_and_generation_do_not_disturb_each_other():
    windows = DocumentWindows.next_step(np.arange(200) % 11 + 1, window=3, lanes=4)

    class Generates(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            texts.append(generate(self.model, PROMPTS, 4, seed=1)[0].tolist())

    weights, texts = [], []
    for callbacks in ([], [Generates()]):
        model = language_model()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(windows, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
        weights.append(model.get_weights())
    for alone, with_generation in zip(*weights, strict=True):
        np.testing.assert_array_equal(alone, with_generation)
    assert len(texts) == len(windows)
    # The graph of the first call sees the weights as they are now.
    before, states = generate(model, PROMPTS, 20, top_k=1), get_states(model)
    model.set_weights([-weight for weight in model.get_weights()])
    after = generate(model, PROMPTS, 20, top_k=1)
    assert any(a.tolist() != b.tolist() for a, b in zip(before, after, strict=True))
    assert len(states) == 2


PROBABILITIES = np.array([0.02, 0.4, 0.05, 0.2, 0.01, 0.01, 0.01, 0.15, 0.1, 0.03, 0.01, 0.01])


def expected_frequencies(temperature=1.0, top_k=None, top_p=None):
    p = PROBABILITIES ** (1 / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[:top_k]
    q = np.zeros_like(p)
    q[kept] = p[kept]
    q /= q.sum()
    if top_p is not None:
        ranked = q[order]
        few = int(np.searchsorted(np.cumsum(ranked), top_p - 1e-9)) + 1
        q[order[few:]] = 0
    return q / q.sum()


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 4}, {"top_p": 0.7},
     {"top_k": 5, "top_p": 0.9}, {"top_k": 99, "top_p": 1.0}],
)  # fmt: skip
def test_steps_are_drawn_as_often_as_they_are_likely(activation, options):
    model = language_model(activation=activation)
    kernel, bias = model.layers[-1].weights
    kernel.assign(tf.zeros_like(kernel))
    bias.assign(np.log(PROBABILITIES))
    drawn = np.stack(generate(model, [[1]] * 400, 25, seed=7, **options))
    frequencies = np.bincount(drawn.reshape(-1), minlength=CLASSES) / drawn.size
    expected = expected_frequencies(**options)
    assert set(np.flatnonzero(frequencies)) <= set(np.flatnonzero(expected))
    deviation = np.sqrt(expected * (1 - expected) / drawn.size)
    assert np.all(np.abs(frequencies - expected) <= 4.5 * deviation + 1e-9)
    assert len({tuple(row) for row in drawn}) > 300  # each prompt is drawn for by itself


def test_the_same_seed_draws_the_same_steps():
    model = language_model()

    def texts(seed):
        return [row.tolist() for row in generate(model, PROMPTS, 30, seed=seed, temperature=3.0)]

    assert texts(5) == texts(5) != texts(6)
    keras.utils.set_random_seed(1)
    first, second = texts(None), texts(None)
    assert first != second
    keras.utils.set_random_seed(1)
    assert texts(None) == first


def test_padding_is_never_drawn_where_it_is_padding():
    for mask_zero in (False, True):
        model = language_model(mask_zero=mask_zero)
        kernel, bias = model.layers[-1].weights
        kernel.assign(tf.zeros_like(kernel))
        bias.assign([9.0] + [0.0] * (CLASSES - 1))
        (drawn,) = generate(model, [[1]], 20, seed=1)
        assert (0 in drawn) is not mask_zero


def test_a_text_ends_before_its_stop():
    model = language_model()
    whole = generate(model, PROMPTS, 30, seed=2, temperature=2.0)
    stops = [4, 7]
    for full, short in zip(
        whole, generate(model, PROMPTS, 30, seed=2, temperature=2.0, stop=stops), strict=True
    ):
        ends = [i for i, step in enumerate(full) if step in stops]
        assert short.tolist() == full[: min(ends, default=30)].tolist()


def test_texts_are_continued_in_words():
    words = WORDS
    vectorizer = keras_tbptt.text.make_vectorizer([" ".join(words)], standardize=None)
    model = language_model()
    prompts = ["a b c", "d ? e"]
    texts = generate(model, prompts, 40, seed=1, temperature=5.0, vectorizer=vectorizer)
    assert all(len(text.split()) == 40 and set(text.split()) <= set(words) for text in texts)
    stopped = generate(
        model, prompts, 40, seed=1, temperature=5.0, vectorizer=vectorizer, stop="<eos>"
    )
    for text, short in zip(texts, stopped, strict=True):
        assert (text + " ").split("<eos>")[0].strip() == short
    with pytest.raises(ValueError, match=r"words of the vocabulary\. Received: '<end>'"):
        generate(model, prompts, 4, vectorizer=vectorizer, stop=["<end>"])
    with pytest.raises(ValueError, match=r"Received: a vocabulary of 3, 12 classes"):
        other = keras_tbptt.text.make_vectorizer(["a"])
        generate(model, prompts, 4, vectorizer=other)
    with pytest.raises(ValueError, match=r"at least one step"):
        generate(model, ["", "a"], 4, vectorizer=vectorizer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "`prompts` must hold at least one"),
        ({"prompts": [[]]}, "at least one step"),
        ({"prompts": [[CLASSES]]}, r"below the vocabulary.*Received: id 12"),
        ({"prompts": [[-1]]}, r"`prompts` must be ids >= 0"),
        ({"prompts": [[0.5]]}, "Received: floats"),
        ({"steps": 0}, r"`steps` must be an integer >= 1\. Received: steps=0"),
        ({"temperature": 0}, r"top_k=1\. Received: temperature=0"),
        ({"temperature": float("nan")}, r"Received: temperature=nan"),
        ({"top_k": 0}, r"`top_k` must be an integer >= 1\. Received: top_k=0"),
        ({"top_p": 0}, r"`top_p` must be in \(0, 1\]\. Received: top_p=0"),
        ({"top_p": 1.5}, r"Received: top_p=1\.5"),
        ({"stop": CLASSES}, r"below 12\. Received: stop=\[12\]"),
        ({"seed": -1}, r"Received: seed=-1"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, message):
    model = language_model()
    with pytest.raises(ValueError, match=message):
        generate(model, **{"prompts": PROMPTS, "steps": 3, **arguments})


@pytest.mark.filterwarnings("ignore:These recurrent layers are not stateful")
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (keras.layers.Conv1D(6, 3, padding="causal"), r"Received: layers \['conv1d"),
        (keras.layers.GRU(6, return_sequences=True), r"Received: layers \['gru"),
        (keras.layers.Lambda(lambda x: keras.ops.cumsum(x, axis=1)), "such as a convolution"),
    ],
)
def test_a_model_that_looks_at_other_steps_of_the_window_is_refused(layer, message):
    tokens = keras.Input(batch_shape=(2, 5), dtype="int32")
    x = layer(keras.layers.Embedding(CLASSES, 6)(tokens))
    x = keras.layers.LSTM(6, stateful=True, return_sequences=True)(x)
    model = TBPTTModel(tokens, keras.layers.Dense(CLASSES)(x))
    if "such as" in message:  # found in what the model gives
        model.set_weights([weight * 5 for weight in model.get_weights()])
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, 3)


def test_a_model_of_floats_or_of_one_class_is_refused():
    steps = keras.Input(batch_shape=(2, 5, 3))
    x = keras.layers.LSTM(6, stateful=True, return_sequences=True)(steps)
    with pytest.raises(ValueError, match="a model of ids"):
        generate(TBPTTModel(steps, keras.layers.Dense(CLASSES)(x)), PROMPTS, 3)
    tokens = keras.Input(batch_shape=(2, 5), dtype="int32")
    x = keras.layers.Embedding(CLASSES, 6)(tokens)
    x = keras.layers.LSTM(6, stateful=True, return_sequences=True)(x)
    with pytest.raises(ValueError, match="probabilities of the next id"):
        generate(TBPTTModel(tokens, keras.layers.Dense(1)(x)), PROMPTS, 3)
    with pytest.raises(ValueError, match="a row for each class"):
        generate(TBPTTModel(tokens, keras.layers.Dense(CLASSES + 1)(x)), PROMPTS, 3)


WORDS = "<eos> a b c d e f g h i".split()  # 10, and padding, and the unknown word


def exported(path, vectorizer=None, **kwargs):
    model = language_model(**kwargs)
    path = keras_tbptt.export_saved_model(model, path, vectorizer, generation=True)
    return model, tf.saved_model.load(str(path)).signatures


def settings(steps=8, temperature=2.0, top_k=0, top_p=1.0, seed=5):
    return {
        "steps": tf.constant(steps),
        "temperature": tf.constant(temperature),
        "top_k": tf.constant(top_k),
        "top_p": tf.constant(top_p),
        "seed": tf.constant(seed),
    }


def test_an_export_generates_what_the_model_generates(tmp_path):
    vectorizer = keras_tbptt.text.make_vectorizer([" ".join(WORDS)], standardize=None)
    model, served = exported(tmp_path, vectorizer, mask_zero=True)
    kwargs = {"temperature": 2.0, "seed": 5, "top_k": 4, "top_p": 0.9}
    sampling = settings(top_k=4, top_p=0.9)
    prompts = ["a b c", "d"]
    expected = generate(model, prompts, 8, vectorizer=vectorizer, stop="i", **kwargs)
    found = served["generate"](text=tf.constant(prompts), stop=tf.constant(["i"]), **sampling)
    assert [text.decode() for text in found["text"].numpy()] == expected

    model, served = exported(tmp_path / "ids")
    ids = tf.ragged.constant(PROMPTS).to_tensor()
    lengths = tf.constant([len(prompt) for prompt in PROMPTS])
    found = served["generate_tokens"](ids=ids, lengths=lengths, stop=tf.constant([7]), **sampling)
    expected = generate(model, PROMPTS, 8, stop=7, **kwargs)
    for row, count, new in zip(found["ids"].numpy(), found["lengths"], expected, strict=True):
        assert row[: int(count)].tolist() == new.tolist()
        assert not row[int(count) :].any()


def test_characters_of_an_export_keep_their_spaces(tmp_path):
    vectorizer = keras_tbptt.text.make_vectorizer(
        ["a b\nc defgh"], standardize=None, split="character"
    )
    model, served = exported(tmp_path, vectorizer)
    state = served["initial_state"](batch_size=tf.constant(1))["state"]
    pieces = []
    for piece in ("a", " ", "\n", "b "):
        reply = served["stream"](
            text=tf.constant([piece]), state=state, start=tf.constant([not pieces])
        )
        state = reply["state"]
        (name,) = set(reply) - {"state", "lengths"}
        pieces.append(reply[name].numpy()[0])
    (ids,) = keras_tbptt.text.encode(vectorizer, ["a \nb "]).to_list()
    whole = model.predict_documents([ids])[0]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)
    with pytest.raises(tf.errors.InvalidArgumentError, match="at least one step"):
        served["serving_default"](text=tf.constant(["a", ""]))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("export"))[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"temperature": 0.0}, "`temperature` must be finite and above 0"),
        ({"top_k": -1}, "`top_k` must be at least 1, or 0 for all"),
        ({"top_p": 0.0}, "`top_p` must be in"),
    ],
)
def test_a_bad_request_is_named(served, changed, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        served["generate_tokens"](
            ids=tf.constant([[1]]), lengths=tf.constant([1]), stop=tf.constant([], "int32"),
            **settings(**changed),
        )  # fmt: skip


def test_only_a_model_that_can_generate_is_exported_so(tmp_path):
    steps = keras.Input(batch_shape=(2, 5, 3))
    x = keras.layers.LSTM(6, stateful=True, return_sequences=True)(steps)
    model = TBPTTModel(steps, keras.layers.Dense(CLASSES)(x))
    with pytest.raises(ValueError, match="a model of ids"):
        keras_tbptt.export_saved_model(model, tmp_path / "model", generation=True)
    assert not (tmp_path / "model").exists()


def test_outputs_that_are_no_numbers_are_refused_and_not_remembered():
    model = language_model(activation="softmax")
    sound = model.get_weights()
    expected = generate(model, PROMPTS, 5, seed=0)
    again = language_model(activation="softmax")
    again.set_weights([np.full_like(weight, np.nan) for weight in sound])
    with pytest.raises(ValueError, match=r"no numbers.*Received: model"):
        generate(again, PROMPTS, 5, seed=0)
    again.set_weights(sound)
    for one, other in zip(expected, generate(again, PROMPTS, 5, seed=0), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_coldest_temperature_draws_the_likeliest():
    model = language_model()
    head = model.layers[-1]
    head.set_weights([100 * weight for weight in head.get_weights()])  # infinite by 1e-37
    likeliest = generate(model, PROMPTS, 5, top_k=1)
    for one, other in zip(likeliest, generate(model, PROMPTS, 5, temperature=1e-37), strict=True):
        np.testing.assert_array_equal(one, other)


def test_classes_that_have_all_underflowed_are_drawn_from():
    """All the mass is on padding, which is never drawn."""
    model = language_model(activation="softmax", mask_zero=True)
    head = model.layers[-1]
    head.set_weights([np.zeros_like(head.kernel), np.eye(CLASSES, dtype="float32")[0] * 200])
    assert all((new > 0).all() for new in generate(model, PROMPTS, 5, seed=0))
