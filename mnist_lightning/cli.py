"""fit, validate, test, predict through LightningCLI, and inspect.

What a checkpoint holds becomes the default for what was not said on the command line: the model's
class, its hyper-parameters, the data's settings. What was said wins, and is refused where the
weights contradict it.
"""

import copy
import csv
import inspect as inspect_module
import io
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from filelock import FileLock, Timeout
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mnist_lightning import checkpoints, evaluations, inspection, memory
from mnist_lightning.callbacks import (
    EarlyStopping,
    EpochLines,
    LayerFreezing,
    Mistakes,
    ProgressBar,
    SafePoints,
)
from mnist_lightning.checkpoints import ModelCheckpoint, WholeFiles
from mnist_lightning.dashboard import Dashboard, RunLogger
from mnist_lightning.data import MNISTDataModule, in_image_order
from mnist_lightning.execution import Execution
from mnist_lightning.files import csv_cell, printable, write_text
from mnist_lightning.models import Classifier, Diverged, Perceptron, ResNet18
from mnist_lightning.names import (
    ConfigByName,
    allow_classes,
    check_named,
    classes_in,
    classes_in_option,
    hint,
    import_class,
    parser_settings,
    read_config,
    shipped_configs,
)

LOGS = "lightning_logs"


def fit(words: list[str]) -> None:
    """Trains a model; ends with a summary."""
    _run("fit", words)


def validate(words: list[str]) -> None:
    """Scores a checkpoint on the validation images."""
    _run("validate", words)


def test(words: list[str]) -> None:
    """Scores a checkpoint on the test images, and records that in its run's folder."""
    _run("test", words)


def predict(words: list[str]) -> None:
    """Writes what a checkpoint makes of images."""
    _run("predict", words)


def _run(command: str, words: list[str]) -> None:
    with _quiet(training=command == "fit"), parser_settings():
        CLI([command, *words])


def inspect(words: list[str]) -> None:
    """Prints the layers of a model; for the perceptron also the tensors of a training step."""
    with _quiet(training=False), parser_settings():
        cli = CLI(words, run=False)
    data, model = cli.datamodule, cli.model
    image = torch.zeros(1, 1, data.image_size, data.image_size)
    print(inspection.format_layers(inspection.layer_table(model.net, image), model.net))
    if isinstance(model, Perceptron):
        data.prepare_data()
        data.setup()
        print(f"\nOne training step on {data.describe()}\n")
        images, labels = next(iter(data.train_dataloader()))
        rows = inspection.tensor_table(model, data, data.preprocess(images), labels)
        print(inspection.format_table(("Tensor", "Shape", "Meaning"), rows))


