"""Networks to begin with: those in the folder of a pretraining run, or of transformers' ELECTRA."""

from collections.abc import Sequence
from pathlib import Path

from convert.from_transformers import read_pair
from model import NETWORK_FILES, SavedNetwork, load_network
from utils import require


def read_initial(name: str, kinds: Sequence[str], essential: str, generator_size: float,
                 flag: str) -> dict[str, SavedNetwork]:
    """The networks of these kinds, as far as they are there, by kind.

    `name` is a run's folder, or what read_pair reads, which then takes `generator_size`; `flag` is the command-line flag
    that gave it. Raises InputError if the network of the `essential` kind is missing, or if the networks don't belong
    together.
    """
    folder = Path(name)
    paths = {kind: folder / file for kind, file in NETWORK_FILES.items() if (folder / file).is_file()}
    if not paths and "discriminator" in kinds:
        networks = read_pair(name, generator_size, flag)
    else:
        networks = {kind: load_network(paths[kind], [kind], flag) for kind in kinds if kind in paths}
    require(essential in networks, f"{flag} {name} has no {essential} ({NETWORK_FILES[essential]}), with which this "
                                   "objective begins: name the folder of a run that trained one")
    require(len({(saved.config, saved.tokenizer) for saved in networks.values()}) == 1,
            f"the networks in {name} have different sizes or vocabularies: expected files of one run")
    return networks
