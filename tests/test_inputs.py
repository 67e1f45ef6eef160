"""Several inputs per step and inputs of a whole document, against the plain model."""

import itertools
from collections import OrderedDict

import keras
import numpy as np
import pytest
import tensorflow as tf
from toys import InterruptAt, Interruption

import keras_tbptt
from keras_tbptt import DocumentWindows, TBPTTModel
from keras_tbptt.client import Session

L = keras.layers
COUNT = 9


def documents(count=COUNT, longest=17, seed=0, multiple=1):
    rng = np.random.default_rng(seed)
    lengths = multiple * rng.integers(1, longest // multiple + 1, count)
    steps = {
        "tokens": [rng.integers(1, 20, n).astype("int32") for n in lengths],
        "features": [rng.normal(size=(n, 2)).astype("float32") for n in lengths],
    }
    return steps, {"user": rng.integers(0, 4, count)}, rng.integers(0, 2, count)


def outputs_of(inputs, window, cell=L.LSTM, layers=1):
    user = L.RepeatVector(window)(L.Embedding(4, 3)(inputs["user"]))
    x = L.Concatenate()([L.Embedding(20, 4)(inputs["tokens"]), inputs["features"], user])
    for i in range(layers):
        x = cell(5, stateful=True, return_sequences=i < layers - 1)(x)
    return L.Dense(1, activation="sigmoid")(x)


def symbolic(lanes, window):
    return {
        "tokens": keras.Input(batch_shape=(lanes, window), dtype="int32", name="tokens"),
        "features": keras.Input(batch_shape=(lanes, window, 2), name="features"),
        "user": keras.Input(batch_shape=(lanes,), dtype="int32", name="user"),
    }


def build(lanes=4, window=5, as_list=False, cls=TBPTTModel, wiring=None, **kwargs):
    keras.utils.set_random_seed(1)
    inputs = symbolic(lanes, window)
    outputs = outputs_of(inputs, window, **(wiring or {}))
    model = cls([*inputs.values()] if as_list else inputs, outputs, **kwargs)
    model.compile(keras.optimizers.SGD(1.0), "binary_crossentropy")
    return model


def on_whole_documents(model, steps, static, labels, wiring):
    """The predictions of the same layers on whole documents, and the gradients' mean."""
    predictions, gradients = [], []
    for i, tokens in enumerate(steps["tokens"]):
        whole = build(1, len(tokens), cls=keras.Model, wiring=wiring)
        whole.set_weights(model.get_weights())
        given = {name: array[i][None] for name, array in {**steps, **static}.items()}
        with tf.GradientTape() as tape:
            prediction = whole(given)
            loss = whole.compute_loss(y=labels[i : i + 1, None], y_pred=prediction)
        predictions.append(prediction[0].numpy())
        gradients.append(
            [tf.convert_to_tensor(g) for g in tape.gradient(loss, whole.trainable_variables)]
        )
    return np.array(predictions), [np.mean(each, axis=0) for each in zip(*gradients, strict=True)]


@pytest.mark.parametrize(
    "cell, layers", [(keras_tbptt.layers.LSTM, 1), (L.LSTM, 2), (L.GRU, 1), (L.GRU, 2)]
)
def test_predictions_and_exact_gradients_are_those_of_whole_documents(cell, layers):
    steps, static, labels = documents()
    wiring = {"cell": cell, "layers": layers}
    model = build(COUNT, wiring=wiring, window_loss="final_only", backprop_windows="all")
    predictions, gradients = on_whole_documents(model, steps, static, labels, wiring)
    np.testing.assert_allclose(
        model.predict_documents(steps, static=static), predictions, atol=1e-6
    )
    before = [weight.numpy() for weight in model.trainable_variables]
    windows = DocumentWindows(
        steps, labels, static=static, window=5, lanes=COUNT, packing="aligned"
    )
    model.fit(windows, epochs=1, verbose=0)
    for old, weight, gradient in zip(before, model.trainable_variables, gradients, strict=True):
        np.testing.assert_allclose(old - weight.numpy(), gradient, atol=1e-5)


@pytest.mark.parametrize(
    ("window_loss", "reach"), [("per_window", 1), ("final_only", 2), ("linear_gain", "artbp")]
)
def test_a_list_of_inputs_learns_as_a_dict_does(window_loss, reach):
    steps, static, labels = documents()
    windows = DocumentWindows(steps, labels, static=static, window=5, lanes=4, shuffle=True, seed=0)
    found = []
    for as_list in (False, True):
        model = build(as_list=as_list, window_loss=window_loss, backprop_windows=reach)
        windows.epoch = 0
        history = model.fit(windows, validation_data=windows, epochs=2, verbose=0).history
        found.append((history, model.predict_documents(steps, static=static)))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("as_list", [False, True])
def test_predictions_depend_on_no_lane_and_no_window(as_list):
    steps, static, _ = documents()
    model = build(as_list=as_list)
    expected = model.predict_documents(steps, static=static)
    for lanes, window in ((1, 1), (3, 4), (20, 17)):
        other = model.resized(lanes=lanes, window=window)
        np.testing.assert_allclose(
            other.predict_documents(steps, static=static), expected, atol=1e-6
        )


def test_a_stock_model_evaluates_and_trains_on_them():
    steps, static, labels = documents(multiple=5)  # no padding, which it would run over
    windows = DocumentWindows(steps, labels, static=static, window=5, lanes=4)
    model, stock = build(), build(cls=keras.Model)
    resets = keras_tbptt.callbacks.ResetStates(windows)
    evaluated = stock.evaluate(windows.dataset(evaluation=True), callbacks=[resets], verbose=0)
    np.testing.assert_allclose(model.evaluate(windows, verbose=0), evaluated, rtol=1e-5)
    stock.fit(windows.dataset(), callbacks=[resets], shuffle=False, verbose=0)
    model.fit(windows, verbose=0)
    for one, other in zip(model.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_one_input_may_be_named_too():
    steps, _, labels = documents()
    named = DocumentWindows({"tokens": steps["tokens"]}, labels, window=5, lanes=4)
    inputs = named.keras_inputs()
    x = L.LSTM(3, stateful=True)(L.Embedding(20, 4)(inputs["tokens"]))
    outputs = L.Dense(1, activation="sigmoid")(x)
    model, unnamed = TBPTTModel(inputs, outputs), TBPTTModel(inputs["tokens"], outputs)
    np.testing.assert_array_equal(
        model.predict_documents(named), unnamed.predict_documents(steps["tokens"])
    )
    for one, documents_of_the_other in ((model, steps["tokens"]), (unnamed, named)):
        with pytest.raises(ValueError, match="both name their inputs, or neither"):
            one.predict_documents(documents_of_the_other)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_and_several_steps_in_one_execution(policy):
    steps, static, labels = documents()
    windows = DocumentWindows(steps, labels, static=static, window=5, lanes=4)
    found = []
    keras.mixed_precision.set_global_policy(policy)
    try:
        for steps_per_execution in (1, 3):
            model = build()
            model.compile("sgd", "binary_crossentropy", steps_per_execution=steps_per_execution)
            found.append(model.fit(windows, epochs=2, verbose=0).history["loss"])
    finally:
        keras.mixed_precision.set_global_policy("float32")
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)
    assert np.isfinite(found).all()


def test_a_nested_model_and_its_clone_take_several_inputs():
    steps, static, _ = documents()
    inputs = symbolic(4, 5)
    given = {n: keras.Input(t.shape[1:], dtype=t.dtype, name=n) for n, t in inputs.items()}
    user = L.RepeatVector(5)(L.Embedding(4, 3)(given["user"]))
    joined = L.Concatenate()([L.Embedding(20, 4)(given["tokens"]), given["features"], user])
    x = L.LSTM(3, stateful=True)(keras.Model(given, joined)(inputs))
    model = TBPTTModel(inputs, L.Dense(1, activation="sigmoid")(x))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    expected = model.predict_documents(steps, static=static)
    np.testing.assert_array_equal(clone.predict_documents(steps, static=static), expected)
    bad = {"user": static["user"] + 4}
    with pytest.raises(ValueError, match="ids of input 'user'"):
        model.predict_documents(steps, static=bad)


def test_a_nested_model_in_the_style_of_call_takes_several_inputs():
    class Joined(keras.Model):
        def call(self, inputs):
            features, user = inputs
            return features + keras.ops.cast(user, "float32")[:, None, None]

    steps, static, _ = documents()
    inputs = {name: tensor for name, tensor in symbolic(4, 5).items() if name != "tokens"}
    x = Joined()([inputs["features"], inputs["user"]])
    model = TBPTTModel(inputs, L.SimpleRNN(3, stateful=True)(x))
    found = model.predict_documents({"features": steps["features"]}, static=static)
    added = [f + user for f, user in zip(steps["features"], static["user"], strict=True)]
    plain = keras.Input(batch_shape=(4, 5, 2))
    other = TBPTTModel(plain, L.SimpleRNN(3, stateful=True)(plain))
    other.set_weights(model.get_weights())
    np.testing.assert_allclose(found, other.predict_documents(added), atol=1e-6)


def test_floats_for_an_integer_input_are_refused_without_an_embedding_too():
    tokens = keras.Input(batch_shape=(4, 5), dtype="int32")
    model = TBPTTModel(tokens, L.SimpleRNN(3, stateful=True)(keras.ops.one_hot(tokens, 20)))
    with pytest.raises(ValueError, match=r"takes integers.*Received: floats"):
        model.predict_documents([[0.5, 1.5]])


def test_every_form_of_documents_gives_the_same_batches():
    steps, static, labels = documents()
    shape = {"window": 5, "lanes": 4}
    lengths = [len(tokens) for tokens in steps["tokens"]]
    offsets = np.cumsum([0, *lengths])
    rows = [{name: array[i] for name, array in steps.items()} for i in range(COUNT)]
    spec = {"tokens": tf.TensorSpec([None], "int32"), "features": tf.TensorSpec([None, 2])}
    dataset = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec)
    ragged = {
        name: tf.ragged.constant([array.tolist() for array in arrays], ragged_rank=1)
        for name, arrays in steps.items()
    }
    forms = [
        DocumentWindows(steps, labels, static=static, **shape),
        DocumentWindows(ragged, labels, static=static, **shape),
        DocumentWindows(
            {name: np.concatenate(arrays) for name, arrays in steps.items()},
            labels, static=static, offsets=offsets, **shape,
        ),
        DocumentWindows(dataset, labels, static=static, **shape),
    ]  # fmt: skip
    assert len({windows.fingerprint for windows in forms}) == 1
    for batches in zip(*(windows.dataset() for windows in forms), strict=True):
        for other in batches[1:]:
            tf.nest.map_structure(np.testing.assert_array_equal, batches[0], other)


