"""studies/search.py and studies/space.py: designs, samplers, trials that are stopped, killed, pruned or fail; bad input."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import studies.search
from Pretraining import QUICKSTART, Pretraining
from studies.compute import training_flops
from studies.search import main
from studies.space import planned_steps, read_space, resolve, to_flags
from utils import InputError, flat, read_settings

ROOT = Path(__file__).parent.parent
# Pretraining without training: the loss is a function of the learning rate and the seed, known without running it.
SCRIPT = '''
import json, os, signal, sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1:], [*sys.argv[2:], ""]))
folder = Path(flags["--output"])
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "starts.txt", "a") as file:
    file.write("start\\n")
starts = len((folder / "starts.txt").read_text().splitlines())
(folder / "init.txt").write_text(flags.get("--init-from", ""))
batch, steps, rate = int(flags["--batch-size"]), int(flags["--steps"]), float(flags["--learning-rate"])
decay = float(flags.get("--weight-decay", 0))
if decay == 0.5:
    sys.exit("error: this trial can't work") if starts > 9 else (print("error: this trial can't work"), sys.exit(2))
if decay == 0.25 or (decay == 0.125 and starts == 1):
    os.kill(os.getpid(), signal.SIGKILL)
def save(*_):
    (folder / "saved.txt").write_text("saved")
    sys.exit(128 + signal.SIGTERM)
signal.signal(signal.SIGTERM, save)
if os.environ.get("SLOW") and starts == 1:
    time.sleep(float(os.environ["SLOW"]))
(folder / "config.toml").write_text(f"batch_size = {batch}\\nmax_length = 16\\nsteps = {steps}\\n")
(folder / "checkpoint-1.pt").write_text("")
(folder / "disc.pt").write_text("")
every = int(flags.get("--eval-every", steps))
with open(folder / "metrics.jsonl", "a") as file:
    for step in [*range(0, steps, every), steps]:
        loss = 100 * abs(rate - 0.01) + int(flags["--seed"]) + (steps - step)
        file.write(json.dumps({"step": step, "heldout": True, "mlm_loss": loss, "disc_auc": 0.75}) + "\\n")
        file.flush()
        if 0 < step < steps:
            time.sleep(0.4)
'''
FINETUNING = '''
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1:], [*sys.argv[2:], ""]))
folder = Path(flags["--output"])
folder.mkdir(parents=True, exist_ok=True)
first, count = int(flags.get("--seed", 0)), int(flags.get("--seeds", 1))
runs = [{"task": flags["--task"], "seed": seed, "scores": {"spearman": 0.5 + seed / 10}, "settings": {}, "source": "",
         "train_rows": 1, "skipped_rows": 0, "dev_rows": {}, "device": "cpu", "seconds": 1.0}
        for seed in range(first, first + count)]
(folder / "results.json").write_text(json.dumps({"runs": runs}))
'''
SPACE = """
metric = "mlm_loss"
report = ["disc_auc"]
[fixed]
steps = 10
batch_size = 4
learning_rate = 0.01
[settings]
learning_rate = [0.01, 0.03, 0.05]
batch_size = [4, 8]
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Scripts of a moment in place of the real ones, and a search that looks at its trials often."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "Pretraining.py").write_text(SCRIPT)
    (folder / "Finetuning.py").write_text(FINETUNING)
    monkeypatch.setattr(studies.search, "ROOT", folder)
    monkeypatch.setattr(studies.search, "POLL_S", 0.02)
    monkeypatch.setattr(studies.search, "REFRESH_S", 0.1)
    return folder


@pytest.fixture
def search(tmp_path, scripts):
    """Runs a search over a space given as text; returns its exit code."""
    def run(text=SPACE, *flags):
        path = tmp_path / "space.toml"
        path.write_text(text)
        return main([str(path), "--output", str(tmp_path / "study"), *map(str, flags)])
    return run


