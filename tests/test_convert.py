"""transformers in and out: exported folders against our networks, imported pairs against transformers' own step, and other
languages all the way."""

import copy
import json
import random

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import metrics, write_pair
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from transformers import (AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification,
                          AutoTokenizer, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining,
                          ElectraForSequenceClassification, ElectraTokenizer, pipeline)

import Finetuning
import LM_DEMO
import Pretraining as script
from dataset import CASES, SPECIAL, Vocabulary, learn_vocabulary, load_vocabulary, prepare, scan_corpus, wordpiece
from model import Classifier, ModelConfig, classifier_to_transformers, to_transformers, to_transformers_config
from Pretraining import main, read_network
from utils import InputError, load

ODD = ["The Café in ZÜRICH", "naïve Ёлка, Йод!", "日本 tea 茶", "tea 😀👩‍🚀!", "e\u0301 composed é", "", " \t ",
       "a\u200bb\u0000c\ufffd", "x" * 101, "Ήλιος ήλιος ΣΟΦΌΣ", "مرحبا İstanbul ß ǅ ﬁ", "[ MASK ]"]
LANGUAGES = {
    "Russian": ("Ёжик Москва ёлка ещё мой йод край новый дом чай её моё зелёный видит любит под над и но тогда".split(),
                ("ёлка", "Ёлка", "елка"), ("мой", "Мой", "мои")),
    "Greek": ("Στην Αθήνα ήλιος η θάλασσα είναι μικρή βλέπει αγαπά σπίτι δέντρο παλιό κάτω πάνω και αλλά τότε ένα".split(),
              ("ήλιος", "Ήλιος", "ηλιος"), ("είναι", "Είναι", "ειναι")),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# Tokenizers


def sentences(words, count, seed=0):
    """Capitalized sentences of 3 to 9 words, each word the next in `words`."""
    rng = random.Random(seed)
    starts = [(rng.randrange(len(words)), rng.randint(3, 9)) for _ in range(count)]
    texts = [" ".join(words[(start + n) % len(words)] for n in range(length)) for start, length in starts]
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


@pytest.fixture(scope="module")
def accented_corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    words = [*LANGUAGES["Russian"][0], *LANGUAGES["Greek"][0], "Café", "naïve", "Zürich", "tea", "日本"]
    path.write_text("\n".join(sentences(words, 300)), encoding="utf-8")
    return scan_corpus((path,))


@pytest.mark.parametrize("case", CASES)
def test_exported_tokenizers_give_our_ids(tmp_path, accented_corpus, case):
    ours = learn_vocabulary(accented_corpus, 400, case)
    for name, text in ours.to_transformers(24).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = [kind.from_pretrained(tmp_path) for kind in (AutoTokenizer, ElectraTokenizer)]
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode("[MASK]", "tea").ids == [ours.cls, ours.mask, ours.sep, *ours.encode(["tea"])[0], ours.sep]
    (tmp_path / "tokenizer.json").unlink()  # as before tokenizer.json came up
    for theirs in (*loaded, ElectraTokenizer.from_pretrained(tmp_path)):
        assert len(theirs) == ours.size and theirs.get_vocab() == {piece: n for n, piece in enumerate(ours.pieces())}
        for text in ODD:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode([text])[0], text
        pair = theirs("мой ЧАЙ", "σπίτι")
        first, second = ours.encode(["мой ЧАЙ", "σπίτι"])
        assert pair["input_ids"] == [ours.cls, *first, ours.sep, *second, ours.sep]
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert theirs("tea [MASK]")["input_ids"][-2] == ours.mask == theirs.mask_token_id
        batch = theirs(["tea " * 99, "tea"], truncation=True, padding=True)
        assert len(batch["input_ids"][0]) == 24 == theirs.model_max_length
        assert batch["input_ids"][1][3:] == [ours.pad] * 21 and sum(batch["attention_mask"][1]) == 3
        assert theirs.decode(ours.encode(["tea."])[0]) == "tea."
    assert load_vocabulary(str(tmp_path)).state() == ours.state()  # vocab.txt and tokenizer_config.json


@pytest.mark.parametrize(("pieces", "case"), [
    (["the", "##s", "a"], "uncased"), (["the", "The"], "cased"), (["Ελ", "έ"], "cased"), (["cafe", "é"], "uncased-accents"),
    (["мои", "й"], "uncased-accents"), (["한", "국"], "uncased-accents"), (["ß", "ø", "茶"], "uncased")])
def test_a_vocab_txt_tells_its_case_unless_told(tmp_path, pieces, case):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *pieces]), encoding="utf-8")
    states = {name: wordpiece({}, *CASES[name]).normalizer.__getstate__() for name in CASES}
    for given in ("auto", *CASES):
        found = load_vocabulary(str(tmp_path / "vocab.txt"), given).tokenizer.normalizer.__getstate__()
        assert found == states[case if given == "auto" else given]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "strip_accents": false}')
    assert load_vocabulary(str(tmp_path)).tokenizer.normalizer.__getstate__() == states["uncased-accents"]


