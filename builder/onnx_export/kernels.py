"""GPT-2's target-dependent operations as they stand in the two ONNX graphs.

Portable: standard operators only, any padding, key-value cache by concatenation (the layout Optimum and
transformers.js read). Optimized: one GroupQueryAttention a block on a shared, fixed-length cache buffer.
"""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf
from builder.model.kernels import MASKED, Kernels
from builder.onnx_export.markers import MICROSOFT, MarkerTable
from serving.bundle import Geometry


class OnnxKernels(Kernels):
    """What both graphs share: layer norm and head as single nodes, and the lists of cache tensors."""

    domains: tuple[str, ...] = ()
    """Operator sets that the graph uses besides the standard one."""

    def __init__(
        self, geometry: Geometry, markers: MarkerTable, past: list[tuple[Any, Any]], attention_mask: Any
    ) -> None:
        super().__init__(geometry.n_head, activation=geometry.activation_function)
        self.geometry = geometry
        self.markers = markers
        self.past = past
        self.present: list[tuple[Any, Any]] = []

    @staticmethod
    def cache_head_dim(geometry: Geometry) -> int:
        """Width of a head in the graph's KV cache."""
        return geometry.head_dim

    def layer_norm(self, layer: Any, hidden: Any) -> Any:
        gamma, beta = tf.convert_to_tensor(layer.gamma), tf.convert_to_tensor(layer.beta)
        (normed,) = self.markers.emit(
            "LayerNormalization",
            [hidden, gamma, beta],
            [tf.TensorSpec(hidden.shape, hidden.dtype)],
            axis=-1,
            epsilon=float(self.geometry.layer_norm_epsilon),
        )
        return normed

    def embed(self, layer: Any, ids: Any) -> Any:
        # Without Keras's handling of negative indices, which would cost eight nodes.
        return tf.gather(tf.convert_to_tensor(layer.embeddings), ids)

    def dense(self, layer: Any, hidden: Any) -> Any:
        return tf.matmul(hidden, tf.convert_to_tensor(layer.kernel)) + tf.convert_to_tensor(layer.bias)

    def project(self, hidden: Any, wte: Any) -> Any:
        """[rows, n_embd] to logits [rows, vocab_size] by one Gemm on the embedding as it is stored.

        transB lets the runtime pack the very initializer that Gather reads, so the tied matrix is stored once and
        never transposed at run time.
        """
        (logits,) = self.markers.emit(
            "Gemm",
            [hidden, tf.convert_to_tensor(wte)],
            [tf.TensorSpec([None, self.geometry.vocab_size], hidden.dtype)],
            transB=1,
        )
        return logits


class PortableKernels(OnnxKernels):
    """Standard operators: past and new keys concatenated, visibility from the attention mask.

    Args:
        attention_mask: [batch, past + sequence] int64, 1 for tokens and 0 for padding, on whichever side.
        past: per block (key, value), each [batch, n_head, past, head_dim].
    """

    def __init__(
        self, geometry: Geometry, markers: MarkerTable, past: list[tuple[Any, Any]], attention_mask: Any
    ) -> None:
        super().__init__(geometry, markers, past, attention_mask)
        total = tf.shape(attention_mask)[1]
        past_length = tf.shape(past[0][0])[2]
        slots = tf.range(total)
        causal = slots[None, :] <= (slots[past_length:])[:, None]
        visible = tf.logical_and(causal[None, None], (attention_mask > 0)[:, None, None, :])
        self.bias: Any = tf.where(visible, 0.0, MASKED)

    def split_heads(self, qkv: Any) -> list[Any]:
        # One transpose of the whole: fewer nodes than one of each part, and there is no gradient to care for.
        shape = tf.shape(qkv)
        head_dim = qkv.shape[-1] // (3 * self.n_head)
        packed = tf.reshape(qkv, [shape[0], shape[1], 3, self.n_head, head_dim])
        heads = tf.transpose(packed, (2, 0, 3, 1, 4))
        return [heads[0], heads[1], heads[2]]

    def attention(self, layer: int, qkv: Any, training: bool) -> Any:
        query, key, value = self.split_heads(qkv)
        past_key, past_value = self.past[layer]
        key, value = tf.concat([past_key, key], 2), tf.concat([past_value, value], 2)
        self.present.append((key, value))
        scale = float(self.geometry.head_dim) ** -0.5
        scores = tf.matmul(query * scale, tf.transpose(key, (0, 1, 3, 2))) + self.bias
        return self.merge_heads(tf.matmul(tf.nn.softmax(scores), value))

    def lm_head(self, hidden: Any, wte: Any) -> Any:
        shape = tf.shape(hidden)
        logits = self.project(tf.reshape(hidden, [-1, self.geometry.n_embd]), wte)
        return tf.reshape(logits, [shape[0], shape[1], self.geometry.vocab_size])


