"""Rows of texts or words in; token ids cut to length, labels, and batches of similar length out."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from dataset import POOL_BATCHES, Batch, Segments, Vocabulary, batches_by_length, collate
from tasks.data import Row, labels_of
from tasks.task import Task

CHUNK_ROWS = 2_048  # tokenized at a time


class Examples(NamedTuple):
    """Rows as the networks take them: N rows, each with one answer, or with one for each word.

    A row that was cut has answers for its first words only.
    """

    segments: list[Segments]
    positions: list[np.ndarray]  # of each row's answers among its tokens; 0, that of [CLS], where the row has one
    labels: list[np.ndarray]  # of each row's answers
    cut: int  # number of rows that were longer than the length

    def answers(self, numbers: np.ndarray, outputs: Tensor) -> Tensor:
        """The outputs (answers, C) that count, of those for rows `numbers` (B,): (B, C), or (B, L, C) for every token."""
        counts = [len(self.positions[number]) for number in numbers]
        rows = np.repeat(np.arange(len(numbers)), counts)
        columns = np.concatenate([self.positions[number] for number in numbers])
        return outputs.reshape(len(numbers), -1, outputs.shape[-1])[rows, columns]


def encode_rows(rows: Sequence[Row], task: Task, vocabulary: Vocabulary, max_length: int) -> Examples:
    """The examples of rows, in their order."""
    labels = [np.array(labels_of(row)) for row in rows]
    if task.kind == "tokens":
        return encode_words(rows, labels, vocabulary, max_length)
    segments, cut = encode_texts([row.texts for row in rows], vocabulary, max_length)
    return Examples(segments, [np.zeros(1, np.int64)] * len(rows), labels, cut)


def training_examples(rows: Sequence[Row], task: Task, vocabulary: Vocabulary, max_length: int) -> Examples:
    """The examples of rows, and after them each pair in the other order where the task is trained so."""
    examples = encode_rows(rows, task, vocabulary, max_length)
    if not task.both_orders:
        return examples
    swapped = encode_rows([row._replace(texts=row.texts[::-1]) for row in rows], task, vocabulary, max_length)
    return Examples(*(own + other for own, other in zip(examples, swapped, strict=True)))


def encode_texts(texts: Sequence[tuple[str, ...]], vocabulary: Vocabulary, max_length: int) -> tuple[list[Segments], int]:
    """Segments of rows of one or two texts, cut longest first to fit `max_length`, and how many were cut."""
    examples, cut = [], 0
    for start in range(0, len(texts), CHUNK_ROWS):
        columns = zip(*texts[start:start + CHUNK_ROWS], strict=True)
        encoded = [vocabulary.encode(list(column)) for column in columns]
        for segments in zip(*encoded, strict=True):
            first, second = segments if len(segments) > 1 else (segments[0], [])
            first = first or [vocabulary.unk]  # of a text without a character that the vocabulary keeps
            room = max_length - (3 if second else 2)
            cut += len(first) + len(second) > room
            first, second = cut_longest_first(first, second, room)
            examples.append((np.array(first, np.uint16), np.array(second, np.uint16)))
    return examples, cut


def encode_words(rows: Sequence[Row], labels: list[np.ndarray], vocabulary: Vocabulary, max_length: int) -> Examples:
    """Examples of sentences of words: the first piece of a word carries its label (G, finetune/tagging)."""
    segments, positions, kept_labels, cut = [], [], [], 0
    for start in range(0, len(rows), CHUNK_ROWS):
        sentences = [row.texts for row in rows[start:start + CHUNK_ROWS]]
        encoded = iter(vocabulary.encode(list(itertools.chain.from_iterable(sentences))))
        for number, words in enumerate(sentences, start):
            pieces = [next(encoded) or [vocabulary.unk] for _ in words]
            firsts = np.cumsum([0, *map(len, pieces)])[:-1] + 1  # after [CLS]
            kept = firsts <= max_length - 2
            ids = list(itertools.chain.from_iterable(pieces)) or [vocabulary.unk]
            cut += len(ids) > max_length - 2
            segments.append((np.array(ids[:max_length - 2], np.uint16), np.array([], np.uint16)))
            positions.append(firsts[kept])
            kept_labels.append(labels[number][kept])
    return Examples(segments, positions, kept_labels, cut)


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
