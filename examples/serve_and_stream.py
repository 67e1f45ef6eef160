"""Export a model, load it as a server does, and read a text whole and piece by piece."""

import tempfile

import keras
import numpy as np
import tensorflow as tf

import keras_tbptt

# A small model that learns whether the first word of a text is "good" or "bad".
rng = np.random.default_rng(0)
labels = rng.integers(0, 2, 300)
texts = [
    " ".join([["bad", "good"][label], *rng.choice(["so", "it", "is"], rng.integers(4, 60))])
    for label in labels
]
vectorizer = keras_tbptt.text.make_vectorizer(texts, vocab_size=10)
documents = keras_tbptt.text.encode(vectorizer, texts)
train = keras_tbptt.DocumentWindows(documents, labels, window=10, lanes=16, shuffle=True, seed=0)

keras.utils.set_random_seed(0)
tokens = keras.Input(batch_shape=(16, 10), dtype="int32")
x = keras.layers.Embedding(10, 8)(tokens)
x = keras.layers.LSTM(16, stateful=True)(x)
model = keras_tbptt.TBPTTModel(tokens, keras.layers.Dense(1, activation="sigmoid")(x))
model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
model.fit(train, epochs=10, verbose=0)

# The export: a directory `1/` that TF Serving mounts. The vocabulary is inside.
with tempfile.TemporaryDirectory() as folder:
    path = keras_tbptt.export_saved_model(model, folder, vectorizer=vectorizer)
    served = tf.saved_model.load(path)
predict, stream = served.signatures["serving_default"], served.signatures["stream"]

# The whole text in one request.
pieces = ["good it is", "so so so it is", "it it is so it is", "so is"]
whole = predict(text=tf.constant([" ".join(pieces)]))["probability"]

# The same text in pieces, as it arrives. A client keeps the state between its requests.
state = served.signatures["initial_state"](batch_size=tf.constant(1))["state"]
for piece in pieces:
    reply = stream(text=tf.constant([piece]), state=state, start=tf.constant([False]))
    state = reply["state"]
    print(f"{reply['probability'][0, 0]:.4f} after {piece!r}")

print(f"{whole[0, 0]:.4f} for the whole text")
np.testing.assert_allclose(reply["probability"], whole, atol=1e-6)
