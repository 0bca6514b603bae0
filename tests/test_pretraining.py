"""Pretraining.py: whole small runs through main(argv), continued runs, and every kind of bad input."""

import dataclasses
import gzip
import json
import math
import os
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import RefuseWaits, Killed, assert_same, metrics, stop_after_save, story, write_pair
from sklearn.metrics import roc_auc_score
from tensorboard import plugin_util
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

import Pretraining as script
from convert import to_transformers
from dataset import SPECIAL_TOKENS, TrainingBatches, Vocabulary, mask_tokens, maskable, stored_batch
from model import Discriminator, Electra, Generator, ModelConfig, sampler_draws
from Pretraining import Pretraining, check, compile_mode, has_papers_settings, main
from studies.heldout import evaluate, heldout_task, masks_of_examples
from studies.tracking import RunningMeans
from utils import InputError, from_table, load, read_settings, tomllib

CONFIGS = Path(__file__).parent.parent / "configs"


# Whole runs


def test_a_run_leaves_a_complete_folder(command, tmp_path, capsys, corpus_file):
    assert main(command()) == 0
    out, folder = capsys.readouterr().out, tmp_path / "run"
    lines = out.splitlines()
    assert lines[0].endswith("quickstart.toml") and "electra_small.toml" in lines[1]
    assert f"LM_DEMO.py --weights {folder / 'gen.pt'}" in out and "Finetuning.py" in out
    assert {"config.toml", "vocab.txt", "gen.pt", "disc.pt", "metrics.jsonl", "checkpoint-8.pt"} <= set(os.listdir(folder))
    saved = from_table(Pretraining, tomllib.loads((folder / "config.toml").read_text()), "config.toml")
    assert saved.steps == 8 and saved.model.hidden_size == 16 and saved.corpus == (str(corpus_file),)

    lines = metrics(folder)
    assert [line["step"] for line in lines if not line["heldout"]] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if line["heldout"]] == [0, 4, 8]
    assert all(math.isfinite(line["mlm_loss"]) and math.isfinite(line["disc_loss"]) for line in lines)
    assert lines[1]["learning_rate"] == pytest.approx(1e-3 * (1 - 1 / 8) * 1 / 2)


def test_weight_files_are_self_contained(command, tmp_path):
    assert main(command()) == 0
    checkpoint = load(tmp_path / "run" / "checkpoint-8.pt")["electra"]
    for name, kind in (("gen.pt", Generator), ("disc.pt", Discriminator)):
        file = load(tmp_path / "run" / name)
        network = kind(ModelConfig(**file["model"]))
        network.load_state_dict(file["weights"])
        vocabulary = Vocabulary.from_json(file["vocabulary"], name)
        assert file["kind"] == kind.__name__.lower() and vocabulary.size == file["model"]["vocab_size"]
        assert (tmp_path / "run" / "vocab.txt").read_text().split("\n")[:-1] == vocabulary.pieces()
        for weight, value in network.state_dict().items():
            assert torch.equal(value, checkpoint[f"{file['kind']}.{weight}"])


def test_training_soon_knows_word_frequencies(command, tmp_path):
    """What seconds can show; that attention finds context takes the minutes of configs/quickstart.toml."""
    assert main(command(steps=150, learning_rate=5e-3, eval_every=150, batch_size=16, model__dropout=0.0)) == 0
    before, after = [line for line in metrics(tmp_path / "run") if line["heldout"]]
    assert after["mlm_loss"] < before["mlm_loss"] - 0.5
    assert after["mlm_accuracy"] > before["mlm_accuracy"] + 0.03
    assert after["disc_loss"] < before["disc_loss"] - 0.1


@pytest.mark.parametrize("flags", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"accumulate": 2, "examples": "line"},
                                   {"workers": 1}])
def test_resumed_run_equals_unbroken_run(command, tmp_path, monkeypatch, flags):
    steps = {"steps": 60, "save_every": 25, "eval_every": 30} | flags  # some two epochs
    assert main(command("unbroken", **steps)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 25)
        main(command("broken", **steps))
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write('{"step": 26, "heldout": false}\n{"step": 2')  # written after the checkpoint, the last line torn
    assert main(command("broken", **steps)) == 0
    unbroken, broken = (load(tmp_path / name / "checkpoint-60.pt") for name in ("unbroken", "broken"))
    for checkpoint in (unbroken, broken):
        del checkpoint["means"]["seconds"]
    assert_same(unbroken, broken)
    assert metrics(tmp_path / "unbroken") == metrics(tmp_path / "broken")
    assert_same(*(load(tmp_path / name / "disc.pt") for name in ("unbroken", "broken")))


