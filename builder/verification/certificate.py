"""The parity certificate: Keras against the SavedModel and against both ONNX graphs, on the bundle's golden input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builder.data.tokenizer import load_tokenizer
from builder.keras_backend import tf
from builder.model.pretrained import load_model
from builder.progress import Reporter
from builder.tf_export.session_servable import SessionServable
from builder.training.plan import FEW_TOKENS, limits
from builder.verification.golden import GOLDEN, versions
from builder.verification.logit_parity import (
    Reference,
    RuntimeReport,
    batches,
    compare_cached,
    greedy_tokens,
    reference_logits,
    window_losses_cached,
    window_losses_full,
)
from builder.verification.paired_loss import relative_difference
from builder.verification.prefill_graph_loss import compare_prefill_graph, find_pair
from builder.verification.quantization_loss import distributions, greedy_record, is_certain, problem
from builder.verification.sampling_parity import compare_sampling
from builder.verification.speculation_parity import compare_speculation
from builder.verification.text_parity import compare_text, judge_text
from builder.verification.transformers_reading import check_reading
from serving.backends.base import Backend
from serving.backends.onnx import OnnxBackend
from serving.backends.tensorflow import TensorFlowBackend
from serving.bundle import Bundle
from serving.errors import BundleError, ParityError

CERTIFICATE = "verification.json"
VERIFIED, TOO_FEW = "verified", "too few tokens"
_OPTIMISED, _PORTABLE, _SAVEDMODEL = "ort/fp32", "onnx/portable", "savedmodel"


def verify(bundle: Bundle, batch_size: int, reporter: Reporter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compare every graph of a bundle with Keras; return the certificate and the golden record.

    Runs on golden.json's prompts and text. A variant in fewer bits that misses its gate is named under "left_out", with
    the reason: the caller must not publish it. Raises ParityError, which names the artifact and the place, if anything
    else is over the tolerances that golden.json states; BundleError if golden.json is not what this version writes.
    """
    golden = _read_golden(bundle)
    prompts, text = golden["prompts"], np.array(golden["text"], np.int64)
    reading = check_reading(bundle, golden)
    reporter.line(f"compared the reading of transformers {reading['version']} on {reading['texts']} texts")
    model = load_model(bundle.folder)
    reference = _reference(model)
    optimized, portable = OnnxBackend(bundle, _OPTIMISED), OnnxBackend(bundle, _PORTABLE)
    savedmodel = TensorFlowBackend(bundle)
    backends: dict[str, Backend] = {_OPTIMISED: optimized, _PORTABLE: portable, _SAVEDMODEL: savedmodel}
    reports = {name: RuntimeReport() for name in backends}

    candidates = np.concatenate(
        [greedy_tokens(optimized, prompts[rows], golden["new_tokens"]) for rows in batches(len(prompts), batch_size)]
    )
    for number, rows in enumerate(batches(len(prompts), batch_size)):
        expected = reference_logits(reference, prompts[rows], candidates[rows])
        for name, backend in backends.items():
            compare_cached(reports[name], backend, prompts[rows], candidates[rows], expected, number)
    reporter.line(f"compared logits of {candidates.size:,} greedy tokens in {', '.join(backends)} with Keras")

    servable = _servable(bundle)
    loops = {
        "savedmodel/serving_default": lambda some, count: savedmodel.generate(some, max_new_tokens=count),
        "savedmodel/serving_default (Session API)": lambda some, count: servable.generate(some, max_new_tokens=count),
    }
    if "savedmodel/decode_slots" in bundle.manifest.graphs:
        loops["savedmodel/decode_slots (Session API)"] = lambda some, count: servable.generate_by_slots(
            some, max_new_tokens=count
        )
    greedy = {name: _greedy_record(reports[name].places["every_step"].table()) for name in backends}
    end = bundle.manifest.model.eos_token_id
    for name, generate in loops.items():
        equal = sum(_equal_tokens(generate, prompts[r], candidates[r], end) for r in batches(len(prompts), batch_size))
        greedy[name] = {"equal": equal, "of": candidates.size}
    reporter.line("compared greedy tokens of the in-graph loop, through tf.function and the Session API, and of slots")

    choices = compare_sampling(optimized, prompts, candidates, batch_size) if optimized.supports_device_sampling else {}
    reporter.line(f"compared {sum(each['draws'] for each in choices.values()):,} choices of ort/choose with the host's")

    speculation = compare_speculation(bundle, _OPTIMISED, prompts, candidates, batch_size)
    if speculation is not None:
        reporter.line(f"compared speculative decoding: {_speculation_line(speculation)}")

    texts = {}
    if "savedmodel/generate_text" in bundle.manifest.graphs:
        texts = compare_text(servable, load_tokenizer(bundle.folder), prompts, candidates, end, batch_size)
        judge_text(texts)
        reporter.line(f"compared {texts['encoded']} encoded and {texts['continued']} continued texts")

    windows = _windows(text, bundle.manifest.model.n_positions)
    count = windows[:, 1:].size
    expected_loss = _sum_losses(lambda some: window_losses_full(reference, some), windows)
    runtimes: dict[str, Callable[[NDArray[np.int64]], float]] = {
        _OPTIMISED: lambda some: window_losses_cached(optimized, some),
        _PORTABLE: lambda some: window_losses_cached(portable, some),
        _SAVEDMODEL: lambda some: -float(sum(row.sum(dtype=np.float64) for row in savedmodel.score(some.tolist()))),
    }
    perplexity = math.exp(expected_loss / count)
    for name, losses in runtimes.items():
        ours = math.exp(_sum_losses(losses, windows) / count)
        reports[name].perplexity, reports[name].perplexity_relative = ours, abs(ours / perplexity - 1)
    reporter.line(f"compared perplexity over {count:,} tokens; Keras {perplexity:.6f}")

    tolerances = golden["tolerances"]
    _judge(reports, greedy, tolerances)
    graphs = bundle.manifest.graphs
    variants = _certify_variants(bundle, reference, golden, candidates, windows, perplexity, batch_size, reporter)
    certificate = {
        "schema_version": 1,
        "passed": True,
        **_status(variants, count, bundle.manifest.quality),
        "reference": "Keras, float32, full recompute without a cache",
        "prompts": len(prompts),
        "new_tokens": golden["new_tokens"],
        "tolerances": tolerances,
        "perplexity": {"reference": perplexity, "tokens": count},
        "runtimes": {name: report.table() for name, report in reports.items()},
        "greedy": greedy,
        "choices": choices,
        "speculation": speculation or {},
        "text": texts,
        "transformers": reading,
        "variants": variants,
        "left_out": {name: table["problem"] for name, table in variants.items() if "problem" in table},
        "versions": versions(),
        "not_run": [
            "tensorflow_model_server: the SavedModel was run by TensorFlow in process, not by the server",
            *[f"{name} on a GPU: it ran on the processor" for name in variants if graphs[name].precision == "fp16"],
        ],
    }
    for sentence in certificate["limits"]:
        reporter.line(sentence)
    return certificate, golden | {"expected": candidates.tolist()}


