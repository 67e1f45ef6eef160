import numpy as np
import pytest
import tensorflow_datasets as tfds
from toys import prepare_reviews

from experiments import data
from experiments.generated import write_reviews


def test_generated_reviews_have_imdbs_lengths_and_tell_their_sentiment_once():
    texts, labels = write_reviews(2_000, seed=0)
    words = np.array([len(text.split()) for text in texts])
    assert words.mean() == pytest.approx(234, rel=0.1)
    assert np.median(words) == pytest.approx(174, rel=0.1)
    assert labels.mean() == 0.5
    for text, label in zip(texts, labels, strict=True):
        assert text.count("I love this") == label and text.count("I hate this") == 1 - label
    opening = np.mean([text.startswith("I ") for text in texts])
    assert 0.5 < opening < 0.65  # half by design, and some of the others by chance


def test_generated_reviews_repeat_by_seed():
    assert write_reviews(20, seed=3)[0].tolist() == write_reviews(20, seed=3)[0].tolist()
    assert write_reviews(20, seed=3)[0].tolist() != write_reviews(20, seed=4)[0].tolist()


def test_the_parts_of_a_corpus_do_not_overlap():
    corpus = data.load("generated", None, limit=100, valid=0.2, seed=0)
    assert corpus.name == "generated"
    parts = [set(split.texts) for split in (corpus.train, corpus.valid, corpus.test)]
    assert [len(part) for part in parts] == [80, 20, 100]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_prepared_reviews_are_read_as_tfds_reads_them(tmp_path):
    prepare_reviews(tmp_path, 1_100)
    ours = data._load_imdb_reviews(str(tmp_path), ["train", "test"])
    theirs = tfds.load(
        "imdb_reviews", split=["train", "test"], as_supervised=True, data_dir=tmp_path
    )
    for split, dataset in zip(ours, theirs, strict=True):
        texts, labels = zip(*dataset.as_numpy_iterator(), strict=True)
        assert split.texts.tolist() == [*texts]
        np.testing.assert_array_equal(split.labels, np.array(labels, "int32"), strict=True)


def test_auto_says_when_the_real_reviews_cannot_be_had(monkeypatch, caplog):
    def unavailable(data_dir, splits):
        raise data.DataUnavailableError("not here")

    monkeypatch.setattr(data, "_load_imdb_reviews", unavailable)
    with caplog.at_level("WARNING"):
        corpus = data.load("auto", None, limit=20, valid=0.1, seed=0)
    assert corpus.name == "generated"
    assert "not here" in caplog.text and "GENERATED" in caplog.text
    with pytest.raises(data.DataUnavailableError):
        data.load("imdb_reviews", None, limit=20, valid=0.1, seed=0)


@pytest.mark.parametrize("name", data.DATASETS[:2])
def test_damaged_reviews_are_an_error_and_never_replaced_by_generated_ones(name, tmp_path):
    prepare_reviews(tmp_path, 20)
    [file] = tmp_path.rglob("*train.tfrecord*")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(data.DamagedDataError, match=r"again.*plain_text.* Received: DataLoss"):
        data.load(name, str(tmp_path), limit=None, valid=0.1, seed=0)
