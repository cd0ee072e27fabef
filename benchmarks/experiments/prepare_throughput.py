"""`gpt2-bundle prepare` compared with the bare tokenizers library, and its memory.

python -m benchmarks.experiments.prepare_throughput --work FOLDER

The text is `synthetic_corpus`'s; the tokenizer, of 32,000 entries, is trained on 5 million characters and given as
a base, so that no training is in the times. Preparation is timed as a person sees it, from the start of the command to
its end, with every cleaning step but boilerplate lines, and both kinds of duplicates. The bare library is timed at its
best: texts in memory, batches of a thousand, `encode_batch` alone. Rounds alternate between the two. Memory is that of
all the command's processes together.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.common.hardware import environment, process_memory, process_tree
from benchmarks.common.standalone import OUTPUT, finish, run, say
from benchmarks.experiments.synthetic_corpus import write_corpus, write_novel
from serving.errors import GPT2BundleError

SETTINGS = (
    "cleaning.html=true",
    "cleaning.invisible=true",
    "cleaning.unicode=NFC",
    "cleaning.symbols=collapse",
    "cleaning.white_space=lines",
    "corpus.near_duplicates=true",
)
_BOILERPLATE = "cleaning.boilerplate_documents=50"
_POLL_SECONDS = 0.05
_BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[1])
with open(sys.argv[2], encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
began = time.perf_counter()
for start in range(0, len(texts), 1000):
    tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
print(time.perf_counter() - began)
"""


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, metavar="FOLDER", help="For texts and runs.")
@click.option("--megabytes", default=50, show_default=True, help="Millions of characters to time.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of the timing; 0 leaves it out.")
@click.option("--memory", "sizes", multiple=True, type=int, metavar="MEGABYTES", help="A size to measure memory at.")
@click.option("--novel", "novels", multiple=True, type=float, metavar="MEGABYTES",
              help="A size to measure memory at with one Chinese text and a tokenizer of its own.")  # fmt: skip
@OUTPUT
def main(
    work: Path, megabytes: int, rounds: int, sizes: tuple[int, ...], novels: tuple[float, ...], output: Path | None
) -> None:
    """Compare the time of preparation with that of the bare library, and measure its memory."""
    work.mkdir(parents=True, exist_ok=True)
    base = _make_base(work) if rounds or sizes else work
    record: dict[str, Any] = {"environment": environment(), "settings": SETTINGS, "synthetic_seed": 0}
    if rounds:
        record["timing"] = _time(work, base, megabytes, rounds)
    if sizes:
        record["memory"] = [_memory(work, base, size) for size in sizes]
    if novels:
        record["novels"] = [_memory(work, None, size) for size in novels]
    finish(record, output, json.dumps)


def _time(work: Path, base: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    corpus, documents = _corpus(work, megabytes)
    rows: dict[str, list[float]] = {"bare": [], "prepare": [], "prepare_boilerplate": []}
    for _ in range(rounds):
        arguments = [sys.executable, "-c", _BARE, str(base / "tokenizer.json"), str(corpus)]
        rows["bare"].append(float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))
        for name, more in (("prepare", ()), ("prepare_boilerplate", (_BOILERPLATE,))):
            shutil.rmtree(work / "runs", ignore_errors=True)
            began = time.perf_counter()
            subprocess.run(_command(work, base, corpus, *more), check=True, capture_output=True)
            rows[name].append(time.perf_counter() - began)
        say(", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in rows.items()))
    medians = {name: statistics.median(seconds) for name, seconds in rows.items()}
    return {
        "megabytes": megabytes,
        "documents": documents,
        "seconds": rows,
        "median_seconds": medians,
        "over_bare": {name: median / medians["bare"] for name, median in medians.items() if name != "bare"},
    }


def _memory(work: Path, base: Path | None, megabytes: float) -> dict[str, Any]:
    """Peaks in bytes, of all processes together: resident, and the part of it that no file backs.

    Without a base it is one Chinese text, with the default recipe.
    """
    if base is None:
        corpus = work / "novel.txt"
        about = {"characters": write_novel(corpus, megabytes)}
    else:
        corpus, documents = _corpus(work, round(megabytes))
        about = {"documents": documents}
    row = {"megabytes": megabytes, **about, **_peaks(work, _command(work, base, corpus))}
    corpus.unlink()
    say(row)
    return row


def _peaks(work: Path, command: list[str]) -> dict[str, Any]:
    shutil.rmtree(work / "runs", ignore_errors=True)
    peaks = {"resident": 0, "anonymous": 0, "largest_process": 0}
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            rows = [fields for pid in process_tree(process.pid) if "VmHWM" in (fields := process_memory(pid))]
            now = {
                "resident": sum(fields["VmRSS"] for fields in rows),
                "anonymous": sum(fields["RssAnon"] for fields in rows),
                "largest_process": max((fields["VmHWM"] for fields in rows), default=0),
            }
            peaks = {name: max(value, now[name]) for name, value in peaks.items()}
            time.sleep(_POLL_SECONDS)
    if process.returncode:
        raise GPT2BundleError(f"prepare ended with {process.returncode}")
    seconds = round(time.perf_counter() - began, 1)
    disk = sum(path.stat().st_size for path in (work / "runs").rglob("*") if path.is_file())
    return {"peak_bytes": peaks, "run_bytes_on_disk": disk, "seconds": seconds}


def _command(work: Path, base: Path | None, corpus: Path, *more: str) -> list[str]:
    own = (*SETTINGS, *more) if base else more
    settings = [part for setting in ("name=measured", *own) for part in ("--set", setting)]
    places = [*(["--base", str(base)] if base else []), "--corpus", str(corpus), "--runs", str(work / "runs")]
    return [sys.executable, "-m", "serving.cli", "prepare", *settings, *places]


def _corpus(work: Path, megabytes: int) -> tuple[Path, int]:
    path = work / f"text-{megabytes}.jsonl"
    return path, write_corpus(path, megabytes * 1_000_000)


def _make_base(work: Path) -> Path:
    """A checkpoint of which only the tokenizer counts."""
    folder = work / "base"
    folder.mkdir(exist_ok=True)
    sample = work / "sample.jsonl"
    write_corpus(sample, 5_000_000)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=31_999, initial_alphabet=alphabet, show_progress=False)
    with sample.open(encoding="utf-8") as file:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in file), trainer)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"vocab_size": tokenizer.get_vocab_size(), "n_positions": 1024, "n_embd": 8, "n_layer": 1, "n_head": 1}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"} | sizes), encoding="utf-8")
    save_file(zero_weights(sizes["vocab_size"], 1024, 8), folder / "model.safetensors")
    return folder


def zero_weights(vocab_size: int, n_positions: int, width: int) -> dict[str, NDArray[np.float32]]:
    """A GPT-2 of one layer whose weights are all zero, by Hugging Face's names."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab_size, width), "wpe.weight": (n_positions, width)}
    for name in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, rows, columns in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
        shapes |= {f"h.0.{name}.weight": (rows * width, columns * width), f"h.0.{name}.bias": (columns * width,)}
    return {f"transformer.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}


if __name__ == "__main__":
    run(main)
