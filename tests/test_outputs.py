"""A target per step and a label of the document in one model, against figures by hand."""

from collections import OrderedDict

import keras
import numpy as np
import pytest
from toys import VOCAB, InterruptAt, Interruption, random_documents, random_labels

from keras_tbptt import DocumentWindows, ExactBackup, TBPTTModel
from keras_tbptt.callbacks import ResetStates

L = keras.layers
WINDOW, LANES = 5, 3
BOTH = {"tags": True, "label": False}


def documents(count=7, longest=23, seed=0, missing=0.0):
    """Features, a target per step, and a label per document; some of each may be unknown."""
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(n, 2)).astype("float32") for n in rng.integers(2, longest, count)]
    tags = [np.cumsum(x.sum(axis=1)).astype("float32") for x in inputs]
    label = np.array([t[-1] > 0 for t in tags], "float32")
    for target in tags:
        target[rng.random(len(target)) < missing] = np.nan
    label[rng.random(count) < missing] = np.nan
    return inputs, {"tags": tags, "label": label}


def two_heads(form=dict, lr=0.1, lanes=LANES, window=WINDOW, cls=TBPTTModel, l2=None, **kwargs):
    keras.utils.set_random_seed(3)
    inputs = keras.Input(batch_shape=(lanes, window, 2))
    steps = L.LSTM(4, stateful=True, return_sequences=True, name="lower")(inputs)
    last = L.LSTM(3, stateful=True, name="upper")(steps)
    tags = L.Dense(1, name="tags", kernel_regularizer=l2)(steps)
    label = L.Dense(1, name="label")(last)
    outputs = {"tags": tags, "label": label} if form is dict else [tags, label]
    model = cls(inputs, outputs, **kwargs)
    losses, factors = {"tags": "mse", "label": "mae"}, {"tags": 0.3, "label": 2.0}
    metrics = {"tags": ["mae"], "label": ["mse"]}
    model.compile(keras.optimizers.SGD(lr), losses, factors, weighted_metrics=metrics)
    return model


def windows(inputs, labels, **kwargs):
    shape = {"window": WINDOW, "lanes": LANES, "per_step": BOTH}
    return DocumentWindows(inputs, labels, **{**shape, **kwargs})


def by_hand(model, inputs, labels):
    """What an evaluation reports: each head's errors over what is known of it."""
    found = model.predict_documents(inputs)
    if isinstance(found, list):
        found = dict(zip(("tags", "label"), found, strict=True))
    tags = np.concatenate(found["tags"])[:, 0] - np.concatenate(labels["tags"])
    label = found["label"][:, 0] - labels["label"]
    figures = {
        "tags_loss": np.nanmean(tags**2), "tags_mae": np.nanmean(np.abs(tags)),
        "label_loss": np.nanmean(np.abs(label)), "label_mse": np.nanmean(label**2),
    }  # fmt: skip
    penalty = float(sum(model.losses))
    total = 0.3 * figures["tags_loss"] + 2.0 * figures["label_loss"] + penalty
    return {"loss": total, **figures}


@pytest.mark.parametrize("form", [dict, list])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_an_evaluation_counts_steps_of_one_head_and_documents_of_the_other(form, missing):
    inputs, labels = documents(missing=missing)
    model = two_heads(form, l2="l2")
    expected = by_hand(model, inputs, labels)
    assert sum(model.losses) > 0
    data = windows(inputs, labels)
    found = model.evaluate(data, verbose=0, return_dict=True)
    assert found == pytest.approx(expected, rel=1e-5)
    again = model.evaluate(data, verbose=0, return_dict=True)
    assert again == pytest.approx(expected, rel=1e-5)


def test_labels_may_be_a_list_for_a_list_of_outputs():
    inputs, labels = documents()
    expected = two_heads(list).evaluate(windows(inputs, labels), verbose=0)
    for form in (list, tuple):
        given = form([labels["tags"], labels["label"]])
        data = windows(inputs, given, per_step=form([True, False]))
        np.testing.assert_array_equal(two_heads(list).evaluate(data, verbose=0), expected)


