"""model.py against transformers' ELECTRA, hand arithmetic and torch's softmax."""

import dataclasses
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining

import model
from convert.names import to_transformers
from dataset import Batch, Masked
from model import Electra, ModelConfig, gumbel_noise, sampler_draws
from studies.compute import training_flops

CONFIGS = Path(__file__).parent.parent / "configs"
SIZES = [
    ModelConfig(vocab_size=211, embedding_size=24, hidden_size=64, layers=3, heads=4, feed_forward_size=128,
                generator_size=0.5, max_positions=40),
    ModelConfig(vocab_size=97, embedding_size=32, hidden_size=32, layers=2, heads=2, feed_forward_size=64,
                generator_size=1.0, max_positions=64),
    ModelConfig(vocab_size=500, embedding_size=16, hidden_size=256, layers=1, heads=4, feed_forward_size=96,
                generator_size=0.25, max_positions=24),
]


def gumbel_sample(logits, rng=None):
    return model.gumbel_sample(logits, sampler_draws(logits.shape[:-1], logits.shape[-1], logits.device, rng))


def draws_for(positions, config, seed=0):
    return sampler_draws(positions.shape, config.vocab_size, positions.device, torch.Generator().manual_seed(seed))


def batch(config, B=5, L=17, K=4, seed=0):
    """Random rows with padding and two segments, masked at K slots of which one is empty."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, config.vocab_size, (B, L), generator=rng)
    lengths = torch.randint(K + 2, L + 1, (B, 1), generator=rng)
    mask = torch.arange(L) < lengths
    mask[0] = True
    segments = (torch.arange(L) >= lengths // 2).long() * mask
    positions = torch.stack([torch.randperm(int(n), generator=rng)[:K] for n in mask.sum(1)])
    chosen = torch.ones(B, K, dtype=torch.bool)
    chosen[1, -1] = False
    masked = ids.scatter(1, positions, torch.where(chosen, 4, ids.gather(1, positions)))
    return ids * mask, segments, mask, masked * mask, positions, chosen


def joint(electra, ids, segments, mask, masked, positions, chosen, draws):
    """The joint forward pass on what `batch` made."""
    return electra(Batch(ids, segments, mask), Masked(masked, positions, chosen), draws)


def peers(electra, config):
    """transformers' two models with our weights, sharing embeddings as ours do, in evaluation mode."""
    def build(kind, network, size):
        peer = kind(ElectraConfig(
            vocab_size=config.vocab_size, embedding_size=config.embedding_size, hidden_size=size.hidden,
            num_hidden_layers=config.layers, num_attention_heads=size.heads, intermediate_size=size.feed_forward,
            max_position_embeddings=config.max_positions, pad_token_id=0))
        peer.load_state_dict(to_transformers(network))
        return peer.eval()
    generator = build(ElectraForMaskedLM, electra.generator, config.generator())
    discriminator = build(ElectraForPreTraining, electra.discriminator, config.discriminator())
    generator.electra.embeddings.word_embeddings.padding_idx = None  # the original's [PAD] learns when it is sampled
    discriminator.electra.embeddings = generator.electra.embeddings
    return generator, discriminator


def enlarged(electra):
    """Weights far from their initial ones, so that a wrong wiring shows."""
    for weight in electra.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return electra.eval()


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_logits_equal_those_of_transformers(config, seed):
    torch.manual_seed(seed)
    electra = enlarged(Electra(config))
    generator, discriminator = peers(electra, config)
    ids, segments, mask, masked, positions, _ = batch(config, seed=seed)
    with torch.no_grad():
        ours = electra.generator(masked, segments, mask, positions)
        theirs = generator(masked, mask.long(), segments).logits
        theirs = theirs.gather(1, positions[..., None].expand_as(ours))
        assert ((ours - theirs).abs() <= 1e-5 * theirs.abs().clamp(min=1)).all()
        ours = electra.discriminator(ids, segments, mask)[mask]
        theirs = discriminator(ids, mask.long(), segments).logits[mask]
        assert ((ours - theirs).abs() <= 1e-5 * theirs.abs().clamp(min=1)).all()


