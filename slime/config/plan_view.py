"""The resource plan as tables on a terminal, for run.dry_run=true."""

from rich.console import Console
from rich.table import Table

from slime.config import SlimeConfig
from slime.config.check_share import FRACTION
from slime.config.parallel import ParallelSizes, parallel_sizes
from slime.config.plan import BatchPlan, MemoryPlan, Plan
from slime.config.plan_memory import RankMemory
from slime.config.plan_share import SharePlan
from slime.config.roles import pools, tensor_parallel


def show(cfg: SlimeConfig, plan: Plan, console: Console) -> None:
    """Print roles, batch and memory."""
    _print(console, f"roles (cluster.device={cfg.cluster.device})", _roles(cfg, plan))
    _print(console, "one step", _batch(plan.batch))
    if plan.memory is None:
        console.print("\nmemory: known once every model is downloaded", highlight=False)
    else:
        title = f"memory of one device, estimated ({plan.memory.parameters:,} parameters, {cfg.model.dtype})"
        _print(console, title, _memory(plan.memory, cfg.trainer.pipeline_parallel))
    if plan.shared is not None:
        _print(console, f"a device of actor and rollout (cluster.share={plan.shared.share})", _shared(plan.shared))


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
    update, sizes = plan.batch.update, parallel_sizes(cfg.trainer)
    made_of = {
        "actor": layout(sizes, update.data_parallel) if update else "",
        "critic": layout(sizes, sizes.data(plan.roles["critic"].devices)) if "critic" in plan.roles else "",
        "rollout": f"{cfg.rollout.engines} engines x {cfg.rollout.tensor_parallel} tensor-parallel",
    }
    for role, need in plan.roles.items():
        if role not in made_of:
            _, width = tensor_parallel(cfg, role)
            made_of[role] = f"{need.devices // width} engines x {width} tensor-parallel"
    table = _table("role", "devices", "CPUs a device", "made of")
    for pool in pools(cfg):
        for place, need in enumerate(pool.needs):
            devices = str(need.devices) if place == 0 else f"{need.devices}, those of {pool.needs[0].role}"
            table.add_row(need.role, devices, f"{need.cpus:g}", made_of[need.role])
    if "rollout" not in plan.roles:
        where = f"{len(cfg.rollout.external_urls)} servers that run already" if cfg.rollout.external_urls else "none needed"
        table.add_row("rollout", "0", "", where)
    if "actor" not in plan.roles:
        table.add_row("actor", "0", "", "none needed")
    return table


def layout(sizes: ParallelSizes, data: int) -> str:
    """How the actor's devices are divided: 2 data x 2 tensor x 2 pipeline (x 2 virtual); experts over 4 x 2 tensor. A size of 1 is not
    said, but for `data`, the copies of the model."""
    stages = f" (x {sizes.virtual} virtual)" if sizes.virtual > 1 else ""
    groups = {"tensor": sizes.tensor, f"pipeline{stages}": sizes.pipeline, "context": sizes.context}
    copies = " x ".join([f"{data} data", *(f"{size} {name}" for name, size in groups.items() if size > 1)])
    split = f" x {sizes.expert_tensor} tensor" if sizes.expert_tensor > 1 else ""
    return f"{copies}; experts over {sizes.expert}{split}" if sizes.expert > 1 else copies


def _batch(batch: BatchPlan) -> Table:
    table = _table()
    table.add_row("batch", f"{batch.prompts} prompts, {batch.samples} samples")
    if (update := batch.update) is not None:
        table.add_row("optimizer steps", f"{update.optimizer_steps} of {update.samples} samples")
        share = f"{update.samples_per_rank} samples, {update.tokens_per_rank} tokens at full length, {update.micro_batches} micro-batches"
        table.add_row("a rank in one of them", f"about {share}")
    return table


def _shared(shared: SharePlan) -> Table:
    """Raises ConfigError for a fraction that fits on no device."""
    table = _table()
    table.add_row("rank", f"{size(shared.rank)}, {'beside the engine' if shared.share == 'split' else 'by turns with the engine'}")
    table.add_row("engine: weights and KV cache of the longest request", size(shared.engine))
    stated = "chosen when the device is known" if shared.fraction is None else f"{shared.fraction:g} of the device"
    table.add_row("engine: " + FRACTION, stated)
    table.add_row("device: at least", size(shared.least()))
    return table


def _memory(memory: MemoryPlan, stages: int) -> Table:
    table = _table()
    if memory.rank is not None:
        _rank(table, "rank", memory.rank, stages)
    if memory.critic is not None:
        _rank(table, "critic's rank", memory.critic, stages)
    if (engine := memory.engine) is not None:
        table.add_row("engine: weights", size(engine.weights))
        table.add_row("engine: KV cache of a token", size(engine.kv_per_token))
        table.add_row("engine: KV cache of all requests in flight", size(engine.kv_wanted))
    return table


def _rank(table: Table, name: str, rank: RankMemory, stages: int) -> None:
    table.add_row(f"{name}: weights", size(rank.weights))
    table.add_row(f"{name}: gradients", size(rank.gradients))
    table.add_row(f"{name}: optimizer state", size(rank.optimizer))
    if rank.critic:
        table.add_row(f"{name}: weights, gradients and optimizer state of the critic", size(rank.critic))
    if rank.frozen:
        table.add_row(f"{name}: weights of the reference and of teachers", size(rank.frozen))
    if rank.snapshot:
        table.add_row(f"{name}: snapshot of the weights that engines have", size(rank.snapshot))
    table.add_row(f"{name}: activations of {'a micro-batch' if stages == 1 else 'micro-batches in flight'}", size(rank.activations))
    if rank.logits:
        table.add_row(f"{name}: logits of a micro-batch and their gradient", size(rank.logits))
        table.add_row(f"{name}: log-probs of a chunk, in fp32", size(rank.logprobs))
    where = f", on pipeline stage {rank.stage + 1} of {stages}, which takes the most" if stages > 1 else ""
    table.add_row(f"{name}: together{where}", size(rank.total))
