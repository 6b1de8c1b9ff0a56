"""Training along rollouts: one sampling serves its updates, and costs what the options say."""

import pytest
import torch
from erasing import disturb

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.samplers import ddim
from sublimate.erasure.methods.all_but_one import AllButOneConfig, AllButOneObjective
from sublimate.erasure.methods.esd import ESDConfig, ESDObjective
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.trajectories import rollout
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import open_model
from sublimate.training.objective import Batch
from sublimate.training.randomness import SampleRandom

CAT = Request(Concept("cat", anchor="dog"), preserve=["seven", "red"])


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return open_model(tiny_sd)


def prepared(objective, step=0):
    """The batches of all turns of a step."""
    found = []
    for turn in objective.turns(step):
        batch = Batch(Condition(), SampleRandom(0, step, turn.name, range(4)))
        with torch.no_grad():
            found.append((turn, objective.prepare(turn, batch, step)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("trajectory", ["student", "frozen"])
def test_updates_of_a_step_share_one_sampling_each_from_its_own_part(sd, trajectory):
    options = {"sampling_steps": 6, "updates_per_rollout": 3, "trajectory": trajectory}
    objective = ESDObjective(sd, ESDConfig(**options), CAT)
    disturb(objective)
    grid = sd.schedule.grid(6).tolist()
    batches = [batch for _, batch in prepared(objective)]
    for name in ("rows", "kept_rows"):
        assert all(torch.equal(batch[name], batches[0][name]) for batch in batches)
    for prefix in ("", "kept_"):
        for i, batch in enumerate(batches):
            assert all(time in grid[2 * i : 2 * i + 2] for time in batch[f"{prefix}t"].tolist())
    # All x_t of a sample lie on one path, that of its own noise.
    random = SampleRandom(0, 0, "student0", range(4))
    rows, z = objective.erased.draw(random), random.normal(sd.latent_shape)
    network = objective.student if trajectory == "student" else objective.frozen
    told, t = objective.erased.condition(rows, "cpu"), torch.stack([batch["t"] for batch in batches])
    stops = torch.tensor([[grid.index(time) for time in times] for times in t.tolist()])
    expected, _ = rollout(network, z, told, objective.null, stops, sd.schedule.grid(6), guidance_scale=3.0)
    torch.testing.assert_close(torch.stack([batch["x_t"] for batch in batches]), expected)
    again, other = prepared(objective), prepared(objective, step=1)
    assert all(torch.equal(a["x_t"], b["x_t"]) for (_, a), b in zip(again, batches, strict=True))
    assert not torch.equal(other[0][1]["x_t"], batches[0]["x_t"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd3"])
def test_x_t_are_those_of_the_models_images(request, family):
    model = open_model(request.getfixturevalue(family))
    objective = ESDObjective(model, ESDConfig(sampling_steps=4, updates_per_rollout=4, start_guidance=2.0), CAT)
    (*_, (_, last)) = prepared(objective)
    random = SampleRandom(0, 0, "student0", range(4))
    _, z = objective.erased.draw(random), random.normal(model.latent_shape)
    drawn = generate_latents(model, ["cat"] * 4, steps=4, guidance_scale=2.0, sampler="ddim", z=z)
    # Of the same sampling one step is left.
    grid, told = model.schedule.grid(4, model.backbone.grid_spacing), model.encode_prompts(["cat"])
    assert last["t"].tolist() == [grid[3]] * 4

    def denoise(x_t, t):
        return guided(model.denoiser, x_t, t, told, model.null_condition(), 2.0)

    with torch.no_grad():
        left = ddim(denoise, last["x_t"], model.schedule, grid[3:])
    torch.testing.assert_close(left, drawn, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (ESDObjective, ESDConfig(sampling_steps=4, updates_per_rollout=4)),
        (ESDObjective, ESDConfig(sampling_steps=4, updates_per_rollout=4, retain=0, start_guidance=1)),
        (AllButOneObjective, AllButOneConfig(sampling_steps=3, updates_per_rollout=3)),
    ],
)
def test_counted_passes_are_the_networks_passes(sd, cls, config):
    # With parts of one step each, stops are no matter of chance.
    objective = cls(sd, config, CAT)
    calls = {"student": 0, "frozen": 0, "with gradient": 0}

    def count(name, samples):
        calls[name] += samples
        if name == "student" and torch.is_grad_enabled():
            calls["with gradient"] += samples

    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: count(name, len(args[0])))
        for name, module in (("student", objective.student), ("frozen", objective.frozen))
    ]
    for turn, batch in prepared(objective):
        objective.loss(turn, batch, 0)
    for hook in hooks:
        hook.remove()
    assert objective.config.passes() == (calls["frozen"] + calls["student"] + 2 * calls["with gradient"]) / 4


def test_the_average_sampling_is_counted():
    assert ESDConfig(start_guidance=1).rollout_passes == 24.5
    assert ESDConfig(start_guidance=3, updates_per_rollout=5).rollout_passes == 2 * (40 + 4.5)


def test_parts_must_be_equal():
    with pytest.raises(ValueError, match="does not divide sampling_steps"):
        ESDConfig(sampling_steps=10, updates_per_rollout=3)
