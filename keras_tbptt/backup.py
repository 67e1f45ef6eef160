"""ExactBackup: a training that is interrupted goes on as though it had not been."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tbptt.checkpoints import CheckpointDirectory, DamagedCheckpointError
from keras_tbptt.model import TBPTTModel
from keras_tbptt.nonfinite import all_finite, find_cause
from keras_tbptt.signals import DeferredSignals
from keras_tbptt.state import seed_variables, state_variables, stateful_layers
from keras_tbptt.windows import DocumentWindows

# A save may take this share of the time that has passed since the one before.
_SHARE = 0.03
_PACKAGES = ("keras_tbptt", "keras", "tensorflow", "numpy")


class BackupError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class ExactBackup(keras.callbacks.Callback):
    """Backs training up, and goes on after an interruption to the bit.

    Keras's `BackupAndRestore` begins the interrupted epoch anew, with the state of all lanes at
    zero and the random draws of dropout elsewhere. This callback keeps all that training
    consists of: weights, optimizer, the state of every lane, the seeds of dropout, metrics, history
    and the place in the epoch's windows; so that a training that was killed, however and whenever,
    has in the end the weights that it would have had. It works in the `fit` of a `TBPTTModel`,
    and of a stock stateful model with `ResetStates`.

    When training begins, the newest checkpoint that is not damaged is gone on with; the windows
    before it are read from the data set and passed over, and other callbacks see their batches
    with the metrics of the checkpoint. A checkpoint of other data, windows or another model
    is refused by name. Damaged ones are named in a warning and skipped.

    SIGTERM and Ctrl-C let the windows in execution finish, save, and then end the process as
    they would have: with `SystemExit(143)` and `KeyboardInterrupt`, or your own handler. A second
    one does so at once.

    A loss or weights that are not finite stop training with a `FloatingPointError` that names
    window, lanes and documents; the model then has the weights of the last checkpoint.

    Put this callback last. A save that fails is a warning while training goes on, and an
    error when there is no later one.

    Args:
        backup_dir: A directory for the checkpoints of this training alone.
        windows: The `DocumentWindows` that `fit` trains on.
        every_seconds: Seconds between two saves; more where that would cost more than 3% of the
            time. None for none by time.
        every_windows: int, windows between two saves; None for none by windows.
        keep: int >= 1, checkpoints that stay.
        callbacks: Callbacks of the same `fit` that must not forget either, such as
            `EarlyStopping` and `ModelCheckpoint`: their public attributes, but for their arguments,
            go along where they are plain (numbers, strings, arrays, lists and dicts of these).

    Raises:
        ValueError: When training begins, if a checkpoint belongs to another training, all
            are damaged, or it cannot be exact (a model without stateful layers).
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
        windows: DocumentWindows,
        *,
        every_seconds: float | None = 60.0,
        every_windows: int | None = None,
        keep: int = 3,
        callbacks: Sequence[keras.callbacks.Callback] = (),
    ):
        super().__init__()
        if not isinstance(windows, DocumentWindows):
            raise ValueError(
                f"`windows` must be keras_tbptt.DocumentWindows. Received: windows={windows!r}"
            )
        for name, value in (("every_windows", every_windows), ("keep", keep)):
            if not (value is None and name == "every_windows") and (
                not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"`{name}` must be an integer >= 1. Received: {name}={value!r}")
        self.directory = CheckpointDirectory(backup_dir, keep)
        self.windows = windows
        self.every_seconds = every_seconds
        self.every_windows = every_windows
        self.callbacks = list(callbacks)
        self.resumed_from: str | None = None
        self._signals = DeferredSignals()

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the newest checkpoint, if there is one."""
        stateful_layers(self.model)
        self._validating = False
        self._build()
        self._about = self._newest()
        if self._about is not None:
            self._restore()
            self.windows.epoch = self._about["windows_epoch"]
            stopped = self._about["stopped"]  # by EarlyStopping, say
            self.model._initial_epoch = self.params["epochs"] if stopped else self._about["epoch"]
        self._passed = 0 if self._about is None else self._about["window"]
        self._saved_windows, self._done = 0, 0
        self._saved_at, self._took = time.monotonic(), 0.0
        self._signals.install(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Goes on where the checkpoint was made; or saves, if it is time."""
        self._epoch, self._window = epoch, 0
        self._windows_epoch = self.windows.epoch
        if self._about is not None:
            self._restore_records()
            if self._passed:
                self._pass_over(self._passed)
        else:
            self._passed = 0
            if self._done == 0:
                self._save()
            else:
                self._save_or_stop()
        self._about = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves, if it is time."""
        before, self._window = self._window, min(batch + 1, len(self.windows))
        if self._window <= self._passed:
            return
        self._done += self._window - before
        if not np.isfinite((logs or {}).get("loss", 0.0)):
            self._explain(f"a loss of {logs['loss']}")
        self._save_or_stop()

    def on_test_begin(self, logs: Any = None) -> None:
        """Notes what validation is going to use for itself."""
        self._validating = self._signals.installed
        if self._validating:
            self._training_values = [(v, v.numpy()) for v in self._shared_with_validation()]

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves what training had come to, if a signal asks for the end."""
        if self._validating and self._signals.received:
            for variable, value in self._training_values:
                variable.assign(value)
            self._save_or_stop()

    def on_test_end(self, logs: Any = None) -> None:
        """Ends validation."""
        self._validating = False

    def on_train_end(self, logs: Any = None) -> None:
        """Saves the end, so that going on after it does nothing."""
        self._signals.restore()
        if self._about is not None:  # there was nothing left to do
            self._restore_records()
        else:
            self._epoch, self._window, self._windows_epoch = self._epoch + 1, 0, self.windows.epoch
            self._save()
        self.model._initial_epoch = None
        self._signals.pass_on()

    def _build(self) -> None:
        """Makes the variables that Keras would make in the first step."""
        model = self.model
        model.optimizer.build(model.trainable_variables)
        read = iter(self.windows.dataset(flags=isinstance(model, TBPTTModel)))
        epoch = self.windows.epoch
        _, y, weight = keras.utils.unpack_x_y_sample_weight(next(read))
        self.windows.epoch = epoch
        y_pred = keras.tree.map_structure(lambda t: tf.zeros(t.shape, t.dtype), model.output)
        model.compute_loss(x=None, y=y, y_pred=y_pred, sample_weight=weight, training=False)
        model.compute_metrics(None, y, y_pred, weight)
        model.reset_metrics()

    def _variables(self) -> list[tf.Variable]:
        model = self.model
        found = [*model.variables, *model.optimizer.variables, *self._shared_with_validation()]
        history = getattr(model, "window_history", None)
        values = [v.value if isinstance(v, keras.Variable) else v for v in found]
        values += history.variables if history is not None else []
        return list({id(v): v for v in values}.values())

    def _shared_with_validation(self) -> list[keras.Variable]:
        # Keras's recurrent layers draw dropout's masks in validation too, and use none.
        model = self.model
        return [*state_variables(model), *seed_variables(model), *model.metrics_variables]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        windows, model = self.windows, self.model
        found = {"data": windows.fingerprint, "documents": windows.num_documents}
        for name in ("window", "lanes", "packing", "shuffle", "seed", "mean_window", "stretch"):
            found[name] = getattr(windows, name)
        found["steps_per_execution"] = model.steps_per_execution
        for name in ("window_loss", "backprop_windows", "cut_probability", "burn_in"):
            if hasattr(model, name):
                found[name] = getattr(model, name)
        found["callbacks"] = [type(callback).__name__ for callback in self.callbacks]
        # Without the history's: it grows.
        shapes = [[*v.shape] for v in self._variables() if None not in v.shape]
        return {**found, "variables": shapes}

    def _newest(self) -> dict[str, Any] | None:
        """What the newest sound checkpoint says of itself, with its `path`."""
        there = self.directory.newest_first()
        for checkpoint in there:
            try:
                about = self.directory.read_about(checkpoint)
            except DamagedCheckpointError as error:
                warnings.warn(
                    f"The checkpoint is damaged, and is skipped for the one before it. "
                    f"Received: {checkpoint} ({error})",
                    stacklevel=2,
                )
                continue
            self._check_identity(checkpoint, about)
            self.resumed_from = checkpoint.name
            return {**about, "path": checkpoint}
        if there:
            raise ValueError(
                "No checkpoint can be read: to begin anew, name another backup_dir or empty this "
                f"one. Received: backup_dir={str(self.directory.path)!r}, all "
                f"{len(there)} checkpoints damaged"
            )
        return None

    def _check_identity(self, checkpoint: Any, about: dict[str, Any]) -> None:
        belongs, received = about["belongs_to"], self._identity()
        others = [name for name in received if received[name] != belongs.get(name)]
        if others:
            raise ValueError(
                "The checkpoint belongs to another training: make these match, or name another "
                f"backup_dir. Received: {checkpoint} with "
                + "; ".join(_difference(name, belongs.get(name), received[name]) for name in others)
            )
        if about["versions"] != _versions():
            warnings.warn(
                "The checkpoint was written by other versions, so what follows may differ in the "
                f"last digits. Received: {checkpoint} of {about['versions']}, now {_versions()}",
                stacklevel=2,
            )

    def _restore(self) -> None:
        self.directory.restore(self._about["path"], self._variables())

    def _restore_records(self) -> None:
        """History and the other callbacks, which `fit` has just begun anew."""
        about, history = self._about, self.model.history
        history.epoch, history.history = about["history"]
        for callback, state in zip(self.callbacks, about["callbacks"], strict=True):
            vars(callback).update(state)

    def _pass_over(self, windows: int) -> None:
        """Lets `fit` read the windows that were learnt from before, and learn nothing."""
        model, about, train = self.model, self._about, self.model.train_function
        self._restore()
        logs = {name: float(value) for name, value in model.get_metrics_result().items()}
        left = windows

        def pass_over(iterator: Any) -> dict[str, float]:
            nonlocal left
            for _ in range(min(model.steps_per_execution, left)):
                next(iterator)
                left -= 1
            if not left:
                # Once more: in the meantime ResetStates has been at work on lanes.
                self.directory.restore(about["path"], self._variables())
                model.train_function = train
            return dict(logs)

        model.train_function = pass_over

    def _save_or_stop(self) -> None:
        if self._signals.received:
            self._signals.restore()
            self._save()
            self._signals.pass_on()
            return
        waited = time.monotonic() - self._saved_at
        by_time = self.every_seconds is not None and waited >= max(
            self.every_seconds, self._took / _SHARE
        )
        by_windows = self.every_windows is not None and (
            self._done - self._saved_windows >= self.every_windows
        )
        if by_time or by_windows:
            try:
                self._save()
            except BackupError as error:
                warnings.warn(f"{error} Training goes on, and tries again.", stacklevel=2)

    def _save(self) -> None:
        began = time.monotonic()
        variables = self._variables()
        if not all_finite(variables):
            self._explain("weights that are not finite")
        about = {
            "epoch": self._epoch,
            "window": self._window,
            "windows_epoch": self._windows_epoch,
            "belongs_to": self._identity(),
            "versions": _versions(),
            "stopped": bool(self.model.stop_training),
            "history": [self.model.history.epoch, self.model.history.history],
            "callbacks": [_public(callback) for callback in self.callbacks],
        }
        name = f"epoch-{self._epoch:05d}-window-{self._window:09d}"
        try:
            self.directory.write(name, variables, about)
        except OSError as error:
            raise BackupError(
                "The checkpoint could not be saved; those before it are as they were. Free some "
                f"space, or name another backup_dir. Received: {self.directory.path} ({error})"
            ) from error
        finally:
            self._took = time.monotonic() - began
            self._saved_at, self._saved_windows = time.monotonic(), self._done

    def _explain(self, what: str) -> None:
        """Says where what is not finite came from, and gives the last checkpoint back."""
        self._signals.restore()
        end = self._windows_epoch, self._window
        self._about = self._newest()
        self._restore()
        begin = self._about["windows_epoch"], self._about["window"]
        cause = find_cause(self.model, self.windows, begin, end)
        self._restore()
        raise FloatingPointError(
            "Training has stopped, and the model has the weights of the last checkpoint. Gradients "
            "that explode are the usual cause: give the optimizer clipnorm=1.0, or a lower "
            f"learning_rate, and go on from there. Received: {what} in epoch {self._epoch + 1}, "
            f"from {cause}; the last checkpoint is {self._about['path']}"
        )


def _public(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """What a callback remembers: its public attributes that are plain and no arguments."""
    arguments = inspect.signature(type(callback).__init__).parameters
    return {
        name: value
        for name, value in vars(callback).items()
        if not name.startswith("_")
        and name not in arguments
        and name not in ("params", "model", "validation_data")
        and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(v) for name, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, np.ndarray, np.generic))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _difference(name: str, there: Any, here: Any) -> str:
    if name == "variables" and there is not None:
        pairs = [(a, b) for a, b in zip(there, here, strict=False) if a != b]
        if pairs:
            return f"a variable of shape {pairs[0][1]} (the checkpoint: {pairs[0][0]})"
        return f"{len(here)} variables (the checkpoint: {len(there)})"
    return f"{name}={here!r} (the checkpoint: {there!r})"
