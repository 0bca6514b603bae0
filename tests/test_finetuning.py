"""Finetuning.py: official files in, scores that scipy and scikit-learn confirm out; weights, protocol, bad input."""

import csv
import dataclasses
import json
import math
import os
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import safetensors.torch
import scipy.stats
import seqeval.metrics
import torch
from conftest import WORDS, Killed, write_pair
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer,
                          ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, ElectraModel)

import Finetuning as script
from convert.to_transformers import main as to_transformers
from dataset import Vocabulary
from Finetuning import Experiment, Finetuning, layerwise_groups, main, read_weights, task_loss
from model import Classifier, ModelConfig, SavedNetwork, build_network, load_network, save_network
from tasks.data import Row
from tasks.encoding import length_batches, similar_batches, training_examples
from tasks.glue import TASKS, TRAINED, GlueFiles, read_task, task_key
from tasks.prediction import predict
from tasks.results import PUBLISHED
from tasks.task import read_task_file
from utils import load, pick_precision, scheduled_rate

FLAGS = "--batch-size 4 --epochs 1 --max-length 24 --precision fp32 --device cpu".split()


@pytest.fixture
def tune(tmp_path, vocabulary, glue, capsys):
    """Runs the script on random weights, gives exit code, output and errors; results land in tmp_path/out."""
    weights = write_pair(tmp_path / "run", vocabulary)[1]

    def run(*flags, data=glue, source=weights, output=tmp_path / "out"):
        code = main(["--weights", str(source), "--data-dir", str(data), "--output", str(output), *FLAGS, *flags])
        return code, *capsys.readouterr()
    return run


def new_experiment(weights, output, **settings):
    settings = Finetuning(task="rte", weights=(str(weights),), **settings)
    source, saved = read_weights(settings, weights)
    device = torch.device("cpu")
    return Experiment(settings, source, saved, Vocabulary.of_network(saved, source), output, device,
                      pick_precision("fp32", device), None)


def table(path):
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Whole runs


ORACLES = {"accuracy": accuracy_score, "f1": f1_score, "matthews": matthews_corrcoef,
           "pearson": lambda a, b: scipy.stats.pearsonr(a, b)[0],
           "spearman": lambda a, b: scipy.stats.spearmanr(a, b)[0]}


@pytest.mark.parametrize("key", TRAINED)
def test_every_task_scores_as_the_libraries_do_and_predicts_every_test_row(tune, tmp_path, key):
    code, _, err = tune("--task", TASKS[key].name.lower(), "--predict")
    assert code == 0, err
    run = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    task, folder = TASKS[key], tmp_path / "out" / key / "seed-0"
    names = set()
    for split in task.dev_files():
        head, *rows = table(folder / f"dev{split and '-' + split}.tsv")
        assert head == ["label", "prediction"] and len(rows) == 14
        columns = [[task.classes.index(word) if task.classes else float(word) for word in column]
                   for column in zip(*rows, strict=True)]
        for metric in task.metrics:
            names.add(f"{split}_{metric}".lstrip("_"))
            assert run["scores"][f"{split}_{metric}".lstrip("_")] == pytest.approx(ORACLES[metric](*columns), abs=1e-9)
    assert names == set(run["scores"])
    submissions = {"mnli": {"MNLI-m", "MNLI-mm", "AX"}}.get(key, {task.name})
    assert {path.stem for path in (tmp_path / "out" / "seed-0").iterdir()} == submissions
    for name in submissions:
        head, *rows = table(tmp_path / "out" / "seed-0" / f"{name}.tsv")
        assert head == ["index", "prediction"] and [row[0] for row in rows] == [str(n) for n in range(14)]
        assert all(row[1] in task.classes if task.classes else 0 <= float(row[1]) <= 5 for row in rows)
    dev, = (record for record in records(folder) if record["heldout"])
    assert {name: dev[name] for name in names} == run["scores"] and list(folder.glob("events.out.tfevents*"))


def test_finished_runs_are_not_repeated_and_other_settings_are_refused(tune, tmp_path):
    assert tune("--task", "rte")[0] == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    code, out, _ = tune("--task", "RTE")
    assert code == 0 and "finished before" in out and (tmp_path / "out" / "results.json").read_bytes() == before
    code, _, err = tune("--task", "rte", "--learning-rate", "1e-3")
    assert code == 2 and "0.0003" in err and "0.001" in err
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert tune("--task", "rte", "--seeds", "2")[0] == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 2


def test_the_same_seed_gives_the_same_model_and_another_a_different_one(tune, tmp_path):
    outputs = [tmp_path / name for name in "abc"]
    for output, seed in zip(outputs, "001", strict=True):
        assert tune("--task", "stsb", "--save-model", "--seed", seed, output=output)[0] == 0
    a, b, c = (load(next(output.glob("stsb/*/model.pt")))["weights"] for output in outputs)
    assert all(torch.equal(a[name], b[name]) for name in a) and any(not torch.equal(a[name], c[name]) for name in a)


