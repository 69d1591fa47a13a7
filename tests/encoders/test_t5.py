"""Span corruption and the rewriting decoder, and the shipped T5's linear readability."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdit.encoders.t5 import NUM_SENTINELS, TASKS, Rewriter, corrupt_spans, rewriting_loss
from mmdit.encoders.tokenizers import T5_END


def _restore(inputs, targets, first):
    """Put each span back where its sentinel stands."""
    spans, current = {}, None
    for token in targets[:-1]:
        if token >= first:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    out = []
    for token in inputs:
        out += spans.pop(token) if token >= first else [token]
    assert not spans
    return out


@pytest.mark.parametrize("length", [1, 2, 3, 7, 20, 120])
def test_corrupted_spans_and_targets_hold_the_caption_between_them(length):
    ids = [*range(10, 10 + length), T5_END]
    for seed in range(50):
        inputs, targets = corrupt_spans(ids, 1_000, np.random.default_rng(seed))
        assert _restore(inputs, targets, 1_000) == ids
        assert inputs[-1] == targets[-1] == T5_END
        sentinels = [token for token in inputs if token >= 1_000]
        assert sentinels == list(range(1_000, 1_000 + len(sentinels)))
        assert 1 <= len(sentinels) <= NUM_SENTINELS
        # two neighbouring sentinels would hide where one span ends
        places = [i for i, token in enumerate(inputs) if token >= 1_000]
        assert all(b - a > 1 for a, b in pairwise(places))


def test_the_share_of_hidden_tokens_is_the_density():
    ids = [*range(10, 110), T5_END]
    hidden = [sum(t < 1_000 for t in corrupt_spans(ids, 1_000, np.random.default_rng(s))[1]) - 1 for s in range(20)]
    assert set(hidden) == {20}


def test_every_word_can_be_hidden_and_none_always_is():
    ids = [*range(10, 20), T5_END]
    kept = np.zeros(10)
    for seed in range(400):
        inputs, _ = corrupt_spans(ids, 1_000, np.random.default_rng(seed))
        kept += [word in inputs for word in range(10, 20)]
    assert (kept > 200).all()
    assert (kept < 399).all()


def test_an_empty_caption_stays_empty():
    assert corrupt_spans([T5_END], 1_000, np.random.default_rng(0)) == ([T5_END], [T5_END])


@pytest.fixture(scope="module")
def rewriter():
    torch.manual_seed(0)
    return Rewriter(30, 16, num_heads=2, max_length=12).eval()


def _inputs():
    torch.manual_seed(1)
    states, targets = torch.randn(2, 5, 16), torch.tensor([[5, 6, 7, 1], [8, 1, 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    return states, mask, torch.tensor([1, 2]), targets


def test_the_decoder_does_not_see_the_token_it_predicts(rewriter):
    states, mask, task, targets = _inputs()
    before = rewriter(states, mask, task, targets)
    changed = targets.clone()
    changed[0, 2] = 20
    after = rewriter(states, mask, task, changed)
    torch.testing.assert_close(after[0, :3], before[0, :3])
    assert (after[0, 3] - before[0, 3]).abs().max() > 1e-4


def test_the_decoder_reads_states_task_and_mask(rewriter):
    states, mask, task, targets = _inputs()
    before = rewriter(states, mask, task, targets)
    hidden = states.clone()
    hidden[1, 3] += 5
    torch.testing.assert_close(rewriter(hidden, mask, task, targets), before)
    shown = states.clone()
    shown[1, 1] += 5
    assert (rewriter(shown, mask, task, targets) - before)[1].abs().max() > 1e-3
    assert (rewriter(states, mask, task.flip(0), targets) - before).abs().max() > 1e-3
    assert len(TASKS) == rewriter.tasks.num_embeddings


def test_the_loss_counts_target_tokens_and_not_padding(rewriter):
    states, mask, task, targets = _inputs()
    logits = rewriter(states, mask, task, targets).double()
    chosen = [(0, 0, 5), (0, 1, 6), (0, 2, 7), (0, 3, 1), (1, 0, 8), (1, 1, 1)]
    by_hand = -torch.stack([F.log_softmax(logits[b, m], dim=0)[token] for b, m, token in chosen]).mean()
    assert float(rewriting_loss(rewriter, states, mask, task, targets).detach()) == pytest.approx(
        by_hand.item(), rel=1e-5
    )


def test_every_parameter_of_the_decoder_learns(rewriter):
    states, mask, task, targets = _inputs()
    rewriting_loss(rewriter, states.requires_grad_(), mask, task, targets).backward()
    assert all(p.grad is not None for p in rewriter.parameters())
    assert states.grad.abs().sum() > 0


CAPTIONS = [
    ("a red circle left of a blue square", "a blue square right of a red circle"),
    ("a small green star above a white cross", "a white cross below a small green star"),
    ("an orange triangle above a cyan diamond", "a cyan diamond below an orange triangle"),
]


def test_the_shipped_t5_gives_paraphrases_like_states_and_swapped_orders_unlike_ones():
    """The recorded gate measures hundreds; three show that the shipped files are the measured ones."""
    from mmdit.encoders.text import load_text_encoders

    text = load_text_encoders("tiny")

    def mean(captions):
        encoded = text.encode(captions, "trim")
        _, start, stop, _ = encoded.streams[1]
        mask = encoded.context_mask[:, start:stop, None]
        return (encoded.context[:, start:stop] * mask).sum(dim=1) / mask.sum(dim=1)

    first, other = mean([a for a, _ in CAPTIONS]), mean([b for _, b in CAPTIONS])
    opposite = {"left": "right", "above": "below"}
    swapped = mean([" ".join(opposite.get(word, word) for word in a.split()) for a, _ in CAPTIONS])
    same, wrong = F.cosine_similarity(first, other), F.cosine_similarity(first, swapped)
    assert same.min() > 0.85
    assert (same - wrong).min() > 0.3
