"""One run: its folder, checkpoints, logs, messages and test evaluations."""
