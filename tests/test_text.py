import json
import tracemalloc

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ANY_TEXT, STRANGE_TEXTS

from keras_tbptt.text import (
    decode,
    encode,
    make_vectorizer,
    standardize,
    write_vocabulary,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's GREAT!", "its great"),
        ("bad.Really<br /><br />bad", "bad really bad"),
        ("3 < 4 and <b>bold</b>", "3 4 and bold"),
        ("Ça, c\u2019est \u00c9MOUVANT", "ça cest émouvant"),
        ("", "[UNK]"),
        (" ...\n\t", "[UNK]"),
        ("a\0b\u00a0c\u3000d\u2028e\x85f\x1cg\0", "a b c d e f g"),
        (b"caf\xff noir", "caf\ufffd noir"),
        ("\U0001f600 \u202eabc", "\U0001f600 \u202eabc"),
    ],
)
def test_texts_become_words(text, words):
    assert standardize(tf.constant([text])).numpy()[0].decode() == words


def test_words_become_ids_and_every_text_has_one():
    vectorizer = make_vectorizer(["good good film", "bad film", "film"], vocab_size=4)
    assert vectorizer.get_vocabulary() == ["", "[UNK]", "film", "good"]
    ids = encode(vectorizer, ["Good film!", "bad", "", "good " * 3])
    assert ids.dtype == tf.int32
    assert ids.to_list() == [[3, 2], [1], [1], [3, 3, 3]]


@pytest.mark.parametrize(
    ("settings", "standardize", "split"),
    [
        ({}, "keras_tbptt>standardize", "whitespace"),
        ({"standardize": None, "split": "character"}, None, "character"),
    ],
)
def test_a_vocabulary_is_written_with_how_texts_become_its_words(
    settings, standardize, split, tmp_path
):
    texts = ["Caf\u00e9 \U0001f600\nno", 'no "\u2028']
    vectorizer = make_vectorizer(texts, **settings)
    path = write_vocabulary(vectorizer, tmp_path / "new" / "vocabulary.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    words = written.pop("words")
    assert written == {"standardize": standardize, "split": split}
    assert words == vectorizer.get_vocabulary()
    if split == "character":
        assert [words.index(c) for c in texts[0]] == encode(vectorizer, texts[:1])[
            0
        ].numpy().tolist()
    assert [p.name for p in path.parent.iterdir()] == ["vocabulary.json"]


def test_many_texts_are_encoded_in_their_order():
    texts = np.array([f"w{i % 7}" for i in range(3_000)], dtype=object)
    vectorizer = make_vectorizer(texts, vocab_size=20)
    ids = encode(vectorizer, texts)
    assert ids.to_list() == vectorizer(texts).to_list()


@pytest.fixture(scope="module")
def strange():
    return make_vectorizer(STRANGE_TEXTS, vocab_size=200)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=5))
def test_any_text_becomes_ids_whatever_it_comes_with(strange, texts):
    ids = encode(strange, texts)
    assert all(ids.row_lengths() >= 1)
    assert 1 <= min(ids.values) and max(ids.values) < strange.vocabulary_size()
    for text, row in zip(texts, ids.to_list(), strict=True):
        assert encode(strange, [text]).to_list() == [row]


@settings(max_examples=50, deadline=None)
@given(text=ANY_TEXT)
def test_no_text_hides_what_follows_it(text):
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    alone, followed = standardize(tf.constant([text, text + b" end"])).numpy()
    assert followed == (b"end" if alone == b"[UNK]" else alone + b" end")


@settings(max_examples=10, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=9))
def test_any_vocabulary_survives_saving(tmp_path_factory, texts):
    vectorizer = make_vectorizer([*texts, *STRANGE_TEXTS], vocab_size=300)
    model = keras.Sequential([vectorizer])
    expected = model(tf.constant(["a b", "abc"])).to_list()
    path = tmp_path_factory.mktemp("saved") / "vectorizer.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert loaded.layers[0].get_vocabulary() == vectorizer.get_vocabulary()
    assert loaded(tf.constant(["a b", "abc"])).to_list() == expected


def test_one_long_text_does_not_make_all_of_them_long(strange):
    tracemalloc.start()
    try:
        encode(strange, ["w" * 100_000] + ["a"] * 500)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("read", [encode, lambda _, texts: make_vectorizer(texts, 10)])
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one text.*shape \\(0,\\)"),
        ("a text", "a flat list.*Received: str"),
        ([["a", "b"]], "a flat list.*shape \\(1, 2\\)"),
        (["a", None], "leave out missing texts.*Received: texts\\[1\\]=None"),
        (["a", 1.5], "must be str or bytes.*Received: texts\\[1\\]=1.5"),
    ],
)
def test_what_is_no_text_is_refused(strange, read, texts, message):
    with pytest.raises(ValueError, match=message):
        read(strange, texts)


def test_a_vectorizer_that_pads_is_refused():
    padding = keras.layers.TextVectorization(vocabulary=["good", "film"])
    with pytest.raises(ValueError, match=r"must not pad.*ragged=True.*Received: ragged=False"):
        encode(padding, ["good film", "good"])


def test_characters_keep_case_and_line_breaks_through_every_file(tmp_path):
    text = "To be,\nor\tnot\r\nto \u2028 be"
    vectorizer = make_vectorizer([text], standardize=None, split="character")
    ids = encode(vectorizer, [text])
    assert decode(vectorizer, ids[0]) == text
    keras.Sequential([keras.Input((), dtype="string"), vectorizer]).save(tmp_path / "v.keras")
    loaded = keras.models.load_model(tmp_path / "v.keras").layers[-1]
    assert loaded.get_vocabulary() == vectorizer.get_vocabulary()
    assert encode(loaded, [text]).to_list() == ids.to_list()


def test_words_are_decoded_with_spaces():
    vectorizer = make_vectorizer(["The The The cat cat <eos>"], 4, standardize=None)
    assert decode(vectorizer, encode(vectorizer, ["The cat  the"])[0]) == "The cat [UNK]"
    assert decode(vectorizer, [2, 0, 0]) == "The"
    with pytest.raises(ValueError, match=r"has 4\. Received: ids from 2 to 4"):
        decode(vectorizer, [2, 4])


@pytest.mark.parametrize("wrong", [b"caf\xe9", "a\0b", "a \ud800"])
@pytest.mark.parametrize("split", ["whitespace", "character"])
def test_without_standardization_a_text_that_is_no_utf8_is_an_error(wrong, split):
    with pytest.raises(ValueError, match=r"must be UTF-8 .* Received: texts\[1\]="):
        make_vectorizer(["a caf\u00e9", wrong], standardize=None, split=split)