def test_a_case_that_can_not_be_had_is_refused(tmp_path, vocabulary):
    for name, text in vocabulary.to_transformers(24).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"--case cased is for vocab.txt .*tokenizer.json has a handling of its own"):
        load_vocabulary(str(tmp_path), "cased")
    for broken in ("{", '{"do_lower_case": "yes"}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(InputError, match="can't be read"):
            load_vocabulary(str(tmp_path / "vocab.txt"))


def test_the_cache_keeps_a_vocabulary_of_each_case(tmp_path, accented_corpus):
    found = {case: prepare(accented_corpus.paths, None, 400, 24, "packed", tmp_path, case)[0] for case in ("auto", *CASES)}
    assert found["auto"].state() == found["uncased"].state()
    for case in CASES:
        assert found[case].state() == learn_vocabulary(accented_corpus, 400, case).state()


# Out


def test_exports_lose_no_file_and_say_what_is_missing(command, tmp_path, capsys):
    target = tmp_path / "export"
    (target / "discriminator").mkdir(parents=True)
    foreign = target / "discriminator" / "pytorch_model.bin"
    foreign.write_bytes(b"another model")
    assert main([*command(), "--export", str(target)]) == 2  # before the first step
    assert "pytorch_model.bin" in capsys.readouterr().err and not (tmp_path / "run" / "config.toml").exists()
    foreign.unlink()
    for _ in range(2):  # the second replaces what the first wrote
        assert main([*command(), "--export", str(target)]) == 0
        assert {path.name for path in (target / "discriminator").iterdir()} == script.EXPORTED
    (tmp_path / "run" / "gen.pt").unlink()
    assert main([*command(), "--export", str(target)]) == 2
    assert "gen.pt is missing" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "run" / "disc.pt"):
        assert main([*command(), "--export", str(folder)]) == 2
    with script.locked(tmp_path / "run" / ".lock"):
        assert main([*command(), "--export", str(target)]) == 2
    assert "in use" in capsys.readouterr().err.splitlines()[-1]


def test_exports_need_no_new_weights_and_have_a_card(command, tmp_path):
    assert main([*command(), "--export", str(tmp_path)]) == 0
    for kind, auto, tag, head in (("generator", AutoModelForMaskedLM, "fill-mask", 0),
                                  ("discriminator", AutoModelForPreTraining, "feature-extraction", 0),
                                  ("generator", AutoModel, "fill-mask", 0),
                                  ("discriminator", AutoModel, "feature-extraction", 0),
                                  ("discriminator", AutoModelForSequenceClassification, "feature-extraction", 4)):
        _, found = auto.from_pretrained(tmp_path / kind, output_loading_info=True)
        assert len(found["missing_keys"]) == head and not found["mismatched_keys"]
        assert all(name.startswith("classifier.") for name in found["missing_keys"])
        card = ModelCard.load(tmp_path / kind / "README.md")
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == tag and card.data.license is None
        last = f"| 8 | {metrics(tmp_path / 'run')[-1]['mlm_loss']:.4f} |"
        assert "corpus.txt" in card.text and last in card.text and "steps = 8" in card.text and "uncased" in card.text


