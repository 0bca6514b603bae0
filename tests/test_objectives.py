"""studies/objectives.py against transformers, the paper's formulas written out on a few tokens, and hand arithmetic."""

import dataclasses
import tomllib
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Killed, assert_same, metrics, stop_after_save
from scipy.stats import chisquare
from test_model import SIZES, batch, enlarged
from transformers import ElectraConfig, ElectraForMaskedLM

from convert.names import to_transformers
from dataset import Batch, Masked, mask_tokens
from model import Encoder, ModelConfig, load_network
from Pretraining import main
from studies.compute import training_flops
from studies.objectives import OBJECTIVES, build_objective, gumbel_argmax
from utils import load

CONFIGS = Path(__file__).parent.parent / "configs"
EQUAL = ModelConfig(vocab_size=97, embedding_size=24, hidden_size=64, layers=2, heads=1, feed_forward_size=256,
                    generator_size=1.0, max_positions=40)  # generator and discriminator of one size
FLAGS = {"two-stage": {"model__generator_size": 1, "model__heads": 1, "model__feed_forward_size": 64}}


def joint_output(electra, config, seed=0):
    """An objective's output for a small batch, the batch, and its masked tokens."""
    ids, segments, mask, masked_ids, positions, chosen = batch(config, seed=seed)
    given, masked = Batch(ids, segments, mask), Masked(masked_ids, positions, chosen)
    draws = electra.draws(masked, torch.Generator().manual_seed(seed))
    return electra(given, masked, draws), given, masked, draws


def loss_of(electra, output, given, masked, disc_weight=50.0):
    counts = {"chosen": masked.chosen.sum(), "judged": electra.judged(given, masked).sum()}
    means = {name: total / counts[over] for name, (total, over) in electra.measure(output, given, masked).items()}
    return electra.loss(means, disc_weight), means


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_the_forward_pass_is_one_graph_for_the_compiler(name, grad_checkpointing):
    """With several, CUDA graphs would sum the gradient of the shared embeddings wrongly (see compile_mode)."""
    torch._dynamo.reset()
    electra = build_objective(name, EQUAL, 1.0).train()
    for module in electra.modules():
        if isinstance(module, Encoder):
            module.grad_checkpointing = grad_checkpointing
    electra.begin_step(0, first=True)
    ids, segments, mask, masked_ids, positions, chosen = batch(EQUAL, seed=0)
    masked = Masked(masked_ids, positions, chosen)
    explanation = torch._dynamo.explain(electra)(Batch(ids, segments, mask), masked,
                                                 electra.draws(masked, torch.Generator().manual_seed(0)))
    assert explanation.graph_count == 1, explanation.break_reasons


# Losses and gradients


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("seed", range(2))
def test_mlm_equals_transformers_with_the_same_weights(config, seed):
    torch.manual_seed(seed)
    electra = enlarged(build_objective("mlm", config, 1.0))
    size = config.discriminator()
    peer = ElectraForMaskedLM(ElectraConfig(
        vocab_size=config.vocab_size, embedding_size=config.embedding_size, hidden_size=size.hidden,
        num_hidden_layers=config.layers, num_attention_heads=size.heads, intermediate_size=size.feed_forward,
        max_position_embeddings=config.max_positions))
    peer.load_state_dict(to_transformers(electra.mlm))
    peer.eval().electra.embeddings.word_embeddings.padding_idx = None
    output, given, masked, _ = joint_output(electra, config, seed)
    loss, means = loss_of(electra, output, given, masked)
    loss.backward()
    labels = torch.full_like(given.ids, -100)
    labels.scatter_(1, masked.positions, given.ids.gather(1, masked.positions).masked_fill(~masked.chosen, -100))
    expected = peer(masked.ids, given.attention_mask.long(), given.segments, labels=labels)
    expected.loss.backward()
    assert means.keys() == {"mlm_loss"}
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    logits = expected.logits.gather(1, masked.positions[..., None].expand_as(output.generator_logits))
    torch.testing.assert_close(output.generator_logits, logits, rtol=1e-5, atol=1e-5)
    gradients = {name: weight.grad for name, weight in peer.named_parameters()}
    for weight in electra.mlm.parameters():
        weight.data = weight.grad  # so that the gradients travel under transformers' names
    for name, gradient in to_transformers(electra.mlm).items():
        if name != "generator_lm_head.weight":  # tied
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-6, msg=name)


