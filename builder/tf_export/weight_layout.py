"""How the SavedModel stores its matrices: as a step of few rows, which is bound by reading them, reads them fastest.

The token table lies transposed, for the head: oneDNN's product with a table stored by tokens takes up to twice as long
(docs/decisions/savedmodel.md). And matrices may be in parts, for servers that run several ops at once with one thread
each.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from builder.keras_backend import tf
from builder.model.gpt2 import GPT2


class ServedWeights(tf.Module):  # type: ignore[misc]
    """The token table of `model`, transposed, and its Dense layers' weights where `parts` is above 1.

    Each is `parts` variables, split by outputs, so that every output is the same sum as in an unsplit matrix.
    `replaced` has the ids of the model's own variables that they stand for.
    """

    def __init__(self, model: GPT2, parts: int) -> None:
        super().__init__(name="served")
        self.table = _parts(np.asarray(model.wte.embeddings).T, parts)
        # Known by their ids: a layer that is tracked here would have its weights stored again.
        self._wte = id(model.wte)
        self.replaced = {id(model.wte.embeddings)}
        layers = [layer for block in model.blocks for layer in block.matrices.values()] if parts > 1 else []
        self.kernels = [_parts(np.asarray(layer.kernel), parts) for layer in layers]
        self.biases = [_parts(np.asarray(layer.bias), parts) for layer in layers]
        self._place = {id(layer): number for number, layer in enumerate(layers)}
        self.replaced |= {id(weight) for layer in layers for weight in (layer.kernel, layer.bias)}

    def digest(self) -> int:
        """A number of 32 bits that tells models apart, by their token table."""
        return zlib.crc32(b"".join(part.numpy().tobytes() for part in self.table))

    def dense(self, layer: Any, hidden: Any) -> Any:
        """The layer's output, [rows, units]."""
        place = self._place.get(id(layer))
        if place is None:
            kernels, biases = [tf.convert_to_tensor(layer.kernel)], [tf.convert_to_tensor(layer.bias)]
        else:
            kernels, biases = self.kernels[place], self.biases[place]
        pairs = zip(kernels, biases, strict=True)
        return _joined([tf.nn.bias_add(tf.matmul(hidden, kernel), bias) for kernel, bias in pairs])

    def embed(self, layer: Any, ids: Any) -> Any:
        """Rows for `ids` [batch, sequence] of the token table or of another Embedding, [batch * sequence, n_embd]."""
        if id(layer) != self._wte:
            rows = tf.gather(tf.convert_to_tensor(layer.embeddings), ids)
            return tf.reshape(rows, [-1, layer.output_dim])
        ids = tf.reshape(ids, [-1])
        first, columns = 0, None
        for part in self.table:
            size = part.shape[1]
            # Read before, since a ResourceGather would make every later read of the variable a copy.
            found = tf.gather(tf.convert_to_tensor(part), tf.clip_by_value(ids - first, 0, size - 1), axis=1)
            columns = found if columns is None else tf.where(ids >= first, found, columns)
            first += size
        return tf.transpose(columns)

    def project(self, hidden: Any) -> Any:
        """[rows, n_embd] to logits [rows, vocab_size]."""
        return _joined([tf.matmul(hidden, part) for part in self.table])


def _parts(weight: Any, parts: int) -> list[Any]:
    return [tf.Variable(np.ascontiguousarray(part), trainable=False) for part in np.array_split(weight, parts, axis=-1)]


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tf.concat(parts, 1)
