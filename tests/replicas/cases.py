"""Trains on replicas and on one device, and prints how much they differ, as JSON.

python tests/replicas/cases.py           # two replicas of this process
TF_CONFIG=... python tests/replicas/cases.py   # one replica for each worker
"""

import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import keras_tbptt
from keras_tbptt._replicas import copies

L = keras.layers
WINDOW, LANES, REPLICAS = 5, 4, 2


def strategy():
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    tf.config.set_logical_device_configuration(cpu, devices)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(REPLICAS)])


def windows(per_step=False, unknown=False, **kwargs):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 50, n).astype("int32") for n in rng.integers(1, 40, 23)]
    labels = np.array([d[0] > 25 for d in documents], "float32")
    if per_step:
        labels = [(d > 25).astype("float32") for d in documents]
        if unknown:
            labels = [np.where(rng.random(len(t)) < 0.3, np.nan, t) for t in labels]
    elif unknown:
        labels = np.where(rng.random(len(labels)) < 0.3, np.nan, labels)
    arguments = {"window": WINDOW, "lanes": LANES, "shuffle": True, "seed": 1}
    arguments["per_step"] = per_step
    arguments["weights"] = rng.uniform(0.5, 2, 23)
    return keras_tbptt.DocumentWindows(documents, labels, **{**arguments, **kwargs})


def build(
    lanes, per_step=False, layer=L.LSTM, l2=None, activity=None, pooled=False, dropout=0.0, **kwargs
):
    tokens = keras.Input(batch_shape=(lanes, WINDOW), dtype="int32")
    x = L.Embedding(50, 4)(tokens)
    x = L.Dropout(dropout, seed=3)(x) if dropout else x
    x = layer(6, stateful=True, return_sequences=per_step or pooled)(x)
    if pooled:
        x = keras_tbptt.layers.ConcatPooling(stateful=True)(x)
    regularizers = {"kernel_regularizer": l2, "activity_regularizer": activity}
    outputs = L.Dense(1, activation="sigmoid", dtype="float32", **regularizers)(x)
    model = keras_tbptt.TBPTTModel(tokens, outputs, **kwargs)
    rng = np.random.default_rng(7)
    model.set_weights([rng.normal(0, 0.3, w.shape).astype("float32") for w in model.get_weights()])
    return model


def compiled(lanes, optimizer, steps_per_execution, **kwargs):
    keras.utils.set_random_seed(4)
    model = build(lanes, **kwargs)
    model.compile(
        optimizer(),
        "binary_crossentropy",
        weighted_metrics=["accuracy", keras.metrics.AUC(name="auc")],
        steps_per_execution=steps_per_execution,
    )
    return model


def local(values, scope):
    """The lanes of this process, of values for all lanes."""
    workers = REPLICAS if "TF_CONFIG" in os.environ else 1
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"] if workers > 1 else 0
    return [np.split(value, workers)[index] for value in values]


def difference(one, other):
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(one, other, strict=False)
    )


def compare(scope, data=None, optimizer=None, steps_per_execution=1, **kwargs):
    optimizer = optimizer or (lambda: keras.optimizers.Adam(0.01))
    data = {"per_step": kwargs.get("per_step", False), **(data or {})}
    found = []
    for replicas in (1, REPLICAS):
        context = scope.scope() if replicas > 1 else tf.device("CPU:0")
        with context:
            model = compiled(LANES // replicas, optimizer, steps_per_execution, **kwargs)
        train = windows(**data)
        history = model.fit(train, epochs=2, validation_data=windows(**data), verbose=0).history
        evaluated = model.evaluate(windows(**data), verbose=0)
        predicted = model.predict_documents([[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]])
        states = keras_tbptt.state.get_states(model)
        found.append(
            (model, history, evaluated, np.concatenate([np.ravel(p) for p in predicted]), states)
        )
    (one, h1, e1, p1, s1), (several, h2, e2, p2, s2) = found
    return {
        "weights": difference(one.get_weights(), several.get_weights()),
        "copies": max(
            difference([c.numpy() for c in copies(v)], [copies(v)[0].numpy()] * 9)
            for v in several.trainable_variables
        ),
        "history": max(difference([h1[name]], [h2[name]]) for name in h1),
        "evaluated": difference([e1], [e2]),
        "predicted": difference([p1], [p2]),
        "states": difference(local(s1, scope), s2),
        "steps": int(one.optimizer.iterations.numpy()) - int(several.optimizer.iterations.numpy()),
    }


def by_layer():
    optimizers = {"embedding.*": lazy(0.01, clipnorm=0.05), "lstm.*": adam(0.02, clipnorm=0.05)}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(adam(0.05), optimizers))


adam, lazy = keras.optimizers.Adam, keras_tbptt.optimizers.LazyAdam
CASES = {
    "per_window": {},
    "final_only": {"window_loss": "final_only"},
    "linear_gain, L2": {"window_loss": "linear_gain", "l2": "l2"},
    "pooled": {"window_loss": "pooled", "pooled": True, "data": {"packing": "aligned"}},
    "burn_in": {"burn_in": 1},
    "per step": {"per_step": True},
    "unknown": {"data": {"unknown": True}},
    "unknown steps, final_only": {
        "window_loss": "final_only", "per_step": True, "data": {"unknown": True, "weights": None}
    },
    "unknown steps, activity": {"per_step": True, "activity": "l2", "data": {"unknown": True}},
    "reach 2": {"backprop_windows": 2},
    "reach 3, final_only, L2": {"backprop_windows": 3, "window_loss": "final_only", "l2": "l2"},
    "reach all": {"backprop_windows": "all", "data": {"packing": "aligned"}},
    "artbp": {"backprop_windows": "artbp"},
    "several an execution": {"steps_per_execution": 3},
    "several an execution, final_only": {"steps_per_execution": 5, "window_loss": "final_only"},
    "LazyAdam": {"optimizer": lambda: lazy(0.01)},
    "LazyAdam, clipped, final_only": {
        "optimizer": lambda: lazy(0.01, clipnorm=0.05), "window_loss": "final_only"
    },
    "LazyAdam, reach 2": {"optimizer": lambda: lazy(0.01), "backprop_windows": 2},
    "rates by layer": {"optimizer": lambda: by_layer()},
    "clipnorm": {"optimizer": lambda: adam(0.01, clipnorm=0.05)},
    "global_clipnorm": {"optimizer": lambda: adam(0.01, global_clipnorm=0.05), "l2": "l2"},
    "clipvalue": {"optimizer": lambda: adam(0.01, clipvalue=0.01)},
    "SGD": {"optimizer": lambda: keras.optimizers.SGD(0.1, momentum=0.9)},
    "layers.LSTM": {"layer": keras_tbptt.layers.LSTM},
    "GRU, idle lanes": {"layer": L.GRU, "data": {"stretch": 1}},
    "random windows": {"data": {"mean_window": 4}},
}  # fmt: skip


def main():
    scope = strategy()
    names = sys.argv[1:] or list(CASES)
    for name in names:
        try:
            print(json.dumps({"case": name, **compare(scope, **CASES[name])}), flush=True)
        except Exception as error:
            print(
                json.dumps({"case": name, "error": f"{type(error).__name__}: {error}"[:600]}),
                flush=True,
            )


if __name__ == "__main__":
    main()