def test_masking_of_bert_has_its_shares(vocabulary):
    """Of 15% chosen tokens 80% become [MASK], 10% a random piece and 10% stay (BERT, section 3.1)."""
    ids = torch.randint(5, 20, (4000, 40))  # few of all pieces, so that random ones are mostly others
    ids[:, 0], ids[:, -1] = vocabulary.cls, vocabulary.sep
    whole = Batch(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
    bert = OBJECTIVES["mlm"]
    masked = mask_tokens(whole, vocabulary, 0.15, 40, torch.Generator().manual_seed(1), bert.kept_prob, bert.random_prob)
    before, after = (x.gather(1, masked.positions)[masked.chosen] for x in (ids, masked.ids))
    number = len(before)
    assert number == 4000 * 6
    is_mask, changed = after == vocabulary.mask, after != before
    V = vocabulary.size
    random_share = 0.1 * (1 - 2 / V)  # a random piece can be the same one or [MASK]
    for share, expected in ((is_mask, 0.8 + 0.1 / V), (changed & ~is_mask, random_share)):
        assert share.double().mean().item() == pytest.approx(expected, abs=4 * (expected * (1 - expected) / number) ** 0.5)
    pieces = np.bincount(after[changed & ~is_mask], minlength=V)
    assert (np.delete(pieces, vocabulary.mask) > 0).all()  # any piece of the vocabulary
    not_chosen = torch.ones_like(ids, dtype=torch.bool).scatter(1, masked.positions, ~masked.chosen)
    assert torch.equal(masked.ids[not_chosen], ids[not_chosen])


@pytest.mark.parametrize("config", SIZES)
def test_electra_15_is_judged_on_the_chosen_tokens_alone(config):
    electra = enlarged(build_objective("electra-15", config, 1.0))
    output, given, masked, _ = joint_output(electra, config)
    loss, means = loss_of(electra, output, given, masked, disc_weight=7.0)
    losses = []
    for b, k in masked.chosen.nonzero().tolist():
        place = masked.positions[b, k]
        logit, label = output.discriminator_logits[b, place], output.sampled_ids[b, k] != given.ids[b, place]
        losses.append(-F.logsigmoid(logit if label else -logit))
    torch.testing.assert_close(means["disc_loss"], torch.stack(losses).mean())
    torch.testing.assert_close(loss, means["mlm_loss"] + 7 * torch.stack(losses).mean())


@pytest.mark.parametrize("config", SIZES)
def test_gradients_of_untied_embeddings_add_up_to_those_of_shared_ones(config):
    shared, untied = (enlarged(build_objective(name, config, 1.0)).eval() for name in ("electra", "untied"))
    untied.load_state_dict(shared.state_dict())
    losses = []
    for electra in (shared, untied):
        output, given, masked, _ = joint_output(electra, config)
        losses.append(loss_of(electra, output, given, masked)[0])
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    networks = untied.generator.encoder.embeddings, untied.discriminator.encoder.embeddings
    for name, weight in shared.generator.encoder.embeddings.named_parameters():
        parts = [network.get_parameter(name).grad for network in networks]
        assert all(part.abs().sum() > 0 for part in parts)
        torch.testing.assert_close(weight.grad, sum(parts), msg=name)


@pytest.mark.parametrize("config", SIZES)
def test_replace_mlm_predicts_the_chosen_tokens_from_the_samples(config):
    electra = enlarged(build_objective("replace-mlm", config, 1.0))
    output, given, masked, _ = joint_output(electra, config)
    loss, means = loss_of(electra, output, given, masked)
    every_position = torch.arange(given.ids.shape[1]).expand_as(given.ids)
    logits = electra.mlm(output.corrupted_ids, given.segments, given.attention_mask, every_position)
    losses, generator_losses = [], []
    for b, k in masked.chosen.nonzero().tolist():
        place = masked.positions[b, k]
        assert output.corrupted_ids[b, place] == output.sampled_ids[b, k]
        losses.append(-logits[b, place].log_softmax(-1)[given.ids[b, place]])
        generator_losses.append(-output.generator_logits[b, k].log_softmax(-1)[given.ids[b, place]])
    torch.testing.assert_close(means["large_mlm_loss"], torch.stack(losses).mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean() + torch.stack(generator_losses).mean())


@pytest.mark.parametrize("config", SIZES)
def test_all_tokens_mlm_is_the_papers_mixture(config):
    """D * [input token] + (1 - D) * softmax, at every token that is no padding."""
    electra = enlarged(build_objective("all-tokens-mlm", config, 1.0))
    output, given, masked, _ = joint_output(electra, config)
    loss, means = loss_of(electra, output, given, masked)
    x = electra.mlm.encoder(output.corrupted_ids, given.segments, given.attention_mask)
    copied = electra.copy(x).sigmoid()  # (B, L, 1)
    mixture = copied * F.one_hot(output.corrupted_ids, config.vocab_size) + (1 - copied) * electra.mlm.predict(x).softmax(-1)
    torch.testing.assert_close(mixture.sum(-1), torch.ones(given.ids.shape))
    losses = -mixture.gather(-1, given.ids[..., None]).squeeze(-1).log()
    expected = losses[given.attention_mask].mean()
    torch.testing.assert_close(means["large_mlm_loss"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected + means["mlm_loss"], rtol=1e-4, atol=1e-5)


def test_two_stage_trains_one_network_at_a_time_and_copies_the_encoder():
    electra = enlarged(build_objective("two-stage", EQUAL, 1.0))
    electra.begin_step(0, first=True)
    output, given, masked, _ = joint_output(electra, EQUAL)
    loss, means = loss_of(electra, output, given, masked)
    loss.backward()
    assert means.keys() == {"mlm_loss", "sampled_accuracy"} and loss == means["mlm_loss"]
    assert all(weight.grad is None for weight in electra.discriminator.parameters())
    assert all(weight.grad is not None for weight in electra.generator.parameters())
    electra.zero_grad()

    electra.begin_step(1, first=True)
    assert_same(dict(electra.discriminator.encoder.state_dict()), dict(electra.generator.encoder.state_dict()))
    output, given, masked, _ = joint_output(electra, EQUAL)
    loss, means = loss_of(electra, output, given, masked)
    loss.backward()
    labels, logits = output.replaced[given.attention_mask], output.discriminator_logits[given.attention_mask]
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, labels.float()))
    assert all(weight.grad is None for weight in electra.generator.parameters())
    assert all(weight.grad is not None for weight in electra.discriminator.parameters())
    before = electra.discriminator.prediction.weight.clone()
    electra.discriminator.encoder.project.weight.data += 1
    electra.begin_step(1, first=False)
    assert torch.equal(electra.discriminator.prediction.weight, before)
    assert not torch.equal(electra.discriminator.encoder.project.weight, electra.generator.encoder.project.weight)


