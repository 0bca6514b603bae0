"""The results of a study in (results.jsonl); tables with standard errors in report.md and plots as PNG files out.

    python -m studies.report runs/search                          # writes runs/search/report.md
    python -m studies.report studies/results/quickstart.jsonl     # writes studies/results/quickstart/report.md

A standard error is of a mean over seeds. Two or three seeds say little about their own spread, so that each mean gets the
larger of its own spread and the spread of the study, which is a median over all combinations of settings.
"""

import itertools
import json
import logging
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import scipy.stats
import tyro

from tasks.results import markdown_table
from utils import InputError, read_settings, replacing, reports_input_errors, require, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution

BEST_SHOWN = 10  # rows of the table of best settings
FAILURES_SHOWN = 10
MOST_LEVELS = 8  # of a factor that are shown one by one
BINS = 4  # into which the values of a range are cut
PAIRS_SHOWN = 3  # of the most important settings, unless a one-factor design names its pairs
COLUMNS = 4  # of panels in a figure
TRADE_OFF = "trade-off.png"
LONG_TICK = 8  # letters of a tick's label beyond which labels are turned
LINE_KEYS = {"trial", "study", "state", "levels", "seed", "settings", "scores", "seconds", "metrics", "direction"}


@dataclass(frozen=True)
class Report:
    """Writes tables and plots of a study's results."""

    study: Annotated[str, tyro.conf.Positional]
    """Folder of a search, or a file of results such as studies/results/quickstart.jsonl."""
    output: str | None = None
    """Folder for report.md and the plots. None: that of the search; of a file NAME.jsonl, the folder NAME beside it."""
    metrics: tuple[str, ...] = ()
    """Scores to show; the first decides what is best, if it isn't the study's own: a loss the lowest, others the highest.
    Without any: those that the space names."""


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(Report, argv)
    path = Path(settings.study)
    is_file = path.suffix == ".jsonl"
    output = Path(settings.output or (path.with_suffix("") if is_file else path))
    study = Study(read_results(path if is_file else path / "results.jsonl"), settings.metrics)
    output.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(study, output)
    write_text(output / "report.md", report_text(study, figures))
    print(output / "report.md")
    return 0


# Results

class Combination(NamedTuple):
    """The trials of one combination of settings, which differ in their seeds."""

    levels: dict[str, Any]  # the label of each factor that it sets
    settings: dict[str, Any]
    scores: dict[str, np.ndarray]  # (N,) by metric


class Estimate(NamedTuple):
    """A mean over so many trials and its standard error, NaN where nothing says what the spread is."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return with_error(self.mean, self.error)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl; InputError for a line that isn't the result of a trial."""
    require(path.is_file(), f"{path} is missing: expected the folder of a search, or its results as a .jsonl file")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            raise InputError(f"{path}, line {number} can't be read as JSON") from None
        is_result = isinstance(line, dict) and line.keys() >= LINE_KEYS
        require(is_result, f"{path}, line {number} is no result of a trial: expected {', '.join(sorted(LINE_KEYS))}")
        lines.append(line)
    require(any(line["state"] == "complete" for line in lines), f"{path} has no complete trial yet: run the search")
    return lines


