"""What a resumed training changes in a checkpoint before Lightning restores it."""

import copy
from typing import Any


def count_manual_steps(checkpoint: dict[str, Any]) -> None:
    """Moves the optimizer steps of an older checkpoint out of Lightning's other counter."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    manual = loops.get("epoch_loop.manual_optimization.optim_step_progress")
    automatic = loops.get("epoch_loop.automatic_optimization.optim_progress")
    if manual and automatic:
        step = automatic["optimizer"]["step"]
        if manual["total"]["completed"] > step["total"]["completed"]:
            step.update(copy.deepcopy(manual))


def take_lr(checkpoint: dict[str, Any], lr: float) -> None:
    """Has optimizers and schedulers go on with another learning rate than they were saved with.

    Rates that are multiples of the saved one are scaled.
    """
    saved = checkpoint.get("hyper_parameters", {}).get("lr", lr)
    if saved != lr:
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                _scale_rates(group, saved, lr)
        for state in checkpoint.get("lr_schedulers", []):
            _scale_rates(state, saved, lr)


def _scale_rates(state: dict[str, Any], old: float, new: float) -> None:
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
                _scale_rates(inner, old, new)
