"""Writes a checkpoint's weights in the other layouts that GPT-2 comes in, name by name as those programs wrote them.

The names are written out here a second time, from the programs that wrote such files, and not taken from the table
under test: transformers 4's TFGPT2LMHeadModel.save_weights, and OpenAI's release, which a TensorFlow 1 Saver wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.oracles.fixtures import FOLDER

Tensors = dict[str, Any]


def h5_tensors(source: str | Path, model: str = "tfgpt2lm_head_model", wte: str = "weight:0") -> Tensors:
    """The tensors of a fixture (or a folder) by the weight names that Keras gave TFGPT2LMHeadModel's."""
    weights = load_file(FOLDER / source / "model.safetensors")
    top = f"{model}/transformer"
    tensors = {f"{top}/wte/{wte}": weights["transformer.wte.weight"]}
    tensors[f"{top}/wpe/embeddings:0"] = weights["transformer.wpe.weight"]
    for block in range(blocks(source)):
        ours, theirs = f"transformer.h.{block}", f"{top}/h_._{block}"
        for norm in ("ln_1", "ln_2"):
            tensors[f"{theirs}/{norm}/gamma:0"] = weights[f"{ours}.{norm}.weight"]
            tensors[f"{theirs}/{norm}/beta:0"] = weights[f"{ours}.{norm}.bias"]
        for part, layer in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            tensors[f"{theirs}/{part}/{layer}/weight:0"] = weights[f"{ours}.{part}.{layer}.weight"]
            tensors[f"{theirs}/{part}/{layer}/bias:0"] = weights[f"{ours}.{part}.{layer}.bias"][None]
    tensors[f"{top}/ln_f/gamma:0"] = weights["transformer.ln_f.weight"]
    tensors[f"{top}/ln_f/beta:0"] = weights["transformer.ln_f.bias"]
    return tensors


def openai_tensors(source: str | Path) -> Tensors:
    """The tensors of a fixture (or a folder) by OpenAI's variable names, the matrices of blocks as [1, in, out]."""
    weights = load_file(FOLDER / source / "model.safetensors")
    tensors = {"model/wte": weights["transformer.wte.weight"], "model/wpe": weights["transformer.wpe.weight"]}
    for block in range(blocks(source)):
        for norm in ("ln_1", "ln_2"):
            tensors[f"model/h{block}/{norm}/g"] = weights[f"transformer.h.{block}.{norm}.weight"]
            tensors[f"model/h{block}/{norm}/b"] = weights[f"transformer.h.{block}.{norm}.bias"]
        for path in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            layer = f"transformer.h.{block}.{path.replace('/', '.')}"
            tensors[f"model/h{block}/{path}/w"] = weights[f"{layer}.weight"][None]
            tensors[f"model/h{block}/{path}/b"] = weights[f"{layer}.bias"]
    tensors["model/ln_f/g"] = weights["transformer.ln_f.weight"]
    tensors["model/ln_f/b"] = weights["transformer.ln_f.bias"]
    return tensors


def blocks(source: str | Path) -> int:
    return int(json.loads((FOLDER / source / "config.json").read_text())["n_layer"])


def write_h5(path: Path, tensors: Tensors, layer: str = "transformer") -> None:
    """Write one Keras weight file: a group for the only layer, its weights' names in attributes as fixed-size bytes."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode()]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = b"2.15.0"
        group = file.create_group(layer)
        group.attrs["weight_names"] = [name.encode() for name in tensors]
        for name, value in tensors.items():
            group.create_dataset(name, data=value)


def write_checkpoint(folder: Path, tensors: Tensors, name: str = "model.ckpt") -> None:
    """Write a TensorFlow 1 checkpoint (.index, .data, .meta, `checkpoint`) of variables with these names."""
    import tensorflow as tf

    v1 = tf.compat.v1
    folder.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), v1.Session() as session:
        variables = [
            v1.get_variable(key, dtype=value.dtype, initializer=value, use_resource=False)
            for key, value in tensors.items()
        ]
        session.run(v1.global_variables_initializer())
        v1.train.Saver(variables).save(session, str(folder / name))


def write_openai(folder: Path, source: str | Path, **changes: Any) -> Path:
    """Write a fixture (or a folder) as one of OpenAI's, but for the tokenizer; `changes` are to its hparams.json."""
    config = json.loads((FOLDER / source / "config.json").read_text())
    write_checkpoint(folder, openai_tensors(source))
    sizes = {"n_vocab": config["vocab_size"], "n_ctx": config["n_positions"]}
    sizes |= {key: config[key] for key in ("n_embd", "n_head", "n_layer")} | changes
    (folder / "hparams.json").write_text(json.dumps(sizes))
    return folder


def as_type(tensors: Tensors, kind: str) -> Tensors:
    """The tensors in another precision."""
    return {name: np.asarray(value).astype(np.dtype(kind)) for name, value in tensors.items()}
