"""Make the tokenizers/ fixtures: tiny tokenizers as releases of `transformers` save them, and the ids that they give.

Run from the repository's root in an environment with the release that a fixture's name ends in:

    python -m tests.oracles.make_tokenizer_fixtures v430   # transformers 4.30.2, whose slow classes are Python
    python -m tests.oracles.make_tokenizer_fixtures v457   # transformers 4.57.6
    python -m tests.oracles.make_tokenizer_fixtures v5     # transformers 5.23.0; last, as it writes every ids.json

Each folder holds what `save_pretrained` wrote, and ids.json: the roles' ids and the ids of TEXTS as transformers 5
reads the folder, whatever release wrote it. The vocabulary is the 256 bytes, a few merges and the end token.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tokenizers"
END = "<|endoftext|>"
TEXTS = [
    "<user> hi<sep>the value of the list",
    "Return  the\n\nvalue, 1234 naïve 漢字！",
    f"one{END}two[PAD] <|im_start|>user\nthe<|im_end|>\n",
    " leading and trailing ",
    "the <place> and<place>",
]
MERGES = ["t h", "th e", "Ġ the", "a n", "an d", "Ġ and", "v a", "va l", "u e", "val ue", "1 2", "Ġ l"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "value", "##s", "of", "list", "hi", "漢", "字", "！"]


def byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in its own order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]


def write_gpt2(folder: Path) -> Path:
    """Write vocab.json and merges.txt."""
    tokens = [*byte_letters(), *(merge.replace(" ", "") for merge in MERGES), END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    return folder


def write_bert(folder: Path) -> Path:
    """Write vocab.txt."""
    letters = "abcdefghijklmnopqrstuvwxyz1234,<>|_"
    tokens = [*WORDS, *letters, *(f"##{letter}" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return folder


def with_added(load: Any, source: Path) -> Any:
    """The usual path: a special token for each role of a chat, a padding token, and a word of one's own."""
    from transformers import AddedToken

    tokenizer = load(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<sep>"], "pad_token": "[PAD]"})
    tokenizer.add_tokens(["naïve", AddedToken("<place>", lstrip=True)])
    return tokenizer


def chatml(load: Any, source: Path) -> Any:
    """A chat model's: its end token is not GPT-2's, and it has a template."""
    tokenizer = load(source)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    )
    return tokenizer


def digits(load: Any, source: Path) -> Any:
    """One with a normalizer and a pre-tokenizer of its own, which only tokenizer.json tells."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bpe = models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt"))
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def main(release: str) -> None:
    from transformers import BertTokenizer, GPT2Tokenizer

    gpt2, bert = GPT2Tokenizer.from_pretrained, BertTokenizer.from_pretrained
    makers: dict[str, tuple[Callable[[Any, Path], Any], Any, Callable[[Path], Path]]] = {
        "added": (with_added, gpt2, write_gpt2),
        "bert": (lambda load, source: load(source), bert, write_bert),
        "chatml": (chatml, gpt2, write_gpt2),
    }
    if release == "v5":
        makers["digits"] = (digits, gpt2, write_gpt2)
    for name, (make, load, write) in makers.items():
        with tempfile.TemporaryDirectory() as temporary:
            tokenizer = make(load, write(Path(temporary)))
        tokenizer.save_pretrained(str(FOLDER / f"{name}_{release}"))
    if release == "v5":
        for folder in sorted(FOLDER.iterdir()):
            write_ids(folder)


def write_ids(folder: Path) -> None:
    """Write ids.json: how AutoTokenizer reads the folder."""
    from transformers import AutoTokenizer

    config = {"model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    (folder / "config.json").unlink()
    roles = ("bos", "eos", "pad", "unk", "sep")
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id", None) for role in roles}
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    record = ids | {"texts": TEXTS, "ids": encoded, "size": len(tokenizer)}
    (folder / "ids.json").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
