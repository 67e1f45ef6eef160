"""Windows whose targets are their inputs, one step on."""

import keras
import numpy as np
import pytest
from toys import VOCAB, random_documents, token_layers, token_model

from keras_tbptt import DocumentWindows


def pairs(windows):
    """The real steps of each document of the epoch: inputs and targets, in order."""
    found, plan = {}, windows.plan
    for step, (x, y, weight) in enumerate(windows.dataset(flags=True)):
        for lane, document in enumerate(plan.document[step]):
            real = weight[lane].numpy() > 0
            assert real.sum() == x["lengths"][lane]
            inputs, targets = found.setdefault(int(document), ([], []))
            inputs.extend(x["inputs"][lane].numpy()[real])
            targets.extend(y[lane].numpy()[real])
    return {i: tuple(map(np.array, found[i])) for i in sorted(found) if i >= 0}


def test_targets_are_the_next_steps_of_the_same_document():
    documents = [d for d in random_documents() if len(d) > 1]
    windows = DocumentWindows.next_step(documents, window=5, lanes=4, shuffle=True, seed=0)
    found = pairs(windows)
    assert len(found) == len(documents)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(found[i][0], document[:-1])
        np.testing.assert_array_equal(found[i][1], document[1:])


@pytest.mark.parametrize("steps, lanes", [(101, 4), (100, 4), (103, 7), (3, 4), (2, 4), (50, 1)])
def test_streams_predict_every_step_but_the_first_once(steps, lanes):
    sequence = np.random.default_rng(0).integers(0, VOCAB, steps)
    windows = DocumentWindows.next_step(sequence, window=5, lanes=lanes)
    found = pairs(windows).values()
    np.testing.assert_array_equal(np.concatenate([x for x, _ in found]), sequence[:-1])
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), sequence[1:])
    lengths = [len(x) for x, _ in found]
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == min(lanes, steps - 1)


@pytest.mark.parametrize("lanes", [1, 4])
def test_the_only_id_that_is_not_0_may_be_the_last(lanes):
    # Padding and idle lanes repeat it, and it has no next step.
    sequence = np.array([0, 0, 0, 3])
    found = pairs(DocumentWindows.next_step(sequence, window=5, lanes=lanes)).values()
    np.testing.assert_array_equal(np.concatenate([y for _, y in found]), sequence[1:])


def test_streams_are_documents_cut_by_hand():
    sequence = np.random.default_rng(0).normal(size=(90, 3)).astype("float32")
    arguments = dict(window=5, lanes=4)
    edges = np.arange(5) * 89 // 4
    by_hand = DocumentWindows(
        sequence[:-1], sequence[1:], offsets=edges, per_step=True, **arguments
    )
    for windows in (
        DocumentWindows.next_step(sequence, offsets=[0, 90], streams=True, **arguments),
        DocumentWindows.next_step([sequence[:30], sequence[30:]], streams=True, **arguments),
        DocumentWindows(
            [sequence[:40], sequence[40:-1]],
            [sequence[1:41], sequence[41:]],
            per_step=True,
            streams=True,
            **arguments,
        ),
    ):
        for mine, theirs in zip(windows.dataset(), by_hand.dataset(), strict=True):
            for one, other in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(one, other)


def test_nothing_is_copied(tmp_path):
    sequence = np.memmap(tmp_path / "ids", "uint16", "w+", shape=(1000,))
    sequence[:] = np.arange(1000)
    windows = DocumentWindows.next_step(sequence, window=5, lanes=3)
    assert windows._flat.next_step.values is sequence and windows._flat.targets.values is sequence
    assert (
        windows.fingerprint
        != DocumentWindows(sequence, offsets=[0, 1000], window=5, lanes=3).fingerprint
    )
    x, y, _ = next(iter(windows.dataset()))
    np.testing.assert_array_equal(y, x + 1)


def test_a_text_trains_on_streams():
    recurrent = lambda: keras.layers.LSTM(8, stateful=True, return_sequences=True)  # noqa: E731
    head = keras.layers.Dense(VOCAB, activation="softmax")
    model = token_model(layers=token_layers(recurrent, head))
    model.compile("adam", "sparse_categorical_crossentropy")
    sequence = np.tile(np.arange(1, 9), 200)
    windows = DocumentWindows.next_step(sequence, window=5, lanes=4)
    losses = model.fit(windows, validation_data=windows, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert len(model.predict_documents(windows)) == 4


def test_what_cannot_be_right_is_refused():
    documents = [[1, 2, 3], [4]]
    arguments = dict(window=5, lanes=2)
    for make, message in (
        (
            lambda: DocumentWindows.next_step(documents, **arguments),
            r"streams=True",
        ),
        (lambda: DocumentWindows.next_step(np.ones(1, int), **arguments), "two steps"),
        (lambda: DocumentWindows(documents, [0, 1], streams=True, **arguments), "per_step=True"),
        (lambda: DocumentWindows(documents, streams=True, **arguments), "per_step=True"),
        (
            lambda: DocumentWindows.next_step(documents, streams=True, weights=[1, 1], **arguments),
            "no `weights`",
        ),
    ):
        with pytest.raises(ValueError, match=message + ".*Received"):
            make()

    recurrent = lambda: keras.layers.LSTM(5, stateful=True, return_sequences=True)  # noqa: E731
    head = keras.layers.Dense(VOCAB - 1, activation="softmax")
    model = token_model(layers=token_layers(recurrent, head))
    model.compile("adam", "sparse_categorical_crossentropy")
    windows = DocumentWindows.next_step(np.arange(1, VOCAB), window=5, lanes=4)
    with pytest.raises(ValueError, match=f"{VOCAB} classes.*Received"):
        model.fit(windows)


def test_fit_names_lanes_that_are_mostly_idle():
    recurrent = lambda: keras.layers.LSTM(5, stateful=True, return_sequences=True)  # noqa: E731
    model = token_model(lanes=16, layers=token_layers(recurrent))
    model.compile("sgd", "binary_crossentropy")
    windows = DocumentWindows([[1, 2, 3]], [[1, 0, 1]], window=5, lanes=16, per_step=True)
    with pytest.warns(UserWarning, match=r"streams=True.*Received"):
        model.fit(windows, verbose=0)
