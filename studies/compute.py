"""What training costs, so that runs can be compared at equal compute."""

from model import EncoderSize, ModelConfig


def training_flops(config: ModelConfig, length: int, predictions: int, objective: str = "electra") -> float:
    """FLOPs of training on one example, a mean over the run: three times the forward pass's matrix multiplications.

    Of `length` tokens, `predictions` pass through the generator's vocabulary head; embedding look-ups are free.
    """
    V, E, H = config.vocab_size, config.embedding_size, config.hidden_size
    generator = encoder_flops(config, config.generator(), length)
    generator += predictions * vocabulary_head_flops(config, config.generator())
    large_encoder = encoder_flops(config, config.discriminator(), length)
    large_head = vocabulary_head_flops(config, config.discriminator())  # of one token
    discriminator = large_encoder + 2 * length * (H * H + H)
    return {
        "electra": 3 * (generator + discriminator),
        "mlm": 3 * (large_encoder + predictions * large_head),
        "electra-15": 3 * (generator + discriminator),  # its logits are computed everywhere, too
        "untied": 3 * (generator + discriminator),
        "replace-mlm": 3 * (generator + large_encoder + predictions * large_head),
        "all-tokens-mlm": 3 * (generator + large_encoder + length * (large_head + 2 * H)),
        # Half of the steps train the generator, half only run it to train the discriminator.
        "two-stage": (3 * generator + generator + 3 * discriminator) / 2,
        # The soft samples' vectors, forward and for the gradient; the table's gradient is not taken.
        "straight-through": 3 * (generator + discriminator) + 2 * 2 * predictions * V * E,
    }[objective]


def encoder_flops(config: ModelConfig, size: EncoderSize, length: int) -> int:
    """FLOPs of an encoder's forward pass over one example."""
    H = size.hidden
    layer = 4 * H * H + 2 * H * size.feed_forward + 2 * length * H  # for one token: projections, feed-forward, attention
    projection = config.embedding_size * H if config.embedding_size != H else 0
    return 2 * length * (config.layers * layer + projection)


def vocabulary_head_flops(config: ModelConfig, size: EncoderSize) -> int:
    """FLOPs of predicting one token."""
    return 2 * (size.hidden * config.embedding_size + config.embedding_size * config.vocab_size)
