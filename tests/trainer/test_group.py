"""The driver's side, over real Ray actors."""

import re
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from slime.cluster.deadline import ProcessLost
from slime.cluster.placement import RolePlacement
from slime.config.algorithm import TeacherConfig
from slime.models.hf_files import HFReader
from slime.trainer.group import TrainerGroup
from slime.types import WeightVersion
from tests.tiny import load_hf_model
from tests.trainer.ranks import make_batch, make_cfg

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=8, include_dashboard=False, logging_level="error", object_store_memory=100 << 20)
    yield
    ray.shutdown()


@contextmanager
def placed(ranks):
    """As many devices of the cluster, given back afterwards."""
    group = placement_group([{"CPU": 1.0}] * ranks)
    assert group.wait(30)
    try:
        yield RolePlacement("actor", group, list(range(ranks)), "cpu", 1.0)
    finally:
        remove_placement_group(group)


@pytest.fixture(scope="module")
def group(cluster, models):
    """Two ranks that share every matrix."""
    with placed(2) as placement:
        started = TrainerGroup.start(make_cfg(models["qwen3"], tensor_parallel=2), placement)
        yield started
        started.stop()


def published(group):
    version = WeightVersion(0, 1, "test")
    return dict(tensor for ref in group.weights(version, 20_000) for tensor in ray.get(ref))


def test_two_ranks_train_save_load_and_export(group, models, tmp_path):
    batch = make_batch(vocab=77)
    with HFReader(models["qwen3"]) as reader:
        weights = published(group)
        assert sorted(weights) == reader.names
        assert all(torch.equal(tensor, reader.read(name)) for name, tensor in weights.items())
    before = group.logprobs(batch)
    metrics = group.update(ray.put(batch))
    assert metrics["train/grad_norm"] > 0
    saving = group.save(tmp_path / "shards")
    trained = published(group)
    again = group.update(batch)["train/grad_norm"]
    files = saving.result(60)
    assert files.keys() == {f"trainer/{path.name}" for path in (tmp_path / "shards" / "trainer").iterdir()} and saving.done()
    group.load(tmp_path / "shards")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in published(group).items())
    assert group.update(batch)["train/grad_norm"] == again
    group.export_hf(tmp_path / "hf")
    after = group.logprobs(batch)
    assert np.abs(after - before).max() > 1e-4
    names = {(span.process, span.name) for span in group.spans()}
    assert {
        ("rank 0", "train"),
        ("rank 1", "forward_backward"),
        ("rank 1", "optimizer"),
        ("rank 0", "save"),
        ("rank 1", "snapshot"),
    } <= names
    model = load_hf_model(tmp_path / "hf")
    ids = torch.from_numpy(batch.tokens[: batch.cu_seqlens[1]].astype(np.int64))
    with torch.no_grad():
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
    mask = batch.loss_mask[1 : batch.cu_seqlens[1]]
    assert np.abs(logp - after[1 : batch.cu_seqlens[1]])[mask].max() <= 1e-5


def test_a_disk_that_refuses_is_an_error_and_the_ranks_stay(group, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "trainer").write_text("a file where the folder should be")
    saving = group.save(tmp_path / "shards")
    group.logprobs(make_batch(vocab=77))
    with pytest.raises(OSError, match=r"could not be written to .*rank 0: .*rank 1: "):
        saving.result(60)
    group.save(tmp_path / "other").result(60)


def test_a_dead_rank_ends_the_group(group):
    """The last test of this group."""
    ray.kill(group.ranks[1])
    with pytest.raises(ProcessLost, match=r"waiting for the trainer to update"):
        group.update(make_batch(vocab=77))
    assert group.ranks == []


def test_ranks_that_wait_for_one_that_does_not_come_say_where(cluster, models, tmp_path):
    cfg = make_cfg(models["qwen3"], tensor_parallel=2)
    cfg.run.dir, cfg.run.name = str(tmp_path), "stuck"
    (tmp_path / "stuck" / "logs").mkdir(parents=True)
    with placed(2) as placement:
        started = TrainerGroup.start(cfg, placement)
        cfg.cluster.step_timeout_s = 3.0  # of the driver; the ranks wait longer for one another
        batch = ray.put(make_batch(vocab=77))
        with pytest.raises(TimeoutError) as raised:
            started.together([started.ranks[0].train.remote(batch)], "the trainer to update")
    told = str(raised.value)
    assert "cluster.step_timeout_s" in told and "rank 1 waits in nothing of slime" in told
    assert re.search(r"rank 0 waits in \w+/\w+\.py:\d+ \w+ \(in \w+ of torch\.distributed", told)
    [file] = (tmp_path / "stuck" / "logs").glob("stacks-the-trainer-to-update-*.txt")
    assert str(file) in told
    text = file.read_text()
    assert "=== rank 0" in text and "reduce_scatter_tensor" in text and "train_beside" in text
    assert started.ranks == []


def test_what_a_user_got_wrong_arrives_as_it_was_raised(group, models):
    cfg = make_cfg(models["qwen3"])
    cfg.trainer.megatron = {"recompute_granularty": "full"}
    with placed(1) as placement, pytest.raises(ValueError, match=r"did you mean trainer\.megatron\.recompute_granularity"):
        TrainerGroup.start(cfg, placement)