class Study:
    """Results grouped by the combination of settings, and the spread between seeds."""

    def __init__(self, lines: list[dict[str, Any]], metrics: tuple[str, ...] = ()):
        self.lines = lines
        self.complete = [line for line in lines if line["state"] == "complete"]
        self.name = lines[-1]["study"]
        names = list(dict.fromkeys(name for line in self.complete for name in line["scores"]))
        self.metrics = list(metrics or lines[-1]["metrics"])
        self.direction = lines[-1]["direction"]
        if self.metric != lines[-1]["metrics"][0]:
            self.direction = "minimize" if self.metric.endswith("loss") else "maximize"
        for metric in self.metrics:
            require(metric in names, f"no trial has the score {metric}: the scores are {', '.join(names)}")
        self.combinations = self.grouped()
        self.spreads = {metric: self.spread(metric) for metric in self.metrics}
        bases = [combination for combination in self.combinations if not combination.levels]
        self.base = bases[0] if bases else None  # of a one-factor design
        self.factors = list(dict.fromkeys(name for combination in self.combinations for name in combination.levels))
        is_grid = all(combination.levels.keys() == set(self.factors) for combination in self.combinations)
        require(self.base is not None or is_grid, "the base, with which each trial is compared, has no complete trial yet: "
                "run the search, with --retry-failed if the base failed")
        self.bins = {} if self.base else {
            factor: bin_names([combination.levels[factor] for combination in self.combinations]) for factor in self.factors}

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def grouped(self) -> list[Combination]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in self.complete:
            groups.setdefault(json.dumps(line["levels"], sort_keys=True), []).append(line)
        return [Combination(lines[0]["levels"], lines[-1]["settings"],
                            {metric: np.array([line["scores"][metric] for line in lines if metric in line["scores"]])
                             for metric in self.metrics}) for lines in groups.values()]

    def spread(self, metric: str) -> float:
        """Standard deviation of a score between seeds of one combination; NaN if each combination has one seed.

        It is the root of the median of the combinations' variances, so that a few diverged runs don't count. Each is first
        divided by median(chi-square_f) / f, by which the median of a variance with f degrees of freedom is too low.
        """
        values = [combination.scores[metric] for combination in self.combinations]
        variances = [scores.var(ddof=1) / (scipy.stats.chi2.median(len(scores) - 1) / (len(scores) - 1))
                     for scores in values if len(scores) > 1]
        return math.sqrt(statistics.median(variances)) if variances else math.nan

    def degrees_of_freedom(self, metric: str) -> int:
        return sum(max(0, len(combination.scores[metric]) - 1) for combination in self.combinations)

    def estimate(self, scores: np.ndarray, metric: str) -> Estimate:
        """The mean of scores (N,) with its standard error."""
        own = float(scores.std(ddof=1)) if len(scores) > 1 else math.nan
        spread = np.nanmax([own, self.spreads[metric]]) if len(scores) > 1 else self.spreads[metric]
        return Estimate(float(scores.mean()), float(spread / math.sqrt(len(scores))), len(scores))

    def ranked(self) -> list[Combination]:
        """The combinations that have the study's metric, best mean first."""
        scored = [combination for combination in self.combinations if len(combination.scores[self.metric])]
        return sorted(scored, key=lambda each: each.scores[self.metric].mean(), reverse=self.direction == "maximize")

    def level(self, combination: Combination, factor: str) -> Any:
        """The level of a factor in a combination; in the base the value of the setting, or "base" for several settings."""
        label = combination.levels.get(factor, combination.settings.get(factor, "base"))
        return self.bins.get(factor, {}).get(label, label)


def bin_names(labels: list[Any]) -> dict[Any, str]:
    """The quarter in which each number drawn from a range lies; nothing for few or other labels, which are shown as such."""
    if len(set(labels)) <= MOST_LEVELS or not all(isinstance(label, int | float) for label in labels):
        return {}
    names = {}
    for part in np.array_split(np.array(sorted(labels)), BINS):
        names |= dict.fromkeys(part.tolist(), f"{part[0]:.3g} to {part[-1]:.3g}")
    return names


def sort_key(label: Any) -> tuple[bool, float, str]:
    """Numbers by size, bins by their first number, then text."""
    try:
        return False, float(str(label).split()[0]), ""
    except ValueError:
        return True, 0.0, str(label)


# Effects

def effect(study: Study, factor: str, metric: str) -> dict[Any, Estimate]:
    """The estimate for each level of a factor, in their order.

    In a one-factor design everything else is the base's. Else it varies; if all levels were combined with the same other
    settings, what these add is taken out, so that the error is that between seeds.
    """
    groups: dict[Any, list[Combination]] = {}
    for combination in study.combinations:
        if len(combination.scores[metric]) and (not study.base or combination.levels.keys() <= {factor}):
            groups.setdefault(study.level(combination, factor), []).append(combination)
    offsets = block_offsets(groups, factor, metric)
    estimates = {}
    for label in sorted(groups, key=sort_key):
        scores = [each.scores[metric] - offsets.get(other_levels(each, factor), 0.0) for each in groups[label]]
        estimates[label] = study.estimate(np.concatenate(scores), metric)
    return estimates


def other_levels(combination: Combination, factor: str) -> str:
    return json.dumps({name: label for name, label in combination.levels.items() if name != factor}, sort_keys=True)


