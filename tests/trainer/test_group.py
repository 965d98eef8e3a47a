"""The driver's side, over real Ray actors."""

import re

import numpy as np
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from slime.cluster.deadline import ProcessLost
from slime.cluster.placement import RolePlacement
from slime.models.hf_files import HFReader
from slime.trainer.group import TrainerGroup
from slime.types import WeightVersion
from tests.tiny import load_hf_model
from tests.trainer.ranks import make_batch, make_cfg

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=5, include_dashboard=False, logging_level="error", object_store_memory=100 << 20)
    yield
    ray.shutdown()


def placed(ranks):
    group = placement_group([{"CPU": 1.0}] * ranks)
    assert group.wait(30)
    return RolePlacement("actor", group, list(range(ranks)), "cpu", 1.0)


@pytest.fixture(scope="module")
def group(cluster, models):
    """Two ranks that share every matrix."""
    placement = placed(2)
    started = TrainerGroup.start(make_cfg(models["qwen3"], tensor_parallel=2), placement)
    yield started
    started.stop()
    remove_placement_group(placement.group)


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
    assert files.keys() == {path.name for path in (tmp_path / "shards").iterdir()} and saving.done()
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
    (tmp_path / "shards").write_text("a file where the folder should be")
    saving = group.save(tmp_path / "shards")
    group.logprobs(make_batch(vocab=77))
    with pytest.raises(OSError, match=r"could not be written to .*rank 0: .*rank 1: "):
        saving.result(60)
    group.save(tmp_path / "other").result(60)


def test_a_dead_rank_ends_the_group(group):
    """The last test of this group."""
    ray.kill(group._ranks[1])
    with pytest.raises(ProcessLost, match=r"waiting for the trainer to update"):
        group.update(make_batch(vocab=77))
    assert group._ranks == []


def test_ranks_that_wait_for_one_that_does_not_come_say_where(cluster, models, tmp_path):
    cfg = make_cfg(models["qwen3"], tensor_parallel=2)
    cfg.run.dir, cfg.run.name = str(tmp_path), "stuck"
    (tmp_path / "stuck" / "logs").mkdir(parents=True)
    started = TrainerGroup.start(cfg, placed(2))
    cfg.cluster.step_timeout_s = 3.0  # of the driver; the ranks wait longer for one another
    batch = ray.put(make_batch(vocab=77))
    with pytest.raises(TimeoutError) as raised:
        started._together([started._ranks[0].train.remote(batch)], "the trainer to update")
    told = str(raised.value)
    assert "cluster.step_timeout_s" in told and "rank 1 waits in nothing of slime" in told
    assert re.search(r"rank 0 waits in \w+/\w+\.py:\d+ \w+ \(in \w+ of torch\.distributed", told)
    [file] = (tmp_path / "stuck" / "logs").glob("stacks-the-trainer-to-update-*.txt")
    assert str(file) in told
    text = file.read_text()
    assert "=== rank 0" in text and "reduce_scatter_tensor" in text and "train_batch" in text
    assert started._ranks == []


def test_what_a_user_got_wrong_arrives_as_it_was_raised(group, models):
    cfg = make_cfg(models["qwen3"])
    cfg.trainer.megatron = {"recompute_granularty": "full"}
    with pytest.raises(ValueError, match=r"did you mean trainer\.megatron\.recompute_granularity"):
        TrainerGroup.start(cfg, placed(1))
