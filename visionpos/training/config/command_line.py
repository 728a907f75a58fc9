"""The command line: from files and flags to a configuration, every mistake in one line.

    python -m train.classify --config configs/run/vit_cifar10_small.yaml --encoding rope_axial --recipe.epochs 5

A run file names one file per group (`model: ../model/vit_128x6.yaml`, relative to itself); flags come on top. The run
files of this project, which an installed package brings with it, have names as well: `--config vit_cifar10_small`.
"""

import re
from argparse import SUPPRESS, HelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Hashable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace, set_loader

from visionpos.training.config.ranges import is_file, path_given
from visionpos.training.config.schema import Config, encoding_label, file_name
from visionpos.training.errors import ConfigError, did_you_mean, one_line, reporting

__all__ = [
    "config_class",
    "field_types",
    "find_config",
    "make_parser",
    "parse",
    "parse_flags",
    "read_fields",
    "read_yaml",
]


AnyConfig = TypeVar("AnyConfig", bound=Config)


def parse(argv: Sequence[str], kind: type[AnyConfig] = Config, description: str = "") -> AnyConfig:
    """Return the configuration that the files and flags of a command line describe; ConfigError on any mistake.

    Args:
        argv: The command line without the name of the command.
        kind: Config or PretrainConfig.
        description: What --help prints above the fields.
    """
    parser = make_parser(description, formatter_class=_FieldHelp)
    parser.add_argument("--config", action="config", help="a YAML file of the fields below; of several, the last wins")
    parser.add_class_arguments(kind)
    flags = parse_flags(parser, _names_to_paths(argv), field_types(kind))
    files = [Path(str(path)) for path in flags.pop("config") or []]
    with reporting("config"):
        config = kind(**vars(parser.instantiate(flags)))
    config.encoding = _load_encoding(config.encoding, [Path(), *(file.parent for file in reversed(files))])
    if config.output is None:
        stem = files[-1].stem if files else config.data.name
        config.output = f"runs/{stem}/{file_name(encoding_label(config.encoding))}-seed{config.seed}"
    config.check()
    return config


PACKAGE = Path(__file__).parents[2]
CONFIGS = next(
    filter(Path.is_dir, (PACKAGE / "configs", PACKAGE.parent / "configs")), PACKAGE
)  # installed, or checked out


def find_config(flag: str, given: str, kind: str) -> Path:
    """Return the file that is meant by a path, or by the name of a file of this project.

    Args:
        flag: what a mistake is reported under.
        given: a path, or a name without a suffix.
        kind: "run" or "sweep": the folder of `configs` that has the files with names.

    Raises:
        ConfigError: an empty path, or a name that neither a file nor one of this project's has.

    Example:
        >>> from visionpos.training.config.command_line import find_config
        >>> find_config("config", "vit_cifar10_small", "run").name
        'vit_cifar10_small.yaml'
    """
    path = path_given(flag, given)
    if not re.fullmatch(r"[\w-]+", given) or path.exists():
        return path
    names = sorted(file.stem for file in (CONFIGS / kind).glob("*.yaml"))
    if given not in names:
        raise ConfigError(f"{flag}: {given!r} given, no file and no name; {did_you_mean(given, names)}")
    return CONFIGS / kind / f"{given}.yaml"


def _names_to_paths(argv: Sequence[str]) -> list[str]:
    """Return a command line in which every `--config NAME` is `--config PATH`."""
    argv = list(argv)
    for index, text in enumerate(argv):
        if index and argv[index - 1] == "--config":
            argv[index] = str(find_config("config", text, "run"))
        elif text.startswith("--config="):
            argv[index] = f"--config={find_config('config', text.removeprefix('--config='), 'run')}"
    return argv


def config_class(path: Path) -> type[Config]:
    """Return the class that a run's file configures: the one with a field of its own in the file, or else Config."""
    given = read_fields(path).keys()
    return next((kind for kind in Config.__subclasses__() if given & kind.__annotations__.keys()), Config)


