"""The guide's Keras program, run as it stands in docs/guides/fine-tune.md, and what its last call refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.keras_backend import keras
from builder.model.gpt2 import GPT2, named_variables
from builder.model.pretrained import load_model
from builder.recipe import Recipe, VerifyRecipe
from builder.stages.keras_export import export_bundle
from serving.bundle import open_bundle
from serving.errors import InputError, TrainingError
from tests.builder.training.test_trainer import GEOMETRY
from tests.tiny_build import TinyBuild

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "fine-tune.md"


@pytest.mark.slow
def test_the_guide_ends_in_a_bundle_of_the_trained_model(
    built: TinyBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(built.corpus, "notes.txt")
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    program = "\n".join(blocks)
    assert program.count('BASE = "gpt2"') == 1
    names: dict[str, Any] = {}
    exec(compile(program.replace('BASE = "gpt2"', f"BASE = {str(built.bundle)!r}"), str(GUIDE), "exec"), names)

    history = names["history"].history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert history["loss"][1] < history["loss"][0] and np.mean(names["losses"]) < history["loss"][0]
    # By the numbers: the mean over the tokens that are no padding.
    inputs, targets, weights = next(iter(names["validation"]))
    names["model"].evaluate(names["validation"].take(1), verbose=0)
    right = (np.asarray(names["model"](inputs)).argmax(-1) == targets.numpy()) * weights.numpy()
    (accuracy,) = (metric for metric in names["model"].metrics if metric.name != "loss")
    assert 0 < weights.numpy().mean() < 1
    assert float(accuracy.result()["accuracy"]) == pytest.approx(right.sum() / weights.numpy().sum(), rel=1e-5)

    bundle = open_bundle(tmp_path / "dist" / "notes")
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["notes"]
    exported = load_model(bundle.folder)
    for (name, ours), (_, theirs) in zip(named_variables(exported), named_variables(names["model"]), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=name)
    certificate = json.loads(bundle.path("verification.json").read_text())
    assert certificate["passed"] is True and certificate["greedy"]["ort/fp32"]["of"] == 64 * 24
    assert bundle.manifest.quality["steps"] == 2 * len(names["train"])
    card = bundle.path("README.md").read_text()
    assert "Fine-tuned from tiny by a Keras program" in card and "base_model: tiny" in card
    assert str(tmp_path) not in card


def test_a_loss_and_metrics_of_the_callers_own_are_what_keras_uses() -> None:
    keras.utils.set_random_seed(3)
    model = GPT2.create(GEOMETRY)
    ids = np.random.default_rng(1).integers(0, 32, (4, 9)).astype(np.int32)
    model.compile(
        optimizer=keras.optimizers.SGD(0.0),
        loss=lambda targets, logits: keras.ops.mean(logits) * 0 + 7.0,
        metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
        jit_compile=False,
    )
    history = model.fit(ids[:, :-1], ids[:, 1:], validation_data=(ids[:, :-1], ids[:, 1:]), verbose=0).history
    right = np.asarray(model(ids[:, :-1])).argmax(-1) == ids[:, 1:]
    assert history["loss"] == history["val_loss"] == [7.0]
    assert history["accuracy"] == history["val_accuracy"] == [pytest.approx(right.mean())]


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(built: TinyBuild, tmp_path: Path) -> None:
    texts = built.corpus.read_text().splitlines()
    sides: dict[str, Any] = {"train": texts[:50], "validation": texts[50:], "name": "x", "output": tmp_path / "dist"}
    with pytest.raises(InputError, match="its tokenizer has 300 entries, but the embedding only 32 rows"):
        export_bundle(GPT2.create(GEOMETRY), str(built.bundle), **sides)
    with pytest.raises(InputError, match="no such folder"):
        export_bundle(GPT2.create(GEOMETRY), str(tmp_path / "none"), **sides)
    with pytest.raises(TrainingError, match="is not below the trigram's"):
        recipe = Recipe(verify=VerifyRecipe(better_than="trigram"))
        export_bundle(load_model(built.bundle), str(built.bundle), recipe=recipe, **sides)
    assert list((tmp_path / "dist").iterdir()) == []
