"""data: where prompts come from."""

from dataclasses import dataclass, field

from slime.config.fields import choice, number


@dataclass
class DataFile:
    path: str = "???"
    """A .jsonl or .parquet file of prompts."""
    weight: float = number(1.0, above=0)
    """Share of draws from this file, relative to the others."""
    source: str | None = None
    """Name for metrics and routing; by default the row's own data.source_key, else the file's stem."""


@dataclass
class EvalSet:
    path: str = "???"
    """A .jsonl or .parquet file of prompts."""
    samples: int = number(1, low=1)
    """Answers a prompt, for avg_at_k and pass_at_k."""
    temperature: float = number(0.0, low=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = number(1.0, above=0, high=1)
    """Nucleus of sampling."""
    max_response_tokens: int | None = None
    """Longest answer; by default rollout.max_response_tokens."""
    reward: str | None = None
    """Reward function of this set; by default reward.fn."""
    limit: int | None = None
    """Evaluate the first this many prompts only."""


@dataclass
class DataConfig:
    train: list[DataFile] = field(default_factory=list)
    """Files to draw training prompts from, mixed by weight."""
    eval: dict[str, EvalSet] = field(default_factory=dict)
    """Evaluation sets by name."""
    prompt_key: str = "prompt"
    """Column of the prompt: a string or a list of chat messages; dots reach into nested columns."""
    label_key: str = "label"
    """Column of the expected answer (verl: reward_model.ground_truth)."""
    metadata_key: str = "metadata"
    """Column of free metadata (verl: extra_info)."""
    tools_key: str = "tools"
    """Column of tool schemas for the chat template."""
    source_key: str = "source"
    """Column that names a row's source (verl: data_source)."""
    chat: str = choice("messages", "always", "never")
    """Chat template: for lists of messages only, for plain strings too (as one user message), or never."""
    shuffle: bool = True
    """Draw each epoch in a new order derived from run.seed."""
    max_prompt_tokens: int = number(1024, low=1)
    """Longer prompts are dropped and counted."""
