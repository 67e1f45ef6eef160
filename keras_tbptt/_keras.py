"""The boundary to Keras: every name used here that is not its public API, one function each."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src import backend


def flatten_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers below a layer, at any depth: nested models, wrappers, custom layers.

    Args:
        layer: A layer or model, which the list leaves out.
    """
    return list(layer._flatten_layers(include_self=False))


def is_of_keras(layer: keras.layers.Layer) -> bool:
    """Whether a layer's class is one of Keras's own, which its configuration describes in full.

    Args:
        layer: A layer. A `Lambda` has code of its user.
    """
    own = type(layer).__module__.startswith("keras.src.")
    return own and not isinstance(layer, keras.layers.Lambda)


def calls(operation: Any) -> list[list[keras.KerasTensor]]:
    """The symbolic tensors that an operation was called on, a list for each of its calls.

    Args:
        operation: A layer, model or operation of a functional model.
    """
    return [list(node.input_tensors) for node in operation._inbound_nodes]


def calls_and_outputs(
    operation: Any,
) -> list[tuple[list[keras.KerasTensor], list[keras.KerasTensor]]]:
    """The symbolic tensors that an operation was called on, and what it gave, for each call.

    Args:
        operation: A layer, model or operation of a functional model.
    """
    return [(list(node.input_tensors), list(node.outputs)) for node in operation._inbound_nodes]


def times_called(model: keras.Model, layer: keras.layers.Layer) -> int:
    """How often a layer runs when a functional model is called, nested models included.

    Args:
        model: A functional or sequential model.
        layer: A layer of it, at any depth.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    depths = getattr(graph, "_nodes_by_depth", {})  # none in a model that is no graph
    called = [node.operation for nodes in depths.values() for node in nodes]
    nested = [one for one in called if isinstance(one, keras.Model) and one is not layer]
    return sum(one is layer for one in called) + sum(times_called(one, layer) for one in nested)


def takes_initial_state(layer: keras.layers.Layer) -> bool:
    """Whether a recurrent layer was called with an `initial_state`.

    Args:
        layer: A layer of a functional model.
    """
    calls = [node.arguments for node in layer._inbound_nodes]
    return any(
        call.kwargs.get("initial_state") is not None or any(a is not None for a in call.args[1:2])
        for call in calls
    )


def producer(tensor: keras.KerasTensor) -> Any:
    """The layer, model or operation that a symbolic tensor is an output of.

    Args:
        tensor: A symbolic tensor of a functional model.
    """
    return tensor._keras_history.operation


def seeds_by_layer(model: keras.Model) -> list[keras.Variable]:
    """The states of random generators in the order of files that version 0.1 saved.

    Args:
        model: A built model.
    """
    generators = [g for layer in model._flatten_layers() for g in layer._seed_generators]
    # A generator shared by two layers is listed by both.
    return list({id(g.state): g.state for g in generators}.values())


def set_mask(tensor: tf.Tensor, mask: tf.Tensor) -> None:
    """Attaches a mask to a tensor, for the layers that take the tensor next.

    Args:
        tensor: `[lanes, steps, ...]`.
        mask: bool `[lanes, steps]`.
    """
    tensor._keras_mask = mask


def without_mask(tensor: tf.Tensor, shape: Any = None) -> tf.Tensor:
    """A copy of an output without its mask, by which Keras would weight a loss.

    The copy keeps the logits that Keras attaches to the outputs of a sigmoid or softmax. Keras's
    losses use them, because probabilities are clipped: a saturated output would learn nothing.

    Args:
        tensor: An output of a model.
        shape: Its static shape. Defaults to None: as it is.
    """
    logits = getattr(tensor, "_keras_logits", None)
    copy, logits = (
        each if each is None or shape is None else tf.ensure_shape(each, shape)
        for each in (tf.identity(tensor), logits)
    )
    if logits is not None:
        copy._keras_logits = logits
    return copy


def output_losses(model: keras.Model) -> list[keras.metrics.Mean]:
    """What reports the loss of each output of a model of several; empty for one output.

    Args:
        model: A compiled model.
    """
    return list(model._compile_loss.metrics) if model._compile_loss is not None else []


def targets_like(model: keras.Model, y: Any, y_pred: Any) -> Any:
    """Targets in the structure of the outputs, in the order in which Keras pairs them.

    Args:
        model: The model.
        y: Targets.
        y_pred: Outputs, one for each target.

    Raises:
        ValueError: If their numbers or their names differ.
    """
    names = model.output_names
    if isinstance(y, Mapping) and not (isinstance(y_pred, Mapping) and set(y) == set(y_pred)):
        if set(y) != set(names):
            given = sorted(y_pred) if isinstance(y_pred, Mapping) else names
            raise ValueError(
                "Targets in a dict need the names of the outputs. "
                f"Received: targets {sorted(y)} for the outputs {given}"
            )
        y = [y[name] for name in names]
    targets = keras.tree.flatten(y)
    if len(targets) != len(keras.tree.flatten(y_pred)):
        raise ValueError(
            "The model needs a target for each of its outputs. "
            f"Received: {len(targets)} targets for the outputs {names}"
        )
    return keras.tree.pack_sequence_as(y_pred, targets)


class OutputLoss(NamedTuple):
    """The loss of one output.

    Attributes:
        value: The output, or what there is for it.
        loss: What `compile` was given.
        factor: Its `loss_weights`; None where there are none.
    """

    value: Any
    loss: keras.losses.Loss
    factor: float | None

    @property
    def divides_by_weights(self) -> bool:
        """Whether Keras divides the loss by the sum of the weights, and not by all rows."""
        return getattr(self.loss, "reduction", None) == "mean_with_sample_weight"

    @property
    def is_sum(self) -> bool:
        """Whether Keras divides the loss by nothing."""
        return getattr(self.loss, "reduction", None) == "sum"

    @property
    def pairs_elements(self) -> bool:
        """Whether it is a loss of Keras's own that compares arrays of one shape."""
        function = getattr(self.loss, "fn", None)
        own = getattr(function, "__module__", "").startswith("keras.src.losses")
        return own and function.__name__ not in ("sparse_categorical_crossentropy", "ctc")

    def shape(self, target: Any, output: Any) -> tuple[int | None, ...] | None:
        """The shape of the loss before it is weighted and reduced; None where it is not known.

        Args:
            target: A target of the output, for its shape and dtype.
            output: The output.
        """
        target, output = _symbolic(target), _symbolic(output)
        with contextlib.suppress(Exception):  # an eager one may be no graph
            return tuple(backend.compute_output_spec(self.loss.call, target, output).shape)
        return None


