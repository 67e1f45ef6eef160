"""What the package knows of Keras beyond its public API: these fail when Keras changes it."""

import keras
import numpy as np
import pytest

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
