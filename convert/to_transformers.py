"""A pretraining run, gen.pt, disc.pt, mlm.pt or a fine-tuned model.pt to model folders that transformers loads.

    python -m convert.to_transformers runs/quickstart exported  # exported/generator and exported/discriminator
    python -m convert.to_transformers runs/quickstart/glue/mrpc/seed-0/model.pt paraphrase
"""

import json
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from convert.names import (TIED, classifier_to_transformers, config_to_transformers, to_transformers,
                           token_classifier_to_transformers)
from convert.vocabulary import TOKENIZER_FILES
from dataset import SPECIAL_TOKENS, Vocabulary
from model import CLASSIFIERS, NETWORK_FILES, SavedNetwork, load_network
from studies.objectives import OBJECTIVES, Untied
from studies.tracking import read_metrics
from tasks.glue import saved_task
from tasks.results import markdown_table
from tasks.task import Task
from utils import InputError, replacing, reports_input_errors, require, write_text

COMMAND = "convert.to_transformers"
MODEL_CARD = Path(__file__).with_name("model_card.md")
CLASSES = {"generator": "ForMaskedLM", "mlm": "ForMaskedLM", "discriminator": "ForPreTraining",
           "classifier": "ForSequenceClassification", "token classifier": "ForTokenClassification"}
PIPELINES = {"generator": "fill-mask", "mlm": "fill-mask", "discriminator": "feature-extraction",
             "classifier": "text-classification", "token classifier": "token-classification"}
REPORT_COLUMNS = ["mlm_loss", "mlm_accuracy", "sampled_accuracy", "large_mlm_loss", "disc_loss", "disc_precision",
                  "disc_recall", "disc_auc"]


@dataclass(frozen=True)
class ToTransformers:
    """Writes model folders that transformers loads."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN|FILE.pt")]
    """Run folder, or one of its weights files (gen.pt, disc.pt, mlm.pt), or a fine-tuned model.pt."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """For a run: gets generator/, discriminator/ or mlm/. For a file: becomes the model folder."""


class ExportedModel(NamedTuple):
    """What a model folder is to hold."""

    texts: dict[str, str]  # by file name
    weights: dict[str, Tensor]  # of model.safetensors


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = tyro.cli(ToTransformers, args=argv, prog=f"python -m {COMMAND}")
    source, target = settings.source, settings.folder
    if source.is_dir():
        contents = {target / kind: model_folder(saved, source) for kind, saved in read_run(source).items()}
    else:
        contents = {target: model_folder(load_network(source, list(CLASSES), COMMAND), source.parent)}
    for folder, content in contents.items():
        foreign = {path.name for path in folder.glob("[!.]*")} - {*content.texts, "model.safetensors"}
        require(not foreign, f"{folder} holds {', '.join(sorted(foreign))[:200]}, which this command did not write: "
                             "choose another folder")
    # Everything has been read and checked; only now are folders made.
    for folder, content in contents.items():
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in content.texts.items():
            write_text(folder / name, text)
        with replacing(folder / "model.safetensors") as temporary:
            safetensors.torch.save_file(content.weights, temporary, {"format": "pt"})
        print(f"exported: {folder}")
    return 0


def read_run(run: Path) -> dict[str, SavedNetwork]:
    """The networks of a run folder by kind; InputError if its objective has others or they were not saved together."""
    kinds = [kind for kind, file in NETWORK_FILES.items() if (run / file).is_file()]
    objective = run_settings(run).get("objective", "electra")
    if (run / "config.toml").is_file():
        require(objective in OBJECTIVES, f"{run / 'config.toml'} has the unknown objective {objective!r}: restore it")
        kinds = OBJECTIVES[objective].networks
    require(bool(kinds), f"{run} has none of {', '.join(NETWORK_FILES.values())}: {COMMAND} expects the folder of a run")
    networks = {kind: load_network(run / NETWORK_FILES[kind], [kind], COMMAND) for kind in kinds}
    require(len({saved.tokenizer for saved in networks.values()}) == 1,
            f"the networks in {run} have different vocabularies: expected files of one run")
    first, *others = (saved.network.encoder.embeddings.state_dict() for saved in networks.values())
    same = all(torch.equal(first[name], other[name]) for other in others for name in first)
    require(same or issubclass(OBJECTIVES[objective], Untied),
            f"the networks in {run} were saved at different steps: let the run save all and repeat this command")
    return networks


def run_settings(run: Path) -> dict[str, Any]:
    """The content of a run's config.toml; empty if there is none."""
    config = run / "config.toml"
    try:
        return tomllib.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError as error:
        raise InputError(f"{config} is not as Pretraining.py writes it ({error}): restore it") from None


