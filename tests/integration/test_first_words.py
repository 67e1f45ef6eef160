"""The export of `experiments.first_words`, in a process of its own because of its flags."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = """
import pathlib, sys
import keras, numpy as np
from experiments import first_words, settings
from experiments.exported import Exported
from experiments.generated import neutral_words

def build(vocabulary):
    tokens = keras.Input(batch_shape=(4, 30), dtype="int32")
    x = keras.layers.Embedding(vocabulary, 8, mask_zero=True)(tokens)
    return settings.build_model(first_words.SETTINGS[1], tokens, x, 6, 1.0)

trained = build(first_words.VOCABULARY)
first_words.export(trained, build(first_words.VOCABULARY + 1), pathlib.Path(sys.argv[1]))
names = ["", "I", "hate", "love", "this", *neutral_words(first_words.VOCABULARY - 5)]
texts, _ = first_words.write_texts(20, 40, seed=3)
words = [" ".join(names[i] for i in ids) for ids in texts]
found = Exported(pathlib.Path(sys.argv[1])).predict({"text": words})["probability"]
np.testing.assert_allclose(found, trained.predict_documents(texts), atol=1e-6)
assert len(set(found[:, 0].tolist())) == 20
"""


def test_the_exported_model_runs_on_words_as_the_trained_one_on_ids(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
