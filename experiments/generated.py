"""Reviews that a small grammar writes: one sentence of sentiment among neutral sentences."""

from __future__ import annotations

import numpy as np

# The training reviews of IMDB have a median of 174 words and a mean of 234. The longest has 2,470.
# A lognormal distribution with that median and mean has sigma = sqrt(2 ln(234 / 174)).
MEDIAN_WORDS, SIGMA, MIN_WORDS, MAX_WORDS = 174, 0.77, 10, 2_470

_SUBJECTS = (
    "the director", "the camera", "a neighbour", "the detective", "her brother", "the crew",
    "an old friend", "the narrator", "the orchestra", "a young teacher", "the captain",
    "the second act", "this scene", "the screenplay", "a stranger", "the village",
)  # fmt: skip
_VERBS = (
    "walks through", "describes", "returns to", "looks at", "follows", "talks about",
    "remembers", "waits near", "shows", "drives past", "writes about", "leaves",
)  # fmt: skip
_OBJECTS = (
    "a long street", "the harbour", "an empty house", "the letter", "a small town", "the river",
    "two brothers", "the railway station", "a wooden table", "the northern coast",
    "the family", "a crowded room", "the end of summer", "an ordinary morning",
)  # fmt: skip
_TAILS = (
    "in the first half", "before the credits", "for a few minutes", "after the war",
    "while it rains", "on a monday", "in black and white", "with the window open", "again", "",
)  # fmt: skip
_KINDS = ("movie", "film", "picture", "show", "story")
_FEELINGS = {0: "hate", 1: "love"}


def write_reviews(documents: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes reviews that are about as long as those of IMDB. Half of them are positive.

    One sentence has the sentiment: "I love this ..." or "I hate this ...". In half of the reviews
    it is the first sentence. In the others it is anywhere.

    Args:
        documents: int. How many reviews.
        seed: int. The same seed writes the same reviews.

    Returns:
        Texts (an object array of str, `[documents]`) and labels (int32 `[documents]`). Label 1 is
        positive.
    """
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(np.log(MEDIAN_WORDS), SIGMA, documents))
    lengths = np.clip(lengths, MIN_WORDS, MAX_WORDS).astype(int)
    labels = rng.permutation(np.arange(documents, dtype="int32") % 2)
    texts = [
        _write(rng, length, _FEELINGS[label])
        for length, label in zip(lengths, labels.tolist(), strict=True)
    ]
    return np.array(texts, dtype=object), labels


def neutral_words(count: int) -> list[str]:
    """Words without a sentiment, in alphabetical order.

    Args:
        count: int. How many, at most 60.
    """
    phrases = " ".join((*_SUBJECTS[:-4], *_VERBS, *_OBJECTS))
    return sorted(set(phrases.split()))[:count]


def _write(rng: np.random.Generator, words: int, feeling: str) -> str:
    sentences: list[str] = []
    written = 4
    while written < words:
        parts = (_SUBJECTS, _VERBS, _OBJECTS, _TAILS)
        sentence = " ".join(options[rng.integers(len(options))] for options in parts).strip()
        written += sentence.count(" ") + 1
        sentences.append(sentence.capitalize() + ".")
    place = 0 if rng.random() < 0.5 else rng.integers(len(sentences) + 1)
    sentences.insert(place, f"I {feeling} this {_KINDS[rng.integers(len(_KINDS))]}.")
    return " ".join(sentences)
