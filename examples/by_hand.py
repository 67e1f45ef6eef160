"""Truncated backpropagation through time by hand, in plain Keras and TensorFlow.

The last part checks that `keras_tbptt.TBPTTModel` learns the same weights.
"""

import keras
import numpy as np
import tensorflow as tf

import keras_tbptt

LANES, WINDOW, VOCAB = 4, 10, 20

# The data: documents of 5 to 60 tokens, the longest first. A document's label depends on its
# first token alone, so most windows do not contain what decides the label.
rng = np.random.default_rng(0)
documents = [rng.integers(1, VOCAB, length) for length in rng.integers(5, 61, 100)]
documents.sort(key=len, reverse=True)
labels = np.array([document[0] < VOCAB / 2 for document in documents], "float32")

# Windows: each document is split into windows of 10 tokens, and the last one is padded with zeros.
# Lanes: each row of the batch holds one document after another. A document goes to the lane that
# has the fewest windows so far.
lanes = [[] for _ in range(LANES)]
for document, label in zip(documents, labels, strict=True):
    lane = min(lanes, key=len)
    for begin in range(0, len(document), WINDOW):
        tokens = document[begin : begin + WINDOW]
        padded = np.pad(tokens, (0, WINDOW - len(tokens)))
        weight = len(tokens) / min(WINDOW, len(document))  # a short last window counts less
        lane.append((padded, begin == 0, label, weight))

# A lane without further documents repeats a window with weight 0, so it learns nothing from it.
longest = max(map(len, lanes))
for lane in lanes:
    lane += [(lane[0][0], False, 0.0, 0.0)] * (longest - len(lane))


def build(model_class):
    """The model: an LSTM that is stateful, so it keeps its state from window to window."""
    keras.utils.set_random_seed(0)
    tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
    x = keras.layers.Embedding(VOCAB, 8, mask_zero=True)(tokens)
    x = keras.layers.LSTM(16, stateful=True, name="lstm")(x)
    return model_class(tokens, keras.layers.Dense(1, activation="sigmoid")(x))


model = build(keras.Model)
optimizer = keras.optimizers.Adam()


@tf.function
def train_step(tokens, starts, labels, weights):
    """Learns from one window of every lane."""
    for state in model.get_layer("lstm").states:
        state.assign(tf.where(starts[:, None], 0.0, state))  # reset the lanes that start a document
    with tf.GradientTape() as tape:  # records this window alone: this is the truncation
        losses = keras.losses.binary_crossentropy(labels[:, None], model(tokens, training=True))
        loss = tf.reduce_mean(losses * weights)
    gradients = tape.gradient(loss, model.trainable_variables)
    # The embedding's gradient has a row per occurrence of a token. Adam needs the rows' sum.
    gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))


for windows in zip(*lanes, strict=True):  # one window of every lane
    tokens, starts, targets, weights = (np.stack(column) for column in zip(*windows, strict=True))
    train_step(tokens, starts, targets, weights.astype("float32"))

# The same epoch with keras_tbptt.
train = keras_tbptt.DocumentWindows(documents, labels, window=WINDOW, lanes=LANES)
same = build(keras_tbptt.TBPTTModel)
same.compile("adam", "binary_crossentropy")
same.fit(train, epochs=1, verbose=0)

pairs = zip(model.get_weights(), same.get_weights(), strict=True)
difference = max(np.abs(by_hand - library).max() for by_hand, library in pairs)
assert difference < 1e-6, difference
print(f"{longest} windows in each of {LANES} lanes, and the same weights as TBPTTModel to 1e-6.")
