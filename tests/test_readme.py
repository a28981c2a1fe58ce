"""README's numbers, recomputed from the files that are committed beside it."""

import json
import re
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mnist_lightning.report import analysis
from mnist_lightning.report.analysis import SearchResult
from mnist_lightning.report.findings import in_words
from mnist_lightning.report.published import PUBLISHED

ROOT = Path(__file__).parent.parent
README = " ".join((ROOT / "README.md").read_text().split())  # wherever its lines break


@cache
def searches() -> dict[str, SearchResult]:
    return {search.name: search for search in analysis.read(ROOT / "lightning_logs" / "study")}


@cache
def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def bench(path: str) -> Any:
    """What lies at ``part/key/name`` in bench.json; of a list, the median."""
    value = results("bench.json")
    for key in path.split("/"):
        value = value[key]
    return statistics.median(value) if isinstance(value, list) else value


def times(ours: str, theirs: str) -> float:
    """How many times as fast ours is."""
    return bench(theirs) / bench(ours)


def cell(search: str, **setting: Any) -> list[float]:
    """Mean and standard deviation over seeds of the validation accuracy, and their number."""
    rows = searches()[search].configurations
    for name, value in setting.items():
        rows = rows[rows[name.replace("__", ".")] == value]
    (row,) = rows.itertuples()
    return [row.acc, row.sd, row.n]


def best(*names: str) -> float:
    return max(searches()[name].configurations["acc"].iloc[0] for name in names)


def shallow_agreement() -> list[int]:
    """Figures within noise, and figures that can be judged."""
    table = analysis.against_the_study(list(searches().values()))
    judged = table[(table["model"] == "ShallowNetwork") & table["within"].notna()]
    worst = judged[judged["where"] == "table 2.1, worst five"]
    assert len(judged[judged["within"] == False]) == len(worst[worst["within"] == False])  # noqa: E712
    return [int(judged["within"].sum()), len(judged)]


def published(where: str) -> float:
    return next(row.value for row in PUBLISHED if row.where == where)


def best_epochs(name: str, regime: str) -> float:
    """The accuracy after the best epoch of each seed, in a search at 224 pixels: the mean."""
    trials = searches()[f"resnet18_{name}"].complete
    return trials[trials["regime"] == regime]["best_val_acc"].mean()


SHARES = (0.002, 0.02, 0.2, 1)


def transfer(share: float, regime: str) -> float:
    """The mean accuracy of three seeds with a share of the images."""
    table = analysis.by_share(list(searches().values()))
    usual = (table["stem"] == "sum") & (table["batch_norm"] == "frozen")
    chosen = usual & (table["share"] == share) & (table["regime"] == regime) & (table["n"] == 3)
    (accuracy,) = {round(acc, 6) for acc in table[chosen]["acc"]}  # two searches have the same
    return accuracy


def stem(share: float, kind: str) -> float:
    """Partly frozen, BatchNorm too, with a share of the images: the mean of three seeds."""
    both = [search for search in searches().values() if "stem" in search.axes]
    table = analysis.by_share(both)
    chosen = (table["share"] == share) & (table["stem"] == kind) & (table["regime"] == "freeze")
    ((accuracy, n),) = table[chosen & (table["batch_norm"] == "frozen")][["acc", "n"]].to_numpy()
    assert n == 3
    return accuracy


def few_validated() -> int:
    """Images that the searches with few images validate on: mini-batches of the config's size."""
    batches = searches()["resnet18_transfer_few"].about["trainer"]["limit_val_batches"]
    config = yaml.safe_load((ROOT / "configs/search/resnet18_transfer.yaml").read_text())
    return batches * config["data"]["eval_batch_size"]


def shallow_steps() -> list[float]:
    """Batch size of ``shallow``, and its steps in an epoch."""
    batch_size = yaml.safe_load((ROOT / "configs" / "shallow.yaml").read_text())["data"][
        "batch_size"
    ]
    return [batch_size, bench("fit/train_images") / batch_size]


def split_sizes() -> list[int]:
    """Images of each part of the two splits of MNIST."""
    numbers = []
    study = searches()["shallow_grid"]
    for split in ("study", "canonical"):
        data = {**study.about["data"], "split": split}
        counts = analysis.image_counts(
            SearchResult(study.path, {**study.about, "data": data}, study.trials, [])
        )
        numbers += [70_000 - sum(counts.values()), counts["val"], counts["test"]]
    return numbers


def rounding(dtype: str, way: str) -> list[float]:
    """Median and greatest distance from autograd."""
    cells = (c for c in results("rounding.json")["distance"] if c["dtype"] == dtype)
    distances = [value for c in cells for value in c[way]]
    return [statistics.median(distances), max(distances)]


def rounding_setup() -> list[int]:
    measured = results("rounding.json")
    cells = measured["distance"]
    networks = {str((c["hidden_units"], c["lr"], c["batch_size"])) for c in cells}
    assert all(len(c[way]) == measured["n"] for c in cells for way in ("stacked", "permuted"))
    return [measured["steps"], len(networks), measured["n"]]


