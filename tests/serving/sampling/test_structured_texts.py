"""What comes out is what was asked for, by libraries that know nothing of how it was made: jsonschema and re."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator, Sequence

import jsonschema
import pytest

from serving.engine.api import Event, FinishEvent, GenerationRequest, TokenEvent
from serving.engine.engine import SlotEngine
from serving.sampling import SamplingParams
from serving.sampling.constraints import StructuredOutput
from tests.serving.guided_model import SIZE, compiler, open_engine, tokenizer
from tests.serving.json_schemas import random_schema


@pytest.fixture(scope="module")
def engine() -> Iterator[SlotEngine]:
    made = open_engine(queue_limit=4096)
    yield made
    made.close()


def texts(engine: SlotEngine, wanted: Sequence[StructuredOutput], **params: float) -> list[tuple[str, FinishEvent]]:
    """The text of each of `wanted`, all at once, and how it ended."""
    events: list[list[Event]] = [[] for _ in wanted]
    ended = threading.Semaphore(0)

    def listen(into: list[Event], event: Event) -> None:
        into.append(event)
        if isinstance(event, FinishEvent):
            ended.release()

    for index, each in enumerate(wanted):
        params = {"temperature": 1.0, "seed": index, "max_new_tokens": 900, **params}
        request = GenerationRequest((5, 6, 7), SamplingParams(**params), grammar=compiler().compile(each))
        engine.submit(request, lambda event, into=events[index]: listen(into, event))
    for _ in wanted:
        assert ended.acquire(timeout=120)
    found = []
    for each in events:
        finish = each[-1]
        assert isinstance(finish, FinishEvent)
        tokens = [event for event in each if isinstance(event, TokenEvent)]
        assert all(event.token_id < tokenizer().get_vocab_size() < SIZE for event in tokens)
        found.append(("".join(event.text for event in tokens) + finish.text, finish))
    return found


def check_schemas(engine: SlotEngine, seeds: range, compact: bool = False) -> None:
    schemas = [random_schema(seed) for seed in seeds]
    wanted = [StructuredOutput("json_schema", json.dumps(each), any_whitespace=not compact) for each in schemas]
    for seed, schema, (text, finish) in zip(seeds, schemas, texts(engine, wanted), strict=True):
        assert finish.reason == "stop", (seed, schema, text, finish)
        value = json.loads(text)
        jsonschema.Draft202012Validator(schema).validate(value)
        if compact:
            assert text == json.dumps(value, separators=(",", ":"), ensure_ascii=False) or "\\" in text or "." in text


def test_texts_follow_generated_schemas(engine: SlotEngine) -> None:
    check_schemas(engine, range(32))
    check_schemas(engine, range(32, 40), compact=True)


@pytest.mark.slow
def test_texts_follow_a_thousand_generated_schemas(engine: SlotEngine) -> None:
    for start in range(1000, 2000, 50):
        check_schemas(engine, range(start, start + 50))


PATTERNS = [
    r"[a-z]{3,8}",
    r"\d{3}-\d{4}",
    r"(yes|no|maybe)!?",
    r"[^\x00-\x7f]{2}",
    r"(a|b)*c",
    r"\$\d+\.\d\d",
    r"[A-F0-9]{8}(-[A-F0-9]{4}){3}",
    r"a.c",
    r"(?i:ok)\s[\w.]{1,9}@x\.de",
    r"^anchored$",
]


def test_texts_match_their_regular_expressions(engine: SlotEngine) -> None:
    wanted = [StructuredOutput("regex", pattern) for pattern in PATTERNS * 3]
    for pattern, (text, finish) in zip(PATTERNS * 3, texts(engine, wanted), strict=True):
        assert finish.reason == "stop" and re.fullmatch(pattern, text), (pattern, text, finish)


def test_texts_are_among_their_choices(engine: SlotEngine) -> None:
    draw = random.Random(3)
    alphabet = "ab \"\\\n\t{}[]é漢\U0001f600/|'#%<>"
    sets = [
        tuple({"".join(draw.choices(alphabet, k=draw.randrange(1, 9))) for _ in range(draw.randrange(1, 9))})
        for _ in range(30)
    ] + [("a", "ab", "abc"), tuple(f"choice {index}" for index in range(1024))]
    wanted = [StructuredOutput("choice", choices=choices) for choices in sets]
    answers = texts(engine, wanted)
    for choices, (text, finish) in zip(sets, answers, strict=True):
        assert finish.reason == "stop" and text in choices, (choices, text, finish)


def test_grammars_in_both_syntaxes(engine: SlotEngine) -> None:
    lark = 'start: item ("," item)~1..3\nitem: /[a-z]{2}/ "=" NUMBER\nNUMBER: /[0-9]{1,2}/'
    gbnf = 'root ::= item ("," item){1,3}\nitem ::= [a-z]{2} "=" [0-9]{1,2}'
    for text, finish in texts(engine, [StructuredOutput("grammar", each) for each in (lark, gbnf)]):
        assert finish.reason == "stop" and re.fullmatch(r"[a-z]{2}=\d\d?(,[a-z]{2}=\d\d?){1,3}", text)


def test_greedy_and_narrowed_sampling_follow_too(engine: SlotEngine) -> None:
    wanted = [StructuredOutput("json_schema", json.dumps(random_schema(seed))) for seed in range(5)]
    for params in ({"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.2, "temperature": 2.0}, {"min_p": 0.5}):
        for index, (text, finish) in enumerate(texts(engine, wanted, repetition_penalty=1.3, **params)):
            assert finish.reason == "stop", (params, index, text)
            jsonschema.Draft202012Validator(random_schema(index)).validate(json.loads(text))


def test_a_text_that_is_cut_says_so(engine: SlotEngine) -> None:
    ((text, finish),) = texts(engine, [StructuredOutput("regex", "[ab]{50}")], max_new_tokens=5)
    assert finish.reason == "length" and re.fullmatch("[ab]{5,}", text)
    ((text, finish),) = texts(engine, [StructuredOutput("regex", "a{1,60}")], max_new_tokens=900)
    assert finish.reason == "stop" and finish.stopped_by in (None, 0)


def test_any_object(engine: SlotEngine) -> None:
    for text, finish in texts(engine, [StructuredOutput("json_object")] * 4, max_new_tokens=100):
        assert text.startswith("{") and (finish.reason == "length" or type(json.loads(text)) is dict)