def test_a_saved_model_predicts_without_training_what_it_predicted_after_training(tune, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("the old dog\ta cat\n\nred tree\tthe bird sees\n", encoding="utf-8")
    code, _, err = tune("--task", "mnli", "--save-model", "--predict", "--predict-file", str(lines))
    assert code == 0, err
    folder = tmp_path / "out" / "mnli" / "seed-0"
    model = folder / "model.pt"
    code, _, err = tune("--task", "ax", "--predict-file", str(lines), source=model, output=tmp_path / "again")
    assert code == 0, err
    again = tmp_path / "again" / "predictions"
    assert table(again / "AX.tsv") == table(tmp_path / "out" / "seed-0" / "AX.tsv")
    assert table(again / "lines-predictions.tsv") == table(folder / "lines-predictions.tsv")
    assert [row[0] for row in table(again / "lines-predictions.tsv")] == ["line", "1", "3"]
    assert "fine-tuned on MNLI, with the labels contradiction" in tune("--task", "rte", source=model)[2]


def test_all_runs_what_is_there_and_prints_the_published_rows(tune, tmp_path, glue):
    data = tmp_path / "data"
    for name in ("rte", "CoLA"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).symlink_to(GlueFiles(task_key(name), glue).folder)
    code, out, _ = tune("--task", "all", "--seeds", "2", data=data)
    assert code == 0 and "SST-2 left out" in out and "n 2" in out
    row = next(line for line in out.splitlines() if line.startswith("| ELECTRA-Small++"))
    published = PUBLISHED["ELECTRA-Small++, median"]
    assert row.endswith(f"| {published[0]} | {published[-1]} | {(published[0] + published[-1]) / 2:.1f} |")


# Protocol


def test_layer_rates_are_the_original_s_or_the_published_formula_s():
    model = Classifier(ModelConfig(vocab_size=9, embedding_size=8, hidden_size=16, heads=2, feed_forward_size=8), 2)
    coded, exact = ([group["lr"] for group in layerwise_groups(model, 1.0, 0.8, flag)] for flag in (False, True))
    assert coded == pytest.approx([0.8**14, *(0.8**power for power in range(13, 1, -1)), 1.0])
    assert exact == pytest.approx([0.8**power for power in range(13, -1, -1)])
    grouped = [p for group in layerwise_groups(model, 1.0, 0.8, False) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len(list(model.parameters()))


def test_both_orders_double_the_steps_and_the_rate_follows_the_schedule(tune, tmp_path):
    for key, factor in (("mrpc", 2), ("rte", 1)):
        tune("--task", key)
        line = records(tmp_path / "out" / key / "seed-0")[0]
        steps = math.ceil(9 * factor / 4)
        assert line["step"] == steps
        assert line["learning_rate"] == pytest.approx(scheduled_rate(steps - 1, 3e-4, int(steps * 0.1), steps))


def test_losses_are_cross_entropy_and_the_scaled_squared_error():
    logits, labels = torch.tensor([[0.2, -0.1], [0.5, 0.3]]), torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = -torch.log_softmax(logits, -1)[[0, 1], [0, 1]].mean()
    assert torch.allclose(task_loss(logits, labels, TASKS["rte"]), expected)
    assert torch.allclose(task_loss(torch.tensor([[0.5], [1.0]]), torch.tensor([5.0, 2.5]).double(), TASKS["stsb"]),
                          torch.tensor(0.25))


def test_batches_hold_every_example_once_in_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    batches = similar_batches(lengths, 8, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(1003)) and sorted(map(len, batches)) == [3] + [8] * 125
    assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 5


def test_mrpc_and_stsb_train_on_both_orders(vocabulary):
    rows = [Row("0", ("the dog", "a cat"), 1.0), Row("1", ("red", "green tree"), 0.0)]
    one = {True: ["the dog", "red"], False: ["a cat", "green tree"]}
    for key in ("mrpc", "stsb", "qqp"):
        examples = training_examples(rows, TASKS[key], vocabulary, 20)
        both = key != "qqp"
        assert np.concatenate(examples.labels).tolist() == [1.0, 0.0] * (1 + both)
        firsts = one[True] + one[False] * both
        assert [list(first) for first, _ in examples.segments] == vocabulary.encode(firsts)


def test_the_classifier_is_a_linear_layer_on_cls_after_dropout():
    torch.manual_seed(0)
    model = Classifier(ModelConfig(vocab_size=20, embedding_size=8, hidden_size=16, layers=1, heads=2,
                                   feed_forward_size=8, dropout=0.5), 3).eval()
    ids, mask = torch.randint(20, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    x = model.encoder(ids, torch.zeros_like(ids), mask)
    assert torch.allclose(model(ids, torch.zeros_like(ids), mask), x[:, 0] @ model.prediction.weight.T, atol=1e-6)
    assert not torch.equal(model.train()(ids, torch.zeros_like(ids), mask), model(ids, torch.zeros_like(ids), mask))


def test_predictions_come_in_the_order_of_their_rows(tmp_path, vocabulary):
    experiment = new_experiment(write_pair(tmp_path, vocabulary)[1], tmp_path, batch_size=1, max_length=24)
    classifier = script.new_classifier(experiment, experiment.saved.config, TASKS["rte"], 0)
    rng = np.random.default_rng(0)
    rows = [Row("", tuple(" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(2)), 0.0) for _ in range(23)]
    predictor = experiment.predictor(TASKS["rte"], classifier)
    alone = np.concatenate([predict(predictor, [row]) for row in rows])
    assert np.allclose(predict(predictor, rows), alone, atol=1e-5) and np.ptp(alone[:, 0]) > 0.01


def test_training_equals_plain_steps_of_adam_without_bias_correction(tune, tmp_path, vocabulary, glue):
    """Three steps by the formulas: clipped gradient, layer-wise rates on the schedule, moments that start at 0."""
    code, _, err = tune("--task", "rte", "--save-model", "--dropout", "0", "--learning-rate", "0.01")
    assert code == 0, err
    trained = load(tmp_path / "out" / "rte" / "seed-0" / "model.pt")["weights"]
    experiment = new_experiment(tmp_path / "run" / "disc.pt", tmp_path, max_length=24)
    config = dataclasses.replace(experiment.saved.config, dropout=0.0)
    classifier = script.new_classifier(experiment, config, TASKS["rte"], 0)
    rows = read_task("rte", glue, training=True, predicting=False).train
    examples = training_examples(rows, TASKS["rte"], vocabulary, 24)
    groups = layerwise_groups(classifier, 0.01, 0.8, False)
    moments = {p: [torch.zeros_like(p), torch.zeros_like(p)] for p in classifier.parameters()}
    batches = length_batches(examples.segments, vocabulary, 24, 4, np.random.default_rng((0, 0)))
    for step, (numbers, batch) in enumerate(batches):
        classifier.zero_grad()
        torch.nn.functional.cross_entropy(classifier(*batch), torch.tensor([rows[n].label for n in numbers])).backward()
        norm = torch.stack([p.grad.norm() for p in classifier.parameters()]).norm()
        for group in groups:
            for p in group["params"]:
                gradient = p.grad * min(1.0, 1.0 / (float(norm) + 1e-6))
                first, second = moments[p]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                p.data -= group["lr"] * (1 - step / 3) * min(1, step) * first / (second.sqrt() + 1e-6)
    assert step == 2
    for name, weight in classifier.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=2e-5)
    initial = script.new_classifier(experiment, config, TASKS["rte"], 0).state_dict()
    assert (trained["prediction.weight"] - initial["prediction.weight"]).abs().max() > 0.01


def test_steps_without_a_finite_gradient_change_nothing_and_are_reported(tune, tmp_path, monkeypatch):
    """The loss of the second of three steps is NaN: weights stay finite. If all are, the run ends as diverged."""
    losses = []

    def nan_at(steps):
        def broken_loss(*arguments):
            losses.append(task_loss(*arguments))
            return losses[-1] * math.nan if len(losses) in steps else losses[-1]
        return broken_loss
    for protocol in ("original", "robust"):
        losses.clear()
        monkeypatch.setattr(script, "task_loss", nan_at([2]))
        code, out, err = tune("--task", "rte", "--save-model", "--protocol", protocol, output=tmp_path / protocol)
        assert code == 0 and "1 of 3 steps were skipped" in out + err
        line = records(tmp_path / protocol / "rte" / "seed-0")[0]
        weights = load(tmp_path / protocol / "rte" / "seed-0" / "model.pt")["weights"]
        assert math.isfinite(line["loss"]) and all(weight.isfinite().all() for weight in weights.values())
    losses.clear()
    monkeypatch.setattr(script, "task_loss", nan_at([1, 2, 3]))
    code, _, err = tune("--task", "rte", output=tmp_path / "diverged")
    assert code == 2 and "diverged" in err and not (tmp_path / "diverged" / "results.json").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_in_half_precision_agrees_with_fp32(tune, tmp_path, precision):
    losses = []
    for name in ("fp32", precision):
        code, out, err = tune("--task", "stsb", "--dropout", "0", "--precision", name, output=tmp_path / name)
        assert code == 0 and "skipped" not in out, err
        losses.append(records(tmp_path / name / "stsb" / "seed-0")[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] != losses[0]


# Weights


def test_without_weights_the_newest_run_is_taken_and_gets_the_results(tmp_path, vocabulary, glue, monkeypatch, capsys):
    for seed, name in enumerate(("old", "new")):
        weights = write_pair(tmp_path / "runs" / name, vocabulary, seed)[1]
        os.utime(weights, (seed, seed))
    monkeypatch.chdir(tmp_path)
    assert main(["--task", "rte", "--data-dir", str(glue), *FLAGS]) == 0
    assert "runs/new/disc.pt" in capsys.readouterr().out
    assert (tmp_path / "runs" / "new" / "glue" / "results.json").is_file()
    assert main(["--task", "rte", "--data-dir", str(glue), "--weights", "runs/old", "--from-scratch", *FLAGS]) == 0
    assert (tmp_path / "runs" / "old" / "glue-scratch" / "results.json").is_file()


def transformers_folder(folder, model_class, vocabulary, **changes):
    config = ElectraConfig(vocab_size=vocabulary.size, embedding_size=8, hidden_size=16, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=32, max_position_embeddings=30, **changes)
    model = model_class(config).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary.pieces()) + "\n", encoding="utf-8")
    return model


@pytest.mark.parametrize("model_class", [ElectraForPreTraining, ElectraForMaskedLM, ElectraModel])
def test_a_transformers_folder_gives_the_same_vectors(tmp_path, vocabulary, model_class):
    reference = transformers_folder(tmp_path, model_class, vocabulary)
    saved = read_weights(Finetuning(max_length=24), tmp_path)[1]
    ids = torch.randint(5, vocabulary.size, (3, 11))
    mask = torch.arange(11) < torch.tensor([[11], [7], [3]])
    segments = (torch.arange(11) > 4).long().expand(3, -1)
    base = getattr(reference, "electra", reference)
    with torch.no_grad():
        expected = base(ids, attention_mask=mask.long(), token_type_ids=segments).last_hidden_state
        vectors = saved.network.encoder(ids, segments, mask)
    assert torch.allclose(vectors[mask], expected[mask], atol=1e-5)


def test_the_encoder_equals_the_checkpoint_bit_for_bit_and_scratch_does_not(tmp_path, vocabulary):
    path = write_pair(tmp_path, vocabulary)[1]
    saved = load(path)["weights"]
    for scratch in (False, True):
        experiment = new_experiment(path, tmp_path, from_scratch=scratch, max_length=24)
        classifier = script.new_classifier(experiment, experiment.saved.config, TASKS["rte"], 0)
        weights = classifier.encoder.state_dict()
        assert all(torch.equal(weights[name], saved[f"encoder.{name}"]) for name in weights) != scratch
        assert len(weights) == sum(name.startswith("encoder.") for name in saved)


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("encoder.layers.0.attention_norm.weight"), "attention_norm"),
    (lambda w: w.update({"encoder.layers.7.feed_forward.bias": torch.zeros(3)}), "layers.7"),
    (lambda w: w.update({"encoder.layers.0.feed_forward.bias": torch.zeros(3)}), "feed_forward.bias"),
    (lambda w: w["encoder.layers.0.feed_forward.bias"].fill_(math.nan), "not finite"),
])
def test_weights_that_do_not_match_one_to_one_are_refused(tune, tmp_path, vocabulary, change, message):
    path = write_pair(tmp_path / "other", vocabulary)[1]
    content = load(path)
    change(content["weights"])
    torch.save(content, path)
    code, _, err = tune("--task", "rte", source=path)
    assert code == 2 and message in err


def test_transformers_folders_that_do_not_fit_are_refused(tune, tmp_path, vocabulary):
    transformers_folder(tmp_path / "relu", ElectraForPreTraining, vocabulary, hidden_act="relu")
    transformers_folder(tmp_path / "words", ElectraForPreTraining, vocabulary)
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    model = transformers_folder(tmp_path / "missing", ElectraForPreTraining, vocabulary)
    weights = {name: w.clone() for name, w in model.state_dict().items() if "layer.1.output.dense.bias" not in name}
    safetensors.torch.save_file(weights, tmp_path / "missing" / "model.safetensors")
    for name, message in {"relu": "hidden_act", "words": "5 pieces",
                          "missing": "layer.1.output.dense.bias", "nowhere/at/all": "no file or folder"}.items():
        source = tmp_path / name if "/" not in name else name
        code, _, err = tune("--task", "rte", source=source)
        assert code == 2 and message in err, (name, err)


# Input


@pytest.mark.parametrize("flags", [("--task", "nothing"), ("--task", "rte", "--seeds", "0"),
                                   ("--task", "rte", "--dropout", "1"),
                                   ("--task", "rte", "--max-length", "31"), ("--task", "all", "--predict-file", "x"),
                                   ("--task", "rte", "--predict-file", "missing.txt"), ()])
def test_impossible_commands_end_in_one_line(tune, flags):
    code, _, err = tune(*flags)
    assert code == 2 and "Traceback" not in err


def test_a_wrong_file_ends_in_one_line_that_names_it(tune, tmp_path):
    path = tmp_path / "data" / "RTE" / "train.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", encoding="utf-8")
    code, _, err = tune("--task", "rte", data=tmp_path / "data")
    assert code == 2 and f"{path}, line 2: the label 'maybe'" in err and err.count("\n") == 1


