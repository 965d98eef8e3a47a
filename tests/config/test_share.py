"""cluster.share: what it does not go with, each with its exact error text; its pools; whether both fit on a device."""

# ruff: noqa: E501

import io
import math

import pytest
from rich.console import Console

from slime.config.check_share import SWAP_ON_GPU
from slime.config.checks import check, check_device
from slime.config.exits import ConfigError, PreflightError
from slime.config.plan import plan
from slime.config.plan_memory import EngineMemory, RankMemory
from slime.config.plan_share import GIB, MOST, RESERVED, SharePlan, share_plan, with_fraction
from slime.config.plan_view import show
from slime.config.roles import pools, shares, swaps
from tests.config.composing import composed

GOOD = ["model.path=model", "data.train=[{path: p.jsonl}]"]
SWAP = "cluster.share=swap"
TWO = "cluster.roles.actor.devices=2 cluster.roles.rollout.devices=2 rollout.engines=2"
HELD = "algorithm.teachers={math: {path: model}} algorithm.distill="

BAD = {
    "cluster.share=both": "cluster.share=both: takes none, split, swap",
    "cluster.share=split rollout.external_urls=['http://h:1']": "cluster.share=split with rollout.external_urls, whose servers have devices "
    "of their own: set cluster.share=none, or remove the urls",
    "cluster.share=split cluster.roles.actor.devices=2": "cluster.share=split with cluster.roles.actor.devices=2 and "
    "cluster.roles.rollout.devices=1: ranks and engines sit on the same devices; make them equal",
    "cluster.share=split rollout.sglang.mem_fraction_static=1": "rollout.sglang.mem_fraction_static=1: takes a number above 0 and below 1",
    "cluster.share=split rollout.sglang.mem_fraction_static=half": "rollout.sglang.mem_fraction_static=half: takes a number above 0 and "
    "below 1",
    "cluster.share=split rollout.sglang.enable_memory_saver=true": "rollout.sglang.enable_memory_saver is set by slime: use cluster.share",
    f"{SWAP} rollout.mode=one_step_off": "cluster.share=swap with rollout.mode=one_step_off: engines would generate while the trainer has "
    "their memory; set rollout.mode=sync, or cluster.share=split",
    f"{SWAP} cluster.device=cpu": "cluster.share=swap with cluster.device=cpu: a CPU engine has no memory that it could give back; set "
    "cluster.share=split, or none",
    f"{SWAP} run.deterministic=true": "cluster.share=swap with run.deterministic=true, which is of the CPU: set cluster.share=split, or none",
    f"{SWAP} rollout.join=urls": "cluster.share=swap with rollout.join=urls: a server of yours keeps its memory and would miss the weights; "
    "remove it",
    f"{SWAP} {HELD}topk": "cluster.share=swap with algorithm.teachers.math on the actor's ranks and algorithm.distill=topk: it would read "
    "answers while engines have the memory; give it devices (cluster.roles.teacher/math) or a url, or set algorithm.distill=full",
    f"{SWAP} sync.pause=retract": "sync.pause=retract has no effect with cluster.share=swap, where engines are loaded whole when they get "
    "their memory back: remove it",
    f"{SWAP} sync.on_mismatch=heal": "sync.on_mismatch=heal has no effect with cluster.share=swap, where engines are loaded whole when they "
    "get their memory back: remove it",
    f"{SWAP} trainer.megatron.nccl_ub=true": "trainer.megatron.nccl_ub=true with cluster.share=swap: NCCL would keep the addresses of memory "
    "that is given away; remove it",
}
PASS = [
    "cluster.share=split",
    "cluster.share=split rollout.mode=one_step_off rollout.join=urls sync.pause=retract sync.on_mismatch=heal",
    "cluster.share=split cluster.device=cpu run.deterministic=true",
    f"cluster.share=split {TWO} rollout.sglang.mem_fraction_static=0.4",
    SWAP,
    f"{SWAP} sync.mode=full",
    f"{SWAP} {HELD}full",
    f"{SWAP} {HELD}topk cluster.roles.teacher/math.devices=1",
    f"{SWAP} algorithm.name=ppo cluster.roles.critic.devices=3",
    "cluster.share=split run.only=rollout rollout.dump=true cluster.roles.actor.devices=3",
    "cluster.share=split run.only=train run.replay=rollouts",
]


