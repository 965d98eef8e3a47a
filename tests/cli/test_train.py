"""`slime train`: exit codes, what is printed, and that Hydra's own flags work as in any Hydra app."""

import json
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from slime.cli.main import main
from slime.config import SlimeConfig
from slime.config.exits import ConfigError, SavedRunAgain

pytestmark = pytest.mark.thorough

RECIPES = (
    "cispo, dapo, grpo, gspo, opd_full, opd_multi_teacher, opd_sampled, opd_topk, ppo, quickstart, quickstart_bf16, quickstart_sft, "
    "reinforce_pp, rloo, sft"
)
GOOD = ["model.path=model", "data.train=[{path: p.jsonl}]", "data.max_prompt_tokens=24", "rollout.max_response_tokens=8"]
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "vocab_size": 32,
}
Slime = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[SlimeConfig, str]]:
    """A working directory with a model's config and a data file; what the loop would have been called with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    started: list[tuple[SlimeConfig, str]] = []
    loop = types.ModuleType("slime.train")
    loop.main = lambda cfg, resolved: started.append((cfg, resolved))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slime.train", loop)
    return started


@pytest.fixture
def slime(runs: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Slime:
    """Call the command; returns exit code, stdout, stderr."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*argv: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["slime", *argv])
        code = 0
        try:
            main()
        except SystemExit as ending:
            code = int(ending.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_recipe_reaches_the_loop(slime: Slime, runs: list) -> None:
    assert slime("train", *GOOD, "run.seed=7", "rollout.stop=[a]") == (0, "", "")
    ((cfg, resolved),) = runs
    assert (cfg.run.seed, cfg.rollout.stop, cfg.model.path) == (7, ["a"], "model")
    assert yaml.safe_load(resolved)["run"]["name"] == cfg.run.name
    assert sorted(path.name for path in Path().iterdir()) == ["model", "p.jsonl"]  # Hydra leaves nothing


def test_sweep_runs_every_job_under_its_own_name(slime: Slime, runs: list) -> None:
    assert slime("train", "--multirun", *GOOD, "run.seed=1,2", "run.dir=runs") == (0, "", "")
    assert [cfg.run.seed for cfg, _ in runs] == [1, 2]
    assert len({cfg.run.name for cfg, _ in runs}) == 2
    assert sorted(path.name for path in Path().iterdir()) == ["model", "p.jsonl", "runs"]


def test_sweep_with_a_bad_job_starts_none(slime: Slime, runs: list) -> None:
    code, out, err = slime("train", *GOOD, "run.seed=1,x", "--multirun")
    assert (code, out, runs) == (2, "", [])
    assert (
        err == "slime: run.seed=x: takes a whole number, >= 0, <= 4294967295. "
        "The one seed: data order, sampling, initialisation and dropout derive from it.\n"
    )


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["run.name=same", "run.seed=1,2"], "share run.dir=runs, run.name=same: leave run.name out, or put ${run.seed} in it"),
        (
            ["run.name=same", "run.steps=1,2"],
            "share run.dir=runs, run.name=same: set run.name with ${run.steps} in it, as in 'run.name=mine-${run.steps}'",
        ),
        (["run.seed=1,1", "run.name=x"], "are the same: GOOD run.seed=1 run.name=x; remove one"),
    ],
)
def test_jobs_of_a_sweep_have_directories_of_their_own(argv: list[str], text: str, slime: Slime, runs: list) -> None:
    assert slime("train", "--multirun", *GOOD, *argv) == (
        2,
        "",
        f"slime: jobs 0 and 1 of this sweep {text.replace('GOOD', ' '.join(GOOD).replace('path: ', 'path:'))}\n",
    )
    assert runs == []


def test_jobs_with_the_swept_knob_in_their_name(slime: Slime, runs: list) -> None:
    assert slime("train", "--multirun", *GOOD, "run.steps=1,2", "run.name=a-${run.steps}", "run.dir=runs")[0] == 0
    assert [cfg.run.name for cfg, _ in runs] == ["a-1", "a-2"]


def test_dry_run_of_a_sweep_has_a_heading_a_job(slime: Slime, runs: list) -> None:
    code, out, _ = slime("train", "--multirun", *GOOD, "run.seed=5,6", "run.dry_run=true", "run.dir=runs")
    headings = [line.partition(":")[0] for line in out.splitlines() if line.startswith("job ") and "run.seed=" in line]
    assert (code, runs, headings) == (0, [], ["job 0", "job 1"])