def test_results_that_cannot_be_read_are_refused(tune, tmp_path):
    (tmp_path / "out").mkdir()
    for text in ("{", "[]", '{"runs": [{"task": "rte"}]}'):
        (tmp_path / "out" / "results.json").write_text(text, encoding="utf-8")
        code, _, err = tune("--task", "rte")
        assert code == 2 and "results.json can't be read" in err
        assert (tmp_path / "out" / "results.json").read_text(encoding="utf-8") == text


def test_absent_data_without_a_hub_names_the_files_and_their_publisher(tune, tmp_path, monkeypatch):
    def no_network(*_):
        raise ConnectionError
    monkeypatch.setattr("convert.hub.reach_hub", no_network)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    code, _, err = tune("--task", "mnli", data=tmp_path / "nothing")
    assert code == 2 and "dev_mismatched.tsv" in err and "gluebenchmark.com" in err and "--data-dir" in err


# A user's own task


def write_reviews(folder, text="", rows=40):
    """reviews.toml and its CSV file: what is said twice is good."""
    words = WORDS[3:9]
    lines = [f'{n},"the {words[n % 6]} dog, {words[n % 6] if n % 2 else "old"}",{"good" if n % 2 else "bad"}'
             for n in range(rows)]
    (folder / "reviews.csv").write_text("id,review,verdict\n" + "\n".join(lines) + "\n", encoding="utf-8")
    path = folder / "reviews.toml"
    path.write_text(f'train = "reviews.csv"\ntexts = ["review"]\nlabel = "verdict"\nepochs = 3\n{text}', encoding="utf-8")
    return path


