"""The benchmarks' table, on numbers that are made up: nothing is timed here. And rounding."""

import json
from pathlib import Path
from typing import Any

import folders
import pytest
import records
import rounding
import run
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
RESULTS = FOLDER / "results" / "bench.json"


def results(**seconds: list[float]) -> dict[str, Any]:
    """Results of the part ``fit`` alone."""
    provenance = {
        "load_average": [0.0, 0.0, 0.0],
        "time": "2026-01-01T00:00:00+00:00",
        "code": {"commit": "0123456789abcdef", "modified": False},
        "versions": {"python": "3.11"},
        "machine": {"system": "Linux", "cpu": "a processor", "cores": 2},
    }
    return {"fit": {"quick": False, "threads": 1, "seconds": seconds, "provenance": provenance}}


@pytest.mark.parametrize(("ours", "met"), [(0.99, "yes"), (1.0, "yes"), (1.01, "**no**")])
def test_a_figure_that_is_missed_says_no(ours: float, met: str) -> None:
    # medians: one run that was disturbed decides nothing
    measured = results(ours=[ours, ours, 50.0], loop=[1.5, 1.5, 0.1])
    row = run.row(run.COMPARISONS[0], measured)
    assert row[-3:] == (f"{1.5 / ours:.3g} x", "1.5 x, aim 2.5 x", met)
    assert f"| {' | '.join(row)} |\n" in run.table(measured)


@pytest.mark.parametrize(("fit", "met"), [(4.9, "yes"), (5.0, "**no**")])
def test_start_up_may_take_a_tenth_and_half_a_second_more(fit: float, met: str) -> None:
    (comparison,) = (c for c in run.COMPARISONS if c.ours == "fit/seconds/start, fit")
    measured = results(**{"start, fit": [fit], "start, import": [4.05]})  # 4.955 at most
    assert run.row(comparison, measured)[-1] == met


def test_a_ratio_of_one_twentieth_less_is_within_five_percent() -> None:
    (step,) = (c for c in run.COMPARISONS if c.ours == "resnet/seconds/28, ours" and c.asked)
    assert step.met(100, 95)
    assert not step.met(100, 94.9)


def test_whatever_was_asked_has_a_row() -> None:
    asked = {(c.ours, c.theirs): c.asked for c in run.COMPARISONS if c.met}
    assert asked == {
        ("fit/seconds/ours", "fit/seconds/loop"): "1.5 x, aim 2.5 x",
        ("fit/seconds_per_epoch/ours", "fit/seconds_per_epoch/documented"): "15 x",
        ("fit/seconds/deep, ours", "fit/seconds/deep, loop"): "1.0 x",
        ("resnet/seconds/28, ours", "resnet/seconds/28, bare"): "within 5 %",
        ("resnet/seconds/224, ours", "resnet/seconds/224, bare"): "within 5 %",
        ("resnet/seconds/224, ours", "resnet/seconds/224, naive"): "4 x",
        ("batches/seconds/ours", "batches/seconds/torchvision"): "50 x",
        ("batches/seconds/ours", "batches/seconds/torchvision, 2 workers"): "50 x",
        **{
            (f"augment/{key}/{net}, {way}", f"augment/{key}/{net}, no augmentation"): asked
            for net, asked in (
                ("ResNet-18", "at most 10 % longer"),
                ("small CNN", "at most 15 % longer"),
            )
            for way in ("shift 2, rotate 10", "crop 4, flip")
            for key in ("processor_seconds",)
        },
        **{
            (f"small_cnn/seconds/{net}, ours", f"small_cnn/seconds/{net}, floor"): "1.3 times that"
            for net in ("conv, fp32", "conv, bf16", "cnn_15s, fp32", "cnn_15s, bf16")
        },
        ("frozen/seconds/freeze, once", "frozen/seconds/freeze, each epoch"): "1.8 x",
        ("frozen/seconds/probe, once", "frozen/seconds/probe, each epoch"): "20 x",
        ("fit/seconds/start, fit", "fit/seconds/start, import"): "its 1.1 x plus 0.5 s",
    }
    for comparison in run.COMPARISONS:  # nothing measured: shown, not left out
        row = run.row(comparison, {})
        assert row[-1] == "not measured"
        assert f"| {' | '.join(row)} |\n" in run.table({})


def test_a_quick_run_says_so() -> None:
    measured = results(ours=[1.0], loop=[2.0])
    assert "A rough look" not in run.table(measured)
    measured["fit"]["quick"] = True
    assert run.table(measured).startswith("A rough look")


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    if not RESULTS.is_file():
        pytest.skip("nothing was measured yet")
    measured = json.loads(RESULTS.read_text())
    table = RESULTS.with_suffix(".md").read_text()
    assert table == run.table(measured)
    readme = (FOLDER / "README.md").read_text()
    assert readme == run.into_readme(readme, table)
    if measured.keys() >= {"fit", "batches", "resnet", "grid"}:
        assert "not measured" not in table


def test_the_committed_table_of_other_libraries_is_that_of_the_committed_results() -> None:
    table = folders.table(json.loads(folders.RESULTS.read_text()))
    readme = (FOLDER / "README.md").read_text()
    assert readme == folders.into_readme(readme, table)


def test_the_committed_records_are_those_of_the_committed_results() -> None:
    for file, text in records.written(json.loads(records.RESULTS.read_text())).items():
        assert file.read_text() == text


def test_lines_are_counted_without_docstring_and_empty_lines(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text('"""Says\n\nmuch."""\n\nimport sys\n\nprint(\n    1\n)\n')
    assert folders.lines(script) == 4


def test_rounding_compares_three_ways_of_one_training() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100, 784, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 10, (100,), generator=generator)
    network = rounding.Network((12, 7), 0.05, 8)
    for distance in rounding.distances(network, 0, x, y):
        assert 0 < distance < 1e-12  # the same updates, in another order
    trained, fresh = network.build(0, x.dtype), network.build(0, x.dtype)
    weights = rounding.autograd(trained, network, x, y)
    assert rounding.distance(weights, [p.detach() for p in fresh.parameters()]) > 0.01
    # relative to the largest value of each tensor, the second of those compared
    ones, others = [torch.ones(2), torch.tensor([1.0, -2.0])], [torch.ones(2), torch.ones(2)]
    assert rounding.distance(ones, others) == 3
    assert rounding.distance(others, ones) == 1.5