def accuracy_change(way: str) -> float:
    accuracies = results("rounding.json")["val_acc"]
    return max(abs(a - b) for a, b in zip(accuracies[way], accuracies["autograd"], strict=True))


def accuracy_setup() -> list[float]:
    measured = results("rounding.json")
    return [measured["epochs"], measured["val_acc"]["batch_size"], measured["val_acc"]["lr"]]


EPOCH = "fit/seconds_per_epoch"
DEEP = {"hidden_units__1": 1024, "hidden_units__2": 128}

# what README says, and where each number of it comes from
CLAIMS: list[tuple[str, Callable[[], Any]]] = [
    # Before the notes
    ("The study's {} networks took", lambda: len(searches()["shallow_grid"].first_round)),
    ("the study's grid of {}, random", lambda: len(searches()["shallow_grid"].first_round)),
    (
        "ResNet-18's rows at {} pixels were trained",
        lambda: searches()["resnet18_scratch"].about["data"]["image_size"],
    ),
    (
        "after the best epoch it is {:.4f} from scratch, {:.4f} fine-tuned and {:.4f} partly"
        " frozen (n={})",
        lambda: [
            best_epochs("scratch", "scratch"),
            *(best_epochs("regimes", regime) for regime in ("finetune", "freeze")),
            len(searches()["resnet18_regimes"].about["seeds"]),
        ],
    ),
    (
        "The best of them all, partly frozen, was tested once: {:.4f}.",
        lambda: searches()["resnet18_freeze"].tests[0]["test/acc"],
    ),
    (
        "{:,} for training, {:,} for validation, {:,} for the test. `--data.split canonical` keeps"
        " MNIST's own test set, for comparison with the literature: {:,}, {:,} and {:,}.",
        split_sizes,
    ),
    # Speed
    ("(batch {}, {:,.0f} steps)", shallow_steps),
    ("as its documentation teaches it | {:.1f} |", lambda: bench(f"{EPOCH}/documented")),
    ("one step at a time through autograd | {:.1f} |", lambda: bench(f"{EPOCH}/one by one")),
    ("hand-written PyTorch loop, images in memory | {:.1f} |", lambda: bench(f"{EPOCH}/loop")),
    ("curves, checkpoints, early stopping, bar | {:.2f} |", lambda: bench(f"{EPOCH}/ours")),
    (
        "`deep2` at batch 32 is {:.1f} times as fast as the hand-written loop",
        lambda: times("fit/seconds/deep, ours", "fit/seconds/deep, loop"),
    ),
    (
        "mini-batches of {} come {:.0f} times as fast as from torchvision",
        lambda: [
            bench("batches/batch_size"),
            times("batches/seconds/ours", "batches/seconds/torchvision"),
        ],
    ),
    # The grid
    (
        "The {} networks took {:.1f} minutes on two cores",
        lambda: [bench("grid/search/trials"), bench("grid/search/wall_seconds") / 60],
    ),
    (
        "took {:.1f} hours of one core on another machine",
        lambda: searches()["shallow_grid"].networks["seconds"].sum() / 3600,
    ),
    (
        "{} of the {} figures of this network that were measured in the study's own setting agree",
        shallow_agreement,
    ),
    (
        "picked for being the worst of {}.",
        lambda: len(searches()["shallow_grid"].first_round),
    ),
    # Beyond the grid's edge
    (
        "800 units reach {:.4f} ± {:.4f} on validation, 100 units {:.4f} ± {:.4f} in the same"
        " search (n={})",
        lambda: [
            *cell("shallow_wide", hidden_units=800)[:2],
            *cell("shallow_wide", hidden_units=100),
        ],
    ),
    (
        "at a learning rate of 0.01. There, two layers of 1024 and 128 units reach {:.4f} ± {:.4f};"
        " at 0.3 they reach {:.4f} ± {:.4f} after as many epochs (n={}), and {:.4f} on test, where"
        " the study's best has {:.4f}.",
        lambda: [
            *cell("deep2_rates", lr=0.01, **DEEP)[:2],
            *cell("deep2_rates", lr=0.3, **DEEP),
            analysis.tested(searches()["deep2_rates"])["acc"],
            published("section 3.5"),
        ],
    ),
    (
        "two layers are {:.3f} above one,",
        lambda: (
            best("deep2_grid", "deep2_rates")
            - best("shallow_grid", "shallow_random", "shallow_refine", "shallow_wide")
        ),
    ),
    # Rounding grows
    ("After {} steps of {} networks, n={} seeds each", rounding_setup),
    ("autograd's by {:.1e} at most in float64", lambda: rounding("float64", "stacked")[1]),
    (
        "they differ by {:.1e} in the median and {:.3f} in the worst case",
        lambda: rounding("float32", "stacked"),
    ),
    ("differs from itself by {:.1e} and {:.3f} when", lambda: rounding("float32", "permuted")),
    ("After {} epochs at batch {} and lr {}, fused", accuracy_setup),
    (
        "the validation accuracy by {:.4f} at most, and another order of the images by {:.4f}"
        " (n={})",
        lambda: [
            *map(accuracy_change, ("stacked", "permuted")),
            len(results("rounding.json")["val_acc"]["autograd"]),
        ],
    ),
    (
        "the standard deviation over seeds is {:.4f}",
        lambda: statistics.stdev(results("rounding.json")["val_acc"]["autograd"]),
    ),
    # The frozen stem
    (
        "its third regime reaches {:.4f} ± {:.4f} here (n={}), not {:.4f}",
        lambda: [*cell("resnet18_regimes", regime="freeze"), published("table 4.4")],
    ),
    ("it reaches {:.4f} ± {:.4f} (n={}), the most", lambda: cell("resnet18_freeze")),
    (
        "at 64 pixels it reaches {:.4f} instead of {:.4f} with 100 training images, {:.4f} instead"
        " of {:.4f} with 1,000, and {:.4f} instead of {:.4f} with 10,000 (BatchNorm frozen, n=3).",
        lambda: [stem(share, kind) for share in SHARES[:3] for kind in ("reset", "sum")],
    ),
    # When ImageNet helps
    (
        "at {} pixels reaches a validation accuracy of {:.4f} from scratch and {:.4f} fine-tuned"
        " with 100 training images, {:.4f} and {:.4f} with 1,000, {:.4f} and {:.4f} with 10,000,"
        " and {:.4f} and {:.4f} with all (n={})",
        lambda: [
            *{s.about["data"]["image_size"] for n, s in searches().items() if "transfer" in n},
            *(transfer(share, way) for share in SHARES for way in ("scratch", "finetune")),
            *{len(s.about["seeds"]) for n, s in searches().items() if "transfer" in n},
        ],
    ),
    ("With 100 and 1,000 images these are accuracies on the first {:,}", few_validated),
    (
        "Partly frozen, it reaches {:.4f}, {:.4f}, {:.4f} and {:.4f}.",
        lambda: [transfer(share, "freeze") for share in SHARES],
    ),
    # What did not help
    (
        "ResNet-18 at 28 pixels is {:.2f} times as fast in bf16 as in fp32",
        lambda: times("resnet/seconds/28, bare, bf16", "resnet/seconds/28, bare"),
    ),
    (
        "At 224 pixels bf16 and channels_last make `fit` {:.1f} times as fast as the naive step",
        lambda: times("resnet/seconds/224, ours", "resnet/seconds/224, naive"),
    ),
]
CLAIMS += [
    (
        "command takes {:.2f} s on its one thread and {:.1f} s on two",
        lambda: [bench(f"command/seconds/loaded, {way}") for way in ("ours", "all cores")],
    ),
]
# Names and settings with digits in them; nothing that was measured.
SETTINGS = [
    *("all networks at 224 pixels", "not the 4 times that were hoped for"),
    *("ResNet-18", "bf16", "float32"),
]


