"""The parser of fit, validate, test, predict and inspect: short help, short errors."""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from mnist_lightning import console, moved
from mnist_lightning.catalog import shipped_configs
from mnist_lightning.classes import import_class
from mnist_lightning.configs import find_config, read_config
from mnist_lightning.console import suggest
from mnist_lightning.models.architectures import ARCHITECTURES
from mnist_lightning.models.classifier import Classifier
from mnist_lightning.words import options

# the sections of the help, after the general options and those of the model
SECTIONS = {
    "data": "data",
    "early_stopping": "early stopping",
    "freezing": "layer freezing",
    "execution": "how the training steps",
    "trainer": "Lightning's Trainer",
}
# the general options, and a better text than the parser's where it needs one
GENERAL = {
    "config": None,
    "model": "The class of the model: one of this package, or your own, like my_module.MyModel.",
    "ckpt_path": "A checkpoint: a file, the folder of a run, or the name of a run, like shallow or"
    " shallow/last. For validate, test and predict also several: an ensemble.",
    "seed_everything": "The seed of the training; true draws a random one.",
    "save_every_minutes": None,
    "pictures": None,
    "tune": None,
    "robustness": None,
    "verbose": None,
    "print_config": None,
    "weights_only": "As in Lightning; checkpoints are always read as data.",
    "help": None,
}


class Parser(LightningArgumentParser):
    """Reports an error in a line or two; its help shows the model's options first."""

    def parse_args(self, args: Any = None, *others: Any, **settings: Any) -> Any:
        argv = list(args or [])
        if {"-h", "--help"} & set(argv):
            print(self._help(argv))
            raise SystemExit(0)
        return super().parse_args(args, *others, **settings)

    def _help(self, argv: list[str]) -> str:
        """The options of a command: general, then the model's, the others, Lightning's last."""
        command, parser = "inspect", self
        if self._subcommands_action is not None:
            command = argv[0]
            parser = self._subcommands_action.choices[command]
        groups = parser._action_groups
        actions = [action for group in groups for action in group._group_actions]
        model, settings = _model(argv, parser.get_defaults(skip_validation=True).get("model"))
        by_name = {_name(action): action for action in actions}
        general = [by_name[name] for name in GENERAL if name in by_name]
        for action in general:
            action.help = GENERAL[_name(action)] or action.help
        sections: list[tuple[str, list[Any]]] = [("general", general)]
        if model is not None:
            own = ArgumentParser()
            own.add_class_arguments(model, "model")
            with suppress(Exception):  # the settings may not fit the class
                own.set_defaults({f"model.{name}": value for name, value in settings.items()})
            summary = (model.__doc__ or "").strip().partition("\n")[0]
            title = f"{model.__name__}: {summary}".rstrip(".: ")
            sections.append((title, [a for a in own._actions if _name(a).startswith("model.")]))
        for group, title in SECTIONS.items():
            sections.append((title, [a for a in actions if _name(a).startswith(f"{group}.")]))
        parser._action_groups = []
        for title, members in sections:
            section = parser.add_argument_group(title)
            section._group_actions = members
        first = "--config NAME" if command in ("fit", "inspect") else "--ckpt_path RUN"
        parser.usage = f"{console.PROGRAM} {command} {first} [options]"
        parser.description = None
        usage, _, rest = parser.format_help().rstrip().partition("\n\n")
        return "\n\n".join([usage, _introduction(command, model), rest])

    def parse_string(self, content: str, *args: Any, **settings: Any) -> Any:
        return super().parse_string(moved.current_config(content), *args, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        raise ValueError(shorten(message, self))


def shorten(message: str, parser: LightningArgumentParser) -> str:
    """The core of a jsonargparse message, with a suggestion."""
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
    modules = {model.__name__: model for model in _subclasses(LightningModule)}
    configs = [path.name for path in shipped_configs()]
    if re.search(r"required: (\w+\.)?model$", core):
        return f"which model? --config NAME ({', '.join(configs)}), or --model CLASS"
    if match := re.search(r"Expected a dot import path string: (\S+)", core):
        return f"no model {match[1]!r}; {suggest(match[1], models)}"
    if match := re.search(r"does not correspond to a subclass of (\w+)", core):
        if match[1] != "LightningModule":
            wrong = re.search(r"Import path (\S+) does not", core)
            return f"{core.partition(':')[0]}: {wrong[1] if wrong else given} is not a {match[1]}"
        return f"--model {given}: not a LightningModule; {suggest(given, models)}"
    if match := re.search(r"argument (?:\S+/)?(\S+): expected one argument", core):
        return f"{match[1]} needs a value after it"
    if match := re.search(r"(\w+): Option '(\w+)' is not accepted", core):
        kind = modules.get(match[1])
        known = ArgumentParser().add_class_arguments(kind, fail_untyped=False) if kind else []
        return f"{match[1]} has no option {match[2]!r}; {suggest(match[2], known)}"
    if match := re.search(r"unrecognized arguments: (\S+)|not accept option '(\S+)'", core):
        unknown = (match[1] or match[2]).partition("=")[0]
        nested = getattr(parser, "_subcommands_action", None)
        parsers = [parser, *(nested.choices.values() if nested else [])]
        options = [o for p in parsers for action in p._actions for o in action.option_strings]
        if match[2]:  # a key in a file has no dashes
            options = [option.lstrip("-") for option in options]
        return f"no option {unknown}; {suggest(unknown, options, 'all of them: --help')}"
    if given and "Expected a" in core:  # one of several types
        start, *types = re.split(r"Expected an? ", core)
        return f"{start}expected {' or '.join(kind.strip() for kind in types)}, got {given}"
    return core


def _name(action: Any) -> str:
    return max(action.option_strings, key=len, default="").lstrip("-")


def _model(argv: list[str], default: Any) -> tuple[type | None, dict[str, Any]]:
    """The model class that the command names, or None, and its settings."""
    given = list(options(argv))
    candidates: list[Any] = [default]  # the last one wins
    for name, value in given:
        if name == "config" and value:
            candidates.append(read_config(find_config(value)).get("model"))
    candidates += [value for name, value in given if name == "model" and value]
    model: type | None = None
    model_settings: dict[str, Any] = {}
    for candidate in candidates:
        path, settings = candidate, {}
        if isinstance(candidate, Mapping | Namespace):
            path = candidate.get("class_path")
            settings = dict(candidate.get("init_args") or {})
        if isinstance(path, str):
            ours = {model.__name__: model for model in _subclasses(Classifier)}
            name = path.rpartition(".")[2]
            model = ours[name] if name in ours else import_class(path)
            model_settings = settings
    return model, model_settings


def _introduction(command: str, model: type | None) -> str:
    if model is not None:
        return f"The options of {model.__name__}, its data and its training."
    models = sorted(ARCHITECTURES)
    configs = (path.name for path in shipped_configs())
    return (
        "Each model has its own options, like its learning rate. To see them too, name the model:\n"
        f"  {console.command(command, '--help', '--config', 'shallow.yaml')}\n"
        f"  {console.command(command, '--help', '--model', 'ShallowNetwork')}\n"
        f"models: {', '.join(models)}; or your own: my_module.MyModel\n"
        f"configurations: {', '.join(configs)}"
    )


def _subclasses(base: type) -> Iterator[type]:
    subclass: type
    for subclass in base.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
