import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import (
    VOCAB,
    random_documents,
    token_layers,
    token_model,
    two_heads,
    whole_document,
)

import keras_tbptt
from keras_tbptt.serving._signatures import signatures
from keras_tbptt.serving._stream import StreamState, functional
from keras_tbptt.text import encode, make_vectorizer

L = keras.layers
TEXTS = ["a b c d e f g h i j k l m", "b", "c a <br /> b! a", "j i h g f e"]


@pytest.fixture(scope="module")
def vectorizer():
    return make_vectorizer([" ".join("abcdefghij")], VOCAB)


@pytest.fixture(scope="module")
def served(vectorizer):
    model = token_model()
    return model, signatures(model, vectorizer)


def layers_of(layer, count):
    def build(x):
        for _ in range(count - 1):
            x = layer(6, stateful=True, return_sequences=True)(x)
        return layer(5, stateful=True)(x)

    return token_layers(lambda: build)


def padded(pieces, padding=0):
    lengths = np.array([len(piece) for piece in pieces], "int32")
    shape = (len(pieces), max(1, lengths.max()), *pieces[0].shape[1:])
    steps = np.full(shape, padding, pieces[0].dtype)
    for row, piece in zip(steps, pieces, strict=True):
        row[: len(piece)] = piece
    return tf.constant(steps), tf.constant(lengths)


def assert_every_step(reply, expected, **tolerance):
    """A reply has the steps of each row, and zeros behind."""
    assert len(reply) == len(expected)
    for row, steps in zip(np.asarray(reply), expected, strict=True):
        np.testing.assert_allclose(row[: len(steps)], steps, **tolerance)
        assert not row[len(steps) :].any()


@pytest.mark.parametrize("layer", [L.LSTM, L.GRU])
@pytest.mark.parametrize("count", [1, 3])
def test_a_stream_in_pieces_of_any_sizes_is_the_whole_document(layer, count):
    model = token_model(layers=layers_of(layer, count))
    serve = signatures(model, None)
    documents = random_documents(count=9, longest=40)
    expected = model.predict_documents(documents)
    whole = serve["serving_default"](*padded(documents))["probability"]
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    rng = np.random.default_rng(0)
    state = serve["initial_state"](9)["state"]
    read = np.zeros(9, int)
    while any(read < [len(d) for d in documents]):
        sizes = rng.integers(0, 13, 9)
        pieces = [d[a : a + n] for d, a, n in zip(documents, read, sizes, strict=True)]
        reply = serve["stream"](*padded(pieces), state, tf.zeros(9, "bool"))
        state, read = reply["state"], read + sizes
    np.testing.assert_allclose(reply["probability"], expected, atol=1e-5)


def test_streams_of_text_are_independent_of_each_other(served, vectorizer):
    model, serve = served
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghijk"), rng.integers(1, 15))) for _ in range(200)]
    expected = model.predict_documents(encode(vectorizer, texts))
    words = [text.split() for text in texts]
    kept = [np.full(serve["initial_state"](1)["state"].shape[1], np.nan, "float32")] * 200  # unread
    begun, answers = np.zeros(200, bool), np.zeros((200, 1))
    while any(words):
        chosen = rng.permutation([i for i in range(200) if words[i]])[: rng.integers(1, 40)]
        pieces = []
        for i in chosen:
            size = rng.integers(0, 6)
            pieces.append(" ".join(words[i][:size]))
            words[i] = words[i][size:]
        state = tf.constant(np.stack([kept[i] for i in chosen]))
        reply = serve["stream"](tf.constant(pieces), state, tf.constant(~begun[chosen]))
        for i, new, answer in zip(chosen, reply["state"], reply["probability"], strict=True):
            kept[i] = np.frombuffer(new.numpy().tobytes(), "float32")  # as a client may keep it
            begun[i], answers[i] = True, answer
    np.testing.assert_allclose(answers, expected, atol=1e-5)