def test_rows_never_grow_beyond_the_position_table(command):
    assert main(command(max_length=27, model__max_positions=27)) == 0  # no multiple of 8, to which rows are padded


def test_only_the_newest_checkpoints_are_kept(command, tmp_path):
    assert main(command(save_every=1, keep_checkpoints=2)) == 0
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-7.pt", "checkpoint-8.pt"]


def test_accumulated_gradients_are_those_of_the_whole_batch(command, tmp_path, monkeypatch):
    gradients = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, norm):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    for accumulate in (1, 4):
        assert main(command(str(accumulate), steps=1, accumulate=accumulate, examples="line", model__dropout=0.0)) == 0
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def prepared_run(monkeypatch, argv):
    """The run of a command line, before its first step."""
    runs = []
    with monkeypatch.context() as patch:
        patch.setattr(script, "train", lambda run, *_: runs.append(run) or run.settings.steps)
        assert main(argv) == 0
    return runs[0]


def own_task(run):
    return heldout_task(run.data, run.vocabulary, run.settings)


@pytest.mark.parametrize("kept_prob", [0.0, 0.9])
def test_kept_prob_is_the_share_of_chosen_tokens_that_stay_visible(command, monkeypatch, kept_prob):
    """In training and in evaluation; every other chosen token is [MASK]."""
    seen, forward = {True: [], False: []}, Electra.forward

    def spy(electra, batch, masked, draws):
        ids, original = (ids.gather(1, masked.positions)[masked.chosen] for ids in (masked.ids, batch.ids))
        seen[electra.training].append(torch.stack([ids, original]))
        return forward(electra, batch, masked, draws)

    monkeypatch.setattr(Electra, "forward", spy)
    assert main(command(kept_prob=kept_prob, examples="line")) == 0
    for parts in seen.values():
        ids, original = torch.cat(parts, 1)
        visible = (ids == original).double()
        assert len(visible) > 50
        assert abs(visible.mean() - kept_prob) < 4 * math.sqrt(kept_prob * (1 - kept_prob) / len(visible)) + 1e-9
        assert (ids[ids != original] == SPECIAL_TOKENS.index("[MASK]")).all()


@pytest.mark.parametrize("device, flags, processes, mode", [
    ("cuda", {}, 1, "reduce-overhead"), ("cpu", {}, 1, "default"), ("cuda", {"accumulate": 2}, 1, "default"),
    ("cuda", {"examples": "line"}, 1, "default"), ("cuda", {}, 2, "default"),
])
def test_cuda_graphs_are_used_where_they_work(monkeypatch, device, flags, processes, mode):
    monkeypatch.setattr(script, "world_size", lambda: processes)
    assert compile_mode(Pretraining(**flags), torch.device(device)) == mode


@pytest.mark.parametrize("flags", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"accumulate": 2},
                                   {"examples": "line"}, {"grad_checkpointing": True}])
def test_a_step_never_waits_for_the_device(command, monkeypatch, flags):
    run = prepared_run(monkeypatch, command(**flags))
    batches = TrainingBatches(run.data.train, run.vocabulary, 24, 6, run.settings.examples == "line", 0)
    means = RunningMeans(run.device, {})
    for step in range(2):
        batch = batches[step]
        with RefuseWaits():
            means.add(*script.training_step(run, batch, step, torch.Generator()))
    values = means.close()
    assert values["skipped_steps"] == 2 or math.isfinite(values["mlm_loss"])  # fp16 overflows until its scale fits
    with pytest.raises(AssertionError, match="_local_scalar_dense"), RefuseWaits():
        torch.ones(2).sum().item()


@pytest.mark.parametrize("flags", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"accumulate": 2}])
def test_grad_checkpointing_changes_nothing_but_memory(command, tmp_path, monkeypatch, flags):
    """Dropout included; begun without it and continued with it."""
    flags |= {"model__layers": 3}
    assert main(command("plain", **flags)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command(**flags))
    assert main(command(grad_checkpointing=True, **flags)) == 0
    plain, saving = (load(tmp_path / name / "checkpoint-8.pt") for name in ("plain", "run"))
    for checkpoint in (plain, saving):
        del checkpoint["means"]["seconds"]
    assert_same(plain, saving)
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "run")


