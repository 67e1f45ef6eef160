"""A character model of the Python manual: many lanes to train, one to test, prompts to continue."""

from pydoc_data.topics import topics

import keras

import keras_tbptt

LANES, WINDOW = 64, 50

# The manual comes with Python. Every character is a step, line breaks included.
manual = "\n".join(topics.values())
train_text, test_text = manual[:400_000], manual[400_000:420_000]
vectorizer = keras_tbptt.text.make_vectorizer([train_text], standardize=None, split="character")
train_ids, test_ids = (
    keras_tbptt.text.encode(vectorizer, [text])[0].numpy() for text in (train_text, test_text)
)

# One text is cut into a contiguous stream for each lane. The target is the next character.
train = keras_tbptt.DocumentWindows.next_step(train_ids, window=WINDOW, lanes=LANES)

keras.utils.set_random_seed(0)
characters = vectorizer.vocabulary_size()
tokens = keras.Input(batch_shape=train.batch_shape, dtype="int32")
x = keras.layers.Embedding(characters, 32)(tokens)
x = keras_tbptt.layers.LSTM(128, stateful=True, return_sequences=True)(x)
logits = keras.layers.Dense(characters)(x)
model = keras_tbptt.TBPTTModel(tokens, logits)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Nadam(0.01, global_clipnorm=1.0), loss)
model.fit(train, epochs=3, verbose=2)

# The test text runs in order on one lane, with the state carried from its first character on.
one = model.resized(lanes=1)
one.compile(loss=loss, weighted_metrics=[keras_tbptt.metrics.BitsPerStep(from_logits=True)])
test = keras_tbptt.DocumentWindows.next_step(test_ids, window=WINDOW, lanes=1)
bits = one.evaluate(test, verbose=0, return_dict=True)["bits_per_step"]
print(f"Test text: {bits:.3f} bits per character")

# Dynamic evaluation scores each window and then learns from it.
adaptive = keras_tbptt.evaluate_dynamically(one, test, learning_rate=0.3)
print(f"With dynamic evaluation: {adaptive['bits_per_step']:.3f} bits per character")

# The model of 64 lanes continues any number of prompts.
prompts = ["The statement ", "If a class "]
for prompt, continuation in zip(
    prompts,
    keras_tbptt.generate(model, prompts, 80, temperature=0.5, seed=0, vectorizer=vectorizer),
    strict=True,
):
    print(repr(prompt + continuation))