@pytest.mark.parametrize(("overrides", "text"), BAD.items())
def test_what_it_does_not_go_with(overrides: str, text: str, workdir) -> None:
    with pytest.raises(ConfigError) as raised:
        check(composed(*GOOD, *_split(overrides)))
    assert str(raised.value) == text


@pytest.mark.parametrize("overrides", PASS)
def test_what_it_goes_with(overrides: str, workdir) -> None:
    check(composed(*GOOD, *_split(overrides)))


def _split(overrides: str) -> list[str]:
    """At blanks outside braces."""
    found, depth = [""], 0
    for letter in overrides:
        depth += (letter == "{") - (letter == "}")
        if letter == " " and not depth:
            found.append("")
        else:
            found[-1] += letter
    return found


def test_a_cpu_that_auto_finds_is_refused_too() -> None:
    cfg = composed(*GOOD, SWAP)
    check_device(cfg, "cuda")
    with pytest.raises(PreflightError) as raised:
        check_device(cfg, "cpu")
    assert str(raised.value) == f"cluster.share=swap with cluster.device=auto, which is cpu here: {SWAP_ON_GPU}"
    check_device(composed(*GOOD, "cluster.share=split"), "cpu")


def test_pools() -> None:
    def found(*overrides: str) -> list[tuple[str, int, float]]:
        return [(pool.name, pool.devices, pool.cpus) for pool in pools(composed(*GOOD, *overrides))]

    cpus = ["cluster.cpus_per_rank=2", "cluster.cpus_per_engine=3"]
    ppo = ["algorithm.name=ppo", "cluster.roles.critic.devices=4"]
    assert found(*cpus) == [("actor", 1, 2), ("rollout", 1, 3)]
    assert found(*cpus, *ppo, "cluster.share=split") == [("actor + rollout", 1, 5), ("critic", 4, 2)]
    alone = composed(*GOOD, SWAP, "run.only=rollout", "rollout.dump=true")
    assert [pool.name for pool in pools(alone)] == ["rollout"] and not shares(alone) and not swaps(alone)
    assert not swaps(composed(*GOOD, "cluster.share=split")) and swaps(composed(*GOOD, SWAP))


def of(share: str, rank: int, engine: int, fraction: float | None = None, staged: int = 0) -> SharePlan:
    return SharePlan(share, rank * GIB, engine * GIB, staged * GIB, fraction)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shared", "device", "fraction"),
    [
        (of("split", 40, 10), 80, 0.37),  # 1 - 0.1 - 42 / 80 = 0.375
        (of("split", 40, 10, staged=2), 80, 0.35),  # 1 - 0.1 - 44 / 80
        (of("split", 40, 10, 0.2), 80, 0.2),
        (of("swap", 40, 10), 80, 0.87),
        (of("swap", 40, 10, staged=2), 80, 0.85),
        (of("swap", 76, 69), 80, 0.87),
        (of("swap", 40, 10, 0.5), 80, 0.5),
    ],
)
def test_the_engines_part(shared: SharePlan, device: int, fraction: float) -> None:
    assert shared.fit(device * GIB) == pytest.approx(fraction)
    assert shared.least() <= device * GIB