def test_held_out_metrics_by_hand(command, tmp_path, monkeypatch):
    """`evaluate`, on lines of many lengths in several batches, against the same quantities from all outputs together."""
    run = prepared_run(monkeypatch, command(examples="line", batch_size=9, accumulate=2, eval_examples=1000))
    for weight in run.electra.parameters():
        weight.data += 0.3 * torch.randn_like(weight)  # so that it also says "replaced"
    values, _ = evaluate(run.electra, own_task(run), run.precision)
    rng = torch.Generator()
    logits, originals, sampled, labels, scores, all_labels, all_scores = ([] for _ in range(7))
    for number in range(len(run.data.heldout)):
        rng.manual_seed(int(np.random.default_rng((0, number)).integers(1 << 62)))
        batch = stored_batch(run.data.heldout, np.array([number]), run.vocabulary, 24, full_width=True)
        masked = mask_tokens(batch, run.vocabulary, 0.15, 24, rng)
        with torch.no_grad():
            draws = sampler_draws(masked.positions.shape, run.model.vocab_size, run.device, rng)
            output = run.electra.eval()(batch, masked, draws)
        logits.append(output.generator_logits[masked.chosen])
        originals.append(batch.ids.gather(1, masked.positions)[masked.chosen])
        sampled.append(output.sampled_ids[masked.chosen])
        real = maskable(batch, run.vocabulary)
        for mask, some_labels, some_scores in ((real, labels, scores), (batch.attention_mask, all_labels, all_scores)):
            some_labels.append(output.replaced[mask])
            some_scores.append(output.discriminator_logits[mask])
    logits, originals, sampled, labels, scores, all_labels, all_scores = map(
        torch.cat, (logits, originals, sampled, labels, scores, all_labels, all_scores))
    hits = (scores > 0) & labels
    assert 0 < hits.sum() < labels.sum() < (scores > 0).sum()
    assert values == pytest.approx({
        "mlm_loss": F.cross_entropy(logits, originals).item(),
        "mlm_accuracy": (logits.argmax(-1) == originals).float().mean().item(),
        "sampled_accuracy": (sampled == originals).float().mean().item(),
        "disc_loss": F.binary_cross_entropy_with_logits(all_scores, all_labels.float()).item(),
        "disc_accuracy": ((scores > 0) == labels).float().mean().item(),
        "disc_precision": (hits.sum() / (scores > 0).sum()).item(), "disc_recall": (hits.sum() / labels.sum()).item(),
        "disc_auc": roc_auc_score(labels, scores), "disc_auc_error": values["disc_auc_error"]}, rel=1e-4)


def test_held_out_metrics_do_not_depend_on_how_the_examples_are_divided(command, tmp_path, monkeypatch):
    measured = []
    for batch_size, accumulate in ((4, 1), (6, 3), (50, 1)):
        run = prepared_run(monkeypatch, command(f"{batch_size}-{accumulate}", batch_size=batch_size, accumulate=accumulate,
                                                model__initializer_range=0.5))
        measured.append(evaluate(run.electra, own_task(run), run.precision)[0])
    assert measured[0]["mlm_loss"] > 0 and 0 < measured[0]["disc_auc"] < 1
    for other in measured[1:]:
        assert other == pytest.approx(measured[0], rel=1e-5)


# Beginning again


def test_a_finished_run_says_so_and_is_left_alone(command, tmp_path, capsys):
    assert main(command()) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    assert main(command()) == 0
    assert "finished" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir() if path.name != ".lock"}


def test_a_folder_with_another_run_is_refused_and_nothing_lost(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command())
    capsys.readouterr()
    kept = (tmp_path / "run" / "checkpoint-4.pt").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(story(seed=9)))
    for arguments, message in (([*command(), "--no-resume"], "--no-resume"), (command(seed=5), "seed = 0"),
                               (command(steps=9), "steps = 8"), (command(model__layers=2), "model.layers = 1"),
                               (command(corpus=other), "has changed")):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-4.pt").read_bytes() == kept
    assert main(command(log_every=1, save_every=3)) == 0  # what doesn't change the result may change


def test_a_run_killed_before_its_first_checkpoint_still_owns_its_folder(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "write_checkpoint", lambda *_: (_ for _ in ()).throw(Killed))
        main(command())
    assert main(command(seed=5)) == 2
    assert "seed = 0" in capsys.readouterr().err
    assert main(command()) == 0


