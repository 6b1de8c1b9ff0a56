"""The sparse autoencoder's parts against brute force, and its training against what it promises."""

import pytest
import torch

from sublimate.pipelines.attached.deactivated_features import residual_blocks
from sublimate.pipelines.model import open_model
from sublimate.pipelines.sparse_autoencoder import SparseAutoencoder, largest
from sublimate.training.objective import Turn
from sublimate.training.randomness import SampleRandom
from sublimate.training.sparse_autoencoder import (
    SparseAutoencoderConfig,
    SparseAutoencoding,
    StatesSource,
    across,
    geometric_median,
)
from sublimate.training.trainer import Trainer, TrainerConfig

TURN = Turn("autoencoder", ("autoencoder",))
CONFIG = SparseAutoencoderConfig(expansion=4, k=3, aux_k=5, dead_after=2, learning_rate=1e-2)


@pytest.fixture
def source(tiny_sd):
    model = open_model(tiny_sd)
    block = residual_blocks(model.component("text_encoder"))[0]
    return StatesSource(model, "text_encoder", block, [["a cat"], ["a dog", "a red dog", "", "seven"]])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(source, step=0, size=4):
    return source.batch(SampleRandom(0, step, TURN.name, range(size)))


def test_codes_are_the_k_largest_activations_that_are_positive():
    autoencoder = SparseAutoencoder(4, 9, 3)
    with torch.no_grad():
        for i, parameter in enumerate(autoencoder.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=i))
    states = normal(5, 4, seed=9)
    for state, code, back in zip(states, autoencoder.encode(states), autoencoder(states), strict=True):
        raw = (autoencoder.encoder.double() @ (state - autoencoder.bias).double() + autoencoder.latent_bias).tolist()
        kept = sorted(range(9), key=raw.__getitem__)[-3:]
        expected = torch.tensor([max(raw[j], 0.0) if j in kept else 0.0 for j in range(9)])
        torch.testing.assert_close(code, expected)
        torch.testing.assert_close(
            back, sum(c * d for c, d in zip(expected, autoencoder.decoder, strict=True)) + autoencoder.bias
        )
    assert (largest(torch.tensor([-3.0, -1.0, -2.0]), 2) == 0).all()
    with pytest.raises(ValueError, match="k = 10: lower k"):
        SparseAutoencoder(4, 9, 10)


def test_the_geometric_median_is_where_distances_are_least():
    points = torch.cat([normal(20, 3), 50 + normal(4, 3, seed=1)])
    median = geometric_median(points)

    def total(at):
        return float((points - at).norm(dim=1).sum())

    assert all(total(median) <= total(median + 0.05 * step) + 1e-4 for step in normal(50, 3, seed=2))
    assert median.norm() < 2 < points.mean(0).norm()


def test_states_are_the_blocks_outputs_without_the_first_token(source):
    encoder, seen = source.model.component("text_encoder"), []
    handle = encoder.get_submodule(source.block).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    source.model.encode_prompts(["a cat", "seven"])
    handle.remove()
    assert torch.equal(source.states(["a cat", "seven"]), seen[0][:, 1:])
    assert seen[0].shape == (2, 16, 16)


def test_prompts_are_drawn_by_group(source):
    drawn = source.drawn(SampleRandom(0, 0, "x", range(2000)))
    assert 900 < drawn.count("a cat") < 1100 and 200 < drawn.count("seven") < 300


@pytest.mark.slow
def test_it_starts_tied_on_unit_directions_at_the_median(source):
    objective = SparseAutoencoding(source, CONFIG, seed=1)
    autoencoder = objective.autoencoder
    assert torch.equal(autoencoder.encoder, autoencoder.decoder) and autoencoder.decoder.shape == (64, 16)
    torch.testing.assert_close(autoencoder.decoder.norm(dim=1), torch.ones(64))
    states = source.states(source.drawn(SampleRandom(1, 0, "bias", range(512)))).flatten(0, 1)
    torch.testing.assert_close(autoencoder.bias, geometric_median(states))
    torch.testing.assert_close(objective.variance, (states - autoencoder.bias).square().sum(1).mean())


