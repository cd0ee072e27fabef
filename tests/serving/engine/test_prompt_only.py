"""Prompts that are read and scored and that nothing is added to."""

from __future__ import annotations

import numpy as np
import pytest

from serving.errors import InputError
from tests.closed_form import greedy, logits_after
from tests.serving.engine.harness import Stepped


@pytest.mark.parametrize("scored", [None, 1])
def test_a_prompt_alone_may_fill_the_context_and_adds_nothing(scored: int | None) -> None:
    engine = Stepped(slots=3)
    beside, _ = engine.submit([9, 9], max_new_tokens=70, ignore_eos=True)
    prompt = [(7 * place) % 250 for place in range(64)]
    heards = [engine.submit(prompt[:length], n=n, prompt_only=True, prompt_logprobs=scored)[0]
              for length, n in ((64, 1), (63, 1), (1, 1), (64, 2))]  # fmt: skip
    engine.run()
    engine.check_idle()
    for heard in heards:
        own = heard.request.prompt
        assert not heard.tokens and [end.reason for end in heard.ends.values()] == ["length"] * heard.request.n
        assert heard.prompt is not None and (heard.prompt.logprobs is None) == (scored is None)
        for place, found in enumerate(heard.prompt.logprobs or ()):
            if place:
                logits = logits_after(own[:place], 257).astype(np.float64)
                wanted_log = logits[own[place]] - np.log(np.exp(logits).sum())
                assert found is not None and found.own == pytest.approx(wanted_log, abs=1e-6)
    assert beside.ids() == greedy([9, 9], 62, 257), "who ran beside is not disturbed"
    assert sorted(each.generated_tokens for each in engine.observed.finished) == [0, 0, 0, 0, 62]
    with pytest.raises(InputError, match=r"65 tokens.*context of 64; shorten it to 64"):
        engine.submit([1] * 65, prompt_only=True)
    with pytest.raises(InputError, match=r"64 tokens.*shorten it to 63"):
        engine.submit([1] * 64)


@pytest.mark.parametrize("copies", [True, False])
def test_a_prompt_that_fills_its_slot_disturbs_nobody_who_decodes_above_it(copies: bool) -> None:
    """Behind it is no place for the token that a row of nobody's gets."""
    engine = Stepped(slots=3, copies=copies)
    below, handle = engine.submit([1], max_new_tokens=60, ignore_eos=True)
    above, _ = engine.submit([9, 9], max_new_tokens=62, ignore_eos=True)
    while not above.tokens:
        engine.engine.step()
    handle.cancel()
    full, _ = engine.submit([(7 * place) % 250 for place in range(64)], n=2, prompt_only=True)
    engine.run()
    assert below.done and above.ids() == greedy([9, 9], 62, 257)
    assert [end.reason for end in full.ends.values()] == ["length"] * 2
    again, _ = engine.submit([*full.request.prompt[:62], 1], max_new_tokens=1, ignore_eos=True)
    engine.run()
    assert again.prompt is not None and again.prompt.cached_tokens == 56
    assert again.ids() == greedy(list(again.request.prompt), 1, 257)
