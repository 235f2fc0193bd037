"""The Reformer against transformers (4.36.2), against attention written out pair by pair, and against itself."""

from collections import Counter
from math import log
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import ReformerConfig as TheirConfig
from transformers import ReformerModelWithLMHead

from tests.batches import batch
from txl_dist.config.sections import changed_model, parse_model
from txl_dist.errors import ConfigError, UserError
from txl_dist.evaluation.reading import Memory, read
from txl_dist.models.base import Runtime
from txl_dist.models.layers import chunked_attention, hashed_attention
from txl_dist.models.layers.chunked_attention import Chunks, attend
from txl_dist.models.layers.dropout import Mask, Noise, factors
from txl_dist.models.layers.hashing import draw_rotations, hash_vectors, sort_as_published, sort_within_buckets
from txl_dist.models.reformer import Reformer, ReformerConfig

torch.set_num_threads(1)

CONF = OmegaConf.to_container(OmegaConf.load(Path(__file__).parents[2] / "conf/model/reformer.yaml"))
SMALL = {"n_layer": 2, "d_model": 32, "n_head": 2, "d_head": 8, "d_inner": 40, "tgt_len": 64}
SMALL |= {"axial_shape": [8, 8], "axial_widths": [12, 20], "lsh_chunk_len": 8, "local_chunk_len": 8, "n_buckets": [8]}
NO_DROPOUT = {"dropout": 0.0, "dropatt": 0.0, "dropatt_lsh": 0.0}
DROPOUT = {"dropout": 0.2, "dropatt": 0.3, "dropatt_lsh": 0.3}
VOCAB, LANES, LENGTH = 30, 2, 64
REVERSIBLE = Runtime(activation_checkpointing=True)


def make_config(**changes):
    return ReformerConfig(**CONF | SMALL | NO_DROPOUT | changes)


def build(config, runtime=REVERSIBLE, dtype=torch.float64):
    """A model whose weights are large enough for attention to choose."""
    torch.manual_seed(0)
    model = Reformer(config, VOCAB, runtime).to(dtype)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.3)
    return model


def draw_tokens(length=LENGTH, lanes=LANES, seed=0):
    return torch.randint(VOCAB, (lanes, length), generator=torch.Generator().manual_seed(seed))


def fields(tokens, targets=None, lookback=None):
    lookback = torch.arange(tokens.size(1)).expand(tokens.shape) if lookback is None else lookback
    return batch(tokens, targets, lookback)


def read_alone(model, tokens, lookback=None):
    """The log-probabilities in evaluation."""
    with torch.no_grad():
        return model.eval()(fields(tokens, None, lookback), model.empty_memory(len(tokens)))[0]


def near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ against transformers


def in_their_names(model, of=lambda parameter: parameter.detach()):
    """What `of` returns of each of our parameters, by transformers' names and in its shapes."""
    named = {"reformer.embeddings.word_embeddings.weight": of(model.embedding.table)}
    axes = len(model.config.axial_shape)
    for axis, table in enumerate(model.embedding.positions):
        shape = [1] * axes + [table.size(1)]
        shape[axis] = table.size(0)
        named[f"reformer.embeddings.position_embeddings.weights.{axis}"] = of(table).view(*shape)
    parts = {"reformer.encoder.layer_norm": model.layer_norm, "lm_head.decoder": model.head}
    for number, layer in enumerate(model.layers):
        where = f"reformer.encoder.layers.{number}"
        for name in ("query_key", "query", "key", "value"):
            if hasattr(layer.attention, name):
                weight = getattr(layer.attention, name).weight
                named[f"{where}.attention.self_attention.{name}.weight"] = of(weight)
        named[f"{where}.attention.output.dense.weight"] = of(layer.attention.output.weight)
        parts[f"{where}.attention.layer_norm"] = layer.attention.layer_norm
        parts[f"{where}.feed_forward.layer_norm"] = layer.feed_forward.layer_norm
        parts[f"{where}.feed_forward.dense.dense"] = layer.feed_forward.inner
        parts[f"{where}.feed_forward.output.dense"] = layer.feed_forward.outer
    for name, part in parts.items():
        named |= {f"{name}.weight": of(part.weight), f"{name}.bias": of(part.bias)}
    return named


