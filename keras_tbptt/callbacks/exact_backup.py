"""ExactBackup: an interrupted training is resumed to the bit."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt import _batches
from keras_tbptt._keras import averages_in_model, set_initial_epoch, sibling_callbacks
from keras_tbptt._replicas import copies
from keras_tbptt.callbacks import _identity as identity
from keras_tbptt.callbacks._agreement import FORMAT, check_agreement, versions
from keras_tbptt.callbacks._checkpoints import CheckpointDirectory
from keras_tbptt.callbacks._memory import CallbackMemory
from keras_tbptt.callbacks._nonfinite import all_finite, find_cause
from keras_tbptt.callbacks._signals import DeferredSignals
from keras_tbptt.callbacks._workers import Workers, newest_intact
from keras_tbptt.data._lanes import Position
from keras_tbptt.data._source import WindowSource
from keras_tbptt.data.stream import DocumentStream
from keras_tbptt.data.windows import DocumentWindows
from keras_tbptt.model import TBPTTModel
from keras_tbptt.state import seed_variables, state_variables, stateful_layers

# The share of the time since the last save that a save may take.
_SHARE = 0.03


class BackupError(OSError):
    """A checkpoint could not be written; the earlier ones are unchanged."""


class ExactBackup(keras.callbacks.Callback):
    """Saves the complete training state, and resumes an interrupted training to the bit.

    Keras's `BackupAndRestore` restarts the interrupted epoch, with the state of all lanes at zero
    and other random draws of dropout. This callback saves the complete training state: weights,
    optimizer, the state of every lane, the seeds of dropout, metrics, history, the other callbacks
    of the same `fit`, and the place in the epoch. A training that was killed at any moment
    therefore ends with the same weights as one that was not. It works in the `fit` of a
    `TBPTTModel`, and of a stock stateful model with `ResetStates`.

    Training resumes from the newest intact checkpoint; the batches before it are skipped. The
    other callbacks see the skipped batches with the metrics of the checkpoint. Damaged checkpoints
    are named in a warning and skipped. A checkpoint takes precedence over `initial_epoch`.

    A checkpoint is refused by name if it belongs to another training: to other data or windows, or
    a model with other layers, arguments of layers, loss, metrics or class of optimizer. Names of
    layers may differ, and a seed that `DocumentWindows` has drawn itself is taken from the
    checkpoint. There may be more epochs than before. The optimizer's arguments may differ: the
    new values then take precedence, and a warning names them. With the same arguments the
    learning rate of the checkpoint is restored, which a callback may have lowered.

    The other callbacks are resumed by their class, and in order where there are several of a
    class. Their state is their public attributes that hold plain values (numbers, strings, arrays,
    and lists and dicts of these with strings as keys), except constructor arguments. A callback of
    the checkpoint that is missing is named in a warning. A new one begins fresh.

    SIGTERM and Ctrl-C let the windows in execution finish, save a checkpoint, and then end the
    process as usual: with `SystemExit(143)` and `KeyboardInterrupt`, or by your own handler. A
    second signal takes effect immediately.

    A loss or a weight that is not finite stops training with a `FloatingPointError` that names
    the window, lanes and documents. The model then has the weights of the last checkpoint.

    Put this callback last. A save that fails raises a warning while training continues, and an
    error when there is no later one.

    Args:
        backup_dir: str or path. A directory for the checkpoints of this training alone.
        windows: `DocumentWindows` or `DocumentStream`. What `fit` trains on.
        every_seconds: float or None. Seconds between two saves; longer if a save would take more
            than 3% of the time. None never saves by time. Defaults to 60.
        every_windows: int >= 1 or None. Windows between two saves. None never saves by windows.
            Defaults to None.
        keep: int >= 1. How many checkpoints are kept. Defaults to 3.

    Raises:
        ValueError: When training begins, if a checkpoint belongs to another training or another
            version of `keras_tbptt`, all checkpoints are damaged, the checkpoint is beyond
            `epochs`, an epoch is not all windows, or the model has no stateful layers.
        BackupError: If a checkpoint cannot be written when training begins or ends.
        FloatingPointError: If the loss or a weight is not finite.

    Example:

    ```python
    model.fit(train, epochs=3, callbacks=[keras_tbptt.ExactBackup("backup", train)])
    ```
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike,
        windows: WindowSource,
        *,
        every_seconds: float | None = 60.0,
        every_windows: int | None = None,
        keep: int = 3,
    ):
        super().__init__()
        if not isinstance(windows, WindowSource):
            raise ValueError(
                "`windows` must be keras_tbptt.DocumentWindows or DocumentStream. "
                f"Received: windows={windows!r}"
            )
        for name, value in (("every_windows", every_windows), ("keep", keep)):
            if not (value is None and name == "every_windows") and (
                not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
        self._given = self.directory = CheckpointDirectory(backup_dir, keep)
        self._workers = Workers(None)
        self.windows = windows
        self.every_seconds = every_seconds
        self.every_windows = every_windows
        self.resumed_from: str | None = None
        self._signals = DeferredSignals()

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the newest intact checkpoint, if there is one."""
        stateful_layers(self.model)
        self._check_windows()
        self._check_steps()
        self._workers = Workers(getattr(self.model, "replicas", None))
        self.directory = self._workers.directory(self._given)
        self._memory = CallbackMemory(sibling_callbacks() or [self], owner=self)
        self._validating = False
        _build_variables(self.model, self.windows)
        self._optimizer = identity.optimizer_configs(self.model)
        self._belongs_to = self._identity()
        self._training_values: list[tuple[tf.Variable, np.ndarray]] = []
        self._epoch: int | None = None
        # The checkpoint to be resumed from, until everything of it is restored.
        self._about = about = newest_intact(self.directory, self._workers)
        if about is not None:
            there = about.get("belongs_to", {})
            if self.windows._seed_drawn and "seed" in there:
                self._belongs_to["seed"] = there["seed"]
            missing = self._memory.missing(about["callbacks"]) if "format" in about else []
            check_agreement(
                about, self._belongs_to, self._optimizer, self.params["epochs"], missing
            )
            self.windows.seed = self._belongs_to["seed"] = about["belongs_to"]["seed"]
            if isinstance(self.windows, DocumentStream):
                self.windows.position = Position.from_json(about["position"])
            else:
                self.windows.epoch = about["windows_epoch"]
            self.resumed_from = about["path"].name
            self._restore(about)
            self._memory.restore(about["callbacks"])
            over = about["ended"] and about["stopped"]  # by EarlyStopping, for example
            set_initial_epoch(self.model, self.params["epochs"] if over else about["epoch"])
        self._saved_windows, self._done = 0, 0
        self._saved_at, self._took = time.monotonic(), 0.0
        self._signals.install(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Resumes the epoch of the checkpoint, or saves if it is time."""
        set_initial_epoch(self.model, None)  # `fit` has read it
        first = self._epoch is None
        if first:
            # Not `windows.epoch` later on, because windows may be read ahead of training.
            self._ahead = self.windows.epoch - epoch
        self._epoch, self._window = epoch, 0
        about = self._about
        if about is None:
            self._save() if first else self._save_or_stop()
        elif about["ended"]:
            # The callbacks before this one have begun the epoch; those after it, training only.
            self._memory.restore(about["callbacks"], after_owner=True)
            self._about = None
        elif about["window"]:
            self._memory.restore(about["callbacks"])
            self._skip(about)
        else:
            self._restore_everything()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves if it is time."""
        before, self._window = self._window, min(batch + 1, self._steps)
        if self._about is None:
            self._done += self._window - before
            if not np.isfinite((logs or {}).get("loss", 0.0)):
                self._explain(f"a loss of {logs['loss']}")
            self._save_or_stop()
        elif self._window == self._about["window"]:
            # Only now, because the other callbacks have seen the skipped batches until here.
            self._restore_everything()
        if self._window == self._steps or self.model.stop_training:
            # Not when validation begins: SwapEMAWeights has swapped the weights by then.
            self._note_values()

    def on_test_begin(self, logs: Any = None) -> None:
        """Notes that validation begins."""
        self._validating = self._signals.installed
        if self._validating and not self._training_values:  # the data ended before the epoch
            self._note_values()

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves the state before validation, if a signal has arrived."""
        if self._validating and self._workers.any(self._signals.received is not None):
            for variable, value in self._training_values:
                variable.assign(value)
            self._save_and_stop()

    def on_test_end(self, logs: Any = None) -> None:
        """Notes that validation has ended."""
        self._validating, self._training_values = False, []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Notes the weights, which the end of training may replace."""
        self._weights = self.model.get_weights()
        self._training_values = []  # where there was no validation

    def on_train_end(self, logs: Any = None) -> None:
        """Saves the end, so that the same `fit` does nothing when it is called again."""
        self._signals.restore()
        if self._about is not None:  # no epoch was left
            self._restore_everything()
        elif self._epoch is not None:
            self._epoch, self._window = self._epoch + 1, 0
            self._save(ended=True)
        set_initial_epoch(self.model, None)
        self._signals.pass_on()

    def _check_windows(self) -> None:
        """Refuses windows that are not those of the `fit`, whose place in an epoch nobody knows."""
        fitted = getattr(self.model, "fitted_windows", None)
        if fitted is not None and fitted is not self.windows:
            raise ValueError(
                "ExactBackup saves the place of its own windows: give it the object that `fit` "
                f"trains on, not another like it. Received: {self.windows!r}, and fit has "
                f"{fitted!r}"
            )

    def _check_steps(self) -> None:
        steps = self.params.get("steps")
        if not isinstance(self.windows, DocumentWindows):
            self._steps = steps
            return
        self._steps = len(self.windows)
        if steps not in (None, len(self.windows)):
            raise ValueError(
                "ExactBackup cannot know the place in an epoch of another length: leave out "
                f"steps_per_epoch, so that an epoch is all {len(self.windows)} windows. "
                f"Received: steps_per_epoch={steps}"
            )

    def _variables(self) -> list[tf.Variable]:
        """The state of training, without learning rates: a new one takes precedence."""
        model = self.model
        found = [*model.variables, *model.optimizer.variables, *self._shared_with_validation()]
        rates = {id(rate) for rate in identity.learning_rates(model)}
        values: list[Any] = [v for v in found if id(v) not in rates]
        for name in ("window_history", "window_order"):  # of a TBPTTModel
            values += getattr(getattr(model, name, None), "variables", [])
        return list({id(copy): copy for v in values for copy in copies(v)}.values())

    def _note_values(self) -> None:
        self._training_values = [(v, v.numpy()) for v in self._variables()]

    def _shared_with_validation(self) -> list[tf.Variable]:
        # Keras's recurrent layers draw dropout masks in validation too, without using them.
        model = self.model
        found = [*state_variables(model), *seed_variables(model), *model.metrics_variables]
        return [copy for variable in found for copy in copies(variable)]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        # Without the window history's variables, whose first dimension grows.
        shapes = [[*v.shape] for v in self._variables() if None not in v.shape]
        described = identity.training_identity(self.model, self.windows)
        if not isinstance(self.windows, DocumentWindows):
            described["steps_per_epoch"] = self._steps
        return {**self._workers.identity, **described, "variables": shapes}

    def _restore(self, about: dict[str, Any]) -> None:
        """Restores the variables."""
        self.directory.restore(about["path"], self._variables())
        rates = identity.learning_rates(self.model)
        values = zip(
            rates, about["learning_rates"], about["optimizer"], self._optimizer, strict=True
        )
        for rate, now, there, here in values:
            if rate is not None:
                same = there["learning_rate"] == here["learning_rate"]
                rate.assign(now if same else here["learning_rate"])

    def _restore_everything(self) -> None:
        about = self._about
        self._restore(about)
        self._memory.restore(about["callbacks"])
        self.model.stop_training = about["stopped"]
        self._about = None

    def _skip(self, about: dict[str, Any]) -> None:
        """Lets `fit` read the windows before the checkpoint without training on them."""
        model, train, history = self.model, self.model.train_function, self.model.history
        self._restore(about)
        logs = {name: float(value) for name, value in model.get_metrics_result().items()}
        left = about["window"]

        def skip(iterator: Any) -> dict[str, float]:
            nonlocal left
            if model.history is not history:  # of another `fit`, after an error in this one
                model.train_function = train
                return train(iterator)
            for _ in range(min(model.steps_per_execution, left)):
                if not isinstance(self.windows, DocumentStream):  # which opens at its position
                    next(iterator)
                left -= 1
            if not left:
                model.train_function = train
            return dict(logs)

        model.train_function = skip

    def _save_or_stop(self) -> None:
        ask = self._workers.is_time(self._done)
        if ask and self._workers.any(self._signals.received is not None):
            return self._save_and_stop()
        waited = time.monotonic() - self._saved_at
        by_time = self.every_seconds is not None and waited >= max(
            self.every_seconds, self._took / _SHARE
        )
        by_windows = self.every_windows is not None and (
            self._done - self._saved_windows >= self.every_windows
        )
        if by_windows or (ask and self._workers.on_clock(by_time)):
            try:
                self._save()
            except BackupError as error:
                warnings.warn(f"{error} Training continues, and tries again.", stacklevel=2)

    def _save_and_stop(self) -> None:
        self._signals.restore()
        self._save()
        self._signals.pass_on()
        if self._workers.several:  # of another worker
            raise SystemExit(128 + signal.SIGTERM)

    def _save(self, ended: bool = False) -> None:
        began = time.monotonic()
        variables = self._variables()
        position = _position_of(self.windows, self.model)
        if self._workers.any(not all_finite(variables)):
            self._explain("weights that are not finite")
        rates = identity.learning_rates(self.model)
        about = {
            "format": FORMAT,
            "versions": versions(),
            "epoch": self._epoch,
            "window": self._window,
            "ended": ended,
            "stopped": bool(self.model.stop_training),
            "replaced": ended and (averages_in_model() or not self._has_weights(self._weights)),
            "windows_epoch": self._epoch + self._ahead,
            **position,
            "belongs_to": self._belongs_to,
            "optimizer": self._optimizer,
            "learning_rates": [None if rate is None else float(rate.numpy()) for rate in rates],
            "callbacks": self._memory.save(),
        }
        name = f"epoch-{self._epoch:05d}-window-{self._window:09d}"
        try:
            self.directory.write(name, variables, about)
        except OSError as error:
            raise BackupError(
                "The checkpoint could not be saved; the earlier ones are unchanged. Free some "
                f"space, or name another backup_dir. Received: {self.directory.path} ({error})"
            ) from error
        finally:
            self._took = time.monotonic() - began
            self._saved_at, self._saved_windows = time.monotonic(), self._done

    def _has_weights(self, weights: list[np.ndarray]) -> bool:
        return all(map(np.array_equal, self.model.get_weights(), weights))

    def _explain(self, what: str) -> None:
        """Names the cause of what is not finite, and restores the last checkpoint."""
        self._signals.restore()
        about = newest_intact(self.directory, self._workers)
        if about is None:
            raise FloatingPointError(
                "The weights are not finite before training begins: load or build the model "
                f"again. Received: {what}"
            )
        self._restore(about)
        begin = about["windows_epoch"], about["window"]
        end = self._epoch + self._ahead, self._window
        cause = "a window since then"
        if self._workers.one_device and isinstance(self.windows, DocumentWindows):
            cause = find_cause(self.model, self.windows, begin, end)
            self._restore(about)
        raise FloatingPointError(
            "Training has stopped, and the model has the weights of the last checkpoint. Exploding "
            "gradients are the usual cause: give the optimizer clipnorm=1.0 or a lower "
            f"learning_rate, and resume from there. Received: {what} in epoch {self._epoch + 1}, "
            f"from {cause}; the last checkpoint is {about['path']}"
        )


def _build_variables(model: keras.Model, windows: WindowSource) -> None:
    """Makes the variables that Keras would make in the first step."""
    replicas = getattr(model, "replicas", None)
    if replicas is not None and replicas.strategy is not None:
        return  # `fit` has made them on all replicas
    if not model.optimizer.built:  # LossScaleOptimizer would make its variables again
        model.optimizer.build(model.trainable_variables)
    place = windows.place
    batch = next(iter(windows.dataset(flags=isinstance(model, TBPTTModel))))
    windows.place = place
    _, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
    y, weight = _batches.as_outputs(y, weight, model)
    y_pred = keras.tree.map_structure(lambda t: tf.zeros(t.shape, t.dtype), model.output)
    model.compute_loss(x=None, y=y, y_pred=y_pred, sample_weight=weight, training=False)
    model.compute_metrics(None, y, y_pred, weight)
    model.reset_metrics()


def _position_of(windows: WindowSource, model: keras.Model) -> dict[str, Any]:
    """Where a stream is: after the windows that were trained on, and no others."""
    if not isinstance(windows, DocumentStream):
        return {}
    position = windows.position
    if len(position.step):
        replicas = model.replicas
        own = np.split(model.window_order.get()[0], replicas.workers)[replicas.worker]
        if not np.array_equal(own, position.step):
            raise ValueError(
                "ExactBackup cannot know the place of a stream that is read ahead of training: "
                "give fit the stream itself, or a dataset without prefetch. Received: lanes "
                f"trained up to steps {own.tolist()}, read up to {position.step.tolist()}"
            )
    return {"position": position.to_json()}
