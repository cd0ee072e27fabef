"""The byte-level BPE that is trained on a corpus, and the files that any tokenizer is read from and written to.

Byte-level means that every text has an encoding and decodes to itself: there is no unknown token. As everywhere with
GPT-2, the literal characters `<|endoftext|>` in a text stand for the end token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from builder.plain_files import is_plain
from builder.recipe import TokenizerRecipe
from builder.special_tokens import END_TOKEN, GENERATION_CONFIG, settings_text
from serving.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
"""What is written of a byte-level BPE; added_tokens.json stands with them where tokens were added."""
PREPARED_FILES = (*TOKENIZER_FILES, "added_tokens.json", GENERATION_CONFIG)
"""All files that a prepared tokenizer may consist of."""
# The names of Hugging Face, those of OpenAI's own release, and KerasHub's.
_VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("vocabulary.json", "merges.txt"))
_PIECE_CHARACTERS = 1 << 11
# Where GPT-2's pattern starts a new pre-token whatever stands around: at white space after anything else, and at a
# punctuation mark after a letter. Of the latter only Chinese and Japanese ones are taken: texts of these languages have
# no others to be cut at for pages, and their letters are letters in every version of Unicode.
_LETTERS = r"0-9A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5"
_SAFE_CUT = re.compile(rf"(?<=\S)(?=[ \t\n\r\u3000])|(?<=[{_LETTERS}])(?=[，。！？；：、…—（）《》「」『』“”])")

# Runs of Thai to Lao, Myanmar, Khmer, kana, Han.
_UNBROKEN = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{4,}")


def train_tokenizer(texts: Iterable[str], recipe: TokenizerRecipe, n_positions: int, folder: Path) -> Tokenizer:
    """Train GPT-2's tokenizer on `texts`, write its five files into `folder` and return it.

    The pre-tokenizer is GPT-2's regular expression, the alphabet all 256 bytes, and the end token the last id, as in
    GPT-2. A corpus with too few pairs that occur `min_frequency` times gives fewer than `vocab_size` entries. The same
    texts give the same files.
    """
    tokenizer = _assemble(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - 1,
        min_frequency=recipe.min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece, _ in pieces(text)), trainer)
    vocab, merges = vocab_and_merges(tokenizer)
    end = vocab[END_TOKEN] = len(vocab)
    tokenizer = _assemble(models.BPE(vocab=vocab, merges=merges))
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_TOKEN)
    write_tokenizer_files(tokenizer, n_positions, folder, roles)
    write_text(folder / GENERATION_CONFIG, settings_text({"bos_token_id": end, "eos_token_id": end}))
    return tokenizer


def even_sample(read: Callable[[], Iterable[str]], unbroken_characters: int) -> Iterator[str]:
    """Yield the texts that `read` gives at each call, or pieces from all over them, to learn a vocabulary from.

    The library keeps each different run of letters in 32 bytes for each of its bytes, and more for its pairs. Between
    blanks the runs are words, which repeat. In scripts without blanks nearly every clause is another run: of the
    characters in such runs about `unbroken_characters` are yielded.
    """
    total = sum(_unbroken(piece) for text in read() for piece, _ in pieces(text))
    if total <= unbroken_characters:
        yield from read()
        return
    due = 0.0
    for text in read():
        for piece, _ in pieces(text):
            count = _unbroken(piece)
            due += count * unbroken_characters / total
            if not count or due >= count:
                due -= count
                yield piece


def _unbroken(text: str) -> int:
    """The characters in runs of four or more of scripts without spaces."""
    return 0 if text.isascii() else sum(map(len, _UNBROKEN.findall(text)))


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a prepared folder or a bundle, without any truncation or padding stored with it.

    Raises InputError if the folder has no tokenizer or a broken one.
    """
    tokenizer = read_tokenizer_files(folder)
    if tokenizer is None:
        raise InputError(f"{folder}: no tokenizer here; run 'gpt2-bundle prepare', or name a folder with one")
    return tokenizer


def read_tokenizer_files(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a folder's tokenizer.json, else of vocab.json and merges.txt (or OpenAI's names).

    Returns None if the folder has none of them. Raises InputError for a broken one.
    """
    path = folder / "tokenizer.json"
    if is_plain(path):
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises nothing narrower.
            raise InputError(f"{path}: not a tokenizer ({error}); fetch or prepare it again") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    pairs = [(folder / vocab, folder / merges) for vocab, merges in _VOCAB_AND_MERGES]
    found = next((pair for pair in pairs if is_plain(pair[0]) and is_plain(pair[1])), None)
    return _from_vocab_and_merges(*found) if found else None


def add_chat_template(folder: Path, template: str) -> None:
    """Write a Jinja `chat_template` into the folder's tokenizer_config.json, where transformers looks for it."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, settings_text(config | {"chat_template": template}))


