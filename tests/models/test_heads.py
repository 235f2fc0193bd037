"""Heads for fine-tuning against Hugging Face's (transformers 4.36.2) on the same hidden states, and their laws."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    XLNetConfig,
    XLNetForQuestionAnswering,
    XLNetForQuestionAnsweringSimple,
    XLNetForSequenceClassification,
)
from transformers.models.xlnet.modeling_xlnet import XLNetModelOutput

from txl_dist.conversion.xlnet.weights import task_head_name
from txl_dist.models.heads import BeamSpanHead, ClassificationHead, ScoreHead, SpanHead, SpanPredictions
from txl_dist.models.layers.dropout import Noise

torch.set_num_threads(1)

LANES, LENGTH, WIDTH, CLASSES, BEAMS = 5, 13, 16, 4, 3
EPS = 1e-12
CLS = LENGTH - 1
BOTH_DTYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])

HEADS = {
    "classes": lambda: ClassificationHead(WIDTH, CLASSES, dropout=0.0),
    "scores": lambda: ScoreHead(WIDTH, dropout=0.0),
    "spans": lambda: SpanHead(WIDTH, BEAMS),
    "beams": lambda: BeamSpanHead(WIDTH, EPS, BEAMS),
}


def build(kind, dtype=torch.float64):
    """A head whose weights are large enough for every one of them to matter."""
    torch.manual_seed(1)
    head = HEADS[kind]().to(dtype).eval()
    head.initialise(0.5)
    for name, parameter in head.named_parameters():
        if "bias" in name or "layer_norm" in name:
            torch.nn.init.normal_(parameter, float("norm.weight" in name), 0.3)
    return head


def hidden_states(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(LANES, LENGTH, WIDTH, generator=generator, dtype=dtype).requires_grad_()


def answers():
    """Targets of five lanes: padding, a passage, its answer; one has none, and one is an answer of one token."""
    possible = torch.zeros(LANES, LENGTH, dtype=torch.int64)
    for lane, (start, end) in enumerate([(0, 9), (4, 10), (1, 8), (6, 9), (0, 5)]):
        possible[lane, start:end] = 1
    possible[:, CLS] = 1
    spans = torch.tensor([[2, 5], [9, 9], [CLS, CLS], [6, 8], [0, 4]])
    return torch.cat([spans, possible], dim=1)


def targets_of(kind):
    if kind == "classes":
        return torch.tensor([[0], [3], [1], [1], [2]])
    if kind == "scores":
        return torch.tensor([[0.5], [-2.0], [3.5], [0.0], [1.25]])
    return answers()


class Hidden(torch.nn.Module):
    """Stands where a model stands in theirs: reads nothing, and returns what it was given."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_, **__):
        return XLNetModelOutput(last_hidden_state=self.hidden)


def theirs(cls, head, hidden, **config):
    """Theirs with the weights of our head, on the hidden states."""
    config = XLNetConfig(
        vocab_size=10,
        d_model=WIDTH,
        n_layer=1,
        n_head=2,
        d_inner=8,
        layer_norm_eps=EPS,
        summary_last_dropout=0,
        **config,
    )
    model = cls(config).to(hidden.dtype)
    model.transformer = Hidden(hidden)
    named = {task_head_name(cls.__name__, name): parameter.detach() for name, parameter in head.named_parameters()}
    model.load_state_dict(named)
    return model.eval()


def assert_near(ours, expected, tolerance):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def assert_same_gradients(loss, head, hidden, their_loss, model, their_hidden, tolerance):
    assert_near(loss, their_loss, tolerance)
    loss.backward()
    their_loss.backward()
    assert_near(hidden.grad, their_hidden.grad, tolerance)
    gradients = dict(model.named_parameters())
    for name, parameter in head.named_parameters():
        assert_near(parameter.grad, gradients[task_head_name(type(model).__name__, name)].grad, tolerance)


