import numpy as np
import pytest
from toys import VOCAB, token_model

import keras_tbptt
from experiments.arriving import pieces
from experiments.exported import Exported, read, read_each
from keras_tbptt.text import make_vectorizer

TEXT = "A b, c <br /> d e? f g h i j k \U0001f600 l m - n \u05d0\u05d1 o p q r s t u v w".encode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    vectorizer = make_vectorizer([" ".join("abcdefghij")], VOCAB)
    keras_tbptt.export_saved_model(token_model(), path, vectorizer, version=9)
    keras_tbptt.export_saved_model(token_model(), path, vectorizer, version=10)
    return Exported(path)


def test_the_newest_version_is_loaded(model):
    assert model.version.name == "10"
    assert model.streams and not model.generates


@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_the_words_of_a_piece_have_the_probabilities_of_words_that_come_alone(model, size):
    alone = list(read(model.predict, pieces([TEXT])))
    together = [p for new in read_each(model.predict, pieces([TEXT], size)) for p in new]
    assert [(p.words, p.text) for p in together] == [(p.words, p.text) for p in alone]
    values = [p.probability for p in together]
    np.testing.assert_allclose(values, [p.probability for p in alone], atol=1e-6)
    whole = model.predict({"text": [TEXT]})["probability"].item()
    assert values[-1] == pytest.approx(whole, abs=1e-6) and len(set(values)) > 5
