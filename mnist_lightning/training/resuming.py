"""What a resumed training changes in a checkpoint before Lightning restores it."""

import copy
from typing import Any


def count_manual_steps(checkpoint: dict[str, Any]) -> None:
    """Of an older checkpoint, whose optimizer steps may be in Lightning's other counter."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    manual = loops.get("epoch_loop.manual_optimization.optim_step_progress")
    automatic = loops.get("epoch_loop.automatic_optimization.optim_progress")
    if manual and automatic:
        step = automatic["optimizer"]["step"]
        if manual["total"]["completed"] > step["total"]["completed"]:
            step.update(copy.deepcopy(manual))


def scale_rates(state: dict[str, Any], old: float, new: float) -> None:
    """Scales the learning rates in the state of a parameter group or of a scheduler."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(scaled(one) for one in value)
        return new * (value / old)  # exactly new, where it was old

    for name, value in state.items():
        if name in ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "_last_lr"):
            state[name] = scaled(value)
        elif name == "_schedulers":  # of a scheduler made of others
            for inner in value:
                scale_rates(inner, old, new)
