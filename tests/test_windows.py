import copy
import gc
import itertools
import pickle
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import random_documents, random_labels, token_layers, token_model

from keras_tbptt import DocumentWindows, TBPTTModel
from keras_tbptt.data import _documents as forms


def batches(windows, **kwargs):
    return [
        keras.tree.map_structure(np.asarray, b)
        for b in windows.dataset(**kwargs).as_numpy_iterator()
    ]


def rejoin(windows):
    """Documents as the lanes read them, in the order in which they end."""
    reading, documents = [[] for _ in range(windows.lanes)], []
    for (x,) in batches(windows, flags=True):
        for lane in range(windows.lanes):
            if x["starts"][lane]:
                reading[lane] = []
            assert x["positions"][lane] == sum(map(len, reading[lane])) or not x["lengths"][lane]
            reading[lane].append(x["inputs"][lane, : x["lengths"][lane]])
            if x["ends"][lane]:
                documents.append(np.concatenate(reading[lane]))
                assert len(documents[-1]) == x["totals"][lane]
    return documents


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=20),
    window=st.integers(1, 9),
    mean=st.none() | st.integers(2, 7),
    stretch=st.none() | st.integers(1, 4),
    lanes=st.integers(1, 6),
    packing=st.sampled_from(["packed", "aligned"]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 9),
)
def test_each_document_is_read_once_with_its_own_labels(
    lengths, window, mean, stretch, lanes, packing, shuffle, epoch
):
    window = max(window, -(-5 * (mean or 0) // 4))
    # Each step has a value of its own, so a step that is lost, repeated or moved shows.
    flat, offsets = np.arange(1, sum(lengths) + 1), np.cumsum([0, *lengths])
    documents = np.arange(len(lengths))
    arguments = dict(
        offsets=offsets, window=window, mean_window=mean, stretch=stretch, lanes=lanes,
        packing=packing, shuffle=shuffle, seed=3,
    )  # fmt: skip
    windows = DocumentWindows(flat, documents, weights=documents + 1, **arguments)
    steps = DocumentWindows(flat, -flat, per_step=True, weights=documents + 1, **arguments)
    windows.epoch = steps.epoch = epoch
    assert ((windows.plan.length >= 1) == (windows.plan.document >= 0)).all()
    longest = np.inf if stretch is None else stretch * (mean or window)
    batch, batch_of_steps = batches(windows, flags=True), batches(steps, flags=True)
    assert len(batch) == len(windows) == len(steps)
    read, reading = {}, {}
    for (x, y, weight), (_, targets, _) in zip(batch, batch_of_steps, strict=True):
        idle = x["lengths"] == 0
        assert not (x["starts"] | x["ends"])[idle].any() and not weight[idle].any()
        for lane in np.flatnonzero(~idle):
            document, real = y[lane], slice(x["lengths"][lane])
            if x["starts"][lane]:
                assert reading.get(lane) is None and document not in read
                reading[lane], read[document] = document, []
            assert reading[lane] == document and weight[lane] == document + 1
            read[document].extend(x["inputs"][lane, real])
            np.testing.assert_array_equal(targets[lane, real], -x["inputs"][lane, real])
            if x["ends"][lane]:
                reading[lane] = None
    assert not any(document is not None for document in reading.values())
    for document, length in enumerate(lengths):
        part = read[document]
        begin = part[0] - flat[offsets[document]]
        assert len(part) == min(length, longest) and 0 <= begin <= length - len(part)
        assert part == list(range(part[0], part[0] + len(part)))


def test_random_lengths_are_around_their_mean_and_new_in_every_epoch():
    windows = DocumentWindows(
        np.ones(10**6, "int32"), offsets=[0, 10**6], window=100, mean_window=70, lanes=1, seed=0
    )
    lengths = windows.plan.length[:, 0]
    assert len(windows) == -(-(10**6) // 70) and lengths.sum() == 10**6
    assert lengths.mean() == pytest.approx(70, rel=0.01)
    assert 0.04 < np.mean(lengths < 53) < 0.06  # one in twenty is half as long
    assert lengths[lengths < 53].mean() / lengths[lengths >= 53].mean() == pytest.approx(0.5, 0.02)
    assert np.std(lengths[lengths >= 53]) == pytest.approx(5 * 70 / 68.25, rel=0.05)
    windows.epoch = 1
    assert (windows.plan.length[:, 0] != lengths).mean() > 0.8


def test_windows_of_random_lengths_have_one_shape():
    windows = DocumentWindows([[1] * 90], [0], window=10, mean_window=8, lanes=2)
    x, _, _ = windows.dataset(flags=True).element_spec
    assert x["inputs"].shape == (2, 10)


@pytest.mark.parametrize("mean_window", [None, 4])
def test_a_stretch_is_read_of_a_long_document(mean_window):
    document = np.arange(1, 101)
    windows = DocumentWindows(
        [document, [7, 8, 9]], window=5, lanes=2, stretch=3, mean_window=mean_window, seed=0
    )
    steps = 3 * (mean_window or 5)
    assert windows.num_steps == steps + 3
    for _ in range(5):
        short, long = sorted(map(list, rejoin(windows)), key=len)
        assert short == [7, 8, 9]
        assert long == list(range(long[0], long[0] + steps))


def test_a_stretch_begins_anywhere_alike():
    windows = DocumentWindows([[1] * 20], window=4, lanes=1, stretch=2, seed=5)
    begins = []
    for windows.epoch in range(2600):
        begins.append(windows.plan.begin[0, 0])
    counts = np.bincount(begins, minlength=13)
    assert len(counts) == 13  # 0 to 12: a stretch is 8 steps of 20
    assert ((counts - 200) ** 2 / 200).sum() < 33  # chi-squared, 12 degrees of freedom, p = 0.001


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drawn", [{"mean_window": 4}, {"stretch": 2}])
def test_what_is_drawn_depends_on_seed_and_epoch_alone(drawn, shuffle):
    def read(seed, epoch):
        windows = DocumentWindows(
            [[1] * t for t in (90, 7, 64, 1)],
            window=5, lanes=2, shuffle=shuffle, seed=seed, **drawn,
        )  # fmt: skip
        windows.epoch = epoch
        return len(windows), [a.tobytes() for a in vars(windows.plan).values()]

    plans = {key: read(*key) for key in itertools.product(range(2), range(3))}
    assert len({size for size, _ in plans.values()}) == 1
    assert len({tuple(plan) for _, plan in plans.values()}) == len(plans)
    assert all(read(*key) == plan for key, plan in plans.items())


def test_models_read_the_stretch_and_random_lengths_change_no_prediction():
    documents, model = random_documents(), token_model(lanes=4, window=5)
    windows = DocumentWindows(documents, window=5, lanes=4, stretch=1, seed=0)
    plan, begins = windows.plan, np.zeros(len(documents), int)
    begins[plan.document[plan.starts]] = plan.begin[plan.starts]
    assert begins.any()
    stretches = [d[b : b + 5] for d, b in zip(documents, begins, strict=True)]
    expected = model.predict_documents(stretches)
    np.testing.assert_allclose(model.predict_documents(windows), expected, atol=1e-6)

    windows = DocumentWindows(documents, window=5, lanes=4, mean_window=4, seed=0)
    expected = model.predict_documents(documents)
    np.testing.assert_allclose(model.predict_documents(windows), expected, atol=1e-6)


def test_targets_per_step_follow_the_stretch():
    document = np.arange(1, 51)
    windows = DocumentWindows(
        [document], [document * 10], window=5, lanes=1, stretch=2, per_step=True, seed=1
    )
    for x, y, _ in batches(windows, flags=True):
        np.testing.assert_array_equal(y, x["inputs"] * 10)


def test_a_batch_holds_what_its_docstring_says():
    windows = DocumentWindows(
        [[3, 1, 4], [1, 5]], [0, 1], weights=[0.5, 1], window=2, lanes=3, seed=0
    )
    (x0, y0, w0), (x1, _, w1) = batches(windows, flags=True)
    assert len(windows) == 2 and windows.num_steps == 5
    assert windows.packing_efficiency == 5 / 12 and windows.batch_shape == x0["inputs"].shape
    np.testing.assert_array_equal(x0["inputs"], [[3, 1], [1, 5], [3, 0]])  # the third lane is idle
    np.testing.assert_array_equal(x1["inputs"], [[4, 0], [3, 0], [3, 0]])
    np.testing.assert_array_equal(x0["starts"], [True, True, False])
    np.testing.assert_array_equal(x0["ends"], [False, True, False])
    np.testing.assert_array_equal(x1["ends"], [True, False, False])
    np.testing.assert_array_equal(x1["positions"], [2, 0, 0])
    np.testing.assert_array_equal(x0["lengths"], [2, 2, 0])
    np.testing.assert_array_equal(x0["totals"], [3, 2, 0])
    np.testing.assert_array_equal(y0[:2], [0, 1])
    np.testing.assert_array_equal(w0, [0.5, 1, 0])
    np.testing.assert_array_equal(w1, [0.5, 0, 0])
    np.testing.assert_array_equal(windows.starts, [x0["starts"], x1["starts"]])
    np.testing.assert_array_equal(windows.ends, [x0["ends"], x1["ends"]])


def test_a_plain_batch_carries_the_weight_of_its_windows():
    windows = DocumentWindows([[3, 1, 4], [1, 5]], [0, 1], window=2, lanes=2)
    weights = [w for _, _, w in batches(windows)]
    np.testing.assert_array_equal(weights, [[1, 1], [0.5, 0]])  # a tail of 1 step counts 1 / 2
    weights = [w for _, _, w in batches(windows, window_loss="final_only")]
    np.testing.assert_array_equal(weights, [[0, 1], [1, 0]])


def test_every_form_of_documents_gives_the_same_batches(tmp_path):
    documents, labels = random_documents(), random_labels()
    lengths = [len(d) for d in documents]
    flat, offsets = np.concatenate(documents), np.cumsum([0, *lengths])
    mapped = np.memmap(tmp_path / "tokens", dtype="uint16", mode="w+", shape=flat.shape)
    mapped[:] = flat
    ragged = tf.RaggedTensor.from_row_splits(flat, offsets)
    pairs = tf.data.Dataset.from_generator(
        lambda: zip(documents, labels, strict=True),
        output_signature=(tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int64)),
    )
    forms = [
        DocumentWindows([d.tolist() for d in documents], labels, window=5, lanes=4),
        DocumentWindows(ragged, labels, window=5, lanes=4),
        DocumentWindows(pairs, window=5, lanes=4),
        DocumentWindows(flat, labels, offsets=offsets, window=5, lanes=4),
        DocumentWindows(mapped, labels, offsets=offsets, window=5, lanes=4),
    ]
    expected = batches(DocumentWindows(documents, labels, window=5, lanes=4), flags=True)
    for windows in forms:
        keras.tree.map_structure(
            np.testing.assert_array_equal, batches(windows, flags=True), expected
        )


def padded(documents, padding="post"):
    longest = max(map(len, documents))
    dtype = documents[0].dtype
    return keras.utils.pad_sequences(documents, longest, padding=padding, dtype=dtype)


@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize("to", [np.asarray, tf.constant, np.ndarray.tolist])
def test_padded_arrays_with_lengths_give_the_same_batches(features, to):
    documents = random_documents(features=features)
    documents[3][-1] = documents[4][0] = 0  # real zeros
    targets = [d * 2 for d in documents]
    lengths = [len(d) for d in documents]
    dense, dense_targets = to(padded(documents)), to(padded(targets))
    for y, dense_y, per_step in (
        (random_labels(), random_labels(), False),
        (targets, dense_targets, True),
    ):
        one = DocumentWindows(documents, y, window=5, lanes=4, per_step=per_step)
        other = DocumentWindows(
            dense, dense_y, lengths=lengths, window=5, lanes=4, per_step=per_step
        )
        keras.tree.map_structure(
            np.testing.assert_array_equal, batches(other, flags=True), batches(one, flags=True)
        )


@pytest.mark.parametrize("padding", ["pre", "post"])
@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize("to", [np.asarray, tf.constant, tf.data.Dataset.from_tensor_slices])
def test_a_padded_array_without_lengths_is_refused(padding, features, to):
    documents = random_documents(features=features)
    assert min(map(len, documents)) < max(map(len, documents))
    with pytest.raises(ValueError, match=r"(?s)`lengths`.*list of unpadded.*np.full.*Received: "):
        DocumentWindows(to(padded(documents, padding)), window=5, lanes=4)


def test_one_padded_series_among_many_is_refused():
    series = np.ones((100, 30), "float32")
    series[40, 29] = 0
    with pytest.raises(ValueError, match=r"`lengths`.*Received: documents of shape"):
        DocumentWindows(series, window=5, lanes=4)


def test_zeros_may_be_real():
    dense = np.array([[0, 3, 0], [1, 0, 2]])
    windows = DocumentWindows(dense, lengths=np.full(2, 3), window=2, lanes=2)
    assert sorted(map(list, rejoin(windows))) == [[0, 3, 0], [1, 0, 2]]
    windows = DocumentWindows(list(dense), window=2, lanes=2)
    assert sorted(map(list, rejoin(windows))) == [[0, 3, 0], [1, 0, 2]]
    for dense in ([[1, 0, 2], [3, 0, 4]], [[0], [1]]):  # in the middle; documents of one step
        assert DocumentWindows(np.array(dense), window=2, lanes=2).num_steps == np.size(dense)


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        (np.ones((2, 3), int), {"lengths": [3, 4]}, "from 1 to 3"),
        (np.ones((2, 3), int), {"lengths": [3, 0]}, "from 1 to 3"),
        (np.ones((2, 3), int), {"lengths": [3]}, "one integer per document"),
        (np.ones((2, 3), int), {"lengths": [1, 2, 3]}, "one integer per document"),
        (np.ones((2, 3), int), {"lengths": [1.5, 2]}, "one integer per document"),
        (np.ones((2, 3), int), {"lengths": [3, 3], "offsets": [0, 1, 2]}, "not both"),
        ([[1, 2], [3]], {"lengths": [2, 1]}, "one padded array"),
        (tf.ragged.constant([[1, 2], [3]]), {"lengths": [2, 1]}, "one padded array"),
        (np.array([[0, 1], [1, 2]]), {"lengths": [1, 2]}, 'padding="post"'),
    ],
)
def test_lengths_that_cannot_be_right_are_refused(documents, arguments, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*Received: "):
        DocumentWindows(documents, window=2, lanes=2, **arguments)


def test_features_and_targets_per_step():
    documents = random_documents(features=3)
    targets = [d.sum(axis=1, keepdims=True) for d in documents]
    windows = DocumentWindows(documents, targets, per_step=True, window=5, lanes=4)
    for x, y, weight in batches(windows, flags=True):
        assert (
            x["inputs"].shape == windows.batch_shape == (4, 5, 3)
            and y.shape == (4, 5, 1)
            and weight.shape == (4, 5)
        )
        real = np.arange(5) < x["lengths"][:, None]
        np.testing.assert_allclose((x["inputs"].sum(-1) - y[..., 0])[real], 0, atol=1e-6)
        np.testing.assert_array_equal(weight[real], 1)
        assert not weight[x["lengths"] == 0].any() and not weight[~real].any()


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float64"])
def test_targets_in_a_file_stay_there(dtype, tmp_path):
    documents = random_documents()
    offsets = np.cumsum([0, *map(len, documents)])
    flat = np.concatenate(documents)
    mapped = np.memmap(tmp_path / "targets", dtype=dtype, mode="w+", shape=flat.shape)
    mapped[:] = flat * 2
    arguments = dict(offsets=offsets, per_step=True, window=5, lanes=4)
    windows = DocumentWindows(flat, mapped, **arguments)
    assert np.shares_memory(windows._flat.targets.values, mapped)
    one, other = windows, DocumentWindows(flat, np.array(mapped), **arguments)
    keras.tree.map_structure(
        np.testing.assert_array_equal, batches(one, flags=True), batches(other, flags=True)
    )
    y, expected = one.whole([3, 5])[2], other.whole([3, 5])[2]
    np.testing.assert_array_equal(y, expected)
    assert y.dtype == expected.dtype == ("float32" if dtype == "float64" else "int32")


def test_every_target_in_a_file_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "_CHUNK", 4)
    mapped = np.memmap(tmp_path / "targets", dtype="float64", mode="w+", shape=(10,))
    mapped[9] = np.inf
    with pytest.raises(ValueError, match=r"(?s)`labels` must be finite.*Received: inf at row 9"):
        DocumentWindows(np.ones(10, int), mapped, offsets=[0, 10], per_step=True, window=5, lanes=1)


