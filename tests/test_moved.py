"""What was made before the house had wings still works: names, options, a run and a search."""

import pickle
from importlib import import_module

import pytest

from mnist_lightning.moved import GONE

# module: public names that it had at commit 6a4caca, and class paths that files hold
NAMES = {
    "analysis": "Found groups setting_text",
    "callbacks": "EarlyStopping EpochLines LayerFreezing Mistakes ProgressBar say",
    "checkpoints": "BINDING_DATA ModelCheckpoint check_agrees read",
    "claims": "Claim Claims open_storage",
    "dashboard": "Dashboard RunLogger",
    "data": "EpochSampler ImageSet MNISTDataModule NORMALIZATIONS epoch_order in_image_order"
    " read_image split_indices",
    "evaluations": "is_whole read record",
    "execution": "Execution FusedSGD Way linear_layers",
    "inspection": "Layer format_layers layer_table tensor_table",
    "models": "AffineMap CLASSES Classifier DeepNetwork PIXELS Perceptron ResNet18 ShallowNetwork"
    " mlp one_cycle",
    "names": "ConfigByName find_checkpoint find_config newest_first read_config",
    "plan": "Search Unit units",
    "population": "Member PopulationTraining initial_parameters",
    "published": "GRIDS PUBLISHED",
    "results": "Results load_results new_record",
    "search": "main read run",
    "space": "Trial best draw grid random refine rounds",
    "stacked": "BLOCK_ROWS Population",
    "worker": "Worker",
}


@pytest.mark.parametrize("module", NAMES)
def test_names_of_before_import(module: str) -> None:
    before = import_module(f"mnist_lightning.{module}")
    for name in NAMES[module].split():
        found = getattr(before, name)
        if isinstance(found, type):
            assert pickle.loads(pickle.dumps(found)) is found
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        before.nonsense  # noqa: B018


def test_what_is_gone_leads_to_modules_that_are_there() -> None:
    for homes in GONE.values():
        for home in homes:
            import_module(f"mnist_lightning.{home}")