def block_offsets(groups: dict[Any, list[Combination]], factor: str, metric: str) -> dict[str, float]:
    """What each combination of the other settings adds to the mean, if every level of the factor has all of them."""
    blocks: dict[str, list[float]] = {}
    for combination in itertools.chain(*groups.values()):
        blocks.setdefault(other_levels(combination, factor), []).append(float(combination.scores[metric].mean()))
    if any(len(means) != len(groups) for means in blocks.values()):
        return {}
    middle = statistics.mean(itertools.chain(*blocks.values()))
    return {block: statistics.mean(means) - middle for block, means in blocks.items()}


def importances(study: Study) -> dict[str, Estimate]:
    """How much each factor matters, the most important first.

    In a one-factor design the distance between its best and its worst mean. Else its share of the variance, which functional
    ANOVA takes from a random forest (Hutter et al., ICML 2014), without an error.
    """
    if not study.base:
        return variance_shares(study)
    distances = {}
    for factor in study.factors:
        estimates = sorted(effect(study, factor, study.metric).values())
        if len(estimates) < 2:
            continue
        low, high = estimates[0], estimates[-1]
        distances[factor] = Estimate(high.mean - low.mean, math.hypot(high.error, low.error), low.count + high.count)
    return dict(sorted(distances.items(), key=lambda item: -item[1].mean))


def variance_shares(study: Study) -> dict[str, Estimate]:
    import optuna  # imported where it is used: a one-factor study does without
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    imitation = optuna.create_study(direction=study.direction)
    labels = {factor: [each.levels[factor] for each in study.combinations] for factor in study.factors}
    distributions = {factor: distribution(values) for factor, values in labels.items() if len(set(values)) > 1}
    for combination in study.combinations:
        params = {factor: combination.levels[factor] for factor in distributions}
        for score in combination.scores[study.metric].tolist():
            imitation.add_trial(optuna.create_trial(params=params, distributions=distributions, value=score))
    if not distributions or len(imitation.trials) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(imitation, evaluator=evaluator)
    return {factor: Estimate(share, math.nan, len(imitation.trials)) for factor, share in shares.items()}


def distribution(values: list[Any]) -> "BaseDistribution":
    """What a factor's values could have been drawn from: few values are a choice, many numbers a range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    if bin_names(values):
        is_log = min(values) > 0 and max(values) / min(values) >= 10
        return FloatDistribution(min(values), max(values), log=is_log)
    return CategoricalDistribution(list(dict.fromkeys(values)))


# Interactions

class Interaction(NamedTuple):
    """Two factors: the mean in each cell, what adding their effects doesn't explain, and how probable that is by chance."""

    rows: list[Any]
    columns: list[Any]
    cells: dict[tuple[Any, Any], Estimate]
    residuals: dict[tuple[Any, Any], float]
    p_value: float  # NaN unless every cell has trials and the spread between seeds is known


def combined_pairs(study: Study) -> list[tuple[str, str]]:
    """The pairs of factors that a one-factor design combined, or those of the most important factors.

    Without those of which no level was combined with two levels of the other factor, as after a few random trials.
    """
    if study.base:
        pairs = [tuple(sorted(each.levels, key=study.factors.index)) for each in study.combinations if len(each.levels) == 2]
        pairs = list(dict.fromkeys(pairs))
    else:
        pairs = list(itertools.combinations(importances(study), 2))[:PAIRS_SHOWN]
    return [pair for pair in pairs if interaction(study, *pair).cells]


def interaction(study: Study, first: str, second: str) -> Interaction:
    """The means for each pair of levels; other factors are the base's in a one-factor design, else they vary."""
    scores: dict[tuple[Any, Any], list[np.ndarray]] = {}
    for combination in study.combinations:
        if len(combination.scores[study.metric]) and (not study.base or combination.levels.keys() <= {first, second}):
            labels = study.level(combination, first), study.level(combination, second)
            scores.setdefault(labels, []).append(combination.scores[study.metric])
    # A level that a one-factor design has not combined with the other factor would be a row or column of holes.
    scores = {labels: arrays for labels, arrays in scores.items()
              if sum(row == labels[0] for row, _ in scores) > 1 and sum(column == labels[1] for _, column in scores) > 1}
    cells = {labels: study.estimate(np.concatenate(arrays), study.metric) for labels, arrays in scores.items()}
    rows, columns = (sorted({labels[axis] for labels in cells}, key=sort_key) for axis in (0, 1))
    if not cells or len(cells) < len(rows) * len(columns):
        return Interaction(rows, columns, cells, {}, math.nan)
    means = np.array([[cells[row, column].mean for column in columns] for row in rows])
    residuals = means - means.mean(1, keepdims=True) - means.mean(0, keepdims=True) + means.mean()
    # F test of the interaction in a two-way layout, with the spread between seeds as the error.
    freedom = (len(rows) - 1) * (len(columns) - 1)
    count = statistics.harmonic_mean([cell.count for cell in cells.values()])
    statistic = count * (residuals**2).sum() / max(1, freedom) / study.spreads[study.metric]**2
    p_value = float(scipy.stats.f.sf(statistic, freedom, study.degrees_of_freedom(study.metric))) if freedom else math.nan
    named = {(row, column): float(residuals[i, j]) for i, row in enumerate(rows) for j, column in enumerate(columns)}
    return Interaction(rows, columns, cells, named, p_value)