class OptimizedKernels(OnnxKernels):
    """GroupQueryAttention on a shared buffer, FastGelu, and logits of each row's last token only.

    Right padding only. Args:
        attention_mask: [batch, total] int64; a row's sum is its length after this step.
        past: per block (key, value), each [batch, n_head, buffer, padded_head_dim].
    """

    domains = (MICROSOFT,)

    @staticmethod
    def cache_head_dim(geometry: Geometry) -> int:
        return geometry.padded_head_dim

    def __init__(
        self, geometry: Geometry, markers: MarkerTable, past: list[tuple[Any, Any]], attention_mask: Any
    ) -> None:
        super().__init__(geometry, markers, past, attention_mask)
        lengths = tf.reduce_sum(attention_mask, axis=1)
        self.last_index = tf.cast(lengths - 1, tf.int32)
        self.total = tf.cast(tf.shape(attention_mask)[1], tf.int32)

    def embed(self, layer: Any, ids: Any) -> Any:
        self.batch_and_sequence = tf.shape(ids)
        return tf.reshape(super().embed(layer, ids), [-1, self.geometry.n_embd])

    def dense(self, layer: Any, hidden: Any) -> Any:
        kernel, bias = tf.convert_to_tensor(layer.kernel), tf.convert_to_tensor(layer.bias)
        spec = tf.TensorSpec([None, bias.shape[0]], hidden.dtype)
        (result,) = self.markers.emit("Gemm", [hidden, kernel, bias], [spec])
        return result

    def attention(self, layer: int, qkv: Any, training: bool) -> Any:
        past_key, past_value = self.past[layer]
        batch, sequence = self.batch_and_sequence[0], self.batch_and_sequence[1]
        heads, width, padded = self.geometry.n_head, self.geometry.head_dim, self.geometry.padded_head_dim
        options: dict[str, Any] = {}
        if padded != width:
            # The zeros add nothing to a product of query and key, and the values' are cut off again.
            parts = tf.reshape(qkv, [batch, sequence, 3 * heads, width])
            qkv = tf.pad(parts, [[0, 0], [0, 0], [0, 0], [0, padded - width]])
            options["scale"] = float(width) ** -0.5
        qkv = tf.reshape(qkv, [batch, sequence, 3 * heads * padded])
        cache = tf.TensorSpec([None, heads, None, padded], qkv.dtype)
        context, key, value = self.markers.emit(
            "GroupQueryAttention",
            [qkv, None, None, past_key, past_value, self.last_index, self.total],
            [tf.TensorSpec([None, None, heads * padded], qkv.dtype), cache, cache],
            domain=MICROSOFT,
            num_heads=heads,
            kv_num_heads=heads,
            **options,
        )
        self.present.append((key, value))
        if padded != width:
            context = tf.reshape(context, [batch, sequence, heads, padded])[..., :width]
        return tf.reshape(context, [-1, self.geometry.n_embd])

    def wanted(self, layer: int, rows: Any) -> Any:
        """After the attention of the last block, whose keys and values are cached by then, only each row's last token.

        Nothing reads what the other tokens would become: in a prompt that is a sixteenth of all products.
        """
        if layer < self.geometry.n_layer - 1:
            return rows
        batch, sequence = self.batch_and_sequence[0], self.batch_and_sequence[1]
        # A row's newest token sits at its length minus what was cached before; with one new token that is index 0
        # whatever the row's length, hence the clip.
        newest = tf.clip_by_value(self.last_index - (self.total - sequence), 0, sequence - 1)
        rows = tf.reshape(rows, [batch, sequence, self.geometry.n_embd])
        return tf.reshape(tf.gather(rows, newest, axis=1, batch_dims=1), [-1, self.geometry.n_embd])

    def activate(self, inner: Any) -> Any:
        if self.activation == "relu":
            return tf.nn.relu(inner)
        operator = "FastGelu" if self.activation == "gelu_new" else "Gelu"
        (result,) = self.markers.emit(operator, [inner], [tf.TensorSpec(inner.shape, inner.dtype)], domain=MICROSOFT)
        return result

    def lm_head(self, hidden: Any, wte: Any) -> Any:
        return tf.expand_dims(self.project(hidden, wte), 1)