class Parser(LightningArgumentParser):
    """Says what is wrong in a line or two, where argparse would print a page of usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        raise ValueError(_shorten(message, self))


def _shorten(message: str, parser: LightningArgumentParser) -> str:
    """The core of a jsonargparse message, and what was probably meant."""
    if denied := re.search(r"Importing '[\w.]+' is not allowed", message):
        return denied[0]
    given = "".join(re.findall(r"^ *Given value: (.*)$", message, re.MULTILINE)[-1:])
    noise = r"Does not validate|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value"
    lines = [line.strip(" -") for line in message.splitlines()]
    core = " ".join(line for line in lines if line and not re.match(noise, line))
    core = re.sub(r'Parser key "([\w.]+)":', r"--\1:", core)
    core = re.sub(r"Problem with given class_path '[\w.]*?(\w+)':", r"\1:", core)
    core = re.sub(r"--(\w+): \w+: --(\w+):", r"--\1.\2:", core)
    core = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", core)
    core = re.sub(r"<class '(\w+)'>", r"\1", core)
    core = re.sub(r"Expected an? (.+?)\. Got value: ", r"expected \1, got ", core)
    models = {model.__name__: model for model in _subclasses(Classifier)}
    configs = [path.name for path in shipped_configs()]
    if re.search(r"required: (\w+\.)?model$", core):
        return f"which model? --config NAME ({', '.join(configs)}), or --model CLASS"
    if match := re.search(r"Expected a dot import path string: (\S+)", core):
        return f"no model {match[1]!r}; {hint(match[1], models)}"
    if match := re.search(r"does not correspond to a subclass of (\w+)", core):
        if match[1] != "Classifier":
            wrong = re.search(r"Import path (\S+) does not", core)
            return f"{core.partition(':')[0]}: {wrong[1] if wrong else given} is no {match[1]}"
        return f"--model {given}: no Classifier; {hint(given, models)}"
    if match := re.search(r"argument (?:\S+/)?(\S+): expected one argument", core):
        return f"{match[1]} needs a value after it"
    if match := re.search(r"(\w+): Option '(\w+)' is not accepted", core):
        known = inspect_module.signature(models[match[1]]).parameters if match[1] in models else []
        return f"{match[1]} has no option {match[2]!r}; {hint(match[2], known)}"
    if match := re.search(r"unrecognized arguments: (\S+)|not accept option '(\S+)'", core):
        word = (match[1] or match[2]).partition("=")[0]
        nested = getattr(parser, "_subcommands_action", None)
        parsers = [parser, *(nested.choices.values() if nested else [])]
        options = [o for p in parsers for action in p._actions for o in action.option_strings]
        if match[2]:  # in a file, where there are no dashes
            options = [option.lstrip("-") for option in options]
        return f"no option {word}; {hint(word, options, 'all of them: --help')}"
    if given and "Expected a" in core:  # of several types
        start, *types = re.split(r"Expected an? ", core)
        return f"{start}expected {' or '.join(kind.strip() for kind in types)}, got {given}"
    return core


def _subclasses(base: type) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, of trainings only.

    That of a resumed run is replaced with the first checkpoint that the new settings led to: a
    training that fails before leaves a run that can go on as it was.
    """

    _file: Path | None = None  # to be written

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = trainer.log_dir  # asks all processes
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
    """LightningCLI that starts from checkpoints and keeps each run in a folder of its own."""

    datamodule: MNISTDataModule
    model: Classifier

    def __init__(self, words: list[str], run: bool = True) -> None:
        self.checkpoint_path: Path | None = None
        self.checkpoint: dict[str, Any] | None = None
        self.run_name = "run"
        self.run: Path | None = None  # the folder of a training that is logged
        self.run_is_new = False
        self.lock: FileLock | None = None
        try:
            super().__init__(
                Classifier,
                MNISTDataModule,
                args=words,
                run=run,
                subclass_mode_model=True,
                # the optimizer and its learning rate are the model's own: every checkpoint has them
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
            if self.lock is not None:
                self.lock.release()

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", ["a run of mnist_lightning, complete"])
        # an abbreviated option would be another spelling for everything that looks for options
        parser = Parser(**{"allow_abbrev": False, **kwargs})
        parser.add_argument(
            "-c", "--config", action=ConfigByName, help="A YAML file, or the name of a shipped one."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(LayerFreezing, "freezing")
        parser.add_argument(
            "--threads",
            type=int | None,
            default=None,
            help="Of the processor. By default OMP_NUM_THREADS, or else one for small networks and"
            " all for convolutions. Another number gives other roundings.",
        )
        parser.add_argument(
            "--save_every_minutes",
            type=float,
            default=5.0,
            help="Within an epoch, last.ckpt is written after so many minutes of training: what a"
            " kill costs at most.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        given = cast(list[str], args)
        words = [word for word in given if word != "--trust"]
        options = dict(_options(words))
        check_named([options[name] for name in options if name != "ckpt_path"], Path())
        named = {c for name, value in _options(words) for c in classes_in_option(name, value)}
        allow_classes(named)
        if "config" in options:
            self.run_name = Path(options["config"]).stem
        self.root = Path(options.get("trainer.default_root_dir", ".")) / LOGS
        if where := options.get("ckpt_path"):
            name = self.run_name if "config" in options else None
            self.checkpoint_path = path = checkpoints.find(where, self.root, name)
            if words[0] == "fit":
                self._lock(checkpoints.run_folder(path))  # before it can become another
            self.checkpoint = checkpoints.read(path)
            recorded = checkpoints.run_folder(path) / "config.yaml"
            if "--trust" in given:
                named.add(self.checkpoint["model_class"])
                named |= set(classes_in(read_config(recorded) if recorded.is_file() else None))
                allow_classes(named)
            words = self._start_from(path, recorded, words, options, named)
        elif (
            words[:1] in (["validate"], ["test"], ["predict"])
            and not {"h", "help"} & options.keys()
        ):
            raise ValueError(
                f"{words[0]} needs trained weights: --ckpt_path FILE, or the folder of a run"
            )
        try:
            self.config = parser.parse_args(words)
        except ValueError as error:
            if denied := re.search(r"Importing '([\w.]+)' is not allowed", str(error)):
                raise ValueError(self._untrusted(f"a file names {denied[1]}", given)) from error
            raise
        if "config" not in options and self.checkpoint is None:
            settings = self.config.get(self.config.get("subcommand", ""), self.config)
            self.run_name = settings.model.class_path.rpartition(".")[2]

    def _untrusted(self, what: str, words: list[str]) -> str:
        again = shlex.join(["python", "-m", "mnist_lightning", *words, "--trust"])
        return (
            f"{what}, which is neither ours, PyTorch's nor Lightning's: its code would be run."
            f" If you trust the file:\n{again}"
        )

    def _start_from(
        self, path: Path, recorded: Path, words: list[str], options: dict[str, str], named: set[str]
    ) -> list[str]:
        """Makes what the checkpoint holds the default of what the words leave unsaid."""
        assert self.checkpoint is not None
        checkpoint = self.checkpoint
        if words[0] == "fit":
            checkpoints.check_resumable(checkpoint, path)
        if recorded.is_file():
            if options["ckpt_path"] in ("best", "last"):
                # the configuration named the run: take what that run was really made with
                words = [words[0], "--config", str(recorded), *_without(words, "config")[1:]]
            elif words[0] == "fit" and "config" not in options:
                words = [words[0], "--config", str(recorded), *words[1:]]
        for name in named & {options.get("model"), checkpoint["model_class"]}:
            if not name.startswith("mnist_lightning."):
                import_class(name)
        try:
            model = checkpoints.model_class(checkpoint)
        except ValueError as error:
            raise ValueError(self._untrusted(f"{path}: {error}", words)) from error
        if (asked := options.get("model", "").rpartition(".")[2]) not in ("", model.__name__):
            raise ValueError(f"{path} holds a {model.__name__}, not a {asked}")
        said = {name.removeprefix("data.") for name in options}
        checkpoints.check_facts(checkpoint, said, path)
        data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
        if data.get("data_dir") and not Path(data["data_dir"]).is_dir():
            del data["data_dir"]  # a folder of another machine
        defaults: dict[str, Any] = {f"data.{key}": value for key, value in data.items()}
        defaults["model"] = {
            "class_path": f"{model.__module__}.{model.__qualname__}",
            "init_args": dict(checkpoint["hyper_parameters"]),
        }
        self._parser(words[0]).set_defaults(defaults)
        # last, because the run's own config.yaml has a ckpt_path too
        return [*_without(words, "ckpt_path"), "--ckpt_path", str(path)]

    def _lock(self, run: Path) -> None:
        """Keeps other trainings out of a run, until this process ends or lets the lock go."""
        if not (run / "config.yaml").is_file() and not self.run_is_new:
            return  # a checkpoint outside a run: the training goes on in a folder of its own
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return
        self.lock = FileLock(run / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{_short(run)} is being trained by another process: wait for it, or stop it"
            ) from None
        except (OSError, NotImplementedError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise ValueError(f"{_short(run / '.lock')} cannot be locked: {reason}") from error

    def _parse_ckpt_path(self) -> None:
        """Lightning's own would now put the checkpoint's values over the user's flags again."""

    def before_instantiate_classes(self) -> None:
        if self.checkpoint is not None:
            data = self.config[self.config.subcommand].data
            if data.source == "auto":  # asked for nothing in particular
                saved = self.checkpoint.get("datamodule_hyper_parameters", {})
                data.source = saved.get("source", "auto")

    def instantiate_classes(self) -> None:
        if self.subcommand == "fit":
            self._check_memory()
        try:
            super().instantiate_classes()
        except ValueError as error:  # of a constructor, wrapped by the parser
            raise ValueError(_shorten(str(error), self._parser(self.subcommand))) from error

    def _check_memory(self) -> None:
        settings = self.config["fit"]
        if torch.cuda.is_available() and settings.trainer.accelerator != "cpu":
            return
        module, _, name = settings.model.class_path.rpartition(".")
        make = partial(getattr(sys.modules[module], name), **settings.model.init_args)
        memory.check(make, settings.data.batch_size, settings.data.image_size)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # The model and the data stand by now. Whatever is wrong with them shows before the run's
        # folder is made.
        if self.checkpoint is not None and self.checkpoint_path is not None:
            checkpoints.check_agrees(
                self.model, dict(self.datamodule.hparams), self.checkpoint, self.checkpoint_path
            )
        _check_image_size(self.model, self.datamodule.image_size)
        settings = self._get(self.config_init, "trainer")
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if self.subcommand == "fit" and settings.get(name) == 0:
                raise ValueError(f"nothing would be trained: --trainer.{name} is 0")
        extra: list[Any] = []
        if settings.get("enable_progress_bar") is not False:
            terminal = sys.stdout.isatty()
            extra.append(ProgressBar() if terminal else EpochLines())
            kwargs["enable_progress_bar"] = terminal
        kwargs["logger"] = False
        threads = self._get(self.config_init, "threads")
        extra += [Dashboard(), Execution(threads=threads, say=_say)]
        if self.subcommand == "fit":
            self._check_goes_on()
            self.safe_points = SafePoints(self._get(self.config_init, "save_every_minutes"))
            extra.append(self.safe_points)
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
            if isinstance(self.model, ResNet18) and self.checkpoint is None:
                self.model.load_pretrained()
            self._get(self.config_init, "freezing").choose(self.model)
            if settings.get("logger") in (None, True) and not settings.get("fast_dev_run"):
                kwargs["logger"] = self._run_logger()
            else:
                kwargs["logger"] = settings.get("logger")
            if settings.get("enable_checkpointing") is not False:
                # Two of them: ModelCheckpoint's save_last would only copy the best one, each time
                # that there is a better one. Both after the epoch's own figures are in.
                how: dict[str, Any] = {
                    "enable_version_counter": False,
                    "save_on_train_epoch_end": True,
                }
                extra.append(ModelCheckpoint(filename="best", monitor="val/acc", mode="max", **how))
                extra.append(ModelCheckpoint(filename="last", **how))
        plugins = settings.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeFiles()]
        kwargs["callbacks"] = [*(settings.get("callbacks") or []), *extra]
        try:
            trainer = super().instantiate_trainer(**kwargs)
            memory.check_processes(trainer.num_devices)
            return trainer
        except Exception:
            self._take_back_run()
            raise

    def _check_goes_on(self) -> None:
        """Refuses to go on within an epoch of mini-batches of another size."""
        if self.checkpoint is not None and checkpoints.progress(self.checkpoint)[1]:
            saved = self.checkpoint.get("datamodule_hyper_parameters", {}).get("batch_size")
            if saved is not None and saved != self.datamodule.batch_size:
                raise ValueError(
                    f"{self.checkpoint_path} lies within an epoch of mini-batches of {saved}"
                    f" images: go on with --data.batch_size {saved}, or from a whole epoch"
                )

    def _run_logger(self) -> RunLogger:
        """Of a new folder, or of the one that the checkpoint lies in."""
        if self.checkpoint is not None and self.checkpoint_path is not None:
            run = checkpoints.run_folder(self.checkpoint_path)
            if (run / "config.yaml").is_file():
                self.run = run
                return RunLogger(run, first_epoch=checkpoints.progress(self.checkpoint)[0] + 1)
        self.run = _new_run(self.root / self.run_name)
        self.run_is_new = True
        self._lock(self.run)
        return RunLogger(self.run)

    def _take_back_run(self) -> None:
        """Removes the folder of a training that failed before its first step."""
        if self.run is not None and self.run_is_new and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            shutil.rmtree(self.run, ignore_errors=True)

    def fit(self, **kwargs: Any) -> None:
        trainer, model = self.trainer, self.model
        stopping = next(c for c in trainer.early_stopping_callbacks if isinstance(c, EarlyStopping))
        limit = f"patience {stopping.patience}" if stopping.enabled else "off"
        parameters = sum(p.numel() for p in model.parameters())
        _say(
            f"{type(model).__name__}, {parameters:,} parameters, on {trainer.strategy.root_device}"
        )
        _say(self.datamodule.describe())
        _say(
            f"batch size {self.datamodule.batch_size}, at most {trainer.max_epochs} epochs,"
            f" early stopping {limit}"
        )
        received: list[int] = []
        try:
            with self._stop_after_a_step(received):
                trainer.fit(**kwargs)
        except SystemExit as stop:
            if isinstance(stop, SIGTERMException):
                received.append(signal.SIGTERM)
            elif isinstance(stop.__context__, KeyboardInterrupt):
                received.append(signal.SIGINT)
            if not received:
                raise
            self._say_how_to_go_on()
            raise SystemExit(128 + received[0]) from None
        except Diverged as error:
            raise ValueError(f"{error}. {self._last_good()}") from error
        except Exception as error:
            restoring = bool(trainer._checkpoint_connector._loaded_checkpoint)
            if restoring:  # what is in the checkpoint does not fit
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(
                    f"{self.checkpoint_path} cannot be resumed: {kind}{error}."
                    " Another one: --ckpt_path FILE"
                ) from error
            if trainer.global_step == 0:
                self._take_back_run()
            full = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
            if full and self.run is not None:
                # of any of its files; those that were complete before still are
                reason = (getattr(error, "strerror", None) or str(error)).lower()
                raise ValueError(
                    f"{_short(self.run)} cannot be written: {reason}. Make room there, or give"
                    " another place: --trainer.default_root_dir DIR"
                ) from error
            raise
        if trainer.global_step == (self.checkpoint or {}).get("global_step", 0):
            if self.checkpoint is None:
                self._take_back_run()
                raise ValueError("nothing was trained: the training was over before its first step")
            _say(
                f"\nnothing was left to train: {trainer.current_epoch} epochs are done."
                " For more: --trainer.max_epochs N"
            )
        self._summarize()

    @contextmanager
    def _stop_after_a_step(self, received: list[int]) -> Iterator[None]:
        """Within, Ctrl-C ends a training as SIGTERM does, after a step; a second one at once.

        Args:
            received: is given the numbers of the signals.
        """
        if self.trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _: Any) -> None:
            received.append(number)
            if not self.safe_points.training or received.count(signal.SIGINT) > 1:
                raise KeyboardInterrupt
            if number == signal.SIGINT and len(received) == 1:
                # the training may be printing just now, so not through its buffer
                at_hand = b"validation" if self.trainer.validating else b"step"
                os.write(2, b"\nstopping after this %b; Ctrl-C again stops at once\n" % at_hand)
            self.safe_points.stop(self.trainer)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _last_good(self) -> str:
        """From where a training that diverged can be tried again."""
        if self.run is None or not (self.run / "checkpoints" / "last.ckpt").is_file():
            return "No checkpoint had been saved before"
        return (
            "The last good checkpoint is last.ckpt. To go on from it:"
            f"\n  python -m mnist_lightning fit --ckpt_path {_short(self.run)}/last"
            f" --model.lr {self.model.lr / 10:g}"
        )

    def _say_how_to_go_on(self) -> None:
        last = (self.run or Path()) / "checkpoints" / "last.ckpt"
        if self.run is None or not last.is_file():
            if self.trainer.global_step == 0:
                self._take_back_run()
            _say("\nstopped; nothing was saved")
            return
        epochs, batches = checkpoints.progress(torch.load(last, weights_only=True, mmap=True))
        within = f"{batches:,} mini-batches of epoch {epochs + 1}"
        saved = f"epoch {epochs}" if not batches else f"epoch {epochs} and {within}"
        _say(
            f"\nstopped; saved up to {saved if epochs else within}. To go on:"
            f"\n  python -m mnist_lightning fit --ckpt_path {_short(self.run)}/last"
        )

    def _summarize(self) -> None:
        trainer = self.trainer
        best = next(
            (c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_score", None)), None
        )
        if not isinstance(best, ModelCheckpoint) or self.run is None:
            return
        file = Path(best.best_model_path)
        epoch = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
        stopped = any(c.stopped_epoch for c in trainer.early_stopping_callbacks)  # type: ignore[attr-defined]
        _say(
            f"\nbest epoch   {epoch} of {trainer.current_epoch}"
            + (" (stopped early)" if stopped else "")
            + f"\n{best.monitor:<12} {best.best_model_score:.4f}"
            f"\ncheckpoint   {_short(file)}"
            f"\ntest it      python -m mnist_lightning test --ckpt_path {_short(self.run)}"
            f"\nsee it       tensorboard --logdir {_short(self.run.parent.parent)}"
        )

    def validate(self, **kwargs: Any) -> None:
        results = self.trainer.validate(**{**kwargs, "verbose": False})
        if not results:
            raise ValueError("no image was scored: --trainer.limit_val_batches is 0")
        _say(f"{self.datamodule.describe()}\n{_figures(results[0])}")

    def test(self, **kwargs: Any) -> None:
        assert self.checkpoint is not None
        assert self.checkpoint_path is not None
        run = checkpoints.run_folder(self.checkpoint_path)
        evaluations.read(run)  # one that could not be recorded does not take place
        if not os.access(run, os.W_OK):
            raise ValueError(f"{run} is read-only: the test evaluation could not be recorded there")
        self._check_returns()
        mistakes = Mistakes()
        self.trainer.callbacks.append(mistakes)  # type: ignore[attr-defined]
        results = self.trainer.test(**{**kwargs, "verbose": False})
        if not results:
            raise ValueError("no image was scored: --trainer.limit_test_batches is 0")
        if not self.trainer.is_global_zero:
            return
        metrics, data = results[0], self.datamodule
        images, test_set = mistakes.images, len(data.test_set)
        # before its figures are shown: what cannot be recorded is not told either
        number = evaluations.record(
            run,
            self.checkpoint_path,
            metrics,
            images,
            test_set,
            **mistakes.facts(data.test_set.images),
            data=data.describe(),
        )
        _say(f"{data.describe()}\n{_figures(metrics)}")
        _say(f"test evaluation {number} of this run, recorded in {_short(run / 'test.json')}")
        if number > 1:
            _say("  The more evaluations, the less a test says: choose on the validation images.")
        if images < test_set:
            part = f"{images:,} of the {test_set:,} test images"
            _say(f"  It scored {part}, so it is not the run's test result.")
            return
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(run)) as writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, self.checkpoint["epoch"] + 1)

    def _check_returns(self) -> None:
        """Refuses strategies that start processes by spawn or fork: this one gets metrics only."""
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise ValueError(
                f"{self.subcommand} needs the answers of all processes, which this strategy does"
                " not return: --trainer.strategy ddp"
            )

    def predict(self, **kwargs: Any) -> None:
        assert self.checkpoint_path is not None
        trainer, data = self.trainer, self.datamodule
        self._check_returns()
        batches = trainer.predict(**{**kwargs, "return_predictions": True})
        if not batches:
            raise ValueError("no image was labelled: --trainer.limit_predict_batches is 0")
        answers = torch.cat(cast(list[torch.Tensor], batches))
        loader = cast(Any, trainer.predict_dataloaders)
        images, answers = in_image_order(trainer, loader, answers)
        if not trainer.is_global_zero:
            return
        files = data.predict_files() if data.predict_dir else None
        rows = [
            (
                printable(files[image].name) if files else f"val[{image}]",
                str(digit),
                f"{probability:.4f}",
            )
            for image, probability, digit in zip(
                images.tolist(), *(column.tolist() for column in answers.max(1)), strict=True
            )
        ]
        header = ("image", "predicted", "probability")
        _say(inspection.format_table(header, rows[:10], right=(1, 2)))
        target = checkpoints.run_folder(self.checkpoint_path) / "predictions.csv"
        text = io.StringIO(newline="")
        csv.writer(text).writerows([header, *([csv_cell(cell) for cell in row] for row in rows)])
        write_text(target, text.getvalue())
        _say(f"{len(rows):,} predictions in {_short(target)}")


def _check_image_size(model: Classifier, size: int) -> None:
    if size == 28:  # every model's
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model.net).eval()(torch.zeros(1, 1, size, size))
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} takes no images of {size} x {size} pixels:"
            " --data.image_size 28"
        ) from error


