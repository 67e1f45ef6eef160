import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import weights_of

import keras_tbptt
from keras_tbptt import DocumentWindows, TBPTTModel, evaluate_dynamically
from keras_tbptt.state import get_states

CLASSES = 9
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def language_model(lanes=1, window=4, **kwargs):
    keras.utils.set_random_seed(3)
    tokens = keras.Input(batch_shape=(lanes, window), dtype="int32")
    x = keras.layers.Embedding(CLASSES, 6)(tokens)
    x = keras.layers.Dropout(0.5)(x)
    x = keras_tbptt.layers.LSTM(8, stateful=True, return_sequences=True)(x)
    model = TBPTTModel(tokens, keras.layers.Dense(CLASSES)(x), **kwargs)
    metrics = [keras_tbptt.metrics.Perplexity(from_logits=True)]
    model.compile("adam", LOSS, weighted_metrics=metrics)
    return model


def text(steps=203, seed=0):
    return np.random.default_rng(seed).integers(1, CLASSES, steps)


def by_hand(model, windows, learning_rate, decay, scales, epsilon):
    """The paper's equations, with NumPy, on a model whose whole text is one lane."""
    variables = model.trainable_variables
    trained = [variable.numpy() for variable in variables]
    level = None if scales is None else np.concatenate([s.ravel() for s in scales]).mean()
    losses, steps, gradients = 0.0, 0, []
    for x, y, _ in windows.dataset(flags=True):
        real = int(x["lengths"][0])
        with tf.GradientTape() as tape:
            logits = model(x["inputs"], training=False)[:, :real]
            loss = tf.reduce_sum(
                keras.losses.sparse_categorical_crossentropy(y[:, :real], logits, from_logits=True)
            )
            mean = loss / model.window
        found = tape.gradient(mean, variables)
        gradients.append([tf.convert_to_tensor(g).numpy() for g in found])
        losses, steps = losses + float(loss), steps + real
        for i, (variable, gradient) in enumerate(zip(variables, gradients[-1], strict=True)):
            r = None if scales is None else scales[i]
            rate = learning_rate if r is None else learning_rate / (r + epsilon)
            pull = decay if r is None else np.minimum(decay * r / level, 1)
            now = variable.numpy()
            variable.assign(now - rate * gradient + pull * (trained[i] - now))
    return losses / steps, gradients


@pytest.mark.parametrize(("decay", "with_statistics"), [(0, False), (0.05, False), (0.05, True)])
def test_it_is_the_papers_equations(decay, with_statistics):
    windows = DocumentWindows.next_step(text(), window=4, lanes=1)
    other = DocumentWindows.next_step(text(40, seed=1), window=4, lanes=1)
    scales = None
    if with_statistics:
        _, gradients = by_hand(language_model(), other, 0.0, 0.0, None, 1.0)
        scales = [
            np.sqrt(np.mean([np.square(step[i]) for step in gradients], axis=0))
            for i in range(len(gradients[0]))
        ]
    expected, _ = by_hand(language_model(), windows, 0.01, decay, scales, 0.02)
    found = evaluate_dynamically(
        language_model(),
        windows,
        learning_rate=0.01,
        decay=decay,
        statistics=other if with_statistics else None,
        epsilon=0.02,
    )
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)


def test_a_text_that_repeats_is_predicted_better():
    windows = DocumentWindows.next_step(np.tile([1, 2, 3, 4, 5, 6], 80), window=4, lanes=1)
    model = language_model()
    loss = model.evaluate(windows, verbose=0, return_dict=True)["loss"]
    assert evaluate_dynamically(model, windows, learning_rate=1.0)["loss"] < loss / 2


def test_everything_is_left_as_it_was():
    windows = DocumentWindows.next_step(text(), window=4, lanes=2)
    models = [language_model(lanes=2), language_model(lanes=2)]
    for model in models:
        model.fit(windows, epochs=1, verbose=0)
    model = models[0]
    before, states = weights_of(model), get_states(model)
    expected = model.evaluate(windows, verbose=0)
    assert evaluate_dynamically(model, windows, learning_rate=0.5)["loss"] != expected[0]
    np.testing.assert_array_equal(weights_of(model), before)
    for old, new in zip(states, get_states(model), strict=True):
        np.testing.assert_array_equal(old, new)
    assert model.evaluate(windows, verbose=0) == expected
    for each in models:
        each.fit(windows, epochs=1, verbose=0)
    np.testing.assert_array_equal(weights_of(models[0]), weights_of(models[1]))


def test_weights_come_back_after_an_error():
    model = language_model(lanes=2)
    before = weights_of(model)
    broken = DocumentWindows.next_step(text(), window=4, lanes=2)
    read, calls = broken._read, []

    def fails(epoch, step):
        calls.append(step)
        if step == 5:
            raise RuntimeError("the disk is gone")
        return read(epoch, step)

    broken._read = fails
    with pytest.raises(Exception, match="the disk is gone"):
        evaluate_dynamically(model, broken, learning_rate=0.5)
    np.testing.assert_array_equal(weights_of(model), before)
    windows = DocumentWindows.next_step(text(), window=4, lanes=2)
    assert model.evaluate(windows, verbose=0) == language_model(lanes=2).evaluate(
        windows, verbose=0
    )


