"""Load and export to the bit; save, resume and continue to the bit."""

import pytest
import torch

from slime.models.hf_files import HFReader
from tests.tiny import make_tiny
from tests.trainer.ranks import make_batch, make_cfg, save, weights

pytestmark = pytest.mark.e2e


def built(place, cfg):
    return weights(place.trainer(cfg))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied", "llama"])
@pytest.mark.parametrize("tp", [1, 2])
def test_load_and_export_are_exact(ranks, models, kind, tp):
    exported, *others = ranks.run(built, tp, make_cfg(models[kind], tensor_parallel=tp))
    assert all(not other for other in others), "the leader alone holds tensors"
    with HFReader(models[kind]) as reader:
        tied = {"lm_head.weight"} if "tied" in kind else set()
        assert set(exported) | tied >= set(reader.names)
        for name, tensor in exported.items():
            assert torch.equal(tensor.view(torch.int32), reader.read(name).view(torch.int32)), name


def with_dropout(trainer):
    """Dropout draws from the RNG states, which have to be resumed too."""
    for layer in trainer.model.stages[0].module.decoder.layers:
        layer.hidden_dropout = 0.1
    return trainer


def continued(place, cfg, batches, directory):
    """(weights of a straight run, of one that was saved half-way and resumed by fresh ranks)."""
    from slime.trainer import shards, step

    trainer = with_dropout(place.trainer(cfg))
    for batch in batches[:2]:
        step.train_batch(trainer, batch)
    save(trainer, directory)
    for batch in batches[2:]:
        step.train_batch(trainer, batch)
    straight = weights(trainer), torch.get_rng_state()
    cfg.run.seed = 99
    resumed = with_dropout(place.trainer(cfg))
    shards.load(resumed, directory)
    assert resumed.optimizer_steps == 2
    for batch in batches[2:]:
        step.train_batch(resumed, batch)
    return straight, (weights(resumed), torch.get_rng_state())


@pytest.mark.parametrize(
    ("world", "tp", "dtype"),
    [(2, 2, "bf16"), (2, 1, "bf16"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1, "fp32"), (2, 1, "fp32")))],
)
def test_resume_is_equal_to_the_bit(ranks, models, tmp_path, world, tp, dtype):
    cfg = make_cfg(models["qwen3"], dtype, tensor_parallel=tp, weight_decay=0.1, schedule="cosine")
    cfg.run.steps = 5
    batches = [make_batch(vocab=77, seed=seed) for seed in range(4)]
    for straight, resumed in ranks.run(continued, world, cfg, batches, tmp_path / "shards"):
        assert straight[0].keys() == resumed[0].keys()
        assert all(torch.equal(tensor, resumed[0][name]) for name, tensor in straight[0].items())
        assert torch.equal(straight[1], resumed[1])


def saved(place, cfg, batch, directory):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    step.train_batch(trainer, batch)
    save(trainer, directory)
    return weights(trainer)


def loaded(place, cfg, batch, directory):
    from slime.trainer import shards, step

    trainer = place.trainer(cfg)
    shards.load(trainer, directory)
    before = weights(trainer)
    step.train_batch(trainer, batch)
    return before, step.train_batch(trainer, batch)["train/grad_norm"]


