"""The operations of GPT-2 that differ by target, as one interface; this file holds the plain ones.

A trace of the model passes its own subclass: static caches for the SavedModel (`builder.tf_export.kernels`), marker
nodes for ONNX (`builder.onnx_export.kernels`). Everything else in the model is the same Keras code in every target.
"""

from __future__ import annotations

import math
from typing import Any

from builder.keras_backend import keras, ops

# Finite, so that a query that may see no key at all (a padded row) gives a uniform softmax instead of not-a-number.
MASKED = -1e9


class Kernels:
    """Plain causal attention, layer norm, GELU and tied head in Keras ops: what training runs.

    Args:
        n_head: attention heads.
        attn_pdrop: dropout rate on the attention probabilities, active with `training=True`.
        activation: the feed-forward layer's function, as `Geometry.activation_function` names it.
    """

    def __init__(self, n_head: int, attn_pdrop: float = 0.0, activation: str = "gelu_new") -> None:
        self.n_head = n_head
        self.activation = activation
        self.attn_dropout = keras.layers.Dropout(attn_pdrop) if attn_pdrop else None

    def split_heads(self, qkv: Any) -> list[Any]:
        """Split [batch, sequence, 3 * n_embd] into query, key and value, each [batch, n_head, sequence, head_dim]."""
        batch, sequence = ops.shape(qkv)[0], ops.shape(qkv)[1]
        shape = (batch, sequence, self.n_head, qkv.shape[-1] // (3 * self.n_head))
        # Cut first: the gradient is then one concatenation, and not three tensors of the whole's size, mostly zeros.
        return [ops.transpose(ops.reshape(part, shape), (0, 2, 1, 3)) for part in ops.split(qkv, 3, axis=-1)]

    def merge_heads(self, context: Any) -> Any:
        """Turn [batch, n_head, sequence, head_dim] back into [batch, sequence, n_embd]."""
        batch, sequence = ops.shape(context)[0], ops.shape(context)[2]
        width = context.shape[1] * context.shape[3]
        return ops.reshape(ops.transpose(context, (0, 2, 1, 3)), (batch, sequence, width))

    def attention(self, layer: int, qkv: Any, training: bool) -> Any:
        """Causal self-attention of block `layer`: packed [batch, sequence, 3 * n_embd] to [batch, sequence, n_embd]."""
        query, key, value = self.split_heads(qkv)
        sequence = ops.shape(qkv)[1]
        positions = ops.arange(sequence)
        visible = positions[:, None] >= positions[None, :]
        return self.merge_heads(self.attend(query, key, value, visible, training))

    def attend(self, query: Any, key: Any, value: Any, visible: Any, training: bool = False) -> Any:
        """Scaled dot-product attention (Vaswani et al. 2017), softmax in float32.

        `query` is [batch, n_head, q, head_dim], `key` and `value` [batch, n_head, k, head_dim], `visible` a boolean
        mask that broadcasts to [batch, n_head, q, k]; returns [batch, n_head, q, head_dim].
        """
        scores = ops.matmul(query * (1.0 / math.sqrt(query.shape[-1])), ops.transpose(key, (0, 1, 3, 2)))
        scores = ops.cast(scores, "float32") + ops.where(visible, 0.0, MASKED)
        probabilities = ops.cast(ops.softmax(scores), value.dtype)
        if self.attn_dropout is not None:
            probabilities = self.attn_dropout(probabilities, training=training)
        return ops.matmul(probabilities, value)

    def wanted(self, layer: int, rows: Any) -> Any:
        """Those of [batch, sequence, n_embd] that block `layer` continues with after its attention: here all."""
        return rows

    def embed(self, layer: Any, ids: Any) -> Any:
        """Look up rows of a Keras Embedding: integers [batch, sequence] to [batch, sequence, n_embd]."""
        return layer(ids)

    def dense(self, layer: Any, hidden: Any) -> Any:
        """Apply a Keras Dense layer to [batch, sequence, width]."""
        return layer(hidden)

    def layer_norm(self, layer: Any, hidden: Any) -> Any:
        """Apply a Keras LayerNormalization layer to [batch, sequence, n_embd]."""
        return layer(hidden)

    def activate(self, inner: Any) -> Any:
        """Apply the activation elementwise: ReLU, GELU, or GELU in its tanh form (Hendrycks & Gimpel 2016)."""
        if self.activation == "relu":
            return ops.relu(inner)
        if self.activation == "gelu":
            # Written out: TensorFlow takes erfc for it, which ONNX has no operator for.
            return 0.5 * inner * (1.0 + ops.erf(inner * math.sqrt(0.5)))
        return ops.gelu(inner, approximate=True)

    def lm_head(self, hidden: Any, wte: Any) -> Any:
        """Logits against the tied embedding: [batch, sequence, n_embd] to float32 [batch, sequence, vocab_size]."""
        wte = ops.cast(ops.convert_to_tensor(wte), hidden.dtype)
        return ops.cast(ops.matmul(hidden, ops.transpose(wte)), "float32")