@pytest.fixture(scope="module")
def taught(cluster, models):
    """Two ranks with a teacher, a batch and its groups. The last test that uses it ends a rank."""
    cfg = make_cfg(models["qwen3"])
    cfg.algorithm.name, cfg.algorithm.distill = "opd", "sampled"
    cfg.algorithm.teachers = {"t": TeacherConfig(str(models["qwen3_tied"]))}
    batch = make_batch(24, vocab=77)
    batch = replace(batch, teacher=np.zeros(len(batch), np.int64))
    with placed(2) as placement:
        started = TrainerGroup.start(cfg, placement)
        yield started, batch, [batch.select(np.flatnonzero(batch.group == n)) for n in np.unique(batch.group)]
        started.stop()


def read(started):
    """Groups that teachers have read since the last call, in the leader: ahead, and with an update."""
    spans = [span for span in started.spans() if span.process == "rank 0"]
    updates = [(span.start_s, span.end_s) for span in spans if span.name == "train"]
    counts = [0, 0]
    for span in (span for span in spans if span.name == "held_teacher"):
        counts[any(begin <= span.start_s <= end for begin, end in updates)] += span.args["groups"]
    return tuple(counts)


def handed(started, groups, timeout_s=60):
    """Hand groups over, and wait until all are read."""
    started.read_ahead([ray.put(group) for group in groups])
    give_up = time.monotonic() + timeout_s
    while started._reading or started._finished:
        time.sleep(0.01)
        started.read_ahead([])
        assert time.monotonic() < give_up


def test_teachers_read_finished_groups_before_the_update(taught):
    started, batch, groups = taught
    handed(started, groups[:3])
    handed(started, groups[3:5])
    metrics = started.update(batch)
    assert read(started) == (5, 1) and metrics["distill/reverse_kl"] != 0
    started.read_ahead([ray.put(group) for group in groups[:2]])
    started.read_ahead([ray.put(group) for group in groups[2:]])  # waits where the first call is not done, and the update does not wait
    started.update(batch)
    assert read(started) in ((2, 4), (6, 0))
    started.update(batch)
    assert read(started) == (0, 6), "nothing is kept from one update to the next"


def test_what_fails_while_teachers_read_is_raised_while_the_rollout_is_waited_for_or_by_the_update(taught):
    started, batch, groups = taught
    nobody = replace(groups[0], teacher=None)
    with pytest.raises(ValueError, match="does not say who of t teaches its samples"):
        handed(started, [nobody])
    started.read_ahead([ray.put(nobody)])
    with pytest.raises(ValueError, match="does not say who of t teaches its samples"):
        started.update(batch)
    started.update(batch)  # the ranks stay usable
    ray.kill(started.ranks[1])
    with pytest.raises(ProcessLost, match="waiting for the trainer's teachers to read finished groups"):
        handed(started, groups)
    assert started.ranks == []


def ppo_cfg(models):
    cfg = make_cfg(models["qwen3"])
    cfg.algorithm.name, cfg.critic.lr, cfg.critic.warmup_steps, cfg.run.steps = "ppo", 1e-2, 1, 3
    return cfg


TIMES = ("time/", "perf/")


def of_the_recipe(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(TIMES)}


@pytest.mark.parametrize("devices", [0, 2])
def test_a_critic_on_the_actor_s_ranks_or_its_own_learns_saves_and_goes_on(cluster, models, tmp_path, caplog, devices):
    """The same numbers either way: one rank of the actor, and the critic on it or on ranks of its own, of which the last is lost then."""
    batch = make_batch(vocab=77)
    with ExitStack() as ending:
        actor = ending.enter_context(placed(1))
        own = ending.enter_context(placed(devices)) if devices else None
        started = TrainerGroup.start(ppo_cfg(models), actor, own)
        ending.callback(started.stop)
        first = started.update(ray.put(batch))
        assert "train/loss" not in first and first["value/mean"] == 0 and first["time/critic_s"] > 0
        saving = started.save(tmp_path / "iter")
        second = started.update(batch)
        files = saving.result(60)
        assert {name.partition("/")[0] for name in files} == {"trainer", "critic"}
        assert all((tmp_path / "iter" / name).stat().st_size == file.bytes for name, file in files.items())
        assert second["train/loss"] != 0 and second["value/mean"] != 0, "the critic is warm"
        started.load(tmp_path / "iter")
        assert of_the_recipe(started.update(batch)) == of_the_recipe(second)
        processes = {span.process for span in started.spans()}
        assert processes == ({"rank 0"} | {f"critic {rank}" for rank in range(devices)})
        assert first["value/loss"] == pytest.approx(ALONE.setdefault("first", first["value/loss"]), rel=1e-5)
        assert second["value/loss"] == pytest.approx(ALONE.setdefault("second", second["value/loss"]), rel=1e-4)
        (tmp_path / "without").mkdir()
        (tmp_path / "iter" / "trainer").rename(tmp_path / "without" / "trainer")
        started.load(tmp_path / "without")
        assert "without holds no critic: it begins anew" in caplog.text
        if devices:
            ray.kill(started.critic.ranks[-1])
            with pytest.raises(ProcessLost, match=r"waiting for the critic's values"):
                started.update(batch)


ALONE: dict[str, float] = {}
