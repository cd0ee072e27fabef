"""The Dockerfiles: linted, rootless, pinned, and made of files that are there. No engine builds them here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from serving import __version__
from serving.deploy import endpoints
from serving.deploy.ray_serve import RAY_VERSION, ray_image
from serving.deploy.workload import USER, ServeOptions, Workload

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
HADOLINT = Path(sys.executable).with_name("hadolint")


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def test_both_devices_and_ray_have_one() -> None:
    assert [path.name for path in FILES] == ["cpu.Dockerfile", "cuda.Dockerfile", "ray.Dockerfile"]


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    done = subprocess.run([HADOLINT, "--no-color", *FILES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN cd /tmp\n")
    assert subprocess.run([HADOLINT, wrong], capture_output=True, timeout=60).returncode != 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_an_image_is_pinned_rootless_and_what_the_manifests_start(path: Path) -> None:
    found = instructions(path)
    stages = [value for name, value in found if name == "FROM"]
    assert len(stages) == 2
    for stage in stages:
        image, _, tag = stage.partition(" ")[0].partition(":")
        assert image in ("python", "ubuntu", "nvidia/cuda") and re.match(r"\d+\.\d+", tag), stage
    last = found[max(at for at, (name, _) in enumerate(found) if name == "FROM") :]
    values = dict(last)
    assert values["USER"] == f"{USER}:{USER}"
    device = path.name.partition(".")[0]
    if device != "ray":  # KubeRay gives its pods the command.
        assert values["ENTRYPOINT"] == '["gpt2-bundle", "serve"]'
        assert values["EXPOSE"] == " ".join(str(port.number) for port in endpoints.PORTS)
    # No package is installed as what it happens to be today, and the last stage has no pip.
    installs = [part for name, value in found if name == "RUN" for part in value.split("&&") if "pip install" in part]
    assert installs and all("--constraint constraints.txt" in part or "--no-deps" in part for part in installs)
    assert not any("pip" in value for name, value in last if name == "RUN")
    load = Workload("a", ServeOptions("ort/fp32", device="cuda" if device == "cuda" else "cpu"), 1, 1, "0" * 64)
    image = ray_image(load) if device == "ray" else load.image
    assert (
        image
        == ("gpt2-bundle-ray" if device == "ray" else "gpt2-bundle-serve") + f":{__version__}-{load.options.device}"
    )
    command = f"docker build -f docker/{path.name} -t {image} ."
    assert command in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_extras_and_copied_files_exist_and_reach_the_build(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    found = instructions(path)
    extras = re.findall(r"\.\[([\w,-]+)\]", str(found))
    assert extras
    for extra in ",".join(extras).split(","):
        for requirement in project["optional-dependencies"][extra]:
            name = re.match(r"[\w-]+", requirement)
            assert name and f"\n{name[0].lower().replace('_', '-')}==" in pinned, requirement
    sources = {word for name, value in found if name == "COPY" and "--from" not in value for word in value.split()[:-1]}
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE))
    assert {source.partition("/")[0] for source in sources} == allowed
    for source in sources:
        assert (ROOT / source).exists()


def test_the_manifests_have_rays_pinned_version() -> None:
    assert f"\nray=={RAY_VERSION}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_what_is_copied_is_all_that_serve_imports(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "serving", tmp_path / "serving", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-P", "-c", "import sys; sys.path.insert(0, '.'); sys.modules['tensorflow'] = None; "
               "from serving.cli import run; sys.exit(run(['serve', '--help']))"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--max-num-seqs" in done.stdout, done.stderr