def losses_of(model: keras.Model, y: Any, y_pred: Any) -> list[OutputLoss]:
    """Each loss that a model is compiled with, beside the output that it is the loss of.

    Args:
        model: A compiled model.
        y: Targets.
        y_pred: Outputs, or a structure like them.
    """
    compiled = model._compile_loss
    if compiled is None:
        return []
    if not compiled.built:
        compiled.build(y, y_pred)
    outputs = keras.tree.flatten(y_pred)
    tree = keras.tree.pack_sequence_as(compiled._y_pred_build_structure, outputs)
    return [
        OutputLoss(
            functools.reduce(operator.getitem, entry.path, tree), entry.loss, entry.loss_weights
        )
        for entry in compiled._flat_losses
    ]


@contextlib.contextmanager
def without_metrics(model: keras.Model, y: Any, y_pred: Any) -> Iterator[None]:
    """Within this context, a model has no metrics of the outputs that are None.

    Args:
        model: A compiled model.
        y: Targets.
        y_pred: Outputs, some of them None.
    """
    compiled = model._compile_metrics
    if compiled is None:
        yield
        return
    if not compiled.built:
        compiled.build(y, model.output)
    lists = (compiled._flat_metrics, compiled._flat_weighted_metrics)
    before = [list(metrics) for metrics in lists]
    for metrics in lists:
        for i, output in enumerate(compiled._flatten_y(y_pred)):
            if output is None:
                metrics[i] = None
    try:
        yield
    finally:
        for metrics, kept in zip(lists, before, strict=True):
            metrics[:] = kept


