"""Steps that run on all replicas of a model, and read their batch before they begin."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_tbptt import _batches, _keras
from keras_tbptt._compiled import (
    check_compiled,
    check_losses,
    check_metrics,
    check_optimizer,
    warn_of_learnt_states,
)
from keras_tbptt._graphs import Held
from keras_tbptt._replicas import summed_over_replicas
from keras_tbptt._sampling import SamplesClasses
from keras_tbptt._steps import build_optimizer, model_scope
from keras_tbptt.state import reset_states


class StepsOnReplicas(SamplesClasses):
    """A model whose steps run on each replica of the strategy that it was built under.

    Args:
        *args: As in a functional `keras.Model`.
        **kwargs: As in a functional `keras.Model`.
    """

    train_function: Any
    test_function: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._held = Held()
        self._end_is_known = {True: True, False: True}  # of training, of evaluation
        self._ends_apart = False
        self._not_built: dict[bool, tuple] = {}  # the batches of a training, of an evaluation

    def prepare(self, dataset: tf.data.Dataset, learns: bool = False) -> tuple[Any, Any, Any]:
        """Looks at the batches of a training or an evaluation.

        Replicas need the variables of losses, metrics and optimizer before any callback runs. On
        one device the first step is early enough: callbacks may change weights and freeze layers.

        Args:
            dataset: Batches with flags, of all replicas.
            learns: bool. Whether it is a training. Defaults to False.

        Returns:
            `tf.TensorSpec`s of the flags, targets and weights of one replica.

        Raises:
            ValueError: If the model cannot run on several replicas as it is compiled.
        """
        cardinality = int(dataset.cardinality())
        self._end_is_known[learns] = cardinality >= 0
        if not learns:
            # Then no worker may stop before the others.
            self._ends_apart = self.replicas.workers > 1 and (
                cardinality == tf.data.INFINITE_CARDINALITY
            )
        flags, y, sample_weight = _batches.unpack(dataset.element_spec)
        flags = _batches.with_all_flags(flags, self.all_lanes, self.window)
        y, sample_weight = _batches.as_outputs(y, sample_weight, self)
        flags, y, sample_weight = self.replicas.specs((flags, y, sample_weight))
        if not self.compiled:  # which Keras says in its own words
            return flags, y, sample_weight
        self._not_built[learns] = flags["inputs"], y, sample_weight
        if self.replicas.strategy is not None:
            check_optimizer(self)
            self._build(learns)
            check_compiled(self)
        return flags, y, sample_weight

    def _build(self, learns: bool) -> None:
        """Makes the variables of losses, metrics and optimizer, where it has not been done."""
        batch = self._not_built.pop(learns, None)
        if batch is None:
            return
        alone = self.replicas.strategy is None
        with model_scope(self):
            if not alone:
                _keras.build_compiled(self, *batch)
            elif not self.run_eagerly:  # an eager metric may be no graph
                # Without these variables a step makes its own, and is traced twice.
                with contextlib.suppress(Exception):
                    _keras.build_compiled(self, *batch)
            if learns and self.optimizer is not None:
                build_optimizer(self)
        if learns and alone:
            warn_of_learnt_states(self)
        check_losses(self, *batch[1:])
        check_metrics(self, batch[1])

    def on_replicas(
        self, step: Callable, x: Any, y: Any, weight: Any, share: Any
    ) -> dict[str, tf.Tensor]:
        """Makes a step on each replica; the reported loss and the metrics are those of all.

        Args:
            step: `(x, y, weight, share) -> Found`, with the rows of one replica.
            x: Inputs and lane flags, of all replicas.
            y: Targets.
            weight: How much each row counts in the loss, weights of documents included.
            share: How much each row counts, without the weights of documents.

        Returns:
            A dict of the metrics' values.
        """

        def run(x: Any, y: Any, weight: Any, share: Any) -> dict[str, tf.Tensor]:
            reset_states(self, x["starts"])
            found = step(x, y, weight, share)
            loss_metric(self).update_state(found.loss.mean, sample_weight=found.loss.count)
            logs = self.compute_metrics(x["inputs"], y, found.y_pred, weight)
            return logs if self.replicas.count == 1 else self._metrics_of_all()

        logs = self.replicas.run(run, x, y, weight, share)
        if self.replicas.strategy is None:
            return logs
        return {name: self.replicas.first(value) for name, value in logs.items()}

    def _metrics_of_all(self) -> dict[str, tf.Tensor]:
        """The metrics of all replicas, within one: their states are added up in one exchange."""
        variables = self.metrics_variables
        states = summed_over_replicas([tf.convert_to_tensor(v.value) for v in variables])
        with keras.StatelessScope(state_mapping=list(zip(variables, states, strict=True))):
            return self.get_metrics_result()

    def make_train_function(self, force: bool = False) -> Callable:
        """Makes what Keras calls for `steps_per_execution` windows.

        Args:
            force: bool. Whether to make it anew.
        """
        force |= self._held.is_other("train", self)
        if self.train_function is None or force:
            super().make_train_function(force)
            self.train_function = self._read_first(self.train_function, learns=True)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable:
        """Makes what Keras calls for `steps_per_execution` windows of an evaluation.

        Args:
            force: bool. Whether to make it anew.
        """
        force |= self._held.is_other("test", self)
        if self.test_function is None or force:
            super().make_test_function(force)
            self.test_function = self._read_first(self.test_function, learns=False)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Callable:
        """Makes what Keras calls for a window of a prediction.

        Args:
            force: bool. Whether to make it anew.
        """
        super().make_predict_function(force or self._held.is_other("predict", self))
        return self.predict_function

    def _until_all_end(self, iterator: Any) -> Iterator:
        """The batches of an evaluation, until no worker has a document left."""
        for batch in iterator:
            if self._ends_apart:
                busy = bool(tf.reduce_any(batch[0]["lengths"] > 0))
                if not self.replicas.from_all([int(busy)]).any():
                    return
            yield batch

    def _read_first(self, function: Callable, learns: bool) -> Callable:
        """Reads a batch before the step begins, where the step might find that there is none.

        Where Keras does not know the number of batches, or a batch cannot be read, a step runs in
        part at the end of the data: the optimizer counts a step that it has not made, and the
        losses of outputs count rows that are not there. Several windows of several replicas cannot
        run in a loop of a graph at all.
        """

        def run(iterator: Any) -> dict[str, tf.Tensor]:
            self._build(learns)
            if self.replicas.strategy is None and self._end_is_known[learns]:
                return function(iterator)
            rest = iterator if learns else self._until_all_end(iterator)
            first = next(rest)
            return function(itertools.chain([first], rest))

        return run


def loss_metric(model: keras.Model) -> keras.metrics.Mean:
    """What reports the loss.

    Args:
        model: A compiled model.
    """
    return next(metric for metric in model.metrics if metric.name == "loss")
