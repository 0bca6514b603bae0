"""studies/report.py: means, standard errors, effects and interactions compared with calculations by hand."""

import json
import math

import numpy as np
import pytest
import scipy.stats

from studies.report import Study, effect, importances, interaction, main, read_results, with_error
from studies.search import best_text


def line(number, levels, seed, loss, state="complete", settings=None, **scores):
    scores = {"mlm_loss": loss} | scores if state != "failed" else {}
    return {"trial": number, "study": "test", "state": state, "levels": levels, "seed": seed,
            "settings": {"rate": 1, "batch": 32} | (settings or {}) | levels, "scores": scores, "seconds": 3600.0,
            "flops": 1e12, "metrics": ["mlm_loss", "disc_auc"], "direction": "minimize"}


def lines_of(groups):
    """Lines from (levels, losses) with a seed for each loss; the AUC is a tenth of the loss."""
    return [line(number, levels, seed, loss, disc_auc=loss / 10) for number, (levels, seed, loss) in enumerate(
        (levels, seed, loss) for levels, losses in groups for seed, loss in enumerate(losses))]


@pytest.fixture
def one_factor():
    return lines_of([({}, [5.0, 5.2, 4.8]), ({"rate": 2}, [4.0, 4.2]), ({"rate": 3}, [6.0, 6.4]),
                     ({"batch": 64}, [4.9, 5.1]), ({"size": "large"}, [5.0, 5.2]), ({"rate": 2, "batch": 64}, [3.0, 3.2])])