@pytest.mark.parametrize(
    ("documents", "labels", "message"),
    [
        (np.array([2**32 + 5, 1]), [0], "`documents`.*int32.*4294967301"),
        ([[2**32 + 5, 1]], [0], "`documents`.*int32.*4294967301"),
        ([[1]], [2**31], "`labels`.*int32.*2147483648"),
        ([[1]], np.array([2**31], "uint32"), "`labels`.*int32.*2147483648"),
        ([[1]], [1e39], "`labels`.*float32.*1e.39"),
        ([[1e39]], [1], "`documents`.*float32.*1e.39"),
    ],
)
def test_numbers_that_a_batch_cannot_hold_are_refused(documents, labels, message):
    offsets = [0, 2] if isinstance(documents, np.ndarray) else None
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        DocumentWindows(documents, labels, offsets=offsets, window=2, lanes=1)


def test_labels_may_be_vectors_and_a_dict_of_outputs():
    labels = {"a": np.arange(23), "b": np.arange(46.0).reshape(23, 2)}
    windows = DocumentWindows(random_documents(), labels, window=5, lanes=4)
    for _, y, weight in batches(windows, flags=True):
        busy = weight > 0
        np.testing.assert_array_equal(y["b"][busy, 0], 2 * y["a"][busy])


def two_outputs(model, per_step):
    """A compiled model with a list of outputs."""
    lstm = lambda: keras.layers.LSTM(5, stateful=True, return_sequences=per_step)  # noqa: E731
    heads = lambda x: [keras.layers.Dense(n, name=name)(x) for name, n in (("a", 1), ("b", 2))]  # noqa: E731
    model = token_model(cls=model, layers=token_layers(lstm, heads))
    model.compile("sgd", ["mse", "mae"], weighted_metrics=[["mae"], ["mse"]])
    return model


