import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import (
    VOCAB,
    compiled,
    counting_model,
    random_documents,
    random_labels,
    token_layers,
    token_model,
    weights_of,
)

from keras_tbptt import DocumentWindows, ResetStates, TBPTTModel
from keras_tbptt.state import get_states


def windows(lanes=4, window=5, count=23, **kwargs):
    return DocumentWindows(
        random_documents(count), random_labels(count), window=window, lanes=lanes, **kwargs
    )


def stock_model(**kwargs):
    return compiled(token_model(cls=keras.Model), **kwargs)


def test_a_stock_model_trains_as_a_tbptt_model_does():
    stock, ours = stock_model(), compiled(token_model())
    one, other = (windows(shuffle=True, seed=1) for _ in range(2))
    stock.fit(one.dataset(), shuffle=False, epochs=3, verbose=0, callbacks=[ResetStates(one)])
    ours.fit(other, epochs=3, verbose=0)
    np.testing.assert_allclose(weights_of(stock), weights_of(ours), atol=1e-6)


def test_lanes_are_reset_where_documents_begin():
    model = counting_model(lanes=2, window=1)
    model.compile("sgd", "mse")
    train = DocumentWindows(
        np.ones((5, 1), "float32"), [0, 0], offsets=[0, 3, 5], window=1, lanes=2
    )
    counts = []

    class Watch(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch, logs=None):
            counts.append(get_states(model)[0][:, 0].tolist())

    model.predict(train.dataset(), verbose=0, callbacks=[ResetStates(train), Watch()])
    assert counts == [[1, 1], [2, 2], [3, 3]]  # lane 1 is idle in the third window
    counts.clear()
    model.predict(train.dataset(), verbose=0, callbacks=[ResetStates(train), Watch()])
    assert counts == [[1, 1], [2, 2], [3, 3]]


