"""What the tests share: a small corpus with structure to learn, and a vocabulary that knows it."""

import random

import pytest
import torch

from dataset import SPECIAL, Vocabulary, wordpiece

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
