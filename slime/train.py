"""The main loop. `step` counts completed updates; version k of the weights is the state after k updates.

    publish 0 | rollout 0 |  update  | publish 1 | rollout 1 |  update  | ...             rollout.mode=sync
    publish 0 | rollout 0 |  publish 0, rollout 1 beside update | publish 1, ...          rollout.mode=one_step_off

A checkpoint is taken where nothing is in flight: the trainer at `step` and the finished batch that it has not trained yet.
Publishing always comes before a rollout, in a resumed run too.
"""

from slime.cluster.signals import StopSignal
from slime.config import SlimeConfig
from slime.restarts import Attempts
from slime.run import Run
from slime.start import open_run


def main(cfg: SlimeConfig, resolved_yaml: str) -> None:
    """Run a recipe to its end, from the last checkpoint again where something was lost on the way.

    Raises ConfigError, PreflightError, NothingToDo, GateStopped or SavedRunAgain (see slime.config.exits).
    """
    with StopSignal(cfg.run.grace_s, cfg.run.max_hours) as signal:
        for attempt in Attempts(cfg, signal):
            with attempt, open_run(attempt.cfg, resolved_yaml, signal) as run:
                attempt.began(run.begins_from)
                if cfg.run.only == "rollout":
                    generate(run)
                else:
                    train(run)
                run.finish()


def train(run: Run) -> None:
    """Generate, train, publish, until run.steps updates are complete."""
    overlap = run.cfg.rollout.mode == "one_step_off"
    run.publish(run.step)
    run.evaluate_first()
    pending = run.restored_batch or run.start(run.step)
    for step in run.steps():
        batch = run.join(pending)  # nothing of this batch is in flight from here on
        run.commit_if_due(step, batch)
        if overlap:
            run.publish(step)
            pending = run.start(step + 1)
        metrics = run.update(batch)
        if not overlap:
            run.publish(step + 1)
            pending = run.start(step + 1)
        run.record(step + 1, batch, metrics)


def generate(run: Run) -> None:
    """run.only=rollout: generate and dump batches with the weights that the engines loaded."""
    run.publish(run.step)
    run.evaluate_first()
    for step in run.steps():
        batch = run.join(run.start(step))
        run.record(step + 1, batch, {})
