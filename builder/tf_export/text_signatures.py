"""The SavedModel's signatures for text: the graph tokenizer before and after generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from builder.keras_backend import tf
from builder.tf_export.graph_tokenizer import GraphTokenizer
from builder.tf_export.input_checks import (
    after,
    check_all,
    check_ids,
    check_parameters,
    check_ranks,
    check_rows,
    parameter_ranks,
)
from serving.bundle import Geometry


class TextSignatures(tf.Module):  # type: ignore[misc]
    """`generate_text`, `tokenize` and `detokenize` over one tokenizer and the generation of checked tokens."""

    def __init__(self, tokenizer: GraphTokenizer, geometry: Geometry, continue_rows: Callable[..., Any]) -> None:
        super().__init__(name="text")
        self.tokenizer = tokenizer
        self._geometry, self._continue = geometry, continue_rows

    def generate(self, text: Any, *parameters: Any) -> Any:
        """Continue each text; the parameters and the tokens are those of `serving_default`.

        Returns, all [batch]: `text`, the continuation without the end token, always valid UTF-8; `lengths` and
        `prompt_tokens` int32, the tokens made (the end token counted) and read; `finish_reason`, "stop" after the end
        token, else "length". Refuses an empty text and one of more tokens than the context.
        """
        geometry, limit = self._geometry, self._geometry.n_positions
        too_long = f"the prompt is longer than the context of {limit} tokens"
        end = self.tokenizer.added_text(geometry.eos_token_id)
        empty = "text may not be empty" + (f"; {end} alone starts a new text" if end else "")
        text, *given = check_ranks(text=(text, 1), **parameter_ranks(*parameters))
        checks = [
            *check_parameters("text", text, *given),
            check_all(tf.strings.length(text) > 0, empty),
            # So that the work of encoding is bounded too: no text of more bytes can have few enough tokens.
            check_all(tf.strings.length(text) <= limit * self.tokenizer.longest, too_long),
        ]
        text, *given = after(checks, text, *given)
        prompt = self._tokens(text)
        longest = tf.reduce_max(prompt["lengths"])
        fits = tf.debugging.Assert(longest <= limit, [f"{too_long}; the longest one has", longest])
        token_ids, lengths = after([fits], prompt["token_ids"], prompt["lengths"])
        made = self._continue(token_ids, lengths, *given)

        # A row without a token has no last one: it is taken from a column of -1 that is put before the first.
        padded = tf.pad(made["token_ids"], [[0, 0], [1, 0]], constant_values=-1)
        stopped = tf.gather(padded, made["lengths"], batch_dims=1) == geometry.eos_token_id
        return {
            "text": self.tokenizer.decode(made["token_ids"], made["lengths"]),
            "lengths": made["lengths"],
            "prompt_tokens": lengths,
            "finish_reason": tf.where(stopped, "stop", "length"),
        }

    def tokenize(self, text: Any) -> dict[str, Any]:
        """Return `token_ids` [batch, longest] int32, padded with the end token, and `lengths` [batch]."""
        (text,) = check_ranks(text=(text, 1))
        return self._tokens(text)

    def _tokens(self, text: Any) -> dict[str, Any]:
        rows = self.tokenizer.encode(text)
        return {
            "token_ids": rows.to_tensor(default_value=self._geometry.eos_token_id),
            "lengths": tf.cast(rows.row_lengths(), tf.int32),
        }

    def detokenize(self, token_ids: Any, lengths: Any) -> dict[str, Any]:
        """Return `text` [batch] of each row's first `lengths` tokens, special tokens skipped."""
        token_ids, lengths = check_ranks(token_ids=(token_ids, 2), lengths=(lengths, 1))
        width = tf.shape(token_ids)[1]
        checks = [
            *check_rows("token_ids", token_ids, lengths=lengths),
            check_ids(token_ids, self._geometry.vocab_size),
            check_all((lengths >= 0) & (lengths <= width), "lengths must be 0 to the width of token_ids"),
        ]
        token_ids, lengths = after(checks, token_ids, lengths)
        return {"text": self.tokenizer.decode(token_ids, lengths)}
