"""Composing a recipe: prefixes that users never type, dictionaries and lists, names of runs, groups, folders of recipes."""

import math

import pytest
import yaml

from slime.config import DataFile, EvalSet, RoleConfig, SlimeConfig, recipes
from slime.config.exits import ConfigError
from slime.config.load import compose
from slime.config.overrides import RECIPES, prepare, prepare_override

GOOD = ["model.path=model"]


def test_defaults_are_those_of_the_dataclasses() -> None:
    recipe = compose(overrides=GOOD)
    expected = SlimeConfig()
    expected.model.path, expected.run.name = "model", recipe.cfg.run.name
    assert recipe.cfg == expected
    assert yaml.safe_load(recipe.resolved)["rollout"]["prompts_per_step"] == 32


@pytest.mark.parametrize(
    ("text", "for_hydra"),
    [
        ("run.seed=1", "run.seed=1"),
        ("+run.seed=1", "run.seed=1"),
        ("++run.seed=1", "run.seed=1"),
        ("run.seed=1,2", "run.seed=1,2"),
        ("rollout.sglang.mem_fraction_static=0.5", "++rollout.sglang.mem_fraction_static=0.5"),
        ("trainer.megatron.recompute_granularity=full", "++trainer.megatron.recompute_granularity=full"),
        ("data.eval.h.path='a b'", "++data.eval={h: {path: 'a b'}}"),
        ("data.eval.h.samples=1,4", "++data.eval.h.samples=1,4"),
        ("cluster.roles.actor.devices=2", "++cluster.roles={actor: {devices: 2}}"),
        ("data.train.0.path=p.jsonl", "data.train.0.path=p.jsonl"),
        ("~data.eval.h", "~data.eval.h"),
        ("hydra.run.dir=x", "hydra.run.dir=x"),
        ("hydra/launcher=x", "hydra/launcher=x"),
    ],
)
def test_override_for_hydra(text: str, for_hydra: str) -> None:
    assert prepare_override(text, [RECIPES]) == for_hydra


def test_flags_stay_and_may_stand_between_overrides() -> None:
    argv = ["run.seed=1,2", "--config-name", "quickstart", "rollout.sglang.a=1", "--multirun", "run.steps=3"]
    assert prepare(argv) == ["--config-name", "quickstart", "--multirun", "run.seed=1,2", "++rollout.sglang.a=1", "run.steps=3"]


def test_dictionaries_lists_and_open_fields() -> None:
    cfg = compose(
        overrides=[
            *GOOD,
            "data.train=[{path: a.jsonl}, {path: b.parquet, weight: 3}]",
            "data.train.0.weight=2",
            "data.eval.aime-24.path=x.jsonl",
            "data.eval.other.path=y.jsonl",
            "data.eval.aime-24.samples=8",
            "~data.eval.other",
            "cluster.roles.rollout.devices=4",
            "rollout.sglang.a=[1,2]",
            "trainer.megatron.b=true",
            "algorithm.importance_reject.lowest=[1e-4,inf]",
            "algorithm.importance_reject={token: [0.5, 5]}",
        ]
    ).cfg
    assert cfg.data.train == [DataFile("a.jsonl", 2.0), DataFile("b.parquet", 3.0)]
    assert cfg.data.eval == {"aime-24": EvalSet("x.jsonl", samples=8)}
    assert cfg.cluster.roles == {"actor": RoleConfig(1), "rollout": RoleConfig(4)}
    assert (cfg.rollout.sglang, cfg.trainer.megatron) == ({"a": [1, 2]}, {"b": True})
    assert cfg.algorithm.importance_reject == {"lowest": [1e-4, math.inf], "token": [0.5, 5]}


def test_run_name_is_the_recipe_and_a_hash_of_what_is_run() -> None:
    def name(*overrides: str) -> str | None:
        return compose(overrides=[*GOOD, *overrides]).cfg.run.name

    assert name() != name("run.seed=1") != name("run.seed=2")
    assert name("run.seed=1", "run.steps=5") == name("run.steps=5", "run.seed=1")
    assert name("run.resume=must", "run.dir=/elsewhere", "run.dry_run=true") == name()
    assert name("run.name=mine") == "mine"
    assert compose("base", GOOD).overrides_hash == (name() or "").removeprefix("base-")


def test_recipe_without_overrides_has_no_hash(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\nmodel: {path: model}\n")
    recipe = compose("mine", config_dir=tmp_path)
    assert (recipe.cfg.run.name, recipe.name, recipe.overrides_hash) == ("mine", "mine", "")


def test_config_groups(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "qwen3.yaml").write_text("path: here\nfamily: qwen3\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base, model: qwen3, _self_]\nrun: {seed: 5}\n")
    cfg = compose("mine", ["model=qwen3", "run.steps=2"], tmp_path).cfg
    assert (cfg.model.path, cfg.model.family, cfg.run.seed, cfg.run.steps) == ("here", "qwen3", 5, 2)
    with pytest.raises(ConfigError, match=r"^model=qwen: group model has qwen3; did you mean qwen3\?$"):
        compose("mine", ["model=qwen"], tmp_path)


def test_group_that_the_recipe_does_not_choose(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "qwen3.yaml").write_text("path: here\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\n")
    with pytest.raises(ConfigError) as raised:
        compose("mine", ["model=qwen3"], tmp_path)
    assert str(raised.value) == (
        "model=qwen3: the recipe chooses no model, so there is nothing to override; put `model: qwen3` in its defaults, before _self_"
    )


@pytest.mark.parametrize("name", ["quickstart.yaml", "base.yaml", "slime_schema.yaml"])
def test_own_recipe_with_the_name_of_a_built_in(name: str, tmp_path) -> None:
    (tmp_path / name).write_text("defaults: [base, _self_]\n")
    with pytest.raises(ConfigError) as raised:
        compose("quickstart", config_dir=tmp_path)
    assert str(raised.value) == f"--config-dir {tmp_path}: {name} has the name of a recipe of slime's; rename it"


def test_own_group_with_the_name_of_a_built_in(tmp_path, monkeypatch) -> None:
    built_in, own = tmp_path / "recipes", tmp_path / "cp"
    for folder in (built_in, own):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "tiny.yaml").write_text("path: here\n")
    monkeypatch.setattr(recipes, "RECIPES", built_in)
    with pytest.raises(ConfigError, match=r"model/tiny.yaml has the name of a recipe of slime's; rename it$"):
        recipes.recipe_folders(own)
    assert recipes.recipe_folders(built_in) == [built_in]


def test_home_is_written_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    (tmp_path / "mine.yaml").write_text("defaults: [base, _self_]\ndata: {eval: {a.b: {path: ~/e.jsonl}}}\nrun: {dir: ~/runs}\n")
    recipe = compose("mine", ["model.path=~/m", "data.train=[{path: ~/t.jsonl}]"], tmp_path)
    assert (recipe.cfg.model.path, recipe.cfg.data.train[0].path, recipe.cfg.run.dir) == ("/h/m", "/h/t.jsonl", "/h/runs")
    assert recipe.cfg.data.eval["a.b"].path == "/h/e.jsonl" and "~" not in recipe.resolved
    assert prepare_override("reward.pattern='a=~/'", [RECIPES]) == "reward.pattern='a=~/'"


def test_missing_config_dir() -> None:
    with pytest.raises(ConfigError, match=r"^--config-dir nowhere: no such folder$"):
        compose(config_dir="nowhere")
