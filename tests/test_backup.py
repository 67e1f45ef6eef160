"""A training that is interrupted and goes on ends as though it had not been."""

import os
import shutil
import signal

import keras
import numpy as np
import pytest
from toys import random_documents, random_labels, token_layers, token_model

from keras_tbptt import DocumentWindows, ExactBackup, ResetStates, TBPTTModel
from keras_tbptt.layers import ConcatPooling
from keras_tbptt.state import get_states

EPOCHS = 3


def windows(count=23, seed=5, **kwargs):
    kwargs = {"window": 5, "lanes": 4, "shuffle": True, "seed": seed, **kwargs}
    return DocumentWindows(random_documents(count), random_labels(count), **kwargs)


def with_dropout(recurrent=None):
    def build(tokens):
        x = keras.layers.Embedding(40, 6, mask_zero=True)(tokens)
        x = keras.layers.Dropout(0.3)(x)
        x = (recurrent or (lambda: keras.layers.LSTM(5, stateful=True, dropout=0.2)))()(x)
        return keras.layers.Dense(1, activation="sigmoid")(x)

    return build


def pooling():
    lstm = keras.layers.LSTM(5, stateful=True, return_sequences=True)
    return lambda x: ConcatPooling(stateful=True)(lstm(x))


def two_layers():
    first = keras.layers.GRU(5, stateful=True, return_sequences=True)
    return lambda x: keras.layers.GRU(4, stateful=True)(first(x))


class Interruption(Exception):
    pass


class InterruptAt(keras.callbacks.Callback):
    """Ends training with an error after so many windows, epochs counted on."""

    def __init__(self, windows):
        super().__init__()
        self.left = windows

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise Interruption


