"""ELECTRA in transformers' layout, from a folder or the Hugging Face hub, to disc.pt, gen.pt and mlm.pt.

    python -m convert.from_transformers exported runs/imported                            # disc.pt and gen.pt
    python -m convert.from_transformers google/electra-small-discriminator runs/released  # disc.pt alone
    python -m convert.from_transformers exported/mlm runs/masked                          # mlm.pt

Finetuning.py and Pretraining.py call read_encoder and read_networks when they are given such a folder or name.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import safetensors.torch
import torch
import tyro
from tokenizers import Tokenizer, decoders
from torch import Tensor, nn

from convert.hub import hub_folder
from convert.names import config_from_transformers, load_transformers
from convert.vocabulary import TOKENIZER_FILES, load_vocabulary
from dataset import SPECIAL_TOKENS, Vocabulary
from model import NETWORK_FILES, Discriminator, Generator, ModelConfig, SavedNetwork, build_network, save_network
from utils import InputError, load, one_line, reports_input_errors, require

COMMAND = "convert.from_transformers"
WEIGHT_FILES = ["model.safetensors", "pytorch_model.bin"]  # the first one that exists is read
LARGE = ("discriminator", "mlm")  # kinds of networks of the configured size; a run has one of them


@dataclass(frozen=True)
class FromTransformers:
    """Writes disc.pt, gen.pt or mlm.pt, whichever there are, from ELECTRA in transformers' layout."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER|NAME")]
    """Folder with discriminator/ or mlm/ and perhaps generator/, or the own folder or hub name of a discriminator or of a
    masked language model, which becomes mlm.pt."""
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """New folder for the weights files."""


class LoadedModel(NamedTuple):
    """The content of a model folder, and the name that the user gave it."""

    name: str
    path: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]


@reports_input_errors
def main(argv: list[str]) -> int:
    settings = tyro.cli(FromTransformers, args=argv, prog=f"python -m {COMMAND}")
    run = settings.run
    require(not run.is_dir() or not any(run.iterdir()), f"{run} is not empty: choose a new folder")
    networks = read_networks(settings.source, ModelConfig().generator_size, COMMAND)
    run.mkdir(parents=True, exist_ok=True)
    for kind, saved in networks.items():
        save_network(run / NETWORK_FILES[kind], saved)
        print(f"{kind}: {run / NETWORK_FILES[kind]}")
    if networks.keys() == {"discriminator"}:
        print(f"{settings.source} has no generator, so there is no gen.pt")
    return 0


def read_encoder(name: str, flag: str) -> SavedNetwork:
    """A discriminator with the encoder of an ElectraModel, or of one of its models with a head, and a random head.

    `name` is a folder or a name on the hub, `flag` the command-line flag that gave it. Raises InputError unless all
    weights of the encoder are there, in their shapes and finite, and its tokenizer beside them.
    """
    folder = read_folder(name, flag)
    config = read_config(folder)
    vocabulary = read_vocabulary(folder, config)
    network = Discriminator(config).eval()
    fill(network.encoder, folder, "discriminator")
    return SavedNetwork("discriminator", network, config, vocabulary.to_json())


def read_networks(name: str, generator_size: float, flag: str) -> dict[str, SavedNetwork]:
    """A discriminator or a large masked language model and, if there is one, its generator, by kind; config and tokenizer
    are the same.

    `name` is a folder with discriminator/ or mlm/ and perhaps generator/, or one network's own folder or name on the hub;
    `flag` is the command-line flag that gave it. Without a generator the config gets `generator_size`. Raises
    InputError for networks that are not whole or do not fit together.
    """
    folders = read_folders(name, flag)
    large, = folders.keys() & set(LARGE)
    config = dataclasses.replace(read_config(folders[large]), generator_size=generator_size)
    vocabulary = read_vocabulary(folders[large], config)
    if "generator" in folders:
        config = pair_config(config, folders["generator"])
        require_same_vocabulary(vocabulary, folders["generator"], config)

    networks = {}
    for kind, folder in folders.items():
        networks[kind] = build_network(kind, config).eval()
        fill(networks[kind], folder, kind)
    if "generator" in networks:
        share_embeddings(networks["generator"], networks[large], large)
    return {kind: SavedNetwork(kind, network, config, vocabulary.to_json()) for kind, network in networks.items()}


def read_folders(name: str, flag: str) -> dict[str, LoadedModel]:
    """The model folders by kind: one of the LARGE ones and perhaps a generator."""
    paths = {kind: Path(name, kind) for kind in NETWORK_FILES if Path(name, kind).is_dir()}
    large = paths.keys() & set(LARGE)
    require(len(large) < 2, f"{name} has both {' and '.join(sorted(large))}: expected one of them, name its own folder")
    if large:
        return {kind: read_folder(str(path), flag) for kind, path in paths.items()}
    folder = read_folder(name, flag)
    has_language_model = any(weight.startswith("generator_") for weight in folder.weights)
    return {"mlm" if has_language_model else "discriminator": folder}


