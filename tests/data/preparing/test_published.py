"""The paper's corpora come out as the authors have them, however they are given; mistakes are reported in one line."""

import hashlib
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlparse

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from txl_dist.config.overrides import CONF, spell_out
from txl_dist.config.parse import parse_config
from txl_dist.config.schema import (
    BytesTokenizerConfig,
    DatasetConfig,
    PrepareJob,
    PublishedCorpusConfig,
    WordTokenizerConfig,
)
from txl_dist.data.index import Index
from txl_dist.data.preparing import corpora, pipeline, published, splitting
from txl_dist.data.preparing.download import Download
from txl_dist.data.preparing.published import LM1B, PUBLISHED, VOCABULARY, CorpusFile
from txl_dist.data.samples import SampleReader
from txl_dist.errors import ConfigError, UserError
from txl_dist.prepare import prepare

REPO = Path(__file__).resolve().parents[3]
TEXTS = Path(os.environ.get("TXL_DIST_TEXT", REPO.parent / "shared" / "data"))
SPLITS = corpora.SPLITS

# Small texts in the place of WikiText-103: words of equal count, <unk> among them, a word of no training text.
WIKI = {
    "wikitext-103/wiki.train.tokens": b" \n = b c = \n \n <unk> a c <unk> a b <unk> . \n c d \xc3\xa9 \n",
    "wikitext-103/wiki.valid.tokens": b" \n a b . \n",
    "wikitext-103/wiki.test.tokens": b" \n c z . \n",
}
WIKI_WORDS = ["<eos>", "c", "<unk>", "=", "b", "a", ".", "d", "é"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "txl_dist" / "corpora"


@pytest.fixture
def wiki(server, pack, tmp_path, monkeypatch) -> Path:
    """The archive of a small WikiText-103, which the server has, too."""
    packed = pack(tmp_path / "wikitext-103-v1.zip", WIKI | {"wikitext-103/README": b"-"})
    data = packed.read_bytes()
    server.files[packed.name] = data
    source = Download(server.url(packed.name), len(data), hashlib.sha256(data).hexdigest())
    small = PUBLISHED["wikitext103"]._replace(downloads=[source], vocab_size=len(WIKI_WORDS))
    monkeypatch.setitem(PUBLISHED, "wikitext103", small)
    return packed


def job(name: str, path: Path | None, folder: Path, tokenizer: Any = None, workers: int = 1) -> PrepareJob:
    corpus = PublishedCorpusConfig(name, None if path is None else str(path))  # type: ignore[arg-type]
    cut = DatasetConfig(str(folder), sample_tokens=8192, shard_samples=64)
    return PrepareJob(corpus, tokenizer or WordTokenizerConfig("word", None, 1, None), cut, workers)


def made(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tokens(folder: Path) -> dict[str, list[int]]:
    index = Index.open(str(folder))
    return {name: SampleReader(index, name).tokens(0, split.tokens).tolist() for name, split in index.splits.items()}


def words(folder: Path) -> list[str]:
    return (folder / "tokenizer" / "vocab.txt").read_text().split("\n")[:-1]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def authors_vocabulary(text: bytes) -> list[str]:
    """`<eos>`, then what Counter.most_common says of the lines read one by one: Vocab of the authors' code."""
    counts: Counter[str] = Counter()
    for line in text.decode().split("\n"):
        counts.update(line.strip().split())
    return ["<eos>", *(word for word, _ in counts.most_common())]


def authors_tokens(text: bytes, vocabulary: list[str]) -> list[int]:
    ids = {word: number for number, word in enumerate(vocabulary)}
    lines = text.decode().split("\n")[:-1]
    return [ids.get(word, ids.get("<unk>")) for line in lines for word in [*line.strip().split(), "<eos>"]]


# -------------------------------------------------------------------------------------------------------- table


def test_every_corpus_of_the_schema_is_in_the_table_and_its_files_make_three_splits():
    assert set(PUBLISHED) == set(get_args(get_type_hints(PublishedCorpusConfig)["name"]))
    for name, corpus in PUBLISHED.items():
        roles = [text.role for text in corpus.files]
        if corpus.cuts:
            assert roles == [None] and corpus.files[0].size == 100_000_000
            assert corpus.cuts == (90_000_000, 95_000_000)
        else:
            assert list(dict.fromkeys(role for role in roles if role != VOCABULARY)) == list(SPLITS)
        for source in corpus.downloads:
            assert urlparse(source.url).scheme in ("http", "https") and urlparse(source.url).hostname
            if source.name != "1b_word_vocab.txt":  # of which nobody has published one: its words are counted
                assert source.size and len(bytes.fromhex(source.sha256 or "")) == 32
        assert corpus.vocab_size or corpus.cuts, name
    sizes = {source.name: source.size for source in PUBLISHED["ptb"].downloads}
    assert sizes == {text.base: text.size for text in PUBLISHED["ptb"].files}


def test_lm1b_is_its_shards_1_to_99_in_order_and_the_first_heldout_one_twice():
    texts = PUBLISHED["lm1b"].files
    train = [text.base for text in texts if text.role == "train"]
    assert train == sorted(train) and len(train) == 99
    assert (train[0], train[-1]) == ("news.en-00001-of-00100", "news.en-00099-of-00100")
    heldout = [(text.role, text.base) for text in texts if text.role in ("valid", "test")]
    assert heldout == [("valid", "news.en.heldout-00000-of-00050"), ("test", "news.en.heldout-00000-of-00050")]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("given", [None, "bytes", "sentencepiece"])
def test_a_corpus_brings_its_tokenizer_unless_another_is_given(name, given):
    usual = "bytes" if name in ("enwik8", "text8") else "word"
    for overrides in {(f"corpus={name}", f"tokenizer={given}"), (f"tokenizer={given}", f"corpus={name}")}:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(
                "prepare", [spell_out(override) for override in overrides if given or "None" not in override]
            )
        parsed = parse_config(PrepareJob, OmegaConf.to_container(config, resolve=True))
        assert (parsed.corpus.name, parsed.tokenizer.name) == (name, given or usual)
        assert parsed.data.dir == f"data/{name}-{given or usual}"


# ------------------------------------------------------------------------------------------- downloaded or given


def test_a_corpus_is_downloaded_and_unpacked_once(server, wiki, cache, tmp_path):
    prepare(job("wikitext103", None, tmp_path / "data"))
    assert words(tmp_path / "data") == WIKI_WORDS == authors_vocabulary(WIKI["wikitext-103/wiki.train.tokens"])
    assert tokens(tmp_path / "data") == {
        split: authors_tokens(WIKI[f"wikitext-103/wiki.{split}.tokens"], WIKI_WORDS) for split in SPLITS
    }
    assert server.asked == [None]
    server.files.clear()
    prepare(job("wikitext103", None, tmp_path / "again"))
    assert content(tmp_path / "again") == content(tmp_path / "data") and server.asked == [None]
    kept = {path.name for path in (cache / "wikitext103").rglob("*") if path.is_file()}
    assert kept == {wiki.name, *(name.split("/")[1] for name in WIKI)}


def test_an_interrupted_download_is_reported_and_the_same_command_resumes_it(server, wiki, cache, tmp_path):
    server.cut = 200
    with pytest.raises(
        UserError, match=r"wikitext-103-v1.zip cannot be downloaded \(the connection broke after 200 of"
    ):
        prepare(job("wikitext103", None, tmp_path / "data"))
    server.cut = 0
    prepare(job("wikitext103", None, tmp_path / "data"))
    assert server.asked == [None, "bytes=200-"] and words(tmp_path / "data") == WIKI_WORDS


def test_all_ways_to_give_a_corpus_make_the_same_dataset(server, wiki, cache, pack, tmp_path):
    prepare(job("wikitext103", None, tmp_path / "data"))
    (tmp_path / "put").mkdir()
    (tmp_path / "put" / wiki.name).write_bytes(wiki.read_bytes())
    (tmp_path / "put" / "train.txt").write_text("of something else")
    renamed = {f"{name.split('.')[1]}.txt": data for name, data in WIKI.items()}  # as the authors' getdata.sh does
    given = {
        "archive": wiki,
        "folder with the archive": tmp_path / "put",
        "another archive": pack(tmp_path / "mine.tar.gz", {f"somewhere/{name}": data for name, data in WIKI.items()}),
        "unzipped": made(tmp_path / "unzipped", WIKI),
        "folder in it": made(tmp_path / "inner", WIKI) / "wikitext-103",
        "renamed": made(tmp_path / "renamed", renamed),
    }
    for number, (description, path) in enumerate(given.items()):
        prepare(job("wikitext103", path, tmp_path / f"data{number}", workers=1 + number % 2))
        assert content(tmp_path / f"data{number}") == content(tmp_path / "data"), description
    assert server.asked == [None]


def test_two_archives_never_pass_for_one_another(wiki, pack, tmp_path):
    other = {name: data.replace(b"d", b"D") for name, data in WIKI.items()}
    for number, files in enumerate((other, WIKI)):  # the second time under the same name
        prepare(job("wikitext103", pack(tmp_path / "mine.zip", files), tmp_path / f"data{number}"))
        assert ("D" in words(tmp_path / f"data{number}")) == (files is other)


def test_without_a_network_the_message_says_what_to_put_where_and_that_works(server, wiki, cache, tmp_path):
    server.files.clear()
    with pytest.raises(UserError) as error:
        prepare(job("wikitext103", None, tmp_path / "data"))
    message = str(error.value)
    assert f"corpus=wikitext103: {server.url(wiki.name)} cannot be downloaded (Not Found)" in message
    (line,) = (line for line in message.splitlines() if " at " in line)
    url, _, where = line.strip().partition(" at ")
    assert url == server.url(wiki.name) and where == str(cache / "wikitext103" / wiki.name)
    assert "python -m txl_dist.prepare corpus=wikitext103 corpus.path=FOLDER" in message
    Path(where).write_bytes(wiki.read_bytes())
    prepare(job("wikitext103", None, tmp_path / "data"))
    assert words(tmp_path / "data") == WIKI_WORDS and len(server.asked) == 1


# ----------------------------------------------------------------------------------------------------- mistakes


def test_a_damaged_archive_is_reported_whether_given_or_downloaded(server, wiki, cache, tmp_path):
    original = wiki.read_bytes()
    wiki.write_bytes(original[:-10])
    with pytest.raises(
        UserError, match=rf"{wiki.name}: has {len(original) - 10} bytes, .* published with {len(original)}"
    ):
        prepare(job("wikitext103", wiki, tmp_path / "data"))
    wiki.write_bytes(original[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{wiki.name}: has the sha256 .* fetch it again"):
        prepare(job("wikitext103", tmp_path, tmp_path / "data"))
    made(cache / "wikitext103", {wiki.name: original[:-10]})
    with pytest.raises(UserError, match=rf"{cache}.*{wiki.name}: has {len(original) - 10} bytes"):
        prepare(job("wikitext103", None, tmp_path / "data"))
    made(tmp_path, {"mine.zip": original[:-10]})
    with pytest.raises(UserError, match="mine.zip: is damaged or cut off"):
        prepare(job("wikitext103", tmp_path / "mine.zip", tmp_path / "data"))
    server.files[wiki.name] = original[:-1] + b"x"
    (cache / "wikitext103" / wiki.name).unlink()
    with pytest.raises(UserError, match=rf"{wiki.name}: what came has the sha256"):
        prepare(job("wikitext103", None, tmp_path / "data"))
    assert not (tmp_path / "data").exists() and not list(tmp_path.glob(".data*"))


SIZES = {"train": "5,101,618", "valid": "399,782", "test": "449,945"}
SHARDS = ", ".join(f"news.en-0000{n}-of-00100" for n in (2, 3, 4))


@pytest.mark.parametrize(
    "name, files, message",
    [
        (
            "wikitext103",
            {"wiki.train.tokens": b"a\n", "test.txt": b"a\n"},
            ["wiki.valid.tokens is missing from this folder"],
        ),
        ("wikitext2", {}, ["wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens are missing from this folder"]),
        ("wikitext103", {f"{split}.txt": b"a" * (split != "test") for split in SPLITS}, ["test.txt: is empty"]),
        (
            "ptb",
            {f"{split}.txt": b"a" for split in SPLITS},
            [f"{split}.txt: has 1 bytes, but must have exactly {size}" for split, size in SIZES.items()],
        ),
        ("enwik8", {"enwik8": b"a" * 99}, ["enwik8: has 99 bytes, but must have exactly 100,000,000"]),
        ("text8", {"enwik8": b"a"}, ["text8 is missing from this folder; give a folder with text8, or text8.zip"]),
        ("lm1b", {"news.en-00001-of-00100": b"a"}, [f"{SHARDS} and 97 more are missing from this folder"]),
    ],
)
def test_missing_files_and_other_sizes_are_reported_together(tmp_path, name, files, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as error:
        prepare(job(name, made(tmp_path / "folder", files), tmp_path / "data"))
    assert len(error.value.problems) == len(message)
    for problem, part in zip(error.value.problems, message, strict=True):
        assert part in problem and "\n" not in problem


def test_a_path_that_is_neither_folder_nor_archive_is_reported(wiki, pack, tmp_path):
    for path, message in [
        (tmp_path / "none", "none: there is no such file or folder"),
        (made(tmp_path, {"a.txt": b"a"}) / "a.txt", "a.txt: wiki.train.tokens, .* are missing from this file"),
        (pack(tmp_path / "b.tgz", {"x": b"a"}), "b.tgz: wiki.train.tokens, .* are missing from this archive"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare(job("wikitext103", path, tmp_path / "data"))


def test_links_that_lead_nowhere_are_named(wiki, tmp_path):
    folder = made(tmp_path / "text", dict(list(WIKI.items())[1:]))
    missing = folder / list(WIKI)[0]
    missing.parent.mkdir(exist_ok=True)
    missing.symlink_to("elsewhere")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (folder, tmp_path / "link"):
        with pytest.raises(ConfigError, match="is a link that leads nowhere"):
            prepare(job("wikitext103", path, tmp_path / "data"))


def test_another_text_under_the_right_names_is_known_by_its_words(wiki, tmp_path):
    folder = made(tmp_path / "text", WIKI | {"wikitext-103/wiki.train.tokens": b"a b\n"})
    with pytest.raises(UserError, match="corpus=wikitext103: the text has 3 different words, but must have 9"):
        prepare(job("wikitext103", folder, tmp_path / "data"))
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------------------------------- bytes and sentences


@pytest.mark.parametrize("name", ["enwik8", "text8"])
def test_one_file_is_cut_at_its_bytes_whatever_they_are(tmp_path, monkeypatch, name):
    small = PUBLISHED[name]._replace(files=[CorpusFile(name, None, 1000)], cuts=(900, 950))
    monkeypatch.setitem(PUBLISHED, name, small)
    monkeypatch.setattr(splitting, "PIECE_BYTES", 64)
    data = np.random.default_rng(1).integers(0, 256, 1000, np.uint8).tobytes()  # with line ends, and no UTF-8
    bytes_job = job(name, made(tmp_path, {"mine": data}) / "mine", tmp_path / "data", BytesTokenizerConfig("bytes"))
    prepare(bytes_job)
    parts = {"train": data[:900], "valid": data[900:950], "test": data[950:]}
    assert tokens(tmp_path / "data") == {split: [*part, 256] for split, part in parts.items()}
    assert {name: split.bytes for name, split in Index.open(bytes_job.data.dir).splits.items()} == {
        "train": 900,
        "valid": 50,
        "test": 50,
    }


def test_enwik8_has_90_5_and_5_million_bytes(tmp_path):
    with open(tmp_path / "enwik8", "wb") as file:
        file.truncate(100_000_000)
    problems: list[str] = []
    config = PublishedCorpusConfig("enwik8", str(tmp_path))
    (source,) = corpora.find(config, problems)
    plan = splitting.plan(config, [corpora.SurveyedFile(source, source.path.stat().st_size, "")])
    assert not problems
    assert [plan.size(split) for split in SPLITS] == [90_000_000, 5_000_000, 5_000_000]
    assert plan.files[0][1][1] == splitting.TextRange("valid", 90_000_000, 95_000_000)


SENTENCES = {
    f"{LM1B}/training-monolingual.tokenized.shuffled/news.en-00001-of-00100": b"the sea , the sea\nno end\n",
    f"{LM1B}/training-monolingual.tokenized.shuffled/news.en-00002-of-00100": b"the end\n",
    f"{LM1B}/training-monolingual.tokenized.shuffled/news.en-00000-of-00100": b"no training text\n",
    f"{LM1B}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": b"the unheard , end\n",
}
COUNTS = b"the 70\n, 60\n<S> 50\nsea 40\n<UNK> 40\nend 40\nno 3\n"


@pytest.fixture
def lm1b(pack, tmp_path, monkeypatch) -> Path:
    """A folder with a small 1-billion-word corpus: its archive, of other bytes than published, and its words."""
    full = PUBLISHED["lm1b"]
    texts = [text for text in full.files if text.role != "train"]
    archive = Download(f"http://127.0.0.1/{LM1B}.tar.gz")
    texts[:0] = [CorpusFile(name, "train") for name in list(SENTENCES)[:2]]
    small = full._replace(downloads=[archive, full.downloads[1]], files=texts, vocab_size=7)
    monkeypatch.setitem(PUBLISHED, "lm1b", small)
    folder = made(tmp_path / "lm1b", {"1b_word_vocab.txt": COUNTS})
    pack(folder / archive.name, SENTENCES)
    return folder


def test_the_words_of_lm1b_are_the_published_ones_in_their_order(lm1b, tmp_path):
    prepare(job("lm1b", lm1b, tmp_path / "data"))
    assert words(tmp_path / "data") == ["<eos>", "the", ",", "sea", "<unk>", "end", "no"]
    assert tokens(tmp_path / "data") == {
        "train": [1, 3, 2, 1, 3, 0, 6, 5, 0, 1, 5, 0],
        "valid": [1, 4, 2, 5, 0],
        "test": [1, 4, 2, 5, 0],
    }
    assert Index.open(str(tmp_path / "data")).splits["train"].document_starts.tolist() == [0, 6, 9, 12]
    (lm1b / "1b_word_vocab.txt").write_bytes(COUNTS.replace(b"40", b"39"))
    with pytest.raises(UserError, match="another dataset"):
        prepare(job("lm1b", lm1b, tmp_path / "data"))


def test_lm1b_predicts_the_same_as_the_authors_sentences_in_double_eos(lm1b, tmp_path):
    """They put <S> before and after each sentence, and their iterator never predicts one sentence from another."""
    prepare(job("lm1b", lm1b, tmp_path / "data"))
    theirs = []
    for name in list(SENTENCES)[:2]:
        for line in SENTENCES[name].decode().splitlines():
            theirs += pairwise(["<eos>", *line.split(), "<eos>"])
    stream = ["<eos>", *(words(tmp_path / "data")[token] for token in tokens(tmp_path / "data")["train"])]
    assert list(pairwise(stream)) == theirs


def test_lm1b_needs_its_words(lm1b, tmp_path):
    (lm1b / "1b_word_vocab.txt").rename(lm1b / "words.txt")
    with pytest.raises(ConfigError, match="lm1b: 1b_word_vocab.txt is missing from this folder"):
        prepare(job("lm1b", lm1b, tmp_path / "data"))
    (lm1b / "1b_word_vocab.txt").write_bytes(COUNTS.replace(b"no 3\n", b""))
    with pytest.raises(UserError, match="the text has 6 different words, but must have 7"):
        prepare(job("lm1b", lm1b, tmp_path / "data"))


# -------------------------------------------------------------------------------------------------- real corpora


@pytest.mark.parametrize(
    "name, folder, counts, vocab_size",
    [
        ("ptb", "ptb", [929_589, 73_760, 82_430], 10_000),
        ("wikitext2", "wikitext-2", [2_088_628, 217_646, 245_569], 33_278),
    ],
)
def test_the_real_corpora_have_the_tokens_of_the_literature(tmp_path, name, folder, counts, vocab_size):
    if not (TEXTS / folder).is_dir():
        pytest.skip(f"no {name} in {TEXTS / folder} (TXL_DIST_TEXT)")
    prepare(job(name, TEXTS / folder, tmp_path / "data"))
    index = Index.open(str(tmp_path / "data"))
    assert [index.splits[split].tokens for split in SPLITS] == counts and index.vocab_size == vocab_size
    paths = {text.role: path for text, path in published.locate(PublishedCorpusConfig(name, str(TEXTS / folder)), [])}
    vocabulary = authors_vocabulary(paths["train"].read_bytes())
    assert words(tmp_path / "data") == vocabulary
    assert tokens(tmp_path / "data")["test"] == authors_tokens(paths["test"].read_bytes(), vocabulary)


def test_the_same_corpus_is_found_done(wiki, tmp_path, capsys, monkeypatch):
    prepare(job("wikitext103", wiki, tmp_path / "data"))
    monkeypatch.setattr(pipeline, "write_splits", None)
    prepare(job("wikitext103", None, tmp_path / "data"))
    assert "Nothing to do" in capsys.readouterr().out
