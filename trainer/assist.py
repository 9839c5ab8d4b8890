"""The straight line of a process that trains with others and writes nothing: its share of every step.

It takes its state from the process that writes, at the start and wherever that one goes back, and so needs
neither the run folder nor the checkpoint's disk. Both take the same updates, step by step.
"""

from __future__ import annotations

from .loop import Lane, step_event, train_step
from .resuming import share_state
from .rollback import Diverged, Safety, exploded
from .run import Run


def assist(run: Run) -> Lane:
    """Train a run to its end beside the process that writes; yields `Step` events alone."""
    share_state(run)
    run.adapter.select()
    run.world.wait_turns(0, run.world.turn)  # what others have encoded is found on the disk
    for _ in run.inputs.prepare():
        run.world.beat()
    run.world.wait_turns(run.world.turn)
    safety = Safety(run)
    while run.step < run.plan.total_steps:
        try:
            result = yield from train_step(run)
            yield step_event(run, result)
            if safety.explodes(result.loss):
                raise exploded(run)
        except Diverged:  # the writer has met the same, and goes back or ends
            share_state(run)
            safety = Safety(run)
