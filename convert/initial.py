"""Networks to begin with: those in the folder of a pretraining run, or of transformers' ELECTRA."""

from pathlib import Path

from convert.from_transformers import read_networks
from model import NETWORK_FILES, SavedNetwork, load_network
from studies.objectives import OBJECTIVES
from utils import require


def read_initial(name: str, objective: str, generator_size: float, flag: str) -> dict[str, SavedNetwork]:
    """The networks of a training objective, as far as they are there, by kind.

    `name` is a run's folder, or what read_networks reads, which then takes `generator_size`; `flag` is the command-line flag
    that gave it. Raises InputError if the most important network is missing, or if they don't belong together.
    """
    folder, kinds = Path(name), OBJECTIVES[objective].networks
    paths = {kind: folder / file for kind, file in NETWORK_FILES.items() if (folder / file).is_file()}
    if paths:
        networks = {kind: load_network(paths[kind], [kind], flag) for kind in kinds if kind in paths}
    else:
        networks = {kind: saved for kind, saved in read_networks(name, generator_size, flag).items() if kind in kinds}
    essential = kinds[0] if objective == "two-stage" else kinds[-1]  # two-stage copies the generator
    require(essential in networks, f"{flag} {name} has no {essential} ({NETWORK_FILES[essential]}), with which --objective "
                                   f"{objective} begins: name the folder of a run that trained one")
    require(len({(saved.config, saved.tokenizer) for saved in networks.values()}) == 1,
            f"the networks in {name} have different sizes or vocabularies: expected files of one run")
    return networks
