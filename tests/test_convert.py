"""convert/ compared with transformers: exported and imported models, a training step, other languages all the way."""

import copy
import json
import random
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import Killed, assert_same, metrics, stop_after_save, write_pair
from huggingface_hub import ModelCard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining, AutoModelForSequenceClassification,
                          AutoTokenizer, ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining,
                          ElectraForSequenceClassification, ElectraModel, ElectraTokenizer, pipeline)
from transformers.utils.logging import disable_progress_bar

import convert.from_transformers
import convert.to_transformers
import Finetuning
import LM_DEMO
import Pretraining
from convert.from_transformers import read_encoder, read_networks
from convert.names import classifier_to_transformers, config_to_transformers, load_transformers, to_transformers
from convert.to_transformers import tokenizer_files
from convert.vocabulary import TOKENIZER_FILES, load_vocabulary
from corpus.vocabulary import CASES, learn_vocabulary, learned_vocabulary, wordpiece
from dataset import SPECIAL_TOKENS, Vocabulary, scan_corpus, stored_batch
from model import (NETWORK_FILES, Classifier, Discriminator, Generator, ModelConfig, SavedNetwork, load_network,
                   save_network)
from tasks.glue import TASKS
from utils import InputError, load

ROOT = Path(__file__).parent.parent
pretrain = Pretraining.main
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
    """transformers reaches no hub, and no progress bar of its own on stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    disable_progress_bar()


def export(source, folder):
    return convert.to_transformers.main([str(source), str(folder)])


def import_run(source, run):
    return convert.from_transformers.main([str(source), str(run)])


def one_error(capsys):
    """The only line on stderr but warnings."""
    line, = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: "))
    assert line.startswith("error: ")
    return line


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
def test_exported_tokenizers_give_the_same_ids(tmp_path, accented_corpus, case):
    vocabulary = learn_vocabulary(accented_corpus, 400, case)
    for name, text in tokenizer_files(vocabulary, 24).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = [tokenizer_class.from_pretrained(tmp_path) for tokenizer_class in (AutoTokenizer, ElectraTokenizer)]
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tea, = vocabulary.encode(["tea"])
    assert plain.encode("[MASK]", "tea").ids == [vocabulary.cls, vocabulary.mask, vocabulary.sep, *tea, vocabulary.sep]
    (tmp_path / "tokenizer.json").unlink()  # as folders had none in old versions
    for tokenizer in (*loaded, ElectraTokenizer.from_pretrained(tmp_path)):
        # ElectraTokenizer never reads the normalizer in tokenizer.json, so decomposed text has no composed pieces there.
        composed = [unicodedata.normalize("NFC", text) for text in ODD] if tokenizer is not loaded[0] else ODD
        assert tokenizer.get_vocab() == {piece: number for number, piece in enumerate(vocabulary.pieces())}
        assert len(tokenizer) == vocabulary.size
        for text in composed:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == vocabulary.encode([text])[0], text
        pair = tokenizer("мой ЧАЙ", "σπίτι")
        first, second = vocabulary.encode(["мой ЧАЙ", "σπίτι"])
        assert pair["input_ids"] == [vocabulary.cls, *first, vocabulary.sep, *second, vocabulary.sep]
        assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert tokenizer("tea [MASK]")["input_ids"][-2] == vocabulary.mask == tokenizer.mask_token_id
        batch = tokenizer(["tea " * 99, "tea"], truncation=True, padding=True)
        assert len(batch["input_ids"][0]) == 24 == tokenizer.model_max_length
        assert batch["input_ids"][1][3:] == [vocabulary.pad] * 21 and sum(batch["attention_mask"][1]) == 3
        assert tokenizer.decode(vocabulary.encode(["tea."])[0]) == "tea."
    # Without tokenizer.json the case comes from tokenizer_config.json.
    assert load_vocabulary(str(tmp_path)).to_json() == vocabulary.to_json()


LOWER = [a + b + c for a in "bcdfghklmn" for b in "aeiou" for c in "lmnrstxz"]  # 400 words


@pytest.mark.parametrize(("pieces", "case"), [
    (["the", "##s", "a"], "uncased"), (["the", "The"], "cased"), (["Ελ", "έ"], "cased"),
    (["cafe", "é"], "uncased-accents"), (["мои", "й"], "uncased-accents"), (["한", "국"], "uncased-accents"),
    (["ß", "ø", "茶"], "uncased"), (["<S>", "</S>", "[URL]", "{NUM}", "@USER", "the", "cafe"], "uncased"),
    ([*LOWER, "COVID", "URL", "NASA", "Zürich"], "uncased"), ([*LOWER, *(word.title() for word in LOWER[:60])], "cased"),
    ([*LOWER, "café", "zoë"], "uncased"), ([*LOWER, *(f"{word}é" for word in LOWER[:60])], "uncased-accents"),
    (["<T>", "的", "是", "不", "hello"], "uncased"), (["है", "नहीं", "hello"], "uncased-accents")])
def test_case_of_a_vocab_txt_follows_from_its_pieces_unless_given(tmp_path, pieces, case):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *pieces]), encoding="utf-8")
    states = {name: wordpiece({}, *CASES[name]).normalizer.__getstate__() for name in CASES}
    for given in ("auto", *CASES):
        normalizer = load_vocabulary(str(tmp_path / "vocab.txt"), given).tokenizer.normalizer
        assert normalizer.__getstate__() == states[case if given == "auto" else given]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "strip_accents": false}')
    assert load_vocabulary(str(tmp_path)).tokenizer.normalizer.__getstate__() == states["uncased-accents"]


OTHER_LINES = ["The film was great, said the director.", "It is a film, a very good one!", "日本の映画は良い。",
               "naïve café 😀 here", "the old (new) film's director"]
OTHER_TOKENIZERS = {  # model, trainer, what cuts the text, decoder
    "byte-level BPE": (models.BPE, trainers.BpeTrainer, pre_tokenizers.ByteLevel(add_prefix_space=False),
                       decoders.ByteLevel()),
    "Unigram": (models.Unigram, trainers.UnigramTrainer, pre_tokenizers.Metaspace(), decoders.Metaspace()),
    "Unigram over blanks": (models.Unigram, trainers.UnigramTrainer, pre_tokenizers.Metaspace(split=False),
                            decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])),
    "BPE with marks": (models.BPE, trainers.BpeTrainer, pre_tokenizers.Metaspace(), decoders.Metaspace()),
}


def other_tokenizer(name, lines):
    """A tokenizer that isn't WordPiece, trained on the lines and the bytes or letters in them."""
    model, trainer, pre_tokenizer, decoder = OTHER_TOKENIZERS[name]
    tokenizer = Tokenizer(model())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    options = {"unk_token": "[UNK]"} if model is models.Unigram else {}
    if name.startswith("byte-level"):
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    tokenizer.train_from_iterator(lines * 5, trainer(vocab_size=330, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                                     **options))
    return tokenizer


