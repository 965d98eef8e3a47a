"""Teachers on the student's ranks, against transformers; and what a batch has to say of served ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from slime.algorithms.aggregation import token_weights
from slime.config.algorithm import TeacherConfig
from slime.trainer.teaching import _same_tokens
from tests.tiny import load_hf_model, make_tiny
from tests.trainer.gradients import assert_same
from tests.trainer.ranks import gradients, make_batch, make_cfg

e2e = pytest.mark.e2e
TEMPERATURE, VOCAB, K = 0.8, 77, 5
TEACHERS = ("qwen3_tied", "llama")  # of 77 ids and of 80


def recipe(models, distill, served=(), **trainer):
    cfg = make_cfg(models["qwen3"], **trainer)
    cfg.rollout.temperature = TEMPERATURE
    cfg.algorithm.name, cfg.algorithm.distill, cfg.algorithm.distill_top_k = "opd", distill, K
    cfg.algorithm.teachers = {
        name: TeacherConfig(str(models[name]), url="http://teacher:1" if name in served else None) for name in TEACHERS
    }
    return cfg


@pytest.fixture(scope="module")
def batch():
    return replace(make_batch(vocab=VOCAB), teacher=np.array([0, 1, 1, 0] * 3))


def of_sequences(model, batch, samples=None):
    """log-softmax of the logits that predict each token [T, vocabulary], of a token without context 0; of these samples alone."""
    found = []
    for i, (start, end) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
        ids = torch.from_numpy(batch.tokens[start:end].astype(np.int64))
        logits = model(ids[None]).logits[0, :-1] / TEMPERATURE if samples is None or samples[i] else None
        width = model.config.vocab_size
        found.append(torch.zeros(len(ids), width) if logits is None else torch.cat([torch.zeros(1, width), logits.log_softmax(-1)]))
    return torch.cat(found)


@pytest.fixture(scope="module")
def theirs(models, batch):
    """The teachers' log-probs [T, 77], each of its own samples; over all of its ids, and over those that the student knows too."""
    with torch.no_grad():
        whole = [of_sequences(load_hf_model(models[name]), batch, batch.teacher == number) for number, name in enumerate(TEACHERS)]
    common = [x[:, :VOCAB].log_softmax(-1) * (x != 0).any(-1, keepdim=True) for x in whole]
    return sum(x[:, :VOCAB] for x in whole), sum(common)


def said(place, cfg, batch):
    from slime.trainer import teaching

    return teaching.ask_teachers(place.trainer(cfg), batch)


@e2e
@pytest.mark.parametrize(("world", "knobs"), [(1, {}), (4, {"tensor_parallel": 2, "pipeline_parallel": 2})])
def test_each_teacher_speaks_of_its_own_samples(ranks, models, batch, theirs, world, knobs) -> None:
    mask, labels = batch.loss_mask, torch.from_numpy(batch.tokens.astype(np.int64))
    expected = theirs[0].gather(1, labels[:, None])[:, 0].numpy()
    for found in ranks.run(said, world, recipe(models, "sampled", **knobs), batch):
        assert np.abs(found.logprobs - expected)[mask].max() < 1e-4 and not found.logprobs[~mask].any()
    for found in ranks.run(said, world, recipe(models, "topk", **knobs), batch):
        values, ids = theirs[0][torch.from_numpy(mask)].topk(K)
        np.testing.assert_array_equal(found.ids[mask], ids)
        np.testing.assert_allclose(found.known[mask][:, :K], values, atol=1e-4)
        np.testing.assert_allclose(np.exp(found.known[mask]).sum(-1), 1, atol=1e-5)  # with the tail


def gradient_of(place, cfg, batch):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    columns = step.prepare(trainer, batch)[2]
    sums, _ = step.accumulate_gradients(trainer, batch, trainer.micro_batches(batch), columns)
    trainer.model.optimizer.prepare_grads()
    return sums["loss"], gradients(trainer), trainer.model.optimizer.get_grad_norm()


def reverse_kl(student, teacher):
    return (student.exp() * (student - teacher)).sum(-1)


@e2e
@pytest.mark.parametrize("distill", ["full", "topk"])
def test_the_loss_is_the_divergence_from_the_teacher_of_each_sample(ranks, models, batch, theirs, distill) -> None:
    """And its gradient that of autograd; the teacher of 80 ids counts as far as the student knows them."""
    model = load_hf_model(models["qwen3"])
    student, teacher = of_sequences(model, batch), theirs[distill == "full"]
    if distill == "topk":
        ids = teacher.topk(K).indices
        parts = [torch.cat([x.gather(1, ids), (1 - x.gather(1, ids).exp().sum(-1, keepdim=True)).log()], -1) for x in (student, teacher)]
        student, teacher = parts
    mask = torch.from_numpy(batch.loss_mask)
    weights = torch.from_numpy(token_weights(batch, "token", 40)).float()
    loss = (weights[mask] * reverse_kl(student[mask], teacher[mask])).sum()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    assert_same(ranks.run(gradient_of, 1, recipe(models, distill), batch)[0], (loss.item(), expected, norm), tolerance=1e-4)


def trained(place, cfg, batch):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    return step.train_batch(trainer, batch)


