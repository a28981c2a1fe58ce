"""Former names still work in code, configurations and checkpoints.

A module that is gone still imports and finds its names in the modules that now hold them. Modules
that became packages (``data``, ``models``, ``search``, ``report``) do the same in their
``__init__.py``, with ``former_names``.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

# former module: the modules that now hold its content
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
    """A ``__getattr__`` for a module; it looks each name up in other modules.

    Args:
        module: the full name of the module.
        homes: the other modules, relative to ``mnist_lightning``.
    """

    def find(name: str) -> Any:
        if not name.startswith("_") and not submodule(name):
            for home in homes:
                imported = import_module(f"mnist_lightning.{home}")
                if hasattr(imported, name):
                    return getattr(imported, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def submodule(name: str) -> bool:
        """Whether it is a submodule: Python asks for it here before it imports it."""
        package = hasattr(sys.modules[module], "__path__")
        return package and find_spec(f"{module}.{name}") is not None

    return find


class FormerModules(MetaPathFinder, Loader):
    """Imports the modules of ``GONE``; Python asks it last, when no file has that name."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        known = package == "mnist_lightning" and name in GONE
        return spec_from_loader(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = GONE[module.__name__.rpartition(".")[2]]
        vars(module)["__getattr__"] = former_names(module.__name__, homes)


# former option: its current name
OPTIONS = {
    "threads": "execution.threads",
    "data.steps_per_execution": "execution.steps",
    "data.init_args.steps_per_execution": "execution.steps",
    "model.fused": "execution.fused",
    "model.init_args.fused": "execution.fused",
}


def current_argv(argv: Sequence[str]) -> list[str]:
    """The arguments of a command, with current option names."""
    current = []
    for argument in argv:
        name, equals, value = argument.removeprefix("--").partition("=")
        renamed = argument.startswith("--") and name in OPTIONS
        current.append(f"--{OPTIONS[name]}{equals}{value}" if renamed else argument)
    return current


def current_config(content: str) -> str:
    """The text of a configuration, with former settings moved to their current places."""
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
        if not isinstance(within, dict) or name not in within or _is_users(settings, option):
            continue
        group, _, name_now = current.partition(".")
        settings.setdefault(group, {}).setdefault(name_now, within.pop(name))
        changed = True
    return yaml.safe_dump(settings, sort_keys=False) if changed else content


def _is_users(settings: dict[str, Any], option: str) -> bool:
    """Whether the option belongs to a user's model or data."""
    group = settings.get(option.partition(".")[0])
    path = group.get("class_path") if isinstance(group, dict) else None
    return "." in str(path or "") and not str(path).startswith("mnist_lightning.")


def update_checkpoint(checkpoint: dict[str, Any]) -> None:
    """Replaces former settings in a checkpoint by the current ones."""
    settings = checkpoint.get("hyper_parameters")
    ours = str(checkpoint.get("model_class", "")).startswith("mnist_lightning.")
    if ours and isinstance(settings, dict) and isinstance(settings.get("fused"), bool):
        checkpoint.setdefault("execution", {"fused": settings.pop("fused")})
