"""ledger.jsonl counts exactly once, survives crashes, and reads as it was written."""

from pathlib import Path

import pytest

from slime.observe.account import Account, AccountLog, Settled, account, compact, expand, read

LINES = [Settled(1, [0, 1, 3], {2: "filter"}), Settled(2, [4, 5, 6]), Settled(3, [9], {7: "too_long", 8: "filter"})]


def written(path: Path, lines: list[Settled] = LINES) -> AccountLog:
    log = AccountLog(path)
    for line in lines:
        log.append(line)
    return log


def test_lines_come_back_and_can_be_read_by_people(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    written(path)
    assert read(path) == LINES
    assert path.read_text().splitlines()[0] == '{"step": 1, "trained": "0-1,3", "dropped": {"filter": "2"}}'


@pytest.mark.parametrize("ordinals", [[], [0], [5, 6], [0, 2, 3, 4, 9, 11, 12]])
def test_ranges_are_what_they_stand_for(ordinals: list[int]):
    assert expand(compact(reversed(ordinals))) == ordinals


def test_every_prompt_is_counted():
    assert account(LINES) == Account(7, {"filter": 2, "too_long": 1})
    assert account(LINES).settled == 10 and account([]) == Account(0, {})


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([Settled(1, [0, 2])], "missing are the prompts 1$"),
        ([Settled(1, [1])], "missing are the prompts 0$"),
        ([Settled(1, [0, 9])], "missing are the prompts 1-8$"),
        ([Settled(1, [0, 1]), Settled(2, [1, 2])], "prompt 1 was settled twice, by updates 1 and 2$"),
        ([Settled(1, [0, 0])], "prompt 0 was settled twice, by updates 1 and 1$"),
        ([Settled(1, [0], {0: "filter"})], "prompt 0 was settled twice"),
        ([Settled(1, list(range(0, 40, 2)))], r"missing are the prompts 1, 3, 5, 7, 9, 11, 13, 15, \.\.\.$"),
    ],
)
def test_prompts_that_are_missing_or_twice_are_named(lines: list[Settled], says: str):
    with pytest.raises(ValueError, match=says):
        account(lines)


def test_a_resumed_run_writes_over_what_came_after(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    written(path).truncate(1)
    log = AccountLog(path)
    log.append(again := Settled(2, [4, 5]))
    assert read(path) == [LINES[0], again]
    with pytest.raises(ValueError, match="ends at update 2, before step 3 that the run resumes from"):
        log.truncate(3)
    log.truncate(0)
    assert read(path) == []


def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "ledger.jsonl"
    written(path)
    path.write_bytes(path.read_bytes()[:-4])
    assert read(path) == LINES[:2] and "cut off by a crash" in caplog.text
    AccountLog(path).append(LINES[2])
    assert read(path) == LINES


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"step": 1, "trained": "x", "dropped": {}}', '{"step": 1, "trained": ""}', '{"step": 2, "trained": "", "dropped": {}}'],
)
def test_other_damage_is_named(tmp_path: Path, line: str):
    (tmp_path / "l").write_text(line + "\n")
    with pytest.raises(ValueError, match="line 1 is "):
        AccountLog(tmp_path / "l")


def test_an_update_out_of_turn_is_refused(tmp_path: Path):
    log = written(tmp_path / "l", LINES[:1])
    for step in (1, 3):
        with pytest.raises(ValueError, match=f"update 2 is next, update {step} cannot"):
            log.append(Settled(step, []))
