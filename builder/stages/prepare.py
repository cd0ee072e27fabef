"""Text to tokens: the corpus, its tokenizer and its shards, the first stage of a build."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from builder.data.base_tokenizer import write_base_tokenizer
from builder.data.corpus import (
    REPORT,
    SCRATCH,
    TRAIN,
    VALIDATION,
    CorpusReport,
    iter_texts,
    prepare_corpus,
    read_report,
)
from builder.data.data_report import vocabulary_coverage, write_report
from builder.data.document_batches import describe_loss
from builder.data.documents import PROMPT, read_file
from builder.data.instructions import Template
from builder.data.masked_shards import open_shard, write_masked_tokens
from builder.data.ngram_table import write_ngram_table
from builder.data.text_boundaries import last_boundary
from builder.data.token_shards import open_tokens, read_tokens, write_tokens
from builder.data.tokenizer import (
    PREPARED_FILES,
    add_chat_template,
    even_sample,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from builder.recipe import Recipe
from builder.run_folder import clear, run_stage, stage_key
from builder.special_tokens import END_TOKEN, read_token_ids
from serving.errors import InputError
from serving.generation.ngram_table import NGRAM_FILE

if TYPE_CHECKING:
    from builder.stages.base_check import CheckedBase

_EXAMPLES, _EXAMPLE_CHARACTERS, _MESSAGE_CHARACTERS = 3, 24, 120
SUMMARY, PAGE = "prepare.json", "report.html"
PARTS = ("corpus", "tokenizer", "tokens")
# What is written into the stage's folder, and into those of its parts.
WRITES = (SUMMARY, PAGE)
_CORPUS_FILES = (TRAIN, VALIDATION, REPORT, SCRATCH, "*.part", "train.left?")
_SHARD_FILES = tuple(f"{side}.{ending}" for side in ("train", "validation") for ending in ("bin", "json", "mask"))
_TOKEN_FILES = (*_SHARD_FILES, NGRAM_FILE)


def prepare(
    recipe: Recipe,
    folder: Path,
    report: Callable[[str], None],
    *,
    key: str = "",
    workers: int = 1,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Write corpus/, tokenizer/, tokens/, report.html and, last, prepare.json under `folder`.

    tokens/ has the shards train.bin and validation.bin, and ngrams.bin, counted from the first.

    `key` names all that decides the result. Of an earlier call with the same one that was broken off, the corpus, the
    tokenizer and the tokens that it finished are reused; without a key everything is made again. `workers` is that
    of `prepare_corpus`. `check` is called when the corpus was read, and raises if it is not what `key` is made of.

    `report` gets one plain line as each step ends. Raises InputError for text that cannot be read, split or packed,
    and if the training side has fewer tokens than one row of `training.sequence_length`.
    """
    base = _read_base(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY).unlink(missing_ok=True)
    writes = dict(zip(PARTS, (_CORPUS_FILES, PREPARED_FILES, (*_TOKEN_FILES, "*.progress*")), strict=True))
    for part in PARTS if not key else ():
        clear(folder / part, writes[part])
    ran = run_stage(
        folder / "corpus",
        stage_key(key, "corpus"),
        lambda part: _make_corpus(recipe, part, workers, check),
        writes=writes["corpus"],
    )
    corpus = read_report(folder / "corpus")
    report(_corpus_line(corpus) + _again(ran))
    ran = run_stage(
        folder / "tokenizer",
        stage_key(key, "tokenizer"),
        lambda part: _make_tokenizer(recipe, base, part, report),
        writes=writes["tokenizer"],
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    vocab_size, end = vocabulary_size(tokenizer), read_token_ids(folder / "tokenizer").eos
    report(f"tokenizer: {vocab_size:,} entries" + _shortfall(recipe, vocab_size) + _again(ran))
    shards = [(folder / "tokens" / name).with_suffix(".bin") for name in (TRAIN, VALIDATION)]
    tokens_key = stage_key(key, "tokens")
    half_done = tuple(shard.with_suffix(ending).name for shard in shards for ending in (".bin", ".mask", ".progress"))
    run_stage(
        folder / "tokens",
        tokens_key,
        lambda part: _make_tokens(recipe, tokenizer, end, shards, tokens_key if key else ""),
        writes=writes["tokens"],
        parts=half_done,
    )
    counts = {shard.stem: len(open_tokens(shard)) for shard in shards}
    loss = describe_loss([open_shard(shard, end) for shard in shards], recipe.training)
    report(f"tokens: {counts['train']:,} for training, {counts['validation']:,} for validation")
    total = sum(counts.values())
    summary: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "base": recipe.model.base,
        "corpus_sha256": corpus.sha256,
        "split": corpus.split,
        "documents": {"train": corpus.train.documents, "validation": corpus.validation.documents},
        "characters": {"train": corpus.train.characters, "validation": corpus.validation.characters},
        "tokens": counts,
        "vocab_size": vocab_size,
        "vocabulary": vocabulary_coverage(read_tokens(shards[0]), read_tokens(shards[1]), vocab_size),
        "tokens_per_document": round(total / corpus.documents, 2),
        "characters_per_token": round(corpus.characters / total, 3),
    }
    indices = [json.loads(shard.with_suffix(".json").read_text(encoding="utf-8")) for shard in shards]
    for key, name in (("too_long", "over_max_tokens"), ("no_response", "no_response_within_max_tokens")):
        if key in indices[0]:
            summary[name] = {shard.stem: index[key] for shard, index in zip(shards, indices, strict=True)}
    summary["examples"] = _examples(folder / "corpus" / VALIDATION)
    if recipe.instruction.is_set:
        user = Template.of(recipe.instruction).pieces["user"][0]
        summary["example_messages"] = _example_messages(folder / "corpus" / VALIDATION, user)
    if loss:
        summary["loss"] = loss
        report(_loss_line(loss))
    write_report(folder / PAGE, corpus, summary)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _make_corpus(recipe: Recipe, folder: Path, workers: int, check: Callable[[], None]) -> None:
    prepare_corpus(recipe, folder, workers)
    check()


