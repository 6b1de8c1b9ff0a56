"""One property matrix over all objectives, on tiny checkpoints of real classes of every family."""

import copy
import json

import pytest
import torch
from diffusers import ModelMixin
from grid import called, opened, refusals, rows
from passes import counted
from processes import launch
from safetensors.torch import load_file

from sublimate.erasure.methods.uce import UCE
from sublimate.erasure.request import Concept, Request
from sublimate.pipelines.gradient_checkpointing import checkpointed
from sublimate.pipelines.model import open_model
from sublimate.training import registry
from sublimate.training.data import ModelSource
from sublimate.training.distill import OBJECTIVES
from sublimate.training.forgetting import forgetful
from sublimate.training.objective import Objective
from sublimate.training.trainer import Trainer, TrainerConfig

FAMILIES = {"": ("tiny_sd_v", "tiny_sd", "tiny_unconditional", "tiny_sd3", "tiny_inpainting")}
LORA = {"kind": "lora", "rank": 2}
# A small c magnifies the rounding of x0 where an eps-network sees almost no signal.
SOFT = {"huber_c": 0.1}
# Guidance that the student is not told, and that unconditional teachers can do without.
BAKED = {"guidance_input": False, "guidance_range": None, **SOFT}
# A critic that still is the teacher differs from it by guidance alone: enough of that, and x0 of moderate size, which
# an eps-network does not have near pure noise, or rounding is all there is.
GUIDED = {"guidance_range": (8.0, 12.0), "start_log_snr": 4.0, "time_range": (0.02, 0.5)}

# name: (method, options). A new objective adds its rows here: one named as the method, which the quick suite takes,
# and one for every branch of its loss. Unless a row says otherwise, teachers that read text are guided with scale 2:
# without guidance a critic that still is the teacher gives no gradient.
CASES = {
    "f_distill": ("f_distill", {"critic_updates": 1, "gan_weight": 0.1, "discriminator_width": 8}),
    "f_distill-lora": (
        "f_distill",
        {"critic_updates": 1, "gan_weight": 0.1, "discriminator_width": 8, "student": LORA, "critic": LORA},
    ),
    "f_distill-few-steps": ("f_distill", {"critic_updates": 2, "sampling_steps": 2, "discriminator_width": 8}),
    "f_distill-data-free": ("f_distill", {"critic_updates": 2, "divergence": "reverse_kl", "gan_weight": 0.0}),
    "consistency_distillation": ("consistency_distillation", BAKED),
    "consistency_distillation-lora": ("consistency_distillation", {**BAKED, "student": LORA}),
    "consistency_distillation-self": ("consistency_distillation", {**BAKED, "target_decay": None, "loss": "l2"}),
    "consistency_distillation-told": (
        "consistency_distillation",
        {**SOFT, "guidance_range": (1.0, 4.0), "guidance_scale": 2.0},
    ),
    "target_driven": ("target_driven", {"student": LORA, "empty_prompts": 0.5, **SOFT}),
    "target_driven-full": ("target_driven", {"student": {"kind": "full"}, "target_steps": (1, 3), **SOFT}),
    "em_distillation": ("em_distillation", {"langevin_steps": 2, "step_z": 0.01}),
    "em_distillation-lora": ("em_distillation", {"langevin_steps": 2, "step_z": 0.0, "student": LORA, "critic": LORA}),
    # While the critic is the teacher, what comes back through their difference is rounding in places: full students
    # get an adversarial term that outweighs it.
    "score_identity": ("score_identity", {"student": LORA}),
    "score_identity-adversarial": ("score_identity", {"gan_weight": 1.0, "discriminator_width": 8}),
    "uni_instruct": (
        "uni_instruct",
        {"divergence": "jensen_shannon", "gan_weight": 1.0, "discriminator_width": 8},
    ),
    "uni_instruct-data-free": (
        "uni_instruct",
        {"divergence": "reverse_kl", "gan_weight": 0.0, "student": LORA, "critic": LORA},
    ),
    "flash": ("flash", {"teacher_steps": 4, "guidance_range": (1.0, 1.0)}),
    "flash-all-terms": (
        "flash",
        {
            "teacher_steps": 3,
            "guidance_range": (1.0, 1.0),
            "dmd_weights": (0.5,),
            "adversarial_weights": (0.3,),
            "distance": "features",
            "discriminator_width": 8,
            "student": {"kind": "full"},
        },
    ),
    "swiftbrush": ("swiftbrush", {"critic": LORA, **GUIDED}),
    "swiftbrush-nasa": ("swiftbrush", {"negative_attention": True, "guide_critic": True, "critic": LORA, **GUIDED}),
    "swiftbrush-few-steps": (
        "swiftbrush",
        {"negative_attention": True, "critic": LORA, **GUIDED, "sampling_steps": 2, "start_log_snr": None},
    ),
    # From scales of 0 no gradient would reach keys and values yet.
    "speedupnet": (
        "speedupnet",
        {"guidance_scale": 3.0, "stage1_steps": 1, "no_negative": 0.5, "initial_scale": 0.5},
    ),
    "speedupnet-consistency": (
        "speedupnet",
        {
            "guidance_scale": 3.0,
            "guidance_range": (1.0, 4.0),
            "stage1_steps": 0,
            "sampling_steps": 2,
            "solver_steps": 2,
            "positive": True,
            "initial_scale": 0.5,
        },
    ),
    "speedupnet-long-steps": (
        "speedupnet",
        {"guidance_scale": 3.0, "stage1_steps": 0, "sampling_steps": 2, "solver_steps": 2, "original_weight": 0.0},
    ),
    "disback": ("disback", {"critic_updates": 1, "degradation_steps": 1, "record_every": 1, "critic": LORA}),
    "disback-path-of-one": ("disback", {"critic_updates": 1, "degradation_steps": 0, "critic": LORA, "student": LORA}),
    "consistency_training": ("consistency_training", {"dropout": 0.0, "huber": 0.01}),
    "consistency_training-tuning": (
        "consistency_training",
        {
            "initialize": "teacher",
            "dropout": 0.0,
            "huber": 0.01,
            "pairs": {"kind": "continuous", "decay": 4},
            "student": LORA,
        },
    ),
    "consistency_trajectory": ("consistency_trajectory", {"solver_steps": 2, **SOFT}),
    "consistency_trajectory-denoising": (
        "consistency_trajectory",
        {"guidance_scale": 1.0, "denoising_weight": 1.0, "target_decay": None, **SOFT},
    ),
    "discriminator_guidance": ("discriminator_guidance", {"discriminator_width": 8}),
    "denoising": ("denoising", {}),
    "denoising-lora": ("denoising", {"student": LORA}),
}


