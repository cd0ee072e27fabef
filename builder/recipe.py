"""Recipes: everything that decides what a bundle becomes, as one frozen tree of dataclasses read from TOML.

Each field carries a sentence and, where it has one, a bound; `recipe_reader` checks both. Names follow Hugging Face's
GPT-2 configuration and training arguments, so that a recipe reads like what its users already know.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from builder.data_recipe import CleaningRecipe as CleaningRecipe
from builder.data_recipe import CorpusRecipe as CorpusRecipe
from builder.data_recipe import InstructionRecipe as InstructionRecipe
from builder.data_recipe import TokenizerRecipe as TokenizerRecipe
from builder.data_recipe import key
from serving.errors import InputError
from serving.support.suggestions import did_you_mean


@dataclass(frozen=True)
class ModelRecipe:
    """Geometry and dropouts of GPT-2 trained from scratch, or the base checkpoint to start from."""

    base: str = key(
        "",
        "Checkpoint to fine-tune: the folder of a model, a bundle or a run, or a name on the Hugging Face "
        "hub. Empty trains from scratch.",
    )
    end_token: str = key(
        "", "Token that ends a text, such as <|im_end|>, if the base's files name two. Empty uses the base's."
    )
    preset: str = key("", "Named geometry (PRESETS). Empty uses the four sizes below.")
    vocab_size: int = key(
        0,
        "Rows of the token embedding when training from scratch. 0 uses the tokenizer's size; a larger value pads it.",
        low=0,
        high=10_000_000,
    )
    n_positions: int = key(128, "Context length in tokens.", low=8, high=65_536)
    n_embd: int = key(192, "Width of the residual stream.", low=8, high=16_384)
    n_layer: int = key(4, "Number of transformer blocks.", low=1, high=256)
    n_head: int = key(6, "Number of attention heads. Must divide n_embd.", low=1, high=256)
    embd_pdrop: float = key(0.0, "Dropout after the embeddings.", low=0.0, high=0.9)
    attn_pdrop: float = key(0.0, "Dropout on attention probabilities.", low=0.0, high=0.9)
    resid_pdrop: float = key(0.0, "Dropout on the two outputs of each block.", low=0.0, high=0.9)


@dataclass(frozen=True)
class TrainingRecipe:
    """How the weights are fitted."""

    epochs: float = key(
        4.0,
        "Passes over the training tokens. Fractions are allowed; 0 exports the initial weights.",
        low=0.0,
        high=10_000,
    )
    batch_size: int = key(16, "Sequences per training step.", low=1, high=65_536)
    sequence_length: int = key(
        128, "Tokens per sequence, from 8 to n_positions. 0 uses n_positions, but at most 512.", low=0, high=65_536
    )
    packing: str = key(
        "stream",
        "stream: join documents by the end token and cut the stream into sequences. rows: one document per "
        "sequence, cut or padded.",
        choices=("stream", "rows"),
    )
    optimizer: str = key(
        "muon",
        "muon uses Muon for the matrices of the blocks and AdamW for the rest. The others apply to all weights.",
        choices=("adamw", "muon", "adam", "sgd"),
    )
    learning_rate: float = key(1e-2, "Peak learning rate.", low=0.0, high=1.0)
    adam_rate_ratio: float = key(
        1.5,
        "With muon, the AdamW learning rate (embeddings, biases, norms) divided by learning_rate.",
        low=0.0,
        high=100.0,
    )
    schedule: str = key(
        "cosine",
        "Learning-rate decay after the warm-up. constant and inverse_sqrt have no end point.",
        choices=("constant", "linear", "cosine", "inverse_sqrt"),
    )
    warmup_fraction: float = key(
        0.05, "Share of the steps during which the learning rate rises from 0.", low=0.0, high=1.0
    )
    final_learning_rate_fraction: float = key(
        0.05, "Final learning rate of cosine and linear, as a share of the peak.", low=0.0, high=1.0
    )
    weight_decay: float = key(
        0.25,
        "Weight decay of matrices with muon and adamw. Biases, norms and embeddings have none.",
        low=0.0,
        high=10.0,
    )
    momentum: float = key(0.9, "With sgd, the momentum of the gradients. 0 means none.", low=0.0, high=0.9999)
    adam_beta1: float = key(0.9, "Decay of the first moment.", low=0.0, high=0.9999)
    adam_beta2: float = key(0.98, "Decay of the second moment.", low=0.0, high=0.99999)
    max_grad_norm: float = key(1.0, "Gradients are scaled down to this global norm.", low=1e-6)
    precision: str = key(
        "float32", "Precision of the layers. The weights are float32 in both.", choices=("float32", "bfloat16")
    )
    freeze: tuple[str, ...] = key(
        (), "Weights that are not trained, as patterns of Hugging Face names: wte.weight, h.0.*, *.bias."
    )
    lora_rank: int = key(
        0,
        "Rank of the LoRA adapters. Only the adapters are trained, and the export merges them. 0 means no LoRA.",
        low=0,
        high=1024,
    )
    lora_alpha: float = key(
        0.0, "The adapters are scaled by lora_alpha / lora_rank. 0 uses the rank.", low=0.0, high=1e4
    )
    lora_targets: tuple[str, ...] = key(
        ("attn.c_attn", "mlp.c_fc"),
        "Matrices that get LoRA adapters.",
        choices=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    )
    accumulation: int = key(
        1, "Gradient accumulation: micro-batches per batch, to save memory. Must divide batch_size.", low=1, high=65_536
    )
    label_smoothing: float = key(
        0.0, "Share of each target that is spread evenly over the vocabulary, in training only.", low=0.0, high=0.9
    )
    ema: float = key(
        0.0, "Momentum of the exponential moving average of the weights, which is validated and exported. 0 means "
"none.",
        low=0.0, high=0.99999,
    )  # fmt: skip
    validations: int = key(4, "Number of validations and checkpoints, spread evenly over the run.", low=1, high=1000)
    patience: int = key(
        0,
        "Early stopping: stop after this many validations without a lower loss. 0 never stops early.",
        low=0,
        high=1000,
    )
    keep: str = key("last", "Validation whose weights are exported.", choices=("best", "last"))
    checkpoints_kept: int = key(1, "Number of checkpoints to keep, the newest ones.", low=1, high=1000)
    log_every: int = key(10, "Steps between two lines of metrics.jsonl.", low=1, high=1_000_000)
    tensorboard: bool = key(False, "Write TensorBoard event files too.")
    sample_prompts: tuple[str, ...] = key(
        (), "Prompts that are continued at each validation. Empty uses two places of the validation text."
    )
    sample_tokens: int = key(16, "Tokens to generate per sample prompt. 0 generates no samples.", low=0, high=1024)
    loop: str = key(
        "fit",
        "fit is the training loop of Keras. custom is a loop of this project with the same steps.",
        choices=("fit", "custom"),
    )
    jit_compile: bool = key(True, "Compile the training step with XLA. Applies to one device only.")
    devices: int = key(0, "Number of GPUs that share a batch. 0 uses all that are visible.", low=0, high=1024)
    worker_timeout: float = key(
        600.0, "With TF_CONFIG, seconds in which all workers must have started.", low=1.0, high=86_400.0
    )


# Defaults of the training keys of a recipe with `model.base`; the dataclass above has those of training from scratch.
FINE_TUNING: dict[str, Any] = {
    "epochs": 3.0, "batch_size": 4, "sequence_length": 0, "optimizer": "adamw", "learning_rate": 5e-5,
    "warmup_fraction": 0.1, "weight_decay": 0.01, "adam_beta2": 0.999,
}  # fmt: skip
LONGEST_ROW = 512
"""Tokens of a row where `training.sequence_length` is 0 and the context is longer."""

# Training keys that have no use with an optimizer.
NO_USE = {
    "muon": ("momentum",),
    "adamw": ("momentum", "adam_rate_ratio"),
    "adam": ("momentum", "adam_rate_ratio", "weight_decay"),
    "sgd": ("adam_rate_ratio", "weight_decay", "adam_beta1", "adam_beta2"),
}

# Training keys that decide what is seen of a run, and by which loop it is made, but not what its weights become.
OBSERVING = (
    "log_every", "tensorboard", "sample_prompts", "sample_tokens", "checkpoints_kept", "loop", "worker_timeout",
)  # fmt: skip


@dataclass(frozen=True)
class ExportRecipe:
    """What a bundle holds beside the float32 graphs, which are always there."""

    variants: tuple[str, ...] = key(
        ("int8", "int4"), "Additional precisions of the optimized graph, under ort/.", choices=("fp16", "int8", "int4")
    )
    int8_kv_cache: tuple[str, ...] = key(
        ("int8", "int4"), "Variants that store the KV cache in int8, a quarter of the memory.", choices=("int8", "int4")
    )
    slots: int = key(
        8,
        "Slots of the SavedModel: sequences that decode_slots runs concurrently. 0 leaves slots out.",
        low=0,
        high=256,
    )
    slot_lease: int = key(60, "Seconds without a call after which a slot may be reassigned.", low=1, high=86_400)
    matmul_parts: int = key(
        1,
        "Parts that each matrix of the SavedModel is split into: the number of cores of the server, or 1 for "
        "whole matrices.",
        low=1,
        high=64,
    )


@dataclass(frozen=True)
class VerifyRecipe:
    """What the parity certificate runs, and how far two runtimes may differ."""

    prompts: int = key(64, "Number of prompts from the validation text for greedy parity.", low=1, high=100_000)
    new_tokens: int = key(64, "Tokens to generate per prompt.", low=1, high=65_536)
    batch_size: int = key(16, "Sequences of different lengths per batch.", low=1, high=4096)
    max_abs: float = key(1e-3, "Maximum difference of a logit in fp32.", low=0.0, high=1.0)
    perplexity_tokens: int = key(8192, "Validation tokens to score in each runtime.", low=64)
    perplexity_relative: float = key(1e-4, "Maximum relative difference of perplexity in fp32.", low=0.0, high=1.0)
    fp16_perplexity: float = key(
        1e-3,
        "Maximum relative increase of perplexity of ort/fp16. A variant above its limit is left out of the bundle.",
        low=0.0,
        high=10,
    )
    int8_perplexity: float = key(0.01, "Maximum relative increase of perplexity of ort/int8.", low=0.0, high=10)
    int4_perplexity: float = key(0.03, "Maximum relative increase of perplexity of ort/int4.", low=0.0, high=10)
    better_than: str = key(
        "",
        "Baseline whose perplexity on the validation text the model must beat, or the build fails. Empty means none.",
        choices=("", "unigram", "trigram"),
    )


@dataclass(frozen=True)
class TrackingRecipe:
    """Experiment trackers that `train` and `build` report to. They change nothing about the bundle."""

    tools: tuple[str, ...] = key(
        (),
        "Trackers that get the recipe, the metrics, the figures of the certificate and the bundle. Each needs the "
        "extra of its name.",
        choices=("mlflow", "wandb"),
    )
    project: str = key("gpt2-bundle", "Experiment of MLflow, project of Weights & Biases.")
    bundle: str = key(
        "reference",
        "What a tracker gets of the bundle: its place, hashes and certificate, a copy of all files, or nothing.",
        choices=("reference", "copy", "none"),
    )
    timeout: float = key(
        60.0, "Maximum number of seconds that the end of a build waits for the trackers.", low=1.0, high=86_400.0
    )


@dataclass(frozen=True)
class Recipe:
    """One bundle's whole recipe."""

    name: str = key("gpt2-docs", "Name of the bundle, and of its folders under dist/ and runs/.")
    seed: int = key(
        1234,
        "Seed of the split, the initial weights, the dropout and the order of the sequences.",
        low=0,
        high=2**31 - 1,
    )
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    instruction: InstructionRecipe = field(default_factory=InstructionRecipe)
    cleaning: CleaningRecipe = field(default_factory=CleaningRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)
    verify: VerifyRecipe = field(default_factory=VerifyRecipe)
    tracking: TrackingRecipe = field(default_factory=TrackingRecipe)

    @property
    def min_characters(self) -> int:
        """Characters that a document has at least (see `CorpusRecipe.min_characters`)."""
        short = self.instruction.is_set or self.corpus.document == "line"
        return self.corpus.min_characters or (1 if short else 20)


