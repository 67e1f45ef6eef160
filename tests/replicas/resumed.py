"""Trains on two workers with `ExactBackup`, and prints the SHA-256 of all variables.

TF_CONFIG=... python tests/replicas/resumed.py DIRECTORY
"""

import hashlib
import sys
import warnings

import cases
import keras

from keras_tbptt import ExactBackup
from keras_tbptt._replicas import copies


class Progress(keras.callbacks.Callback):
    """Says which window is done, so that the test can interrupt."""

    def on_train_batch_end(self, batch, logs=None):
        print(f"window {batch}", flush=True)


def main():
    scope = cases.strategy()
    keras.utils.set_random_seed(4)
    with scope.scope():
        model = cases.build(cases.LANES // 2, dropout=0.3)
        model.compile("adam", "binary_crossentropy")
    data = cases.windows()
    backup = ExactBackup(sys.argv[1], data, every_windows=7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(data, epochs=4, callbacks=[backup, Progress()], verbose=0)
    digest = hashlib.sha256()
    for variable in [*model.variables, *model.optimizer.variables]:
        for copy in copies(variable):
            digest.update(copy.numpy().tobytes())
    print(f"resumed from {backup.resumed_from}", f"sha {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    main()
