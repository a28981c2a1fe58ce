"""Many trainings: what is searched, which worker trains what, and the results."""

from mnist_lightning.moved import former_names

__getattr__ = former_names(__name__, ["search.command"])
