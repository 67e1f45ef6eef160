"""Tags for every word of long texts: a target per step, padding left out, tags back in order."""

import keras
import numpy as np

import keras_tbptt

LANES, WINDOW = 8, 20
TAGS = ["determiner", "noun", "verb", "adverb"]
WORDS = {
    "determiner": ["the", "a", "every"],
    "noun": ["cook", "watch", "walk", "plant"],
    "verb": ["cook", "watch", "walk", "plant"],  # the same words: only what came before decides
    "adverb": ["slowly", "again", "today"],
}
VOCABULARY = sorted({word for words in WORDS.values() for word in words})

rng = np.random.default_rng(0)


def write():
    """Writes a text of 5 to 80 sentences, with a tag for each word."""
    tags = []
    for _ in range(rng.integers(5, 81)):
        tags += [0, 1, 2, 0, 1] + [3] * int(rng.integers(0, 2))
    words = [rng.choice(WORDS[TAGS[tag]]) for tag in tags]
    return words, tags


texts, tags = zip(*(write() for _ in range(300)), strict=True)
documents = [[VOCABULARY.index(word) for word in text] for text in texts]

# One target array per document, as long as the document.
train = keras_tbptt.DocumentWindows(
    documents[:250], list(tags[:250]), window=WINDOW, lanes=LANES, per_step=True, shuffle=True,
    seed=0,
)  # fmt: skip
test = keras_tbptt.DocumentWindows(
    documents[250:], list(tags[250:]), window=WINDOW, lanes=LANES, per_step=True
)

keras.utils.set_random_seed(0)
tokens = keras.Input(batch_shape=train.batch_shape, dtype="int32")
x = keras.layers.Embedding(len(VOCABULARY), 16)(tokens)
x = keras_tbptt.layers.LSTM(32, stateful=True, return_sequences=True)(x)
outputs = keras.layers.Dense(len(TAGS), activation="softmax")(x)
model = keras_tbptt.TBPTTModel(tokens, outputs)
model.compile(
    keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", weighted_metrics=["accuracy"]
)
model.fit(train, epochs=2, verbose=2)

# Each word counts once. Padding does not count.
print(f"Accuracy: {model.evaluate(test, verbose=0)[1]:.4f}")

# One array [T, tags] per text, whatever the window and the lanes.
text = "every watch watch a plant slowly".split()
(probabilities,) = model.predict_documents([[VOCABULARY.index(word) for word in text]])
for word, row in zip(text, probabilities, strict=True):
    print(f"{word:8} {TAGS[row.argmax()]}")
