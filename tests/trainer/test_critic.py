"""The critic against transformers and autograd in float64, in every layout, and beside the policy that it warms up for."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slime.config import CriticConfig
from slime.config.of_critic import of_critic, optimizer_steps
from slime.models.registry import load_map
from slime.models.value import HEAD, OUTPUT, value_map
from tests.tiny import load_hf_model, make_tiny
from tests.trainer.gradients import assert_same
from tests.trainer.ranks import gradients, make_batch, make_cfg, weights, with_experts
from tests.trainer.test_layouts import LAYOUTS, applies

pytestmark = pytest.mark.e2e
HIDDEN = 64


def ppo_cfg(path, dtype="fp32", **trainer):
    """Values are no log-probs: a temperature that would show."""
    cfg = make_cfg(path, dtype, **trainer)
    cfg.algorithm.name, cfg.rollout.temperature, cfg.critic.lr = "ppo", 0.5, 1e-2
    return cfg


def head(seed=3):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.3, (1, HIDDEN)).astype(np.float32))


def with_head(critic):
    """A head that is not 0, so that its gradient reaches the trunk."""
    with torch.no_grad():
        for name, parameter in critic.model.parameters():
            if name == OUTPUT:
                parameter.copy_(head())
    return critic


def targets_of(batch, seed=4):
    """(old values, returns) of the trained tokens, far enough from each other that the bound holds some."""
    g = np.random.default_rng(seed)
    old, returns = g.normal(0, 1, len(batch.tokens)), g.normal(0.5, 1, len(batch.tokens))
    return (old * batch.loss_mask).astype(np.float32), returns * batch.loss_mask


def reference_values(path, batch, dtype=torch.float64):
    """(values [T] by transformers' trunk and a head, sequence by sequence, with gradient; trunk, head)."""
    trunk, weight = load_hf_model(path).to(dtype).model, head().to(dtype).requires_grad_()
    found = []
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        ids = torch.from_numpy(batch.tokens[start:end].astype(np.int64))
        hidden = trunk(ids[None]).last_hidden_state[0]
        found.append(torch.cat([torch.zeros(1), hidden[:-1] @ weight[0]]))  # a token's value is of the one before it
    return torch.cat(found) * torch.from_numpy(batch.loss_mask), trunk, weight


def values_of(place, cfg, batch):
    from slime.trainer import critic

    return critic.values(with_head(place.critic(cfg)), batch)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_tied"])
def test_values_are_those_of_the_trunk_and_no_temperature_divides_them(ranks, models, kind):
    """slime's first critic divided its values by the temperature of sampling, as if they were logits (THUDM/slime#1928)."""
    cfg, batch = ppo_cfg(models[kind], max_tokens_per_rank=50), make_batch(vocab=77)
    with torch.no_grad():
        expected, _, _ = reference_values(models[kind], batch)
    for found in ranks.run(values_of, 1, cfg, batch):
        assert found.dtype == np.float32 and np.abs(found - expected.numpy()).max() <= 1e-5
        assert (found[~batch.loss_mask] == 0).all() and np.abs(found[batch.loss_mask]).min() > 0


def test_bf16_values_are_fp32_numbers(ranks, models):
    """bf16 would leave three digits of them. As close to float64 as transformers' own in bf16."""
    batch = make_batch(vocab=77)
    found = ranks.run(values_of, 1, ppo_cfg(models["qwen3"], "bf16"), batch)[0]
    with torch.no_grad():
        expected, _, _ = reference_values(models["qwen3"], batch)
        rounded, _, _ = reference_values(models["qwen3"], batch, torch.bfloat16)
    assert np.abs(found - expected.numpy()).max() < 1.5 * (rounded - expected).abs().max()
    rounded = torch.from_numpy(found).bfloat16().float().numpy()
    assert (found != rounded)[batch.loss_mask].mean() > 0.9


def gradient(place, cfg, batch, old, returns):
    """(loss, HF-space gradient, its norm by the optimizer) of one update."""
    from slime.trainer import critic

    made = with_head(place.critic(cfg))
    sums = critic.accumulate_gradients(made, batch, made.micro_batches(batch), old, returns)
    made.model.optimizer.prepare_grads()
    return sums["loss"], gradients(made), made.model.optimizer.get_grad_norm()


@pytest.mark.parametrize(("kind", "clip"), [("qwen3", 0.2), ("qwen3_tied", None)])
def test_gradient_is_that_of_autograd(ranks, models, kind, clip):
    cfg, batch = ppo_cfg(models[kind]), make_batch(vocab=77)
    cfg.critic.value_clip = clip
    old, returns = targets_of(batch)
    values, trunk, weight = reference_values(models[kind], batch)
    v, v_old, r = (x[torch.from_numpy(batch.loss_mask)] for x in (values, torch.from_numpy(old).double(), torch.from_numpy(returns)))
    losses = (v - r) ** 2
    if clip:
        losses = torch.maximum(losses, (v_old + torch.clamp(v - v_old, -clip, clip) - r) ** 2)
    loss = losses.mean()  # over the trained tokens; no half
    loss.backward()
    expected = {f"model.{name}": p.grad.float() for name, p in trunk.named_parameters()} | {HEAD: weight.grad.float()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    assert_same(ranks.run(gradient, 1, cfg, batch, old, returns)[0], (loss.item(), expected, norm))


ALWAYS = {("qwen3", name) for name in LAYOUTS} | {("deepseek_v3", name) for name in ("TP2+SP", "PP2", "EP2", "TP2 x EP2 x ETP1")}
CASES = [
    pytest.param(family, layout, id=f"{family}-{layout}", marks=() if (family, layout) in ALWAYS else pytest.mark.slow)
    for family in ("qwen3", "deepseek_v3")
    for layout in LAYOUTS
    if applies(family, layout)
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Four layers; a vocabulary that no layout divides; qwen3 tied, whose critic is not."""
    root = tmp_path_factory.mktemp("deep_critics")
    return {family: make_tiny(root / family, family, tied=family == "qwen3", vocab=77, layers=4) for family in ("qwen3", "deepseek_v3")}


@pytest.fixture(scope="module")
def alone(ranks, deep):
    """The update of one process, by family, as it is asked for."""
    batch, found = make_batch(samples=8, vocab=77), {}

    def of(family):
        if family not in found:
            found[family] = ranks.run(gradient, 1, ppo_cfg(deep[family]), batch, *targets_of(batch))[0]
        return batch, found[family]

    return of


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_a_layout_gives_the_gradient_of_one_process(ranks, deep, alone, family, layout, record_property):
    batch, expected = alone(family)
    world, knobs = LAYOUTS[layout]
    found = ranks.run(gradient, world, ppo_cfg(deep[family], max_tokens_per_rank=60, **knobs), batch, *targets_of(batch))
    record_property("worst gradient", assert_same(found[0], expected))
    assert len({(loss, norm) for loss, _, norm in found}) == 1, "ranks report different losses"


@pytest.mark.parametrize("budget", [1, 40, 100])
def test_gradient_does_not_depend_on_how_the_update_is_cut(ranks, deep, alone, budget):
    batch, expected = alone("qwen3")
    assert_same(ranks.run(gradient, 1, ppo_cfg(deep["qwen3"], max_tokens_per_rank=budget), batch, *targets_of(batch))[0], expected)


def test_values_reach_every_rank(ranks, deep):
    batch = make_batch(samples=8, vocab=77)
    expected = ranks.run(values_of, 1, ppo_cfg(deep["qwen3"]), batch)[0]
    for layout in ("PP2 x VPP2", "CP2", "TP2 x PP2"):
        world, knobs = LAYOUTS[layout]
        for found in ranks.run(values_of, world, ppo_cfg(deep["qwen3"], **knobs), batch):
            assert np.abs(found - expected).max() <= 1e-5


def test_it_chooses_its_own_experts(ranks, deep):
    batch = make_batch(samples=8, vocab=77)
    routed = with_experts(batch, load_map(deep["deepseek_v3"]).routing)
    own, beside_routes = (ranks.run(values_of, 1, ppo_cfg(deep["deepseek_v3"]), b)[0] for b in (batch, routed))
    assert np.abs(own - beside_routes).max() <= 1e-5 < np.abs(own).max()  # not to the bit: a GPU adds what experts give in no fixed order


def learned(place, cfg, batch, returns, batches):
    """What it reports of each of several passes over one batch, and how it is left."""
    from slime.trainer import critic

    made, reports = place.critic(cfg), []
    for _ in range(batches):
        old = critic.values(made, batch)
        reports.append({**critic.learn(made, batch, old, returns), "old": old})
    return reports, made.optimizer_steps, made.version


def test_it_begins_at_0_and_learns_the_returns(ranks, models):
    batch = make_batch(vocab=77)
    returns = targets_of(batch)[1]
    cfg = ppo_cfg(models["qwen3"], warmup_steps=2)
    (first, second, *_, last), steps, version = ranks.run(learned, 2, cfg, batch, returns, 30)[0]
    of_tokens = returns[batch.loss_mask]
    assert not first["old"].any() and first["value/mean"] == 0
    assert first["value/loss"] == pytest.approx((of_tokens**2).mean(), rel=1e-6) and first["value/clip_frac"] == 0
    assert first["value/explained_variance"] == pytest.approx(0, abs=1e-12)
    old = second["old"][batch.loss_mask].astype(np.float64)
    assert second["value/mean"] == pytest.approx(old.mean(), rel=1e-5)
    assert second["value/explained_variance"] == pytest.approx(1 - np.var(of_tokens - old) / np.var(of_tokens), rel=1e-6)
    assert (first["critic/lr"], second["critic/lr"], last["critic/lr"]) == (5e-3, 1e-2, 1e-2), "trainer.warmup_steps, at critic.lr"
    assert last["value/loss"] < first["value/loss"] / 4 and last["value/explained_variance"] > 0.5
    assert (steps, version) == (30, 30) and first["critic/grad_norm"] > 0


def test_several_updates_are_bounded_by_the_values_before_the_batch(ranks, models):
    batch = make_batch(vocab=77)
    returns = targets_of(batch)[1]
    cfg = ppo_cfg(models["qwen3"], updates_per_batch=3, epochs_per_batch=4)
    cfg.critic.value_clip = 1e-3
    (report,), steps, version = ranks.run(learned, 1, cfg, batch, returns, 1)[0]
    assert (steps, version) == (12, 1) and report["value/clip_frac"] > 0.2
    cfg.critic.value_clip = None
    (free,), _, _ = ranks.run(learned, 1, cfg, batch, returns, 1)[0]
    assert free["value/clip_frac"] == 0


def test_ranks_report_the_same(ranks, models):
    batch = make_batch(vocab=77)
    cfg = ppo_cfg(models["qwen3"], tensor_parallel=2, max_tokens_per_rank=60)
    reports = [{k: v for k, v in found[0][0].items() if k != "old"} for found in ranks.run(learned, 4, cfg, batch, targets_of(batch)[1], 1)]
    assert reports == [reports[0]] * 4


def not_finite(place, cfg, batch, returns):
    from slime.config.exits import NotFinite
    from slime.trainer import critic

    made = place.critic(cfg)
    before = {name: tensor.clone() for name, tensor in weights(made).items()}
    with pytest.raises(NotFinite, match=r"^the critic's update 1: the loss is nan .*\(the policy's on its batch were: .* critic\.lr=0\.01"):
        critic.learn(made, batch, np.zeros_like(returns, np.float32), returns)
    return all(torch.equal(tensor, before[name]) for name, tensor in weights(made).items()), made.optimizer_steps


def test_returns_that_are_no_numbers_are_refused_on_every_rank(ranks, models):
    batch = make_batch(vocab=77)
    returns = targets_of(batch)[1]
    returns[np.flatnonzero(batch.loss_mask)[0]] = np.nan
    assert ranks.run(not_finite, 2, ppo_cfg(models["qwen3"]), batch, returns) == [(True, 0)] * 2


def beside(place, cfg, batches, learns):
    """Whole updates of policy and critic on the same ranks; (weights before, after each update, metrics, versions)."""
    from slime.trainer import critic, step

    trainer = place.trainer(cfg)
    judge = place.critic(cfg, trainer)
    held, reports = [{name: t.clone() for name, t in weights(trainer).items()}], []
    for batch, actor_learns in zip(batches, learns, strict=True):
        values = critic.values(judge, batch)
        metrics, returns = step.train_beside(trainer, batch, values, actor_learns)
        reports.append({**metrics, **critic.learn(judge, batch, values, returns)})
        held.append({name: t.clone() for name, t in weights(trainer).items()})
    return held, reports, (trainer.version, trainer.optimizer_steps, judge.version, judge.optimizer_steps)


def test_the_policy_stays_while_the_critic_warms_up(ranks, models):
    cfg = ppo_cfg(models["qwen3"], schedule="cosine")
    cfg.run.steps, cfg.critic.warmup_steps = 4, 2
    batches = [replace(make_batch(vocab=77, seed=seed), version=np.full(12, seed)) for seed in range(3)]
    held, reports, counts = ranks.run(beside, 2, cfg, batches, [False, False, True])[0]
    first, second, third = reports
    for name, tensor in held[0].items():
        assert torch.equal(tensor, held[1][name]) and torch.equal(tensor, held[2][name]), name
    assert any(not torch.equal(tensor, held[3][name]) for name, tensor in held[0].items())
    assert counts == (3, 1, 3, 3)
    assert "train/loss" not in first and "mismatch/logprob_abs_diff" in second and second["staleness/max"] == 0.0
    assert all(report["value/loss"] > 0 for report in reports) and third["train/grad_norm"] > 0
    assert third["train/lr"] == cfg.trainer.lr, "its schedule begins when it does"
    assert optimizer_steps(cfg) == 2 and optimizer_steps(of_critic(cfg)) == 4


def test_advantages_come_from_the_values(ranks, models):
    """With gamma = lam = 1 an advantage is the reward less the value: of values that are 0, the reward itself."""
    cfg, batch = ppo_cfg(models["qwen3"]), make_batch(vocab=77)
    cfg.algorithm.normalize = False
    _, (report,), _ = ranks.run(beside, 1, cfg, [batch], [True])[0]
    of_tokens = batch.rewards[batch.sample_of_token][batch.loss_mask]
    assert report["advantage/mean"] == pytest.approx(of_tokens.mean()) and report["advantage/std"] == pytest.approx(of_tokens.std())
    assert report["value/loss"] == pytest.approx((of_tokens**2).mean(), rel=1e-5)


def without_returns(place, cfg, batch):
    from slime.trainer import step

    trainer = place.trainer(cfg)
    targets = trainer.algorithm.targets
    trainer.algorithm = replace(trainer.algorithm, targets=lambda known: replace(targets(known), returns=None))
    with pytest.raises(ValueError, match=r"algorithm\.name=ppo: it uses a critic, and its targets have no returns"):
        step.train_beside(trainer, batch, np.zeros(len(batch.tokens), np.float32), True)


def test_an_algorithm_that_says_nothing_to_its_critic_is_refused(ranks, models):
    ranks.run(without_returns, 1, ppo_cfg(models["qwen3"]), make_batch(vocab=77))


def test_it_may_begin_as_another_model(ranks, models):
    cfg, batch = ppo_cfg(models["qwen3"]), make_batch(vocab=77)
    cfg.critic.path = str(models["qwen3_tied"])
    with torch.no_grad():
        expected, _, _ = reference_values(models["qwen3_tied"], batch)
    assert np.abs(ranks.run(values_of, 1, cfg, batch)[0] - expected.numpy()).max() <= 1e-5


def test_the_recipe_as_the_critic_reads_it(models):
    cfg = ppo_cfg(models["qwen3"], lr=1e-6, min_lr=1e-7, schedule="cosine")
    cfg.critic = CriticConfig(lr=1e-5, warmup_steps=3)
    own = of_critic(cfg)
    assert (own.trainer.lr, own.trainer.min_lr, own.trainer.schedule) == (1e-5, pytest.approx(1e-6), "cosine")
    assert own.model == cfg.model and of_critic(replace(cfg, critic=CriticConfig("other"))).model.path == "other"
    cfg.trainer.lr = 0.0
    assert of_critic(cfg).trainer.min_lr == 0.0
    judge = value_map(load_map(models["qwen3_tied"]))
    assert judge.hf_shapes[HEAD] == (1, HIDDEN) and not judge.shared and "lm_head.weight" not in judge.hf_shapes