def take_strategy(model: keras.Model) -> tf.distribute.Strategy | None:
    """Takes over from Keras to run a model on the replicas of the strategy it is built under.

    Keras would give each replica a part of each batch in an order of its own, and fails on flags
    that are no numbers. Without the strategy, it calls `train_step` with whole batches.

    Args:
        model: A model whose constructor has just run.

    Returns:
        The strategy; None outside of a strategy's scope.
    """
    strategy, model._distribute_strategy = model._distribute_strategy, None
    return strategy


def build_compiled(model: keras.Model, x: Any, y: Any, sample_weight: Any) -> None:
    """Makes the variables of losses and metrics.

    No replica can make them alone, and TensorFlow traces a step twice that makes variables. Losses
    are not called, so a step says what does not fit.

    Args:
        model: A compiled functional model.
        x: `tf.TensorSpec`s of the model's inputs.
        y: `tf.TensorSpec`s of the targets; None if there are none.
        sample_weight: `tf.TensorSpec`s of their weights.
    """
    batch = keras.tree.map_structure(_symbolic, (x, y, model.output, sample_weight))
    if model._compile_loss is not None and not model._compile_loss.built:
        model._compile_loss.build(targets_like(model, y, model.output), model.output)
    if model._compile_metrics is not None and not model._compile_metrics.built:
        # Not their results, which may have any shape.
        backend.compute_output_spec(model._compile_metrics.update_state, *batch[1:])


def scalar_metrics(model: keras.Model, y: Any) -> list[str]:
    """The functions among a model's metrics that give one number for a whole batch.

    Args:
        model: A functional model, compiled with weighted metrics alone.
        y: `tf.TensorSpec`s of the targets.
    """
    compiled = model._compile_metrics
    if compiled is None or not compiled.built:
        return []
    targets = keras.tree.map_structure(_symbolic, y)
    flat = compiled._flatten_y(targets), compiled._flatten_y(model.output)
    found = []
    for metrics, target, output in zip(compiled._flat_weighted_metrics, *flat, strict=False):
        for metric in metrics.metrics if metrics is not None else []:
            function = getattr(metric, "_fn", None)
            if function is None:
                continue
            with contextlib.suppress(Exception):  # an eager one may be no graph
                if backend.compute_output_spec(function, target, output).shape == ():
                    found.append(metric.name)
    return found


def _symbolic(spec: Any) -> keras.KerasTensor | None:
    if spec is None:
        return None
    return keras.KerasTensor(spec.shape, keras.backend.standardize_dtype(spec.dtype))


def apply_summed(
    optimizer: keras.optimizers.Optimizer, gradients: list[Any], variables: list[Any]
) -> None:
    """An optimizer's step with gradients that are summed over replicas already.

    Keras would clip the gradients of each replica, and sum them up then.

    Args:
        optimizer: An optimizer, or a `LossScaleOptimizer` of one.
        gradients: Tensors, `tf.IndexedSlices` or None; the same on all replicas.
        variables: What they are the gradients of.
    """
    for each in unwrapped(optimizer):
        if "_all_reduce_sum_gradients" not in vars(each):
            usual = each._all_reduce_sum_gradients
            each._all_reduce_sum_gradients = lambda pairs, usual=usual: (
                list(pairs) if getattr(_SUMMED, "now", False) else usual(pairs)
            )
    _SUMMED.now = True
    try:
        optimizer.apply(gradients, variables)
    finally:
        _SUMMED.now = False


