"""The training stage: prepared tokens to trained weights, with the report that puts them beside the n-gram models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tokenizers import Tokenizer

from builder.base import Base, geometry_of, load_weights, resolve_base
from builder.metrics_log import MetricsLog, read_metrics
from builder.ngram import trigram_perplexity, unigram_perplexity
from builder.progress import Reporter
from builder.recipe import Recipe, TrainingRecipe
from builder.run_report import REPORT_PAGE, write_report
from builder.tokenizer import end_token_id, load_tokenizer, vocabulary_size
from builder.tokens import open_tokens
from serving.bundle import Geometry
from serving.errors import InputError

WEIGHTS = "model.safetensors"
REPORT = "training.json"


def hf_config(geometry: Geometry) -> dict[str, Any]:
    """The model's config.json as Hugging Face's GPT2Config reads it."""
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
    tokens = open_tokens(prepared / "tokens" / "train.bin")
    held_out = open_tokens(prepared / "tokens" / "validation.bin")
    tokenizer = load_tokenizer(prepared / "tokenizer")
    vocab_size = vocabulary_size(tokenizer)
    base = resolve_base(recipe.model.base) if recipe.model.base else None
    geometry = geometry_of(recipe.model, vocab_size, end_token_id(tokenizer), base)
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
    from builder.devices import training_devices

    with training_devices(recipe.training) as devices:
        if devices > 1:
            reporter.line(f"training on {devices} devices")
        return _train(recipe, base, geometry, tokens, held_out, tokenizer, folder, run_id, reporter)


def _train(
    recipe: Recipe,
    base: Base | None,
    geometry: Geometry,
    tokens: NDArray[Any],
    held_out: NDArray[Any],
    tokenizer: Tokenizer,
    folder: Path,
    run_id: str,
    reporter: Reporter,
) -> dict[str, Any]:
    """Make the model, fit it and write what `train` says, on the devices whose scope is open."""
    from builder.frameworks import keras
    from builder.samples import Continuations
    from builder.trainable import choose_trainable
    from builder.training import LanguageModel, exported_row, fit, layer_precision
    from builder.weights import write_safetensors

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
    prompts = _prompts(settings, tokenizer, held_out) if settings.sample_tokens else []

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
            tokens,
            held_out,
            seed=recipe.seed,
            folder=folder / "checkpoint",
            run_id=run_id,
            notify=notify,
            log=MetricsLog(folder, every=settings.log_every, tensorboard=settings.tensorboard),
            sample=sample,
        )
    write_report(folder / REPORT_PAGE, recipe.name, read_metrics(folder), history, shown or sample())
    exported = exported_row(history, recipe.training)
    report = {
        "loop": settings.loop,
        "parameters": geometry.parameters,
        "training_tokens": len(tokens),
        "validation_tokens": len(held_out),
        "validation_loss": exported["validation_loss"],
        "validation_perplexity": exported["validation_perplexity"],
        "validation_accuracy": exported["validation_accuracy"],
        "unigram_perplexity": unigram_perplexity(tokens, held_out, geometry.vocab_size),
        "trigram_perplexity": trigram_perplexity(tokens, held_out, geometry.vocab_size),
        "history": history,
    }
    _say_how_it_compares(report, reporter)
    write_safetensors(model, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(hf_config(geometry), indent=2) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _prompts(recipe: TrainingRecipe, tokenizer: Tokenizer, held_out: NDArray[Any]) -> list[list[int]]:
    """Ids of the prompts that samples continue."""
    if recipe.sample_prompts:
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in recipe.sample_prompts]
        return [ids for ids in encoded if ids]
    places = (0, len(held_out) // 2)
    return [held_out[place : place + 8].tolist() for place in places]


def quality(report: dict[str, Any]) -> dict[str, float]:
    """The report's figures that a manifest carries."""
    return {key: float(value) for key, value in report.items() if key not in ("history", "loop")}


def _say_how_it_compares(report: dict[str, Any], reporter: Reporter) -> None:
    ours, trigram = report["validation_perplexity"], report["trigram_perplexity"]
    verdict = "better than both" if ours < min(trigram, report["unigram_perplexity"]) else "NOT better than both"
    reporter.line(
        f"validation perplexity {ours:.2f}, {verdict}: unigram {report['unigram_perplexity']:.2f}, "
        f"trigram (modified Kneser-Ney) {trigram:.2f}, on the same {report['validation_tokens']:,} tokens"
    )