def test_a_task_of_glue_written_as_one_s_own_gives_the_very_same_numbers(tune, tmp_path, glue):
    path = tmp_path / "rte.toml"
    path.write_text(f'''train = "{glue}/RTE/train.tsv"
dev = "{glue}/RTE/dev.tsv"
unlabelled = "{glue}/RTE/test.tsv"
texts = ["sentence1", "sentence2"]
label = "label"
classes = ["entailment", "not_entailment"]
quotes = "text"
''', encoding="utf-8")
    for name, task in (("glue", "rte"), ("own", str(path))):
        code, _, err = tune("--task", task, "--predict", "--save-model", output=tmp_path / name)
        assert code == 0, err
    glue_run, own_run = (json.loads((tmp_path / name / "results.json").read_text())["runs"][0] for name in ("glue", "own"))
    assert own_run["scores"]["accuracy"] == glue_run["scores"]["accuracy"] and own_run["task"] == "rte"
    weights, own_weights = (load(tmp_path / name / "rte" / "seed-0" / "model.pt")["weights"] for name in ("glue", "own"))
    assert all(torch.equal(weights[name], own_weights[name]) for name in weights)
    assert table(tmp_path / "own" / "seed-0" / "rte.tsv") == table(tmp_path / "glue" / "seed-0" / "RTE.tsv")


