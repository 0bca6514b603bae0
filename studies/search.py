"""A space of settings in (studies/spaces/*.toml); a run folder for each trial and one line of results.jsonl out.

    python -m studies.search studies/spaces/quickstart.toml --output runs/search   # the same command again resumes
    python -m studies.report runs/search

Any number of processes, on machines that share the folder, can work on one study. A trial is held by the lock of a file,
which its subprocess inherits: once both have ended, the lock is free, and any process of the study goes on with the trial.
"""

import contextlib
import fcntl
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import optuna
import torch
import tyro
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from studies.space import (ROOT, SET_BY_SEARCH, Assignment, Range, Space, check_trial, dotted, planned_steps, read_space,
                           step_flops, to_flags)
from studies.tracking import read_metrics
from tasks.results import read_results
from utils import (InputError, bounded, flat, from_table, locked, one_line, read_settings, reports_input_errors, require,
                   stop_signals, to_toml, write_text)

ATTEMPTS = 3  # of a trial whose process is killed or ends with an error that is not the user's
DRAWS = 100  # of a sampler for one trial, until the settings fit together
FAILURES_AT_FIRST = 3  # failed trials before any complete one that end the search
POLL_S = 0.2
REFRESH_S = 2.0  # between looks at what other processes have finished
LOGGED_S = 60.0  # between states of the progress bar where it goes to a file
EXTENSIBLE = {"settings", "repeats", "base_repeats", "pairs", "report", "keep"}  # what may be added to a space later
RESULTS = "results.jsonl"
PLAN = "plan.json"  # the keys of a design's trials; those that a later space no longer has are dropped


@dataclass(frozen=True)
class Search:
    """Runs the trials of a space. Run the same command again to resume, or at the same time to share the work."""

    space: Annotated[str, tyro.conf.Positional]
    """TOML file of the settings to vary, such as studies/spaces/quickstart.toml."""
    output: str | None = None
    """Folder of the study. None: runs/search/NAME, where NAME is the space's."""
    script: str | None = None
    """Pretraining.py or Finetuning.py, instead of the space's."""
    set: tuple[str, ...] = ()
    """NAME=VALUE of fixed settings, such as corpus=corpus.txt, finetuning.data_dir=data/glue or first.steps=100."""
    trials: int | None = bounded(None, at_least=1)
    """Stop when the study has so many trials. None: all of a grid or a one-factor design."""
    minutes: float = bounded(0.0, at_least=0)
    """Save the running trials and stop after so many minutes; 0: no limit."""
    jobs: int = bounded(1, at_least=1)
    """Trials that run at the same time."""
    threads: int | None = bounded(None, at_least=1)
    """CPU threads of each. None: the machine's cores shared out among the jobs."""
    storage: str | None = None
    """URL of a database for Optuna, such as postgresql://...; None: the file journal.log in the study's folder."""
    retry_failed: bool = False
    """Run the trials that failed once more."""


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = read_settings(Search, argv)
    space = read_space(Path(settings.space), settings.set, settings.script)
    require(space.is_design() or settings.trials or settings.minutes,
            f"the sampler {space.sampler} has no end of its own: set --trials or --minutes")
    output = Path(settings.output or f"runs/search/{space.name}")
    study = open_study(space, output, settings.storage, settings.retry_failed)
    received = run_trials(study, space, settings, output)
    counts = count_states(study)
    if received:
        print(f"{received[0].name}: saved the running trials; run the same command again to resume")
    print(f"{output}: " + ", ".join(f"{count} {state.lower()}" for state, count in counts.items()))
    print(best_text(read_lines(output / RESULTS)) + f"\n\nNext:\n  python -m studies.report {output}")
    return 128 + received[0] if received else 0


# The study

