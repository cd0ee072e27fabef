"""The SavedModel: signatures that stock TensorFlow Serving serves, over one set of weights.

serving_default  generate: token ids in, generated ids out, the loop inside the graph.
prefill, decode  a prompt's logits and its cache out; then one token and the cache in, logits and the cache out.
score            log-probability of each token of a text.
generate_text    text in, text out; with tokenize and detokenize, where the graph can do the tokenizer's work.
prefill_slots    streaming and continuous batching; with decode_slots and release_slots, in builder/tf_export/slots.py.

Every input and output has the batch as its first axis, so that TensorFlow Serving may merge and split requests.
Sequences are right-padded; `lengths` says where each row ends. A request that breaks a bound fails with
INVALID_ARGUMENT and a sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.keras_backend import tf
from builder.model.gpt2 import GPT2
from builder.tf_export.generation_loop import generation_loop
from builder.tf_export.graph_tokenizer import GraphTokenizer
from builder.tf_export.input_checks import (
    after,
    check_all,
    check_ids,
    check_parameters,
    check_prompt,
    check_ranks,
    check_rows,
    parameter_ranks,
)
from builder.tf_export.kernels import PromptKernels, StepKernels
from builder.tf_export.slots import Slots
from builder.tf_export.text_signatures import TextSignatures
from builder.tf_export.weight_layout import ServedWeights


def _function(method: Any) -> Any:
    return tf.function(method, autograph=False)


def _row(dtype: Any, name: str) -> Any:
    return tf.TensorSpec([None], dtype, name=name)


_TOKENS = tf.TensorSpec([None, None], tf.int32, name="token_ids")
_LENGTHS = _row(tf.int32, "lengths")
_TEXT = _row(tf.string, "text")
_PARAMETERS = (
    _row(tf.int32, "max_new_tokens"),
    _row(tf.float32, "temperature"),
    _row(tf.int32, "top_k"),
    _row(tf.float32, "top_p"),
    _row(tf.int64, "seed"),
)


class Servable(tf.Module):  # type: ignore[misc]
    """The signatures of one model; `save` writes them."""

    def __init__(
        self,
        model: GPT2,
        tokenizer: GraphTokenizer | None = None,
        *,
        slots: int = 0,
        slot_lease: float = 60.0,
        matmul_parts: int = 1,
    ) -> None:
        """Without a tokenizer there are no signatures for text, and without slots none for them.

        With `matmul_parts` above 1 weight matrices are stored and multiplied in that many parts.
        """
        super().__init__(name="gpt2")
        # The method and not the model, which would be tracked and its weights stored a second time.
        self._forward = model.__call__
        # TensorFlow's own variables: it restores Keras's wrappers of them only in Python, not through a Session.
        self.served = ServedWeights(model, matmul_parts)
        replaced = self.served.replaced
        self.weights = [variable.value for variable in model.trainable_variables if id(variable) not in replaced]
        self.geometry = model.geometry
        queue = f"slots_{self.served.digest():08x}"
        self.slots = Slots(self.geometry, self._run, slots, slot_lease, queue) if slots else None
        self.text = None if tokenizer is None else TextSignatures(tokenizer, self.geometry, self._continue)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the SavedModel to `folder` (a TensorFlow Serving version folder); return its concrete functions."""
        signatures = {
            "serving_default": _function(self.generate).get_concrete_function(_TOKENS, _LENGTHS, *_PARAMETERS),
            "prefill": _function(self.prefill).get_concrete_function(_TOKENS, _LENGTHS, _row(tf.int32, "capacity")),
            "decode": _function(self.decode).get_concrete_function(
                _row(tf.int32, "token_ids"),
                _LENGTHS,
                **{
                    name: tf.TensorSpec(
                        [None, self.geometry.n_head, None, self.geometry.head_dim], tf.float32, name=name
                    )
                    for name in self.cache_names()
                },
            ),
            "score": _function(self.score).get_concrete_function(_TOKENS, _LENGTHS),
        }
        if self.text is not None:
            signatures["generate_text"] = _function(self.text.generate).get_concrete_function(_TEXT, *_PARAMETERS)
            signatures["tokenize"] = _function(self.text.tokenize).get_concrete_function(_TEXT)
            signatures["detokenize"] = _function(self.text.detokenize).get_concrete_function(_TOKENS, _LENGTHS)
        if self.slots is not None:
            slot = (_row(tf.int32, "slot"), _row(tf.int64, "generation"))
            signatures["prefill_slots"] = _function(self.slots.prefill).get_concrete_function(
                _row(tf.int64, "request_id"), _TOKENS, _LENGTHS, *_PARAMETERS
            )
            signatures["decode_slots"] = _function(self.slots.decode).get_concrete_function(
                *slot, _row(tf.int32, "received"), _row(tf.int32, "steps")
            )
            signatures["release_slots"] = _function(self.slots.release).get_concrete_function(*slot)
            signatures["cancel_slots"] = _function(self.slots.cancel).get_concrete_function(
                _row(tf.int64, "request_id")
            )
        tf.saved_model.save(self, str(folder), signatures=signatures)
        return signatures

    def cache_names(self) -> list[str]:
        """Names of the cache tensors in `prefill`'s outputs and in `decode`'s inputs and outputs."""
        return [f"cache_{layer}_{part}" for layer in range(self.geometry.n_layer) for part in ("key", "value")]

    def generate(self, token_ids: Any, lengths: Any, *parameters: Any) -> dict[str, Any]:
        """Continue each row; return `token_ids` [batch, longest] int32 and `lengths` [batch] int32.

        A row ends after its end token (which is counted), after `max_new_tokens`, or where the context is full. After
        its length, the row is filled with the end token. `parameters` are `input_checks.PARAMETERS`, each [batch].
        """
        token_ids, lengths, *given = check_ranks(
            token_ids=(token_ids, 2), lengths=(lengths, 1), **parameter_ranks(*parameters)
        )
        checks = [
            *check_prompt(self.geometry, token_ids, lengths),
            *check_parameters("token_ids", token_ids, *given),
        ]
        token_ids, lengths, *given = after(checks, token_ids, lengths, *given)
        return self._continue(token_ids, lengths, *given)

    def _continue(self, token_ids: Any, lengths: Any, max_new_tokens: Any, *sampling: Any) -> dict[str, Any]:
        """The same of rows that have been checked."""
        if self.slots is not None:
            return self.slots.generate(token_ids, lengths, max_new_tokens, *sampling)
        return generation_loop(self.geometry, self._run, token_ids, lengths, max_new_tokens, tuple(sampling))

    def prefill(self, token_ids: Any, lengths: Any, capacity: Any) -> dict[str, Any]:
        """Run a prompt; return `logits` [batch, vocab_size] after each row's last token, and the cache.

        The cache tensors are [batch, n_head, length, head_dim], zero after the prompt; their length is the largest
        of `capacity` [batch], which must be at least the padded prompt's and at most n_positions.
        """
        token_ids, lengths, capacity = check_ranks(
            token_ids=(token_ids, 2), lengths=(lengths, 1), capacity=(capacity, 1)
        )
        width, limit = tf.shape(token_ids)[1], self.geometry.n_positions
        checks = [
            *check_prompt(self.geometry, token_ids, lengths),
            *check_rows("token_ids", token_ids, capacity=capacity),
            check_all(
                (tf.reduce_max(capacity) >= width) | (tf.size(capacity) == 0), "capacity must hold the padded prompt"
            ),
            check_all(capacity <= limit, f"capacity must be at most {limit}"),
        ]
        token_ids, lengths, capacity = after(checks, token_ids, lengths, capacity)
        kernels = PromptKernels(self.geometry, lengths, last=True)
        logits = self._run(token_ids, None, kernels)
        room = tf.maximum(tf.reduce_max(capacity), width) - width
        padded = [tf.pad(tensor, [[0, 0], [0, 0], [0, room], [0, 0]]) for pair in kernels.present for tensor in pair]
        return {"logits": logits, **dict(zip(self.cache_names(), padded, strict=True))}

    def decode(self, token_ids: Any, lengths: Any, **cache: Any) -> dict[str, Any]:
        """Append one token a row to the cache; return `logits` [batch, vocab_size] and the cache.

        `lengths` [batch] counts the tokens that the cache holds; the new one is written there.
        """
        names = self.cache_names()
        token_ids, lengths, *tensors = check_ranks(
            token_ids=(token_ids, 1), lengths=(lengths, 1), **{name: (cache[name], 4) for name in names}
        )
        cache = dict(zip(names, tensors, strict=True))
        shape, capacity = tf.shape(tensors[0]), tf.shape(tensors[0])[2]
        checks = [
            check_ids(token_ids, self.geometry.vocab_size),
            *check_rows("token_ids", token_ids, lengths=lengths, **cache),
            *[check_all(tf.shape(each) == shape, "the cache tensors must have one shape") for each in tensors[1:]],
            check_all(lengths >= 0, "lengths must be 0 or more"),
            check_all(lengths < capacity, "the cache is full; prefill with a larger capacity"),
            check_all(lengths < self.geometry.n_positions, "the context is full"),
        ]
        token_ids, lengths, *tensors = after(checks, token_ids, lengths, *tensors)
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        kernels = StepKernels(self.geometry, lengths, pairs)
        logits = self._run(token_ids[:, None], lengths[:, None], kernels)
        present = [tensor for pair in kernels.present for tensor in pair]
        return {"logits": logits, **dict(zip(names, present, strict=True))}

    def score(self, token_ids: Any, lengths: Any) -> dict[str, Any]:
        """Log-probability (nats) of each token given those before it.

        Returns `log_probs` [batch, sequence] float32, 0 for a row's first token and for padding, and `total` [batch].
        """
        token_ids, lengths = check_ranks(token_ids=(token_ids, 2), lengths=(lengths, 1))
        token_ids, lengths = after(check_prompt(self.geometry, token_ids, lengths), token_ids, lengths)
        kernels = PromptKernels(self.geometry, lengths, last=False)
        logits = self._run(token_ids, None, kernels)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(token_ids[:, 1:], logits[:, :-1])
        inside = tf.range(1, tf.shape(token_ids)[1])[None, :] < lengths[:, None]
        log_probs = tf.pad(tf.where(inside, -losses, 0.0), [[0, 0], [1, 0]])
        return {"log_probs": log_probs, "total": tf.reduce_sum(log_probs, axis=-1)}

    def _run(self, token_ids: Any, position_ids: Any, kernels: Any) -> Any:
        kernels.weights = self.served
        if position_ids is None:
            position_ids = tf.broadcast_to(tf.range(tf.shape(token_ids)[1])[None, :], tf.shape(token_ids))
        return self._forward(token_ids, position_ids=position_ids, kernels=kernels)