def test_a_piece_without_a_word_changes_nothing(served):
    _, serve = served
    start, go_on = tf.constant([True]), tf.constant([False])
    first = serve["stream"](tf.constant(["a b"]), serve["initial_state"](1)["state"], start)
    again = serve["stream"](tf.constant([" ... "]), first["state"], go_on)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])


def test_what_a_request_is_padded_with_does_not_matter(served):
    model, serve = served
    documents = random_documents()
    ids, lengths = padded(documents)
    ids = tf.where(tf.sequence_mask(lengths), ids, VOCAB - 1)
    ids = tf.pad(ids, [[0, 0], [0, 20]], constant_values=VOCAB - 1)
    answers = serve["tokens"](ids, lengths)["probability"]
    np.testing.assert_allclose(answers, model.predict_documents(documents), atol=1e-5)


def test_the_same_request_gives_the_same_bytes(served):
    _, serve = served
    answers = [serve["serving_default"](tf.constant(TEXTS))["probability"].numpy() for _ in "12"]
    assert answers[0].tobytes() == answers[1].tobytes()


def rates(steps):
    x = L.GRU(4, stateful=True, return_sequences=True)(steps)
    return [L.Dense(2, name="slow")(x), L.Dense(3, name="fast")(x)]


@pytest.mark.parametrize(
    "features, window",
    [(None, 5), (None, 1), (None, 50), (3, 5)],  # no document has 50 steps
)
def test_every_step_of_streams_and_whole_documents_is_the_unwindowed_model_s(features, window):
    keras.utils.set_random_seed(0)
    if features is None:
        layers, names = two_heads, ["label", "tags"]
        given = keras.Input(batch_shape=(4, window), dtype="int32")
    else:
        layers, names = rates, ["slow", "fast"]
        given = keras.Input(batch_shape=(4, window, features))
    model = keras.Model(given, layers(given))
    serve = signatures(model, None)
    documents = random_documents(count=9, longest=23, features=features)
    expected = [
        dict(zip(names, keras.tree.flatten(whole_document(model, layers, document)), strict=True))
        for document in documents
    ]
    at_every_step = [name for name in names if name != "label"]
    lengths = [len(document) for document in documents]

    steps, given_lengths = padded(documents, padding=7)
    steps = tf.concat([steps, steps[:, -3:]], axis=1)  # more padding than is needed
    reply = serve["tokens"](steps, given_lengths)
    assert sorted(reply) == sorted([*names, "lengths"])
    np.testing.assert_array_equal(reply["lengths"], lengths)
    for name in at_every_step:
        assert reply[name].shape[:2] == steps.shape[:2]
        assert_every_step(reply[name], [one[name] for one in expected], atol=1e-6)

    rng = np.random.default_rng(0)
    state, done = serve["initial_state"](9)["state"], np.zeros(9, int)
    found = {name: [[] for _ in documents] for name in at_every_step}
    while any(done < lengths):
        sizes = rng.integers(0, 13, 9)
        pieces = [d[n : n + size] for d, n, size in zip(documents, done, sizes, strict=True)]
        given_steps, given_lengths = padded(pieces, padding=7)
        streamed = serve["stream"](given_steps, given_lengths, state, tf.zeros(9, "bool"))
        np.testing.assert_array_equal(streamed["lengths"], given_lengths)
        for name in at_every_step:
            assert streamed[name].shape[:2] == given_steps.shape[:2]
            for kept, row, n in zip(found[name], streamed[name], given_lengths, strict=True):
                assert not row[n:].numpy().any()
                kept.append(row[:n].numpy())
        state, done = streamed["state"], done + given_lengths.numpy()
    for name in at_every_step:
        for kept, one in zip(found[name], expected, strict=True):
            np.testing.assert_allclose(np.concatenate(kept), one[name], atol=1e-6)
    if "label" in names:
        labels = [one["label"] for one in expected]
        np.testing.assert_allclose(reply["label"], labels, atol=1e-6)
        np.testing.assert_allclose(streamed["label"], labels, atol=1e-6)


