"""What a resumed run may change of its recipe, knob by knob. Pure.

Three kinds. FREE: where and how fast a run computes, what is shown and kept. PROMPTS: what gives an ordinal its prompt; a change repeats
some and skips others. COURSE, all the others: the objective, the batches, the model, the numbers. A run that goes on takes FREE changes and
refuses the rest, unless run.accept_changes names them; a new run that begins from another's checkpoint refuses PROMPTS alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from slime.config.tree import knobs


class Kind(Enum):
    """What a change of a knob means for a run that goes on."""

    FREE = "free"
    COURSE = "course"
    PROMPTS = "prompts"


def _names(group: str, knobs: str) -> dict[str, tuple[str, ...]]:
    return {group: tuple(knobs.split())}


# Every knob is in one of these: a new one must be put somewhere.
FREE = {
    **_names("run", "name dir eval_every save_every keep_last keep_every resume accept_changes grace_s max_hours max_restarts dry_run"),
    **_names("data", "eval"),
    **_names(
        "rollout",
        "engines tensor_parallel max_in_flight dump external_urls external_key_env join engine_python start_timeout_s request_timeout_s "
        "health_timeout_s max_restarts",
    ),
    **_names("reward", "timeout_s workers max_error_frac"),
    **_names("trainer", "tensor_parallel pipeline_parallel context_parallel expert_parallel max_tokens_per_rank"),
    **_names("sync", "mode codec transport snapshot url pause on_mismatch bucket_mb anchor_every keep key_env timeout_s"),
    **_names("cluster", "device address roles share cpus_per_rank cpus_per_engine object_store_mb start_timeout_s step_timeout_s"),
    **_names("observe", "wandb tensorboard examples mismatch_stop"),
}
PROMPTS = {
    **_names("run", "seed"),
    **_names("data", "train prompt_key label_key metadata_key tools_key shuffle max_prompt_tokens"),
}
COURSE = {
    **_names("run", "steps deterministic only replay"),
    **_names("model", "path family dtype"),
    **_names("data", "source_key chat"),
    **_names(
        "rollout",
        "mode prompts_per_step samples_per_prompt max_response_tokens temperature top_p stop generate filter select oversample "
        "mask_truncated quantization replay_experts sglang",
    ),
    **_names("reward", "fn signature pattern url overlong_buffer overlong_penalty"),
    **_names(
        "trainer",
        "lr schedule warmup_steps decay_steps min_lr weight_decay beta1 beta2 eps clip_grad updates_per_batch epochs_per_batch megatron",
    ),
    **_names(
        "algorithm",
        "name aggregation normalize gamma lam clip_low clip_high clip_dual entropy_coef kl_loss_coef kl_reward_coef "
        "kl_estimator reference_every importance importance_low importance_high importance_reject importance_normalize "
        "opsm_delta teachers distill distill_coef distill_beta distill_top_k",
    ),
    **_names("critic", "path lr value_clip warmup_steps"),
}
# Options of other libraries that say how memory and work are laid out; * stands for the rest of a name.
FREE_OPTIONS = {
    "rollout.sglang": """
        mem_fraction_static max_running_requests max_total_tokens max_queued_requests chunked_prefill_size max_prefill_tokens page_size
        cuda_graph* disable_cuda_graph* schedule_* cpu_offload_gb log_* watchdog_timeout enable_metrics*""",
    "trainer.megatron": """
        recompute_* virtual_pipeline_model_parallel_size expert_tensor_parallel_size num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage sequence_parallel *overlap* bucket_size cpu_offloading*""",
}
FREE_ENTRIES = {"algorithm.teachers": ("url", "key_env", "tensor_parallel")}  # of a knob with names: <knob>.<name>.<entry>
UNSAID = frozenset(["run.name", "run.dir", "run.resume", "run.accept_changes", "run.dry_run"])  # a change of these is not worth a word


@dataclass(frozen=True, slots=True)
class Change:
    """A knob whose value is another one. Of a dictionary each entry is a change."""

    name: str
    before: Any
    now: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.name}: {_said(self.before)} -> {_said(self.now)}"

    def accepted(self, names: Iterable[str]) -> bool:
        """Whether it, or the knob that it belongs to, is among these names."""
        return any(self.name == name or (self.name.startswith(f"{name}.") and "." in name) for name in names)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The knobs that differ between two resolved recipes, by name. Where data.train lies is no difference: its content is compared. Nor is
    the default of a knob that the first recipe, made by an older slime, does not know."""
    old, new, defaults = flat(before), flat(now), {knob.path: knob.default for knob in knobs()}
    found = []
    for name in sorted((old.keys() | new.keys()) - UNSAID):
        a, b = old.get(name), new.get(name)
        if name == "data.train":
            a, b = _without_paths(a), _without_paths(b)
        elif name not in old and name in defaults:
            a = defaults[name]
        if a != b:
            found.append(Change(name, old.get(name), new.get(name), kind_of(name, now)))
    return found


def kind_of(name: str, recipe: dict[str, Any]) -> Kind:
    """What a change of this knob, or entry of one, means in a recipe. One that there is no more, which an older slime knew, is FREE."""
    group, knob, *rest = name.split(".", 2)
    if knob in PROMPTS.get(group, ()):
        return Kind.PROMPTS
    if knob in FREE.get(group, ()) or (name == "run.steps" and not _rate_follows_steps(recipe)):
        return Kind.FREE
    if rest and any(_matches(rest[0], option) for option in FREE_OPTIONS.get(f"{group}.{knob}", "").split()):
        return Kind.FREE
    if rest and rest[0].rpartition(".")[2] in FREE_ENTRIES.get(f"{group}.{knob}", ()):
        return Kind.FREE
    return Kind.COURSE if knob in COURSE.get(group, ()) else Kind.FREE


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Knob -> value of a nested recipe."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _rate_follows_steps(recipe: dict[str, Any]) -> bool:
    """Whether the learning rate of an update depends on how many are to come."""
    trainer = recipe["trainer"]
    return trainer["schedule"] == "wsd" or (trainer["schedule"] == "cosine" and trainer["decay_steps"] is None)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.partition(".")[0], pattern)


def _without_paths(value: Any) -> Any:
    return [{k: v for k, v in file.items() if k != "path"} for file in value] if isinstance(value, list) else value


def _said(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
