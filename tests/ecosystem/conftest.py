"""One bundle for all tools, our own answers, and the environments that the Makefile installs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serving.backends.onnx import OnnxBackend
from serving.bundle import Bundle, open_bundle
from serving.cli import run
from serving.sampling.detokenizer import load_tokenizer
from tests.tiny_build import SETTINGS, TinyBuild

NEW_TOKENS = 32
TEXTS = ("Return the", "naïve 'quotes' don't", "12 東京\n\n    x")
ROOT = Path(__file__).parents[2]
_SCALE, _SEED, _MARGIN = 0.45, 12, 0.02
_SIZES = {"n_positions": 96, "n_embd": 64, "n_layer": 3, "n_head": 4}


@dataclass(frozen=True)
class Answers:
    """The token ids of each text of TEXTS, and the greedy tokens after them, both [texts][tokens]."""

    tokens: list[list[int]]
    answers: list[list[int]]


def python_of(environment: str) -> Path:
    """The Python of `.venv-ENVIRONMENT`, or skip the test."""
    python = Path(os.environ.get("ENVIRONMENTS", ROOT)).absolute() / f".venv-{environment}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no .venv-{environment} here; run 'make test-ecosystem', or 'make .venv-{environment}/installed'")
    return python


def ask(command: list[Any], **more: Any) -> Any:
    """The JSON that a tool's program prints in its last line. Its arguments end with the texts and the tokens."""
    done = subprocess.run(
        [*map(str, command), json.dumps(TEXTS), str(NEW_TOKENS)],
        capture_output=True, text=True, timeout=600, check=False, **more,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def ours(bundle: Bundle, graph: str = "onnx/portable") -> Answers:
    """Our greedy tokens by a graph; the end token is one like any other."""
    tokenizer, backend = load_tokenizer(bundle), OnnxBackend(bundle, graph)
    prompts = [tokenizer.encode(text).ids for text in TEXTS]
    answers = []
    for prompt in prompts:
        state, logits = backend.prefill([prompt], len(prompt) + NEW_TOKENS)
        tokens: list[int] = []
        while len(tokens) < NEW_TOKENS:
            second, first = np.partition(logits[0], -2)[-2:]
            assert graph != "onnx/portable" or first - second > _MARGIN, (
                "two tokens are too close to tell runtimes apart"
            )
            tokens.append(int(logits.argmax()))
            if len(tokens) < NEW_TOKENS:
                logits = backend.decode(state, logits.argmax(-1))
        answers.append(tokens)
    return Answers(prompts, answers)


@pytest.fixture(scope="session")
def varied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of large random weights: its greedy tokens vary, where a small trained model repeats one.

    ECOSYSTEM_BUNDLE names another bundle to try the tools on.
    """
    if "ECOSYSTEM_BUNDLE" in os.environ:
        return open_bundle(os.environ["ECOSYSTEM_BUNDLE"])
    built: TinyBuild = request.getfixturevalue("built")
    folder = tmp_path_factory.mktemp("varied")
    base = folder / "base"
    base.mkdir()
    for path in built.bundle.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt") and path.name not in ("manifest.json", "golden.json"):
            shutil.copy(path, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | _SIZES | {"n_inner": 4 * _SIZES["n_embd"]}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(_weights(config, load_file(built.bundle / "model.safetensors")), base / "model.safetensors")
    settings = [setting for setting in SETTINGS if not setting.startswith(("model.", "tokenizer.", "training.epochs"))]
    # Random weights have no perplexity worth a limit.
    settings += ["training.epochs=0", "verify.int8_perplexity=10", "verify.int4_perplexity=10"]
    build = TinyBuild(built.corpus, folder / "runs", folder / "dist", tuple(settings))
    assert run([*build.build(), "--base", str(base)]) == 0
    return open_bundle(build.bundle)


def _weights(config: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    width, random = config["n_embd"], np.random.default_rng(_SEED)
    sizes = {
        "wte.weight": (config["vocab_size"], width), "wpe.weight": (config["n_positions"], width),
        "ln": (width,), "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width),
    }  # fmt: skip
    found = {}
    for name in like:
        parts = name.split(".")
        if "h" in parts and parts[2] != "0":
            continue
        shape = next(size for key, size in sizes.items() if key in name)
        for layer in range(config["n_layer"] if "h" in parts else 1):
            norm = len(shape) == 1 and name.endswith("weight")
            value = random.normal(1.0 if norm else 0.0, _SCALE, shape if name.endswith("weight") else shape[-1:])
            found[name.replace("h.0.", f"h.{layer}.")] = value.astype(np.float32)
    return found


@pytest.fixture(scope="session")
def expected(varied: Bundle) -> Answers:
    """What every tool must say: no end token among it, which some would stop at, and many different tokens."""
    found = ours(varied)
    for tokens in found.answers:
        assert len(set(tokens)) > NEW_TOKENS // 4 and varied.manifest.model.eos_token_id not in tokens, tokens
    return found