def open_study(space: Space, output: Path, storage: str | None, retry_failed: bool) -> optuna.Study:
    """The study in the folder, with the trials of the space's design that it didn't have. InputError if it is another's."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with locked(output / ".lock"):
        check_same_space(space, output)
        study = optuna.create_study(
            storage=open_storage(output, storage), study_name=space.name, direction=space.direction, load_if_exists=True,
            pruner=optuna.pruners.MedianPruner() if space.prune_at else optuna.pruners.NopPruner())
        newest = {trial.user_attrs.get("assignment"): trial for trial in study.get_trials(deepcopy=False)
                  if "dropped" not in trial.user_attrs}
        for assignment in space.assignments():
            if assignment.key() not in newest:
                study.enqueue_trial({}, description(space, assignment))
        for trial in newest.values():
            if retry_failed and trial.state == TrialState.FAIL:
                study.enqueue_trial(trial.params, trial.user_attrs | {"attempts": 0, "folder": folder_name(trial)})
        write_text(output / PLAN, json.dumps([assignment.key() for assignment in space.assignments()]))
        write_text(output / "base.toml", to_toml(space.resolve({})))
        write_text(output / "space.toml", to_toml(space))  # last, because check_same_space takes it for all of them
    return study


def open_storage(output: Path, url: str | None) -> optuna.storages.BaseStorage:
    """Optuna's storage in a file of the folder, or in a database; InputError if the database can't be used."""
    journal = str(output / "journal.log")
    try:
        return (optuna.storages.RDBStorage(url) if url else
                JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal))))
    except (ImportError, SQLAlchemyError) as error:
        raise InputError(f"--storage {url} can't be opened ({one_line(error)}): expected the URL of a database, such as "
                         "sqlite:///study.db, and its driver installed") from None


def check_same_space(space: Space, output: Path) -> None:
    """InputError if the folder holds the study of another space or another base; a design may have gained or lost trials."""
    if not (output / "space.toml").exists():
        return
    saved_space = from_table(Space, tomllib.loads((output / "space.toml").read_text(encoding="utf-8")),
                             str(output / "space.toml"))
    # Both in full, for an earlier version didn't write what has been added to Space since.
    saved, current = (tomllib.loads(to_toml(each)) for each in (saved_space, space))
    free = EXTENSIBLE if space.is_design() else EXTENSIBLE - {"settings"}
    compared = {name: (saved.get(name), current.get(name)) for name in sorted((saved.keys() | current.keys()) - free)}
    for name, levels in saved_space.factors.items():
        before, now = (dict(each) if isinstance(each, list) else {} for each in (levels, space.factors.get(name)))
        compared |= {f"{name} {label!r}": (before[label], now[label]) for label in before.keys() & now.keys()}
    # The configuration that the space names may have been edited.
    base, base_now = (dotted(tomllib.loads(text)) for text in
                      ((output / "base.toml").read_text(encoding="utf-8"), to_toml(space.resolve({}))))
    compared |= {name: (base.get(name), base_now.get(name)) for name in sorted(base.keys() | base_now.keys())}
    for name, (before, now) in compared.items():
        require(before == now, f"{output} holds a study with {name} = {before}, now it is {now}: restore it or choose "
                               "another --output")


def description(space: Space, assignment: Assignment) -> dict[str, Any]:
    """What Optuna keeps of a trial, so that any process can run it: who it is, all its settings, and the varied ones."""
    attributes = {"assignment": assignment.key(), "varied": space.varied_values(assignment.levels)}
    attributes |= run_description(space.resolve(assignment.levels))
    if space.first:
        attributes["first"] = run_description(space.resolve_first(assignment.levels))
    return attributes


def run_description(resolved: Any) -> dict[str, Any]:
    """All settings of a run, so that a later edit of the configuration doesn't reach the trials of this study."""
    settings = {name: value for name, value in flat(resolved).items()
                if name not in SET_BY_SEARCH and value not in (None, ())}
    return {"settings": settings, "steps": planned_steps(resolved), "step_flops": step_flops(resolved)}


def count_states(study: optuna.Study) -> dict[str, int]:
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return {state: states.count(state) for state in dict.fromkeys(states)}


# The loop

