"""Training on several devices: the same weights as on one, a checkpoint that is taken up, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.training.device_strategy import training_devices
from serving.errors import InputError
from tests.builder.training.test_training_control import ADAM


@pytest.mark.slow
def test_two_devices_give_the_weights_of_one_and_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.builder.training.two_devices", str(tmp_path), "{}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["devices"] == [1, 2]
    assert figures["apart"] < 1e-4 < 1e-2 < figures["moved"]
    assert figures["resumed"] == 0
    for name in ("losses", "train_losses", "accuracies"):
        one, both = figures[name]
        assert both == pytest.approx(one, rel=1e-3), name


def test_more_devices_than_there_are_are_refused() -> None:
    with (
        pytest.raises(InputError, match=r"'training.devices' is 9 and there are 1"),
        training_devices(replace(ADAM, devices=9)),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loop": "custom"}, "'custom', which runs on one device and here are 2"),
        ({"accumulation": 2}, "'training.accumulation' is 2, which needs one device, not 2"),
        ({"batch_size": 5}, "is 5, which 2 devices cannot share evenly"),
    ],
)
def test_what_several_devices_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    from builder.keras_backend import tf

    device = tf.config.list_logical_devices("CPU")[0]
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [device, device] if kind == "GPU" else [])
    with pytest.raises(InputError, match=words), training_devices(replace(ADAM, **changes)):
        pass
