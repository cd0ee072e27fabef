"""Recipes: everything that decides what a bundle becomes, as one frozen tree of dataclasses read from TOML.

Each field carries a sentence and, where it has one, a bound; `recipe_reader` checks both. Names follow Hugging Face's
GPT-2 configuration and training arguments, so that a recipe reads like what its users already know.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from serving.errors import InputError
from serving.support.suggestions import did_you_mean


def _key(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A dataclass field with its sentence and its inclusive bounds."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class CorpusRecipe:
    """Where the text comes from and how it is split."""

    paths: tuple[str, ...] = _key((), "Files, folders or globs to read; empty takes the builtin text.")
    builtin: str = _key(
        "docstrings",
        "What is read where there are no paths: the running Python's docstrings, or generated Chinese sentences.",
        choices=("docstrings", "chinese"),
    )
    document: str = _key(
        "file", "What is one document in .txt and .md files: the file, or each line of it.", choices=("file", "line")
    )
    encoding: str = _key(
        "utf-8", "Encoding of texts without a byte-order mark, which decides where there is one: gb18030, cp1252, ..."
    )
    transform: str = _key(
        "", "Function that each text goes through before cleaning, FILE.py:FUNCTION or MODULE:FUNCTION; text to text."
    )
    text_field: str = _key(
        "text", "Field of a .json or .jsonl record, or column of a table, that is the text; a.b is the field b in a."
    )
    bad_records: str = _key(
        "skip",
        "Records that have null or a number where text should be: count them and go on (skip), or end (error).",
        choices=("skip", "error"),
    )
    label_field: str = _key("", "Field or column that is a document's label; empty reads none.")
    balance: str = _key(
        "none",
        "By label, on the training side only: cap at label_cap, sample down to the rarest, or up to the commonest.",
        choices=("none", "cap", "down", "up"),
    )
    label_cap: int = _key(0, "With balance cap, the most documents of one label; 0 is no cap.", low=0)
    validation_fraction: float = _key(
        0.05,
        "Share of the text held out: documents chosen by hash, or where that misses it, the ends of long ones.",
        low=0.001,
        high=0.5,
    )
    deduplicate: bool = _key(True, "Drop documents whose text, white space folded, was seen before.")
    near_duplicates: bool = _key(False, "Drop documents much like one seen before, by MinHash.")
    near_threshold: float = _key(0.8, "Jaccard similarity of shingles from which two are alike.", low=0.3, high=1.0)
    near_num_perm: int = _key(128, "Permutations of a MinHash signature; more estimate better.", low=16, high=1024)
    near_shingle_words: int = _key(5, "Words a shingle.", low=1, high=50)
    min_characters: int = _key(
        0,
        "Drop documents shorter than this, by their text or by their responses alone; 0 takes 20, or 1 for "
        "instructions and for documents of a line.",
        low=0,
    )
    max_characters: int = _key(0, "Drop documents longer than this, or trim them; 0 is no limit.", low=0)
    max_tokens: int = _key(0, "The same in tokens, the end token not counted.", low=0)
    trim: bool = _key(
        False, "Cut documents that are too long, at a line's, a sentence's or a word's end, instead of dropping them."
    )


@dataclass(frozen=True)
class InstructionRecipe:
    """Prompts and responses instead of plain text: where they stand in a record, and the template around them."""

    prompt_field: str = _key("", "Field or column that is the prompt; needs response_field.")
    response_field: str = _key("", "Field or column that is the response, which alone the loss counts.")
    input_field: str = _key("", "Field or column that goes with the prompt, such as a context; may be empty.")
    messages_field: str = _key(
        "", "Instead of those: the field of chat turns, a list of {role, content} or of ShareGPT's {from, value}."
    )
    template: str = _key(
        "instruction",
        "instruction: ### headings as in Alpaca. chat: names of the roles. The keys below replace pieces of either.",
        choices=("instruction", "chat"),
    )
    system_template: str = _key("", "What a system turn becomes, with {content} in it; empty takes the template's.")
    user_template: str = _key("", "The same of a user turn or prompt.")
    input_template: str = _key("", "The same of what input_field holds.")
    tool_template: str = _key("", "The same of what a tool answered.")
    assistant_template: str = _key("", "The same of a response; must end in {content}, where the end token follows.")

    @property
    def is_set(self) -> bool:
        """Whether records are read as instructions."""
        return bool(self.prompt_field or self.response_field or self.messages_field)


@dataclass(frozen=True)
class CleaningRecipe:
    """What is done to each document's text before anything else; all off unless switched on, in the order they run."""

    html: bool = _key(False, "Strip HTML's tags, scripts and styles, and decode its entities.")
    invisible: bool = _key(False, "Remove control characters, terminal sequences and zero-width characters.")
    unicode: str = _key("none", "Unicode normalization form.", choices=("none", "NFC", "NFKC"))
    symbols: str = _key(
        "keep",
        "Rows of four or more equal symbols, and of box drawing: shorten them (collapse) or take them out (drop).",
        choices=("keep", "collapse", "drop"),
    )
    boilerplate_documents: int = _key(
        0, "Remove lines that stand in at least this many documents, such as license headers; 0 keeps all.", low=0
    )
    boilerplate_characters: int = _key(20, "Lines shorter than this are never boilerplate.", low=1)
    white_space: str = _key(
        "keep",
        "lines: line ends unified, blanks at lines' ends and all but one empty line removed. words: inner blanks too.",
        choices=("keep", "lines", "words"),
    )


