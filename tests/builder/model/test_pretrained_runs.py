"""A run or an earlier bundle as the base of the next: where its parts lie, and what must not be started from."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from builder.model.pretrained import local_base
from serving.bundle import open_bundle
from serving.cli import run as command
from serving.errors import InputError
from tests.oracles.fixtures import FOLDER
from tests.oracles.layouts import h5_tensors, write_h5, write_openai
from tests.tiny_build import SETTINGS as TINY
from tests.tiny_build import Fails, TinyBuild, contents

# The same build without sizes or a tokenizer of its own, and without training.
WITHOUT_SIZES = tuple(each for each in TINY if not each.startswith(("model.", "tokenizer.", "training.epochs")))
SETTINGS = (*WITHOUT_SIZES, "training.epochs=0")


def a_run(folder: Path) -> Path:
    """A run as its stages leave it, but for what no reader of a base looks at."""
    (folder / "prepare" / "tokenizer").mkdir(parents=True)
    shutil.copytree(FOLDER / "bytes", folder / "train")
    for stage in ("prepare", "train"):
        (folder / stage / "stage.json").write_text("{}")
    return folder


def test_a_run_is_a_base(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    base = local_base(str(run))
    assert base is not None and (base.weights, base.tokenizer) == (run / "train", run / "prepare" / "tokenizer")
    (run / ".lock").touch()
    assert run / "train" / "model.safetensors" in base.files() and run / ".lock" not in base.files()


@pytest.mark.parametrize("stage", ["prepare", "train"])
def test_a_run_that_is_not_done_is_refused(tmp_path: Path, stage: str) -> None:
    run = a_run(tmp_path / "run")
    (run / stage / "stage.json").unlink()
    with pytest.raises(InputError, match="run: this run is not trained yet; run 'gpt2-bundle train'"):
        local_base(str(run))


def test_a_run_prepared_anew_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    later = (run / "train" / "stage.json").stat().st_mtime + 5
    os.utime(run / "prepare" / "stage.json", (later, later))
    with pytest.raises(InputError, match="run: this run was prepared again since it was trained"):
        local_base(str(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["run", pytest.param("h5", marks=pytest.mark.slow), pytest.param("openai", marks=pytest.mark.slow)]
)
def test_a_base_in_each_layout_is_built_as_it_is(
    built: TinyBuild, tmp_path: Path, capfd: pytest.CaptureFixture[str], layout: str
) -> None:
    """Without training, weights and tokenizer come out byte for byte as the bundle that the base was made of."""
    base = tmp_path / "base"
    if layout == "run":
        base, label = built.run, "model.safetensors"
    elif layout == "h5":
        label = "tf_model.h5"
        base.mkdir()
        write_h5(base / "tf_model.h5", h5_tensors(built.bundle))
        for name in ("config.json", "tokenizer.json"):
            shutil.copyfile(built.bundle / name, base / name)
    else:
        label = "TensorFlow checkpoint model.ckpt"
        write_openai(base, built.bundle)
        for name, source in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            shutil.copyfile(built.bundle / source, base / name)
    ours = TinyBuild(built.corpus, tmp_path / "runs", tmp_path / "dist", SETTINGS)
    assert command([*ours.build(), "--base", str(base)]) == 0
    assert f"base: {label} of {base}\n" in capfd.readouterr().out
    theirs, opened = open_bundle(built.bundle), open_bundle(ours.bundle)
    assert opened.manifest.model == theirs.manifest.model
    for name in ("model.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert opened.path(name).read_bytes() == theirs.path(name).read_bytes(), name


def test_a_run_may_not_be_its_own_base(fails: Fails, tiny: TinyBuild) -> None:
    tiny = replace(tiny, settings=SETTINGS)
    before = contents(tiny.run)
    for folder in (tiny.run, tiny.run / "train"):
        for arguments in (["prepare", *tiny.options()], tiny.build()):
            fails([*arguments, "--base", str(folder)], 2, str(folder), "the folder of this very run", "--set name=")
    assert contents(tiny.run) == before


def test_a_bundle_may_not_replace_its_own_base(fails: Fails, tiny: TinyBuild) -> None:
    tiny = replace(tiny, settings=SETTINGS)
    before = contents(tiny.bundle)
    fails([*tiny.build(), "--base", str(tiny.bundle)], 2, "the bundle that this build would replace", "--set name=")
    assert contents(tiny.bundle) == before
