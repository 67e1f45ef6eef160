"""Reviews as ids, kept from run to run."""

import os

import numpy as np
import pytest

from experiments import data, encoded
from keras_tbptt import text

TEXTS = np.array(["a good film", "bad", "not good at all", "a bad film"], object)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A directory as tensorflow-datasets prepares it, and the calls that read its texts."""
    folder = tmp_path / "tfds/imdb_reviews/plain_text/1.0.0"
    folder.mkdir(parents=True)
    (folder / "train.tfrecord").write_bytes(b"records")
    calls = []

    def load(name, *arguments):
        calls.append(arguments)
        split = data.Split(TEXTS, np.array([1, 0, 0, 1], "int32"))
        return data.Corpus("imdb_reviews", split, split.take([0]), split.take([1, 2]))

    monkeypatch.setattr(data, "load", load)
    return folder, calls


def load(folder, cache_dir, name="auto", vocab_size=20, seed=0):
    return encoded.load(name, str(folder.parents[2]), None, 0.1, seed, vocab_size, str(cache_dir))


def assert_same(one, other):
    assert one.name == other.name
    for split in encoded.SPLITS:
        for name, array in vars(one.splits[split]).items():
            np.testing.assert_array_equal(array, getattr(other.splits[split], name), strict=True)
    np.testing.assert_array_equal(
        one.vectorizer(["A <br/>good new film"]).to_tensor(),
        other.vectorizer(["A <br/>good new film"]).to_tensor(),
    )


def test_texts_are_read_once(prepared, tmp_path):
    folder, calls = prepared
    first, second = (load(folder, tmp_path / "cache") for _ in range(2))
    assert len(calls) == 1
    assert_same(first, second)
    assert first.splits["valid"].offsets.tolist() == [0, 3]


def test_the_test_is_read_apart_and_once(prepared, tmp_path):
    folder, calls = prepared
    corpora = [load(folder, tmp_path / "cache", seed=seed) for seed in (0, 1)]
    assert len(calls) == 2
    arguments = str(folder.parents[2]), None
    first, second = (
        encoded.load_test(corpus, *arguments, seed, str(tmp_path / "cache"))
        for seed, corpus in enumerate(corpora)
    )
    assert len(calls) == 3  # both seeds have the same words here
    np.testing.assert_array_equal(first.ids, text.encode(corpora[0].vectorizer, TEXTS[1:3]).values)
    for name, array in vars(first).items():
        np.testing.assert_array_equal(array, getattr(second, name), strict=True)
    assert first.labels.tolist() == [0, 0] and first.offsets.tolist() == [0, 1, 5]


def test_what_is_kept_belongs_to_files_and_arguments(prepared, tmp_path):
    folder, calls = prepared
    load(folder, tmp_path / "cache")
    load(folder, tmp_path / "cache", vocab_size=5)
    assert len(calls) == 2
    os.utime(folder / "train.tfrecord", ns=(1, 1))
    load(folder, tmp_path / "cache")
    assert len(calls) == 3


def test_what_is_kept_belongs_to_the_vocabulary_of_an_encoder(prepared, tmp_path):
    folder, calls = prepared
    for words in (["good", "film"], ["bad", "film"], ["good", "film"]):
        vectorizer = text.make_vectorizer([" ".join(words)], standardize=text.standardize)
        corpus = load(folder, tmp_path / "cache", vocab_size=vectorizer)
        assert corpus.vectorizer.get_vocabulary() == vectorizer.get_vocabulary()
        ids = vectorizer(["a good film"]).flat_values
        np.testing.assert_array_equal(corpus.splits["train"].ids[:3], ids)
    assert len(calls) == 2


def test_texts_of_a_language_model_have_no_labels_and_two_words(tmp_path, monkeypatch):
    train = np.array(["a good film", "bad", "not good at all", "the test is not here"], object)
    unlabelled = np.array([f"film {i}" for i in range(6)], object)
    asked = []

    def read(data_dir, splits):
        asked.extend(splits)
        labels = np.zeros(4, "int32"), np.full(6, -1, "int32")
        return [data.Split(*each) for each in zip((train, unlabelled), labels, strict=True)]

    monkeypatch.setattr(data, "_load_imdb_reviews", read)
    folder = tmp_path / "imdb_reviews/plain_text/1.0.0"
    folder.mkdir(parents=True)
    (folder / "train.tfrecord").write_bytes(b"records")
    arguments = "imdb_reviews", str(tmp_path), None
    first, second = (
        encoded.load_texts(*arguments, 2, seed, 50, str(tmp_path / "cache")) for seed in (0, 1)
    )
    assert asked == ["train", "unsupervised"]  # no test, and no second time for another seed
    assert_same(first, second)
    lengths = {name: np.diff(split.offsets).tolist() for name, split in first.splits.items()}
    assert lengths == {"train": [3, 4, 5, 2, 2, 2, 2], "valid": [2, 2]}
    words = first.vectorizer.get_vocabulary()
    assert "1" in words and "0" not in words and "5" not in words  # the held-out are the ends
    assert words[2] == "film"
    with pytest.raises(ValueError, match=r"at most half .* Received: 4 of 6 reviews"):
        encoded.load_texts(*arguments, 4, 0, 50, "")


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_file_is_made_again(prepared, tmp_path, content):
    folder, calls = prepared
    first = load(folder, tmp_path / "cache")
    [kept] = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert_same(first, load(folder, tmp_path / "cache"))
    assert len(calls) == 2
    assert kept.read_bytes() == whole


def test_nothing_is_kept_on_request_or_of_generated_reviews(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, calls = prepared
    before = {*tmp_path.rglob("*")}
    load(folder, "")
    load(folder, tmp_path / "cache", name="generated")
    assert {*tmp_path.rglob("*")} == before and len(calls) == 2


def test_a_cache_that_cannot_be_written_costs_a_warning(prepared, tmp_path):
    folder, _ = prepared
    (tmp_path / "cache").write_text("a file")
    assert load(folder, tmp_path / "cache").splits["train"].labels.tolist() == [1, 0, 0, 1]


def test_fewer_labels_leave_whole_documents():
    rng = np.random.default_rng(0)
    splits = {}
    for name, count in {"train": 90, "valid": 10}.items():
        lengths = rng.integers(0, 5, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        # Each id and label says whose it is.
        splits[name] = encoded.Documents(
            np.repeat(np.arange(count), lengths), offsets, np.arange(count)
        )
    corpus = encoded.Encoded("imdb_reviews", None, splits)

    def chosen(labels, seed=0):
        fewer = encoded.fewer_labels(corpus, labels, 0.1, seed).splits
        for name in ("train", "valid"):
            found, rows = fewer[name], fewer[name].labels
            lengths = np.diff(splits[name].offsets)[rows]
            np.testing.assert_array_equal(np.diff(found.offsets), lengths)
            np.testing.assert_array_equal(found.ids, np.repeat(rows, lengths))
        return [set(fewer[name].labels.tolist()) for name in ("train", "valid")]

    few, more, every = chosen(20), chosen(50), chosen(100)
    assert [len(part) for part in few] == [18, 2] and [len(part) for part in more] == [45, 5]
    assert all(a < b < c for a, b, c in zip(few, more, every, strict=True))
    assert chosen(20, seed=1) != few
    for labels in (1, 101, 0):
        with pytest.raises(ValueError, match=f"Received: labels={labels}"):
            encoded.fewer_labels(corpus, labels, 0.1, 0)
