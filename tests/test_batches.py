import keras
import numpy as np
import pytest
from toys import (
    VOCAB,
    compiled,
    random_documents,
    random_labels,
    token_layers,
    token_model,
    weights_of,
)

from keras_tbptt import DocumentWindows

L = keras.layers


def per_step_model(outputs=lambda x: L.Dense(1)(x), **kwargs):
    recurrent = lambda: L.LSTM(5, stateful=True, return_sequences=True)  # noqa: E731
    return token_model(layers=token_layers(recurrent, outputs), **kwargs)


def windows(labels, **kwargs):
    return DocumentWindows(random_documents(), labels, window=5, lanes=4, **kwargs)


@pytest.mark.parametrize("backprop_windows", [1, 2])
def test_targets_per_step_need_no_axis_of_one(backprop_windows):
    targets = [np.cos(d) for d in random_documents()]

    def train(targets):
        model = per_step_model(backprop_windows=backprop_windows)
        model.compile("sgd", "mse", weighted_metrics=["mae"])
        data = windows(targets, per_step=True)
        history = model.fit(data, validation_data=data, verbose=0).history
        return weights_of(model), history

    flat, history = train(targets)
    column, same = train([t[:, None] for t in targets])
    np.testing.assert_array_equal(flat, column)
    assert history == same


@pytest.mark.parametrize(
    ("make", "labels", "kwargs", "message"),
    [
        (
            lambda: per_step_model(),
            random_labels(),
            {},
            r"per_step=True.*return_sequences=False",
        ),
        (
            lambda: token_model(),
            [np.ones(len(d)) for d in random_documents()],
            {"per_step": True},
            "return_sequences=True",
        ),
        (
            lambda: per_step_model(lambda x: keras.ops.squeeze(L.Dense(1)(x), -1)),
            [np.ones(len(d)) for d in random_documents()],
            {"per_step": True},
            "needs a last axis",
        ),
    ],
    ids=["forgotten per_step", "forgotten return_sequences", "squeezed"],
)
def test_targets_that_do_not_fit_the_outputs_are_explained(make, labels, kwargs, message):
    model = make()
    model.compile("sgd", "mse")
    before = weights_of(model)
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=rf"(?s)({message}).*Received: targets"):
            call(windows(labels, **kwargs), verbose=0)
    np.testing.assert_array_equal(weights_of(model), before)


@pytest.mark.parametrize("class_weight", [{-1: 2.0}, {0: -1.0}, {0.5: 1.0}, {0: np.nan}])
def test_a_class_weight_that_means_nothing_is_refused(class_weight):
    model = compiled(token_model())
    with pytest.raises(ValueError, match=r"(?s)class indices >= 0.*Received: class_weight"):
        model.fit(windows(random_labels()), class_weight=class_weight, verbose=0)


def test_classes_without_a_weight_count_one():
    labels = np.arange(23) % 3

    def train(**kwargs):
        model = token_model(layers=token_layers(outputs=L.Dense(3, activation="softmax")))
        model.compile("sgd", "sparse_categorical_crossentropy")
        model.fit(windows(labels, **kwargs.pop("data", {})), verbose=0, **kwargs)
        return weights_of(model)

    weighed = train(class_weight={1: 3.0})
    expected = train(data={"weights": np.where(labels == 1, 3.0, 1.0)})
    np.testing.assert_allclose(weighed, expected, atol=1e-7)


def nested_embedding(mask_zero=False):
    return lambda ids: L.LSTM(5, stateful=True)(
        keras.Sequential([L.Embedding(VOCAB, 6, mask_zero=mask_zero), L.Dense(4)])(ids)
    )


def test_an_id_beyond_a_nested_embedding_is_named():
    model = token_model(layers=nested_embedding())
    with pytest.raises(ValueError, match=rf"input_dim={VOCAB}.*Received: id {VOCAB}"):
        model.predict_documents([[1, VOCAB]])


@pytest.mark.parametrize("layers", [token_layers(), nested_embedding(mask_zero=True)])
def test_a_real_id_0_is_refused_where_it_would_be_padding(layers):
    model = compiled(token_model(layers=layers))
    zeros = DocumentWindows([[0, 1, 1], [1, 0]], [0, 1], window=5, lanes=4)
    for call in (model.fit, model.evaluate, model.predict, model.predict_documents):
        with pytest.raises(ValueError, match=r"(?s)let ids begin at 1.*Received: id 0"):
            call(zeros)
    with pytest.raises(ValueError, match="let ids begin at 1"):
        model.fit(zeros.dataset(flags=True))


def test_id_0_is_an_id_like_any_other_without_mask_zero():
    """Was the symbol before this one a 0?"""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 2, n) for n in rng.integers(5, 40, 200)]
    targets = [np.append(0, 1 - d[:-1]) for d in documents]
    keras.utils.set_random_seed(0)
    model = token_model(
        lanes=16,
        window=10,
        layers=lambda ids: L.Dense(1, activation="sigmoid")(
            L.LSTM(8, stateful=True, return_sequences=True)(L.Embedding(2, 4)(ids))
        ),
    )
    model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy", weighted_metrics=["accuracy"])
    data = DocumentWindows(documents, targets, per_step=True, window=10, lanes=16)
    model.fit(data, epochs=6, verbose=0)
    assert model.evaluate(data, verbose=0)[1] > 0.99
