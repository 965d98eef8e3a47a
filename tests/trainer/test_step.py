"""A step against transformers, and the same gradient however the update is cut, ordered and laid out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from slime.algorithms.base import Algorithm, LossOutputs
from slime.types import NO_VERSION, Batch
from tests.algorithms.local import LocalSequences
from tests.tiny import load_hf_model
from tests.trainer.gradients import assert_same, gradient, grpo_cfg, log_probs, noisy_old
from tests.trainer.ranks import make_batch, make_cfg, weights

pytestmark = pytest.mark.e2e
KINDS = ["qwen3", "qwen3_tied", pytest.param("llama", marks=pytest.mark.slow)]


def reference_logprobs(model, batch: Batch, temperature: float):
    """(log-probs [T], entropy [T]) of trained tokens by transformers, sequence by sequence, with gradient."""
    logprobs, entropies = [], []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        ids = torch.from_numpy(batch.tokens[start:end].astype(np.int64))
        logp = (model(ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        zero = torch.zeros(1)
        logprobs.append(torch.cat([zero, logp.gather(1, ids[1:, None])[:, 0]]))
        entropies.append(torch.cat([zero, -(logp.exp() * logp).sum(-1)]))
    mask = torch.from_numpy(batch.loss_mask)
    return torch.cat(logprobs) * mask, torch.cat(entropies) * mask


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_transformers(ranks, models, kind):
    cfg, batch = grpo_cfg(models[kind], max_tokens_per_rank=50), make_batch(vocab=77)
    with torch.no_grad():
        expected, _ = reference_logprobs(load_hf_model(models[kind]), batch, 0.8)
    for found in ranks.run(log_probs, 1, cfg, batch):
        assert np.abs(found - expected.numpy()).max() <= 1e-5
        assert (found[~batch.loss_mask] == 0).all()


def test_bf16_log_probs_are_close(ranks, models):
    """0.008 to 0.0095 over 4 random models: their tokens have log-probs near -4.7, so that a logit rounds by up to 2^-7. (Those of a model
    that has learnt something are near 0: recipes/quickstart_bf16.yaml stops at 0.005.) With an fp32 slip to bf16 log-softmax: 0.0127."""
    cfg, batch = make_cfg(models["qwen3"], "bf16"), make_batch(vocab=77)
    with torch.no_grad():
        expected, _ = reference_logprobs(load_hf_model(models["qwen3"]), batch, 1.0)
    assert np.abs(ranks.run(log_probs, 1, cfg, batch)[0] - expected.numpy())[batch.loss_mask].mean() < 0.011


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_autograd(ranks, models, kind):
    from slime.algorithms.aggregation import token_weights
    from slime.algorithms.base import LossInputs, Step
    from slime.algorithms.registry import build_algorithm

    cfg, batch = grpo_cfg(models[kind]), make_batch(vocab=77)
    model = load_hf_model(models[kind])
    logprobs, entropy = reference_logprobs(model, batch, 0.8)
    old = noisy_old(batch, logprobs.detach().numpy())
    algorithm = build_algorithm(cfg.algorithm)
    advantages = torch.from_numpy(algorithm.targets(Step(batch)).advantages).float()
    rollout = torch.from_numpy(batch.rollout_logprobs)
    sequences = LocalSequences(torch.from_numpy(batch.sample_of_token))
    losses = algorithm.loss(LossInputs(logprobs, torch.from_numpy(old), entropy, advantages, rollout, sequences)).loss
    loss = (torch.from_numpy(token_weights(batch, "sequence", 40)).float() * losses).sum()
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    assert_same(ranks.run(gradient, 1, cfg, batch, old)[0], (loss.item(), expected, norm))


@pytest.mark.parametrize(
    ("kind", "aggregation"),
    [
        ("qwen3_tied", "sequence"),
        ("qwen3", "token"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("qwen3", "sequence"), ("llama", "sequence"), ("qwen3", "constant"))),
    ],
)
def test_gradient_does_not_depend_on_cut_order_or_layout(ranks, models, kind, aggregation):
    cfg, batch = grpo_cfg(models[kind], aggregation), make_batch(samples=16, vocab=77)
    old = noisy_old(batch, ranks.run(log_probs, 1, cfg, batch)[0])
    expected = ranks.run(gradient, 1, cfg, batch, old)[0]

    def with_(world, **trainer):
        return ranks.run(gradient, world, grpo_cfg(models[kind], aggregation, **trainer), batch, old)[0]

    for budget in (1, 40, 100):
        assert_same(with_(1, max_tokens_per_rank=budget), expected)
    assert_same(ranks.run(gradient, 1, cfg, batch, old, 5)[0], expected)
    order = np.random.default_rng(2).permutation(len(batch))
    spans = np.concatenate([np.arange(batch.cu_seqlens[i], batch.cu_seqlens[i + 1]) for i in order])
    assert_same(ranks.run(gradient, 1, cfg, batch.select(order), old[spans])[0], expected)
    assert_same(with_(2, max_tokens_per_rank=60), expected)
    assert_same(with_(2, max_tokens_per_rank=60, tensor_parallel=2), expected)
    assert_same(with_(4, max_tokens_per_rank=60, tensor_parallel=2), expected)


def test_more_ranks_than_sequences(ranks, models):
    cfg, batch = grpo_cfg(models["qwen3"]), make_batch(samples=1, vocab=77, shortest=30)
    batch.rewards[:] = 1.0
    old = np.zeros(len(batch.tokens), np.float32)
    assert_same(ranks.run(gradient, 2, cfg, batch, old)[0], ranks.run(gradient, 1, cfg, batch, old)[0])


def train(place, cfg, batch, steps=1):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    return [step.train_batch(trainer, batch) for _ in range(steps)], weights(trainer)


def test_metrics_of_a_batch(ranks, models):
    cfg, batch = grpo_cfg(models["qwen3"], max_tokens_per_rank=100, warmup_steps=2), make_batch(vocab=77)
    (first, second), _ = ranks.run(train, 2, cfg, batch, 2)[0]
    assert first["train/kl"] == first["train/clip_frac"] == 0.0
    assert first["train/lr"] == 5e-4 and second["train/lr"] == 1e-3
    assert first["train/tokens"] == batch.loss_mask.sum()
    assert first["train/loss"] == pytest.approx(first["train/pg_loss"] - 0.1 * first["train/entropy"], abs=1e-6)
    expected = ranks.run(log_probs, 1, cfg, batch)[0]
    mismatch = np.abs(expected - batch.rollout_logprobs)[batch.loss_mask].mean()
    assert first["mismatch/logprob_abs_diff"] == pytest.approx(mismatch, rel=1e-5)
    assert first["staleness/max"] == 0.0 and 0 < first["offpolicy/ess"] < 1
    assert first["offpolicy/kl"] == first["mismatch/kl"], "one version drew the batch"
    assert second["staleness/mean"] == 1.0 and "mismatch/kl" not in second, "the batch is of version 0, the weights are 1"
    assert second["offpolicy/kl"] != first["offpolicy/kl"]
    assert {"advantage/mean", "advantage/std", "perf/tokens_per_s", "time/train_s", "train/grad_norm"} <= first.keys()
    assert not {"perf/mfu", "perf/gpu_mem_gb", "perf/tokens_per_s_per_gpu"} & first.keys(), "of GPUs"


def test_every_rank_reports_the_same(ranks, models):
    batch = make_batch(samples=16, vocab=77)
    batch.version[:] = np.arange(16) % 2 - 1
    cfg = grpo_cfg(models["qwen3"], max_tokens_per_rank=60, tensor_parallel=2)
    reports = [
        {k: v for k, v in metrics.items() if k.split("/")[0] not in ("time", "perf")} for (metrics,), _ in ranks.run(train, 4, cfg, batch)
    ]
    assert reports == [reports[0]] * 4
    assert {"mismatch/kl", "offpolicy/ess", "staleness/max"} <= reports[0].keys()


def test_a_log_prob_that_is_not_a_number_shows_in_every_comparison(ranks, models):
    batch = make_batch(vocab=77)
    batch.rollout_logprobs[np.flatnonzero(batch.loss_mask)[0]] = np.nan
    (found,), _ = ranks.run(train, 1, grpo_cfg(models["qwen3"]), batch)[0]
    assert all(np.isnan(value) for name, value in found.items() if name.startswith(("mismatch/", "offpolicy/")))


def test_several_updates_use_log_probs_from_before_the_batch(ranks, models):
    batch = make_batch(vocab=77)
    (one,), _ = ranks.run(train, 1, grpo_cfg(models["qwen3"]), batch)[0]
    (many,), _ = ranks.run(train, 1, grpo_cfg(models["qwen3"], updates_per_batch=3, epochs_per_batch=2, lr=1e-2), batch)[0]
    for name in ("mismatch/logprob_abs_diff", "offpolicy/kl", "offpolicy/ess"):
        assert many[name] == pytest.approx(one[name], rel=1e-5)
    assert many["train/kl"] > 0 and many["train/micro_batches"] == 6
    assert many["train/tokens"] == 2 * one["train/tokens"]
    assert many["staleness/max"] == 0.0


@pytest.mark.parametrize("updates", [1, 3])
def test_the_loss_of_normalised_weights_is_that_of_the_whole_batch(ranks, models, updates):
    """On two ranks, in micro-batches: at ratio 1, the mean over an update's tokens of -A w / (mean of w over the batch)."""
    cfg, batch = grpo_cfg(models["qwen3"], "token", updates_per_batch=updates, max_tokens_per_rank=60, lr=0.0), make_batch(vocab=77)
    cfg.algorithm.entropy_coef, cfg.algorithm.normalize = 0.0, False
    logprobs = ranks.run(log_probs, 1, cfg, batch)[0]
    noise = np.random.default_rng(3).normal(0, 0.3, len(logprobs))
    batch = replace(batch, rollout_logprobs=((logprobs + noise) * batch.loss_mask).astype(np.float32))
    ratios, sample = np.exp(logprobs.astype(np.float64) - batch.rollout_logprobs), batch.sample_of_token
    lowest = np.array([ratios[batch.loss_mask & (sample == n)].min(initial=np.inf) for n in range(len(batch))])
    w = np.where(lowest[sample] < 0.65, 0.0, np.minimum(ratios, 1.2))
    of_group = np.array([batch.rewards[batch.group == group].mean() for group in batch.group])
    advantages = (batch.rewards - of_group)[sample]
    parts = [batch.loss_mask & (batch.group == group)[sample] for group in np.unique(batch.group)] if updates > 1 else [batch.loss_mask]
    expected = np.mean([(-advantages * w)[part].mean() for part in parts]) / w[batch.loss_mask].mean()
    cfg.algorithm.importance, cfg.algorithm.importance_high = "token", 1.2
    cfg.algorithm.importance_reject, cfg.algorithm.importance_normalize = {"lowest": [0.65, np.inf]}, True
    (found,), _ = ranks.run(train, 2, cfg, batch)[0]
    assert 0.2 < found["train/importance_rejected_frac"] < 0.9 and w[batch.loss_mask].mean() < 0.8
    assert found["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert found["train/importance"] == pytest.approx(np.mean([w[part].mean() for part in parts]), rel=1e-5)


def train_without_old(place, cfg, batch):
    """Two batches of an algorithm that reads no old log-probs; a forward pass for them would fail."""
    from slime.trainer import step

    trainer = place.trainer(cfg)
    trainer.algorithm = replace(trainer.algorithm, uses_old_logprobs=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(step, "log_probs")
        return [step.train_batch(trainer, replace(batch, version=batch.version + k)) for k in range(2)]


@pytest.mark.parametrize(("updates", "epochs"), [(3, 2), (1, 2)])
def test_an_algorithm_that_reads_no_old_log_probs_does_not_pay_for_them(ranks, models, updates, epochs):
    cfg, batch = grpo_cfg(models["qwen3"], updates_per_batch=updates, epochs_per_batch=epochs), make_batch(vocab=77)
    first, second = ranks.run(train_without_old, 1, cfg, batch)[0]
    seen = batch.select(np.arange(len(batch) // updates))  # by the first update
    expected = ranks.run(log_probs, 1, cfg, seen)[0]
    drift = np.abs(expected - seen.rollout_logprobs)[seen.loss_mask].mean()
    assert first["mismatch/logprob_abs_diff"] == pytest.approx(drift, rel=1e-5)
    assert first["train/kl"] == 0.0, "old log-probs are the current ones"
    assert second["staleness/max"] == 0.0 and "mismatch/kl" in second, "a version is a batch, however many steps"


def test_demonstrations_are_learnt_at_temperature_1(ranks, models):
    batch = make_batch(vocab=77)
    batch.version[:] = NO_VERSION
    cfg = grpo_cfg(models["qwen3"], "token")
    cfg.algorithm.name, cfg.algorithm.entropy_coef = "sft", 0.0
    with torch.no_grad():
        expected, _ = reference_logprobs(load_hf_model(models["qwen3"]), batch, 1.0)
    (found,), _ = ranks.run(train, 1, cfg, batch)[0]
    assert found["train/nll"] == pytest.approx(-expected.numpy()[batch.loss_mask].mean(), rel=1e-5)
    assert not [name for name in found if name.startswith(("mismatch/", "offpolicy/", "staleness/"))]


def zero_advantages(place, cfg, batch):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    before = weights(trainer)
    step.train_batch(trainer, replace(batch, rewards=np.ones(len(batch))))
    return before, weights(trainer)


def test_weight_decay_spares_norms(ranks, models):
    cfg = make_cfg(models["qwen3"], lr=0.1, weight_decay=0.5)
    before, after = ranks.run(zero_advantages, 1, cfg, make_batch(vocab=77))[0]
    for name, old in before.items():
        torch.testing.assert_close(after[name], old if old.ndim == 1 else old * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)


def nothing_to_train_on(place, cfg, batch):
    """Whether a second batch, of which one update's samples are all masked, moved policy or critic."""
    from slime.trainer import critic, step

    trainer = place.trainer(cfg)
    judge = place.critic(cfg, trainer)
    values = critic.values(judge, batch)
    _, returns = step.train_beside(trainer, batch, values, True)
    critic.learn(judge, batch, values, returns)
    before = [{name: t.clone() for name, t in weights(trained).items()} for trained in (trainer, judge)]
    masked = replace(batch, loss_mask=batch.loss_mask & (batch.group != batch.group[-1])[batch.sample_of_token])
    says = r"optimizer step 3 of 3 has 4 samples and no token that is trained"
    with pytest.raises(ValueError, match=says):
        step.train_beside(trainer, masked, values, True)
    with pytest.raises(ValueError, match=says):
        critic.learn(judge, masked, values, returns)
    return all(
        torch.equal(t, held[name]) for trained, held in zip((trainer, judge), before, strict=True) for name, t in weights(trained).items()
    )


def test_momentum_and_weight_decay_alone_move_nothing(ranks, models):
    cfg = grpo_cfg(models["qwen3"], updates_per_batch=3, weight_decay=0.5)
    cfg.algorithm.name = "ppo"
    assert ranks.run(nothing_to_train_on, 1, cfg, make_batch(vocab=77))[0] is True


def refused(place, cfg, batch, spoil, after, says):
    """Train with the loss that `spoil` makes after `after` optimizer steps; returns whether the weights stayed, and what may follow."""
    from slime.config.exits import NotFinite
    from slime.trainer import step

    trainer = place.trainer(cfg)
    algorithm = trainer.algorithm

    def loss(x):
        bad = trainer.optimizer_steps == after
        return LossOutputs(spoil(x.logprobs) if bad else x.logprobs, {})

    held = {}
    trainer.algorithm = Algorithm(algorithm.targets, loss)
    finished = trainer.model.optimizer.step_with_ready_grads
    trainer.model.optimizer.step_with_ready_grads = lambda: (finished(), held.update(weights(trainer)))
    held.update(weights(trainer))
    with pytest.raises(NotFinite, match=says):
        step.train_batch(trainer, batch)
    same = all(torch.equal(t, held[name]) for name, t in weights(trainer).items())
    trainer.algorithm, trainer.model.optimizer.step_with_ready_grads = algorithm, finished
    return same, trainer.optimizer_steps, step.train_batch(trainer, batch)["train/grad_norm"]


def nan(logprobs):
    return logprobs * float("nan")


def infinite_constant(logprobs):
    """A loss that is not finite although its gradient is."""
    return logprobs + float("inf")


def test_a_loss_or_gradient_that_is_not_finite_is_refused_on_every_rank(ranks, models):
    says = r"update 1: the loss is nan and the gradient has norm nan; the step was not taken\. .*trainer\.lr"
    for world, tp in ((1, 1), (2, 1), (2, 2)):
        cfg = grpo_cfg(models["qwen3"], tensor_parallel=tp)
        for same, steps, norm in ranks.run(refused, world, cfg, make_batch(vocab=77), nan, 0, says):
            assert same and steps == 0 and np.isfinite(norm)
    says = r"update 1: the loss is inf and the gradient has norm [\d.]+; the step was not taken"
    assert ranks.run(refused, 1, grpo_cfg(models["qwen3"]), make_batch(vocab=77), infinite_constant, 0, says)[0][:2] == (True, 0)


def test_optimizer_steps_that_a_batch_has_taken_before_are_told(ranks, models):
    cfg = grpo_cfg(models["qwen3"], updates_per_batch=2)
    says = r"update 1, optimizer step 2 of 2: .*; the step was not taken \(the 1 before it on this batch were: only the last checkpoint "
    assert ranks.run(refused, 1, cfg, make_batch(vocab=77), nan, 1, says)[0][:2] == (True, 1)


def dtypes(place, cfg, batch):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    step.train_batch(trainer, batch)
    mains = [p for group in trainer.model.optimizer.param_groups for p in group["params"]]
    return (
        {p.dtype for p in trainer.model.stages[0].parameters()},
        {p.main_grad.dtype for p in trainer.model.stages[0].parameters()},
        {p.dtype for p in mains},
    )


def test_bf16_keeps_gradients_and_main_weights_in_fp32(ranks, models):
    found = ranks.run(dtypes, 2, make_cfg(models["qwen3"], "bf16"), make_batch(vocab=77))[0]
    assert found == ({torch.bfloat16}, {torch.float32}, {torch.float32})
