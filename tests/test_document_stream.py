"""Documents that are read from shards while a model trains."""

import gc
import itertools
import json
import os
import pickle
import signal
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import (
    VOCAB,
    InterruptAt,
    Interruption,
    random_documents,
    random_labels,
    token_layers,
    token_model,
    two_heads,
)

from keras_tbptt import DocumentStream, DocumentWindows, ExactBackup, RecordError, TBPTTModel
from keras_tbptt.data._lanes import Position

COUNT = 40
DOCUMENTS = random_documents(COUNT)
LABELS = random_labels(COUNT)
RECORDS = [{"ids": ids.tolist(), "label": int(y)} for ids, y in zip(DOCUMENTS, LABELS, strict=True)]
SHARDS = [RECORDS[:13], RECORDS[13:14], RECORDS[14:]]
SHAPE = {"window": 5, "lanes": 4}


def parse(record):
    return record["ids"], record["label"]


def stream(shards=SHARDS, parse=parse, **kwargs):
    return DocumentStream(shards, parse, **{**SHAPE, "seed": 0, **kwargs})


def batches(dataset, count=None):
    found = itertools.islice(dataset.as_numpy_iterator(), count)
    return [tf.nest.map_structure(np.copy, batch) for batch in found]


def assert_same(one, other):
    assert len(one) == len(other)
    tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def compiled(loss="binary_crossentropy", **kwargs):
    model = token_model(**kwargs)
    model.compile("adam", loss, weighted_metrics=["accuracy"])
    return model


def by_hand(documents, lanes=4, window=5):
    """For each window, the document and the first step of each lane; None for an idle lane."""
    waiting, at = iter(range(len(documents))), [None] * lanes
    while True:
        at = [(next(waiting, None), 0) if place is None else place for place in at]
        at = [None if place is None or place[0] is None else place for place in at]
        if not any(at):
            return
        yield list(at)
        after = [place and (place[0], place[1] + window) for place in at]
        at = [p if p and p[1] < len(documents[p[0]]) else None for p in after]


def test_a_lane_takes_the_next_document_when_its_own_ends():
    found = batches(stream().dataset(one_pass=True))
    for (x, y, weight), lanes in zip(found, by_hand(DOCUMENTS), strict=True):
        for lane, place in enumerate(lanes):
            if place is None:
                assert not x["lengths"][lane] and not weight[lane]
                continue
            document, step = place
            ids = DOCUMENTS[document][step : step + 5]
            np.testing.assert_array_equal(x["inputs"][lane], np.pad(ids, (0, 5 - len(ids))))
            assert x["starts"][lane] == (step == 0)
            assert x["ends"][lane] == (step + 5 >= len(DOCUMENTS[document]))
            assert x["lengths"][lane] == len(ids)
            assert x["positions"][lane] == step
            assert x["totals"][lane] == len(DOCUMENTS[document])
            assert y[lane] == LABELS[document]
            assert weight[lane] == 1


def order_of(found):
    """The documents in which lanes begin, by their first window."""
    return [tuple(x["inputs"][lane]) for x, *_ in found for lane in range(4) if x["starts"][lane]]


