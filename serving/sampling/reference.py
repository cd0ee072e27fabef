"""The reference page of the sampling parameters: `python -m serving.sampling.reference > docs/sampling.md`."""

from __future__ import annotations

from serving.sampling.parameters import DECLARATIONS, MAX_BIAS, MAX_SEED, Declaration

_HEAD = """# Sampling parameters

`python -m serving.sampling.reference` writes this page from the declarations in `serving/sampling/parameters.py`.

The first name is the field of `serving.SamplingParams` and, with dashes, the option of `gpt2-bundle generate`.
The second is the field of `/v1/completions`, `/v1/chat/completions` and the Open Inference Protocol.
The ONNX runtimes have all of them. The slots of a SavedModel have those marked in the last column,
and so do `gpt2-bundle client` and `serve --runtime tensorflow`.

| parameter | in requests | type | range | default | what it does | slots |
|---|---|---|---|---|---|---|
"""
_TAIL = f"""\
| `logit_bias` | `logit_bias` | token ids to numbers | -{MAX_BIAS:g} to {MAX_BIAS:g} | none | Added to their logits. | |
| `stop` | `stop` | texts | | none | Text that ends the output and is not part of it. | yes |
| `stop_token_ids` | `stop_token_ids` | token ids | | none | Tokens that end the output and belong to it. | yes |

In requests, `temperature` is 1 by default and `top_k` -1 considers all tokens.
Without `seed`, each request takes a new one.

## Order

1. `logit_bias`, the penalties and `min_tokens` change the logits.
   A grammar of [structured output](protocols.md) removes tokens.
2. `temperature` divides the logits.
3. `top_k`, then `top_p` and `min_p` choose the tokens that may be sampled.
4. A random number chooses one of them. It depends on `seed` and the position alone, so a sequence gets the same tokens
   in any batch.
"""


def page() -> str:
    """Return the page, in Markdown."""
    return _HEAD + "".join(map(_row, DECLARATIONS.values())) + _TAIL


def _row(each: Declaration) -> str:
    powers = {2**31 - 1: "2^31 - 1", MAX_SEED: "2^63 - 1"}
    high = powers.get(int(each.high), format(each.high, "g")) if each.kind != "boolean" else ""
    span = f"{'above ' if each.above_low else ''}{each.low:g} to {high}"
    span = "true, false" if each.kind == "boolean" else span
    default = str(each.default).lower() if each.kind == "boolean" else f"{each.default:g}"
    cells = (f"`{each.name}`", f"`{each.wire}`", each.kind, span, default, each.help, "yes" if each.slots else "")
    return f"| {' | '.join(cells)} |\n".replace("|  |", "| |")


if __name__ == "__main__":
    print(page(), end="")
