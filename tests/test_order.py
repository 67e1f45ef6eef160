"""Windows that do not follow each other are refused, whatever they came through."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import compiled, random_documents, random_labels, token_model, weights_of

from keras_tbptt import DocumentWindows, TBPTTModel
from keras_tbptt.state import get_states

Refused = tf.errors.InvalidArgumentError


def windows(**kwargs):
    return DocumentWindows(random_documents(), random_labels(), window=5, lanes=4, **kwargs)


def flagged(**kwargs):
    """A data set whose own `shuffle` is not refused, as after any `map`."""
    return windows(**kwargs).dataset(flags=True).map(lambda *batch: batch)


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize(
    "disturb", [lambda d: d.shuffle(20, seed=1), lambda d: d.skip(1), lambda d: d.shard(2, 0)]
)
def test_windows_out_of_order_are_refused_before_they_are_learnt_from(call, disturb):
    model = compiled(token_model())
    with pytest.raises(Refused, match="do not follow each other"):
        getattr(model, call)(disturb(flagged()), verbose=0)


def test_nothing_is_learnt_from_a_window_that_is_refused():
    model = compiled(token_model(lanes=1))
    documents = [np.arange(1, 11)]
    second = DocumentWindows(documents, [1], window=5, lanes=1).dataset(flags=True)
    second = second.map(lambda *batch: batch).skip(1)
    before = weights_of(model), get_states(model)
    with pytest.raises(Refused, match="do not follow each other"):
        model.fit(second, verbose=0)
    np.testing.assert_array_equal(weights_of(model), before[0])
    np.testing.assert_array_equal(get_states(model), before[1])


def test_what_keeps_the_order_is_taken():
    def train(data, **kwargs):
        model = compiled(token_model())
        model.fit(data, verbose=0, **kwargs)
        return weights_of(model)

    expected = train(windows(), epochs=2)
    repeated = flagged().repeat().prefetch(2)
    np.testing.assert_array_equal(
        train(repeated, epochs=2, steps_per_epoch=len(windows())), expected
    )
    # Validation in between, in the middle of documents.
    thirds = train(flagged().repeat(), epochs=6, steps_per_epoch=-(-len(windows()) // 3))
    with_validation = train(
        flagged().repeat(), epochs=6, steps_per_epoch=-(-len(windows()) // 3),
        validation_data=windows(),
    )  # fmt: skip
    np.testing.assert_array_equal(thirds, with_validation)


def test_a_fit_after_an_interruption_begins_anew():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                raise KeyboardInterrupt

    model = compiled(token_model())
    with pytest.raises(KeyboardInterrupt):
        model.fit(windows(), verbose=0, callbacks=[Stop()])
    model.fit(windows(), verbose=0)


def test_the_gradient_of_whole_documents_needs_aligned_windows_from_any_data_set():
    model = compiled(token_model(backprop_windows="all"))
    with pytest.raises(ValueError, match='packing="aligned"'):
        model.fit(windows().dataset(flags=True), verbose=0)
    with pytest.raises(Refused, match="begin together in all lanes"):
        model.fit(flagged(), verbose=0)
    model.fit(flagged(packing="aligned"), validation_data=windows(), verbose=0)
    assert int(model.optimizer.iterations) == model.optimizer_steps(windows(packing="aligned"))


# Lanes of one's own: 3 windows of 2 lanes, all full, the document of lane 1 ending in the second.
IDS = np.random.default_rng(0).integers(1, 40, (3, 2, 5)).astype("int32")
STARTS = np.array([[True, True], [False, False], [False, True]])
ENDS = np.array([[False, False], [False, True], [True, True]])


def own(**flags):
    x = {"inputs": IDS, "starts": STARTS, **flags}
    y, weight = np.ones((3, 2), "int32"), np.ones((3, 2), "float32")
    return tf.data.Dataset.from_tensor_slices((x, y, weight))


def test_batches_of_ones_own_train_with_the_flags_that_the_loss_needs():
    documents = [IDS[:, 0].ravel(), IDS[:2, 1].ravel(), IDS[2, 1]]
    same = DocumentWindows(documents, [1, 1, 1], window=5, lanes=2)
    for window_loss, flags in (("per_window", {}), ("final_only", {"ends": ENDS})):
        mine, theirs = (compiled(token_model(lanes=2, window_loss=window_loss)) for _ in range(2))
        mine.fit(own(**flags), verbose=0)
        theirs.fit(same, verbose=0)
        np.testing.assert_allclose(weights_of(mine), weights_of(theirs), atol=1e-7)
    evaluated = mine.evaluate(own(ends=ENDS), verbose=0)
    np.testing.assert_allclose(evaluated, theirs.evaluate(same, verbose=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("window_loss", "flags", "missing"),
    [
        ("final_only", {}, "ends"),
        ("linear_gain", {"ends": ENDS}, "positions"),
        ("per_window", {"lengths": np.full((3, 2), 5)}, "totals"),
    ],
)
def test_a_flag_that_is_missing_is_named(window_loss, flags, missing):
    model = compiled(token_model(lanes=2, window_loss=window_loss))
    with pytest.raises(ValueError, match=rf"(?s)need the flags.*{missing}.*Received: "):
        model.fit(own(**flags), verbose=0)


def test_a_model_in_the_style_of_call_is_refused_in_a_sentence():
    class Mine(TBPTTModel):
        def __init__(self):
            super().__init__()
            self.lstm = keras.layers.LSTM(3, stateful=True)

        def call(self, x):
            return self.lstm(x)

    with pytest.raises(ValueError, match=r"(?s)functional model.*super\(\).*Received: "):
        Mine()


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # Keras, at any such end
@pytest.mark.parametrize("steps_per_execution", [1, 4])
def test_the_end_of_data_of_unknown_length_is_no_step_of_the_optimizer(steps_per_execution):
    """Keras's Adam would correct its bias, and a schedule would go on, for a step too many."""
    found = []
    for data in (windows(), flagged().filter(lambda *batch: True)):
        model = compiled(token_model(), "adam", steps_per_execution=steps_per_execution)
        model.fit(data, validation_data=windows(), epochs=2, verbose=0)
        assert model.optimizer.iterations.numpy() == 2 * len(windows())
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