def _certify_variants(
    bundle: Bundle,
    reference: Reference,
    golden: dict[str, Any],
    candidates: NDArray[np.int64],
    windows: NDArray[np.int64],
    perplexity: float,
    batch_size: int,
    reporter: Reporter,
) -> dict[str, dict[str, Any]]:
    """The figures of each graph that is not float32, with its gate, and with its problem where it misses it."""
    graphs = bundle.manifest.graphs
    backends = {name: OnnxBackend(bundle, name) for name, graph in graphs.items() if graph.precision != "fp32"}
    variants = {}
    for name, distribution in distributions(backends, reference, windows).items():
        greedy = greedy_record(backends[name], golden["prompts"], candidates, batch_size)
        table = distribution.table(perplexity) | greedy | {"gate": golden["gates"][name]}
        found = problem(table, table["gate"])
        status = VERIFIED if is_certain(table, table["gate"]) else TOO_FEW
        variants[name] = table | ({"problem": found} if found else {"status": status})
        speculation = None
        if not found:
            rows = batches(len(golden["prompts"]), batch_size)
            own = [greedy_tokens(backends[name], golden["prompts"][r], candidates.shape[1]) for r in rows]
            speculation = compare_speculation(bundle, name, golden["prompts"], np.concatenate(own), batch_size)
            variants[name]["speculation"] = speculation or {}
        verdict = f"LEFT OUT: {found}" if found else f"{status}, perplexity {relative_difference(table)}"
        reporter.line(
            f"{name}: {verdict}; the likeliest token is the same at {table['top1_agreement']:.2%} of the text"
            + ("" if speculation is None else f"; speculative decoding: {_speculation_line(speculation)}")
        )
    kept = {name for name, table in variants.items() if "problem" not in table}
    for name in sorted(kept):
        pair = find_pair(bundle, name, kept)
        if pair is None:
            continue
        record = compare_prefill_graph(bundle, name, pair, reference, golden, candidates, windows, batch_size)
        variants[name]["prefill_graph"] = record
        found = record.get("problem")
        verdict = f"not proven: {found}" if found else f"{record['status']}, perplexity {relative_difference(record)}"
        reporter.line(f"{name} after prompts that {pair} prefilled: {verdict}")
    return variants


