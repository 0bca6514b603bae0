"""studies/: the curves of a run show its metrics and, for the paper's settings, the published points."""

import json

import pytest
from matplotlib.figure import Figure

from studies.tracking import draw_curves, main

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
