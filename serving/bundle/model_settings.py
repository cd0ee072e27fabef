"""What the Hugging Face settings in a bundle say: the chat template's source, and the ids that end a text.

Standard library only.
"""

from __future__ import annotations

import json
from typing import Any

from serving.bundle.folder import Bundle
from serving.bundle.strict_json import refuse
from serving.errors import BundleError

MAX_TEMPLATE = 65_536
"""Characters of a chat template."""
_MAX_SETTINGS = 16 << 20
_FILE = "chat_template.jinja"


def settings(bundle: Bundle, name: str) -> dict[str, Any]:
    """The JSON object in the file `name`, {} if the bundle has no such file. Raises BundleError for anything else."""
    if all(artifact.path != name for artifact in bundle.manifest.artifacts):
        return {}
    try:
        table = json.loads(bundle.read(name, _MAX_SETTINGS))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise BundleError(f"{bundle.folder}: {name} is not a JSON object; build the bundle again")
    return table


def chat_template_source(bundle: Bundle) -> str | None:
    """The Jinja source of the chat template, None where there is none.

    As transformers does, chat_template.jinja comes before the key in tokenizer_config.json, which may be a list of
    templates by name, of which "default" is taken. Raises BundleError for a source that is not text or is too long.
    """
    source = settings(bundle, "tokenizer_config.json").get("chat_template")
    if any(artifact.path == _FILE for artifact in bundle.manifest.artifacts):
        source = bundle.read(_FILE, 4 * MAX_TEMPLATE).decode("utf-8", "replace")
    if isinstance(source, list):
        named = [each for each in source if isinstance(each, dict) and each.get("name") == "default"]
        source = named[0].get("template") if named else None
    if not source:
        return None
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
        raise refuse(str(bundle.folder), f"the chat template is not a text of at most {MAX_TEMPLATE} characters")
    return source


def end_ids(bundle: Bundle) -> list[int]:
    """The end tokens of generation_config.json that are ids of the model, at most 16."""
    ids = settings(bundle, "generation_config.json").get("eos_token_id")
    listed = ids if isinstance(ids, list) else [ids]
    vocabulary = bundle.manifest.model.vocab_size
    return [id for id in listed[:16] if type(id) is int and 0 <= id < vocabulary]