@dataclass(frozen=True)
class TokenizerRecipe:
    """The byte-level BPE trained on the corpus; a base checkpoint brings its own instead."""

    vocab_size: int = _key(
        2048, "Entries of the vocabulary, the 256 bytes and the end token included.", low=257, high=1_000_000
    )
    min_frequency: int = _key(2, "A pair is merged only if it occurs at least this often.", low=1)
    unbroken_characters: int = _key(
        1_500_000,
        "Characters of scripts without spaces, such as Chinese, to learn from, taken evenly from the text; each takes "
        "some 250 bytes of memory.",
        low=1000,
    )


@dataclass(frozen=True)
class ModelRecipe:
    """Geometry and dropouts of GPT-2 trained from scratch, or the base checkpoint to start from."""

    base: str = _key("", "Folder (a bundle or run too) or hub name of a GPT-2 to fine-tune; empty trains from scratch.")
    end_token: str = _key(
        "", "With a base whose files name two: the token that ends a text, such as <|im_end|>; empty takes the base's."
    )
    preset: str = _key("", "Named geometry (see builder/recipe.py); empty takes the four fields below.")
    vocab_size: int = _key(
        0, "Rows of the token embedding, from scratch; 0 takes the tokenizer's, more pads it.", low=0, high=10_000_000
    )
    n_positions: int = _key(128, "Context length, in tokens.", low=8, high=65_536)
    n_embd: int = _key(192, "Width of the residual stream.", low=8, high=16_384)
    n_layer: int = _key(4, "Transformer blocks.", low=1, high=256)
    n_head: int = _key(6, "Attention heads; must divide n_embd.", low=1, high=256)
    embd_pdrop: float = _key(0.0, "Dropout after the embeddings.", low=0.0, high=0.9)
    attn_pdrop: float = _key(0.0, "Dropout on attention probabilities.", low=0.0, high=0.9)
    resid_pdrop: float = _key(0.0, "Dropout on each block's two outputs.", low=0.0, high=0.9)


