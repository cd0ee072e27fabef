"""Places between whole characters in tokens that are parts of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from builder.data.character_tokens import CharacterTokens
from builder.data.documents import Document
from builder.data.instructions import Template
from builder.data.masked_shards import Shard, open_shard, write_masked_tokens
from builder.data.token_shards import open_tokens, write_tokens
from builder.data.tokenizer import end_token_id, train_tokenizer
from builder.recipe import InstructionRecipe, Recipe, TokenizerRecipe
from builder.stages.train import _prompts

TEXT = "话说天下大势，分久必合。Grüße 👋🏽 abc " * 30


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT], TokenizerRecipe(vocab_size=257 + 20), 16, tmp_path_factory.mktemp("tokenizer"))


def test_every_place_is_between_characters(tokenizer: Tokenizer) -> None:
    ids, places = tokenizer.encode(TEXT).ids, CharacterTokens(tokenizer)
    for place in range(4, len(ids)):
        last, following = places.last_place(ids, place), places.next_place(ids, place)
        assert last <= place <= following
        for cut in (last, following):
            assert tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:]) == TEXT
        assert following - last <= 4


def test_documents_cut_by_tokens_end_in_a_whole_character(tokenizer: Tokenizer, tmp_path: Path) -> None:
    end = end_token_id(tokenizer)
    chat = Document("", "").with_segments(
        Template.of(InstructionRecipe(template="chat")).segments([("user", "问"), ("assistant", TEXT)])
    )
    for limit in range(40, 60):
        write_tokens([TEXT], tokenizer, tmp_path / "a.bin", max_tokens=limit, trim=True)
        write_masked_tokens([chat], tokenizer, tmp_path / "b.bin", max_tokens=limit, trim=True)
        for ids in (open_tokens(tmp_path / "a.bin"), open_shard(tmp_path / "b.bin", end).ids):
            assert limit - 3 <= len(ids) - 1 <= limit
            assert "\ufffd" not in tokenizer.decode(ids.tolist())


def test_sample_prompts_hold_whole_characters(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for skipped in range(12):
        write_tokens([TEXT[skipped:]], tokenizer, tmp_path / "a.bin")
        shard = Shard(open_tokens(tmp_path / "a.bin"))
        prompts = _prompts(Recipe(), tokenizer, shard)
        assert len(prompts) == 2 and all(8 <= len(prompt) < 12 for prompt in prompts)
        assert not any("\ufffd" in tokenizer.decode(prompt) for prompt in prompts)
