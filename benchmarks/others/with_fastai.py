"""fastai: `ImageDataLoaders.from_folder` and a Learner."""

import sys

from fastai.vision.all import (
    Adam,
    CropPad,
    Flip,
    ImageDataLoaders,
    Learner,
    RandomCrop,
    accuracy,
    get_image_files,
)
from small_cnn import small_cnn

folder = sys.argv[1]
dls = ImageDataLoaders.from_folder(
    f"{folder}/train",
    valid_pct=0.2,
    bs=128,
    item_tfms=[CropPad(40), RandomCrop(32)],
    batch_tfms=Flip(),
)
learn = Learner(dls, small_cnn(), opt_func=Adam, metrics=accuracy)
learn.fit(1, 0.002)
test = dls.test_dl(get_image_files(f"{folder}/test"), with_labels=True)
print("test accuracy", learn.validate(dl=test)[1])