def their_model(model, seed):
    config = model.config
    theirs = TheirConfig(
        attn_layers=config.kinds,
        hidden_size=config.d_model,
        num_attention_heads=config.n_head,
        attention_head_size=config.d_head,
        feed_forward_size=config.d_inner,
        axial_pos_shape=config.axial_shape,
        axial_pos_embds_dim=config.axial_widths,
        max_position_embeddings=config.max_len,
        lsh_attn_chunk_length=config.lsh_chunk_len,
        local_attn_chunk_length=config.local_chunk_len,
        lsh_num_chunks_before=config.lsh_chunks_before,
        local_num_chunks_before=config.local_chunks_before,
        num_hashes=config.n_hashes,
        num_buckets=config.n_buckets if len(config.n_buckets) > 1 else config.n_buckets[0],
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        vocab_size=VOCAB,
        is_decoder=True,
        hash_seed=seed,
    )
    other = ReformerModelWithLMHead(theirs).double().train()
    missing, unexpected = other.load_state_dict(in_their_names(model), strict=False)
    assert set(missing) <= {"lm_head.bias"} and not unexpected
    return other


@pytest.mark.parametrize(
    "changes",
    [
        {"n_hashes": 1},
        {"n_hashes": 4},
        {"n_hashes": 2, "n_buckets": [4, 2]},
        {"n_hashes": 2, "lsh_chunks_before": 2, "local_chunks_before": 2},
        {"n_hashes": 1, "lsh_chunks_before": 8},  # all, and its own once more
        {"n_hashes": 3, "local_chunks_before": 0, "lsh_chunk_len": 16},
        {"attn_layers": ["lsh"], "n_layer": 3, "activation": "relu"},
        {"lsh_chunk_len": 64, "n_hashes": 2},  # as long as the segment: nothing is hashed
        {"axial_shape": [4, 4, 4], "axial_widths": [8, 8, 16]},
    ],
    ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()).replace(" ", ""),
)
@pytest.mark.parametrize("runtime", [Runtime(), REVERSIBLE], ids=["stored", "reversible"])
def test_published_is_the_model_of_transformers(changes, runtime, monkeypatch):
    config = make_config(lsh="published", **changes)
    model = build(config, runtime)
    seed = 5

    def theirs_rotations(seed_of_layer, n_head, d_head, rounds, directions):
        torch.manual_seed(seed)
        return torch.randn(n_head, d_head, rounds, directions, dtype=torch.float64)

    monkeypatch.setattr(hashed_attention, "draw_rotations", theirs_rotations)
    theirs = their_model(model, seed)
    tokens = draw_tokens()
    expected = theirs(tokens, labels=tokens)
    expected.loss.backward()
    targets = torch.cat([tokens[:, 1:], torch.full((LANES, 1), -100)], dim=1)
    losses, _ = model(fields(tokens, targets), model.empty_memory(LANES))
    loss = losses.sum() / (LANES * (LENGTH - 1))
    loss.backward()
    near(loss, expected.loss, 1e-12)
    gradients = in_their_names(model, lambda parameter: parameter.grad)
    theirs_too = {name: parameter.grad for name, parameter in theirs.named_parameters() if name in gradients}
    assert gradients.keys() - theirs_too.keys() <= {"lm_head.decoder.bias"}  # one tensor of two names
    for name, gradient in theirs_too.items():
        scale = gradient.abs().max()
        near(gradients[name] / scale, gradient / scale, 1e-12)


# --------------------------------------------------------------------------------------------- against every pair


def windows(position, chunks, length):
    """The pairs (query, key) that meet in the windows of an order, as often as they do."""
    n = len(position)
    pairs = []
    for at in range(n):
        chunk = at // chunks.chunk_len
        for back in range(chunks.before + 1):
            first = (chunk - back) * chunks.chunk_len
            pairs += [(at, other % n) for other in range(first, first + chunks.chunk_len)]
    return [(query, key) for query, key in pairs if position[query] < length and position[key] < length]


def closed_form(query, key, value, pairs):
    """Softmax over all that a query meets before itself: as often as it meets a key, that counts; else itself."""
    length = len(query)
    times = Counter(pairs)
    output = torch.empty_like(value)
    for i in range(length):
        seen = [j for j in range(length) if times[i, j] and j < i]
        scores = torch.stack([query[i] @ key[j] + log(times[i, j]) for j in seen]) if seen else None
        output[i] = scores.softmax(0) @ value[seen] if seen else value[i]
    return output


