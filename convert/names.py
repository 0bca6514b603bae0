"""Parameters and sizes of the networks: their names here to their names in transformers' ELECTRA, and back."""

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from model import LAYER_NORM_EPS, Classifier, Discriminator, Encoder, EncoderSize, Generator, ModelConfig

# How names here become those of ElectraForMaskedLM and ElectraForPreTraining.
ENCODER_NAMES = {
    r"^encoder\.embeddings\.token": "electra.embeddings.word_embeddings",
    r"^encoder\.embeddings\.position": "electra.embeddings.position_embeddings",
    r"^encoder\.embeddings\.segment": "electra.embeddings.token_type_embeddings",
    r"^encoder\.embeddings\.norm": "electra.embeddings.LayerNorm",
    r"^encoder\.project": "electra.embeddings_project",
    r"^encoder\.layers\.": "electra.encoder.layer.",
    r"\.attention_output\.": ".attention.output.dense.",
    r"\.attention_norm\.": ".attention.output.LayerNorm.",
    r"\.feed_forward\.": ".intermediate.dense.",
    r"\.feed_forward_output\.": ".output.dense.",
    r"\.feed_forward_norm\.": ".output.LayerNorm.",
}
HEAD_NAMES = {
    Generator: {r"^dense": "generator_predictions.dense", r"^norm": "generator_predictions.LayerNorm",
                r"^bias": "generator_lm_head.bias"},
    Discriminator: {r"^dense": "discriminator_predictions.dense",
                    r"^prediction": "discriminator_predictions.dense_prediction"},
    Encoder: {},
}
TIED = "generator_lm_head.weight"  # the generator's output table, which is the table of token embeddings
TOKEN_EMBEDDINGS = "electra.embeddings.word_embeddings.weight"
POSITION_NUMBERS = "electra.embeddings.position_ids"  # 0, 1, 2, ...: among the weights in old files
HEAD_WEIGHTS = ("discriminator_predictions.", "generator_predictions.", "generator_lm_head.", "classifier.")
CONFIG_NAMES = {
    "vocab_size": "vocab_size", "embedding_size": "embedding_size", "hidden_size": "hidden_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "feed_forward_size": "intermediate_size",
    "max_positions": "max_position_embeddings", "dropout": "hidden_dropout_prob",
    "initializer_range": "initializer_range",
}
# What every network here computes.
FIXED_CONFIG = {"model_type": "electra", "hidden_act": "gelu", "type_vocab_size": 2, "layer_norm_eps": LAYER_NORM_EPS}


def transformers_names(network: Generator | Discriminator | Encoder) -> dict[str, list[str]]:
    """For each parameter its name in transformers, or three: query, key and value are stacked here."""
    names = {}
    for own_name in network.state_dict():
        name = f"encoder.{own_name}" if isinstance(network, Encoder) else own_name
        for pattern, replacement in (ENCODER_NAMES | HEAD_NAMES[type(network)]).items():
            name = re.sub(pattern, replacement, name)
        names[own_name] = [name]
        if "query_key_value" in name:
            names[own_name] = [name.replace("query_key_value", f"attention.self.{part}")
                               for part in ("query", "key", "value")]
    return names


def to_transformers(network: Generator | Discriminator | Encoder) -> dict[str, Tensor]:
    """A network's weights under transformers' names."""
    own_weights, weights = network.state_dict(), {}
    for own_name, names in transformers_names(network).items():
        parts = own_weights[own_name].chunk(len(names))
        weights.update(zip(names, parts, strict=True))
    if isinstance(network, Generator):
        weights[TIED] = weights[TOKEN_EMBEDDINGS]
    return weights