@pytest.mark.parametrize("form", ["list", "offsets", "dataset"])
@pytest.mark.parametrize("per_step", [False, True])
def test_a_tuple_of_labels_serves_a_list_of_outputs(form, per_step):
    documents = random_documents()
    flat, offsets = np.concatenate(documents), np.cumsum([0, *map(len, documents)])
    a, b = flat[:, None] * 1.0, np.stack([flat, -flat], 1) * 2.0
    if not per_step:
        a, b = a[: len(documents)], b[: len(documents)]
    rows = lambda t: np.split(t, offsets[1:-1]) if per_step else t  # noqa: E731
    arguments = dict(window=5, lanes=4, per_step=per_step)
    if form == "offsets":
        windows = DocumentWindows(flat, (a, b), offsets=offsets, **arguments)
    elif form == "list":
        windows = DocumentWindows(documents, (rows(a), rows(b)), **arguments)
    else:
        steps = [None] if per_step else []
        signature = (
            tf.TensorSpec([None], "int32"),
            (tf.TensorSpec([*steps, 1], "float32"), tf.TensorSpec([*steps, 2], "float32")),
        )
        pairs = lambda: zip(documents, zip(rows(a), rows(b), strict=True), strict=True)  # noqa: E731
        pairs = tf.data.Dataset.from_generator(pairs, output_signature=signature)
        windows = DocumentWindows(pairs, **arguments)
    named = DocumentWindows(documents, {"a": rows(a), "b": rows(b)}, **arguments)
    for (_, y, _), (_, expected, _) in zip(batches(windows), batches(named), strict=True):
        assert isinstance(y, tuple) and len(y) == 2
        np.testing.assert_array_equal(y[0], expected["a"])
        np.testing.assert_array_equal(y[1], expected["b"])