def test_each_lane_has_the_static_input_of_its_document():
    steps, static, labels = documents()
    windows = DocumentWindows(steps, labels, static=static, window=5, lanes=4, shuffle=True, seed=3)
    plan = windows.plan
    for step, (x, _, weight) in enumerate(windows.dataset()):
        busy = weight.numpy() > 0
        np.testing.assert_array_equal(
            x["user"].numpy()[busy], static["user"][plan.document[step][busy]]
        )


def test_the_fingerprint_knows_names_and_static_inputs():
    steps, static, labels = documents()
    shape = {"window": 5, "lanes": 4}
    original = DocumentWindows(steps, labels, static=static, **shape).fingerprint
    renamed = {"words": steps["tokens"], "features": steps["features"]}
    other = {"user": (static["user"] + 1) % 4}
    assert DocumentWindows(renamed, labels, static=static, **shape).fingerprint != original
    assert DocumentWindows(steps, labels, static=other, **shape).fingerprint != original


def test_the_next_step_of_one_input():
    rng = np.random.default_rng(0)
    series = {"load": rng.normal(size=(30, 1)), "hour": np.arange(30) % 24}
    windows = DocumentWindows.next_step(series, target="load", window=4, lanes=3)
    assert windows.num_documents == 3  # streams
    seen = {}
    for x, y, weight in windows.dataset():
        real = weight.numpy() > 0
        for load, following in zip(x["load"].numpy()[real], y.numpy()[real], strict=True):
            seen[float(load[0])] = float(following[0])
    flat = series["load"][:, 0].astype("float32").tolist()
    assert seen == dict(itertools.pairwise(flat))


