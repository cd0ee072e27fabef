"""The training stage: prepared tokens to trained weights, with a report that compares them with n-gram models."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from builder.data.character_tokens import CharacterTokens
from builder.data.document_batches import counted_targets, first_prompts, is_plain, make_sampler
from builder.data.instructions import Template
from builder.data.masked_shards import Shard, open_shard
from builder.data.ngram_baselines import trigram_perplexity, unigram_perplexity
from builder.data.tokenizer import load_tokenizer, vocabulary_size
from builder.model.pretrained import Base, geometry_of, load_weights, resolve_base
from builder.progress import Reporter
from builder.recipe import ModelRecipe, Recipe, TrainingRecipe, VerifyRecipe
from builder.special_tokens import TokenIds, read_token_ids
from builder.tracking.session import Tracking
from builder.training.metrics_log import METRICS, TENSORBOARD, MetricsLog, read_metrics
from builder.training.plan import adapter_line, limits, plan_steps, settings_line, settled
from builder.training.training_report import REPORT_PAGE, write_report
from builder.training.workers import Workers
from serving.bundle import Geometry
from serving.errors import InputError, TrainingError

WEIGHTS = "model.safetensors"
REPORT = "training.json"
# What is written into the stage's folder, and what of it the next call keeps to resume from.
WRITES = (WEIGHTS, "config.json", REPORT, REPORT_PAGE)
KEEPS = ("checkpoint", METRICS, TENSORBOARD)
SETTINGS = ("loop", "sequence_length")
"""Keys of the report that say what a training setting was in fact, where the recipe leaves it open."""


def hf_config(geometry: Geometry, recipe: ModelRecipe, pad: int | None = None) -> dict[str, Any]:
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
        **({} if pad is None else {"pad_token_id": pad}),
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def tokens_digest(prepared: Path) -> str:
    """SHA-256 of the tokens, their masks and the tokenizer in `prepared`. Raises InputError if they are not there."""
    digest = hashlib.sha256()
    paths = [*(prepared / "tokens").glob("*.bin"), *(prepared / "tokens").glob("*.mask")]
    for path in sorted([*paths, *(prepared / "tokenizer").glob("*.json")]):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    if not paths:
        raise InputError(
            f"{prepared}: no tokens here; share the run's folder with the chief's machine, or copy this one"
        )
    return digest.hexdigest()


def train(
    recipe: Recipe,
    prepared: Path,
    folder: Path,
    run_id: str,
    reporter: Reporter,
    workers: Workers | None = None,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Train on the tokens in `prepared`; write weights, config.json, training.json, metrics.jsonl and report.html
    to `folder`. Of several `workers`, the chief alone writes. `tracking` gets the lines of metrics.jsonl.

    Returns the report; nothing where this worker is not the chief. A checkpoint of the same `run_id` in `folder` is
    resumed. Raises InputError for a base checkpoint that does not fit, TrainingError when the loss is not a number or
    another worker has failed.
    """
    recipe = settled(recipe)
    tokenizer = load_tokenizer(prepared / "tokenizer")
    ids = read_token_ids(prepared / "tokenizer")
    shard, held_out = (open_shard(prepared / "tokens" / f"{side}.bin", ids.eos) for side in ("train", "validation"))
    vocab_size = vocabulary_size(tokenizer)
    base = resolve_base(recipe.model.base) if recipe.model.base else None
    geometry = geometry_of(recipe.model, vocab_size, ids, base)
    if vocab_size > geometry.vocab_size:
        raise InputError(
            f"model.base {recipe.model.base!r}: its tokenizer has {vocab_size} entries, its weights only "
            f"{geometry.vocab_size}; name a whole checkpoint"
        )

    # TensorFlow is imported only here, so that the errors above come at once.
    from builder.training.device_strategy import training_devices

    with training_devices(recipe.training) as devices:
        if devices > 1 and workers is not None:
            raise InputError(
                f"{workers.cluster.names[workers.rank]} has {devices} devices, and a worker trains on one; start one "
                "worker a GPU (CUDA_VISIBLE_DEVICES), or set training.devices=1"
            )
        if devices > 1:
            reporter.line(f"training on {devices} devices")
        return _train(
            recipe, base, geometry, ids, shard, held_out, tokenizer, folder, run_id, reporter, workers, tracking
        )


