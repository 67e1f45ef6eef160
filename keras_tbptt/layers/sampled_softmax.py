"""Softmax layers for large vocabularies, trained on a sample of the classes."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_tbptt.layers._sampling_layer import SamplingLayer


@keras.saving.register_keras_serializable(package="keras_tbptt")
class SampledSoftmax(SamplingLayer):
    """A dense softmax layer that a `TBPTTModel` trains on a sample of the classes.

    With a large vocabulary, most of the time of a training step goes into the products with all
    classes. In `TBPTTModel.fit`, the loss of this layer is the softmax loss over the target and a
    random sample of other classes instead, as in `tf.nn.sampled_softmax_loss` (Jean et al. 2015,
    "On using very large target vocabulary for neural machine translation", section 3). All steps
    of a batch share one sample. The target itself is removed from it. Each logit is corrected by
    the log of the probability that its class is in the sample.

    Everywhere else the layer is exact and equals `keras.layers.Dense(classes, activation)`: in
    `evaluate`, validation, `predict`, exports, and in training by any other Keras model.

    Classes are drawn with a chance that falls as 1 / (class + 1). So the classes must be sorted by
    falling frequency, as `keras.layers.TextVectorization` and `keras_tbptt.text` sort words.

    A rare class is drawn in few steps, so its bias hardly moves. Where frequencies are known,
    assign their logs to `bias` before training.

    The loss that `fit` reports is that of the sample, which is lower than the exact one.
    Metrics of this output would need all classes: `fit` reports them for the validation data
    alone. With `keras_tbptt.optimizers.LazyAdam`, a step updates only the rows of the targets and
    of the sample. Other optimizers update all rows, which costs a part of the gain.

    The layer must be an output of the model, with the loss `SparseCategoricalCrossentropy`.

    Args:
        classes: int. Number of classes, which are 0 to `classes` - 1.
        samples: int >= 1. How many distinct classes a sample has on average. From `classes` on,
            training is exact too. Defaults to 1024.
        activation: `"softmax"` for probabilities, or None for logits, which need a loss with
            `from_logits=True`. Defaults to `"softmax"`.
        use_bias: bool. Whether each class has a bias. Defaults to True.
        kernel_initializer: Initializer of the kernel. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of the bias. Defaults to `"zeros"`.
        kernel_regularizer: Optional regularizer of the kernel. It makes the gradient dense.
        seed: Optional int. Seed of the samples.
        **kwargs: Further arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Float tensor `[..., units]`.
        training: Optional bool.

    Returns:
        Tensor `[..., classes]` in the compute dtype.

    Weights, in the layer's variable dtype: kernel `[classes, units]`, a row for each class, and
    bias `[classes]`.

    Raises:
        ValueError: If `classes` or `samples` is not a positive integer, or `activation` is neither.

    Example:

    ```python
    x = keras_tbptt.layers.LSTM(256, stateful=True, return_sequences=True)(x)
    outputs = keras_tbptt.layers.SampledSoftmax(20_000)(x)
    model = keras_tbptt.TBPTTModel(tokens, outputs)
    model.compile(keras_tbptt.optimizers.LazyAdam(), "sparse_categorical_crossentropy")
    ```
    """

    def __init__(
        self,
        classes: int,
        samples: int = 1024,
        activation: Any = "softmax",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not isinstance(classes, int) or classes < 1:
            raise ValueError(f"`classes` must be an integer >= 1. Received: classes={classes!r}")
        self.classes = classes
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.supports_masking = True
        self._set_sampling(classes, samples, activation, seed)

    def build(self, shape: tuple) -> None:
        """Makes the weights.

        Args:
            shape: `(..., units)`.
        """
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.classes, shape[-1]),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias", shape=(self.classes,), initializer=self.bias_initializer
            )

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Probabilities or logits of all classes.

        Args:
            inputs: Float tensor `[..., units]`.
            training: Optional bool.
        """

        def logits() -> tf.Tensor:
            product = keras.ops.matmul(inputs, keras.ops.transpose(self.kernel))
            return product if self.bias is None else keras.ops.add(product, self.bias)

        return self._outputs(logits, inputs, training)

    def compute_output_shape(self, shape: tuple) -> tuple:
        """`(..., classes)`.

        Args:
            shape: `(..., units)`.
        """
        return (*shape[:-1], self.classes)

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration."""
        return {
            **super().get_config(),
            "classes": self.classes,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            **self._sampling_config(),
        }

    def _kernel_and_bias(self) -> tuple[Any, Any]:
        return self.kernel, self.bias


@keras.saving.register_keras_serializable(package="keras_tbptt")
class SampledReversibleEmbedding(SamplingLayer, keras.layers.ReversibleEmbedding):
    """An embedding that is also the `SampledSoftmax` of the model: input and output are tied.

    A word has one vector for both. This halves the weights of a model with a large vocabulary, and
    often lowers the perplexity (Press and Wolf 2017, "Using the output embedding to improve
    language models"). The layer is a `keras.layers.ReversibleEmbedding` with an activation, whose
    reverse call is trained as `SampledSoftmax` is. It has no bias.

    Args:
        input_dim: int. Number of classes, which are the ids 0 to `input_dim` - 1, sorted by
            falling frequency.
        output_dim: int. Size of an id's vector, and of what the reverse call is given.
        samples: int >= 1. As in `SampledSoftmax`. Defaults to 1024.
        activation: `"softmax"` or None, of the reverse call, as in `SampledSoftmax`. Defaults to
            `"softmax"`.
        seed: Optional int. Seed of the samples.
        **kwargs: Further arguments of `keras.layers.ReversibleEmbedding`. `tie_weights=False` and
            `logit_soft_cap` are refused.

    Call arguments:
        inputs: Ids `[...]`; with `reverse=True` float tensor `[..., output_dim]`.
        reverse: bool. Whether the layer is called as the output of the model. Defaults to False.
        training: Optional bool.

    Returns:
        Tensor `[..., output_dim]`, or with `reverse=True` `[..., input_dim]`, in the compute dtype.

    Weights, in the layer's variable dtype: embeddings `[input_dim, output_dim]`.

    Raises:
        ValueError: If `samples` is not a positive integer, `activation` is neither, or an argument
            is refused.

    Example:

    ```python
    words = keras_tbptt.layers.SampledReversibleEmbedding(20_000, 256)
    x = keras_tbptt.layers.LSTM(256, stateful=True, return_sequences=True)(words(tokens))
    model = keras_tbptt.TBPTTModel(tokens, words(x, reverse=True))
    ```
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        samples: int = 1024,
        activation: Any = "softmax",
        seed: int | None = None,
        **kwargs: Any,
    ):
        refused = {"tie_weights": True, "logit_soft_cap": None}
        for name, only in refused.items():
            if kwargs.get(name, only) != only:
                raise ValueError(
                    f"A SampledReversibleEmbedding works with {name}={only} alone: leave the "
                    f"argument out. Received: {name}={kwargs[name]!r}"
                )
        super().__init__(input_dim, output_dim, **kwargs)
        self._set_sampling(input_dim, samples, activation, seed)

    def call(
        self, inputs: tf.Tensor, reverse: bool = False, training: bool | None = None
    ) -> tf.Tensor:
        """Vectors of ids, or probabilities or logits of all ids.

        Args:
            inputs: Ids `[...]`; with `reverse=True` float tensor `[..., output_dim]`.
            reverse: bool. Whether the layer is called as the output of the model.
            training: Optional bool.
        """
        call = super().call
        if not reverse:
            return call(inputs)
        inputs = keras.ops.cast(inputs, self.compute_dtype)
        return self._outputs(lambda: call(inputs, reverse=True), inputs, training)

    def compute_output_spec(
        self, inputs: Any, reverse: bool = False, training: bool | None = None
    ) -> keras.KerasTensor:
        """The shape and dtype of what `call` returns.

        Args:
            inputs: As in `call`.
            reverse: As in `call`.
            training: As in `call`.

        Raises:
            ValueError: If the reverse call is given vectors of another size.
        """
        if reverse and inputs.shape[-1] != self.output_dim:
            raise ValueError(
                f"The reverse call of layer {self.name!r} needs vectors of size output_dim="
                f"{self.output_dim}: give the layer before it as many units. "
                f"Received: inputs of shape {tuple(inputs.shape)}"
            )
        return super().compute_output_spec(inputs, reverse=reverse)

    def get_config(self) -> dict[str, Any]:
        """The layer's configuration."""
        return {**super().get_config(), **self._sampling_config()}

    def _kernel_and_bias(self) -> tuple[Any, Any]:
        return self.embeddings, None
