"""Whatever arrives, in whatever order: every continuation is what it is alone, and every slot comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.api import GenerationRequest
from serving.sampling import SamplingParams
from tests.serving.engine.harness import EOS, Heard, Stepped, wanted

PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.7, 20.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.7]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((EOS, 20.0),), ((7, 3.0), (EOS, 2.0))]),
    seed=st.integers(0, 2**63 - 1),
    stop=st.sampled_from([(), ("a", "zz"), ("\x07", "!")]),
    stop_token_ids=st.sampled_from([(), (5, 90, 171)]),
    min_tokens=st.sampled_from([0, 0, 6]),
    ignore_eos=st.booleans(),
)
STARTS = [list(range(40, 40 + 8 * size)) for size in (0, 1, 2, 4)]
PROMPTS = st.builds(
    lambda start, rest: start + rest,
    st.sampled_from(STARTS),
    st.lists(st.integers(0, 255), min_size=1, max_size=20),
)
REQUESTS = st.builds(
    lambda prompt, params, **fields: GenerationRequest(tuple(prompt), params, **fields),
    PROMPTS,
    PARAMS,
    n=st.sampled_from([1, 1, 1, 2, 4]),
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([None, None, None, 2]),
    timeout=st.sampled_from([None, None, 9.0, 40.0]),
)
ACTIONS = st.lists(
    st.one_of(REQUESTS, st.integers(1, 6), st.tuples(st.just("cancel"), st.integers(0, 9))), min_size=1, max_size=25
)


@given(ACTIONS, st.booleans(), st.sampled_from([2, 8, None]), st.sampled_from([8, 64]))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_everybody_gets_what_they_would_get_alone(
    actions: list[Any], copies: bool, chunk: int | None, budget: int
) -> None:
    engine = Stepped(slots=4, chunk=chunk, copies=copies, max_num_batched_tokens=budget)
    requests: list[tuple[Heard, Any]] = []
    cancelled = set()
    for action in actions:
        if isinstance(action, GenerationRequest):
            heard = Heard(replace(action, request_id=f"{len(requests):03}"))
            requests.append((heard, engine.engine.submit(heard.request, heard)))
        elif isinstance(action, int):
            for _ in range(action):
                engine.now += 1
                engine.engine.step()
        elif requests:
            heard, handle = requests[action[1] % len(requests)]
            cancelled.add(id(heard))
            ended = dict(heard.ends)
            handle.cancel()
            engine.engine.step()
            assert heard.done
            assert all(end.reason == "cancelled" for index, end in heard.ends.items() if index not in ended)
    engine.run()
    engine.check_idle()
    for heard, _ in requests:
        assert heard.done
        for index in range(heard.request.n):
            check(heard, index, id(heard) in cancelled)
    records = sorted(engine.observed.finished, key=lambda record: record.request_id)
    assert [record.request_id for record in records] == [heard.request.request_id for heard, _ in requests]
    started = [record.scheduled for record in records if record.scheduled is not None]
    assert started == sorted(started), "not first come, first served"


def check(heard: Heard, index: int, may_be_cancelled: bool) -> None:
    ids, text, reason = wanted(heard.request, index)
    end = heard.ends[index]
    if end.reason == "cancelled":
        assert may_be_cancelled
    if end.reason == "timeout":
        assert heard.request.timeout is not None
    if end.reason in ("cancelled", "timeout"):
        assert heard.ids(index) == ids[: len(heard.ids(index))]
        return
    assert (heard.ids(index), heard.text(index), end.reason) == (ids, text, reason)
    stopped_by = end.stopped_by
    if reason == "stop":
        assert stopped_by == ids[-1] or stopped_by in heard.request.params.stop
    else:
        assert stopped_by is None
    logprobs = heard.request.logprobs
    for event in heard.tokens[index]:
        assert (event.logprobs is None) == (logprobs is None)
        assert event.logprobs is None or len(event.logprobs.top) == logprobs
    assert heard.prompt is not None
    if heard.request.prompt_logprobs is not None:
        assert heard.prompt.logprobs is not None and len(heard.prompt.logprobs) == len(heard.request.prompt)
