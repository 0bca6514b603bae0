"""Metrics of fine-tuning tasks by name: true and predicted labels in, one number out."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
import seqeval.metrics
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from tasks.data import Row, by_sentence, true_labels
from tasks.task import SPAN_METRICS, Task


def correlation(measure: Callable[..., Any], labels: np.ndarray, predictions: np.ndarray) -> float:
    """scipy's `measure` of real labels; 0 where it is not defined, with one row or all labels or predictions equal."""
    if len(labels) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        value = float(measure(labels, predictions).statistic)
    return 0.0 if math.isnan(value) else value


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """The mean F1 of the classes that occur in `labels`."""
    return float(f1_score(labels, predictions, labels=np.unique(labels), average="macro", zero_division=0.0))


# Of classes by their numbers or of real labels, both (N,); F1 is that of class 1.
METRICS = {
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0.0),
    "macro_f1": macro_f1,
    "matthews": matthews_corrcoef,
    "pearson": partial(correlation, scipy.stats.pearsonr),
    "spearman": partial(correlation, scipy.stats.spearmanr),
}
# Of lists of sentences, each a list of its words' labels, by the rules of CoNLL's script conlleval.
SPANS = {
    "span_f1": partial(seqeval.metrics.f1_score, zero_division=0),
    "span_precision": partial(seqeval.metrics.precision_score, zero_division=0),
    "span_recall": partial(seqeval.metrics.recall_score, zero_division=0),
}


def task_scores(task: Task, rows: Sequence[Row], predictions: np.ndarray) -> dict[str, float]:
    """The task's metrics of `predictions` for all labels of the rows."""
    labels, scores = true_labels(rows), {}
    for name in task.metrics:
        if name in SPAN_METRICS:
            sentences = [by_sentence(rows, task.label_texts(values)) for values in (labels, predictions)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numpy warns of a mean over no spans
                scores[name] = float(SPANS[name](*sentences))
        else:
            scores[name] = float(METRICS[name](labels, predictions))
    return scores