# Text

def report_text(study: Study, figures: list[str]) -> str:
    """report.md: the numbers of trials, the best settings, effects, importance, interactions and failures."""
    sections = [head_text(study), best_text(study)]
    if study.factors:
        sections += [f"## Effect of each setting\n\n{effect_note(study)}", *pictures(figures, "effects-")]
        sections += pictures(figures, TRADE_OFF)
        sections += [effect_text(study, factor) for factor in study.factors]
        sections += [importance_text(study, importances(study)), *pictures(figures, "importance")]
    pairs = combined_pairs(study)
    if pairs:
        sections.append("## Interaction of two settings")
    for first, second in pairs:
        sections += [interaction_text(study, first, second), *pictures(figures, interaction_file(first, second))]
    sections.append(failures_text(study))
    return "\n\n".join(section for section in sections if section) + "\n"


def pictures(figures: list[str], beginning: str) -> list[str]:
    return [f"![{name}]({name})" for name in figures if name.startswith(beginning)]


def head_text(study: Study) -> str:
    states = [line["state"] for line in study.lines]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    hours = sum(line["seconds"] for line in study.lines) / 3600
    flops = sum(line.get("flops", 0) for line in study.lines)
    cost = f"{hours:.1f} hours" + (f", {flops:.2g} FLOPs" if flops else "")
    spreads = "; ".join(f"{metric} {spread:.3g}" for metric, spread in study.spreads.items() if math.isfinite(spread))
    freedom = study.degrees_of_freedom(study.metric)
    noise = (f"Standard deviation of one trial between seeds, over all settings: {spreads} ({freedom} degrees of freedom)."
             if spreads else "Each combination has one seed, so the spread between seeds is not known.")
    return (f"# Study {study.name}\n\n{len(study.lines)} trials ({counts}) of {len(study.combinations)} combinations of "
            f"settings; {cost}. Metric: {study.metric}, to {study.direction}.\n\n{noise}")


def best_text(study: Study) -> str:
    """The best combinations, the number of trials beside the best score, and how good the luckiest of equals would be."""
    ranked = study.ranked()
    rows = [[levels_text(each.levels), str(len(each.scores[study.metric])),
             *(str(study.estimate(each.scores[metric], metric)) if len(each.scores[metric]) else "-"
               for metric in study.metrics)] for each in ranked[:BEST_SHOWN]]
    best, count = ranked[0], len(ranked)
    estimate = study.estimate(best.scores[study.metric], study.metric)
    trials = sum(len(each.scores[study.metric]) for each in ranked)
    # Expected maximum of so many standard normals (Blom, 1958).
    luck = scipy.stats.norm.ppf((count - 0.375) / (count + 0.25)) * estimate.error
    note = (f" If all {count} were equally good, the luckiest mean would still be some {luck:.2g} better than the average."
            if math.isfinite(luck) and count > 1 else "")
    best_settings = markdown_table(["settings", "seeds", *study.metrics], rows)
    return (f"## Best settings\n\nThe best {study.metric}, {estimate}, is that of {levels_text(best.levels)}, chosen from "
            f"{count} combinations in {trials} trials.{note}\n\n{best_settings}")


def effect_note(study: Study) -> str:
    if study.base:
        return ("Each setting is changed alone; everything else is the base's. The last column is the difference of "
                f"{study.metric} from the base.")
    return "Means over all trials with the value; the other settings vary."


