"""Sentiment of texts of any length: texts, vocabulary, windows, training, predictions."""

import keras
import numpy as np

import keras_tbptt

LANES, WINDOW, VOCAB = 16, 10, 100

# Each text has one verdict, somewhere among sentences that say nothing about it.
rng = np.random.default_rng(0)
VERDICTS = {0: ["I was bored", "what a waste", "I hated it"],
            1: ["I was moved", "what a film", "I loved it"]}  # fmt: skip
OTHER = ["we saw it on {day}", "the {thing} was in {place}", "it ran for two hours"]
WORDS = {"day": ["monday", "friday"], "thing": ["story", "cast"], "place": ["rome", "the dark"]}


def write(label):
    """Writes a text of 20 to 130 words."""
    sentences = list(rng.choice(OTHER, rng.integers(5, 25)))
    sentences.insert(rng.integers(len(sentences) + 1), rng.choice(VERDICTS[label]))
    chosen = {name: rng.choice(words) for name, words in WORDS.items()}
    return ". ".join(sentences).format(**chosen)


labels = rng.integers(0, 2, 1000)
texts = [write(label) for label in labels]

# The vocabulary is learned from the training texts only.
vectorizer = keras_tbptt.text.make_vectorizer(texts[:800], VOCAB)
documents = keras_tbptt.text.encode(vectorizer, texts)
train = keras_tbptt.DocumentWindows(
    documents[:800], labels[:800], window=WINDOW, lanes=LANES, shuffle=True, seed=0
)
valid = keras_tbptt.DocumentWindows(documents[800:], labels[800:], window=WINDOW, lanes=LANES)

# The loss is taken at every window, against the label of the window's document.
keras.utils.set_random_seed(0)
tokens = keras.Input(batch_shape=(LANES, WINDOW), dtype="int32")
x = keras.layers.Embedding(VOCAB, 16)(tokens)  # the model masks the padding by itself
x = keras_tbptt.layers.LSTM(32, stateful=True)(x)
outputs = keras.layers.Dense(1, activation="sigmoid")(x)
model = keras_tbptt.TBPTTModel(tokens, outputs, window_loss="per_window")
model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", weighted_metrics=["accuracy"])
model.fit(train, validation_data=valid, epochs=8, verbose=2)

# `evaluate` and `predict_documents` count documents, not windows.
loss, accuracy = model.evaluate(valid, verbose=0)
print(f"Accuracy on {valid.num_documents} new texts: {accuracy:.3f}")

new = [
    "We saw it on friday. I loved it. It ran for two hours.",
    "What a waste. The cast was in rome.",
]
probabilities = model.predict_documents(keras_tbptt.text.encode(vectorizer, new))
for text, probability in zip(new, probabilities, strict=True):
    print(f"{probability[0]:.2f}  {text}")
