"""The command line: names from any folder, defaults from checkpoints, no option silently ignored.

Several are traps of the tools underneath, each met once for real; what would bring one back (a
private name that goes away, say) fails here.
"""

import json
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from PIL import Image

from mnist_lightning import ShallowNetwork, __version__
from mnist_lightning.__main__ import main
from mnist_lightning.cli import CLI
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.models.inspection import layer_table
from mnist_lightning.search.plan import PLAIN
from mnist_lightning.spec import DataSpec

FIT = "fit --config shallow --data.source digits --trainer.max_epochs 2".split()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with one trained run: 2 epochs, seed 7, batches of 16."""
    folder = tmp_path_factory.mktemp("work")
    flags = "--seed_everything 7 --data.batch_size 16 --model.lr 0.3 --model.hidden_units 20"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIT, *flags.split()]) == 0
    return folder


@pytest.fixture(autouse=True)
def _there(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


def _parsed(words: str) -> CLI:
    """The command line object, without running the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLI, "_run_subcommand", lambda self, subcommand: None)
        return CLI(words.split())


SGD = {"momentum": 0.0, "nesterov": False, "weight_decay": None}
TRAINED = {**PLAIN, **SGD, "hidden_units": 20, "lr": 0.3, "spec": DataSpec().plain()}
CKPT = "lightning_logs/shallow/version_0/checkpoints/best.ckpt"


@pytest.mark.parametrize(
    "where",
    [
        CKPT,
        "lightning_logs/shallow/version_0",
        "lightning_logs/shallow/version_0/best",
        "lightning_logs/shallow",
        "shallow",
        "shallow/best",
        "shallow/version_0",
    ],
)
def test_a_checkpoint_alone_is_enough(where: str) -> None:
    """Class, hyper-parameters and data settings come from the checkpoint."""
    cli = _parsed(f"test --ckpt_path {where}")
    assert type(cli.model) is ShallowNetwork
    assert dict(cli.model.hparams) == TRAINED
    assert (cli.datamodule.batch_size, cli.datamodule.source) == (16, "digits")
    assert cli.config.test.ckpt_path == CKPT


def test_best_and_last_of_the_configured_run() -> None:
    assert _parsed("test --config shallow --ckpt_path best").checkpoint_path == Path(CKPT)
    last = _parsed("test --config shallow.yaml --ckpt_path last").checkpoint_path
    assert last == Path(CKPT).with_name("last.ckpt")


@pytest.mark.parametrize("kind", ["best", "last"])
def test_best_and_last_need_to_know_of_which_run(kind: str, capsys: pytest.CaptureFixture) -> None:
    """Lightning alone would score an untrained model for `last`, with exit code 0."""
    assert main(["test", "--ckpt_path", kind]) != 0
    assert "of which run?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "predict"])
def test_untrained_weights_are_not_scored(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([command, "--config", "shallow"]) != 0
    assert "needs trained weights" in capsys.readouterr().err


def test_flags_win_over_the_checkpoint() -> None:
    """Lightning alone silently uses the checkpoint's values."""
    cli = _parsed(f"fit --ckpt_path {CKPT} --model.lr 0.7 --data.batch_size 5")
    assert (cli.model.lr, cli.datamodule.batch_size) == (0.7, 5)
    assert cli.model.hparams.hidden_units == 20  # not given: the checkpoint's value


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., Path]:
    """Writes a user's configuration."""

    def write(name: str = "mine", **settings: object) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    return write


@pytest.mark.parametrize("option", ["-c {}", "-c={}", "-c{}", "--config {}", "--config={}"])
@pytest.mark.parametrize("first", [True, False])
def test_a_configuration_wins_over_the_run_that_is_resumed(
    mine: Callable[..., Path], option: str, first: bool
) -> None:
    """In each spelling, before and after the checkpoint; other settings come from the run."""
    config = option.format(mine(trainer={"max_epochs": 4}))
    both = (config, "--ckpt_path shallow/last") if first else ("--ckpt_path shallow/last", config)
    cli = _parsed(f"fit {' '.join(both)}")
    assert (cli.trainer.max_epochs, cli.datamodule.batch_size) == (4, 16)
    assert cli.config.fit.seed_everything == 7
    assert dict(cli.model.hparams) == TRAINED