@pytest.mark.parametrize("steps_per_execution", [1, 3])
def test_the_figures_of_training_are_those_of_an_evaluation(steps_per_execution):
    inputs, labels = documents(missing=0.2)
    model = two_heads(lr=0.0, window_loss="final_only")
    model.steps_per_execution = steps_per_execution
    expected = by_hand(model, inputs, labels)
    data = windows(inputs, labels, shuffle=True, seed=1)
    history = model.fit(data, validation_data=data, verbose=0).history
    for name, value in expected.items():
        assert history[f"val_{name}"][0] == pytest.approx(value, rel=1e-5)
        if name.startswith("label"):
            assert history[name][0] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("window_loss", "reach"),
    [
        ("per_window", 1),
        ("linear_gain", 1),
        ("final_only", 2),
        ("per_window", "all"),
        ("final_only", "all"),
    ],
)
def test_the_step_is_the_sum_of_the_steps_of_each_head(window_loss, reach):
    """Of plain SGD from the same weights: one head's loss, then the other's."""
    inputs, labels = documents(count=3, longest=12, missing=0.2)
    arguments = {"window_loss": window_loss, "backprop_windows": reach}
    data = windows(inputs, labels, packing="aligned", lanes=3)
    changes = {}
    for name, factors in (
        ("both", {"tags": 0.3, "label": 2.0}),
        ("tags", {"tags": 0.3, "label": 0.0}),
        ("label", {"tags": 0.0, "label": 2.0}),
    ):
        model = two_heads(**arguments)
        # With a rate this small, the weights of later windows are those of the first.
        losses = {"tags": "mse", "label": "mae"}
        model.compile(keras.optimizers.SGD(1e-4), losses, factors, run_eagerly=True)
        before = [w.numpy() for w in model.trainable_variables]
        model.fit(data, verbose=0)
        after = [w.numpy() for w in model.trainable_variables]
        changes[name] = [b - a for a, b in zip(before, after, strict=True)]
    for both, tags, label in zip(*changes.values(), strict=True):
        np.testing.assert_allclose(both, tags + label, atol=3e-6, rtol=1e-2)


def test_one_head_learns_what_it_would_learn_alone():
    """With the other's loss at weight 0, against windows of one kind of target."""
    inputs, labels = documents(missing=0.2)
    for name in ("tags", "label"):
        alone = {key: float(key == name) for key in BOTH}
        model = two_heads()
        model.compile("sgd", {"tags": "mse", "label": "mae"}, alone)
        model.fit(windows(inputs, labels), verbose=0, epochs=2)
        head = two_heads()
        single = TBPTTModel(head.input, head.output[name])
        single.compile("sgd", {"tags": "mse", "label": "mae"}[name])
        data = windows(inputs, labels[name], per_step=BOTH[name])
        single.fit(data, verbose=0, epochs=2)
        for variable in single.trainable_variables:
            same = next(v for v in model.trainable_variables if v.path == variable.path)
            np.testing.assert_allclose(variable.numpy(), same.numpy(), atol=1e-6)


@pytest.mark.parametrize("reach", [1, 2, "all", "artbp"])
def test_what_an_unknown_target_would_be_changes_nothing(reach):
    inputs, labels = documents(missing=0.3)
    found = []
    for fill in (0.0, 7.0):
        masks = {
            "tags": [~np.isnan(t) for t in labels["tags"]], "label": ~np.isnan(labels["label"])
        }  # fmt: skip
        filled = {
            "tags": [np.nan_to_num(t, nan=fill) for t in labels["tags"]],
            "label": np.nan_to_num(labels["label"], nan=fill),
        }
        model = two_heads(backprop_windows=reach)
        model.fit(windows(inputs, filled, weights=masks, packing="aligned"), epochs=2, verbose=0)
        found.append(model.get_weights())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_outputs_per_step_may_be_unknown_in_different_places():
    inputs, labels = documents(missing=0.3)
    other = [np.where(np.arange(len(t)) % 2, np.nan, 2 * t) for t in documents()[1]["tags"]]
    data = windows(inputs, {"a": labels["tags"], "b": other}, per_step=True)
    keras.utils.set_random_seed(3)
    x = keras.Input(batch_shape=(LANES, WINDOW, 2))
    steps = L.LSTM(4, stateful=True, return_sequences=True)(x)
    model = TBPTTModel(x, {"a": L.Dense(1, name="a")(steps), "b": L.Dense(1, name="b")(steps)})
    model.compile("sgd", "mse")
    found = model.evaluate(data, verbose=0, return_dict=True)
    predicted = model.predict_documents(inputs)
    for name, target in (("a", labels["tags"]), ("b", other)):
        error = np.concatenate(predicted[name])[:, 0] - np.concatenate(target)
        assert found[f"{name}_loss"] == pytest.approx(np.nanmean(error**2), rel=1e-5)
    assert found["loss"] == pytest.approx(found["a_loss"] + found["b_loss"], rel=1e-5)
    model.fit(data, verbose=0)
    assert model.optimizer.iterations.numpy() == model.optimizer_steps(data)


