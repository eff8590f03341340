"""The command line of every script in `train/` and `eval/`.

A script describes its settings by a frozen dataclass, reads it with `parse` or, where a run has
configs, with `load_config`, and does its work inside `one_sentence`. Flags are written with hyphens
(`--data-dir`, `--no-scale-gem`); underscores are accepted as well.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast, get_args

import jax
import tyro

from ggem_jax.descriptors.backbones import read_any_vit
from ggem_jax.files.errors import AmbiguousWeights
from ggem_jax.models.transformer import GELU
from ggem_jax.models.vit import vit_config
from ggem_jax.weights.architecture import NOTHING_GIVEN, Given
from ggem_jax.weights.vit import PublishedViT

CONFIGS = Path(__file__).parent / "configs"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}  # of the computation; weights are float32


class Settings(Protocol):
    """The settings of a script that has configs."""

    tool: ClassVar[str]  # its module, such as train.classify


T = TypeVar("T")
S = TypeVar("S", bound=Settings)


class Refused(Exception):
    """A mistake of the user or a failure of the machine, in one sentence.

    A script prints the sentence and exits with a non-zero code (`one_sentence`).
    """


def require(name: str, value: Any, what: str, fulfilled: bool) -> None:
    """Raises `ValueError` if a setting is wrong.

    Args:
        name: The setting as its flag spells it, without the leading hyphens.
        value: The value of the setting.
        what: The condition in words, such as "at least 1".
        fulfilled: Whether the value fulfils it.

    Raises:
        ValueError: It does not; the message names the flag, the condition and the value.
    """
    if not fulfilled:
        raise ValueError(f"--{name.replace('_', '-')} must be {what}, it is {value}")


@contextlib.contextmanager
def one_sentence(tool: str) -> Iterator[None]:
    """Ends a script with one line on standard error when something goes wrong inside the block.

    The exit code is 1 where the user or the machine is at fault, and 130 after Ctrl-C. Errors in
    our own code keep their traceback.

    Args:
        tool: Name of the script, which begins the line.

    Yields:
        Nothing.

    Raises:
        SystemExit: In place of `Refused`, `KeyboardInterrupt`, `OSError`, lack of memory on a
            device, and a home directory that cannot be found.
    """
    try:
        yield
    except Refused as error:
        sys.exit(f"{tool}: {error}")
    except KeyboardInterrupt:
        sys.stderr.write(f"{tool}: interrupted\n")
        sys.exit(128 + signal.SIGINT)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(
            f"{tool}: out of memory ({first_line(error)}): try a smaller --batch, more"
            " --optimizer.accumulate or --model.remat"
        )
    except RuntimeError as error:
        if "home directory" not in str(error):  # of a path that begins with ~
            raise
        sys.exit(f"{tool}: {error}")
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        sys.exit(f"{tool}: {error.strerror or error}{file}")


def first_line(error: BaseException, otherwise: str | None = None) -> str:
    """Returns the first line of an error's message, or `otherwise` where the message is empty.

    Args:
        error: The error.
        otherwise: The result for an empty message; None takes the name of the error's type.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else otherwise or type(error).__name__


