"""The sdist and the wheel: whole, and enough to generate and serve in a fresh environment without TensorFlow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest

from tests.tiny_build import TinyBuild

ROOT = Path(__file__).parents[1]
# What `du` finds in the environment, which an image of python:3.12-slim adds to its own 130 MB or so.
MAX_ENVIRONMENT = 270_000_000
# After what docker/cpu.Dockerfile takes away, with bytecode as far as the tests ran it.
MAX_IMAGE_PACKAGES = 225_000_000
PAGES = {"/": "text/html", "/playground.css": "text/css", "/playground.js": "text/javascript"}
LEFT_OUT = shutil.ignore_patterns(".*", "dist", "runs", "build", "__pycache__", "*.egg-info")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

pytestmark = pytest.mark.slow


def started(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def succeeded(*words: str | Path, folder: Path) -> str:
    done = started(*words, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an sdist and of the wheel that is built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    succeeded(sys.executable, "-m", "build", "--outdir", folder, folder / "source", folder=folder)
    return folder


@pytest.fixture(scope="module")
def environment(distributions: Path) -> Path:
    """The scripts of an environment with the wheel and its extra `serve`."""
    subprocess.run([sys.executable, "-m", "venv", distributions / "venv"], check=True, timeout=300)
    install(distributions, "serve")
    return distributions / "venv" / "bin"


def size_on_disk(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def install(distributions: Path, extras: str) -> None:
    (wheel,) = distributions.glob("*.whl")
    python = distributions / "venv" / "bin" / "python"
    constraints = ("--constraint", ROOT / "constraints.txt")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-compile")
    succeeded(python, "-m", "pip", "install", *quiet, *constraints, f"{wheel}[{extras}]", folder=distributions)


def check_server(command: Path, bundle: Path, text: str, folder: Path) -> None:
    """Start `serve`; its pages and the greedy `text` must come."""
    with subprocess.Popen(
        [command, "serve", bundle, "--port", "0"],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            for page, kind in PAGES.items():
                with urllib.request.urlopen(url + page, timeout=30) as answer:
                    assert answer.headers["Content-Type"].startswith(kind) and answer.read()
            body = json.dumps({"model": "tiny", "prompt": "Return the", "max_tokens": 8, "temperature": 0}).encode()
            request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.load(answer)["choices"][0]["text"] == text
        finally:
            server.terminate()
            server.wait(60)


def test_the_distributions_are_whole(distributions: Path) -> None:
    (wheel,), (sdist,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    kept = {path.relative_to(ROOT).as_posix() for part in ("serving", "builder", "benchmarks") for path in
            (ROOT / part).rglob("*") if path.suffix in (".py", ".json", ".html", ".css", ".js")}  # fmt: skip
    kept = {name for name in kept if not name.startswith("benchmarks/results/")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert kept <= names, kept - names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name.partition("/")[0]} <= {
        "serving", "builder", "benchmarks", f"{wheel.name.rpartition('-py3')[0]}.data",
    }  # fmt: skip
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras >= {
        *["onnx", "onnx-gpu", "serve", "build", "bench", "client", "ray", "trace", "guided", "sign", "mlflow", "wandb"]
    }
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside >= {*kept, "constraints.txt", "docker/cpu.Dockerfile", "recipes/default.toml", "docs/serving.md"}


def test_the_extra_serve_alone_names_the_runtime_that_it_lacks(
    environment: Path, distributions: Path, real_bundle: Path
) -> None:
    packages = json.loads(succeeded(environment / "python", "-m", "pip", "list", "--format=json", folder=distributions))
    names = {package["name"].lower() for package in packages}
    assert not names & {"tensorflow", "keras", "torch", "onnx", "onnxruntime", "transformers", "sympy", "h5py"}
    done = started(environment / "gpt2-bundle", "generate", real_bundle, "a", folder=distributions)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "'gpt2-bundle[onnx]'" in done.stderr


def test_a_bundle_is_served_without_tensorflow(environment: Path, distributions: Path, built: TinyBuild) -> None:
    install(distributions, "serve,onnx")
    command = environment / "gpt2-bundle"
    said = succeeded(
        command, "generate", built.bundle, "Return the", "--json", "--max-new-tokens", "8", folder=distributions
    )
    text = json.loads(said)["text"]
    assert text
    check_server(command, built.bundle, text, distributions)
    # The Grafana dashboard travels in the wheel.
    target = distributions / "k8s"
    succeeded(command, "deploy", built.bundle, "--target", "kubernetes", "--output", target, folder=distributions)
    assert any("dashboard" in path.name for path in target.rglob("*"))


def test_the_environment_is_small(environment: Path, distributions: Path) -> None:
    install(distributions, "serve,onnx")
    size = size_on_disk(environment.parent / "lib")
    pip = sum(
        path.lstat().st_blocks * 512
        for name in ("pip", "setuptools")
        for folder in (environment.parent / "lib").glob(f"python*/site-packages/{name}*")
        for path in folder.rglob("*")
        if path.is_file()
    )
    print(f"environment without pip: {(size - pip) / 1e6:.0f} MB")
    assert size - pip < MAX_ENVIRONMENT


def test_the_image_has_all_that_serving_needs(environment: Path, distributions: Path, built: TinyBuild) -> None:
    """What the Dockerfile removes last, removed here; it takes pip, so nothing is installed after this test."""
    install(distributions, "serve,onnx,guided")
    text = (ROOT / "docker/cpu.Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if "pip uninstall" in line]
    removal = line[line.index("/opt/venv/bin/pip uninstall") :].replace("/opt/venv", str(environment.parent))
    succeeded("sh", "-ec", removal, folder=distributions)
    assert not (environment / "pip").exists()
    command = environment / "gpt2-bundle"
    options = ("Return the", "--json", "--max-new-tokens", "8")
    said = json.loads(succeeded(command, "generate", built.bundle, *options, folder=distributions))
    check_server(command, built.bundle, said["text"], distributions)
    choice = succeeded(command, "generate", built.bundle, "Is it ", "--choice", "yes", folder=distributions)
    assert "yes" in choice
    size = size_on_disk(environment.parent)
    print(f"packages of the image: {size / 1e6:.0f} MB")
    assert size < MAX_IMAGE_PACKAGES
