"""Make the checkpoints/ fixtures: the model of fixtures/odd_heads as other libraries save it, and logits of theirs.

Run from the repository's root, each in an environment with the libraries that it names:

    python -m tests.oracles.make_checkpoint_fixtures torch      # torch 2.13, transformers 5.23, peft 0.19, safetensors
    python -m tests.oracles.make_checkpoint_fixtures tensorflow # transformers 4.57.6, tensorflow 2.21, tf_keras, torch
    python -m tests.oracles.make_checkpoint_fixtures keras_hub  # keras_hub 0.32, keras 3.15, tensorflow 2.21
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "checkpoints"
SOURCE = Path(__file__).parent / "fixtures" / "odd_heads"
# Changes of config.json under which the same weights are another function.
FUNCTIONS: dict[str, dict[str, Any]] = {
    **{name: {"activation_function": name} for name in ("gelu", "relu", "gelu_fast", "gelu_pytorch_tanh")},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "unscaled": {"scale_attn_weights": False},
    "both_scales": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
}


def ids() -> Any:
    return np.load(SOURCE / "cases.npz")["full_ids"]


def torch_logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids())).logits.numpy()


def make_torch() -> None:
    """Logits under other functions, safetensors' save_model, torch.compile's names, and a LoRA adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file, save_model
    from transformers import GPT2Config, GPT2LMHeadModel

    logits = {}
    for name, changes in FUNCTIONS.items():
        config = GPT2Config.from_pretrained(SOURCE, attn_implementation="eager", **changes)
        logits[name] = torch_logits(GPT2LMHeadModel.from_pretrained(SOURCE, config=config))
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "functions.npz", **logits)

    model = GPT2LMHeadModel.from_pretrained(SOURCE).eval()
    for name in ("save_model", "compiled"):
        folder = FOLDER / name
        folder.mkdir(exist_ok=True)
        shutil.copyfile(SOURCE / "config.json", folder / "config.json")
    save_model(model, str(FOLDER / "save_model" / "model.safetensors"))
    state = torch.nn.DataParallel(torch.compile(model)).state_dict()
    save_file({key: value.clone() for key, value in state.items()}, str(FOLDER / "compiled" / "model.safetensors"))

    torch.manual_seed(5)
    settings = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        rank_pattern={"c_fc": 2},
        alpha_pattern={"c_fc": 5},
        modules_to_save=["ln_f"],
    )
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                weight.add_(0.2 * torch.randn_like(weight))
    adapted.save_pretrained(str(FOLDER / "lora"))
    (FOLDER / "lora" / "README.md").unlink(missing_ok=True)
    # Where the base lies is for the test to say.
    path = FOLDER / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "BASE"}, indent=2) + "\n")
    np.savez_compressed(FOLDER / "lora" / "logits.npz", logits=torch_logits(adapted))


def make_tensorflow() -> None:
    """transformers' TFGPT2LMHeadModel: safetensors with the names of TensorFlow, and Keras's save_weights."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    from transformers import GPT2LMHeadModel, TFGPT2LMHeadModel

    with tempfile.TemporaryDirectory() as temporary:
        GPT2LMHeadModel.from_pretrained(SOURCE).save_pretrained(temporary, safe_serialization=False)
        model = TFGPT2LMHeadModel.from_pretrained(temporary, from_pt=True)
    model.save_pretrained(FOLDER / "tf_safetensors", safe_serialization=True)
    (FOLDER / "tf_object").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(SOURCE / "config.json", FOLDER / "tf_object" / "config.json")
    model.save_weights(str(FOLDER / "tf_object" / "tf_model"))


def make_keras_hub() -> None:
    """A preset of KerasHub's GPT2CausalLM with random weights, its logits, and the task's own save_weights."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    from keras_hub.models import GPT2Backbone, GPT2CausalLM, GPT2Tokenizer

    from tests.oracles.make_tokenizer_fixtures import write_gpt2

    backbone = GPT2Backbone(
        vocabulary_size=50, num_layers=2, num_heads=3, hidden_dim=15, intermediate_dim=60, max_sequence_length=21
    )
    random = np.random.default_rng(9)
    for weight in backbone.weights:
        weight.assign(random.normal(1.0 if "gamma" in weight.path else 0.0, 0.3, weight.shape))
    model = GPT2CausalLM(backbone=backbone)
    model.save_to_preset(str(FOLDER / "keras_hub"))
    with tempfile.TemporaryDirectory() as temporary:
        source = write_gpt2(Path(temporary))
        merges = (source / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        tokenizer = GPT2Tokenizer(vocabulary=json.loads((source / "vocab.json").read_text()), merges=merges)
    tokenizer.save_to_preset(str(FOLDER / "keras_hub_tokenizer"))
    (FOLDER / "keras_task").mkdir(exist_ok=True)
    shutil.copyfile(FOLDER / "keras_hub" / "config.json", FOLDER / "keras_task" / "config.json")
    model.save_weights(str(FOLDER / "keras_task" / "my.weights.h5"))
    hidden = backbone({"token_ids": ids(), "padding_mask": np.ones_like(ids())})
    logits = keras.ops.convert_to_numpy(backbone.token_embedding(hidden, reverse=True))
    np.savez_compressed(FOLDER / "keras_hub" / "logits.npz", logits=logits)


if __name__ == "__main__":
    {"torch": make_torch, "tensorflow": make_tensorflow, "keras_hub": make_keras_hub}[sys.argv[1]]()