def test_a_run_goes_on_without_its_cache_and_in_another_precision(command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command())
    shutil.rmtree(tmp_path / "cache")
    assert main(command(precision="fp16")) == 0
    assert (tmp_path / "run" / "checkpoint-8.pt").exists()
    assert "the precision was fp32 and is fp16" in capsys.readouterr().err


def test_automatic_precision_that_means_another_one_on_this_machine_is_told(command, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command(precision="auto"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert main(command(precision="auto")) == 0
    assert "the precision was fp32 and is bf16" in capsys.readouterr().err


def test_a_refused_run_leaves_no_folder_and_takes_no_other(command, tmp_path, capsys):
    assert main(command(corpus=tmp_path / "missing.txt")) == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert main(command(corpus=tmp_path / "missing.txt")) == 2
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# Bad input


def test_invalid_bytes_are_counted_and_a_line_of_a_megabyte_is_read(command, tmp_path, capsys):
    path = tmp_path / "corpus.txt"
    path.write_bytes("\n\n".join(story(300)).encode() + b"\nthe \xff cat\n" + b"the old cat " * 100_000)
    assert main(command(corpus=path)) == 0
    assert "1 of " in (out := capsys.readouterr().out) and "not UTF-8" in out


@pytest.mark.parametrize(("name", "content", "message"), [
    ("missing", None, "can't be read"),
    ("empty", b"", "no text"),
    ("blank", b"\n \n\t\n", "no text"),
    ("binary", bytes(range(256)) * 50, "binary"),
    ("latin", "Ümläüt für älle\n".encode("latin-1") * 100, "not UTF-8"),
    ("short", b"the cat sees a dog.\n", "too little text"),
    ("broken.gz", b"no gzip", "can't be read"),
    ("damaged.gz", gzip.compress(b"the cat sees a dog.\n" * 99, mtime=0)[:20] + bytes(range(60)), "can't be read"),
    ("missing.txt/inside", None, "can't be read"),
])
def test_a_corpus_that_can_not_be_used_is_refused(command, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(command(corpus=path)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(("flags", "message"), [
    ({"steps": 0}, "steps = 0"), ({"batch_size": 0}, "batch_size = 0"), ({"batch_size": -3}, "batch_size = -3"),
    ({"max_length": 1}, "max_length = 1"), ({"max_length": 33}, "max_positions = 32"), ({"accumulate": 7}, "accumulate = 7"),
    ({"mask_prob": 1.0}, "mask_prob"), ({"learning_rate": 0.0}, "learning_rate"), ({"model__heads": 3}, "heads = 3"),
    ({"model__heads": 0}, "heads = 0"), ({"model__dropout": 1.0}, "dropout"), ({"log_every": 0}, "log_every"),
    ({"model__generator_size": 0.01}, "generator"), ({"warmup_steps": -1}, "warmup_steps"),
    ({"vocab": "no_such_file.txt?"}, "no_such_file"), ({"learning_rate": "nan"}, "learning_rate"),
    ({"seed": -1}, "seed = -1"),
    ({"disc_weight": "nan"}, "disc_weight"), ({"clip_norm": "inf"}, "clip_norm"), ({"model__generator_size": "nan"}, "size"),
    ({"model__vocab_size": 0}, "vocab_size"), ({"learning_rate": 1e30, "warmup_steps": 0, "eval_every": 1}, "diverged"),
])
def test_values_that_can_not_work_are_refused(command, capsys, flags, message):
    assert main(command(**flags)) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and message in error[-1]


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "x"], "--steps"), (["--stepz", "3"], "stepz"), (["--precision", "int8"], "--precision"),
    (["--config", "none.toml"], "none.toml"), (["--model.width", "3"], "model.width")])
def test_flags_that_can_not_be_read_are_refused(command, capsys, flags, message):
    assert main(command() + flags) == 2
    assert message in capsys.readouterr().err


def test_unknown_toml_keys_and_absent_devices_are_refused(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.toml").write_text("steps = 3\nbatch_sise = 4\n")
    assert main([*command(), "--config", str(tmp_path / "bad.toml")]) == 2
    assert "'batch_sise', did you mean 'batch_size'?" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command(device="cuda")) == 2
    assert "CUDA" in capsys.readouterr().err