def unwrapped(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """An optimizer and those that it wraps, as `LossScaleOptimizer` and `MultiOptimizer` do.

    Args:
        optimizer: A `keras.optimizers.Optimizer`.

    Returns:
        The optimizers, outermost first.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    inner = getattr(optimizer, "optimizers", ()) if inner is None else [inner]
    return [optimizer, *(found for wrapped in inner for found in unwrapped(wrapped))]


def optimizer_of(optimizer: keras.optimizers.Optimizer, variable: Any) -> Any:
    """What updates a variable: one of the optimizers of a `MultiOptimizer`, or the optimizer.

    Args:
        optimizer: A built optimizer.
        variable: One of the variables that it was built for.
    """
    optimizer = _without_wrappers(optimizer)
    if not isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return optimizer
    return optimizer.optimizers[optimizer._var_to_optimizer_idx[optimizer._var_key(variable)]]


def unknown_to(optimizer: keras.optimizers.Optimizer, variables: Iterable[Any]) -> list[Any]:
    """The variables that a built optimizer was not built for; none before it is built.

    Args:
        optimizer: An optimizer.
        variables: Variables of a model.
    """
    optimizer = _without_wrappers(optimizer)
    if not optimizer.built:
        return []
    known = {id(variable) for variable in optimizer._trainable_variables}
    return [variable for variable in variables if id(variable) not in known]


def _without_wrappers(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """What a `LossScaleOptimizer` wraps, which mixed_float16 puts around any optimizer."""
    while (inner := getattr(optimizer, "inner_optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def keys_of_optimizers(optimizer: keras.optimizers.Optimizer) -> list[str]:
    """The keys of the `OptimizerMap` of a `MultiOptimizer`; empty for others.

    Args:
        optimizer: An optimizer.
    """
    by_key = getattr(_without_wrappers(optimizer), "_optimizer_map", None)
    return list(by_key) if isinstance(by_key, keras.optimizers.OptimizerMap) else []


def strategy_of(optimizer: keras.optimizers.Optimizer) -> tf.distribute.Strategy:
    """The strategy that an optimizer was made under.

    Args:
        optimizer: An optimizer.
    """
    return optimizer._distribution_strategy


def keep_losses(model: keras.Model, scope: keras.StatelessScope) -> None:
    """Leaves what layers added to the loss within a scope where a plain call would.

    Args:
        model: The model that was called within the scope.
        scope: A scope that collects losses, which has ended.
    """
    for layer in flatten_layers(model):
        layer._losses.extend(loss for loss in scope.losses if id(loss) in layer._loss_ids)


def original_of_clone(outputs: Any) -> keras.Model | None:
    """The model that `keras.models.clone_model` is cloning when it calls a constructor.

    `clone_model` calls the class with inputs, outputs and name alone, and passes no other
    argument of the original on.

    Args:
        outputs: What the constructor was given.

    Returns:
        The original, or None where the caller is not `clone_model`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals
        if frame.f_code.co_name == "_clone_functional_model" and (
            found.get("output_tensors") is outputs
        ):
            return found["model"]
        frame = frame.f_back
    return None


def sibling_callbacks() -> list[keras.callbacks.Callback]:
    """Finds all callbacks of the `fit` that is calling a callback.

    Keras gives a callback no way to see the others, but their `CallbackList` is what calls it.

    Returns:
        The callbacks in the order in which they are called, the caller and those that Keras adds
        included. Empty outside of a `CallbackList`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return list(caller.callbacks)
        frame = frame.f_back
    return []


def averages_in_model() -> bool:
    """Whether `SwapEMAWeights` has swapped weights in the `fit` that is calling a callback."""
    return any(getattr(each, "_ema_weights_in_model", False) for each in sibling_callbacks())


def set_initial_epoch(model: keras.Model, epoch: int | None) -> None:
    """Sets the epoch that `fit` begins with, from a callback's `on_train_begin`.

    Args:
        model: The model that is being trained.
        epoch: int >= 0. The first epoch; it takes precedence over the argument `initial_epoch` of
            `fit`. None gives the argument its effect back.
    """
    model._initial_epoch = None if epoch is None else _Epoch(epoch)


# Each replica of a process traces its step in a thread of its own.
_SUMMED = threading.local()


class _Epoch(int):
    """Keras uses its own value where this one is false, which 0 must not be."""

    def __bool__(self) -> bool:
        return True


class OpenAdam(keras.optimizers.Adam):
    """Adam whose slots and clipping a subclass can use."""

    def slots(self, variable: Any) -> tuple[keras.Variable, keras.Variable]:
        """Momentum and velocity of a variable.

        Args:
            variable: One of the variables that the optimizer was built for.
        """
        index = self._get_variable_index(variable)
        return self._momentums[index], self._velocities[index]

    def clip(self, gradients: list[Any]) -> list[Any]:
        """Clips gradients as `clipnorm`, `global_clipnorm` or `clipvalue` says.

        Args:
            gradients: Tensors.
        """
        return super()._clip_gradients(gradients)

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        return self.clip(grads)