def fit_context(recipe: Recipe, n_positions: int, where: str = "model.n_positions") -> Recipe:
    """Return `recipe` with the tokens of a row decided for a model of `n_positions`.

    Raises InputError for rows longer than that; `where` says whose positions they are.
    """
    length = recipe.training.sequence_length or min(n_positions, LONGEST_ROW)
    if length > n_positions:
        raise InputError(
            f"recipe key 'training.sequence_length' is {length}, longer than {where} {n_positions}; "
            "lower it, or set it to 0, which takes what fits"
        )
    return replace(recipe, training=replace(recipe.training, sequence_length=length))


# Named geometries: OpenAI's four releases of GPT-2 and DistilGPT-2, and small ones for two cores.
# name: (n_layer, n_embd, n_head, n_positions). The GPT-2 rows are those of the released hparams.json files.
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "nano": (2, 128, 2, 128),
    "mini": (4, 256, 4, 256),
    "small": (6, 384, 6, 512),
    "distilgpt2": (6, 768, 12, 1024),
    "gpt2": (12, 768, 12, 1024),
    "gpt2-medium": (24, 1024, 16, 1024),
    "gpt2-large": (36, 1280, 20, 1024),
    "gpt2-xl": (48, 1600, 25, 1024),
}


def resolve_preset(model: ModelRecipe) -> ModelRecipe:
    """Return `model` with its preset's geometry filled in; raise `InputError` for an unknown preset."""
    if not model.preset:
        return model
    if model.preset not in PRESETS:
        raise InputError(f"recipe key model.preset: no preset {model.preset!r}{did_you_mean(model.preset, PRESETS)}")
    n_layer, n_embd, n_head, n_positions = PRESETS[model.preset]
    return replace(model, preset="", n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_positions)