LENGTHS = [64, 61]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("lsh", ["strict", "published"])
@pytest.mark.parametrize("before", [1, 2])
def test_attention_is_the_closed_form(lsh, before, length):
    generator = torch.Generator().manual_seed(1)
    query, value = (torch.randn(1, length, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    query[0, 5] = query[0, 3] = query[0, 40]  # so that some buckets have more than one, whatever is drawn
    chunks = Chunks(3, 8, before, sees_itself=False, around=lsh == "published")
    buckets = hash_vectors(query[None], draw_rotations(torch.tensor(1), 1, 6, 3, 4), [8])
    document = torch.tensor([0] * 30 + [30] * (length - 30))[None]
    sort = sort_within_buckets if lsh == "strict" else sort_as_published
    layout = sort(buckets, document, [8], chunks)
    pairs = []
    if lsh == "published":
        order = layout.position[0].tolist()
        met = windows(order, chunks, length)
        pairs = [(order[i], order[j]) for i, j in met if order[j] >= document[0, order[i]]]
    else:
        for of_round in buckets[0, 0].tolist():
            for i in range(length):
                alike = [j for j in range(i) if of_round[j] == of_round[i] and j >= document[0, i]]
                pairs += [(i, j) for j in alike[len(alike) - min(len(alike), before * 8) :]]
    expected = closed_form(query[0], query[0] * 0.7, value[0], pairs)
    near(attend(query, query * 0.7, value, layout, chunks, None)[0], expected, 1e-12)


def in_one_piece(query, key, value, layout, chunks, mask):
    """Attention of all windows at once, for autograd."""
    rows, length, _ = query.shape
    row = torch.arange(rows)[:, None, None]
    numbers = torch.arange(layout.position.size(1)).expand(rows, -1) if layout.number is None else layout.number
    order, number, lowest = (
        x.long().unflatten(1, (-1, chunks.chunk_len)) for x in (layout.position, numbers, layout.lowest)
    )
    window, window_number = (
        torch.cat([x[:, x.size(1) - chunks.reach :], x], dim=1).long().unfold(1, chunks.window, chunks.chunk_len)
        for x in (layout.position, numbers)
    )
    scores = query[row, order.clamp(max=length - 1)] @ key[row, window.clamp(max=length - 1)].transpose(-1, -2)
    keys, queries = window_number[..., None, :], number[..., None]
    scores = scores.masked_fill((keys > queries) | (keys < lowest[..., None]), -torch.inf)
    scores = scores.masked_fill(keys == queries, chunked_attention.SELF)
    log_sums = scores.logsumexp(-1)
    weights = (scores - log_sums[..., None]).exp()
    seeds = chunked_attention.chunk_seeds(mask.seeds, range(weights.size(1)))
    weights = weights * factors(seeds, list(weights.shape[2:]), mask.p, weights.dtype).view_as(weights)
    outputs = (weights @ value[row, window.clamp(max=length - 1)]).flatten(1, 2)
    undo = order.flatten(1).unflatten(1, (chunks.rounds, -1))[..., :length].argsort(-1)
    undo = undo + torch.arange(chunks.rounds)[:, None] * (order[0].numel() // chunks.rounds)
    row = torch.arange(rows)[:, None, None]
    shares = log_sums.flatten(1)[row, undo].softmax(1)
    return (outputs[row, undo] * shares[..., None]).sum(1)


@pytest.mark.parametrize("block", [1, 3000, 1 << 20])
@pytest.mark.parametrize("lsh", ["strict", "published"])
def test_blocks_have_the_gradients_of_the_formula(lsh, block, monkeypatch):
    monkeypatch.setattr(chunked_attention, "CPU_BLOCK", block)
    length, rows = 61, 4
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, length, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    upper = torch.randn(rows, length, 6, generator=generator, dtype=torch.float64)
    chunks = Chunks(2, 8, 1, sees_itself=False, around=lsh == "published")
    buckets = hash_vectors(inputs[0][None], draw_rotations(torch.tensor(1), rows, 6, 2, 4), [8])
    sort = sort_within_buckets if lsh == "strict" else sort_as_published
    layout = sort(buckets, torch.zeros(1, length, dtype=torch.int64), [8], chunks)
    mask = Mask(0.3, torch.arange(rows) + 17)
    results = []
    for function in (in_one_piece, attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves, layout, chunks, mask)
        output.backward(upper)
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    near(*results)


# ------------------------------------------------------------------------------------------------------- causality


def moved(lsh, kinds):
    """How far the log-probabilities before a token move when it changes, and those of a prefix alone."""
    model = build(make_config(lsh=lsh, attn_layers=kinds, n_hashes=4))
    tokens = draw_tokens()
    other = tokens.clone()
    other[:, 40] = (other[:, 40] + 1) % VOCAB
    whole = read_alone(model, tokens)
    changed = (read_alone(model, other) - whole)[:, :40].abs().max()
    prefix = (read_alone(model, tokens[:, :32]) - whole[:, :32]).abs().max()
    return float(changed), float(prefix)


def test_strict_is_causal_and_published_is_not():
    assert max(moved("strict", ["local", "lsh"])) < 1e-12
    assert max(moved("strict", ["lsh"])) < 1e-12
    assert max(moved("published", ["local"])) < 1e-12
    assert min(moved("published", ["lsh"])) > 1e-3


@pytest.mark.parametrize("lsh", ["strict", "published"])
def test_documents_do_not_see_one_another(lsh):
    model = build(make_config(lsh=lsh))
    tokens = draw_tokens()
    lookback = torch.cat([torch.arange(25), torch.arange(LENGTH - 25)]).expand(LANES, LENGTH)
    other = tokens.clone()
    other[:, :25] = draw_tokens(25, seed=9)
    difference = (read_alone(model, other, lookback) - read_alone(model, tokens, lookback))[:, 25:].abs().max()
    assert difference < 1e-12 if lsh == "strict" else difference > 1e-6  # chunks of the order have borders elsewhere


@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("prompt", [1, 7, 40])
def test_a_text_read_piece_by_piece_is_the_text(prompt, before):
    config = make_config(n_hashes=3, lsh_chunks_before=before, local_chunks_before=before, lsh_chunk_len=4)
    model = build(config).eval()
    tokens = draw_tokens()
    whole = read_alone(model, tokens)
    memory = Memory.empty(model, LANES)
    log_probs = []
    for piece in [tokens[:, :prompt], *tokens[:, prompt : prompt + 4].split(1, dim=1), tokens[:, prompt + 4 :]]:
        readings = list(read(model, piece, memory))
        log_probs += [more for more, _ in readings]
        memory = readings[-1][1]
    near(torch.cat(log_probs, dim=1), whole)


def test_lanes_of_different_lengths_go_on_together():
    model = build(make_config()).eval()
    long, short = draw_tokens(lanes=1), draw_tokens(lanes=1, seed=3)
    memories = []
    for tokens, length in ((long, 50), (short, 9)):
        [(_, memory)] = read(model, tokens[:, :length], Memory.empty(model, 1))
        memories.append(memory)
    memory = Memory.join(memories)
    for step in range(5):
        again = memory.copy()
        [(log_probs, memory)] = read(model, torch.stack([long[0, 50 + step], short[0, 9 + step]])[:, None], memory)
        [(same, _)] = read(model, torch.stack([long[0, 50 + step], short[0, 9 + step]])[:, None], again)
        near(same, log_probs, 0)
        near(log_probs[0, 0], read_alone(model, long)[0, 50 + step])
        near(log_probs[1, 0], read_alone(model, short)[0, 9 + step])


def test_published_is_read_token_by_token_as_each_prefix_is():
    model = build(make_config(lsh="published", attn_layers=["lsh"], n_layer=1)).eval()
    tokens = draw_tokens(lanes=1)
    [(_, memory)] = read(model, tokens[:, :20], Memory.empty(model, 1))
    for position in range(20, 30):
        [(log_probs, memory)] = read(model, tokens[:, position, None], memory)
        near(log_probs[:, -1], read_alone(model, tokens[:, : position + 1])[:, -1])


# ------------------------------------------------------------------------------------------------- reversible layers


@pytest.mark.parametrize("lsh", ["strict", "published"])
def test_reversing_layers_gives_the_gradients_of_autograd(lsh):
    config = make_config(lsh=lsh, n_layer=4, ff_chunk_len=24, **DROPOUT)
    tokens, targets = draw_tokens(), draw_tokens(seed=1)
    gradients = []
    for runtime in (Runtime(), REVERSIBLE):
        model = build(config, runtime)
        losses, _ = model(fields(tokens, targets), model.empty_memory(LANES), Noise.of_step(1, 7, range(LANES)))
        losses.mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        near(gradients[1][name] / gradient.abs().max(), gradient / gradient.abs().max())


def test_pieces_of_feed_forward_change_nothing():
    tokens = draw_tokens()
    near(read_alone(build(make_config(ff_chunk_len=7)), tokens), read_alone(build(make_config()), tokens))


def test_twelve_layers_are_computed_back_in_float32():
    config = make_config(n_layer=12, n_hashes=4, d_model=64, axial_widths=[32, 32], **DROPOUT)
    torch.manual_seed(0)
    model = Reformer(config, VOCAB, REVERSIBLE)
    carry = model.embed(model.inputs_of(fields(draw_tokens())), Noise.of_step(1, 0, range(LANES)))
    noise = Noise.of_step(1, 0, range(LANES))
    shared = model.shared(carry, noise)
    first, second = start = carry[0].detach().chunk(2, dim=-1)
    chosen = []
    with torch.no_grad():
        for layer in model.layers:
            attended, arrangement = layer.attention(second, shared, noise)
            first = first + attended
            second = second + layer.feed_forward(first, noise)
            chosen.append(arrangement)
        for layer in reversed(model.layers):
            second = second - layer.feed_forward(first, noise)
            first = first - layer.attention(second, shared, noise, chosen.pop())[0]
    near(torch.cat([first, second]), torch.cat(start), 1e-5)


def test_streams_stay_in_float32_in_half_precision():
    config = make_config(n_layer=6, init_std=0.02, **DROPOUT)
    tokens, targets = draw_tokens(), draw_tokens(seed=1)
    noise = Noise.of_step(1, 0, range(LANES))
    gradients = []
    for runtime in (Runtime(), REVERSIBLE):
        torch.manual_seed(0)
        model = Reformer(config, VOCAB, runtime).bfloat16()
        assert model.embed(model.inputs_of(fields(tokens)), noise)[0].dtype == torch.float32
        model(fields(tokens, targets), model.empty_memory(LANES), noise)[0].mean().backward()
        assert all(parameter.dtype == parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).double())
    assert (gradients[1] - gradients[0]).norm() < 1e-2 * gradients[0].norm()


# ---------------------------------------------------------------------------------------------------------- hashing


def test_rotations_belong_to_step_layer_and_round():
    config = make_config(attn_layers=["lsh"])
    model = build(config)
    attentions = [layer.attention for layer in model.layers]
    carry = model.embed(model.inputs_of(fields(draw_tokens())))
    view = model.shared(carry)
    noise = [Noise.of_step(1, step, range(LANES)) for step in (0, 1)]
    drawn = [attention.rotations(view, of_step) for attention in attentions for of_step in noise]
    assert len({tuple(rotations.flatten().tolist()) for rotations in drawn}) == 4
    near(attentions[0].rotations(view, noise[0].of_rows(slice(1, 2))), drawn[0], 0)  # of all lanes
    near(attentions[0].rotations(view._replace(rounds=5), noise[0])[:, :, :2], drawn[0], 0)
    model.eval()
    fixed = attentions[0].rotations(view, None)
    near(attentions[0].rotations(view, None), fixed, 0)
    assert not torch.equal(attentions[0].rotations(view._replace(draw=1), None), fixed)


def test_opposite_vectors_are_in_opposite_buckets():
    vectors = torch.randn(1, 2, 50, 6, generator=torch.Generator().manual_seed(0))
    rotations = draw_rotations(torch.tensor(3), 2, 6, 4, 4)
    buckets, opposite = hash_vectors(vectors, rotations, [8]), hash_vectors(-vectors, rotations, [8])
    assert torch.equal((buckets + 4) % 8, opposite)
    assert buckets.min() >= 0 and buckets.max() < 8 and len(buckets.unique()) == 8
    factors = hash_vectors(vectors, draw_rotations(torch.tensor(3), 2, 6, 4, 5), [4, 6])
    assert factors.max() < 24 and len(factors.unique()) > 12


# ----------------------------------------------------------------------------------------------------------- config


def test_what_does_not_fit_is_told():
    config = make_config(
        mem_len=5, axial_widths=[12, 12], tgt_len=65, n_buckets=[7], attn_layers=["lsh"] * 3, lsh_chunks_before=0
    )
    problems = "\n".join(config.problems())
    for part in ("model.mem_len=5: a Reformer has no memory", "add up to 24, not to model.d_model=32"):
        assert part in problems
    for part in (
        "model.tgt_len=65: there are only 64 positions",
        "model.n_buckets=[7]: must be even",
        "names 3 layers",
        "model.lsh_chunks_before=0: with model.lsh=strict",
    ):
        assert part in problems
    with pytest.raises(ConfigError, match="mem_len"):
        changed_model(make_config(), {"mem_len": 3})
    assert parse_model(CONF | {"n_buckets": 16}).n_buckets == [16]


def test_a_text_beyond_the_positions_is_an_error():
    model = build(make_config()).eval()
    with pytest.raises(UserError, match="model.axial_shape: has 64 positions"):
        list(read(model, draw_tokens(65), Memory.empty(model, LANES)))


def test_a_model_as_published_says_what_its_losses_mean():
    said = "hashing as published is not causal: losses are no conditional probabilities"
    for lsh, kinds, note in (("published", ["lsh"], said), ("published", ["local"], ""), ("strict", ["lsh"], "")):
        model = build(make_config(lsh=lsh, attn_layers=kinds))
        assert model.config.note == note
        assert model.describe_runtime(torch.device("cpu"), torch.float32) == (f"{note}, " if note else "")