def read_folder(name: str, flag: str) -> LoadedModel:
    """Configuration and weights of one model, from a folder or the hub."""
    path = Path(name)
    require(not path.is_file(), f"{name} is a file: {flag} expects a folder or a name on the hub")
    if not path.is_dir():
        path = hub_folder(name, f"{flag}: there is no file or folder {name} here",
                          ["config.json", *TOKENIZER_FILES, *WEIGHT_FILES])
    weight_files = [path / file for file in WEIGHT_FILES if (path / file).is_file()]
    require((path / "config.json").is_file() and bool(weight_files),
            f"{name} lacks config.json or {' or '.join(WEIGHT_FILES)}: {flag} expects ELECTRA as transformers saves it")
    with input_errors(f"{name} can't be read"):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        is_pickle = weight_files[0].suffix == ".bin"
        weights = load(weight_files[0]) if is_pickle else safetensors.torch.load_file(weight_files[0])
    return LoadedModel(name, path, config, weights)


def read_config(folder: LoadedModel) -> ModelConfig:
    """The sizes of a model; InputError for one that this project does not compute."""
    with input_errors(f"the config.json of {folder.name} does not describe an ELECTRA that this project computes"):
        return config_from_transformers(folder.config)


def pair_config(config: ModelConfig, generator_folder: LoadedModel) -> ModelConfig:
    """A discriminator's config with the size of its generator, which must have the original's proportions."""
    generator = read_config(generator_folder)
    config = dataclasses.replace(config, generator_size=generator.hidden_size / config.hidden_size)
    size = config.generator()
    expected = {"heads": size.heads, "feed_forward_size": size.feed_forward}
    expected |= {name: getattr(config, name) for name in ("vocab_size", "embedding_size", "layers", "max_positions")}
    differences = [f"{name} = {getattr(generator, name)} where {value} is expected"
                   for name, value in expected.items() if getattr(generator, name) != value]
    require(not differences,
            f"{generator_folder.name} has {', '.join(differences)}: a generator needs the vocabulary, embedding size, "
            "layers and positions of its discriminator, heads of 64 and a feed-forward size of 4 times its hidden size")
    return config


def read_vocabulary(folder: LoadedModel, config: ModelConfig) -> Vocabulary:
    """The model's vocabulary as Pretraining.py keeps it; InputError if it has more pieces than the model has rows.

    It may have fewer: tables of embeddings are often padded to a round number, for speed.
    """
    vocabulary = load_vocabulary(str(folder.path))
    tokenizer, added = vocabulary.tokenizer, vocabulary.tokenizer.get_added_tokens_decoder().values()
    in_model = tokenizer.get_vocab(with_added_tokens=False)
    if all(token.special and token.content in in_model for token in added):
        # What an export adds, how texts are framed and word pieces joined, is left out: the same vocabulary is always the
        # same JSON. The decoder of any other model is its own.
        plain = Tokenizer(tokenizer.model)
        plain.normalizer, plain.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        if not isinstance(tokenizer.decoder, decoders.WordPiece):
            plain.decoder = tokenizer.decoder
        vocabulary = Vocabulary(plain, folder.name)
    require(vocabulary.size > len(SPECIAL_TOKENS),
            f"{folder.name} has a vocabulary of {vocabulary.size} pieces, none of them of words: repair its tokenizer files")
    require(vocabulary.size <= config.vocab_size,
            f"{folder.name} has a vocabulary of {vocabulary.size:,} pieces and weights for {config.vocab_size:,}: "
            "they belong to different models")
    if vocabulary.size < config.vocab_size:
        print(f"{folder.name}: {vocabulary.size:,} pieces; the embeddings have {config.vocab_size:,} rows, the rest unused")
    return vocabulary


def require_same_vocabulary(vocabulary: Vocabulary, generator_folder: LoadedModel, config: ModelConfig) -> None:
    """Raises InputError if the generator's folder has a vocabulary, and it is not that of the network beside it."""
    if any((generator_folder.path / file).is_file() for file in TOKENIZER_FILES[:2]):
        other = read_vocabulary(generator_folder, config)
        require(other.pieces() == vocabulary.pieces() and other.case_note == vocabulary.case_note,
                f"{generator_folder.name} and the network beside it have different vocabularies: expected two networks "
                "that were trained together")


def fill(network: nn.Module, folder: LoadedModel, kind: str) -> None:
    """Loads the folder's weights; InputError unless they are one for one the network's, and finite."""
    with input_errors(f"the weights of {folder.name} are not those of a {kind}"):
        load_transformers(network, folder.weights)
    finite = all(weight.isfinite().all() for weight in network.parameters())
    require(finite, f"{folder.name} has weights that are not finite numbers: choose another model")


def share_embeddings(generator: Generator, network: Discriminator | Generator, kind: str) -> None:
    """Gives the generator the large network's embeddings, since they share them here; warns where they differ."""
    own, shared = (one.encoder.embeddings.state_dict() for one in (generator, network))
    differences = [name for name in own if not torch.equal(own[name], shared[name])]
    if differences:
        print(f"warning: generator and {kind} have different embeddings ({', '.join(differences)}); "
              f"the {kind}'s are used for both", file=sys.stderr)
    generator.encoder.embeddings.load_state_dict(shared)


@contextlib.contextmanager
def input_errors(message: str) -> Iterator[None]:
    """Turns errors into an InputError with this message: damaged and foreign files raise many types of errors."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{message} ({one_line(error)})") from None


if __name__ == "__main__":
    sys.exit(main())
