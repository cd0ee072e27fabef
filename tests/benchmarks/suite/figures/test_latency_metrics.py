"""Metrics beside their definitions, written out the slow way, on responses that hypothesis makes up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.suite.figures import latency_metrics
from benchmarks.suite.figures.latency_metrics import Objectives
from benchmarks.suite.load.events import Response, differing, outputs_hash

timestamps = st.floats(0, 10, allow_nan=False)


@st.composite
def responses(draw, index=0):
    scheduled = draw(timestamps)
    sent = scheduled + draw(timestamps)
    started = sent + draw(timestamps)
    times = np.cumsum([started, *draw(st.lists(timestamps, max_size=12))])[1:].tolist()
    return Response(
        index=index,
        scheduled=scheduled,
        sent=sent,
        started=draw(st.sampled_from([None, started])),
        finished=(times[-1] if times else started) + draw(timestamps),
        token_times=tuple(times),
        prompt_tokens=draw(st.integers(1, 50)),
        streamed=draw(st.booleans()),
        error=draw(st.sampled_from([None, None, None, "refused"])),
    )


def response(*times, scheduled=0.0, **values):
    defaults = {"index": 0, "sent": scheduled, "finished": times[-1] if times else scheduled, "prompt_tokens": 3}
    return Response(scheduled=scheduled, token_times=times, **(defaults | values))


def brute_quantile(values, quantile):
    values = sorted(values)
    position = quantile * (len(values) - 1)
    below = int(position)
    if below == position:
        return values[below]
    return values[below] * (below + 1 - position) + values[below + 1] * (position - below)


@given(st.lists(responses(), max_size=8))
@settings(max_examples=60, deadline=None)
def test_every_figure_is_its_definition(given_responses):
    answered = [each for each in given_responses if each.error is None]
    expected = {name: [] for name in latency_metrics.LATENCIES}
    for each in answered:
        times = each.token_times
        if times:
            expected["ttft"].append(times[0] - each.scheduled)
        if each.streamed:
            for place in range(1, len(times)):
                expected["inter_token"].append(times[place] - times[place - 1])
            if len(times) > 1:
                expected["tpot"].append((times[-1] - times[0]) / (len(times) - 1))
        expected["e2e"].append(each.finished - each.scheduled)
        if each.started is not None:
            expected["queue"].append(each.started - each.scheduled)
    record = latency_metrics.summarise([given_responses], Objectives(), resamples=20)
    for name, values in expected.items():
        found = record["latency"][name]
        assert (found is None) == (not values), name
        if values:
            assert found["samples"] == len(values)
            assert found["mean"]["value"] == pytest.approx(sum(values) / len(values))
            for key, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
                assert found[key]["value"] == pytest.approx(brute_quantile(values, quantile), abs=1e-12)
                assert found[key]["low"] <= found[key]["high"]
    json.dumps(record, allow_nan=False)


@given(st.lists(responses(), min_size=1, max_size=8), timestamps, timestamps, timestamps)
@settings(max_examples=60, deadline=None)
def test_throughput_and_goodput_are_counts_over_the_span(given_responses, first, each_token, whole):
    objectives = Objectives(ttft=first, tpot=each_token, e2e=whole)
    seconds = max(each.finished for each in given_responses) - min(each.scheduled for each in given_responses)
    found = latency_metrics.throughput(given_responses, objectives)
    if not seconds:
        assert set(found.values()) == {None}
        return
    tokens = good = 0
    for each in given_responses:
        if each.error is not None:
            continue
        tokens += len(each.token_times)
        late = not each.token_times or each.token_times[0] - each.scheduled > first
        late |= each.finished - each.scheduled > whole
        if not each.streamed:
            late = True
        elif len(each.token_times) > 1:
            gaps = len(each.token_times) - 1
            late |= (each.token_times[-1] - each.token_times[0]) / gaps > each_token
        good += not late
    assert found["output_tokens_per_second"] == pytest.approx(tokens / seconds)
    assert found["goodput"] == pytest.approx(good / seconds)


def test_waiting_to_be_sent_counts():
    """A client that stalls for 5 s may not make the target look fast (coordinated omission)."""
    late = response(6.0, scheduled=0.0, sent=5.0)
    assert latency_metrics.ttft(late) == 6.0 and latency_metrics.e2e(late) == 6.0


def test_no_samples_are_null_and_one_has_no_width():
    record = latency_metrics.summarise([[]], Objectives())
    assert record["latency"] == dict.fromkeys(latency_metrics.LATENCIES)
    assert record["throughput"]["output_tokens_per_second"] is None
    one = latency_metrics.summarise([[response(2.0)]], Objectives())["latency"]["ttft"]
    assert one["p99"] == {"value": 2.0, "low": 2.0, "high": 2.0}


def test_one_token_has_no_time_behind_it_that_could_be_too_long():
    limit = Objectives(tpot=0.1)
    assert latency_metrics.is_good(response(5.0), limit) and latency_metrics.is_good(response(5.0, 5.05), limit)
    assert not latency_metrics.is_good(response(5.0, 5.2), limit) and not latency_metrics.is_good(response(), limit)
    assert not latency_metrics.is_good(response(5.0, streamed=False), limit)
    assert not latency_metrics.is_good(response(5.0, error="broke off"), limit)


def test_tokens_of_failed_responses_are_not_counted():
    record = latency_metrics.summarise([[response(1.0, 2.0), response(1.0, 2.0, 3.0, error="broke off")]], Objectives())
    assert (record["requests"], record["failed"], record["output_tokens"]) == (2, 1, 2)


def test_the_interval_of_tokens_is_that_of_whole_responses():
    """Fifty tokens of one response are one draw: intervals by tokens would be far too narrow."""
    many = [response(*np.cumsum([1.0, *[gap] * 50]).tolist()) for gap in (0.01, 0.02, 0.03, 0.04)]
    found = latency_metrics.summarise([many], Objectives())["latency"]["inter_token"]["mean"]
    assert found["low"] < 0.018 and found["high"] > 0.032


def test_outputs_are_compared_by_ids_then_by_text():
    left = [response(1.0, index=index, tokens=(index, 7), text="x") for index in range(3)]
    right = [response(1.0, index=index, tokens=(index, 7 + (index == 1))) for index in range(3)]
    assert differing(left, right) == [1]
    assert differing(left, [response(1.0, index=2, text="x\ufffd")]) == []
    assert differing(left, [response(1.0, index=2, text="y")]) == [2]
    assert differing(left, [response(1.0, index=2, tokens=(9,), error="refused")]) == []
    assert outputs_hash(left) == outputs_hash(left[::-1]) != outputs_hash(right)
    assert outputs_hash([response(1.0)]) is None
