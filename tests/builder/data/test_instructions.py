"""Instruction data: records to documents, what cleaning may touch, masks, and the template in Jinja."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from builder.data import masked_shards, token_shards
from builder.data.cleaning import steps, trim
from builder.data.corpus import prepare_corpus
from builder.data.documents import Document, read_file
from builder.data.instructions import Template, read_instructions
from builder.data.masked_shards import COUNTED, LAST, open_shard, write_masked_tokens
from builder.data.sources import read_documents
from builder.data.tokenizer import END_TOKEN, end_token_id, train_tokenizer
from builder.recipe import CleaningRecipe, CorpusRecipe, InstructionRecipe, Recipe, TokenizerRecipe
from builder.recipe_reader import read_recipe
from builder.stages.prepare import prepare
from serving.errors import InputError

ALPACA = InstructionRecipe(prompt_field="instruction", response_field="output", input_field="input")
CHAT = InstructionRecipe(messages_field="messages", template="chat")
TURNS = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hi there\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And 'now' \\ {x} é😀 %}?"},
    {"role": "assistant", "content": "\nBye."},
]
CHAT_TEXT = (
    "Be brief.\n\nUser:\nHi there\n\nAssistant:\nHello.<|endoftext|>User:\nAnd 'now' \\ {x} é😀 %}?\n\nAssistant:\nBye."
)


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path: Path, recipe: InstructionRecipe, label_field: str = "") -> list[Document]:
    return list(read_instructions(path, CorpusRecipe(label_field=label_field), recipe))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([CHAT_TEXT * 3], TokenizerRecipe(vocab_size=300), 64, tmp_path_factory.mktemp("tokenizer"))


def test_prompts_and_responses_of_each_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [
        {"instruction": "Add.", "input": "1, 2", "output": " 3 ", "kind": 7},
        {"instruction": "Say a.", "input": "", "output": "a", "kind": None},
    ]
    expected = [
        ("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3", "7"),
        ("### Instruction:\nSay a.\n\n### Response:\na", ""),
    ]
    table = lines(tmp_path / "a.jsonl", records)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('kind,output,instruction,input\n7, 3 ,Add.,"1, 2"\n,a,Say a.,\n')
    for path in (table, tmp_path / "a.parquet", tmp_path / "a.csv"):
        found = read(path, ALPACA, "kind")
        assert [(document.text, document.label) for document in found] == expected, path
        assert found[0].runs == [(expected[0][0][:-1], False), ("3", True)]
        assert found[0].content == "Add.\n1, 2\n3"


def test_chats_in_both_forms(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    shared = [{"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
              for turn in TURNS]  # fmt: skip
    path = lines(tmp_path / "a.jsonl", [{"messages": TURNS}, {"messages": shared}])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": TURNS}]), tmp_path / "a.parquet")
    for document in [*read(path, CHAT), *read(tmp_path / "a.parquet", CHAT)]:
        assert document.text == CHAT_TEXT
        assert [text for text, counted in document.runs if counted] == ["Hello.", END_TOKEN, "Bye."]
        assert "".join(text for text, _ in document.runs) == CHAT_TEXT


@pytest.mark.parametrize(
    ("record", "recipe", "words"),
    [
        ({"instruction": "x", "input": ""}, ALPACA, ["no field 'output' to read (instruction.response_field)"]),
        ({"instruction": 3, "input": "", "output": "x"}, ALPACA, ["field 'instruction' is a number, not a string"]),
        ({"messages": "x"}, CHAT, ["field 'messages' is a string, not a list of turns"]),
        ({"messages": [{"role": "user"}]}, CHAT, ["turn 1: not a turn", "{role, content}"]),
        ({"messages": [{"role": "usr", "content": ""}]}, CHAT, ["turn 1: role 'usr'", "did you mean 'user'"]),
        ({"messages": [{"role": ["user"], "content": ""}]}, CHAT, ["turn 1: role ['user']"]),
    ],
)
def test_records_that_are_none(tmp_path: Path, record: Any, recipe: InstructionRecipe, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        list(read_instructions(lines(tmp_path / "a.jsonl", [record]), CorpusRecipe(bad_records="error"), recipe))
    assert "a.jsonl, line 1" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["instruction.prompt_field=a"], ["instruction.prompt_field", "response_field"]),
        (["instruction.input_field=a"], ["instruction.input_field", "prompt_field"]),
        (["instruction.messages_field=a"], ["instruction.messages_field", "corpus.paths"]),
        (["instruction.user_template={prompt}"], ["user_template", "{prompt} is not a placeholder", "{content}"]),
        (["instruction.user_template={content!r}"], ["user_template", "not a placeholder"]),
        (["instruction.user_template={content} {"], ["user_template", "braces"]),
        (["instruction.assistant_template=Response:"], ["assistant_template", "{content} 0 times"]),
        (["instruction.assistant_template={content} ###"], ["assistant_template", "after {content}"]),
    ],
)
def test_settings_that_are_none(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        read_recipe(None, overrides)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_other_names_of_roles_and_content_in_parts(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    openai = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts},
              {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Hello."}]  # fmt: skip
    shared = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi there"},
              {"from": "observation", "value": "sunny"}, {"from": "chatgpt", "value": "Hello."}]  # fmt: skip
    expected = "Be brief.\n\nUser:\nHi there\n\nTool:\nsunny\n\nAssistant:\nHello."
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": openai}, {"messages": shared}]))
    assert [document.text for document in read(path, CHAT)] == [expected, expected]
    render = jinja2.Environment().from_string(Template.of(CHAT).chat_template()).render
    assert render(messages=openai, eos_token=END_TOKEN) == expected + END_TOKEN
    named = [{"role": turn["from"], "content": turn["value"]} for turn in shared]
    assert render(messages=named, eos_token=END_TOKEN) == expected + END_TOKEN


def test_records_with_what_is_no_text_are_counted(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    calls = [{"function": {"name": "weather", "arguments": "{}"}}]
    bad: list[Any] = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]},
        {"messages": [{"role": "user", "content": 7}]},
        None,
    ]
    path, skipped = lines(tmp_path / "a.jsonl", [good, *bad]), Counter[str]()
    assert len(list(read_instructions(path, CorpusRecipe(), CHAT, skipped))) == 1
    assert skipped == {"part that is not text": 1, "tool call instead of text": 1, "number instead of text": 1,
                       "null instead of text": 1}  # fmt: skip
    for record in bad:
        with pytest.raises(InputError, match="line 1"):
            list(read_instructions(lines(path, [record]), CorpusRecipe(bad_records="error"), CHAT))


def test_short_pairs_stay(tmp_path: Path) -> None:
    records = [{"instruction": f"{n}+{n}?", "input": "", "output": str(n + n)} for n in range(200)]
    records += [{"instruction": f"第{n}问", "input": "", "output": "好"} for n in range(50)]
    path = lines(tmp_path / "a.jsonl", records)
    corpus = CorpusRecipe(paths=(str(path),))
    report = prepare_corpus(Recipe(corpus=corpus, instruction=ALPACA), tmp_path / "corpus")
    assert (report.documents, report.dropped) == (250, {})
    report = prepare_corpus(Recipe(corpus=replace(corpus, min_characters=3), instruction=ALPACA), tmp_path / "corpus")
    assert report.documents == 150 and report.dropped == {"too short": 100}


CUSTOM = InstructionRecipe(
    messages_field="messages", user_template="<<{{Q}}>> '{content}'\\\n", assistant_template="A\t{content}"
)


@pytest.mark.parametrize("recipe", [CHAT, CUSTOM, InstructionRecipe(messages_field="messages")], ids=str)
def test_the_jinja_template_gives_what_training_reads(recipe: InstructionRecipe) -> None:
    template = Template.of(recipe)
    # As transformers sets it up.
    render = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template.chat_template()).render

    document = Document("", "").with_segments(template.segments([(turn["role"], turn["content"]) for turn in TURNS]))
    assert render(messages=TURNS, eos_token=END_TOKEN) == document.text + END_TOKEN
    before = "".join(text for text, _ in document.runs[:-1])
    assert render(messages=TURNS[:-1], eos_token=END_TOKEN, add_generation_prompt=True) == before


def test_cleaning_stays_within_the_turns(tmp_path: Path) -> None:
    record = {"instruction": "<b>Add</b>   these ====== \u200b", "input": "", "output": "<p>three</p>"}
    (document,) = read(lines(tmp_path / "a.jsonl", [record]), ALPACA)
    recipe = CleaningRecipe(html=True, invisible=True, symbols="drop", white_space="words")
    for _, step in steps(recipe):
        document = document.mapped(step)
    assert document.runs == [("### Instruction:\nAdd these\n\n### Response:\n", False), ("three", True)]


def test_trimming_keeps_an_answer_or_says_that_there_is_none() -> None:
    whole = Document("", "").with_segments(
        Template.of(CHAT).segments([("user", "a b"), ("assistant", "one two"), ("user", "c"), ("assistant", "three")])
    )
    text = "User:\na b\n\nAssistant:\none two"
    cut = {len(whole.text) - 2: text + END_TOKEN + "User:\nc\n\nAssistant:\nthr", len(text) + 5: text, len(text): text}
    for limit, expected in cut.items():
        found = whole.trimmed(limit, trim)
        assert found.text == expected and found.is_answered
    short = whole.trimmed(len(text) - 2, trim)
    assert short.text == "User:\na b\n\nAssistant:\none" and short.segments[-1].part == "cut"
    for limit in (1, 3, 10, len(text) - 7):
        assert not whole.trimmed(limit, trim).is_answered


LONG = "Below is a task, for the one who answers. Answer it well, in few words, as a careful friend would, \
and say so where you do not know what to say.\n{content}\n"


def test_what_is_dropped_and_counted(tmp_path: Path) -> None:
    def record(prompt: str, answer: str) -> dict[str, str]:
        return {"instruction": prompt, "input": "", "output": answer}

    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    distinct = [record(f"What is {word} in the list of {index}?", f"It is {word} {index}.") for index, word in
                enumerate(words)]  # fmt: skip
    records = [*distinct, distinct[0], record("Say nothing at all to this.", " <br> "), record("x" * 500, "y" * 500)]
    recipe = Recipe(
        corpus=CorpusRecipe(
            paths=(str(lines(tmp_path / "a.jsonl", records)),), max_characters=500, trim=True, near_duplicates=True,
            validation_fraction=0.2,
        ),
        instruction=replace(ALPACA, user_template=LONG),
        cleaning=CleaningRecipe(html=True, boilerplate_documents=5),
    )  # fmt: skip
    report = prepare_corpus(recipe, tmp_path / "corpus")
    # The template's words stand in every text; they are neither boilerplate nor what makes two texts alike.
    assert report.dropped == {"duplicate": 1, "no response": 2}
    both = [document for side in ("train", "validation") for document in read_file(tmp_path / f"corpus/{side}.jsonl")]
    assert sorted(document.content.rpartition("\n")[2] for document in both) == sorted(
        entry["output"] for entry in distinct
    )
    assert all(document.text.startswith(LONG.partition("{")[0]) for document in both)


def test_shards_and_masks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    end = end_token_id(tokenizer)
    template = Template.of(CHAT)
    turns = [("user", "Hi there"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Bye.")]
    one = Document("", "").with_segments(template.segments(turns))
    two = Document("", "").with_segments(template.segments([("user", "x"), ("assistant", "Hello there")]))
    path = tmp_path / "train.bin"

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    assert write_masked_tokens([one, two], tokenizer, path) == len(open_shard(path, end).ids)
    shard = open_shard(path, end)
    assert shard.mask is not None
    prompt = ids("User:\nHi there\n\nAssistant:\n")
    later = ids("User:\nAnd?\n\nAssistant:\n")
    first = [*prompt, *ids("Hello."), end, *later, *ids("Bye."), end]
    assert shard.ids.tolist()[: len(first)] == first
    assert tokenizer.decode(shard.ids[(shard.mask & COUNTED) > 0].tolist(), skip_special_tokens=False) == (
        "Hello.<|endoftext|>Bye.<|endoftext|>Hello there<|endoftext|>"
    )
    assert [index + 1 for index, mark in enumerate(shard.mask) if mark & LAST] == [len(first), len(shard.ids)]
    index = json.loads(path.with_suffix(".json").read_text())
    assert index["mask"]["counted"] == int((shard.mask & COUNTED).sum())

    # Limits: in the second answer, behind the first one's end, in the first answer, and in the prompt.
    whole = len(prompt) + len(ids("Hello.")) + 1
    for limit, length, ends in ((len(first) - 2, len(first) - 1, False), (whole + 1, whole, True), (whole, whole, True),
                                (whole - 1, whole, False), (len(prompt), 0, False)):  # fmt: skip
        assert write_masked_tokens([one], tokenizer, path, max_tokens=limit, trim=True) == length, limit
        if length:
            mask = open_shard(path, end).mask
            assert mask is not None and (mask[-1] == LAST | COUNTED) == ends, limit
            assert open_shard(path, end).ids[-1] == end
    assert json.loads(path.with_suffix(".json").read_text())["no_response"] == 1
    path.with_suffix(".mask").unlink()
    with pytest.raises(InputError, match="prepare' again"):
        open_shard(path, end)


def test_a_masked_shard_that_was_broken_off_is_resumed(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_shards, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(token_shards, "_BATCHES_A_NOTE", 1)
    template = Template.of(CHAT)
    documents = [
        Document("", "").with_segments(template.segments([("user", f"x {n}"), ("assistant", "Hello " * (n % 9))]))
        for n in range(60)
    ]
    whole, broken = tmp_path / "whole.bin", tmp_path / "broken.bin"
    taken: list[int] = []

    def breaking() -> Iterator[Document]:
        yield from documents[:45]
        raise RuntimeError("killed")

    def counting() -> Iterator[Document]:
        for number, document in enumerate(documents):
            taken.append(number)
            yield document

    for cut in (True, False):
        options: dict[str, Any] = {"max_tokens": 40, "trim": cut}
        write_masked_tokens(documents, tokenizer, whole, **options)
        with pytest.raises(RuntimeError):
            write_masked_tokens(breaking(), tokenizer, broken, resume_key="key", **options)
        noted = json.loads(broken.with_suffix(".progress").read_text())
        assert noted["taken"] > 30 and noted["no_response"] and noted["too_long"]
        for place in (broken, broken.with_suffix(".mask")):
            with place.open("ab") as file:
                file.write(b"half of a batch that was not noted")
        write_masked_tokens(counting(), tokenizer, broken, resume_key="key", **options)
        for ending in (".bin", ".mask", ".json"):
            assert broken.with_suffix(ending).read_bytes() == whole.with_suffix(ending).read_bytes(), ending
        broken.with_suffix(".progress").unlink()


def test_preparation_counts_what_the_loss_counts(tmp_path: Path) -> None:
    records = [{"instruction": f"Count to {n} please.", "input": "", "output": " ".join(map(str, range(n)))}
               for n in range(2, 80)]  # fmt: skip
    recipe = read_recipe(None, [
        f"corpus.paths={lines(tmp_path / 'a.jsonl', records)}", "instruction.prompt_field=instruction",
        "instruction.response_field=output", "training.packing=rows", "training.sequence_length=64",
        "tokenizer.vocab_size=300",
    ])  # fmt: skip
    said: list[str] = []
    prepare(recipe, tmp_path / "p", said.append)
    loss = json.loads((tmp_path / "p/prepare.json").read_text())["loss"]
    assert 0 < loss["train"]["counted_tokens"] < loss["train"]["tokens"]
    assert loss["train"]["truncated_documents"] > 0 and loss["train"]["padding_tokens"] > 0
    assert any(line.startswith("loss: on ") for line in said)
    assert "What the loss counts, validation" in (tmp_path / "p/report.html").read_text()
    config = json.loads((tmp_path / "p/tokenizer/tokenizer_config.json").read_text())
    assert "### Response:" in config["chat_template"]
    messages = json.loads((tmp_path / "p/prepare.json").read_text())["example_messages"]
    assert messages and all(re.fullmatch(r"Count to \d+ please\.", message) for message in messages)


@pytest.mark.slow
def test_functions_of_the_standard_library() -> None:
    recipe = InstructionRecipe(prompt_field="signature", response_field="docstring", user_template="Doc:\n{content}\n")
    found = {document.name: document for document in read_documents(CorpusRecipe(), recipe)}
    assert len(found) > 1000
    assert found["textwrap.dedent"].text.startswith("Doc:\ndef dedent(text):\n### Response:\nRemove any common leading")
    with pytest.raises(InputError, match=r"'instruction.prompt_field' is 'signatur'.*did you mean 'signature'"):
        next(read_documents(CorpusRecipe(), InstructionRecipe(prompt_field="signatur", response_field="docstring")))


@pytest.mark.oracle
@pytest.mark.parametrize("recipe", [CHAT, CUSTOM], ids=str)
def test_transformers_renders_what_training_reads(tmp_path: Path, recipe: InstructionRecipe) -> None:
    from transformers import AutoTokenizer

    path = lines(tmp_path / "a.jsonl", [{"messages": [*TURNS[:-1], {"role": "assistant", "content": f"Bye {n}."}]}
                                        for n in range(40)])  # fmt: skip
    prepare(
        Recipe(corpus=CorpusRecipe(paths=(str(path),)), instruction=recipe, tokenizer=TokenizerRecipe(vocab_size=300)),
        tmp_path / "p",
        lambda line: None,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "p/tokenizer")
    document = next(read_file(tmp_path / "p/corpus/train.jsonl"))
    answer = {"role": "assistant", "content": document.runs[-1][0]}
    rendered = tokenizer.apply_chat_template([*TURNS[:-1], answer], tokenize=False)
    assert rendered == document.text + END_TOKEN
    prefix = tokenizer.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert prefix == "".join(text for text, _ in document.runs[:-1])
    ids = open_shard(tmp_path / "p/tokens/train.bin", tokenizer.eos_token_id).ids
    expected = tokenizer(prefix)["input_ids"]
    assert ids[: len(expected)].tolist() == expected
