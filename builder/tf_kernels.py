"""GPT-2's target-dependent operations in the SavedModel: plain TensorFlow ops and caches of fixed shape.

Hidden states are kept as [rows, n_embd], so that a dense layer is one MatMul with its bias, which TensorFlow's graph
optimiser fuses. No op here needs XLA or anything that stock TensorFlow Serving does not link.
"""

from __future__ import annotations

from typing import Any

from builder.frameworks import tf
from builder.kernels import MASKED, Kernels
from serving.bundle import Geometry

Cache = list[tuple[Any, Any]]


class ServableKernels(Kernels):
    """What every signature shares; subclasses say what attention sees.

    After the call `present` holds each block's new key and value, [batch, n_head, sequence, head_dim].
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry.n_head)
        self.geometry = geometry
        self.present: Cache = []

    def embed(self, layer: Any, ids: Any) -> Any:
        self.batch, self.sequence = tf.shape(ids)[0], tf.shape(ids)[1]
        return tf.reshape(tf.gather(tf.convert_to_tensor(layer.embeddings), ids), [-1, self.geometry.n_embd])

    def dense(self, layer: Any, hidden: Any) -> Any:
        return tf.nn.bias_add(tf.matmul(hidden, tf.convert_to_tensor(layer.kernel)), tf.convert_to_tensor(layer.bias))

    def gelu(self, inner: Any) -> Any:
        return tf.nn.gelu(inner, approximate=True)

    def layer_norm(self, layer: Any, hidden: Any) -> Any:
        mean = tf.reduce_mean(hidden, axis=-1, keepdims=True)
        centred = hidden - mean
        variance = tf.reduce_mean(tf.square(centred), axis=-1, keepdims=True)
        scale = tf.math.rsqrt(variance + self.geometry.layer_norm_epsilon)
        return centred * (scale * tf.convert_to_tensor(layer.gamma)) + tf.convert_to_tensor(layer.beta)

    def attention(self, layer: int, qkv: Any, training: bool) -> Any:
        shape = [self.batch, self.sequence, 3, self.geometry.n_head, self.geometry.head_dim]
        query, key, value = tf.unstack(tf.transpose(tf.reshape(qkv, shape), [2, 0, 3, 1, 4]), num=3)
        query = query * (float(self.geometry.head_dim) ** -0.5)
        context = self.attend_cached(layer, query, key, value)
        return tf.reshape(tf.transpose(context, [0, 2, 1, 3]), [-1, self.geometry.n_embd])

    def attend_cached(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        """Attend and record the cache; `query` is scaled already, all are [batch, n_head, sequence, head_dim]."""
        raise AssertionError("a subclass says what attention sees")

    def project(self, hidden: Any, wte: Any) -> Any:
        """[rows, n_embd] to logits [rows, vocab_size] against the tied embedding."""
        return tf.matmul(hidden, tf.convert_to_tensor(wte), transpose_b=True)


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
            return tf.reshape(self.project(hidden, wte), shape)
        hidden = tf.reshape(hidden, [self.batch, self.sequence, self.geometry.n_embd])
        return self.project(tf.gather(hidden, self.lengths - 1, batch_dims=1), wte)


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
        return self.project(hidden, wte)


class LoopKernels(ServableKernels):
    """One new token a row inside the generation loop: a prefix that never changes and a block of recent tokens.

    The prompt's keys stay loop-invariant, so a step writes only into the recent block, at the same index in every
    row. Softmax runs over both parts at once.

    Args:
        prefix: per block (key, value), each [batch, n_head, prompt, head_dim].
        prefix_bias: [batch, 1, 1, prompt], 0 for a row's tokens, large negative for its padding.
        recent: per block (key, value), each [block, batch, n_head, head_dim].
        index: scalar int32, where this step writes in the block.
    """

    def __init__(self, geometry: Geometry, prefix: Cache, prefix_bias: Any, recent: Cache, index: Any) -> None:
        super().__init__(geometry)
        self.prefix, self.prefix_bias, self.recent, self.index = prefix, prefix_bias, recent, index
        block = tf.shape(recent[0][0])[0]
        self.recent_bias = tf.where(tf.range(block) <= index, 0.0, MASKED)[None, None, None, :]

    def attend_cached(self, layer: int, query: Any, key: Any, value: Any) -> Any:
        recent_key, recent_value = (
            tf.tensor_scatter_nd_update(block, [[self.index]], [new[:, :, 0, :]])
            for block, new in zip(self.recent[layer], (key, value), strict=True)
        )
        self.present.append((recent_key, recent_value))
        prefix_key, prefix_value = self.prefix[layer]
        on_prefix = tf.matmul(query, prefix_key, transpose_b=True) + self.prefix_bias
        on_recent = tf.einsum("bhqd,tbhd->bhqt", query, recent_key) + self.recent_bias
        prompt = tf.shape(prefix_key)[2]
        probabilities = tf.nn.softmax(tf.concat([on_prefix, on_recent], axis=-1))
        context = tf.matmul(probabilities[..., :prompt], prefix_value)
        return context + tf.einsum("bhqt,tbhd->bhqd", probabilities[..., prompt:], recent_value)

    def lm_head(self, hidden: Any, wte: Any) -> Any:
        return self.project(hidden, wte)
