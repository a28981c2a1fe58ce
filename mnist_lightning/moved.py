"""Names that code, configurations and checkpoints made before knew: they still import.

Modules that are gone stand for those that their content moved to. Modules that became packages
(``data``, ``models``, ``search``, ``report``) hand their former names on, in their own
``__init__.py``, through ``former_names``.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

# former module: where its content is now
GONE = {
    "analysis": ["report.analysis"],
    "callbacks": ["training.callbacks", "training.freezing", "training.progress", "console"],
    "checkpoints": ["runs.checkpoints", "runs.folder"],
    "claims": ["search.leases"],
    "dashboard": ["runs.loggers"],
    "evaluations": ["runs.evaluations"],
    "execution": ["training.execution"],
    "figures": ["report.figures"],
    "findings": ["report.findings"],
    "inspection": ["models.inspection"],
    "memory": ["training.memory"],
    "names": ["configs", "classes", "runs.folder"],
    "own": ["models.own"],
    "plan": ["search.plan"],
    "population": ["training.population"],
    "published": ["report.published"],
    "results": ["search.results"],
    "space": ["search.space"],
    "stacked": ["training.stacked"],
    "worker": ["search.worker"],
}


def former_names(module: str, homes: Sequence[str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds each name in the modules that the names moved to.

    Args:
        module: its own full name.
        homes: the others, below ``mnist_lightning``.
    """

    def find(name: str) -> Any:
        if not name.startswith("_") and not submodule(name):
            for home in homes:
                found = import_module(f"mnist_lightning.{home}")
                if hasattr(found, name):
                    return getattr(found, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def submodule(name: str) -> bool:
        """Python asks here for one too, before it imports it."""
        package = hasattr(sys.modules[module], "__path__")
        return package and find_spec(f"{module}.{name}") is not None

    return find


class FormerModules(MetaPathFinder, Loader):
    """Imports the modules of ``GONE``; asked only where there is no file of that name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        known = package == "mnist_lightning" and name in GONE
        return spec_from_loader(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = GONE[module.__name__.rpartition(".")[2]]
        vars(module)["__getattr__"] = former_names(module.__name__, homes)


# option: its name by now
OPTIONS = {
    "threads": "execution.threads",
    "data.steps_per_execution": "execution.steps",
    "data.init_args.steps_per_execution": "execution.steps",
    "model.fused": "execution.fused",
    "model.init_args.fused": "execution.fused",
}


def current_words(words: Sequence[str]) -> list[str]:
    """The words of a command, with the options that have another name by now."""
    named = [(word, *word.removeprefix("--").partition("=")) for word in words]
    return [
        f"--{OPTIONS[name]}{equals}{value}" if word.startswith("--") and name in OPTIONS else word
        for word, name, equals, value in named
    ]


def current_config(content: str) -> str:
    """A configuration as text, with the settings that are at another place by now."""
    if not any(option.rpartition(".")[2] in content for option in OPTIONS):
        return content
    import yaml

    settings = yaml.safe_load(content)
    changed = False
    for option, current in OPTIONS.items():
        *groups, name = option.split(".")
        within: Any = settings
        for group in groups:
            within = within.get(group) if isinstance(within, dict) else None
        if not isinstance(within, dict) or name not in within or _is_of_another(settings, option):
            continue
        group, _, name_now = current.partition(".")
        settings.setdefault(group, {}).setdefault(name_now, within.pop(name))
        changed = True
    return yaml.safe_dump(settings, sort_keys=False) if changed else content


def _is_of_another(settings: dict[str, Any], option: str) -> bool:
    """Whether the option is one of a model or data of the user's own."""
    group = settings.get(option.partition(".")[0])
    path = group.get("class_path") if isinstance(group, dict) else None
    return "." in str(path or "") and not str(path).startswith("mnist_lightning.")


def bring_up_to_date(checkpoint: dict[str, Any]) -> None:
    """Has a checkpoint of before say what it says by the names of now."""
    settings = checkpoint.get("hyper_parameters")
    ours = str(checkpoint.get("model_class", "")).startswith("mnist_lightning.")
    if ours and isinstance(settings, dict) and isinstance(settings.get("fused"), bool):
        checkpoint.setdefault("execution", {"fused": settings.pop("fused")})