def test_several_windows_an_execution_and_any_reach_give_the_same():
    windows = DocumentWindows.next_step(text(), window=4, lanes=2)
    expected = evaluate_dynamically(language_model(lanes=2), windows, learning_rate=0.5)
    model = language_model(lanes=2, backprop_windows=2)
    model.compile("sgd", LOSS, steps_per_execution=4)
    found = evaluate_dynamically(model, windows, learning_rate=0.5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0}, r"`learning_rate` must be above 0\. Received: learning_rate=0"),
        ({"learning_rate": float("nan")}, "Received: learning_rate=nan"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\)\. Received: decay=1.0"),
        ({"epsilon": 0}, r"`epsilon` must be above 0\. Received: epsilon=0"),
        ({"windows": DocumentWindows([[1, 2]], [0], window=4, lanes=1)}, "a target per step"),
        ({"statistics": [[1, 2]]}, r"`statistics` must be DocumentWindows"),
        ({"model": keras.Sequential([keras.layers.Dense(1)])}, "a compiled TBPTTModel"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments, message):
    given = {
        "model": language_model(),
        "windows": DocumentWindows.next_step(text(), window=4, lanes=1),
        "learning_rate": 0.1,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        evaluate_dynamically(given.pop("model"), given.pop("windows"), **given)


@pytest.mark.parametrize("shape", [(1, None), (3, 2), (None, 7)])
def test_a_resized_model_gives_the_same_predictions(shape):
    model = language_model(lanes=2)
    model.fit(DocumentWindows.next_step(text(), window=4, lanes=2), verbose=0)
    other = model.resized(*shape)
    assert (other.lanes, other.window) == (shape[0] or 2, shape[1] or 4)
    documents = [text(n, seed=n) for n in (1, 9, 4)]
    expected = model.predict_documents(documents)
    for one, two in zip(expected, other.predict_documents(documents), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    other.trainable_variables[0].assign_add(tf.ones_like(other.trainable_variables[0]))
    np.testing.assert_array_equal(model.predict_documents(documents)[1], expected[1])


def test_a_resized_model_keeps_what_its_layers_were_adapted_to_and_nested_models():
    normalization = keras.layers.Normalization()
    normalization.adapt(np.random.default_rng(0).normal(3, 2, (50, 2)))
    inner = keras.Input(batch_shape=(2, 4, 2))
    nested = keras.Model(inner, keras.layers.GRU(3, stateful=True)(inner))
    steps = keras.Input(batch_shape=(2, 4, 2))
    model = TBPTTModel(steps, nested(normalization(steps)))
    documents = [np.random.default_rng(n).normal(3, 2, (n, 2)).astype("float32") for n in (1, 9)]
    found = model.resized(lanes=1, window=3).predict_documents(documents)
    np.testing.assert_allclose(found, model.predict_documents(documents), atol=1e-6)


def test_a_resized_model_keeps_its_way_to_train():
    model = language_model(lanes=2, window_loss="linear_gain", backprop_windows=3, burn_in=1)
    other = model.resized(lanes=1)
    assert type(other) is TBPTTModel
    assert (other.window_loss, other.backprop_windows, other.burn_in) == ("linear_gain", 3, 1)
    other.compile("sgd", LOSS)
    other.fit(DocumentWindows.next_step(text(30), window=4, lanes=1), verbose=0)


def test_a_model_for_one_batch_shape_alone_is_refused():
    tokens = keras.Input(batch_shape=(2, 4), dtype="int32")
    x = keras.layers.Embedding(CLASSES, 6)(tokens)
    x = keras.layers.Reshape((4, 6))(x)
    x = keras_tbptt.layers.LSTM(8, stateful=True, return_sequences=True)(x)
    with pytest.raises(ValueError, match=r"made for one batch shape alone.*\(2, 5\)"):
        TBPTTModel(tokens, keras.layers.Dense(CLASSES)(x)).resized(window=5)


def test_a_layer_in_float16_is_refused_and_bfloat16_is_evaluated():
    windows = DocumentWindows.next_step(text(60), window=4, lanes=1)
    for policy in ("mixed_float16", "mixed_bfloat16"):
        keras.config.set_dtype_policy(policy)
        try:
            model = language_model()
        finally:
            keras.config.set_dtype_policy("float32")
        if policy == "mixed_float16":
            with pytest.raises(ValueError, match=r"underflow in float16.*Received: layers \["):
                evaluate_dynamically(model, windows, learning_rate=0.1)
        else:
            found = evaluate_dynamically(model, windows, learning_rate=0.1, decay=0.01)
            assert np.isfinite(found["loss"])
