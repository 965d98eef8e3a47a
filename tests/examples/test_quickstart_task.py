import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from examples.quickstart.make_task import CARELESS, ROWS, make_task


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    out = tmp_path_factory.mktemp("task")
    make_task(out, seed=3)
    return out


def rows(task, name):
    return [json.loads(line) for line in (task / f"{name}.jsonl").read_text().splitlines()]


def digits_of(row):
    return row["prompt"].removeprefix("sort ").removesuffix("=")


def test_no_prompt_is_in_two_files(task):
    prompts = [row["prompt"] for name in ROWS for row in rows(task, name)]
    assert {name: len(rows(task, name)) for name in ROWS} == ROWS
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_labels_to_be_rewarded_are_right(task, name):
    assert all(row["label"] == "".join(sorted(digits_of(row))) for row in rows(task, name))


@pytest.mark.parametrize("task_name", ["", "turn_"])
def test_careful_demonstrations_are_the_others_without_mistakes(task, task_name):
    careless, careful = rows(task, f"{task_name}demos"), rows(task, f"{task_name}careful")
    assert [row["prompt"] for row in careless] == [row["prompt"] for row in careful]
    assert all(sorted(row["label"], reverse=bool(task_name)) == list(row["label"]) and len(row["label"]) == 6 for row in careful)
    differing = [(a["label"], b["label"]) for a, b in zip(careless, careful, strict=True) if a["label"] != b["label"]]
    assert len(differing) > 1000 and all(b.replace("0", "") == a for a, b in differing)


def test_demonstrations_drop_leading_zeros_and_make_no_other_mistake(task):
    demos = rows(task, "demos")
    assert all(row["label"] in ((right := "".join(sorted(digits_of(row)))), right.lstrip("0")) for row in demos)
    with_zero = [row for row in demos if "0" in row["prompt"]]
    careless = sum(row["label"][0] != "0" for row in with_zero) / len(with_zero)
    assert abs(careless - CARELESS) < 0.03
    assert abs(len(with_zero) / len(demos) - 0.6) < 0.03


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(task, tmp_path):
    make_task(tmp_path / "again", seed=3)
    make_task(tmp_path / "other", seed=4)
    files = sorted(p.relative_to(task) for p in task.rglob("*") if p.is_file())
    assert all((task / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    changed = {f.name for f in files if (task / f).read_bytes() != (tmp_path / "other" / f).read_bytes()}
    names = ("train", "demos", "heldout", "careful")
    assert changed == {*(f"{task}{name}.jsonl" for task in ("", "turn_") for name in names), "model.safetensors"}


def test_the_tokenizer_is_one_token_a_character(task):
    tokenizer = AutoTokenizer.from_pretrained(task / "model")
    text = "sort 402715="
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.decode([*tokenizer("0147")["input_ids"], tokenizer.eos_token_id], skip_special_tokens=True) == "0147"


def test_every_prompt_and_answer_fits_and_config_agrees_with_the_tokenizer(task):
    tokenizer, config = AutoTokenizer.from_pretrained(task / "model"), AutoConfig.from_pretrained(task / "model")
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for name in ROWS:
        for row in rows(task, name):
            ids = tokenizer(row["prompt"] + row["label"])["input_ids"]
            assert len(ids) <= 19 and tokenizer.unk_token_id not in ids