def test_own_task_from_file_to_predictions_of_new_rows(tune, tmp_path, capsys):
    """Trained without a dev file; model.pt alone classifies a file whose other columns are kept."""
    (tmp_path / "test.csv").write_text("id,review,verdict\n0,red dog red,good\n1,the cat,bad\n", encoding="utf-8")
    new = tmp_path / "new.csv"
    new.write_text('city,review,note\nLyon,"the red dog, red","a ""b"""\nOslo,the new dog,\n', encoding="utf-8")
    path = write_reviews(tmp_path, 'test = "test.csv"\nmax_length = 16')
    code, out, err = tune("--task", str(path), "--save-model", "--predict-file", str(new), "--probabilities")
    assert code == 0, err
    assert "36 training rows, 4 dev rows" in out and "bad 18 (50.0%), good 18 (50.0%)" in out
    run = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    folder = tmp_path / "out" / "reviews" / "seed-0"
    assert list(run["scores"]) == ["accuracy", "macro_f1"] and set(run["test_scores"]) == {"test_accuracy", "test_macro_f1"}
    assert run["settings"]["max_length"] == 24  # the flag goes before the file
    assert len(table(tmp_path / "out" / "reviews" / "held-out.tsv")) == 5 and len(table(folder / "test.tsv")) == 3
    with open(folder / "new-predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["city"], row["review"], row["note"]) for row in rows] == [
        ("Lyon", "the red dog, red", 'a "b"'), ("Oslo", "the new dog", "")]
    for row in rows:
        probabilities = {name: float(row[f"p_{name}"]) for name in ("bad", "good")}
        assert sum(probabilities.values()) == pytest.approx(1, abs=2e-4)
        assert row["prediction"] == max(probabilities, key=probabilities.get)
        assert float(row["probability"]) == max(probabilities.values())
    model = ["--weights", str(folder / "model.pt"), "--device", "cpu", "--precision", "fp32"]
    assert main([*model, "--predict-file", str(new), "--output", str(tmp_path / "again"), "--probabilities"]) == 0
    again = tmp_path / "again" / "predictions" / "new-predictions.csv"
    assert again.read_bytes() == (folder / "new-predictions.csv").read_bytes()
    assert main([*model, "--task", str(path), "--output", str(tmp_path / "again")]) == 0
    assert f"test_accuracy {100 * run['test_scores']['test_accuracy']:.1f}" in capsys.readouterr().out


