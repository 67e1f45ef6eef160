"""Training on a sample of the classes: exact everywhere else, and the same to the bit on resume."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import InterruptAt, Interruption

import keras_tbptt
from keras_tbptt import DocumentWindows, TBPTTModel
from keras_tbptt.layers import SampledReversibleEmbedding, SampledSoftmax
from keras_tbptt.layers._candidates import LogUniform, candidate_logits
from keras_tbptt.layers._sampling_layer import mark_sampled, sampled_of
from keras_tbptt.optimizers import LazyAdam

L = keras.layers
CLASSES, LANES, WINDOW = 50, 4, 5


def texts(count=9, seed=0):
    """Documents with frequent small ids, as words sorted by frequency have."""
    rng = np.random.default_rng(seed)
    return [np.minimum(rng.geometric(0.1, n), CLASSES) - 1 for n in rng.integers(6, 30, count)]


def next_words(**kwargs):
    return DocumentWindows.next_step(texts(), window=WINDOW, lanes=LANES, **kwargs)


def head(**kwargs):
    initial = keras.initializers.GlorotUniform(seed=2)
    return SampledSoftmax(
        CLASSES, **{"samples": 8, "seed": 3, "kernel_initializer": initial, **kwargs}
    )


def language_model(last=None, cls=TBPTTModel, lstm=None, seed=1, **kwargs):
    keras.utils.set_random_seed(seed)
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    x = L.Embedding(CLASSES, 6)(tokens)
    x = L.LSTM(7, stateful=True, return_sequences=True, **(lstm or {}))(x)
    return cls(tokens, (last or head())(x), **kwargs)


def tied_model(activation="softmax", **kwargs):
    keras.utils.set_random_seed(1)
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    words = SampledReversibleEmbedding(CLASSES, 7, samples=8, seed=3, activation=activation)
    x = L.LSTM(7, stateful=True, return_sequences=True)(words(tokens))
    return TBPTTModel(tokens, words(x, reverse=True), **kwargs)


def compiled(model, optimizer="sgd", loss="sparse_categorical_crossentropy", **kwargs):
    model.compile(optimizer, loss, **kwargs)
    return model


def with_dense(model, **kwargs):
    """The same model, with the same weights, whose last layer is Keras's."""
    dense = language_model(L.Dense(CLASSES, activation="softmax"), **kwargs)
    *others, kernel, bias = model.get_weights()
    dense.set_weights([*others, kernel.T, bias])
    return dense


@pytest.mark.parametrize("draws", [1, 7])
def test_a_class_is_drawn_as_often_as_is_said(draws):
    sampler = LogUniform(12, 5)
    sampler.draws = draws
    once = np.log1p(1 / np.arange(1, 13)) / np.log(13)
    assert once.sum() == pytest.approx(1)
    chance = np.exp(sampler.log_chance(tf.range(12)))
    np.testing.assert_allclose(chance, 1 - (1 - once) ** draws, rtol=1e-5)

    @tf.function
    def count(trials):
        drawn = tf.map_fn(
            lambda i: tf.reduce_sum(tf.one_hot(sampler.draw(tf.stack([5, i])), 12), axis=0),
            tf.range(trials),
            fn_output_signature=tf.float32,
        )
        return tf.reduce_mean(drawn, axis=0)

    np.testing.assert_allclose(count(20_000), chance, atol=0.012)


@pytest.mark.parametrize(("classes", "samples"), [(50, 8), (20_000, 1024), (10, 9)])
def test_as_many_distinct_classes_are_drawn_as_are_asked_for(classes, samples):
    sampler = LogUniform(classes, samples)
    drawn = [sampler.draw(tf.constant([1, i])).numpy() for i in range(100)]
    assert all(len(set(ids)) == len(ids) and ids.max() < classes for ids in drawn)
    assert np.mean([len(ids) for ids in drawn]) == pytest.approx(samples, rel=0.06)
    np.testing.assert_array_equal(sampler.draw(tf.constant([1, 2])), drawn[2])


