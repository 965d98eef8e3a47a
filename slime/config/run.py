"""run: what is run, for how long, and where it lies."""

from dataclasses import dataclass

from slime.config.fields import choice, number


@dataclass
class RunConfig:
    name: str | None = None
    """Name of the run's directory; by default the recipe's name and a hash of the overrides."""
    dir: str = "runs"
    """Folder that holds the run's directory; every rank and engine host must see it."""
    seed: int = number(0, low=0, high=2**32 - 1)  # NumPy's bound, by which SGLang seeds
    """The one seed: data order, sampling, initialisation and dropout derive from it."""
    steps: int = number(100, low=1)
    """Updates to complete; one update trains one batch of rollout.prompts_per_step prompts."""
    eval_every: int = number(0, low=0)
    """Evaluate every this many updates; 0 evaluates before the first and after the last only."""
    save_every: int = number(0, low=0)
    """Checkpoint every this many updates; 0 saves after the last only."""
    keep_last: int = number(2, low=1)
    """Newest checkpoints that stay; older ones go once a newer one is durable."""
    resume: str = "auto"
    """auto resumes this run if it has a checkpoint; must demands one; never refuses a directory with a run; a path is where it begins."""
    deterministic: bool = False
    """Same recipe, same bits (CPU; rollout.mode sync or one_step_off): seeded sampling, batch-invariant engines."""
    grace_s: float = number(60.0, above=0)
    """Seconds that a stopping run may take to finish its step and save."""
    dry_run: bool = False
    """Print the resolved recipe and the resource plan, start nothing."""
    only: str = choice("all", "rollout", "train")
    """Run one half alone: rollout generates and dumps, train reads rollouts from run.replay."""
    replay: str | None = None
    """Directory of rollouts dumped by rollout.dump=true, for run.only=train."""
