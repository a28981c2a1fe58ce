"""The training: executions, callbacks, layer freezing, progress on the console."""