def test_the_loss_is_tensorflows():
    rng = np.random.default_rng(0)
    kernel = keras.Variable(rng.normal(size=(CLASSES, 6)), dtype="float32")
    bias = keras.Variable(rng.normal(size=CLASSES), dtype="float32")
    inputs = tf.constant(rng.normal(size=(30, 6)), tf.float32)
    targets = tf.constant(rng.integers(0, CLASSES, 30))
    sampler = LogUniform(CLASSES, 20)
    drawn = sampler.draw(tf.constant([1, 2]))
    expected = tf.nn.sampled_softmax_loss(
        kernel.value,
        bias.value,
        targets[:, None],
        inputs,
        tf.size(drawn),
        CLASSES,
        sampled_values=(
            drawn,
            tf.exp(sampler.log_chance(targets))[:, None],
            tf.exp(sampler.log_chance(drawn)),
        ),
        remove_accidental_hits=True,
    )
    logits = candidate_logits(inputs, kernel, bias, targets, drawn, sampler)
    got = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.zeros(30, "int64"), logits)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.isin(targets, drawn).any() and not np.isin(targets, drawn).all()


def test_the_mean_gradient_approaches_that_of_all_classes():
    rng = np.random.default_rng(0)
    kernel = keras.Variable(rng.normal(size=(CLASSES, 6)), dtype="float32")
    inputs = tf.constant(rng.normal(size=(30, 6)), tf.float32)
    targets = tf.constant(np.minimum(rng.geometric(0.2, 30), CLASSES) - 1)

    def gradient(logits_and_labels):
        with tf.GradientTape() as tape:
            logits, labels = logits_and_labels()
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(loss)
        return tf.convert_to_tensor(tape.gradient(loss, kernel.value))

    exact = gradient(lambda: (tf.matmul(inputs, kernel.value, transpose_b=True), targets))

    def error(samples):
        sampler = LogUniform(CLASSES, samples)

        def with_sample(seed):
            drawn = sampler.draw(tf.stack([7, seed]))
            logits = candidate_logits(inputs, kernel, None, targets, drawn, sampler)
            return logits, tf.zeros_like(targets)

        one = tf.function(lambda seed: gradient(lambda: with_sample(seed)))
        mean = np.mean([one(tf.constant(seed)) for seed in range(300)], axis=0)
        return np.linalg.norm(mean - exact) / np.linalg.norm(exact)

    errors = [error(samples) for samples in (10, 30, 48)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03


@pytest.mark.parametrize("activation", ["softmax", None])
def test_evaluation_and_prediction_are_those_of_a_dense_layer(activation):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    metric = keras_tbptt.metrics.Perplexity(from_logits=activation is None)
    model = compiled(
        language_model(head(activation=activation)), loss=loss, weighted_metrics=[metric]
    )
    model.fit(next_words(), verbose=0)
    dense = language_model(L.Dense(CLASSES, activation=activation))
    *others, kernel, bias = model.get_weights()
    dense.set_weights([*others, kernel.T, bias])
    compiled(dense, loss=loss, weighted_metrics=[metric])
    np.testing.assert_allclose(
        model.evaluate(next_words(), verbose=0), dense.evaluate(next_words(), verbose=0), rtol=1e-5
    )
    for one, two in zip(
        model.predict_documents(texts()), dense.predict_documents(texts()), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{"cls": keras.Model}, {"last": head(samples=CLASSES)}])