def _load_encoding(spec: Any, folders: Sequence[Path]) -> Any:
    """Return `spec`, read from its file if it names one (in `folders`, the first that has it)."""
    if isinstance(spec, str) and spec.endswith((".yaml", ".yml")):
        found = [folder / spec for folder in folders if is_file(folder / spec)]
        if not found:
            raise ConfigError(f"encoding: there is no file {spec!r} (looked in {', '.join(map(str, folders))})")
        spec = read_yaml(found[0])
    for part in spec if isinstance(spec, list) else [spec]:
        if not (isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("name"), str))):
            raise ConfigError(
                f"encoding: {part!r} given; accepted: a name, names joined by '+', {{name: ..., option: ...}}, "
                "a list of those, or a .yaml file of one"
            )
    return spec


class _Loader(yaml.SafeLoader):
    """Read YAML with the numbers and booleans of YAML 1.2 (`1e-3` is a number, `no` is text) and no duplicate keys.

    There are texts, numbers, booleans, nulls, lists and mappings, and no other types (`!!set`, `!!binary`).
    """

    yaml_constructors: ClassVar = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "int", "float", "bool", "null", "seq", "map")
    }

    yaml_implicit_resolvers: ClassVar = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("int", "null", "merge")]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Raise ConstructorError for a key that is there twice, of which the last would win."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key_node.value!r} in line {key_node.start_mark.line + 1}"
                )
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Raise ConstructorError for a number that no field could hold."""
        value = super().construct_yaml_int(node)
        if value.bit_length() > 64:
            raise yaml.constructor.ConstructorError(
                None, None, f"whole number of more than 64 bits in line {node.start_mark.line + 1}"
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _load(text: str) -> Any:
    """Return the content of YAML, by the rules above; YAMLError also for what `!!int x` raises."""
    with reporting("not read as YAML", yaml.YAMLError):
        return yaml.load(text, Loader=_Loader)


set_loader("strict", _load, exceptions=(yaml.YAMLError,))


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file, by the rules above."""
    with reporting(str(path)):
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def read_fields(path: Path) -> dict[str, Any]:
    """Return the content of a YAML file that gives fields by name."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {type(content).__name__} given; accepted: fields, as in `seed: 0`")
    return content


class _FieldHelp(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Print the description as it is, and type and default of each field."""


def make_parser(description: str, formatter_class: type[HelpFormatter] = RawDescriptionHelpFormatter) -> ArgumentParser:
    """Return a parser that reads YAML by the rules above and raises where argparse would print its usage.

    Args:
        description: What --help begins with, as it is: that of a script is its docstring, with three examples on top.
        formatter_class: Of the help that follows.
    """
    debug = "--debug, anywhere among the flags, shows the traceback of an error."
    return ArgumentParser(
        description=description,
        formatter_class=formatter_class,
        usage=SUPPRESS,
        epilog=debug,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="strict",
    )


def parse_flags(parser: ArgumentParser, argv: Sequence[str], types: dict[str, Any]) -> Namespace:
    """Return the parsed flags, or raise every mistake as a ConfigError of one line; `types` says what there is."""
    try:
        with reporting("command line"):
            flags = parser.parse_args(list(argv))
    except ConfigError as error:
        if isinstance(error.__cause__, UnicodeError):
            _find_undecodable([Path(text.rpartition("=")[2]) for text in argv])
        if isinstance(error.__cause__, ArgumentError):
            raise ConfigError(_explain(str(error.__cause__), types)) from error.__cause__
        raise
    for file in flags.get("config") or []:
        _refuse_unknown(read_fields(Path(str(file))), types)
    for name, kind in types.items():  # jsonargparse lets null pass in files for any field, and [] for a group
        value, accepts_null = flags.get(name, ""), kind is Any or NoneType in get_args(kind)
        if (value is None and not accepts_null) or (is_dataclass(kind) and not isinstance(value, Namespace)):
            given = "null" if value is None else repr(value)
            raise ConfigError(f"{name}: {given} given; accepted: {_accepted(kind)}")
    return flags


