"""What decides each stage, and so makes it run again when it changes."""

from __future__ import annotations

from pathlib import Path

from builder.recipe_reader import read_recipe
from builder.stages.pipeline import Run


def test_the_keys_follow_what_decides_each_stage(tmp_path: Path) -> None:
    def keys(*overrides: str) -> tuple[str, str, str]:
        ours = Run(read_recipe(None, overrides), tmp_path)
        return ours.prepare_key(), ours.train_key(), ours.export_key()

    def changed(*overrides: str) -> list[bool]:
        return [ours != theirs for ours, theirs in zip(keys(*overrides), keys(), strict=True)]

    assert changed() == [False, False, False]
    assert changed("name=other") == [False, False, True]
    assert changed("verify.prompts=3") == changed('export.variants=["int8"]') == [False, False, True]
    assert changed("training.learning_rate=0.5") == changed("training.jit_compile=false") == [False, True, True]
    for setting in ("loop=custom", "log_every=3", "tensorboard=true", "sample_tokens=0", "checkpoints_kept=2"):
        assert changed(f"training.{setting}") == [False] * 3, setting
    assert changed("model.n_layer=3") == [False, True, True]
    assert changed("cleaning.html=true") == changed("corpus.near_duplicates=true") == [True] * 3
    assert changed("training.packing=rows") == changed("instruction.template=chat") == [True] * 3
    assert changed("seed=3") == changed("tokenizer.vocab_size=300") == changed("corpus.min_characters=3") == [True] * 3


def test_a_base_checkpoint_that_changed_is_read_anew(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"1")
    ours = Run(read_recipe(None, [f"model.base={base}"]), tmp_path)
    before = ours.prepare_key(), ours.train_key()
    (base / "model.safetensors").write_bytes(b"22")
    assert ours.train_key() != before[1]
    now = ours.prepare_key()
    (base / "tokenizer.json").write_text("{}")
    assert ours.prepare_key() != now
