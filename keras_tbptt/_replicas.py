"""The replicas of a tf.distribute strategy, each with lanes of its own."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_SUPPORTED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
)


class Replicas:
    """Where a model runs: on one device, or on several replicas that make one step together.

    A batch has the lanes of all replicas: replica r has the rows `[r * lanes, (r + 1) * lanes)`.
    With several workers each of them reads the rows of its own replicas; those of the others may be
    there too, or idle.

    Args:
        strategy: What the model was built under; None for one device without a strategy.
        lanes: int. Rows of one replica.

    Raises:
        ValueError: If the strategy is of another kind than mirrored.

    Attributes:
        strategy: As given.
        count: int. How many replicas there are.
        workers: int. How many processes they are in.
        worker: int. Which of them this one is.
    """

    def __init__(self, strategy: tf.distribute.Strategy | None, lanes: int):
        if strategy is not None and not isinstance(strategy, _SUPPORTED):
            raise ValueError(
                "A TBPTTModel runs under tf.distribute.MirroredStrategy or "
                "MultiWorkerMirroredStrategy, because each replica keeps the state of its lanes. "
                f"Received: {type(strategy).__name__}"
            )
        self.strategy = strategy
        self.count = 1 if strategy is None else strategy.num_replicas_in_sync
        local = 1 if strategy is None else len(strategy.extended.worker_devices)
        self.workers = self.count // local
        self.worker = _worker_index(strategy) if self.workers > 1 else 0
        self._first = local * self.worker
        self._lanes = lanes

    def run(self, function: Callable, *args: Any) -> Any:
        """Calls a function on each replica, with the rows of its lanes.

        Args:
            function: Takes the arguments, with the rows of one replica.
            *args: Structures of tensors `[lanes of all replicas, ...]`.

        Returns:
            What the function returns, from each replica.
        """
        if self.strategy is None:
            return function(*args)
        return self.strategy.run(lambda *whole: function(*self._own(whole)), args=args)

    def first(self, value: Any) -> Any:
        """A value that is the same on all replicas, from the first one of this process.

        Args:
            value: What `run` has returned.
        """
        return self.strategy.experimental_local_results(value)[0]

    def gathered(self, outputs: Any) -> Any:
        """The rows of all replicas, in the order of lanes.

        Args:
            outputs: What `run` has returned: structures of tensors `[lanes, ...]`.
        """
        if self.count == 1:
            return outputs
        if self.workers > 1:
            with self.strategy.scope():
                return keras.tree.map_structure(lambda rows: self.strategy.gather(rows, 0), outputs)
        local = self.strategy.experimental_local_results
        return keras.tree.map_structure(lambda rows: tf.concat(local(rows), 0), outputs)

    def any(self, condition: tf.Tensor) -> tf.Tensor:
        """Whether something is so on any worker; inside a graph. All workers must call it.

        Workers may read documents of their own, so none of them knows the lanes of the others.

        Args:
            condition: bool. Whether it is so on this one.
        """
        if self.workers == 1:
            return condition
        with self.strategy.scope():
            found = self.strategy.run(lambda: tf.cast(condition, tf.int32))
            return self.strategy.reduce(tf.distribute.ReduceOp.SUM, found, axis=None) > 0

    def all(self, condition: tf.Tensor) -> tf.Tensor:
        """Whether something is so on all workers; as `any`.

        Args:
            condition: bool. Whether it is so on this one.
        """
        return condition if self.workers == 1 else ~self.any(~condition)

    def specs(self, whole: Any) -> Any:
        """The `tf.TensorSpec`s of one replica.

        Args:
            whole: The `tf.TensorSpec`s of a batch of all replicas.
        """
        return tf.nest.map_structure(
            lambda spec: tf.TensorSpec([self._lanes, *spec.shape[1:]], spec.dtype), whole
        )

    def with_seeds_of_their_own(self, seeds: list[keras.Variable]) -> None:
        """Makes dropout differ between replicas.

        Args:
            seeds: The states of random generators, which are the same on all replicas.
        """
        if self.count == 1:
            return
        for seed in seeds:
            for i, copy in enumerate(copies(seed)):
                offset = np.zeros(seed.shape, copy.dtype.as_numpy_dtype)
                offset.flat[0] = (self._first + i) * 1_000_003
                copy.assign_add(offset)

    def agree(self, what: str, value: Any) -> None:
        """Refuses workers that were not given the same.

        Args:
            what: What the value is, for the error.
            value: Anything with a `repr` that is the same for the same.

        Raises:
            ValueError: If another worker has another value.
        """
        if self.workers == 1:
            return
        digest = hashlib.sha256(repr(value).encode()).digest()
        found = self.from_all([int.from_bytes(digest[:7], "big")])
        if len(np.unique(found)) > 1:
            raise ValueError(
                f"All workers must be given the same {what}. Received: {what} that differ between "
                f"the {self.workers} workers"
            )

    def from_all(self, numbers: Sequence[int]) -> np.ndarray:
        """What each worker has, int64 `[workers, len(numbers)]`. All workers must call it.

        Args:
            numbers: ints, as many on each worker.
        """
        if self.workers == 1:
            return np.array([numbers], "int64")
        with self.strategy.scope():
            found = self._gather(tf.constant([numbers], tf.int64)).numpy()
        return found[:: self.count // self.workers]

    @functools.cached_property
    def _gather(self) -> Callable:
        # Eagerly it is slow, and TensorFlow warns of it.
        @tf.function(reduce_retracing=True, autograph=False)
        def gather(numbers: tf.Tensor) -> tf.Tensor:
            return self.strategy.gather(self.strategy.run(tf.identity, (numbers,)), axis=0)

        return gather

    def _own(self, whole: Any) -> Any:
        if self.count == 1:
            return whole
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        lanes = self._lanes

        def rows(tensor: tf.Tensor) -> tf.Tensor:
            shape = tensor.shape[1:]
            own = tf.reshape(tensor, [self.count, lanes, *shape])[replica]
            return tf.ensure_shape(own, [lanes, *shape])

        return tf.nest.map_structure(rows, whole)


def summed_over_replicas(tensors: Sequence[Any]) -> list[Any]:
    """Sums over all replicas, within a replica; all dense tensors of a dtype in one exchange.

    An exchange takes about a millisecond, however little it exchanges.

    Args:
        tensors: Tensors, `tf.IndexedSlices` or None.
    """
    context = tf.distribute.get_replica_context()
    found = list(tensors)
    dense = [i for i, each in enumerate(found) if tf.is_tensor(each) and not _is_slices(each)]
    for dtype in sorted({found[i].dtype for i in dense}, key=str):  # in one order on all workers
        places = [i for i in dense if found[i].dtype == dtype]
        together = tf.concat([tf.reshape(found[i], [-1]) for i in places], 0)
        sizes = [found[i].shape.num_elements() for i in places]
        parts = tf.split(context.all_reduce("SUM", together), sizes)
        for i, part in zip(places, parts, strict=True):
            found[i] = tf.reshape(part, found[i].shape)
    return [context.all_reduce("SUM", each) if _is_slices(each) else each for each in found]


def _is_slices(value: Any) -> bool:
    return isinstance(value, tf.IndexedSlices)


def check_one_device(model: keras.Model, what: str) -> None:
    """Refuses a model of several replicas.

    Args:
        model: Any model.
        what: What is to be done with it, for the error.

    Raises:
        ValueError: If it runs on several replicas.
    """
    replicas = getattr(model, "replicas", None)
    if replicas is not None and replicas.count > 1:
        raise ValueError(
            f"{what} needs a model on one device: call model.resized() outside of the strategy's "
            f"scope, which copies the weights. Received: model {model.name!r} on {replicas.count} "
            "replicas"
        )


def copies(variable: Any) -> tuple[tf.Variable, ...]:
    """The copies of a variable on the replicas of this process, each a variable of one device.

    Args:
        variable: A `keras.Variable` or a `tf.Variable`.
    """
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return tuple(getattr(value, "values", (value,)))


def _worker_index(strategy: tf.distribute.Strategy) -> int:
    """The place of this process among all workers: the chief is the first."""
    resolver = strategy.cluster_resolver
    chiefs = len(resolver.cluster_spec().as_dict().get("chief", []))
    return resolver.task_id + (chiefs if resolver.task_type == "worker" else 0)
