"""A training that is interrupted and resumed ends as though it had not been."""

import hashlib
import json
import os
import shutil
import signal

import keras
import numpy as np
import pytest
from toys import (
    InterruptAt,
    Interruption,
    random_documents,
    random_labels,
    token_layers,
    token_model,
)

from keras_tbptt import DocumentWindows, ExactBackup, ResetStates, TBPTTModel
from keras_tbptt.layers import ConcatPooling
from keras_tbptt.state import get_states

EPOCHS = 3
# The callbacks that interrupt a run are missing when it is resumed.
pytestmark = pytest.mark.filterwarnings("ignore:.*these callbacks.*(Interrupt|KeepStart|Send)")


def windows(count=23, seed=5, lengths=None, **kwargs):
    kwargs = {"window": 5, "lanes": 4, "shuffle": True, "seed": seed, **kwargs}
    documents = random_documents(count)
    if lengths:
        documents = [np.resize(document, lengths) for document in documents]
    return DocumentWindows(documents, random_labels(count), **kwargs)


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


class InterruptInValidation(keras.callbacks.Callback):
    def on_test_batch_end(self, batch, logs=None):
        raise Interruption


class KeepStart(keras.callbacks.Callback):
    """Copies the checkpoint of the beginning, so that another run can begin as this one."""

    def __init__(self, folder, copy):
        super().__init__()
        self._folder, self._copy = folder, copy

    def on_epoch_begin(self, epoch, logs=None):
        if not self._copy.exists():
            shutil.copytree(self._folder, self._copy)


