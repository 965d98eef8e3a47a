"""reward: how answers are judged."""

from dataclasses import dataclass

from slime.config.fields import choice, number


@dataclass
class RewardConfig:
    fn: str = "exact"
    """exact, numeric, math, format, or pkg.mod:fn (sync or async) of your own."""
    signature: str = choice("sample", "group", "verl", "slime")
    """How fn is called: fn(sample), fn(samples of a group), verl's compute_score, or slime's async fn(args, sample)."""
    pattern: str | None = None
    """Regular expression of reward.fn=format."""
    url: str | None = None
    """Ask this HTTP endpoint instead of calling reward.fn."""
    timeout_s: float = number(30.0, above=0)
    """Deadline of one judgement; a worker that misses it is killed and the sample counts as a reward error."""
    workers: int = number(2, low=1)
    """Processes that run reward functions."""
    max_error_frac: float = number(0.05, low=0, high=1)
    """Share of a step's samples whose reward may fail before the run stops."""
    overlong_buffer: int = number(0, low=0)
    """Last tokens of rollout.max_response_tokens over which training lowers the reward, up to overlong_penalty (DAPO); 0 does not."""
    overlong_penalty: float = number(1.0, above=0)
    """What an answer of rollout.max_response_tokens loses."""
