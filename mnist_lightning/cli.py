"""fit, validate, test, predict through LightningCLI, and inspect.

A checkpoint gives defaults for all options that the command leaves out: the model's class, its
hyper-parameters, the settings of the data. Options of the command win; they are refused if they
contradict the weights.
"""

import copy
import csv
import gc
import io
import re
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import nn

from mnist_lightning import console, moved, words
from mnist_lightning.classes import (
    allow_classes,
    class_path,
    import_class,
    is_own,
    naming,
    parser_settings,
)
from mnist_lightning.configs import (
    ConfigByName,
    classes_in,
    classes_in_argument,
    read_config,
    read_request,
)
from mnist_lightning.console import say, short
from mnist_lightning.data.module import MNISTDataModule
from mnist_lightning.data.sampling import in_image_order
from mnist_lightning.files import csv_cell, first_line, printable, reason, write_bytes, write_text
from mnist_lightning.models import inspection, own
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.models.epoch_metrics import Diverged
from mnist_lightning.models.perceptron import Perceptron
from mnist_lightning.models.resnet import ResNet18
from mnist_lightning.parser import Parser, shorten
from mnist_lightning.quiet import quiet
from mnist_lightning.runs import checkpoints, ensembles, evaluations, messages
from mnist_lightning.runs.checkpoints import DATA_CLASS, REMEDY, ModelCheckpoint, Origin, WholeFiles
from mnist_lightning.runs.folder import LOGS, RunFolder, find_checkpoint, run_name
from mnist_lightning.runs.loggers import Dashboard, RunLogger
from mnist_lightning.spec import DataSpec
from mnist_lightning.training import memory, tuning
from mnist_lightning.training.callbacks import EarlyStopping, Mistakes, SafePoints
from mnist_lightning.training.execution import Execution
from mnist_lightning.training.freezing import LayerFreezing
from mnist_lightning.training.progress import EpochLines, ProgressBar


def fit(argv: list[str]) -> None:
    """Trains a model, and prints a summary; with ``--tune``, finds one of its settings first."""
    with quiet(training=True):
        if (tuned := CLI(["fit", *argv]).tuned) is not None:
            gc.collect()  # frees the images and the model of the Tuner
            CLI(tuned.argv, curve=tuned.curve)


def validate(argv: list[str]) -> None:
    """Evaluates a checkpoint, or several as an ensemble, on the validation images."""
    _run("validate", ensembles.as_one(argv))


def test(argv: list[str]) -> None:
    """Evaluates a checkpoint on the test images, and records it in the folder of the run.

    Several are evaluated as an ensemble, which has a folder of its own.
    """
    _run("test", ensembles.as_one(argv))


def predict(argv: list[str]) -> int:
    """Labels images: those at the paths in ``argv``, or the validation images with a Trainer."""
    options, paths = words.split_paths(argv)
    options = ensembles.as_one(options)
    given = {name for name, _ in words.options(options)}
    if paths or given & {"json", "out"} or given == {"help"}:
        from mnist_lightning.deploy.predict import main

        with quiet(training=False):
            return main([*options, "--", *paths])
    _run("predict", options)
    return 0


def _run(command: str, argv: list[str]) -> None:
    with quiet(training=False):
        CLI([command, *argv])


def inspect(argv: list[str]) -> None:
    """Prints the layers of a model, and draws training images as the model sees them.

    For the perceptron it also prints the tensors of a training step. Of a checkpoint it draws what
    the model learned and where it fails, into the folder of the run.
    """
    with quiet(training=False):
        cli = CLI(argv, run=False)
    data, model = cli.datamodule, cli.model
    net = cast(nn.Module, getattr(model, "net", model))
    image = torch.zeros(1, *_spec(data).shape)
    print(inspection.format_layers(inspection.layer_table(net, image), net))
    if not isinstance(data, MNISTDataModule):
        return
    data.prepare_data()
    data.setup()
    if isinstance(model, Perceptron):
        print(f"\nOne training step on {data.describe()}\n")
        images, labels, *_ = next(iter(data.train_dataloader()))
        rows = inspection.tensor_table(model, data, data.preprocess(images), labels)
        print(inspection.format_table(("Tensor", "Shape", "Meaning"), rows))
    if cli.checkpoint is not None:
        _show_trained(cli)
        return
    write_bytes(Path("samples.png"), inspection.sample_sheet(data))
    each = ", each first as it is, then as augmented in nine epochs" if data.augment else ""
    print(f"\nsamples.png: training images of {data.describe()}{each}")


