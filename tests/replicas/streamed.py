"""Trains two workers on shards, and prints how much they differ from one device, and a SHA-256.

TF_CONFIG=... python tests/replicas/streamed.py DIRECTORY
"""

import hashlib
import json
import pathlib
import sys

import cases
import keras
import numpy as np
import tensorflow as tf
from resumed import Progress

from keras_tbptt import DocumentStream, ExactBackup
from keras_tbptt._replicas import copies

WINDOWS, EPOCHS = 30, 3


def write(directory):
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(5):
        rows = [
            [rng.integers(1, 50, n).tolist(), int(rng.integers(2))] for n in rng.integers(1, 40, 9)
        ]
        path = directory / f"{shard}.jsonl"
        if not path.exists():
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(directory / "*.jsonl")


def stream(shards):
    return DocumentStream(
        shards, lambda row: (row[0], row[1]), window=5, lanes=4, shuffle=True, seed=1
    )


def merged(one, other):
    """A batch with the lanes of two workers, each of which runs half of them."""
    return tf.nest.map_structure(lambda a, b: tf.concat([a[:2], b[2:]], 0), one, other)


def main():
    scope = cases.strategy()
    directory = pathlib.Path(sys.argv[1])
    shards = write(directory / "shards")
    found, digest = {}, hashlib.sha256()
    for loss in ("per_window", "final_only"):
        histories, models = [], []
        for replicas in (1, 2):
            train = stream(shards)
            with scope.scope() if replicas == 2 else tf.device("CPU:0"):
                keras.utils.set_random_seed(4)
                model = cases.build(4 // replicas, window_loss=loss)
                model.compile("adam", "binary_crossentropy", weighted_metrics=["accuracy"])
            whole = train
            if replicas == 1:
                halves = [stream(shards) for _ in range(2)]
                each = [half.dataset_of_worker(i, 2, False) for i, half in enumerate(halves)]
                whole = tf.data.Dataset.zip(*each).map(merged)
            backup = ExactBackup(directory / loss, train, every_seconds=None, every_windows=7)
            history = model.fit(
                whole,
                steps_per_epoch=WINDOWS,
                epochs=EPOCHS,
                callbacks=[backup, Progress()] if replicas == 2 else [],
                validation_data=stream(shards),
                verbose=0,
            )
            histories.append(history.history)
            models.append(model)
        weights = cases.difference(*(model.get_weights() for model in models))
        evaluated = cases.difference(*([m.evaluate(stream(shards), verbose=0)] for m in models))
        figures = max(cases.difference([histories[0][k]], [histories[1][k]]) for k in histories[0])
        for variable in [*models[1].variables, *models[1].optimizer.variables]:
            for copy in copies(variable):
                digest.update(copy.numpy().tobytes())
        found[loss] = {"weights": weights, "evaluated": evaluated, "history": figures}
    print(json.dumps(found), flush=True)
    print(f"resumed from {backup.resumed_from}", f"sha {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    main()
