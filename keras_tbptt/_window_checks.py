"""Windows that a model cannot run on."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from keras_tbptt import _keras
from keras_tbptt._inputs import ModelInputs, static_layers
from keras_tbptt._masks import off_time_layers
from keras_tbptt.data._source import WindowSource
from keras_tbptt.data.stream import DocumentStream
from keras_tbptt.data.windows import DocumentWindows


def check_windows(windows: WindowSource, model: keras.Model) -> None:
    """Refuses windows of another shape, and ids that the embeddings cannot look up.

    The ids of a stream are refused when they are read.

    Args:
        windows: The windows.
        model: A functional model with stateful layers.

    Raises:
        ValueError: If the model cannot run on them.
    """
    form = ModelInputs(model)
    if isinstance(windows, DocumentStream):
        windows.forget_limits()  # those of another model
    replicas = getattr(model, "replicas", None)
    _check_shapes(windows, form, 1 if replicas is None else replicas.count)
    for name, tensor in form.tensors.items():
        dtype = form.by_name(windows.input_dtype)[name]
        if dtype == "float32" and not keras.backend.is_float_dtype(tensor.dtype):
            raise ValueError(
                "The model takes integers, and Keras would cut floats off to them: give ids"
                f"{_of_input(form, name)}, or build the input with a float dtype. Received: floats"
            )
        for layer in embeddings_of_ids(model, [tensor]):
            if isinstance(windows, DocumentWindows):
                _check_ids(windows, form, name, layer)
            elif isinstance(windows, DocumentStream) and dtype == "int32":
                padding = layer.mask_zero and name not in form.static
                windows.limit_ids(name if form.named else "", int(padding), layer.input_dim - 1)
            elif dtype == "float32":
                raise ValueError(
                    f"The ids{_of_input(form, name)} must be integers below the vocabulary of "
                    f"layer {layer.name!r}, input_dim={layer.input_dim}. Received: floats"
                )
    off = off_time_layers(model, windows.window, static_layers(model, [*form.static.values()]))
    if windows.has_padding and off:
        raise ValueError(
            "A layer would run over the padding of last windows, because its steps are not the "
            "window's: remove strides and pooling before it, or give it documents that fill "
            f"their windows. Received: layers {off} of model {model.name!r}, {windows!r}"
        )


def _of_input(form: ModelInputs, name: str) -> str:
    return f" of input {name!r}" if form.named else ""


def _check_ids(
    windows: DocumentWindows, form: ModelInputs, name: str, layer: keras.layers.Embedding
) -> None:
    """Refuses ids that an embedding has no row for, or takes for padding."""
    smallest, largest = form.by_name(windows.min_id)[name], form.by_name(windows.max_id)[name]
    if largest is None or largest >= layer.input_dim or smallest < 0:
        wrong = "floats" if largest is None else f"id {smallest if smallest < 0 else largest}"
        raise ValueError(
            f"The ids{_of_input(form, name)} must be integers below the vocabulary of "
            f"layer {layer.name!r}, input_dim={layer.input_dim}. Received: {wrong}"
        )
    if layer.mask_zero and smallest == 0 and name not in form.static:
        raise ValueError(
            f"Layer {layer.name!r} has mask_zero=True and takes id 0 for padding, but the "
            f"documents{_of_input(form, name)} contain it: let ids begin at 1, or leave "
            "mask_zero out (a TBPTTModel masks padding by itself). "
            f"Received: id 0 in {windows!r}"
        )


def check_replicas(windows: WindowSource, model: keras.Model) -> None:
    """Refuses what would differ between workers, or what their sum would count wrongly.

    Args:
        windows: The windows.
        model: A `TBPTTModel`.

    Raises:
        ValueError: If the model cannot run on them as one would on one device.
    """
    if model.replicas.count > 1 and windows.weights_differ:
        raise ValueError(
            "Outputs that count in different places, or not as much as each other, are trained "
            "on one device: give all outputs targets of the same kind, or build the model outside "
            f"of the strategy's scope. Received: {model.replicas.count} replicas, {windows!r}"
        )
    if model.replicas.workers == 1:
        return
    if windows.draws and windows._seed_drawn:
        raise ValueError(
            "Each worker would draw another seed, and run other documents: give "
            f"DocumentWindows(..., seed=0). Received: {windows!r} with seed=None"
        )
    # Each worker has a place of its own in a stream.
    epoch = None if isinstance(windows, DocumentStream) else windows.epoch
    drawn = (windows.seed, epoch) if windows.draws else ()
    agreed = (windows.fingerprint, drawn, windows.window, windows.lanes, windows.packing)
    model.replicas.agree("windows", agreed)


def _check_shapes(windows: WindowSource, form: ModelInputs, replicas: int) -> None:
    """Refuses windows that do not have the inputs of the model, each in its shape."""
    received = windows.batch_shape
    if form.named != isinstance(received, dict):
        wanted = (
            f"a dict of documents with the names {[*form.tensors]}"
            if form.named
            else "the documents themselves, or the model a dict of its input"
        )
        raise ValueError(
            "Windows and model must both name their inputs, or neither: give DocumentWindows "
            f"{wanted}. Received: windows of batch shape {received}"
        )
    if not form.named:
        shape = tuple(next(iter(form.tensors.values())).shape)
        if (shape[0] * replicas, *shape[1:]) != received:
            on_replicas = f" on each of {replicas} replicas" if replicas > 1 else ""
            raise ValueError(
                f"The model's batch shape is {shape}{on_replicas}, so the windows need "
                f"lanes={shape[0] * replicas}, window={shape[1]} and steps of shape {shape[2:]}. "
                f"Received: windows of batch shape {received}"
            )
        return
    expected = {
        name: (tensor.shape[0] * replicas, *tensor.shape[1:])
        for name, tensor in form.tensors.items()
    }
    if expected != received:
        raise ValueError(
            f"The model's inputs have the batch shapes {expected}, and the windows must have the "
            "same names and shapes (see DocumentWindows.keras_inputs). "
            f"Received: windows of batch shapes {received}"
        )
    if set(windows.static_names) != set(form.static):
        raise ValueError(
            f"The second axis of a static input must not be as long as the window, {form.window}, "
            "because the input would be taken for one per step: give it another shape, such as "
            f"[documents, 1, ...]. Received: windows of batch shapes {received}, "
            f"static={windows.static_names}"
        )


def check_classes(windows: WindowSource | None, model: keras.Model) -> None:
    """Refuses an output that has no class for an id: a GPU would give NaN for it.

    The ids of a stream are refused when they are read.

    Args:
        windows: The windows; None for batches of other origin.
        model: A functional model.

    Raises:
        ValueError: If an output has too few classes.
    """
    if isinstance(windows, DocumentStream) and windows.target_input is not None:
        for output in keras.tree.flatten(model.outputs):
            if output.shape[-1] > 1 and not windows.predicts_floats:
                windows.limit_ids(windows.target_input, 0, output.shape[-1] - 1)
    if not isinstance(windows, DocumentWindows) or windows.max_next_id is None:
        return
    for output in keras.tree.flatten(model.outputs):
        if 1 < output.shape[-1] <= windows.max_next_id:
            raise ValueError(
                "The output must have a class for each id, because the target of a step is the id "
                f"after it: give it {windows.max_next_id + 1} classes. "
                f"Received: an output of shape {tuple(output.shape)}, id {windows.max_next_id}"
            )


def embeddings_of_ids(
    model: keras.Model, ids: Sequence[keras.KerasTensor]
) -> list[keras.layers.Embedding]:
    """The embeddings that look up the model's ids as they are, in nested models too.

    Args:
        model: A functional model.
        ids: Its symbolic inputs of ids.
    """
    known, found = {id(tensor) for tensor in ids}, []
    for layer in model.layers:
        for tensors in _keras.calls(layer):
            taken = [id(tensor) in known for tensor in tensors]
            if isinstance(layer, keras.layers.Embedding) and any(taken):
                found.append(layer)
            elif isinstance(layer, keras.Model) and any(taken) and getattr(layer, "inputs", None):
                inner = [t for t, is_ids in zip(layer.inputs, taken, strict=True) if is_ids]
                found += embeddings_of_ids(layer, inner)
    return found
