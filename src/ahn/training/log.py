"""What a training prints while it runs, and its log afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

Say = Callable[[str], None]
"""Is given a line of text now and then."""


class Lines(TrainerCallback):
    """Prints a line for every line of the log.

    Args:
        stage: Name of the stage.
        say: Prints the line.
    """

    def __init__(self, stage: str, say: Say) -> None:
        self.stage = stage
        self.say = say

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; the last step is logged and evaluated whatever the interval."""
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or last
        control.should_evaluate = control.should_evaluate or (last and args.eval_strategy != "no")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the Trainer."""
        if not state.is_world_process_zero or not logs:
            return
        losses = [name for name in logs if name.removeprefix("eval_").startswith("loss")]
        parts = [f"{name.replace('eval_loss', 'held-out loss')} {logs[name]:.4f}" for name in losses]
        if not parts:
            return
        rate = logs.get("train_tokens_per_second")
        speed = f", {logs['num_input_tokens_seen']:,} tokens, {rate:,.0f} tokens/s" if rate else ""
        self.say(f"{self.stage} {state.global_step}/{state.max_steps}: {', '.join(parts)}{speed}")


def read_history(file: Path) -> list[dict[str, float]]:
    """The lines of the log in a `trainer_state.json`; none if there is no such file."""
    return list(TrainerState.load_from_json(str(file)).log_history) if file.is_file() else []