@BOTH_DTYPES
@pytest.mark.parametrize("kind, num_labels", [("classes", CLASSES), ("scores", 1)])
def test_classes_and_scores_agree_with_the_reference(kind, num_labels, dtype, tolerance):
    head, hidden, their_hidden = build(kind, dtype), hidden_states(dtype), hidden_states(dtype)
    targets = targets_of(kind)
    model = theirs(XLNetForSequenceClassification, head, their_hidden, num_labels=num_labels)
    output = model(labels=targets.to(dtype) if kind == "scores" else targets)
    losses = head(hidden, targets)
    assert losses.shape == (LANES, 1) and losses.dtype == dtype
    assert_near(head.read(hidden)[:, 0], output.logits, tolerance)
    assert_near(head.outputs(hidden, targets), output.logits.float(), 1e-5)
    assert_same_gradients(losses.mean(), head, hidden, output.loss, model, their_hidden, tolerance)


@BOTH_DTYPES
def test_spans_agree_with_the_reference(dtype, tolerance):
    """Theirs has no mask: an answer can be anywhere."""
    head, hidden, their_hidden = build("spans", dtype), hidden_states(dtype), hidden_states(dtype)
    targets = answers()
    targets[:, 2:] = 1
    model = theirs(XLNetForQuestionAnsweringSimple, head, their_hidden, num_labels=2)
    output = model(start_positions=targets[:, 0], end_positions=targets[:, 1])
    start_log_probs = output.start_logits.log_softmax(1)
    end_log_probs = output.end_logits.log_softmax(1)
    found = head.predict(hidden, targets)
    for lane in range(LANES):
        starts = start_log_probs[lane].argsort(descending=True)[:BEAMS]
        ends = end_log_probs[lane].argsort(descending=True)[:BEAMS]
        assert torch.equal(found.start[lane], starts)
        assert all(torch.equal(row, ends) for row in found.end[lane])
        assert_near(found.start_log_prob[lane], start_log_probs[lane, starts], tolerance)
        assert_near(found.end_log_prob[lane], end_log_probs[lane, ends].expand(BEAMS, -1), tolerance)
        spans = [
            output.start_logits[lane, start] + output.end_logits[lane, end]
            for start in starts
            for end in ends
            if start <= end and CLS not in (start, end)
        ]
        null = output.start_logits[lane, CLS] + output.end_logits[lane, CLS]
        expected = null - max(spans) if spans else torch.tensor(1e30, dtype=dtype)
        assert_near(found.no_answer[lane], expected, tolerance)
    assert sum(found.no_answer < 1e29) > 2
    assert_same_gradients(head(hidden, targets).mean(), head, hidden, output.loss, model, their_hidden, tolerance)


@BOTH_DTYPES
def test_beams_agree_with_the_reference(dtype, tolerance):
    """Theirs returns probabilities, whatever they are called, and of each end those of all starts."""
    head, hidden, their_hidden = build("beams", dtype), hidden_states(dtype), hidden_states(dtype)
    targets = answers()
    start, end, possible = targets.split([1, 1, LENGTH], dim=1)
    model = theirs(XLNetForQuestionAnswering, head, their_hidden, start_n_top=BEAMS, end_n_top=BEAMS)
    given = {"p_mask": (1 - possible).to(dtype), "cls_index": torch.full((LANES,), CLS)}
    output = model(**given)
    found = head.predict(hidden, targets)
    assert torch.equal(found.start, output.start_top_index)
    assert torch.equal(found.end.mT, output.end_top_index.view(LANES, BEAMS, BEAMS))
    assert_near(found.start_log_prob.exp(), output.start_top_log_probs, tolerance)
    assert_near(found.end_log_prob.exp().mT, output.end_top_log_probs.view(LANES, BEAMS, BEAMS), tolerance)
    assert_near(found.no_answer, output.cls_logits, tolerance)
    output = model(
        start_positions=start[:, 0], end_positions=end[:, 0], is_impossible=(start[:, 0] == CLS).to(dtype), **given
    )
    assert_same_gradients(head(hidden, targets).mean(), head, hidden, output.loss, model, their_hidden, tolerance)


