"""Exact document boundaries in Keras code that exists already: a stock Sequential model.

The model, `compile` and `fit` stay Keras's own. `DocumentWindows` makes the batches, and the
callback `ResetStates` resets each lane where it starts a document.
"""

import keras
import numpy as np

import keras_tbptt

LANES, WINDOW = 16, 30

# Documents of 5 to 100 tokens. A document's label depends on its first token, 1 or 2. All other
# tokens are noise.
rng = np.random.default_rng(0)
labels = rng.integers(0, 2, 600)
documents = [np.append(1 + label, rng.integers(3, 10, rng.integers(4, 100))) for label in labels]

train = keras_tbptt.DocumentWindows(
    documents[:500], labels[:500], window=WINDOW, lanes=LANES, shuffle=True, seed=0
)
valid = keras_tbptt.DocumentWindows(documents[500:], labels[500:], window=WINDOW, lanes=LANES)

keras.utils.set_random_seed(0)
model = keras.Sequential(
    [
        keras.Input(batch_shape=(LANES, WINDOW), dtype="int32"),
        keras.layers.Embedding(10, 8, mask_zero=True),  # a stock model must mask the padding itself
        keras.layers.LSTM(16, stateful=True),
        keras.layers.Dense(1, activation="sigmoid"),
    ]
)
# `metrics` would count every window of every lane. `weighted_metrics` count documents.
model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", weighted_metrics=["accuracy"])
model.fit(
    train.dataset(),  # a loss at every window
    validation_data=valid.dataset(evaluation=True),  # each document once, at its last window
    epochs=10,
    shuffle=False,  # `train` shuffles documents; windows must stay in order
    callbacks=[keras_tbptt.ResetStates(train, validation=valid)],
    verbose=2,
)

# Outside of `fit`, too, the callback resets the lanes.
loss, accuracy = model.evaluate(
    valid.dataset(evaluation=True), callbacks=[keras_tbptt.ResetStates(valid)], verbose=0
)
print(f"Accuracy on {valid.num_documents} new documents: {accuracy:.3f}")
