"""A classifier that starts from the encoder of a language model."""

from __future__ import annotations

import json
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import keras
from absl import flags

import keras_tbptt
from experiments import data, encoded, encoder, runner, workers
from keras_tbptt._files import write_whole

# The defaults of flags where there is an encoder, chosen on reviews of held-out films. Few words
# are dropped, because the language model was trained without dropped words.
_RECIPE = {
    "window_loss": "linear_gain",
    "epochs": 2,
    "lanes": 128,
    "learning_rate": 2e-3,
    "layer_decay": 1.5,
    "word_dropout": 0.1,
}

flags.DEFINE_string(
    "pretrained", None, "Directory of an encoder, which `python -m experiments.pretrain` saves. "
    "Vocabulary and sizes are those of the encoder. It changes the defaults of other flags: "
    f"{' '.join(f'--{flag}={value}' for flag, value in _RECIPE.items())}."
)  # fmt: skip
flags.DEFINE_boolean(
    "pretrain", False, "Whether a language model is trained first, with the same window and sizes; "
    "512 units if --units is not given. A later run uses the same one."
)  # fmt: skip
flags.DEFINE_integer("pretrain_epochs", 1, "Epochs of that language model.", 1)
flags.DEFINE_float(
    "layer_decay", 1.0, "By what the learning rate of the LSTM is divided, and that of the "
    "embedding twice. Howard and Ruder (2018) take 2.6.", 1
)  # fmt: skip
flags.DEFINE_float(
    "unfreeze_epochs", 0.0, "Epochs after which the LSTM begins to learn; the embedding begins "
    "after twice as many.", 0
)  # fmt: skip
FLAGS = flags.FLAGS

_SIZES = {"vocab_size": "vocabulary", "embedding_dim": "embedding_dim", "units": "units"}
# From the output down.
_LAYERS = ("lstm", "embedding")
_UNITS = 512


def encoder_of_flags() -> encoder.Encoder | None:
    """The encoder that the flags name, whose sizes become the values of flags.

    With `--pretrain`, it is trained first, unless an earlier run has done so.

    Returns:
        The encoder; None for a training from scratch.

    Raises:
        RunError: If there is none, flags contradict it or each other, or its training fails.
    """
    if FLAGS.pretrain and FLAGS.pretrained:
        raise runner.RunError(
            "An encoder is either given or trained first: leave out --pretrain or --pretrained. "
            f"Received: --pretrain --pretrained={FLAGS.pretrained}"
        )
    if not FLAGS.pretrain and FLAGS.pretrain_epochs != FLAGS["pretrain_epochs"].default:
        raise runner.RunError(
            "Only --pretrain trains a language model: give it, or leave out --pretrain_epochs. "
            f"Received: --pretrain_epochs={FLAGS.pretrain_epochs}"
        )
    if not FLAGS.pretrain and not FLAGS.pretrained:
        if FLAGS.layer_decay != 1 or FLAGS.unfreeze_epochs:
            raise runner.RunError(
                "Only layers of an encoder learn later or at other rates: give --pretrained or "
                f"--pretrain. Received: --layer_decay={FLAGS.layer_decay} "
                f"--unfreeze_epochs={FLAGS.unfreeze_epochs}"
            )
        return None
    for flag, value in _RECIPE.items():
        if not FLAGS[flag].present:
            setattr(FLAGS, flag, value)
    if len(_LAYERS) * FLAGS.unfreeze_epochs >= FLAGS.epochs:
        raise runner.RunError(
            "The embedding would never learn: give less than half of --epochs. "
            f"Received: --unfreeze_epochs={FLAGS.unfreeze_epochs} --epochs={FLAGS.epochs}"
        )
    try:
        found = encoder.load(_trained() if FLAGS.pretrain else pathlib.Path(FLAGS.pretrained))
    except encoder.EncoderError as error:
        raise runner.RunError(str(error)) from error
    if FLAGS.pretrain:  # with the sizes of the flags; the vocabulary may have fewer words
        return found
    for flag, size in _SIZES.items():
        if FLAGS[flag].present and getattr(FLAGS, flag) != found.about[size]:
            raise runner.RunError(
                f"The encoder has sizes of its own: leave out --{flag}. "
                f"Received: --{flag}={getattr(FLAGS, flag)}; the encoder has {found.about[size]}"
            )
        setattr(FLAGS, flag, found.about[size])
    return found


def _trained() -> pathlib.Path:
    """Trains a language model in a process of its own, and returns where its encoder is."""
    if workers.several():
        raise runner.RunError(
            "Several workers cannot train one encoder: train it with python -m "
            "experiments.pretrain, and give it with --pretrained. Received: --pretrain"
        )
    if not FLAGS["units"].present:
        FLAGS.units = _UNITS
    given = {
        "window": FLAGS.window,
        "units": FLAGS.units,
        "embedding_dim": FLAGS.embedding_dim,
        "vocab_size": FLAGS.vocab_size,
        "epochs": FLAGS.pretrain_epochs,
        "limit": FLAGS.limit,
        "precision": None if FLAGS.precision == "float32" else FLAGS.precision,
    }
    given = {name: value for name, value in given.items() if value is not None}
    parts = [FLAGS.data, *(f"{name}{value}" for name, value in given.items())]
    run = pathlib.Path("runs/pretrain") / "-".join(parts).replace("_", "")
    given |= {"data": FLAGS.data, "data_dir": FLAGS.data_dir, "cache_dir": FLAGS.cache_dir}
    given |= {"backup_seconds": FLAGS.backup_seconds, "run_dir": run}
    command = [sys.executable, "-m", "experiments.pretrain", "--resume"]
    command += [f"--{name}={value}" for name, value in given.items() if value is not None]
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except (KeyboardInterrupt, SystemExit):
        process.send_signal(signal.SIGTERM)
        process.wait()
        same = shlex.join(["python", "-m", "experiments.imdb", *sys.argv[1:]])
        print(f"Then train the classifier, or do both with: {same}", file=sys.stderr)
        raise
    if code:
        raise runner.RunError(
            "The language model was not trained: see above, and run the command again, which "
            f"resumes. Received: exit code {code}"
        )
    return run / "encoder"


