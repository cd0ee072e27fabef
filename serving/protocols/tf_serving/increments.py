"""An answer of `serving_default` or `generate_text` in increments: what has come of each row since the last one.

Put together row by row, the increments are the whole answer: tokens and texts appended, lengths added, and the one
finish reason that is not empty.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import numpy as np

from serving.engine.api import FinishEvent, TokenEvent
from serving.protocols.tf_serving.signatures import (
    Arrays,
    Call,
    check_inputs,
    make_request,
    objects,
    padded,
    read_parameters,
    read_prompts,
)
from serving.server.errors import error_of
from serving.server.event_queue import EventQueue

STREAMED = ("serving_default", "generate_text")


@dataclass
class _Row:
    """What has come of one row since the last increment; `reason` is set once, when it ends."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""


class Increments:
    """The rows of one request under way."""

    def __init__(self, name: str, call: Call, prompts: Sequence[Sequence[int]], generation: EventQueue | None) -> None:
        """`generation` has a request for each prompt that does not fill the context; None if there is none."""
        self._name, self._call, self._prompts, self._generation = name, call, prompts, generation
        room = call.engine.n_positions
        self._places = [place for place, prompt in enumerate(prompts) if len(prompt) < room]
        self._cancelled = False
        self._rows = [_Row(reason="" if len(prompt) < room else "length") for prompt in prompts]

    async def outputs(self) -> AsyncGenerator[Arrays, None]:
        """The signature's outputs, each time for what has come; at least once. Raises the error that a row ends by."""
        if self._generation is None:
            yield self._take()
            return
        while batch := await self._generation.next():
            for index, event in batch:
                row = self._rows[self._places[index]]
                if isinstance(event, TokenEvent):
                    row.token_ids.append(event.token_id)
                    row.text += event.text
                elif isinstance(event, FinishEvent):
                    if self._cancelled and event.reason == "cancelled":
                        return
                    if (error := error_of(event)) is not None:
                        raise error
                    row.text += event.text
                    row.reason = event.reason
            if any(row.token_ids or row.text or row.reason for row in self._rows):
                yield self._take()

    def cancel(self) -> None:
        """End `outputs` within one step, without an error."""
        self._cancelled = True
        if self._generation is not None:
            self._generation.cancel()

    def close(self) -> None:
        """Free every slot within one step, if anything still runs."""
        if self._generation is not None:
            self._generation.close()

    def _take(self) -> Arrays:
        rows, self._rows = self._rows, [_Row() for _ in self._rows]
        token_ids, lengths = padded([row.token_ids for row in rows], self._call.engine.eos_token_id)
        if self._name != "generate_text":
            return {"token_ids": token_ids, "lengths": lengths}
        return {
            "text": objects([row.text.encode("utf-8") for row in rows]),
            "lengths": lengths,
            "prompt_tokens": np.array([len(prompt) for prompt in self._prompts], np.int32),
            "finish_reason": objects([row.reason.encode() for row in rows]),
        }


async def open_increments(name: str, call: Call, inputs: Arrays) -> Increments:
    """Begin the generation that `inputs` of signature `name`, one of STREAMED, ask for.

    Raises InputError for what the signature refuses, and what `Engine.submit` raises.
    """
    check_inputs(name, call, inputs)
    parameters = read_parameters(inputs)
    prompts = await read_prompts(call, inputs)
    requests = [
        make_request(call, prompt, params)
        for prompt, params in zip(prompts, parameters, strict=True)
        if len(prompt) < call.engine.n_positions
    ]
    return Increments(name, call, prompts, await EventQueue.open(call.engine, requests) if requests else None)