def parse(
    record: type[T],
    argv: list[str] | None,
    prog: str,
    *,
    default: T | None = None,
    description: str | None = None,
) -> T:
    """Returns the record that flags describe.

    Args:
        record: The dataclass of the settings; the comments beside its fields are the help texts.
        argv: The flags; None takes those of the process.
        prog: The module that is run, such as `eval.metric`.
        default: A record whose values hold where no flag is given; None takes the defaults of the
            dataclass.
        description: The text of `--help` before the flags; None takes the record's docstring.

    Raises:
        Refused: A flag is wrong; the sentence says which and what it must be.
        SystemExit: After `--help`, with code 0.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = tyro.cli(
                record,
                default=default,
                args=sys.argv[1:] if argv is None else argv,
                prog=f"python -m {prog}",
                description=description,
            )
            return cast(T, found)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise Refused(
            f"{_sentence_of(said.getvalue())} (python -m {prog} --help lists the flags)"
        ) from None
    except ValueError as error:
        raise Refused(str(error)) from None


def load_config(record: type[S], argv: list[str], prog: str | None = None) -> S:
    """Returns the settings of a run from its config files and flags.

    Each layer goes over those before it: the defaults, `--config NAME`, `--config-file FILE`,
    `--init FILE` (the sizes of a published network), `--variant NAME` (such as S/16), `--precision`
    (fp32 or bf16, the dtype of the computation), and the other flags. The settings of the run that
    `--resume-from RUN` names take the place of the defaults.
    Without a config, a file, a run and a source of data the config is `digits`.

    Args:
        record: The dataclass of the settings.
        argv: The flags.
        prog: The module that is run; None takes `record.tool`.

    Raises:
        Refused: A flag or a file is wrong.
    """
    prog = prog or record.tool
    argv = list(argv)
    settings: dict[str, Any] = {}
    name, file, start, variant, before, precision = (
        take_flag(argv, flag)
        for flag in (
            *("--config", "--config-file", "--init", "--variant", "--resume-from"),
            "--precision",
        )
    )
    if start is not None and before is not None:
        raise Refused("--init and --resume-from exclude each other: a run starts from one of them")
    if before is not None:
        settings = _settings_of_run(Path(before), record)
    names_data = any(re.match(r"--data(\.source)?(=|$)", flag) for flag in argv)
    if name is None and file is None and before is None and not names_data:
        name = "digits"
    if name is not None:
        if name not in known_configs(record):
            raise Refused(f"--config must be one of {', '.join(known_configs(record))}, not {name}")
        settings = _put_over(settings, read_settings(configs_of(record) / f"{name}.toml"))
    if file is not None:
        settings = _put_over(settings, read_settings(Path(file)))
    if start is not None:
        settings = _put_over(settings, _settings_of_published(Path(start), _choices_of(argv)))
    if variant is not None:
        settings = _put_over(settings, {"variant": variant})
    if precision is not None:
        if precision not in PRECISIONS:
            raise Refused(f"--precision must be {' or '.join(PRECISIONS)}, not {precision}")
        settings = _put_over(settings, {"model": {"dtype": PRECISIONS[precision]}})
    try:  # all layers together: a value may fit only what a later layer sets
        return parse(
            record,
            [*flags(settings), *argv],
            prog,
            default=record(),
            description=_describe_layers(record),
        )
    except Refused:
        if file is not None:
            try:
                parse(record, flags(settings), prog, default=record())
            except Refused as error:
                raise Refused(f"in the config file {file}: {error}") from None
        raise


def configs_of(record: type[Settings]) -> Path:
    """Returns the folder of a script's configs.

    Args:
        record: The dataclass of the script's settings.
    """
    return CONFIGS / record.tool.rpartition(".")[2]


def known_configs(record: type[Settings]) -> list[str]:
    """Returns the names that `--config` takes: the files in the script's folder of configs.

    Args:
        record: The dataclass of the script's settings.
    """
    return sorted(path.stem for path in configs_of(record).glob("*.toml"))


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the nested settings in a file, by name.

    Args:
        path: A TOML file, or a `.json` file such as the `config.json` of a run, whose facts about
            tool and data are left out.

    Raises:
        Refused: The file cannot be read, or does not hold settings by name.
    """
    kind = "JSON" if path.suffix == ".json" else "TOML"
    try:
        text = path.read_text()
        values = json.loads(text) if kind == "JSON" else tomllib.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"settings by name are needed, not a {type(values).__name__}")
    except OSError as error:
        raise Refused(f"the config file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the config file {path} is not {kind}: {error}") from None
    for name in ("data_found", "tool"):  # the config.json of a run has them beside its settings
        values.pop(name, None)
    return values