def effect_text(study: Study, factor: str) -> str:
    """A table of the factor's levels with the estimates of all metrics and the difference from the base."""
    effects = {metric: effect(study, factor, metric) for metric in study.metrics}
    base_label = study.level(study.base, factor) if study.base else None
    rows = []
    for label, estimate in effects[study.metric].items():
        values = [str(effects[metric].get(label, "-")) for metric in study.metrics]
        row = [f"{shown(label)}{' (base)' if study.base and label == base_label else ''}", str(estimate.count), *values]
        if study.base:
            base = effects[study.metric].get(base_label)
            row.append(str(difference(estimate, base)) if base and label != base_label else "")
        rows.append(row)
    header = [factor, "trials", *study.metrics, *(["difference"] if study.base else [])]
    return f"### {factor}\n\n{markdown_table(header, rows)}"


def difference(a: Estimate, b: Estimate) -> Estimate:
    return Estimate(a.mean - b.mean, math.hypot(a.error, b.error), a.count + b.count)


def importance_text(study: Study, values: dict[str, Estimate]) -> str:
    if not values:
        return ""
    if study.base:
        rows = [[factor, str(value), f"{value.mean / value.error:.1f}" if value.error > 0 else "-"]
                for factor, value in values.items()]
        header = ["setting", "best minus worst mean", "in standard errors"]
        note = "By chance alone, the best and the worst of several values differ by one to one and a half standard errors."
    else:
        rows = [[factor, f"{value.mean:.2f}"] for factor, value in values.items()]
        header, note = ["setting", "share of the variance"], "By functional ANOVA of a random forest."
    return f"## Importance for {study.metric}\n\n{note}\n\n{markdown_table(header, rows)}"


def interaction_text(study: Study, first: str, second: str) -> str:
    """A table of the means of each pair of levels, and how far they are from the sum of two effects."""
    result = interaction(study, first, second)
    rows = [[shown(row), *(str(result.cells.get((row, column), "-")) for column in result.columns)] for row in result.rows]
    note = "Some pairs have no trial."
    if result.residuals:
        largest = max(result.residuals, key=lambda labels: abs(result.residuals[labels]))
        chance = f"; by chance alone so much with probability {result.p_value:.2g}" if result.p_value >= 0 else ""
        note = (f"The sum of the two effects is off by at most {abs(result.residuals[largest]):.2g}, at {shown(largest[0])} "
                f"and {shown(largest[1])}{chance}.")
    columns = [f"{second} = {shown(column)}" for column in result.columns]
    return f"### {first} and {second}\n\n{markdown_table([first, *columns], rows)}\n\n{note}"


def failures_text(study: Study) -> str:
    failed = [line for line in study.lines if line["state"] == "failed"]
    rows = [[str(line["trial"]), levels_text(line["levels"]), str(line["seed"]), line.get("error", "").replace("|", "/")]
            for line in failed[:FAILURES_SHOWN]]
    return f"## Failed trials\n\n{markdown_table(['trial', 'settings', 'seed', 'error'], rows)}" if failed else ""


def levels_text(levels: dict[str, Any]) -> str:
    return ", ".join(f"{name} {shown(label)}" for name, label in levels.items()) or "the base"


def shown(label: Any) -> str:
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def with_error(mean: float, error: float) -> str:
    """A mean with its standard error, of which two digits are shown."""
    if not math.isfinite(error) or error <= 0:
        return f"{mean:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


# Plots