def test_a_model_keeps_the_length_of_its_training(tune, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("the " + "dog " * 20 + "\n", encoding="utf-8")
    assert tune("--task", str(write_reviews(tmp_path)), "--max-length", "8", "--save-model", "--predict-file",
                str(text))[0] == 0
    folder = tmp_path / "out" / "reviews" / "seed-0"
    flags = ["--weights", str(folder / "model.pt"), "--precision", "fp32", "--output", str(tmp_path / "again")]
    assert main([*flags, "--predict-file", str(text), "--device", "cpu"]) == 0
    again = tmp_path / "again" / "predictions" / "long-predictions.tsv"
    assert again.read_bytes() == (folder / "long-predictions.tsv").read_bytes()
    assert main([*flags, "--predict-file", str(text), "--device", "cpu", "--max-length", "24"]) == 0
    assert again.read_bytes() != (folder / "long-predictions.tsv").read_bytes()


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".parquet"])
def test_predictions_keep_the_format_of_the_file(tune, tmp_path, suffix):
    rows = [{"n": 7, "review": "the red dog"}, {"n": 8, "review": "a cat"}]
    new = tmp_path / f"new{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), new)
    else:
        text = "n\treview\n7\tthe red dog\n8\ta cat\n" if suffix == ".tsv" else "\n".join(map(json.dumps, rows))
        new.write_text(text, encoding="utf-8")
    assert tune("--task", str(write_reviews(tmp_path)), "--predict-file", str(new))[0] == 0
    path = tmp_path / "out" / "reviews" / "seed-0" / f"new-predictions{suffix}"
    if suffix == ".parquet":
        predicted = pyarrow.parquet.read_table(path).to_pylist()
    elif suffix == ".jsonl":
        predicted = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        head, *lines = table(path)
        predicted = [dict(zip(head, line, strict=True)) | {"n": int(line[0])} for line in lines]
    assert [{name: row[name] for name in ("n", "review")} for row in predicted] == rows
    assert all(list(row) == ["n", "review", "prediction", "probability"] and row["prediction"] in ("good", "bad")
               for row in predicted)


def test_errors_and_confusions_are_those_of_the_predictions(tune, tmp_path):
    lines = write_reviews(tmp_path, 'dev = "dev.csv"').with_name("reviews.csv").read_text().splitlines()
    text = "\n".join(lines[:31]).replace(",good", ",x").replace(",bad", ",good").replace(",x", ",bad")  # all wrong
    (tmp_path / "dev.csv").write_text(text, encoding="utf-8")
    assert tune("--task", str(tmp_path / "reviews.toml"))[0] == 0
    folder = tmp_path / "out" / "reviews" / "seed-0"
    answers = table(folder / "dev.tsv")[1:]
    matrix = {row[0]: list(map(int, row[1:])) for row in table(folder / "confusion.tsv")[1:]}
    assert matrix == {label: [answers.count([label, other]) for other in ("bad", "good")] for label in ("bad", "good")}
    head, *errors = table(folder / "errors.tsv")
    wrong = [n for n, (label, prediction) in enumerate(answers) if label != prediction]
    assert head == ["line", "label", "prediction", "probability", "review"]
    assert len(errors) == min(20, len(wrong)) > 0 and {int(row[0]) - 2 for row in errors} <= set(wrong)
    assert [row[3] for row in errors] == sorted((row[3] for row in errors), reverse=True)
    assert "| seed 0 |" in (tmp_path / "out" / "results.md").read_text()


def test_real_labels_of_any_range_are_learned_and_predicted_on_it(tune, tmp_path):
    (tmp_path / "t.csv").write_text("text,score\n" + "".join(f"the {WORDS[n % 9]} dog,{-10 - n % 9}\n" for n in range(60)))
    (tmp_path / "t.toml").write_text('train = "t.csv"\ntexts = ["text"]\nlabel = "score"\nrange = [-20, -10]')
    (tmp_path / "new.jsonl").write_text('{"text": "the old dog"}\n', encoding="utf-8")
    assert tune("--task", str(tmp_path / "t.toml"), "--epochs", "2", "--save-model", "--predict-file",
                str(tmp_path / "new.jsonl"))[0] == 0
    folder = tmp_path / "out" / "t" / "seed-0"
    predicted = json.loads((folder / "new-predictions.jsonl").read_text())["prediction"]
    assert to_transformers([str(folder / "model.pt"), str(tmp_path / "exported")]) == 0
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "exported")("the old dog", return_tensors="pt")
    assert peer(**batch).logits.item() == pytest.approx(predicted, abs=1e-3)
    columns = np.array([list(map(float, row)) for row in table(folder / "dev.tsv")[1:]]).T
    run = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    assert columns.shape == (2, 6) and run["scores"]["pearson"] == pytest.approx(scipy.stats.pearsonr(*columns)[0])
    assert not (folder / "confusion.tsv").exists() and table(folder / "errors.tsv")[0][3] == "difference"
    assert torch.allclose(task_loss(torch.tensor([[0.5]]), torch.tensor([-20.0]), read_task_file(tmp_path / "t.toml")),
                          torch.tensor(0.25))


def test_one_dev_row_of_a_regression_task_has_a_score(tune, tmp_path, glue):
    folder = tmp_path / "data" / "STS-B"
    folder.mkdir(parents=True)
    for file, count in (("train.tsv", 9), ("dev.tsv", 1)):
        lines = (glue / "STS-B" / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / file).write_text("".join(lines[:1 + count]), encoding="utf-8")
    code, out, err = tune("--task", "stsb", data=tmp_path / "data")
    assert code == 0 and "a correlation is not defined" in out, err


