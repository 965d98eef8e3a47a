"""rollout: how answers are generated."""

from dataclasses import dataclass, field
from typing import Any

from slime.config.fields import choice, number


@dataclass
class RolloutConfig:
    mode: str = choice("sync", "one_step_off")
    """sync trains on the newest weights; one_step_off generates the next batch while this one trains."""
    prompts_per_step: int = number(32, low=1)
    """Prompts in the batch of one update, over all ranks."""
    samples_per_prompt: int = number(8, low=1)
    """Answers drawn for each prompt: a group."""
    max_response_tokens: int = number(1024, low=1)
    """Longest answer; longer ones are truncated and counted."""
    temperature: float = number(1.0, above=0)
    """Sampling temperature; trainer log-probs use it too."""
    top_p: float = number(1.0, above=0, high=1)
    """Nucleus of sampling. Below 1 training is approximate: tokens are of the nucleus, log-probs of the whole distribution."""
    stop: list[str] = field(default_factory=list)
    """Strings that end an answer, beside the tokenizer's end tokens."""
    engines: int = number(1, low=1)
    """SGLang servers."""
    tensor_parallel: int = number(1, low=1)
    """Devices of one server."""
    max_in_flight: int = number(4096, low=1)
    """Requests under way at once, over all engines."""
    generate: str = "slime.rollout.generate:single_turn"
    """pkg.mod:fn, an async fn(sample, client, cfg) -> Sample | list[Sample]."""
    filter: str | None = None
    """pkg.mod:fn, fn(group) -> bool; groups it rejects are dropped, counted and replaced by new prompts."""
    select: str = choice("ordinal", "arrival")
    """Which finished groups make the batch: the first drawn, or the first finished (biased to short answers)."""
    oversample: float = number(0.25, above=0)
    """With rollout.select=arrival: share of further prompts that are drawn, and dropped as surplus if they finish last."""
    mask_truncated: bool = False
    """Do not train on answers that were cut off, though their rewards count in their group (DAPO's overlong filtering)."""
    dump: bool = False
    """Write every batch and its samples to rollouts/ in the run's directory."""
    external_urls: list[str] = field(default_factory=list)
    """SGLang servers that run already; slime starts none then."""
    join: str | None = None
    """A file of URLs, one a line, read before each sync: servers on the driver's host that it lists are caught up, proven and used."""
    external_key_env: str | None = None
    """Name of the environment variable that holds the API and admin key of rollout.external_urls and of those that join."""
    engine_python: str | None = None
    """Interpreter that serves; by default the one that runs slime."""
    quantization: str = choice("none", "fp8")
    """fp8: engines hold projections as e4m3 codes with a scale for each 128 x 128 block, made anew from every version. Needs a GPU."""
    replay_experts: bool = True
    """Of a mixture of experts: the trainer sends each token to the experts that the engine sent it to (routing replay, R3)."""
    start_timeout_s: float = number(300.0, above=0)
    """Deadline for an engine to become healthy."""
    request_timeout_s: float = number(600.0, above=0)
    """Deadline for one answer; an engine that misses it is started anew, and the request asked again, at most twice."""
    health_timeout_s: float = number(60.0, above=0)
    """An engine that answers no probe for so long is killed and started anew."""
    max_restarts: int = number(3, low=0)
    """How often one engine is brought back between two published versions; beyond it is retired."""
    sglang: dict[str, Any] = field(default_factory=dict)
    """Any argument of SGLang's server by its own name, e.g. rollout.sglang.mem_fraction_static=0.8."""

    @property
    def fp32_head(self) -> bool:
        """Engines compute logits in fp32, and so does the trainer, since log-probs of both are compared."""
        return bool(self.sglang.get("enable_fp32_lm_head"))