@pytest.mark.parametrize("model", [TBPTTModel, keras.Model])
@pytest.mark.parametrize("per_step", [False, True])
def test_a_list_of_outputs_learns_from_a_tuple_as_from_names(model, per_step):
    documents = random_documents()
    steps = len if per_step else lambda document: 1
    a = [np.resize(d, (steps(d), 1)) * 1.0 for d in documents]
    b = [np.resize(d, (steps(d), 2)) * 2.0 for d in documents]
    if not per_step:
        a, b = np.concatenate(a), np.concatenate(b)

    def losses(labels):
        keras.utils.set_random_seed(1)
        trained = two_outputs(model, per_step)
        windows = DocumentWindows(documents, labels, window=5, lanes=4, per_step=per_step)
        x = windows.dataset(flags=model is TBPTTModel)
        return trained.fit(x, shuffle=False, verbose=0, epochs=2).history

    got, expected = losses((a, b)), losses({"a": a, "b": b})
    assert got == expected and len(got) >= 4 and np.std(got["loss"]) > 0


def test_a_list_or_a_tuple_with_one_entry_per_document_is_labels():
    documents = [[1], [2], [3]]
    for labels, expected in (((4, 5, 6), [4, 5, 6]), (([4, 0], [5, 0], [6, 0]), None)):
        for form in (list, tuple):
            windows = DocumentWindows(documents, form(labels), window=1, lanes=3)
            ((_, y, _),) = batches(windows)
            np.testing.assert_array_equal(y, labels if expected is None else expected)
    targets = ([4], [5], [6])
    windows = DocumentWindows(documents, targets, window=1, lanes=3, per_step=True)
    np.testing.assert_array_equal(batches(windows)[0][1], targets)


