"""`ConvNetwork` with widths [16, 32], as its user would write it in Keras."""

from keras import Sequential, layers


def stage(outputs):
    return [
        layers.Conv2D(outputs, 3, padding="same", use_bias=False),
        layers.MaxPooling2D(),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.Conv2D(outputs, 3, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
    ]


def small_cnn():
    head = layers.GlobalAveragePooling2D(), layers.Dense(10)
    return Sequential([layers.Rescaling(1 / 255), *stage(16), *stage(32), *head])
