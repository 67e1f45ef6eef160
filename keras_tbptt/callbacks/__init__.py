"""Callbacks for stateful Keras models: a `TBPTTModel`, and most of them any other."""

from keras_tbptt.callbacks.exact_backup import BackupError, ExactBackup
from keras_tbptt.callbacks.reset_states import ResetStates

__all__ = ["BackupError", "ExactBackup", "ResetStates"]
