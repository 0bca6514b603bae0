"""studies/tracking.py: curves, the metrics of a detector, and warnings of a run that does not learn."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from studies.tracking import auc_error, detection_metrics, draw_curves, learning_warnings, main

RECORDS = [{"step": 0, "heldout": True, "mlm_loss": 9.0, "disc_auc": 0.5},
           {"step": 30_000, "heldout": False, "mlm_loss": 5.0, "learning_rate": 1e-3},
           {"step": 60_000, "heldout": False, "mlm_loss": 4.0, "learning_rate": 5e-4},
           {"step": 60_000, "heldout": True, "mlm_loss": 4.5, "disc_auc": 0.87}]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, savefig = [], Figure.savefig

    def spy(figure, *given, **options):
        saved.append(figure)
        return savefig(figure, *given, **options)
    monkeypatch.setattr(Figure, "savefig", spy)
    monkeypatch.setattr("studies.tracking.draw_curves", draw_curves)  # which conftest.py takes out of other tests
    return saved


def drawn(figure):
    """Every curve of a figure by its label, and the texts below it."""
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    points = {line.get_label(): list(zip(*map(list, line.get_data()), strict=True)) for line in lines}
    return points, " ".join(text.get_text() for text in figure.texts)


def test_curves_show_every_metric_of_the_run(run, figures):
    draw_curves(run, published=False)
    points, caption = drawn(figures[0])
    assert points == {"mlm_loss, training": [(30_000, 5.0), (60_000, 4.0)], "mlm_loss, held out": [(60_000, 4.5)],
                      "disc_auc, held out": [(60_000, 0.87)],
                      "learning_rate, training": [(30_000, 1e-3), (60_000, 5e-4)]}
    assert "OpenWebText" not in caption
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_published_points_are_shown_up_to_the_step_reached(run, figures):
    assert main([str(run), "--published"]) == 0
    points, caption = drawn(figures[0])
    assert {label: curve for label, curve in points.items() if "published" in label} == {
        "disc_auc, published": [(50_000, 0.875)], "mlm_loss, published": [(10_000, 5.1), (50_000, 3.65)],
        "disc_loss, published": [(10_000, 0.248), (50_000, 0.221)]}
    assert "OpenWebText" in caption


def test_a_folder_without_metrics_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


# Metrics


def test_detection_metrics_by_hand():
    labels, scores = np.array([1, 1, 0, 0, 0], dtype=bool), np.array([2.0, -1.0, 1.0, -2.0, -3.0])
    detection = detection_metrics(labels, scores)
    assert (detection.accuracy, detection.precision, detection.recall) == pytest.approx((3 / 5, 1 / 2, 1 / 2))
    assert detection.auc == pytest.approx(5 / 6)  # of six pairs, one in the wrong order
    assert np.isnan(detection_metrics(np.zeros(3, dtype=bool), scores[:3]).auc)


def test_auc_error_is_the_spread_of_aucs():
    rng = np.random.default_rng(0)
    labels = np.arange(600) < 100
    aucs = [detection_metrics(labels, rng.normal(size=600) + 0.5 * labels).auc for _ in range(400)]
    assert auc_error(float(np.mean(aucs)), labels) == pytest.approx(np.std(aucs), rel=0.15)


def test_a_run_that_does_not_learn_is_warned_of():
    stale = [{"disc_auc": 0.505, "disc_auc_error": 0.01, "mlm_loss": 6.0}] * 6
    assert len(list(learning_warnings(stale, 5.8))) == 2
    assert not list(learning_warnings(stale[:5], 5.8))  # too early to tell
    learning = [{"disc_auc": 0.6 + n / 50, "disc_auc_error": 0.01, "mlm_loss": 6 - n / 5} for n in range(6)]
    assert not list(learning_warnings(learning, 5.8))
    assert not list(learning_warnings([line | {"mlm_loss": 4.0} for line in learning], 5.8))  # a good generator at its end
