"""Streaming over slots through the stand-in: whatever the network does, each text is that of `serving_default`."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from serving.backends.loader import load_backend
from serving.bundle import open_bundle
from serving.cli import run
from serving.clients import outliving_calls
from serving.clients.tf_serving import TFServingClient
from serving.clients.transport import Piece
from serving.errors import InputError, ServerError
from serving.generation import generate
from serving.sampling import SamplingParams
from tests.serving.clients.test_tf_serving import KINDS, SNOWMAN, connect
from tests.serving.tf_serving_emulator import Emulator, serving

SLOTS = 8
SAMPLED = SamplingParams(max_new_tokens=9, temperature=1.0, seed=3)
PROMPTS = [f"{number} {SNOWMAN}"[:12] for number in range(SLOTS + 3)]


@pytest.fixture(scope="module")
def server(real_bundle: Path) -> Iterator[Emulator]:
    with serving(real_bundle / "savedmodel/1", "bytes") as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def every_slot_is_given_back(server: Emulator) -> Iterator[None]:
    server.failures, server.lost, server.run_calls, server.delay, server.pad = [], [], [], 0.0, 0
    server.gather, server.merged = 0.0, 0
    yield
    server.failures, server.lost, server.gather = [], [], 0.0
    release(server, fill(server, SLOTS))


def fill(server: Emulator, count: int) -> dict[str, Any]:
    """Take `count` slots that must be free."""
    names = np.random.default_rng(time.monotonic_ns()).integers(1, 2**62, count)
    sampling = {"temperature": np.zeros(count, np.float32), "top_k": np.zeros(count, np.int32)}
    sampling |= {"top_p": np.ones(count, np.float32), "seed": np.zeros(count, np.int64)}
    answer = server.servable.run(
        "prefill_slots",
        request_id=names,
        token_ids=np.full((count, 1), 7, np.int32),
        lengths=np.ones(count, np.int32),
        max_new_tokens=np.full(count, 40, np.int32),
        **sampling,
    )
    assert (answer["status"] >= 0).all(), "a slot was not given back"
    return {name: answer[name] for name in ("slot", "generation")}


def release(server: Emulator, held: dict[str, Any]) -> None:
    server.servable.run("release_slots", **held)


def tokenizer(bundle: Path) -> Tokenizer:
    return Tokenizer.from_file(str(bundle / "tokenizer.json"))


def joined(pieces: list[Piece], count: int) -> list[tuple[str, int, str | None]]:
    rows = [[piece for piece in pieces if piece.index == index] for index in range(count)]
    assert all([piece.finish_reason for piece in row[:-1]] == [None] * (len(row) - 1) for row in rows)
    return [
        ("".join(each.text for each in row), sum(len(each.token_ids) for each in row), row[-1].finish_reason)
        for row in rows
    ]


def alone(server: Emulator, prompts: list[str], params: SamplingParams) -> list[tuple[str, int, str | None]]:
    made = connect(server, "grpc").generate(prompts, params, slots=False)
    server.run_calls.clear()
    return [(each.text, each.tokens, each.finish_reason) for each in made]


@pytest.mark.parametrize("kind", KINDS)
def test_more_prompts_than_slots_each_as_alone(server: Emulator, real_bundle: Path, kind: str) -> None:
    wanted = alone(server, PROMPTS, SAMPLED)
    client = connect(server, kind)
    pieces = list(client.stream(PROMPTS, SAMPLED, tokenizer(real_bundle), steps=2))
    assert joined(pieces, len(PROMPTS)) == wanted
    assert max(len(piece.token_ids) for piece in pieces) <= 2
    assert server.run_calls.count("decode_slots") < sum(tokens for _, tokens, _ in wanted) / 2, "they share calls"
    made = client.generate(PROMPTS, SAMPLED, tokenizer(real_bundle), slots=True)
    assert [(each.text, each.tokens, each.finish_reason) for each in made] == wanted


@pytest.mark.parametrize("kind", ["column", "grpc"])
def test_the_servers_tokenizer(server: Emulator, kind: str) -> None:
    assert joined(list(connect(server, kind).stream(SNOWMAN, SAMPLED)), 1) == alone(server, [SNOWMAN], SAMPLED)


@pytest.mark.parametrize("kind", ["column", "grpc"])
def test_lost_answers_lose_and_repeat_no_token(server: Emulator, real_bundle: Path, kind: str) -> None:
    params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=5)
    wanted = alone(server, PROMPTS[:3], params)
    server.pad = 2
    # The first prefill, two decodes in a row, and one that comes after the try's deadline.
    server.lost = ["UNAVAILABLE", 0.0, "DEADLINE_EXCEEDED", "UNAVAILABLE", 0.0, 5.0]
    client = connect(server, kind, timeout=8, eos_token_id=256)
    pieces = list(client.stream(PROMPTS[:3], params, tokenizer(real_bundle), steps=3))
    assert joined(pieces, 3) == wanted
    assert not server.lost


def test_clients_whose_calls_are_merged(server: Emulator, real_bundle: Path) -> None:
    wanted = alone(server, PROMPTS[:6], SAMPLED)
    server.gather, server.pad = 0.01, 1
    server.lost = [0.0] * 9 + ["UNAVAILABLE"] * 2
    tokens = tokenizer(real_bundle)

    def client(first: int) -> list[tuple[str, int, str | None]]:
        stream = connect(server, ["grpc", "column", "row"][first // 2]).stream(
            PROMPTS[first : first + 2], SAMPLED, tokens
        )
        return joined(list(stream), 2)

    with ThreadPoolExecutor(3) as pool:
        made = [row for rows in pool.map(client, (0, 2, 4)) for row in rows]
    assert made == wanted and server.merged > 3 and not server.lost


class Scripted:
    """A server whose texts are 256, 5, 7 and whose end token is 7; it fills rows up with it."""

    def predict(self, signature: str, inputs: Any, timeout: float) -> dict[str, Any]:
        rows = np.arange(len(next(iter(inputs.values()))))
        one = {"slot": rows.astype(np.int32), "generation": rows + 1, "status": 0 * rows}
        if signature == "tokenize":
            return {"token_ids": np.array([[97, 7, 7], [97, 98, 97]]), "lengths": np.array([1, 3])}
        if signature == "prefill_slots":
            return one | {"token_ids": np.full((len(rows), 1), 256), "lengths": 0 * rows + 1}
        if signature == "decode_slots":
            return {"token_ids": np.array([[5, 7]] * len(rows)), "lengths": 0 * rows + 2, "status": 0 * rows + 1}
        return {"status": 0 * rows + 1}

    def metadata(self, timeout: float) -> dict[str, Any]:
        return {"tokenize": {"inputs": {}, "outputs": {}}}

    def status(self, timeout: float) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("known", [None, 7])
def test_a_text_ends_at_the_models_end_token_and_not_at_another(real_bundle: Path, known: int | None) -> None:
    client = TFServingClient(Scripted(), eos_token_id=known)
    (made,) = client.generate(["a"], SamplingParams(), tokenizer(real_bundle), slots=True)
    assert (made.tokens, made.finish_reason) == (3, "stop")


@pytest.mark.parametrize("known", [True, False])
def test_a_prompt_that_nobody_waits_for_any_more_gives_its_slot_back(
    server: Emulator, real_bundle: Path, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, cancelled = server.run, list[int]()

    def cancels(signature: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """A server with a signature for it: it finds the slot by the name, as a prompt of that name does."""
        if not known or signature != "cancel_slots":
            return original(signature, inputs)
        cancelled.extend(np.asarray(inputs["request_id"]).tolist())
        rows = len(cancelled)
        sampling = {"temperature": np.zeros(rows, np.float32), "top_k": np.zeros(rows, np.int32)}
        sampling |= {"top_p": np.ones(rows, np.float32), "seed": np.zeros(rows, np.int64)}
        tokens, ones = np.zeros((rows, 1), np.int32), np.ones(rows, np.int32)
        found = original("prefill_slots", {"request_id": np.array(cancelled, np.int64), "token_ids": tokens,
                                           "lengths": ones, "max_new_tokens": ones, **sampling})  # fmt: skip
        return original("release_slots", {name: found[name] for name in ("slot", "generation")})

    monkeypatch.setattr(server, "run", cancels)
    client = connect(server, "grpc", timeout=0.3, retries=0, eos_token_id=256)
    server.lost = [1.0]
    with pytest.raises(ServerError, match="the call continues"):
        list(client.stream(["ab", "cd"], SAMPLED, tokenizer(real_bundle)))
    for thread in list(outliving_calls._under_way):
        thread.join()
    # The fixture fills all slots.
    assert len(cancelled) == 2 * known and "decode_slots" not in server.run_calls
    assert "release_slots" in server.run_calls


def test_a_lost_farewell_is_said_again(server: Emulator, real_bundle: Path) -> None:
    stream = connect(server, "grpc").stream("ab", SAMPLED, tokenizer(real_bundle))
    next(stream)
    server.failures = ["UNAVAILABLE"]
    stream.close()
    assert "release_slots" in server.run_calls


def test_closing_and_failing_give_the_slots_back(server: Emulator, real_bundle: Path) -> None:
    stream = connect(server, "grpc").stream(PROMPTS[:4], SAMPLED, tokenizer(real_bundle))
    next(stream)
    stream.close()
    release(server, fill(server, SLOTS))
    with pytest.raises(ServerError, match="the answer was lost"):
        for _ in connect(server, "grpc", retries=1).stream(PROMPTS[:4], SAMPLED, tokenizer(real_bundle)):
            server.lost = ["UNAVAILABLE", "UNAVAILABLE"]
    # The fixture fills them once more.


def test_waiting_for_a_slot(server: Emulator, real_bundle: Path) -> None:
    held = fill(server, SLOTS)
    with pytest.raises(ServerError, match=r"no slot came free within 1 s") as caught:
        list(connect(server, "grpc", timeout=1.0).stream("ab", SAMPLED, tokenizer(real_bundle)))
    assert caught.value.code == "RESOURCE_EXHAUSTED" and server.run_calls.count("prefill_slots") > 1
    later = threading.Timer(0.3, release, (server, held))
    later.start()
    pieces = list(connect(server, "grpc").stream("ab", SAMPLED, tokenizer(real_bundle)))
    later.join()
    assert joined(pieces, 1) == alone(server, ["ab"], SAMPLED)


def test_a_slot_that_is_lost(server: Emulator, real_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = alone(server, ["ab"], SAMPLED)
    original, seen = server.servable.run, []

    def forgets(signature: str, **inputs: Any) -> dict[str, Any]:
        seen.append(signature)
        if seen.count("decode_slots") == 1 and signature == "decode_slots":
            original("release_slots", slot=inputs["slot"], generation=inputs["generation"])
        return original(signature, **inputs)

    monkeypatch.setattr(server.servable, "run", forgets)
    # Nothing was given out: it is begun again.
    (made,) = connect(server, "grpc").generate(["ab"], SAMPLED, tokenizer(real_bundle), slots=True)
    assert [(made.text, made.tokens, made.finish_reason)] == wanted and seen.count("prefill_slots") == 2
    seen.clear()
    stream = connect(server, "grpc").stream("ab", SAMPLED, tokenizer(real_bundle))
    assert next(stream).token_ids
    with pytest.raises(ServerError, match="no longer has the slot of prompt 0") as caught:
        list(stream)
    assert caught.value.code == "ABORTED"


def test_stop_texts_token_ids_and_ignored_ends(server: Emulator, real_bundle: Path) -> None:
    client, tokens = connect(server, "grpc"), tokenizer(real_bundle)
    greedy = SamplingParams(max_new_tokens=20)
    ((text, _, _),) = alone(server, ["ab"], greedy)
    stop = text[3:5]
    (made,) = client.generate(["ab"], SamplingParams(max_new_tokens=20, stop=(stop,)), tokens)
    assert made.text == text[: text.index(stop)] and made.finish_reason == "stop"

    ids = [token for piece in client.stream("ab", greedy, tokens) for token in piece.token_ids]
    stops = SamplingParams(max_new_tokens=20, stop_token_ids=(ids[4],))
    (made,) = client.generate(["ab"], stops, tokens)
    assert made.tokens == ids.index(ids[4]) + 1 and made.finish_reason == "stop"

    # A text that ends by itself, and what a loop that goes on makes of it.
    ended = next(
        (number, row)
        for number, row in enumerate(server.servable.generate([[number] for number in range(256)], max_new_tokens=20))
        if len(row) < 20
    )
    backend = load_backend(open_bundle(real_bundle), "onnx")
    end = ended[1][-1]
    going = SamplingParams(max_new_tokens=20, ignore_eos=True)
    (wanted,) = generate(backend, [[ended[0]]], going, end)
    ids = [token for piece in client.stream([[ended[0]]], going, tokens, steps=3) for token in piece.token_ids]
    assert ids == list(wanted.token_ids) and len(ids) == 20 and end in ids[:-1]

    for here in (tokens, None):  # By the tokenizer here, or by the server's.
        stop = SamplingParams(max_new_tokens=20, ignore_eos=True, stop=("<|endoftext|>",))
        (made,) = client.generate([[ended[0]]], stop, here)
        assert (made.tokens, made.finish_reason) == (ids.index(end) + 1, "stop")

    with pytest.raises(InputError, match="ignore_eos needs temperature 0"):
        client.stream("ab", SamplingParams(ignore_eos=True, temperature=1.0))
    with pytest.raises(InputError, match="min_p is not done"):
        client.generate(["ab"], SamplingParams(min_p=0.1))
    with pytest.raises(InputError, match="need slots"):
        client.generate(["ab"], SamplingParams(stop=("b",)), slots=False)
    with pytest.raises(InputError, match="may not be empty"):
        client.stream(["ab", ""], greedy)


@pytest.mark.parametrize("kind", ["url", "grpc"])
def test_the_command(
    server: Emulator, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [f"--{kind}", server.url if kind == "url" else server.address, "--model", "bytes"]
    options += ["--temperature", "1", "--seed", "3", "--max-new-tokens", "9"]
    wanted = alone(server, ["one", "two", SNOWMAN], SAMPLED)
    stdin = io.TextIOWrapper(io.BytesIO(f"two\n{SNOWMAN}\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert run(["client", "generate", "one", "-", "--stream", *options]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text, _, _ in wanted)
    assert "decode_slots" in server.run_calls
    server.run_calls.clear()
    assert run(["client", "generate", "one", "two", SNOWMAN, "--json", *options]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["text"], line["tokens"], line["finish_reason"]) for line in lines] == wanted
    assert server.run_calls == ["generate_text"]
    # On a terminal it streams by itself.
    server.run_calls.clear()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(["client", "generate", "one", *options]) == 0
    assert capsys.readouterr().out == f"{wanted[0][0]}\n" and "decode_slots" in server.run_calls
    text = wanted[0][0]
    assert run(["client", "generate", "one", "--stop", text[2:4], *options]) == 0
    assert capsys.readouterr().out == text[: text.index(text[2:4])] + "\n"