def check_same_encoder(found: encoder.Encoder, directory: runner.RunDirectory) -> None:
    """Keeps what a run begins from, and refuses to resume it from something else.

    Args:
        found: The encoder.
        directory: The directory of the run.

    Raises:
        RunError: If the run has begun from another encoder.
    """
    path = directory / "encoder.json"
    if not path.exists():
        write_whole(path, (json.dumps(found.about, indent=2) + "\n").encode())
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != found.about:
        raise runner.RunError(
            "The run to resume has begun from another encoder: give that one with --pretrained, or "
            f"another --run_dir. Received: {found.about['weights_sha256'][:12]}; the run has "
            f"{before['weights_sha256'][:12]}"
        )


def load_corpus(pretrained: encoder.Encoder | None) -> encoded.Encoded:
    """The reviews as ids of the words of an encoder or, from scratch, of the training reviews.

    Those of the test are not read yet.

    Args:
        pretrained: The encoder, if there is one.

    Raises:
        RunError: If they cannot be had, there are too few, or the encoder was trained on others.
    """
    try:
        corpus = encoded.load(
            FLAGS.data,
            FLAGS.data_dir,
            FLAGS.limit,
            FLAGS.validation,
            FLAGS.seed,
            pretrained.vectorizer if pretrained else FLAGS.vocab_size,
            FLAGS.cache_dir,
        )
        if FLAGS.labels is not None:
            corpus = encoded.fewer_labels(corpus, FLAGS.labels, FLAGS.validation, FLAGS.seed)
    except (data.DataUnavailableError, ValueError) as error:
        raise runner.RunError(str(error)) from error
    if pretrained and pretrained.about["dataset"] != corpus.name:
        raise runner.RunError(
            "The encoder was trained on other reviews: give the same --data. "
            f"Received: {corpus.name}; the encoder has {pretrained.about['dataset']}"
        )
    return corpus


def load_test(corpus: encoded.Encoded) -> encoded.Documents:
    """The test of the reviews.

    Args:
        corpus: From `load_corpus`.

    Raises:
        RunError: If it cannot be had.
    """
    try:
        return encoded.load_test(corpus, FLAGS.data_dir, FLAGS.limit, FLAGS.seed, FLAGS.cache_dir)
    except (data.DataUnavailableError, ValueError) as error:
        raise runner.RunError(str(error)) from error


def transfer(found: encoder.Encoder, model: keras_tbptt.TBPTTModel) -> None:
    """Gives the weights of an encoder to a model.

    Args:
        found: The encoder.
        model: A model with layers named `"embedding"` and `"lstm"`, of the encoder's sizes.
    """
    embeddings, *lstm = found.weights.values()
    model.get_layer("embedding").set_weights([embeddings])
    model.get_layer("lstm").set_weights(lstm)


def make_optimizer(
    make: Callable[[Any], keras.optimizers.Optimizer], rate: float, steps: int
) -> keras.optimizers.Optimizer:
    """The optimizer that the flags describe: its rate decays to 0 along a cosine.

    Args:
        make: Makes an optimizer of a learning-rate schedule.
        rate: The learning rate at the start.
        steps: int. Steps of the whole training.
    """

    def of_layer(depth: int) -> keras.optimizers.Optimizer:
        own = rate / FLAGS.layer_decay**depth
        schedule = keras.optimizers.schedules.CosineDecay(own, steps)
        frozen = round(depth * FLAGS.unfreeze_epochs * steps / FLAGS.epochs)
        return make(Delayed(schedule, frozen) if frozen else schedule)

    if FLAGS.layer_decay == 1 and not FLAGS.unfreeze_epochs:
        return of_layer(0)
    below = {f"{name}/.*": of_layer(depth) for depth, name in enumerate(_LAYERS, 1)}
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(of_layer(0), below))


@keras.saving.register_keras_serializable(package="experiments")
class Delayed(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is 0 at first.

    A layer whose rate is 0 does not move, and no recompilation is needed for it to begin.

    Args:
        schedule: The schedule, which runs on meanwhile.
        begin: int. The first step at which its rate counts.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, begin: int):
        super().__init__()
        self.schedule = schedule
        self.begin = begin

    def __call__(self, step: Any) -> Any:
        """The rate at a step.

        Args:
            step: A scalar, from 0.
        """
        rate = self.schedule(step)
        return keras.ops.where(step >= self.begin, rate, keras.ops.zeros_like(rate))

    def get_config(self) -> dict[str, Any]:
        """The configuration."""
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "begin": self.begin}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Delayed:
        """The schedule of a configuration.

        Args:
            config: From `get_config`.
        """
        schedule = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(schedule, config["begin"])