class Training:
    """One model, its data and callbacks; made anew for every piece, as a process would."""

    def __init__(
        self, folder, stock=False, layers=None, model=None, optimizer=None, compiled=None, **data
    ):
        self.stock = stock
        cls = keras.Model if stock else TBPTTModel
        seed = int(np.random.default_rng().integers(1000))  # what a checkpoint does not bring back
        layers = layers or with_dropout()
        self.model = token_model(cls=cls, seed=seed, layers=layers, **(model or {}))
        self.model.compile(
            optimizer or keras.optimizers.Adam(0.01, clipnorm=1.0),
            **{
                "loss": "binary_crossentropy",
                "weighted_metrics": ["accuracy"],
                **(compiled or {}),
            },
        )
        self.train = windows(**data)
        self.valid = windows(
            9, lengths=data.get("lengths"), shuffle=False, window=self.train.window
        )
        self.folder = folder

    def fit(self, *more, epochs=EPOCHS, before=(), every_windows=3, **kwargs):
        train, valid, callbacks = self.train, self.valid, [*before]
        if self.stock:
            callbacks.append(ResetStates(self.train, validation=self.valid))
            train, valid = train.dataset(), valid.dataset()
        self.backup = ExactBackup(
            self.folder, self.train, every_windows=every_windows, every_seconds=None
        )
        callbacks += [self.backup, *more]
        self.history = self.model.fit(
            train, validation_data=valid, epochs=epochs, verbose=0, shuffle=False,
            callbacks=callbacks, **kwargs,
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


def uninterrupted(folder, epochs=EPOCHS, before=list, **setting):
    """A whole run, and the checkpoint of its beginning for the run that is interrupted."""
    whole = Training(folder / "whole", **setting)
    whole.fit(KeepStart(folder / "whole", folder / "start"), epochs=epochs, before=before())
    return whole, folder / "start"


@pytest.fixture(scope="module")
def shared_whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture
def whole_and_start(shared_whole, tmp_path):
    """`uninterrupted`, with the defaults, run once for all tests; each has a copy of the start."""
    whole, start = shared_whole
    return whole, shutil.copytree(start, tmp_path / "start")


@pytest.fixture(scope="module")
def shared_epoch(tmp_path_factory):
    return Training(tmp_path_factory.mktemp("epoch")).fit(epochs=1).folder


@pytest.fixture
def after_one_epoch(shared_epoch, tmp_path):
    """The checkpoints of a training of one epoch, run once for all tests; each has a copy."""
    return shutil.copytree(shared_epoch, tmp_path / "after_one_epoch")


SETTINGS = {
    "packed": {},
    "aligned": {"packing": "aligned", "model": {"window_loss": "final_only"}},
    "several steps in one execution": {"compiled": {"steps_per_execution": 4}},
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
    whole, start = uninterrupted(tmp_path, **setting)
    steps = len(whole.train)
    assert steps > 8

    executions = -(-steps // whole.model.steps_per_execution)
    for interruption in (InterruptAt(executions - 1), InterruptInValidation()):
        with pytest.raises(Interruption):
            Training(start, **setting).fit(interruption)
    pieces = Training(start, **setting).fit()
    assert_same(whole, pieces)


def test_a_training_that_is_over_is_not_done_again(shared_whole, tmp_path):
    done, _ = shared_whole
    folder = shutil.copytree(done.folder, tmp_path / "done")
    again = Training(folder).fit()
    assert_same(done, again)
    assert int(again.model.optimizer.iterations) == EPOCHS * len(again.train)
    longer = Training(folder).fit(epochs=EPOCHS + 1)
    assert longer.history.epoch == [0, 1, 2, 3]


def stoppers():
    return [
        keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, factor=0.5, min_delta=0.1),
    ]


@pytest.mark.parametrize("stock", [False, True])
def test_the_other_callbacks_of_the_fit_are_resumed_too(stock, tmp_path):
    whole, pieces_of = uninterrupted(tmp_path, epochs=9, stock=stock, before=stoppers)
    steps = len(whole.train)
    for at in (steps + 2, steps + 4):
        with pytest.raises(Interruption):
            Training(pieces_of, stock=stock).fit(InterruptAt(at), epochs=9, before=stoppers())
    pieces = Training(pieces_of, stock=stock).fit(epochs=9, before=stoppers())
    assert_same(whole, pieces)
    stopped = Training(pieces_of, stock=stock).fit(epochs=9, before=stoppers())
    assert_same(whole, stopped)


def averages(swap_on_epoch=False):
    return {
        "optimizer": keras.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.8),
        "before": [keras.callbacks.SwapEMAWeights(swap_on_epoch)],
    }


def test_a_signal_while_averages_are_validated_saves_the_weights_of_training(tmp_path):
    def fit(folder, *more):
        setting = averages()
        return Training(folder, optimizer=setting["optimizer"]).fit(
            *more, before=setting["before"], every_windows=10**6
        )

    whole = fit(tmp_path / "whole", KeepStart(tmp_path / "whole", tmp_path / "start"))
    with pytest.raises(SystemExit):
        fit(tmp_path / "start", Send(signal.SIGTERM, validating=True))
    assert_same(whole, fit(tmp_path / "start"))


def test_more_epochs_after_averages_took_the_place_of_weights_are_warned_of(tmp_path):
    def fit(epochs):
        setting = averages(swap_on_epoch=True)
        Training(tmp_path, optimizer=setting["optimizer"]).fit(
            epochs=epochs, before=setting["before"]
        )

    fit(1)
    with pytest.warns(UserWarning, match=r"replaced the weights.*Received: .*epochs=2"):
        fit(2)


def test_more_epochs_after_the_best_weights_are_warned_of(tmp_path):
    def best():  # which is always the first epoch
        stop = keras.callbacks.EarlyStopping(
            "loss", min_delta=99, patience=99, restore_best_weights=True
        )
        return [stop]

    Training(tmp_path).fit(epochs=2, before=best())
    Training(tmp_path).fit(epochs=2, before=best())
    with pytest.warns(UserWarning, match=r"replaced the weights.*Received: .*epochs=3"):
        Training(tmp_path).fit(epochs=3, before=best())


class Counter(keras.callbacks.Callback):
    """Counts windows and epochs; the first argument is no memory."""

    def __init__(self, step=1):
        super().__init__()
        self.step, self.windows, self.epochs = step, 0, np.float32(0)

    def on_train_batch_end(self, batch, logs=None):
        self.windows += self.step

    def on_epoch_begin(self, epoch, logs=None):
        self.epochs += np.float32(1)


def test_a_callback_sees_each_window_and_epoch_once(tmp_path):
    def counters():
        return [Counter(), Counter(10)]

    def fit(before, after, *more, **kwargs):
        Training(tmp_path).fit(*after, *more, before=before, **kwargs)

    for at in (1, 5, 8):  # begins; is resumed at window 0; in the middle
        with pytest.raises(Interruption):
            fit(counters(), counters(), InterruptAt(at))
    steps = len(windows())
    for epochs in (EPOCHS, EPOCHS + 1):
        before, after = counters(), counters()
        fit(before, after, epochs=epochs)
        for pair in (before, after):
            assert [c.windows for c in pair] == [epochs * steps, 10 * epochs * steps]
            assert [f"{c.epochs:.1f}" for c in pair] == [f"{epochs:.1f}"] * 2


def test_a_schedule_that_builds_on_the_rate_is_applied_once_an_epoch(tmp_path):
    def halving():
        return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)]

    whole, pieces_of = uninterrupted(tmp_path, before=halving)
    with pytest.raises(Interruption):
        Training(pieces_of).fit(
            InterruptAt(len(whole.train) + 1), before=halving(), every_windows=1
        )
    assert_same(whole, Training(pieces_of).fit(before=halving()))
    longer = Training(pieces_of).fit(epochs=EPOCHS + 1, before=halving())
    assert float(longer.model.optimizer.learning_rate) == pytest.approx(0.01 / 2 ** (EPOCHS + 1))


