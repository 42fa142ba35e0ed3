"""Rows of every kind of source, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kasa_runtime.errors import ConfigError, DataError
from kasa_runtime.training import rows as module
from kasa_runtime.training.rows import Row, read_rows, sample, shuffled

from .making import WriteRows

FIELDS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]


def written(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def contents(path: Path | str, *columns: str) -> list[dict[str, object]]:
    return [dict(row.fields) for row in read_rows(path, columns)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"q": "one", "a": "1"}\n\n{"q": "two", "a": "2"}'),
        ("bom.jsonl", '\ufeff{"q": "one", "a": "1"}\r\n{"q": "two", "a": "2"}\r\n'),
        ("lines.json", '{"q": "one", "a": "1"}\n{"q": "two", "a": "2"}\n'),
        ("array.json", '[{"q": "one", "a": "1"},\n {"q": "two", "a": "2"}]'),
        ("a.csv", "q,a\none,1\ntwo,2\n"),
        ("excel.csv", '\ufeffq,a\r\n"one",1\r\ntwo,"2"\r\n'),
        ("a.TSV", "q\ta\none\t1\ntwo\t2"),
    ],
)
def test_every_form_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert contents(written(tmp_path, name, content)) == FIELDS


def test_parquet_rows_are_numbered_and_keep_their_lists(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"q": ["one", None], "refs": [["1", "I"], []]}), path)
    rows = read_rows(path)
    assert [dict(row.fields) for row in rows] == [
        {"q": "one", "refs": ["1", "I"]},
        {"q": None, "refs": []},
    ]
    assert [row.line for row in rows] == [1, 2]


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"a.parquet: not a readable Parquet file"):
        read_rows(written(tmp_path, "a.parquet", "no parquet"))


def test_glue_tsv_has_no_header_and_its_quotation_marks_are_text(tmp_path: Path) -> None:
    path = written(tmp_path, "cola.tsv", 'gj04\t1\t\tHe said "no.\nbc01\t0\t*\t"a"\n')
    assert contents(path, "source", "label", "mark", "sentence") == [
        {"source": "gj04", "label": "1", "mark": "", "sentence": 'He said "no.'},
        {"source": "bc01", "label": "0", "mark": "*", "sentence": '"a"'},
    ]


def test_a_row_over_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'q,a\r\n"one\r\n\r\nmore",1\r\n\r\ntwo,2\r\n')
    rows = read_rows(path)
    assert [(row.line, row.fields["q"]) for row in rows] == [(2, "one\r\n\r\nmore"), (6, "two")]


def test_fields_may_be_longer_than_the_limit_of_python(tmp_path: Path) -> None:
    assert contents(written(tmp_path, "a.csv", f"q\n{'x' * 200_000}\n"))[0]["q"] == "x" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"q": 1}\n{\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"q": 1}\n[1]\n', r"a.jsonl:2: want a JSON object, got list"),
        ("a.json", '[{"q": 1},\n {]', r"a.json:2: not valid JSON"),
        ("a.json", '[{"q": 1}, 3]', r"a.json:2: want a JSON object, got int"),
        ("a.jsonl", b'{"q": 1}\n\n{"q": "\xff"}\n', r"a.jsonl:3: not UTF-8 text"),
        ("a.csv", b"q\none\ntw\xe9\n", r"a.csv:3: not UTF-8 text"),
        ("a.csv", "q,a\n1,2\n1,2,3\n", r"a.csv:3: want 2 columns \(q, a\), found 3"),
        ("a.tsv", "q\ta\nx\n", r"a.tsv:2: want 2 columns \(q, a\), found 1"),
        ("a.csv", 'q,a\n1,2\n"open,3\n4,5\n', r"a.csv:3: not a readable table"),
        ("a.csv", "q,a,q\n1,2,3\n", r"a.csv:1: the header has two columns named 'q'"),
        ("a.jsonl", "\n \n", r"a.jsonl: want at least one row, found none"),
        ("a.csv", "q,a\n", r"a.csv: want at least one row, found none"),
        ("a.tsv", "", r"a.tsv: want at least one row, found none"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(written(tmp_path, name, content))


def test_missing_file_and_unknown_form_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: cannot be read .*No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match=r"a.xlsx: want a file that ends in .jsonl, .*datasets:"):
        read_rows(written(tmp_path, "a.xlsx", "x"))


def test_missing_column_is_named_with_one_near_it(write_rows: WriteRows) -> None:
    row = read_rows(write_rows("a.jsonl", [{"x": 1}, {"sentence": "a", "label": None}]))[1]
    with pytest.raises(
        DataError,
        match=r"a.jsonl:2: no field 'sentense', which '\{sentense\}.' needs; has sentence, label; "
        r"did you mean 'sentence'\?",
    ):
        row.render("{sentense}.")
    with pytest.raises(DataError, match=r"no field 'other'; has sentence, label$"):
        row.get("other")


def test_null_is_not_a_text(write_rows: WriteRows) -> None:
    row = read_rows(write_rows("a.jsonl", [{"q": None}]))[0]
    with pytest.raises(DataError, match=r"a.jsonl:1: field 'q' is null, which '\{q\}' needs"):
        row.render("{q}")
    with pytest.raises(DataError, match=r"a.jsonl:1: field 'q' is null$"):
        row.get("q")


@pytest.mark.parametrize("template", ["{q", "{}", "{q.x}", "{q[x]}", "{q:y}"])
def test_broken_template_is_a_data_error(write_rows: WriteRows, template: str) -> None:
    row = read_rows(write_rows("a.jsonl", [{"q": 1}]))[0]
    with pytest.raises(DataError, match=r"a.jsonl:1: "):
        row.render(template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that `datasets` can load, its cache in the test's own, no network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"q": f"row {i}"}) for i in range(5)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "test.jsonl").write_text(lines[0])
    return folder


@pytest.mark.filterwarnings("ignore")
def test_datasets_give_rows_of_a_split_and_of_a_part_of_it(hub: Path) -> None:
    source = f"datasets:{hub}:train"
    rows = read_rows(source)
    assert [(row.line, row.fields["q"]) for row in rows][-1] == (5, "row 4")
    assert str(rows[0].error("bad")) == f"{source}:1: bad"
    assert len(read_rows(f"datasets:{hub}:train[:2]")) == 2
    assert len(read_rows(f"datasets:{hub}:default:test")) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tail", [":tarin", ":other:train", "/none:train"])
def test_what_datasets_cannot_load_is_named(hub: Path, tail: str) -> None:
    source = f"datasets:{hub}{tail}"
    with pytest.raises(DataError, match=f"{source}: datasets cannot load this"):
        read_rows(source)


@pytest.mark.parametrize(
    "source", ["datasets:", "datasets:name", "datasets:a:b:c:d", "datasets::x"]
)
def test_malformed_names_of_datasets_are_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"want datasets:NAME\[:CONFIG\]:SPLIT"):
        read_rows(source)


def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(module, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pyarrow.* pip install 'kasa-runtime\[train\]'"):
        read_rows(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"datasets is not installed; pip install"):
        read_rows("datasets:a:train")


def test_order_depends_on_the_seed_alone() -> None:
    rows = [Row(Path("x"), line, {}) for line in range(50)]
    orders = [[row.line for row in shuffled(rows, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(50))
    assert [row.line for row in shuffled(rows, seed=1, limit=3)] == orders[0][:3]


def test_sample_depends_on_the_seed_and_keeps_the_order() -> None:
    rows = [Row(Path("x"), line, {}) for line in range(30)]
    first = [row.line for row in sample(rows, 5, seed=1)]
    assert first == sorted(first) == [row.line for row in sample(rows, 5, seed=1)]
    assert len(sample(rows, 0, seed=1)) == len(sample(rows, 99, seed=1)) == 30
