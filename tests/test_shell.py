"""What a shell gets from the command: completions, by the shells themselves where they are installed, and a manual."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.cli import COMMANDS, run
from tests.closed_form import write_bundle

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpt2-bundle.1"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working folder with bundles and other folders, and the command on PATH."""
    write_bundle(tmp_path / "dist" / "gpt2-docs")
    write_bundle(tmp_path / "dist" / "gpt2-geometry")
    (tmp_path / "dist" / "gpt2-notes").mkdir()
    script = tmp_path / "bin" / "gpt2-bundle"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m serving.cli "$@"\n')
    script.chmod(0o755)
    return tmp_path


def in_shell(home: Path, shell: str, script: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    environment = os.environ | {"PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(home)}
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *options, "-c", script], cwd=home, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


BASH = """
eval "$(gpt2-bundle completion bash)"
complete -p gpt2-bundle >/dev/null || exit 9
ask() {
    COMPREPLY=() COMP_WORDS=(gpt2-bundle "$@") COMP_CWORD=$#
    _gpt2_bundle_completion gpt2-bundle
    echo "${COMPREPLY[@]}"
}
"""


def test_bash_completes_commands_options_bundles_and_graphs(home: Path) -> None:
    script = (
        BASH + 'ask ins; ask inspect --; ask inspect ""; ask inspect dist/gpt2-d; ask serve dist/gpt2-docs --graph ort'
    )
    commands, options, bundles, started, graphs = in_shell(home, "bash", script).splitlines()
    assert commands.split() == ["inspect"]
    assert {"--json", "--no-hashes", "--help"} <= set(options.split())
    assert bundles.split() == ["dist/gpt2-docs", "dist/gpt2-geometry"]
    assert started.split() == ["dist/gpt2-docs"]
    assert graphs.split() == ["ort/fp32"]


def test_fish_completes_by_the_script(home: Path) -> None:
    script = "gpt2-bundle completion fish | source; complete --do-complete 'gpt2-bundle inspect dist/gpt2-d'"
    assert in_shell(home, "fish", script).split() == ["dist/gpt2-docs"]


def test_zsh_takes_the_script(home: Path) -> None:
    script = 'autoload -Uz compinit; compinit -u; eval "$(gpt2-bundle completion zsh)"; echo ${_comps[gpt2-bundle]}'
    assert in_shell(home, "zsh", script).split() == ["_gpt2_bundle_completion"]


def test_a_folder_without_bundles_is_left_to_the_shell(home: Path) -> None:
    question = {
        "_GPT2_BUNDLE_COMPLETE": "fish_complete",
        "COMP_WORDS": "gpt2-bundle inspect",
        "COMP_CWORD": "dist/gpt2-n",
    }
    command = [home / "bin" / "gpt2-bundle"]
    done = subprocess.run(command, cwd=home, env=os.environ | question, capture_output=True, text=True, timeout=60)
    assert done.stdout == "dir,dist/gpt2-n\n"


def test_all_commands_complete_without_importing_one(home: Path) -> None:
    script = (
        "import os, sys; os.environ.update(_GPT2_BUNDLE_COMPLETE='bash_complete', COMP_WORDS='gpt2-bundle ', "
        "COMP_CWORD='1')\nimport serving.cli\ntry: serving.cli.run([])\nexcept SystemExit: pass\n"
        "print([name for name in sys.modules if '.commands.' in name], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == set(COMMANDS)
    assert done.stderr.strip() == "[]"


def test_the_manual_is_that_of_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["man"]) == 0
    page = capsys.readouterr().out
    assert page == PAGE.read_text(encoding="utf-8"), "write it again by 'make man'"
    for name in COMMANDS:
        assert f'.SS "gpt2\\-bundle {name.replace("-", chr(92) + "-")} [' in page


@pytest.mark.parametrize("checker", ["mandoc", "groff"])
def test_the_manual_is_clean_roff(checker: str) -> None:
    if shutil.which(checker) is None:
        pytest.skip(f"{checker} is not installed")
    command = ["mandoc", "-T", "lint", "-W", "warning"] if checker == "mandoc" else ["groff", "-man", "-ww", "-z"]
    done = subprocess.run([*command, PAGE], capture_output=True, text=True, timeout=60)
    # A date would be that of a release, and there was none.
    assert [line for line in (done.stdout + done.stderr).splitlines() if "missing date" not in line] == []
