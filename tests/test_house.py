"""The house: imports point one way, and the contract needs nothing but Python."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("builder", "serving", "benchmarks")
MAY_IMPORT = {"builder": {"serving"}, "benchmarks": {"serving"}, "serving": set()}
# What a program that only reads bundles must be able to import anywhere.
CONTRACT = ("bundle", "manifest", "strict_json", "publish", "errors", "suggest")


def imports(path: Path) -> set[str]:
    """Every module that a file imports by name, at the top or inside a function, `import_module` included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def sources(part: str) -> list[Path]:
    files = sorted((ROOT / part).rglob("*.py"))
    assert files, part
    return files


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part: str) -> None:
    forbidden = {*PARTS, "tests"} - {part} - MAY_IMPORT[part]
    for path in sources(part):
        wrong = {name for name in imports(path) if name.partition(".")[0] in forbidden}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_the_scan_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "import a.b as c\ndef f():\n    from d.e import g\n    import importlib\n    importlib.import_module('h.i')\n"
    )
    assert imports(path) == {"a.b", "d.e", "importlib", "h.i"}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_needs_only_the_standard_library(name: str) -> None:
    own = {f"serving.{module}" for module in CONTRACT}
    for module in imports(ROOT / "serving" / f"{name}.py"):
        assert module in own or module.partition(".")[0] in sys.stdlib_module_names, module


def test_only_the_backend_that_is_named_so_imports_a_runtime() -> None:
    allowed = {
        "tensorflow": {"backends/tensorflow.py", "backends/tensorflow_session.py", "quiet_tensorflow.py"},
        "onnxruntime": {"backends/onnx.py", "backends/onnx_loop.py", "backends/onnx_session.py"},
        "keras": set(),
        "onnx": set(),
        "torch": set(),
        "transformers": set(),
    }
    for path in sources("serving"):
        heavy = {name.partition(".")[0] for name in imports(path)} & allowed.keys()
        place = path.relative_to(ROOT / "serving").as_posix()
        assert all(place in allowed[name] for name in heavy), f"{place} imports {heavy}"


def test_every_command_leads_to_a_file() -> None:
    from serving.cli import COMMANDS

    for name, (target, sentence) in COMMANDS.items():
        module, _, attribute = target.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert attribute in functions, name
        assert sentence.endswith(".") and len(sentence) < 80
