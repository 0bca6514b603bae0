"""Python's own documentation to text: English prose that is on every machine where this project runs."""

import ast
import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from corpus.sentences import split_sentences
from dataset import content_key
from utils import locked, replacing

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
DOCUMENTATION_VERSION = 4  # part of the file's name: raise it when the same packages give another text
SKIPPED_FOLDERS = {"test", "tests", "testing", "idlelib"}
SHORTEST_PROSE = 8  # words of a paragraph
PROSE_SHARE = 0.8  # of a paragraph's words; in code and tables fewer are words of plain letters
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Doctests, underlined headings, directives of reStructuredText, code in Markdown.
CODE = re.compile(r">>>|^\s*[-=~^]{3,}\s*$|^\s*[.:]{2} |```", re.MULTILINE)
# A role with its text (":class:`~pkg.File`", ":ref:`text <target>`"), or single marks of code and emphasis.
ROLE = re.compile(r":\w+(?::\w+)*:`~?([^`<]+)(?: <[^>]*>)?`|[`*]+")
WORD = re.compile(r"(?<!\S)[A-Za-z][a-z'-]*[.,;:!?)]?(?!\S)")


def documentation_corpus(cache: Path, requirements: Path = REQUIREMENTS) -> Path:
    """A corpus of the docstrings of the standard library and of the packages in `requirements`; built once, cached.

    A document is a module, a line a sentence. Paragraphs that an earlier module has are left out.
    """
    names = re.findall(r"^[\w.-]+", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    packages = [package for name in names for package in importlib.metadata.distributions(name=name)]
    versions = [f"{package.name} {package.version}" for package in packages]
    path = cache / f"documentation-{content_key(versions, sys.version, DOCUMENTATION_VERSION)}.txt"
    with locked(path.with_suffix(".lock")):
        if path.exists():
            return path
        files = python_files(packages)
        with (replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file,
              ProcessPoolExecutor() as pool):
            modules = pool.map(docstring_paragraphs, files, chunksize=32)
            bar = tqdm(modules, "Collecting documentation", len(files), unit=" modules", disable=None)
            write_modules(file, bar)
    return path


def python_files(packages: Iterable[importlib.metadata.Distribution]) -> list[Path]:
    """The modules of the standard library, then those of the packages, without tests."""
    library = Path(sysconfig.get_path("stdlib"))
    library_files = [file for file in library.rglob("*.py") if "site-packages" not in file.parts]
    package_files = set()
    for package in packages:
        package_files.update(Path(file.locate()) for file in package.files or () if file.suffix == ".py")
    files = sorted(library_files) + sorted(package_files)
    return [file for file in files if not SKIPPED_FOLDERS & set(file.parts)]


def write_modules(file: TextIO, modules: Iterable[list[str]]) -> None:
    """Writes each module's paragraphs, a sentence a line, except those that were written before."""
    seen: set[str] = set()
    for paragraphs in modules:
        new = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
        seen.update(new)
        sentences = [sentence for paragraph in new for sentence in split_sentences(paragraph)]
        if new:
            file.write("\n".join(sentences) + "\n\n")


def docstring_paragraphs(path: Path) -> list[str]:
    """Paragraphs of English prose in the docstrings of a Python file: no code, no parameter lists, no markup."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return []
    docstrings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    text = "\n\n".join(filter(None, docstrings))
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        if CODE.search(block):
            continue
        paragraph = ROLE.sub(r"\1", " ".join(block.split()))
        words = WORD.findall(paragraph)
        if len(words) >= SHORTEST_PROSE and len(words) > PROSE_SHARE * len(paragraph.split()):
            paragraphs.append(paragraph)
    return paragraphs
