"""Where each document is one window, a fit has the figures and the weights of plain Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tbptt import DocumentWindows, TBPTTModel

L = keras.layers
LANES, WINDOW, COUNT = 4, 5, 8
RNG = np.random.default_rng(0)
DOCUMENTS = RNG.normal(size=(COUNT, WINDOW, 3)).astype("float32")
LABELS = RNG.integers(0, 2, (COUNT, 1)).astype("float32")


class Adds(L.Layer):
    """Adds a term to the loss that depends on the window."""

    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x


def one_output(x, **regular):
    return L.Dense(1, activation="sigmoid", name="head", **regular)(x)


def several_outputs(x):
    return {name: L.Dense(1, activation="sigmoid", name=name)(x) for name in ("a", "b")}


def build(cls, outputs=one_output, recurrent=L.GRU, behind=lambda x: x, **kwargs):
    keras.utils.set_random_seed(1)
    steps = keras.Input(batch_shape=(LANES, WINDOW, 3))
    x = L.Dense(3, name="first")(steps)
    x = L.Dense(3, name="second")(x)
    x = behind(recurrent(5, stateful=issubclass(cls, TBPTTModel))(x))
    return cls(steps, outputs(x), **kwargs)


def fits(compile_with, cls=(TBPTTModel, keras.Model), reach=1, callbacks=(), labels=LABELS, **kw):
    """A fit of a `TBPTTModel`, and one of plain Keras: histories and weights of both."""
    windows = DocumentWindows(
        list(DOCUMENTS), labels, window=WINDOW, lanes=LANES, packing="aligned"
    )
    whole = tf.data.Dataset.from_tensor_slices((DOCUMENTS, labels)).batch(LANES)
    found = []
    for model, data in (
        (build(cls[0], backprop_windows=reach, **kw), windows),
        (build(cls[1], **kw), whole),
    ):
        model.compile(**compile_with(model))
        history = model.fit(
            data, epochs=2, verbose=0, shuffle=False, callbacks=[each() for each in callbacks]
        ).history
        found.append((history, [v.numpy() for v in model.trainable_variables]))
    return found


def assert_alike(found):
    (history, weights), (expected_history, expected_weights) = found
    assert history.keys() == expected_history.keys()
    for name, values in expected_history.items():
        np.testing.assert_allclose(history[name], values, atol=1e-5, err_msg=name)
    for got, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def plainly(**kwargs):
    """What `compile` gets: a loss and SGD, unless others are given."""
    return lambda _: {
        "optimizer": keras.optimizers.SGD(0.1),
        "loss": "binary_crossentropy",
        **kwargs,
    }


ADDS = {"behind": lambda x: Adds()(x)}
OF_OUTPUTS = {
    "outputs": lambda x: one_output(x, activity_regularizer="l2", kernel_regularizer="l2")
}
OF_STATES = {"recurrent": lambda *a, **k: L.GRU(*a, activity_regularizer="l2", **k)}


@pytest.mark.parametrize(
    ("kind", "reach"),
    [(ADDS, 1), (ADDS, "all"), (OF_OUTPUTS, 1), (OF_OUTPUTS, 2), (OF_OUTPUTS, "artbp"),
     (OF_STATES, 2), (OF_STATES, "all")],
)  # fmt: skip
def test_what_a_layer_adds_to_the_loss_is_learnt(kind, reach):
    assert_alike(fits(plainly(), reach=reach, **kind))


def with_a_term_of_its_own(cls):
    class Own(cls):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = super().compute_loss(x, y, y_pred, sample_weight, training=training)
            return loss + 2 * keras.ops.mean(keras.ops.square(y_pred))

    return Own


@pytest.mark.parametrize("reach", [1, 3, "all"])
def test_an_overridden_loss_counts_each_window_once(reach):
    cls = [with_a_term_of_its_own(each) for each in (TBPTTModel, keras.Model)]
    assert_alike(fits(plainly(), cls=cls, reach=reach))


class Assigns(keras.callbacks.Callback):
    """Gives the model other weights when its training begins."""

    def on_train_begin(self, logs=None):
        for variable in self.model.trainable_variables:
            variable.assign(tf.fill(variable.shape, 0.05))


class Freezes(keras.callbacks.Callback):
    """Freezes a layer when the training begins; the next one has weights of the same shape."""

    def on_train_begin(self, logs=None):
        self.model.get_layer("first").trainable = False


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize(
    ("optimizer", "callback"),
    [
        (lambda: keras.optimizers.ScheduleFreeAdamW(0.01), Assigns),
        (lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), Freezes),
    ],
)
def test_the_optimizer_begins_with_what_callbacks_leave_it(optimizer, callback, reach):
    def compile_with(model):
        # As a graph, Keras loses the weights that ScheduleFreeAdamW begins with.
        eager = not isinstance(model, TBPTTModel)
        return plainly(optimizer=optimizer(), run_eagerly=eager)(model)

    assert_alike(fits(compile_with, callbacks=[callback], reach=reach))


def test_a_step_that_learns_nothing_needs_no_optimizer():
    cls = [
        type("Tests", (each,), {"train_step": lambda self, data: self.test_step(data)})
        for each in (TBPTTModel, keras.Model)
    ]
    assert_alike(fits(plainly(optimizer=None), cls=cls))


@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("loss", [{"b": "mse"}, {"a": None, "b": "mse"}])
def test_some_outputs_may_have_no_target(loss):
    assert_alike(fits(plainly(loss=loss), outputs=several_outputs, labels={"b": LABELS}))


class InNumPy(keras.metrics.Mean):
    """Its result has a shape that TensorFlow does not know."""

    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(y_pred, sample_weight)

    def result(self):
        return tf.numpy_function(np.float32, [super().result()], tf.float32)


class BeginsAtOne(keras.metrics.Metric):
    """Makes its variable when it is first updated."""

    total = None

    def update_state(self, y_true, y_pred, sample_weight=None):
        if self.total is None:
            self.total = self.add_weight(initializer="ones")
        self.total.assign_add(keras.ops.sum(y_pred))

    def result(self):
        return self.total + 0


@pytest.mark.parametrize("metric", [InNumPy, BeginsAtOne, keras.metrics.AUC, keras.metrics.F1Score])
def test_metrics_are_those_of_keras(metric):
    assert_alike(fits(lambda model: plainly(weighted_metrics=[metric(name="metric")])(model)))


@pytest.mark.parametrize("outputs", [one_output, several_outputs])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight", "sum"])
def test_each_reduction_reports_the_mean_over_documents(outputs, reduction):
    """Six documents in four lanes: the last two batches have idle lanes."""
    model = build(TBPTTModel, outputs)
    names = model.output_names
    losses = [keras.losses.BinaryCrossentropy(reduction=reduction) for _ in names]
    model.compile(keras.optimizers.SGD(0.0), losses[0] if len(names) == 1 else losses)
    labels = LABELS[:6] if len(names) == 1 else dict.fromkeys(names, LABELS[:6])
    windows = DocumentWindows(list(DOCUMENTS[:6]), labels, window=WINDOW, lanes=LANES)
    predicted = keras.tree.flatten(model.predict_documents(list(DOCUMENTS[:6])))
    each = [float(np.mean(keras.losses.binary_crossentropy(LABELS[:6], p))) for p in predicted]
    for figures in (
        model.evaluate(windows, verbose=0, return_dict=True),
        {k: v[0] for k, v in model.fit(windows, verbose=0).history.items()},
    ):
        assert figures["loss"] == pytest.approx(sum(each), rel=1e-5)
        if len(each) > 1:
            found = [figures[f"{name}_loss"] for name in names]
            assert found == pytest.approx(each, rel=1e-5)


@pytest.mark.parametrize("reach", ["all", "artbp"])
def test_a_second_fit_has_no_window_of_the_first_to_look_back_to(reach):
    documents = [np.tile(each, (3, 1)) for each in DOCUMENTS[:LANES]]

    def windows(dtype):
        labels = LABELS[:LANES].astype(dtype)
        return DocumentWindows(documents, labels, window=WINDOW, lanes=LANES, packing="aligned")

    def model():
        made = build(TBPTTModel, backprop_windows=reach, cut_probability=1e-6)
        made.compile(keras.optimizers.SGD(0.1), "binary_crossentropy")
        return made

    trained, fresh = model(), model()
    trained.fit(windows("int32"), steps_per_epoch=2, verbose=0)  # ends within all documents
    trained.fit(windows("float32"), verbose=0)
    fresh.set_weights(trained.get_weights())
    for each in (trained, fresh):
        each.fit(windows("int32"), verbose=0)
    for got, expected in zip(trained.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-7)
