"""The conversion that docs/checkpoints.md gives for nanoGPT's ckpt.pt: run as it stands there, against torch."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.model.geometry import read_geometry
from builder.model.gpt2 import GPT2
from builder.model.pretrained import load_weights
from builder.model.weight_matching import check_head, match_weights

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "block_size": 12}


def nano(state: dict[str, Any], ids: Any, n_head: int) -> Any:
    """nanoGPT's forward pass on its state, written with torch's functions."""
    import torch
    from torch.nn import functional

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    batch, length = ids.shape
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:length]
    for block in range(SIZES["n_layer"]):
        place = f"transformer.h.{block}"
        qkv = linear(norm(x, f"{place}.ln_1"), f"{place}.attn.c_attn").split(x.shape[-1], dim=2)
        q, k, v = (part.view(batch, length, n_head, -1).transpose(1, 2) for part in qkv)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + linear(attended, f"{place}.attn.c_proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{place}.ln_2"), f"{place}.mlp.c_fc")), f"{place}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def nano_state(bias: bool) -> dict[str, Any]:
    """Random weights under nanoGPT's names, the linear layers [outputs, inputs]."""
    import torch

    torch.manual_seed(2)
    width = SIZES["n_embd"]
    state = {"transformer.wte.weight": torch.randn(40, width) * 0.4, "transformer.wpe.weight": torch.randn(12, width)}
    for block in range(SIZES["n_layer"]):
        place = f"transformer.h.{block}"
        shapes = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width)}
        shapes |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width), "ln_1": (width,), "ln_2": (width,)}
        for layer, shape in shapes.items():
            state[f"{place}.{layer}.weight"] = torch.randn(shape) * 0.3
            if bias:
                state[f"{place}.{layer}.bias"] = torch.randn(shape[0]) * 0.3
    state["transformer.ln_f.weight"] = torch.randn(width)
    if bias:
        state["transformer.ln_f.bias"] = torch.randn(width)
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


@pytest.mark.oracle
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_the_script_of_the_page_converts_it(tmp_path: Path, bias: bool, prefix: str) -> None:
    torch = pytest.importorskip("torch")
    state = nano_state(bias)
    model = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    best = torch.tensor(1.5)
    record = {"model": model, "optimizer": {}, "model_args": SIZES | {"bias": bias, "dropout": 0.0}, "iter_num": 7}
    torch.save(record | {"best_val_loss": best, "config": {"out_dir": "out"}}, tmp_path / "ckpt.pt")
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "convert.py").write_text(script, encoding="utf-8")
    subprocess.run([sys.executable, "convert.py", "ckpt.pt", "out"], cwd=tmp_path, check=True)

    folder = tmp_path / "out"
    geometry = read_geometry(folder)
    check_head(folder, match_weights(folder, geometry))
    ours = GPT2.create(geometry)
    load_weights(ours, folder)
    ids = np.random.default_rng(0).integers(0, 40, (3, 12))
    with torch.no_grad():
        theirs = nano(state, torch.tensor(ids), SIZES["n_head"]).numpy()
    np.testing.assert_allclose(ours(ids).numpy(), theirs, atol=5e-5)