def filled(text: str, numbers: Any) -> str:
    """The text with its numbers, as README writes them: 8.1e-7."""
    values = numbers if isinstance(numbers, list) else [numbers]
    return text.format(*values).replace("e-0", "e-")


@pytest.mark.parametrize(("text", "numbers"), CLAIMS, ids=[text for text, _ in CLAIMS])
def test_a_number_is_that_of_the_files(text: str, numbers: Callable[[], Any]) -> None:
    assert filled(text, numbers()) in README


def test_no_other_number_is_claimed() -> None:
    """A number that is new in these sections needs a line above."""
    speed = README.partition("**Speed.**")[2].partition("**Layer freezing**")[0]
    rest = speed + README.partition("## Notes on what was found")[2]
    for text in [filled(text, numbers()) for text, numbers in CLAIMS] + SETTINGS:
        rest = rest.replace(text, "")
    assert re.findall(r"\S*\d\S*", rest) == []


def test_numbers_in_words_are_those_of_the_files() -> None:
    words = ("no", "one", "two", "three", "four", "five")
    bench_runs = len(results("bench.json")["fit"]["seconds"]["ours"])
    assert f"medians of {words[bench_runs]} alternating runs" in README
    grid = results("bench.json")["grid"]
    cores, seeds = words[grid["provenance"]["machine"]["cores"]], words[grid["n"]]
    assert f"minutes on {cores} cores ({seeds} seed, " in README
    seeds = words[len(searches()["shallow_grid"].about["seeds"])]
    assert f"The {seeds} seeds in [lightning_logs/study]" in README
    within, judged = shallow_agreement()
    assert f"The other {words[judged - within]} belong to its five worst models" in README


def test_the_lesson_of_the_grid_is_that_of_its_report() -> None:
    lesson = "Small mini-batches win mostly because the learning rate stays the same."
    assert f" {lesson} " in README
    assert any(lesson in text for text in in_words([searches()["shallow_grid"]]))


def test_wider_and_deeper_is_in_the_order_that_is_said() -> None:
    two = best("deep2_grid", "deep2_rates")
    one = best("shallow_grid", "shallow_random", "shallow_refine", "shallow_wide")
    assert best("deep3_grid") < min(one, two)
