"""Make the fixtures: tiny random GPT-2s as `transformers` saves them, and the logits that PyTorch computes with them.

Run from the repository's root, with the `oracle` extra installed:

    python -m tests.oracles.make_gpt2_fixtures

Each folder of fixtures/ is a Hugging Face checkpoint (config.json, model.safetensors) with cases.npz beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from tests.oracles.fixtures import FOLDER

# Every size differs from every other somewhere, so that no two of them can be confused and still pass.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "one_block": {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_inner": 12, "n_positions": 16, "vocab_size": 13},
    "odd_heads": {"n_layer": 2, "n_head": 3, "n_embd": 15, "n_inner": None, "n_positions": 21, "vocab_size": 50},
    "wide_heads": {"n_layer": 3, "n_head": 2, "n_embd": 48, "n_inner": 40, "n_positions": 24, "vocab_size": 101},
    "deep": {"n_layer": 6, "n_head": 4, "n_embd": 32, "n_inner": 64, "n_positions": 32, "vocab_size": 31},
    "bytes": {"n_layer": 2, "n_head": 3, "n_embd": 24, "n_inner": 96, "n_positions": 48, "vocab_size": 257},
}
EPSILONS = {"wide_heads": 1e-3, "deep": 1e-6}


def make(name: str, folder: Path, seed: int) -> None:
    """Write the fixture `name` to `folder`."""
    torch.manual_seed(seed)
    sizes = GEOMETRIES[name]
    end = sizes["vocab_size"] - 1
    config = GPT2Config(
        **sizes,
        layer_norm_epsilon=EPSILONS.get(name, 1e-5),
        bos_token_id=end,
        eos_token_id=end,
        attn_implementation="eager",
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for key, weight in model.transformer.named_parameters():
            noise = torch.randn_like(weight)
            if ".ln_" in f".{key}" and key.endswith("weight"):
                weight.copy_(1 + 0.3 * noise)
            elif weight.dim() == 1:
                # A large last bias would make one token the likeliest everywhere.
                weight.copy_((0.05 if key.startswith("ln_f") else 0.15) * noise)
            elif key.startswith("w"):
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[0] ** 0.5)
        make_end_likely(model, np.random.default_rng(seed).integers(0, end, (8, sizes["n_positions"])))
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "cases.npz", **cases(model, config, np.random.default_rng(seed)))


def make_end_likely(model: GPT2LMHeadModel, ids: Any) -> None:
    """Exchange the end token's embedding with that of a token which is often the likeliest, so that rows do end."""
    likeliest = model(torch.tensor(ids)).logits.argmax(-1)
    often = int(torch.bincount(likeliest.ravel()).argsort(descending=True)[1])
    end = model.config.eos_token_id
    table = model.transformer.wte.weight
    table[[often, end]] = table[[end, often]]


def cases(model: GPT2LMHeadModel, config: GPT2Config, random: np.random.Generator) -> dict[str, Any]:
    """Ids, masks and float32 logits: two rows of full length, and three ragged rows padded on the left and right."""
    full = random.integers(0, config.vocab_size, (2, config.n_positions))
    lengths = np.array([config.n_positions // 2, 1, config.n_positions // 3])
    width = int(lengths.max())
    ids = random.integers(0, config.vocab_size, (3, width))
    right = (np.arange(width) < lengths[:, None]).astype(np.int64)
    left = right[:, ::-1].copy()
    return {
        "full_ids": full,
        "full_logits": logits(model, full, np.ones_like(full)),
        "left_ids": ids,
        "left_mask": left,
        "left_logits": logits(model, ids, left),
        "right_ids": ids,
        "right_mask": right,
        "right_logits": logits(model, ids, right),
    }


def logits(model: GPT2LMHeadModel, ids: Any, mask: Any) -> Any:
    """Logits [batch, sequence, vocab_size], positions counted from each row's first token."""
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)
        )
    return output.logits.numpy()


def main() -> None:
    for seed, name in enumerate(GEOMETRIES):
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        make(name, FOLDER / name, seed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
