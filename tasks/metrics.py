"""Metrics of fine-tuning tasks by name: true and predicted labels (N,) in, one number out."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def correlation(measure: Callable[..., Any], labels: np.ndarray, predictions: np.ndarray) -> float:
    """scipy's `measure` of real labels; 0 where all predictions are equal, for which it is not defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        value = float(measure(labels, predictions).statistic)
    return 0.0 if math.isnan(value) else value


# Classes are given by their numbers; F1 is that of class 1.
METRICS = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": partial(correlation, scipy.stats.pearsonr),
    "spearman": partial(correlation, scipy.stats.spearmanr),
}
