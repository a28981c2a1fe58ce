"""Use what was trained: answers for your own images, and files for other programs."""
