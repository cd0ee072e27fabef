"""A bundle's weights as other servers read them: a GGUF file, or a Hugging Face folder that transformers serves.

Both get a vocabulary in which every id has a text, so that each token is an event of a stream: a bundle with GPT-2's
geometry and a tokenizer of its own may have ids without one. Neither has an end of text that random weights would come
upon. Runs in llama-cpp-python's environment: python -m benchmarks.serving.peer_files BUNDLE --gguf FILE --kind Q8_0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def vocabulary(bundle: Path) -> list[str]:
    """The token of each id of the model; those that the tokenizer lacks are named by their ids."""
    known: dict[str, int] = json.loads((bundle / "vocab.json").read_text(encoding="utf-8"))
    size: int = json.loads((bundle / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    names = {index: token for token, index in known.items()}
    return [names.get(index, f"<{index}>") for index in range(size)]


def write_folder(bundle: Path, folder: Path) -> None:
    """A Hugging Face folder with the bundle's own weights, by a link."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": None, "eos_token_id": None}
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"do_sample": False, "pad_token_id": 0})
    tokenizer = json.loads((bundle / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = {token: index for index, token in enumerate(vocabulary(bundle))}
    tokenizer["added_tokens"] = []
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024})
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors").symlink_to((bundle / "model.safetensors").absolute())


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    """Write what the command line asks for."""
    import gguf

    from benchmarks.peers.llama_peer import write_gguf

    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--kind", choices=("Q8_0", "F32"), required=True)
    options = parser.parse_args()

    def describe(writer: Any) -> None:
        tokens = vocabulary(options.bundle)
        merges = (options.bundle / "merges.txt").read_text(encoding="utf-8").splitlines()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([int(gguf.TokenType.NORMAL)] * len(tokens))
        writer.add_token_merges([line for line in merges if line and not line.startswith("#version")])
        writer.add_bos_token_id(len(tokens) - 1)
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_add_bos_token(False)

    write_gguf(options.bundle, options.gguf, gguf.GGMLQuantizationType[options.kind], describe)


if __name__ == "__main__":
    main()
