"""A TOML file in: the settings that a study varies; out: the settings of each of its trials, checked before any runs."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import json
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from utils import InputError, bounded, check_bounds, flat, from_table, read_toml, require

ROOT = Path(__file__).parent.parent
SET_BY_SEARCH = {"output", "seed", "seeds", "resume", "extend", "max_minutes"}  # settings that a space can't have
SAME_AT_FIRST = {"config", "init_from", "objective", "flops"}  # for a run and the one that starts from its weights
LONGEST_LABEL = 80  # characters of a level's name in the name of a folder


class Level(NamedTuple):
    """One value of a factor. Its label is the value itself, or the name of several settings that change together."""

    label: Any
    settings: dict[str, Any]


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, for the samplers random and tpe."""

    low: float
    """Smallest value; if low and high have no decimal point, all values are integers."""
    high: float
    """Largest value."""
    log: bool = False
    """Whether ratios count rather than differences."""

    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


class Assignment(NamedTuple):
    """What distinguishes a trial: the label of each factor that differs from the base, and the seed."""

    levels: dict[str, Any]
    seed: int

    def key(self) -> str:
        return json.dumps([self.levels, self.seed], sort_keys=True)

    def name(self) -> str:
        """For the name of a folder."""
        text = "-".join([f"{name}={label}" for name, label in self.levels.items()] or ["base"])
        plain = "".join(letter if letter.isalnum() or letter in "=.,_-" else "_" for letter in text)
        return f"{plain[:LONGEST_LABEL]}-seed={self.seed}"


