"""Changes to a loaded checkpoint before Lightning resumes from it."""

import copy
from collections.abc import Mapping
from typing import Any


def count_manual_steps(checkpoint: dict[str, Any]) -> None:
    """Copies the step count of an older checkpoint from manual to automatic optimization."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    manual = loops.get("epoch_loop.manual_optimization.optim_step_progress")
    automatic = loops.get("epoch_loop.automatic_optimization.optim_progress")
    if manual and automatic:
        step = automatic["optimizer"]["step"]
        if manual["total"]["completed"] > step["total"]["completed"]:
            step.update(copy.deepcopy(manual))


def take_lr(checkpoint: dict[str, Any], lr: float) -> None:
    """Replaces the saved learning rate ``lr`` in the states of optimizers and schedulers.

    All learning rates are scaled by the ratio of the new rate to the saved one.
    """
    saved = checkpoint.get("hyper_parameters", {}).get("lr", lr)
    if saved != lr:
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                _scale_rates(group, saved, lr)
        for state in checkpoint.get("lr_schedulers", []):
            _scale_rates(state, saved, lr)


def take_options(
    checkpoint: dict[str, Any], saved: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """Replaces saved options of the optimizer that differ from those of the model.

    Args:
        checkpoint: as loaded.
        saved: ``momentum``, ``nesterov``, ``weight_decay``, ``schedule`` and ``warmup_epochs`` of
            the training so far, or some of them.
        options: the same of the model.

    Raises:
        ValueError: the saved state does not fit an option.
    """
    for name, old in saved.items():
        new = options[name]
        if old == new:
            continue
        if name in ("schedule", "warmup_epochs") or (name == "weight_decay" and not (old and new)):
            raise ValueError(
                f"a training with {name} {old} cannot resume with {new}: leave {name} as it was, or"
                " start a new training"
            )
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                if group[name] == old:  # the group of biases has no weight decay
                    group[name] = new


def _scale_rates(state: dict[str, Any], old: float, new: float) -> None:
    """Scales the learning rates in the state of a parameter group or of a scheduler."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(scaled(rate) for rate in value)
        return new * (value / old)  # in this order, so that old becomes exactly new

    for name, value in state.items():
        if name in ("lr", "initial_lr", "max_lr", "min_lr", "base_lrs", "max_lrs", "_last_lr"):
            state[name] = scaled(value)
        elif name == "_schedulers":  # a scheduler that consists of other schedulers
            for inner in value:
                _scale_rates(inner, old, new)