def test_config_of_a_recipe_in_a_folder(slime: Slime, runs: list, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text("defaults: [base, _self_]\nrun: {seed: 11}\nmodel: {path: model}\n")
    mine = ["--config-name", "mine", "--config-dir", "recipes"]
    code, out, _ = slime("train", "--cfg", "job", *mine, "rollout.sglang.mem_fraction_static=0.5")
    shown = yaml.safe_load(out)
    assert (code, shown["run"]["seed"], shown["rollout"]["sglang"]) == (0, 11, {"mem_fraction_static": 0.5})
    assert slime("train", *mine, *GOOD)[0] == 0
    assert runs[0][0].run.seed == 11 and str(runs[0][0].run.name).startswith("mine-")


def test_dry_run_prints_recipe_and_plan_and_starts_nothing(slime: Slime, runs: list) -> None:
    code, out, err = slime("train", *GOOD, "run.dry_run=true", "run.seed=5")
    assert (code, err, runs) == (0, "", [])
    assert "seed: 5" in out and "roles (cluster.device=auto)" in out and "32 prompts, 256 samples" in out


def test_help_lists_every_knob(slime: Slime, runs: list) -> None:
    code, out, _ = slime("train", "--help")
    assert code == 0 and runs == []
    assert "trainer.max_tokens_per_rank=8192   (a whole number, >= 1)" in out
    assert "rollout.mode=sync   (sync | one_step_off)" in out
    assert "75  stopped early and saved; run the same command again" in out
    assert slime("--help")[1].startswith("slime: RL post-training")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["trian"], "slime trian: no such command; there are train, convert, report, sync; did you mean train?"),
        (["train"], f"--config-name is missing: name a recipe; there are {RECIPES}"),
        (["train", "--dry-run", *GOOD], "--dry-run: no such flag; a knob is set by key=value, run.dry_run=true"),
        (["train", "--trainer.lr=1", *GOOD], "--trainer.lr: no such flag; a knob is set by key=value, trainer.lr=1"),
        (["train", "--recipe", "x"], "--recipe: no such flag; a recipe is named by --config-name"),
        (["train", "--config_name", "x"], "--config_name: no such flag; a recipe is named by --config-name"),
        (["train", "--mutlirun", *GOOD], "--mutlirun: no such flag; did you mean --multirun?"),
        (["train", "--config-path", "x"], "--config-path x: use --config-dir, which adds a folder of recipes to slime's own"),
        (
            ["train", "--config-name"],
            "argument --config-name/-cn: expected one argument; `slime train --help` shows how it is called",
        ),
        (["train", "--cfg", "job", "--resolve", "run.seed=${run.stepz}"], "run.seed: Interpolation key 'run.stepz' not found"),
        (["train", "--cfg", "job", "trainer.lr=fast"], "trainer.lr=fast: takes a number, >= 0. Peak learning rate of Adam."),
        (
            ["train", "--cfg", "job", "--config-name", "nope"],
            f"no recipe nope; there are base, {RECIPES}",
        ),
        (
            ["train", *GOOD, "hydra.jobx=1"],
            "hydra.jobx=1: Hydra has no such setting or value; `slime train --cfg hydra` shows its settings",
        ),
        (["train", "run.stepz=1"], "unknown key run.stepz: did you mean run.steps?"),
        (["train", "--config-dir", "nowhere"], "--config-dir nowhere: no such folder"),
        (["train", "--cfg", "job", "run.stepz=1"], "unknown key run.stepz: did you mean run.steps?"),
        (
            ["train", *GOOD, "run.only=train"],
            "run.only=train reads rollouts from a directory: set run.replay to one that rollout.dump=true wrote",
        ),
        (
            ["train", *GOOD, "trainer.megatron.overlap_grad_reduc=true"],
            "trainer.megatron.overlap_grad_reduc: megatron-core has no such option; did you mean trainer.megatron.overlap_grad_reduce?",
        ),
    ],
)
def test_wrong_recipe_exits_with_2(argv: list[str], text: str, slime: Slime, runs: list) -> None:
    assert slime(*argv) == (2, "", f"slime: {text}\n")
    assert runs == []


@pytest.mark.e2e
def test_options_of_the_engine(slime: Slime, runs: list) -> None:
    code, out, err = slime("train", *GOOD, "rollout.sglang.mem_fraction_statik=0.5")
    assert (code, out, runs) == (2, "", [])
    assert err.startswith("slime: rollout.sglang.mem_fraction_statik: SGLang 0.")
    assert err.endswith("has no such server argument; did you mean rollout.sglang.mem_fraction_static?\n")
    assert slime("train", *GOOD, "rollout.sglang.mem_fraction_static=0.5") == (0, "", "")


@pytest.mark.parametrize(("error", "code"), [(ConfigError("x"), 2), (SavedRunAgain("x"), 75), (RuntimeError("x"), 1)])
def test_endings_of_a_run(error: Exception, code: int, slime: Slime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra, through which it comes, leaves it as it is; the others are in test_endings.py."""

    def fail(cfg: SlimeConfig, resolved: str) -> None:
        raise error

    monkeypatch.setattr(sys.modules["slime.train"], "main", fail)
    if code == 1:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    found, out, err = slime("train", *GOOD)
    assert (found, out) == (code, "")
    assert err == "slime: x\n" if code != 1 else "in fail" in err and err.endswith("slime: x\n")


def test_report_of_a_folder_without_a_run(slime: Slime, tmp_path: Path) -> None:
    assert slime("report", str(tmp_path)) == (2, "", f"slime: slime report {tmp_path}: no metrics.jsonl there; give a run's directory\n")