def _find_undecodable(paths: Sequence[Path]) -> None:
    """Raise ConfigError for the file, one of `paths` or a group that one of them names, whose text is not UTF-8."""
    for path in paths:
        if is_file(path):
            groups = read_fields(path).values()
            _find_undecodable([path.parent / text for text in groups if isinstance(text, str)])


def _refuse_unknown(content: dict[str, Any], types: dict[str, Any], prefix: str = "") -> None:
    """Raise ConfigError for a key that is no field; jsonargparse lets one pass whose value is an empty mapping."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in types:
            raise ConfigError(f"{name}: no such field; {_fields_like(name, types)}")
        if is_dataclass(types[name]) and isinstance(value, dict):
            _refuse_unknown(value, types, f"{name}.")


def _fields_like(key: str, types: dict[str, Any]) -> str:
    """Return a hint that names the fields of the group that a wrong key is in."""
    return did_you_mean(key, [name for name in types if name.rpartition(".")[0] == key.rpartition(".")[0]])


UNKNOWN_KEY_MESSAGE = re.compile(
    r"Group '(?P<group>[\w.]+)' does not accept option '(?P<key>.+)'"
    r"|Option '(?P<option>.+)' is not accepted|unrecognized arguments: --(?P<flag>[^\s=]+)"
)


def _explain(message: str, types: dict[str, Any]) -> str:
    """Return jsonargparse's message in one line that names the field, what was given and what is accepted."""
    if unknown := UNKNOWN_KEY_MESSAGE.search(message):
        key = unknown["option"] or unknown["flag"] or f"{unknown['group']}.{unknown['key']}"
        parts = key.split(".")
        paths = [".".join(parts[: count + 1]) for count in range(len(parts))]
        key = next((path for path in paths if path not in types), key)
        return f"{key}: no such field; {_fields_like(key, types)}"
    if text := re.search(r"Unexpected config: ?(.*)", message, re.S):
        return f"config: Unexpected config {text[1][:60]!r}; accepted: fields, as in `seed: 0`"
    if key := re.search(r'(?:Empty nested key|Spaces not allowed in keys): "(.*)"', message, re.S):
        return f"config: {key[1][:60]!r} given as the name of a field; accepted: fields, as in `seed: 0`"
    names = re.findall(r'Parser key "([\w.]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*?)\s*$", message)
    if names and value and names[-1] in types:
        return f"{names[-1]}: {value[1]!r} given; accepted: {_accepted(types[names[-1]])}"
    if missing := re.search(r"arguments are required: (.*)", message):
        return f"{missing[1]}: not given; start from a file (--config NAME, as in configs/run)"
    if names and (
        unread := re.match(r"\s*Unable to load config (['\"].*?['\"])(.*)", message.partition(":\n")[2], re.S)
    ):
        reason = re.sub(r'\s*- Parser key "[\w.]+":.*', "", unread[2], flags=re.S) or ": no such file"
        return one_line(f"{names[0]}: cannot read {unread[1]}{reason}")
    return re.sub(r'^Parser key "([\w.]+)":', r"\1:", one_line(message))


def field_types(group: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every field, by its dotted name."""
    types = {}
    for name, kind in get_type_hints(group).items():
        types[prefix + name] = kind
        if is_dataclass(kind):
            types.update(field_types(kind, f"{prefix}{name}."))
    return types


def _accepted(kind: Any) -> str:
    """Return a type in words."""
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))}: {', '.join(map(_accepted, get_args(kind)))}"
    if isinstance(kind, UnionType):
        return " or ".join(map(_accepted, get_args(kind)))
    if is_dataclass(kind):
        return f"a file of its fields ({', '.join(get_type_hints(kind))})"
    return WORDS_FOR_TYPE.get(get_origin(kind) or kind, str(kind))


WORDS_FOR_TYPE = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    dict: "a mapping of option: value",
}
