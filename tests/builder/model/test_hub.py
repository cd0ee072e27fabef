"""Base checkpoints by name: folders first, then the hub, here its client's functions replaced or its cache made up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from builder.model.geometry import read_geometry
from builder.model.gpt2 import GPT2
from builder.model.pretrained import Base, load_weights, resolve_base
from serving.errors import InputError
from tests.oracles.fixtures import FOLDER, max_difference, read_cases
from tests.oracles.layouts import h5_tensors, write_h5


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "bytes", tmp_path / "base"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has nothing; the names it was asked for."""
    asked: list[str] = []

    def snapshot_download(name: str, **_: Any) -> str:
        asked.append(name)
        raise OSError("500 Server Error\nfor url\n")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


class Hub:
    """A hub with one repository, which copies what is asked for as the client does, patterns and all."""

    def __init__(self, files: Path, cache: Path) -> None:
        self.files, self.cache, self.asked = files, cache, []  # type: ignore[var-annotated]

    def snapshot_download(self, name: str, allow_patterns: list[str]) -> str:
        self.asked.append((name, allow_patterns))
        self.cache.mkdir(exist_ok=True)
        names = [path.name for path in self.files.iterdir()]
        for wanted in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copyfile(self.files / wanted, self.cache / wanted)
        return str(self.cache)

    @property
    def fetched(self) -> set[str]:
        return {path.name for path in self.cache.iterdir()}


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The repository has the fixture's files, all kinds of weights and what else repositories have."""
    (checkpoint / "cases.npz").unlink()
    write_h5(checkpoint / "tf_model.h5", h5_tensors("bytes"))
    for name in ("pytorch_model.bin", "flax_model.msgpack", "tokenizer.json", "merges.txt", "rust_model.ot", "run.py"):
        (checkpoint / name).write_bytes(b"x")
    ours = Hub(checkpoint, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", ours.snapshot_download)
    return ours


def test_a_local_folder_is_its_own_base(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]) -> None:
    assert resolve_base(str(checkpoint)) == Base(checkpoint, checkpoint)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert resolve_base("~/base").weights == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert resolve_base("base").tokenizer == Path("base")
    assert no_hub == []


@pytest.mark.parametrize("name", ["./nowhere", "../nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_what_reads_like_a_path_is_not_asked_of_the_hub(name: str, no_hub: list[str]) -> None:
    with pytest.raises(InputError, match=f"model.base '{name}': no such folder; name the folder of a whole GPT-2"):
        resolve_base(name)
    assert no_hub == []


def test_a_file_is_not_a_base(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[str]) -> None:
    monkeypatch.chdir(checkpoint)
    with pytest.raises(InputError, match="no such folder"):
        resolve_base("config.json")
    assert no_hub == []


def test_safetensors_are_all_that_is_fetched_where_there_are_some(hub: Hub) -> None:
    assert resolve_base("openai-community/gpt2") == Base(hub.cache, hub.cache)
    assert hub.fetched == {"config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert [name for name, _ in hub.asked] == ["openai-community/gpt2"]


def test_h5_is_fetched_only_where_there_are_no_safetensors(hub: Hub) -> None:
    (hub.files / "model.safetensors").unlink()
    resolve_base("gpt2")
    assert hub.fetched == {"config.json", "tf_model.h5", "tokenizer.json", "merges.txt"}


def test_settings_of_the_tokenizer_and_adapters_are_fetched(hub: Hub) -> None:
    names = (
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
        "chat_template.jinja",
        "vocab.txt",
    )
    for name in (*names, "notes.txt"):
        (hub.files / name).write_text("{}")
    resolve_base("gpt2")
    assert set(names) < hub.fetched and "notes.txt" not in hub.fetched


def test_shards_are_fetched(hub: Hub) -> None:
    (hub.files / "model.safetensors").rename(hub.files / "model-00001-of-00001.safetensors")
    (hub.files / "model.safetensors.index.json").write_text("{}")
    resolve_base("gpt2")
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} < hub.fetched
    assert "tf_model.h5" not in hub.fetched


def test_pickled_weights_are_never_fetched(hub: Hub) -> None:
    for name in ("model.safetensors", "tf_model.h5"):
        (hub.files / name).unlink()
    with pytest.raises(InputError, match=r"'gpt2': its repository has neither model\.safetensors nor tf_model\.h5"):
        resolve_base("gpt2")
    assert "pytorch_model.bin" not in hub.fetched


def http(kind: type[errors.HfHubHTTPError], said: str) -> Exception:
    """One of the client's HTTP errors, whose constructor wants a response of its HTTP library."""
    error = kind.__new__(kind)
    Exception.__init__(error, said)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (http(errors.RepositoryNotFoundError, "404 Client Error.\n\nRepository Not Found"), "no such repository, or"),
        (http(errors.GatedRepoError, "403 Client Error.\n\nAccess restricted"), "is gated; accept its terms there"),
        (errors.HFValidationError("Repo id must be in the form 'name'"), "not a name of a hub repository"),
        (
            errors.LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nAn error happened"),
            r"cannot be reached \(ConnectError: Name or service not known\) and its cache has no whole copy; name a",
        ),
        (ConnectionError("refused"), r"cannot be reached \(refused\)"),
        (http(errors.HfHubHTTPError, "500 Server Error\nfor url"), r"the hub failed \(500 Server Error\); try again"),
        (RuntimeError(), r"the hub failed \(RuntimeError\)"),
    ],
)
def test_each_failure_of_the_hub_is_one_line(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, **_: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=rf"model\.base 'gpt9': there is no such folder, and .*{words}") as caught:
        resolve_base("gpt9")
    assert "\n" not in str(caught.value)


