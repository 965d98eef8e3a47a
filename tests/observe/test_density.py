import json
import logging
from pathlib import Path

import numpy as np
import pytest

from slime.observe.density import DensityLog, Tensor, read, read_merged
from slime.observe.density_cells import GROUPS, Cell, cell_of

TENSORS: list[Tensor] = [("a", 10), ("b.0", 4), ("b.1", 6)]


def three(path: Path) -> DensityLog:
    log = DensityLog(path)
    for step in (1, 2, 4):
        log.append(step, [step, 0, 2 * step // 2], TENSORS)
    return log


def test_the_file_is_a_head_and_a_short_line_a_version(tmp_path: Path) -> None:
    path = tmp_path / "run" / "density.jsonl"
    log = three(path)
    assert path.read_text().splitlines() == [
        '{"tensors":[["a",10],["b.0",4],["b.1",6]]}',
        '{"step":1,"changed":[1,0,1]}',
        '{"step":2,"changed":[2,0,2]}',
        '{"step":4,"changed":[4,0,4]}',
    ]
    assert log.last_step == 4
    found = read(path)
    assert found.tensors == TENSORS and found.steps == [1, 2, 4]
    assert found.changed.tolist() == [[1, 0, 1], [2, 0, 2], [4, 0, 4]] and found.sizes.tolist() == [10, 4, 6]


def test_counts_may_come_from_numpy_and_a_log_goes_on(tmp_path: Path) -> None:
    three(tmp_path / "d")
    DensityLog(tmp_path / "d").append(7, np.array([10, 4, 6], np.uint64), [(n, np.int64(s)) for n, s in TENSORS])  # type: ignore[arg-type]
    assert json.loads((tmp_path / "d").read_text().splitlines()[-1]) == {"step": 7, "changed": [10, 4, 6]}
    assert (tmp_path / "d").read_text().count("tensors") == 1


@pytest.mark.parametrize(
    ("step", "changed", "tensors", "said"),
    [
        (5, [0, 0], TENSORS[:2], "of other tensors than the file's: 2 instead of 3"),
        (5, [0, 0, 0], [*TENSORS[:2], ("b.1", 7)], "b.1 of 7 elements instead of b.1 of 6"),
        (5, [0, 0, 0], [*TENSORS[:2], ("c", 6)], "c of 6 elements instead of b.1 of 6"),
        (5, [0, 0], TENSORS, "2 counts for 3 tensors"),
        (5, [0, 5, 0], TENSORS, "5 elements of b.0 changed, which has 4"),
        (5, [0, -1, 0], TENSORS, "-1 elements of b.0"),
        (4, [0, 0, 0], TENSORS, "step 4 is recorded, 4 cannot follow"),
        (3, [0, 0, 0], TENSORS, "step 4 is recorded, 3 cannot follow"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, step: int, changed: list[int], tensors: list[Tensor], said: str) -> None:
    three(tmp_path / "d")
    before = (tmp_path / "d").read_bytes()
    for log in (three(tmp_path / "e"), DensityLog(tmp_path / "d")):
        with pytest.raises(ValueError, match=said):
            log.append(step, changed, tensors)
    assert (tmp_path / "d").read_bytes() == (tmp_path / "e").read_bytes() == before


@pytest.mark.parametrize(("step", "kept"), [(9, [1, 2, 4]), (4, [1, 2, 4]), (3, [1, 2]), (1, [1]), (0, [])])
@pytest.mark.parametrize("anew", [False, True])
def test_a_resumed_run_forgets_later_versions(tmp_path: Path, step: int, kept: list[int], anew: bool) -> None:
    log = three(tmp_path / "d")
    log = DensityLog(tmp_path / "d") if anew else log
    log.truncate(step)
    assert read(tmp_path / "d").steps == kept and log.last_step == max(kept, default=-1)
    log.append(10, [0, 0, 1], TENSORS)
    log.append(11, [0, 0, 2], TENSORS)
    assert read(tmp_path / "d").steps == [*kept, 10, 11] and read(tmp_path / "d").changed[-1].tolist() == [0, 0, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_run_that_resumes_before_its_first_version_may_be_of_another_model(tmp_path: Path) -> None:
    log = three(tmp_path / "d")
    log.truncate(0)
    log.append(1, [1], [("other", 1)])
    assert read(tmp_path / "d").tensors == [("other", 1)]


def test_a_log_that_is_not_there_has_nothing_to_forget(tmp_path: Path) -> None:
    DensityLog(tmp_path / "d").truncate(3)
    assert not (tmp_path / "d").exists()


def test_a_crash_at_any_byte_leaves_whole_versions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    three(tmp_path / "d")
    whole = (tmp_path / "d").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in {*range(0, len(whole), 7), *(end + off for end in ends for off in (-1, 0, 1) if end + off <= len(whole))}:
        path = tmp_path / "torn"
        path.write_bytes(whole[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            found = read(path)
        count = sum(end <= size for end in ends)
        assert found.steps == [1, 2, 4][: max(0, count - 1)]
        assert ("cut off" in caplog.text) == (size not in (0, *ends))
        assert path.stat().st_size == size  # a reader changes nothing
        DensityLog(path).append(9, [0, 4, 0], TENSORS)
        assert read(path).steps == [*found.steps, 9] and read(path).tensors == TENSORS


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not the record"),
        ('{"step":9}', "line 2 is not the record"),
        ('{"step":9,"changed":[1,2]}', "line 2 does not have a count for each of 3"),
        ('{"step":9,"changed":[1,2,"x"]}', "line 2 is not the record"),
        ('{"step":1,"changed":[1,2,3]}', "line 2 is of step 1, after step 1"),
    ],
)
def test_damage_is_named(tmp_path: Path, line: str, said: str) -> None:
    lines = ['{"tensors":[["a",10],["b.0",4],["b.1",6]]}', '{"step":1,"changed":[1,0,1]}', line, '{"step":10,"changed":[1,0,1]}']
    (tmp_path / "d").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "d")


def test_a_damaged_head_and_steps_out_of_order_are_not_carried_on(tmp_path: Path) -> None:
    for text, said in (('{"tensors":[["a"]]}\n', "first line"), ('{"tensors":[["a",1]]}\n{"step":1}\n', "line 1 is not the record")):
        (tmp_path / "d").write_text(text)
        with pytest.raises(ValueError, match=said):
            DensityLog(tmp_path / "d")


def test_tensors_are_added_up_while_reading(tmp_path: Path) -> None:
    log = DensityLog(tmp_path / "d")
    log.append(1, [1, 2, 3], TENSORS)
    log.append(2, [0, 0, 4], TENSORS)
    found = read_merged(tmp_path / "d", lambda name: name[0])
    assert found.tensors == [("a", 10), ("b", 10)] and found.changed.tolist() == [[1, 5], [0, 4]]


def in_layer(group: str, kind: str) -> Cell:
    return Cell(7, "layer 7", group, kind)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("model.embed_tokens.weight", Cell(-1, "embedding")),
        ("model.norm.weight", Cell(-1, "final norm")),
        ("lm_head.weight", Cell(-1, "lm_head")),
        ("visual.blocks.3.mlp.fc1.weight", Cell(-1, "visual")),
        ("model.layers.7.self_attn.q_proj.weight", in_layer("attention", "q")),
        ("model.layers.7.self_attn.q_proj.bias", in_layer("attention", "bias")),
        ("model.layers.7.self_attn.kv_a_proj_with_mqa.weight", in_layer("attention", "kv a")),
        ("model.layers.7.self_attn.q_norm.weight", in_layer("norms", "q")),
        ("model.layers.7.self_attn.kv_a_layernorm.weight", in_layer("norms", "kv a")),
        ("model.layers.7.input_layernorm.weight", in_layer("norms", "input")),
        ("model.layers.7.post_attention_layernorm.weight", in_layer("norms", "post attn")),
        ("model.layers.7.input_layernorm.bias", in_layer("norms", "bias")),
        ("model.layers.7.mlp.gate_up_proj.weight", in_layer("mlp", "gate up")),
        ("model.layers.7.mlp.gate_proj.weight", in_layer("mlp", "gate")),
        ("model.layers.7.mlp.gate.weight", in_layer("router", "router")),
        ("model.layers.7.mlp.gate.e_score_correction_bias", in_layer("router", "router bias")),
        ("model.layers.7.mlp.experts.31.up_proj.weight", in_layer("experts", "up")),
        ("model.layers.7.mlp.shared_experts.up_proj.weight", in_layer("shared experts", "up")),
        ("model.layers.7.block_sparse_moe.gate.weight", in_layer("router", "router")),
        ("model.layers.7.block_sparse_moe.experts.1.w2.weight", in_layer("experts", "w2")),
        ("model.layers.7.eh_proj.weight", in_layer("other", "eh")),
    ],
)
def test_a_tensor_has_a_cell_by_its_name(name: str, cell: Cell) -> None:
    assert cell_of(name) == cell
    assert cell.group in ("", *GROUPS)


def test_rows_and_columns_go_through_the_model() -> None:
    names = [
        "lm_head.weight",
        "model.norm.weight",
        "visual.x",
        "model.layers.10.mlp.x",
        "model.layers.9.mlp.x",
        "model.embed_tokens.weight",
    ]
    rows = [cell.row for cell in sorted(map(cell_of, names), key=lambda c: c.row_order)]
    assert rows == ["embedding", "layer 9", "layer 10", "final norm", "lm_head", "visual"]
    kinds = ["mlp.down_proj", "self_attn.bias", "mlp.gate_proj", "self_attn.o_proj", "self_attn.k_proj", "self_attn.q_proj"]
    columns = sorted((cell_of(f"model.layers.0.{kind}.weight") for kind in kinds), key=lambda c: c.column_order)
    assert [c.kind for c in columns] == ["q", "k", "o", "bias", "gate", "down"]
