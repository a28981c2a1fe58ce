"""A user's own model and data, from an empty folder: trained, tested, predicted, searched.

What is printed as a command is read out of the output and run.
"""

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from torch import nn

import mnist_lightning
from mnist_lightning import Classifier, MNISTDataModule, ShallowNetwork
from mnist_lightning.__main__ import main
from mnist_lightning.runs.checkpoints import read
from mnist_lightning.search import command as search

README = (Path(__file__).parent.parent / "README.md").read_text()
PART = README.split("**A model of your own**")[1].split("\n\n**")[0]
QUICK = "--data.source digits --trainer.max_epochs 1".split()

# as in Lightning's tutorial "PyTorch Lightning CIFAR10/MNIST", without its data
TUTORIAL = """
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional import accuracy


class LitMNIST(LightningModule):
    def __init__(self, hidden_size=64, learning_rate=2e-4):
        super().__init__()
        self.learning_rate = learning_rate
        self.num_classes = 10
        self.model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, hidden_size),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(hidden_size, self.num_classes),
        )

    def forward(self, x):
        x = self.model(x)
        return F.log_softmax(x, dim=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        return F.nll_loss(logits, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = F.nll_loss(logits, y)
        acc = accuracy(logits.argmax(1), y, task="multiclass", num_classes=10)
        self.log("val_loss", loss, prog_bar=True)
        self.log("val_acc", acc, prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.nll_loss(self(x), y), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class LitAutoEncoder(LightningModule):
    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = nn.Sequential(nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 28 * 28))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        x = x.view(x.size(0), -1)
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)
"""

HEIRS = """
from my_module import MyModel


class Scheduled(MyModel):
    def __init__(self, hidden: int = 8, lr: float = 0.2):
        super().__init__(hidden, 0.5, lr)
        self.save_hyperparameters()  # also saves dropout, which this class does not accept


class Wide(MyModel):
    def validation_step(self, batch, batch_idx):
        return self(batch[0].flatten(1)[:, :100])
"""

PICTURES = """
from my_tutorial import LitMNIST


class Pictures(LitMNIST):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.logger.experiment.add_image("first", batch[0][0], self.global_step)


class Rates(LitMNIST):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
"""

DATA = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from mnist_lightning import MNISTDataModule


class Noise(LightningDataModule):
    def __init__(self, count: int = 64, batch_size: int = 16):
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def setup(self, stage):
        images = torch.rand(self.count, 1, 28, 28)
        self.images = TensorDataset(images, torch.arange(self.count) % 10)

    def train_dataloader(self):
        return DataLoader(self.images, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.images, batch_size=self.batch_size)

    def test_dataloader(self):
        return self.val_dataloader()

    def predict_dataloader(self):
        return self.val_dataloader()


