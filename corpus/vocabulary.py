"""Word pieces in, BERT's tokenizer out; and a corpus in, a vocabulary of word pieces learned from its training text out."""

from collections import Counter
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dataset import SPECIAL_TOKENS, Corpus, Vocabulary, content_key, corpus_hash, scan_corpus
from utils import locked, write_text

# The arguments of BERT's normalizer for each --case: lower case or not, without accents or not (None: as lower case)
CASES = {"cased": (False, None), "uncased": (True, None), "uncased-accents": (True, False)}
JOINERS = "\u200c\u200d"  # zero-width: they tell words apart in Persian, and forms of letters in the scripts of India
LONGEST_WORD = 100  # characters; a longer one is [UNK], as in the original

LEARNING_LINES = 1_000_000  # evenly spread lines of the corpus from which a vocabulary is learned
LEARNING_VERSION = 4  # part of the cache key: raise it when the same corpus would give another vocabulary
COVERAGE = 0.9995  # share of the words whose letters are all to be known; SentencePiece's default, there of the letters
LETTERS_SHARE = 0.75  # most pieces that are given to letters, so that there is room for words and parts of words
FEWEST_LETTERS = 256  # known whatever the text needs, and no fewer than one piece in 16: they serve other texts


def wordpiece(pieces: dict[str, int], lowercase: bool, strip_accents: bool | None = None) -> Tokenizer:
    """BERT's tokenizer over these pieces. By default lower case also strips accents, as in the original.

    Beyond the original it composes characters (NFC) where accents stay, and keeps the JOINERS that are pieces.
    """
    tokenizer = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    joiners = "".join(joiner for joiner in JOINERS if f"##{joiner}" in pieces)
    steps = [normalizers.BertNormalizer(clean_text=not joiners, lowercase=lowercase, strip_accents=strip_accents)]
    if joiners:  # BERT's clean_text would drop them, so this drops all that it drops but joiners between letters
        invisible = rf"[\p{{Cc}}\p{{Cf}}\p{{Co}}\ufffd&&[^\t\n\r{joiners}]]"
        misplaced = rf"(?<![\p{{L}}\p{{M}}])[{joiners}]|[{joiners}](?![\p{{L}}\p{{M}}])"
        steps.insert(0, normalizers.Replace(Regex(f"{invisible}|{misplaced}"), ""))
    if not (lowercase if strip_accents is None else strip_accents):
        steps.insert(0, normalizers.NFC())
    tokenizer.normalizer = steps[0] if len(steps) == 1 else normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def learned_vocabulary(paths: tuple[Path, ...], size: int, case: str, cache: Path) -> Vocabulary:
    """`learn_vocabulary` of a corpus, learned once and kept in the cache under a name that its content gives.

    `case` is a key of CASES, or auto, which is uncased.
    """
    case = "uncased" if case == "auto" else case
    path = cache / f"vocabulary-{content_key(corpus_hash(paths), size, case, LEARNING_VERSION)}.json"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            write_text(path, learn_vocabulary(scan_corpus(paths), size, case).to_json())
    return Vocabulary.from_json(path.read_text(encoding="utf-8"), str(path))


def learn_vocabulary(corpus: Corpus, size: int, case: str = "uncased") -> Vocabulary:
    """`size` word pieces from the training text, in alphabetical order.

    They are more than `size` only if special tokens and letters alone are.
    """
    tokenizer = wordpiece({f"##{joiner}": number for number, joiner in enumerate(JOINERS)}, *CASES[case])  # keeps both
    words = count_words(corpus, tokenizer)
    letters = frequent_letters(words, size)
    inner_letters = {letter for word in words for letter in word[1:]} & set(letters)
    # The trainer numbers letters at random and breaks ties by number, so that the same text would give another vocabulary
    # each time. It keeps the order of special tokens, so the letters are given to it as such.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, limit_alphabet=len(letters), initial_alphabet=letters, show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in sorted(inner_letters))])
    tokenizer.train_from_iterator(words.elements(), trainer)
    pieces = [*SPECIAL_TOKENS, *sorted(set(tokenizer.get_vocab()) - set(SPECIAL_TOKENS))]
    return Vocabulary(wordpiece({piece: number for number, piece in enumerate(pieces)}, *CASES[case]), "learned")


def count_words(corpus: Corpus, tokenizer: Tokenizer) -> Counter[str]:
    """How often each word of the training text comes, as the tokenizer normalizes and cuts it."""
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
