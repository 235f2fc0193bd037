"""Imported Reformers have transformers' numbers here; nearly right folders are read, others refused with a reason."""

import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
    ReformerModel,
    ReformerModelWithLMHead,
)
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from tests.batches import batch
from tests.conversion.reformer_models import (
    LENGTH,
    SEED,
    TOKENIZER,
    VOCAB,
    draw_tokens,
    hash_as_transformers,
    hugging_face_model,
    save_folder,
)
from tests.conversion.third_party import assert_same, load_weights
from tests.conversion.xlnet_models import convert_job, edit_config
from txl_dist.checkpoint.format import latest
from txl_dist.config.sections import parse_model
from txl_dist.conversion.reformer import hugging_face
from txl_dist.convert import convert
from txl_dist.data import tokenizers
from txl_dist.errors import UserError
from txl_dist.models.shapes import parameter_shapes
from txl_dist.runs.load import load_model

torch.set_num_threads(1)

ENWIK8 = {"attn_layers": ["local", "local", "lsh", "local"] * 3, "hidden_size": 1024, "feed_forward_size": 4096}
ENWIK8 |= {"num_attention_heads": 8, "attention_head_size": 128, "num_buckets": 512, "num_hashes": 4, "vocab_size": 258}
ENWIK8 |= {"axial_pos_shape": [128, 512], "axial_pos_embds_dim": [256, 768], "max_position_embeddings": 65536}
ENWIK8 |= {"local_attn_chunk_length": 128, "lsh_attn_chunk_length": 256, "is_decoder": True, "eos_token_id": 2}
CRIME = {"num_attention_heads": 2, "axial_pos_shape": [512, 1024], "max_position_embeddings": 524288}
CRIME |= {"num_buckets": [64, 128], "is_decoder": True}

CASES = {
    "as published": {},
    "factors": {"num_hashes": 4, "num_buckets": [4, 2], "lsh_num_chunks_before": 2, "hidden_act": "gelu"},
    "local": {"attn_layers": ["local"] * 3, "local_num_chunks_before": 2, "hidden_act": "gelu_new"},
    "one table": {"axial_pos_embds": False, "chunk_size_feed_forward": 16},
    "three axes": {"axial_pos_shape": [4, 4, 4], "axial_pos_embds_dim": [8, 8, 16], "attn_layers": ["lsh"]},
}


def import_run(source, run_dir, **values):
    convert(convert_job(**{"from": source}, run=run_dir, **values))
    return run_dir


def refusal(*args, **values):
    with pytest.raises(UserError) as caught:
        import_run(*args, **values)
    return str(caught.value)


def title(run_dir):
    return latest(run_dir).state["imported"]["title"]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_has_the_loss_of_transformers(case, safe, tmp_path, monkeypatch):
    theirs = hugging_face_model(**CASES[case], hash_seed=SEED)
    run_dir = import_run(save_folder(theirs, tmp_path / "hf", safe), tmp_path / "run")
    hash_as_transformers(monkeypatch)
    tokens = draw_tokens()
    expected = theirs.double().train()(tokens, labels=tokens).loss
    model, checkpoint = load_model(str(run_dir))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    losses, _ = model.double()(batch(tokens, targets, torch.arange(LENGTH).expand(2, LENGTH)), model.empty_memory(2))
    torch.testing.assert_close(losses.sum() / (2 * (LENGTH - 1)), expected, rtol=1e-12, atol=1e-12)
    config = checkpoint.config["model"]
    assert (config["lsh"], config["tgt_len"], config["n_layer"]) == ("published", 64, len(theirs.config.attn_layers))
    assert (config["dropout"], config["dropatt"], config["ff_chunk_len"]) == (0, 0, 16 * (case == "one table"))
    assert title(run_dir) == "Hugging Face's reformer"
    assert tokenizers.load(run_dir / "tokenizer").model == TOKENIZER.model


