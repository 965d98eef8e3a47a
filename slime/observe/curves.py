"""The curves of a report, as data: titles, metrics and how they are drawn. `report_curves` draws them."""

from collections.abc import Callable
from dataclasses import dataclass

from slime.observe.charts import number, percent
from slime.observe.console_table import short


@dataclass(frozen=True, slots=True)
class Curve:
    """A line chart: (metric, label) pairs."""

    title: str
    metrics: tuple[tuple[str, str], ...]
    log: bool = False
    bounds: tuple[float | None, float | None] = (None, None)
    write: Callable[[float], str] = number
    limit: str = ""  # a knob of `observe` drawn as a dashed line
    note: str = ""
    if_any: bool = False  # left out where all values are 0
    unless_as: str = ""  # left out where its values are those of this metric


FROM_0 = (0.0, None)
RESPONSES = (
    Curve("Response length", (("response_len/mean", "mean"), ("response_len/max", "longest")), note="tokens"),
    Curve("Truncated responses", (("response_len/truncated_frac", "share"),), bounds=FROM_0, write=percent),
    Curve("Overlong penalty", (("reward/overlong_penalty", "added to the mean reward"),), note="in training alone", if_any=True),
    Curve("Groups of equal rewards", (("group/zero_std_frac", "share"),), bounds=FROM_0, write=percent),
    Curve("Reward errors", (("reward/error_frac", "share"),), bounds=FROM_0, write=percent, if_any=True),
)
OPTIMISATION = (
    Curve("Entropy", (("train/entropy", "nats a token"),)),
    Curve("Policy loss", (("train/pg_loss", "loss"),), if_any=True),
    Curve("Loss", (("train/loss", "loss"),), unless_as="train/pg_loss"),
    Curve("Gradient norm", (("train/grad_norm", "before clipping"),), bounds=FROM_0),
    Curve("Advantages", (("advantage/mean", "mean"), ("advantage/std", "standard deviation")), note="of trained tokens", if_any=True),
    Curve("Clipped tokens", (("train/clip_frac", "share"),), bounds=FROM_0, write=percent),
    Curve("KL of the update", (("train/kl", "k3 estimate"),), if_any=True),
    Curve("KL(policy, reference)", (("train/ref_kl", "the recipe's estimate"),), note="of the loss or the reward"),
    Curve("Learning rate", (("train/lr", "lr"),), bounds=FROM_0),
)
CRITIC = (
    Curve("Value loss", (("value/loss", "squared error"),), log=True),
    Curve("Explained variance of the returns", (("value/explained_variance", "share"),), bounds=(None, 1.0)),
    Curve("Values", (("value/mean", "mean"),)),
    Curve("Clipped values", (("value/clip_frac", "share"),), bounds=FROM_0, write=percent, if_any=True),
    Curve("Gradient norm of the critic", (("critic/grad_norm", "before clipping"),), bounds=FROM_0),
    Curve("Learning rate of the critic", (("critic/lr", "lr"),), bounds=FROM_0),
)
DISTILLATION = (Curve("Divergence from the teacher", (("train/distillation", "nats a token"),), note="as a loss"),)
OFF_POLICY = (
    Curve("Staleness", (("staleness/mean", "mean"), ("staleness/max", "largest")), bounds=FROM_0, note="versions", if_any=True),
    Curve("KL(rollout, trainer)", (("offpolicy/kl", "k3 estimate"),), log=True, note="whole batch"),
    Curve("Effective sample size", (("offpolicy/ess", "of the batch's tokens"),), bounds=(0.0, 1.0), write=percent),
    Curve("Ratio trainer / rollout", (("offpolicy/ratio_mean", "mean"), ("offpolicy/ratio_max", "largest")), log=True, note="of tokens"),
    Curve("Importance weight", (("train/importance", "mean"),), bounds=FROM_0),
    Curve("Weights out of bounds", (("train/importance_bounded_frac", "share of tokens"),), bounds=FROM_0, write=percent),
    Curve(
        "Tokens left out",
        (("train/importance_rejected_frac", "by their ratio"), ("train/opsm_frac", "bad and off-policy")),
        bounds=FROM_0,
        write=percent,
        note="of the policy loss",
    ),
)
TRAINER_AND_ENGINE = (
    Curve(
        "Log-prob difference",
        (
            ("mismatch/logprob_abs_diff", "mean"),
            ("mismatch/logprob_abs_diff_max", "largest"),
            ("mismatch/logprob_abs_diff_without_replay", "mean without replay"),
        ),
        log=True,
        limit="mismatch_stop",
        note="same tokens, same weights",
    ),
    Curve("KL(engine, trainer)", (("mismatch/kl", "k3 estimate"),), log=True, note="same tokens, same weights"),
    Curve(
        "Experts that replay changed", (("mismatch/experts_changed_frac", "of tokens x layers"),), bounds=FROM_0, write=percent, if_any=True
    ),
    Curve("Prefix cache hits", (("engine/cache_hit", "of prompt tokens"),), bounds=(0.0, 1.0), write=percent),
)
SPEEDS = (
    Curve("Tokens per second", (("perf/tokens_per_s", "trained"), ("engine/tokens_per_s", "generated")), bounds=FROM_0, write=short),
    Curve("Tokens per second and GPU", (("perf/tokens_per_s_per_gpu", "trained"),), bounds=FROM_0, write=short),
    Curve("Model FLOPs utilisation", (("perf/mfu", "of the bf16 peak"),), bounds=FROM_0, write=percent),
    Curve("Peak GPU memory", (("perf/gpu_mem_gb", "GB, trainer"),), bounds=FROM_0),
    Curve("Idle share of a step", (("time/idle_frac", "nothing computes"),), bounds=FROM_0, write=percent),
)
SYNC = (
    Curve("Changed weights", (("sync/density", "of all elements"),), log=True, write=percent),
    Curve("Bytes on the wire", (("sync/wire_bytes", "of a version"),), log=True, write=short),
    Curve("Compression", (("sync/ratio", "weights / bytes sent"),), log=True),
    Curve(
        "Seconds of a sync",
        tuple((f"sync/{name}_s", name) for name in ("diff", "encode", "stage", "pause", "commit", "verify")),
        log=True,
        note="engines stand still during pause",
    ),
)