def test_every_epoch_has_every_document_once_in_an_order_of_its_own():
    shuffled = stream(shuffle=True)
    counts = shuffled.count()
    assert counts[:3] == (COUNT, sum(map(len, DOCUMENTS)), sum(-(-len(d) // 5) for d in DOCUMENTS))
    assert counts.one_pass == len(batches(stream().dataset(one_pass=True)))
    order = order_of(batches(shuffled.dataset(), 2 * len(shuffled) + 9))
    given = [tuple(np.pad(d[:5], (0, 5 - len(d[:5])))) for d in DOCUMENTS]
    first, second = order[:COUNT], order[COUNT : 2 * COUNT]
    assert sorted(first) == sorted(second) == sorted(given)
    assert len({tuple(first), tuple(second), tuple(given)}) == 3
    again = stream(shuffle=True)
    again.epoch = 1
    assert order_of(batches(again.dataset(), 30))[:20] == second[:20]


def test_no_lane_is_ever_idle_in_training():
    for x, *_ in batches(stream(shuffle=True).dataset(), 100):
        assert (x["lengths"] > 0).all()


@pytest.mark.parametrize("parse_batch", [None, 7])
def test_a_stream_goes_on_from_any_position(parse_batch):
    def parse_any(records):
        return [parse(r) for r in records] if parse_batch else parse(records)

    kwargs = {"parse": parse_any, "parse_batch": parse_batch, "shuffle": True}
    running = stream(**kwargs)
    whole = batches(stream(**kwargs).dataset(), 90)
    places = [running.position]
    for _ in zip(range(90), running.dataset(), strict=False):
        places.append(running.position)
    for begin in (0, 1, 17, 39, 40, 60):
        other = stream(**kwargs)
        saved = json.loads(json.dumps(places[begin].to_json()))
        other.position = Position.from_json(saved)
        assert_same(batches(other.dataset(), 20), whole[begin : begin + 20])


def test_a_position_of_many_lanes_is_small():
    lanes = np.full(128, 10_000_000)
    position = Position(Position.beginning(3).next, lanes // 1000, lanes, lanes // 10)
    assert len(json.dumps(position.to_json())) < 4096


def write_text(path, rows):
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))


def write_tfrecord(path, rows):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows:
            writer.write(json.dumps(row).encode())


def write_array_record(path, rows):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()


def write_parquet(path, rows):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)


WRITERS = {
    "part-{}.txt": (write_text, json.loads),
    "part-{}.jsonl": (write_text, dict),
    "part.tfrecord-0000{}-of-00003": (write_tfrecord, json.loads),
    "part-{}.array_record": (write_array_record, json.loads),
    "part-{}.parquet": (write_parquet, dict),
}


def write(directory, name, shards=SHARDS):
    writer, decode = WRITERS[name]
    for i, rows in enumerate(shards):
        writer(directory / name.format(i), rows)
    return str(directory / name.format("*")), lambda record: parse(decode(record))


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_batches(name, tmp_path):
    shards, parse_record = write(tmp_path, name)
    found = batches(stream(shards, parse_record, shuffle=True).dataset(), 60)
    assert_same(found, batches(stream(shuffle=True).dataset(), 60))


def test_a_line_may_be_the_document(tmp_path):
    (tmp_path / "a.jsonl").write_text("[1, 2, 3]\r\n\r\n[4]\n  \n[5, 6]")
    found = batches(DocumentStream(tmp_path / "a.jsonl", window=3, lanes=3).dataset(one_pass=True))
    np.testing.assert_array_equal(found[0][0]["inputs"], [[1, 2, 3], [4, 0, 0], [5, 6, 0]])


def test_evaluation_counts_as_that_of_windows_in_memory():
    model = compiled()
    windows = DocumentWindows(DOCUMENTS, LABELS, **SHAPE)
    np.testing.assert_allclose(
        model.evaluate(stream(shuffle=True), verbose=0), model.evaluate(windows, verbose=0), 1e-6
    )


def test_a_label_of_which_a_part_is_unknown_is_refused():
    for missing in ([np.nan, 1.0], [1.0, np.nan]):
        rows = [([1, 2], [0.0, 1.0]), ([3], missing)]
        found = DocumentStream([rows], window=5, lanes=2, unknown=True)
        with pytest.raises(RecordError, match=r"NaN in all of its numbers, or in none"):
            found.count()


def test_weights_unknown_labels_and_static_inputs_are_those_of_windows_in_memory():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(COUNT, 2)).astype("float32")
    labels[rng.random(COUNT) < 0.3] = np.nan
    weights, users = rng.random(COUNT), rng.integers(0, 7, COUNT)
    rows = list(zip(DOCUMENTS, users, labels, weights, strict=True))
    windows = DocumentWindows(
        {"ids": DOCUMENTS}, labels, static={"user": users}, weights=weights, window=5, lanes=64
    )
    found = DocumentStream(
        [rows],
        lambda row: ({"ids": row[0], "user": row[1]}, row[2], row[3]),
        static=["user"],
        unknown=True,
        window=5,
        lanes=64,
    )
    assert found.batch_shape == windows.batch_shape and found.static_names == ["user"]

    def lanes_of(dataset):
        """Everything about each lane of each window, in an order that is not the lanes'."""
        seen = []
        for x, y, weight in batches(dataset):
            for lane in np.flatnonzero(x["lengths"]):
                inputs = x["inputs"]
                row = [x["positions"][lane], *inputs["ids"][lane], inputs["user"][lane]]
                seen.append((*row, x["known"][lane], *y[lane], weight[lane]))
        return sorted(seen)

    assert lanes_of(found.dataset(one_pass=True)) == lanes_of(windows.dataset(flags=True))


