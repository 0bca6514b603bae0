"""Wikipedia, books and Python's documentation to plain text with one sentence a line.

Run `python -m corpus --help` for the first two; Pretraining.py builds the third by itself when it is given no corpus.
"""

from pathlib import Path


def corpus_files(names: tuple[str, ...], cache: Path) -> tuple[Path, ...]:
    """The paths of the named text files; without names, that of the documentation of Python and its packages, in `cache`."""
    if names:
        return tuple(map(Path, names))
    from corpus.documentation import documentation_corpus  # imported where it is used, for it needs a sentence splitter
    return (documentation_corpus(cache),)