def test_a_callback_that_is_missing_is_named_and_a_new_one_begins_fresh(tmp_path):
    with pytest.raises(Interruption):
        Training(tmp_path).fit(InterruptAt(4), before=stoppers())
    with pytest.warns(UserWarning, match="callbacks.*differs.*'ReduceLROnPlateau'") as warned:
        Training(tmp_path).fit(before=[Counter(), stoppers()[0]])
    assert "EarlyStopping" not in str(warned[0].message)


class Awkward(keras.callbacks.Callback):
    """Holds what cannot be saved, and a file that is open only while training runs."""

    def __init__(self):
        super().__init__()
        self.objects = np.array([object()])
        self.file = None

    def on_train_begin(self, logs=None):
        self.file = open(os.devnull, "w")

    def on_epoch_end(self, epoch, logs=None):
        self.file.write("an epoch")

    def on_train_end(self, logs=None):
        self.file.close()
        self.file = None


def test_what_cannot_be_saved_of_a_callback_does_not_get_in_the_way(tmp_path):
    Training(tmp_path).fit(before=[Awkward()], epochs=1)
    Training(tmp_path).fit(before=[Awkward()], epochs=2)


def test_a_checkpoint_of_version_0_1_is_refused_in_a_sentence(after_one_epoch):
    for file in after_one_epoch.glob("*/about.json"):
        about = json.loads(file.read_text())
        old = {"epoch": 1, "window": 0, "windows_epoch": 1, "belongs_to": about["belongs_to"]}
        old |= {"versions": about["versions"], "stopped": False, "history": [[], {}]}
        file.write_text(json.dumps(old | {"callbacks": []}))
        sums = file.with_name("SHA256SUMS")
        lines = [line for line in sums.read_text().splitlines() if "about.json" not in line]
        lines.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  about.json")
        sums.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"written by another version.*Received"):
        Training(after_one_epoch).fit()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": 24}, "data="),
        ({"window": 7, "model": {"window": 7}}, "window=7"),
        ({"seed": 6}, "seed=6"),
        ({"packing": "aligned"}, "packing='aligned'"),
        ({"layers": token_layers()}, "layers="),
        ({"model": {"window_loss": "final_only"}}, "window_loss='final_only'"),
        ({"compiled": {"steps_per_execution": 2}}, "steps_per_execution=2"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused_by_name(change, named, after_one_epoch):
    there = sorted(after_one_epoch.rglob("*"))
    with pytest.raises(ValueError, match=f"belongs to another training.*{named}"):
        Training(after_one_epoch, **change).fit()
    assert sorted(after_one_epoch.rglob("*")) == there


def changed(dropout=0.3, mask_zero=True, activation="sigmoid", names=("a", "b"), l2=0.0, seed=1):
    """The layers of `with_dropout`, with everything that a user may change between two runs."""

    def build(tokens):
        x = keras.layers.Embedding(40, 6, mask_zero=mask_zero, name=names[0])(tokens)
        x = keras.layers.Dropout(dropout, seed=seed)(x)
        x = keras.layers.LSTM(5, stateful=True, kernel_regularizer=keras.regularizers.L2(l2))(x)
        start = keras.initializers.RandomNormal(seed=seed)
        dense = keras.layers.Dense(1, activation=activation, kernel_initializer=start)
        return keras.layers.Activation("linear", name=names[1])(dense(x))

    return build


CONFIGURATIONS = {
    "dropout": ({"dropout": 0.5}, r"rate=0\.5 of Dropout 'dropout(_\d+)?' \(the checkpoint: 0\.3"),
    "mask": ({"mask_zero": False}, r"mask_zero=False of Embedding 'a' \(the checkpoint: True"),
    "activation": ({"activation": "tanh"}, r"activation='tanh' of Dense .*'sigmoid'"),
    "nested": ({"l2": 0.1}, r"l2=0\.1 of L2 .*0\.0"),
}


@pytest.fixture(scope="module", params=[False, True], ids=["TBPTTModel", "stock"])
def configured(request, tmp_path_factory):
    """The checkpoints of a training with the layers of `changed`, and its other settings."""
    # Without padding no mask is needed.
    setting = {"stock": request.param, "lengths": 5}
    folder = tmp_path_factory.mktemp("configured")
    Training(folder, layers=changed(), **setting).fit(epochs=1)
    return folder, setting


@pytest.mark.parametrize("change", CONFIGURATIONS)
def test_another_configuration_of_a_layer_is_refused_by_name(change, configured, tmp_path):
    change, named = CONFIGURATIONS[change]
    folder, setting = configured
    folder = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(ValueError, match=f"belongs to another training.*{named}"):
        Training(folder, layers=changed(**change), **setting).fit()


def test_names_and_seeds_do_not_make_another_training(tmp_path):
    Training(tmp_path, layers=changed()).fit(epochs=1)
    other = Training(tmp_path, layers=changed(names=("c", "d"), seed=2)).fit(epochs=1)
    assert other.backup.resumed_from


def test_the_wiring_and_nested_models_belong_to_the_configuration(tmp_path):
    def wired(swapped, rate, inner="inner"):
        def build(tokens):
            x = keras.layers.Embedding(40, 6, mask_zero=True)(tokens)
            x = keras.layers.LSTM(4, stateful=True)(x)
            steps = keras.Input((4,))
            block = keras.Model(steps, keras.layers.Dropout(rate)(steps), name=inner)
            one, other = keras.layers.Dense(2)(block(x)), keras.layers.Dense(2)(x)
            pair = [other, one] if swapped else [one, other]
            return keras.layers.Dense(1, activation="sigmoid")(keras.layers.Subtract()(pair))

        return build

    Training(tmp_path, layers=wired(False, 0.1)).fit(epochs=1)
    assert Training(tmp_path, layers=wired(False, 0.1, "x")).fit(epochs=1).backup.resumed_from
    with pytest.raises(ValueError, match=r"inbound_nodes.* of Dense"):
        Training(tmp_path, layers=wired(True, 0.1)).fit()
    with pytest.raises(ValueError, match=r"rate=0\.2 of Dropout"):
        Training(tmp_path, layers=wired(False, 0.2)).fit()


def test_a_lambda_is_known_by_its_code(tmp_path):
    def last(function):
        def build(tokens):
            return keras.layers.Lambda(function)(token_layers()(tokens))

        return build

    Training(tmp_path, layers=last(lambda x: x * 0.5)).fit(epochs=1)
    again = Training(tmp_path, layers=last(lambda x: x * 0.5)).fit(epochs=1)  # on another line
    assert again.backup.resumed_from
    with pytest.raises(ValueError, match=r"function=.* of Lambda"):
        Training(tmp_path, layers=last(lambda x: x * 0.6)).fit()


COMPILED = [
    ({"loss": "mse"}, None, "loss='mse'"),
    ({"loss": keras.losses.BinaryCrossentropy(label_smoothing=0.1)}, None, "loss=BinaryCross"),
    ({"weighted_metrics": ["mse"]}, None, "weighted_metrics='mse'"),
    ({}, "sgd", "optimizer='SGD'"),
    ({}, keras.optimizers.Adam(0.01, clipnorm=1.0, amsgrad=True), "amsgrad=True of Adam"),
]


@pytest.mark.parametrize(("compiled", "optimizer", "named"), COMPILED)
def test_another_loss_metric_or_optimizer_is_refused_by_name(
    compiled, optimizer, named, after_one_epoch
):
    with pytest.raises(ValueError, match=f"belongs to another training.*{named}"):
        Training(after_one_epoch, compiled=compiled, optimizer=optimizer).fit()


def test_a_model_without_a_configuration_is_known_by_its_variables(tmp_path):
    class Own(keras.Model):
        def get_config(self):
            raise NotImplementedError

    train = windows()

    def fit(units):
        layers = token_layers(lambda: keras.layers.LSTM(units, stateful=True))
        model = token_model(cls=Own, layers=layers)
        model.compile("sgd", "binary_crossentropy")
        callbacks = [ResetStates(train), ExactBackup(tmp_path, train)]
        model.fit(train.dataset(), verbose=0, shuffle=False, callbacks=callbacks)

    fit(5)
    with pytest.raises(ValueError, match=r"belongs to another.*a variable of shape \[6, 24\]"):
        fit(6)


def test_windows_that_are_not_those_of_the_fit_are_refused(tmp_path):
    model = token_model()
    model.compile("sgd", "binary_crossentropy")
    with pytest.raises(ValueError, match=r"the object that `fit` trains on.*Received: "):
        model.fit(windows(), callbacks=[ExactBackup(tmp_path, windows())], verbose=0)
    assert not [*tmp_path.iterdir()]


def test_a_new_learning_rate_takes_precedence_over_the_checkpoint(tmp_path):
    with pytest.raises(Interruption):
        Training(tmp_path).fit(InterruptAt(5))
    new = Training(tmp_path, optimizer=keras.optimizers.Adam(0.001, clipnorm=1.0))
    named = r"differs from an uninterrupted run.*learning_rate=0\.001 of Adam.*0\.01"
    with pytest.warns(UserWarning, match=named), pytest.raises(Interruption):
        new.fit(InterruptAt(8))
    assert float(new.model.optimizer.learning_rate) == np.float32(0.001)
    same = Training(tmp_path, optimizer=keras.optimizers.Adam(0.001, clipnorm=1.0)).fit()
    assert float(same.model.optimizer.learning_rate) == np.float32(0.001)


def test_the_same_learning_rate_keeps_what_a_callback_made_of_it(tmp_path):
    def lowering():
        return [keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.005 if epoch else rate)]

    Training(tmp_path).fit(epochs=2, before=lowering())
    other = Training(tmp_path, optimizer=keras.optimizers.Adam(0.01, clipnorm=0.5))
    for epochs in (2, 3):  # in the same process, it is 0.005 before the second `fit`
        with pytest.warns(UserWarning, match=r"clipnorm=0\.5 of Adam.*1\.0") as warned:
            other.fit(epochs=epochs, before=lowering())
        assert "learning_rate" not in str(warned[0].message)
        assert float(other.model.optimizer.learning_rate) == np.float32(0.005)
    other.fit(epochs=4, before=lowering())


