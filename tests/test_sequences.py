"""Images, sounds and drawn numbers, from the command that prepares them to the file that continues them."""

import json
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from txl_dist.data.index import Index
from txl_dist.data.mu_law import from_mu_law, mu_law
from txl_dist.data.samples import SampleReader
from txl_dist.data.tokenizers import IdsTokenizer
from txl_dist.evaluation.sampling import Completion, Sampler

HEIGHT, WIDTH = 6, 4  # of an image, grey
SIZE = HEIGHT * WIDTH

XLNET = ["model=xlnet", "model.reuse_len=12", "model.dropatt=0.0"]
SMALL = [
    "data.num_lanes=4",
    "data.reset_memory=document",
    "model.n_layer=1",
    "model.d_model=16",
    "model.n_head=2",
    "model.d_head=8",
    "model.d_inner=32",
    f"model.tgt_len={SIZE}",
    f"model.mem_len={SIZE}",
    "model.dropout=0.0",
    "optimizer.lr=3e-3",
    "train.max_steps=20",
    "train.eval_every=20",
    "checkpoint.every=20",
    "tracking.mode=disabled",
]


@pytest.fixture(scope="module")
def images(run, tmp_path_factory):
    """Images with one bright row each."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "in").mkdir()
    for number in range(40):
        image = np.zeros((HEIGHT, WIDTH), np.uint8)
        image[number % HEIGHT] = 200
        Image.fromarray(image).save(folder / "in" / f"{number}.png")
    corpus = ["corpus=files", f"corpus.path={folder}/in", "corpus.read=image", f"corpus.size=[{HEIGHT},{WIDTH}]"]
    shares = ["corpus.channels=1", "corpus.valid_share=0.1", "corpus.test_share=0.1"]
    done = run("txl_dist.prepare", *corpus, *shares, f"data.dir={folder}/data", "data.sample_tokens=100", "workers=1")
    assert "train │        32 │     - │    768" in done.stdout
    return folder / "data"


@pytest.fixture(scope="module", params=[[], XLNET], ids=["transformer_xl", "xlnet"])
def trained_run(request, run, images, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run("txl_dist.train", *request.param, *SMALL, f"data.dir={images}", f"run.dir={run_dir}")
    return run_dir


def evaluated(run, run_dir, *overrides):
    return json.loads(run("txl_dist.evaluate", f"run={run_dir}", "format=json", *overrides).stdout)


def test_training_and_evaluation_agree_in_bits_per_dimension(run, trained_run, metrics):
    result = evaluated(run, trained_run, "num_lanes=4")
    assert result["tokens"] == result["dimensions"] == 4 * SIZE
    assert result["bits_per_dimension"] == pytest.approx(result["loss"] / np.log(2))
    assert metrics(trained_run)[-1]["test/bits_per_dimension"] == pytest.approx(result["bits_per_dimension"], rel=1e-5)
    assert not {"bits_per_byte", "bytes", "word_perplexity"} & set(result)
    assert not [key for line in metrics(trained_run) for key in line if "per_byte" in key]
    table = run("txl_dist.evaluate", f"run={trained_run}").stdout
    assert "bits per dimension" in table and "unknown" not in table
    several = run("txl_dist.evaluate", f"run=[{trained_run},{trained_run}/../run]").stdout
    assert "bits per dimension" in several and "bits per character" not in several


def test_a_window_as_long_as_an_image_is_memory_that_ends_with_it(run, trained_run):
    """Both read <eos> before the first pixel, and nothing of the image before."""
    with_memory = evaluated(run, trained_run, "num_lanes=4")
    window = evaluated(run, trained_run, "sliding_window=true")
    assert window["loss"] == pytest.approx(with_memory["loss"], rel=1e-5)
    for num_lanes in (3, 8):  # no divisor of the images, and more than there are
        other = evaluated(run, trained_run, f"num_lanes={num_lanes}")
        assert other["loss"] == pytest.approx(with_memory["loss"], rel=1e-5)


def test_generation_begins_as_training_does(run, trained_run, images):
    """The probabilities of the first pixels of an image are those that evaluation scores."""
    index = Index.open(str(images))
    tokens = SampleReader(index, "test").tokens(0, SIZE).tolist()
    done = run("txl_dist.score", f"run={trained_run}", f"text={' '.join(map(str, tokens))}", "format=json")
    total = json.loads(done.stdout)["log_prob"]
    result = evaluated(run, trained_run, "num_lanes=1", f"max_tokens={SIZE}")
    assert -total / SIZE == pytest.approx(result["loss"], rel=1e-5)


def test_images_are_written_in_their_size(run, trained_run, tmp_path):
    prompts = ["", " ".join(["7"] * 5)]
    given = f"prompt={json.dumps(prompts)}"
    done = run("txl_dist.generate", f"run={trained_run}", given, "format=png", f"out={tmp_path}/a.png")
    numbers = run("txl_dist.generate", f"run={trained_run}", given, "format=ids", f"max_tokens={SIZE}").stdout
    expected = [list(map(int, line.split()))[:SIZE] for line in numbers.splitlines() if line and "---" not in line]
    for number, pixels in enumerate(expected, 1):
        with Image.open(tmp_path / f"a-{number}.png") as image:
            assert image.mode == "L" and image.size == (WIDTH, HEIGHT)
            assert np.asarray(image).reshape(-1).tolist() == pixels
    assert expected[1][:5] == [7] * 5
    assert done.stdout == f"{tmp_path}/a-1.png: 24 tokens\n{tmp_path}/a-2.png: 24 tokens\n"


def test_an_image_that_is_not_complete_is_filled_and_that_is_said(run, trained_run, tmp_path):
    options = ["prompt=9 9", "max_tokens=3", "temperature=0", "format=png", f"out={tmp_path}/a.png"]
    done = run("txl_dist.generate", f"run={trained_run}", *options)
    assert done.stdout == f"{tmp_path}/a.png: 5 tokens; 19 are missing, and 0\n"
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image).reshape(-1)
    assert pixels[:2].tolist() == [9, 9] and not pixels[5:].any()


def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(run, trained_run, tmp_path):
    weights = [*trained_run.glob("checkpoints/*/weights-*")]
    contents = [path.read_bytes() for path in weights]
    refused = [
        (["format=png", "prompt="], "out: is missing; format=png is written to a file; give out=NAME.png"),
        (["format=png", "prompt=", f"out={tmp_path}/a.jpg"], "a.jpg: is not the name of a file for format=png"),
        (["format=png", "prompt=", f"out={tmp_path}/no/a.png"], f"there is no folder {tmp_path}/no"),
        (["format=wav", "prompt=", f"out={tmp_path}/a.wav"], "was not trained on sounds; give format=text"),
        (["format=png", f"prompt={'1 ' * 25}", f"out={tmp_path}/a.png"], "prompt: has 25 numbers, more than the 24"),
        (["prompt=1 256"], "prompt: number 2, '256', is not one of 0 to 255; give numbers with spaces"),
    ]
    try:
        for path, content in zip(weights, contents, strict=True):
            path.write_bytes(bytes(len(content)))  # as long as before, but no weights
        for options, reason in refused:
            done = run("txl_dist.generate", f"run={trained_run}", *options, expect=2)
            assert reason in done.stderr and "Traceback" not in done.stderr, done.stderr
    finally:
        for path, content in zip(weights, contents, strict=True):
            path.write_bytes(content)
    assert not list(tmp_path.iterdir())


def test_a_run_of_numbers_has_no_exported_form(run, trained_run, tmp_path):
    done = run("txl_dist.convert", f"run={trained_run}", f"to={tmp_path}/out", expect=2)
    assert "its tokens are no text" in done.stderr and not list(tmp_path.iterdir())


def test_text_is_written_to_files_too(run, small, tmp_path):
    run("txl_dist.train", *small, f"run.dir={tmp_path}/run", "train.max_steps=2")
    options = [f"run={tmp_path}/run", 'prompt=["the", "and"]', "max_tokens=9"]
    printed = run("txl_dist.generate", *options).stdout
    run("txl_dist.generate", *options, f"out={tmp_path}/a.txt")
    texts = [(tmp_path / f"a-{number}.txt").read_text("utf-8") for number in (1, 2)]
    assert printed == f"--- 1\n{texts[0]}\n--- 2\n{texts[1]}" and texts[0].startswith("the")
    numbers = run("txl_dist.generate", *options, "format=ids").stdout.splitlines()
    assert numbers[1].split()[:3] == [str(byte) for byte in b"the"]
    done = run("txl_dist.generate", *options, "format=png", f"out={tmp_path}/a.png", expect=2)
    assert "was not trained on images" in done.stderr


def test_a_sound_is_continued_at_its_rate(run, tmp_path):
    (tmp_path / "in").mkdir()
    samples = (np.sin(np.arange(600) / 5) * 12000).astype("<i2")
    for number in range(3):
        with wave.open(str(tmp_path / "in" / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(4000)
            file.writeframes(samples.tobytes())
    paths = [f"corpus.{split}={tmp_path}/in/{number}.wav" for number, split in enumerate(("train", "valid", "test"))]
    run("txl_dist.prepare", "corpus=files", "corpus.read=audio", *paths, f"data.dir={tmp_path}/data", "workers=1")
    index = Index.open(str(tmp_path / "data"))
    levels = SampleReader(index, "train").tokens(0, 601).tolist()
    assert levels == [*mu_law(samples / 2**15).tolist(), 256]
    run("txl_dist.train", *SMALL, f"data.dir={tmp_path}/data", f"run.dir={tmp_path}/run")
    result = evaluated(run, tmp_path / "run")
    assert (result["tokens"], result["dimensions"]) == (601, 600)
    assert result["bits_per_dimension"] == pytest.approx(result["loss"] / np.log(2) * 601 / 600)
    prompt = " ".join(map(str, levels[:50]))
    options = [f"prompt={prompt}", "max_tokens=30", "format=wav", f"out={tmp_path}/a.wav"]
    run("txl_dist.generate", f"run={tmp_path}/run", *options)
    with wave.open(str(tmp_path / "a.wav"), "rb") as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (4000, 1, 2)
        written = np.frombuffer(file.readframes(100), "<i2")
    assert 50 < len(written) <= 80
    assert np.abs(written[:50] - from_mu_law(np.array(levels[:50])) * 2**15).max() <= 0.5


def test_an_eos_that_is_not_in_the_data_is_never_drawn():
    log_probs = torch.tensor([[0.1, 0.2, 0.7]]).log()
    generators = [torch.Generator().manual_seed(0)]
    assert Sampler(temperature=0, never=2).draw(log_probs, generators).tolist() == [1]
    assert {Sampler(never=2).draw(log_probs, generators).item() for _ in range(200)} == {0, 1}
    assert Completion(IdsTokenizer(2, end=False), "").never_drawn == 2
    assert Completion(IdsTokenizer(2, end=True), "").never_drawn is None
