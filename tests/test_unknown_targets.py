"""Targets that are not known count nowhere: against figures by hand."""

import keras
import numpy as np
import pytest
from toys import InterruptAt, Interruption

from keras_tbptt import DocumentWindows, ExactBackup, TBPTTModel
from keras_tbptt.callbacks import ResetStates

L = keras.layers
WINDOW, LANES = 5, 3


def series(count=7, longest=23, seed=0, missing=0.3):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    inputs = [rng.normal(size=(n, 2)).astype("float32") for n in lengths]
    targets = [np.cumsum(x.sum(axis=1)).astype("float32") for x in inputs]
    for target in targets:
        target[rng.random(len(target)) < missing] = np.nan
    return inputs, targets


def regressor(lanes=LANES, window=WINDOW, every_step=True, cls=TBPTTModel, lr=0.1, **kwargs):
    keras.utils.set_random_seed(3)
    inputs = keras.Input(batch_shape=(lanes, window, 2))
    x = L.LSTM(4, stateful=True, return_sequences=every_step)(inputs)
    model = cls(inputs, L.Dense(1)(x), **kwargs)
    model.compile(keras.optimizers.SGD(lr), "mse", weighted_metrics=["mae"])
    return model


def windows(inputs, targets, **kwargs):
    shape = {"window": WINDOW, "lanes": LANES, "per_step": True}
    return DocumentWindows(inputs, targets, **{**shape, **kwargs})


def by_hand(model, inputs, targets, known=None):
    """Mean squared and mean absolute error over the targets that are known."""
    predictions = np.concatenate(model.predict_documents(inputs))[:, 0]
    error = predictions - np.concatenate(targets)
    error = error[~np.isnan(error) if known is None else np.concatenate(known)]
    return np.square(error).mean(), np.abs(error).mean()


def test_evaluation_counts_the_known_targets_only():
    inputs, targets = series()
    model = regressor()
    found = model.evaluate(windows(inputs, targets), verbose=0)
    np.testing.assert_allclose(found, by_hand(model, inputs, targets), rtol=1e-6)


def test_the_losses_of_training_count_the_known_targets_only():
    inputs, targets = series()
    model = regressor(lr=0.0)
    expected = by_hand(model, inputs, targets)
    data = windows(inputs, targets, shuffle=True, seed=0)
    history = model.fit(data, validation_data=data, verbose=0).history
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(history[name][0], expected[0], rtol=1e-6)
    for name in ("mae", "val_mae"):
        np.testing.assert_allclose(history[name][0], expected[1], rtol=1e-6)


def test_a_mask_and_weights_of_zero_mean_the_same_as_nan():
    inputs, targets = series()
    known = [~np.isnan(target) for target in targets]
    filled = [np.nan_to_num(target, nan=1e6) for target in targets]
    found = []
    for data in (
        windows(inputs, targets),
        windows(inputs, filled, weights=known),
        windows(inputs, filled, weights=[mask.astype(float) for mask in known]),
        windows(
            np.concatenate(inputs), np.concatenate(filled), weights=np.concatenate(known),
            offsets=np.cumsum([0, *map(len, inputs)]),
        ),
    ):  # fmt: skip
        model = regressor()
        model.fit(data, epochs=2, verbose=0)
        found.append((model.evaluate(data, verbose=0), model.get_weights()[0]))
    for evaluated, weights in found[1:]:
        np.testing.assert_array_equal(evaluated, found[0][0])
        np.testing.assert_array_equal(weights, found[0][1])


def test_weights_per_step_weight_the_metrics():
    inputs, targets = series(missing=0)
    rng = np.random.default_rng(1)
    weights = [rng.integers(0, 3, len(target)) for target in targets]
    model = regressor()
    _, mae = model.evaluate(windows(inputs, targets, weights=weights), verbose=0)
    predictions = np.concatenate(model.predict_documents(inputs))[:, 0]
    errors = np.abs(predictions - np.concatenate(targets))
    np.testing.assert_allclose(mae, np.average(errors, weights=np.concatenate(weights)), rtol=1e-6)


