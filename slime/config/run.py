"""run: what is run, for how long, and where it lies."""

from dataclasses import dataclass, field

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
    """Newest checkpoints that stay; older ones go once a newer one is durable and verified."""
    keep_every: int = number(0, low=0)
    """Checkpoints whose step is a multiple of this stay for good, beside the newest run.keep_last; 0 keeps none for good."""
    resume: str = "auto"
    """auto resumes this run if it has a checkpoint; must demands one; never refuses a directory with a run; a path is where it begins."""
    accept_changes: list[str] = field(default_factory=list)
    """Knobs whose new values a resumed run takes though they change what it trains, e.g. [trainer.lr]; others are refused by name."""
    deterministic: bool = False
    """Same recipe, same bits (CPU; rollout.mode sync or one_step_off): seeded sampling, batch-invariant engines."""
    grace_s: float = number(60.0, above=0)
    """Seconds that a stopping run may take to finish its step and save."""
    max_hours: float = number(0.0, low=0)
    """Hours after which this process saves and exits with 75, run.grace_s earlier to be in time: a job's wall-time limit; 0 has none."""
    max_restarts: int = number(3, low=0)
    """How often a run that lost a process, a host or all engines starts again by itself without a new checkpoint in between."""
    dry_run: bool = False
    """Print the resolved recipe and the resource plan, start nothing."""
    only: str = choice("all", "rollout", "train")
    """Run one half alone: rollout generates and dumps, train reads rollouts from run.replay."""
    replay: str | None = None
    """For run.only=train: a directory of rollouts that rollout.dump=true wrote, or one batch that stopped a run (stopped/*.npz)."""
