import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slime.config import DataConfig, DataFile, EvalSet
from slime.data.files import open_rows
from slime.data.source import BLOCK, PromptSource, eval_prompts, permutation


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(path: Path, n: int) -> Path:
    return write_jsonl(path, [{"prompt": f"{path.stem} {i}", "label": str(i)} for i in range(n)])


def source(*files: DataFile, seed: int = 0, **keys) -> PromptSource:
    return PromptSource(DataConfig(train=list(files), **keys), seed)


def test_an_epoch_has_every_row_once_and_the_next_another_order(tmp_path: Path):
    prompts = source(DataFile(str(numbered(tmp_path / "a.jsonl", 50))))
    epochs = [[prompts.prompt(e * 50 + i).label for i in range(50)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [str(i) for i in range(50)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_prompt_depends_on_its_ordinal_alone(tmp_path: Path):
    files = [DataFile(str(numbered(tmp_path / "a.jsonl", 30)), 3.0), DataFile(str(numbered(tmp_path / "b.jsonl", 7)), 1.0)]
    forward = [source(*files).prompt(i) for i in range(200)]
    prompts = source(*files)
    assert [prompts.prompt(i) for i in reversed(range(200))][::-1] == forward
    assert [source(*files, seed=1).prompt(i).prompt for i in range(200)] != [p.prompt for p in forward]


def test_files_are_mixed_by_weight_and_each_is_drawn_evenly(tmp_path: Path):
    prompts = source(
        DataFile(str(numbered(tmp_path / "a.jsonl", 64)), 3.0), DataFile(str(numbered(tmp_path / "b.jsonl", 10)), 1.0, source="small")
    )
    drawn = [prompts.prompt(i) for i in range(4 * BLOCK)]
    assert Counter(p.source for p in drawn) == {"a": 3 * BLOCK, "small": BLOCK}
    of_b = Counter(p.label for p in drawn if p.source == "small")
    assert max(of_b.values()) - min(of_b.values()) <= 1


def test_without_shuffle_rows_come_in_the_file_s_order(tmp_path: Path):
    prompts = source(DataFile(str(numbered(tmp_path / "a.jsonl", 5))), shuffle=False)
    assert [prompts.prompt(i).label for i in range(7)] == ["0", "1", "2", "3", "4", "0", "1"]


def test_verl_s_parquet_by_nested_keys(tmp_path: Path):
    rows = [
        {
            "data_source": f"gsm{i % 2}",
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
        }
        for i in range(25)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "v.parquet", row_group_size=10)
    keys = {"label_key": "reward_model.ground_truth", "metadata_key": "extra_info", "source_key": "data_source"}
    prompts = source(DataFile(str(tmp_path / "v.parquet")), shuffle=False, **keys)
    got = prompts.prompt(23)
    assert (got.prompt, got.label, got.source, got.metadata) == ([{"role": "user", "content": "q23"}], "23", "gsm1", {"index": 23})


def test_slime_s_jsonl_with_metadata_and_tools(tmp_path: Path):
    row = {"prompt": "p", "label": "l", "metadata": {"k": 1}, "tools": [{"type": "function"}], "source": "s"}
    got = source(DataFile(str(write_jsonl(tmp_path / "s.jsonl", [row])))).prompt(0)
    assert (got.label, got.metadata, got.tools, got.source) == ("l", {"k": 1}, [{"type": "function"}], "s")


def test_blank_lines_are_no_rows_and_the_last_line_needs_no_end(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n  \n{"prompt": "ü"}\n{"prompt": "z"}')
    rows = open_rows(str(tmp_path / "a.jsonl"), "k")
    assert [rows.row(i)["prompt"] for i in range(len(rows))] == ["x", "ü", "z"]


def test_evaluation_takes_the_first_rows_in_order(tmp_path: Path):
    path = numbered(tmp_path / "e.jsonl", 9)
    assert [p.label for p in eval_prompts("e", EvalSet(str(path), limit=3), DataConfig())] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"data\.train\.0\.path=.*no such file"),
        ("", "the file has no rows"),
        ('{"prompt": "x"\n', "line 1: not JSON"),
        ("[1]\n", "a row is an object with columns, not list"),
        ('{"question": "x", "label": "y"}\n', "no column prompt; it has question, label: set data.prompt_key"),
        ('{"prompt": 3}\n', "neither a string nor a list of chat messages"),
    ],
)
def test_bad_files_say_what_and_where(tmp_path: Path, text: str | None, says: str):
    path = tmp_path / "bad.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says):
        source(DataFile(str(path)))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"label_key": "answer"}, r"no column answer; it has prompt, extra: set data\.label_key"),
        ({"label_key": "extra.truth"}, r"no column extra\.truth; extra has index: set data\.label_key"),
        ({"tools_key": "extra"}, r"extra is not a list of tool schemas; set data\.tools_key"),
    ],
)
def test_a_column_that_is_asked_for_and_missing_is_named(tmp_path: Path, keys: dict, says: str):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "extra": {"index": 1}}])
    with pytest.raises(ValueError, match=says):
        source(DataFile(str(path)), **keys)


def test_the_line_of_a_broken_row_counts_blank_lines(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n\n{"prompt"')
    with pytest.raises(ValueError, match="line 4: not JSON"):
        open_rows(str(tmp_path / "a.jsonl"), "k").row(1)


def test_fields_that_a_parquet_row_does_not_have_are_not_there(tmp_path: Path):
    rows = [
        {"prompt": [{"role": "user", "content": "q", "tool_calls": None}]},
        {"prompt": [{"role": "user", "content": "q", "tool_calls": [{"id": 1}]}]},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert source(DataFile(str(tmp_path / "a.parquet")), shuffle=False).prompt(0).prompt == [{"role": "user", "content": "q"}]


def test_shuffled_rows_of_many_row_groups_are_read_in_any_order(tmp_path: Path):
    pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(10_000)]}), tmp_path / "a.parquet", row_group_size=700)
    prompts = source(DataFile(str(tmp_path / "a.parquet")))
    assert {prompts.prompt(i).prompt for i in range(10_000)} == {f"p{i}" for i in range(10_000)}


def test_the_order_of_an_epoch_is_fixed_for_good():
    assert permutation(8, 0, 2, 0, 0).tolist() == [0, 4, 6, 3, 5, 7, 1, 2]
    assert sorted(permutation(1000, 7).tolist()) == list(range(1000))


def test_other_bad_files(tmp_path: Path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"slime reads \.jsonl and \.parquet"):
        source(DataFile(str(tmp_path / "a.csv")))
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="not a parquet file"):
        source(DataFile(str(tmp_path / "a.parquet")))
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        source()


def test_a_broken_row_further_down_is_named_when_it_is_drawn(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    prompts = source(DataFile(str(tmp_path / "a.jsonl")), shuffle=False)
    with pytest.raises(ValueError, match="line 2: not JSON"):
        prompts.prompt(1)
