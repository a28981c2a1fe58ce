"""Many trainings: what is tried, by which workers, and what came of it."""

from mnist_lightning.moved import former_names

__getattr__ = former_names(__name__, ["search.command"])
