"""The names of what is measured in each epoch, for code that does without PyTorch too."""

# of the trials of a search; the train loss is the mean over its mini-batches as they came
CURVES = ("train_loss", "val_loss", "val_acc")