def test_a_mask_of_next_steps_is_that_of_the_targets():
    """Offsets that begin late: the mask belongs to the array that the documents lie in."""
    flat = np.arange(40)
    mask = flat % 3 > 0
    data = DocumentWindows.next_step(flat, offsets=[7, 20, 33], weights=mask, window=5, lanes=2)
    seen = []
    for x, y, weight in data.dataset():
        real = weight.numpy() > 0
        np.testing.assert_array_equal(y.numpy()[real], x.numpy()[real] + 1)
        seen += y.numpy()[real].tolist()
    expected = [step for step in range(8, 33) if mask[step] and step != 20]
    assert sorted(seen) == expected


@pytest.mark.parametrize(
    ("reach", "steps_per_execution"), [(1, 1), (1, 3), (2, 3), ("all", 1), ("artbp", 3)]
)
def test_what_an_unknown_target_would_be_changes_nothing(reach, steps_per_execution):
    inputs, targets = series()
    found = []
    for fill in (0.0, 7.0):
        known = [~np.isnan(target) for target in targets]
        filled = [np.nan_to_num(target, nan=fill) for target in targets]
        model = regressor(backprop_windows=reach)
        model.compile("adam", "mse", steps_per_execution=steps_per_execution)
        data = windows(inputs, filled, weights=known, packing="aligned")
        model.fit(data, epochs=2, verbose=0)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_window_without_a_known_target_makes_no_step():
    """With momentum, a step without a gradient would move the weights on."""
    inputs, targets = series(count=1, longest=20, seed=1, missing=0)
    targets[0][WINDOW:] = np.nan
    data = windows(inputs, targets, lanes=1)
    model = regressor(lanes=1)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    model.fit(data, verbose=0)
    assert len(data) > 1
    assert model.optimizer.iterations.numpy() == model.optimizer_steps(data) == 1