def _show_trained(cli: "CLI") -> None:
    """Draws a trained model into the folder of its run, for all validation images."""
    from mnist_lightning.insight import gradcam, pictures

    assert cli.checkpoint is not None
    assert cli.checkpoint_path is not None
    model, data = cli.model, cli.datamodule
    model.load_state_dict(cli.checkpoint["state_dict"])
    drawn = dict(pictures.draw(model, data, pictures.validation_answers(model, data)))
    if not _validates(data):
        print(f"\n{pictures.WITHOUT_VALIDATION}")
    elif isinstance(model, Classifier) and isinstance(data, MNISTDataModule):
        try:
            if (sheet := gradcam.draw(model, data)) is not None:
                drawn["gradcam"] = pictures.png(sheet)
        except ModuleNotFoundError:
            print(f"\nto see where the network looks (Grad-CAM): {console.install('explain')}")
    folder = pictures.write(RunFolder.of(cli.checkpoint_path).path, drawn)
    print(f"\npictures of {own.describe(data)} in {short(folder)}:\n  {', '.join(drawn)}")


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the folder of a training.

    In a resumed run the file is replaced when the first checkpoint is saved: if the training
    fails earlier, the run can still resume with its old settings.
    """

    _file: Path | None = None  # not written yet

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = trainer.log_dir  # communicates: every process must call it
        if stage == "fit" and trainer.loggers and folder and trainer.is_global_zero:
            self._file = Path(folder, self.config_filename)
            if not self._file.exists():
                self._write()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, self.parser.dump(self.config, skip_none=False))
            self._file = None


class CLI(LightningCLI):
    """LightningCLI that takes defaults from a checkpoint and gives each run its own folder.

    Args:
        argv: the command and its options; without ``run``, options alone.
        run: whether there is a command, which runs.
        curve: of the learning rates that were tried before this training, as CSV.
    """

    datamodule: LightningDataModule
    model: LightningModule

    def __init__(self, argv: list[str], run: bool = True, curve: str = "") -> None:
        self.argv, self.curve = argv, curve
        self.tuned: tuning.Tuned | None = None  # after a command with --tune, which does not train
        self.command, options = (argv[0], argv[1:]) if run else ("", argv)
        self.request = read_request([argument for argument in options if argument != "--trust"])
        if not is_own(self.request.model):
            self.request.others = moved.current_argv(self.request.others)
        self.checkpoint_path: Path | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.run_name = run_name(self.request)
        self.run: RunFolder | None = None  # only of a training with a logger
        self.locked: RunFolder | None = None
        self.defaults: dict[str, Any] = {}
        self.root = Path(self.request.root) / LOGS
        try:
            with parser_settings():
                self._read_defaults()
                # subclass_mode_data expects the settings of a data module in its init_args
                own_data = self.request.data is not None
                super().__init__(
                    LightningModule,
                    LightningDataModule if own_data else MNISTDataModule,
                    args=argv,
                    run=run,
                    subclass_mode_model=True,
                    subclass_mode_data=own_data,
                    # the optimizer and its lr are arguments of the model: every checkpoint has them
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    seed_everything_default=0,
                    save_config_callback=SaveConfig,
                    save_config_kwargs={"overwrite": True},
                    parser_class=Parser,
                    trainer_defaults={
                        "max_epochs": 50,
                        "num_sanity_val_steps": 0,
                        "enable_model_summary": False,
                    },
                )
        finally:
            if self.locked is not None:
                self.locked.unlock()

    def _read_defaults(self) -> None:
        """Imports the user's classes that the command names, and reads the checkpoint."""
        request = self.request
        named = {c for argument in request.others for c in classes_in_argument(argument)}
        named |= {c for config in request.configs for c in classes_in(read_config(config))}
        allow_classes(named)
        for name in (request.model, request.data):
            if is_own(name):
                import_class(cast(str, name))
        if request.data is not None:
            self.defaults["data"] = {"class_path": request.data}
        if request.ckpt_path is not None:
            self._start_from(request.ckpt_path, named)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", ["all settings of a run of mnist_lightning"])
        # other code looks options up by their full names
        parser = Parser(**{"allow_abbrev": False, **kwargs})
        parser.add_argument(
            "-c", "--config", action=ConfigByName, help="A YAML file, or the name of a shipped one."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.request.data is None or hasattr(import_class(self.request.data), "spec"):
            # a model without an argument spec, of the user's own, is left as it is
            parser.link_arguments(
                "data", "model.init_args.spec", compute_fn=_plain_spec, apply_on="instantiate"
            )
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(LayerFreezing, "freezing")
        parser.add_lightning_class_args(Execution, "execution")
        parser.add_argument(
            "--save_every_minutes",
            type=float,
            default=5.0,
            help="Writes last.ckpt also within an epoch, each time this many minutes have passed:"
            " a kill loses no more.",
        )
        parser.add_argument(
            "--pictures",
            type=bool,
            default=True,
            help="Draws what the best epoch learned and where it fails, when the training ends.",
        )
        if not self.command:  # inspect: the other commands have it from the Trainer's methods
            parser.add_argument("--ckpt_path", type=str | None, default=None)
        parser.add_argument(
            "--tune",
            type=tuning.Tune,
            default="none",
            help="Finds the learning rate, or the largest batch size that fits into a GPU, with"
            " Lightning's Tuner; then trains with it.",
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command alone: the parsers of the others would take as long as everything else."""
        known = LightningCLI.subcommands()
        return {self.command: known[self.command]} if self.command else known

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "test":
            parser.add_argument(
                "--robustness",
                action="store_true",
                help="Measures the accuracy on shifted, rotated, scaled, noisy, blurred, faded,"
                " thinner and thicker test images instead.",
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        configs = [f"--config={config}" for config in self.request.configs]
        try:
            self._parser(self.command or None).set_defaults(self.defaults)
            self.config = parser.parse_args(
                [*([self.command] if self.command else []), *configs, *self.request.others]
            )
        except ValueError as error:
            denied = re.search(r"Importing '([\w.]+)' is not allowed", str(error))
            if denied and is_own(denied[1]):
                raise ValueError(self._untrusted(f"a file names {denied[1]}")) from error
            if denied:
                raise ValueError(
                    f"a file names {denied[1]}, which is never imported: name a class of"
                    " mnist_lightning, torch.nn, torch.optim or Lightning, or your own"
                ) from error
            raise
        settings = self.config.get(self.command, self.config)
        if self.command:  # a configuration may name another checkpoint, or a run
            settings.ckpt_path = str(self.checkpoint_path) if self.checkpoint_path else None
        if self.run_name is None:
            self.run_name = settings.model.class_path.rpartition(".")[2]
        if self._tunes and self.checkpoint_path is not None:
            raise ValueError(
                f"--tune {settings.tune} is for a new training, and {short(self.checkpoint_path)}"
                " continues one: leave --tune or --ckpt_path out"
            )

    @property
    def _tunes(self) -> bool:
        return self.command == "fit" and self.config["fit"].tune != "none"

    def _untrusted(self, what: str) -> str:
        again = console.command(*self.argv, "--trust")
        return (
            f"{what}, a class from outside mnist_lightning, PyTorch and Lightning: importing it"
            f" would run its code. If you trust the file:\n{again}"
        )

    def _start_from(self, where: str, named: set[str]) -> None:
        """Reads a checkpoint; its settings become the defaults of the parser.

        Args:
            where: the value of ``--ckpt_path``.
            named: the classes that the user named.
        """
        request, training = self.request, self.command == "fit"
        path = find_checkpoint(where, self.root, self.run_name, "last" if training else "best")
        run = RunFolder.of(path)
        if training and run.exists:
            run.lock()  # before reading: another process could replace the file
            self.locked = run
        checkpoint = checkpoints.read(path)
        self.checkpoint_path, self.checkpoint = path, checkpoint
        recorded = run.config
        if "--trust" in self.argv:
            named |= set(classes_in(read_config(recorded) if recorded.is_file() else None))
            named |= {checkpoint.get(key, "") for key in ("model_class", "data_class")}
            named |= set(classes_in(checkpoint.get("hyper_parameters")))
            allow_classes(named)
        if training:
            checkpoints.check_resumable(checkpoint, path)
        if recorded.is_file():
            if where in ("best", "last"):
                # the configuration only named the run: use the settings that the run recorded
                request.configs = [recorded]
            elif training:
                request.configs = [recorded, *request.configs]
        model = self._class_in("model", request.model, named, LightningModule)
        given = {argument.partition("=")[0].removeprefix("--data.") for argument in request.others}
        checkpoints.check_complete(checkpoint, model, given, path)
        self.defaults["model"] = {
            "class_path": class_path(model),
            "init_args": checkpoints.arguments(model, checkpoint.get("hyper_parameters", {})),
        }
        for name, value in checkpoint.get("execution", {}).items():
            self.defaults[f"execution.{name}"] = value
        data = checkpoints.data_settings(checkpoint)
        if request.data is None and "data_class" not in checkpoint:
            self.defaults |= {f"data.{key}": value for key, value in data.items()}
            return
        kind = self._class_in("data", request.data, named, LightningDataModule)
        request.data = class_path(kind)
        self.defaults["data"] = {
            "class_path": request.data,
            "init_args": checkpoints.arguments(kind, data),
        }

    def _class_in(self, what: str, requested: str | None, named: set[str], kind: type) -> type:
        """The class of the checkpoint's model or data; a user's class only if the user names it.

        Args:
            what: ``model`` or ``data``.
            requested: the class that the command asks for.
            named: all classes that the command names.
            kind: the base class that it must have.
        """
        assert self.checkpoint is not None
        saved = self.checkpoint.get(f"{what}_class", None if what == "model" else DATA_CLASS)
        path = requested if is_own(requested) else saved
        if path is None:
            raise ValueError(
                f"{self.checkpoint_path} has no model_class. {REMEDY} For a model of your own,"
                " name its class: --model my_module.MyModel"
            )
        if requested and saved and requested.rpartition(".")[2] != saved.rpartition(".")[2]:
            _, _, name = saved.rpartition(".")
            raise ValueError(
                f"{self.checkpoint_path} holds a {name}, not a {requested.rpartition('.')[2]}"
            )
        if path in named and is_own(path):
            import_class(path)
        try:
            return checkpoints.known_class(path, kind)
        except ValueError as error:
            if path.startswith("__main__."):
                raise ValueError(
                    f"{self.checkpoint_path} holds a {path}, a class defined in a script. Name the"
                    f" script's file: --{what} my_script.{path.rpartition('.')[2]}"
                ) from error
            if is_own(path):
                reason = self._untrusted(f"{self.checkpoint_path} names {path}")
                raise ValueError(reason) from error
            raise ValueError(f"{self.checkpoint_path}: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning's method would override the user's flags with the checkpoint."""

    def before_instantiate_classes(self) -> None:
        self._find_weights()
        data, saved = self._data_settings(), {}
        if self.checkpoint is not None:
            saved = self.checkpoint.get("datamodule_hyper_parameters", {})
        folder = data.get("data_dir")
        if data.get("source") == "auto" and folder in (None, saved.get("data_dir")):
            data.source = saved.get("source", "auto")  # the user chose no source
        elif data.get("source") == "digits" and folder is not None:
            raise ValueError(
                f"--data.data_dir {folder}: scikit-learn's digits are not in a folder. Leave the"
                " option out, or give --data.source mnist"
            )

    def _find_weights(self) -> None:
        """Replaces the folder of a run, as weights to start from, by its checkpoint."""
        settings = self._get(self.config, "model").get("init_args") or {}
        weights = settings.get("weights")
        if isinstance(weights, str) and Path(weights).is_dir():
            try:
                settings["weights"] = str(find_checkpoint(weights, self.root))
            except ValueError as error:
                raise ValueError(
                    f"--model.weights {weights}: no file, and no folder of a run with a checkpoint"
                ) from error

    def _data_settings(self) -> Any:
        data = self._get(self.config, "data")
        return data.get("init_args", data) if self.request.data else data

    def instantiate_classes(self) -> None:
        if self.subcommand == "fit":
            self._check_memory()
        try:
            super().instantiate_classes()
        except ValueError as error:  # a constructor's error, wrapped by the parser
            raise ValueError(shorten(str(error), self._parser(self.subcommand))) from error

    def _check_memory(self) -> None:
        settings = self.config["fit"]
        if torch.cuda.is_available() and settings.trainer.accelerator != "cpu":
            return
        module, _, name = settings.model.class_path.rpartition(".")
        arguments = dict(settings.model.get("init_args", {}))
        spec = DataSpec()
        if self.request.data is None:
            spec = MNISTDataModule(**settings.data.as_dict()).spec
            if "spec" in arguments:
                arguments["spec"] = spec
        make = partial(getattr(sys.modules[module], name), **arguments)
        if "batch_size" in (data := self._data_settings()):
            memory.check(make, data.batch_size, spec, settings.execution.fused)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # The model and the data exist now: check them before the run's folder is made.
        if self.checkpoint is not None and self.checkpoint_path is not None:
            checkpoints.check_agrees(
                self.model, dict(self.datamodule.hparams), self.checkpoint, self.checkpoint_path
            )
        _check_image_size(self.model, self.datamodule)
        own.check_can(self.command, self.model)
        settings = self._get(self.config_init, "trainer")
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if self.subcommand == "fit" and settings.get(name) == 0:
                raise ValueError(f"nothing would be trained: --trainer.{name} is 0")
        extra: list[Any] = [*self._screen(settings, kwargs), Dashboard()]
        self._get(self.config_init, "execution").say = say
        kwargs["logger"] = False
        if self.subcommand == "fit":
            extra += self._for_training(settings, kwargs)
        plugins = _as_list(settings.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles()]
        kwargs["callbacks"] = [*_as_list(settings.get("callbacks")), *extra]
        if self._tunes:
            callbacks = _as_list(settings.get("callbacks"))
            kwargs = tuning.trainer_settings(settings, callbacks, plugins)
            self._get(self.config_init, "freezing").cache = False  # for a few mini-batches
        try:
            trainer = super().instantiate_trainer(**kwargs)
            memory.check_processes(trainer.num_devices)
            return trainer
        except Exception:
            self._take_back_run()
            raise

    def _screen(self, settings: Any, kwargs: dict[str, Any]) -> list[Callback]:
        """The callbacks that show progress; a live bar only on a terminal."""
        terminal = sys.stdout.isatty()
        shown: list[Callback] = [
            EpochLines(shutil.get_terminal_size().columns if terminal else None)
        ]
        users = any(isinstance(c, AnyProgressBar) for c in _as_list(settings.get("callbacks")))
        if settings.get("enable_progress_bar") is not False and not users:
            kwargs["enable_progress_bar"] = terminal
            shown += [ProgressBar()] if terminal else []
        return shown

    def _for_training(self, settings: Any, kwargs: dict[str, Any]) -> list[Callback]:
        """Prepares data, weights and folder; returns the callbacks that save checkpoints."""
        self._check_batch_size()
        self.safe_points = SafePoints(self._get(self.config_init, "save_every_minutes"))
        if isinstance(self.datamodule, MNISTDataModule):
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        monitor = {} if self._tunes else self._choose_monitor()
        if isinstance(self.model, ResNet18) and self.checkpoint is None:
            self.model.load_pretrained()
        self._get(self.config_init, "freezing").choose(self.model)
        if self._tunes:  # writes nothing
            return []
        if settings.get("logger") in (None, True) and not settings.get("fast_dev_run"):
            kwargs["logger"] = self._run_logger()
        else:
            kwargs["logger"] = settings.get("logger")
        if settings.get("enable_checkpointing") is False:
            return [self.safe_points]
        # Two callbacks: with save_last, ModelCheckpoint only copies the best checkpoint, and only
        # when there is a new best one. Both save when the epoch's metrics are known.
        options: dict[str, Any] = {"enable_version_counter": False, "save_on_train_epoch_end": True}
        return [
            self.safe_points,
            ModelCheckpoint(filename="best", **monitor, **options),
            ModelCheckpoint(filename="last", **options),
            self._origin(),
        ]

    def _choose_monitor(self) -> dict[str, Any]:
        """Has early stopping monitor a metric that the model logs, if there is a validation.

        Returns:
            ``monitor`` and ``mode`` of the ModelCheckpoint that keeps the best epoch; empty if
            the model logs no metric for it.
        """
        names = ["val/loss", "val/acc"]
        settings = self.config_init[self.command]
        if not _validates(self.datamodule):
            self._stop_without_validation(settings)
            return {}
        if not own.logs_as_ours(self.model):
            try:
                names = own.figures(self.model, self.datamodule)
            except own.ValidationFails as error:
                monitor = settings.early_stopping.monitor
                names = [monitor] if monitor != "val/loss" else []
                rank_zero_warn(
                    f"{error}. This was a trial before the training, which may still work. Name a"
                    " metric that it logs: --early_stopping.monitor val_loss"
                )
            settings.early_stopping, outcome = own.stopping(settings.early_stopping, names)
            if not {"val/loss", "val/acc"} <= set(names):
                logged = ", ".join(names) or "nothing"
                say(f"{type(self.model).__name__} logs {logged} in a validation: {outcome}")
        best = own.watched(names).best
        return {"monitor": best[0], "mode": best[1]} if best else {}

    def _stop_without_validation(self, settings: Any) -> None:
        """Turns early stopping off, unless it monitors a metric of the training.

        Raises:
            ValueError: the user asks for it on the command line.
        """
        stopping = settings.early_stopping
        if not stopping.enabled or not stopping.monitor.startswith("val"):
            return
        for name, value in words.options(self.request.others):
            if name.startswith("early_stopping."):
                raise ValueError(
                    "with --data.val_fraction 0 there is no validation that early stopping could"
                    f" monitor: leave --{name} {value} out"
                )
        stopping.enabled = False
        self.config[self.command].early_stopping.enabled = False  # for config.yaml

    def _origin(self) -> Origin:
        settings = self.config[self.command]
        made = yaml.safe_load(self._parser(self.command).dump(settings, skip_none=False))
        return Origin(made["model"], made["data"] if self.request.data else None)

    def _check_batch_size(self) -> None:
        """Refuses to resume within an epoch with another batch size."""
        if self.checkpoint is not None and checkpoints.progress(self.checkpoint)[1]:
            saved = self.checkpoint.get("datamodule_hyper_parameters", {}).get("batch_size")
            if saved != getattr(self.datamodule, "batch_size", saved):
                raise ValueError(
                    f"{self.checkpoint_path} was saved within an epoch, at batch size {saved}:"
                    f" resume with --data.batch_size {saved}, or from the end of an epoch"
                )

    def _run_logger(self) -> RunLogger:
        """The logger of a new run, or of the run that the checkpoint belongs to."""
        if self.locked is not None and self.checkpoint is not None:
            self.run = self.locked
            done, _ = checkpoints.progress(self.checkpoint)
            return RunLogger(self.run.path, first_epoch=done + 1)
        self.run = self.locked = RunFolder.make(self.root / str(self.run_name))
        self.run.lock()
        return RunLogger(self.run.path)

    def _take_back_run(self) -> None:
        if self.run is not None:
            self.run.take_back()

    def fit(self, **kwargs: Any) -> None:
        trainer = self.trainer
        if not self._tunes:
            self._announce()
        try:
            with self.safe_points.stop_on_signals(trainer) as received:
                if self._tunes:
                    self.tuned = self._tune()
                    return
                if self.run is not None and self.curve:
                    write_text(self.run.path / "lr_find.csv", self.curve)
                trainer.fit(**kwargs)
        except SystemExit as stop:
            if isinstance(stop, SIGTERMException):
                received.append(signal.SIGTERM)
            elif isinstance(stop.__context__, KeyboardInterrupt):
                received.append(signal.SIGINT)
            if not received:
                raise
            if trainer.global_step == 0 and not (self.run and self.run.last.is_file()):
                self._take_back_run()
            messages.say_stopped(self.run, self._class_options())
            # one Ctrl-C, which ends as a SIGTERM; a second one, or a real SIGTERM, does not wait
            if received in ([signal.SIGINT], [signal.SIGINT, signal.SIGTERM]):
                self._draw()
            raise SystemExit(128 + received[0]) from None
        except Exception as error:
            if (explained := self._explained(error)) is None:
                raise
            raise explained from error
        if trainer.global_step == (self.checkpoint or {}).get("global_step", 0):
            if self.checkpoint is None:
                self._take_back_run()
                raise ValueError("nothing was trained: the training ended before its first step")
            say(
                f"\nnothing was left to train: {trainer.current_epoch} epochs are done."
                " For more: --trainer.max_epochs N"
            )
        if self.run is not None:
            self._draw()
            messages.say_finished(trainer, self.run, self._class_options())

    def _draw(self) -> None:
        """Draws the pictures of the run's best epoch. If that fails, the training is still fine."""
        run, trainer, data = self.run, self.trainer, self.datamodule
        if run is None or not self.config["fit"].pictures or not trainer.is_global_zero:
            return
        if not run.best.is_file():
            return
        from mnist_lightning.insight import pictures

        trained = trainer.global_step * getattr(data, "batch_size", 0) * trainer.world_size
        try:
            best = checkpoints.read(run.best)
            epoch, most = best["epoch"] + 1, pictures.answers_after(trained)
            place = trainer.strategy.root_device
            if not _validates(data):
                say(pictures.WITHOUT_VALIDATION)
            with pictures.with_weights(self.model, best["state_dict"], place):
                pictures.write_run(run, self.model, data, epoch, most)
        except Exception as error:
            rank_zero_warn(f"the pictures of {run} are not complete: {first_line(error)}")

    def _announce(self) -> None:
        """Says what is trained, on what, and from where."""
        trainer, model = self.trainer, self.model
        stopping = next(c for c in trainer.early_stopping_callbacks if isinstance(c, EarlyStopping))
        limit = f"patience {stopping.patience}" if stopping.enabled else "off"
        parameters = sum(p.numel() for p in model.parameters())
        say(f"{type(model).__name__}, {parameters:,} parameters, on {trainer.strategy.root_device}")
        say(own.describe(self.datamodule))
        if isinstance(self.datamodule, MNISTDataModule):
            say(self.datamodule.describe_classes())
        size = getattr(self.datamodule, "batch_size", "its own")
        say(f"batch size {size}, at most {trainer.max_epochs} epochs, early stopping {limit}")
        if not _validates(self.datamodule):
            say("no validation: early stopping does not apply, and best.ckpt is of the last epoch")
        if self.checkpoint is not None and self.checkpoint_path is not None:
            messages.say_resumed(
                self.checkpoint_path,
                self.checkpoint,
                [Path(str(file)) for file in self.config["fit"].config or []],
                self.run,
                self._class_options(),
            )

    def _tune(self) -> tuning.Tuned:
        """Finds the value; returns the command that trains with it."""
        settings = self.config["fit"]
        found = tuning.find(
            settings.tune,
            self.trainer,
            self.model,
            self.datamodule,
            {"model": settings.model.get("init_args") or {}, "data": self._data_settings()},
        )
        in_file = any("tune" in read_config(config) for config in self.request.configs)
        tuned = tuning.Tuned(tuning.command(self.argv, found, in_file), found.curve)
        say(f"found {found.option} {found.value}; training with it:")
        say(f"  {console.command(*tuned.argv)}\n")
        return tuned

    def _explained(self, error: Exception) -> ValueError | None:
        """The error of a training as a sentence with a remedy, if there is one."""
        if isinstance(error, Diverged):
            lr = cast(Classifier, self.model).lr
            return ValueError(
                f"{error}. {messages.retry_hint(self.run, lr, self._class_options())}"
            )
        if self.trainer._checkpoint_connector._loaded_checkpoint:
            # the error comes from restoring the checkpoint
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return ValueError(
                f"{self.checkpoint_path} cannot be resumed: {kind}{error}."
                " Give another: --ckpt_path FILE"
            )
        if self.trainer.global_step == 0:
            self._take_back_run()
        full = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
        if full and self.run is not None:
            # any file of the run; files that were complete stay complete
            return ValueError(
                f"{self.run} cannot be written: {reason(error)}. Make room there, or give"
                " another folder: --trainer.default_root_dir DIR"
            )
        return None

    def _class_options(self) -> list[str]:
        """The options that name the user's classes in a further command."""
        return naming(model=class_path(type(self.model)), data=class_path(type(self.datamodule)))

    def validate(self, **kwargs: Any) -> None:
        results = self.trainer.validate(**{**kwargs, "verbose": False})
        if not results:
            raise ValueError("no image was scored: --trainer.limit_val_batches is 0")
        say(f"{own.describe(self.datamodule)}\n{messages.metrics_text(results[0])}")
        if classes := self._per_class("val"):
            say(messages.per_class_text(classes))

    def test(self, **kwargs: Any) -> None:
        assert self.checkpoint is not None
        assert self.checkpoint_path is not None
        run = RunFolder.of(self.checkpoint_path)
        robustness = self.config["test"].robustness
        # no evaluation takes place that cannot be recorded
        evaluations.read(run.path, "robustness.json" if robustness else "test.json")
        if not run.is_writable:
            raise ValueError(f"{run} is read-only: the test evaluation could not be recorded there")
        if robustness:
            self._test_robustness(run)
            return
        self._check_returns()
        data, mistakes, facts = self.datamodule, Mistakes(), {}
        self.trainer.callbacks.append(mistakes)  # type: ignore[attr-defined]
        results = self.trainer.test(**{**kwargs, "verbose": False})
        if not results:
            raise ValueError("no image was scored: --trainer.limit_test_batches is 0")
        if not self.trainer.is_global_zero:
            return
        metrics, images = results[0], mistakes.images
        test_set = own.test_images(data, self.trainer, images)
        if isinstance(data, MNISTDataModule):
            facts = mistakes.facts(data.test_set, data.spec.classes)
        if classes := self._per_class("test"):
            facts["per_class"] = classes
        if isinstance(self.model, Classifier) and self.model.tta:
            facts["tta"] = self.model.tta
        if members := self.checkpoint.get("members"):  # of an ensemble
            facts["members"] = members
        # before the result is shown: if it cannot be recorded, nobody sees it
        number = evaluations.record(
            run.path,
            self.checkpoint_path,
            metrics,
            images,
            test_set,
            **facts,
            data=own.describe(data),
        )
        say(f"{own.describe(data)}\n{messages.metrics_text(metrics)}")
        if classes:
            say(messages.per_class_text(classes))
        say(f"test evaluation {number} of this run, recorded in {short(run.path / 'test.json')}")
        if number > 1:
            say("  Each evaluation makes a test less reliable: choose on the validation images.")
        if images < test_set:
            part = f"{images:,} of the {test_set:,} test images"
            say(f"  It scored {part}, so it is not the run's test result.")
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run.path)) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, self.checkpoint["epoch"] + 1)

    def _test_robustness(self, run: RunFolder) -> None:
        """Measures and records the accuracy on changed test images."""
        from mnist_lightning.insight import pictures, robustness

        assert self.checkpoint is not None
        assert self.checkpoint_path is not None
        data, place = self.datamodule, self.trainer.strategy.root_device
        if not isinstance(data, MNISTDataModule):
            raise ValueError(
                f"--robustness changes the images of MNISTDataModule, and {type(data).__name__} has"
                " others: leave it out"
            )
        data.prepare_data()
        data.setup("test")
        seed = int(self.config["test"].seed_everything or 0)
        with pictures.with_weights(self.model, self.checkpoint["state_dict"], place):
            plain = robustness.accuracy(self.model.eval(), data)
            say(f"{data.describe()}\naccuracy {plain:.4f} on the test images as they are; changed:")
            rows = []
            for row in robustness.measure(self.model, data, seed):
                say(robustness.line(row))
                rows.append(row)
        number = evaluations.record(
            run.path,
            self.checkpoint_path,
            {"test/acc": plain},
            len(data.test_set),
            len(data.test_set),
            "robustness.json",
            seed=seed,
            data=data.describe(),
            changes={
                row.kind.name: {
                    "strengths": list(row.kind.strengths),
                    "of": row.kind.what,
                    "acc": list(row.accuracies),
                }
                for row in rows
            },
        )
        sheet = pictures.png(robustness.draw(plain, rows))
        folder = pictures.write(run.path, {"robustness": sheet})
        say(
            f"robustness evaluation {number} of this run, recorded in"
            f" {short(run.path / 'robustness.json')}; drawn in {short(folder)}/robustness.png"
            "\n  It used the test images, and is counted apart from the test evaluations."
        )

    def _per_class(self, stage: str) -> list[dict[str, Any]]:
        return self.model.per_class(stage) if isinstance(self.model, Classifier) else []

    def _check_returns(self) -> None:
        """Refuses strategies that spawn or fork: only metrics come back from their processes."""
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                f"{self.subcommand} needs the results of all processes, and this strategy does"
                " not return them: --trainer.strategy ddp"
            )

    def predict(self, **kwargs: Any) -> None:
        assert self.checkpoint_path is not None
        trainer, data = self.trainer, self.datamodule
        self._check_returns()
        try:
            batches = trainer.predict(**{**kwargs, "return_predictions": True})
        except MisconfigurationException as error:
            if "more than one `__init__` argument" not in str(error):
                raise
            raise ValueError(  # Lightning builds the loader again
                f"{type(data).__name__}: predict needs a DataLoader with named arguments:"
                " DataLoader(images, batch_size=...)"
            ) from error
        if not batches:
            raise ValueError("no image was labelled: --trainer.limit_predict_batches is 0")
        names = data.spec.classes if isinstance(data, MNISTDataModule) else None
        known = len(names) if names and type(data) is MNISTDataModule else None
        scores = own.probabilities(batches, known, type(self.model).__name__)
        if names is None or len(names) != scores.shape[1]:
            names = tuple(map(str, range(scores.shape[1])))
        loader = cast(Any, trainer.predict_dataloaders)
        images, scores = in_image_order(trainer, loader, scores)
        if not trainer.is_global_zero:
            return
        of_folder = isinstance(data, MNISTDataModule) and data.predict_dir is not None
        files = cast(MNISTDataModule, data).predict_files() if of_folder else None
        rows = [
            (
                printable(files[image].name) if files else f"val[{image}]",
                printable(names[label]),
                f"{probability:.4f}",
            )
            for image, probability, label in zip(
                images.tolist(), *(column.tolist() for column in scores.max(1)), strict=True
            )
        ]
        header = ("image", "predicted", "probability")
        say(inspection.format_table(header, rows[:10], right=(1, 2)))
        target = RunFolder.of(self.checkpoint_path).path / "predictions.csv"
        text = io.StringIO(newline="")
        csv.writer(text).writerows([header, *([csv_cell(cell) for cell in row] for row in rows)])
        write_text(target, text.getvalue())
        say(f"{len(rows):,} predictions in {short(target)}")