def test_every_step_of_texts(vectorizer):
    model = token_model(layers=two_heads)
    serve = signatures(model, vectorizer)
    expected = model.predict_documents(encode(vectorizer, TEXTS))
    whole = serve["serving_default"](tf.constant(TEXTS))
    np.testing.assert_array_equal(whole["lengths"], [13, 1, 4, 6])
    assert_every_step(whole["tags"], expected["tags"], atol=1e-6)
    np.testing.assert_allclose(whole["label"], expected["label"], atol=1e-6)
    nothing = serve["serving_default"](tf.constant([], tf.string))
    assert nothing["tags"].shape[0] == nothing["lengths"].shape[0] == 0

    first, second = ["a b c d e f g", "", "c a", "..."], ["h i j k l m", "b", "b! a", "j i h g f e"]
    state, start = serve["initial_state"](4)["state"], tf.zeros(4, "bool")
    before = serve["stream"](tf.constant(first), state, start)
    after = serve["stream"](tf.constant(second), before["state"], start)
    np.testing.assert_array_equal(before["lengths"], [7, 0, 2, 0])
    np.testing.assert_array_equal(after["lengths"], [6, 1, 2, 6])
    pairs = zip(expected["tags"], before["lengths"], strict=True)
    assert_every_step(before["tags"], [tags[:n] for tags, n in pairs], atol=1e-6)
    pairs = zip(expected["tags"], before["lengths"], strict=True)
    assert_every_step(after["tags"], [tags[n:] for tags, n in pairs], atol=1e-6)
    np.testing.assert_allclose(after["label"], expected["label"], atol=1e-6)


def test_a_piece_without_a_step_has_no_outputs_per_step():
    model = token_model(layers=two_heads)
    serve = signatures(model, None)
    documents = random_documents(count=3, longest=9)
    state, start = serve["initial_state"](3)["state"], tf.zeros(3, "bool")
    before = serve["stream"](*padded(documents), state, start)
    ids, lengths = tf.fill([3, 2], 7), tf.zeros([3], "int32")
    after = serve["stream"](ids, lengths, before["state"], start)
    np.testing.assert_array_equal(after["tags"], np.zeros([3, 2, 3]))
    np.testing.assert_array_equal(after["lengths"], [0, 0, 0])
    for name in ("label", "state"):
        np.testing.assert_array_equal(after[name], before[name])
    nothing = serve["tokens"](tf.zeros([0, 4], "int32"), tf.zeros([0], "int32"))
    assert nothing["tags"].shape == (0, 4, 3)


def test_the_last_step_alone():
    model = token_model(layers=two_heads)
    serve = signatures(model, None, last_step=True)
    documents = random_documents(count=6)
    expected = model.predict_documents(documents, last_step=True)
    state, start = serve["initial_state"](6)["state"], tf.zeros(6, "bool")
    streamed = serve["stream"](*padded(documents), state, start)
    again = serve["stream"](tf.fill([6, 1], 7), tf.zeros([6], "int32"), streamed["state"], start)
    whole = serve["tokens"](*padded(documents))
    assert sorted(whole) == ["label", "tags"]
    for reply in (whole, streamed, again):
        for name in ("label", "tags"):
            np.testing.assert_allclose(reply[name], expected[name], atol=1e-6)
    # The state holds the latest tags only where they are asked for.
    assert StreamState(model, last_step=True).width == StreamState(model).width + 3


def test_every_step_of_a_stock_sequential_model():
    build = [
        L.Embedding(VOCAB, 6, mask_zero=True),
        L.LSTM(5, stateful=True, return_sequences=True),
        L.Dense(2, activation="softmax"),
    ]
    stock = keras.Sequential([keras.Input(batch_shape=(4, 5), dtype="int32"), *build])
    recurrent = lambda: L.LSTM(5, stateful=True, return_sequences=True)  # noqa: E731
    layers = token_layers(recurrent, L.Dense(2, activation="softmax"))
    documents = random_documents(count=6)
    reply = signatures(functional(stock), None)["serving_default"](*padded(documents))
    expected = [whole_document(stock, layers, document) for document in documents]
    assert_every_step(reply["probability"], expected, atol=1e-6)