class InterruptInValidation(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        raise Interruption


class Training:
    """One model, its data and callbacks; made anew for every piece, as a process would."""

    def __init__(self, folder, stock=False, layers=None, steps_per_execution=1, model=None, **data):
        self.stock = stock
        cls = keras.Model if stock else TBPTTModel
        seed = int(np.random.default_rng().integers(1000))  # what a checkpoint does not bring back
        layers = layers or with_dropout()
        self.model = token_model(cls=cls, seed=seed, layers=layers, **(model or {}))
        self.model.compile(
            keras.optimizers.Adam(0.01, clipnorm=1.0),
            "binary_crossentropy",
            weighted_metrics=["accuracy"],
            steps_per_execution=steps_per_execution,
        )
        self.train = windows(**data)
        self.valid = windows(9, shuffle=False, window=self.train.window)
        self.folder = folder

    def fit(self, *more, epochs=EPOCHS, remembered=(), **backup):
        train, valid, callbacks = self.train, self.valid, [*remembered]
        if self.stock:
            callbacks.append(ResetStates(self.train, validation=self.valid))
            train, valid = train.dataset(), valid.dataset()
        backup = {"every_windows": 3, "every_seconds": None, "callbacks": remembered, **backup}
        self.backup = ExactBackup(self.folder, self.train, **backup)
        callbacks += [self.backup, *more]
        self.history = self.model.fit(
            train, validation_data=valid, epochs=epochs, verbose=0, shuffle=False,
            callbacks=callbacks,
        )  # fmt: skip
        return self

    def everything(self):
        variables = [*self.model.variables, *self.model.optimizer.variables]
        return [v.numpy() for v in variables] + get_states(self.model)


def assert_same(one, other):
    for a, b in zip(one.everything(), other.everything(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert one.history.history == other.history.history
    assert one.history.epoch == other.history.epoch


SETTINGS = {
    "packed": {},
    "aligned": {"packing": "aligned", "model": {"window_loss": "final_only"}},
    "several steps in one execution": {"steps_per_execution": 4},
    "stock": {"stock": True},
    "two layers, GRU": {"layers": with_dropout(two_layers)},
    "reach 3": {"model": {"backprop_windows": 3}},
    "reach all": {"packing": "aligned", "model": {"backprop_windows": "all"}},
    "artbp": {"model": {"backprop_windows": "artbp"}},
    "pooled": {
        "packing": "aligned",
        "layers": with_dropout(pooling),
        "model": {"window_loss": "pooled"},
    },
    "random windows": {"mean_window": 4, "stretch": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_training_that_was_interrupted_ends_as_one_that_was_not(setting, tmp_path):
    setting = SETTINGS[setting]
    start = Training(tmp_path / "start", **setting)
    with pytest.raises(Interruption):
        start.fit(InterruptAt(1), every_windows=10**6)  # the checkpoint of the beginning
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    whole = Training(tmp_path / "whole", **setting).fit()
    steps = len(whole.train)
    assert steps > 8

    executions = -(-steps // setting.get("steps_per_execution", 1))
    for interruption in (InterruptAt(executions - 1), InterruptInValidation()):
        with pytest.raises(Interruption):
            Training(tmp_path / "start", **setting).fit(interruption)
    pieces = Training(tmp_path / "start", **setting).fit()
    assert_same(whole, pieces)


def test_a_training_that_is_over_is_not_done_again(tmp_path):
    done = Training(tmp_path).fit()
    again = Training(tmp_path).fit()
    assert_same(done, again)
    longer = Training(tmp_path).fit(epochs=EPOCHS + 1)
    assert longer.history.epoch == [0, 1, 2, 3]


def test_other_callbacks_remember_what_they_are_given_to(tmp_path):
    def remembering():
        return [
            keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, factor=0.5, min_delta=0.1),
        ]

    with pytest.raises(Interruption):
        Training(tmp_path / "a").fit(InterruptAt(1), remembered=remembering())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = Training(tmp_path / "a").fit(epochs=9, remembered=remembering())
    steps = len(whole.train)
    for at in (steps + 2, steps + 4):
        with pytest.raises(Interruption):
            Training(tmp_path / "b").fit(InterruptAt(at), epochs=9, remembered=remembering())
    pieces = Training(tmp_path / "b").fit(epochs=9, remembered=remembering())
    assert_same(whole, pieces)
    stopped = Training(tmp_path / "b").fit(epochs=9, remembered=remembering())
    assert stopped.history.epoch == whole.history.epoch


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 24}, "data="),
        ({"window": 7, "model": {"window": 7}}, "window=7"),
        ({"seed": 6}, "seed=6"),
        ({"packing": "aligned"}, "packing='aligned'"),
        ({"layers": token_layers()}, "a variable of shape"),
        ({"model": {"window_loss": "final_only"}}, "window_loss='final_only'"),
        ({"steps_per_execution": 2}, "steps_per_execution=2"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_by_name(change, named, tmp_path):
    Training(tmp_path).fit(epochs=1)
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"belongs to another training.*{named}"):
        Training(tmp_path, **change).fit()
    assert sorted(tmp_path.rglob("*")) == there


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path):
    with pytest.raises(Interruption):
        Training(tmp_path / "sound").fit(InterruptAt(9))
    shutil.copytree(tmp_path / "sound", tmp_path / "damaged")
    newest, before, *_ = sorted((tmp_path / "damaged").iterdir(), reverse=True)
    flip(newest / "variables.index")
    training = Training(tmp_path / "damaged")
    with pytest.warns(UserWarning, match=f"is damaged.*{newest.name}.*variables.index"):
        training.fit()
    assert training.backup.resumed_from == before.name
    assert_same(Training(tmp_path / "sound").fit(), training)


def test_without_a_sound_checkpoint_nothing_is_overwritten(tmp_path):
    Training(tmp_path).fit(epochs=1)
    for file in tmp_path.glob("*/about.json"):
        flip(file)
    there = sorted(tmp_path.rglob("*"))
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="No checkpoint can be read"),
    ):
        Training(tmp_path).fit()
    assert sorted(tmp_path.rglob("*")) == there


