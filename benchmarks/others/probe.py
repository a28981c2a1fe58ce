"""Runs a script, or our command, until what is measured of it; prints that as JSON on a line.

    python probe.py start|batches NAME [argument ...]

- start: until the first training step is finished;
- batches: until the training starts, then the training's mini-batches without a network.

It takes the place of the function that would go on, so that the scripts stay as users write them.
"""

import json
import runpy
import sys
import time
from pathlib import Path

MARK = "MEASURED "
FOLDER = Path(__file__).parent


def report(**facts):
    print(f"\n{MARK}{json.dumps(facts)}", flush=True)
    time.sleep(60)  # whoever measures ends this process and its workers


def passes(batches, repeats):
    """Seconds of each pass over the training's mini-batches, and their images."""
    seconds, images = [], 0
    for _ in range(repeats):
        began, images = time.perf_counter(), 0
        for x, _labels in batches():
            images += len(x)
        seconds.append(time.perf_counter() - began)
    report(seconds=seconds, images=images)


def stop_at_first_step(name):
    if name == "keras":
        from keras.callbacks import CallbackList

        CallbackList.on_train_batch_end = lambda *_: report()
    elif name == "fastai":
        from fastai.callback.core import Callback
        from fastai.learner import Learner

        class Stop(Callback):
            def after_step(self):
                report()

        fit = Learner.fit
        Learner.fit = lambda self, *rest: fit(self, *rest, cbs=Stop())
    else:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(lambda *_: report())


def stop_at_training(name):
    if name == "keras":
        from keras import Model

        # the second pass reads what tf.data's cache has kept in memory
        Model.fit = lambda self, data, **_: passes(lambda: data, 2)
    elif name == "fastai":
        from fastai.learner import Learner

        Learner.fit = lambda self, *_: passes(lambda: self.dls.train, 1)
    elif name == "skorch":
        from skorch import NeuralNet

        NeuralNet.run_single_epoch = lambda self, batches, **_: passes(lambda: batches, 1)
    elif name == "timm":
        import timm.data
        import timm.optim

        create, loaders = timm.data.create_loader, []

        def create_loader(*args, **settings):
            loaders.append(create(*args, **settings))
            return loaders[-1]

        timm.data.create_loader = create_loader
        timm.optim.create_optimizer_v2 = lambda *_, **__: passes(lambda: loaders[0], 1)
    else:
        import lightning.pytorch as pl

        def start(self, trainer, module):
            data = trainer.datamodule
            loader = trainer.train_dataloader
            passes(lambda: (data.on_after_batch_transfer(batch, 0) for batch in loader), 2)

        pl.Callback.on_train_start = start


def main():
    mode, name, *arguments = sys.argv[1:]
    (stop_at_first_step if mode == "start" else stop_at_training)(name)
    if name == "ours":
        from mnist_lightning.__main__ import main

        sys.exit(f"the command ended: {main(arguments)}")
    sys.path.insert(0, str(FOLDER))
    sys.argv = [f"with_{name}.py", *arguments]
    runpy.run_path(str(FOLDER / sys.argv[0]), run_name="__main__")


if __name__ == "__main__":
    main()