@dataclass(frozen=True)
class Space:
    """The settings that a study varies, and how."""

    name: str = ""
    """Of the study; the name of the file."""
    script: Literal["Pretraining.py", "Finetuning.py"] = "Pretraining.py"
    """What a trial runs."""
    sampler: Literal["one-factor", "grid", "random", "tpe"] = "one-factor"
    """one-factor: the base, then one setting changed at a time; grid: all combinations; random; tpe: Optuna's
    tree-structured Parzen estimator."""
    metric: str = ""
    """Score that says which trial is best: a held-out metric of metrics.jsonl, or TASK_METRIC of a fine-tuning."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Whether less or more of the metric is better."""
    report: tuple[str, ...] = ()
    """Further scores that the report shows."""
    repeats: int = bounded(2, at_least=1)
    """Seeds of each combination of settings."""
    base_repeats: int | None = bounded(None, at_least=1)
    """Seeds of the base of one-factor, from which the spread between seeds is known. None: as many as of the others."""
    first_seed: int = bounded(0, at_least=0)
    """Seeds are numbered from it."""
    tokens: float | None = bounded(None, above=0)
    """Training tokens of each trial, padding counted: its steps follow from batch_size and max_length. None, or in a
    trial that sets steps or flops: those hold."""
    prune_at: tuple[float, ...] = ()
    """Shares of a trial's steps after which it is evaluated and, if its metric is worse than the median there, ended."""
    keep: Literal["metrics", "networks", "all"] = "metrics"
    """What remains of a finished trial's folder: without any .pt file, without checkpoints, or all."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Settings of every trial."""
    first: dict[str, Any] = field(default_factory=dict)
    """Of pretraining: the steps and whatever else is different in a run before each trial, from whose weights the trial
    starts. What is set here holds there whatever the trial's levels are, and its cost comes on top of `tokens` and of a
    level's `flops`. Rows of 16 tokens at first shorten the plateau at the beginning of training."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Factor -> list of values, list of tables of settings that change together, or table of a range."""
    pairs: tuple[dict[str, Any], ...] = ()
    """Of one-factor: tables of two factors and their values, of which all combinations are tried too."""
    finetuning: tuple[dict[str, Any], ...] = ()
    """Settings of Finetuning.py for each task on which a pretrained network is fine-tuned, whose dev scores are scores of
    the trial."""

    def is_design(self) -> bool:
        """Whether all trials are known from the start."""
        return self.sampler in ("one-factor", "grid")

    @functools.cached_property
    def factors(self) -> dict[str, list[Level] | Range]:
        """What varies; a factor that is a setting is named as in flags, with a dot."""
        values = dotted(self.settings, stop="low")
        return {name: read_factor(name, value, f"{self.name}.toml") for name, value in values.items()}

    def assignments(self) -> list[Assignment]:
        """All trials of a design, in the order in which they run: everything with the first seed, then with the next.

        Levels that equal the base are left out, and so are combinations that come twice. Empty for random and tpe.
        """
        if not self.is_design():
            return []
        if self.sampler == "grid":
            all_labels = [[level.label for level in levels] for levels in self.factors.values()]
            combinations = [dict(zip(self.factors, labels, strict=True)) for labels in itertools.product(*all_labels)]
        else:
            combinations = self.one_factor_combinations()
        repeats = [self.base_repeats or self.repeats if not levels else self.repeats for levels in combinations]
        return [Assignment(levels, self.first_seed + number) for number in range(max(repeats, default=0))
                for levels, count in zip(combinations, repeats, strict=True) if number < count]

    @functools.cached_property
    def base_labels(self) -> dict[str, Any]:
        """The label of each factor, if it has one, that stands for what the base is anyway."""
        base = self.resolve({})
        return {name: level.label for name, levels in self.factors.items() for level in levels
                if self.resolve({name: level.label}) == base}

    def one_factor_combinations(self) -> list[dict[str, Any]]:
        """The base, each other level of each factor, and the combinations of `pairs`."""
        combinations = [{}]
        for name, levels in self.factors.items():
            combinations += [{name: level.label} for level in levels if level.label != self.base_labels.get(name)]
        for pair in map(dotted, self.pairs):
            for labels in itertools.product(*pair.values()):
                levels = dict(zip(pair, labels, strict=True))
                # With a value of the base it is a change of one factor, which is there already.
                if all(label != self.base_labels.get(name) for name, label in levels.items()) and levels not in combinations:
                    combinations.append(levels)
        return combinations

    def trial_settings(self, levels: dict[str, Any]) -> dict[str, Any]:
        """The settings of a trial by their names with a dot, without its seed and its folder."""
        values = dotted(self.fixed)
        for name, label in levels.items():
            values |= level_settings(self.factors[name], name, label)
        if "config" in values:
            values["config"] = str(config_file(values["config"]))
        if self.tokens and not values.keys() & {"steps", "flops"}:
            resolved = resolve(self.script, values)
            values["steps"] = max(1, round(self.tokens / (resolved.batch_size * resolved.max_length)))
        if self.prune_at:
            steps = planned_steps(resolve(self.script, values))
            values["eval_every"] = max(1, round(min(self.prune_at) * steps))
        return values

    def resolve(self, levels: dict[str, Any]) -> Any:
        """The script's settings object of a trial."""
        return resolve(self.script, self.trial_settings(levels))

    def resolve_first(self, levels: dict[str, Any]) -> Any:
        """The settings object of the run before a trial; its length follows from its own steps, not from FLOPs."""
        return resolve(self.script, self.trial_settings(levels) | {"flops": 0.0} | dotted(self.first))

    def varied_values(self, levels: dict[str, Any]) -> dict[str, Any]:
        """The values in a trial of all settings that some trial changes, and the labels of factors that are no setting."""
        resolved = flat(self.resolve(levels))
        values = {}
        for name, factor in self.factors.items():
            changed = [name] if isinstance(factor, Range) else [key for level in factor for key in level.settings]
            values |= {key: resolved[key] for key in changed}
        labels = (self.base_labels if self.sampler == "one-factor" else {}) | levels
        return values | {name: label for name, label in labels.items() if values.get(name) is None}


def read_space(path: Path, overrides: tuple[str, ...] = (), script: str | None = None) -> Space:
    """A space from its file; `overrides` are NAME=VALUE of fixed settings, finetuning.NAME=VALUE of all tasks, and
    first.NAME=VALUE.

    Raises InputError for a file that can't be read, an unknown setting, a value of a wrong type or out of bounds, and an
    impossible combination, before any trial runs.
    """
    table = read_toml(path, f"the space {path}")
    space = from_table(Space, {"name": path.stem} | table | ({"script": script} if script else {}), str(path))
    for override in overrides:
        space = overridden(space, override)
    check_bounds(space)
    check_space(space, str(path))
    return space