def test_a_rate_and_a_schedule_may_take_each_others_place(tmp_path):
    def decay(steps):
        return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.01, steps))

    with pytest.raises(Interruption):
        Training(tmp_path, optimizer=decay(30)).fit(InterruptAt(5))
    assert Training(tmp_path, optimizer=decay(30)).fit(epochs=1).backup.resumed_from
    with pytest.warns(UserWarning, match=r"number of epochs.*decay_steps=40 of CosineDecay"):
        Training(tmp_path, optimizer=decay(40)).fit(epochs=2)
    with pytest.warns(UserWarning, match=r"learning_rate=0\.002 of Adam.*CosineDecay"):
        constant = Training(tmp_path, optimizer=keras.optimizers.Adam(0.002)).fit(epochs=3)
    assert float(constant.model.optimizer.learning_rate) == np.float32(0.002)
    with pytest.warns(UserWarning, match="learning_rate=CosineDecay of Adam"):
        Training(tmp_path, optimizer=decay(40)).fit(epochs=4)


def test_after_a_loss_that_is_not_finite_a_lower_rate_goes_on(tmp_path):
    setting = {"layers": token_layers(outputs=keras.layers.Dense(1)), "compiled": {"loss": "mse"}}
    training = Training(tmp_path, optimizer=keras.optimizers.SGD(1e30), **setting)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        training.fit()
    training.model.optimizer.learning_rate = 0.01  # in the same process
    with pytest.warns(UserWarning, match=r"learning_rate=0\.01 of SGD.*1e\+30"):
        training.fit(epochs=1)
    assert np.isfinite(training.history.history["loss"]).all()
    assert float(training.model.optimizer.learning_rate) == np.float32(0.01)