@dataclass(frozen=True)
class TrainingRecipe:
    """How the weights are fitted."""

    epochs: float = _key(
        4.0, "Passes over the training tokens; fractions allowed, 0 exports as it is.", low=0.0, high=10_000
    )
    batch_size: int = _key(16, "Rows a step.", low=1, high=65_536)
    sequence_length: int = _key(
        128, "Tokens a row, 8 to the model's n_positions; 0 takes n_positions, but 512 at most.", low=0, high=65_536
    )
    packing: str = _key(
        "stream",
        "stream: documents joined by the end token and cut into rows. rows: one document a row, cut or padded.",
        choices=("stream", "rows"),
    )
    optimizer: str = _key(
        "muon",
        "muon: Muon for the blocks' matrices, AdamW for the rest. adamw, adam, sgd: that one for all weights.",
        choices=("adamw", "muon", "adam", "sgd"),
    )
    learning_rate: float = _key(1e-2, "Peak learning rate.", low=0.0, high=1.0)
    adam_rate_ratio: float = _key(
        1.5, "With muon, AdamW's rate for embeddings, biases and norms over learning_rate.", low=0.0, high=100.0
    )
    schedule: str = _key(
        "cosine",
        "How the rate falls after the warm-up; constant and inverse_sqrt have no end.",
        choices=("constant", "linear", "cosine", "inverse_sqrt"),
    )
    warmup_fraction: float = _key(0.05, "Share of the steps over which the rate rises from 0.", low=0.0, high=1.0)
    final_learning_rate_fraction: float = _key(
        0.05, "Cosine and linear end at this share of the peak.", low=0.0, high=1.0
    )
    weight_decay: float = _key(
        0.25,
        "Decay of matrices with muon and adamw; biases, norms and embeddings have none.",
        low=0.0,
        high=10.0,
    )
    momentum: float = _key(0.9, "With sgd, the momentum of the gradients; 0 is none.", low=0.0, high=0.9999)
    adam_beta1: float = _key(0.9, "Decay of the first moment.", low=0.0, high=0.9999)
    adam_beta2: float = _key(0.98, "Decay of the second moment.", low=0.0, high=0.99999)
    max_grad_norm: float = _key(1.0, "Gradients are scaled down to this global norm.", low=1e-6)
    precision: str = _key(
        "float32", "Arithmetic of the layers; the weights are float32 in both.", choices=("float32", "bfloat16")
    )
    freeze: tuple[str, ...] = _key(
        (), "Weights that stay as they are, as patterns on their Hugging Face names: wte.weight, h.0.*, *.bias."
    )
    lora_rank: int = _key(
        0, "Train low-rank adapters of this rank and nothing else, merged at export; 0 is none.", low=0, high=1024
    )
    lora_alpha: float = _key(0.0, "The adapters count alpha / rank times; 0 takes the rank.", low=0.0, high=1e4)
    lora_targets: tuple[str, ...] = _key(
        ("attn.c_attn", "mlp.c_fc"),
        "Matrices that get adapters.",
        choices=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    )
    accumulation: int = _key(
        1, "Parts that a batch is run in to save memory; must divide batch_size.", low=1, high=65_536
    )
    label_smoothing: float = _key(
        0.0, "Share of each target spread evenly over the vocabulary, in training only.", low=0.0, high=0.9
    )
    ema: float = _key(
        0.0, "Momentum of the moving average of the weights, which is validated and exported; 0 is none.",
        low=0.0, high=0.99999,
    )  # fmt: skip
    validations: int = _key(4, "Validations, and checkpoints, spread evenly over the run.", low=1, high=1000)
    patience: int = _key(
        0, "Stop after this many validations in a row without a lower loss; 0 never stops early.", low=0, high=1000
    )
    keep: str = _key("last", "Which validation's weights are exported.", choices=("best", "last"))
    checkpoints_kept: int = _key(1, "Checkpoints kept, the newest ones.", low=1, high=1000)
    log_every: int = _key(10, "Steps between two lines of metrics.jsonl.", low=1, high=1_000_000)
    tensorboard: bool = _key(False, "Write TensorBoard's event files too.")
    sample_prompts: tuple[str, ...] = _key(
        (), "Texts continued at each validation; empty takes two places of the validation text."
    )
    sample_tokens: int = _key(16, "Tokens each of them is continued by; 0 shows none.", low=0, high=1024)
    loop: str = _key(
        "fit", "fit: Keras's own loop. custom: the project's loop, with the same steps.", choices=("fit", "custom")
    )
    jit_compile: bool = _key(True, "Compile the training step with XLA; on one device only.")
    devices: int = _key(0, "GPUs that a batch is split over; 0 takes all that are visible.", low=0, high=1024)