def run_trials(study: optuna.Study, space: Space, settings: Search, output: Path) -> list[signal.Signals]:
    """Runs trials until none is left, time is over or a signal comes, which it returns. Trials that run then are saved."""
    deadline = time.monotonic() + 60 * settings.minutes if settings.minutes else math.inf
    known = len(read_lines(output / RESULTS))
    jobs: dict[int, Job] = {}  # by the number of their slot, which chooses the GPU
    refreshed, unfinished, problem = -math.inf, True, ""
    interval = REFRESH_S if sys.stderr.isatty() else LOGGED_S
    with stop_signals() as received, stopped_jobs(jobs), tqdm(desc="Search", unit=" trials", mininterval=interval) as bar:
        while unfinished or jobs:  # other processes' trials are waited for, too: they are taken over if these die
            if time.monotonic() - refreshed > REFRESH_S:
                refreshed = time.monotonic()
                problem = problem_of(read_lines(output / RESULTS)[known:])
                unfinished = show_progress(bar, study, space, settings.trials, len(jobs))
                if not (received or problem):
                    start_jobs(jobs, study, space, settings, output)
            if received or problem or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
            if remove_ended(jobs):
                refreshed = -math.inf
    require(not problem, problem)
    return received


def start_jobs(jobs: "dict[int, Job]", study: optuna.Study, space: Space, settings: Search, output: Path) -> None:
    """Fills the free slots with trials, as long as there are any."""
    for slot in set(range(settings.jobs)) - jobs.keys():
        job = claim(study, space, output, settings.trials)
        if job is None:
            return
        job.start(job_environment(settings, slot))
        jobs[slot] = job


@contextlib.contextmanager
def stopped_jobs(jobs: "dict[int, Job]") -> Iterator[None]:
    """Lets the jobs that still run at the end of the block, or at an error in it, save what they have done."""
    try:
        yield
    finally:
        for job in jobs.values():
            job.stop()
        while jobs:
            time.sleep(POLL_S)
            remove_ended(jobs)


def remove_ended(jobs: "dict[int, Job]") -> bool:
    """Takes out the jobs that have ended; returns whether there were any."""
    count = len(jobs)
    for slot in list(jobs):
        job = jobs.pop(slot)  # is not put back where its results can't be read
        if not job.has_ended():
            jobs[slot] = job
    return len(jobs) < count


def show_progress(bar: tqdm, study: optuna.Study, space: Space, limit: int | None, running: int) -> bool:
    """Updates the bar with the trials of all processes. Returns whether some trial is still to be finished."""
    counts = count_states(study)
    known = sum(counts.values())
    finished = known - counts.get("RUNNING", 0) - counts.get("WAITING", 0)
    # A design has no more trials than it began with, whatever --trials says; a sampler draws until the limit.
    bar.total = min(limit or known, known) if space.is_design() else limit
    bar.set_postfix_str(f"{running} running here", refresh=False)
    bar.update(finished - bar.n)
    return bar.total is None or finished < bar.total