def padded(steps, starts, ends):
    """The steps from `starts` to `ends` of each document, right-padded with what is no zero."""
    longest = max(ends - starts)
    found = {}
    for name, arrays in steps.items():
        found[name] = np.full((len(arrays), longest, *arrays[0].shape[1:]), 3, arrays[0].dtype)
        for row, array, start, end in zip(found[name], arrays, starts, ends, strict=True):
            row[: end - start] = array[start:end]
    return {**found, "lengths": (ends - starts).astype("int32")}


def test_exports_take_each_input_by_its_name(tmp_path):
    ort = pytest.importorskip("onnxruntime")
    steps, static, _ = documents()
    model = build()
    expected = model.predict_documents(steps, static=static)
    user = static["user"].astype("int32")
    ends = np.array([len(tokens) for tokens in steps["tokens"]])
    begin, middle = np.zeros_like(ends), ends // 2

    served = tf.saved_model.load(str(keras_tbptt.export_saved_model(model, tmp_path / "model")))
    call = {name: f for name, f in served.signatures.items()}
    as_tensors = lambda given: {name: tf.constant(value) for name, value in given.items()}  # noqa: E731
    found = call["serving_default"](**as_tensors({**padded(steps, begin, ends), "user": user}))
    np.testing.assert_allclose(found["probability"], expected, atol=1e-6)

    state = call["initial_state"](batch_size=tf.constant(COUNT))["state"]
    onnx = ort.InferenceSession(str(keras_tbptt.export_onnx(model, tmp_path / "model.onnx")))
    onnx_state, names = state.numpy(), [output.name for output in onnx.get_outputs()]
    for start, end in itertools.pairwise((begin, middle, ends)):
        piece = {**padded(steps, start, end), "user": user, "start": end < 0}
        reply = call["stream"](**as_tensors({**piece, "state": state}))
        state = reply["state"]
        replies = dict(zip(names, onnx.run(None, {**piece, "state": onnx_state}), strict=True))
        onnx_state = replies["new_state"]
    np.testing.assert_allclose(reply["probability"], expected, atol=1e-6)
    np.testing.assert_allclose(replies["probability"], expected, atol=1e-6)

    whole = padded(steps, begin, ends)
    for change, named in (
        ({"user": user + 4}, "`user` must lie between 0 and 3"),
        ({"features": whole["features"] * np.nan}, "`features` must be finite"),
        ({"user": user[:-1]}, "`user` and `lengths`"),
        ({"tokens": whole["tokens"][:, :-1]}, "`lengths` must lie between 1"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=named):
            call["serving_default"](**as_tensors({**whole, "user": user, **change}))


def test_a_text_with_a_static_input_is_served_and_streamed(tmp_path):
    texts = ["good film", "bad film", "a good good film"]
    vectorizer = keras_tbptt.text.make_vectorizer(texts)
    steps = {"tokens": keras_tbptt.text.encode(vectorizer, texts)}
    inputs = symbolic(2, 3)
    del inputs["features"]
    user = L.RepeatVector(3)(L.Embedding(4, 3)(inputs["user"]))
    x = L.Concatenate()([L.Embedding(20, 4)(inputs["tokens"]), user])
    model = TBPTTModel(inputs, L.Dense(1, activation="sigmoid")(L.LSTM(5, stateful=True)(x)))
    users = np.array([0, 3, 1], "int32")
    expected = model.predict_documents(steps, static={"user": users})
    pytest.importorskip("tensorflow_serving")
    path = keras_tbptt.export_saved_model(model, tmp_path, vectorizer, warmup_texts=texts)
    assert (path / "assets.extra" / "tf_serving_warmup_requests").stat().st_size
    call = tf.saved_model.load(str(path)).signatures
    found = call["serving_default"](text=tf.constant(texts), user=tf.constant(users))
    np.testing.assert_allclose(found["probability"], expected, atol=1e-6)

    def predict(given, signature):
        reply = call[signature](**{name: tf.constant(value) for name, value in given.items()})
        return {name: value.numpy() for name, value in reply.items()}

    session = Session(predict, static={"user": np.int32(1)})
    session.send("a good")
    reply = session.send("good film")
    np.testing.assert_allclose(reply["probability"], expected[2], atol=1e-6)


def test_a_session_streams_named_inputs(tmp_path):
    steps, static, _ = documents()
    model = build()
    expected = model.predict_documents(steps, static=static)
    call = tf.saved_model.load(str(keras_tbptt.export_saved_model(model, tmp_path))).signatures

    def predict(given, signature):
        reply = call[signature](**{name: tf.constant(value) for name, value in given.items()})
        return {name: value.numpy() for name, value in reply.items()}

    longest = max(range(COUNT), key=lambda i: len(steps["tokens"][i]))
    session = Session(predict, static={"user": static["user"][longest]})
    for begin, end in ((0, 3), (3, 3), (3, None)):
        reply = session.send(inputs={name: a[longest][begin:end] for name, a in steps.items()})
    np.testing.assert_allclose(reply["probability"], expected[longest], atol=1e-6)


def test_a_sequence_of_a_whole_document_is_not_masked_by_the_window():
    """Pooling over a static sequence of three must not see the padding of a window of five."""
    rng = np.random.default_rng(0)
    steps = {"x": [rng.normal(size=(n, 2)) for n in (3, 7)]}
    static = {"history": rng.normal(size=(2, 3, 2))}
    inputs = {
        "x": keras.Input(batch_shape=(2, 5, 2), name="x"),
        "history": keras.Input(batch_shape=(2, 3, 2), name="history"),
    }
    pooled = L.GlobalAveragePooling1D()(inputs["history"])
    x = L.Concatenate()([inputs["x"], L.RepeatVector(5)(pooled)])
    model = TBPTTModel(inputs, L.SimpleRNN(3, stateful=True)(x))
    found = model.predict_documents(steps, static=static)
    mean = static["history"].mean(axis=1)
    cell = model.layers[-1].cell
    for i, document in enumerate(steps["x"]):
        h = np.zeros(3)
        for step in document:
            h = np.tanh(
                np.concatenate([step, mean[i]]) @ cell.kernel.numpy()
                + h @ cell.recurrent_kernel.numpy()
                + cell.bias.numpy()
            )
        np.testing.assert_allclose(found[i], h, atol=1e-5)


SHAPE = {"window": 5, "lanes": 4}
BAD_INPUT = [
    (lambda s, t, y: DocumentWindows({**s, "features": s["features"][:-1]}, y, **SHAPE),
     "8 documents instead of 9"),
    (lambda s, t, y: DocumentWindows({**s, "features": [f[:1] for f in s["features"]]}, y, **SHAPE),
     r"1 steps instead of \d+ for document \d+ in documents\['features'\]"),
    (lambda s, t, y: DocumentWindows({**s, "x": [f * np.nan for f in s["features"]]}, y, **SHAPE),
     r"documents\['x'\]` must be finite"),
    (lambda s, t, y: DocumentWindows({**s, "x": [-a for a in s["tokens"]]}, y, **SHAPE),
     r"documents\['x'\]` must be ids >= 0"),
    (lambda s, t, y: DocumentWindows({}, y, **SHAPE), "an empty dict"),
    (lambda s, t, y: DocumentWindows(s["tokens"], y, static=t, **SHAPE), "documents=no dict"),
    (lambda s, t, y: DocumentWindows(s, y, static=t["user"], **SHAPE), "static=no dict"),
    (lambda s, t, y: DocumentWindows(s, y, static={"tokens": y}, **SHAPE), "other names"),
    (lambda s, t, y: DocumentWindows(s, y, static={"user": y[:-1]}, **SHAPE), r"shape \(8,\)"),
    (lambda s, t, y: DocumentWindows(s, y, static={"user": np.full(COUNT, np.nan)}, **SHAPE),
     r"static\['user'\]` must be finite"),
    (lambda s, t, y: DocumentWindows.next_step(s, **SHAPE), "target=None"),
    (lambda s, t, y: DocumentWindows.next_step(s, target="word", **SHAPE), "target='word'"),
    (lambda s, t, y: DocumentWindows.next_step(s["tokens"], target="tokens", **SHAPE),
     "without names"),
    (lambda s, t, y: DocumentWindows.next_step(s, static=t, target="tokens", streams=True, **SHAPE),
     r"static=\['user'\]"),
    (lambda s, t, y: build().fit(DocumentWindows(s, y, **SHAPE)), "same names and shapes"),
    (lambda s, t, y: build().fit(DocumentWindows(s["tokens"], y, **SHAPE)), "a dict of documents"),
    (lambda s, t, y: build().fit(DocumentWindows(s, y, static=t, window=6, lanes=4)),
     "batch shapes"),
    (lambda s, t, y: build().fit(DocumentWindows(s, y, static={"user": t["user"] + 4}, **SHAPE)),
     "ids of input 'user' must be integers below .* id 7"),
    (lambda s, t, y: build().fit(DocumentWindows(s, y, static={"user": t["user"] - 1}, **SHAPE)),
     "id -1"),
    (lambda s, t, y: build().fit(
        DocumentWindows({**s, "tokens": [a + 9 for a in s["tokens"]]}, y, static=t, **SHAPE)),
     "ids of input 'tokens'"),
    (lambda s, t, y: build().fit(DocumentWindows(s, y, static={"user": t["user"] * 0.5}, **SHAPE)),
     "ids of input 'user'.* Received: floats"),
    (lambda s, t, y: keras_tbptt.diagnostics.gradient_reach(build(), s, y), "models of one input"),
    (lambda s, t, y: keras_tbptt.generate(build(), [[1]], 3), "Generation needs a model of ids"),
    (lambda s, t, y: Session(None).send(inputs={"x": [1, 2], "y": [[1.0, 2.0]]}),
     "steps of different numbers"),
    (lambda s, t, y: Session(None).send(inputs={}), "at least one input"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_INPUT)
def test_bad_input_gets_one_sentence(change, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        change(*documents())


def test_a_static_input_that_looks_like_steps_is_refused():
    steps, _, labels = documents()
    static = {"user": np.zeros((COUNT, 5))}
    windows = DocumentWindows(steps, labels, static=static, window=5, lanes=4)
    inputs = windows.keras_inputs()
    x = L.Concatenate()([inputs["features"], L.Reshape((5, 1))(inputs["user"])])
    tokens = L.Embedding(20, 2)(inputs["tokens"])
    model = TBPTTModel(inputs, L.Dense(1)(L.LSTM(3, stateful=True)(L.Concatenate()([x, tokens]))))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="second axis of a static input"):
        model.fit(windows)


def test_an_initial_state_from_a_static_input_is_refused():
    """Keras would set it again in every window."""
    inputs = symbolic(4, 5)
    user = L.Embedding(4, 5)(inputs["user"])
    x = L.LSTM(5, stateful=True)(inputs["features"], initial_state=[user, user])
    with pytest.raises(ValueError, match="must not have an `initial_state`"):
        TBPTTModel([inputs["features"], inputs["user"]], L.Dense(1)(x))


def test_an_input_with_a_name_of_the_exports_own_is_refused(tmp_path):
    x, state = (
        keras.Input(batch_shape=(2, 3, 1), name="x"),
        keras.Input(batch_shape=(2, 1), name="state"),
    )
    model = TBPTTModel(
        [x, state],
        L.Dense(1)(L.LSTM(2, stateful=True)(L.Concatenate()([x, L.RepeatVector(3)(state)]))),
    )
    with pytest.raises(ValueError, match=r"Received: inputs \['state'\]"):
        keras_tbptt.export_saved_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_interrupted_training_of_several_inputs_ends_as_one_that_was_not(tmp_path):
    steps, static, labels = documents()

    def fit(folder, epochs=2, user=static["user"], callbacks=()):
        windows = DocumentWindows(
            steps, labels, static={"user": user}, window=5, lanes=4, shuffle=True, seed=1
        )
        model = build(backprop_windows=2)
        backup = keras_tbptt.ExactBackup(folder, windows, every_windows=1, every_seconds=None)
        model.fit(windows, epochs=epochs, callbacks=[backup, *callbacks], verbose=0)
        return model.get_weights()

    whole = fit(tmp_path / "whole")
    with pytest.raises(Interruption):
        fit(tmp_path / "part", callbacks=[InterruptAt(4)])
    with pytest.raises(ValueError, match="data"):
        fit(tmp_path / "part", user=(static["user"] + 1) % 4)
    with pytest.warns(UserWarning, match="InterruptAt"):
        resumed = fit(tmp_path / "part")
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (lambda a, b: OrderedDict(b=b, a=a), r"plain dict.*Received: \['b', 'a'\]"),
        (lambda a, b: {"x": {"a": a, "b": b}}, "without structures within.*Received: "),
        (lambda a, b: [a, (b,)], "without structures within.*Received: "),
    ],
)
def test_inputs_that_keras_would_pair_wrongly_are_refused(structure, message):
    a, b = (keras.Input(batch_shape=(2, 3, 1), name=name) for name in "ab")
    outputs = L.Dense(1)(L.GRU(2, stateful=True)(L.Concatenate()([a, b])))
    with pytest.raises(ValueError, match=message):
        TBPTTModel(structure(a, b), outputs)