@pytest.mark.parametrize(("config", "temperature"), [(SIZES[0], 1.0), (SIZES[1], 0.5), (SIZES[2], 2.0)])
def test_straight_through_reads_hard_samples_and_has_the_gradient_of_soft_ones(config, temperature):
    electra = enlarged(build_objective("straight-through", config, temperature))
    output, given, masked, draws = joint_output(electra, config)

    # Forward: the plain discriminator on the argmax of logits and noise.
    noise = -draws.clamp(min=torch.finfo(torch.float32).tiny).log()
    perturbed = output.generator_logits + noise
    assert torch.equal(output.sampled_ids, perturbed.argmax(-1))
    plain = electra.discriminator(output.corrupted_ids, given.segments, given.attention_mask)
    assert torch.equal(output.discriminator_logits, plain)

    # Backward: by the chain rule, the gradient at the chosen tokens' vectors times the soft samples' derivative.
    gradient, = torch.autograd.grad(output.discriminator_losses.sum(), output.generator_logits, retain_graph=True)
    table = electra.discriminator.encoder.embeddings.token.weight
    vectors = table[output.corrupted_ids].detach().requires_grad_()
    logits = electra.discriminator(vectors, given.segments, given.attention_mask)
    losses = F.binary_cross_entropy_with_logits(logits, output.replaced.float(), reduction="none") * given.attention_mask
    at_vectors, = torch.autograd.grad(losses.sum(), vectors)
    free_logits = output.generator_logits.detach().requires_grad_()
    total = 0.0
    for b, k in masked.chosen.nonzero().tolist():
        soft = ((free_logits[b, k] + noise[b, k]) / temperature).softmax(-1)
        total = total + (soft @ table.detach() * at_vectors[b, masked.positions[b, k]]).sum()
    expected, = torch.autograd.grad(total, free_logits)
    assert expected.norm() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_straight_through_samples_follow_softmax():
    logits = 2 * torch.randn(37, generator=torch.Generator().manual_seed(0))
    draws = torch.empty(100_000, 37).exponential_(generator=torch.Generator().manual_seed(1))
    sampled = gumbel_argmax(logits.expand(100_000, 37), draws)
    expected = 100_000 * logits.double().softmax(-1)
    assert chisquare(np.bincount(sampled, minlength=37), expected.numpy()).pvalue > 1e-3