@pytest.mark.parametrize("window_loss", ["per_window", "final_only", "linear_gain"])
def test_documents_without_a_label_count_nowhere(window_loss):
    inputs, targets = series(missing=0)
    labels = np.array([t[-1] for t in targets])
    labels[[1, 4]] = np.nan
    shape = {"window": WINDOW, "lanes": LANES}
    data = DocumentWindows(inputs, labels, **shape)
    known = ~np.isnan(labels)
    model = regressor(every_step=False, window_loss=window_loss)
    error = model.predict_documents(inputs)[:, 0] - labels
    np.testing.assert_allclose(
        model.evaluate(data, verbose=0)[0], np.square(error[known]).mean(), rtol=1e-6
    )
    model.fit(data, verbose=0)
    assert model.optimizer.iterations.numpy() == model.optimizer_steps(data)
    other = regressor(every_step=False, window_loss=window_loss)
    filled = DocumentWindows(inputs, np.nan_to_num(labels), weights=known, **shape)
    other.fit(filled, verbose=0)
    for one, two in zip(model.get_weights()[:3], other.get_weights()[:3], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_stock_model_counts_as_a_tbptt_model_does():
    inputs, targets = series(missing=0)
    inputs = [np.resize(x, (10, 2)) for x in inputs]  # no padding, which it would run over
    targets = [np.where(np.arange(10) % 3 == 0, np.nan, np.resize(t, 10))[:, None] for t in targets]
    data = windows(inputs, targets)
    stock = regressor(cls=keras.Model)
    found = stock.evaluate(data.dataset(evaluation=True), callbacks=[ResetStates(data)], verbose=0)
    np.testing.assert_allclose(found, regressor().evaluate(data, verbose=0), rtol=1e-5)


def test_a_lead_in_gives_the_state_a_start_and_counts_nowhere():
    """Validation after training, against one run over both."""
    inputs, targets = series(missing=0)
    begin = np.array([len(x) // 2 for x in inputs])
    model = regressor()
    data = windows(inputs, targets, lead_in=begin)
    after = [np.arange(len(x)) >= b for x, b in zip(inputs, begin, strict=True)]
    expected = by_hand(model, inputs, targets, known=after)
    np.testing.assert_allclose(model.evaluate(data, verbose=0), expected, rtol=1e-6)
    cut = [x[b:] for x, b in zip(inputs, begin, strict=True)]
    anew = model.evaluate(
        windows(cut, [t[-len(x) :] for x, t in zip(cut, targets, strict=True)]), verbose=0
    )
    assert abs(anew[0] - expected[0]) > 1e-3  # the state matters


def test_a_lead_in_of_stretches_counts_the_documents_own_steps():
    inputs, targets = series(count=4, longest=60, missing=0)
    targets = [np.where(np.arange(len(t)) < 1, 1e9, t) for t in targets]
    data = windows(inputs, targets, lead_in=1, stretch=2, shuffle=True, seed=0)
    for x, y, weight in data.dataset(flags=True):
        known = x["known"].numpy()
        assert (y.numpy()[known] < 1e9).all()
        np.testing.assert_array_equal(known, weight.numpy() > 0)


def test_training_with_unknown_targets_is_resumed(tmp_path):
    inputs, targets = series()

    def fit(folder, *callbacks, targets=targets):
        data = windows(inputs, targets, shuffle=True, seed=2, lead_in=1)
        model = regressor(backprop_windows=2)
        backup = ExactBackup(folder, data, every_windows=1, every_seconds=None)
        history = model.fit(data, epochs=2, callbacks=[backup, *callbacks], verbose=0)
        return history.history["loss"], model.get_weights()

    whole = fit(tmp_path / "whole")
    with pytest.raises(Interruption):
        fit(tmp_path / "part", InterruptAt(5))
    known = [np.nan_to_num(target) for target in targets]
    with pytest.raises(ValueError, match="data"):
        fit(tmp_path / "part", targets=known)
    with pytest.warns(UserWarning, match="Interrupt"):
        resumed = fit(tmp_path / "part")
    assert resumed[0] == whole[0]
    for one, other in zip(resumed[1], whole[1], strict=True):
        np.testing.assert_array_equal(one, other)


X, Y = series(missing=0)
NAN = [np.full(len(t), np.nan) for t in Y]
BAD_INPUT = [
    (lambda: windows(X, NAN), "At least one target must be known"),
    (lambda: windows(X, [np.where([[True, False]], np.nan, t[:, None]) for t in Y]),
     "known as a whole or not at all"),
    (lambda: windows(X, [t + np.inf for t in Y]), "finite numbers"),
    (lambda: windows(X, Y, weights=[t[:-1] for t in Y]), "one target per step"),
    (lambda: windows(X, Y, weights=[-np.ones(len(t)) for t in Y]), ">= 0 per step"),
    (lambda: windows(X, Y, weights=[t * np.nan for t in Y]), "finite number >= 0 per step"),
    (lambda: windows(X, Y, weights=[np.zeros(len(t)) for t in Y]), "not all 0"),
    (lambda: windows(X, Y, lead_in=-1), "lead_in=-1"),
    (lambda: windows(X, Y, lead_in=1.5), "lead_in=1.5"),
    (lambda: windows(X, Y, lead_in=100), "lead_in=100"),
    (lambda: windows(X, Y, lead_in=[1, 2]), r"lead_in=\[1, 2\]"),
    (lambda: windows(X, Y, lead_in=1, streams=True), "without streams=True"),
    (lambda: DocumentWindows(X, [0] * len(X), window=5, lanes=3, lead_in=1), "a target per step"),
    (lambda: DocumentWindows([x * np.nan for x in X], window=5, lanes=3), "finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", BAD_INPUT)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=f"{message}.*Received: |Received: .*{message}"):
        make()