def test_stock_models_and_samples_of_all_classes_learn_exactly(kwargs):
    data = next_words().dataset() if "cls" in kwargs else next_words()
    model = language_model(**kwargs)
    kwargs.pop("last", None)
    dense = with_dense(model, **kwargs)
    for one in (model, dense):
        history = compiled(one, weighted_metrics=["accuracy"]).fit(data, verbose=0, shuffle=False)
        assert set(history.history) == {"loss", "accuracy"}
    *others, kernel, bias = model.get_weights()
    for got, expected in zip([*others, kernel.T, bias], dense.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


REACHES = [
    {},
    {"backprop_windows": 2},
    {"backprop_windows": "all"},
    {"backprop_windows": "artbp"},
    {"burn_in": 1},
    {"window_loss": "final_only"},
    {"window_loss": "linear_gain", "backprop_windows": 3},
]


@pytest.mark.parametrize("kwargs", REACHES)
def test_training_lowers_the_exact_loss_and_reports_no_metric_of_a_sample(kwargs):
    data = next_words(packing="aligned", shuffle=True, seed=0)
    model = compiled(
        language_model(**kwargs),
        LazyAdam(0.03),
        weighted_metrics=["accuracy"],
        steps_per_execution=2,
    )
    before = model.evaluate(data, verbose=0)[0]
    history = model.fit(data, validation_data=data, epochs=3, verbose=0).history
    assert set(history) == {"loss", "val_loss", "val_accuracy"}
    assert history["val_loss"][-1] < before - 0.05
    assert np.isfinite(history["loss"]).all() and history["loss"][0] < before


@pytest.mark.parametrize("kwargs", REACHES[:5])
def test_the_product_with_all_classes_is_not_computed_in_training(kwargs):
    calls = []

    class Watched(SampledSoftmax):
        def call(self, inputs, training=None):
            def watch(outputs):
                calls.append(outputs.shape)
                return outputs

            outputs = super().call(inputs, training)
            seen = tf.numpy_function(watch, [outputs], tf.float32, stateful=False)
            return mark_sampled(tf.ensure_shape(seen, outputs.shape), sampled_of(outputs))

    model = language_model(Watched(CLASSES, samples=8), **kwargs)
    compiled(model, weighted_metrics=["accuracy"])
    model.fit(next_words(packing="aligned"), verbose=0)
    assert not calls
    model.evaluate(next_words(), verbose=0)
    assert calls


def test_a_training_step_does_not_read_the_whole_kernel():
    """TensorFlow would copy it, because the optimizer writes to it later on."""
    model = compiled(language_model(), LazyAdam(0.02))
    data = next_words()
    model.fit(data, verbose=0)
    batch = next(iter(data.dataset(flags=True)))
    graph = tf.function(model.train_step).get_concrete_function(batch).graph
    handle = next(i for e, i in graph.captures if e is model.layers[-1].kernel.value.handle)
    assert {op.type for op in handle.consumers()} >= {"ResourceGather", "ResourceScatterSub"}
    assert "ReadVariableOp" not in {op.type for op in handle.consumers()}


def test_a_loss_of_ones_own_sees_the_exact_output():
    seen = []

    class Own(TBPTTModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            seen.append(np.asarray(y_pred))
            return tf.reduce_sum(y_pred) * 0.0

    model = compiled(language_model(cls=Own), keras.optimizers.SGD(0.0), run_eagerly=True)
    model.fit(next_words(), verbose=0)
    np.testing.assert_allclose(np.sum(seen, axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("kwargs", [{}, {"run_eagerly": True}])
@pytest.mark.parametrize("build", [language_model, tied_model])
def test_a_training_step_takes_tensorflows_loss(build, kwargs):
    model = compiled(build(), keras.optimizers.SGD(1.0), **kwargs)
    other = build()
    other.set_weights(model.get_weights())
    layer = other.layers[-1] if build is language_model else other.layers[1]
    kernel, bias = layer._kernel_and_bias()
    documents = [text[: WINDOW + 1] for text in texts() if len(text) > WINDOW][:LANES]
    weights = np.array([1.0, 0.0, 0.5, 2.0])
    windows = DocumentWindows.next_step(documents, weights=weights, window=WINDOW, lanes=LANES)
    history = model.fit(windows, verbose=0).history

    x, targets, sample_weight = next(iter(windows.dataset()))
    drawn = layer._sampler.draw(layer.seed_generator.next())
    variables = [variable.value for variable in other.trainable_variables]
    with tf.GradientTape() as tape:
        outputs = other(x, training=True)
        hidden = sampled_of(outputs).inputs
        losses = tf.nn.sampled_softmax_loss(
            kernel.value,
            tf.zeros(CLASSES) if bias is None else bias.value,
            tf.reshape(tf.cast(targets, "int64"), [-1, 1]),
            tf.reshape(hidden, [-1, 7]),
            tf.size(drawn),
            CLASSES,
            sampled_values=(
                drawn,
                tf.exp(layer._sampler.log_chance(tf.reshape(targets, [-1, 1]))),
                tf.exp(layer._sampler.log_chance(drawn)),
            ),
            remove_accidental_hits=True,
        )
        loss = tf.reduce_mean(losses * tf.reshape(tf.cast(sample_weight, "float32"), [-1]))
    assert history["loss"] == [pytest.approx(float(loss), rel=1e-5)]
    for new, old, gradient in zip(
        model.trainable_variables, variables, tape.gradient(loss, variables), strict=True
    ):
        np.testing.assert_allclose(new, old - tf.convert_to_tensor(gradient), atol=1e-6)


@pytest.mark.parametrize("reach", [2, "all"])
def test_windows_that_run_again_have_the_same_candidates(reach):
    short = [text[: WINDOW + 1] for text in texts(12)]
    windows = DocumentWindows.next_step(short, window=WINDOW, lanes=LANES, packing="aligned")
    once, again = (
        compiled(language_model(lstm={"dropout": 0.3}, backprop_windows=n), "adam")
        for n in (1, reach)
    )
    losses = [model.fit(windows, epochs=2, verbose=0).history["loss"] for model in (once, again)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for one, two in zip(once.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("reach", [1, 2])
@pytest.mark.parametrize("build", [language_model, tied_model])
def test_lazy_adam_leaves_the_classes_that_were_not_drawn_alone(build, reach):
    model = compiled(build(backprop_windows=reach), LazyAdam(0.1, clipnorm=1.0))
    model.fit(next_words(), verbose=0)  # gives the rows a momentum
    layer = model.layers[-1] if build is language_model else model.layers[1]
    kernel, bias = layer._kernel_and_bias()
    before = [np.array(weight) for weight in (kernel, bias) if weight is not None]
    drawn = layer._sampler.draw(tf.identity(layer.seed_generator.state.value)).numpy()
    documents = [[1, 2, 3, 1, 2, 4]] * LANES
    model.fit(DocumentWindows.next_step(documents, window=WINDOW, lanes=LANES), verbose=0)
    used = {1, 2, 3, 4, *drawn.tolist()}
    assert len(used) < CLASSES / 2
    for old, new in zip(before, (kernel, bias), strict=False):
        moved = (old != np.array(new)).reshape(CLASSES, -1).any(axis=1)
        assert set(np.flatnonzero(moved)) == used


def test_a_tied_table_gets_the_sum_of_its_gradients():
    """As an output and as an embedding; Adam, which takes dense gradients, is the oracle."""
    windows = DocumentWindows.next_step(texts(), window=WINDOW, lanes=LANES)
    gradients = []
    for cls in (LazyAdam, keras.optimizers.Adam):
        model = compiled(tied_model(), cls(0.1, beta_1=0.0, beta_2=0.0, epsilon=1.0))
        model.fit(windows.dataset(flags=True).take(1), verbose=0)
        gradients.append(model.layers[1].get_weights()[0])
    np.testing.assert_allclose(*gradients, atol=1e-5)


def test_xla_does_not_compile_it():
    with pytest.warns(UserWarning, match="Proceeding with `jit_compile=False`"):
        model = compiled(language_model(), jit_compile=True)
    assert not model.jit_compile
    assert not compiled(language_model(), jit_compile="auto").jit_compile


@pytest.mark.filterwarnings("ignore:.*these callbacks.*Interrupt")
@pytest.mark.parametrize("kwargs", [{}, {"backprop_windows": 2}])
@pytest.mark.parametrize("build", [language_model, tied_model])
def test_an_interrupted_training_resumes_to_the_bit(tmp_path, build, kwargs):
    def train(folder, *callbacks):
        model = compiled(build(**kwargs), LazyAdam(0.02))
        data = next_words(shuffle=True, seed=0)
        backup = keras_tbptt.ExactBackup(tmp_path / folder, data, every_windows=2)
        fit = model.fit(data, epochs=2, callbacks=[backup, *callbacks], verbose=0)
        return fit.history["loss"], model.get_weights()

    whole = train("whole")
    with pytest.raises(Interruption):
        train("parts", InterruptAt(len(next_words()) + 5))
    resumed = train("parts")
    assert resumed[0][-1] == whole[0][-1]
    for one, two in zip(resumed[1], whole[1], strict=True):
        np.testing.assert_array_equal(one, two)


def two_outputs(as_dict, last):
    keras.utils.set_random_seed(1)
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    x = L.LSTM(7, stateful=True)(L.Embedding(CLASSES, 6)(tokens))
    outputs = {"word": last(x), "good": L.Dense(1, activation="sigmoid", name="good")(x)}
    return TBPTTModel(tokens, outputs if as_dict else [outputs["word"], outputs["good"]])


@pytest.mark.parametrize("as_dict", [True, False])
def test_one_of_several_outputs_is_sampled(as_dict):
    rng = np.random.default_rng(0)
    labels = {"word": rng.integers(0, CLASSES, 9), "good": rng.integers(0, 2, 9)}
    if not as_dict:
        labels = (labels["word"], labels["good"])
    windows = DocumentWindows(texts(), labels, window=WINDOW, lanes=LANES)
    model = two_outputs(as_dict, head(name="word"))
    model.compile(
        "adam",
        {"word": "sparse_categorical_crossentropy", "good": "binary_crossentropy"},
        {"word": 2.0, "good": 1.0},
        weighted_metrics={"word": ["accuracy"], "good": ["accuracy"]},
    )
    history = model.fit(windows, validation_data=windows, epochs=2, verbose=0).history
    ours = {"loss", "word_loss", "good_loss", "good_accuracy"}
    assert set(history) == ours | {f"val_{name}" for name in ours} | {"val_word_accuracy"}
    for prefix in ("", "val_"):
        parts = 2 * np.array(history[f"{prefix}word_loss"]) + history[f"{prefix}good_loss"]
        np.testing.assert_allclose(history[f"{prefix}loss"], parts, rtol=1e-5)
    assert max(history["word_loss"]) < min(history["val_word_loss"])  # of a sample


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_a_target_per_document_with_class_weights(dtype):
    labels = np.array([0, 1, 49, 3, 4, 5, 6, 7, 8]).astype(dtype)
    windows = DocumentWindows(texts(), labels, window=WINDOW, lanes=LANES)
    keras.utils.set_random_seed(1)
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    x = L.LSTM(7, stateful=True)(L.Embedding(CLASSES, 6)(tokens))
    model = compiled(TBPTTModel(tokens, head()(x)), keras.optimizers.SGD(0.0))
    none = model.fit(windows, class_weight=dict.fromkeys(range(CLASSES), 0.0), verbose=0)
    some = model.fit(windows, class_weight={49: 2.0}, verbose=0)
    assert none.history["loss"] == [0] and np.isfinite(some.history["loss"][0])


def test_penalties_are_added_to_the_loss():
    def loss(regularizer):
        model = language_model(head(kernel_regularizer=regularizer))
        compiled(model, keras.optimizers.SGD(0.0))
        kernel = model.layers[-1].kernel
        return model.fit(next_words(), verbose=0).history["loss"][0], np.sum(np.square(kernel))

    (without, _), (penalised, norm) = loss(None), loss(keras.regularizers.L2(0.5))
    assert penalised == pytest.approx(without + 0.5 * norm, rel=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("build", [language_model, tied_model])
def test_mixed_precision(build, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(build(), LazyAdam(0.02))
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.output.dtype == policy.removeprefix("mixed_")
    losses = model.fit(next_words(), validation_data=next_words(), epochs=3, verbose=0).history
    plain = compiled(build(), LazyAdam(0.02)).fit(next_words(), epochs=3, verbose=0).history
    assert losses["val_loss"][-1] < losses["val_loss"][0]
    np.testing.assert_allclose(losses["loss"], plain["loss"], rtol=0.05)


@pytest.mark.parametrize("build", [language_model, tied_model])
@pytest.mark.parametrize("how", ["clone", "file"])
def test_clones_and_files_are_sampled_too(tmp_path, build, how):
    model = compiled(build(), LazyAdam(0.02))
    model.fit(next_words(), verbose=0)
    if how == "clone":
        other = compiled(keras.models.clone_model(model), LazyAdam(0.02))
        other.set_weights(model.get_weights())
    else:
        model.save(tmp_path / "model.keras")
        other = keras.saving.load_model(tmp_path / "model.keras")
    for one, two in zip(model.layers[1:], other.layers[1:], strict=True):
        assert one.get_config() == two.get_config()
    np.testing.assert_array_equal(
        np.concatenate(model.predict_documents(texts())),
        np.concatenate(other.predict_documents(texts())),
    )
    sampled = other.fit(next_words(), verbose=0).history["loss"][0]
    assert sampled < 0.9 * other.evaluate(next_words(), verbose=0)


@pytest.mark.parametrize("build", [language_model, tied_model])
def test_exports_are_exact(tmp_path, build):
    model = compiled(build())
    keras_tbptt.export_saved_model(model, tmp_path / "model")
    (version,) = (tmp_path / "model").glob("[0-9]*")
    tokens = tf.saved_model.load(version).signatures["tokens"]
    document = texts()[0].astype("int32")
    got = tokens(ids=document[None], lengths=np.int32([len(document)]))["probability"]
    (expected,) = model.predict_documents([document])
    np.testing.assert_allclose(got[0], expected, atol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", None])
@pytest.mark.parametrize("tied", [True, False])
def test_what_else_runs_the_model_is_exact(tied, activation):
    """Generation, dynamic evaluation and a resized model: as with a dense layer."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=activation is None)
    model = tied_model(activation) if tied else language_model(head(activation=activation))
    compiled(model, LazyAdam(0.02), loss).fit(next_words(), verbose=0)
    weights = model.get_weights()
    if tied:
        weights += [weights[0].T, np.zeros(CLASSES)]
    else:
        weights[-2] = weights[-2].T
    keras.utils.set_random_seed(1)
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    x = L.Embedding(CLASSES, 7 if tied else 6)(tokens)
    x = L.LSTM(7, stateful=True, return_sequences=True)(x)
    dense = TBPTTModel(tokens, L.Dense(CLASSES, activation=activation)(x))
    dense.set_weights(weights)
    compiled(dense, "sgd", loss)
    got, expected = (
        keras_tbptt.generate(one, [[1, 2, 3]] * 2, 9, temperature=1.0, seed=1)
        for one in (model, dense)
    )
    for one, two in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, two)
    if not tied:
        scores = [
            keras_tbptt.evaluate_dynamically(one, next_words(), learning_rate=0.01)["loss"]
            for one in (model, dense)
        ]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    resized = compiled(model.resized(lanes=2), loss=loss)
    windows = DocumentWindows.next_step(texts(), window=WINDOW, lanes=2)
    assert resized.evaluate(windows, verbose=0) == pytest.approx(
        model.evaluate(next_words(), verbose=0), rel=1e-5
    )


def test_a_tied_layer_is_exact_in_evaluation_and_in_stock_models():
    model = compiled(tied_model(), "adam")
    model.fit(next_words(), verbose=0)
    table = model.get_weights()[0]
    dense = language_model(L.Dense(CLASSES, use_bias=False, activation="softmax"))
    keras.utils.set_random_seed(1)
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    x = L.LSTM(7, stateful=True, return_sequences=True)(L.Embedding(CLASSES, 7)(tokens))
    dense = TBPTTModel(tokens, L.Dense(CLASSES, use_bias=False, activation="softmax")(x))
    dense.set_weights([*model.get_weights(), table.T])
    np.testing.assert_allclose(
        np.concatenate(model.predict_documents(texts())),
        np.concatenate(dense.predict_documents(texts())),
        atol=1e-6,
    )
    stock = compiled(keras.Model(model.inputs, model.outputs), keras.optimizers.SGD(0.0))
    data = next_words().dataset()
    loss = stock.fit(data, shuffle=False, verbose=0).history["loss"][0]
    assert loss == pytest.approx(stock.evaluate(data, verbose=0), rel=0.2)


def test_a_layer_with_lora_is_sampled_from_the_sum():
    model = tied_model()
    model.layers[1].enable_lora(2)
    compiled(model, keras.optimizers.Adam(0.02))
    before = model.evaluate(next_words(), verbose=0)
    model.fit(next_words(), epochs=2, verbose=0)
    assert model.evaluate(next_words(), verbose=0) < before


def test_a_nested_model_may_end_with_the_layer():
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    inner = language_model(cls=keras.Model)
    model = compiled(TBPTTModel(tokens, inner(tokens)), weighted_metrics=["accuracy"])
    assert set(model.fit(next_words(), verbose=0).history) == {"loss"}


def test_another_layer_behind_it_is_refused():
    def behind(x):
        return L.Activation("softmax", dtype="float32")(head(activation=None)(x))

    with pytest.raises(ValueError, match=r"must be an output of the model.*Received: layer"):
        language_model(behind)
    assert language_model(behind, cls=keras.Model)


@pytest.mark.parametrize(
    ("activation", "loss"),
    [
        ("softmax", "mse"),
        ("softmax", keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        (None, "sparse_categorical_crossentropy"),
        (None, keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)),
    ],
)
def test_a_loss_that_the_sample_would_change_is_refused(activation, loss):
    model = compiled(language_model(head(activation=activation)), loss=loss)
    logits = activation is None
    with pytest.raises(ValueError, match=rf"Crossentropy\(from_logits={logits}\).*Received: "):
        model.fit(next_words(), verbose=0)


@pytest.mark.parametrize("wrong", [-1, CLASSES])
def test_targets_that_are_no_classes_are_refused(wrong):
    documents = texts()
    targets = [text * 0 for text in documents]
    targets[2][1] = wrong
    windows = DocumentWindows(documents, targets, window=WINDOW, lanes=LANES, per_step=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be classes from 0 to 49"):
        compiled(language_model()).fit(windows, verbose=0)


def test_one_hot_targets_are_refused():
    documents = texts()
    targets = [np.eye(CLASSES, dtype="float32")[text] for text in documents]
    windows = DocumentWindows(documents, targets, window=WINDOW, lanes=LANES, per_step=True)
    with pytest.raises(ValueError, match="the index of one class as the target"):
        compiled(language_model()).fit(windows, verbose=0)


@pytest.mark.parametrize(
    ("make", "received"),
    [
        (lambda: SampledSoftmax(0), "classes=0"),
        (lambda: SampledSoftmax(9.5), "classes=9.5"),
        (lambda: SampledSoftmax(9, samples=0), "samples=0"),
        (lambda: SampledSoftmax(9, activation="relu"), "activation='relu'"),
        (lambda: SampledReversibleEmbedding(9, 2, tie_weights=False), "tie_weights=False"),
        (lambda: SampledReversibleEmbedding(9, 2, logit_soft_cap=3.0), "logit_soft_cap=3.0"),
        (
            lambda: SampledReversibleEmbedding(9, 2)(keras.Input((3, 4)), reverse=True),
            r"inputs of shape \(None, 3, 4\)",
        ),
    ],
)
def test_arguments_are_checked(make, received):
    with pytest.raises(ValueError, match=f"Received: {received}"):
        make()