def test_every_objective_has_a_row():
    missing = set(registry.available(OBJECTIVES)) - set(CASES)
    assert not missing, f"add a row of that name to CASES for {', '.join(sorted(missing))}"


# These ask no teacher: what they forget is in their images. DisBack first aims at nodes of its own path.
TAUGHT_BY_DATA = ("consistency_training", "consistency_training-tuning", "denoising", "denoising-lora", "disback")

# Why an objective may refuse a family: its network has no input for one more number, no cross-attention, masked text,
# attention that is told nothing else, two texts, none.
REASONS = (
    "cannot be told",
    "has no cross-attention",
    "masks the padding of its text",
    "tells its attention nothing but the text",
    "reads two texts",
    "has no null condition to guide by",
)


def pytest_generate_tests(metafunc):
    if metafunc.cls is TestObjective:
        metafunc.parametrize(("case", "family"), rows(metafunc, CASES, FAMILIES))


@pytest.fixture
def model(request, family):
    return opened(request.getfixturevalue(family))


def make(model, case):
    method, options = CASES[case]
    cls = registry.load(OBJECTIVES, method, Objective)
    if "guidance_scale" in cls.Config.model_fields and not options.get("guidance_range"):
        options = {"guidance_scale": 2.0 if model.null_condition() else 1.0, **options}
    torch.manual_seed(0)
    with refusals(*REASONS):
        return cls(model, cls.Config(**options))


def make_trainer(model, case, folder, **options):
    objective = make(model, case)
    prompts = called(model, "red cat", "a dog", "cat") if model.any_condition() else []
    latents = torch.randn((3, *model.latent_shape), generator=torch.Generator().manual_seed(1))
    needed = {name: latents for name in ("images", "samples") if name in objective.needs}
    if model.backbone.shown:
        needed["images"] = latents
    negatives = ["gogh", "a painting"] if "negatives" in objective.needs else []
    source = ModelSource(model, prompts, needed.get("images"), negatives, needed.get("samples"))
    defaults = {"max_train_steps": 2, "train_batch_size": 2, "ema_decay": 0.5}
    return Trainer(objective, source, TrainerConfig(output_dir=folder, **defaults | options), progress=False)


