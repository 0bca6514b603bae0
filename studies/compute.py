"""What training costs, so that runs can be compared at equal compute."""

from model import ModelConfig


def training_flops(config: ModelConfig, length: int, predictions: int) -> int:
    """FLOPs of training on one example: three times the forward pass's matrix multiplications.

    Of `length` tokens, `predictions` pass through the generator's vocabulary head; embedding look-ups are free.
    """
    E, V = config.embedding_size, config.vocab_size
    multiplications = 0
    for H, _, inner in (config.generator(), config.discriminator()):
        layer = 4 * H * H + 2 * H * inner + 2 * length * H  # for one token: projections, feed-forward, attention
        projection = E * H if E != H else 0
        multiplications += length * (config.layers * layer + projection)
    multiplications += predictions * (config.generator().hidden * E + E * V)  # the generator's head
    multiplications += length * (config.hidden_size**2 + config.hidden_size)  # the discriminator's head
    return 3 * 2 * multiplications