class Few(MNISTDataModule):
    def __init__(self, share: float = 0.5, batch_size: int = 16):
        super().__init__(source="digits", batch_size=batch_size, val_fraction=share)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working directory with the user's modules."""
    folder = tmp_path_factory.mktemp("own")
    written = re.search(r"```python\n(.*?)```", PART, re.DOTALL)
    assert written
    for name, text in {
        "my_module": written[1],
        "my_heirs": HEIRS,
        "my_tutorial": TUTORIAL,
        "my_data": DATA,
        "my_pictures": PICTURES,
    }.items():
        (folder / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
    forget()


def forget() -> None:
    """Forgets the modules, as in a new process."""
    for name in ("my_module", "my_heirs", "my_tutorial", "my_data", "my_pictures"):
        sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def _there(folder: Path) -> None:
    forget()


Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed; returns its output."""

    def run(*words: str) -> str:
        forget()
        capsys.readouterr()
        if words[0] == "search":  # in this process: starting another one would take longer
            found, place = search.read(words[1:])
            search.run(found, **{**place, "workers": 0})
            return capsys.readouterr().out
        code = main(list(words))
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    return run


def hints(text: str) -> list[list[str]]:
    """Our commands in a text, as lists of arguments."""
    found = re.findall(r"(?:mnist-lightning|mnist_lightning) +((?:fit|test|predict) .*)", text)
    return [shlex.split(line) for line in found]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    forget()
    capsys.readouterr()
    assert main(list(words)) == 1
    return capsys.readouterr().err


def test_what_the_readme_writes_works(run: Run) -> None:
    """Its module and its commands, with less training."""
    commands = hints(re.sub(r" +", " ", PART)) + [
        shlex.split(line.split("mnist_lightning ")[1])
        for line in PART.splitlines()
        if "mnist_lightning search" in line
    ]
    assert [words[0] for words in commands] == ["fit", "test", "predict", "search"]
    for words in commands:
        more = QUICK if words[0] == "fit" else []
        if words[0] == "search":
            more = "--data.source digits --fixed.max_epochs 1".split()
        text = run(*words, *more)
        if words[0] in ("fit", "search"):
            assert hints(text)
            for hint in hints(text):
                if "ID.ckpt" not in hint[2]:
                    run(*hint)


def test_a_tutorials_module_works_too(run: Run) -> None:
    model = "my_tutorial.LitMNIST"
    text = run("fit", "--model", model, "--model.learning_rate", "0.01", *QUICK)
    assert "best.ckpt is by val_acc, early stopping by val_loss" in text
    assert re.search(r"\nval_acc +0\.\d{4}\n", text)
    (hint,) = hints(text)
    assert re.match("scikit-learn's digits.*\ntest_loss", run(*hint))
    checkpoint = read(Path("lightning_logs/LitMNIST/version_0/checkpoints/best.ckpt"))
    assert checkpoint["hyper_parameters"] == {"hidden_size": 64, "learning_rate": 0.01}
    text = run("predict", "--ckpt_path", "LitMNIST", "--model", model)
    assert "323 predictions" in text
    assert all(0.1 <= float(p) <= 1 for p in re.findall(r"^val\S+ +\d +(\S+)$", text, re.MULTILINE))
    words = "fit --ckpt_path LitMNIST/last --trainer.max_epochs 2 --model"
    assert "epoch" in run(*words.split(), model)
    words = "search --space.learning_rate [0.01,0.001] --fixed.max_epochs 1 --name lit"
    text = run(*words.split(), "--data.source", "digits", "--model", model)
    run(*hints(text)[0])


def test_a_validation_may_write_pictures_as_it_does_in_a_training(run: Run) -> None:
    text = run("fit", "--model", "my_pictures.Pictures", *QUICK)
    assert "best.ckpt is by val_acc, early stopping by val_loss" in text


def test_a_validation_that_works_only_within_a_training_is_no_mistake(run: Run) -> None:
    """The metrics that it logs can be named; otherwise the last epoch is kept."""
    words = ("fit", "--model", "my_pictures.Rates", *QUICK)
    assert "best.ckpt is of the last epoch, no early stopping" in run(*words)
    text = run(*words, "--early_stopping.monitor", "val_loss")
    assert "best.ckpt is by val_loss, early stopping by val_loss" in text
    assert re.search(r"\nval_loss +\d\.\d{4}\n", text)


def test_a_module_that_cannot_says_why(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """It trains, with a network as an argument; it has no other step."""
    model = "my_tutorial.LitAutoEncoder"
    encoder = "torch.nn.Linear --model.encoder.in_features 784 --model.encoder.out_features 3"
    text = run("fit", "--model", model, "--model.encoder", *encoder.split(), *QUICK)
    assert "logs nothing in a validation: best.ckpt is of the last epoch" in text
    again = ["--ckpt_path", "LitAutoEncoder", "--model", model]
    run("fit", *again, "--trainer.max_epochs", "2")
    needs = {
        "validate": "needs a validation_step",
        "test": "needs a test_step",
        "predict": "needs a forward or a predict_step",
    }
    for command, what in needs.items():
        assert what in refused(capsys, command, *again)
    words = "search --space.max_epochs [1] --fixed.encoder null --data.source digits --name auto"
    assert "LitAutoEncoder logs nothing there" in run(*words.split(), "--model", model)


def test_a_subclass_of_a_subclass(run: Run) -> None:
    text = run("fit", "--model", "my_heirs.Scheduled", *QUICK)
    saved = read(Path("lightning_logs/Scheduled/version_0/checkpoints/best.ckpt"))
    assert saved["hyper_parameters"].keys() == {"hidden", "lr", "dropout"}
    run(*hints(text)[0])


def test_what_a_configuration_names_is_known(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's file may name the class; a run's file needs --trust, and the error says so."""
    settings = {
        "model": {"class_path": "my_module.MyModel", "init_args": {"hidden": 8}},
        "data": {"class_path": "my_data.Few", "init_args": {"share": 0.25}},
        "trainer": {"max_epochs": 1},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(settings))
    run("fit", "--config", "mine.yaml")
    run("test", "--ckpt_path", "mine", "--config", "mine.yaml")
    run("fit", "--config", "lightning_logs/mine/version_0/config.yaml")  # trains it again
    assert Path("lightning_logs/mine/version_1/checkpoints/best.ckpt").is_file()
    text = refused(capsys, "test", "--ckpt_path", "mine")
    assert "names my_module.MyModel, a class from outside" in text
    run(*hints(text)[0])


def test_own_data(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Any LightningDataModule works, also with a configuration for settings that it shares."""
    config = ["--config", "shallow.yaml", "--trainer.max_epochs", "1"]
    text = run("fit", *config, "--data", "my_data.Noise", "--data.count", "40")
    (hint,) = hints(text)
    assert hint[-2:] == ["--data", "my_data.Noise"]
    assert "data: Noise" in run(*hint)
    settings = yaml.safe_load(Path("lightning_logs/shallow/version_0/config.yaml").read_text())
    assert settings["data"]["init_args"] == {"count": 40, "batch_size": 8}
    again = ["--ckpt_path", "shallow", "--data", "my_data.Noise"]
    assert "40 predictions" in run("predict", *again)
    run("fit", *again, "--trainer.max_epochs", "2")
    text = refused(capsys, "test", "--ckpt_path", "shallow")
    assert "names my_data.Noise, a class from outside" in text
    run(*hints(text)[0])


def test_the_console_script_finds_the_working_directory(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sys.path starts with its own folder; that of python -m with the working directory."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(folder))])
    assert "Dropout" in run("inspect", "--model", "my_module.MyModel")


@pytest.mark.slow
def test_the_workers_of_a_search_find_it_too(folder: Path) -> None:
    script = "import sys; from mnist_lightning.__main__ import main; sys.exit(main(sys.argv[1:]))"
    words = "search --model my_module.MyModel --space.hidden [4,5] --fixed.max_epochs 1 --workers 2"
    command = [sys.executable, "-P", "-c", script, *words.split(), "--data.source", "digits"]
    done = subprocess.run([*command, "--name", "two"], capture_output=True, text=True)
    assert "winner" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("fit --model my_module.Missing", "no class my_module.Missing"),
        ("fit --model my_modul.MyModel", "No module named 'my_modul'"),
        ("fit --model my_module.nn", "not a LightningModule"),
        ("fit --model my_module.MyModel --model.hiden 3", "did you mean hidden?"),
        ("fit --model my_tutorial.LitMNIST --model.hidden 3", "did you mean hidden_size?"),
        ("fit --config shallow --data my_module.MyModel", "not a LightningDataModule"),
        ("fit --model", "--model needs a value after it"),
        ("fit --model my_heirs.Wide --data.source digits", "Wide fails in a validation of MNIST"),
        ("search --model my_module.MyModel --data my_data.Noise", "no other data module"),
        (
            "fit --model my_tutorial.LitMNIST --early_stopping.monitor val_los"
            " --data.source digits",
            "early stopping monitors val_los, which the validation does not log; it logs:"
            " val_loss, val_acc",
        ),
    ],
)
def test_mistakes(words: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert what in refused(capsys, *words.split())


# ---- from Python


class WithNet(Classifier):
    def __init__(self, net: nn.Module, width: int = 3, lr: float = 0.1) -> None:
        super().__init__(net, lr, "sgd")


class Chain(ShallowNetwork):
    def __init__(self, hidden_units: int = 5, more: list[int] | None = None) -> None:
        super().__init__(hidden_units, lr=0.2)


def test_arguments_are_hyper_parameters() -> None:
    """Plain values, from the whole chain of classes."""
    assert dict(WithNet(nn.Linear(2, 2)).hparams) == {"width": 3, "lr": 0.1}
    assert dict(Chain(more=[1]).hparams) == {
        "hidden_units": 5,
        "more": [1],
        "lr": 0.2,
        "optimizer": "sgd",
        "dropout": 0.0,
        "batch_norm": False,
        "activation": "relu",
    }


class Wide(ShallowNetwork):
    def __init__(self, factor: int = 2, **options: float) -> None:
        super().__init__(hidden_units=10 * factor, **options)


def test_a_subclass_that_passes_options_on_is_loaded(tmp_path: Path) -> None:
    """Its checkpoint has its own arguments, not those that it sets itself."""
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, barebones=False)
    trainer.fit(Wide(3, momentum=0.5), MNISTDataModule(source="digits"))
    trainer.save_checkpoint(tmp_path / "wide.ckpt")
    model = Wide.load_from_checkpoint(tmp_path / "wide.ckpt")
    assert (model.momentum, model.net.hidden1.out_features) == (0.5, 30)
    assert dict(model.hparams) == {"factor": 3, "momentum": 0.5}


def test_lightnings_own_way_of_loading(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, barebones=False)
    trainer.fit(Chain(7), MNISTDataModule(source="digits"))
    trainer.save_checkpoint(tmp_path / "chain.ckpt")
    model = Chain.load_from_checkpoint(tmp_path / "chain.ckpt")
    assert model.hparams["hidden_units"] == 7


@pytest.fixture(scope="module")
def deep2(folder: Path) -> None:
    """A run of our own model, on the digits."""
    assert main(["fit", "--config", "deep2", "--model.hidden_units", "[9, 8]", *QUICK]) == 0


@pytest.mark.usefixtures("deep2")
def test_load_gives_a_model_ready_to_predict(run: Run) -> None:
    """By folder, by name, by file; with the same results as predict."""
    best = "lightning_logs/deep2/version_0/checkpoints/best.ckpt"
    for where in ("lightning_logs/deep2", "deep2", "deep2/last", Path(best)):
        model = mnist_lightning.load(where)
        assert not model.training
        assert model.net[1].out_features == 9
    run("predict", "--ckpt_path", "deep2")
    data = MNISTDataModule(source="digits")
    data.setup()
    with torch.no_grad():
        answers = model(data.preprocess(data.val_set.images)).argmax(1).tolist()
    rows = Path("lightning_logs/deep2/version_0/predictions.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[1]) for row in rows] == answers


def test_a_checkpoint_of_a_script(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A checkpoint written from Python names no class, or one of __main__."""
    data = MNISTDataModule(source="digits")
    lit = importlib.import_module("my_tutorial").LitMNIST()
    file = str(tmp_path / "lit.ckpt")
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(lit, data)
    trainer.save_checkpoint(file)
    assert "has no model_class" in refused(capsys, "test", "--ckpt_path", file)
    run("test", "--ckpt_path", file, "--model", "my_tutorial.LitMNIST")
    torch.save({**torch.load(file, weights_only=True), "model_class": "__main__.LitMNIST"}, file)
    text = refused(capsys, "test", "--ckpt_path", file)
    assert "--model my_script.LitMNIST" in text
    run("test", "--ckpt_path", file, "--model", "my_tutorial.LitMNIST")


def test_load_imports_nothing_that_a_file_names(run: Run) -> None:
    run("fit", "--model", "my_tutorial.LitMNIST", "--model.hidden_size", "9", *QUICK)
    lit = sys.modules["my_tutorial"].LitMNIST
    run("fit", "--model", "my_heirs.Scheduled", *QUICK)
    # already imported here
    assert type(mnist_lightning.load("Scheduled")) is sys.modules["my_heirs"].Scheduled
    forget()
    with pytest.raises(ValueError, match=r"load\('Scheduled', model_class=Scheduled\)"):
        mnist_lightning.load("Scheduled")
    assert "my_heirs" not in sys.modules
    model: LightningModule = mnist_lightning.load("LitMNIST", model_class=lit)
    assert model.model[1].out_features == 9


def test_the_package_itself_stays_light() -> None:
    code = "import sys, mnist_lightning; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- named data is never replaced


@pytest.mark.parametrize(
    "named", ["--data.name FashionMNIST", "--data.data_dir photos", "variable"]
)
def test_named_data_is_never_swapped(
    named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnist_lightning.data.download._first_to_answer", _nobody)
    monkeypatch.delenv("MNIST_DATA_DIR", raising=False)
    for kind in ("cats", "dogs"):
        Path("photos", kind).mkdir(parents=True, exist_ok=True)
        Path("photos", kind, "1.png").touch()
    if named == "variable":
        monkeypatch.setenv("MNIST_DATA_DIR", "photos")
    words = [] if named == "variable" else named.split()
    text = refused(capsys, "fit", "--config", "shallow.yaml", *words)
    assert re.search(r"(Fashion)?MNIST is not in (data|photos): .*--data.source digits", text)


@pytest.mark.usefixtures("deep2")
def test_a_checkpoint_of_the_digits_takes_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "test", "--ckpt_path", "deep2", "--data.data_dir", "photos")
    assert "--data.data_dir photos: scikit-learn's digits are not in a folder" in text


def _nobody(*_: object) -> str:
    raise OSError("no mirror answers in a test")
