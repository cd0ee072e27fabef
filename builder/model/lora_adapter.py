"""A LoRA adapter as PEFT saves it, merged onto its base (Hu et al., "LoRA", 2021): W + scale * A B.

PEFT keeps the two factors transposed, as of a torch Linear: A is [rank, inputs] and B [outputs, rank], where GPT-2's
matrices are [inputs, outputs].
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from builder.model.checkpoint_formats import Stored, safetensors_tensors
from builder.model.weight_matching import weight_shapes
from builder.plain_files import is_plain, read_json
from serving.bundle import Geometry
from serving.errors import InputError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:transformer\.)?")
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
# What changes the merged weights in other ways than this file does.
_UNSUPPORTED = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "alora_invocation_tokens"),
    *("trainable_token_indices", "target_parameters", "arrow_config", "kasa_config", "monteclora_config"),
    *("velora_config", "loftq_config"),
)
# Starts that leave the base as it was; PiSSA, OLoRA and their like train on a changed one.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def adapter_base(folder: Path) -> str:
    """Return the name of the base that the adapter in `folder` was trained on.

    Raises InputError for an adapter of another kind than LoRA, or one that cannot be merged.
    """
    config = _config(folder)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise InputError(f"{folder / ADAPTER_CONFIG}: names no base_model_name_or_path; write the base's name there")
    return name


class LoraAdapter:
    """The adapter of a folder. Raises InputError for tensors that are not those of an adapter for this geometry."""

    def __init__(self, folder: Path, geometry: Geometry) -> None:
        self._folder, self._config = folder, _config(folder)
        self._shapes = weight_shapes(geometry)
        self._factors: dict[str, dict[str, Stored]] = {}
        self._whole: dict[str, Stored] = {}
        for tensor in _tensors(folder):
            short = _PREFIX.sub("", tensor.name)
            found = _FACTOR.fullmatch(short)
            if found:
                self._factors.setdefault(f"{found[1]}.weight", {})[found[2]] = tensor
            else:
                # modules_to_save, and biases that were trained.
                self._whole[short.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")] = tensor
        unknown = sorted((self._factors.keys() | self._whole.keys()) - self._shapes.keys() - {"lm_head.weight"})
        if unknown:
            raise InputError(f"{folder}: the adapter has {unknown[0]!r}, which is not a weight of the base")
        if "lm_head.weight" in self._factors or "lm_head.weight" in self._whole:
            raise InputError(f"{folder}: the adapter changes lm_head, which is tied to the token embedding here")
        for name, factors in self._factors.items():
            self._check(name, factors)

    @property
    def description(self) -> str:
        """Its rank and how many matrices it changes."""
        return f"{self._folder.name} (LoRA, rank {self._config.get('r')}, {len(self._factors)} matrices)"

    def merged(self, name: str, weight: Any) -> Any:
        """Return `weight` [inputs, outputs], named as in Hugging Face without "transformer.", with what was learned."""
        if name in self._whole:
            return self._finite(self._whole[name]).reshape(weight.shape)
        factors = self._factors.get(name)
        if factors is None:
            return weight
        a, b = self._finite(factors["A"]), self._finite(factors["B"])
        update = self._scale(name, a.shape[0]) * (b @ a).T
        return weight + update.astype(weight.dtype)

    def _finite(self, tensor: Stored) -> Any:
        import numpy as np

        array = tensor.read()
        if not np.isfinite(array).all():
            raise InputError(f"{self._folder}: tensor {tensor.name!r} holds infinities or not-a-numbers")
        return array

    def _scale(self, name: str, rank: int) -> float:
        alpha = float(_by_pattern(self._config.get("alpha_pattern"), name, self._config.get("lora_alpha", rank)))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _check(self, name: str, factors: dict[str, Stored]) -> None:
        shape = self._shapes[name]
        a, b = (factors[key].shape if key in factors else () for key in "AB")
        if len(shape) != 2 or name in ("wte.weight", "wpe.weight"):
            raise InputError(f"{self._folder}: the adapter changes {name!r}, which is not a matrix of a block")
        if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != shape or a[0] != b[1]:
            raise InputError(
                f"{self._folder}: the adapter's factors of {name!r} are {list(a)} and {list(b)}, which do not make "
                f"{list(shape)}; name the base that it was trained on"
            )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    config = read_json(path, "an adapter's configuration")
    if config.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' can be merged")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise InputError(f"{path}: {key} is set; merge it with PEFT's merge_and_unload, and name that folder")
    if config.get("init_lora_weights") not in _STARTS:
        raise InputError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base; merge it with "
            "PEFT's merge_and_unload, and name that folder"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise InputError(f"{path}: bias is {config['bias']!r}; only none, all or lora_only")
    return config


def _tensors(folder: Path) -> list[Stored]:
    path = folder / ADAPTER_WEIGHTS
    if not is_plain(path):
        raise InputError(f"{folder}: no {ADAPTER_WEIGHTS} here; save the adapter with safe_serialization=True")
    return list(safetensors_tensors(path))


def _by_pattern(table: Any, name: str, default: Any) -> Any:
    """The entry of a PEFT pattern table whose key the module's path ends with, else `default`."""
    module = name.removesuffix(".weight")
    for pattern, value in table.items() if isinstance(table, dict) else ():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", module):
            return value
    return default