def test_models_are_compared_in_one_table_with_spreads(tune, tmp_path, vocabulary, glue, capsys):
    for seed, name in enumerate("ab"):
        write_pair(tmp_path / name, vocabulary, seed)
    flags = ["--data-dir", str(glue), "--output", str(tmp_path / "out"), "--seeds", "2", *FLAGS]
    weights = ["--weights", str(tmp_path / "a"), str(tmp_path / "b")]
    for task, heads in (("mrpc", "| mrpc, dev | accuracy | f1 |"), ("all", "| dev | CoLA matthews | SST-2 accuracy |")):
        assert main(["--task", task, *weights, *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith(heads) for line in lines)
        for name in "ab":
            row, = (line for line in lines if line.startswith(f"| {tmp_path / name / 'disc.pt'}, median of 2 |"))
            runs = json.loads((tmp_path / "out" / name / "results.json").read_text())["runs"]
            values = [100 * run["scores"]["accuracy"] for run in runs if run["task"] == "mrpc"]
            assert f"| {np.median(values):.1f} ± {np.std(values, ddof=1):.1f} |" in row
    write_pair(tmp_path / "other" / "a", vocabulary)
    assert main(["--task", "rte", *weights, str(tmp_path / "other" / "a"), *flags]) == 2
    assert "give the runs different names" in capsys.readouterr().err


# Tokens


def write_tagging(folder):
    """tags.toml: animals and what they do are spans, in CoNLL's columns."""
    tags = {"cat": "B-A", "dog": "B-A", "bird": "B-A", "sees": "B-D", "likes": "B-D", "finds": "B-D"}
    rng = np.random.default_rng(0)
    sentences = [rng.choice(WORDS, rng.integers(2, 9)) for _ in range(60)]
    text = "\n".join("".join(f"{word} x {tags.get(word, 'O')}\n" for word in words) for words in sentences)
    (folder / "tags.conll").write_text(text, encoding="utf-8")
    path = folder / "tags.toml"
    path.write_text('kind = "tokens"\ntrain = "tags.conll"\ndev = "tags.conll"\ntexts = ["word"]\nlabel = "tag"')
    return path


def test_tokens_from_conll_columns_to_predictions_and_transformers(tune, tmp_path, capsys):
    path, new = write_tagging(tmp_path), tmp_path / "new.txt"
    new.write_text("the old dog sees a cat\nbirds\n", encoding="utf-8")
    assert tune("--task", str(path), "--save-model", "--predict-file", str(new), "--epochs", "25", "--learning-rate",
                "0.01", "--dropout", "0")[0] == 0
    run = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]
    folder = tmp_path / "out" / "tags" / "seed-0"
    assert run["scores"]["span_f1"] > 0.8  # it has learned the words by heart
    sentences = [[line.split() for line in text.splitlines()] for text in (folder / "dev.conll").read_text().split("\n\n")]
    labels, predictions = ([[row[column] for row in rows] for rows in sentences] for column in (1, 2))
    assert run["scores"]["span_f1"] == pytest.approx(seqeval.metrics.f1_score(labels, predictions))
    predicted = (folder / "new-predictions.conll").read_text()
    assert [line.split()[0] for line in predicted.split()[::3]] == "the old dog sees a cat birds".split()
    assert main(["--weights", str(folder / "model.pt"), "--predict-file", str(new), "--device", "cpu", "--precision",
                 "fp32", "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "predictions" / "new-predictions.conll").read_text() == predicted
    assert to_transformers([str(folder / "model.pt"), str(tmp_path / "exported")]) == 0
    peer = AutoModelForTokenClassification.from_pretrained(tmp_path / "exported").eval()
    batch = AutoTokenizer.from_pretrained(tmp_path / "exported")("the old dog sees a cat", return_tensors="pt")
    own = load_network(folder / "model.pt", ["token classifier"], "").network
    with torch.no_grad():
        expected = own(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"].bool())
        assert torch.allclose(peer(**batch).logits, expected, atol=1e-5)
    assert peer.config.id2label == {0: "B-A", 1: "B-D", 2: "O"}


def test_sentences_without_words_or_in_one_string_are_predicted_too(tune, tmp_path):
    new = tmp_path / "new.jsonl"
    new.write_text('{"word": []}\n{"word": "the dog"}\n{"word": ["a", "cat"]}\n', encoding="utf-8")
    assert tune("--task", str(write_tagging(tmp_path)), "--predict-file", str(new), "--batch-size", "1")[0] == 0
    rows = (tmp_path / "out" / "tags" / "seed-0" / "new-predictions.jsonl").read_text().splitlines()
    assert [len(json.loads(row)["prediction"]) for row in rows] == [0, 2, 2]


def test_words_that_are_cut_off_count_as_missed(tune, tmp_path):
    code, out, _ = tune("--task", str(write_tagging(tmp_path)), "--max-length", "5")
    assert code == 0 and "training examples are longer than 5 tokens and are cut" in out
    lines = (tmp_path / "out" / "tags" / "seed-0" / "dev.conll").read_text()
    assert all(line.endswith(" O") for text in lines.split("\n\n") for line in text.splitlines()[3:])


# Interruptions


@pytest.mark.parametrize("protocol", ["original", "robust"])
def test_a_killed_run_goes_on_at_its_last_epoch_and_ends_as_an_unbroken_one(tune, tmp_path, monkeypatch, protocol):
    """Killed within the second epoch, and again after the third was saved; the seeds before it aren't repeated."""
    flags = ["--task", "rte", "--epochs", "3", "--seeds", "2", "--save-model", "--protocol", protocol]
    assert tune(*flags, output=tmp_path / "unbroken")[0] == 0
    train_epoch, save = script.train_epoch, script.save

    def killed_in_epoch(run, *arguments):
        if run.seed == 1 and arguments[2] == 1:
            raise Killed
        return train_epoch(run, *arguments)

    def killed_after_saving(path, content):
        save(path, content)
        if content["epochs"] == 3:
            raise Killed
    for name, function in (("train_epoch", killed_in_epoch), ("save", killed_after_saving)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(script, name, function)
            tune(*flags)
    code, out, err = tune(*flags)
    assert code == 0 and "RTE, seed 0: finished before" in err + out and "seed 1: goes on after epoch 3" in err + out
    results, expected = (json.loads((tmp_path / name / "results.json").read_text())["runs"] for name in ("out", "unbroken"))
    for run, other in zip(results, expected, strict=True):
        assert run | {"seconds": 0} == other | {"seconds": 0}
    for seed in ("seed-0", "seed-1"):
        folders = [tmp_path / name / "rte" / seed for name in ("out", "unbroken")]
        weights, others = (load(folder / "model.pt")["weights"] for folder in folders)
        assert all(torch.equal(weights[name], others[name]) for name in weights)
        assert records(folders[0]) == records(folders[1]) and not (folders[0] / "checkpoint.pt").exists()


def test_an_unfinished_run_is_not_mixed_with_other_settings(tune, tmp_path, monkeypatch):
    def killed(*_):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "write_predictions", killed)
        tune("--task", "rte")
    code, _, err = tune("--task", "rte", "--learning-rate", "1e-3")
    assert code == 2 and "an unfinished run" in err and "0.0003" in err and "--output" in err
    checkpoint = tmp_path / "out" / "rte" / "seed-0" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    code, _, err = tune("--task", "rte")
    assert code == 2 and "delete it to begin this run again" in err


def test_results_of_other_rows_are_not_mixed(tune, tmp_path):
    path = write_reviews(tmp_path)
    assert tune("--task", str(path))[0] == 0
    write_reviews(tmp_path, rows=42)
    code, _, err = tune("--task", str(path))
    assert code == 2 and "with data = " in err


def test_a_refused_run_leaves_no_folder(tune, tmp_path, glue):
    (tmp_path / "data" / "RTE").mkdir(parents=True)
    (tmp_path / "data" / "RTE" / "train.tsv").write_text("index\tsentence1\n0\ta\n", encoding="utf-8")
    for flags in (("--task", "rte"), ("--task", "nothing"), ("--task", "rte", "--predict-file", "none.csv"),
                  ("--task", "rte", "--max-length", "500"), ("--task", str(tmp_path / "none.toml"))):
        data = tmp_path / "data" if flags == ("--task", "rte") else glue
        assert tune(*flags, data=data)[0] == 2 and not (tmp_path / "out").exists(), flags


def test_the_commands_of_the_readme_run(tmp_path, vocabulary, monkeypatch):
    """Of tasks/README.md, with the files of tasks/examples."""
    root = Path(script.__file__).parent
    commands = re.findall(r"^python Finetuning.py (.*)$", (root / "tasks" / "README.md").read_text(), re.MULTILINE)
    write_pair(tmp_path / "runs" / "quickstart", vocabulary)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = [str(root / word) if word.startswith("tasks/") else word for word in command.split()]
        assert main([*words, "--device", "cpu"]) == 0
    assert len(commands) == 2
    model = "runs/quickstart/tasks/reviews/seed-0/model.pt"
    head, *rows = (tmp_path / model).with_name("predictions").joinpath("new-predictions.csv").read_text().splitlines()
    assert head == "city,review,prediction,probability" and [row.split(",")[0] for row in rows] == ["Lyon", "Oslo"]


def test_a_masked_language_model_is_fine_tuned_as_a_discriminator_is(tune, tmp_path, vocabulary, monkeypatch):
    """mlm.pt, in a run folder or by itself, and as the newest run."""
    saved = load_network(write_pair(tmp_path / "pair", vocabulary)[1], ["discriminator"], "")
    network = build_network("mlm", saved.config)
    path = tmp_path / "runs" / "bert" / "mlm.pt"
    path.parent.mkdir(parents=True)
    save_network(path, SavedNetwork("mlm", network, saved.config, saved.tokenizer))
    for source in (path, path.parent):
        experiment = new_experiment(source, tmp_path, max_length=24)
        classifier = script.new_classifier(experiment, experiment.saved.config, TASKS["rte"], 0)
        weights = network.encoder.state_dict()
        assert all(torch.equal(weight, weights[name]) for name, weight in classifier.encoder.state_dict().items())
        assert tune("--task", "rte", source=source)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert main(["--task", str(write_reviews(tmp_path)), *FLAGS]) == 0
    assert (path.parent / "tasks" / "results.json").is_file()