def disturb_critic(trainer):
    """Moves the critic, if there is one: one that still is the teacher gives no gradient but by guidance."""
    generator = torch.Generator().manual_seed(5)
    for player in (player for name, player in trainer.players.items() if name == "critic"):
        with torch.no_grad():
            for parameter in player.trainable().values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def weights(trainer):
    live = {f"{n}.{k}": p.detach().clone() for n, q in trainer.players.items() for k, p in q.trainable().items()}
    averages = {f"average.{n}.{k}": v.clone() for n, a in trainer.averages.items() for k, v in a.values.items()}
    return {**live, **averages, **{f"state.{k}": v for k, v in trainer.objective.state().items()}}


# From an edited teacher, with a LoRA for a student, in bf16, as one of several processes: by configuration alone.
COMPOSED = """
import json, os, sys
from pathlib import Path
from sublimate.training.distill import DistillConfig, distill
folder = Path(sys.argv[1])
outcomes = {}
for name, config in json.loads((folder / "configs.json").read_text()).items():
    try:
        distill(DistillConfig(**config), progress=False)
        outcomes[name] = ""
    except ValueError as refusal:
        outcomes[name] = str(refusal)
(folder / f"{os.environ['RANK']}.json").write_text(json.dumps(outcomes))
"""
# What is new in a student, or all of it, no LoRA can hold.
REFUSED = {
    "consistency_distillation-told",
    "consistency_trajectory",
    "consistency_trajectory-denoising",
    "consistency_training",
}


@pytest.mark.slow
def test_every_objective_composes_by_configuration_alone(tiny_sd_v, tmp_path):
    model = open_model(str(tiny_sd_v))
    edit = UCE().fit(model, Request(erase=(Concept("cat", anchor="dog"),)))
    edit.save(tmp_path / "edit.safetensors")
    (tmp_path / "prompts.txt").write_text("red cat\na dog\n")
    prompts = str(tmp_path / "prompts.txt")
    configs = {}
    for case, (method, options) in CASES.items():
        lora = (
            {"student": LORA} if "student" in registry.load(OBJECTIVES, method, Objective).Config.model_fields else {}
        )
        negatives = method == "speedupnet" or options.get("negative_attention")
        configs[case] = {
            "model": str(tiny_sd_v),
            "edits": [str(tmp_path / "edit.safetensors")],
            "method": method,
            "objective": {**options, **lora},
            "data": {"prompts": prompts, "negatives": prompts if negatives else None, "teacher_steps": 1},
            "trainer": {
                "output_dir": str(tmp_path / case),
                "max_train_steps": 1,
                "train_batch_size": 1,
                "mixed_precision": "bf16",
            },
        }
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    launch(COMPOSED, tmp_path, processes=2, timeout=300)
    outcomes = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert outcomes[0] == outcomes[1]
    refusals = {case: said for case, said in outcomes[0].items() if said}
    assert refusals.keys() == REFUSED and all("LoRA" in said for said in refusals.values()), refusals
    for case in CASES.keys() - REFUSED:
        files = list((tmp_path / case / "student").rglob("*.safetensors"))
        assert files and all(torch.isfinite(t).all() for file in files for t in load_file(file).values()), case


