"""A long series: many targets a step, a state that is carried on, and a live stream."""

import tempfile

import keras
import numpy as np
import tensorflow as tf

import keras_tbptt

LANES, WINDOW, HORIZON = 16, 24, 12
TRAIN, VALID = 7_000, 8_500  # where training and validation end

# Two years of a made-up sensor, every two hours: a season of a day, one of a week, and noise.
rng = np.random.default_rng(0)
hours = 2 * np.arange(10_000)
series = 20 + 5 * np.sin(2 * np.pi * hours / 24) + 3 * np.sin(2 * np.pi * hours / 168)
series = (series + rng.normal(0, 0.5, len(hours))).astype("float32")


def ahead(end):
    """The next 12 values after each step; NaN, which is not counted, where they are not known."""
    targets = np.full((end, HORIZON), np.nan, "float32")
    windows = np.lib.stride_tricks.sliding_window_view(series[1:end], HORIZON)
    targets[: len(windows)] = windows
    return targets


def part(begin, end):
    """A part of the series to score, after all that came before: the state is carried into it."""
    return keras_tbptt.DocumentWindows(
        [series[:end, None]], [ahead(end)], lead_in=begin, window=WINDOW, lanes=LANES, per_step=True
    )


# One series is cut into a contiguous stream for each lane.
train = keras_tbptt.DocumentWindows(
    [series[:TRAIN, None]], [ahead(TRAIN)], streams=True, window=WINDOW, lanes=LANES, per_step=True
)

# The model takes raw measurements. What it knows of their scale comes from the training part.
keras.utils.set_random_seed(0)
normalization = keras.layers.Normalization()
normalization.adapt(series[:TRAIN, None])
inputs = keras.Input(batch_shape=train.batch_shape)
x = keras_tbptt.layers.LSTM(32, stateful=True, return_sequences=True)(normalization(inputs))
change = keras.layers.Rescaling(float(series[:TRAIN].std()))(keras.layers.Dense(HORIZON)(x))
outputs = keras.layers.Add(name="forecast")([inputs, change])  # present value + change
model = keras_tbptt.TBPTTModel(inputs, outputs)
model.compile(keras.optimizers.Adam(0.01), "mse", weighted_metrics=["mae"])
model.fit(train, validation_data=part(TRAIN, VALID), validation_freq=10, epochs=30, verbose=2)

_, error = model.evaluate(part(VALID, len(series)), verbose=0)
known = ahead(len(series))[VALID:-HORIZON]
persistence = np.abs(series[VALID:-HORIZON, None] - known).mean()
print(f"Mean absolute error of the test part: {error:.3f}, persistence {persistence:.3f}")

# The export takes raw measurements too. One at a time, its forecasts are those of the whole series.
with tempfile.TemporaryDirectory() as folder:
    path = keras_tbptt.export_saved_model(model, folder)
    signatures = tf.saved_model.load(path).signatures
    state = signatures["initial_state"](batch_size=tf.constant(1))["state"]
    for step, value in enumerate(series[:100]):
        reply = signatures["stream"](
            features=tf.constant([[[value]]]),
            lengths=tf.constant([1]),
            state=state,
            start=tf.constant([step == 0]),
        )
        state = reply["state"]
(whole,) = model.predict_documents([series[:100, None]], last_step=True)
print(f"Next value: {reply['forecast'][0, 0, 0]:.3f} by the stream, {whole[0]:.3f} by the model")