REFUSED = {
    (
        of("split", 75, 10),
        80,
    ): "cluster.share=split on devices of 80.0 GiB: an engine is left 0.0 GiB, and its weights with the KV cache of "
    "the longest request take 10.0 GiB; lower trainer.max_tokens_per_rank, set sync.snapshot=host, or divide the model over more devices, "
    "or raise rollout.tensor_parallel",
    (of("split", 40, 10, 0.5), 80): "rollout.sglang.mem_fraction_static=0.5 with cluster.share=split on devices of 80.0 GiB: a rank takes "
    "about 40.0 GiB, and 10.0 GiB stay free of it; rollout.sglang.mem_fraction_static can be 0.37 at most",
    (of("split", 90, 10, 0.5), 80): "rollout.sglang.mem_fraction_static=0.5 with cluster.share=split on devices of 80.0 GiB: a rank takes "
    "about 90.0 GiB, and 10.0 GiB stay free of it; nothing is left for an engine; lower trainer.max_tokens_per_rank, set sync.snapshot=host, "
    "or divide the model over more devices",
    (
        of("split", 40, 10, 0.1),
        80,
    ): "cluster.share=split on devices of 80.0 GiB: rollout.sglang.mem_fraction_static=0.1 leaves an engine 8.0 "
    "GiB, and its weights with the KV cache of the longest request take 10.0 GiB; raise it, lower trainer.max_tokens_per_rank, set "
    "sync.snapshot=host, or divide the model over more devices, or raise rollout.tensor_parallel",
    (of("swap", 77, 10), 80): "cluster.share=swap on devices of 80.0 GiB: a rank takes about 77.0 GiB and 4.0 GiB stay occupied; lower "
    "trainer.max_tokens_per_rank, set sync.snapshot=host, or divide the model over more devices",
    (of("swap", 10, 10, 0.89), 80): "rollout.sglang.mem_fraction_static=0.89 with cluster.share=swap on devices of 80.0 GiB: 10.0 GiB stay "
    "free of it; rollout.sglang.mem_fraction_static can be 0.87 at most",
}


@pytest.mark.parametrize(("case", "text"), REFUSED.items())
def test_what_does_not_fit_names_the_knob(case: tuple[SharePlan, int], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        case[0].fit(case[1] * GIB)
    assert str(raised.value) == text


@pytest.mark.parametrize("fraction", [None, 0.2, 0.5, 0.8])
@pytest.mark.parametrize("share", ["split", "swap"])
@pytest.mark.parametrize(("rank", "engine"), [(3, 1), (40, 10), (10, 60)])
def test_the_least_device_is_where_it_begins_to_fit(share: str, rank: int, engine: int, fraction: float | None) -> None:
    shared = of(share, rank, engine, fraction)
    least = shared.least()
    assert shared.fit(int(least * 1.06)) == pytest.approx(fraction or shared.fit(int(least * 1.06)))
    with pytest.raises(ConfigError):
        shared.fit(int(least * 0.94))


def test_a_fraction_that_fits_on_no_device() -> None:
    with pytest.raises(ConfigError, match=r"^rollout\.sglang\.mem_fraction_static=0\.95 with cluster\.share=split: .* set it below 0\.9$"):
        of("split", 1, 1, 0.95).least()
    assert (round(MOST, 6), RESERVED) == (0.9, 2 * GIB)


def test_the_plan_adds_both_up(workdir) -> None:
    cfg = composed(*GOOD, SWAP, "rollout.sglang.mem_fraction_static=0.3")
    found = plan(cfg)
    assert found.memory is not None and found.shared is not None
    rank, engine = found.memory.rank, found.memory.engine
    assert isinstance(rank, RankMemory) and isinstance(engine, EngineMemory)
    assert found.shared == share_plan(cfg, rank, engine)
    assert (found.shared.rank, found.shared.engine) == (rank.total, engine.weights + engine.kv_per_token * 2048)
    assert found.shared.staged == math.ceil(engine.weights / 3), "a quarter in a file, and what it replaces"
    assert (found.shared.share, found.shared.fraction) == ("swap", 0.3)
    out = io.StringIO()
    show(cfg, found, Console(file=out, width=200))
    text = " ".join(out.getvalue().split())
    assert "a device of actor and rollout (cluster.share=swap)" in text and "0.3 of the device" in text
    assert "rollout 1, those of actor" in text
    assert plan(composed(*GOOD)).shared is None
    assert plan(composed(*GOOD, "cluster.share=split", "cluster.device=cpu")).shared is None, "nothing is divided there"


def test_the_fraction_is_stated_in_a_copy() -> None:
    cfg = composed(*GOOD, SWAP, "rollout.sglang.page_size=16")
    assert with_fraction(cfg, 0.5).rollout.sglang == {"page_size": 16, "mem_fraction_static": 0.5}
    assert cfg.rollout.sglang == {"page_size": 16}
