"""How transformers reads a bundle, told nothing but its folder: the certificate's block of the authority on formats.

Its tokenizer must give our ids and texts, its configuration our geometry and token ids, its chat template the text
that training used. No weights are loaded, so torch is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from builder.data.documents import Document
from builder.data.instructions import Template, Turn
from builder.data.tokenizer import load_tokenizer
from builder.special_tokens import read_token_ids
from builder.verification.perplexity import instruction_of
from serving.bundle import Bundle
from serving.errors import ParityError

_TEXTS = (
    *("", " ", "a  b   c", "\n\n", "\t tab", "line\r\nline", "don't WE'LL they've", "1234567 3.14 1,000", "x" * 300),
    *(
        "naïve café",
        "e\u0301 \u00e9",
        "\ufb01 \u01c4 \u00bd",
        "漢字！。\u3000段落",
        "～～～★★★",
        "👋🏽 👨‍👩‍👧",
        "Ünï\u200bcode\ufeff",
    ),
    *("مرحبا", "हिन्दी", "한국어", "\x00\x1f\x7f", "<|endoftext|", "[PAD] [SEP] ##a </s>", " leading", "trailing "),
)
_GEOMETRY = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon")
_DEFAULTS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
_QUESTION: Turn = ("user", "Say {it} — 'why'?\n\\n 漢字 <|endoftext|")
_ANSWER: Turn = ("assistant", 'Because {% of %} "that".\n  Twice.')


def check_reading(bundle: Bundle, golden: dict[str, Any]) -> dict[str, Any]:
    """Compare what transformers makes of the bundle's settings with what the bundle is; return what was compared.

    Raises ParityError, which names the file and the difference.
    """
    # Without torch it advises at import to install it, which reading a tokenizer does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    folder, options = str(bundle.folder), {"local_files_only": True}
    ours = load_tokenizer(bundle.folder)
    theirs = _loaded("tokenizer_config.json", lambda: transformers.AutoTokenizer.from_pretrained(folder, **options))
    texts = _texts(ours, [*golden["prompts"], golden["text"]])
    _compare_tokenizers(bundle, ours, theirs, texts)
    config = _loaded("config.json", lambda: transformers.AutoConfig.from_pretrained(folder, **options))
    _compare_config(bundle, config)
    generation = _loaded(
        "generation_config.json", lambda: transformers.GenerationConfig.from_pretrained(folder, **options)
    )
    _compare_ids(bundle, "generation_config.json", generation)
    return {
        "version": transformers.__version__,
        "tokenizer_class": type(theirs).__name__,
        "texts": len(texts),
        "chat_template": _compare_chat(bundle, theirs),
    }


def _loaded(file: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # Whatever it raises, the folder cannot be read by it.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _difference(file, f"does not load ({reason})") from None


def _difference(file: str, what: str) -> ParityError:
    return ParityError(f"parity failed in {file}: as transformers reads it, {what}; nothing was published")


def _texts(tokenizer: Tokenizer, ids: Iterable[Sequence[int]]) -> list[str]:
    """The golden texts, odd ones, and each added token between letters and between blanks."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()][:200]
    golden = [tokenizer.decode(list(each), skip_special_tokens=False) for each in ids]
    return [*golden, *_TEXTS, *(f"a{token}b {token} {token}\n" for token in added)]


def _compare_tokenizers(bundle: Bundle, ours: Tokenizer, theirs: Any, texts: Sequence[str]) -> None:
    file = "tokenizer_config.json"
    for text in texts:
        wanted = ours.encode(text, add_special_tokens=False).ids
        found = list(theirs(text, add_special_tokens=False)["input_ids"])
        if found != wanted:
            raise _difference(file, f"the text {text[:40]!r} gives the ids {found[:8]}, not {wanted[:8]}")
        if theirs.decode(wanted, skip_special_tokens=False) != ours.decode(wanted, skip_special_tokens=False):
            raise _difference(file, f"the ids {wanted[:8]} do not give back the text {text[:40]!r}")
    size = ours.get_vocab_size(with_added_tokens=True)
    if len(theirs) != size:
        raise _difference(file, f"the tokenizer has {len(theirs)} entries, not {size}")
    _compare_ids(bundle, file, theirs)


def _compare_ids(bundle: Bundle, file: str, theirs: Any) -> None:
    """The ids of the roles that generation knows, against the manifest and generation_config.json."""
    model, pad = bundle.manifest.model, read_token_ids(bundle.folder).pad
    for role, wanted in (("eos", model.eos_token_id), ("bos", model.bos_token_id), ("pad", pad)):
        found = getattr(theirs, f"{role}_token_id", None)
        if found != wanted:
            raise _difference(file, f"{role}_token_id is {found}, not {wanted}")


def _compare_config(bundle: Bundle, config: Any) -> None:
    model = bundle.manifest.model
    wanted = {key: getattr(model, key) for key in _GEOMETRY} | {"activation_function": model.activation_function}
    wanted |= {"model_type": "gpt2"} | _DEFAULTS
    for key, value in wanted.items():
        if getattr(config, key, None) != value:
            raise _difference("config.json", f"{key} is {getattr(config, key, None)!r}, not {value!r}")
    _compare_ids(bundle, "config.json", config)


def _compare_chat(bundle: Bundle, theirs: Any) -> str:
    """Whether the chat template gives the text of training ("equal"), is a base's own ("rendered"), or is not there."""
    if not theirs.chat_template:
        return "none"
    recipe = instruction_of(bundle)
    turns = [_QUESTION, _ANSWER, _QUESTION, _ANSWER]
    if recipe is None:
        # A base's own may want turns of another kind: it is the base's, whole, either way.
        try:
            theirs.apply_chat_template(_messages(turns), tokenize=False)
        except Exception as error:  # jinja2's errors share no base with the templates' own.
            return f"not rendered: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        return "rendered"
    template, end = Template.of(recipe), str(theirs.eos_token)
    for some in (turns, turns[:2], [("system", "Be brief."), *turns]):
        wanted = _training_text(template, some, end)
        found = theirs.apply_chat_template(_messages(some), tokenize=False)
        if found != wanted:
            raise _difference("tokenizer_config.json", f"the chat template gives {found!r}, not {wanted!r}")
    wanted = template.prompt(_QUESTION[1])
    found = theirs.apply_chat_template(_messages(turns[:1]), tokenize=False, add_generation_prompt=True)
    if found != wanted:
        raise _difference("tokenizer_config.json", f"the chat template's prompt is {found!r}, not {wanted!r}")
    return "equal"


def _messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _training_text(template: Template, turns: list[Turn], end: str) -> str:
    """The conversation as training reads it, with the end token that follows a document."""
    document = Document("", "").with_segments(template.segments(turns)).with_end(end)
    return document.text + end
