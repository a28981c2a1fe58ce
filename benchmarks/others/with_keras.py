"""Keras: `image_dataset_from_directory`, with tf.data's cache as TensorFlow's tutorials have it."""

import sys

import keras
from keras import layers
from small_cnn_keras import small_cnn
from tensorflow.data import AUTOTUNE

folder = sys.argv[1]
options = {"image_size": (32, 32), "batch_size": 128}
train, val = keras.utils.image_dataset_from_directory(
    f"{folder}/train", validation_split=0.2, subset="both", seed=0, **options
)
test = keras.utils.image_dataset_from_directory(f"{folder}/test", shuffle=False, **options)
augment = keras.Sequential(
    [layers.RandomFlip("horizontal"), layers.ZeroPadding2D(4), layers.RandomCrop(32, 32)]
)
train = train.cache().map(lambda x, y: (augment(x, training=True), y), AUTOTUNE).prefetch(AUTOTUNE)
val = val.cache().prefetch(AUTOTUNE)
model = small_cnn()
model.compile(
    keras.optimizers.AdamW(0.002),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(train, validation_data=val, epochs=1)
print("test accuracy", model.evaluate(test)[1])