# Compute


def test_flops_of_every_objective_by_hand():
    """Multiplications and additions of one example, for the sizes of the paper's Small."""
    config, L, K = ModelConfig(), 128, 19
    large = 2 * L * (128 * 256 + 12 * (12 * 256**2 + 2 * 128 * 256))  # projection, then per layer 12 H^2 + 2 L H
    small = 2 * L * (128 * 64 + 12 * (12 * 64**2 + 2 * 128 * 64))
    large_head, small_head = (2 * (H * 128 + 128 * 30522) for H in (256, 64))  # of one token
    detector = 2 * L * (256**2 + 256)
    generator, discriminator = small + K * small_head, large + detector
    expected = {"electra": 3 * (generator + discriminator), "mlm": 3 * (large + K * large_head),
                "electra-15": 3 * (generator + discriminator), "untied": 3 * (generator + discriminator),
                "replace-mlm": 3 * (generator + large + K * large_head),
                "all-tokens-mlm": 3 * (generator + large + L * large_head + 2 * L * 256),
                "two-stage": 2 * generator + 1.5 * discriminator,
                "straight-through": 3 * (generator + discriminator) + 4 * K * 30522 * 128}
    assert expected.keys() == OBJECTIVES.keys()
    for name, flops in expected.items():
        assert training_flops(config, L, K, name) == flops, name


def test_flops_decide_the_number_of_steps_and_the_schedule(command, tmp_path, capsys):
    assert main(command("by-steps", objective="mlm", steps=10)) == 0
    cost = float(capsys.readouterr().out.split(" FLOPs in 10 steps")[0].split()[-1])
    assert main(command("by-flops", objective="mlm", flops=cost, steps=999)) == 0
    assert metrics(tmp_path / "by-flops") == metrics(tmp_path / "by-steps")
    assert main(command("by-flops", objective="mlm", flops=cost, steps=999)) == 0
    assert "is finished, all 10 steps" in capsys.readouterr().out
    assert main(command("by-flops", objective="mlm", flops=cost + 1e9, steps=999)) == 2
    assert "flops" in capsys.readouterr().err
    assert main(command("too-few", flops=10.0)) == 2
    assert "less than one step" in capsys.readouterr().err


def test_configurations_of_bert_have_the_sizes_and_the_cost_of_electra():
    for size, settings in (("small", {"flops": 1.15e18}), ("tiny", {})):
        electra, bert = (tomllib.loads((CONFIGS / f"{name}_{size}.toml").read_text()) for name in ("electra", "bert"))
        electra_model = ModelConfig(**electra["model"])
        bert_model = dataclasses.replace(ModelConfig(**bert["model"]), generator_size=electra_model.generator_size)
        assert bert_model == electra_model and bert["objective"] == "mlm"
        length, K = electra["max_length"], round(0.15 * electra["max_length"])
        cost = electra["steps"] * electra["batch_size"] * training_flops(electra_model, length, K)
        assert (bert | settings)["flops"] == pytest.approx(cost, rel=1e-3)