def _spec(data: LightningDataModule) -> DataSpec:
    """Shape and classes of the images; MNIST's if the user's own data do not tell."""
    spec = getattr(data, "spec", None)
    return spec if isinstance(spec, DataSpec) else DataSpec()


def _validates(data: LightningDataModule) -> bool:
    """Whether there are validation images; call it after ``setup``."""
    return not isinstance(data, MNISTDataModule) or len(data.val_set) > 0


def _plain_spec(data: LightningDataModule) -> dict[str, Any]:
    return _spec(data).plain()


def _check_image_size(model: LightningModule, data: LightningDataModule) -> None:
    spec = _spec(data)
    if spec.shape == DataSpec().shape:  # every model takes these
        return
    try:
        with torch.no_grad():
            copy.deepcopy(getattr(model, "net", model)).eval()(torch.zeros(1, *spec.shape))
    except RuntimeError as error:
        flags = "--data.image_size"
        if getattr(data, "source", None) == "folder":  # other sets have the channels that they have
            flags += ", --data.channels"
        raise ValueError(
            f"{type(model).__name__} does not take images of {spec.height} x {spec.width} pixels"
            f" with {spec.channels} channels: {flags}"
        ) from error


def _as_list(setting: Any) -> list[Any]:
    """A setting of the Trainer that may be one object, a list, or None, as a list."""
    return setting if isinstance(setting, list) else [] if setting is None else [setting]