def test_a_model_of_bytes_without_a_vocabulary_gets_ours(tmp_path):
    theirs = hugging_face_model(vocab_size=258, attn_layers=["local"])
    theirs.save_pretrained(tmp_path / "hf")
    run_dir = import_run(tmp_path / "hf", tmp_path / "run")
    model, _ = load_model(str(run_dir))
    assert tokenizers.load(run_dir / "tokenizer").kind == "bytes"
    assert title(run_dir).endswith("its token 1 is <eos>, and its token 0 (padding) is left out")
    text = torch.tensor(list(("Käse, " * 9).encode()[:LENGTH]))[None]
    with torch.no_grad():
        ours, _ = model(batch(text, None, torch.arange(text.size(1))[None]), model.empty_memory(1))
        logits = theirs.eval()(text + 2).logits
    torch.testing.assert_close(ours[..., :256], logits[..., 1:].log_softmax(-1)[..., 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[..., 256], logits[..., 1:].log_softmax(-1)[..., 0], rtol=1e-5, atol=1e-5)
    (tmp_path / "hf" / "spiece.model").write_bytes(TOKENIZER.model)  # then it is no model of bytes
    assert f"the vocabulary has {VOCAB} tokens, but the model 258" in refusal(tmp_path / "hf", tmp_path / "other")


def test_missing_and_null_keys_are_hugging_faces_defaults(tmp_path):
    given = {"hidden_size": 256, "is_decoder": True, "vocab_size": VOCAB}
    folder = save_folder(ReformerModelWithLMHead(ReformerConfig(**given)), tmp_path / "hf")
    expected = import_run(folder, tmp_path / "run")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "reformer", "vocab_size": VOCAB, "hidden_act": None, "lsh_num_chunks_before": None})
    )
    run_dir = import_run(folder, tmp_path / "again")
    assert latest(run_dir).config == latest(expected).config
    assert title(run_dir) == title(expected)
    assert "states no num_buckets: 128, as transformers chooses for 4,096 tokens" in title(run_dir)
    config = latest(run_dir).config["model"]
    assert (config["n_buckets"], config["axial_widths"], config["dropout"]) == ([128], [64, 192], 0.05)


def test_every_key_has_its_place(tmp_path):
    places = {
        "hidden_dropout_prob": ("dropout", 0.25),
        "local_attention_probs_dropout_prob": ("dropatt", 0.125),
        "lsh_attention_probs_dropout_prob": ("dropatt_lsh", 0.5),
        "initializer_range": ("init_std", 0.03),
        "axial_norm_std": ("axial_init_std", 0.7),
        "layer_norm_eps": ("layer_norm_eps", 1e-6),
        "local_num_chunks_before": ("local_chunks_before", 2),
        "lsh_num_chunks_before": ("lsh_chunks_before", 3),
        "local_attn_chunk_length": ("local_chunk_len", 4),
        "lsh_attn_chunk_length": ("lsh_chunk_len", 16),
        "num_hashes": ("n_hashes", 5),
        "chunk_size_feed_forward": ("ff_chunk_len", 32),
    }
    theirs = hugging_face_model(**{key: value for key, (_, value) in places.items()}, axial_pos_shape=[16, 8])
    config = latest(import_run(save_folder(theirs, tmp_path / "hf"), tmp_path / "run")).config["model"]
    expected = dict(places.values()) | {"axial_shape": [16, 8], "tgt_len": 64}
    assert {key: config[key] for key in expected} == expected
    edit_config(tmp_path / "hf", max_position_embeddings=1000)
    assert latest(import_run(tmp_path / "hf", tmp_path / "long")).config["model"]["tgt_len"] == 128


