"""Names on the Hugging Face hub: files in, a folder on this machine out. Nothing is asked for unless a user names it."""

import contextlib
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from utils import InputError, require

HUB_TIMEOUT_S = 5


def hub_folder(name: str, missing: str, patterns: list[str]) -> Path:
    """A folder with the files of a model on the hub, downloaded or from the local cache.

    Raises InputError, beginning with `missing` (what was looked for on this machine), if there are none.
    """
    check_hub_name(name, missing)
    try:
        reach_hub()
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # no network, no such model: each its own type
        with contextlib.suppress(OSError, ValueError):
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        raise InputError(f"{missing}, and it could not be downloaded from the Hugging Face hub "
                         f"({type(error).__name__})") from None


def check_hub_name(name: str, missing: str) -> None:
    """Raises InputError for a text that can't be NAME or OWNER/NAME on the hub."""
    require(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None, f"{missing}, nor a name on the hub")


def reach_hub() -> None:
    """Raises an error within seconds where the hub is out of reach; its own functions would retry for minutes."""
    huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
