"""GPT-2's target-dependent operations in the SavedModel: plain TensorFlow ops on caches that a step writes in.

Hidden states are kept as [rows, n_embd], so that a dense layer is one MatMul with its bias, which TensorFlow's graph
optimizer fuses. No op here needs XLA or anything that stock TensorFlow Serving does not link.
"""

from __future__ import annotations

from typing import Any

from builder.keras_backend import tf
from builder.model.kernels import MASKED, Kernels
from builder.tf_export.weight_layout import ServedWeights
from serving.bundle import Geometry

Cache = list[tuple[Any, Any]]


class ServableKernels(Kernels):
    """What every signature shares; subclasses say what attention sees.

    After the call `present` holds each block's new key and value, [batch, n_head, sequence, head_dim].
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry.n_head, activation=geometry.activation_function)
        self.geometry = geometry
        self.present: Cache = []
        # Set before the call, by whoever has them.
        self.weights: ServedWeights

    def embed(self, layer: Any, ids: Any) -> Any:
        self.batch, self.sequence = tf.shape(ids)[0], tf.shape(ids)[1]
        return self.weights.embed(layer, ids)

    def dense(self, layer: Any, hidden: Any) -> Any:
        return self.weights.dense(layer, hidden)

    def activate(self, inner: Any) -> Any:
        return tf.nn.gelu(inner, approximate=True) if self.activation == "gelu_new" else super().activate(inner)

    def layer_norm(self, layer: Any, hidden: Any) -> Any:
        mean = tf.reduce_mean(hidden, axis=-1, keepdims=True)
        centered = hidden - mean
        variance = tf.reduce_mean(tf.square(centered), axis=-1, keepdims=True)
        scale = tf.math.rsqrt(variance + self.geometry.layer_norm_epsilon)
        return centered * (scale * tf.convert_to_tensor(layer.gamma)) + tf.convert_to_tensor(layer.beta)

    def attention(self, layer: int, qkv: Any, training: bool) -> Any:
        shape = [self.batch, self.sequence, 3, self.geometry.n_head, self.geometry.head_dim]
        query, key, value = tf.unstack(tf.transpose(tf.reshape(qkv, shape), [2, 0, 3, 1, 4]), num=3)
        query = query * (float(self.geometry.head_dim) ** -0.5)
        context = self.attend_cached(layer, query, key, value)
        return tf.reshape(tf.transpose(context, [0, 2, 1, 3]), [-1, self.geometry.n_embd])

    def attend_cached(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        """Attend and record the cache; `query` is scaled already, all are [batch, n_head, sequence, head_dim]."""
        raise AssertionError("a subclass says what attention sees")


class PromptKernels(ServableKernels):
    """A whole right-padded prompt: causal attention among its own tokens.

    With `last` the head gives only each row's last token, [batch, vocab_size], else every position,
    [batch, sequence, vocab_size]. Padding sits after a row's tokens, so causality alone hides it from them.
    """

    def __init__(self, geometry: Geometry, lengths: Any, *, last: bool) -> None:
        super().__init__(geometry)
        self.lengths = lengths
        self.last = last

    def attend_cached(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        self.present.append((key, value))
        slots = tf.range(self.sequence)
        bias = tf.where(slots[:, None] >= slots[None, :], 0.0, MASKED)
        scores = tf.matmul(query, key, transpose_b=True) + bias
        return tf.matmul(tf.nn.softmax(scores), value)

    def lm_head(self, hidden: Any, wte: Any) -> Any:
        if not self.last:
            shape = [self.batch, self.sequence, self.geometry.vocab_size]
            return tf.reshape(self.weights.project(hidden), shape)
        hidden = tf.reshape(hidden, [self.batch, self.sequence, self.geometry.n_embd])
        return self.weights.project(tf.gather(hidden, self.lengths - 1, batch_dims=1))


class StepKernels(ServableKernels):
    """One new token a row on a cache of fixed length: written at index `lengths`, then attended up to it.

    Args:
        lengths: [batch] int32, tokens cached so far; the new token's position.
        cache: per block (key, value), each [batch, n_head, capacity, head_dim].
    """

    def __init__(self, geometry: Geometry, lengths: Any, cache: Cache) -> None:
        super().__init__(geometry)
        self.cache = cache
        capacity = tf.shape(cache[0][0])[2]
        slots = tf.range(capacity)[None, :]
        self.here = (slots == lengths[:, None])[:, None, :, None]
        self.bias = tf.where(slots <= lengths[:, None], 0.0, MASKED)[:, None, None, :]

    def attend_cached(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        past_key, past_value = self.cache[layer]
        key, value = tf.where(self.here, key, past_key), tf.where(self.here, value, past_value)
        self.present.append((key, value))
        return tf.matmul(tf.nn.softmax(tf.matmul(query, key, transpose_b=True) + self.bias), value)

    def lm_head(self, hidden: Any, wte: Any) -> Any:
        return self.weights.project(hidden)


class LoopKernels(ServableKernels):
    """One new token a row inside the generation loop, written in place into a cache that only the loop knows.

    Args:
        positions: [batch] int32, each row's new token's position; positions after it are never attended.
        cache: per block (key, value), each [batch * n_head * capacity, head_dim].
        capacity: scalar int32, cached positions a row.
    """

    def __init__(self, geometry: Geometry, positions: Any, cache: Cache, capacity: Any) -> None:
        super().__init__(geometry)
        self.cache, self.capacity = cache, capacity
        heads = tf.range(tf.shape(positions)[0] * geometry.n_head)
        self.places = heads * capacity + tf.repeat(positions, geometry.n_head)
        self.bias = tf.where(tf.range(capacity) <= positions[:, None], 0.0, MASKED)[:, None, None, :]

    def attention(self, layer: int, qkv: Any, training: bool) -> Any:
        heads, width = self.geometry.n_head, self.geometry.head_dim
        query, *new = tf.unstack(tf.reshape(qkv, [-1, 3, heads, 1, width]), axis=1)
        # The op changes its input where it lies: nothing reads the cache as it was before, and no copy is made.
        updated = [
            tf.raw_ops.InplaceUpdate(x=past, i=self.places, v=tf.reshape(tensor, [-1, width]))
            for past, tensor in zip(self.cache[layer], new, strict=True)
        ]
        self.present.append((updated[0], updated[1]))
        key, value = (tf.reshape(self.attended(tensor), [-1, heads, self.capacity, width]) for tensor in updated)
        scores = tf.matmul(query * (float(width) ** -0.5), key, transpose_b=True) + self.bias
        return tf.reshape(tf.matmul(tf.nn.softmax(scores), value), [-1, self.geometry.n_embd])

    def lm_head(self, hidden: Any, wte: Any) -> Any:
        return self.weights.project(hidden)

    def attended(self, cache: Any) -> Any:
        """The part of a cache tensor that belongs to the rows of this step."""
        return cache


class SlotKernels(LoopKernels):
    """The same on a cache that has room for more rows than the step: its first ones are the step's."""

    def attended(self, cache: Any) -> Any:
        # The head of a tensor is a view, not a copy.
        return cache[: tf.size(self.places) * self.capacity]