def test_an_output_without_a_loss_is_left_out():
    inputs, labels = documents(missing=0.2)
    model = two_heads()
    model.compile("sgd", {"tags": "mse", "label": None})
    found = model.evaluate(windows(inputs, labels), verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(by_hand(model, inputs, labels)["tags_loss"], rel=1e-5)


def test_a_lead_in_belongs_to_targets_per_step_alone():
    inputs, labels = documents()
    model = two_heads()
    found = model.evaluate(windows(inputs, labels, lead_in=1), verbose=0, return_dict=True)
    late = [np.where(np.arange(len(t)) < 1, np.nan, t) for t in labels["tags"]]
    expected = by_hand(model, inputs, {**labels, "tags": late})
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_stock_model_counts_as_a_tbptt_model_does():
    inputs, labels = documents(missing=0.2)
    inputs = [np.resize(x, (10, 2)) for x in inputs]  # no padding, which it would run over
    tags = [np.where(np.isnan(np.resize(t, 10)), np.nan, 1.0)[:, None] for t in labels["tags"]]
    data = windows(inputs, {"tags": tags, "label": labels["label"]})
    stock = two_heads(cls=keras.Model)
    found = stock.evaluate(
        data.dataset(evaluation=True), callbacks=[ResetStates(data)], verbose=0, return_dict=True
    )
    expected = two_heads().evaluate(data, verbose=0, return_dict=True)
    for name in ("label_mse", "tags_mae"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("reach", [1, 2])
def test_training_with_two_heads_is_resumed(tmp_path, reach):
    inputs, labels = documents(missing=0.2)

    def fit(folder, *callbacks, per_step=BOTH, labels=labels):
        data = windows(inputs, labels, shuffle=True, seed=2, per_step=per_step)
        model = two_heads(backprop_windows=reach)
        backup = ExactBackup(folder, data, every_windows=1, every_seconds=None)
        history = model.fit(data, epochs=2, callbacks=[backup, *callbacks], verbose=0)
        return history.history["loss"], model.get_weights()

    whole = fit(tmp_path / "whole")
    with pytest.raises(Interruption):
        fit(tmp_path / "part", InterruptAt(5))
    with pytest.raises(ValueError, match="data"):
        fit(tmp_path / "part", labels={**labels, "label": np.zeros(len(inputs))})
    with pytest.warns(UserWarning, match="Interrupt"):
        resumed = fit(tmp_path / "part")
    assert resumed[0] == whole[0]
    for one, other in zip(resumed[1], whole[1], strict=True):
        np.testing.assert_array_equal(one, other)


X, Y = documents()
TAGS, LABEL = Y["tags"], Y["label"]
BAD_INPUT = [
    (lambda: windows(X, Y, per_step={"tags": True}), "names of the labels"),
    (lambda: windows(X, Y, per_step={"tags": True, "lable": False}), "names of the labels"),
    (lambda: windows(X, Y, per_step=True), r"labels\['label'\]"),
    (lambda: windows(X, Y, per_step=False), r"labels\['tags'\]"),
    (lambda: windows(X, Y, weights=[np.ones(len(t)) for t in TAGS]), "give a dict"),
    (lambda: windows(X, Y, weights={"tag": LABEL}), "names of the labels"),
    (lambda: windows(X, Y, weights={"tags": [t[:-1] for t in TAGS]}), r"weights\['tags'\]"),
    (lambda: windows(X, Y, weights={"label": TAGS}), r"weights\['label'\]"),
    (lambda: windows(X, (TAGS, LABEL), per_step=(True,)), "an entry for each output"),
    (lambda: windows(X, LABEL, per_step=[False]), "an entry for each output"),
    (lambda: windows(X, LABEL, per_step=BOTH), "names of the labels"),
    (lambda: windows(X, {**Y, "label": LABEL * np.nan}), "At least one target must be known"),
    (lambda: windows(X, Y, streams=True), "nothing may belong to a whole"),
    (lambda: two_heads().fit(windows(X, {"tags": LABEL, "label": LABEL}, per_step=False)),
     "has a time axis"),
    (lambda: two_heads().fit(windows(X, {"tags": TAGS, "label": TAGS}, per_step=True)),
     "needs an output per step"),
    (lambda: two_heads().evaluate(windows(X, Y, window=5, lanes=1), steps=1), "batch shape"),
    (lambda: two_heads().evaluate(
        windows([np.resize(x, (30, 2)) for x in X],
                {"tags": [np.resize(t, 30) for t in TAGS], "label": LABEL}), steps=1, verbose=0),
     "No document ends"),
]  # fmt: skip


@pytest.mark.parametrize("make, message", BAD_INPUT)
def test_bad_input_gets_one_sentence(make, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*Received: |Received: .*{message}"):
        make()


def test_loss_weights_may_follow_each_form_that_keras_takes():
    """A list of losses and weights, beside the dicts of the other tests."""
    inputs, labels = documents(missing=0.2)
    expected = two_heads().evaluate(windows(inputs, labels), verbose=0, return_dict=True)
    for losses, factors in ((["mse", "mae"], [0.3, 2.0]), (("mse", "mae"), (0.3, 2.0))):
        model = two_heads(list)
        model.compile("sgd", losses, factors)
        found = model.evaluate(windows(inputs, labels), verbose=0, return_dict=True)
        for name in ("loss", "tags_loss", "label_loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_two_heads_in_mixed_precision_and_in_a_clone(tmp_path):
    inputs, labels = documents(missing=0.2)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = two_heads()
    finally:
        keras.config.set_dtype_policy("float32")
    data = windows(inputs, labels)
    model.fit(data, verbose=0)
    found = model.evaluate(data, verbose=0, return_dict=True)
    assert found == pytest.approx(by_hand(model, inputs, labels), rel=2e-2)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(data, verbose=0, return_dict=True) == pytest.approx(found, rel=1e-6)
    loaded.fit(data, verbose=0)


def test_what_is_known_is_counted_without_batches_where_all_is_known(monkeypatch):
    inputs, labels = documents()
    data = windows(inputs, labels)
    monkeypatch.setattr(type(data._flat), "batch", None)
    np.testing.assert_array_equal(data.known["tags"], data.plan.length)
    np.testing.assert_array_equal(data.known["label"], data.plan.length > 0)


def test_what_is_known_is_counted_by_output():
    inputs, labels = documents(missing=0.3)
    data = windows(inputs, labels)
    assert data.known["tags"].sum() == (~np.isnan(np.concatenate(labels["tags"]))).sum()
    known = ~np.isnan(labels["label"])
    assert data.known["label"][data.ends].sum() == known.sum()


@pytest.mark.parametrize("names", [("z", "b"), ("tags", "other"), ("tags",)])
def test_targets_by_wrong_names_are_refused(names):
    documents = random_documents(6)
    labels = {name: random_labels(6) for name in names}
    windows = DocumentWindows(documents, labels, window=5, lanes=4)
    one = len(names) == 1
    tokens = windows.keras_inputs()
    x = L.LSTM(3, stateful=True)(L.Embedding(VOCAB, 4)(tokens))
    heads = {name: L.Dense(1, name=f"{name}_head")(x) for name in ("tags", "label")}
    for outputs in (heads["tags"],) if one else (heads, list(heads.values())):
        model = TBPTTModel(tokens, outputs)
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match=r"names of the outputs.*Received: targets"):
            model.fit(windows, verbose=0)


def test_outputs_in_an_unsorted_ordered_dict_are_refused():
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    x = L.LSTM(3, stateful=True)(L.Embedding(VOCAB, 4)(tokens))
    heads = OrderedDict([("zeta", L.Dense(1)(x)), ("alpha", L.Dense(1)(x))])
    with pytest.raises(ValueError, match=r"plain dict.*Received: \['zeta', 'alpha'\]"):
        TBPTTModel(tokens, heads)
    assert TBPTTModel(tokens, dict(heads)).lanes == 4
