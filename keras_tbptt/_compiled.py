"""What a model on several replicas cannot be compiled with."""

from __future__ import annotations

import keras

from keras_tbptt import _keras
from keras_tbptt._replicas import copies

_OF_A_DEVICE = ("gradient_accumulation_steps", "ema_overwrite_frequency")


def check_optimizer(model: keras.Model) -> None:
    """Refuses an optimizer that is not of the replicas, or that each would use on its own.

    Args:
        model: A compiled `TBPTTModel` that was built under a strategy.

    Raises:
        ValueError: If there is such an optimizer.
    """
    optimizer, replicas = model.optimizer, model.replicas
    if optimizer is None:
        return
    if _keras.strategy_of(optimizer) is not replicas.strategy:
        raise ValueError(
            "The optimizer does not belong to the strategy of the model: make it, and call "
            f"compile, within strategy.scope(). Received: {optimizer!r} of another scope"
        )
    if replicas.count == 1:
        return
    inner = getattr(optimizer, "inner_optimizer", None)
    wrong = [
        f"{name}={value!r}"
        for each in (optimizer, inner)
        for name in _OF_A_DEVICE
        if (value := getattr(each, name, None))
    ]
    if wrong:
        raise ValueError(
            "Keras would do this on each replica before gradients are summed up: leave it out, or "
            f"train on one device. Received: {', '.join(wrong)}"
        )


def check_compiled(model: keras.Model) -> None:
    """Refuses losses and metrics that the sum of the replicas would not be right for.

    Args:
        model: A `TBPTTModel` whose losses and metrics are built.

    Raises:
        ValueError: If there are such losses or metrics.
    """
    local = len(copies(model.trainable_variables[0])) if model.trainable_variables else 1
    outside = [v.path for v in model.metrics_variables if len(copies(v)) != local]
    if outside:
        raise ValueError(
            "The metrics do not belong to the strategy of the model: make them within "
            f"strategy.scope(). Received: {outside}"
        )
    if model.replicas.count == 1:
        return
    for output in _keras.losses_of(model, None, model.output):
        if getattr(output.loss, "reduction", None) == "mean_with_sample_weight":
            raise ValueError(
                'A loss with reduction="mean_with_sample_weight" would divide by the weights of '
                'each replica alone: use reduction="sum_over_batch_size". '
                f"Received: {output.loss!r}"
            )