def two_head_data():
    rng = np.random.default_rng(1)
    tags = [rng.integers(0, 3, len(d)) for d in DOCUMENTS]
    return {"tags": tags, "label": LABELS.astype("float32")}


def test_per_step_has_the_names_of_the_labels():
    rows = [([1, 2], {"tags": [0, 1], "label": 1.0})]
    for per_step in ({"tags": True, "lable": False}, {"tags": True}, [True, False, True]):
        with pytest.raises(ValueError, match="per_step"):
            stream([rows], parse=None, per_step=per_step)


def test_two_heads_evaluate_as_on_windows_in_memory():
    labels, per_step = two_head_data(), {"tags": True, "label": False}
    rows = [
        (ids, {"tags": labels["tags"][i], "label": labels["label"][i]})
        for i, ids in enumerate(DOCUMENTS)
    ]
    model = token_model(layers=two_heads)
    losses = {"tags": "sparse_categorical_crossentropy", "label": "mse"}
    model.compile("adam", losses)
    windows = DocumentWindows(DOCUMENTS, labels, per_step=per_step, **SHAPE)
    found = stream([rows], parse=None, per_step=per_step)
    assert found.per_step == windows.per_step
    np.testing.assert_allclose(
        model.evaluate(found, verbose=0), model.evaluate(windows, verbose=0), 1e-6
    )


def test_the_next_step_is_predicted_as_on_windows_in_memory():
    long = [d for d in DOCUMENTS if len(d) > 1]
    layers = token_layers(
        lambda: keras.layers.LSTM(5, stateful=True, return_sequences=True),
        keras.layers.Dense(VOCAB, activation="softmax"),
    )
    model = compiled("sparse_categorical_crossentropy", layers=layers)
    windows = DocumentWindows.next_step(long, **SHAPE)
    found = DocumentStream.next_step([long], **SHAPE)
    np.testing.assert_allclose(
        model.evaluate(found, verbose=0), model.evaluate(windows, verbose=0), 1e-6
    )
    assert model.fit(found, steps_per_epoch=5, verbose=0).history["loss"]


class Terminate(keras.callbacks.Callback):
    """Sends this process SIGTERM in the validation of the first epoch."""

    def on_test_batch_end(self, batch, logs=None):
        if batch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_training_that_ends_in_its_validation_goes_on_at_the_place_of_each_lane(tmp_path):
    def train(directory, *callbacks):
        model, train = compiled(), stream(shuffle=True)
        backup = ExactBackup(directory, train, every_seconds=None)
        fit = {"steps_per_epoch": 3, "epochs": 2, "verbose": 0, "validation_data": stream()}
        history = model.fit(train, **fit, callbacks=[*callbacks, backup])
        return model.get_weights(), history.history

    whole = train(tmp_path / "whole")
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", Terminate())
    with pytest.warns(UserWarning, match="Terminate"):
        resumed = train(tmp_path / "cut")
    assert_same(whole[0], resumed[0])
    assert whole[1] == resumed[1]