@pytest.mark.parametrize("config", SIZES)
def test_gradients_equal_those_of_the_loss_wired_from_transformers(config):
    torch.manual_seed(3)
    electra = enlarged(Electra(config))
    generator, discriminator = peers(electra, config)
    ids, segments, mask, masked, positions, chosen = batch(config)
    output = joint(electra, ids, segments, mask, masked, positions, chosen, draws_for(positions, config))
    loss = output.generator_losses.sum() / chosen.sum() + 50 * output.discriminator_losses.sum() / mask.sum()
    loss.backward()

    labels = torch.full_like(ids, -100).scatter(1, positions, ids.gather(1, positions).masked_fill(~chosen, -100))
    logits = generator(masked, mask.long(), segments).logits
    mlm_loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100)
    corrupted = ids.clone()
    for b, k in chosen.nonzero().tolist():
        corrupted[b, positions[b, k]] = output.sampled_ids[b, k]
    assert torch.equal(output.replaced, corrupted != ids)
    logits = discriminator(corrupted, mask.long(), segments).logits
    disc_loss = F.binary_cross_entropy_with_logits(logits[mask], (corrupted != ids)[mask].float())
    peer_loss = mlm_loss + 50 * disc_loss
    peer_loss.backward()
    torch.testing.assert_close(loss, peer_loss, rtol=1e-5, atol=0)
    total = torch.stack([weight.grad.norm() for weight in electra.parameters()]).norm()
    for network, peer in ((electra.generator, generator), (electra.discriminator, discriminator)):
        theirs = {name: weight.grad for name, weight in peer.named_parameters()}
        for weight in network.parameters():
            weight.data = weight.grad  # so that the gradients travel under transformers' names
        for name, ours in to_transformers(network).items():
            if name != "generator_lm_head.weight":  # tied
                near_zero = 1e-7 * total  # the key biases' gradient is 0 but for rounding: softmax cancels them
                assert (ours - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + near_zero, name


def test_outputs_do_not_depend_on_padding():
    config = SIZES[0]
    electra = enlarged(Electra(config))
    ids, segments, mask, masked, positions, _ = batch(config, L=12)
    wider = [F.pad(x, (0, 9), value=v) for x, v in ((ids, 3), (segments, 1), (mask, False), (masked, 3))]
    with torch.no_grad():
        near, far = electra.discriminator(ids, segments, mask), electra.discriminator(*wider[:3])
        torch.testing.assert_close(near[mask], far[:, :12][mask], rtol=1e-5, atol=1e-5)
        near = electra.generator(masked, segments, mask, positions)
        far = electra.generator(wider[3], wider[1], wider[2], positions)
        torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)


def test_discriminator_loss_reaches_only_the_shared_embeddings_of_the_generator():
    config = SIZES[0]
    electra = Electra(config)
    given = batch(config)
    output = joint(electra, *given, draws_for(given[-1], config))
    output.discriminator_losses.sum().backward()
    shared = set(electra.discriminator.encoder.embeddings.parameters())
    for name, weight in electra.generator.named_parameters():
        assert (weight.grad is not None) == (weight in shared), name
    assert not output.sampled_ids.requires_grad
    assert electra.generator.encoder.project.weight is not electra.discriminator.encoder.project.weight


def test_losses_are_zero_at_empty_slots_and_padding():
    config = SIZES[1]
    ids, segments, mask, masked, positions, chosen = batch(config)
    output = joint(Electra(config), ids, segments, mask, masked, positions, chosen, draws_for(positions, config))
    assert (output.generator_losses[~chosen] == 0).all() and (output.generator_losses[chosen] > 0).all()
    assert (output.discriminator_losses[~mask] == 0).all() and (output.discriminator_losses[mask] > 0).all()
    assert not output.replaced[~mask].any()


def test_initial_weights_are_the_originals():
    config = dataclasses.replace(ModelConfig(), vocab_size=3000, layers=2)
    electra = Electra(config)
    for name, weight in electra.named_parameters():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
        elif weight.ndim == 1:
            assert (weight == 0).all(), name
        elif name.endswith(("project.weight", "prediction.weight")):  # Glorot uniform: +-sqrt(6 / (in + out))
            bound = (6 / sum(weight.shape)) ** 0.5
            assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound, name
        else:  # normal of 0.02 cut at two standard deviations has a standard deviation of 0.880 x 0.02
            assert weight.abs().max() <= 0.04, name
            assert weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.1), name


def test_small_has_the_papers_size_and_flops():
    config = ModelConfig(**tomllib.loads((CONFIGS / "electra_small.toml").read_text()).get("model", {}))
    electra = Electra(config)
    assert sum(p.numel() for p in electra.discriminator.parameters()) == pytest.approx(13.5e6, rel=0.01)
    assert sum(p.numel() for p in electra.parameters()) == pytest.approx(14.2e6, rel=0.01)
    assert config.generator() == (64, 1, 256)
    # by hand, multiplications per token of 128: projection, 12 x (4 H^2 attention + 8 H^2 feed-forward + 2 x 128 H), head
    discriminator = 128 * 256 + 12 * (12 * 256**2 + 2 * 128 * 256) + 256**2 + 256
    generator = 128 * 64 + 12 * (12 * 64**2 + 2 * 128 * 64)
    vocabulary = 19 * (64 * 128 + 128 * 30522)
    by_hand = 1_000_000 * 128 * 3 * 2 * (128 * (discriminator + generator) + vocabulary)
    assert 1_000_000 * 128 * training_flops(config, 128, 19) == by_hand == pytest.approx(1.15e18, rel=0.01)


@pytest.mark.parametrize(("name", "discriminator", "generator", "slots"), [("base", 110e6, (256, 4, 1024), 79),
                                                                            ("large", 335e6, (256, 4, 1024), 130)])
