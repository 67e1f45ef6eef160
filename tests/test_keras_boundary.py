"""What the package knows of Keras beyond its public API: these fail when Keras changes it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tbptt import _keras


def fit(*callbacks, **kwargs):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x, y = np.zeros((4, 2)), np.zeros((4, 1))
    return model.fit(x, y, batch_size=2, validation_data=(x, y), callbacks=callbacks, **kwargs)


class Look(keras.callbacks.Callback):
    found = ()

    def on_train_begin(self, logs=None):
        self.found = _keras.sibling_callbacks()


@pytest.mark.parametrize("listed", [False, True])
def test_a_callback_finds_all_callbacks_of_its_fit(listed, capsys):
    look, other = Look(), keras.callbacks.TerminateOnNaN()
    if listed:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        look.set_model(model)
        keras.callbacks.CallbackList([other, look], model=model).on_train_begin()
        assert look.found == [other, look]
    else:
        history = fit(other, look)
        assert look.found[:3] == [other, look, history]
        assert [type(c) for c in look.found[3:]] == [keras.callbacks.ProgbarLogger]


def test_outside_of_a_fit_there_are_no_callbacks():
    assert _keras.sibling_callbacks() == []


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_callback_chooses_the_epoch_that_the_fit_begins_with(epoch):
    class Begin(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            _keras.set_initial_epoch(self.model, epoch)

    history = fit(Begin(), initial_epoch=2, epochs=3, verbose=0)
    assert history.epoch == list(range(epoch, 3))
    _keras.set_initial_epoch(history.model, None)
    x = np.zeros((2, 2))
    assert history.model.fit(x, x[:, :1], initial_epoch=2, epochs=3, verbose=0).epoch == [2]


L = keras.layers


def nested_model():
    steps = keras.Input(batch_shape=(2, 3, 4))
    inner = keras.Sequential([keras.Input(batch_shape=(2, 3, 4)), L.LSTM(5, dropout=0.1)])
    x = inner(steps)
    return keras.Model(steps, {"a": L.Dense(1, name="a")(x), "b": L.Dense(1, name="b")(x)})


def test_layers_are_found_at_any_depth():
    names = [type(layer).__name__ for layer in _keras.flatten_layers(nested_model())]
    assert sorted(names).count("LSTM") == 1 and names.count("Dense") == 2


def test_the_tensors_that_a_layer_was_called_on_are_known():
    model = nested_model()
    assert [[id(t) for t in call] for call in _keras.calls(model.layers[1])] == [[id(model.input)]]
    assert _keras.producer(model.output["a"]) is model.get_layer("a")


def test_a_mask_reaches_the_next_layer():
    seen = []

    class Look(L.Layer):
        supports_masking = True

        def call(self, x, mask=None):
            seen.append(mask)
            return x

    x, mask = tf.ones([2, 3, 4]), tf.constant([[True, True, False]] * 2)
    _keras.set_mask(x, mask)
    Look()(x)
    assert seen[0] is mask


def test_an_output_without_its_mask_keeps_the_logits_that_losses_use():
    output = keras.activations.softmax(tf.constant([[0.0, 200.0]]))
    _keras.set_mask(output, tf.constant([[True]]))
    copy = _keras.without_mask(output, (1, 2))
    assert not hasattr(copy, "_keras_mask")
    loss = keras.losses.sparse_categorical_crossentropy(tf.constant([0]), copy)
    assert float(loss[0]) == pytest.approx(200)  # of probabilities, which are clipped: 16


def test_the_loss_of_each_output_has_a_metric():
    model = nested_model()
    model.compile("sgd", {"a": "mse", "b": "mae"})
    model.train_on_batch(np.ones((2, 3, 4)), {"a": np.ones((2, 1)), "b": np.ones((2, 1))})
    assert [metric.name for metric in _keras.output_losses(model)] == ["a_loss", "b_loss"]
    alone = keras.Sequential([keras.Input((2,)), L.Dense(1)])
    alone.compile("sgd", "mse")
    alone.train_on_batch(np.ones((2, 2)), np.ones((2, 1)))
    assert _keras.output_losses(alone) == []


@pytest.mark.parametrize("losses", [{"a": "mse", "b": "mae"}, ["mse", "mae"], "mse"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_each_loss_is_found_beside_its_output(losses, as_dict):
    model = nested_model()
    if not as_dict:
        model = keras.Model(model.input, [model.output["a"], model.output["b"]])
    if as_dict and isinstance(losses, list):
        losses = dict(zip("ab", losses, strict=True))
    model.compile("sgd", losses)
    outputs = {"a": tf.zeros([2, 1]), "b": tf.ones([2, 1])}
    targets = {"b": tf.fill([2, 1], 3.0), "a": tf.fill([2, 1], 2.0)}
    if not as_dict:
        outputs = [outputs["a"], outputs["b"]]
    paired = _keras.targets_like(model, targets, outputs)
    for output, target in zip(keras.tree.flatten(outputs), keras.tree.flatten(paired), strict=True):
        assert float(target[0, 0]) == float(output[0, 0]) + 2
    losses_of = _keras.losses_of(model, paired, outputs)
    found = [(float(output.value[0, 0]), output.loss.fn) for output in losses_of]
    second = (
        keras.losses.mean_squared_error if losses == "mse" else keras.losses.mean_absolute_error
    )
    assert found == [(0, keras.losses.mean_squared_error), (1, second)]


def test_without_a_loss_none_is_found():
    model = nested_model()
    model.compile("sgd")
    assert _keras.losses_of(model, None, model.output) == []
    with pytest.raises(ValueError, match="1 targets for the outputs"):
        _keras.targets_like(model, np.ones((2, 1)), model.output)


@pytest.mark.parametrize("built", [True, False])
def test_an_output_can_be_left_out_of_the_metrics(built):
    model = nested_model()
    model.compile("sgd", {"a": "mse", "b": "mae"}, weighted_metrics={"a": ["mse"], "b": ["mae"]})
    x, y = np.ones((2, 3, 4)), {"a": np.ones((2, 1)), "b": np.ones((2, 1))}
    if built:
        model.evaluate(x, y, verbose=0)
        model.reset_metrics()
    outputs = {"a": None, "b": tf.zeros([2, 1])}
    with _keras.without_metrics(model, y, outputs):
        found = model.compute_metrics(x, y, outputs)
    assert {"b_mae"} <= set(found) and "a_mse" not in found
    assert float(found["b_mae"]) == 1
    assert {"a_mse", "b_mae"} <= set(model.get_metrics_result())


def test_a_clone_knows_its_original():
    found = []

    class Clones(keras.Model):
        def __init__(self, inputs, outputs, name=None):
            found.append(_keras.original_of_clone(outputs))
            super().__init__(inputs, outputs, name=name)

    x = keras.Input((2,))
    model = Clones(x, L.Dense(1)(x))
    keras.models.clone_model(model)
    assert found == [None, model]


def test_the_generators_of_random_numbers_are_found_by_layer():
    model = nested_model()
    (seed,) = _keras.seeds_by_layer(model)
    assert seed is model.layers[1].layers[0].cell.seed_generator.state


def test_the_slots_of_adam_and_its_clipping():
    variable = keras.Variable(np.ones(3))
    optimizer = _keras.OpenAdam(1.0, clipnorm=1.0)
    optimizer.apply([tf.constant([3.0, 0.0, 4.0])], [variable])
    momentum, velocity = optimizer.slots(variable)
    np.testing.assert_allclose(momentum, [0.06, 0.0, 0.08], atol=1e-6)
    np.testing.assert_allclose(velocity, [0.00036, 0.0, 0.00064], atol=1e-7)
    assert float(tf.norm(optimizer.clip([tf.constant([3.0, 4.0])])[0])) == pytest.approx(1)


def test_summed_gradients_are_applied_without_summing_them_again():
    variable = keras.Variable(np.ones(2))
    optimizer = keras.optimizers.SGD(1.0, clipnorm=1.0)
    assert callable(optimizer._all_reduce_sum_gradients)
    called = []

    class Watched(keras.optimizers.SGD):
        def _all_reduce_sum_gradients(self, pairs):
            called.append(pairs)
            return super()._all_reduce_sum_gradients(pairs)

    optimizer = Watched(1.0, clipnorm=1.0)
    _keras.apply_summed(optimizer, [tf.constant([3.0, 4.0])], [variable])
    assert not called
    np.testing.assert_allclose(variable, [0.4, 0.2], atol=1e-6)
    optimizer.apply([tf.constant([3.0, 4.0])], [variable])
    assert len(called) == 1