@pytest.mark.parametrize(("at", "steps_per_execution"), [(3, 3), (20, 1), (41, 3)])
def test_an_interrupted_training_ends_as_one_that_was_not(at, steps_per_execution, tmp_path):
    def train(directory, interrupted_at=0):
        model = token_model(window_loss="final_only", backprop_windows=2)
        model.compile("adam", "binary_crossentropy", steps_per_execution=steps_per_execution)
        train = stream(shuffle=True)
        backup = ExactBackup(directory, train, every_seconds=None, every_windows=6)
        history = model.fit(
            train,
            steps_per_epoch=24,
            epochs=3,
            validation_data=stream(),
            verbose=0,
            callbacks=[InterruptAt(interrupted_at), backup],
        )
        return model, history.history, train.position

    model, history, position = train(tmp_path / "whole")
    with pytest.raises(Interruption):
        train(tmp_path / "cut", at // steps_per_execution)
    resumed, same_history, same_position = train(tmp_path / "cut")
    assert_same(model.get_weights(), resumed.get_weights())
    assert history == same_history
    assert position.to_json() == same_position.to_json()


def test_a_backup_refuses_other_shards_and_a_stream_that_is_read_ahead(tmp_path):
    model, train = compiled(), stream(shuffle=True)
    model.fit(train, steps_per_epoch=9, verbose=0, callbacks=[ExactBackup(tmp_path / "a", train)])
    other = stream(SHARDS[:2], shuffle=True)
    with pytest.raises(ValueError, match="belongs to another training"):
        model.fit(
            other, steps_per_epoch=9, epochs=2, verbose=0,
            callbacks=[ExactBackup(tmp_path / "a", other)],
        )  # fmt: skip
    ahead = train.dataset().prefetch(7)
    with pytest.raises(ValueError, match="read ahead of training"):
        model.fit(
            ahead, steps_per_epoch=9, verbose=0, callbacks=[ExactBackup(tmp_path / "b", train)]
        )


def test_a_dataset_begins_at_the_same_place_each_time_and_may_be_mapped():
    train = stream(shuffle=True)
    dataset = train.dataset()
    assert_same(batches(dataset, 9), batches(dataset, 9))
    histories = [
        compiled().fit(x, steps_per_epoch=9, verbose=0).history
        for x in (stream(shuffle=True), dataset.map(lambda *batch: batch))
    ]
    assert histories[0] == histories[1]


def test_a_second_fit_goes_on_with_the_next_documents():
    model, train = compiled(), stream()
    model.fit(train, steps_per_epoch=11, verbose=0)
    begun = train.position
    assert begun.record.max() > -1
    model.evaluate(train, verbose=0)
    assert train.position.to_json() == begun.to_json()
    first = []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            first.append(train.position)

    model.fit(train, steps_per_epoch=1, verbose=0, callbacks=[Seen()])
    taken = begun.next.record + begun.next.shard * 13  # of the first two shards, 13 and 1 records
    expected = [(shard, i) for shard, rows in enumerate(SHARDS) for i in range(len(rows))]
    there = zip(first[0].shard.tolist(), first[0].record.tolist(), strict=True)
    assert [*there] == expected[taken : taken + 4]


def test_several_iterations_do_not_disturb_each_other():
    train = stream(shuffle=True)
    whole = batches(train.dataset(), 20)
    dataset = train.dataset()
    pairs = batches(tf.data.Dataset.zip(dataset, dataset), 20)
    assert_same([one for one, _ in pairs], whole)
    assert_same([other for _, other in pairs], whole)
    iterators = [iter(train.dataset()) for _ in range(9)]
    for iterator in iterators:
        next(iterator)
    refused = []
    for i, iterator in enumerate(iterators):
        try:
            for _ in range(200):
                next(iterator)
        except tf.errors.InvalidArgumentError as error:
            assert "at once" in str(error)
            refused.append(i)
    # The one that was read longest ago, which may not be the first: they read ahead by themselves.
    assert len(refused) == 1 and refused != [8]


def test_a_stream_is_let_go_of():
    def train_once():
        train = stream(pickle.loads(pickle.dumps(SHARDS)))
        compiled().fit(train, steps_per_epoch=3, validation_data=train, verbose=0)
        return weakref.ref(train)

    alive = train_once()
    gc.collect()
    assert alive() is None


def test_the_length_of_an_epoch_is_part_of_a_training(tmp_path):
    model, train = compiled(), stream()
    model.fit(train, steps_per_epoch=9, verbose=0, callbacks=[ExactBackup(tmp_path, train)])
    with pytest.raises(ValueError, match="steps_per_epoch=5"):
        model.fit(
            train, steps_per_epoch=5, epochs=2, verbose=0, callbacks=[ExactBackup(tmp_path, train)]
        )


def test_windows_of_large_steps_are_read_ahead_in_a_smaller_number():
    rows = [np.ones((3, 20_000), "float32")] * 9
    dataset = DocumentStream([rows], window=50, lanes=8).dataset()
    assert dataset._input_dataset._input_dataset._input_dataset._buffer_size.numpy() == 2


def test_a_counted_stream_needs_no_steps_per_epoch(tmp_path):
    train, model = stream(), compiled()
    with pytest.raises(ValueError, match="steps_per_epoch"):
        model.fit(train, verbose=0)
    train.count(tmp_path / "counts.json")
    steps = model.fit(train, verbose=0).params["steps"]
    assert steps == len(train) == -(-train.counts.windows // 4)

    class NotRead(list):
        def __getitem__(self, i):
            assert threading.current_thread() is None, "read again"

    again = stream()
    again._records.read = NotRead().__getitem__
    assert again.count(tmp_path / "counts.json") == train.counts


def test_class_weight_and_a_pickled_stream():
    weighed = [compiled().fit(s, steps_per_epoch=9, verbose=0, class_weight={0: 1.0, 1: 3.0})
               for s in (stream(), pickle.loads(pickle.dumps(stream())))]  # fmt: skip
    plain = compiled().fit(stream(), steps_per_epoch=9, verbose=0)
    assert weighed[0].history == weighed[1].history != plain.history


BAD = {
    "no label": ({"ids": [1, 2]}, "label"),
    "no steps": ({"ids": [], "label": 1}, "no step"),
    "an id beyond the vocabulary": ({"ids": [VOCAB], "label": 1}, f"id {VOCAB}"),
    "padding": ({"ids": [0, 3], "label": 1}, "id 0"),
    "a negative id": ({"ids": [-1], "label": 1}, "id -1"),
    "floats": ({"ids": [0.5], "label": 1}, "float"),
    "text": ({"ids": "text", "label": 1}, "numbers"),
    "another shape": ({"ids": [[1], [2]], "label": 1}, "shape"),
    "a label of another shape": ({"ids": [1], "label": [1, 0]}, "shape"),
}


def shards_with(record):
    return [*SHARDS[:1], [*RECORDS[13:20], record, *RECORDS[20:]]]


@pytest.fixture(scope="module")
def trained():
    return compiled()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_record_is_named_or_skipped(bad, trained):
    record, words = BAD[bad]
    with pytest.raises(RecordError, match=words) as caught:
        trained.fit(stream(shards_with(record)), steps_per_epoch=60, verbose=0)
    assert (caught.value.shard, caught.value.record) == ("shard 1", 7)
    skipping = stream(shards_with(record), skip_errors=True)
    trained.fit(skipping, steps_per_epoch=60, verbose=0)
    assert [*skipping.skipped] == [("shard 1", 7)]


def test_nothing_is_trained_on_a_bad_record():
    shards = shards_with({"ids": [1, 2]})
    model = compiled()
    with pytest.raises(RecordError):
        model.fit(stream(shards), steps_per_epoch=60, verbose=0)
    good = compiled()
    windows = int(model.optimizer.iterations)
    good.fit(stream(), steps_per_epoch=windows, verbose=0)
    assert_same(model.get_weights(), good.get_weights())

    skipping = stream(shards, skip_errors=True)
    model = compiled()
    model.fit(skipping, steps_per_epoch=60, verbose=0)
    good = compiled()
    good.fit(stream(), steps_per_epoch=60, verbose=0)
    assert_same(model.get_weights(), good.get_weights())


def test_damaged_empty_and_missing_shards_are_named(tmp_path):
    _, parse_record = write(tmp_path, "part.tfrecord-0000{}-of-00003", [*SHARDS[:2], RECORDS])
    paths = sorted(tmp_path.glob("part*"))
    content = bytearray(paths[2].read_bytes())
    content[100] ^= 1
    paths[2].write_bytes(content)
    (tmp_path / "part-empty.tfrecord").touch()
    everything = [*map(str, paths), str(tmp_path / "part-empty.tfrecord")]
    with pytest.raises(RecordError, match=r"record 0 of .*00002-of-00003, .*checksum"):
        compiled().fit(stream(everything, parse_record), steps_per_epoch=99, verbose=0)
    with pytest.raises(RecordError, match="empty") as caught:
        compiled().fit(stream(everything[3:] + everything[:1], parse_record), verbose=0)
    assert caught.value.record is None
    lasting = stream(everything, parse_record, skip_errors=True)
    paths[1].unlink()
    compiled().evaluate(lasting, verbose=0)
    assert {*lasting.skipped} == {
        (everything[1], None),
        (everything[2], 0),
        (everything[3], None),
    }
    with pytest.raises(FileNotFoundError, match="exists"):
        stream(str(tmp_path / "nothing-*.jsonl"))
    with pytest.raises(ValueError, match="compressed"):
        (tmp_path / "a.jsonl.gz").touch()
        stream(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("damage", ["cut off", "a wrong length", "a wrong end"])
def test_what_follows_a_damaged_length_is_not_read(damage, tmp_path):
    _, parse_record = write(tmp_path, "part.tfrecord-0000{}-of-00003", [RECORDS[:5]])
    [path] = tmp_path.glob("part*")
    content = bytearray(path.read_bytes())
    fourth = [16 + len(json.dumps(row)) for row in RECORDS[:3]]
    if damage == "cut off":
        del content[-3:]
    elif damage == "a wrong length":
        content[sum(fourth)] += 1
    else:
        content[sum(fourth) - 1] ^= 1
    path.write_bytes(content)
    found = stream(str(path), parse_record, skip_errors=True)
    counts = found.count()
    kept = {"cut off": 4, "a wrong length": 3, "a wrong end": 4}[damage]
    bad = {"cut off": 4, "a wrong length": 3, "a wrong end": 2}[damage]
    assert counts.documents == kept and [*found.skipped] == [(str(path), bad)]


def test_a_document_in_progress_that_is_gone_is_named(tmp_path):
    shards, parse_record = write(tmp_path, "part-{}.jsonl")
    train = stream(shards, parse_record)
    batches(train.dataset(), 9)
    write(tmp_path, "part-{}.jsonl", [SHARDS[0][:2], *SHARDS[1:]])
    other = stream(shards, parse_record)
    other.position = train.position
    with pytest.raises(tf.errors.InvalidArgumentError, match="record"):
        next(other.dataset().as_numpy_iterator())
    assert isinstance(other.failure, RecordError)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"window": 0}, "window"),
        ({"lanes": 0}, "lanes"),
        ({"parse_batch": 1}, "parse_batch"),
        ({"shards": []}, "at least one shard"),
        ({"shards": [3]}, "len"),
        ({"static": ["user"]}, "user"),
        ({"per_step": True}, "T"),
    ],
)
def test_bad_arguments_are_refused(kwargs, words):
    with pytest.raises((ValueError, RecordError), match=words):
        stream(**kwargs)


