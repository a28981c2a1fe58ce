"""What a run leaves: its folder, checkpoints, logs and test evaluations."""