def test_case_that_a_tokenizer_does_not_allow_is_refused(tmp_path, vocabulary):
    for name, text in tokenizer_files(vocabulary, 24).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"--case cased is for vocab.txt .*tokenizer.json says itself what it does"):
        load_vocabulary(str(tmp_path), "cased")
    for broken in ("{", '{"do_lower_case": "yes"}'):
        (tmp_path / "tokenizer_config.json").write_text(broken)
        with pytest.raises(InputError, match="can't be read"):
            load_vocabulary(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_other_tokenizers_keep_their_decoder_all_the_way(command, tmp_path, name, capsys):
    corpus, page = tmp_path / "corpus.txt", tmp_path / "page.html"
    corpus.write_text("\n".join(OTHER_LINES * 30), encoding="utf-8")
    tokenizer = other_tokenizer(name, OTHER_LINES)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    assert pretrain(command(corpus=corpus, vocab=tmp_path / "tokenizer", model__vocab_size=size, examples="line")) == 0
    assert export(tmp_path / "run", tmp_path / "exported") == 0
    vocabulary = Vocabulary.of_network(load_network(tmp_path / "run" / "gen.pt", ["generator"], ""), "")
    for kind in ("generator", "discriminator"):
        assert not (tmp_path / "exported" / kind / "vocab.txt").exists()  # transformers would take it for word pieces
        peer = AutoTokenizer.from_pretrained(tmp_path / "exported" / kind)
        for line in OTHER_LINES:
            ids = peer(line)["input_ids"]
            assert ids[1:-1] == vocabulary.encode([line])[0] == tokenizer.encode(line, add_special_tokens=False).ids
            assert peer.decode(ids, skip_special_tokens=True) == line  # transformers' own way back
    assert import_run(tmp_path / "exported", tmp_path / "again") == 0
    again = Vocabulary.of_network(load_network(tmp_path / "again" / "disc.pt", ["discriminator"], ""), "")
    assert again.pieces() == vocabulary.pieces() and again.encode(OTHER_LINES) == vocabulary.encode(OTHER_LINES)
    assert again.tokenizer.decode(again.encode(OTHER_LINES[:1])[0]) == OTHER_LINES[0]

    # The demo shows words, in the original's places; only what is masked differs.
    for run in ("run", "again"):
        capsys.readouterr()
        assert LM_DEMO.main(["--weights", str(tmp_path / run / "gen.pt"), "--input", str(corpus), "--mask-prob", "0.2",
                             "--top-k", "3", "--html", str(page)]) == 0
        shown = capsys.readouterr().out + page.read_text(encoding="utf-8")
        assert "\u2581" not in shown and "\u0120" not in shown and "\u00e3" not in shown
        for line, row in zip(OTHER_LINES, re.findall(r"^ +masked +(.*)$", shown, re.MULTILINE), strict=False):
            pattern = re.escape(re.sub(r"\+(.*?)\+", r"\1", row))
            assert re.fullmatch(re.sub(r"(\\ )?(\\\[MASK\\\])+", ".*", pattern), line), row


def test_cache_keeps_a_vocabulary_of_each_case(tmp_path, accented_corpus):
    vocabularies = {case: learned_vocabulary(accented_corpus.paths, 400, case, tmp_path) for case in CASES}
    for case in CASES:
        assert vocabularies[case].to_json() == learn_vocabulary(accented_corpus, 400, case).to_json()


# Out


def test_exported_run_has_the_same_logits_and_ids_in_transformers(command, tmp_path):
    target = tmp_path / "exported"
    assert pretrain(command()) == 0
    assert export(tmp_path / "run", target) == 0
    texts = [("the old dog sees a cat.", "red green tree"), ("a Bird", "the")]
    for kind, file, auto_class in (("generator", "gen.pt", AutoModelForMaskedLM),
                                   ("discriminator", "disc.pt", AutoModelForPreTraining)):
        saved = load_network(tmp_path / "run" / file, [kind], "")
        vocabulary = Vocabulary.of_network(saved, file)
        model = auto_class.from_pretrained(target / kind).eval()
        tokenizer = AutoTokenizer.from_pretrained(target / kind)
        batch = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
        for row, segments, pair in zip(batch["input_ids"], batch["token_type_ids"], texts, strict=True):
            first, second = vocabulary.encode(list(pair))
            expected = [vocabulary.cls, *first, vocabulary.sep, *second, vocabulary.sep]
            assert row.tolist()[:len(expected)] == expected and vocabulary.unk not in expected
            assert segments.tolist()[:len(expected)] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        mask = batch["attention_mask"].bool()
        positions = [torch.arange(mask.shape[1]).expand(mask.shape)] if kind == "generator" else []
        with torch.no_grad():
            own_logits = saved.network(batch["input_ids"], batch["token_type_ids"], mask, *positions)
            logits = model(**batch).logits
        assert own_logits.std() > 0.001
        assert torch.allclose(own_logits[mask], logits[mask], rtol=0, atol=1e-5)
    assert len(pipeline("fill-mask", model=str(target / "generator"), top_k=2)("the old [MASK] sees a cat.")) == 2


def test_exports_need_no_new_weights_and_have_a_model_card(command, tmp_path):
    assert pretrain(command()) == 0
    assert export(tmp_path / "run", tmp_path / "exported") == 0
    assert export(tmp_path / "run" / "disc.pt", tmp_path / "exported_alone") == 0
    for folder, auto_class, task, new_weights in (
            ("exported/generator", AutoModelForMaskedLM, "fill-mask", 0),
            ("exported/discriminator", AutoModelForPreTraining, "feature-extraction", 0),
            ("exported_alone", AutoModelForPreTraining, "feature-extraction", 0),
            ("exported/generator", AutoModel, "fill-mask", 0),
            ("exported/discriminator", AutoModel, "feature-extraction", 0),
            ("exported/discriminator", AutoModelForSequenceClassification, "feature-extraction", 4)):
        _, loaded = auto_class.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert len(loaded["missing_keys"]) == new_weights and not loaded["mismatched_keys"]
        assert all(name.startswith("classifier.") for name in loaded["missing_keys"])
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == task and card.data.license is None
        last_row = f"| 8 | {metrics(tmp_path / 'run')[-1]['mlm_loss']:.4f} |"
        assert "corpus.txt" in card.text and last_row in card.text
        assert "steps = 8" in card.text and "uncased" in card.text


def test_unfinished_run_is_exported(command, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after_save(patch, 4)
        pretrain(command())
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "held')
    assert export(tmp_path / "run", tmp_path / "exported") == 0
    assert "| 4 |" in (tmp_path / "exported" / "generator" / "README.md").read_text(encoding="utf-8")


def test_networks_without_a_run_are_exported(tmp_path, vocabulary):
    write_pair(tmp_path / "pair", vocabulary)
    assert export(tmp_path / "pair", tmp_path / "exported") == 0
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "exported" / "generator")
    assert ModelCard.load(tmp_path / "exported" / "generator" / "README.md").data.pipeline_tag == "fill-mask"


def test_export_replaces_its_own_files_only(tmp_path, vocabulary, capsys):
    write_pair(tmp_path / "run", vocabulary)
    target = tmp_path / "exported"
    (target / "discriminator").mkdir(parents=True)
    foreign = target / "discriminator" / "pytorch_model.bin"
    foreign.write_bytes(b"another model")
    assert export(tmp_path / "run", target) == 2
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert foreign.read_bytes() == b"another model" and not (target / "generator").exists()
    foreign.unlink()
    for _ in range(2):  # the second export replaces the files of the first
        assert export(tmp_path / "run", target) == 0
        assert {path.name for path in (target / "discriminator").iterdir()} == {
            "config.json", "model.safetensors", "README.md", *TOKENIZER_FILES}
    assert export(tmp_path / "run" / "gen.pt", target) == 2  # holds generator/ and discriminator/
    assert "holds discriminator, generator" in capsys.readouterr().err


def test_export_makes_no_folder_until_everything_is_read(tmp_path, vocabulary, capsys):
    run, target = tmp_path / "run", tmp_path / "exported"
    generator, discriminator = write_pair(run, vocabulary)
    whole = discriminator.read_bytes()
    other = write_pair(tmp_path / "other", vocabulary, seed=1)[1].read_bytes()
    for content, message in ((b"damaged", "disc.pt can't be loaded"),
                             (whole[:len(whole) // 2], "disc.pt can't be loaded"),
                             (generator.read_bytes(), "disc.pt holds a generator"), (other, "different steps")):
        discriminator.write_bytes(content)
        assert export(run, target) == 2
        assert message in one_error(capsys)
    torch.save({"weights": torch.ones(3)}, tmp_path / "foreign.pt")
    for file in ("foreign.pt", "missing.pt"):
        assert export(tmp_path / file, target) == 2
        assert file in one_error(capsys)
    discriminator.write_bytes(whole)
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    for config in ("corpus = ", 'objective = "poems"', 'objective = "electra"'):
        (run / "config.toml").write_text(config, encoding="utf-8")
        assert export(run, target) == 2
        assert "config.toml" in one_error(capsys)
    generator.unlink()
    assert export(run, target) == 2
    assert "gen.pt is missing" in one_error(capsys)
    assert export(tmp_path, target) == 2
    assert "has none of gen.pt, disc.pt, mlm.pt" in one_error(capsys)
    assert not target.exists()
    target.write_text("in the way", encoding="utf-8")
    assert export(discriminator, target) == 2 and target.read_text(encoding="utf-8") == "in the way"


@pytest.mark.parametrize(("outputs", "scale"), [(3, 1.0), (1, 5.0)])
def test_classifier_has_the_same_logits_in_transformers(outputs, scale):
    config = ModelConfig(vocab_size=90, embedding_size=16, hidden_size=256, layers=2, heads=4, feed_forward_size=80)
    classifier = Classifier(config, outputs).eval()
    for weight in classifier.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    peer = ElectraForSequenceClassification(ElectraConfig(**config_to_transformers(config, config.discriminator()),
                                                          num_labels=outputs)).eval()
    peer.load_state_dict(classifier_to_transformers(classifier, scale))
    ids = torch.randint(90, (50, 12))
    with torch.no_grad():
        expected = scale * classifier(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))
        assert (expected - peer(ids).logits).abs().max() < 1e-4 < expected.std()
        for dtype in (torch.bfloat16, torch.float16):  # the doubled outputs cost no more than rounding them does
            half = copy.deepcopy(peer).to(dtype)
            vectors = half.electra(ids).last_hidden_state
            head = [(scale * weight).to(dtype) for weight in classifier.prediction.parameters()]
            linear = F.linear(vectors[:, 0], *head)
            rounding = torch.finfo(dtype).eps * linear.abs().clamp(min=1)
            assert ((half.classifier(vectors) - linear).abs() <= 2 * rounding).all()


@pytest.mark.parametrize("key", ["sst2", "mnli", "stsb"])
def test_fine_tuned_model_gives_the_same_answers_in_transformers(tmp_path, vocabulary, glue, capsys, key):
    weights, lines, target = write_pair(tmp_path, vocabulary)[1], tmp_path / "lines.txt", tmp_path / "exported"
    pairs = [("the old dog", "a Cat eats."), ("red tree", "birds")]
    task = TASKS[key]
    texts = [pair[:len(task.texts)] for pair in pairs]
    lines.write_text("\n".join("\t".join(text) for text in texts), encoding="utf-8")

    def tune(source, *flags, output="out"):
        short = "--epochs 1 --max-length 24 --precision fp32 --device cpu".split()
        return Finetuning.main(["--task", key, "--weights", str(source), "--data-dir", str(glue), "--output",
                                str(tmp_path / output), *short, *flags])
    assert tune(weights, "--save-model") == 0
    model_file = tmp_path / "out" / key / "seed-0" / "model.pt"
    assert tune(model_file, "--predict-file", str(lines)) == 0
    assert export(model_file, target) == 0
    peer, loaded = AutoModelForSequenceClassification.from_pretrained(target, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(target)
    batch = tokenizer(*map(list, zip(*texts, strict=True)), padding=True, return_tensors="pt")
    classifier = load_network(model_file, ["classifier"], "").network
    with torch.no_grad():
        outputs = classifier(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"].bool())
        assert torch.allclose(peer.eval()(**batch).logits, outputs * task.scale[0], atol=1e-4)
    predicted = [line.split("\t")[1] for line in
                 (tmp_path / "out" / "predictions" / "lines-predictions.tsv").read_text().splitlines()[1:]]
    answers = pipeline("text-classification", model=str(target))(
        [{"text": text[0], "text_pair": text[1]} if len(text) > 1 else text[0] for text in texts])
    if task.classes:
        assert [answer["label"] for answer in answers] == predicted and set(peer.config.label2id) == set(task.classes)
    else:
        assert peer.config.problem_type == "regression"
        assert [answer["score"] for answer in answers] == pytest.approx(list(map(float, predicted)), abs=1e-4)
    card = ModelCard.load(target / "README.md")
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["scores"]
    assert card.data.pipeline_tag == "text-classification" and Finetuning.scores_text(scores) in card.text
    assert tune(target, output="again") == 0  # its encoder can be fine-tuned again


def test_classifier_that_does_not_fit_its_task_or_transformers_is_refused(tmp_path, vocabulary, capsys):
    config = load_network(write_pair(tmp_path, vocabulary)[1], ["discriminator"], "").config
    H = config.hidden_size
    many = json.dumps({"name": "many", "train": "x.csv", "texts": ["x"], "label": "y", "classes": list(range(H))})
    for task, outputs, message in (("poems", 2, "names the task 'poems'"),
                                   ("mnli", 2, "2 outputs, expected the 3 of MNLI"),
                                   (many, H, f"{H} outputs, expected at most {H // 2}")):
        saved = SavedNetwork("classifier", Classifier(config, outputs), config, vocabulary.to_json(), task)
        save_network(tmp_path / "model.pt", saved)
        assert export(tmp_path / "model.pt", tmp_path / "exported") == 2
        assert message in one_error(capsys)
    assert not (tmp_path / "exported").exists()


# In


def save_pair(folder, vocabulary, discriminator, generator, **shared):
    """transformers' pair of random weights with shared embeddings, saved in two folders."""
    pair = {}
    rows = shared.pop("rows", None)  # of the embeddings, where they are to be more than the pieces
    for name, model_class, sizes in (("generator", ElectraForMaskedLM, generator),
                                     ("discriminator", ElectraForPreTraining, discriminator)):
        hidden, heads, feed_forward = sizes
        config = ElectraConfig(vocab_size=vocabulary.size, hidden_size=hidden, num_attention_heads=heads,
                               intermediate_size=feed_forward, **shared)
        pair[name] = model_class(config).eval()
        if rows:
            pair[name].resize_token_embeddings(rows)
        if name == "discriminator":
            pair[name].electra.embeddings.load_state_dict(pair["generator"].electra.embeddings.state_dict())
        save_model(folder / name, pair[name], vocabulary)
    return pair


def save_model(folder, model, vocabulary):
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary.pieces()) + "\n", encoding="utf-8")


def small_pair(folder, vocabulary, generator=(32, 1, 128)):
    return save_pair(folder, vocabulary, (64, 2, 32), generator, embedding_size=8, num_hidden_layers=1)


@pytest.mark.parametrize(("embedding", "discriminator", "generator"), [
    (128, (256, 4, 1024), (256, 4, 1024)),  # google/electra-small, whose generator has full width
    (768, (768, 12, 3072), (256, 4, 1024)),  # -base
    (1024, (1024, 16, 4096), (256, 4, 1024)),  # -large
    (128, (256, 4, 1024), (64, 1, 256))])  # the paper's small
def test_pairs_of_the_released_sizes_are_read(tmp_path, vocabulary, embedding, discriminator, generator):
    pair = save_pair(tmp_path, vocabulary, discriminator, generator, embedding_size=embedding, num_hidden_layers=1)
    for name, model in pair.items():  # as released: keys of old versions, pickled, position numbers among the weights
        config = json.loads((tmp_path / name / "config.json").read_text())
        config |= {"position_embedding_type": "absolute", "summary_type": "first", "vocab_size": vocabulary.size}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").unlink()
        torch.save(model.state_dict() | {"electra.embeddings.position_ids": torch.arange(512)[None]},
                   tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    networks = read_networks(str(tmp_path), 0.25, "--init-from")
    config = networks["generator"].config
    assert config == networks["discriminator"].config
    assert (*config.generator(), *config.discriminator()) == (*generator, *discriminator)
    for name, model in pair.items():
        weights = to_transformers(networks[name].network)
        assert all(torch.equal(weights[key], weight) for key, weight in model.state_dict().items())


def test_run_comes_back_from_transformers_bit_for_bit(command, tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    assert pretrain(command()) == 0
    assert export(run, tmp_path / "exported") == 0
    assert import_run(tmp_path / "exported", again) == 0
    assert {path.name for path in again.iterdir()} == {"gen.pt", "disc.pt"}
    for file in ("gen.pt", "disc.pt"):
        assert_same(load(again / file), load(run / file))  # weights, sizes, the tokenizer's JSON

    # All three scripts take it.
    line = tmp_path / "sents.txt"
    line.write_text("the old dog sees a cat.", encoding="utf-8")
    assert LM_DEMO.main(["--weights", str(again / "gen.pt"), "--input", str(line)]) == 0
    assert pretrain(command("more", init_from=again, steps=1)) == 0
    assert export(again, tmp_path / "exported_again") == 0
    for kind in ("generator", "discriminator"):
        for file in ("model.safetensors", "config.json", *TOKENIZER_FILES):
            path = Path(kind) / file
            assert (tmp_path / "exported" / path).read_bytes() == (tmp_path / "exported_again" / path).read_bytes()


def test_masked_language_model_has_the_same_logits_in_transformers_and_comes_back(command, tmp_path, capsys):
    run, target = tmp_path / "run", tmp_path / "exported"
    assert pretrain(command(objective="mlm", model__generator_size=0.25)) == 0
    assert export(run, target) == 0 and export(run / "mlm.pt", tmp_path / "single") == 0
    assert [path.name for path in target.iterdir()] == ["mlm"]
    saved = load_network(run / "mlm.pt", ["mlm"], "")
    for folder in (target / "mlm", tmp_path / "single"):
        peer, loaded = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
        assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and peer.config.hidden_size == 16
        batch = AutoTokenizer.from_pretrained(folder)(["the old [MASK] sees", "a cat"], padding=True, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            logits = saved.network(batch["input_ids"], batch["token_type_ids"], mask,
                                   torch.arange(mask.shape[1]).expand(mask.shape))
            assert torch.allclose(logits[mask], peer.eval()(**batch).logits[mask], rtol=0, atol=1e-5)
        card = ModelCard.load(folder / "README.md")
        assert card.data.pipeline_tag == "fill-mask" and "| 8 |" in card.text and "disc_loss" not in card.text
        assert "objective `mlm`" in card.text
    for number, source in enumerate((target, target / "mlm", tmp_path / "single")):
        again = tmp_path / f"again-{number}"
        assert import_run(source, again) == 0
        assert [path.name for path in again.iterdir()] == ["mlm.pt"]
        assert_same(load(again / "mlm.pt"), load(run / "mlm.pt"))
    assert pretrain(command("more", objective="mlm", init_from=target, steps=1)) == 0
    (tmp_path / "sents.txt").write_text("the old dog", encoding="utf-8")
    assert LM_DEMO.main(["--weights", str(tmp_path / "again-0" / "mlm.pt"), "--input", str(tmp_path / "sents.txt")]) == 0
    capsys.readouterr()
    assert pretrain(command("other", init_from=target, steps=1)) == 2
    assert "has no discriminator" in one_error(capsys)


@pytest.mark.parametrize("objective", ["replace-mlm", "two-stage"])
def test_networks_of_other_objectives_are_exported_together(command, tmp_path, objective):
    sizes = {"model__generator_size": 1, "model__heads": 1, "model__feed_forward_size": 64}
    assert pretrain(command(objective=objective, **sizes)) == 0
    assert export(tmp_path / "run", tmp_path / "exported") == 0
    large = "mlm" if objective == "replace-mlm" else "discriminator"
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"generator", large}
    assert import_run(tmp_path / "exported", tmp_path / "again") == 0
    for kind in ("generator", large) if objective == "replace-mlm" else (large,):  # two-stage shares no embeddings
        assert_same(load(tmp_path / "again" / NETWORK_FILES[kind]), load(tmp_path / "run" / NETWORK_FILES[kind]))


@pytest.mark.parametrize("kind", ["discriminator", "generator"])
def test_rows_of_embeddings_that_no_piece_uses_are_accepted(command, tmp_path, vocabulary, capsys, glue, kind):
    """As resize_token_embeddings leaves them: tables padded to a round number of rows, for speed."""
    rows = 64
    pair = save_pair(tmp_path / "pair", vocabulary, (64, 2, 32), (32, 1, 128), embedding_size=8, num_hidden_layers=1,
                     max_position_embeddings=32, rows=rows)
    for name, model in pair.items():
        assert model.config.vocab_size == rows > vocabulary.size
        AutoTokenizer.from_pretrained(tmp_path / "pair" / name)
    assert import_run(tmp_path / "pair", tmp_path / "run") == 0
    assert f"{vocabulary.size} pieces; the embeddings have {rows} rows" in capsys.readouterr().out
    ids = torch.randint(5, vocabulary.size, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    positions = [torch.arange(9).expand(2, -1)] if kind == "generator" else []
    saved = load_network(tmp_path / "run" / NETWORK_FILES[kind], [kind], "")
    with torch.no_grad():
        logits = saved.network(ids, torch.zeros_like(ids), mask, *positions)
        assert torch.allclose(logits, pair[kind](ids).logits, rtol=0, atol=1e-5)

    # Back to transformers, into the demo, into pretraining and fine-tuning.
    assert export(tmp_path / "run", tmp_path / "exported") == 0
    weights = safetensors.torch.load_file(tmp_path / "exported" / kind / "model.safetensors")
    for name, weight in pair[kind].state_dict().items():
        if name in weights:
            assert torch.equal(weights[name], weight), name
    assert json.loads((tmp_path / "exported" / kind / "config.json").read_text())["vocab_size"] == rows
    (tmp_path / "sents.txt").write_text("the old dog sees a cat", encoding="utf-8")
    assert LM_DEMO.main(["--weights", str(tmp_path / "run" / "gen.pt"), "--input", str(tmp_path / "sents.txt"),
                         "--top-k", "999"]) == 0
    for source in (tmp_path / "pair", tmp_path / "run"):
        begun = command("more", init_from=source)
        assert pretrain(begun) == 0 and pretrain(begun) == 0
        assert load_network(tmp_path / "more" / "gen.pt", ["generator"], "").config.vocab_size == rows
        for path in (tmp_path / "more").iterdir():
            path.unlink()
    assert Finetuning.main(["--task", "rte", "--weights", str(tmp_path / "pair" / "discriminator"), "--data-dir", str(glue),
                            "--output", str(tmp_path / "out"), "--epochs", "1", "--max-length", "24", "--device", "cpu",
                            "--precision", "fp32"]) == 0


def test_discriminator_alone_gives_disc_pt_and_says_so(tmp_path, vocabulary, capsys):
    small_pair(tmp_path / "pair", vocabulary)
    assert import_run(tmp_path / "pair" / "discriminator", tmp_path / "run") == 0
    assert "no generator, so there is no gen.pt" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["disc.pt"]
    assert load_network(tmp_path / "run" / "disc.pt", ["discriminator"], "").config.generator_size == 0.25
    assert read_networks(str(tmp_path / "pair" / "discriminator"), 0.5, "")["discriminator"].config.generator_size == 0.5


def test_import_writes_into_a_new_folder_only(tmp_path, vocabulary, capsys):
    small_pair(tmp_path / "pair", vocabulary)
    (tmp_path / "run").mkdir()
    assert import_run(tmp_path / "pair", tmp_path / "run") == 0  # an empty folder is new enough
    before = (tmp_path / "run" / "disc.pt").read_bytes()
    assert import_run(tmp_path / "pair", tmp_path / "run") == 2
    assert "is not empty" in one_error(capsys)
    assert (tmp_path / "run" / "disc.pt").read_bytes() == before


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


LAST = "electra.encoder.layer.0.output.dense.bias"
DAMAGES = {
    "damaged weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"), "can't be read"),
    "foreign weights": (lambda folder: safetensors.torch.save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
                        "1 weights have no place here: a"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "lacks config.json or model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
    "config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "no tokenizer": (lambda folder: (folder / "vocab.txt").unlink(),
                     "has no vocabulary: expected tokenizer.json or vocab.txt"),
    "another model": (lambda folder: change_config(folder, model_type="bert"), "model_type is 'bert'"),
    "another activation": (lambda folder: change_config(folder, hidden_act="relu"), "hidden_act is 'relu'"),
    "impossible heads": (lambda folder: change_config(folder, num_attention_heads=3), "a multiple of 3"),
    "size that is a text": (lambda folder: change_config(folder, hidden_size="64"), "config.json"),
    "missing weight": (lambda folder: change_weights(folder, lambda weights: weights.pop(LAST)), LAST),
    "surplus weight": (lambda folder: change_weights(folder, lambda weights: weights.update(extra=torch.ones(1))),
                       "extra"),
    "wrong shape": (lambda folder: change_weights(folder, lambda weights: weights.update({LAST: torch.ones(3)})),
                    "feed_forward_output.bias"),
    "not finite": (lambda folder: change_weights(folder, lambda weights: weights[LAST].fill_(torch.nan)), "not finite"),
    "another vocabulary": (lambda folder: (folder / "vocab.txt").write_text("\n".join(
        [*SPECIAL_TOKENS, *map(str, range(95))])), "100 pieces"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_models_that_do_not_fit_are_refused(tmp_path, vocabulary, capsys, damage):
    change, message = DAMAGES[damage]
    small_pair(tmp_path / "pair", vocabulary)
    change(tmp_path / "pair" / "discriminator")
    for source in ("pair", "pair/discriminator"):
        assert import_run(tmp_path / source, tmp_path / "run") == 2
        assert message in one_error(capsys)
    with pytest.raises(InputError, match=re.escape(message)):
        read_encoder(str(tmp_path / "pair" / "discriminator"), "--weights")
    assert not (tmp_path / "run").exists()


def test_names_without_a_model_are_refused(tmp_path, vocabulary, capsys):
    small_pair(tmp_path / "pair", vocabulary)
    for kind in ("mlm", "discriminator"):
        (tmp_path / "two" / kind).mkdir(parents=True)
    for source, message in (("nowhere/at/all", "no file or folder nowhere/at/all here"),
                            (tmp_path / "pair" / "generator" / "vocab.txt", "vocab.txt is a file"),
                            (tmp_path, "lacks config.json"),
                            (tmp_path / "two", "has both discriminator and mlm")):
        assert import_run(source, tmp_path / "run") == 2
        assert message in one_error(capsys)


def test_pairs_that_do_not_fit_together_are_refused(command, tmp_path, vocabulary, capsys):
    small_pair(tmp_path / "heads", vocabulary, generator=(32, 2, 128))
    small_pair(tmp_path / "inner", vocabulary, generator=(32, 1, 64))
    pair = small_pair(tmp_path / "untied", vocabulary)
    weights = {name: weight.clone() for name, weight in pair["generator"].state_dict().items()}
    weights["generator_lm_head.weight"] += 1
    safetensors.torch.save_file(weights, tmp_path / "untied" / "generator" / "model.safetensors")
    for name, text in (("pieces", "\n".join([*vocabulary.pieces()[:-1], "other"])), ("case", None)):
        small_pair(tmp_path / name, vocabulary)
        if text:
            (tmp_path / name / "generator" / "vocab.txt").write_text(text, encoding="utf-8")
        else:
            (tmp_path / name / "generator" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    for name, message in (("heads", "heads = 2 where 1 is expected"), ("inner", "feed_forward_size = 64 where 128"),
                          ("untied", "is tied here"), ("pieces", "different vocabularies"),
                          ("case", "different vocabularies")):
        assert pretrain(command(init_from=tmp_path / name)) == 2
        assert message in one_error(capsys)
        assert import_run(tmp_path / name, tmp_path / "imported") == 2
        assert message in one_error(capsys)
    assert not (tmp_path / "imported").exists()


def test_pair_with_different_embeddings_gets_those_of_the_discriminator(tmp_path, vocabulary, capsys):
    pair = small_pair(tmp_path / "pair", vocabulary)
    for file in ("vocab.txt", "config.json"):
        assert (tmp_path / "pair" / "generator" / file).exists()
    (tmp_path / "pair" / "generator" / "vocab.txt").unlink()  # a generator needs none of its own
    assert import_run(tmp_path / "pair", tmp_path / "same") == 0
    assert not capsys.readouterr().err
    change_weights(tmp_path / "pair" / "generator",
                   lambda weights: weights["electra.embeddings.LayerNorm.bias"].fill_(7.0))
    assert import_run(tmp_path / "pair", tmp_path / "run") == 0
    assert "different embeddings (norm.bias); the discriminator's are used" in capsys.readouterr().err
    generator, discriminator = (load_network(tmp_path / "run" / file, [kind], "").network for file, kind in
                                (("gen.pt", "generator"), ("disc.pt", "discriminator")))
    expected = pair["discriminator"].electra.embeddings.LayerNorm.bias
    assert torch.equal(generator.encoder.embeddings.norm.bias, expected)
    assert torch.equal(discriminator.encoder.embeddings.norm.bias, expected)


@pytest.mark.parametrize("model_class", [ElectraForPreTraining, ElectraModel, ElectraForSequenceClassification])
def test_encoders_give_the_vectors_of_transformers(tmp_path, vocabulary, model_class):
    config = ElectraConfig(vocab_size=vocabulary.size, embedding_size=8, hidden_size=16, num_hidden_layers=2,
                           num_attention_heads=2, intermediate_size=32, max_position_embeddings=30)
    peer = model_class(config).eval()
    save_model(tmp_path, peer, vocabulary)
    saved = read_encoder(str(tmp_path), "--weights")
    assert saved.kind == "discriminator" and Vocabulary.of_network(saved, "").pieces() == vocabulary.pieces()
    ids = torch.randint(5, vocabulary.size, (3, 11))
    mask = torch.arange(11) < torch.tensor([[11], [7], [3]])
    segments = (torch.arange(11) > 4).long().expand(3, -1)
    with torch.no_grad():
        expected = getattr(peer, "electra", peer)(ids, attention_mask=mask.long(), token_type_ids=segments)
        vectors = saved.network.encoder(ids, segments, mask)
    assert torch.allclose(vectors[mask], expected.last_hidden_state[mask], rtol=0, atol=1e-5)


def test_weights_go_to_transformers_and_back_one_to_one():
    config = ModelConfig(vocab_size=211, embedding_size=24, hidden_size=64, layers=3, heads=4, feed_forward_size=128,
                         generator_size=0.5, max_positions=40)
    for network_class in (Generator, Discriminator):
        network, other = network_class(config), network_class(config)
        for weight in network.parameters():
            weight.data += 0.1 * torch.randn_like(weight)
        load_transformers(other, to_transformers(network))
        assert_same(dict(other.state_dict()), dict(network.state_dict()))
        with pytest.raises(KeyError, match=r"electra\.extra"):
            load_transformers(other, to_transformers(network) | {"electra.extra": torch.zeros(1)})


def test_imported_pair_learns_in_a_step_what_the_formulas_give(command, tmp_path, vocabulary, monkeypatch):
    """The training step against the paper's loss and BERT's Adam, computed on transformers' networks."""
    pair = save_pair(tmp_path / "pair", vocabulary, (16, 2, 32), (8, 1, 32), embedding_size=12, num_hidden_layers=2,
                     max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                     initializer_range=0.3)
    runs, passes = [], []
    monkeypatch.setattr(Pretraining, "train", lambda run, *_: runs.append(run) or run.settings.steps)
    rate, flags = 0.01, {"warmup_steps": 0, "steps": 2, "clip_norm": 1.0, "disc_weight": 50.0}
    assert pretrain(command(init_from=tmp_path / "pair", learning_rate=rate, **flags)) == 0
    run = runs[0]
    run.electra.train().register_forward_hook(lambda _, inputs, output: passes.append((inputs, output)))
    batch = stored_batch(run.data.train, np.arange(6), run.vocabulary, 24)
    Pretraining.training_step(run, batch, 1, torch.Generator())  # the second step, since the first has rate 0
    ((ids, segments, mask), (masked_ids, positions, chosen), _), output = passes[0]

    generator, discriminator = pair["generator"].train(), pair["discriminator"].train()
    generator.electra.embeddings.word_embeddings.padding_idx = None  # the original's [PAD] learns when it is sampled
    discriminator.electra.embeddings = generator.electra.embeddings
    logits = generator(masked_ids, mask.long(), segments).logits
    rows = torch.arange(len(ids))[:, None].expand_as(positions)[chosen], positions[chosen]
    corrupted = ids.clone()
    corrupted[rows] = output.sampled_ids[chosen]
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
    for name, peer in (("generator", generator), ("discriminator", discriminator)):
        trained = to_transformers(getattr(run.electra, name))
        initial = safetensors.torch.load_file(tmp_path / "pair" / name / "model.safetensors")
        for key, weight in peer.state_dict().items():
            torch.testing.assert_close(trained[key], weight, rtol=0, atol=2e-5,
                                       msg=lambda text, key=key: f"{key}: {text}")
            if key in initial and "key.bias" not in key:
                assert (trained[key] - initial[key]).abs().max() > 0.01, key


# Other languages


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("case", ["cased", "uncased", "uncased-accents"])
def test_another_language_goes_all_the_way(command, tmp_path, capsys, language, case):
    words, *pairs = LANGUAGES[language]
    corpus, run, target = tmp_path / "corpus.txt", tmp_path / "run", tmp_path / "exported"
    corpus.write_text("\n".join(sentences(words, 400)), encoding="utf-8")
    flags = {"corpus": corpus, "case": case, "model__vocab_size": 300}
    assert pretrain(command(**flags)) == 0
    assert {"cased": "see case and", "uncased": "see lower case without", "uncased-accents": "see lower case with accents"
            }[case] in capsys.readouterr().out
    other = "uncased" if case == "cased" else "cased"
    assert pretrain(command(**flags | {"case": other})) == 2
    assert f"case = {case}, this command has {other}" in capsys.readouterr().err
    vocabulary = Vocabulary.of_network(load_network(run / "gen.pt", ["generator"], ""), "gen.pt")
    for plain, capital, bare in pairs:
        ids, capitals, bares = vocabulary.encode([plain, capital, bare])
        assert vocabulary.unk not in ids
        assert (ids == capitals) == (case != "cased") and (ids == bares) == (case == "uncased")

    # The demo shows the text as the networks see it.
    text = sentences(words, 1, seed=5)[0]
    (tmp_path / "sents.txt").write_text(text, encoding="utf-8")
    assert LM_DEMO.main(["--weights", str(run / "gen.pt"), "--input", str(tmp_path / "sents.txt"), "--mask-prob", "0",
                         "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    shown = text if case == "cased" else text.lower()
    if case == "uncased":
        shown = "".join(vocabulary.pieces()[number].removeprefix("##") for number in vocabulary.encode([text])[0])
    masked = next(line for line in out.splitlines() if line.startswith("     masked")).split("masked")[1]
    unmasked = [word for word in masked.split() if "[MASK]" not in word and "+" not in word]
    assert len(unmasked) > 1 and all(word in shown for word in unmasked)
    note = {"cased": "see case and accents", "uncased": "see lower case without accents",
            "uncased-accents": "see lower case with accents"}[case]
    assert note in out and note in (tmp_path / "page.html").read_text()

    # A classifier answers the same here and in transformers.
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name in ("train", "dev"):
        rows = "".join(f"{line}\t{n % 2}\n" for n, line in enumerate(sentences(words, 20, seed=len(name))))
        (folder / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}", encoding="utf-8")
    tuning = ["--task", "sst2", "--data-dir", str(tmp_path / "glue"), "--output", str(tmp_path / "out"),
              "--max-length", "24", "--device", "cpu", "--precision", "fp32"]
    assert Finetuning.main([*tuning, "--weights", str(run / "disc.pt"), "--epochs", "1", "--save-model"]) == 0
    model_file = tmp_path / "out" / "sst2" / "seed-0" / "model.pt"
    assert Finetuning.main([*tuning, "--weights", str(model_file), "--predict-file", str(tmp_path / "sents.txt")]) == 0
    predictions = tmp_path / "out" / "predictions" / "sents-predictions.tsv"
    predicted = predictions.read_text(encoding="utf-8").splitlines()[1]
    assert export(model_file, tmp_path / "tuned") == 0
    answer = pipeline("text-classification", model=str(tmp_path / "tuned"))(text)[0]
    assert predicted.split("\t")[1:] == [answer["label"], f"{answer['score']:.4f}", text]

    # Case and accents are handled alike in every exported and imported model.
    assert export(run, target) == 0
    texts = [*sentences(words, 9, seed=3), *(word for pair in pairs for word in pair)]
    for exported in (target / "generator", target / "discriminator", tmp_path / "tuned"):
        tokenizer = AutoTokenizer.from_pretrained(exported)
        assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == vocabulary.encode(texts)
    for source in (target, target / "discriminator"):
        assert pretrain(command("again", corpus=corpus, init_from=source, steps=1)) == 0
        again = Vocabulary.from_json(load(tmp_path / "again" / "disc.pt")["vocabulary"], "")
        assert again.encode(texts) == vocabulary.encode(texts) and again.case_note == vocabulary.case_note
        for path in (tmp_path / "again").iterdir():
            path.unlink()


# Commands


README = (ROOT / "convert" / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
            if not line.endswith("# download")]
MAINS = {"convert.to_transformers": convert.to_transformers.main,
         "convert.from_transformers": convert.from_transformers.main,
         "Finetuning.py": Finetuning.main, "Pretraining.py": pretrain}


def test_commands_of_the_readme_work_one_after_another(tmp_path, monkeypatch, vocabulary, glue, corpus_file):
    monkeypatch.chdir(tmp_path)
    write_pair(Path("runs/quickstart"), vocabulary, max_positions=128)
    Path("data").mkdir()
    Path("data/glue").symlink_to(glue)
    Path("corpus.txt").symlink_to(corpus_file)
    Path("configs").symlink_to(ROOT / "configs")
    short = {"Finetuning.py": "--epochs 1 --device cpu --precision fp32".split(),
             "Pretraining.py": "--steps 2 --batch-size 4 --eval-examples 8 --device cpu --precision fp32".split()}
    assert Finetuning.main(["--task", "mrpc", "--save-model", *short["Finetuning.py"]]) == 0
    for command in COMMANDS:
        program, *flags = shlex.split(command.removeprefix("python ").removeprefix("-m "), comments=True)
        assert MAINS[program]([*flags, *short.get(program, [])]) == 0, command


def test_converters_run_as_modules_without_importing_transformers():
    code = """
import runpy, sys
for name in ("convert.to_transformers", "convert.from_transformers"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0
assert not {"transformers", "datasets", "sklearn", "matplotlib"} & sys.modules.keys()
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "python -m convert.to_transformers [-h] RUN|FILE.pt FOLDER" in result.stdout
    assert "python -m convert.from_transformers [-h] FOLDER|NAME RUN" in result.stdout
