"""The default corpus: docstrings found by parsing alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.data.docstrings import read_docstrings
from serving.errors import InputError


def test_docstrings_by_qualified_name_in_source_order_without_running_anything(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text('"""The package."""\n')
    (tmp_path / "pack" / "part.py").write_text(
        'def first():\n    """First.\n\n    Body.\n        Indented.\n    """\n    def inner():\n        "Inner."\n'
        "class C:\n    'A class.'\n    async def method(self):\n        'A method.'\n"
        "if True:\n    try:\n        pass\n    except OSError:\n        def late():\n            'Late.'\n"
        "def silent(): pass\nx = 'no docstring'\n"
    )
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "half.py").write_text('"""\\ud800"""\n')
    (tmp_path / "warns.py").write_text("'''An invalid \\d escape.'''\n")
    (tmp_path / "raises.py").write_text('"""Never run."""\nraise SystemExit\n')
    for skipped in ("test", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "a.py").write_text('"""Not this."""\n')
    found = [(document.name, document.text) for document in read_docstrings(tmp_path)]
    assert found == [
        ("pack", "The package."),
        ("pack.part.first", "First.\n\nBody.\n    Indented."),
        ("pack.part.first.inner", "Inner."),
        ("pack.part.C", "A class."),
        ("pack.part.C.method", "A method."),
        ("pack.part.late", "Late."),
        ("raises", "Never run."),
        ("warns", "An invalid \\d escape."),
    ]


@pytest.mark.slow
def test_the_standard_library_has_over_a_million_characters() -> None:
    documents = list(read_docstrings())
    assert sum(len(document.text) for document in documents) > 1_000_000
    names = {document.name for document in documents}
    assert {"json", "json.dumps", "collections.OrderedDict.move_to_end"} <= names
    assert not [name for name in names if name.startswith("test.") or "site-packages" in name]


def test_a_library_without_sources_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no docstrings here.*set corpus\.paths"):
        list(read_docstrings(tmp_path))
