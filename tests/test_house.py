"""The house: imports point one way from layer to layer, and the contract needs nothing but Python."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("builder", "serving", "benchmarks")
MAY_IMPORT = {"builder": {"serving"}, "benchmarks": {"serving"}, "serving": set()}
# From the top down: a folder or file imports only from rows below its own, and its own files. Names that share a row
# do not import each other.
LAYERS = {
    "serving": (
        "cli ray",
        "commands",
        "entrypoints model",
        "protocols",
        "server",
        "engine",
        "generation clients",
        "backends",
        "sampling deploy chat gguf distribution",
        "bundle protobuf",
        "support errors",
    ),
    "builder": (
        "commands",
        "stages",
        "verification",
        "training tracking onnx_export tf_export recipe_reader recipe_reference",
        "data model",
        "recipe run_folder progress keras_backend special_tokens",
        "plain_files data_recipe",
    ),
    "benchmarks": ("commands", "serving training experiments", "peers", "suite", "common"),
}


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file imports by name, at the top or inside a function, `import_module` included.

    `from a import b` gives "a" and "a.b", as b may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return frozenset(found)


def sources(part: str) -> list[Path]:
    files = sorted((ROOT / part).rglob("*.py"))
    assert files, part
    return files


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_graph() -> dict[str, set[str]]:
    """Each module of the project with the modules of the project that it imports, itself left out."""
    modules = {module_name(path): path for part in PARTS for path in sources(part)}
    graph = {}
    for name, path in modules.items():
        found = imports(path) & modules.keys()
        # `from package import module` depends on the module, not on the package's face.
        graph[name] = {each for each in found if each != name and not any(o.startswith(each + ".") for o in found)}
    return graph


def layer_faults(graph: dict[str, set[str]]) -> list[str]:
    """Each import that does not point to a lower layer of its part."""
    found = []
    for name, targets in graph.items():
        for target in targets:
            part, _, rest = name.partition(".")
            other, _, below = target.partition(".")
            here, there = rest.partition(".")[0], below.partition(".")[0]
            if part != other or not here or not there or here == there:
                continue
            rank = {each: row for row, names in enumerate(LAYERS[part]) for each in names.split()}
            if rank[here] >= rank[there]:
                found.append(f"{name} imports {target}")
    return found


def circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules on a circle of imports: those left when modules that import nothing left are taken away."""
    left = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    # What only leads into a circle is taken away from the other side.
    while free := [name for name in left if not any(name in targets for targets in left.values())]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("part", PARTS)
def test_imports_point_one_way(part: str) -> None:
    forbidden = {*PARTS, "tests"} - {part} - MAY_IMPORT[part]
    for path in sources(part):
        wrong = {name for name in imports(path) if name.partition(".")[0] in forbidden}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_each_folder_imports_only_lower_layers() -> None:
    assert layer_faults(module_graph()) == []


def test_no_import_closes_a_circle() -> None:
    assert circles(module_graph()) == []


def test_every_file_has_a_layer() -> None:
    for part, rows in LAYERS.items():
        names = {each for row in rows for each in row.split()}
        places = {path.relative_to(ROOT / part).parts[0].removesuffix(".py") for path in sources(part)} - {"__init__"}
        assert places == names, part


def test_a_wrong_layer_and_a_circle_are_found() -> None:
    graph = {
        "serving.engine.core": {"serving.server.state"},
        "serving.server.state": {"serving.engine.core"},
        "serving.cli": {"serving.engine.core"},
        "serving.errors": set[str](),
    }
    assert layer_faults(graph) == ["serving.engine.core imports serving.server.state"]
    assert circles(graph) == ["serving.engine.core", "serving.server.state"]


def test_the_scan_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        "import a.b as c\ndef f():\n    from d.e import g\n    import importlib\n    importlib.import_module('h.i')\n"
    )
    assert imports(path) == {"a.b", "d.e", "d.e.g", "importlib", "h.i"}


CONTRACT = [
    "errors.py",
    "support/suggestions.py",
    *(f"bundle/{path.name}" for path in (ROOT / "serving/bundle").glob("*.py")),
]


@pytest.mark.parametrize("place", CONTRACT)
def test_the_contract_needs_only_the_standard_library(place: str) -> None:
    path = ROOT / "serving" / place
    own = {module_name(ROOT / "serving" / each) for each in CONTRACT}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                assert name in own or str(name).partition(".")[0] in sys.stdlib_module_names, f"{place} imports {name}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("serving", "tensorflow onnxruntime numpy tokenizers llguidance"),
        ("serving.model", "tensorflow onnxruntime llguidance"),
        ("serving.engine.engine, serving.commands.generate, serving.protocols.openai.routes", "llguidance onnxruntime"),
        ("serving.clients.session_transport", "tensorflow"),
        ("builder.stages.pipeline", "tensorflow onnx onnxruntime"),
        # The training stage with all that it imports when it runs.
        (
            "builder.training.trainer, builder.training.samples, builder.model.safetensors_file",
            "onnx tf2onnx onnxruntime",
        ),
    ],
)
def test_an_import_loads_no_runtime_that_it_does_not_need(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*sorted(set({absent.split()}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == ""


def test_only_the_backend_that_is_named_so_imports_a_runtime() -> None:
    allowed = {
        "tensorflow": {"backends/tensorflow.py", "clients/session_transport.py", "support/tensorflow_import.py"},
        "onnxruntime": {"backends/onnx.py", "backends/onnx_multi_step.py", "backends/onnx_session.py"},
        "llguidance": {"sampling/grammars.py"},
        "keras": set(),
        "onnx": set(),
        "torch": set(),
        "transformers": set(),
    }
    for path in sources("serving"):
        heavy = {name.partition(".")[0] for name in imports(path)} & allowed.keys()
        place = path.relative_to(ROOT / "serving").as_posix()
        assert all(place in allowed[name] for name in heavy), f"{place} imports {heavy}"


def test_the_architecture_page_has_a_line_for_each_module() -> None:
    rows: dict[str, list[str]] = {}
    heading = ""
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = "".join(re.findall("`([a-z_0-9/]+)/`", line)[:1])
        elif row := re.match(r"\| `([\w/]+)(?:\.py)?` \|", line):
            rows.setdefault(heading, []).append(row[1])
    for part in PARTS:
        for path in sources(part):
            if path.name != "__init__.py":
                folder, above = (
                    path.parent.relative_to(ROOT).as_posix(),
                    path.parent.parent.relative_to(ROOT).as_posix(),
                )
                names = [*rows.get(folder, []), *(name for name in rows.get(above, []) if "/" in name)]
                assert [name.rpartition("/")[2] for name in names].count(path.stem) == 1, path.relative_to(ROOT)


def test_every_command_leads_to_a_file() -> None:
    from serving.cli import COMMANDS

    for name, (target, sentence) in COMMANDS.items():
        module, _, attribute = target.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        assert attribute in functions, name
        assert sentence.endswith(".") and len(sentence) < 80
