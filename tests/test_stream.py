import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import VOCAB, random_documents, token_layers, token_model

import keras_tbptt
from keras_tbptt.serving._signatures import signatures
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


def padded(pieces):
    lengths = np.array([len(piece) for piece in pieces], "int32")
    ids = np.zeros((len(pieces), max(1, lengths.max())), "int32")
    for row, piece in zip(ids, pieces, strict=True):
        row[: len(piece)] = piece
    return tf.constant(ids), tf.constant(lengths)


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


def test_features_and_outputs_per_step_and_several_outputs():
    steps = keras.Input(batch_shape=(4, 5, 3))
    x = L.GRU(4, stateful=True, return_sequences=True)(steps)
    outputs = {"rate": L.Dense(2)(x), "label": L.Dense(1)(L.LSTM(3, stateful=True)(x))}
    model = keras_tbptt.TBPTTModel(steps, outputs)
    serve = signatures(model, None)
    documents = random_documents(count=6, features=3)
    batch = tf.ragged.constant([d.tolist() for d in documents], ragged_rank=1)
    lengths = tf.cast(batch.row_lengths(), "int32")
    expected = model.predict_documents(documents, last_step=True)
    state, start = serve["initial_state"](6)["state"], tf.zeros(6, "bool")
    streamed = serve["stream"](batch.to_tensor(), lengths, state, start)
    for answer in (serve["serving_default"](batch.to_tensor(), lengths), streamed):
        for name in ("rate", "label"):
            np.testing.assert_allclose(answer[name], expected[name], atol=1e-5)


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
