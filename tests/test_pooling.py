import keras
import numpy as np
import pytest
from toys import random_documents

from keras_tbptt import DocumentWindows, TBPTTModel
from keras_tbptt.layers import ConcatPooling


def pooled(document):
    return np.concatenate([document[-1], document.mean(axis=0), document.max(axis=0)])


def test_it_pools_the_steps_that_are_not_masked():
    steps = np.random.default_rng(0).normal(size=(2, 6, 3)).astype("float32") - 5  # all below zero
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)
    expected = [pooled(row[real]) for row, real in zip(steps, mask, strict=True)]
    np.testing.assert_allclose(ConcatPooling()(steps, mask=mask), expected, atol=1e-6)


def test_windows_pool_a_document_as_one_pass_does():
    documents = random_documents(features=3)
    steps = keras.Input(batch_shape=(4, 5, 3))
    model = TBPTTModel(steps, ConcatPooling(stateful=True)(steps))
    expected = [pooled(document) for document in documents]
    np.testing.assert_allclose(model.predict_documents(documents), expected, atol=1e-6)


def test_its_state_is_no_weight_and_is_reset():
    layer = ConcatPooling(stateful=True)
    first = layer(np.ones((2, 3, 4)))
    assert layer.weights == []
    assert [tuple(state.shape) for state in layer.states] == [(2, 4), (2, 4), (2, 1)]
    np.testing.assert_array_equal(layer(np.zeros((2, 3, 4)))[:, 4:8], np.full((2, 4), 0.5))
    layer.reset_state()
    np.testing.assert_array_equal(layer(np.ones((2, 3, 4))), first)
    copy = ConcatPooling.from_config(layer.get_config())
    assert copy.stateful and copy.name == layer.name


def test_a_batch_of_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"fixed batch size.*Received: "):
        ConcatPooling(stateful=True)(keras.Input((3, 4)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_counts_are_exact_where_variables_have_half_precision(dtype):
    layer = ConcatPooling(stateful=True, dtype=dtype)
    for value in (0.0, 3.0, 3.0, 3.0):
        found = layer(np.full((1, 1024, 1), value))
    np.testing.assert_array_equal(found, [[3.0, 2.25, 3.0]])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_sums_are_exact_in_mixed_precision(policy):
    """A thousand steps of 1.25: a sum in half precision would stop growing long before."""
    documents = [np.full((1000, 2), 1.25, "float32")] * 4
    steps = keras.Input(batch_shape=(4, 5, 2))
    outputs = ConcatPooling(stateful=True, dtype=keras.DTypePolicy(policy))(steps)
    model = TBPTTModel(steps, keras.layers.Dense(1, dtype="float32")(outputs))
    predicted = TBPTTModel(steps, outputs).predict_documents(documents)
    np.testing.assert_array_equal(predicted, np.full((4, 6), 1.25))
    model.compile("sgd", "mse")
    model.fit(
        DocumentWindows(documents, [1.0] * 4, window=5, lanes=4, packing="aligned"), verbose=0
    )
