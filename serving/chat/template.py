"""A bundle's chat template: read from its files, and rendered by processes that are kept warm."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from serving.bundle import Bundle
from serving.bundle.model_settings import chat_template_source, end_ids, settings
from serving.chat.process import RendererBusyError, TemplateError, TemplateProcess

__all__ = ["ChatTemplate", "Message", "RendererBusyError", "TemplateError", "chat_template"]

Message = dict[str, Any]
"""`role`, `content` (a text or a list of texts) and what else the template may read."""
PROCESSES = 2
"""For one template: one slow rendering does not hold the others."""
MAX_INPUT = 1 << 20
"""Characters of the messages of one call."""
_PROBE = "\ue000answer\ue001"


class ChatTemplate:
    """One template with a model's special tokens. Its methods may be called from any thread, and wait.

    Whoever must not wait calls them in `threads`, which are as many as there are processes.
    """

    def __init__(self, source: str, special: Mapping[str, str], end_ids: Sequence[int] = ()) -> None:
        """`special` are the special tokens by their role, such as eos_token; `end_ids` end a text besides."""
        self._source, self._special, self._end_ids = source, special, tuple(end_ids)
        self._idle: list[TemplateProcess] = []
        self._lock = threading.Lock()
        self._broken: str | None = None
        self._closed = False
        self.threads = ThreadPoolExecutor(PROCESSES, thread_name_prefix="chat")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of `messages`, as transformers' `apply_chat_template` renders it.

        `variables` are further values for the template. Raises TemplateError, RendererBusyError, RuntimeMissingError.
        """
        size = sum(len(str(value)) for message in messages for value in message.values())
        if size > MAX_INPUT:
            raise TemplateError(f"the messages have {size} characters; at most {MAX_INPUT} are rendered")
        job = {
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "kwargs": dict(variables or {}),
        }
        process = self._take()
        try:
            text: str = process.ask(job)
            return text
        finally:
            self._give_back(process)

    def end_token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end an answer: those of the bundle's settings, and the one that the template puts there."""
        turn = self._end_of_turn
        added = tokenizer.get_added_tokens_decoder().items()
        found = [(len(token.content), id) for id, token in added if token.special and turn.startswith(token.content)]
        return tuple(dict.fromkeys([*self._end_ids, *(id for _, id in sorted(found)[-1:])]))

    @cached_property
    def _end_of_turn(self) -> str:
        """What the template writes behind an answer."""
        chat: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self.render(chat, add_generation_prompt=False)
        except TemplateError:
            return ""
        return text.rpartition(_PROBE)[2].lstrip()

    def _take(self) -> TemplateProcess:
        with self._lock:
            if self._broken is not None:
                raise TemplateError(self._broken)
            if self._idle:
                return self._idle.pop()
        try:
            return TemplateProcess(self._source, self._special)
        except TemplateError as error:  # It would not compile another time either.
            self._broken = str(error)
            raise

    def _give_back(self, process: TemplateProcess) -> None:
        with self._lock:
            if process.alive and not self._closed:
                self._idle.append(process)
                return
        process.close()

    def close(self) -> None:
        """End the processes; may be called more than once."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()
        self.threads.shutdown(wait=False, cancel_futures=True)


def chat_template(bundle: Bundle) -> ChatTemplate | None:
    """The chat template of `bundle`, None where it has none.

    Raises BundleError for files that are not what they say.
    """
    source = chat_template_source(bundle)
    if source is None:
        return None
    special = _special_tokens(
        {**settings(bundle, "special_tokens_map.json"), **settings(bundle, "tokenizer_config.json")}
    )
    return ChatTemplate(source, special, end_ids(bundle))


def _special_tokens(table: Mapping[str, Any]) -> dict[str, str]:
    """Every role's token, such as eos_token, which the files write as text or as an object with its text."""
    found = {}
    for role, token in table.items():
        text = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(text, str):
            found[role] = text
    return found