def draw_figures(study: Study, output: Path) -> list[str]:
    """Writes the plots into the folder; returns their names."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would report on its font cache
    names = []
    if study.factors:
        for metric in study.metrics:
            names.append(f"effects-{metric}.png")
            draw_effects(study, metric, output / names[-1])
    if study.base and len(study.metrics) > 1:
        names.append(TRADE_OFF)
        draw_trade_off(study, output / names[-1])
    values = importances(study)
    if values:
        names.append("importance.png")
        draw_importances(study, values, output / names[-1])
    for first, second in combined_pairs(study):
        names.append(interaction_file(first, second))
        draw_interaction(study, interaction(study, first, second), (first, second), output / names[-1])
    return names


def interaction_file(first: str, second: str) -> str:
    return f"interaction-{first}-{second}.png".replace(" ", "_").replace("/", "_")


def draw_effects(study: Study, metric: str, path: Path) -> None:
    """A panel for each factor: the mean of each level with its standard error; the band is the base's."""
    from matplotlib.figure import Figure  # imported where it is used: it takes a second
    rows = math.ceil(len(study.factors) / COLUMNS)
    columns = min(COLUMNS, len(study.factors))
    figure = Figure((2.8 * columns, 2.0 * rows), dpi=72, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(study.factors):]:
        axes.set_axis_off()
    for axes, factor in zip(grid.flat, study.factors, strict=False):
        estimates = effect(study, factor, metric)
        positions = positions_of(list(estimates), axes)
        are_ordered = all(not is_text for is_text, *_ in map(sort_key, estimates))
        draw_estimates(axes, positions, list(estimates.values()), "-" if are_ordered else "none")
        if study.base and len(study.base.scores[metric]):
            base = study.estimate(study.base.scores[metric], metric)
            axes.axhspan(base.mean - base.error, base.mean + base.error, color="C1", alpha=0.3, linewidth=0)
        axes.set_title(factor, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.supylabel(metric)
    save_figure(figure, path)


def draw_estimates(axes: "Axes", positions: list[float], estimates: list[Estimate], line: str = "-",
                   label: str | None = None) -> None:
    """Means at their positions with their standard errors, as far as these are known."""
    errors = [np.nan_to_num(estimate.error) for estimate in estimates]
    means = [estimate.mean for estimate in estimates]
    axes.errorbar(positions, means, errors, marker="o", markersize=4, capsize=3, linestyle=line, label=label)


def positions_of(labels: list[Any], axes: "Axes") -> list[float]:
    """Where labels stand on the horizontal axis: numbers in logarithmic distances, everything else side by side."""
    are_numbers = all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels)
    if are_numbers and min(labels) > 0 and max(labels) / min(labels) >= 4:
        positions = [math.log2(label) for label in labels]
    else:
        positions = [float(number) for number in range(len(labels))]
    texts = [shown(label) for label in labels]
    is_long = max(map(len, texts), default=0) > LONG_TICK
    axes.set_xticks(positions, texts, fontsize="small", rotation=20 if is_long else 0, ha="right" if is_long else "center")
    return positions


def draw_trade_off(study: Study, path: Path) -> None:
    """The first two metrics of the base and of each change of one factor: what wins the one may lose the other."""
    from matplotlib.figure import Figure
    figure = Figure((9.6, 6.4), dpi=72, layout="constrained")
    axes = figure.subplots()
    first, second = study.metrics[:2]
    combinations = [each for each in study.combinations
                    if len(each.levels) < 2 and len(each.scores[first]) and len(each.scores[second])]
    for number, combination in enumerate(combinations):
        y, x = (study.estimate(combination.scores[metric], metric) for metric in (first, second))
        axes.errorbar(x.mean, y.mean, np.nan_to_num(y.error), np.nan_to_num(x.error), marker="o", markersize=4,
                      elinewidth=0.6, color="C0" if combination.levels else "C1")
        above_or_below = 4 if number % 2 else -11  # names of neighbours overlap less
        axes.annotate(levels_text(combination.levels), (x.mean, y.mean), (4, above_or_below),
                      textcoords="offset points", fontsize="small")
    axes.set(xlabel=second, ylabel=first)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_importances(study: Study, values: dict[str, Estimate], path: Path) -> None:
    from matplotlib.figure import Figure
    figure = Figure((6.4, 0.8 + 0.3 * len(values)), dpi=72, layout="constrained")
    axes = figure.subplots()
    means = [value.mean for value in values.values()]
    axes.barh(list(values), means, xerr=[np.nan_to_num(value.error) for value in values.values()], capsize=3, alpha=0.7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{study.metric}: best minus worst mean" if study.base else f"share of the variance of {study.metric}")
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def draw_interaction(study: Study, result: Interaction, names: tuple[str, str], path: Path) -> None:
    """A line for each level of the second factor: parallel lines mean that the factors don't interact."""
    from matplotlib.figure import Figure
    figure = Figure((5.6, 3.6), dpi=72, layout="constrained")
    axes = figure.subplots()
    positions = dict(zip(result.rows, positions_of(result.rows, axes), strict=True))
    for column in result.columns:
        rows = [row for row in result.rows if (row, column) in result.cells]
        cells = [result.cells[row, column] for row in rows]
        draw_estimates(axes, [positions[row] for row in rows], cells, label=shown(column))
    axes.set(xlabel=names[0], ylabel=study.metric)
    axes.legend(title=names[1], fontsize="small")
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


if __name__ == "__main__":
    sys.exit(main())
