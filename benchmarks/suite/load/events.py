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


def output_hash(response: Response) -> str | None:
    """SHA-256 of the output's token ids (decimal, comma-separated), or of its text where ids are not known."""
    if response.error is not None:
        return None
    if response.tokens is not None:
        return hashlib.sha256(",".join(map(str, response.tokens)).encode()).hexdigest()
    return None if response.text is None else hashlib.sha256(response.text.encode("utf-8", "replace")).hexdigest()


def differing(left: Sequence[Response], right: Sequence[Response]) -> list[int]:
    """Indexes of the requests that both answered, with other outputs.

    Token ids are compared where both have them, else texts; requests of which neither is known to both are not told
    apart. A text's last character may be half there, so a replacement character at its end is not looked at.
    """
    others = {response.index: response for response in right}
    return sorted(
        {each.index for each in left if each.index in others and _differ(each, others[each.index])},
    )


def _differ(left: Response, right: Response) -> bool:
    if left.error is not None or right.error is not None:
        return False
    if left.tokens is not None and right.tokens is not None:
        return left.tokens != right.tokens
    if left.text is None or right.text is None:
        return False
    return left.text.rstrip("\ufffd") != right.text.rstrip("\ufffd")


def outputs_hash(responses: Iterable[Response]) -> str | None:
    """One SHA-256 over the hashes of all outputs in the order of their indexes, or None if one is not known."""
    hashes = [output_hash(response) for response in sorted(responses, key=lambda response: response.index)]
    if not hashes or any(each is None for each in hashes):
        return None
    return hashlib.sha256("\n".join(map(str, hashes)).encode()).hexdigest()
