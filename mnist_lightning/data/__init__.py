"""Image data: find or download it, verify, split, batch and resize it."""

from mnist_lightning.moved import former_names

__getattr__ = former_names(
    __name__, ["data.module", "data.sampling", "data.photos", "data.readers", "data.download"]
)