@torch.no_grad()
def classifier_to_transformers(classifier: Classifier, scale: float, offset: float = 0.0) -> dict[str, Tensor]:
    """Weights of an ElectraForSequenceClassification whose logits are `scale` times the classifier's outputs + `offset`.

    The head here is one linear layer; transformers' is a dense layer, a GELU and an output layer. Its dense layer gives
    each output z twice, as z and as -z; the output layer subtracts the second: gelu(z) - gelu(-z) = z. All other units
    are 0. The hidden size must be at least twice the number of outputs.
    """
    outputs, H = classifier.prediction.weight.shape
    signs = torch.cat([torch.eye(outputs), -torch.eye(outputs)])  # (2 outputs, outputs)
    dense_weight, dense_bias, output_weight = torch.zeros(H, H), torch.zeros(H), torch.zeros(outputs, H)
    dense_weight[:2 * outputs] = scale * signs @ classifier.prediction.weight
    dense_bias[:2 * outputs] = scale * signs @ classifier.prediction.bias
    output_weight[:, :2 * outputs] = signs.T
    head = {"dense.weight": dense_weight, "dense.bias": dense_bias, "out_proj.weight": output_weight,
            "out_proj.bias": torch.full((outputs,), offset)}
    return to_transformers(classifier.encoder) | {f"classifier.{name}": weight for name, weight in head.items()}


def token_classifier_to_transformers(classifier: Classifier) -> dict[str, Tensor]:
    """Weights of an ElectraForTokenClassification, whose head is the same linear layer."""
    head = {f"classifier.{name}": weight for name, weight in classifier.prediction.state_dict().items()}
    return to_transformers(classifier.encoder) | head


def load_transformers(network: Generator | Discriminator | Encoder, weights: dict[str, Tensor]) -> None:
    """Fills a network with weights under transformers' names.

    An encoder takes them from an ElectraModel or from one of its models with a head, which it leaves out. Raises
    KeyError for weights that are missing or left over and for an output table that is not tied to the token embeddings,
    RuntimeError for a wrong shape.
    """
    names = transformers_names(network)
    if isinstance(network, Encoder):
        if any(name.startswith("embeddings.") for name in weights):  # an ElectraModel's
            weights = {f"electra.{name}": weight for name, weight in weights.items()}
        weights = {name: weight for name, weight in weights.items() if not name.startswith(HEAD_WEIGHTS)}
    expected = {name for parts in names.values() for name in parts}
    left_over = weights.keys() - expected - {TIED, POSITION_NUMBERS}
    if left_over:
        raise KeyError(f"{len(left_over)} weights have no place here: {', '.join(sorted(left_over))}")
    missing = expected - weights.keys()
    if missing:
        raise KeyError(f"{len(missing)} weights are missing: {', '.join(sorted(missing))}")
    if TIED in weights and not torch.equal(weights[TIED], weights[TOKEN_EMBEDDINGS]):
        raise KeyError(f"{TIED} differs from {TOKEN_EMBEDDINGS}, to which it is tied here")
    network.load_state_dict({own_name: torch.cat([weights[name] for name in parts])
                             for own_name, parts in names.items()})


def config_from_transformers(config: dict[str, Any]) -> ModelConfig:
    """The sizes in a config.json; ValueError for a network that is not computed here."""
    for name, expected in (FIXED_CONFIG | {"position_embedding_type": "absolute"}).items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{name} is {config[name]!r}, expected {expected!r}")
    # What a config.json leaves out has the same default in both projects.
    sizes = ModelConfig(**{own_name: config[name] for own_name, name in CONFIG_NAMES.items() if name in config})
    if sizes.hidden_size % sizes.heads:
        raise ValueError(f"hidden_size is {sizes.hidden_size}, expected a multiple of {sizes.heads} attention heads")
    return sizes


def config_to_transformers(config: ModelConfig, size: EncoderSize) -> dict[str, Any]:
    """The content of config.json, or the arguments of ElectraConfig, for the network of this size."""
    values = dataclasses.asdict(config)
    values |= {"hidden_size": size.hidden, "heads": size.heads, "feed_forward_size": size.feed_forward}
    sizes = {name: values[own_name] for own_name, name in CONFIG_NAMES.items()}
    return FIXED_CONFIG | sizes | {"attention_probs_dropout_prob": config.dropout}