def written_out(objective, states, dead=()):
    """The loss token by token."""
    autoencoder, total = objective.autoencoder, 0.0
    for state in states.flatten(0, 1):
        left = state - autoencoder(state)
        total += left.square().sum()
        if dead:
            raw = autoencoder.activations(state)[list(dead)]
            values, order = raw.topk(min(CONFIG.aux_k, len(dead)))
            guess = sum(
                v.relu() * autoencoder.decoder[list(dead)[i]] for v, i in zip(values, order.tolist(), strict=True)
            )
            total += (left.detach() - guess).square().sum() / 32
    return total / (objective.variance * states.shape[:2].numel())


@pytest.mark.slow
@pytest.mark.parametrize("dead", [(), (3, 8), tuple(range(10, 20))])
def test_the_loss_and_its_gradient_are_the_formula(source, dead):
    objective, twin = (SparseAutoencoding(source, CONFIG, seed=2) for _ in range(2))
    batch = batch_of(source)
    for one in (objective, twin):
        one.idle[list(dead)] = CONFIG.dead_after
        one.player.set_trainable(True)
    loss = objective.loss(TURN, batch, 0)
    expected = written_out(twin, batch["activations"], dead)
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    expected.backward()
    for one, other in zip(objective.autoencoder.parameters(), twin.autoencoder.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    decoder = objective.autoencoder.decoder
    assert (decoder.grad * decoder).sum(1).abs().max() < 1e-6 and decoder.grad.abs().max() > 1e-5


def test_what_is_across_has_no_part_along():
    vectors, directions = normal(6, 4), torch.nn.functional.normalize(normal(6, 4, seed=1))
    result = across(vectors, directions)
    torch.testing.assert_close((result * directions).sum(1), torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(across(result, directions), result)
    torch.testing.assert_close((vectors - result).norm(dim=1), (vectors * directions).sum(1).abs())


def test_latents_that_nothing_uses_die_and_used_ones_do_not(source):
    objective = SparseAutoencoding(source, CONFIG, seed=2)
    batch = batch_of(source)
    used = (objective.autoencoder.encode(batch["activations"]) > 0).flatten(0, 1).any(0)
    for step in range(2):
        objective.prepare(TURN, batch, step)
        objective.after_step(step)
    assert torch.equal(objective.idle, torch.where(used, 0.0, 2.0)) and 0 < used.sum() < 64
    assert float(objective.loss(TURN, batch, 2).logs["dead"]) == float((~used).float().mean())


def trained(source, folder, steps, seed=0, **options):
    objective = SparseAutoencoding(source, CONFIG, seed=seed)
    config = TrainerConfig(output_dir=folder, max_train_steps=steps, **{"train_batch_size": 4, **options})
    Trainer(objective, source, config, progress=False).run()
    return objective


@pytest.mark.slow
def test_training_explains_states_and_keeps_directions_at_length_one(source, tmp_path):
    start = SparseAutoencoding(source, CONFIG)
    objective = trained(source, tmp_path, 60)
    batch = batch_of(source, 1000, 16)
    before, after = (float(o.loss(TURN, batch, 0).logs["unexplained"]) for o in (start, objective))
    assert after < 0.3 * before
    torch.testing.assert_close(objective.autoencoder.decoder.norm(dim=1), torch.ones(64))


@pytest.mark.slow
def test_accumulation_and_resuming_change_nothing(source, tmp_path):
    whole = trained(source, tmp_path / "whole", 6)
    parts = trained(source, tmp_path / "parts", 6, train_batch_size=2, gradient_accumulation_steps=2)
    trained(source, tmp_path / "resumed", 3, checkpointing_steps=3)
    resumed = trained(source, tmp_path / "resumed", 6, checkpointing_steps=3)
    for name, value in whole.autoencoder.state_dict().items():
        assert torch.equal(resumed.autoencoder.state_dict()[name], value)
        torch.testing.assert_close(parts.autoencoder.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert torch.equal(resumed.idle, whole.idle) and whole.idle.max() >= CONFIG.dead_after


def test_a_micro_batch_is_a_mean_over_its_samples(source):
    objective = SparseAutoencoding(source, CONFIG)
    batch = batch_of(source)
    parts = [objective.loss(TURN, batch.part(i, i + 1), 0).total for i in range(4)]
    torch.testing.assert_close(objective.loss(TURN, batch, 0).total, torch.stack(parts).mean())