@pytest.mark.parametrize(("outputs", "scale"), [(3, 1.0), (1, 5.0)])
def test_a_classifier_is_the_same_in_transformers(outputs, scale):
    config = ModelConfig(vocab_size=90, embedding_size=16, hidden_size=256, layers=2, heads=4, feed_forward_size=80)
    model = Classifier(config, outputs).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    theirs = ElectraForSequenceClassification(ElectraConfig(**to_transformers_config(config, config.discriminator()),
                                                            num_labels=outputs)).eval()
    theirs.load_state_dict(classifier_to_transformers(model, scale))
    ids = torch.randint(90, (50, 12))
    with torch.no_grad():
        ours = scale * model(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
        assert (ours - theirs(ids).logits).abs().max() < 1e-4 < ours.std()
        for dtype in (torch.bfloat16, torch.float16):  # its head costs no more than rounding our outputs does
            half = copy.deepcopy(theirs).to(dtype)
            vectors = half.electra(ids).last_hidden_state
            linear = F.linear(vectors[:, 0], *((scale * weight).to(dtype) for weight in model.prediction.parameters()))
            rounding = torch.finfo(dtype).eps * linear.abs().clamp(min=1)
            assert ((half.classifier(vectors) - linear).abs() <= 2 * rounding).all()


@pytest.mark.parametrize("key", ["sst2", "mnli", "stsb"])
def test_a_fine_tuned_model_goes_to_transformers(tmp_path, vocabulary, glue, capsys, key):
    weights, lines, target = write_pair(tmp_path, vocabulary)[1], tmp_path / "lines.txt", tmp_path / "export"
    pairs = [("the old dog", "a Cat eats."), ("red tree", "birds")]
    texts = [pair[:len(Finetuning.TASKS[key].texts)] for pair in pairs]
    lines.write_text("\n".join("\t".join(text) for text in texts), encoding="utf-8")

    def tune(source, *flags, output="out"):
        return Finetuning.main(["--task", key, "--weights", str(source), "--data-dir", str(glue), "--output",
                                str(tmp_path / output), *"--epochs 1 --max-length 24 --precision fp32 --device cpu".split(),
                                *flags])
    assert tune(weights, "--export", str(target)) == 2 and "--save-model keeps model.pt" in capsys.readouterr().err
    assert tune(weights, "--save-model") == 0
    kept = tmp_path / "out" / key / "seed-0" / "model.pt"
    assert tune(kept, "--export", str(target), "--predict-file", str(lines)) == 0
    theirs, found = AutoModelForSequenceClassification.from_pretrained(target, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(target)
    batch = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
    task = Finetuning.TASKS[key]
    ours = read_network(kept, {"classifier": lambda config: Classifier(config, len(task.labels) or 1)}, "", [key]).network
    with torch.no_grad():
        wanted = ours(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"].bool()) * (task.highest or 1)
        assert torch.allclose(theirs.eval()(**batch).logits, wanted, atol=1e-4)
    predicted = [line.split("\t")[1] for line in
                 (tmp_path / "out" / "predictions" / "lines-predictions.tsv").read_text().splitlines()[1:]]
    answers = pipeline("text-classification", model=str(target))(
        [{"text": text[0], "text_pair": text[1]} if len(text) > 1 else text[0] for text in texts])
    if task.labels:
        assert [answer["label"] for answer in answers] == predicted and set(theirs.config.label2id) == set(task.labels)
    else:
        assert theirs.config.problem_type == "regression"
        assert [answer["score"] for answer in answers] == pytest.approx(list(map(float, predicted)), abs=1e-4)
    card = ModelCard.load(target / "README.md")
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["scores"]
    assert card.data.pipeline_tag == "text-classification" and Finetuning.scores_text(scores) in card.text
    assert tune(target, output="again") == 0  # as an encoder it comes in again


# In


def save_pair(folder, vocabulary, discriminator, generator, **shared):
    """transformers' pair of random weights with embeddings in common, saved in two folders."""
    pair = {}
    for name, kind, sizes in (("generator", ElectraForMaskedLM, generator),
                              ("discriminator", ElectraForPreTraining, discriminator)):
        pair[name] = kind(ElectraConfig(vocab_size=vocabulary.size, **shared, **dict(
            zip(("hidden_size", "num_attention_heads", "intermediate_size"), sizes, strict=True)))).eval()
        if name == "discriminator":
            pair[name].electra.embeddings.load_state_dict(pair["generator"].electra.embeddings.state_dict())
        pair[name].save_pretrained(folder / name)
        (folder / name / "vocab.txt").write_text("\n".join(vocabulary.pieces()), encoding="utf-8")
    return pair


@pytest.mark.parametrize(("embedding", "discriminator", "generator"), [
    (128, (256, 4, 1024), (256, 4, 1024)),  # google/electra-small, whose generator has full width
    (768, (768, 12, 3072), (256, 4, 1024)),  # -base
    (1024, (1024, 16, 4096), (256, 4, 1024)),  # -large
    (128, (256, 4, 1024), (64, 1, 256))])  # the paper's small
def test_released_pairs_come_in(tmp_path, vocabulary, embedding, discriminator, generator):
    pair = save_pair(tmp_path, vocabulary, discriminator, generator, embedding_size=embedding, num_hidden_layers=1)
    for name, model in pair.items():  # as released: keys of old versions, pickled, position numbers among the weights
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"position_embedding_type": "absolute", "summary_type": "first", "vocab_size": vocabulary.size}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(model.state_dict() | {"electra.embeddings.position_ids": torch.arange(512)[None]},
                   tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    initial = script.read_initial(script.Pretraining(init_from=str(tmp_path)))
    assert (*initial.model.generator(), *initial.model.discriminator()) == (*generator, *discriminator)
    electra = script.Electra(initial.model)
    script.fill(electra, initial)
    for name, model in pair.items():
        ours = to_transformers(getattr(electra, name))
        assert all(torch.equal(ours[key], weight) for key, weight in model.state_dict().items())


def test_generators_that_ours_is_not_are_refused(command, tmp_path, vocabulary, capsys):
    save_pair(tmp_path / "heads", vocabulary, (64, 2, 32), (32, 2, 128), embedding_size=8, num_hidden_layers=1)
    pair = save_pair(tmp_path / "untied", vocabulary, (64, 2, 32), (32, 1, 128), embedding_size=8, num_hidden_layers=1)
    weights = {name: weight.clone() for name, weight in pair["generator"].state_dict().items()}
    weights["generator_lm_head.weight"] += 1
    safetensors.torch.save_file(weights, tmp_path / "untied" / "generator" / "model.safetensors")
    for name, message in (("heads", "heads = 2 where 1 is wanted"), ("untied", "is tied here")):
        assert main(command(init_from=tmp_path / name)) == 2
        assert message in capsys.readouterr().err


def test_an_imported_pair_learns_in_a_step_what_transformers_own_does(command, tmp_path, vocabulary, monkeypatch):
    """Our training step against its formulas (paper; BERT's Adam without bias correction) on transformers' networks."""
    pair = save_pair(tmp_path / "pair", vocabulary, (16, 2, 32), (8, 1, 32), embedding_size=12, num_hidden_layers=2,
                     max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                     initializer_range=0.3)
    runs, seen = [], []
    monkeypatch.setattr(script, "train", lambda run, *_: runs.append(run) or run.settings.steps)
    rate, flags = 0.01, {"warmup_steps": 0, "steps": 2, "clip_norm": 1.0, "disc_weight": 50.0}
    assert main(command(init_from=tmp_path / "pair", learning_rate=rate, **flags)) == 0
    run = runs[0]
    run.electra.train().register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
    batch = script.TrainingBatches(script.Collator(run.data.train, run.vocabulary, 24), 6, False, 0)[0]
    script.training_step(run, batch, 1, torch.Generator())  # the second, since the first has rate 0
    (ids, segments, mask, masked_ids, positions, chosen, _), output = seen[0]

    generator, discriminator = pair["generator"].train(), pair["discriminator"].train()
    generator.electra.embeddings.word_embeddings.padding_idx = None  # the original's [PAD] learns when it is sampled
    discriminator.electra.embeddings = generator.electra.embeddings
    logits = generator(masked_ids, mask.long(), segments).logits
    rows = torch.arange(len(ids))[:, None].expand_as(positions)[chosen], positions[chosen]
    corrupted = ids.clone()
    corrupted[rows] = output.sampled[chosen]
    detected = discriminator(corrupted, mask.long(), segments).logits
    loss = F.cross_entropy(logits[rows], ids[rows]) + 50 * F.binary_cross_entropy_with_logits(
        detected[mask], (corrupted != ids)[mask].float())
    loss.backward()
    weights = {weight for model in (generator, discriminator) for weight in model.parameters()}
    norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
    assert norm > 1  # so that it is clipped
    with torch.no_grad():
        for weight in weights:
            gradient = weight.grad / norm
            step = 0.1 * gradient / ((0.001 * gradient**2).sqrt() + 1e-6) + (0.01 * weight if weight.ndim > 1 else 0)
            weight -= rate * (1 - 1 / 2) * step
    for name, theirs in (("generator", generator), ("discriminator", discriminator)):
        ours = to_transformers(getattr(run.electra, name))
        for key, weight in theirs.state_dict().items():
            before = safetensors.torch.load_file(tmp_path / "pair" / name / "model.safetensors").get(key)
            torch.testing.assert_close(ours[key], weight, rtol=0, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
            assert before is None or "key.bias" in key or (ours[key] - before).abs().max() > 0.01, key


# Other languages


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("case", ["cased", "uncased", "uncased-accents"])
def test_another_language_all_the_way(command, tmp_path, capsys, language, case):
    words, *pairs = LANGUAGES[language]
    corpus, run, target = tmp_path / "corpus.txt", tmp_path / "run", tmp_path / "export"
    corpus.write_text("\n".join(sentences(words, 400)), encoding="utf-8")
    flags = {"corpus": corpus, "case": case, "export": target, "model__vocab_size": 300}
    assert main(command(**flags)) == 0
    other = "uncased" if case == "cased" else "cased"
    assert main(command(**flags | {"case": other})) == 2
    assert f"case = {case}, this command has {other}" in capsys.readouterr().err
    ours = read_network(run / "gen.pt", {"generator": script.Generator}, "").vocabulary
    for plain, capital, bare in pairs:
        ids, capitals, bares = ours.encode([plain, capital, bare])
        assert ours.unk not in ids
        assert (ids == capitals) == (case != "cased") and (ids == bares) == (case == "uncased")

    text = sentences(words, 1, seed=5)[0]
    (tmp_path / "sents.txt").write_text(text, encoding="utf-8")
    assert LM_DEMO.main(["--weights", str(run / "gen.pt"), "--input", str(tmp_path / "sents.txt"), "--mask-prob", "0",
                         "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    kept = text if case == "cased" else text.lower()
    shown = kept if case != "uncased" else "".join(ours.pieces()[n].removeprefix("##") for n in ours.encode([text])[0])
    masked = next(line for line in out.splitlines() if line.startswith("     masked")).split("masked")[1]
    unmasked = [word for word in masked.split() if "[MASK]" not in word and "+" not in word]
    assert len(unmasked) > 1 and all(word in shown for word in unmasked)
    note = {"cased": "", "uncased": "see lower case without accents", "uncased-accents": "see lower case with accents"}[case]
    assert ("the networks see" in out) == bool(note) and note in out and note in (tmp_path / "page.html").read_text()

    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name in ("train", "dev"):
        rows = "".join(f"{line}\t{n % 2}\n" for n, line in enumerate(sentences(words, 20, seed=len(name))))
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    tuning = ["--task", "sst2", "--data-dir", str(tmp_path / "glue"), "--output", str(tmp_path / "out"),
              "--max-length", "24", "--device", "cpu", "--precision", "fp32"]
    assert Finetuning.main([*tuning, "--weights", str(run / "disc.pt"), "--epochs", "1", "--save-model"]) == 0
    model = tmp_path / "out" / "sst2" / "seed-0" / "model.pt"
    assert Finetuning.main([*tuning, "--weights", str(model), "--predict-file", str(tmp_path / "sents.txt"),
                            "--export", str(tmp_path / "tuned")]) == 0
    predicted = (tmp_path / "out" / "predictions" / "sents-predictions.tsv").read_text(encoding="utf-8").splitlines()[1]
    answer = pipeline("text-classification", model=str(tmp_path / "tuned"))(text)[0]
    assert predicted.split("\t")[1:] == [answer["label"], f"{answer['score']:.4f}", text]

    texts = [*sentences(words, 9, seed=3), *(word for pair in pairs for word in pair)]
    for exported in (target / "generator", target / "discriminator", tmp_path / "tuned"):
        theirs = AutoTokenizer.from_pretrained(exported)
        assert [theirs(text, add_special_tokens=False)["input_ids"] for text in texts] == ours.encode(texts)
    for source in (target, target / "discriminator"):  # the handling travels with the weights
        assert main(command("again", corpus=corpus, init_from=source, steps=1)) == 0
        again = Vocabulary.from_state(load(tmp_path / "again" / "disc.pt")["vocabulary"], "")
        assert again.encode(texts) == ours.encode(texts) and again.seen == ours.seen
        for path in (tmp_path / "again").iterdir():
            path.unlink()