def test_several_configurations_lie_over_the_run(mine: Callable[..., Path]) -> None:
    one = mine("one", trainer={"max_epochs": 4}, data={"batch_size": 3})
    two = mine("two", trainer={"max_epochs": 5})
    cli = _parsed(f"fit --config {one} --ckpt_path shallow/last --config {two}")
    assert (cli.trainer.max_epochs, cli.datamodule.batch_size) == (5, 3)
    # a flag wins at any position
    cli = _parsed(f"fit --trainer.max_epochs 6 -c {one} --ckpt_path shallow/last -c {two}")
    assert cli.trainer.max_epochs == 6


def test_a_checkpoint_named_in_a_configuration(
    mine: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    """It is found and checked like the option; the option wins."""
    cli = _parsed(f"test -c {mine(ckpt_path='shallow/last')}")
    assert cli.checkpoint_path == Path(CKPT).with_name("last.ckpt")
    assert dict(cli.model.hparams) == TRAINED
    assert cli.config.test.ckpt_path == str(cli.checkpoint_path)
    cli = _parsed(f"test -c {mine(ckpt_path='missing')} --ckpt_path shallow")
    assert cli.checkpoint_path == Path(CKPT)
    assert main(["test", "-c", str(mine(ckpt_path="missing"))]) == 1
    assert "--ckpt_path missing: there is no file or folder missing" in capsys.readouterr().err


def test_the_configuration_of_a_resumed_run_starts_the_training_again() -> None:
    """It names the checkpoint in its own folder from which the run resumed."""
    run = Path(CKPT).parent.parent
    config = (run / "config.yaml").read_text()
    try:
        resumed = {**yaml.safe_load(config), "ckpt_path": CKPT}
        (run / "config.yaml").write_text(yaml.safe_dump(resumed))
        cli = _parsed(f"fit --config {run}/config.yaml")
        assert cli.checkpoint is None
        assert cli.config.fit.ckpt_path is None
        assert cli.run_name == "shallow"
        assert _parsed("fit --ckpt_path shallow").checkpoint_path == Path(CKPT).with_name(
            "last.ckpt"
        )
    finally:
        (run / "config.yaml").write_text(config)


@pytest.mark.parametrize("model", ["ShallowNetwork", "mnist_lightning.models.ShallowNetwork"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_class_path_beside_a_checkpoint(
    mine: Callable[..., Path], model: str, nested: bool, capsys: pytest.CaptureFixture
) -> None:
    """The hyper-parameters are the checkpoint's; another class is refused."""
    config = mine(model={"class_path": model} if nested else model)
    for command in ("test", "fit"):
        assert dict(_parsed(f"{command} -c {config} --ckpt_path shallow").model.hparams) == TRAINED
    assert main(["test", "-c", str(mine(model="Perceptron")), "--ckpt_path", "shallow"]) == 1
    assert "holds a ShallowNetwork, not a Perceptron" in capsys.readouterr().err


def test_resuming_without_config_takes_that_of_the_run() -> None:
    cli = _parsed("fit --ckpt_path shallow/last")
    assert cli.trainer.max_epochs == 2
    assert cli.config.fit.seed_everything == 7


def test_wrong_class_is_refused_not_replaced(capsys: pytest.CaptureFixture) -> None:
    assert main(["test", "--ckpt_path", CKPT, "--model", "Perceptron"]) != 0
    assert "holds a ShallowNetwork, not a Perceptron" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--data.split canonical", "--data.split_seed 1", "--data.normalization mnist"]
)
def test_other_data_are_refused(flag: str, capsys: pytest.CaptureFixture) -> None:
    """Another split would put training images among the test images."""
    assert main(["test", "--ckpt_path", CKPT, *flag.split()]) != 0
    assert "trained on other data" in capsys.readouterr().err


def test_own_model_from_another_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's Classifier in a file: trained by name, tested by checkpoint and name."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from mnist_lightning.models import Classifier\n"
        "class Mine(Classifier):\n"
        "    def __init__(self, lr: float = 0.1):\n"
        "        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), lr, 'sgd')\n"
        "        self.save_hyperparameters()\n"
    )
    monkeypatch.chdir(tmp_path)
    fit = "fit --model mine.Mine --data.source digits --trainer.max_epochs 1"
    assert main(fit.split()) == 0
    assert main("test --ckpt_path Mine --model mine.Mine".split()) == 0
    capsys.readouterr()
    assert main([*fit.split(), "--data.image_size", "20"]) == 1
    refused = (
        "error: Mine does not take images of 20 x 20 pixels with 1 channels: --data.image_size"
    )
    assert capsys.readouterr().err.strip() == refused  # only a folder's images have --data.channels


def test_config_names_work_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _parsed("fit --config deep3 --data.source digits").model.hparams.hidden_units[1] == 10
    (tmp_path / "deep3.yaml").write_text(
        "model: {class_path: ShallowNetwork, init_args: {hidden_units: 3}}"
    )
    # the user's file wins
    mine = _parsed("fit --config deep3.yaml --data.source digits")
    assert mine.model.hparams.hidden_units == 3


def test_several_configs_lie_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "longer.yaml").write_text("trainer: {max_epochs: 99}")
    cli = _parsed(f"fit -c shallow -c {tmp_path}/longer.yaml --data.source digits")
    assert (cli.trainer.max_epochs, cli.model.lr) == (99, 0.1)