@pytest.fixture
def write(tmp_path):
    def write_lines(lines, name="results.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(each) + "\n" for each in lines))
        return tmp_path / name
    return write_lines


def test_spread_between_seeds_is_estimated_from_all_combinations():
    rng = np.random.default_rng(0)
    groups = [({"rate": number}, rng.normal(number, 0.3, size=2).tolist()) for number in range(400)]
    groups[7] = ({"rate": 7}, [7.0, 700.0])  # one of its seeds diverged
    assert Study(lines_of(groups)).spreads["mlm_loss"] == pytest.approx(0.3, rel=0.15)


def test_standard_errors_by_hand(one_factor):
    study = Study(one_factor)
    # Variances .04 with 2 degrees of freedom and .02, .08, .02, .02, .02 with 1; chi-square's medians are 1.386 and .455.
    variances = [0.04 / (2 * math.log(2) / 2), *(variance / scipy.stats.chi2.median(1) for variance in
                                                 (0.02, 0.08, 0.02, 0.02, 0.02))]
    spread = math.sqrt(np.median(variances))
    assert study.spreads["mlm_loss"] == pytest.approx(spread)
    estimates = effect(study, "rate", "mlm_loss")
    assert list(estimates) == [1, 2, 3]  # the base first, by the value of its setting
    assert [estimate.mean for estimate in estimates.values()] == pytest.approx([5.0, 4.1, 6.2])
    own = math.sqrt(0.08)  # larger than the spread of the study
    assert [estimate.error for estimate in estimates.values()] == pytest.approx(
        [spread / math.sqrt(3), spread / math.sqrt(2), own / math.sqrt(2)])
    assert [estimate.count for estimate in estimates.values()] == [3, 2, 2]


def test_importance_of_a_one_factor_design_is_the_distance_of_best_and_worst(one_factor):
    values = importances(Study(one_factor))
    assert list(values) == ["rate", "size", "batch"]
    assert [value.mean for value in values.values()] == pytest.approx([6.2 - 4.1, 0.1, 0.0])


def test_interaction_is_what_the_sum_of_two_effects_leaves(one_factor):
    result = interaction(Study(one_factor), "rate", "batch")
    assert result.rows == [1, 2] and result.columns == [32, 64]  # rate 3 was not combined with batch
    assert {labels: cell.mean for labels, cell in result.cells.items()} == {
        (1, 32): pytest.approx(5.0), (1, 64): pytest.approx(5.0), (2, 32): pytest.approx(4.1), (2, 64): pytest.approx(3.1)}
    # Of a 2 x 2 table the residuals are a quarter of (a + d - b - c).
    assert result.residuals[1, 32] == pytest.approx((5.0 + 3.1 - 5.0 - 4.1) / 4)
    assert 0 < result.p_value < 0.05


def test_p_values_are_uniform_where_there_is_no_interaction():
    rng, p_values = np.random.default_rng(0), []
    for _ in range(150):
        groups = [({"rate": a, "batch": b}, (a + b + rng.normal(size=3)).tolist()) for a in range(3) for b in range(3)]
        p_values.append(interaction(Study(lines_of(groups)), "rate", "batch").p_value)
    assert scipy.stats.kstest(p_values, "uniform").statistic < 0.25
    assert np.mean(np.array(p_values) < 0.05) < 0.15


def test_effects_in_a_grid_are_free_of_the_other_setting():
    rng = np.random.default_rng(1)
    groups = [({"rate": rate, "batch": batch}, (rate + 10 * batch + 0.01 * rng.normal(size=2)).tolist())
              for rate in (1, 2, 3) for batch in (1, 2)]
    estimates = effect(Study(lines_of(groups)), "rate", "mlm_loss")
    means = [estimate.mean for estimate in estimates.values()]
    assert np.diff(means) == pytest.approx([1, 1], abs=0.03)
    assert all(estimate.error < 0.02 for estimate in estimates.values())  # though the batches differ by 10
    assert list(importances(Study(lines_of(groups)))) == ["batch", "rate"]


def test_values_of_a_range_are_shown_in_quarters():
    rng = np.random.default_rng(2)
    groups = [({"rate": float(rate)}, [float(rate)]) for rate in rng.uniform(size=40)]
    estimates = effect(Study(lines_of(groups)), "rate", "mlm_loss")
    assert [estimate.count for estimate in estimates.values()] == [10] * 4
    means = [estimate.mean for estimate in estimates.values()]
    assert means == sorted(means)


def test_report_of_a_folder(tmp_path, write, one_factor, capsys):
    failed = line(99, {"rate": 9}, 0, 0.0, state="failed") | {"error": "exit code 2: error: diverged"}
    write([*one_factor, failed])
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "14 trials (13 complete, 1 failed) of 6 combinations of settings; 14.0 hours" in text
    assert "is that of rate 2, batch 64, chosen from 6 combinations in 13 trials" in text
    assert "If all 6 were equally good" in text
    assert "| 1 (base) | 3 | 5.00 ± 0.12 | 0.500 ± 0.012 |  |" in text
    assert "| 2 | 2 | 4.10 ± 0.15 | 0.410 ± 0.015 | -0.90 ± 0.19 |" in text
    assert "| base (base) |" in text  # of size, which is no setting
    assert "exit code 2: error: diverged" in text
    pictures = {path.name: path for path in tmp_path.glob("*.png")}
    assert pictures.keys() == {"effects-mlm_loss.png", "effects-disc_auc.png", "trade-off.png", "importance.png",
                               "interaction-rate-batch.png"}
    for name, path in pictures.items():
        assert f"![{name}]({name})" in text
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000


def test_report_of_a_file_of_results(tmp_path, write, one_factor):
    write(one_factor, "small.jsonl")
    assert main([str(tmp_path / "small.jsonl"), "--metrics", "disc_auc"]) == 0
    text = (tmp_path / "small" / "report.md").read_text()
    assert "The best disc_auc, 0.620 ± 0.020, is that of rate 3" in text  # the highest, though the study's metric is a loss
    assert "mlm_loss" not in text


def test_scores_that_only_some_trials_have(tmp_path, write):
    lines = lines_of([({}, [5.0, 5.2]), ({"objective": "mlm"}, [4.0, 4.2]), ({"objective": "other"}, [4.5, 4.7])])
    for each in lines[2:]:
        del each["scores"]["disc_auc"]
    lines[-1]["scores"]["large_loss"] = lines[-2]["scores"]["large_loss"] = 1.0
    write(lines)
    assert main([str(tmp_path), "--metrics", "large_loss", "disc_auc"]) == 0
    assert "| other | 2 | 1 | - |  |" in (tmp_path / "report.md").read_text()


def test_a_study_of_which_only_the_base_has_run(tmp_path, write):
    write(lines_of([({}, [5.0, 5.2])]))
    assert main([str(tmp_path)]) == 0
    assert "The best mlm_loss, 5.10 ± 0.15, is that of the base" in (tmp_path / "report.md").read_text()


def test_a_few_random_trials_have_effects_but_no_interactions(tmp_path, write):
    write(lines_of([({"rate": rate, "size": rate + 0.5}, [5.0 + rate]) for rate in (1.0, 2.0, 4.0)]))
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## Effect of each setting" in text and "Interaction" not in text


def test_trials_without_the_base_are_refused(tmp_path, write, capsys):
    write([line(0, {}, 0, 5.0, state="failed"), line(1, {"rate": 2}, 0, 4.0, disc_auc=0.4),
           line(2, {"batch": 64}, 0, 4.5, disc_auc=0.4)])
    assert main([str(tmp_path)]) == 2
    assert "the base, with which each trial is compared, has no complete trial yet" in capsys.readouterr().err


def test_one_seed_has_no_standard_error(tmp_path, write):
    write(lines_of([({}, [5.0]), ({"rate": 2}, [4.0])]))
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "the spread between seeds is not known" in text and "±" not in text


@pytest.mark.parametrize("content, message", [
    (None, "results.jsonl is missing"), ("{\n", "line 1 can't be read as JSON"), ('{"trial": 1}\n', "line 1 is no result"),
    (json.dumps(line(0, {}, 0, 1.0, state="failed")) + "\n", "has no complete trial yet"),
])
def test_unusable_results_are_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_metric_that_no_trial_has_is_refused(tmp_path, write, one_factor, capsys):
    write(one_factor)
    assert main([str(tmp_path), "--metrics", "mlm_los"]) == 2
    assert "no trial has the score mlm_los: the scores are mlm_loss, disc_auc" in capsys.readouterr().err


def test_errors_are_shown_with_two_digits():
    assert [with_error(4.6789, error) for error in (0.0123, 0.12, 1.2, 12.0, math.nan)] == [
        "4.679 ± 0.012", "4.68 ± 0.12", "4.7 ± 1.2", "5 ± 12", "4.679"]


def test_the_search_prints_the_number_of_trials_beside_the_best(write, one_factor):
    text = best_text(read_results(write(one_factor)))
    assert "best mlm_loss: 3.1, mean of 2 seeds" in text and "of 6 combinations of settings in 13 trials" in text