# Runs


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_resumes_and_saves_its_networks(command, tmp_path, capsys, monkeypatch, objective):
    """An interrupted run equals an unbroken one; what the objective lacks is in no metric, and its networks are saved."""
    flags = {"objective": objective, "accumulate": 2, "learning_rate": 3e-3, "disc_weight": 1} | FLAGS.get(objective, {})
    assert main(command("unbroken", **flags)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command(**flags))
    assert main(command(**flags)) == 0
    unbroken, resumed = (load(tmp_path / name / "checkpoint-8.pt") for name in ("unbroken", "run"))
    for checkpoint in (unbroken, resumed):
        del checkpoint["means"]["seconds"]
    assert_same(unbroken, resumed)
    assert metrics(tmp_path / "unbroken") == metrics(tmp_path / "run")

    networks = OBJECTIVES[objective].networks
    files = {"generator": "gen.pt", "discriminator": "disc.pt", "mlm": "mlm.pt"}
    assert {path.name for path in (tmp_path / "run").glob("*.pt")} == {files[kind] for kind in networks} | {
        "checkpoint-4.pt", "checkpoint-8.pt"}
    for kind in networks:
        assert load_network(tmp_path / "run" / files[kind], [kind], "--weights").kind == kind
    records = metrics(tmp_path / "run")
    names = {name for record in records for name in record}
    assert ("disc_loss" in names) == ("disc_auc" in names) == ("discriminator" in networks)
    assert ("large_mlm_loss" in names) == (networks == ("generator", "mlm"))
    assert ("sampled_accuracy" in names) == ("generator" in networks)
    first, last = (record["mlm_loss"] for record in (records[0], records[-1]))
    assert last < first


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs_in_half_precision(command, tmp_path, objective, precision):
    flags = {"objective": objective, "precision": precision, "steps": 4, "eval_every": 2} | FLAGS.get(objective, {})
    assert main(command(**flags)) == 0
    assert np.isfinite([record["mlm_loss"] for record in metrics(tmp_path / "run") if record["heldout"]]).all()


@pytest.mark.parametrize("objective", ["electra", "two-stage"])
def test_a_compiled_run_equals_an_eager_one_and_resumes(command, tmp_path, monkeypatch, objective):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    flags = {"objective": objective, "model__dropout": 0, "learning_rate": 3e-3} | FLAGS.get(objective, {})
    assert main(command("eager", **flags)) == 0
    assert main(command("unbroken", compile=True, **flags)) == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        main(command(compile=True, **flags))
    assert main(command(compile=True, **flags)) == 0
    assert metrics(tmp_path / "unbroken") == metrics(tmp_path / "run")
    eager, compiled = (metrics(tmp_path / name)[-1] for name in ("eager", "run"))
    assert compiled == pytest.approx(eager, rel=1e-3, abs=1e-3)


def test_two_stage_has_a_schedule_in_each_half(command, tmp_path):
    assert main(command(objective="two-stage", log_every=1, **FLAGS["two-stage"])) == 0
    rates = [record["learning_rate"] for record in metrics(tmp_path / "run") if not record["heldout"]]
    assert rates[:4] == rates[4:] and rates[0] == 0 and max(rates) == rates[2]


# Bad input


def test_objectives_that_do_not_fit_are_refused(command, tmp_path, capsys):
    assert main(command(objective="two-stage")) == 2
    assert "--model.generator-size 1" in capsys.readouterr().err
    assert main(command(objective="mlm")) == 0
    assert main(command()) == 2
    assert "objective = mlm, this command has electra" in capsys.readouterr().err
    assert main(command("next", init_from=tmp_path / "run")) == 2
    assert "disc.pt" in capsys.readouterr().err
    assert main(command("next", init_from=tmp_path / "run", objective="replace-mlm")) == 0  # takes the large network
    assert main(command("pair")) == 0
    assert main(command("third", init_from=tmp_path / "pair", objective="mlm")) == 2
    assert "mlm.pt" in capsys.readouterr().err
    assert main(command("fourth", objective="bert")) == 2
    capsys.readouterr()
    assert main(command("staged", objective="two-stage", **FLAGS["two-stage"])) == 0
    assert main(command("staged", objective="two-stage", steps=20, extend=True, **FLAGS["two-stage"])) == 2
    assert "border between" in capsys.readouterr().err


def test_a_run_begins_from_the_networks_of_its_objective(command, tmp_path):
    assert main(command(objective="mlm")) == 0
    assert main(command("next", init_from=tmp_path / "run", objective="mlm", learning_rate=1e-9, warmup_steps=0)) == 0
    before, after = (load_network(tmp_path / name / "mlm.pt", ["mlm"], "--weights").network.state_dict()
                     for name in ("run", "next"))
    for name, weight in before.items():
        torch.testing.assert_close(weight, after[name], rtol=0, atol=1e-6)