def _make_tokens(recipe: Recipe, tokenizer: Tokenizer, end: int, shards: Sequence[Path], key: str) -> None:
    limits: dict[str, Any] = {
        "max_tokens": recipe.corpus.max_tokens,
        "trim": recipe.corpus.trim,
        "end_token": end,
        "resume_key": key,
    }
    for name, shard in zip((TRAIN, VALIDATION), shards, strict=True):
        source = shard.parent.parent / "corpus" / name
        if recipe.instruction.is_set:
            count = write_masked_tokens(read_file(source), tokenizer, shard, **limits)
        else:
            count = write_tokens(iter_texts(source), tokenizer, shard, **limits)
        if not count:
            raise InputError(
                f"corpus: every {shard.stem} document is longer than corpus.max_tokens {recipe.corpus.max_tokens}; "
                "raise it or set corpus.trim"
            )
    write_ngram_table(shards[0], vocabulary_size(tokenizer), shards[0].with_name(NGRAM_FILE))
    for shard in shards:
        shard.with_suffix(".progress").unlink(missing_ok=True)


def _read_base(recipe: Recipe) -> CheckedBase | None:
    """The recipe's base, so that its errors are reported before any text is read."""
    if not recipe.model.base:
        return None
    from builder.stages.base_check import read_base  # It may ask the hub, which a model from scratch never needs.

    return read_base(recipe.model)


def _make_tokenizer(recipe: Recipe, base: CheckedBase | None, folder: Path, report: Callable[[str], None]) -> None:
    if base is not None:
        for note in base.tokenizer.notes:
            report(note)
        if recipe.instruction.is_set and base.tokenizer.files.chat_template:
            report("chat template: the recipe's instruction template replaces it")
        write_base_tokenizer(base.tokenizer, base.geometry.n_positions, folder)
    else:
        texts = even_sample(
            lambda: _texts_to_learn(folder.parent / "corpus" / TRAIN), recipe.tokenizer.unbroken_characters
        )
        train_tokenizer(texts, recipe.tokenizer, recipe.model.n_positions, folder)
    if recipe.instruction.is_set:
        add_chat_template(folder, Template.of(recipe.instruction).chat_template())


def _texts_to_learn(path: Path) -> Iterator[str]:
    """The texts that a vocabulary is learned from; a plain document is one run."""
    for document in read_file(path):
        # The end token inside a chat is not text.
        yield from (text for text, _ in document.runs if not (document.segments and text == END_TOKEN))


def _examples(path: Path) -> list[str]:
    """What a model of this text may be asked to continue: how its first held-out documents begin, in a line."""
    found = []
    for document in islice(read_file(path), _EXAMPLES):
        text, counted = document.runs[0]
        if not counted:  # A prompt in its template goes as it is.
            found.append(text)
            continue
        found.append(_line(text, _EXAMPLE_CHARACTERS))
    return list(dict.fromkeys(example for example in found if example))


def _example_messages(path: Path, before: str) -> list[str]:
    """What a model of these conversations may be asked: their first user turns, which stand behind `before`."""
    found = []
    for document in islice(read_file(path), _EXAMPLES):
        pairs = zip(document.segments, document.segments[1:], strict=False)
        turns = [each.text for frame, each in pairs if each.part == PROMPT and frame.text == before]
        turns += [each.text for each in document.segments if each.part == PROMPT]
        found += [_line(text, _MESSAGE_CHARACTERS) for text in turns[:1]]
    return list(dict.fromkeys(message for message in found if message))


def _line(text: str, most: int) -> str:
    """The first line of a text that has anything in it, up to `most` characters."""
    line = next((line.strip() for line in text.split("\n") if line.strip()), "")
    return line if len(line) <= most else line[: last_boundary(line, most)]


def _again(ran: bool) -> str:
    return "" if ran else " (done before)"


def _loss_line(loss: Mapping[str, Mapping[str, int]]) -> str:
    counted, tokens = (sum(side[key] for side in loss.values()) for key in ("counted_tokens", "tokens"))
    left_out = sum(side.get("documents_without_counted_tokens", 0) for side in loss.values())
    truncated = sum(side.get("truncated_documents", 0) for side in loss.values())
    return (
        f"loss: on {counted:,} of {tokens:,} tokens"
        + (f"; {truncated:,} documents cut to a row" if truncated else "")
        + (f"; {left_out:,} left out, with none in their row" if left_out else "")
    )


def _corpus_line(corpus: CorpusReport) -> str:
    dropped = ", ".join(f"{count:,} {why}" for why, count in corpus.dropped.items())
    skipped = sum(corpus.skipped_files.values())
    return (
        f"corpus: {corpus.train.documents:,} + {corpus.validation.documents:,} documents, "
        f"{corpus.characters:,} characters, "
        f"{corpus.validation.characters / corpus.characters:.1%} held out by {corpus.split}"
        + (f"; dropped {dropped}" if dropped else "")
        + (f"; skipped {skipped:,} files of other kinds" if skipped else "")
    )


def _shortfall(recipe: Recipe, vocab_size: int) -> str:
    wanted = recipe.tokenizer.vocab_size
    if recipe.model.base or vocab_size >= wanted:
        return ""
    return f" (of the {wanted:,} asked for: the text has no more pairs that repeat)"
