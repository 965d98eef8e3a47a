import json
from pathlib import Path

import pytest

from slime.config import DataFile, SlimeConfig
from slime.config.exits import GateStopped
from slime.rollout.demonstrations import Demonstrations
from slime.rollout.handle import RolloutResult
from tests.tiny import EOS, SPECIAL, make_tokenizer


@pytest.fixture
def cfg(tmp_path: Path) -> SlimeConfig:
    make_tokenizer(tmp_path / "model", 80)
    cfg = SlimeConfig()
    cfg.model.path, cfg.algorithm.name = str(tmp_path / "model"), "sft"
    cfg.data.train, cfg.data.shuffle = [DataFile(str(tmp_path / "demos.jsonl"))], False
    cfg.rollout.prompts_per_step, cfg.rollout.max_response_tokens = 3, 4
    return cfg


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slime.rollout.demonstrations.ray.put", lambda value: value)


def start(cfg: SlimeConfig, rows: list[dict], first: int = 0) -> RolloutResult:
    Path(cfg.data.train[0].path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return Demonstrations(cfg).start(0, first).result()


def test_the_label_and_the_end_token_are_trained_on_and_the_prompt_is_not(cfg: SlimeConfig):
    result = start(
        cfg,
        [{"prompt": "1+1=", "label": "2"}, {"prompt": [{"role": "user", "content": "2+2"}], "label": "4"}, {"prompt": "3", "label": "33"}],
    )
    batch = result.ref
    assert batch.version.tolist() == [-1] * 3, "no policy drew them"
    assert result.summary.metrics == {
        "response_len/mean": pytest.approx(7 / 3),
        "response_len/max": 3.0,
        "response_len/truncated_frac": 0.0,
    }
    tokenizer = Demonstrations(cfg)._tokenizer
    spans = [slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]) for i in range(3)]
    assert [tokenizer.decode(batch.tokens[s]) for s in spans] == [f"1+1=2{EOS}", f"<user>2+2<assistant>4{EOS}", f"333{EOS}"]
    assert [tokenizer.decode(batch.tokens[s][batch.loss_mask[s]]) for s in spans] == [f"2{EOS}", f"4{EOS}", f"33{EOS}"]
    assert batch.tokens[batch.cu_seqlens[1:] - 1].tolist() == [SPECIAL.index(EOS)] * 3


def test_a_batch_is_a_function_of_its_first_ordinal_and_too_long_ones_are_named(cfg: SlimeConfig):
    rows = [{"prompt": f"{i}=", "label": "9" * (9 if i == 4 else 1)} for i in range(8)]
    summary = start(cfg, rows, first=3).summary
    assert (summary.trained, summary.dropped, summary.drawn) == ([3, 5, 6], {4: "too_long"}, 4)
    assert start(cfg, rows, first=3).ref.tokens.tobytes() == start(cfg, rows, first=3).ref.tokens.tobytes()


def test_examples_that_cannot_be_learnt_from(cfg: SlimeConfig):
    with pytest.raises(ValueError, match=r"its label is the answer .* and is not text; set data\.label_key"):
        start(cfg, [{"prompt": "1", "label": 3}])
    says = r"prompts were dropped \(too_long 96\) and 0 of 3 kept, .*raise data\.max_prompt_tokens .*also rollout\.max_response_tokens"
    with pytest.raises(GateStopped, match=says):
        start(cfg, [{"prompt": "1", "label": "too long"}])
