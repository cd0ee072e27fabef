"""The model as two functions that the slots call as one op each, so that TensorFlow optimizes them.

TensorFlow optimizes a function where it is called by PartitionedCall, and not within a batch function or the body of a
While op that is not lowered. There no product was fused with its bias, a step's ran without oneDNN, and Pow computed
GELU's cube (docs/decisions/slots.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builder.keras_backend import tf
from builder.tf_export.kernels import Cache, PromptKernels, SlotKernels
from serving.bundle import Geometry


class SlotModel:
    """Prompts and steps of one model.

    Args:
        run: from (token_ids [rows, sequence], position_ids or None, kernels) to logits.
    """

    def __init__(self, geometry: Geometry, run: Callable[[Any, Any, Any], Any]) -> None:
        self.geometry, self._run = geometry, run
        self._functions: dict[str, Any] = {}

    def prefill(self, token_ids: Any, lengths: Any) -> tuple[Any, Cache]:
        """Run right-padded prompts [rows, width]; return logits [rows, vocab_size] after each row's last token.

        Also, per block, key and value [rows, n_head, width, head_dim].
        """
        specs = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]
        logits, *present = self._function("prefill", self._prefill, specs)(token_ids, lengths)
        return logits, _pairs(present)

    def decode(self, tokens: Any, positions: Any, capacity: Any, cache: Cache) -> Any:
        """Run `tokens` [rows] at `positions` [rows], written in place into `cache`; return logits [rows, vocab_size].

        `cache` is that of `SlotKernels`, `capacity` a scalar.
        """
        row, part = tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, self.geometry.head_dim], tf.float32)
        tensors = [tensor for pair in cache for tensor in pair]
        specs = [row, row, tf.TensorSpec([], tf.int32), *[part] * len(tensors)]
        return self._function("decode", self._decode, specs)(tokens, positions, capacity, *tensors)

    def _prefill(self, token_ids: Any, lengths: Any) -> list[Any]:
        kernels = PromptKernels(self.geometry, lengths, last=True)
        logits = self._run(token_ids, None, kernels)
        return [logits, *(tensor for pair in kernels.present for tensor in pair)]

    def _decode(self, tokens: Any, positions: Any, capacity: Any, *tensors: Any) -> Any:
        kernels = SlotKernels(self.geometry, positions, _pairs(tensors), capacity)
        return self._run(tokens[:, None], positions[:, None], kernels)

    def _function(self, name: str, method: Any, specs: list[Any]) -> Any:
        if name not in self._functions:
            with tf.init_scope():
                function = tf.function(
                    method, input_signature=specs, autograph=False, experimental_attributes={"_noinline": True}
                )
                self._functions[name] = function.get_concrete_function()
        return self._functions[name]


def _pairs(tensors: Any) -> Cache:
    return list(zip(tensors[::2], tensors[1::2], strict=True))
