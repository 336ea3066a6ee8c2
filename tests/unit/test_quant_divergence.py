"""KL divergence against torch's own, and its standard error against a simulation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from quant_samples import network
from taught_clips import taught_clips

from quasr.quant.apply import quantise
from quasr.quant.divergence import Divergence, answer_logprobs, divergence
from quasr.quant.prompts import embed
from quasr.quant.recipe import recipe_for


def test_is_the_mean_over_all_positions_of_torch_s_kl_divergence() -> None:
    clips, original, changed = taught_clips(), network(), network()
    quantise(changed, recipe_for("int4-g32"))
    before = [answer_logprobs(original, clip) for clip in clips]
    found = divergence(before, changed, clips)
    after = torch.cat([answer_logprobs(changed, clip) for clip in clips])
    expected = F.kl_div(after, torch.cat(before), reduction="batchmean", log_target=True)
    assert found.mean == pytest.approx(float(expected), rel=1e-4)
    assert found.mean > 0
    assert found.positions == tuple(len(clip.answer) for clip in clips)
    assert found.agreement == pytest.approx(
        float((after.argmax(-1) == torch.cat(before).argmax(-1)).float().mean()), abs=1e-6
    )


def test_a_network_does_not_diverge_from_itself() -> None:
    clips, model = taught_clips(2), network()
    found = divergence([answer_logprobs(model, clip) for clip in clips], model, clips)
    assert (found.mean, found.standard_error, found.agreement) == (0.0, 0.0, 1.0)


def test_positions_are_those_before_each_token_of_the_answer() -> None:
    clip, model = taught_clips(1)[0], network()
    with torch.no_grad():
        logits = model.decoder.logits(model.decoder.prefill(embed(model, clip), None))[0]
    whole = logits.log_softmax(-1)
    torch.testing.assert_close(answer_logprobs(model, clip), whole[-len(clip.answer) :])


def test_standard_error_is_the_spread_that_repeated_samples_have() -> None:
    generator = torch.Generator().manual_seed(1)

    def sample() -> Divergence:
        sizes = torch.randint(5, 40, (50,), generator=generator)
        rates = torch.rand(50, generator=generator)
        return Divergence(tuple((sizes * rates).tolist()), tuple(sizes.tolist()), 0)

    samples = [sample() for _ in range(800)]
    spread = torch.tensor([one.mean for one in samples]).std()
    typical = torch.tensor([one.standard_error for one in samples]).mean()
    assert float(typical) == pytest.approx(float(spread), rel=0.1)


def test_difference_is_paired_by_clip() -> None:
    one, other = Divergence((1.0, 4.0, 9.0), (1, 2, 3), 0), Divergence((0.5, 3.0, 7.5), (1, 2, 3), 0)
    mean, error = one.difference(other)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(0.0, abs=1e-12)
    assert one.standard_error > 0.1


def test_one_clip_tells_no_standard_error() -> None:
    assert math.isnan(Divergence((1.0,), (2,), 0).standard_error)
