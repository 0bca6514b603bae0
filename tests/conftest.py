"""What the tests share: a small corpus with structure to learn, a vocabulary that knows it, a pair of random networks."""

import random

import pytest
import torch

from dataset import SPECIAL, Vocabulary, wordpiece
from model import Electra, ModelConfig
from Pretraining import write_models

WORDS = """the a old new red green cat dog bird house tree river sees likes finds eats near under over and but
then""".split()


@pytest.fixture(autouse=True)
def deterministic():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def vocabulary():
    pieces = [*SPECIAL, *WORDS, ".", "##s", "é"]
    return Vocabulary(wordpiece({piece: number for number, piece in enumerate(pieces)}, lowercase=True), "tests")


def story(documents=60, seed=0):
    """Documents of 3 to 12 sentences of 3 to 14 words, each the next in WORDS: a language one layer can learn."""
    rng = random.Random(seed)

    def sentence():
        start, length = rng.randrange(len(WORDS)), rng.randint(3, 14)
        return " ".join(WORDS[(start + n) % len(WORDS)] for n in range(length)) + "."
    return ["\n".join(sentence() for _ in range(rng.randint(3, 12))) for _ in range(documents)]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(story()) + "\n", encoding="utf-8")
    return path


def write_pair(folder, vocabulary, seed=0, **sizes):
    """gen.pt and disc.pt of random weights as a pretraining run writes them; the generator's are large enough to differ."""
    torch.manual_seed(seed)
    config = ModelConfig(**{"vocab_size": vocabulary.size, "embedding_size": 8, "hidden_size": 16, "layers": 1, "heads": 2,
                            "feed_forward_size": 32, "generator_size": 0.5, "max_positions": 30, "initializer_range": 1.0}
                         | sizes)
    folder.mkdir(parents=True, exist_ok=True)
    write_models(folder, Electra(config), config, vocabulary)
    return folder / "gen.pt", folder / "disc.pt"
