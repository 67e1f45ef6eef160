"""Training on samples of the classes: the loss of sampled outputs, which have no metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

from keras_tbptt import _keras
from keras_tbptt._prediction import PredictsDocuments
from keras_tbptt.layers._sampling_layer import Sampled, SamplingLayer, sampled_of


class SamplesClasses(PredictsDocuments):
    """A model that takes the loss of a `SampledSoftmax` in training from a sample of the classes.

    The layer attaches to its output what it can be sampled from. The output itself is exact, but
    nothing in a training step uses it, so TensorFlow does not compute it.

    Args:
        *args: As in a functional `keras.Model`.
        **kwargs: As in a functional `keras.Model`.

    Raises:
        ValueError: If the output of a `SampledSoftmax` is not an output of the model.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        last = list(last_layers(self.outputs))
        for layer in _keras.flatten_layers(self):
            if isinstance(layer, SamplingLayer) and layer not in last:
                raise ValueError(
                    f"The output of a {type(layer).__name__} must be an output of the model, with "
                    'nothing behind it, not even a cast: give the layer dtype="float32" instead. '
                    f"Received: layer {layer.name!r}, with other layers behind it"
                )

    @property
    def uses_samples_alone(self) -> bool:
        """Whether nothing in a training step uses the whole of an output that can be sampled."""
        return type(self).compute_loss is SamplesClasses.compute_loss

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """The loss, as in `keras.Model.compute_loss`; in training, of a sample of the classes.

        Args:
            x: As in `keras.Model.compute_loss`.
            y: As in `keras.Model.compute_loss`.
            y_pred: As in `keras.Model.compute_loss`.
            sample_weight: As in `keras.Model.compute_loss`.
            training: bool. Whether outputs of a training call are sampled.

        Returns:
            A scalar.

        Raises:
            ValueError: If a sampled output has another loss than the crossentropy of class indices.
        """
        if training and any(map(sampled_of, keras.tree.flatten(y_pred))):
            y = _keras.targets_like(self, y, y_pred)
            for output in _keras.losses_of(self, y, y_pred):
                _check_loss(sampled_of(output.value), output.loss)
            # The target is the first of the classes that are left.
            y, y_pred = (
                keras.tree.map_structure(replace, y, y_pred)
                for replace in (_target_in_sample, _output_of_sample)
            )
        return super().compute_loss(x, y, y_pred, sample_weight, training=training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """The metrics, as in `keras.Model.compute_metrics`, of the outputs that there are.

        Args:
            x: As in `keras.Model.compute_metrics`.
            y: As in `keras.Model.compute_metrics`.
            y_pred: As in `keras.Model.compute_metrics`; None for an output without metrics.
            sample_weight: As in `keras.Model.compute_metrics`.

        Returns:
            A dict of values by name.
        """
        if all(output is not None for output in keras.tree.flatten(y_pred)):
            return super().compute_metrics(x, y, y_pred, sample_weight)
        with _keras.without_metrics(self, y, y_pred):
            return super().compute_metrics(x, y, y_pred, sample_weight)


def last_layers(outputs: Any) -> Iterator[Any]:
    """The layer or operation that gives each output, within nested models too.

    Args:
        outputs: Symbolic outputs of a model.
    """
    for output in keras.tree.flatten(outputs):
        layer = _keras.producer(output)
        if isinstance(layer, keras.Model):
            yield from last_layers(layer.outputs)
        else:
            yield layer


def _target_in_sample(target: Any, output: Any) -> Any:
    return target if sampled_of(output) is None else keras.ops.zeros_like(target)


def _output_of_sample(target: Any, output: Any) -> Any:
    sampled = sampled_of(output)
    return output if sampled is None else sampled.outputs(target)


def _check_loss(sampled: Sampled | None, loss: keras.losses.Loss) -> None:
    """Refuses a loss that samples of the classes would change."""
    if sampled is None:
        return
    config = {}
    if isinstance(loss, keras.losses.SparseCategoricalCrossentropy):
        config = loss.get_config()
    logits = sampled.layer.activation is keras.activations.linear
    fits = getattr(loss, "fn", None) is keras.losses.sparse_categorical_crossentropy
    fits &= config.get("ignore_class") is None and config.get("from_logits", False) == logits
    if not fits:
        raise ValueError(
            f"The output of layer {sampled.layer.name!r} needs the loss "
            f"keras.losses.SparseCategoricalCrossentropy(from_logits={logits}), because it is "
            f"trained on a sample of the classes. Received: {loss!r} with {config}"
        )