# Defaults of the training keys of a recipe with `model.base`; the dataclass above has those of training from scratch.
FINE_TUNING: dict[str, Any] = {
    "epochs": 3.0,
    "batch_size": 4,
    "sequence_length": 0,
    "optimizer": "adamw",
    "learning_rate": 5e-5,
    "warmup_fraction": 0.1,
    "weight_decay": 0.01,
    "adam_beta2": 0.999,
}
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
OBSERVING = ("log_every", "tensorboard", "sample_prompts", "sample_tokens", "checkpoints_kept", "loop")


@dataclass(frozen=True)
class ExportRecipe:
    """What a bundle holds beside the float32 graphs, which are always there."""

    variants: tuple[str, ...] = _key(
        ("int8", "int4"), "Further precisions of the optimized graph, under ort/.", choices=("fp16", "int8", "int4")
    )
    int8_caches: tuple[str, ...] = _key(
        ("int8", "int4"),
        "Variants that keep keys and values in int8: a quarter of the memory.",
        choices=("int8", "int4"),
    )
    slots: int = _key(8, "Generations the SavedModel keeps at once for decode_slots; 0 leaves it out.", low=0, high=256)
    slot_lease: int = _key(60, "Seconds without a call after which another may take a slot.", low=1, high=86_400)
    matmul_parts: int = _key(
        1,
        "Parts that the SavedModel stores its matrices in: the server's cores, or 1 for whole ones.",
        low=1,
        high=64,
    )


@dataclass(frozen=True)
class VerifyRecipe:
    """What the parity certificate runs, and how far two runtimes may differ."""

    prompts: int = _key(64, "Prompts from the validation text for greedy parity.", low=1, high=100_000)
    new_tokens: int = _key(64, "Tokens each prompt is continued by.", low=1, high=65_536)
    batch_size: int = _key(16, "Ragged rows run at once.", low=1, high=4096)
    max_abs: float = _key(1e-3, "Largest allowed difference of a logit in fp32.", low=0.0, high=1.0)
    perplexity_tokens: int = _key(8192, "Validation tokens scored through each runtime.", low=64)
    perplexity_relative: float = _key(1e-4, "Largest allowed relative difference of perplexity.", low=0.0, high=1.0)
    fp16_perplexity: float = _key(1e-3, "The same for ort/fp16; a variant over its gate is left out.", low=0.0, high=10)
    int8_perplexity: float = _key(0.01, "The same for ort/int8.", low=0.0, high=10)
    int4_perplexity: float = _key(0.03, "The same for ort/int4.", low=0.0, high=10)
    better_than: str = _key(
        "",
        "Baseline whose perplexity on the validation text the model must beat, or the build fails; empty is none.",
        choices=("", "unigram", "trigram"),
    )


@dataclass(frozen=True)
class Recipe:
    """One bundle's whole recipe."""

    name: str = _key("gpt2-docs", "Name of the bundle, and of its folders under dist/ and runs/.")
    seed: int = _key(1234, "Seed of the split, the initial weights, the dropout and the order.", low=0, high=2**31 - 1)
    corpus: CorpusRecipe = field(default_factory=CorpusRecipe)
    instruction: InstructionRecipe = field(default_factory=InstructionRecipe)
    cleaning: CleaningRecipe = field(default_factory=CleaningRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)
    verify: VerifyRecipe = field(default_factory=VerifyRecipe)

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
