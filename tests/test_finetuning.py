"""Finetuning.py: official files in, scores that scipy and scikit-learn confirm out; weights, protocol, bad input."""

import dataclasses
import json
import math
import os

import datasets
import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
from conftest import WORDS, write_pair
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining, ElectraModel

import Finetuning as script
from dataset import Vocabulary
from Finetuning import Experiment, Finetuning, layerwise_groups, main, read_weights, task_loss
from model import Classifier, ModelConfig
from tasks.data import Row
from tasks.encoding import length_batches, similar_batches, training_examples
from tasks.glue import TASKS, TRAINED, GlueFiles, read_task, task_key
from tasks.prediction import predict
from tasks.results import PUBLISHED
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
    assert "fine-tuned on MNLI" in tune("--task", "rte", source=model)[2]


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
    answering = experiment.predictor(TASKS["rte"], classifier)
    alone = np.concatenate([predict(answering, [row]) for row in rows])
    assert np.allclose(predict(answering, rows), alone, atol=1e-5) and np.ptp(alone[:, 0]) > 0.01


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


@pytest.mark.parametrize("model_class", [ElectraForPreTraining, ElectraModel])
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
    transformers_folder(tmp_path / "generator", ElectraForMaskedLM, vocabulary)
    transformers_folder(tmp_path / "relu", ElectraForPreTraining, vocabulary, hidden_act="relu")
    transformers_folder(tmp_path / "words", ElectraForPreTraining, vocabulary)
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", encoding="utf-8")
    model = transformers_folder(tmp_path / "missing", ElectraForPreTraining, vocabulary)
    weights = {name: w.clone() for name, w in model.state_dict().items() if "layer.1.output.dense.bias" not in name}
    safetensors.torch.save_file(weights, tmp_path / "missing" / "model.safetensors")
    for name, message in {"generator": "generator", "relu": "hidden_act", "words": "5 pieces",
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
