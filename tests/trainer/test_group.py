"""The driver's side, over real Ray actors."""

import numpy as np
import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from slime.cluster.placement import RolePlacement
from slime.models.hf_files import HFReader
from slime.trainer.group import TrainerGroup
from slime.types import WeightVersion
from tests.tiny import load_hf_model
from tests.trainer.ranks import make_batch, make_cfg

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=3, include_dashboard=False, logging_level="error", object_store_memory=100 << 20)
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
    group.save(tmp_path / "shards")
    trained = published(group)
    again = group.update(batch)["train/grad_norm"]
    group.load(tmp_path / "shards")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in published(group).items())
    assert group.update(batch)["train/grad_norm"] == again
    group.export_hf(tmp_path / "hf")
    after = group.logprobs(batch)
    assert np.abs(after - before).max() > 1e-4
    names = {(span.process, span.name) for span in group.spans()}
    assert {("rank 0", "train"), ("rank 1", "forward_backward"), ("rank 1", "optimizer"), ("rank 0", "save")} <= names
    model = load_hf_model(tmp_path / "hf")
    ids = torch.from_numpy(batch.tokens[: batch.cu_seqlens[1]].astype(np.int64))
    with torch.no_grad():
        logp = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()
    mask = batch.loss_mask[1 : batch.cu_seqlens[1]]
    assert np.abs(logp - after[1 : batch.cu_seqlens[1]])[mask].max() <= 1e-5


def test_a_dead_rank_ends_the_group(group):
    """The last test of this group."""
    ray.kill(group._ranks[1])
    with pytest.raises(RuntimeError, match=r"waiting for the trainer to update"):
        group.update(make_batch(vocab=77))
    assert group._ranks == []


def test_what_a_user_got_wrong_arrives_as_it_was_raised(group, models):
    cfg = make_cfg(models["qwen3"])
    cfg.trainer.megatron = {"recompute_granularty": "full"}
    with pytest.raises(ValueError, match=r"did you mean trainer\.megatron\.recompute_granularity"):
        TrainerGroup.start(cfg, placed(1))
