"""What the corpus reads, in which order, and the one line that each unreadable input ends in."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from builder.data import text_decoding
from builder.data.documents import Document
from builder.data.sources import find_sources, read_documents
from builder.recipe import CorpusRecipe
from serving.errors import InputError


def read(*paths: Path | str, field: str = "text", **settings: Any) -> list[Document]:
    return list(read_documents(CorpusRecipe(paths=tuple(map(str, paths)), text_field=field, **settings)))


def texts(*paths: Path | str, field: str = "text", **settings: Any) -> list[str]:
    return [document.text for document in read(*paths, field=field, **settings)]


def fails(*paths: Path | str, field: str = "text", **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(*paths, field=field, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_parquet(path: Path, **columns: object) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def compressed(path: Path, ending: str) -> Path:
    data = path.read_bytes()
    if ending == ".gz":
        return write(Path(f"{path}.gz"), gzip.compress(data))
    zstandard = pytest.importorskip("zstandard")
    half = len(data) // 2  # Two frames, as `zstd a b` and parallel compressors write them.
    frames = [zstandard.ZstdCompressor().compress(piece) for piece in (data[:half], data[half:])]
    return write(Path(f"{path}.zst"), b"".join(frames))


TEXTS = ["one, “two”\nthree", 'a "quoted" line\r\n', "Grüße 👋"]


def every_kind(folder: Path) -> dict[str, Path]:
    """One file of each kind, the record kinds holding TEXTS."""
    folder.mkdir(exist_ok=True)
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([("id", "text"), *((str(number), text) for number, text in enumerate(TEXTS))])
    return {
        ".txt": write(folder / "a.txt", TEXTS[0]),
        ".md": write(folder / "b.md", TEXTS[0]),
        ".json": write(folder / "c.json", json.dumps([{"text": text} for text in TEXTS], indent=2)),
        ".ndjson": write(folder / "c.ndjson", "\n".join(json.dumps({"text": text}) for text in TEXTS)),
        ".tsv": folder / "d.tsv",
        ".jsonl": write(folder / "c.jsonl", "\n".join(json.dumps({"text": text}) for text in TEXTS) + "\n\n"),
        ".csv": folder / "d.csv",
        ".parquet": write_parquet(folder / "e.parquet", text=TEXTS, id=[0, 1, 2]),
    }


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".md", ".json", ".ndjson", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_gives_its_texts(tmp_path: Path, kind: str, compression: str) -> None:
    path = every_kind(tmp_path)[kind]
    if compression:
        path = compressed(path, compression)
    expected = TEXTS[:1] if kind in (".txt", ".md") else TEXTS
    assert [document.text for document in read(path)] == expected


def test_names_and_order_do_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        folder = tmp_path / place / "books"
        write(folder / "b.txt", "second")
        write(folder / "a" / "z.jsonl", '{"text": "first"}\n\n{"text": "still"}')
        write(folder / "image.PNG", b"\x89PNG")
        write(folder / ".git" / "c.txt", "no")
        write(folder / "._b.txt", b"\xff\xff")
        names = ["books/a/z.jsonl:1", "books/a/z.jsonl:3", "books/b.txt"]
        assert [document.name for document in read(folder)] == names
    assert find_sources([str(folder)]).skipped == {".png": 1, "hidden": 1}


def test_a_glob_names_from_its_fixed_part_and_a_file_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "y2020" / "b.txt", "b")
    write(tmp_path / "y2019" / "a.txt", "a")
    write(tmp_path / "y2019" / "c.pdf", "c")
    documents = read(tmp_path / "y2020" / "b.txt", tmp_path / "y*" / "*")
    assert [document.name for document in documents] == ["b.txt", "y2019/a.txt"]
    assert [document.name for document in read(tmp_path / "**" / "*.txt")] == ["y2019/a.txt", "y2020/b.txt"]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\nbroken\n')
    documents = read_documents(CorpusRecipe(paths=(str(path),)))
    assert next(documents).text == "fine"


def test_without_paths_the_docstrings_are_read() -> None:
    assert next(read_documents(CorpusRecipe())).name == "__future__"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str) -> None:
    content = {"a.txt": "hi", "a.jsonl": '{"text": "hi"}', "a.csv": "text\nhi\n"}[name]
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
    assert [document.text for document in read(path)] == ["hi"]


def test_a_csv_field_may_be_longer_than_the_usual_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(read(path)[0].text) == 200_000


def test_empty_files_in_a_folder_are_documents_to_drop(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "")
    write(tmp_path / "in" / "b.txt", "text")
    assert [document.text for document in read(tmp_path / "in")] == ["", "text"]


def test_paths_that_lead_to_nothing(tmp_path: Path) -> None:
    assert "no such file or folder" in fails(tmp_path / "none.txt")
    assert "the glob matches nothing" in fails(tmp_path / "*.txt")
    assert "empty entry" in fails("")
    (tmp_path / "bare").mkdir()
    assert "nothing at all" in fails(tmp_path / "bare")
    image = write(tmp_path / "images" / "a.png", "x")
    assert "no readable file in this folder (it has 1 x .png)" in fails(tmp_path / "images")
    assert "no readable file in this glob" in fails(tmp_path / "images" / "*")
    assert "this kind of file is not read; give one of .txt, .md, .jsonl" in fails(image)


def test_files_without_text(tmp_path: Path) -> None:
    empty, blank = write(tmp_path / "x" / "empty.txt", ""), write(tmp_path / "x" / "blank.txt", " \n\t")
    assert f"{empty}: the file is empty" in fails(empty)
    assert f"{blank}: no text in it" in fails(blank)
    assert "no records" in fails(write(tmp_path / "a.jsonl", "\n\n"))
    assert "no records" in fails(write_parquet(tmp_path / "a.parquet", text=[]))
    assert "2 files (x/blank.txt, x/empty.txt) and no text in any" in fails(tmp_path / "x")


def test_binary_and_foreign_encodings_name_the_byte(tmp_path: Path) -> None:
    assert "not UTF-8 text (byte 3 is 0xe9)" in fails(write(tmp_path / "latin.txt", "caf\u00e9".encode("latin-1")))
    assert "a binary file (byte 4 is zero)" in fails(write(tmp_path / "zero.txt", b"abcd\0\xff"))
    assert "name its encoding in corpus.encoding" in fails(write(tmp_path / "gbk.txt", "话说天下".encode("gbk")))
    assert "UTF-16" in fails(write(tmp_path / "utf16.md", "text".encode("utf-16-le")))
    lines = b'{"text": "fine"}\n{"text": "\xff"}\n'
    assert "byte 27 is 0xff" in fails(write(tmp_path / "a.jsonl", lines))
    assert "byte 27 is 0xff" in fails(write(tmp_path / "a.jsonl.gz", gzip.compress(lines)))


def test_broken_json_lines(tmp_path: Path) -> None:
    def line_two(text: str) -> str:
        message = fails(write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + text))
        assert "a.jsonl, line 2: " in message
        return message

    assert "not valid JSON (Expecting value, column 10)" in line_two('{"text": ')
    assert "a JSON list; put one JSON object" in line_two("[1]")
    assert "no field 'text' to read (corpus.text_field); did you mean 'texts'?" in line_two('{"texts": "x"}')
    assert "half a surrogate pair at character 1" in line_two(r'{"text": "a\ud800"}')
    assert "nested too deeply" in line_two('{"text": ' + "[" * 200_000)


def test_broken_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert "line 1: no field 'text' to read (corpus.text_field); known: id, body" in fails(
        write(path, "id,body\n1,x\n")
    )
    assert "line 4: 3 columns where the header has 2" in fails(write(path, 'id,text\n1,"x\ny"\n2,a, b\n'))
    assert "line 3: not valid CSV" in fails(write(path, 'id,text\n1,x\n2,"open\nand open'))


def test_broken_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["fine", None], label=[1, 2])
    assert "row 2: field 'text' is a null, not a string" in fails(path, bad_records="error")
    assert "row 1: field 'label' is a number" in fails(path, field="label", bad_records="error")
    assert "no text in it, only 2 x number instead of text; leave it out or name another" in fails(path, field="label")
    assert "no field 'test' to read (corpus.text_field); did you mean 'text'?" in fails(path, field="test")
    cut = write(tmp_path / "cut.parquet", path.read_bytes()[:-20])
    assert "broken Parquet after row 0" in fails(cut)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_broken_compression(tmp_path: Path, ending: str) -> None:
    text = write(tmp_path / "a.txt", os.urandom(3000).hex())
    whole = compressed(text, ending)
    name = {".gz": "gzip", ".zst": "zstd"}[ending]
    cut = write(tmp_path / f"cut.txt{ending}", whole.read_bytes()[:-200])
    assert f"cut.txt{ending}: broken {name}" in fails(cut)
    assert f"broken {name}" in fails(write(tmp_path / f"other.txt{ending}", "not compressed at all"))
    spoiled = bytearray(whole.read_bytes())
    spoiled[:2] = b"\0\0"
    assert f"broken {name}" in fails(write(tmp_path / f"spoiled.jsonl{ending}", bytes(spoiled)))


# Kinds and encodings that other programs write.


def test_json_of_each_shape(tmp_path: Path) -> None:
    records = [{"text": text} for text in TEXTS]
    for content in (
        json.dumps(records), json.dumps(records, indent=1), "\ufeff" + json.dumps(records, ensure_ascii=False),
        "\n".join(map(json.dumps, records)), json.dumps(records[0], indent=2) + "".join(map(json.dumps, records[1:])),
    ):  # fmt: skip
        assert texts(write(tmp_path / "a.json", content)) == TEXTS
    assert read(write(tmp_path / "a.json", json.dumps(records)))[1].name == "a.json:2"
    assert "no text in it" in fails(write(tmp_path / "a.json", "[]"))


def test_long_json_is_read_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": 'x\u00e9\\"' * size, "n": [1.5e-3, -120, True, None]} for size in (1, 3, 500, 7, 90)]
    path = write(tmp_path / "a.json", json.dumps(records, indent=1))
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(text_decoding, "_CHUNK", size)
        assert texts(path) == [record["text"] for record in records]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"text": "a"},\n{"text": }]', "line 2: not valid JSON (Expecting value)"),
        ('[{"text": "a"}\n{"text": "b"}]', "a comma or the end of the list is missing"),
        ('[{"text": "a"}]\n]', "line 2: not valid JSON (text after the end of the list)"),
        ('[{"text": "a"},', "line 1: not valid JSON"),
        ('[{"text": "a', "Unterminated string"),
        ('[{"text": "a"}, [1]]', "record 2: a JSON list; put a list of JSON objects there"),
        ('[{"text": "a"}, {"body": "b"}]', "record 2: no field 'text' to read"),
        ("[" * 200_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_broken_json(tmp_path: Path, content: str, words: str) -> None:
    assert words in fails(write(tmp_path / "a.json", content))


def test_json_settings_in_a_folder_of_texts_are_left_out(tmp_path: Path) -> None:
    write(tmp_path / "in" / "package.json", '{"name": "x"}')
    write(tmp_path / "in" / "a.md", "text")
    assert texts(tmp_path / "in") == ["text"]
    assert find_sources([str(tmp_path / "in")]).skipped == {".json": 1}
    write(tmp_path / "only" / "a.json", '[{"text": "x"}]')
    assert texts(tmp_path / "only") == ["x"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_tables_by_the_delimiter_of_their_header(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [("id", "text", "x"), *((n, text, "") for n, text in enumerate(TEXTS))]
        )
    assert texts(path) == TEXTS


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "big5", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, chunk: int) -> None:
    monkeypatch.setattr(text_decoding, "_CHUNK", chunk)
    lines = ["話說天下大勢，分久必合", "第二行"] if encoding == "big5" else ["话说天下大势，分久必合", "第二行 two"]
    path = write(tmp_path / "a.txt", "\n".join(lines).encode(encoding))
    # A mark says what it is; without one the recipe does.
    own = {} if encoding in ("utf-16", "utf-32", "utf-8-sig") else {"encoding": encoding}
    assert texts(path, **own) == ["\n".join(lines)]
    assert texts(path, document="line", **own) == lines
    if encoding.startswith("utf"):
        assert texts(path, encoding=own.get("encoding", "gbk")) == ["\n".join(lines)]
    rows = write(tmp_path / "a.csv", f"id,text\n1,{lines[0]}\n".encode(encoding))
    assert texts(rows, **own) == lines[:1]


def test_what_an_encoding_cannot_hold_names_the_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "话说".encode("gbk") + b"ab\xff\xff")
    assert "not GBK text (byte 6 is 0xff)" in fails(path, encoding="gbk")
    assert "not CP1252 text (byte 0 is 0x81)" in fails(write(tmp_path / "b.txt", b"\x81abc"), encoding="cp1252")
    assert texts(write(tmp_path / "c.txt", "Grüße “x”".encode("cp1252")), encoding="cp1252") == ["Grüße “x”"]


def test_a_document_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\n\n  \n two\nthree")
    assert [(found.name, found.text) for found in read(path, document="line")] == [
        ("a.txt:1", "one"), ("a.txt:4", " two"), ("a.txt:5", "three"),
    ]  # fmt: skip


def test_single_records_without_text_are_counted(tmp_path: Path) -> None:
    lines = '{"text": "fine"}\n{"text": null}\nnull\n{"text": 3}\n{"text": NaN}\n7\n{"text": "too"}\n'
    path, skipped = write(tmp_path / "a.jsonl", lines), Counter[str]()
    recipe = CorpusRecipe(paths=(str(path),))
    assert [document.text for document in read_documents(recipe, skipped=skipped)] == ["fine", "too"]
    assert skipped == {"null instead of text": 2, "number instead of text": 3}
    assert "line 2: field 'text' is a null, not a string" in fails(path, bad_records="error")
    assert "line 1: a JSON null" in fails(write(tmp_path / "b.jsonl", "null"), bad_records="error")
    assert "field 'text' is a list" in fails(write(tmp_path / "c.jsonl", '{"text": ["a"]}'))


def test_a_field_within_a_field_and_columns_of_bytes(tmp_path: Path) -> None:
    nested = [{"translation": {"en": "one", "zh": {"cn": "一"}}, "a.b": "dot"}]
    for path in (
        write_parquet(tmp_path / "a.parquet", **{key: [nested[0][key]] for key in nested[0]}),
        write(tmp_path / "a.jsonl", json.dumps(nested[0])),
        write(tmp_path / "a.json", json.dumps(nested)),
    ):
        assert texts(path, field="translation.en") == ["one"]
        assert texts(path, field="translation.zh.cn") == ["一"]
        assert texts(path, field="a.b") == ["dot"]
    message = fails(tmp_path / "a.parquet", field="translation.eng")
    assert "no field 'eng' to read (corpus.text_field); did you mean 'en'?" in message
    assert "no field 'a' to read" in fails(tmp_path / "a.parquet", field="a.b.x")
    raw = write_parquet(tmp_path / "b.parquet", text=["话".encode("gbk"), b"ab"])
    assert texts(raw, encoding="gbk") == ["话", "ab"]
    assert "row 1: not utf-8 text" in fails(raw)
