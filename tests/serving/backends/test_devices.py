"""Which replica is on which device, and what ONNX Runtime is told; no GPU is needed for either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

import serving.engine.engine
from serving.backends.devices import parse_devices
from serving.backends.onnx_session import open_graph, open_session
from serving.bundle import Bundle, open_bundle
from serving.entrypoints import engine_loader
from serving.entrypoints.engine_loader import EngineLoader
from serving.errors import BundleError, InputError, RuntimeMissingError
from tests.serving.double_engine import DoubleEngine
from tests.tiny_build import Fails


def test_devices_are_a_list_or_an_option_given_several_times() -> None:
    assert parse_devices("cuda") == ("cuda",)
    assert parse_devices("cuda:0, cuda:1") == parse_devices(["cuda:0", "cuda:1"]) == ("cuda:0", "cuda:1")
    assert parse_devices(["cuda:0,cuda:1", "cpu"]) == ("cuda:0", "cuda:1", "cpu")
    for wrong in ("cuda:0,", "cuda:-1", "gpu", ["cpu", "cuda:1.5"]):
        with pytest.raises(InputError, match="it is 'cpu', 'cuda' or 'cuda:' and the number of a GPU"):
            parse_devices(wrong)


@pytest.mark.parametrize(
    ("devices", "replicas", "places", "threads"),
    [
        (("cuda:0", "cuda:1"), 2, ["cuda:0", "cuda:1"], None),
        (("cuda:0", "cuda:1"), 5, ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"], None),
        (("cuda",), 2, ["cuda", "cuda"], None),
        (("cpu",), 3, ["cpu"] * 3, 4),
        (("cpu", "cuda:1"), 4, ["cpu", "cuda:1", "cpu", "cuda:1"], 6),
        (("cpu",), 1, ["cpu"], None),
    ],
)
def test_replicas_take_devices_in_turns(
    bundle_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    devices: tuple[str, ...],
    replicas: int,
    places: list[str],
    threads: int | None,
) -> None:
    seen: list[tuple[str, int | None]] = []

    def open_engine(bundle: Any, graph: Any, device: str, config: Any, observer: Any) -> DoubleEngine:
        seen.append((device, config.threads))
        return DoubleEngine(observer=observer)

    monkeypatch.setattr(serving.engine.engine, "open_engine", open_engine)
    monkeypatch.setattr(engine_loader, "usable_cores", lambda: 12)
    loader = EngineLoader(devices=devices, replicas=replicas)
    loader.open(open_bundle(bundle_folder), None).close()  # type: ignore[arg-type]
    assert seen == [(place, threads) for place in places]


def test_caches_in_int8_want_an_onnx_runtime_that_knows_them(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(bundle_folder)
    graph = bundle.graph("ort/fp32")
    caches = {name: replace(spec, dtype="int8") for name, spec in graph.inputs.items() if name.startswith("past")}
    graphs = {**bundle.manifest.graphs, "ort/int8": replace(graph, inputs={**graph.inputs, **caches})}
    bundle = replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))

    def opened(bundle: Bundle, name: str) -> None:
        with pytest.raises(BundleError, match="cannot load"):  # The file has only the right name.
            open_graph(bundle, name, "cpu", 1)

    for version in ("1.27.1", "1.9.0", "0.30"):
        monkeypatch.setattr(ort, "__version__", version)
        with pytest.raises(RuntimeMissingError, match=f"ONNX Runtime 1.28 or newer, and {version} is installed"):
            open_graph(bundle, "ort/int8", "cpu", 1)
        opened(bundle, "ort/fp32")
    for version in ("1.28.0", "1.31.0.dev1", "2.0.0", "unknown"):
        monkeypatch.setattr(ort, "__version__", version)
        opened(bundle, "ort/int8")


def test_the_cuda_provider_is_told_the_number(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Session:
        def __init__(self, path: str, options: Any, providers: Any, **more: Any) -> None:
            calls.append((providers, more))
            if providers[0][1]["device_id"] == "7":
                raise RuntimeError("CUDA failure 101: invalid device ordinal ;\n GPU=0 ; hostname=h")
            if providers[0][1]["device_id"] == "8":
                raise RuntimeError("the protobuf is broken")

        def get_providers(self) -> list[str]:
            return [provider if isinstance(provider, str) else provider[0] for provider in calls[-1][0]]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    bundle = open_bundle(bundle_folder)
    for device, number in (("cuda", "0"), ("cuda:0", "0"), ("cuda:3", "3")):
        open_session(bundle, "ort/fp32/model.onnx", device, None)
        (name, told), last = calls[-1][0]
        assert (name, told["device_id"], last) == ("CUDAExecutionProvider", number, "CPUExecutionProvider")
        assert calls[-1][1] == {"enable_fallback": 0}, "what cannot be had is an error and no other device"
    with pytest.raises(
        RuntimeMissingError, match=r"cannot start on 'cuda:7' here \(CUDA failure 101.*nvidia-smi"
    ) as no:
        open_session(bundle, "ort/fp32/model.onnx", "cuda:7", None)
    assert "\n" not in str(no.value)
    with pytest.raises(BundleError, match=r"cannot load .*broken"):
        open_session(bundle, "ort/fp32/model.onnx", "cuda:8", None)


def test_a_runtime_without_cuda_is_one_line(bundle_folder: Path, fails: Fails) -> None:
    options = ["--port", "0", "--device", "cuda:0,cuda:1", "--replicas", "2"]
    fails(["serve", str(bundle_folder), *options], 1, "does not run on 'cuda'", "pip install 'gpt2-bundle[onnx-gpu]'")