def model_folder(saved: SavedNetwork, run: Path) -> ExportedModel:
    """A network as transformers saves it, and its model card; `run` is the folder of the weights file."""
    vocabulary = Vocabulary.of_network(saved, str(run))
    max_length = saved.config.max_positions
    if saved.kind in CLASSIFIERS:
        size = saved.config.discriminator()
        task = saved_task(saved.task, str(run))
        max_length = min(max_length, task.max_length)  # that of its training
        head_config, weights = classifier_head(saved, task)
    else:
        size = saved.config.generator() if saved.kind == "generator" else saved.config.discriminator()
        head_config, weights = {}, to_transformers(saved.network)
    config = config_to_transformers(saved.config, size) | head_config
    config |= {"architectures": [f"Electra{CLASSES[saved.kind]}"], "pad_token_id": vocabulary.pad}
    card = MODEL_CARD.read_text(encoding="utf-8").format(
        kind=saved.kind, suffix=CLASSES[saved.kind], pipeline=PIPELINES[saved.kind], max_length=max_length,
        millions=sum(weight.numel() for weight in saved.network.parameters()) / 1e6, pieces=vocabulary.size,
        case=vocabulary.case_note, report=saved.report or pretraining_report(run))
    texts = tokenizer_files(vocabulary, max_length) | {"config.json": json.dumps(config, indent=2), "README.md": card}
    # safetensors takes no tensors that share memory. transformers ties the output table again when it loads.
    return ExportedModel(texts, {name: weight.clone() for name, weight in weights.items() if name != TIED})


def classifier_head(saved: SavedNetwork, task: Task) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A classifier's additions to config.json and its weights; a real label is on the task's own scale."""
    labels = dict(enumerate(task.classes or [task.label]))
    outputs = len(saved.network.prediction.bias)
    require(len(labels) == outputs, f"the classifier has {outputs} outputs, expected the {len(labels)} of {task.name}")
    config = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
    if saved.kind == "token classifier":
        return config, token_classifier_to_transformers(saved.network)
    size = saved.config.hidden_size
    require(2 * outputs <= size, f"the classifier has {outputs} outputs, expected at most {size // 2} with a hidden size of "
                                 f"{size}: transformers' dense layer has no room for more")
    config |= {"problem_type": "single_label_classification" if task.classes else "regression",
               "classifier_dropout": 0.0}  # transformers would apply it to the outputs, which its dense layer holds
    return config, classifier_to_transformers(saved.network, *task.scale)


def tokenizer_files(vocabulary: Vocabulary, max_length: int) -> dict[str, str]:
    """Files, by name, from which transformers' tokenizers give the vocabulary's ids.

    They put [CLS] and [SEP] around one or two texts and truncate to `max_length`. For them "[MASK]" in a text is the
    mask, which for the vocabulary is text. Only word pieces have a vocab.txt: it says all of such a vocabulary but its
    treatment of case, and nothing of another's scores or merges.
    """
    tokenizer = Tokenizer.from_str(vocabulary.to_json())
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary.sep), ("[CLS]", vocabulary.cls))
    is_wordpiece = isinstance(tokenizer.model, models.WordPiece)
    if is_wordpiece and tokenizer.decoder is None:
        tokenizer.decoder = decoders.WordPiece()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length,
                "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings |= {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    steps = tokenizer.normalizer
    for step in steps if isinstance(steps, normalizers.Sequence) else [steps]:
        if isinstance(step, normalizers.BertNormalizer):  # ElectraTokenizer builds one like it from these settings
            settings |= {"do_lower_case": step.lowercase, "strip_accents": step.strip_accents,
                         "tokenize_chinese_chars": step.handle_chinese_chars}
    texts = (tokenizer.to_str(pretty=True), "\n".join(vocabulary.pieces()) + "\n", json.dumps(settings, indent=1))
    files = dict(zip(TOKENIZER_FILES, texts, strict=True))
    return files if is_wordpiece else {name: text for name, text in files.items() if name != "vocab.txt"}


def pretraining_report(run: Path) -> str:
    """Corpus, held-out metrics and settings of a run, in Markdown; empty without its config.toml and metrics.jsonl."""
    config, metrics = run / "config.toml", run / "metrics.jsonl"
    if not (config.is_file() and metrics.is_file()):
        return ""
    settings = run_settings(run)
    try:
        corpus = ", ".join(Path(path).name for path in settings["corpus"])
        records = [record for record in read_metrics(metrics) if record["heldout"]]
        columns = [name for name in REPORT_COLUMNS if any(name in record for record in records)]
        rows = []
        for record in records:
            values = [f"{record[name]:.4f}" if name in record else "" for name in columns]
            rows.append([f"{record['step']:,}", *values])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{config} or {metrics} is not as Pretraining.py writes it ({error!r}): restore it") from None
    table = markdown_table(["step", *columns], rows)
    return (f"Pretrained with the objective `{settings.get('objective', 'electra')}` (Clark et al., ICLR 2020) on "
            f"{corpus or 'docstrings of Python packages, in English'}.\n\n## On held-out text\n\n{table}\n\n"
            f"## Settings\n\n```toml\n{config.read_text(encoding='utf-8')}```")


if __name__ == "__main__":
    sys.exit(main())
