"""What an engine that is started anew beside a rank takes."""

from dataclasses import replace
from pathlib import Path

import pytest

from slime.cluster.gpus import Memory, parse
from slime.config import SlimeConfig
from slime.config.exits import PreflightError
from slime.config.plan_share import GIB, with_fraction
from slime.engine import fraction
from slime.engine.endpoint import Endpoint
from slime.engine.fraction import MOST, beside_rank, of_free
from slime.engine.server import ServerSpec

SPEC = ServerSpec(
    endpoint=Endpoint("http://h:1", "key"),
    python="python",
    words=["--tp-size=2", "--mem-fraction-static=0.4"],
    environment={"CUDA_VISIBLE_DEVICES": "2,3"},
    label="run/loaded",
    log=Path("log"),
)


def test_as_many_bytes_as_before() -> None:
    assert of_free(0.4, [Memory(80 * GIB, 38 * GIB)]) == pytest.approx(0.4 * 80 / 38)
    assert of_free(0.4, [Memory(80 * GIB, 60 * GIB), Memory(80 * GIB, 40 * GIB)]) == pytest.approx(0.8), "of the fullest device"
    assert of_free(0.4, [Memory(80 * GIB, 0)]) == MOST


def test_only_where_a_rank_sits_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(fraction, "memory_of", lambda gpus: asked.append(gpus) or [Memory(80 * GIB, 40 * GIB)])
    cfg = with_fraction(SlimeConfig(), 0.4)
    for share in ("none", "swap"):
        cfg.cluster.share = share
        assert beside_rank(cfg, SPEC) == SPEC
    cfg.cluster.share = "split"
    assert beside_rank(cfg, replace(SPEC, environment={})) == replace(SPEC, environment={}), "on a CPU"
    assert not asked
    again = beside_rank(cfg, SPEC)
    assert again.words == ["--tp-size=2", "--mem-fraction-static=0.8000"] and asked == [[2, 3]]
    assert beside_rank(cfg, again).words == again.words, "of what it was first, not of what it was last"


def test_what_nvidia_smi_says() -> None:
    assert parse("81559, 81008\n143771, 3\n") == [Memory(81559 << 20, 81008 << 20), Memory(143771 << 20, 3 << 20)]
    for said in ("", "No devices were found\n", "FileNotFoundError: nvidia-smi", "[N/A], [N/A]", "1, 2, 3"):
        with pytest.raises(PreflightError, match=r"cluster\.share divides a GPU's memory and has to know it; set cluster\.share=none"):
            parse(said)