@pytest.mark.parametrize("packing", ["packed", "aligned"])
def test_epochs_differ_in_order_and_seeds_repeat(packing):
    def order(windows):
        return [tuple(d) for d in rejoin(windows)]

    def make(seed):
        return DocumentWindows(
            random_documents(), window=5, lanes=4, shuffle=True, seed=seed, packing=packing
        )

    one, again, other = make(1), make(1), make(2)
    epochs = [order(one) for _ in range(3)]
    assert epochs == [order(again) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != order(other)
    again.epoch = 1
    assert order(again) == epochs[1] and again.epoch == 2


def test_the_order_is_the_same_on_every_machine():
    windows = DocumentWindows([[1]] * 3 + [[1, 1]] * 3, window=1, lanes=2, shuffle=True, seed=5)
    assert windows.plan.document.tolist() == [[5, 3], [5, 3], [1, 0], [4, 2], [4, -1]]


def test_the_plan_shows_the_coming_epoch_and_a_peek_does_not_end_it():
    windows = DocumentWindows(random_documents(), window=5, lanes=4, shuffle=True, seed=1)
    starts = windows.starts
    next(iter(windows.dataset(flags=True).take(1)))
    assert windows.epoch == 0
    read = np.stack([x["starts"] for (x,) in batches(windows, flags=True)])
    np.testing.assert_array_equal(read, starts)
    assert windows.epoch == 1 and not np.array_equal(windows.starts, starts)


def wait_until_all_are_read(windows, monkeypatch):
    """Returns a function that waits until the input pipeline has read an epoch's last window."""
    done, read = threading.Event(), windows._read

    def watch(epoch, step):
        result = read(epoch, step)
        if step == len(windows) - 1:
            done.set()
        return result

    monkeypatch.setattr(windows, "_read", watch)
    return lambda: done.wait(30)


@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize(("count", "used"), [(20, 14), (20, 19), (5, 1)])
def test_windows_that_nobody_has_used_do_not_end_an_epoch(flags, count, used, monkeypatch):
    windows = DocumentWindows([[1]] * count, [0] * count, window=1, lanes=1)
    wait = wait_until_all_are_read(windows, monkeypatch)
    batches = iter(windows.dataset(flags=flags))
    for _ in range(used):
        next(batches)
    assert wait() and windows.epoch == 0
    for _ in range(count - used):
        assert windows.epoch == 0
        next(batches)
    assert windows.epoch == 1


def test_an_epoch_of_one_window_ends_with_it():
    windows = DocumentWindows([[1]], [0], window=1, lanes=1)
    for epoch in range(3):
        assert windows.epoch == epoch
        next(iter(windows.dataset(flags=True)))


def test_a_map_behind_the_dataset_takes_one_window_at_a_time(monkeypatch):
    windows = DocumentWindows([[1]] * 5, [0] * 5, window=1, lanes=1)
    wait = wait_until_all_are_read(windows, monkeypatch)
    mapped = windows.dataset().map(lambda x, y, weight: (x, y + 1, weight))
    batches = iter(mapped)
    for _ in range(4):
        next(batches)
    assert wait() and windows.epoch == 0 and mapped.cardinality() == 5


def test_lanes_finish_together():
    lengths = np.random.default_rng(0).lognormal(5.16, 0.77, 2_000).astype(int) + 1
    flat, offsets = np.ones(lengths.sum(), "int32"), np.cumsum([0, *lengths])
    windows = DocumentWindows(flat, offsets=offsets, window=30, lanes=64)
    assert len(windows) == -(-int(np.ceil(lengths / 30).sum()) // 64)  # no packing has fewer
    aligned = DocumentWindows(flat, offsets=offsets, window=30, lanes=64, packing="aligned")
    assert len(aligned) < 1.2 * len(windows)


def test_idle_lanes_are_well_formed():
    windows = DocumentWindows([[0, 0, 7], [5]], [0, 1], window=2, lanes=4)
    for x, _, weight in batches(windows, flags=True):
        assert (x["inputs"][x["lengths"] == 0, 0] != 0).all()
        assert (weight[x["lengths"] == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": []}, "at least one document"),
        ({"documents": [[1, 2], []]}, "at least one step"),
        ({"documents": [[1, 2], [[1.0]]]}, "alike but for T"),
        ({"documents": [[1.0, np.nan], [2.0]]}, "finite"),
        ({"documents": [[1, -2], [2]]}, "ids >= 0"),
        ({"documents": [["a"], ["b"]]}, "turn text into ids"),
        ({"labels": [1]}, "one label per document"),
        ({"labels": [1, np.inf]}, "finite numbers"),
        ({"labels": [[1, 2, 3], [1]], "per_step": True}, "one target per step"),
        ({"labels": [[1, 2], [1]]}, "per_step=True"),
        ({"labels": [np.ones(2), np.ones(1)]}, "per_step=True"),
        ({"labels": tf.ragged.constant([[1, 2], [1]])}, "per_step=True"),
        ({"labels": {"a": [[1, 2], [1]]}}, r"labels\['a'\].*per_step=True"),
        ({"labels": ["yes", "no"]}, "keras.layers.StringLookup.*return_inverse=True"),
        ({"labels": np.array(["yes", "no"], object)}, "StringLookup"),
        ({"labels": [["a", "b"], ["a"]], "per_step": True}, "StringLookup"),
        ({"labels": [[[1], [2, 3]], [[1]]], "per_step": True}, "alike but for T"),
        ({"documents": [[1, 2], [[3], [4, 5]]]}, "alike but for T"),
        ({"labels": ([0, 1], [1, np.inf])}, r"labels\[1\].*finite numbers"),
        ({"weights": [1, -1]}, "one finite number >= 0 per document"),
        ({"window": 0}, "`window` must be an integer >= 1"),
        ({"lanes": 0}, "`lanes` must be an integer >= 1"),
        ({"mean_window": 3, "window": 3}, "at least 1.25 times"),
        ({"stretch": 0}, "`stretch` must be an integer >= 1"),
        ({"packing": "tight"}, "`packing` must be one of"),
        ({"documents": tf.data.Dataset.from_tensors([1]).repeat()}, "finite dataset"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = {"documents": [[1, 2], [3]], "labels": [0, 1], "window": 2, "lanes": 2}
    with pytest.raises(ValueError, match=rf"(?s){message}.*Received: "):
        DocumentWindows(**{**arguments, **change})


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([0, 1], {"flags": True}, "leave out `evaluation`"),
        ([0, 1], {"window_loss": "final_only"}, "leave out `window_loss`"),
        (None, {}, "needs labels"),
    ],
)
def test_an_evaluation_that_cannot_be_right_is_refused(labels, arguments, message):
    windows = DocumentWindows([[1, 2], [3]], labels, window=2, lanes=2)
    with pytest.raises(ValueError, match=rf"(?s){message}.*Received: "):
        windows.dataset(evaluation=True, **arguments)


def test_windows_cannot_be_shuffled():
    windows = DocumentWindows([[1, 2], [3]], [0, 1], window=2, lanes=2)
    with pytest.raises(ValueError, match="Shuffle documents instead"):
        windows.dataset().shuffle(10)


@pytest.mark.parametrize("flags", [False, True])
def test_the_end_of_an_epoch_waits_for_no_tuner(flags):
    """tf.data's tuner sleeps for up to 41 s, and letting go of the iterator waits for it."""
    windows = DocumentWindows([[1, 2, 3]], [0], window=2, lanes=1)
    assert windows.dataset(flags=flags).options().autotune.enabled is False


@pytest.mark.parametrize("flags", [False, True])
def test_a_dataset_keeps_its_documents_and_lets_go_of_them(flags):
    windows = DocumentWindows([[1, 2, 3]], [0], window=2, lanes=1)
    dataset, there = windows.dataset(flags=flags).take(2), weakref.ref(windows)
    del windows
    gc.collect()
    assert len(list(dataset)) == 2 and there() is not None
    del dataset
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copied_windows_give_the_same_batches(copied, tmp_path):
    documents = random_documents()
    mapped = np.memmap(
        tmp_path / "tokens", dtype="uint16", mode="w+", shape=sum(map(len, documents))
    )
    mapped[:] = np.concatenate(documents)
    windows = DocumentWindows(
        mapped, random_labels(), offsets=np.cumsum([0, *map(len, documents)]),
        window=5, mean_window=4, lanes=4, shuffle=True,
    )  # fmt: skip
    batches(windows)
    other = copied(windows)
    assert other.epoch == windows.epoch == 1 and other.fingerprint == windows.fingerprint
    for _ in range(2):
        keras.tree.map_structure(
            np.testing.assert_array_equal,
            batches(other, flags=True),
            batches(windows, flags=True),
        )
    batches(other)
    assert (windows.epoch, other.epoch) == (3, 4)


def test_whole_documents_end_together():
    documents = [[[1.0], [2.0], [3.0]], [[4.0]], [[5.0], [6.0]]]
    targets = [[1, 2, 3], [4], [5, 6]]
    windows = DocumentWindows(
        documents, targets, window=2, lanes=1, per_step=True, weights=[1, 2, 3]
    )
    steps, real, y, weights = windows.whole([2, 0])
    assert steps[..., 0].tolist() == [[5, 5, 6], [1, 2, 3]]
    assert real.tolist() == [[False, True, True], [True, True, True]]
    assert (y.tolist(), weights.tolist()) == ([6, 3], [3, 1])
    assert windows.lengths.tolist() == [3, 1, 2]
    part = DocumentWindows(np.arange(1, 9), [0, 1], window=2, lanes=1, offsets=[2, 3, 6]).whole([1])
    assert (part[0].tolist(), part[2].tolist()) == ([[4, 5, 6]], [1])
    assert DocumentWindows([[1]], window=2, lanes=1).whole([0])[2] is None