def test_larger_models_have_the_papers_sizes(name, discriminator, generator, slots):
    settings = tomllib.loads((CONFIGS / f"electra_{name}.toml").read_text())
    config = ModelConfig(**settings["model"])
    with torch.device("meta"):
        electra = Electra(config)
    H, layers, V, G = config.hidden_size, config.layers, config.vocab_size, generator[0]
    # by hand: token, position and segment tables and LayerNorm; layers of 12 H^2 weights and 13 H biases and norms; heads
    embeddings, head = (V + 512 + 2 + 2) * H, H * H + H + H + 1
    both = [embeddings + layers * (12 * H * H + 13 * H) + head,
            H * G + G + layers * (12 * G * G + 13 * G) + (G * H + H) + 2 * H + V]
    assert sum(p.numel() for p in electra.discriminator.parameters()) == both[0] == pytest.approx(discriminator, rel=0.01)
    assert sum(p.numel() for p in electra.parameters()) == sum(both)
    assert config.generator() == generator and config.heads == H // 64
    assert int((settings["mask_prob"] + 0.005) * settings["max_length"]) == slots


def test_checkpointed_layers_give_the_same_gradient_and_keep_less():
    """With dropout; what is kept is counted as autograd stores it."""
    config = dataclasses.replace(SIZES[0], dropout=0.3)
    ids, segments, mask, masked, positions, chosen = batch(config)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        electra, kept = enlarged(Electra(config)).train(), 0
        for encoder in (electra.generator.encoder, electra.discriminator.encoder):
            encoder.grad_checkpointing = checkpointed

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            output = joint(electra, ids, segments, mask, masked, positions, chosen, draws_for(positions, config))
        (output.generator_losses.sum() + output.discriminator_losses.sum()).backward()
        found.append(({name: p.grad for name, p in electra.named_parameters()}, kept))
    (plain, much), (saving, little) = found
    assert little < 0.6 * much
    for name, gradient in plain.items():
        assert torch.equal(gradient, saving[name]), name


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a C++ compiler"))])
def test_the_joint_forward_compiles_whole_and_once(backend):
    """No graph break, no recompilation from step to step; losses and gradients equal eager ones."""
    config, results = SIZES[2], []
    electra = enlarged(Electra(config))
    torch.compiler.reset()
    compiled = torch.compile(electra, backend=backend, fullgraph=True)
    given = batch(config)
    for network in (electra, compiled):
        output = joint(network, *given, draws_for(given[-1], config))
        loss = output.generator_losses.sum() + 50 * output.discriminator_losses.sum()
        loss.backward()
        results.append((loss.detach(), [weight.grad for weight in electra.parameters()]))
        electra.zero_grad()
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            given = batch(config, seed=seed)
            joint(compiled, *given, draws_for(given[-1], config, seed)).generator_losses.sum().backward()


# The sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [2, 37, 1000])
def test_samples_follow_softmax(dtype, V):
    rng = torch.Generator().manual_seed(V)
    logits = (2 * torch.randn(V, generator=rng)).to(dtype)
    draws = 200_000
    counts = torch.bincount(gumbel_sample(logits.expand(draws, V), rng), minlength=V).double()
    expected = logits.double().softmax(-1) * draws
    common = expected >= 5  # the rest is one class, as the test wants
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    kept = expected > 0
    assert chisquare(counts[kept], expected[kept], sum_check=False).pvalue > 1e-3


def test_noise_is_finite_for_every_draw():
    limits = torch.finfo(torch.float32)
    draws = torch.tensor([0.0, limits.smallest_normal / 2, limits.tiny, 1e-20, 1.0, 104.0, limits.max, torch.inf])
    noise = gumbel_noise(draws)
    assert noise.isfinite().all() and (noise.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sampler_survives_extreme_logits(dtype):
    logits = torch.full((1000, 50), -torch.inf, dtype=dtype)
    logits[:, 7], logits[:, 8], logits[:, 49] = 1.0, 1.0, -6e4
    assert set(gumbel_sample(logits).tolist()) == {7, 8}
    logits[:, 49] = 6e4
    assert set(gumbel_sample(logits).tolist()) == {49}


def test_sampler_has_no_gradient_and_repeats_with_its_generator():
    logits = torch.randn(4, 9, 100, requires_grad=True)
    sampled = gumbel_sample(logits, torch.Generator().manual_seed(1))
    assert sampled.shape == (4, 9) and sampled.dtype == torch.int64 and not sampled.requires_grad
    assert torch.equal(sampled, gumbel_sample(logits, torch.Generator().manual_seed(1)))


def test_torchs_gumbel_softmax_fails_in_half_precision_where_ours_does_not():
    """What the sampler is a patch for (pytorch#41663); when torch mends it, this test says so."""
    torch.manual_seed(20)  # some 3 draws in 10^8 round to 0: with this seed one of the first million
    logits = torch.zeros(1000, 1000, dtype=torch.float16)
    assert F.gumbel_softmax(logits, dim=-1).isnan().any()
    sampled = gumbel_sample(logits)
    assert ((sampled >= 0) & (sampled < 1000)).all()
