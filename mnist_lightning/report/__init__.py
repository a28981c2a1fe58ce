"""What searches found: numbers, words, figures, and one page with all of them."""

from mnist_lightning.moved import former_names

__getattr__ = former_names(__name__, ["report.command", "report.page", "report.sections"])
