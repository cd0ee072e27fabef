"""The one definition of GPT-2: a Keras 3 model on the TensorFlow backend.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), as released: pre-layer-norm blocks, GELU
in its tanh form, learned positions, and a head tied to the token embedding. What differs by target (training,
SavedModel, ONNX) is the `Kernels` object that a call may pass; the layers and their weights never do.
"""

from __future__ import annotations

import math
from typing import Any, Self

from builder.keras_backend import keras, ops
from builder.model.kernels import Kernels
from serving.bundle import Geometry


def initial_normal(n_embd: int, projections: int = 1) -> Any:
    """A new initialiser, normal with standard deviation 0.02 * sqrt(768 / n_embd) / sqrt(projections).

    That is the released 0.02 at width 768, and keeps a layer's output of one size at others. The released models scale
    the projections into the residual stream by 1/sqrt(number of such projections).
    """
    # One for each weight: a Keras initialiser that is used twice gives the same numbers twice.
    return keras.initializers.RandomNormal(stddev=0.02 * math.sqrt(768 / n_embd / projections))


class Block(keras.layers.Layer):  # type: ignore[misc]
    """One transformer block: attention and a feed-forward layer, each after a layer norm and with a residual add."""

    def __init__(self, geometry: Geometry, index: int, resid_pdrop: float, **options: Any) -> None:
        super().__init__(**options)
        self.index = index
        width = geometry.n_embd
        projections = 2 * geometry.n_layer
        epsilon = geometry.layer_norm_epsilon
        self.ln_1 = keras.layers.LayerNormalization(epsilon=epsilon, name="ln_1")
        self.c_attn = keras.layers.Dense(3 * width, kernel_initializer=initial_normal(width), name="attn_c_attn")
        self.attn_c_proj = keras.layers.Dense(
            width, kernel_initializer=initial_normal(width, projections), name="attn_c_proj"
        )
        self.ln_2 = keras.layers.LayerNormalization(epsilon=epsilon, name="ln_2")
        self.c_fc = keras.layers.Dense(geometry.n_inner, kernel_initializer=initial_normal(width), name="mlp_c_fc")
        self.mlp_c_proj = keras.layers.Dense(
            width, kernel_initializer=initial_normal(width, projections), name="mlp_c_proj"
        )
        self.dropout = keras.layers.Dropout(resid_pdrop, name="dropout")
        self.width, self.n_inner = width, geometry.n_inner

    def build(self, input_shape: Any) -> None:
        hidden = (None, None, self.width)
        for layer in (self.ln_1, self.c_attn, self.attn_c_proj, self.ln_2, self.c_fc):
            layer.build(hidden)
        self.mlp_c_proj.build((None, None, self.n_inner))
        self.built = True

    @property
    def matrices(self) -> dict[str, Any]:
        """The Dense layers by their names in a Hugging Face checkpoint."""
        return {
            "attn.c_attn": self.c_attn,
            "attn.c_proj": self.attn_c_proj,
            "mlp.c_fc": self.c_fc,
            "mlp.c_proj": self.mlp_c_proj,
        }

    def call(self, hidden: Any, kernels: Kernels, training: bool = False) -> Any:
        qkv = kernels.dense(self.c_attn, kernels.layer_norm(self.ln_1, hidden))
        context = kernels.wanted(self.index, kernels.attention(self.index, qkv, training))
        attended = kernels.dense(self.attn_c_proj, context)
        hidden = kernels.wanted(self.index, hidden) + self.dropout(attended, training=training)
        inner = kernels.activate(kernels.dense(self.c_fc, kernels.layer_norm(self.ln_2, hidden)))
        return hidden + self.dropout(kernels.dense(self.mlp_c_proj, inner), training=training)


