"""Wikipedia, books and Python's documentation to plain text with one sentence a line.

Run `python -m corpus --help` for the first two; Pretraining.py builds the third by itself when it is given no corpus.
"""

from pathlib import Path


def corpus_files(names: tuple[str, ...], cache: Path) -> tuple[Path, ...]:
    """The text files of a run, by the names in its settings; if it names none, Python's documentation."""
    if names:
        return tuple(map(Path, names))
    from corpus.documentation import documentation_corpus  # imported where it is used, for it needs a sentence splitter
    return (documentation_corpus(cache),)