def _speculation_line(record: dict[str, Any]) -> str:
    verified = record["verified"]
    return (
        f"{verified['equal']:,} of {verified['certain']:,} certain tokens are those of single-token steps, "
        f"{verified['of'] - verified['certain']:,} are not certain, logits are off by up to {record['deviation']:.1e}"
    )


def _status(variants: dict[str, dict[str, Any]], tokens: int, quality: Mapping[str, float]) -> dict[str, Any]:
    """The certificate's `status` and `limits`: whether its figures are of enough tokens, and what they cannot say."""
    found = limits(quality)
    thin = [name for name, table in variants.items() if table.get("status") == TOO_FEW]
    if tokens < FEW_TOKENS:
        found.append(
            f"{TOO_FEW}: perplexities were compared on {tokens} tokens (fewer than {FEW_TOKENS:,}), so the gates of "
            "variants prove little; add validation text"
        )
    elif thin:
        found.append(f"{TOO_FEW}: {', '.join(thin)} may miss the gate on another text; raise verify.perplexity_tokens")
    return {"status": TOO_FEW if tokens < FEW_TOKENS or thin else VERIFIED, "limits": found}


def summary(certificate: dict[str, Any]) -> dict[str, Any]:
    """The few figures of a certificate that the manifest carries."""
    runtimes = certificate["runtimes"]
    return {
        "verified": certificate["status"] == VERIFIED,
        "status": certificate["status"],
        "certificate": CERTIFICATE,
        "max_abs": {name: table["every_step"]["max_abs"] for name, table in runtimes.items()},
        "greedy_tokens": min(record["of"] for record in certificate["greedy"].values()),
        "greedy_equal": min(record["equal"] for record in certificate["greedy"].values()),
        "perplexity_relative": max(table["perplexity_relative"] for table in runtimes.values()),
        "variants": {
            name: {key: table[key] for key in ("perplexity_relative", "top1_agreement", "kl_divergence")}
            for name, table in certificate["variants"].items()
            if name not in certificate["left_out"]
        },
        "left_out": certificate["left_out"],
        "prefill_graphs": {
            name: {key: table["prefill_graph"][key] for key in ("graph", "status", "perplexity_relative")}
            for name, table in certificate["variants"].items()
            if "status" in table.get("prefill_graph", {})
        },
    }


def write_certificate(folder: Path, certificate: dict[str, Any], golden: dict[str, Any]) -> None:
    """Write verification.json and golden.json into a draft."""
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    (folder / GOLDEN).write_text(json.dumps(golden) + "\n", encoding="utf-8")


