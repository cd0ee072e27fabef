"""For Keras programs: a base checkpoint to a Keras model, and the trained model to a verified bundle, a call each."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from builder.data.base_tokenizer import read_base_tokenizer, write_base_tokenizer
from builder.data.masked_shards import open_shard
from builder.data.token_shards import write_tokens
from builder.data.tokenizer import load_tokenizer
from builder.model.gpt2 import GPT2
from builder.model.pretrained import load_weights, resolve_base
from builder.model.safetensors_file import write_safetensors
from builder.progress import Reporter
from builder.recipe import ModelRecipe, Recipe, TrainingRecipe, fit_context
from builder.stages.base_check import read_base
from builder.stages.export import export
from builder.stages.pipeline import package, verify_bundle
from builder.stages.train import WEIGHTS, check_quality, figures, hf_config, quality
from builder.training.plan import OWN_PROGRAM
from builder.training.trainer import LanguageModel, evaluate
from serving.bundle import Bundle, open_bundle
from serving.bundle.publishing import check_destination


def load_base(name: str, end_token: str = "") -> tuple[GPT2, Tokenizer]:
    """Return a base checkpoint as a Keras model, token ids [batch, sequence] to logits, and its tokenizer.

    `name` is a folder or a hub name. `model.geometry.eos_token_id` is the end token; `end_token` decides which it is
    where the base's files disagree. Raises InputError for a base that cannot be built.
    """
    base = read_base(ModelRecipe(base=name, end_token=end_token))
    model = GPT2.create(base.geometry)
    load_weights(model, base.parts.weights, base.parts.adapter)
    return model, base.tokenizer.tokenizer


def export_bundle(
    model: GPT2,
    base: str,
    *,
    train: Iterable[str],
    validation: Iterable[str],
    name: str,
    output: Path | str = "dist",
    recipe: Recipe | None = None,
    reporter: Reporter | None = None,
) -> Bundle:
    """Export `model` as the bundle `output`/`name`, verify it, publish it, and return it opened.

    Args:
        model: a GPT-2 in float32, however it was trained, on the vocabulary of `base`'s tokenizer.
        base: folder or hub name of the checkpoint that it was loaded from, for the tokenizer.
        train: the texts that it was trained on; int4 and int8 are calibrated on them, and n-grams fitted.
        validation: texts that it was not trained on; the certificate and the perplexities are of these.
        recipe: for its `seed`, `export`, `verify` and `model.end_token`; the rest is not read.

    Raises InputError for a tokenizer that does not fit the model, TrainingError for a model no better than
    `verify.better_than`, and ParityError if a runtime disagrees with Keras. Nothing is published then.
    """
    reporter, recipe = reporter or Reporter(), recipe or Recipe()
    geometry = model.geometry
    recipe = Recipe(
        name=name,
        seed=recipe.seed,
        model=ModelRecipe(base=base, end_token=recipe.model.end_token),
        training=TrainingRecipe(epochs=0.0, sequence_length=0, loop=OWN_PROGRAM),
        export=recipe.export,
        verify=recipe.verify,
    )
    recipe = fit_context(recipe, geometry.n_positions)
    destination = Path(output) / name
    check_destination(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{name}-") as place:
        prepared, trained, draft = (Path(place) / each for each in ("prepare", "train", "bundle"))
        for folder in (trained, draft):
            folder.mkdir()
        places = resolve_base(base)
        read = read_base_tokenizer(places.tokenizer, places.weights, geometry.vocab_size, recipe.model.end_token)
        geometry = replace(geometry, bos_token_id=read.ids.bos, eos_token_id=read.ids.eos)
        write_base_tokenizer(read, geometry.n_positions, prepared / "tokenizer")
        for note in read.notes:
            reporter.line(note)
        tokenizer = load_tokenizer(prepared / "tokenizer")
        sides = []
        digest = hashlib.sha256()
        for side, texts in (("train", list(train)), ("validation", list(validation))):
            shard = prepared / "tokens" / f"{side}.bin"
            write_tokens(texts, tokenizer, shard, end_token=read.ids.eos)
            digest.update(json.dumps(texts).encode())
            sides.append(open_shard(shard, read.ids.eos))
        (prepared / "prepare.json").write_text(json.dumps({"corpus_sha256": digest.hexdigest()}), encoding="utf-8")
        write_safetensors(model, trained / WEIGHTS)
        config = hf_config(geometry, recipe.model, read.ids.pad)
        (trained / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

        measured = LanguageModel.create(geometry)
        load_weights(measured, trained)
        row = evaluate(measured, sides[1], recipe.training)
        steps = 0 if getattr(model, "optimizer", None) is None else int(model.optimizer.iterations)
        report = {"steps": steps, "parameters": geometry.parameters}
        report |= figures(recipe.training, geometry, sides[0], sides[1], row)
        check_quality(recipe.verify, report)
        exported = export(recipe, prepared, trained, draft, quality(report), reporter)
        certificate, golden = verify_bundle(exported, recipe.verify.batch_size, reporter)
        package(exported, certificate, golden, destination)
    reporter.line(f"published {destination}")
    return open_bundle(destination, check="sizes")
