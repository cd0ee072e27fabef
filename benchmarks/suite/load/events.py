"""What a client saw of one request: timestamps on one monotonic clock, in seconds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """One request as its client saw it. Timestamps are seconds of one monotonic clock.

    `scheduled` is when the schedule wanted it sent; `sent` when it was. `started` is when the target began to work on
    it, None where the client cannot know. `token_times` has an entry for every output token, in order: tokens that
    arrive together share a timestamp. `counted` is False where the target does not say how many tokens an arrival held.
    `tokens` are the output's ids where the target gives them; `text` is the output as text where it is known.
    """

    index: int
    scheduled: float
    sent: float
    finished: float
    token_times: tuple[float, ...]
    prompt_tokens: int
    started: float | None = None
    streamed: bool = True
    counted: bool = True
    tokens: tuple[int, ...] | None = None
    text: str | None = None
    error: str | None = None


def outputs_hash(responses: Iterable[Response]) -> str | None:
    """One SHA-256 over those of all outputs in the order of their indexes, or None if one is not known.

    An output's is that of its token ids (decimal, comma-separated), or of its text where ids are not known.
    """
    hashes = []
    for response in sorted(responses, key=lambda response: response.index):
        if response.error is not None or (response.tokens is None and response.text is None):
            return None
        text = str(response.text) if response.tokens is None else ",".join(map(str, response.tokens))
        hashes.append(hashlib.sha256(text.encode("utf-8", "replace")).hexdigest())
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest() if hashes else None


def differing(left: Sequence[Response], right: Sequence[Response]) -> list[int]:
    """Indexes of the requests that both answered, with other outputs.

    Token ids are compared where both have them, else texts; requests of which neither is known to both are not told
    apart. A text's last character may be half there, so a replacement character at its end is not looked at.
    """
    others = {response.index: response for response in right}
    pairs = [(each, others[each.index]) for each in left if each.index in others]
    return sorted({one.index for one, other in pairs if _differ(one, other)})


def _differ(left: Response, right: Response) -> bool:
    if left.error is not None or right.error is not None:
        return False
    if left.tokens is not None and right.tokens is not None:
        return left.tokens != right.tokens
    if left.text is None or right.text is None:
        return False
    return left.text.rstrip("\ufffd") != right.text.rstrip("\ufffd")
