"""Images in: found or fetched, verified, split, batched, resized."""

from mnist_lightning.moved import former_names

__getattr__ = former_names(
    __name__, ["data.module", "data.sampling", "data.photos", "data.readers", "data.download"]
)
