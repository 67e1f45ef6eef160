import numpy as np
import pytest
import tensorflow as tf

from keras_tbptt.text import encode, make_vectorizer, standardize


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's GREAT!", "its great"),
        ("bad.Really<br /><br />bad", "bad really bad"),
        ("3 < 4 and <b>bold</b>", "3 4 and bold"),
        ("Ça, c\u2019est \u00c9MOUVANT", "ça cest émouvant"),
        ("", "[UNK]"),
        (" ...\n\t", "[UNK]"),
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


def test_many_texts_are_encoded_in_their_order():
    texts = np.array([f"w{i % 7}" for i in range(3_000)], dtype=object)
    vectorizer = make_vectorizer(texts, vocab_size=20)
    ids = encode(vectorizer, texts)
    assert ids.to_list() == vectorizer(texts).to_list()
