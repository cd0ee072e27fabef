"""Weight matrices stored in parts, for servers that run several ops at once with one thread each.

A step of few rows is bound by reading weights, and one product on two threads reads them more slowly than two
products on one thread each (docs/decisions.md). Every element is the same sum as before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from builder.frameworks import tf
from builder.gpt2 import GPT2


class SplitWeights(tf.Module):  # type: ignore[misc]
    """The Dense layers' weights and the token table of `model`, each in `parts` variables of its own."""

    def __init__(self, model: GPT2, parts: int) -> None:
        super().__init__(name="split")
        layers = [layer for block in model.blocks for layer in block.matrices.values()]
        self.kernels = [_parts(layer.kernel, parts, 1) for layer in layers]
        self.biases = [_parts(layer.bias, parts, 0) for layer in layers]
        self.table = _parts(model.wte.embeddings, parts, 0)
        # Variables by the layer; the layers themselves must not be tracked, or their weights are stored again.
        self._place = {id(layer): number for number, layer in enumerate(layers)}
        self._wte = id(model.wte)
        self.replaced = {id(weight) for layer in layers for weight in (layer.kernel, layer.bias)}
        self.replaced.add(id(model.wte.embeddings))

    def dense(self, layer: Any, hidden: Any) -> Any:
        """The layer's output, [rows, units]."""
        place = self._place[id(layer)]
        pairs = zip(self.kernels[place], self.biases[place], strict=True)
        return tf.concat([tf.nn.bias_add(tf.matmul(hidden, kernel), bias) for kernel, bias in pairs], 1)

    def holds(self, layer: Any) -> bool:
        """Whether `layer` is the token table."""
        return id(layer) == self._wte

    def embed(self, ids: Any) -> Any:
        """Rows of the token table for `ids` of any shape, each read from the part that has it."""
        first, found = 0, None
        for part in self.table:
            size = part.shape[0]
            # Read first: a ResourceGather would make every later read of the variable a copy.
            rows = tf.gather(tf.convert_to_tensor(part), tf.clip_by_value(ids - first, 0, size - 1))
            found = rows if found is None else tf.where((ids >= first)[..., None], rows, found)
            first += size
        return found

    def project(self, hidden: Any) -> Any:
        """Logits [rows, vocab_size]."""
        return tf.concat([tf.matmul(hidden, part, transpose_b=True) for part in self.table], 1)


def _parts(weight: Any, parts: int, axis: int) -> list[Any]:
    return [tf.Variable(part, trainable=False) for part in np.array_split(np.asarray(weight), parts, axis)]
