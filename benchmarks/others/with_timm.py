"""timm: `create_dataset` and `create_loader`, with DeiT's padded crop for small images."""

import sys

import torch
import torch.nn.functional as F
from small_cnn import small_cnn
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import AverageMeter, accuracy
from torchvision.transforms import RandomCrop

folder, device = sys.argv[1], torch.device("cpu")
train = create_dataset("", folder, split="train", is_training=True)
val = create_dataset("", folder, split="train")
test = create_dataset("", folder, split="test")
rows = torch.randperm(len(train)).tolist()
train.reader.samples = [val.reader.samples[row] for row in rows[len(rows) // 5 :]]
val.reader.samples = [val.reader.samples[row] for row in rows[: len(rows) // 5]]
options = {"input_size": (3, 32, 32), "batch_size": 128, "device": device}
train_loader = create_loader(train, is_training=True, color_jitter=0, **options)
train.transform.transforms[0] = RandomCrop(32, padding=4)
val_loader = create_loader(val, crop_pct=1.0, **options)
test_loader = create_loader(test, crop_pct=1.0, **options)
model = small_cnn()
optimizer = create_optimizer_v2(model, "adamw", lr=0.002)


@torch.no_grad()
def evaluate(loader):
    model.eval()
    meter = AverageMeter()
    for images, labels in loader:
        meter.update(accuracy(model(images), labels)[0].item() / 100, len(labels))
    return meter.avg


for epoch in range(1):
    model.train()
    for images, labels in train_loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(epoch, "val accuracy", evaluate(val_loader))
print("test accuracy", evaluate(test_loader))
