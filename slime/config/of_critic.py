"""The recipe as the critic reads it, and how many optimizer steps policy and critic take. Pure."""

from dataclasses import replace

from slime.config import SlimeConfig


def of_critic(cfg: SlimeConfig) -> SlimeConfig:
    """The same recipe with the critic's model and learning rate in the places of the policy's, so that one code trains both."""
    path, critic, trainer = cfg.critic.path, cfg.critic, cfg.trainer
    model = cfg.model if path is None else replace(cfg.model, path=path)
    min_lr = trainer.min_lr * critic.lr / trainer.lr if trainer.lr else 0.0
    return replace(
        cfg, model=model, trainer=replace(trainer, lr=critic.lr, min_lr=min_lr), critic=replace(critic, path=None, warmup_steps=0)
    )


def optimizer_steps(cfg: SlimeConfig) -> int:
    """Of a whole run. The policy takes none while the critic alone learns."""
    return (cfg.run.steps - cfg.critic.warmup_steps) * cfg.trainer.updates_per_batch * cfg.trainer.epochs_per_batch
