"""skorch: torchvision's ImageFolder, as in skorch's tutorial on transfer learning."""

import sys

import torch
from sklearn.metrics import accuracy_score
from sklearn.model_selection import train_test_split
from skorch import NeuralNetClassifier
from skorch.helper import predefined_split
from small_cnn import small_cnn
from torch.utils.data import Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

folder = sys.argv[1]
plain = T.ToTensor()
augmented = T.Compose([T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), plain])
train = ImageFolder(f"{folder}/train", augmented)
val = ImageFolder(f"{folder}/train", plain)
test = ImageFolder(f"{folder}/test", plain)
rows, val_rows = train_test_split(range(len(train)), test_size=0.2, stratify=train.targets)
net = NeuralNetClassifier(
    small_cnn,
    criterion=torch.nn.CrossEntropyLoss,
    optimizer=torch.optim.AdamW,
    lr=0.002,
    batch_size=128,
    max_epochs=1,
    classes=range(10),
    iterator_train__shuffle=True,
    train_split=predefined_split(Subset(val, val_rows)),
)
net.fit(Subset(train, rows), None)
print("test accuracy", accuracy_score(test.targets, net.predict(test)))