def overridden(space: Space, text: str) -> Space:
    """The space with one NAME=VALUE set; the value is read as TOML, or as text where it is none."""
    name, equals, value = text.partition("=")
    require(bool(equals), f"--set {text}: expected NAME=VALUE")
    with contextlib.suppress(ValueError):  # else it is text without quotation marks
        value = tomllib.loads(f"value = {value}")["value"]
    prefix, _, rest = name.replace("-", "_").partition(".")
    if prefix == "finetuning":
        require(bool(space.finetuning), f"--set {text}: the space has no [[finetuning]]")
        return dataclasses.replace(space, finetuning=tuple(task | {rest: value} for task in space.finetuning))
    if prefix == "first":
        require(bool(space.first), f"--set {text}: the space has no [first]")
        return dataclasses.replace(space, first=dotted(space.first) | {rest: value})
    return dataclasses.replace(space, fixed=dotted(space.fixed) | {name.replace("-", "_"): value})


def check_space(space: Space, source: str) -> None:
    """InputError unless every trial of the space can run."""
    require(space.metric != "", f"{source}: metric is missing: expected the name of a score, such as mlm_loss")
    require(bool(space.settings), f"{source}: [settings] is missing: expected a table of what the study varies")
    require(all(0 < share < 1 for share in space.prune_at), f"{source}: prune_at must be shares between 0 and 1")
    is_pretraining = space.script == "Pretraining.py"
    require(is_pretraining or not (space.tokens or space.prune_at or space.finetuning or space.first),
            f"{source}: tokens, prune_at, finetuning and first need script = \"Pretraining.py\"")
    known = flat(settings_class(space.script)()) if is_pretraining else fields_of(space.script)
    check_names(dotted(space.fixed), known, f"{source} [fixed]")
    check_names(dotted(space.first), known, f"{source} [first]")
    require(not space.first or "steps" in space.first, f"{source} [first]: steps is missing")
    for name in dotted(space.first):
        require(name not in SAME_AT_FIRST and not name.startswith("model."),
                f"{source} [first]: {name} can't differ from the trial's: set it in [fixed] or leave it out")
    factors = space.factors
    for name, factor in factors.items():
        if isinstance(factor, Range):
            require(space.sampler in ("random", "tpe"), f"{source}: {name} is a range, which the samplers random and tpe "
                    f"can draw from; {space.sampler} needs a list of values")
            check_names({name: 0}, known, f"{source} [settings]")
            bounds = [factor.low, factor.high]
        else:
            bounds = [level.label for level in factor]
            for level in factor:
                check_names(level.settings, known, f"{source} [settings]")
        for label in bounds:
            check_trial(space, {name: label}, source)
    for pair in map(dotted, space.pairs):
        require(space.sampler == "one-factor", f"{source}: pairs needs sampler = \"one-factor\"")
        check_pair(pair, factors, f"{source}, pairs")
    for task in space.finetuning:
        check_names(task, fields_of("Finetuning.py"), f"{source} [[finetuning]]", {"output", "weights", "seed"})
        with naming(f"{source} [[finetuning]]"):
            resolve("Finetuning.py", task)
    for assignment in space.assignments():
        check_trial(space, assignment.levels, source)


def check_pair(pair: dict[str, Any], factors: dict[str, list[Level]], source: str) -> None:
    """InputError unless the pair has lists of values of two factors."""
    require(len(pair) == 2 and pair.keys() <= factors.keys(),
            f"{source}: {', '.join(pair)}: expected two of {', '.join(factors)}")
    for name, labels in pair.items():
        known = [level.label for level in factors[name]]
        require(isinstance(labels, list) and all(label in known for label in labels),
                f"{source}: {name} = {labels}: expected a list of values that it has in [settings], {known}")


def check_trial(space: Space, levels: dict[str, Any], source: str) -> None:
    """InputError that names the trial unless its settings are within their bounds and fit together."""
    trial = ", ".join(f"{name} = {label}" for name, label in levels.items()) or "the base"
    with naming(f"{source}, {trial}"):
        settings = space.resolve(levels)
        if space.script == "Pretraining.py":
            importlib.import_module("Pretraining").check(settings)
    if space.first:
        with naming(f"{source} [first], {trial}"):
            importlib.import_module("Pretraining").check(space.resolve_first(levels))


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Puts where the settings are from before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def check_names(values: dict[str, Any], known: dict[str, Any], source: str, refused: set[str] = SET_BY_SEARCH) -> None:
    """InputError for a setting that the script doesn't have or that the search sets itself."""
    for name in values:
        require(name not in refused, f"{source}: {name} is set by the search: leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(f"{source}: unknown setting {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))


