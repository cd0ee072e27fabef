"""The Grafana dashboard asks for nothing that the server does not count."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from serving.entrypoints.http_app import build_app
from serving.server.metrics import PREFIX
from serving.server.registry import ModelRegistry, ServedModel, State
from serving.server.settings import Settings
from serving.server.state import Server
from tests.serving.double_engine import DoubleEngine, bundle_of

BOARD = json.loads((files("serving.server") / "grafana_dashboard.json").read_text(encoding="utf-8"))
NAME = re.compile(rf"\b{PREFIX}\w+")


def test_every_expression_asks_for_metrics_and_labels_that_are_exposed(tmp_path: Path) -> None:
    registry = ModelRegistry()
    server = Server(registry, Settings())
    counts = server.metrics.model("tiny", 1)
    counts.engine = engine = DoubleEngine(observer=counts)
    registry.add(ServedModel("tiny", 1, bundle_of(tmp_path / "tiny", "tiny"), engine, 1_700_000_000, State.AVAILABLE))
    with TestClient(build_app(registry, Settings(), server=server)) as client:
        assert client.post("/v1/completions", json={"prompt": "A"}).status_code == 200
        exposed: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for sample in family.samples:
                exposed.setdefault(sample.name, set()).update(sample.labels)
    engine.close()

    expressions = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    expressions += [variable["definition"] for variable in BOARD["templating"]["list"] if "definition" in variable]
    assert len(expressions) > 20
    for expression in expressions:
        (name,) = NAME.findall(expression)
        assert name in exposed, expression
        labels = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression)
        labels += [label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")]
        assert labels or expression.startswith("label_values"), expression
        assert set(labels) <= exposed[name], expression


def test_panels_have_places_and_numbers_of_their_own() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
