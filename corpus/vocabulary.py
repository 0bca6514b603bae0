"""A corpus in, a vocabulary learned from its training text out; imported only where no vocabulary is named."""

from collections import Counter
from itertools import islice
from pathlib import Path

from tokenizers import trainers

from dataset import CASES, JOINERS, SPECIAL_TOKENS, Corpus, Vocabulary, content_key, corpus_hash, scan_corpus, wordpiece
from utils import locked, write_text

LEARNING_LINES = 1_000_000  # evenly spread lines of the corpus from which a vocabulary is learned
LEARNING_VERSION = 4  # part of the cache key: raise it when the same corpus would give another vocabulary
COVERAGE = 0.9995  # share of the words whose letters are all to be known, SentencePiece's default for large scripts
LETTERS_SHARE = 0.75  # most pieces that are given to letters, so that there is room for words and parts of words
FEWEST_LETTERS = 256  # known whatever the text needs, and no fewer than one piece in 16: they serve other texts


def learned_vocabulary(paths: tuple[Path, ...], size: int, case: str, cache: Path) -> Vocabulary:
    """`learn_vocabulary` of a corpus, learned once and kept in the cache under a name that its content gives."""
    path = cache / f"vocabulary-{content_key(corpus_hash(paths), size, case, LEARNING_VERSION)}.json"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write_text(path, learn_vocabulary(scan_corpus(paths), size, case).to_json())
    return Vocabulary.from_json(path.read_text(encoding="utf-8"), str(path))


def learn_vocabulary(corpus: Corpus, size: int, case: str = "uncased") -> Vocabulary:
    """`size` word pieces from the training text, more only if special tokens and letters are, in alphabetical order."""
    counted_words = count_words(corpus, case)
    letters = frequent_letters(counted_words, size)
    # Where a joiner is not among the letters, the tokenizer drops it, so the words are those without it.
    dropped = str.maketrans("", "", "".join(set(JOINERS) - set(letters)))
    words = Counter()
    for word, count in counted_words.items():
        words[word.translate(dropped)] += count
    inner_letters = {letter for word in words for letter in word[1:]} & set(letters)
    # The trainer numbers letters at random and breaks ties by number, so that the same text would give another vocabulary
    # each time. It keeps the order of special tokens, so the letters are given to it as such.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, limit_alphabet=len(letters), initial_alphabet=letters, show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in sorted(inner_letters))])
    tokenizer = wordpiece({}, *CASES[case])
    tokenizer.train_from_iterator(words.elements(), trainer)
    pieces = [*SPECIAL_TOKENS, *sorted(set(tokenizer.get_vocab()) - set(SPECIAL_TOKENS))]
    return Vocabulary(wordpiece({piece: number for number, piece in enumerate(pieces)}, *CASES[case]), "learned")


def count_words(corpus: Corpus, case: str) -> Counter[str]:
    """How often each word, as the networks are to see it, comes in the training text; joiners between letters are kept."""
    tokenizer = wordpiece({f"##{joiner}": number for number, joiner in enumerate(JOINERS)}, *CASES[case])
    words = Counter()
    for line in islice(corpus.split(False), 0, None, corpus.lines // LEARNING_LINES + 1):
        normalized = tokenizer.normalizer.normalize_str(line)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized))
    return words


def frequent_letters(words: Counter[str], size: int) -> list[str]:
    """The most frequent letters, enough to spell COVERAGE of the words, in at most LETTERS_SHARE of `size` pieces.

    A word with one unknown letter is [UNK] as a whole. Wikipedia has thousands of rare letters, Chinese needs thousands.
    """
    counts, inner_letters = Counter(), set()
    for word, count in words.items():
        counts.update(dict.fromkeys(word, count))
        inner_letters.update(word[1:])
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))
    rank = {letter: number for number, letter in enumerate(letters)}
    spelled = Counter()  # number of words by the rank of the rarest letter in them
    for word, count in words.items():
        spelled[max(rank[letter] for letter in word)] += count
    fewest = max(FEWEST_LETTERS, size // 16)
    pieces, missing = 0, (1 - COVERAGE) * words.total()
    unknown = words.total() - sum(spelled[number] for number in range(fewest))
    for number, letter in enumerate(letters):
        pieces += 2 if letter in inner_letters else 1  # also inside a word
        if number < fewest:
            continue
        if unknown <= missing or pieces > LETTERS_SHARE * size:
            return letters[:number]
        unknown -= spelled[number]
    return letters