def flags(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Returns nested settings as flags: {"a": {"b_c": False}} -> ["--a.no-b-c"].

    Args:
        values: Settings by name; a dictionary is a group, a list becomes several values of one
            flag.
        prefix: Text between the hyphens and the names, such as "a.".
    """
    found = []
    for key, value in values.items():
        name = key.replace("_", "-")
        if isinstance(value, dict):
            found += flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            found.append(f"--{prefix}{'' if value else 'no-'}{name}")
        else:
            found += [f"--{prefix}{name}", *map(str, value if isinstance(value, list) else [value])]
    return found


def to_dict(record: Any) -> dict[str, Any]:
    """Returns a record as JSON can hold it; `from_dict` is the way back.

    Args:
        record: A dataclass of settings; paths in it become text.
    """
    return json.loads(json.dumps(dataclasses.asdict(record), default=str))


def from_dict(record: type[S], values: dict[str, Any]) -> S:
    """Returns the record that `to_dict` gave these values for.

    Args:
        record: The dataclass of the settings.
        values: The settings by name.

    Raises:
        Refused: The values do not fit the record.
    """
    return parse(record, flags(values), record.tool, default=record())


@functools.lru_cache(maxsize=1)  # it is read for the settings, then for the weights
def published_vit(path: Path, given: Given = NOTHING_GIVEN) -> PublishedViT:
    """Returns the network of the file that `--init` names, published or our own.

    Args:
        path: File of weights; `~` is the home directory.
        given: Choices of the flags `--model.*` that a published file may leave open.

    Raises:
        Refused: The file cannot be read, or is not a Vision Transformer.
    """
    try:
        return read_any_vit(path.expanduser(), given)
    except AmbiguousWeights as error:
        names = "--model.heads, --model.gelu and --model.post-norm"
        raise Refused(f"--init: {error} (in training the flags are {names})") from None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        several = " (in training: write it with python -m ggem_jax.weights convert --which first)"
        raise Refused(f"--init: {error}{several if '--which' in str(error) else ''}") from None


def _choices_of(argv: list[str]) -> Given:
    """The choices among the flags that a published file may leave open, wrong values left out."""

    def value(flag: str) -> str:
        found = re.findall(rf"(?m)^--model\.{flag}(?:=|\n)(.*)$", "\n".join(argv))
        return found[-1] if found else ""

    heads, gelu = value("heads"), value("gelu")
    norms = re.findall(r"(?m)^--model\.(no-)?post-norm$", "\n".join(argv))
    return Given(
        int(heads) if heads.isascii() and heads.isdecimal() else None,
        cast(GELU, gelu) if gelu in get_args(GELU) else None,
        None,
        None if not norms else "pre" if norms[-1] else "post",
    )


def _settings_of_published(path: Path, given: Given) -> dict[str, Any]:
    """The sizes of the network, and mean and deviation of its images where they are known."""
    published = published_vit(path, given)
    settings: dict[str, Any] = {"init": str(path), "model": dataclasses.asdict(published.config)}
    if published.normalised is not None:
        settings["data"] = dict(zip(("mean", "std"), map(list, published.normalised), strict=True))
    return settings


def _settings_of_run(run: Path, record: type[Settings]) -> dict[str, Any]:
    """The settings of a run that another one continues; its folder and its start are its own."""
    try:
        tool = json.loads((run / "config.json").read_text()).get("tool", record.tool)
    except (OSError, ValueError, AttributeError):
        raise Refused(f"--resume-from {run} is not the folder of a run of {record.tool}") from None
    if tool != record.tool:
        raise Refused(f"--resume-from {run} is a run of {tool}, not of {record.tool}")
    settings = read_settings(run / "config.json")
    own = ("out", "init", "stop_after")
    settings.get("text", {}).pop("tokenizer", None)  # that in the run's folder is taken
    return {name: value for name, value in settings.items() if name not in own} | {
        "resume_from": str(run)
    }


def _describe_layers(record: type[Settings]) -> str:
    folder = configs_of(record).relative_to(CONFIGS.parent.parent).as_posix()
    return (
        "Defaults, or the settings of --resume-from RUN < --config NAME < --config-file FILE (TOML"
        " or JSON) < --init FILE < --variant NAME < --precision fp32|bf16 < the flags below."
        " Without --config, --config-file, --resume-from and --data the config is digits."
        f" NAME of --config: {', '.join(known_configs(record))}; each file in {folder} says what it"
        " trains and what to expect. NAME of --variant: Ti, S, B, L or H, a slash, and the patch"
        " size; it sets the sizes of the model."
        f"{DRY_RUN}"
    )


DRY_RUN = (
    " --dry-run prints what a run would take, and trains nothing: with --images N and (except in"
    " train.contrastive) --classes N"
    " without the data, with --on none, here or h200:N to choose the devices to compile for."
)


def _put_over(settings: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """The settings with those of a layer over them; a `variant` stands for the model's sizes."""
    layer = dict(layer)
    if "variant" in layer:
        try:
            config = vit_config(layer.pop("variant"))
        except ValueError as error:
            raise Refused(str(error)) from None
        names = ("patch", "width", "depth", "heads", "mlp_width")
        sizes = {name: getattr(config, name) for name in names}
        settings = _merge(settings, {"model": sizes})
    return _merge(settings, layer)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merge(below[name], value)
        for name, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(name), dict)
    }
    return below | above | both


def take_flag(argv: list[str], flag: str) -> str | None:
    """Removes `flag VALUE` and `flag=VALUE` from the flags and returns the last value.

    Args:
        argv: The flags, which lose this one.
        flag: The flag, with its hyphens.

    Returns:
        The value, or None where the flag is not there.

    Raises:
        Refused: The flag is last and has no value.
    """
    value = None
    for i in reversed(range(len(argv))):
        name, equals, found = argv[i].partition("=")
        if name.replace("_", "-") != flag:
            continue
        if not equals and i + 1 == len(argv):
            raise Refused(f"{flag} needs a value")
        found = found if equals else argv[i + 1]
        del argv[i : i + (1 if equals else 2)]
        value = found if value is None else value
    return value


def _sentence_of(box: str) -> str:
    """The first paragraph of the parser's box, then the flags that the later ones suggest."""
    paragraphs: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # after the title
        text = line.strip(" │|")
        if text and not text.strip("─-╭╮╰╯+"):
            paragraphs.append([])
        elif text:
            paragraphs[-1].append(text)
    filled = [lines for lines in paragraphs if lines]
    suggestions = [
        line.split()[0].rstrip(",")
        for lines in filled[1:]
        for line in lines
        if line.startswith("--")
    ]
    sentence = " ".join(filled[0]) if filled else "the flags are wrong"
    return f"{sentence}; perhaps {' or '.join(suggestions)}" if suggestions else sentence
