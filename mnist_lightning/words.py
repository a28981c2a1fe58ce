"""What is wrong with the words of a command, as far as it shows before PyTorch is imported.

A typo is answered at once, and not after the seconds that the imports take. What is refused here is
certainly wrong; what passes may still be refused by the parser. The options are read off the
sources, which nothing has to be imported for.
"""

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from mnist_lightning.catalog import hint, shipped_configs
from mnist_lightning.console import python, require
from mnist_lightning.names import Asked, asked, find_checkpoint, find_config, run_name

TRAINER = "lightning.pytorch.trainer.trainer"
# the options of a group are the arguments of a class
GROUPS = {
    "trainer": (TRAINER, "Trainer"),
    "data": ("mnist_lightning.data", "MNISTDataModule"),
    "early_stopping": ("mnist_lightning.callbacks", "EarlyStopping"),
    "freezing": ("mnist_lightning.callbacks", "LayerFreezing"),
}
MODELS = "mnist_lightning.models"
_OF_ALL = {"help", "print_config", "seed_everything", "model", "trust", *GROUPS}
_WITHIN = {"help", "class_path", "init_args", "dict_kwargs"}


def check(command: str, words: Sequence[str]) -> None:
    """Refuses what is certainly wrong.

    Args:
        command: the first word of the command line.
        words: the others.

    Raises:
        ValueError: an option that there is not, a configuration or checkpoint that is not there, no
            model or no weights where there must be some, a package that is not installed.
    """
    for package in ("torch", "lightning"):
        if find_spec(package) is None:
            raise ValueError(
                f"{python()} has no {package}: use the Python that this was installed with"
            )
    found = list(options(words))
    given = dict(found)
    if command == "search":
        for name, value in found:
            if name == "config":
                find_config(value, "search")
        if "help" not in given:
            require("optuna", "a search")
        return
    wanted = asked(words)
    if "help" not in given:
        _check_options(command, list(given), wanted)
        _check_checkpoint(command, given, wanted)


def _check_options(command: str, names: list[str], wanted: Asked) -> None:
    known = {name: _arguments(*where) for name, where in GROUPS.items()}
    known["model"] = None
    if wanted.ckpt_path is None and wanted.model is not None:  # a checkpoint knows its class
        if wanted.model in _classes(MODELS) or wanted.model.startswith(f"{MODELS}."):
            known["model"] = _arguments(MODELS, wanted.model.rpartition(".")[2])
        elif wanted.model.isidentifier():
            raise ValueError(f"no model {wanted.model!r}; {hint(wanted.model, _classifiers())}")
    if wanted.ckpt_path is not None or wanted.data is not None:
        known["data"] = None
    plain = _OF_ALL | {"config"} | _named_in("mnist_lightning.cli")
    if command == "inspect":
        plain -= {"ckpt_path"}
    else:
        plain |= set(_arguments(TRAINER, "Trainer", command) or [])
    for name in names:
        root, _, rest = name.removesuffix("+").partition(".")
        arguments = known.get(root)
        if root in known and (arguments is None or rest.partition(".")[0] in {"", *_WITHIN}):
            continue
        if root in known and rest.partition(".")[0] in (arguments or ()):
            continue
        if root in plain and not rest:
            continue
        every = [f"--{option}" for option in sorted(plain)]
        every += [f"--{group}.{option}" for group in known for option in known[group] or ()]
        raise ValueError(f"no option --{name}; {hint(f'--{name}', every, 'all of them: --help')}")


def _check_checkpoint(command: str, given: dict[str, str], wanted: Asked) -> None:
    if wanted.ckpt_path is not None:
        kind = "last" if command == "fit" else "best"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the command itself warns
            find_checkpoint(
                wanted.ckpt_path, Path(wanted.root) / "lightning_logs", run_name(wanted), kind
            )
    elif command in ("validate", "test", "predict") and "print_config" not in given:
        raise ValueError(
            f"{command} needs trained weights: --ckpt_path FILE, or the folder of a run"
        )
    elif not wanted.configs and wanted.model is None and "print_config" not in given:
        names = ", ".join(path.name for path in shipped_configs())
        raise ValueError(f"which model? --config NAME ({names}), or --model CLASS")


def options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options among the words, as (name without dashes, value); a value may be missing."""
    for word, following in pairwise([*words, ""]):
        if re.match(r"--\w|-[ch]\b", word):
            name, equals, value = word.lstrip("-").partition("=")
            if not equals:
                value = "" if following.startswith("--") else following
            yield {"c": "config", "h": "help"}.get(name, name), value


@cache
def _source(module: str) -> ast.Module:
    """The source of a module, parsed; it is not imported."""
    root, *parts = module.split(".")
    spec = find_spec(root)
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0], *parts).with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _classes(module: str) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _source(module).body if isinstance(node, ast.ClassDef)}


def _classifiers() -> list[str]:
    return [
        name
        for name, node in _classes(MODELS).items()
        if any(isinstance(base, ast.Name) and base.id == "Classifier" for base in node.bases)
    ]


def _arguments(module: str, name: str, method: str = "__init__") -> list[str] | None:
    """The names of a method's arguments; nothing where the source does not tell them all."""
    found = _classes(module).get(name)
    for node in found.body if found else []:
        if isinstance(node, ast.FunctionDef) and node.name == method:
            if node.args.kwarg is not None:
                return None
            return [argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs)]
    return None


def _named_in(module: str) -> set[str]:
    """The names that stand as options in a source, like ``"--threads"``."""
    texts = (node.value for node in ast.walk(_source(module)) if isinstance(node, ast.Constant))
    return {text[2:] for text in texts if isinstance(text, str) and re.fullmatch(r"--\w+", text)}