@e2e
def test_a_step_reports_how_far_the_student_is_from_each_teacher(ranks, models, batch, theirs) -> None:
    found = ranks.run(trained, 1, recipe(models, "sampled"), batch)[0]
    with torch.no_grad():
        student = of_sequences(load_hf_model(models["qwen3"]), batch)
    labels = torch.from_numpy(batch.tokens.astype(np.int64))[:, None]
    ahead = (student - theirs[0]).gather(1, labels)[:, 0].numpy()
    own = batch.teacher[batch.sample_of_token]
    assert found["distill/reverse_kl"] == pytest.approx(ahead[batch.loss_mask].mean(), abs=1e-4)
    for number, name in enumerate(TEACHERS):
        assert found[f"distill/{name}/reverse_kl"] == pytest.approx(ahead[batch.loss_mask & (own == number)].mean(), abs=1e-4)
    assert found["advantage/mean"] == pytest.approx(-found["distill/reverse_kl"], abs=1e-5)


@e2e
def test_a_served_teacher_has_said_it_before(ranks, models, batch) -> None:
    """Beside one that is held: each speaks of its own."""
    held = ranks.run(said, 1, recipe(models, "sampled"), batch)[0]
    spoken = replace(batch, teacher_logprobs=np.where(batch.loss_mask, -1.5, 0).astype(np.float32))
    found = ranks.run(said, 1, recipe(models, "sampled", served=("llama",)), spoken)[0]
    own = batch.loss_mask & (batch.teacher == 1)[batch.sample_of_token]
    assert (found.logprobs[own] == -1.5).all()
    np.testing.assert_array_equal(found.logprobs[~own], held.logprobs[~own])


def bits(said):
    """What was said, float32 as int32: -0.0 and 0.0 differ."""
    return [None if x is None else x.view(np.int32) if x.dtype == np.float32 else x for x in (said.logprobs, said.ids, said.known)]


def read_at_several_moments(place, cfg, batch, moments):
    """What teachers say where those groups (positions, in the order in which they were finished) were read ahead, a call for each list; how
    many were left to the update; and whether anything is kept after it."""
    from slime.trainer import teaching

    trainer = place.trainer(cfg)
    groups = [batch.select(np.flatnonzero(batch.group == ordinal)) for ordinal in np.unique(batch.group)]
    found = []
    for calls in moments:
        for call in calls:
            teaching.read_ahead(trainer, [groups[position] for position in call])
        trainer.tracer.drain()
        said = teaching.ask_teachers(trainer, batch)
        left = sum(span.args["groups"] for span in trainer.tracer.drain() if span.name == "held_teacher")
        found.append((bits(said), left, len(trainer.heard)))
    return found


MOMENTS = [[], [[2], [0]], [[1, 5, 3], [], [4]], [[5, 4, 3, 2, 1, 0]]]
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {  # what shares a row, who computes it and what it meets there
    "rows": ("sampled", 1, {"max_tokens_per_rank": 50}),
    "DP2": ("topk", 2, {}),
    "TP2 x PP2": ("sampled", 4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "CP2 x PP2 x VPP2": ("topk", 4, {"context_parallel": 2, "pipeline_parallel": 2, "megatron": VPP2}),
    "EP2": ("sampled", 2, {"expert_parallel": 2}),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Models with experts, each of which sees few tokens: products whose bits depend on how many these are."""
    folder = tmp_path_factory.mktemp("experts")
    return {name: make_tiny(folder / name, "qwen3_moe", vocab=VOCAB, layers=4, seed=k) for k, name in enumerate(("qwen3", *TEACHERS))}


@e2e
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_said_of_a_group_has_the_same_bits_whenever_and_with_whichever_others_it_is_read(ranks, experts, layout) -> None:
    distill, world, knobs = LAYOUTS[layout]
    batch = replace(make_batch(24, vocab=VOCAB, seed=3), teacher=np.array([0, 1, 1, 0, 1, 1, 1, 1] * 3))
    for found in ranks.run(read_at_several_moments, world, recipe(experts, distill, **knobs), batch, MOMENTS):
        assert [left for _, left, _ in found] == [6, 4, 2, 0] and [kept for *_, kept in found] == [0] * 4
        never = found[0][0]
        assert any(x is not None and x.any() for x in never)
        for said, *_ in found[1:]:
            for ours, theirs in zip(said, never, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def refusal(place, cfg, batch):
    from slime.trainer import teaching

    with pytest.raises(ValueError) as error:
        teaching.ask_teachers(place.trainer(cfg), batch)
    return str(error.value)


@e2e
def test_a_batch_that_does_not_say_what_is_needed_is_refused(ranks, models, batch) -> None:
    nobody = ranks.run(refusal, 1, recipe(models, "sampled"), replace(batch, teacher=None))[0]
    assert nobody == "the batch does not say who of qwen3_tied, llama teaches its samples: generate it with algorithm.teachers"
    silent = ranks.run(refusal, 1, recipe(models, "topk", served=("llama",)), batch)[0]
    assert silent.startswith("the batch does not hold what algorithm.distill=topk asks of llama: generate it with this recipe")


def test_the_same_tokens_are_found_in_both_rows() -> None:
    ours, theirs = np.array([7, 3, 9, 1]), np.array([1, 7])
    at, of = _same_tokens(ours, theirs)
    assert (ours[at] == theirs).all() and of.tolist() == [0, 1]
    with pytest.raises(AssertionError, match="the same tokens"):
        _same_tokens(ours, np.array([1, 8]))