class TestObjective:
    def test_a_turn_moves_its_players_and_nothing_else(self, model, case, tmp_path):
        teacher = copy.deepcopy(model.denoiser.state_dict())
        trainer = make_trainer(model, case, tmp_path)
        for turn in trainer.objective.turns(0):
            before = {n: copy.deepcopy(p.module.state_dict()) for n, p in trainer.players.items()}
            trainer._take(turn)
            for name, player in trainer.players.items():
                moved = any(not torch.equal(v, before[name][k]) for k, v in player.module.state_dict().items())
                assert moved == (name in turn.trains), (turn, name)
        assert all(torch.equal(v, teacher[k]) for k, v in model.denoiser.state_dict().items())

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_a_resumed_run_equals_the_uninterrupted_one(self, model, case, tmp_path):
        straight = make_trainer(model, case, tmp_path / "a")
        straight.run()
        make_trainer(model, case, tmp_path / "b", max_train_steps=1, checkpointing_steps=1).run()
        resumed = make_trainer(model, case, tmp_path / "b")
        resumed.run()
        assert resumed.step == 2
        found = weights(resumed)
        for name, value in weights(straight).items():
            assert torch.equal(value, found[name]), name

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_accumulation_changes_nothing_but_rounding(self, model, case, tmp_path):
        # One step: Adam turns the rounding of a near-zero gradient into a full step, so gradients are compared.
        whole = make_trainer(model, case, tmp_path / "a", train_batch_size=4)
        parts = make_trainer(model, case, tmp_path / "b", train_batch_size=1, gradient_accumulation_steps=4)
        if not model.null_condition() and not case.startswith("disback-path-of-one"):  # LoRAs multiply rounding there
            for trainer in (whole, parts):
                disturb_critic(trainer)
        for turn in whole.objective.turns(0):
            with counted(parts, model) as passes:
                found = gradients(parts, turn)
            assert max(passes) <= 2  # guidance doubles a micro-batch, and so does the backward pass
            expected = gradients(whole, turn)
            # Some gradients are zero but for the rounding of larger ones, as of a bias before a softmax.
            floor = 1e-9 + 1e-8 * max(float(a.abs().max()) for a in expected)
            for a, b in zip(expected, found, strict=True):
                # Near pure noise an eps-network's x0 multiplies rounding by fifteen.
                torch.testing.assert_close(a, b, rtol=2e-3, atol=3e-3 * float(a.abs().max()) + floor)

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_gradient_checkpointing_changes_nothing(self, model, case, tmp_path):
        plain, saving = (make_trainer(model, case, tmp_path, gradient_checkpointing=on) for on in (False, True))
        parts = (part for player in saving.players.values() for part in player.module.modules())
        assert all(part.is_gradient_checkpointing for part in parts if isinstance(part, ModelMixin))
        for turn in plain.objective.turns(0):
            expected = gradients(plain, turn)
            with checkpointed(model):  # the teacher's
                found = gradients(saving, turn)
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()) + 1e-10)

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_a_step_makes_the_passes_that_its_options_name_and_no_other(self, model, case, tmp_path):
        trainer = make_trainer(model, case, tmp_path, train_batch_size=4)
        with counted(trainer, model) as passes:
            for turn in trainer.objective.turns(0):
                trainer._take(turn)
        assert sum(passes) == 4 * trainer.objective.config.passes(0)

    @pytest.mark.slow
    @pytest.mark.first_family
    def test_the_teacher_alone_is_asked_for_anchors(self, model, case, tmp_path):
        if "prompts" not in make(model, case).needs or CASES[case][0] in ("speedupnet", "discriminator_guidance"):
            return
        teachers, encode = (model, forgetful(model), forgetful(model)), model.encode_prompts
        trainers = [make_trainer(t, case, tmp_path / str(i), train_batch_size=4) for i, t in enumerate(teachers)]
        anchor = called(model, "cat")[0]
        trainers[1].source.encode = lambda texts: encode(texts).with_teacher(encode(texts))
        trainers[2].source.encode = lambda texts: encode(texts).with_teacher(encode([anchor] * len(texts)))
        for trainer in trainers:
            disturb_critic(trainer)
        moved = False
        for turn in trainers[0].objective.turns(0):
            plain, same, led = (gradients(trainer, turn) for trainer in trainers)
            floor = 1e-10 + 1e-8 * max(float(a.abs().max()) for a in plain)
            for a, b in zip(plain, same, strict=True):  # gradients of features are added in another order
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + floor)
            moved |= any(not torch.equal(a, b) for a, b in zip(plain, led, strict=True))
        assert moved == (case not in TAUGHT_BY_DATA)

    @pytest.mark.slow
    def test_bf16_moves_the_same_players_the_same_way(self, model, case, tmp_path):
        wide = make_trainer(model, case, tmp_path / "a", train_batch_size=8)
        narrow = make_trainer(model, case, tmp_path / "b", train_batch_size=8, mixed_precision="bf16")
        for turn in wide.objective.turns(0):
            a, b = (torch.cat([g.flatten() for g in gradients(trainer, turn)]) for trainer in (wide, narrow))
            # Networks round, weights do not; a fresh critic's difference is small beside its rounding.
            assert b.dtype == torch.float32
            if a.any() or b.any():  # without guidance, a critic that still is the teacher gives no gradient
                assert not torch.equal(a, b) and torch.cosine_similarity(a, b, 0) > 0.6


def gradients(trainer, turn):
    """The gradients the turn's optimisers would see."""
    found = []

    def note(*_):
        found.extend(p.grad.detach().clone() for n in turn.trains for p in trainer.players[n].trainable().values())

    steps = {name: trainer.optimizers[name].step for name in turn.trains}
    for name in turn.trains:
        trainer.optimizers[name].step = lambda: None
    trainer.optimizers[turn.trains[0]].step = note
    trainer.config = trainer.config.model_copy(update={"max_grad_norm": 1e9})
    try:
        trainer._take(turn)
    finally:
        for name, step in steps.items():
            trainer.optimizers[name].step = step
    return found