# Settings of the scripts

def settings_class(script: str) -> type:
    """The script's dataclass of settings, which has the name of the script."""
    module = importlib.import_module(Path(script).stem)  # here, for a study imports only the script that it runs
    return getattr(module, Path(script).stem)


def fields_of(script: str) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(settings_class(script))}


def resolve(script: str, values: dict[str, Any]) -> Any:
    """The script's settings object from its defaults or the TOML file `config`, then `values` by their names with a dot."""
    script_class = settings_class(script)
    table = {}
    if script == "Pretraining.py":
        path = config_file(values.get("config", "configs/quickstart.toml"))
        table = read_toml(path, f"config = {str(path)!r}")
    hints = typing.get_type_hints(script_class)
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        is_list = typing.get_origin(hints.get(name)) is tuple
        target = table.setdefault(section, {}) if section else table
        target[key] = [value] if is_list and isinstance(value, str) else value  # one text stands for a list of it
    require("task" in values or script == "Pretraining.py", "task is missing")
    settings = from_table(script_class, table, "settings")
    check_bounds(settings)
    return settings


def config_file(name: str) -> Path:
    """The file that `config` names: in the working folder or, as configs/quickstart.toml, beside the scripts."""
    return ROOT / name if (ROOT / name).exists() and not Path(name).exists() else Path(name)


def planned_steps(settings: Any) -> int | None:
    """The number of steps of a pretraining run; None for other scripts."""
    if getattr(settings, "flops", 0):
        return max(1, round(settings.flops / step_flops(settings)))
    return getattr(settings, "steps", None)


def step_flops(settings: Any) -> float | None:
    """FLOPs of a step of pretraining; None for other scripts."""
    module = importlib.import_module(type(settings).__module__)
    return module.step_flops(settings, settings.model) if hasattr(module, "step_flops") else None


def to_flags(values: dict[str, Any]) -> list[str]:
    """The command-line flags of settings by their names with a dot."""
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            section, dot, key = flag.rpartition(".")
            flags.append(f"--{section}{dot}{key if value else f'no-{key}'}")
        elif isinstance(value, list | tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


# Factors

def dotted(table: dict[str, Any], stop: str | None = None) -> dict[str, Any]:
    """The values of nested tables by names with a dot; a table with the key `stop` is a value."""
    values = {}
    for name, value in table.items():
        if isinstance(value, dict) and stop not in value:
            values |= {f"{name}.{key}": nested for key, nested in dotted(value, stop).items()}
        else:
            values[name] = value
    return values


def read_factor(name: str, value: Any, source: str) -> list[Level] | Range:
    """A factor from its value in the space's file."""
    if isinstance(value, dict):
        factor = from_table(Range, value, f"{source} [settings.{name}]")
        require(factor.low < factor.high and (factor.low > 0 or not factor.log),
                f"{source}: {name} = {value}: expected low < high, and low > 0 if log")
        return factor
    require(isinstance(value, list) and len(value) > 0,
            f"{source}: {name} = {value!r}: expected a list of values or a table with low and high")
    require(not any(isinstance(level, list) for level in value),
            f"{source}: {name} has a list among its values: write a table, with a name and the setting, in its place")
    levels = list(read_levels(name, value))
    labels = [json.dumps(level.label) for level in levels]
    require(len(set(labels)) == len(labels), f"{source}: {name} has a value twice")
    return levels


def read_levels(name: str, values: list[Any]) -> Iterator[Level]:
    for value in values:
        if isinstance(value, dict):
            settings = dotted({key: setting for key, setting in value.items() if key != "name"})
            yield Level(value.get("name", ", ".join(f"{key}={setting}" for key, setting in settings.items())), settings)
        else:
            yield Level(value, {name: value})


def level_settings(factor: list[Level] | Range, name: str, label: Any) -> dict[str, Any]:
    """The settings that a label of a factor stands for."""
    if isinstance(factor, Range):
        return {name: label}
    return next(level.settings for level in factor if level.label == label)