def scaled(rate=0.01):
    inner = keras.optimizers.Adam(rate, clipnorm=1.0)
    return keras.optimizers.LossScaleOptimizer(inner, 2.0**10, dynamic_growth_steps=5)


def test_a_loss_scale_is_resumed(tmp_path):
    whole, start = uninterrupted(tmp_path, optimizer=scaled())
    shutil.copytree(start, tmp_path / "twice")
    optimizer = whole.model.optimizer
    steps = EPOCHS * len(whole.train)
    assert optimizer.dynamic_scale == 2.0 ** (10 + steps // 5)
    assert optimizer.step_counter == steps % 5
    own, inner = 4, 2 + 2 * len(whole.model.trainable_variables)
    assert len(optimizer.variables) == own + inner
    with pytest.raises(Interruption):
        Training(start, optimizer=scaled()).fit(InterruptAt(14))
    assert_same(whole, Training(start, optimizer=scaled()).fit())

    twice = Training(tmp_path / "twice", optimizer=scaled())
    twice.fit(epochs=1)
    twice.fit()
    assert_same(whole, twice)
    with pytest.warns(UserWarning, match=r"learning_rate=0\.001 of Adam"):
        lower = Training(tmp_path / "twice", optimizer=scaled(0.001)).fit()
    assert float(lower.model.optimizer.inner_optimizer.learning_rate) == np.float32(0.001)


def test_mixed_float16_is_resumed(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        whole, pieces_of = uninterrupted(tmp_path)
        with pytest.raises(Interruption):
            Training(pieces_of).fit(InterruptAt(5))
        assert_same(whole, Training(pieces_of).fit())
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ValueError, match=r"dtype='float32' of Embedding.*'mixed_float16'"):
        Training(pieces_of).fit()


@pytest.mark.parametrize("stock", [False, True])
def test_a_seed_that_was_drawn_is_taken_from_the_checkpoint(stock, tmp_path):
    whole, pieces_of = uninterrupted(tmp_path, stock=stock, seed=None)
    with pytest.raises(Interruption):
        Training(pieces_of, stock=stock, seed=None).fit(InterruptAt(5))
    pieces = Training(pieces_of, stock=stock, seed=None)
    drawn = pieces.train.seed
    pieces.fit()
    assert pieces.train.seed == whole.train.seed != drawn
    assert_same(whole, pieces)
    refused = Training(pieces_of, stock=stock, seed=None, count=24)
    drawn = refused.train.seed
    with pytest.raises(ValueError, match="data="):
        refused.fit()
    assert refused.train.seed == drawn


def test_an_epoch_of_other_steps_is_refused(tmp_path):
    steps = len(windows())
    for other in (steps - 1, steps + 1, 2 * steps):
        with pytest.raises(
            ValueError, match=f"steps_per_epoch.*{steps} windows.*Received.*{other}"
        ):
            Training(tmp_path).fit(steps_per_epoch=other)
    assert not list(tmp_path.iterdir())


def test_all_steps_of_an_epoch_may_be_given(tmp_path):
    # There are six windows, which are all read ahead of training.
    data = {"count": 7, "lanes": 4}
    whole, pieces_of = uninterrupted(tmp_path, **data)
    steps = {"steps_per_epoch": len(whole.train)}
    with pytest.raises(Interruption):
        Training(pieces_of, **data).fit(InterruptAt(len(whole.train) + 3), every_windows=1, **steps)
    assert_same(whole, Training(pieces_of, **data).fit(**steps))


def test_the_checkpoint_takes_precedence_over_initial_epoch(whole_and_start, tmp_path):
    whole, pieces_of = whole_and_start
    with pytest.raises(Interruption):
        Training(pieces_of).fit(InterruptAt(4), initial_epoch=2)
    assert_same(whole, Training(pieces_of).fit(initial_epoch=2))

    late = Training(tmp_path / "late").fit(initial_epoch=1)
    assert late.history.epoch == [1, 2]
    assert_same(late, Training(tmp_path / "late").fit())
    none = Training(tmp_path / "none").fit(initial_epoch=3)
    assert none.history.epoch == [] and not (tmp_path / "none").exists()


def test_fewer_epochs_than_the_checkpoint_has_are_refused(shared_whole, tmp_path):
    shutil.copytree(shared_whole[0].folder, tmp_path / "over")
    with pytest.raises(Interruption):
        Training(tmp_path / "within").fit(InterruptAt(len(windows()) + 4))
    for folder, least in (("over", EPOCHS), ("within", 2)):
        with pytest.raises(ValueError, match=rf"epochs={least} or more.*Received: epochs=1"):
            Training(tmp_path / folder).fit(epochs=1)


def test_an_error_while_windows_are_skipped_leaves_the_next_fit_alone(tmp_path):
    with pytest.raises(Interruption):
        Training(tmp_path).fit(InterruptAt(8))
    training = Training(tmp_path)
    with pytest.raises(Interruption):
        training.fit(InterruptAt(2))
    before = training.model.get_weights()
    history = training.model.fit(training.train, initial_epoch=0, epochs=1, verbose=0)
    assert history.epoch == [0]
    assert any((a != b).any() for a, b in zip(before, training.model.get_weights(), strict=True))
    assert int(training.model.optimizer.iterations) == 6 + len(training.train)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_skipped(whole_and_start):
    whole, folder = whole_and_start
    with pytest.raises(Interruption):
        Training(folder).fit(InterruptAt(9))
    newest, before, *_ = sorted(folder.iterdir(), reverse=True)
    flip(newest / "variables.index")
    training = Training(folder)
    with pytest.warns(UserWarning, match=f"is damaged.*{newest.name}.*variables.index"):
        training.fit()
    assert training.backup.resumed_from == before.name
    assert_same(whole, training)


def test_without_a_sound_checkpoint_nothing_is_overwritten(after_one_epoch):
    for file in after_one_epoch.glob("*/about.json"):
        flip(file)
    there = sorted(after_one_epoch.rglob("*"))
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="No checkpoint can be read"),
    ):
        Training(after_one_epoch).fit()
    assert sorted(after_one_epoch.rglob("*")) == there


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
def test_a_signal_lets_the_window_finish_and_saves(number, end, validating, whole_and_start):
    before = signal.default_int_handler, signal.SIG_DFL
    # A `fit` that ended in an error, as in tests before this one, leaves its own handlers.
    for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(each, handler)
    whole, folder = whole_and_start
    sender = Send(number, validating=validating)
    with pytest.raises(end) as ended:
        Training(folder).fit(sender, every_windows=10**6)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    if end is SystemExit:
        assert ended.value.code == 128 + signal.SIGTERM
    newest = max(p.name for p in folder.iterdir())
    window = len(whole.train) if validating else sender.batch + 1
    assert newest == f"epoch-00000-window-{window:09d}"
    assert_same(whole, Training(folder).fit())


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
        pytest.warns(UserWarning, match="could not be saved.*No space left.*Training continues"),
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