def test_an_output_that_can_not_be_written_is_refused(command, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(command(output="file/run")) == 2
    assert "can't be written" in capsys.readouterr().err
    assert main(command(cache=tmp_path / "file")) == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_run_without_a_whole_checkpoint_is_refused(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command())
    (tmp_path / "run" / "checkpoint-4.pt").write_bytes(b"damaged")
    assert main(command()) == 2
    assert "damaged" in capsys.readouterr().err


# Tracking


def events(folder):
    """What TensorBoard shows of a run folder: the steps and values of every tag."""
    shown = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return {tag: [(event.step, tensor_util.make_ndarray(event.tensor_proto).item()) for event in shown.Tensors(tag)]
            for tag in shown.Tags()["tensors"]}


def test_tensorboard_shows_every_metric_once_also_of_a_continued_run(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        write = script.write_checkpoint
        patch.setattr(script, "write_checkpoint", lambda run, step, window: write(run, step, window) if step == 4 else
                      (_ for _ in ()).throw(Killed))
        main(command(save_every=4))  # killed at step 8, whose metrics are written
    assert main(command()) == 0
    shown = events(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    wanted = {}
    for line in lines:
        for name in line.keys() - {"step", "heldout"}:
            tag = f"{'heldout' if line['heldout'] else 'train'}/{name}"
            wanted.setdefault(tag, []).append((line["step"], pytest.approx(line[name], rel=1e-6)))
    texts = [shown.pop(f"{name}/text_summary") for name in ("settings", "samples")]
    assert shown == wanted
    assert [[step for step, _ in text] for text in texts] == [[0, 4], [0, 4, 8]]
    settings = (tmp_path / "run" / "config.toml").read_text()
    assert unescape(plugin_util.markdown_to_safe_html(texts[0][1][1])) == f"<pre><code>{settings}</code></pre>"


def test_samples_show_what_is_masked_generated_and_flagged(command, tmp_path, monkeypatch):
    """The table as TensorBoard renders it, against the networks' outputs on the first held-out examples."""
    text = "\n\n".join(story()).replace("over", "*|<_`")
    (tmp_path / "corpus.txt").write_text(text)
    run = prepared_run(monkeypatch, command(corpus=tmp_path / "corpus.txt", model__vocab_size=50))
    for weight in run.electra.parameters():
        weight.data += 0.3 * torch.randn_like(weight)  # so that it also says "replaced"
    html = plugin_util.markdown_to_safe_html(evaluate(run.electra, own_task(run), run.precision)[1])
    numbers = np.linspace(0, len(run.data.heldout) - 1, 20).astype(np.int64)
    numbers = np.array_split(numbers, 4)[0]
    batch = stored_batch(run.data.heldout, numbers, run.vocabulary, 24, full_width=True)
    masked, draws = masks_of_examples(run.electra, own_task(run), batch, numbers)
    with torch.no_grad():
        output = run.electra.eval()(batch, masked, draws)
    wanted, pieces = [], run.vocabulary.pieces()
    for row in range(4):
        original, hidden = (ids[row][batch.attention_mask[row]].tolist() for ids in (batch.ids, masked.ids))
        generated = list(original)
        for position, used, sampled in zip(masked.positions[row], masked.chosen[row], output.sampled_ids[row], strict=True):
            generated[position] = sampled.item() if used else generated[position]
        for name, ids, marks in (("original", original, [False] * len(original)),
                                 ("masked", hidden, [piece == run.vocabulary.mask for piece in hidden]),
                                 ("generated", generated, [a != b for a, b in zip(generated, original, strict=True)]),
                                 ("flagged", generated, (output.discriminator_logits[row] > 0).tolist())):
            line = ""
            for piece, mark in zip([pieces[number] for number in ids], marks, strict=False):
                inner = piece.startswith("##") and not mark
                line += piece[2:] if inner else f" <strong>{piece}</strong>" if mark else f" {piece}"
            wanted.append((f"{row + 1} {name}", line[1:]))
    assert [tuple(map(unescape, row)) for row in re.findall("<td>(.*?)</td>\\s*<td>(.*?)</td>", html)] == wanted
    assert all(any(sign in line for _, line in wanted) for sign in ("<strong>[MASK]", "*", "|", "<", "_", "`"))
    assert all(any("<strong>" in line for name, line in wanted if kind in name) for kind in ("generated", "flagged"))


def test_the_published_curve_is_for_the_papers_run_alone():
    for name, wanted in (("electra_small", True), ("electra_small_line", False), ("quickstart", False)):
        settings = read_settings(Pretraining, ["--config", str(CONFIGS / f"{name}.toml"), "--seed", "3"], Path())
        assert has_papers_settings(settings, settings.model) == wanted
    assert not has_papers_settings(Pretraining(), ModelConfig(vocab_size=4096))


# Configurations and help


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_say_what_they_are(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    settings = read_settings(Pretraining, ["--config", str(path)], path)
    check(settings)
    assert settings.output == f"runs/{path.stem}"


@pytest.mark.parametrize("name", ["electra_base", "electra_large"])
def test_larger_models_make_a_step(tmp_path, corpus_file, name):
    flags = {"--config": CONFIGS / f"{name}.toml", "--corpus": corpus_file, "--output": tmp_path / "run", "--steps": 1,
             "--cache": tmp_path / "cache", "--batch-size": 2, "--accumulate": 1, "--max-length": 64, "--eval-examples": 2,
             "--device": "cpu", "--model.layers": 1}
    assert main([str(word) for flag in flags.items() for word in flag]) == 0
    first, last = [line for line in metrics(tmp_path / "run") if line["heldout"]]
    assert first["mlm_loss"] == last["mlm_loss"]  # rate 0 at the first step
    assert all(math.isfinite(line["mlm_loss"] + line["disc_loss"]) for line in metrics(tmp_path / "run"))


def test_electra_small_has_papers_settings_and_the_default():
    settings = read_settings(Pretraining, ["--config", str(CONFIGS / "electra_small.toml")], Path())
    assert dataclasses.replace(settings, config=Pretraining.config) == Pretraining()
    with pytest.raises(InputError):
        check(dataclasses.replace(settings, max_length=513))


def test_help_lists_every_setting_with_the_papers_default(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Pretraining):
        assert field.name == "model" or f"--{field.name.replace('_', '-')}" in text
    for field in dataclasses.fields(ModelConfig):
        assert f"--model.{field.name.replace('_', '-')}" in text
    assert "default: 1000000" in text and "default: 30522" in text


# Beginning from other weights


def test_a_run_begins_from_the_weights_of_transformers_or_of_another_run(command, tmp_path, capsys):
    exported, other = tmp_path / "exported", tmp_path / "other"
    assert main(command()) == 0
    assert to_transformers.main([str(tmp_path / "run"), str(exported)]) == 0
    before = load(tmp_path / "run" / "checkpoint-8.pt")["electra"]
    for init_from, kept in ((tmp_path / "run", ("generator.", "discriminator.")),
                            (exported, ("generator.", "discriminator.")),
                            (exported / "discriminator", ("discriminator.",))):
        shutil.rmtree(other, ignore_errors=True)
        flags = {"init_from": init_from, "learning_rate": 1e-30, "weight_decay": 0,
                 "model__hidden_size": 32, "model__layers": 3}  # sizes that the weights overrule
        assert main(command("other", **flags)) == 0
        after = load(other / "checkpoint-8.pt")["electra"]
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(kept))
        assert main(command("other", **flags)) == 0
        printed = capsys.readouterr()
        assert "finished" in printed.out
        assert printed.err.count("warning: --model.dropout, --model.embedding-size") == 2 and "ignored" in printed.err
    (exported / "discriminator" / "model.safetensors").write_bytes(b"damaged")
    assert main(command("third", init_from=exported)) == 2
    assert main(command("third", init_from=tmp_path / "nothing")) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_parts_that_do_not_belong_together_are_refused_as_a_beginning(command, tmp_path, capsys, vocabulary):
    assert main(command()) == 0
    pieces = (tmp_path / "run" / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*pieces[:-2], pieces[-1], pieces[-2]]))  # as many, two exchanged
    assert main(command("other", init_from=tmp_path / "run", vocab=tmp_path / "vocab.txt")) == 2
    assert "has other pieces" in (message := capsys.readouterr().err) and "than --init-from" in message
    write_pair(tmp_path / "pair", vocabulary)
    (tmp_path / "pair" / "gen.pt").write_bytes((tmp_path / "run" / "gen.pt").read_bytes())
    assert main(command("other", init_from=tmp_path / "pair")) == 2
    assert "expected files of one run" in capsys.readouterr().err


def test_a_run_folder_with_any_name_can_be_resumed(command, tmp_path, monkeypatch):
    name = "emoji \U0001f600 \"quoted\" back\\slash"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command(name))
    assert main(command(name)) == 0
    assert (tmp_path / name / "checkpoint-8.pt").exists()