class GPT2(keras.Model):  # type: ignore[misc]
    """GPT-2 as a language model: token ids [batch, sequence] int32 to logits [batch, sequence, vocab_size].

    Args:
        geometry: sizes and activation.
        embd_pdrop, attn_pdrop, resid_pdrop: dropout rates in [0, 1), active only with `training=True`.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        embd_pdrop: float = 0.0,
        attn_pdrop: float = 0.0,
        resid_pdrop: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.geometry = geometry
        width = geometry.n_embd
        self.wte = keras.layers.Embedding(
            geometry.vocab_size, width, embeddings_initializer=initial_normal(width), name="wte"
        )
        self.wpe = keras.layers.Embedding(
            geometry.n_positions, width, embeddings_initializer=initial_normal(width), name="wpe"
        )
        self.dropout = keras.layers.Dropout(embd_pdrop, name="embedding_dropout")
        self.blocks = [Block(geometry, index, resid_pdrop, name=f"h_{index}") for index in range(geometry.n_layer)]
        self.ln_f = keras.layers.LayerNormalization(epsilon=geometry.layer_norm_epsilon, name="ln_f")
        self.plain = Kernels(geometry.n_head, attn_pdrop, geometry.activation_function)

    @classmethod
    def create(cls, geometry: Geometry, **options: Any) -> Self:
        """Return a model with its weights made, from the global Keras seed."""
        model = cls(geometry, **options)
        model.build()
        return model

    def build(self, input_shape: Any = None) -> None:
        hidden = (None, None, self.geometry.n_embd)
        self.wte.build((None, None))
        self.wpe.build((None, None))
        for block in self.blocks:
            block.build(hidden)
        self.ln_f.build(hidden)
        self.built = True

    def call(
        self, token_ids: Any, position_ids: Any = None, kernels: Kernels | None = None, training: bool = False
    ) -> Any:
        """Return logits [batch, sequence, vocab_size], or what `kernels.lm_head` makes of the last hidden states.

        Args:
            token_ids: [batch, sequence] integers in [0, vocab_size).
            position_ids: [batch, sequence] integers in [0, n_positions); counted from 0 when None.
            kernels: how this target computes attention, norms, GELU and the head; plain Keras ops when None.
            training: whether dropouts are active.
        """
        kernels = kernels or self.plain
        if position_ids is None:
            position_ids = ops.arange(ops.shape(token_ids)[1], dtype="int32")[None, :]
        hidden = kernels.embed(self.wte, token_ids) + kernels.embed(self.wpe, position_ids)
        hidden = self.dropout(hidden, training=training)
        for block in self.blocks:
            hidden = block(hidden, kernels=kernels, training=training)
        return kernels.lm_head(kernels.layer_norm(self.ln_f, hidden), self.wte.embeddings)


def named_variables(model: GPT2) -> list[tuple[str, Any]]:
    """Every weight with its name in a Hugging Face GPT-2 checkpoint, in that checkpoint's layer order.

    Shapes agree without a transpose: Hugging Face's GPT-2 keeps its Conv1D weights as [input, output], as Dense does.
    """
    named = [
        ("transformer.wte.weight", model.wte.embeddings),
        ("transformer.wpe.weight", model.wpe.embeddings),
    ]
    for block in model.blocks:
        prefix = f"transformer.h.{block.index}."
        layers = {
            "ln_1": block.ln_1,
            "attn.c_attn": block.c_attn,
            "attn.c_proj": block.attn_c_proj,
            "ln_2": block.ln_2,
            "mlp.c_fc": block.c_fc,
            "mlp.c_proj": block.mlp_c_proj,
        }
        for name, layer in layers.items():
            norm = isinstance(layer, keras.layers.LayerNormalization)
            named.append((f"{prefix}{name}.weight", layer.gamma if norm else layer.kernel))
            named.append((f"{prefix}{name}.bias", layer.beta if norm else layer.bias))
    named.append(("transformer.ln_f.weight", model.ln_f.gamma))
    named.append(("transformer.ln_f.bias", model.ln_f.beta))
    return named


def stored_variables(model: GPT2) -> list[tuple[str, Any]]:
    """What training must keep of the weights: `named_variables`, with a LoRA layer's three matrices told apart.

    A kernel with adapters reads as the merged matrix, which is what an export wants and cannot be assigned.
    """
    layers = [layer for block in model.blocks for layer in block.matrices.values()]
    adapted = [layer for layer in layers if layer.lora_enabled]
    if not adapted:
        return named_variables(model)
    for layer in adapted:
        layer.lora_enabled = False
    try:
        named = named_variables(model)
    finally:
        for layer in adapted:
            layer.lora_enabled = True
    for layer in adapted:
        named.append((f"lora.{layer.path}.a", layer.lora_kernel_a))
        named.append((f"lora.{layer.path}.b", layer.lora_kernel_b))
    return named


def random_states(model: GPT2) -> list[Any]:
    """The state of every dropout's random numbers, in the order of the model; none where no rate is above 0."""
    dropouts = [model.dropout, *(block.dropout for block in model.blocks), model.plain.attn_dropout]
    return [dropout.seed_generator.state for dropout in dropouts if dropout is not None and dropout.rate > 0]