def test_validation_leaves_training_bit_identical():
    def train(validation=None):
        model, train = stock_model(), windows(shuffle=True, seed=1)
        model.fit(
            train.dataset(),
            shuffle=False,
            epochs=3,
            verbose=0,
            validation_data=validation and validation.dataset(),
            callbacks=[ResetStates(train, validation)],
        )
        return [weights_of(model), *get_states(model)]

    for one, other in zip(train(windows(count=9)), train(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_validation_on_the_training_windows_is_no_epoch_of_theirs():
    def train(**kwargs):
        model, train = stock_model(), windows(shuffle=True, seed=1)
        callbacks = [ResetStates(train, validation=train)]
        if kwargs.pop("validate", False):
            kwargs["validation_data"] = train.dataset()
        model.fit(
            train.dataset(), shuffle=False, epochs=3, verbose=0, callbacks=callbacks, **kwargs
        )
        assert train.epoch == 3
        model.evaluate(train.dataset(), verbose=0, callbacks=[ResetStates(train)])
        model.predict(train.dataset(), verbose=0, callbacks=[ResetStates(train)])
        assert train.epoch == 3
        return weights_of(model)

    np.testing.assert_array_equal(train(validate=True), train())


def two_outputs(x):
    return [keras.layers.Dense(1, activation="sigmoid", name=name)(x) for name in "ab"]


def one_label():
    return random_documents(), random_labels(), {}, token_model


def one_label_each_for_two_outputs():
    labels = {"a": random_labels(seed=1), "b": random_labels(seed=2)}
    outputs = lambda x: dict(zip("ab", two_outputs(x), strict=True))  # noqa: E731
    lstm = lambda: keras.layers.LSTM(5, stateful=True)  # noqa: E731
    layers = token_layers(lstm, outputs)
    return random_documents(), labels, {}, lambda cls: token_model(cls=cls, layers=layers)


def tagger(cls, mask=False):
    def layers(tokens):
        x = keras.layers.Embedding(VOCAB, 6, mask_zero=mask or cls is TBPTTModel)(tokens)
        x = keras.layers.LSTM(5, stateful=True, return_sequences=True)(x)
        return keras.layers.Dense(1, activation="sigmoid")(x)

    return token_model(cls=cls, layers=layers)


def one_target_per_step():
    targets = [d[:, None] > VOCAB / 2 for d in random_documents()]
    return random_documents(), targets, {"per_step": True}, tagger


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("task", [one_label, one_label_each_for_two_outputs, one_target_per_step])
def test_a_stock_model_evaluates_documents_as_a_tbptt_model_does(task, weighted):
    documents, labels, kwargs, model = task()
    if weighted:
        kwargs["weights"] = np.linspace(0, 2, len(documents))
    valid = DocumentWindows(documents, labels, window=5, lanes=4, **kwargs)
    stock, ours = model(cls=keras.Model), model(cls=TBPTTModel)
    for each in (stock, ours):
        metrics = {n: ["accuracy"] for n in "ab"} if isinstance(labels, dict) else ["accuracy"]
        each.compile("sgd", "binary_crossentropy", weighted_metrics=metrics)
    got = stock.evaluate(
        valid.dataset(evaluation=True),
        verbose=0, return_dict=True, callbacks=[ResetStates(valid)],
    )  # fmt: skip
    expected = ours.evaluate(valid, verbose=0, return_dict=True)
    names = [name for name in expected if name not in ("a_loss", "b_loss")]
    assert len(names) == (3 if isinstance(labels, dict) else 2)
    assert [got[name] for name in names] == pytest.approx([expected[n] for n in names], abs=1e-6)


def test_the_loss_of_an_evaluation_is_the_mean_over_documents():
    model, valid = stock_model(), windows()
    ours = compiled(token_model())
    predicted = ours.predict_documents(random_documents())
    expected = keras.losses.binary_crossentropy(random_labels()[:, None], predicted).numpy().mean()
    got = model.evaluate(valid.dataset(evaluation=True), verbose=0, callbacks=[ResetStates(valid)])
    assert got[0] == pytest.approx(expected, abs=1e-6)


def test_keras_would_divide_the_loss_of_masked_steps_by_those_of_their_batch():
    documents, targets, kwargs, _ = one_target_per_step()
    valid = DocumentWindows(documents, targets, window=5, lanes=4, **kwargs)
    model = compiled(tagger(keras.Model, mask=True))
    with pytest.raises(ValueError, match=r"(?s)mask_zero=False.*Received: "):
        model.evaluate(valid.dataset(evaluation=True), verbose=0, callbacks=[ResetStates(valid)])
    model.predict(valid.dataset(), verbose=0, callbacks=[ResetStates(valid)])


def fit(model, data, callback, **kwargs):
    model.fit(data, shuffle=False, verbose=0, callbacks=[callback], **kwargs)


def shuffled_arrays(train):
    x, y, w = (np.concatenate(parts) for parts in zip(*train.dataset(), strict=True))
    stock_model().fit(
        x, y, sample_weight=w, batch_size=4, verbose=0, callbacks=[ResetStates(train)]
    )


def stateless(train):
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    layers = token_layers(lambda: keras.layers.LSTM(5))
    fit(compiled(keras.Model(tokens, layers(tokens))), train.dataset(), ResetStates(train))


def behind(change, **kwargs):
    """Trains on the windows with something behind their dataset."""

    def wrong(train):
        fit(stock_model(), change(train.dataset()), ResetStates(train), epochs=2, **kwargs)

    return wrong


def validation_of(change, **kwargs):
    def wrong(train):
        valid = windows(count=9)
        fit(
            stock_model(), train.dataset(), ResetStates(train, valid),
            validation_data=change(valid.dataset(evaluation=True)), **kwargs,
        )  # fmt: skip

    return wrong


def with_starts(starts):
    return lambda t: fit(stock_model(), t.dataset(), ResetStates(starts(t)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (behind(lambda d: d.map(lambda *batch: batch).shuffle(3)), "reads ahead"),
        (behind(lambda d: d.prefetch(2)), "reads ahead"),
        (behind(lambda d: d.skip(1).repeat(), steps_per_epoch=25), "reads ahead"),
        (behind(lambda d: d.cache()), "do not come from the windows"),
        (behind(lambda d: d.repeat()), "no window 26"),
        (validation_of(lambda d: d.repeat(2)), "no window"),
        (validation_of(lambda d: d.take(2)), "must be all"),
        (validation_of(lambda d: d, validation_steps=2), "must be all"),
        (with_starts(lambda t: t.starts.astype(int)), "bool"),
        (with_starts(lambda t: t.starts[0]), "bool"),
        (with_starts(lambda t: t.starts[:, :3]), "batch size"),
        (with_starts(lambda t: t.starts[:-1]), "all 24 windows"),
        (
            lambda t: fit(stock_model(steps_per_execution=2), t.dataset(), ResetStates(t)),
            "steps_per_execution=1",
        ),
        (shuffled_arrays, "do not come from the windows"),
        (lambda t: fit(stock_model(), t.dataset(), ResetStates(windows(lanes=3))), "batch size"),
        (stateless, "stateful=True"),
        (
            lambda t: fit(stock_model(), t.dataset(), ResetStates(t), steps_per_epoch=2),
            "leave out steps_per_epoch",
        ),
        (
            lambda t: fit(stock_model(), t.dataset(), ResetStates(t), validation_data=t.dataset()),
            "validation=valid",
        ),
        (lambda t: fit(compiled(token_model()), t, ResetStates(t)), "leave ResetStates out"),
        (lambda t: ResetStates([True]), "must be keras_tbptt.DocumentWindows, or"),
        (lambda t: ResetStates(None), "must be keras_tbptt.DocumentWindows, or"),
    ],
)
def test_what_cannot_be_right_is_refused_loudly(wrong, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*Received: "):
        wrong(windows())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.map(lambda x, y, weight: (x, y, weight)),
        lambda d: d.repeat(),
        lambda d: d.unbatch().batch(4, drop_remainder=True),
    ],
)
def test_what_takes_one_window_at_a_time_may_follow_the_dataset(change):
    def train(change):
        model, train = stock_model(), windows(shuffle=True, seed=1)
        data, steps = change(train.dataset()), len(train)
        fit(model, data, ResetStates(train), epochs=3, steps_per_epoch=steps)
        return weights_of(model)

    np.testing.assert_array_equal(train(change), train(lambda dataset: dataset))


def test_an_evaluation_in_the_middle_of_training_changes_nothing():
    def train(*callbacks):
        model, train = stock_model(), windows(shuffle=True, seed=1)
        callbacks = [ResetStates(train), *(callback(train) for callback in callbacks)]
        model.fit(train.dataset(), shuffle=False, epochs=2, verbose=0, callbacks=callbacks)
        return weights_of(model)

    class Evaluate(keras.callbacks.Callback):
        def __init__(self, train):
            super().__init__()
            self.train = train

        def on_train_batch_begin(self, batch, logs=None):
            if batch == 7:
                data = self.train.dataset(evaluation=True)
                self.model.predict(data, verbose=0, callbacks=[ResetStates(self.train)])

    np.testing.assert_array_equal(train(Evaluate), train())


class OwnLanes:
    """Lanes that somebody made by hand, with new boundaries in every epoch."""

    def __init__(self, windows):
        self.windows = windows

    @property
    def starts(self):
        return self.windows.starts


def test_boundaries_of_ones_own_lanes_reset_as_the_windows_do():
    def train(boundaries):
        model, train = stock_model(), windows(shuffle=True, seed=1)
        valid = windows(count=9)
        callback = ResetStates(boundaries(train), validation=boundaries(valid))
        data = valid.dataset(evaluation=True)
        fit(model, train.dataset(), callback, epochs=3, validation_data=data)
        return [weights_of(model), *get_states(model)]

    for one, other in zip(train(OwnLanes), train(lambda w: w), strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_array_of_boundaries_serves_every_epoch():
    def train(boundaries):
        model, train = stock_model(), windows()
        arrays = [np.stack(parts) for parts in zip(*train.dataset(), strict=True)]
        data = tf.data.Dataset.from_tensor_slices(tuple(arrays)) if boundaries else train.dataset()
        callback = ResetStates(train.starts if boundaries else train)
        fit(model, data, callback, epochs=3)
        return weights_of(model)

    np.testing.assert_array_equal(train(True), train(False))


def test_a_refused_training_has_not_begun():
    model = stock_model(steps_per_execution=2)
    before = weights_of(model)
    with pytest.raises(ValueError):
        fit(model, windows().dataset(), ResetStates(windows()))
    np.testing.assert_array_equal(weights_of(model), before)