def test_a_checkpoint_loads_into_another_layout(ranks, models, tmp_path):
    batch = make_batch(vocab=77)
    written = ranks.run(saved, 2, make_cfg(models["qwen3"]), batch, tmp_path)[0]
    norms = []
    for world, tp in ((2, 1), (2, 2), (1, 1)):
        read, norm = ranks.run(loaded, world, make_cfg(models["qwen3"], tensor_parallel=tp), batch, tmp_path)[0]
        assert all(torch.equal(tensor, read[name]) for name, tensor in written.items())
        norms.append(norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


SPARSE_LAYOUTS = [
    (2, {"tensor_parallel": 2, "expert_parallel": 2, "megatron": {"expert_tensor_parallel_size": 1}}),
    (2, {"pipeline_parallel": 2}),
    (2, {"expert_parallel": 2}),
    (1, {}),
    (4, {"pipeline_parallel": 2, "expert_parallel": 2}),  # the first stage has no experts
]


@pytest.mark.parametrize("first", [pytest.param(0, id="of EP2"), pytest.param(1, id="of EP1", marks=pytest.mark.slow)])
def test_a_mixture_of_experts_loads_into_any_layout(ranks, tmp_path, first):
    """Weights to the bit; the optimizer by the gradient norm of the update after the next."""
    model = make_tiny(tmp_path / "model", "deepseek_v3", vocab=77)
    batch = make_batch(vocab=77)
    world, layout = SPARSE_LAYOUTS[first]
    written = ranks.run(saved, world, make_cfg(model, **layout), batch, tmp_path / "shards")[0]
    norms = []
    for world, layout in SPARSE_LAYOUTS:
        read, norm = ranks.run(loaded, world, make_cfg(model, **layout), batch, tmp_path / "shards")[0]
        assert all(torch.equal(tensor, read[name]) for name, tensor in written.items()), layout
        norms.append(norm)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_virtual_stages_loads_into_any_layout(ranks, tmp_path):
    model = make_tiny(tmp_path / "model", "qwen3", tied=True, vocab=77, layers=4)
    batch, norms = make_batch(vocab=77), []
    virtual = {"pipeline_parallel": 2, "megatron": {"virtual_pipeline_model_parallel_size": 2}}
    written = ranks.run(saved, 2, make_cfg(model, **virtual), batch, tmp_path / "shards")[0]
    for world, layout in ((2, virtual), (1, {}), (2, {"tensor_parallel": 2}), (2, {"pipeline_parallel": 2}), (2, {"context_parallel": 2})):
        read, norm = ranks.run(loaded, world, make_cfg(model, **layout), batch, tmp_path / "shards")[0]
        assert all(torch.equal(tensor, read[name]) for name, tensor in written.items()), layout
        norms.append(norm)
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def load_nothing(place, cfg, directory):
    from slime.trainer import shards

    with pytest.raises(ValueError, match=r"holds no trainer checkpoint.*run\.resume"):
        shards.load(place.trainer(cfg), directory)


def test_no_checkpoint_is_an_error(ranks, models, tmp_path):
    ranks.run(load_nothing, 1, make_cfg(models["qwen3"]), tmp_path)


def children(place, cfg, directory):
    import psutil

    trainer = place.trainer(cfg)
    save(trainer, directory)
    return [child.name() for child in psutil.Process().children()]


def test_a_save_leaves_no_process_behind(ranks, models, tmp_path):
    assert ranks.run(children, 1, make_cfg(models["qwen3"]), tmp_path) == [[]]


def fail_to_write(place, cfg, directory):
    """Rank 1 cannot write: its file's name is taken by a folder."""
    trainer = place.trainer(cfg)
    if place.rank == 0:
        (directory / "__1_0.distcp").mkdir(parents=True)
    torch.distributed.barrier()
    with pytest.raises(OSError, match=r"could not be written to.*: rank 1: .*Is a directory"):
        save(trainer, directory)
    assert not (directory / "metadata.json").exists()


def test_every_rank_hears_of_a_failed_write(ranks, models, tmp_path):
    ranks.run(fail_to_write, 2, make_cfg(models["qwen3"], tensor_parallel=2), tmp_path / "shards")


def train_while_it_is_held(place, cfg, batches, directory):
    """(weights when the snapshot was taken, weights and addresses that a load of it gives), with updates between snapshot and write."""
    from slime.trainer import shards, step
    from slime.trainer.host_buffers import HostBuffers

    trainer = place.trainer(cfg)
    step.train_batch(trainer, batches[0])
    held = weights(trainer)
    held = {name: tensor.clone() for name, tensor in held.items()}
    snapshot = shards.snapshot(trainer, directory, HostBuffers(pinned=trainer.device.torch.type == "cuda"))
    own = {t.untyped_storage().data_ptr() for stage in trainer.model.stages for t in (*stage.parameters(), *stage.module.buffers())}
    taken = {data.untyped_storage().data_ptr() for _, data in snapshot.items if isinstance(data, torch.Tensor)}
    assert not own & taken, "the snapshot is memory of the model"
    straight = step.train_batch(trainer, batches[1])["train/grad_norm"]
    files = snapshot.write()
    resumed = place.trainer(cfg)
    shards.load(resumed, directory)
    loaded = weights(resumed)
    return held, loaded, straight == step.train_batch(resumed, batches[1])["train/grad_norm"], files, snapshot.host_bytes


@pytest.mark.parametrize(("world", "tp"), [(2, 1), (1, 1)])
def test_what_is_written_is_what_was_held_whatever_was_trained_since(ranks, models, tmp_path, world, tp):
    from slime.observe.hashed import read_hashed

    cfg = make_cfg(models["qwen3"], "bf16", tensor_parallel=tp)
    answers = ranks.run(train_while_it_is_held, world, cfg, [make_batch(vocab=77, seed=seed) for seed in range(2)], tmp_path)
    held, loaded, _, _, _ = answers[0]
    assert held and all(torch.equal(tensor, loaded[name]) for name, tensor in held.items())
    assert all(same for _, _, same, _, _ in answers)
    files = {name: file for _, _, _, found, _ in answers for name, file in found.items()}
    assert files.keys() == {path.name for path in tmp_path.iterdir()}
    for name, file in files.items():
        assert file == read_hashed(tmp_path / name)
    elements = sum(tensor.numel() for tensor in held.values())
    assert answers[0][4] == pytest.approx(14 * elements, rel=0.05), "two bytes of weights and three fp32 numbers a parameter"
    assert sum(answer[4] for answer in answers[1:]) < elements, "the ranks that hold the same write nothing"


def load_torn(place, cfg, directory):
    from slime.trainer import shards

    trainer = place.trainer(cfg)
    save(trainer, directory)
    for file in directory.glob(f"__{place.rank}_*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    torch.distributed.barrier()
    with pytest.raises(OSError, match=r"could not be read from"):
        shards.load(trainer, directory)


def test_a_torn_file_is_an_error_on_every_rank(ranks, models, tmp_path):
    ranks.run(load_torn, 2, make_cfg(models["qwen3"]), tmp_path)


def judged(place, cfg, batches, resume=None, keep=None):
    """Updates of policy and critic on the same ranks, from `resume` on; saved into `keep` after the last but two. Returns the weights of
    both, and what the critic reported."""
    from slime.trainer import critic, shards, step

    trainer = with_dropout(place.trainer(cfg))
    judge = with_dropout(place.critic(cfg, trainer))
    both, reports = {"trainer": trainer, "critic": judge}, []
    if resume is not None:
        for name, trained in both.items():
            shards.load(trained, resume / name)
    for left, batch in zip(range(len(batches), 0, -1), batches, strict=True):
        if left == 2 and keep is not None:
            for name, trained in both.items():
                save(trained, keep / name)
        values = critic.values(judge, batch)
        _, returns = step.train_beside(trainer, batch, values, judge.version >= cfg.critic.warmup_steps)
        reports.append(critic.learn(judge, batch, values, returns))
    return {name: weights(trained) for name, trained in both.items()}, reports, (judge.version, judge.optimizer_steps)


@pytest.mark.parametrize(
    ("world", "layout", "dtype"),
    [
        (2, {"tensor_parallel": 2}, "bf16"),
        (2, {}, "bf16"),
        pytest.param(2, {"pipeline_parallel": 2}, "fp32", marks=pytest.mark.slow),
    ],
)
def test_a_critic_resumes_to_the_bit(ranks, models, tmp_path, world, layout, dtype):
    """In the middle of its warm-up, several optimizer steps a batch."""
    cfg = make_cfg(models["qwen3_tied"], dtype, weight_decay=0.1, schedule="cosine", updates_per_batch=3, **layout)
    cfg.algorithm.name, cfg.critic.lr, cfg.critic.warmup_steps, cfg.run.steps = "ppo", 1e-2, 3, 5
    batches = [make_batch(vocab=77, seed=seed) for seed in range(4)]
    straight = ranks.run(judged, world, cfg, batches, None, tmp_path)
    resumed = ranks.run(judged, world, cfg, batches[2:], tmp_path)
    for (held, reports, counts), (again, tail, recounted) in zip(straight, resumed, strict=True):
        assert reports[2:] == tail and counts == recounted == (4, 12)
        for role, tensors in held.items():
            assert tensors.keys() == again[role].keys()
            assert all(torch.equal(tensor, again[role][name]) for name, tensor in tensors.items()), role


def judge_saved(place, cfg, batch, directory, load=False):
    """(its weights before the last of two updates, what the last reports), saved or loaded before it."""
    from slime.trainer import critic, shards

    judge = place.critic(cfg)
    returns = batch.rewards[batch.sample_of_token] * batch.loss_mask
    if load:
        shards.load(judge, directory)
    else:
        critic.learn(judge, batch, critic.values(judge, batch), returns)
        save(judge, directory)
    before = {name: tensor.clone() for name, tensor in weights(judge).items()}
    return before, critic.learn(judge, batch, critic.values(judge, batch), returns)


def test_a_critic_loads_into_another_layout(ranks, tmp_path):
    model, batch = make_tiny(tmp_path / "model", "qwen3", tied=True, vocab=77, layers=4), make_batch(vocab=77)
    written, expected = ranks.run(judge_saved, 2, make_cfg(model, tensor_parallel=2), batch, tmp_path / "critic")[0]
    for world, layout in ((1, {}), (2, {"pipeline_parallel": 2}), (2, {"context_parallel": 2})):
        read, found = ranks.run(judge_saved, world, make_cfg(model, **layout), batch, tmp_path / "critic", True)[0]
        assert all(torch.equal(tensor, read[name]) for name, tensor in written.items()), layout
        assert found == pytest.approx(expected, rel=1e-4)
