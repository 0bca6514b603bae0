"""Wikipedia, books and Python's documentation to plain text with one sentence a line.

Run `python -m corpus --help` for the first two; Pretraining.py builds the third by itself when it is given no corpus.
"""