def end_token_id(tokenizer: Tokenizer) -> int:
    """Return the id of `<|endoftext|>`, the end token of a trained tokenizer; InputError if the tokenizer has none."""
    found = tokenizer.token_to_id(END_TOKEN)
    if found is None:
        raise InputError(f"the tokenizer has no {END_TOKEN} token; add it, or take a tokenizer of the GPT-2 family")
    return int(found)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Return the number of ids: the highest one plus one, added tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield (piece, is the last) of a text cut where GPT-2's pattern cuts in any case; joined, they are the text.

    The library's time and memory grow faster than the length of what it gets at once: 8 million characters took 1 s in
    pieces of a thousand and 6 s in pieces of 65 thousand.
    """
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and (cut := _SAFE_CUT.search(text, start + _PIECE_CHARACTERS)):
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True


def can_cut(tokenizer: Tokenizer) -> bool:
    """Return whether the encodings of `pieces`, joined, are that of the whole text, as with GPT-2's own pattern."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    pattern = state["pre_tokenizer"] or {}
    return (
        state["normalizer"] is None
        and pattern.get("type") == "ByteLevel"
        and pattern.get("use_regex") is True
        and pattern.get("add_prefix_space") is False
        and not any(
            token["lstrip"]
            or token["rstrip"]
            or token["content"].split() != [token["content"]]
            or _SAFE_CUT.search(token["content"])
            for token in state["added_tokens"]
        )
    )


def _assemble(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)
    if tokenizer.token_to_id(END_TOKEN) is not None:
        tokenizer.add_special_tokens([AddedToken(END_TOKEN, special=True, normalized=False)])
    return tokenizer


def _from_vocab_and_merges(vocab_path: Path, merges_path: Path) -> Tokenizer:
    try:
        vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
        lines = merges_path.read_text(encoding="utf-8").split("\n")
        if lines[0].startswith("#version"):
            lines = lines[1:]
        merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
        return _assemble(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # The library raises nothing narrower for a merge that is not in the vocabulary.
        raise InputError(
            f"{vocab_path.parent}: {vocab_path.name} and {merges_path.name} are not a tokenizer ({error}); "
            "fetch them again"
        ) from None


def vocab_and_merges(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary of a BPE, token to id, and its merges in order."""
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    pairs: Iterable[Sequence[str]] = (
        merge.split(" ") if isinstance(merge, str) else merge  # Older tokenizer.json files join the two.
        for merge in model["merges"]
    )
    return dict(model["vocab"]), [(left, right) for left, right in pairs]


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Return whether transformers' GPT2Tokenizer makes this very tokenizer of its vocabulary, merges and added tokens.

    That class drops the normalizer, the pre-tokenizer and the model's options of a tokenizer.json.
    """
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    model, pattern = state["model"], state["pre_tokenizer"] or {}
    options = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    return bool(
        model["type"] == "BPE"
        and not any(model.get(key) for key in (*options, *affixes))
        and state["normalizer"] is None
        and pattern.get("type") == "ByteLevel"
        and pattern.get("use_regex") is True
        and pattern.get("add_prefix_space") is False
    )


def write_tokenizer_files(
    tokenizer: Tokenizer,
    n_positions: int,
    folder: Path,
    roles: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a tokenizer into `folder` so that transformers, told nothing, reads it with the same ids.

    `roles` are the special tokens by role, `settings` more entries of tokenizer_config.json. vocab.json and merges.txt
    are written only where they alone say the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = is_gpt2(tokenizer)
    config = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": n_positions,
        "tokenizer_class": "GPT2Tokenizer" if plain else "PreTrainedTokenizerFast",
        **roles,
        **(settings or {}),
    }
    if not plain:
        del config["add_prefix_space"]
        # A BERT tokenizer's third input, the segment, is one that GPT-2 lacks.
        config["model_input_names"] = ["input_ids", "attention_mask"]
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(folder / "tokenizer_config.json", settings_text(config))
    if plain:
        vocab, merges = vocab_and_merges(tokenizer)
        ordered = dict(sorted(vocab.items(), key=lambda item: item[1]))
        write_text(folder / "vocab.json", json.dumps(ordered, ensure_ascii=False) + "\n")
        write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
        added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
        if new := {content: index for content, index in added.items() if content not in vocab}:
            write_text(folder / "added_tokens.json", settings_text(new))
    special = dict(roles) | {key: value for key, value in config.items() if key == "additional_special_tokens"}
    write_text(folder / "special_tokens_map.json", settings_text(special))


def tokenizer_folder_files(folder: Path) -> list[Path]:
    """Return the files of a prepared tokenizer that belong in a bundle, generation_config.json among them."""
    return [folder / name for name in PREPARED_FILES if (folder / name).is_file()]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with line feeds, the same bytes on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")