def test_a_dataset_that_is_read_into_memory_is_announced(monkeypatch):
    monkeypatch.setattr("keras_tbptt.data._documents._LARGE", 100)
    dataset = tf.data.Dataset.from_tensor_slices(np.ones((5, 9), "int32"))
    with pytest.warns(UserWarning, match="DocumentStream"):
        DocumentWindows(dataset, window=3, lanes=2)


def test_what_needs_documents_in_memory_is_refused():
    model = compiled()
    with pytest.raises(ValueError, match="memory"):
        model.predict_documents(stream())
    with pytest.raises(ValueError, match="flags"):
        stream().dataset(flags=False)
    with pytest.raises(ValueError, match="aligned"):
        compiled(backprop_windows="all").fit(stream(), steps_per_epoch=2)
    with pytest.raises(TypeError, match="length"):
        len(stream())
    with pytest.raises(ValueError, match="something to learn"):
        model.optimizer_steps(stream())
    assert model.predict(stream(), verbose=0).shape[1:] == (1,)


def figures_of(targets, weights):
    """The loss of an evaluation, from a stream and from windows."""
    records = list(zip(DOCUMENTS, targets, weights, strict=True))
    unknown = any(np.isnan(target).any() for target in targets)
    given = DocumentStream([records], **SHAPE, per_step=True, unknown=unknown)
    windows = DocumentWindows(DOCUMENTS, targets, **SHAPE, per_step=True, weights=weights)
    tokens = windows.keras_inputs()
    x = keras.layers.GRU(3, stateful=True, return_sequences=True)(
        keras.layers.Embedding(VOCAB, 3)(tokens)
    )
    model = TBPTTModel(tokens, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    return model.evaluate(given, verbose=0), model.evaluate(windows, verbose=0)


def test_steps_of_weight_0_count_as_in_windows():
    rng = np.random.default_rng(0)
    targets = [rng.normal(size=len(ids)) for ids in DOCUMENTS]
    by_step = [rng.integers(0, 2, len(ids)).astype(float) for ids in DOCUMENTS]
    np.testing.assert_allclose(*figures_of(targets, by_step), rtol=1e-5)


def test_documents_of_weight_0_count_as_in_windows_where_targets_are_unknown():
    rng = np.random.default_rng(0)
    targets = [np.where(rng.random(len(ids)) < 0.4, np.nan, 1.0) for ids in DOCUMENTS]
    by_document = np.arange(COUNT) % 3
    np.testing.assert_allclose(*figures_of(targets, by_document.tolist()), rtol=1e-5)


@pytest.mark.parametrize("skip_errors", [False, True])
def test_the_ids_of_a_larger_model_are_allowed_again(skip_errors):
    records = [([1, 2], 0.0), ([60, 1], 1.0), ([3], 1.0)]
    given = DocumentStream([records], **SHAPE, skip_errors=skip_errors)
    given.count()

    def loss(rows):
        keras.utils.set_random_seed(0)
        tokens = given.keras_inputs()
        x = keras.layers.GRU(3, stateful=True)(keras.layers.Embedding(rows, 2)(tokens))
        model = TBPTTModel(tokens, keras.layers.Dense(1)(x))
        model.compile("sgd", "mse")
        return model.evaluate(given, verbose=0)

    before = loss(100)
    if skip_errors:
        assert loss(10) != before
    else:
        with pytest.raises(RecordError, match="id 60, not 0 to 9"):
            loss(10)
    assert loss(100) == before


def test_counts_of_another_parse_are_not_used(tmp_path):
    shards = [[{"ids": [1, 2], "label": 0}, *RECORDS]]  # the first document stays the same

    def counted(parse):
        return stream(shards, parse=parse).count(tmp_path / "counts.json").steps

    everything = 2 + sum(map(len, DOCUMENTS))
    assert counted(parse) == everything
    assert counted(lambda record: (record["ids"][:2], record["label"])) < everything
    assert counted(parse) == everything


def test_a_label_after_a_record_without_one_is_an_error_of_the_record():
    records = [([1, 2], None), ([3], 1.0)]
    given = DocumentStream([records], **SHAPE)
    with pytest.raises(RecordError, match=r"record 1 of .*the first record has none"):
        given.count()


def test_a_file_that_two_patterns_match_is_refused(tmp_path):
    (tmp_path / "a-1.jsonl").write_text(json.dumps([[1, 2], 0.0]) + "\n")
    with pytest.raises(ValueError, match=r"named once.*Received: .*a-1.jsonl"):
        DocumentStream([tmp_path / "a-*.jsonl", tmp_path / "a-1.jsonl"], **SHAPE)


@pytest.mark.parametrize("shards", [[{"ids": [1]}], {"ids": [1]}])
def test_records_without_a_list_around_them_are_refused(shards):
    with pytest.raises(ValueError, match=r"given as \[records\].*Received: "):
        DocumentStream(shards, parse, **SHAPE)


def test_an_array_is_a_shard():
    ids = np.ones((3, 4), "int64")
    assert DocumentStream([ids], **SHAPE).count().steps == 12


def test_lines_of_spaces_are_blank_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr("keras_tbptt.data._shards._BUFFER", 7)  # so that lines cross it
    lines = [" " * 12, "a b", "", " indented", "\t" * 20, "end"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    given = DocumentStream(tmp_path / "a.txt", lambda line: list(line.encode()), **SHAPE)
    assert given.count().documents == 3
    assert given.count().steps == len("a b indentedend")


def test_counts_that_no_longer_hold_are_named(tmp_path):
    longest = len(max(DOCUMENTS, key=len))

    def parse(record):
        return record["ids"][:longest], record["label"]

    shards = [[{"ids": [1, 2], "label": 0}, *RECORDS]]
    stream(shards, parse=parse).count(tmp_path / "counts.json")
    longest = 3  # the code of `parse` is the same, and so is the first document
    shorter = stream(shards, parse=parse)
    shorter.count(tmp_path / "counts.json")
    with pytest.raises(ValueError, match=r"count again.*Received: <DocumentStream"):
        compiled().evaluate(shorter, verbose=0)