def test_saved_config_starts_the_same_training_again() -> None:
    cli = _parsed("fit --config lightning_logs/shallow/version_0/config.yaml")
    assert dict(cli.model.hparams) == TRAINED
    assert cli.trainer.max_epochs == 2


def test_no_second_config_in_the_way(tmp_path: Path) -> None:
    """Stock LightningCLI fails on its own config.yaml when a training without logger runs twice."""
    words = [*FIT, "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    for _ in range(2):
        assert main([*words, "--trainer.default_root_dir", str(tmp_path)]) == 0
    assert not list(tmp_path.rglob("config.yaml"))


def test_one_flag_turns_early_stopping_off_or_tunes_it() -> None:
    base = "fit --config shallow --data.source digits"
    off = _parsed(f"{base} --early_stopping.enabled false").trainer.early_stopping_callbacks
    tuned = _parsed(f"{base} --early_stopping.patience 3").trainer.early_stopping_callbacks
    assert [callback.enabled for callback in off] == [False]
    assert [(callback.enabled, callback.patience) for callback in tuned] == [(True, 3)]


def test_validate_leaves_no_trace() -> None:
    before = sorted(Path().rglob("*"))
    assert main(["validate", "--ckpt_path", "shallow"]) == 0
    assert sorted(Path().rglob("*")) == before


def test_predict_labels_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for index in range(3):
        pixels = np.full((60, 40), 255, np.uint8)
        pixels[10:50, 15 + index : 22] = 0
        Image.fromarray(pixels).save(tmp_path / f"one{index}.png")
    assert main(["predict", "--ckpt_path", "shallow", "--data.predict_dir", str(tmp_path)]) == 0
    table = Path("lightning_logs/shallow/version_0/predictions.csv").read_text().splitlines()
    assert table[0] == "image,predicted,probability"
    assert [line.split(",")[0] for line in table[1:]] == ["one0.png", "one1.png", "one2.png"]
    assert "3 predictions in" in capsys.readouterr().out


def test_summary_has_commands_to_copy(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert main([*FIT, "--trainer.default_root_dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    command = next(line for line in lines if line.startswith("test it")).split("mnist_lightning ")[
        1
    ]
    assert main(command.split()) == 0
    assert any(re.match(r"see it .*tensorboard(\.main)? --logdir ", line) for line in lines)


def test_fast_dev_run_takes_one_mini_batch_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("training_step", "validation_step"):
        step = getattr(Classifier, name)

        def recorded(*arguments: object, name: str = name, step: Callable = step) -> object:
            calls.append(name)
            return step(*arguments)

        monkeypatch.setattr(Classifier, name, recorded)
    flags = ["--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(tmp_path)]
    assert main([*FIT, *flags]) == 0
    assert calls == ["training_step", "validation_step"]
    assert not list(tmp_path.iterdir())


def test_inspect_prints_every_layer(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("inspect --config deep2".split()) == 0
    out = capsys.readouterr().out
    assert re.search(r"Linear-2 +\[-1, 2048\] +1,607,680\n", out)
    assert "Total params: 1,871,242" in out  # 784*2048+2048 + 2048*128+128 + 128*10+10


def test_layer_table_counts_what_the_network_has() -> None:
    model = ShallowNetwork(30)
    table = layer_table(model.net, torch.zeros(1, 1, 28, 28))
    assert [layer.output_shape for layer in table] == [(-1, 784), (-1, 30), (-1, 30), (-1, 10)]
    assert sum(layer.parameters for layer in table) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "steps per execution: 256, fused; 1 thread\n"),
        ("--execution.threads 2", "steps per execution: 256, fused; 2 threads\n"),
        (
            "--model.optimizer adam --execution.steps 9",
            "steps per execution: 9, autograd: the optimizer is Adam; 1 thread\n",
        ),
        (
            "--trainer.callbacks=EMAWeightAveraging",
            "one step at a time: EMAWeightAveraging acts on each mini-batch; 1 thread\n",
        ),
        (
            "--trainer.val_check_interval=00:00:01:00",
            "one step at a time: val_check_interval is a time, which may end after any mini-batch;",
        ),
    ],
)
def test_fit_says_how_it_steps(
    flags: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    words = "fit --config shallow.yaml --data.source digits --trainer.max_epochs 1 "
    assert main((words + flags).split()) == 0
    assert said in capsys.readouterr().out
    recorded = json.loads(
        (tmp_path / "lightning_logs/shallow/version_0/provenance.json").read_text()
    )
    assert recorded[0]["threads"] == (2 if "--execution.threads" in flags else 1)


def test_a_command_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It restores warnings, log levels and threads, also after an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def state() -> tuple[object, ...]:
        levels = [logging.getLogger(f"lightning.{name}").level for name in ("pytorch", "fabric")]
        return warnings.filters[:], warnings.formatwarning, levels, torch.get_num_threads()

    import mnist_lightning.cli  # noqa: F401 (importing Lightning itself changes the filters)

    before = state()
    for flags in ("", " --trainer.accumulate_grad_batches 2 --execution.steps 5"):
        main(
            f"fit --config shallow.yaml --data.source digits --trainer.max_epochs 1{flags}".split()
        )
        assert state() == before


def test_inspect_reads_the_perceptrons_tensors_off_a_step(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main("inspect --config perceptron --data.source digits --data.batch_size 6".split()) == 0
    rows = {
        line.split()[0]: line.split("]")[0].split("[")[1]
        for line in capsys.readouterr().out.splitlines()
        if "[" in line
    }
    assert rows["w"] == "784, 10"
    assert rows["b"] == "1, 10"
    assert rows["y"] == rows["t"] == rows["grad"] == "6, 10"  # the batch size is 6
    assert rows["data_train"] == "1294, 784"


def test_version_and_help(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    for words in ([], ["--help"]):
        assert main(words) == 0
        assert "fit --config shallow.yaml" in capsys.readouterr().out


def test_help_of_a_command_names_our_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--data.split" in out
    assert "--early_stopping.enabled" in out


def test_hparams_hold_what_the_run_used() -> None:
    hparams = yaml.safe_load(Path("lightning_logs/shallow/version_0/hparams.yaml").read_text())
    assert hparams["source"] == "digits"
    assert hparams["lr"] == 0.3
    assert "_instantiator" not in hparams


def test_checkpoint_holds_plain_data_only() -> None:
    checkpoint = torch.load(CKPT, weights_only=True)
    assert json.dumps(checkpoint["hyper_parameters"])
    assert json.dumps(checkpoint["datamodule_hyper_parameters"])


@pytest.mark.parametrize("name", ["_parse_ckpt_path", "_parser", "_get", "_run_subcommand"])
def test_lightning_still_has_what_we_lean_on(name: str) -> None:
    """We rely on names that are not public. When Lightning itself prefers flags to the checkpoint
    (pull request 21455), our code for that can be deleted."""
    assert callable(getattr(LightningCLI, name))
