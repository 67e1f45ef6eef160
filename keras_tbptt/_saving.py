"""Saving what Keras leaves out of a `.keras` file: recurrent states and random generators."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

import keras
import numpy as np

from keras_tbptt import _keras
from keras_tbptt._replicas import check_one_device
from keras_tbptt.state import seed_variables, state_variables, stateful_layers


class SavesStates(keras.Model):
    """A model whose `.keras` file can carry the state of training."""

    _saves_states = False

    def save(
        self,
        filepath: str | os.PathLike,
        overwrite: bool = True,
        zipped: bool | None = None,
        include_states: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model as a `.keras` file, as `keras.Model.save` does.

        Args:
            filepath: As in `keras.Model.save`.
            overwrite: As in `keras.Model.save`.
            zipped: As in `keras.Model.save`.
            include_states: bool. Whether the file holds, beside weights and optimizer, what Keras
                leaves out: the recurrent state of every lane, and the state of the random
                generators of dropout and of `"artbp"`. `keras.saving.load_model` restores what the
                file holds. Defaults to False.
            **kwargs: Further arguments of `keras.Model.save`.

        Raises:
            ValueError: If `include_states=True` and the model runs on several replicas.
        """
        if include_states:
            check_one_device(self, "A file with the states of all lanes")
        self._saves_states = include_states
        try:
            super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
        finally:
            self._saves_states = False

    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Saves what belongs to the model and to none of its layers, for Keras.

        Args:
            store: Where to.
        """
        super().save_own_variables(store)
        if self._saves_states:
            for name, variable in self._carried().items():
                store[name] = variable

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Loads what `save_own_variables` saved, for Keras.

        Args:
            store: Where from.

        Raises:
            ValueError: If it holds the states of a model of other lanes or layers.
        """
        saved = {name: np.asarray(store[name]) for name in store.keys()}
        states = {name: saved.pop(name) for name in list(saved) if not name.isdigit()}
        super().load_own_variables(saved)
        if not states:
            return
        check_one_device(self, "A file with the states of all lanes")
        carried = self._carried()
        if states.keys() <= (old := self._carried_in_0_1()).keys():
            carried = old
        expected = {name: tuple(variable.shape) for name, variable in carried.items()}
        received = {name: value.shape for name, value in states.items()}
        if expected != received:
            raise ValueError(
                f"The states in the file are those of a model of other lanes or layers: this one "
                f"has {expected}. Load a file that was saved without include_states=True. "
                f"Received: {received}"
            )
        for name, variable in carried.items():
            variable.assign(states[name])

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was when it was saved.

        Args:
            config: From `get_compile_config`.
        """
        self.compile(**keras.saving.deserialize_keras_object(config))
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def _carried(self) -> dict[str, keras.Variable]:
        """What `save` includes on request, by the names in the file."""
        named: dict[str, keras.Variable] = {}
        for layer in stateful_layers(self):
            # By the layer's name: a variable's path is another after loading, where a nested
            # Sequential was built by its first call.
            for variable in keras.tree.flatten(layer.states):
                prefix = f"state.{layer.name}."
                named[f"{prefix}{sum(name.startswith(prefix) for name in named)}"] = variable
        return named | {f"generator.{i}": v for i, v in enumerate(seed_variables(self))}

    def _carried_in_0_1(self) -> dict[str, keras.Variable]:
        """The same, by the names in files of version 0.1."""
        kinds = {"state": state_variables(self), "seed": _keras.seeds_by_layer(self)}
        return {f"{kind}_{i}": v for kind, found in kinds.items() for i, v in enumerate(found)}