def test_targets_per_step_without_an_axis_of_one_are_resumed(tmp_path):
    def fit(folder, *callbacks):
        keras.utils.set_random_seed(1)
        tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
        x = keras.layers.Embedding(40, 6)(tokens)
        x = keras.layers.LSTM(5, stateful=True, return_sequences=True)(x)
        model = TBPTTModel(tokens, keras.layers.Dense(1)(x))
        model.compile("sgd", "mse")
        documents = random_documents()
        targets = [np.cos(d) for d in documents]
        train = DocumentWindows(documents, targets, per_step=True, window=5, lanes=4, seed=0)
        backup = ExactBackup(folder, train, every_windows=3, every_seconds=None)
        model.fit(train, epochs=2, verbose=0, callbacks=[backup, *callbacks])
        return model.get_weights()

    with pytest.raises(Interruption):
        fit(tmp_path / "pieces", InterruptAt(7))
    for one, other in zip(fit(tmp_path / "pieces"), fit(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_directory_may_have_the_name_of_a_worker(tmp_path):
    model = token_model()
    model.compile("adam", "binary_crossentropy")
    folder, train = tmp_path / "worker-1", windows()
    model.fit(train, callbacks=[ExactBackup(folder, train)], verbose=0)
    assert [path.name for path in tmp_path.iterdir()] == ["worker-1"]
    assert all(path.name.startswith("epoch-") for path in folder.iterdir())
