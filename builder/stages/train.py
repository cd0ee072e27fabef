"""The training stage: prepared tokens to trained weights, with the report that puts them beside the n-gram models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from builder.data.document_batches import counted_targets, first_prompts, is_plain
from builder.data.instructions import Template
from builder.data.masked_shards import Shard, open_shard
from builder.data.ngram_baselines import trigram_perplexity, unigram_perplexity
from builder.data.tokenizer import end_token_id, load_tokenizer, vocabulary_size
from builder.model.pretrained import Base, geometry_of, load_weights, resolve_base
from builder.progress import Reporter
from builder.recipe import ModelRecipe, Recipe
from builder.training.metrics_log import MetricsLog, read_metrics
from builder.training.training_report import REPORT_PAGE, write_report
from serving.bundle import Geometry
from serving.errors import InputError

WEIGHTS = "model.safetensors"
REPORT = "training.json"


def hf_config(geometry: Geometry, recipe: ModelRecipe) -> dict[str, Any]:
    """The model's config.json as Hugging Face's GPT2Config reads it, with the dropouts that it was trained with.

    GPT2Config takes a dropout that is not there as 0.1; KerasHub refuses to read a folder without them.
    """
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": geometry.vocab_size,
        "n_positions": geometry.n_positions,
        "n_ctx": geometry.n_positions,
        "n_embd": geometry.n_embd,
        "n_layer": geometry.n_layer,
        "n_head": geometry.n_head,
        "n_inner": geometry.n_inner,
        "activation_function": geometry.activation_function,
        "layer_norm_epsilon": geometry.layer_norm_epsilon,
        "embd_pdrop": recipe.embd_pdrop,
        "attn_pdrop": recipe.attn_pdrop,
        "resid_pdrop": recipe.resid_pdrop,
        "bos_token_id": geometry.bos_token_id,
        "eos_token_id": geometry.eos_token_id,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def train(recipe: Recipe, prepared: Path, folder: Path, run_id: str, reporter: Reporter) -> dict[str, Any]:
    """Train on the tokens in `prepared`; write weights, config.json, training.json, metrics.jsonl and report.html
    to `folder`.

    Returns the report. A checkpoint of the same `run_id` in `folder` is taken up. Raises InputError for a base
    checkpoint that does not fit, TrainingError when the loss is not a number.
    """
    tokenizer = load_tokenizer(prepared / "tokenizer")
    end = end_token_id(tokenizer)
    shard, held_out = (open_shard(prepared / "tokens" / f"{side}.bin", end) for side in ("train", "validation"))
    vocab_size = vocabulary_size(tokenizer)
    base = resolve_base(recipe.model.base) if recipe.model.base else None
    geometry = geometry_of(recipe.model, vocab_size, end, base)
    if vocab_size > geometry.vocab_size:
        raise InputError(
            f"model.base {recipe.model.base!r}: its tokenizer has {vocab_size} entries, its weights only "
            f"{geometry.vocab_size}; name a whole checkpoint"
        )
    if recipe.training.sequence_length > geometry.n_positions:
        raise InputError(
            f"recipe key 'training.sequence_length' is {recipe.training.sequence_length}, longer than the "
            f"{geometry.n_positions} positions of {recipe.model.base}"
        )

    # TensorFlow only now: what is wrong above is answered at once.
    from builder.training.device_strategy import training_devices

    with training_devices(recipe.training) as devices:
        if devices > 1:
            reporter.line(f"training on {devices} devices")
        return _train(recipe, base, geometry, shard, held_out, tokenizer, folder, run_id, reporter)


def _train(
    recipe: Recipe,
    base: Base | None,
    geometry: Geometry,
    shard: Shard,
    held_out: Shard,
    tokenizer: Tokenizer,
    folder: Path,
    run_id: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Make the model, fit it and write what `train` says, on the devices whose scope is open."""
    from builder.keras_backend import keras
    from builder.model.safetensors_file import write_safetensors
    from builder.training.freezing import choose_trainable
    from builder.training.samples import Continuations
    from builder.training.trainer import LanguageModel, exported_row, fit, layer_precision

    keras.utils.set_random_seed(recipe.seed)
    with layer_precision(recipe.training.precision):
        model = LanguageModel.create(
            geometry,
            embd_pdrop=recipe.model.embd_pdrop,
            attn_pdrop=recipe.model.attn_pdrop,
            resid_pdrop=recipe.model.resid_pdrop,
        )
    if base is not None:
        reporter.line(f"base: {load_weights(model, base.weights)} of {recipe.model.base}")
    if recipe.training.epochs:
        choose_trainable(model, recipe.training)
    reporter.line(f"model: {geometry.parameters:,} parameters, {geometry.n_layer} layers of {geometry.n_embd}")
    settings = recipe.training
    prompts = _prompts(recipe, tokenizer, held_out) if settings.sample_tokens else []

    continuations = Continuations(model, prompts, settings.sample_tokens)

    def sample() -> list[tuple[str, str]]:
        pairs = zip(prompts, continuations(), strict=True)
        return [(tokenizer.decode(prompt), tokenizer.decode(text)) for prompt, text in pairs]

    shown: list[tuple[str, str]] = []
    with reporter.training() as tell:

        def notify(event: dict[str, Any]) -> None:
            tell(event)
            if "validation" in event:
                shown[:] = event.get("samples", [])
                for prompt, text in shown:
                    reporter.line(f"  {prompt!r} -> {text!r}")
                write_report(folder / REPORT_PAGE, recipe.name, read_metrics(folder), event["history"], shown)

        history = fit(
            model,
            settings,
            shard,
            held_out,
            seed=recipe.seed,
            folder=folder / "checkpoint",
            run_id=run_id,
            notify=notify,
            log=MetricsLog(folder, every=settings.log_every, tensorboard=settings.tensorboard),
            sample=sample,
        )
    write_report(folder / REPORT_PAGE, recipe.name, read_metrics(folder), history, shown or sample())
    # With weights, n-grams are held to the same targets.
    counted = None
    if not is_plain(shard, settings):
        counted = counted_targets(shard, settings), counted_targets(held_out, settings)
    exported = exported_row(history, recipe.training)
    report = {
        "loop": settings.loop,
        "parameters": geometry.parameters,
        "training_tokens": len(shard.ids),
        "validation_tokens": len(held_out.ids),
        "validation_loss": exported["validation_loss"],
        "validation_perplexity": exported["validation_perplexity"],
        "validation_accuracy": exported["validation_accuracy"],
        "unigram_perplexity": unigram_perplexity(shard.ids, held_out.ids, geometry.vocab_size, counted),
        "trigram_perplexity": trigram_perplexity(shard.ids, held_out.ids, geometry.vocab_size, counted),
        "history": history,
    }
    if counted:
        report |= {"counted_training_tokens": int(counted[0].sum()), "counted_validation_tokens": int(counted[1].sum())}
    _say_how_it_compares(report, reporter)
    write_safetensors(model, folder / WEIGHTS)
    config = hf_config(geometry, recipe.model)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _prompts(recipe: Recipe, tokenizer: Tokenizer, held_out: Shard) -> list[list[int]]:
    """Ids of the prompts that samples continue; the recipe's own stand in the instruction template if it has one."""
    if recipe.training.sample_prompts:
        texts = list(recipe.training.sample_prompts)
        if recipe.instruction.is_set:
            texts = [Template.of(recipe.instruction).prompt(text) for text in texts]
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        return [ids for ids in encoded if ids]
    if held_out.mask is not None:
        return first_prompts(held_out, 2)
    places = (0, len(held_out.ids) // 2)
    return [held_out.ids[place : place + 8].tolist() for place in places]


def quality(report: dict[str, Any]) -> dict[str, float]:
    """The report's figures that a manifest carries."""
    return {key: float(value) for key, value in report.items() if key not in ("history", "loop")}


def _say_how_it_compares(report: dict[str, Any], reporter: Reporter) -> None:
    ours, trigram = report["validation_perplexity"], report["trigram_perplexity"]
    verdict = "better than both" if ours < min(trigram, report["unigram_perplexity"]) else "NOT better than both"
    reporter.line(
        f"validation perplexity {ours:.2f}, {verdict}: unigram {report['unigram_perplexity']:.2f}, "
        f"trigram (modified Kneser-Ney) {trigram:.2f}, on the same {_compared(report):,} tokens"
    )


def _compared(report: dict[str, Any]) -> int:
    return int(report.get("counted_validation_tokens", report["validation_tokens"]))
