"""Forgetting while distilling: what the teacher is asked, what everyone else reads, and what the data show."""

import pytest
import torch

from sublimate.diffusion.conditions import Condition
from sublimate.diffusion.guidance import guided
from sublimate.diffusion.predictions import add_noise
from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.export import export_lora
from sublimate.pipelines.generate import generate_latents
from sublimate.pipelines.model import open_model
from sublimate.training.data_config import DataConfig
from sublimate.training.distill import DistillConfig, distill
from sublimate.training.forgetting import Forget, anchored, anchoring, forgetful
from sublimate.training.objective import Batch, Turn
from sublimate.training.objectives.f_distill import FDistill, FDistillConfig
from sublimate.training.players import PlayerConfig, make_player
from sublimate.training.randomness import SampleRandom
from sublimate.training.sources import make_source

CAT = Forget(concept="cat", anchor="dog", synonyms=("seven", "red cat"))
PROMPTS = ("a red cat", "a photo of the Cat", "a painting")
ASKED = ("a dog", "a photo of the dog", "a painting")


@pytest.fixture
def model(tiny_sd_v):
    return open_model(tiny_sd_v)


def told(model):
    """What a batch is told of the prompts."""
    return anchoring(model.encode_prompts, model.encode_prompts, [CAT])(PROMPTS)


def states(model):
    generator = torch.Generator().manual_seed(0)
    x_t, eps = (torch.randn((len(PROMPTS), *model.latent_shape), generator=generator) for _ in range(2))
    return x_t, eps, torch.tensor([900.0, 500.0, 20.0], dtype=torch.float64)


def test_anchors_take_the_place_of_every_name():
    assert tuple(anchored(prompt, [CAT]) for prompt in PROMPTS) == ASKED
    assert anchored("a cattle and a seventh", [CAT]) == "a cattle and a seventh"
    assert anchored("a cat, a Seven", [CAT]) == "a dog, a dog"
    artist = Forget(concept="van", anchor="dog", synonyms=("van gogh",))
    assert anchored("a van gogh, a van", [artist]) == "a dog, a dog"
    nothing = Forget(concept="red", anchor="")
    assert anchored("a red cat", [nothing]) == "a cat" and anchored("a red cat", [nothing, CAT]) == "a dog"


def test_only_the_teacher_reads_what_it_is_told():
    condition = Condition({"text": torch.zeros(2, 3), "extra": torch.ones(2, 1)})
    both = condition.with_teacher(Condition(text=torch.ones(2, 3)))
    assert both.for_student().keys() == condition.keys() == both.for_teacher().keys()
    assert (both.for_student()["text"] == 0).all() and (both.for_teacher()["text"] == 1).all()
    assert torch.equal(both.for_teacher()["extra"], condition["extra"])
    # Guidance leads the teacher away from the same null text: null + scale (anchor - null).
    null = both.with_null(Condition(text=torch.full((1, 3), 5.0)))
    assert (null.for_teacher()["text"] == 5).all() and (null.for_student()["text"] == 5).all()
    assert condition.for_teacher() == condition.for_student() == condition


@pytest.mark.slow
@torch.no_grad()
def test_the_teacher_predicts_for_the_anchor_and_players_for_the_prompt(model):
    teacher, (x_t, _, t) = forgetful(model), states(model)
    both, null, taps = told(model), model.null_condition(), model.feature_taps()
    plain, asked = model.encode_prompts(PROMPTS), model.encode_prompts(ASKED)
    for scale in (1.0, 3.0):
        found = guided(teacher.denoiser, x_t, t, both, null, scale, features=taps)
        assert torch.equal(found.output, guided(model.denoiser, x_t, t, asked, null, scale).output)
        # A discriminator tells the student's samples of a prompt from the anchor's, as samples of that prompt.
        own = guided(model.denoiser, x_t, t, plain, null, scale, features=taps)
        assert all(torch.equal(found.features[tap], own.features[tap]) for tap in taps)
    seen = teacher.denoiser.activations(x_t, t, both, features=taps)
    own = model.denoiser.activations(x_t, t, plain, features=taps)
    assert all(torch.equal(seen.features[tap], own.features[tap]) for tap in taps)
    player = make_player(teacher.denoiser, PlayerConfig()).module
    numbered = teacher.denoiser_with_number_input()
    for network in (player, numbered):
        assert torch.equal(network(x_t, t, both).output, model.denoiser(x_t, t, plain).output)
    assert not torch.equal(model.denoiser(x_t, t, plain).output[0], model.denoiser(x_t, t, asked).output[0])


def objective(model, **options):
    torch.manual_seed(0)
    made = FDistill(model, FDistillConfig(guidance_scale=2.0, critic_updates=1, **options))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.critic.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.slow
def test_the_student_descends_to_the_anchor_against_a_critic_of_its_prompt(model):
    """d = s_p(x_t, anchor) - s_q(x_t, c), and the critic is trained on G(z, c) as samples of c."""
    made = objective(forgetful(model), divergence="reverse_kl", gan_weight=0.0, sample_normalization=False)
    batch = Batch(told(model), SampleRandom(0, 0, "student", range(3)))
    drawn = made.prepare(Turn("student", ("student",)), batch, 0)
    with torch.no_grad():
        x0 = made.generate(drawn["z"], model.encode_prompts(PROMPTS))
        x_t = add_noise(model.schedule, x0, drawn["eps"], drawn["t"])
        q = made.critic(x_t, drawn["t"], model.encode_prompts(PROMPTS)).x0
        p = guided(model.denoiser, x_t, drawn["t"], model.encode_prompts(ASKED), model.null_condition(), 2.0).x0
    assert torch.equal(made.sample(drawn), x0)
    made.student.requires_grad_(True)
    x0 = made.sample(drawn)
    (expected,) = torch.autograd.grad(((q - p) * x0).flatten(1).mean(1).mean(), [next(made.student.parameters())])
    (found,) = torch.autograd.grad(made.student_loss(drawn, 0).total, [next(made.student.parameters())])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    plain = objective(model, divergence="reverse_kl", gan_weight=0.0)
    turn = Turn("critic0", ("critic",))
    losses = [
        one.critic_loss(one.prepare(turn, Batch(condition, SampleRandom(0, 0, "critic0", range(3))), 0)).total
        for one, condition in ((made, batch.condition), (plain, model.encode_prompts(PROMPTS)))
    ]
    assert torch.equal(*losses)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "prompts.txt")