def test_every_step_in_half_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = token_model(layers=two_heads)
    finally:
        keras.config.set_dtype_policy("float32")
    serve = signatures(model, None)
    documents = random_documents(count=6)
    expected = model.predict_documents(documents)
    reply = serve["tokens"](*padded(documents))
    assert reply["tags"].dtype == tf.float16
    assert_every_step(reply["tags"], expected["tags"], atol=1e-3)


def bad_requests():
    text, ids, lengths = tf.constant(["a"]), tf.constant([[3, 4]]), tf.constant([2])
    state, start = tf.zeros([1, 11]), tf.constant([False])
    return {
        "ids` must lie between 0 and 39": ("tokens", ids + 40, lengths),
        "ids` must lie between 0": ("tokens", ids - 5, lengths),
        "`ids` must be at least 1": ("tokens", tf.constant([[3, 0]]), lengths),
        "lengths` must lie between 1": ("tokens", ids, lengths - 2),
        "lengths` must lie": ("tokens", ids, lengths + 1),
        "ids` and `lengths` must have the same number": ("tokens", ids, tf.constant([2, 2])),
        "state` must have 11 columns": ("stream", text, state[:, 1:], start),
        "state` must be finite": ("stream", text, state * np.nan, start),
        "text` and `state` must have the same number": ("stream", text, tf.zeros([2, 11]), start),
        "text` and `start` must have": ("stream", text, state, tf.constant([False, True])),
        "batch_size` must not be negative": ("initial_state", tf.constant(-1)),
    }


@pytest.mark.parametrize("message", bad_requests())
def test_a_bad_request_is_named_and_leaves_the_model_working(served, message):
    _, serve = served
    before = serve["serving_default"](tf.constant(TEXTS))["probability"].numpy()
    name, *request = bad_requests()[message]
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        serve[name](*request)
    np.testing.assert_array_equal(
        serve["serving_default"](tf.constant(TEXTS))["probability"], before
    )


def test_strange_texts_get_an_answer(served):
    _, serve = served
    texts = [b"", b"\xff\xfe\x00", b"a" * 10_000_000, "\u202e a \U0001f600".encode()]
    answers = serve["serving_default"](tf.constant(texts))["probability"]
    assert np.isfinite(answers).all() and answers.shape == (4, 1)
    assert serve["serving_default"](tf.constant([], tf.string))["probability"].shape == (0, 1)


def test_a_request_of_another_rank_is_refused_by_name(vectorizer, tmp_path):
    model = token_model()
    loaded = tf.saved_model.load(
        str(keras_tbptt.export_saved_model(model, tmp_path, vectorizer=vectorizer))
    )
    text, state, start = tf.constant(["a"]), tf.zeros([1, 11]), tf.constant([True])
    ids, lengths = tf.constant([[3, 4]]), tf.constant([2])
    requests = {
        "text": ("serving_default", {"text": text[0]}),
        "ids": ("tokens", {"ids": ids[0], "lengths": lengths}),
        "lengths": ("tokens", {"ids": ids, "lengths": lengths[0]}),
        "state": ("stream", {"text": text, "state": state[0], "start": start}),
        "start": ("stream", {"text": text, "state": state, "start": start[0]}),
    }
    for name, (signature, request) in requests.items():
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"tensor {name} .*expected shape"):
            loaded.signatures[signature](**request)
    answer = loaded.signatures["serving_default"](text=text)["probability"]
    assert np.isfinite(answer).all()


def test_ids_are_checked_against_a_nested_embedding_too():
    nested = lambda ids: L.LSTM(3, stateful=True)(  # noqa: E731
        keras.Sequential([L.Embedding(40, 6), L.Dense(4)])(ids)
    )
    serve = signatures(token_model(layers=nested), None)
    with pytest.raises(tf.errors.InvalidArgumentError, match="ids` must lie between 0 and 39"):
        serve["tokens"](tf.constant([[3, 40]]), tf.constant([2]))
    assert serve["tokens"](tf.constant([[3, 0]]), tf.constant([2]))  # 0 is an id like any other