def cached(home: Path, files: Path, names: tuple[str, ...]) -> None:
    """Lay out nobody/gpt2-tiny in the hub's cache as its client does: blobs, and links to them by commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / "models--nobody--gpt2-tiny"
    for folder in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, name in enumerate(names):
        shutil.copyfile(files / name, repository / "blobs" / f"{number:040x}")
        (repository / "snapshots" / commit / name).symlink_to(f"../../blobs/{number:040x}")


def offline(home: Path, name: str = "nobody/gpt2-tiny") -> list[str]:
    """What resolving `name` prints in a process of its own, since the client reads its variables when imported."""
    code = (
        "import sys\nfrom builder.model.pretrained import resolve_base\nfrom serving.errors import InputError\n"
        "try:\n    print(resolve_base(sys.argv[1]).weights)\nexcept InputError as error:\n    print('error:', error)\n"
    )
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE", "TRANSFORMERS"))
    }
    env |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=root, env=env, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("weights", ["model.safetensors", "tf_model.h5"])
def test_the_usual_cache_is_read_offline(checkpoint: Path, tmp_path: Path, weights: str) -> None:
    write_h5(checkpoint / "tf_model.h5", h5_tensors("bytes"))
    cached(tmp_path / "home", checkpoint, ("config.json", weights))
    (found,) = offline(tmp_path / "home")
    assert "models--nobody--gpt2-tiny/snapshots/" in found
    model = GPT2.create(read_geometry(Path(found)))
    assert load_weights(model, Path(found)) == weights
    case = read_cases("bytes")["full"]
    assert max_difference(model(case.ids), case.logits) < 5e-5


def test_a_cache_without_weights_is_refused_offline(checkpoint: Path, tmp_path: Path) -> None:
    cached(tmp_path / "home", checkpoint, ("config.json",))
    (line,) = offline(tmp_path / "home")
    assert line.startswith("error: model.base 'nobody/gpt2-tiny': ") and "neither model.safetensors nor" in line


@pytest.mark.parametrize("name", ["nobody/gpt2-tiny", "gpt2"])
def test_what_is_not_in_the_cache_is_refused_offline(tmp_path: Path, name: str) -> None:
    (line,) = offline(tmp_path / "home", name)
    assert line.startswith(f"error: model.base {name!r}: ") and "while HF_HUB_OFFLINE is set; unset it" in line


def test_a_partial_snapshot_is_read_if_it_has_what_is_needed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(name: str, **_: Any) -> str:
        error = errors.LocalEntryNotFoundError("incomplete: 1 file(s) are missing (vocab.json)")
        error.snapshot_path = str(checkpoint)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_base("gpt2").weights == checkpoint
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be reached"):
        resolve_base("openai-community/gpt2")
