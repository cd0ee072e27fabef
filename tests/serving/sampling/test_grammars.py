"""Grammars to tokens: what is refused, what is masked, and what hostile grammars cost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from serving.errors import InputError, RuntimeMissingError
from serving.sampling import SamplingParams, sample_tokens
from serving.sampling.constraints import FEW, MAX_DEPTH, Allowed, ConstraintError, StructuredOutput, sample_allowed
from serving.sampling.grammars import GrammarCompiler, Matcher
from tests.serving.guided_model import SIZE, compiler, tokenizer


def start(kind: Any, text: str = "", **fields: Any) -> Matcher:
    return compiler().compile(StructuredOutput(kind, text, **fields)).start()


def accept(constraint: Matcher, text: str) -> None:
    for token in tokenizer().encode(text).ids:
        assert token in constraint.allowed().ids
        constraint.accept(token)


def test_the_end_token_is_allowed_where_the_text_is_whole_and_only_there() -> None:
    constraint = start("regex", "ab*")
    assert 0 not in constraint.allowed().ids
    accept(constraint, "a")
    assert 0 in constraint.allowed().ids and not constraint.done
    accept(constraint, "bb")
    constraint.accept(0)
    assert constraint.done


def test_other_ends_are_allowed_where_the_end_token_is() -> None:
    grammar = compiler().compile(StructuredOutput("regex", "(ab)*"))
    end = SIZE - 1  # Of which the tokenizer knows nothing, as of a special token that is not its end token.
    assert end in grammar.start(frozenset([end])).allowed().ids and end not in grammar.start().allowed().ids
    constraint = grammar.start(frozenset([end]))
    accept(constraint, "a")
    assert end not in constraint.allowed().ids
    accept(constraint, "b")
    assert {0, end} <= set(constraint.allowed().ids.tolist())
    constraint.accept(end)
    assert constraint.done


def test_a_text_that_nothing_can_follow_is_done() -> None:
    constraint = start("json_schema", '{"enum": [12, 13]}')
    assert not constraint.done
    accept(constraint, "12")
    assert constraint.done


def test_ids_that_the_tokenizer_does_not_have_are_never_allowed() -> None:
    allowed = start("regex", r"(.|\n)*").allowed().ids
    size = tokenizer().get_vocab_size()
    assert allowed.dtype == np.int64 and (np.diff(allowed) > 0).all()
    assert allowed.max() < size < SIZE and len(allowed) > 400


def test_masks_are_those_of_the_texts_that_they_lead_to() -> None:
    """A token is allowed if and only if its text is a beginning of what the expression matches."""
    allowed = set(start("regex", "[a-z ]{4}").allowed().ids.tolist())
    for token in range(1, tokenizer().get_vocab_size()):
        text = tokenizer().decode([token])
        fits = len(text) <= 4 and all(each in "abcdefghijklmnopqrstuvwxyz " for each in text)
        # In a place where the text is free, several tokens may spell the same: all of them are allowed.
        assert (token in allowed) == fits, text


def test_sequences_of_one_grammar_do_not_touch_each_other() -> None:
    grammar = compiler().compile(StructuredOutput("regex", "ax|bx"))
    one, two = grammar.start(), grammar.start()
    accept(one, "a")
    accept(two, "b")
    accept(one, "x")
    assert one.done and not two.done
    accept(two, "x")
    assert two.done and grammar.start().allowed().ids.tolist() == grammar.start().allowed().ids.tolist()


def test_a_token_that_is_not_allowed_is_an_error_of_its_own_sequence() -> None:
    grammar = compiler().compile(StructuredOutput("regex", "[0-9]{9}"))
    wrong, right = grammar.start(), grammar.start()
    wrong.accept(tokenizer().encode("a").ids[0])
    with pytest.raises(ConstraintError, match="after 1 tokens"):
        wrong.allowed()
    accept(right, "1")
    assert right.allowed().count


def test_a_sequence_does_not_wait_for_another_that_computes() -> None:
    grammar = compiler().compile(StructuredOutput("regex", "ab|ac"))
    constraint = grammar.start()
    with grammar.lock:  # As another thread has it while it computes.
        constraint.accept(tokenizer().encode("a").ids[0])
        assert not constraint.ready
    constraint.compute()
    accept(constraint, "c")
    assert constraint.done


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("regex", "([", "regex parse error"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", "[^\\s\\S]", ""),
        ("json_schema", "{", "EOF"),
        ("json_schema", "[]", "object"),
        ("json_schema", '{"type": "banana"}', "banana"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "object", "properties": {"a": false}, "required": ["a"]}', "nsatisfiable"),
        ("json_schema", '{"$ref": "https://example.com/schema.json"}', ""),
        ("json_schema", '{"$ref": "#/$defs/none"}', ""),
        ("json_schema", '{"type": "string", "pattern": "("}', ""),
        ("json_schema", '{"x-guidance": {"lenient": true}, "type": "array", "uniqueItems": true}', "uniqueItems"),
        ("grammar", "start: other", "other"),
        ("grammar", "no grammar at all", ""),
        ("grammar", '{"grammars": []}', "not JSON"),
        ("grammar", "root ::= (((", ""),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(kind: Any, text: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        compiler().compile(StructuredOutput(kind, text))
    assert words in str(error.value) and "\n" not in str(error.value) and 5 < len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "regex", "text": " "}, "empty"),
        ({"kind": "regex", "text": "a" * 32769}, "32769 characters"),
        ({"kind": "regex", "text": "\ud800"}, "Unicode"),
        ({"kind": "regex", "text": "(" * 65 + ")" * 65}, "brackets"),
        ({"kind": "json_schema", "text": '{"items":' * 65 + "{}" + "}" * 65}, "brackets"),
        ({"kind": "choice"}, "0 choices"),
        ({"kind": "choice", "choices": ("a", "")}, "empty"),
        ({"kind": "choice", "choices": ("a",) * 1025}, "1025 choices"),
        ({"kind": "choice", "choices": ("a" * 20000, "b" * 20000)}, "40000 characters"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_read(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        StructuredOutput(**fields)
    assert StructuredOutput("regex", "(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH)


def test_another_tokenizer_and_no_library_are_errors_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="byte-level"):
        GrammarCompiler(Tokenizer(models.WordPiece({"a": 0}, unk_token="a")), 1, 0)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RuntimeMissingError, match=r"pip install 'gpt2-bundle\[guided\]'"):
        GrammarCompiler(tokenizer(), SIZE, 0)


def test_choosing_among_the_allowed_is_choosing_from_a_masked_row() -> None:
    draw = np.random.default_rng(5)
    for case in range(300):
        size = int(draw.choice([2000, 9000]))
        line = draw.normal(0, 3, size).astype(np.float32)
        bits = draw.random(size) < draw.choice([0.001, 0.3, 0.9])
        bits[draw.integers(size)] = True
        masked = np.where(bits, line, np.float32(-np.inf))
        params = SamplingParams(
            temperature=float(draw.choice([0, 0.3, 1, 50])),
            top_k=int(draw.choice([0, 1, 5, 1999])),
            top_p=float(draw.choice([0.1, 0.9, 1])),
            min_p=float(draw.choice([0, 0.2])),
        )
        wanted = sample_tokens(masked[None], params.temperature, params.top_k, params.top_p, case, 3, params.min_p)
        assert sample_allowed(line, Allowed.of(bits), params, case, 3) == wanted[0]


def test_allowed_tokens_are_those_of_the_bits() -> None:
    draw = np.random.default_rng(6)
    for size in (1, 31, 32, 33, 257, 5000, 50257):
        for share in (0.0001, 0.02, 0.5, 1):
            bits = draw.random(size) < share
            allowed = Allowed.of(bits)
            assert allowed.ids.tolist() == np.flatnonzero(bits).tolist() and allowed.count == bits.sum()
            assert (allowed.bias is None) == (allowed.count <= FEW)
            if allowed.bias is not None:
                assert np.array_equal(allowed.bias, np.where(bits, 0, -np.inf))
    # Bits beyond the vocabulary do not count.
    assert Allowed(np.array([0xFFFFFFFF], np.uint32), 5).ids.tolist() == [0, 1, 2, 3, 4]


def test_a_bias_that_leaves_nothing_is_the_sequences_own_error() -> None:
    line = np.array([0, -np.inf, 1], np.float32)
    with pytest.raises(ConstraintError, match="min_tokens"):
        sample_allowed(line, Allowed.of(np.array([False, True, False])), SamplingParams(), 0, 0)


def _nested(depth: int) -> dict[str, Any]:
    return {"type": "integer"} if not depth else {"type": "object", "properties": {"a": _nested(depth - 1)}}


HOSTILE: dict[str, tuple[str, str]] = {
    "nested": ("json_schema", json.dumps(_nested(20))),
    "references": (
        "json_schema",
        json.dumps({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(700)}, "$ref": "#/$defs/d0"}),
    ),
    "circle": ("json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'),
    "products": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(6)]} for i in range(20)]}),
    ),
    "conjunction": ("json_schema", json.dumps({"allOf": [{"pattern": f".*{i}.*"} for i in range(1000)]})),
    "long": ("json_schema", '{"type": "string", "minLength": 1000000000, "maxLength": 1000000000}'),
    "many": ("json_schema", '{"type": "array", "items": {}, "minItems": 1000000000}'),
    "multiples": ("json_schema", '{"type": "integer", "multipleOf": 999999937}'),
    "subsets": ("json_schema", '{"type": "string", "pattern": "^.*a.{200}b.{200}$"}'),
    "intersection": ("json_schema", '{"type": "string", "minLength": 30000, "pattern": "^(ab|c)*$"}'),
    "repetition": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "unicode": ("regex", r"(\p{L}|\p{N}\w){1,5000}"),
    "alternatives": ("regex", "|".join(f".*{i}.*x" for i in range(3000))),
    "doubling": ("grammar", "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(60)) + '\nT60: "a"'),
    "rules": ("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"'),
    "ambiguous": ("grammar", 'start: s\ns: s s | s s s | "a" | "aa" | ""'),
    "complement": ("grammar", "start: T\nT: ~/(.*a.{0,30}b.*){3}/ & /.*c.{20}/"),
    "terminals": (
        "grammar",
        "start: " + " | ".join(f"T{i}" for i in range(900)) + "".join(f"\nT{i}: /.*{i}.*/" for i in range(900)),
    ),
    "circular": ("grammar", 'start: A\nA: A "b" | "c"'),
    "translated": ("grammar", "root ::= " + "(" * 60 + '"a"' + ")" * 60 + ' | "b"' * 5000),
}


def test_hostile_grammars_cost_bounded_time_and_memory_and_never_the_process() -> None:
    """In one process of little memory: refused in a few seconds, or a sequence that ends or goes on in small steps."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from tests.serving.sampling.test_grammars import run_hostile; run_hostile()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    costs = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and not done.stderr, (costs[-1:], done.stderr[-2000:])
    assert [name for name, *_ in costs] == list(HOSTILE)
    assert all(compiled < 5 and slowest < 1 for _, compiled, slowest in costs), costs


def run_hostile() -> None:
    """Print each name with the seconds of its compilation and of its slowest step, by the processor's clock."""
    tokenizer(), compiler()
    # With the stack of a thread, as the server has it.
    thread = threading.Thread(target=lambda: [_run_hostile(name) for name in HOSTILE])
    thread.start()
    thread.join()


def _run_hostile(name: str) -> None:
    kind, text = HOSTILE[name]
    compiled = slowest = 0.0
    began = time.thread_time()
    try:
        constraint = compiler().compile(StructuredOutput(kind, text)).start()  # type: ignore[arg-type]
        compiled = time.thread_time() - began
        draw = np.random.default_rng(1)
        for _ in range(60):
            began = time.thread_time()
            allowed = constraint.allowed()
            constraint.accept(int(draw.choice(allowed.ids)))
            slowest = max(slowest, time.thread_time() - began)
            if constraint.done:
                break
    except (InputError, ConstraintError) as error:
        assert 0 < len(str(error)) < 300
        compiled = compiled or time.thread_time() - began
    print(json.dumps([name, compiled, slowest]), flush=True)
