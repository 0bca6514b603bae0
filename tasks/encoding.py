"""Rows of one or two texts in; token ids cut to length, labels, and batches of similar length out."""

from collections.abc import Iterator, Sequence

import numpy as np

from dataset import POOL_BATCHES, Batch, Segments, Vocabulary, batches_by_length, collate
from tasks.glue import Row, Task

CHUNK_ROWS = 2_048  # tokenized at a time


def encode_texts(texts: Sequence[tuple[str, ...]], vocabulary: Vocabulary, max_length: int,
                 swap: bool = False) -> list[Segments]:
    """Examples of rows of one or two texts, cut longest first to fit `max_length`; `swap` exchanges the two texts."""
    examples = []
    for start in range(0, len(texts), CHUNK_ROWS):
        columns = list(zip(*texts[start:start + CHUNK_ROWS], strict=True))
        encoded = [vocabulary.encode(list(column)) for column in (reversed(columns) if swap else columns)]
        for segments in zip(*encoded, strict=True):
            first, second = segments if len(segments) > 1 else (segments[0], [])
            first, second = cut_longest_first(first, second, max_length - (3 if second else 2))
            examples.append((np.array(first, np.uint16), np.array(second, np.uint16)))
    return examples


def training_examples(rows: Sequence[Row], task: Task, vocabulary: Vocabulary,
                      max_length: int) -> tuple[list[Segments], np.ndarray]:
    """Examples and their labels (N,), each pair in both orders where the task is trained so."""
    texts, labels = [row.texts for row in rows], np.array([row.label for row in rows])
    examples = encode_texts(texts, vocabulary, max_length)
    if not task.both_orders:
        return examples, labels
    return examples + encode_texts(texts, vocabulary, max_length, swap=True), np.concatenate([labels, labels])


def cut_longest_first(first: list[int], second: list[int], room: int) -> Segments:
    """Both segments in at most `room` pieces: the longer one loses its last pieces, the second one if they are equal.

    This is the original's rule (google-research/electra, finetune/classification/classification_tasks.py).
    """
    a, b = len(first), len(second)
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    return first[:a], second[:b]


def similar_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The numbers 0..N - 1 of examples in batches of similar length and random order; only one batch may be smaller."""
    order = rng.permutation(len(lengths))
    pool_size = POOL_BATCHES * batch_size
    batches = []
    for pool in np.split(order, range(pool_size, len(order), pool_size)):
        batches += [pool[numbers] for numbers in batches_by_length(lengths[pool], batch_size)]
    return [batches[number] for number in rng.permutation(len(batches))]


def length_batches(examples: list[Segments], vocabulary: Vocabulary, max_length: int, batch_size: int,
                   rng: np.random.Generator) -> Iterator[tuple[np.ndarray, Batch]]:
    """All examples once, in batches of similar length and random order: the examples' numbers (B,) and the batch."""
    lengths = np.array([len(first) + len(second) for first, second in examples])
    for numbers in similar_batches(lengths, batch_size, rng):
        yield numbers, collate([examples[number] for number in numbers], vocabulary, max_length)