def job_environment(settings: Search, slot: int) -> dict[str, str]:
    """The environment of a trial: its share of the cores and, where there are several GPUs, one of them."""
    threads = settings.threads or max(1, torch.get_num_threads() // settings.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}  # for log.txt
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    if visible:
        devices = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def claim(study: optuna.Study, space: Space, output: Path, limit: int | None) -> "Job | None":
    """A trial for this process: one whose process has died, else the next one; None if there is none now."""
    with locked(output / ".claims"):
        for number, trial_id in running_trials(study).items():
            lock = hold(output / "locks" / str(number))
            if lock is None:
                continue
            if number in running_trials(study):
                return Job(study, optuna.trial.Trial(study, trial_id), lock, space, output)
            lock.close()  # its process has not died: it finished the trial a moment ago
        return claim_next(study, space, output, limit)


def running_trials(study: optuna.Study) -> dict[int, int]:
    """Optuna's internal id of each trial that has begun and not ended, by its number."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return {trial.number: trial._trial_id for trial in trials}


def claim_next(study: optuna.Study, space: Space, output: Path, limit: int | None) -> "Job | None":
    """The first trial that no process has begun, or one that the sampler draws.

    Raises InputError if many draws in a row can't work, such as heads that don't divide a width.
    """
    problems: list[str] = []
    while len(problems) < DRAWS:
        trials = study.get_trials(deepcopy=False)
        begun = sum(trial.state != TrialState.WAITING for trial in trials)
        if begun >= (limit or math.inf) or (space.is_design() and begun == len(trials)):
            return None
        # With one seed for all processes each would draw the same trials; with the number of trials none does.
        study.sampler = new_sampler(space, len(trials))
        trial = study.ask()
        if space.is_design() and trial.user_attrs["assignment"] not in json.loads((output / PLAN).read_text()):
            trial.set_user_attr("dropped", True)
            study.tell(trial, state=TrialState.FAIL)
            continue
        try:
            return Job(study, trial, hold(output / "locks" / str(trial.number)), space, output)
        except InputError as error:
            problems.append(str(error))
            study.tell(trial, state=TrialState.FAIL)
    raise InputError(f"{DRAWS} draws in a row can't work, the last one because of {problems[-1]}: narrow the space")


def hold(path: Path) -> IO | None:
    """The file with an exclusive lock on it, or None if another process holds it."""
    path.parent.mkdir(exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def new_sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    if space.sampler == "tpe":
        # The liar takes running trials for bad ones, so that processes at one time don't try the same place.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)
    return optuna.samplers.RandomSampler(seed=seed)


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """The level of each factor that the sampler draws."""
    levels = {}
    for name, factor in space.factors.items():
        if not isinstance(factor, Range):
            levels[name] = trial.suggest_categorical(name, [level.label for level in factor])
        elif factor.is_integer():
            levels[name] = trial.suggest_int(name, int(factor.low), int(factor.high), log=factor.log)
        else:
            levels[name] = trial.suggest_float(name, factor.low, factor.high, log=factor.log)
    return levels


# One trial

class Job:
    """A trial that this process holds, and the subprocess that computes it."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, lock: IO, space: Space, output: Path):
        self.study, self.trial, self.lock, self.space, self.output = study, trial, lock, space, output
        if not space.is_design() and "assignment" not in trial.user_attrs:
            describe_sampled(study, trial, space)
        levels, self.seed = json.loads(trial.user_attrs["assignment"])
        self.levels = levels
        self.folder = output / "trials" / folder_name(trial)
        self.commands = trial_commands(space, trial.user_attrs, self.seed, self.folder)
        self.stopping = self.pruned = False
        self.reported: set[int] = set()
        self.process: subprocess.Popen | None = None

    def start(self, environment: dict[str, str]) -> None:
        """Starts the first of the commands that are left."""
        self.environment = environment
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            # In a session of its own, so that Ctrl-C reaches only the search, which then stops its trials.
            self.process = subprocess.Popen(self.commands[0], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=environment, start_new_session=True, pass_fds=[self.lock.fileno()])

    def stop(self) -> None:
        """Asks the subprocess to save and end, once: the second signal would end it at once."""
        if not self.stopping and self.process.poll() is None:
            self.process.terminate()
        self.stopping = True

    def has_ended(self) -> bool:
        """Whether the trial is over or stopped; starts its next command and prunes it where it is time to."""
        status = self.process.poll()
        if status is None:
            if self.space.prune_at and not self.pruned and self.is_bad():
                self.pruned = True
                self.process.terminate()
            return False
        self.count("seconds", time.monotonic() - self.started)
        if status == 0 or self.pruned:
            self.commands.pop(0)
            if self.commands and not self.pruned and not self.stopping:
                self.start(self.environment)
                return False
            if not self.commands or self.pruned:
                self.finish("pruned" if self.pruned else "complete")
        elif not self.stopping:
            # Exit code 2 is an error of the settings or the data, which would only come again.
            if status != 2 and self.count("attempts", 1) < ATTEMPTS:
                self.start(self.environment)
                return False
            self.finish("failed", f"exit code {status}: {last_message(self.folder / 'log.txt')}")
        self.lock.close()
        return True

    def count(self, name: str, amount: float) -> float:
        """Adds to a number that the study keeps of the trial, over all processes that have run it."""
        total = self.trial.user_attrs.get(name, 0) + amount
        self.trial.set_user_attr(name, total)
        return total

    def is_bad(self) -> bool:
        """Whether the pruner ends the trial for its held-out metric at one of the shares `prune_at` of its steps."""
        steps = self.trial.user_attrs["steps"]
        for share in self.space.prune_at:
            reached = [record for record in heldout_records(self.folder) if record["step"] >= share * steps]
            percent = round(100 * share)  # the same for trials of unequal numbers of steps
            if percent in self.reported or not reached or self.space.metric not in reached[0]:
                continue
            self.reported.add(percent)
            self.trial.report(reached[0][self.space.metric], percent)
            if self.trial.should_prune():
                return True
        return False

    def finish(self, state: str, error: str | None = None) -> None:
        """Writes the trial's line of results.jsonl, tells Optuna, and deletes what the space doesn't keep."""
        scores = {} if state == "failed" else read_scores(self.space, self.folder)
        attributes = self.trial.user_attrs
        line = {"trial": self.trial.number, "study": self.space.name, "state": state, "folder": self.folder.name,
                "levels": self.levels, "seed": self.seed, "settings": attributes["varied"], "scores": scores,
                **self.cost(), "seconds": round(attributes["seconds"], 2),
                "metrics": [self.space.metric, *self.space.report], "direction": self.space.direction}
        add_line(self.output / RESULTS, line | ({"error": error} if error else {}))
        value = scores.get(self.space.metric)
        if state == "failed":
            self.study.tell(self.trial, state=TrialState.FAIL)
        elif state == "pruned" or value is None:  # without a value Optuna has no other name for it
            self.study.tell(self.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(self.trial, value)
        if state != "failed":  # --retry-failed goes on from its checkpoint
            tidy(self.folder, self.space.keep)

    def cost(self) -> dict[str, float]:
        """Steps, tokens (padding counted) and FLOPs of the pretraining up to its last evaluation, the first run included."""
        records, attributes = heldout_records(self.folder), self.trial.user_attrs
        if not records:
            return {}
        runs = [attributes | {"steps": records[-1]["step"]}]
        if "first" in attributes:
            runs.append(attributes["first"])
        return {"steps": sum(run["steps"] for run in runs),
                "tokens": sum(run["steps"] * run["settings"]["batch_size"] * run["settings"]["max_length"] for run in runs),
                "flops": sum(run["steps"] * run["step_flops"] for run in runs)}


def folder_name(trial: optuna.Trial | optuna.trial.FrozenTrial) -> str:
    """Of a trial: its number and settings, or the folder of the failed trial that it goes on with."""
    own = f"{trial.number:04}-{Assignment(*json.loads(trial.user_attrs['assignment'])).name()}"
    return trial.user_attrs.get("folder", own)


def describe_sampled(study: optuna.Study, trial: optuna.Trial, space: Space) -> None:
    """Draws the settings of a trial and adds its repeats with other seeds. InputError if they don't fit together."""
    levels = suggest(trial, space)
    check_trial(space, levels, f"{space.name}.toml")
    attributes = [description(space, Assignment(levels, space.first_seed + number)) for number in range(space.repeats)]
    for repeat in attributes[1:]:
        study.enqueue_trial(levels, repeat)
    # The assignment, which comes first, is written last: a process may be killed here, and it says that all are there.
    for name, value in reversed(attributes[0].items()):
        trial.set_user_attr(name, value)


def trial_commands(space: Space, attributes: dict[str, Any], seed: int, folder: Path) -> list[list[str]]:
    """The command lines of a trial in their order: the run before it if the space has one, the script, the fine-tunings."""
    script = [sys.executable, str(ROOT / space.script)]
    own = {"output": str(folder), "seed": seed}
    settings = attributes["settings"]
    commands = []
    if "first" in attributes:
        first = str(folder / "first")
        commands.append([*script, *to_flags(own | {"output": first} | attributes["first"]["settings"])])
        # The sizes come with the weights.
        settings = {name: value for name, value in settings.items() if not name.startswith("model.")} | {"init_from": first}
    commands.append([*script, *to_flags(own | settings)])
    for task in space.finetuning:
        flags = to_flags(task | {"weights": str(folder), "output": str(folder / "finetuning")})
        commands.append([sys.executable, str(ROOT / "Finetuning.py"), *flags])
    return commands


def heldout_records(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return [record for record in read_metrics(path) if record["heldout"]] if path.is_file() else []


def read_scores(space: Space, folder: Path) -> dict[str, float]:
    """The last held-out metrics of a run folder, and TASK_METRIC, the mean over seeds, of each fine-tuning in it."""
    results = folder / "finetuning" / "results.json" if space.script == "Pretraining.py" else folder / "results.json"
    records = heldout_records(folder) if space.script == "Pretraining.py" else []
    scores = {name: value for name, value in (records[-1] if records else {}).items() if name not in ("step", "heldout")}
    values: dict[str, list[float]] = {}
    for run in read_results(results).values():
        for name, value in run.scores.items():
            values.setdefault(f"{run.task}_{name}".lower().replace(" ", "_"), []).append(value)
    scores |= {name: statistics.mean(numbers) for name, numbers in values.items()}
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def last_message(log: Path) -> str:
    """The last error in a log, or its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["no output"])[-1][:500]


def tidy(folder: Path, keep: str) -> None:
    """Deletes what the space doesn't keep of a finished trial, and the states of progress bars in its log."""
    patterns = {"metrics": "**/*.pt", "networks": "**/checkpoint-*.pt"}
    if keep in patterns:
        for path in folder.glob(patterns[keep]):
            path.unlink()
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    write_text(folder / "log.txt", "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in log.split("\n")))


# results.jsonl

def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of results.jsonl, none if there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Adds the line of a trial, unless a process that was killed had just written it."""
    with locked(path.with_name(".results")):
        lines = read_lines(path)
        if all(line["trial"] != written["trial"] for written in lines):
            write_lines(path, [*lines, line])


def add_scores(path: Path, scores: dict[str, dict[str, float]]) -> None:
    """Adds scores to complete trials, by the names of their folders."""
    with locked(path.with_name(".results")):
        lines = read_lines(path)
        for line in lines:
            if line["state"] == "complete":
                line["scores"] |= scores.get(line.get("folder", ""), {})
        write_lines(path, lines)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def problem_of(lines: list[dict[str, Any]]) -> str:
    """Why it makes no sense to go on after the first trials of a search, or nothing."""
    complete = [line for line in lines if line["state"] == "complete"]
    if len(lines) >= FAILURES_AT_FIRST and all(line["state"] == "failed" for line in lines):
        return (f"all of {len(lines)} trials failed, trial {lines[-1]['trial']} with {lines[-1]['error']!r}: correct the "
                "cause, then run the same command with --retry-failed")
    if complete and not any(line["metrics"][0] in line["scores"] for line in complete):
        return (f"the metric {complete[0]['metrics'][0]} is not among the scores of a trial, "
                f"{', '.join(complete[0]['scores'])}: correct the space and choose another --output")
    return ""


def best_text(lines: list[dict[str, Any]]) -> str:
    """The best mean over seeds and how many it was chosen from."""
    groups: dict[str, list[float]] = {}
    for line in lines:
        if line["state"] == "complete" and line["metrics"][0] in line["scores"]:
            groups.setdefault(json.dumps(line["levels"]), []).append(line["scores"][line["metrics"][0]])
    if not groups:
        return "no complete trial yet"
    pick = min if lines[0]["direction"] == "minimize" else max
    levels, values = pick(groups.items(), key=lambda item: statistics.mean(item[1]))
    return (f"best {lines[0]['metrics'][0]}: {statistics.mean(values):.4g}, mean of {len(values)} seeds, with {levels}; "
            f"of {len(groups)} combinations of settings in {sum(map(len, groups.values()))} trials")


if __name__ == "__main__":
    sys.exit(main())