@pytest.mark.parametrize("max_positions", [64, 4096, 65536, 524288])
@pytest.mark.parametrize("chunk_len", [4, 64, 256])
def test_buckets_are_those_that_transformers_chooses(chunk_len, max_positions):
    for length in (max_positions, max_positions // 2):
        layer = types.SimpleNamespace(chunk_length=chunk_len, max_position_embeddings=max_positions)
        layer.config = types.SimpleNamespace()
        if length >= chunk_len:
            LSHSelfAttention._set_num_buckets(layer, length)
            assert hugging_face.choose_buckets(length, chunk_len, max_positions) == layer.num_buckets


def test_what_a_user_may_know_better(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    given = {"lsh": "strict", "n_buckets": [4, 4], "tgt_len": 32, "n_hashes": 8, "hash_draw": 2}
    config = latest(import_run(folder, tmp_path / "run", model=given)).config["model"]
    assert {key: config[key] for key in given} == given
    assert "model.d_model" in refusal(folder, tmp_path / "other", model={"d_model": 32})


def test_the_biases_have_either_name(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    expected = load_weights(import_run(folder, tmp_path / "run"))
    tensors = load_file(folder / "model.safetensors")
    biases = tensors.pop("lm_head.bias")
    assert torch.equal(expected["head.bias"], biases)
    for number, names in enumerate(
        [["lm_head.bias"], ["lm_head.decoder.bias"], ["lm_head.bias", "lm_head.decoder.bias"]]
    ):
        save_file(tensors | {name: biases.clone() for name in names}, folder / "model.safetensors")
        assert_same(load_weights(import_run(folder, tmp_path / f"run-{number}")), expected)
    save_file(tensors | {"lm_head.bias": biases, "lm_head.decoder.bias": biases + 1}, folder / "model.safetensors")
    message = refusal(folder, tmp_path / "other")
    assert "lm_head.bias differs from lm_head.decoder.bias" in message and "\n" not in message


@pytest.mark.parametrize("wrap", ["model", "module."])
def test_a_wrapped_or_parted_state_is_read(wrap, tmp_path):
    model = hugging_face_model()
    folder = save_folder(model, tmp_path / "hf", safe=False)
    expected = load_weights(import_run(folder, tmp_path / "run"))
    # The buffers of masks, which older versions saved.
    state = model.state_dict() | {
        "reformer.encoder.layers.1.attention.self_attention.self_mask_value_float16": torch.tensor(-1e3),
        "reformer.encoder.layers.0.attention.self_attention.mask_value_float32": torch.tensor(-1e9),
    }
    wrapped = {wrap + name: value for name, value in state.items()} if wrap.endswith(".") else {wrap: state}
    torch.save(wrapped, folder / "pytorch_model.bin")
    assert_same(load_weights(import_run(folder, tmp_path / "again")), expected)
    model.save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    (tmp_path / "parts" / "spiece.model").write_bytes(TOKENIZER.model)
    assert_same(load_weights(import_run(tmp_path / "parts", tmp_path / "third")), expected)


def test_a_vocabulary_can_be_given(tmp_path):
    folder = save_folder(hugging_face_model(), tmp_path / "hf")
    (folder / "spiece.model").rename(tmp_path / "given.model")
    assert "tokenizer_from: is missing" in refusal(folder, tmp_path / "run")
    import_run(folder, tmp_path / "run", tokenizer_from=tmp_path / "given.model")
    (tmp_path / "words.txt").write_text("\n".join(["<eos>", "<unk>", *(f"w{i}" for i in range(VOCAB - 2))]))
    run_dir = import_run(folder, tmp_path / "words", tokenizer_from=tmp_path / "words.txt")
    assert tokenizers.load(run_dir / "tokenizer").kind == "word"
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ReformerTokenizer"}')  # without its vocabulary
    assert "tokenizer_class='ReformerTokenizer': is none that was exported" in refusal(folder, tmp_path / "third")
    (tmp_path / "given.model").write_bytes(TOKENIZER.model[:200])
    message = refusal(folder, tmp_path / "third", tokenizer_from=tmp_path / "given.model")
    assert "given.model: cannot be read as a SentencePiece model" in message and "\n" not in message


@pytest.mark.parametrize(
    "config, count", [(ENWIK8, 149_182_722), (CRIME, 2_748_224)], ids=["enwik8", "crime-and-punishment"]
)
def test_published_models_have_their_number_of_parameters(config, count):
    values = hugging_face.DEFAULTS | config
    ours = parse_model(hugging_face.hyper_parameters(values))
    shapes = parameter_shapes(ours, values["vocab_size"], at_most=1000)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
    assert not list(ours.problems()) and ours.tgt_len == values["max_position_embeddings"]


def test_a_model_of_the_published_shape_is_imported(tmp_path):
    theirs = ReformerModelWithLMHead(ReformerConfig(**CRIME))
    theirs.save_pretrained(tmp_path / "hf", safe_serialization=False)
    words = "\n".join(["<eos>", "<unk>", *(f"w{i}" for i in range(318))])
    (tmp_path / "vocab.txt").write_text(words)
    run_dir = import_run(tmp_path / "hf", tmp_path / "run", tokenizer_from=tmp_path / "vocab.txt")
    weights = load_weights(run_dir)
    assert sum(map(torch.Tensor.numel, weights.values())) == 2_748_224
    axis = theirs.reformer.embeddings.position_embeddings.weights[1]
    assert torch.equal(weights["embedding.positions.1"], axis[0])
    assert latest(run_dir).config["model"]["n_buckets"] == [64, 128]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"axial_pos_shape": [4, 16]}, "axial_pos_shape=[4, 16], axial_pos_embds_dim=[12, 20]: asks for positions "
         "weights.0 [4, 1, 12], weights.1 [1, 16, 20], but its tensors are weights.0 [8, 1, 12], weights.1 [1, 8, 20]"),
        ({"axial_pos_embds_dim": [16, 16]}, "axial_pos_embds_dim=[16, 16]: asks for positions weights.0 [8, 1, 16]"),
        ({"axial_pos_embds": False}, "max_position_embeddings=64: asks for positions embedding.weight [64, 32]"),
        ({"axial_pos_embds_dim": [16, 20]}, "add up to 36"),
        ({"axial_pos_shape": [64]}, "axial_pos_shape=[64]: must be a list of 2 to 7 numbers"),
        ({"axial_pos_shape": [2**31 - 1] * 100_000}, "must be a list of 2 to 7 numbers"),
        ({"axial_pos_shape": 64}, "axial_pos_shape=64: must be"),
        ({"axial_pos_shape": ["8", "8"]}, "axial_pos_shape=['8', '8']: must be"),
        ({"lsh_num_chunks_after": 1}, "lsh_num_chunks_after=1: must be 0"),
        ({"local_num_chunks_after": 1}, "local_num_chunks_after=1: must be 0"),
        ({"is_decoder": False}, "must be a ReformerModelWithLMHead, is_decoder=true"),
        ({"hidden_act": "swish"}, "hidden_act='swish': must be one of gelu"),
        ({"attn_layers": ["local", "full"]}, "states attn_layers.1='full'"),
        ({"attn_layers": ["lsh", "local"]}, "layers.0.attention.self_attention.query_key.weight: is missing"),
        ({"attn_layers": ["local", "lsh", "local"]}, "layers.2.attention.layer_norm.weight: is missing"),
        ({"attn_layers": ["local", "lsh"] * 50_000}, "model.n_layer=100000"),
        ({"num_buckets": 7}, "n_buckets=[7]: must be even"),
        ({"num_buckets": None, "lsh_attn_chunk_length": 0}, "lsh_attn_chunk_length=0: must be a number above 0"),
        ({"num_buckets": None, "max_position_embeddings": 10**400}, "max_position_embeddings=1000"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings='64': must be a number above 0"),
        ({"feed_forward_size": 41}, "feed_forward.dense.dense.weight: has the shape [40, 32]"),
        ({"vocab_size": VOCAB + 1}, "word_embeddings.weight: has the shape"),
        ({"hidden_size": "32"}, "states d_model='32'"),
        ({"txl_dist": 3}, "is damaged"),
        ({"txl_dist": {"lsh": "loose"}}, "states lsh='loose'"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_a_config_that_disagrees_is_refused(changes, message, tmp_path):
    folder = edit_config(save_folder(hugging_face_model(), tmp_path / "hf"), **changes)
    text = refusal(folder, tmp_path / "run")
    assert message in text and len(text.splitlines()) <= 6 and len(text) < 2000 and "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [ReformerModel, ReformerForSequenceClassification, ReformerForMaskedLM])
def test_a_model_without_a_causal_softmax_is_refused(kind, tmp_path):
    model = hugging_face_model(kind, is_decoder=kind is ReformerModel)
    folder = save_folder(model, tmp_path / "hf")
    if kind is ReformerForSequenceClassification:
        edit_config(folder, is_decoder=True)
    if kind is ReformerForMaskedLM:  # of which the config states is_decoder only where all keys are written
        config = json.loads((folder / "config.json").read_text())
        config.pop("is_decoder", None)
        (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder, tmp_path / "run")
    assert "ReformerModelWithLMHead" in message and "\n" not in message


def test_a_lone_file_is_refused(tmp_path):
    torch.save(hugging_face_model().state_dict(), tmp_path / "lone.bin")
    assert "give the folder with its config.json" in refusal(tmp_path / "lone.bin", tmp_path / "run")


def test_many_tensors_of_the_same_few_numbers_are_no_large_model(tmp_path):
    model = hugging_face_model(attn_layers=["local", "lsh"] * 15)
    folder = save_folder(model, tmp_path / "hf", safe=False)
    state = model.state_dict()
    shared = torch.zeros(max(map(torch.Tensor.numel, state.values())))
    state = {name: shared[: value.numel()].view(value.shape) for name, value in state.items()}
    torch.save(state, folder / "pytorch_model.bin")
    message = refusal(folder, tmp_path / "run")
    assert "parameters, but all tensors only" in message and "\n" not in message