# --------------------------------------------------------------------------------------------------- laws of all heads


@pytest.mark.parametrize("kind", HEADS)
def test_a_lane_without_target_has_no_loss_and_no_gradient(kind):
    head, hidden = build(kind), hidden_states()
    targets = targets_of(kind)
    expected = head(hidden, targets).detach()
    targets[1, :2] = float("nan") if kind == "scores" else -100
    losses = head(hidden, targets)
    others = [0, 2, 3, 4]
    assert not losses[1].any() and torch.equal(losses[others], expected[others]) and expected[1].all()
    losses.sum().backward()
    assert not hidden.grad[1].any() and hidden.grad[others].flatten(1).any(dim=1).all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("kind", ["spans", "beams"])
def test_positions_without_answers_are_nothing_to_the_softmax(kind):
    """Padding and questions: whatever their hidden states, losses and predictions are the same."""
    head, hidden, targets = build(kind), hidden_states(), answers()
    impossible = targets[:, 2:] == 0
    changed = hidden.detach().clone()
    changed[impossible] += 1.0
    assert torch.equal(head(changed, targets), head(hidden, targets))
    for field, expected in zip(head.predict(changed, targets), head.predict(hidden, targets), strict=True):
        torch.testing.assert_close(field, expected)
    found = head.predict(hidden, targets)
    assert not impossible.gather(1, found.start).any()
    assert not impossible.gather(1, found.end.flatten(1)).any()


@pytest.mark.parametrize("kind", ["spans", "beams"])
@pytest.mark.parametrize("length", [LENGTH, 2])
def test_what_is_packed_is_unpacked(kind, length):
    """A segment may have fewer positions than there are beams."""
    head, hidden, targets = build(kind), hidden_states()[:, -length:], answers()
    targets = torch.cat([targets[:, :2], targets[:, -length:]], dim=1)
    outputs = head.outputs(hidden, targets)
    assert outputs.dtype == torch.float32 and len(outputs) == LANES
    beams = min(length, BEAMS)
    for field, expected in zip(SpanPredictions.unpack(outputs), head.predict(hidden, targets), strict=True):
        assert field.shape == expected.shape == (LANES, beams, beams)[: field.dim()]
        assert (
            torch.equal(field, expected.to(field.dtype)) and field.is_floating_point() == expected.is_floating_point()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", HEADS)
def test_losses_are_float32_in_half_precision(kind, dtype):
    head, hidden = build(kind), hidden_states()
    expected = head(hidden, targets_of(kind))
    losses = head.to(dtype)(hidden.to(dtype), targets_of(kind))
    assert losses.dtype == head.outputs(hidden.to(dtype), targets_of(kind)).dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=0.1, atol=0.1)


def test_dropout_belongs_to_lanes():
    head = ClassificationHead(WIDTH, CLASSES, dropout=0.3).double()
    head.initialise(0.5)
    hidden, targets, noise = hidden_states(), targets_of("classes"), Noise.of_step(1, 2, range(LANES))
    losses = head(hidden, targets, noise)
    rows = slice(2, 4)
    assert_near(head(hidden[rows], targets[rows], noise.of_rows(rows)), losses[rows], 1e-10)
    assert not torch.allclose(head.eval()(hidden, targets), losses)


@pytest.mark.parametrize("kind", HEADS)
def test_weights_are_drawn(kind):
    head = build(kind)
    head.initialise(0.02)
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "layer_norm" in name:
            assert (parameter == 1).all()
        else:
            assert 0.01 < parameter.std() < 0.03


@pytest.mark.parametrize("kind", HEADS)
def test_the_cost_is_what_torch_counts(kind):
    head, hidden, targets = build(kind), hidden_states(), targets_of(kind)
    with FlopCounterMode(display=False) as counter:
        losses = head(hidden, targets)
        forward = counter.get_total_flops()
        losses.mean().backward()
    products = head.products(LANES, LENGTH)
    assert forward == sum(product.forward for product in products)
    assert counter.get_total_flops() == sum(product.training for product in products)