def _judge(reports: dict[str, RuntimeReport], greedy: dict[str, dict[str, int]], tolerances: dict[str, float]) -> None:
    for name, report in reports.items():
        problem = report.problem(tolerances["max_abs"], tolerances["perplexity_relative"])
        if problem:
            raise ParityError(f"parity failed in {name} at {problem}; nothing was published")
    for name, record in greedy.items():
        if record["equal"] + record.get("ties", 0) != record["of"]:
            raise ParityError(
                f"parity failed in {name}: only {record['equal']} of {record['of']} greedy tokens are those of Keras; "
                "nothing was published"
            )


def _read_golden(bundle: Bundle) -> dict[str, Any]:
    path = bundle.path(GOLDEN)
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        prompts, text, new_tokens = golden["prompts"], golden["text"], golden["new_tokens"]
        longest, shortest = max(map(len, prompts)), min(map(len, prompts))
        ids = [token for tokens in [*prompts, text] for token in tokens]
        vocab_size, n_positions = bundle.manifest.model.vocab_size, bundle.manifest.model.n_positions
        if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
            raise ValueError("its tokens are not all of the vocabulary")
        if type(new_tokens) is not int or shortest < 1 or new_tokens < 1 or longest + new_tokens > n_positions:
            raise ValueError("its prompts do not fit the model")
        if len(text) < 2:
            raise ValueError("its text is too short")
        if not all(0 <= golden["tolerances"][key] < math.inf for key in ("max_abs", "perplexity_relative")):
            raise ValueError("its tolerances are not finite")
        wanted = [name for name, graph in bundle.manifest.graphs.items() if graph.precision != "fp32"]
        if not all(0 <= golden["gates"][name] < math.inf for name in wanted):
            raise ValueError("its gates are not finite")
    except (ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{path}: not a golden record ({type(error).__name__}: {error}); build it again") from None
    result: dict[str, Any] = golden
    return result


def _reference(model: Any) -> Reference:
    forward = tf.function(
        lambda ids: model(ids), input_signature=[tf.TensorSpec([None, None], tf.int32)], autograph=False
    )
    return lambda ids: forward(tf.constant(ids, tf.int32)).numpy()


def _servable(bundle: Bundle) -> SessionServable:
    """The SavedModel through the Session API, as TensorFlow Serving loads and runs it."""
    return SessionServable(bundle.path(bundle.graph("savedmodel/serving_default").path).parent)


def _greedy_record(place: dict[str, Any]) -> dict[str, int]:
    return {"equal": place["argmax_equal"], "of": place["rows"], "ties": place["ties"]}


def _equal_tokens(
    generate: Callable[[Any, int], list[list[int]]], prompts: list[list[int]], candidates: NDArray[np.int64], end: int
) -> int:
    """How many candidate tokens the loop gives too. It stops at the end token, so it is asked to continue after it."""
    equal = 0
    done = [0] * len(prompts)
    while rows := [row for row in range(len(prompts)) if done[row] < candidates.shape[1]]:
        texts = [[*prompts[row], *candidates[row, : done[row]].tolist()] for row in rows]
        answers = generate(texts, candidates.shape[1])
        for row, answer in zip(rows, answers, strict=True):
            wanted = candidates[row, done[row] :].tolist()
            if end in wanted:
                wanted = wanted[: wanted.index(end) + 1]
            else:
                answer = answer[: len(wanted)]
            if answer == wanted:
                equal += len(wanted)
                done[row] += len(wanted)
                continue
            matching = sum(mine == theirs for mine, theirs in zip(answer, wanted, strict=False))
            # One that did not stop at the end token has not chosen it.
            equal += min(matching, len(wanted) - 1)
            # One that went astray ends its row here: what comes after is not a continuation of the same text.
            done[row] = candidates.shape[1]
    return equal


def _windows(text: NDArray[np.int64], n_positions: int) -> NDArray[np.int64]:
    """Cut the text into rows of at most 256 tokens (or the context), dropping what is left over."""
    length = min(n_positions, 256, len(text))
    return text[: len(text) // length * length].reshape(-1, length)


def _sum_losses(losses: Callable[[NDArray[np.int64]], float], windows: NDArray[np.int64]) -> float:
    return sum(losses(windows[rows]) for rows in batches(len(windows), 8))