def _new_run(folder: Path) -> Path:
    """Makes the next ``version_N``; never the same one for two trainings that start together."""
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]  # a further process of the same training: it writes nothing
        return folder / "version_0"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = (
            max((int(run.name[8:]) for run in checkpoints.newest_first(folder)), default=-1) + 1
        )
        while True:
            run = folder / f"version_{number}"
            try:
                run.mkdir()
                return run
            except FileExistsError:
                number += 1
    except OSError as error:
        raise ValueError(
            f"no run can be kept in {folder}: {(error.strerror or str(error)).lower()}."
            " Another place: --trainer.default_root_dir DIR"
        ) from error


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    """The options among the words, as (name without dashes, value)."""
    for word, following in pairwise([*words, ""]):
        if word.startswith("-"):
            name, equals, value = word.lstrip("-").partition("=")
            yield {"c": "config"}.get(name, name), value if equals else following


def _without(words: list[str], name: str) -> list[str]:
    """The words without one option and its value."""
    result, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in (f"--{name}", f"-{name[0]}"):
            skip = True
        elif not word.startswith(f"--{name}="):
            result.append(word)
    return result


def _figures(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in sorted(metrics.items()))


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter: to be read, and copied."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path.absolute())) else str(path)


@rank_zero_only
def _say(text: str) -> None:
    print(printable(text), flush=True)


@contextmanager
def _quiet(training: bool) -> Iterator[None]:
    """Within, only what concerns the user: no adverts, and no advice that does not apply here."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels, form = [logger.level for logger in loggers], warnings.formatwarning
    with warnings.catch_warnings():
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        _ignore_advice(training)
        # a warning is a sentence for the user, not a place in the code
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        try:
            yield
        finally:
            warnings.formatwarning = form
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _ignore_advice(training: bool) -> None:
    for advice in (
        ".*does not have many workers.*",  # the images are in memory
        ".*smaller than the logging interval.*",  # figures are logged once an epoch
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LeafSpec.*",
        ".*isinstance.treespec.*",
        # what only training needs of a checkpoint
        *([] if training else [".*The dirpath has changed.*", ".*callbacks used to create.*"]),
    ):
        warnings.filterwarnings("ignore", advice)
