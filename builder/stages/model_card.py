"""The bundle's README.md: a Hugging Face model card made of what was measured, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.training.plan import OWN_PROGRAM, limits
from builder.verification.paired_loss import relative_difference
from serving.bundle import Bundle
from serving.bundle.examples import generate_arguments


def model_card(bundle: Bundle, certificate: dict[str, Any], quality: dict[str, float]) -> str:
    """Return the card's Markdown, front matter included."""
    manifest = bundle.manifest
    model = manifest.model
    base = _base_name(manifest.provenance.recipe["model"]["base"])
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2, onnx, tf-serving]"]
    if base:
        front.append(f"base_model: {base}")
    lines = [
        "---",
        *front,
        "---",
        f"# {manifest.name}",
        "",
        f"GPT-2 with {model.parameters:,} parameters ({model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, context {model.n_positions}, vocabulary {model.vocab_size:,}), built by gpt2-bundle.",
        "",
        "## Training",
        "",
        _training(base, manifest.provenance.recipe["training"], quality),
        "",
        "## Quality",
        "",
        f"Over {int(quality.get('counted_validation_tokens', quality['validation_tokens'])):,} held-out tokens"
        + (" of responses:" if "counted_validation_tokens" in quality else ":"),
        "",
        "| model | perplexity |",
        "|---|---|",
        f"| this model | {quality['validation_perplexity']:.2f} |",
        f"| trigram, interpolated modified Kneser-Ney | {quality['trigram_perplexity']:.2f} |",
        f"| unigram | {quality['unigram_perplexity']:.2f} |",
        "",
        *(f"{sentence[0].upper()}{sentence[1:]}.\n" for sentence in limits(quality)),
        "## Parity",
        "",
        f"Status: {certificate['status']}.",
        "",
        f"Against Keras in float32, {certificate['prompts']} ragged prompts continued by {certificate['new_tokens']} "
        f"tokens each; perplexity over {certificate['perplexity']['tokens']:,} of the held-out tokens. "
        "The whole record is in verification.json.",
        "",
        "| runtime | largest logit difference | greedy tokens equal | perplexity |",
        "|---|---|---|---|",
    ]
    for name, table in certificate["runtimes"].items():
        greedy = certificate["greedy"][name]
        lines.append(
            f"| {name} | {table['every_step']['max_abs']:.1e} | {greedy['equal']:,} of {greedy['of']:,} "
            f"| {table['perplexity']:.4f} |"
        )
    lines += [f"| Keras (reference) | | | {certificate['perplexity']['reference']:.4f} |", ""]
    reading = certificate["transformers"]
    lines += [
        f"transformers {reading['version']} reads this folder as it is: the same ids for {reading['texts']} texts, "
        "the same sizes and token ids"
        + (", the chat template of training." if reading["chat_template"] == "equal" else "."),
        "",
    ]
    lines += _variants(certificate)
    lines += ["Not run:", ""]
    lines += [f"- {sentence}" for sentence in certificate["not_run"]]
    lines += [
        "",
        "## Use",
        "",
        "In the folder of this file:",
        "",
        "```sh",
        f"gpt2-bundle generate . {generate_arguments(bundle.folder)} --runtime onnx",
        "gpt2-bundle serve .",
        "gpt2-bundle verify .",
        "```",
        "",
        "`savedmodel/` is a TensorFlow Serving model folder; `onnx/model.onnx` takes any padding and uses standard "
        "operators; `ort/fp32/model.onnx` is the same model on ONNX Runtime's GroupQueryAttention with a shared cache.",
        "",
    ]
    return "\n".join(lines)


def _base_name(base: str) -> str:
    """The base checkpoint as a card may call it.

    Of a folder its own name at most: the card says nothing about the machine that built it, and dist/NAME is not a name
    on the hub.
    """
    local = base.startswith((".", "/", "~")) or Path(base).is_dir()
    return base.rstrip("/").rpartition("/")[2] if local else base


def _training(base: str, recipe: dict[str, Any], quality: dict[str, float]) -> str:
    """One sentence on where the weights come from."""
    if recipe["loop"] == OWN_PROGRAM:
        return f"Fine-tuned from {base} by a Keras program, whose settings are not part of the recipe."
    steps, trainable = int(quality.get("steps", 0)), int(quality.get("trainable_parameters", 0))
    if not steps:
        return f"The weights of {base}, as they are." if base else "Random weights: this model was not trained."
    start = f"Fine-tuned from {base}" if base else "Trained from scratch"
    rank = int(quality.get("lora_rank", 0))
    method = f" with LoRA of rank {rank} on {', '.join(recipe['lora_targets'])}" if rank else ""
    rows = f"{recipe['batch_size']} x {recipe['sequence_length']} tokens"
    return (
        f"{start}{method}: {steps:,} steps of {rows} with {recipe['optimizer']} at a learning rate of "
        f"{recipe['learning_rate']:g}; {trainable:,} of {int(quality['parameters']):,} parameters were trained."
    )


def _variants(certificate: dict[str, Any]) -> list[str]:
    """What fewer bits cost: a row for each variant in the bundle, a sentence for each that was left out."""
    kept = {name: table for name, table in certificate["variants"].items() if name not in certificate["left_out"]}
    lines = []
    if kept:
        lines += [
            "In fewer bits, against the same reference; KL divergence in nats a token, logit differences as median, "
            "99th percentile and largest; alone are the greedy tokens that a prompt has both by itself and in a batch:",
            "",
            "| variant | status | perplexity | same likeliest token | KL | logit difference | same greedy text for "
            "| alone |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for name, table in kept.items():
        first = table["first_divergence"]
        difference = " / ".join(f"{table['logit_difference'][key]:.2g}" for key in ("p50", "p99", "max"))
        lines.append(
            f"| {name} | {table['status']} | {table['perplexity']:.4f}, {relative_difference(table, digits=2)} "
            f"| {table['top1_agreement']:.2%} | {table['kl_divergence']:.2e} | {difference} "
            f"| {first['median']:.0f} of {first['of']} tokens (median; shortest {first['min']}) "
            f"| {table['alone']['equal']:,} of {table['alone']['of']:,} |"
        )
    lines += [""] if kept else []
    for name, table in kept.items():
        pair = table.get("prefill_graph", {})
        if "status" in pair:
            lines += [
                f"{pair['graph']} may prefill the prompts of {name} (status: {pair['status']}): perplexity "
                f"{relative_difference(pair, digits=2)} on {pair['tokens']:,} tokens that decode steps predict after "
                f"prompts of {pair['prompt_tokens']} tokens; with its own prompts, "
                f"{pair['same']['perplexity_relative']:+.2%}.\n"
            ]
    lines += [f"{name} was left out: {reason}.\n" for name, reason in certificate["left_out"].items()]
    return lines
