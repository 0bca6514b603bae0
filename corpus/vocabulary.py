"""A corpus in, a vocabulary learned from its training text out; imported only where no vocabulary is named."""

from collections import Counter
from itertools import islice
from pathlib import Path

from tokenizers import trainers

from dataset import CASES, SPECIAL_TOKENS, Corpus, Vocabulary, content_key, corpus_hash, scan_corpus, wordpiece
from utils import locked, write_text

LEARNING_LINES = 1_000_000  # evenly spread lines of the corpus from which a vocabulary is learned
LEARNING_VERSION = 3  # part of the cache key: raise it when the same corpus would give another vocabulary


def learned_vocabulary(paths: tuple[Path, ...], size: int, case: str, cache: Path) -> Vocabulary:
    """`learn_vocabulary` of a corpus, learned once and kept in the cache under a name that its content gives."""
    path = cache / f"vocabulary-{content_key(corpus_hash(paths), size, case, LEARNING_VERSION)}.json"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write_text(path, learn_vocabulary(scan_corpus(paths), size, case).to_json())
    return Vocabulary.from_json(path.read_text(encoding="utf-8"), str(path))


def learn_vocabulary(corpus: Corpus, size: int, case: str = "uncased") -> Vocabulary:
    """`size` word pieces from the training text, more only if special tokens and letters are, in alphabetical order.

    Of the letters the most frequent are known, 256 or a sixteenth of `size`: Wikipedia has thousands of rare ones.
    """
    tokenizer = wordpiece({}, *CASES[case])
    words = Counter()
    for line in islice(corpus.split(False), 0, None, corpus.lines // LEARNING_LINES + 1):
        normalized = tokenizer.normalizer.normalize_str(line)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    letter_counts = Counter()
    for word, count in words.items():
        letter_counts.update(dict.fromkeys(word, count))
    letters = sorted(letter_counts, key=lambda letter: (-letter_counts[letter], letter))[:max(256, size // 16)]
    inner_letters = {letter for word in words for letter in word[1:]} & set(letters)
    # The trainer numbers letters at random and breaks ties by number, so that the same text would give another vocabulary
    # each time. It keeps the order of special tokens, so the letters are given to it as such.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, limit_alphabet=len(letters), initial_alphabet=letters, show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in sorted(inner_letters))])
    tokenizer.train_from_iterator(words.elements(), trainer)
    pieces = [*SPECIAL_TOKENS, *sorted(set(tokenizer.get_vocab()) - set(SPECIAL_TOKENS))]
    return Vocabulary(wordpiece({piece: number for number, piece in enumerate(pieces)}, *CASES[case]), "learned")
