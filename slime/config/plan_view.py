"""The resource plan as tables on a terminal, for run.dry_run=true."""

from rich.console import Console
from rich.table import Table

from slime.config import SlimeConfig
from slime.config.plan import BatchPlan, MemoryPlan, Plan


def show(cfg: SlimeConfig, plan: Plan, console: Console) -> None:
    """Print roles, batch and memory."""
    _print(console, f"roles (cluster.device={cfg.cluster.device})", _roles(cfg, plan))
    _print(console, "one step", _batch(plan.batch))
    if plan.memory is None:
        console.print(f"\nmemory: known once {cfg.model.path} is downloaded", highlight=False)
    else:
        title = f"memory of one device, estimated ({plan.memory.parameters:,} parameters, {cfg.model.dtype})"
        _print(console, title, _memory(plan.memory))


def _print(console: Console, title: str, table: Table) -> None:
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    console.print(table)


def size(count: float) -> str:
    """Bytes in words: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _table(*columns: str) -> Table:
    table = Table(show_header=bool(columns), show_edge=False, pad_edge=False, box=None, padding=(0, 2))
    for column in columns:
        table.add_column(column, header_style="dim")
    return table


def _roles(cfg: SlimeConfig, plan: Plan) -> Table:
    made_of = {
        "actor": f"{plan.batch.data_parallel} data-parallel x {cfg.trainer.tensor_parallel} tensor-parallel ranks",
        "rollout": f"{cfg.rollout.engines} engines x {cfg.rollout.tensor_parallel} tensor-parallel",
    }
    table = _table("role", "devices", "CPUs a device", "made of")
    for need in plan.roles.values():
        table.add_row(need.role, str(need.devices), f"{need.cpus:g}", made_of[need.role])
    if "rollout" not in plan.roles:
        where = f"{len(cfg.rollout.external_urls)} servers that run already" if cfg.rollout.external_urls else "none needed"
        table.add_row("rollout", "0", "", where)
    return table


def _batch(batch: BatchPlan) -> Table:
    table = _table()
    for name, value in (
        ("batch", f"{batch.prompts} prompts, {batch.samples} samples"),
        ("optimizer steps", f"{batch.updates} of {batch.samples_per_update} samples"),
        (
            "a rank in one of them",
            f"at most {batch.samples_per_rank} samples, {batch.tokens_per_rank} tokens, {batch.micro_batches} micro-batches",
        ),
    ):
        table.add_row(name, value)
    return table


def _memory(memory: MemoryPlan) -> Table:
    table = _table()
    for name, value in (
        ("rank: weights", size(memory.rank_weights)),
        ("rank: gradients", size(memory.rank_gradients)),
        ("rank: optimizer state", size(memory.rank_optimizer)),
        ("rank: activations of a micro-batch", size(memory.rank_activations)),
        ("rank: together", size(memory.rank_total)),
        ("engine: weights", size(memory.engine_weights)),
        ("engine: KV cache of a token", size(memory.engine_kv_per_token)),
        ("engine: KV cache of all requests in flight", size(memory.engine_kv_wanted)),
    ):
        table.add_row(name, value)
    return table