@pytest.fixture
def start_search(tmp_path, scripts):
    """Starts a search in a process of its own."""
    program = ("import sys; from pathlib import Path; import studies.search as search; "
               f"search.ROOT = Path({str(scripts)!r}); search.POLL_S = 0.02; search.REFRESH_S = 0.1; "
               "sys.exit(search.main(sys.argv[1:]))")
    processes = []

    def start(text=SPACE, slow=""):
        path = tmp_path / "space.toml"
        path.write_text(text)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLOW": slow}
        processes.append(subprocess.Popen([sys.executable, "-c", program, str(path), "--output", str(tmp_path / "study")],
                                          env=environment, start_new_session=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return processes[-1]
    yield start
    for process in processes:
        process.kill()
        process.communicate()


def space_of(tmp_path, text):
    (tmp_path / "space.toml").write_text(text)
    return read_space(tmp_path / "space.toml")


def results(tmp_path):
    path = tmp_path / "study" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts(tmp_path):
    """How often each trial was started."""
    return {path.parent.name: len(path.read_text().splitlines())
            for path in sorted((tmp_path / "study" / "trials").glob("*/starts.txt"))}


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Designs

def test_one_factor_design_is_the_base_and_single_changes_seed_by_seed(tmp_path):
    space = space_of(tmp_path, "repeats = 2\nbase_repeats = 3\n" + SPACE + """
size = [{ name = "small", model.hidden_size = 64, model.heads = 2 }, { name = "large", model.hidden_size = 256 }]
[[pairs]]
learning_rate = [0.01, 0.05]
batch_size = [8]
[[pairs]]
learning_rate = [0.05]
batch_size = [8]
""")
    changes = [{}, {"learning_rate": 0.03}, {"learning_rate": 0.05}, {"batch_size": 8}, {"size": "small"}, {"size": "large"},
               {"learning_rate": 0.05, "batch_size": 8}]  # the base's own values are no changes
    assert [(each.levels, each.seed) for each in space.assignments()] == [
        *((levels, seed) for seed in (0, 1) for levels in changes), ({}, 2)]
    assert space.trial_settings({"size": "small"})["model.hidden_size"] == 64
    assert space.varied_values({"batch_size": 8}) == {"learning_rate": 0.01, "batch_size": 8, "model.hidden_size": 128,
                                                      "model.heads": 4}


def test_a_table_of_settings_that_equals_the_base_names_it(tmp_path):
    space = space_of(tmp_path, SPACE + 'size = [{ name = "128 wide" }, { name = "64 wide", model.hidden_size = 64 }]')
    assert space.varied_values({})["size"] == "128 wide"
    assert space.varied_values({"size": "64 wide"})["size"] == "64 wide"
    assert len(space.assignments()) == 2 * (1 + 2 + 1 + 1)


def test_grid_is_all_combinations(tmp_path):
    space = space_of(tmp_path, 'sampler = "grid"\nrepeats = 1\nfirst_seed = 7\n' + SPACE)
    assert sorted((each.levels["learning_rate"], each.levels["batch_size"], each.seed) for each in space.assignments()) == [
        (rate, size, 7) for rate in (0.01, 0.03, 0.05) for size in (4, 8)]


def test_equal_tokens_set_the_steps(tmp_path):
    space = space_of(tmp_path, "tokens = 8_000\n" + SPACE.replace("steps = 10", "max_length = 8") +
                     'length = [{ name = "long", max_length = 16 }, { name = "few", steps = 3 }, '
                     '{ name = "cheap", flops = 1e12 }]')
    assert space.resolve({}).steps == 8000 / (4 * 8)
    assert space.resolve({"batch_size": 8}).steps == 8000 / (8 * 8)
    assert space.resolve({"length": "long"}).steps == 8000 / (4 * 16)
    assert space.resolve({"length": "few"}).steps == 3
    cheap = space.resolve({"length": "cheap"})
    assert planned_steps(cheap) == round(1e12 / (4 * training_flops(cheap.model, 8, 1)))
    space = space_of(tmp_path, SPACE + 'length = [{ name = "cheap", flops = 1e12 }]\n[first]\nsteps = 7\nmax_length = 6')
    first = space.resolve_first({"length": "cheap", "batch_size": 8})
    assert (planned_steps(first), first.batch_size, first.max_length) == (7, 8, 6)


def test_flags_give_the_settings_that_were_checked():
    values = {"corpus": ["a b.txt", "c.txt"], "compile": True, "resume": False, "learning_rate": 2e-3, "steps": 7,
              "model.hidden_size": 64, "examples": "line"}
    assert flat(read_settings(Pretraining, to_flags(values), QUICKSTART)) | {"config": ""} == flat(
        resolve("Pretraining.py", values)) | {"config": "", "corpus": ("a b.txt", "c.txt")}


@pytest.mark.parametrize("path", sorted((ROOT / "studies" / "spaces").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_spaces_can_run(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    space = read_space(path)
    assert len(space.assignments()) > 1 or space.sampler in ("random", "tpe")


def test_the_readmes_space_is_one(tmp_path):
    text = re.search(r"```toml\n(.*?)```", (ROOT / "studies" / "README.md").read_text(), re.DOTALL)[1]
    space = space_of(tmp_path, text)
    assert len(space.assignments()) == 5 + 2 * (2 + 1 + 2)
    uncommented = text.replace("# weight", "weight").replace('"one-factor"', '"random"').split("[[pairs]]")[0]
    assert space_of(tmp_path, uncommented).factors["weight_decay"].low == 1e-3


@pytest.mark.parametrize("text, message", [
    ("metric = \n", "can't be read as TOML"),
    (SPACE.replace("steps = 10", "stepps = 10"), "unknown setting 'stepps', did you mean 'steps'"),
    (SPACE + "model.hiden_size = [1, 2]", "unknown setting 'model.hiden_size', did you mean 'model.hidden_size'"),
    (SPACE.replace("[0.01, 0.03", "[-0.01, 0.03"), "learning_rate = -0.01 must be above 0"),
    (SPACE.replace("batch_size = 4", 'batch_size = "4"'), "batch_size = '4'"),
    (SPACE.replace("steps = 10", 'output = "runs/x"'), "output is set by the search"),
    (SPACE.replace('metric = "mlm_loss"', ""), "metric is missing"),
    (SPACE.replace("metric", "metrik"), "unknown key 'metrik', did you mean 'metric'"),
    (SPACE.replace("[4, 8]", "[]"), "expected a list of values or a table with low and high"),
    (SPACE.replace("[4, 8]", "[4, 8, 4]"), "batch_size has a value twice"),
    (SPACE + 'corpus = [["a.txt"], ["b.txt"]]', "corpus has a list among its values"),
    (SPACE.replace("[4, 8]", "{ low = 4, high = 8 }"), "one-factor needs a list of values"),
    ('sampler = "random"\n' + SPACE.replace("[4, 8]", "{ low = 9, high = 8 }"), "expected low < high"),
    ('sampler = "tpe"\n' + SPACE.replace("[4, 8]", "{ low = 0, high = 8 }"), "batch_size = 0 must be at least 1"),
    (SPACE + "model.hidden_size = [128, 130]", "model.hidden_size = 130: model.hidden_size = 130 must be a multiple"),
    (SPACE + "[[pairs]]\nlearning_rate = [0.01]\nclip_norm = [1.0]", "expected two of learning_rate, batch_size"),
    ('sampler = "tpe"\n' + SPACE.replace("[4, 8]", "{ low = 4, high = 8 }") +
     "[[pairs]]\nlearning_rate = [0.01]\nbatch_size = [4]", 'pairs needs sampler = "one-factor"'),
    (SPACE + "[[pairs]]\nlearning_rate = [0.02]\nbatch_size = [8]", "learning_rate = [0.02]: expected a list of values"),
    ("prune_at = [1.5]\n" + SPACE, "prune_at must be shares between 0 and 1"),
    (SPACE + '[[finetuning]]\ntask = "stsb"\nepoch = 3', "unknown setting 'epoch', did you mean 'epochs'"),
    (SPACE.replace("[fixed]", '[fixed]\nconfig = "nowhere.toml"'), "'nowhere.toml' can't be read"),
    (SPACE + "[first]\nmax_length = 8", "[first]: steps is missing"),
    (SPACE + "[first]\nsteps = 8\nmax_length = 4096", "[first], learning_rate = 0.01: max_length = 4096 is beyond"),
    (SPACE + "[first]\nsteps = 8\nobjective = 'mlm'", "[first]: objective can't differ from the trial's"),
    (SPACE + "[first]\nsteps = 8\nmodel.layers = 1", "[first]: model.layers can't differ from the trial's"),
])
def test_bad_spaces_are_refused_with_the_key(tmp_path, text, message):
    with pytest.raises(InputError, match=r"space\.toml") as error:
        space_of(tmp_path, text)
    assert message in str(error.value)


# Trials

def test_results_are_one_line_a_trial_and_the_same_command_goes_on(tmp_path, search, capsys):
    text = "repeats = 1\ntokens = 640\n" + SPACE.replace("steps = 10\n", "max_length = 16\n")
    assert search(text, "--trials", 2) == 0
    assert len(results(tmp_path)) == 2
    assert search(text) == 0
    lines = results(tmp_path)
    assert [(line["levels"], line["seed"]) for line in lines] == [
        ({}, 0), ({"learning_rate": 0.03}, 0), ({"learning_rate": 0.05}, 0), ({"batch_size": 8}, 0)]
    assert [line["scores"] for line in lines] == [
        {"mlm_loss": pytest.approx(loss), "disc_auc": 0.75} for loss in (0.0, 2.0, 4.0, 0.0)]
    last = lines[-1]
    assert (last["steps"], last["tokens"], last["state"]) == (640 / (8 * 16), 640, "complete")
    assert last["settings"] == {"learning_rate": 0.01, "batch_size": 8} and last["flops"] > 0 and last["seconds"] > 0
    assert set(starts(tmp_path).values()) == {1}
    assert "best mlm_loss: 0, mean of 1 seeds" in capsys.readouterr().out


def test_a_search_of_a_small_design_ends_before_its_limit(tmp_path, search):
    assert search(SPACE, "--trials", 100) == 0
    assert len(results(tmp_path)) == len(starts(tmp_path)) < 100


def test_a_design_gains_and_loses_trials(tmp_path, search):
    assert search(SPACE, "--trials", 3) == 0
    text = "repeats = 1\nbase_repeats = 2\n" + SPACE.replace("[0.01, 0.03, 0.05]", "[0.01, 0.02, 0.03]")
    assert search(text) == 0
    assert sorted((json.dumps(line["levels"]), line["seed"]) for line in results(tmp_path)) == sorted([
        ("{}", 0), ('{"learning_rate": 0.03}', 0), ('{"learning_rate": 0.05}', 0),  # run before
        ("{}", 1), ('{"learning_rate": 0.02}', 0), ('{"batch_size": 8}', 0)])
    assert set(starts(tmp_path).values()) == {1}


@pytest.mark.parametrize("before, after, message", [
    ("steps = 10", "steps = 11", "fixed = "),
    ('"small", model.hidden_size = 64', '"small", model.hidden_size = 32', "size 'small' = {'model.hidden_size': 64, "),
    ("weight_decay = 0.01", "weight_decay = 0.02", "weight_decay = 0.01, now it is 0.02"),  # in the configuration
])
def test_another_space_in_the_folder_is_refused(tmp_path, search, capsys, before, after, message):
    config = tmp_path / "config.toml"
    config.write_text("weight_decay = 0.01")
    text = (SPACE.replace("[fixed]", f'[fixed]\nconfig = "{config}"') +
            'size = [{ name = "small", model.hidden_size = 64, model.heads = 2 }]')
    assert search(text, "--trials", 1) == 0
    assert search(text, "--trials", 1) == 0
    config.write_text(config.read_text().replace(before, after))
    assert search(text.replace(before, after), "--trials", 1) == 2
    error = capsys.readouterr().err
    assert message in error and "choose another --output" in error


def test_a_study_of_a_version_without_first_goes_on(tmp_path, search):
    assert search(SPACE, "--trials", 1) == 0
    saved = tmp_path / "study" / "space.toml"
    assert "[first]\n" in saved.read_text()
    saved.write_text(saved.read_text().replace("[first]\n", ""))
    assert search(SPACE, "--trials", 2) == 0
    assert len(results(tmp_path)) == 2
    assert search(SPACE + "[first]\nsteps = 7", "--trials", 3) == 2


def test_a_database_can_hold_the_study(tmp_path, search, capsys):
    assert search(SPACE, "--trials", 2, "--storage", f"sqlite:///{tmp_path}/study.db") == 0
    assert len(results(tmp_path)) == 2 and not (tmp_path / "study" / "journal.log").exists()
    assert search(SPACE, "--storage", "nosuchdatabase://x") == 2
    assert "--storage nosuchdatabase://x can't be opened" in capsys.readouterr().err


def test_failures_are_recorded_and_not_retried_until_asked(tmp_path, search):
    text = "repeats = 1\n" + SPACE + "weight_decay = [0.5, 0.25, 0.125]"
    assert search(text) == 0
    states = {line["levels"].get("weight_decay"): (line["state"], line.get("error")) for line in results(tmp_path)}
    assert states[0.5] == ("failed", "exit code 2: error: this trial can't work")
    assert states[0.25][0] == "failed" and "exit code -9" in states[0.25][1]
    assert states[0.125] == ("complete", None)
    counts = starts(tmp_path)
    assert [count for name, count in counts.items() if "weight_decay" in name] == [1, studies.search.ATTEMPTS, 2]
    assert search(text) == 0
    assert starts(tmp_path) == counts
    assert search(text, "--retry-failed") == 0
    assert sum(starts(tmp_path).values()) == sum(counts.values()) + 1 + studies.search.ATTEMPTS


def test_a_search_whose_first_trials_all_fail_stops(tmp_path, search, capsys):
    text = SPACE.replace("[fixed]", "[fixed]\nweight_decay = 0.5")
    assert search(text) == 2
    assert len(results(tmp_path)) == studies.search.FAILURES_AT_FIRST
    error = capsys.readouterr().err
    assert "this trial can't work" in error and "--retry-failed" in error


def test_a_metric_that_no_trial_has_is_named(tmp_path, search, capsys):
    assert search(SPACE.replace('"mlm_loss"', '"mlm_los"')) == 2
    assert "the metric mlm_los is not among the scores of a trial, mlm_loss, disc_auc" in capsys.readouterr().err
    assert len(results(tmp_path)) == 1


@pytest.mark.parametrize("keep, left", [("metrics", set()), ("networks", {"disc.pt"}),
                                        ("all", {"disc.pt", "checkpoint-1.pt"})])
def test_what_is_kept_of_a_trial(tmp_path, search, keep, left):
    assert search(f'keep = "{keep}"\n' + SPACE, "--trials", 1) == 0
    folder = next((tmp_path / "study" / "trials").iterdir())
    assert {path.name for path in folder.glob("*.pt")} == left
    assert (folder / "metrics.jsonl").is_file() and (folder / "log.txt").is_file()


def test_fine_tuning_after_pretraining_gives_scores(tmp_path, search):
    text = 'repeats = 1\nmetric = "stsb_spearman"\ndirection = "maximize"\n' + SPACE.replace('metric = "mlm_loss"', "")
    assert search(text + '[[finetuning]]\ntask = "stsb"\nseeds = 3', "--trials", 1) == 0
    scores = results(tmp_path)[0]["scores"]
    assert scores == {"mlm_loss": 0.0, "disc_auc": 0.75, "stsb_spearman": pytest.approx((0.5 + 0.6 + 0.7) / 3)}


def test_finetuning_itself_can_be_searched(tmp_path, search):
    text = """
script = "Finetuning.py"
sampler = "random"
metric = "rte_spearman"
direction = "maximize"
[fixed]
task = "rte"
[settings]
learning_rate = { low = 1e-5, high = 1e-3, log = true }
epochs = { low = 2, high = 5 }
"""
    assert search(text, "--trials", 8, "--jobs", 2) == 0
    lines = results(tmp_path)
    assert len(lines) == 8 and sorted(line["scores"]["rte_spearman"] for line in lines) == [0.5] * 4 + [0.6] * 4
    assert all(1e-5 <= line["levels"]["learning_rate"] <= 1e-3 for line in lines)
    assert all(line["levels"]["epochs"] in range(2, 6) for line in lines)
    seeds = {}
    for line in lines:
        seeds.setdefault(line["levels"]["learning_rate"], []).append(line["seed"])
    assert sorted(map(sorted, seeds.values())) == [[0, 1]] * 4  # each draw with both seeds


def test_tpe_comes_nearer_to_the_optimum_than_random(tmp_path, search):
    distances = {}
    for sampler in ("random", "tpe"):
        text = f"""
sampler = "{sampler}"
metric = "mlm_loss"
repeats = 1
[fixed]
steps = 1
batch_size = 1
[settings]
learning_rate = {{ low = 1e-4, high = 1.0, log = true }}
"""
        assert search(text, "--trials", 24, "--jobs", 2) == 0
        late = [line["levels"]["learning_rate"] for line in results(tmp_path) if line["trial"] >= 12]
        distances[sampler] = sum(abs(math.log10(rate / 0.01)) for rate in late) / len(late)
        (tmp_path / "study").rename(tmp_path / sampler)
    assert distances["tpe"] < 0.6 * distances["random"]


def test_bad_trials_are_pruned(tmp_path, search):
    text = "prune_at = [0.5]\nrepeats = 1\n" + SPACE.replace("[0.01, 0.03, 0.05]", "[0.02, 0.03, 0.04, 0.05, 0.9]")
    assert search(text) == 0
    lines = results(tmp_path)
    pruned = [line for line in lines if line["state"] == "pruned"]
    # The pruner compares with the median of at least five trials; a trial that ends at once can't be pruned any more.
    assert [line["levels"] for line in pruned] == [{"learning_rate": 0.9}]
    assert pruned[0]["steps"] == 5 and pruned[0]["scores"]["mlm_loss"] == pytest.approx(89 + 5)
    assert search(text) == 0 and len(results(tmp_path)) == len(lines)


def test_draws_that_cannot_work_are_drawn_again(tmp_path, search, capsys):
    text = ('sampler = "random"\nrepeats = 1\n' + SPACE.replace("[settings]", "model.generator_size = 1.0\n[settings]") +
            "model.heads = [4, 8]\nmodel.hidden_size = [128, 36]\n")
    assert search(text, "--trials", 8) == 0
    sizes = [(line["levels"]["model.hidden_size"], line["levels"]["model.heads"]) for line in results(tmp_path)]
    assert {(128, 4), (128, 8), (36, 4)} >= set(sizes)  # 36 is no multiple of 8
    assert 0 < len(sizes) < 8


def test_each_job_has_its_share_of_cores_and_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    settings = studies.search.Search("space.toml", jobs=4)
    environments = [studies.search.job_environment(settings, slot) for slot in range(4)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["2", "3", "2", "3"]
    assert {each["OMP_NUM_THREADS"] for each in environments} == {"4"}


def test_samplers_need_an_end(search, capsys):
    assert search('sampler = "random"\n' + SPACE) == 2
    assert "set --trials or --minutes" in capsys.readouterr().err


# Processes

def test_two_processes_share_a_study_and_a_dead_ones_trial_is_taken_over(tmp_path, start_search):
    first = start_search(slow="1000")
    wait_for(lambda: starts(tmp_path))
    second = start_search()
    wait_for(lambda: len(results(tmp_path)) == 7)  # all but the one that the first process holds
    first.kill()  # its subprocess goes on and still holds the trial
    first.wait()
    time.sleep(0.5)
    assert len(results(tmp_path)) == 7 and second.poll() is None
    slow = tmp_path / "study" / "trials" / "0000-base-seed=0"
    for pid in processes_of(slow):
        os.kill(pid, signal.SIGKILL)
    assert second.wait(60) == 0
    assert len(results(tmp_path)) == 8
    assert {name: count for name, count in starts(tmp_path).items() if count != 1} == {slow.name: 2}


def processes_of(folder):
    """The processes of the trial in this folder, which names it on its command line."""
    table = subprocess.run(["ps", "-wweo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in table.splitlines() if str(folder) in line]


def test_a_stopped_search_saves_its_trial_and_goes_on_with_it(tmp_path, start_search):
    process = start_search("repeats = 1\n" + SPACE, slow="1000")
    wait_for(lambda: starts(tmp_path))
    time.sleep(0.5)  # until the trial can receive the signal
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches all processes of the group
    assert process.wait(60) == 130
    assert b"SIGINT: saved the running trials; run the same command again to resume" in process.stdout.read()
    assert not results(tmp_path)
    folder = next((tmp_path / "study" / "trials").iterdir())
    assert (folder / "saved.txt").is_file()
    again = start_search("repeats = 1\n" + SPACE)
    assert again.wait(60) == 0
    assert len(results(tmp_path)) == 4
    assert starts(tmp_path) == {name: 2 if name == folder.name else 1 for name in starts(tmp_path)}


def test_the_run_before_a_trial_is_resumed_and_counted(tmp_path, search):
    text = """
repeats = 1
metric = "mlm_loss"
[fixed]
steps = 10
batch_size = 4
max_length = 16
learning_rate = 0.01
init_from = "runs/x"
[first]
steps = 7
batch_size = 2
[settings]
weight_decay = [0.01, 0.125]
"""
    assert search(text, "--set", "first.steps=5") == 0
    assert [(line["state"], line["steps"], line["tokens"]) for line in results(tmp_path)] == [
        ("complete", 10 + 5, 10 * 4 * 16 + 5 * 2 * 16)] * 2
    base, changed = sorted((tmp_path / "study" / "trials").iterdir())
    # With this weight decay each of the two runs is killed once.
    assert [len((folder / "starts.txt").read_text().splitlines())
            for folder in (base / "first", base, changed / "first", changed)] == [1, 1, 2, 2]
    assert [(folder / "init.txt").read_text() for folder in (base / "first", base)] == ["runs/x", str(base / "first")]


# The real scripts

def test_a_real_trial_is_ordinary_run_folders(tmp_path, command, glue):
    flags = command()
    settings = {name.strip("-").replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    fixed = "\n".join(f"{name} = {value if value[0].isdigit() else json.dumps(value)}" for name, value in settings.items()
                      if name != "output")
    (tmp_path / "space.toml").write_text(f"""
metric = "stsb_spearman"
direction = "maximize"
repeats = 1
keep = "networks"
[fixed]
{fixed}
[first]
steps = 2
max_length = 12
batch_size = 12
[settings]
learning_rate = [1e-3, 2e-3]
[[finetuning]]
task = "stsb"
epochs = 1
max_length = 24
data_dir = "{glue}"
""")
    assert main([str(tmp_path / "space.toml"), "--output", str(tmp_path / "study"), "--trials", "1"]) == 0
    line = results(tmp_path)[0]
    folder = next((tmp_path / "study" / "trials").iterdir())
    metrics = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert line["scores"]["mlm_loss"] == metrics[-1]["mlm_loss"] and metrics[-1]["step"] == 8
    assert (line["steps"], line["tokens"]) == (2 + 8, 2 * 12 * 12 + 8 * 6 * 24)
    assert -1 <= line["scores"]["stsb_spearman"] <= 1
    assert {path.name for path in folder.glob("*.pt")} == {"gen.pt", "disc.pt"}
    assert {path.name for path in (folder / "first").glob("*.pt")} == {"gen.pt", "disc.pt"}
    first, last = (resolve("Pretraining.py", {"config": str(path / "config.toml")}) for path in (folder / "first", folder))
    assert (first.max_length, first.init_from, last.max_length, last.init_from) == (12, None, 24, str(folder / "first"))
    model = last.model  # steps of so many examples; of 24 tokens 15% are chosen, of 12 likewise
    assert line["flops"] == 8 * 6 * training_flops(model, 24, 4) + 2 * 12 * training_flops(model, 12, 2)