def _train(
    recipe: Recipe,
    base: Base | None,
    geometry: Geometry,
    ids: TokenIds,
    shard: Shard,
    held_out: Shard,
    tokenizer: Tokenizer,
    folder: Path,
    run_id: str,
    reporter: Reporter,
    workers: Workers | None,
    tracking: Tracking | None,
) -> dict[str, Any]:
    """Make the model, fit it and write what `train` says, on the devices whose scope is open."""
    from builder.keras_backend import keras
    from builder.model.safetensors_file import write_safetensors
    from builder.training.freezing import set_trainable
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
        reporter.line(f"base: {load_weights(model, base.weights, base.adapter)} of {recipe.model.base}")
    settings = recipe.training
    about = [f"model: {geometry.parameters:,} parameters, {geometry.n_layer} layers of {geometry.n_embd}"]
    trainable = 0
    if settings.epochs:
        set_trainable(model, settings)
        trainable = sum(math.prod(variable.shape) for variable in model.trainable_variables)
        if settings.lora_rank or settings.freeze:
            about.append(adapter_line(settings, trainable, geometry.parameters))
        steps, _ = plan_steps(settings, make_sampler(shard, settings, recipe.seed).rows)
        about.append(settings_line(settings, steps))
    if workers is not None:
        about.append(f"workers: {workers.size}, each with {settings.batch_size // workers.size} rows of a batch")
    for line in about:
        reporter.line(line)
    if workers is not None and not workers.is_chief:
        if settings.epochs:
            fit(model, settings, shard, held_out, seed=recipe.seed, folder=folder, run_id=run_id,
                notify=lambda event: None, workers=workers)  # fmt: skip
        return {}
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
                write_report(folder / REPORT_PAGE, recipe.name, about, read_metrics(folder), event["history"], shown)

        history = fit(
            model,
            settings,
            shard,
            held_out,
            seed=recipe.seed,
            folder=folder / "checkpoint",
            run_id=run_id,
            notify=notify,
            log=MetricsLog(
                folder,
                every=settings.log_every,
                tensorboard=settings.tensorboard,
                tell=None if tracking is None else tracking.log,
            ),
            sample=sample,
            workers=workers,
        )
    exported = exported_row(history, recipe.training)
    report = {
        "loop": settings.loop,
        "sequence_length": settings.sequence_length,
        "steps": exported["step"],
        "parameters": geometry.parameters,
        "trainable_parameters": trainable,
        "lora_rank": settings.lora_rank,
        **figures(settings, geometry, shard, held_out, exported),
        "history": history,
    }
    _say_how_it_compares(report, reporter)
    for sentence in limits(report):
        reporter.line(sentence)
    about += limits(report)
    write_report(folder / REPORT_PAGE, recipe.name, about, read_metrics(folder), history, shown or sample())
    write_safetensors(model, folder / WEIGHTS)
    config = hf_config(geometry, recipe.model, ids.pad)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def figures(
    settings: TrainingRecipe, geometry: Geometry, shard: Shard, held_out: Shard, row: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the sizes of both sides, the validation figures of a history's `row`, and those of the n-grams."""
    # With weights, n-grams are held to the same targets.
    counted = None
    if not is_plain(shard, settings):
        counted = counted_targets(shard, settings), counted_targets(held_out, settings)
    found = {
        "training_tokens": len(shard.ids),
        "validation_tokens": len(held_out.ids),
        "validation_loss": row["validation_loss"],
        "validation_perplexity": row["validation_perplexity"],
        "validation_accuracy": row["validation_accuracy"],
        "unigram_perplexity": unigram_perplexity(shard.ids, held_out.ids, geometry.vocab_size, counted),
        "trigram_perplexity": trigram_perplexity(shard.ids, held_out.ids, geometry.vocab_size, counted),
    }
    if counted:
        found |= {"counted_training_tokens": int(counted[0].sum()), "counted_validation_tokens": int(counted[1].sum())}
    return found


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
    characters = CharacterTokens(tokenizer)
    starts = [characters.next_place(held_out.ids, place) for place in (0, len(held_out.ids) // 2)]
    found = [held_out.ids[place : characters.next_place(held_out.ids, place + 8)].tolist() for place in starts]
    return [ids for ids in found if ids]


def quality(report: dict[str, Any]) -> dict[str, float]:
    """The report's figures that a manifest carries."""
    return {key: float(value) for key, value in report.items() if key not in ("history", *SETTINGS)}


def check_quality(recipe: VerifyRecipe, figures: Mapping[str, float]) -> None:
    """Raise TrainingError if a model with these figures is not better than `recipe.better_than`."""
    if not recipe.better_than:
        return
    ours, theirs = figures["validation_perplexity"], figures[f"{recipe.better_than}_perplexity"]
    if not ours < theirs:
        raise TrainingError(
            f"validation perplexity {ours:.2f} is not below the {recipe.better_than}'s {theirs:.2f}, as "
            "verify.better_than asks for; train longer, add text, or change that key"
        )


def _say_how_it_compares(report: dict[str, Any], reporter: Reporter) -> None:
    ours, trigram = report["validation_perplexity"], report["trigram_perplexity"]
    verdict = "better than both" if ours < min(trigram, report["unigram_perplexity"]) else "NOT better than both"
    reporter.line(
        f"validation perplexity {ours:.2f}, {verdict}: unigram {report['unigram_perplexity']:.2f}, "
        f"trigram (modified Kneser-Ney) {trigram:.2f}, on the same {_compared(report):,} tokens"
    )


def _compared(report: dict[str, Any]) -> int:
    return int(report.get("counted_validation_tokens", report["validation_tokens"]))