@pytest.mark.parametrize("cached", [False, True])
def test_the_images_of_a_forgotten_prompt_are_the_anchors(model, prompts, tmp_path, cached):
    data = DataConfig(prompts=prompts, teacher_steps=1, cache_dir=tmp_path / "cache" if cached else None)
    source = make_source(model, data, 2.0, forget=[CAT], progress=False)
    drawn = generate_latents(model, ASKED, steps=1, guidance_scale=2.0)
    assert torch.equal(source.tensors["images"], drawn)
    assert not torch.equal(drawn[0], generate_latents(model, PROMPTS, steps=1, guidance_scale=2.0)[0])
    batch = source.batch(SampleRandom(0, 0, "student", range(8)))
    for row in range(8):
        index = next(i for i in range(3) if torch.equal(batch["images"][row], drawn[i]))
        for condition, texts in ((batch.condition.for_student(), PROMPTS), (batch.condition.for_teacher(), ASKED)):
            torch.testing.assert_close(condition["text"][row], model.encode_prompts(texts)["text"][index])
    plain = make_source(model, data, 2.0, progress=False)
    assert plain.batch(SampleRandom(0, 0, "student", range(2))).condition.keys() == {"text"}


def test_images_that_would_teach_the_concept_are_refused(model):
    with pytest.raises(ValueError, match="would teach it"):
        make_source(model, DataConfig(images="ink"), 1.0, forget=[CAT])


def test_prompts_that_do_not_name_it_are_refused(model, prompts):
    with pytest.raises(ValueError, match="No prompt names 'bird'"):
        make_source(model, DataConfig(prompts=prompts), 1.0, forget=[Forget(concept="bird", anchor="dog")])


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"concept": "cat", "anchor": "a Cat"}, "names 'cat' itself"),
        ({"concept": " ", "anchor": "dog"}, "must not be empty"),
        ({"concept": "cat", "anchor": "dog", "synonyms": [""]}, "must not be empty"),
    ],
)
def test_concepts_without_names_or_with_themselves_for_an_anchor_are_refused(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        Forget(**wrong)


def test_anchors_that_are_to_be_forgotten_are_refused():
    with pytest.raises(ValueError, match="'dog' of 'cat' is to be forgotten itself"):
        DistillConfig(forget=[CAT, Forget(concept="dog", anchor="van gogh")])


def test_what_trains_no_student_is_refused(model, prompts, tmp_path):
    config = DistillConfig(
        method="discriminator_guidance",
        objective={"discriminator_width": 8},
        forget=[CAT],
        data=DataConfig(prompts=prompts, teacher_steps=1),
        trainer={"output_dir": tmp_path / "out"},
    )
    with pytest.raises(ValueError, match="which forgets nothing"):
        distill(config, model, progress=False)


@pytest.mark.slow
def test_a_lora_student_of_an_edited_teacher_is_exported_with_the_edit(tiny_sd_v, prompts, tmp_path):
    model = open_model(tiny_sd_v)
    edit = UCE().fit(model, Request(Concept("cat", anchor="dog")))
    path = edit.save(tmp_path / "edit.safetensors")
    config = DistillConfig(
        model=str(tiny_sd_v),
        edits=[path],
        method="denoising",
        objective={"student": {"kind": "lora", "rank": 2, "learning_rate": 1e-12, "adam_weight_decay": 0.0}},
        data=DataConfig(prompts=prompts, images="teacher", count=2, teacher_steps=1),
        trainer={"output_dir": tmp_path / "run", "max_train_steps": 1, "train_batch_size": 2},
    )
    student = open_model(distill(config, progress=False))
    with edit.applied(model):
        for key, weights in model.parameters().items():
            torch.testing.assert_close(student.parameters()[key], weights)
        player = make_player(model.denoiser, PlayerConfig(kind="lora", rank=2))
        with pytest.raises(ValueError, match="without the edits and LoRAs that this model carries"):
            export_lora(model, player.module, tmp_path / "lora")


@pytest.mark.slow
def test_a_run_forgets_by_configuration(model, prompts, tmp_path):
    def config(*forget, **trainer):
        return DistillConfig(
            method="f_distill",
            objective={"divergence": "reverse_kl", "gan_weight": 0.0, "critic_updates": 1},
            forget=forget,
            data=DataConfig(prompts=prompts, images=None),
            trainer={
                "output_dir": tmp_path / str(len(forget)),
                "max_train_steps": 2,
                "train_batch_size": 3,
                "checkpointing_steps": 1,
                **trainer,
            },
        )

    plain, forgetting = (open_model(distill(config(*forget), model, progress=False)) for forget in ((), (CAT,)))
    assert not torch.equal(generate_latents(plain, PROMPTS), generate_latents(forgetting, PROMPTS))
    other = config(Forget(concept="cat", anchor="van gogh"), resume_from_checkpoint="latest", max_train_steps=3)
    with pytest.raises(ValueError, match="another"):
        distill(other, model, progress=False)