class Send(keras.callbacks.Callback):
    """Sends this process a signal in the middle of training, or of validation."""

    def __init__(self, number, batch=7, validating=False):
        super().__init__()
        self.number, self.batch, self.validating, self.seen = number, batch, validating, 0

    def on_train_batch_begin(self, batch, logs=None):
        self.seen = batch
        if batch == self.batch and not self.validating:
            os.kill(os.getpid(), self.number)

    def on_test_batch_begin(self, batch, logs=None):
        if batch == 1 and self.validating:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_lets_the_window_finish_and_saves(number, end, validating, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interruption):
        Training(tmp_path / "a").fit(InterruptAt(1))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = Training(tmp_path / "a").fit()
    sender = Send(number, validating=validating)
    with pytest.raises(end) as ended:
        Training(tmp_path / "b").fit(sender, every_windows=10**6)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    if end is SystemExit:
        assert ended.value.code == 128 + signal.SIGTERM
    newest = max(p.name for p in (tmp_path / "b").iterdir())
    window = len(whole.train) if validating else sender.batch + 1
    assert newest == f"epoch-00000-window-{window:09d}"
    assert_same(whole, Training(tmp_path / "b").fit())


def test_a_second_signal_stops_at_once(tmp_path):
    class Twice(keras.callbacks.Callback):
        went_on = False

        def on_train_batch_begin(self, batch, logs=None):
            if batch == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                self.went_on = True

    twice = Twice()
    with pytest.raises(KeyboardInterrupt):
        Training(tmp_path).fit(twice)
    assert not twice.went_on


def test_after_an_error_in_training_ctrl_c_works_as_ever(tmp_path):
    with pytest.raises(Interruption):
        Training(tmp_path).fit(InterruptAt(1))
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


@pytest.mark.parametrize("stock", [False, True])
def test_a_loss_that_is_not_finite_names_window_lane_and_document(stock, tmp_path):
    labels = random_labels(23).astype("float32")
    labels[17] = 1e30  # finite, but its square is not
    train = DocumentWindows(random_documents(23), labels, window=5, lanes=4, seed=5)
    model = token_model(
        cls=keras.Model if stock else TBPTTModel,
        layers=token_layers(outputs=keras.layers.Dense(1)),
    )
    model.compile("sgd", "mse")
    before = model.get_weights()
    window, lane = np.argwhere((train.plan.document == 17) & train.plan.starts)[0]
    callbacks = [ResetStates(train)] if stock else []
    callbacks.append(ExactBackup(tmp_path, train))
    with pytest.raises(FloatingPointError) as error:
        model.fit(train.dataset(flags=not stock), verbose=0, shuffle=False, callbacks=callbacks)
    message = str(error.value)
    assert f"window {window + 1} of {len(train)}, lanes [{lane}]" in message
    assert "documents [17]" in message and "clipnorm" in message and "Received:" in message
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    training = Training(tmp_path)

    class Break(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 6:
                training.model.layers[-1].kernel.assign(np.full((5, 1), np.nan))

    with pytest.raises(FloatingPointError, match=r"not finite|nan"):
        training.fit(Break(), every_windows=1)
    assert np.isfinite(training.model.layers[-1].kernel.numpy()).all()


def test_a_save_that_fails_is_a_warning_until_there_is_no_other(tmp_path, monkeypatch):
    training = Training(tmp_path)
    calls = []

    def full(*args):
        calls.append(args)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(*args)

    class Patch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            monkeypatch.setattr(training.backup.directory, "write", full)

    write = ExactBackup(tmp_path, training.train).directory.write
    with (
        pytest.warns(UserWarning, match="could not be saved.*No space left.*Training goes on"),
        pytest.raises(OSError, match="could not be saved"),
    ):
        training.fit(Patch(), epochs=1)
    assert len(training.model.history.epoch) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-00000-window-000000000"]


@pytest.mark.parametrize(
    "argument", [{"every_windows": 0}, {"keep": 0}, {"every_windows": 2.5}, {"windows": [1]}]
)
def test_bad_arguments_are_refused(argument, tmp_path):
    with pytest.raises(ValueError, match="Received"):
        ExactBackup(tmp_path, **{"windows": windows(), **argument})
