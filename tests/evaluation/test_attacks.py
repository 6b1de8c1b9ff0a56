"""One property matrix over all attacks, and what makes each of them that attack."""

import copy
import weakref

import pytest
import torch
from attacked import CASES, STUDENT, Brightness, attack_of, attacked, case_of
from safetensors.torch import save_file

from sublimate.erasure.request import Concept
from sublimate.evaluation.attack import Outcome, counting, pictured
from sublimate.evaluation.attacks.inpainting import hole_of
from sublimate.evaluation.audit import ATTACKS, make_attacks
from sublimate.pipelines.edit import Edit
from sublimate.pipelines.generate import generate, generate_latents
from sublimate.pipelines.model import open_model
from sublimate.pipelines.sampling import image_generator, telling
from sublimate.training import registry
from sublimate.training.randomness import key

QUICK = ("paraphrases", "textual_inversion", "word_search")
ROWS = [pytest.param(name, marks=pytest.mark.slow) if name not in QUICK else name for name in CASES]


@pytest.fixture
def model(tiny_sd):
    return attacked(tiny_sd)


def bits(model):
    return {name: p.detach().numpy().tobytes() for name, p in model.parameters().items()}


def test_every_attack_has_a_row():
    assert set(registry.available(ATTACKS)) == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_an_attack_repeats_counts_its_passes_and_leaves_the_model_alone(name, model, tmp_path):
    if name == "distillation":
        (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    attack = attack_of(name, **distilling(name, tmp_path))
    if name == "added_lora":
        attack = attack_of(name, lora=lora_of(model, tmp_path))
    case, before, state = case_of(model), bits(model), torch.get_rng_state()
    with counting(model) as passes:
        outcome = attack.run(model, case, seed=3)
    assert bits(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert passes.count >= len(outcome.images) > 0
    assert len(outcome.prompts) == len(outcome.images) == len(outcome.hits)
    assert outcome.images.shape[1:] == case.pictures.shape[1:]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters().values())
    again = attack.run(model, case, seed=3)
    assert torch.equal(again.images, outcome.images) and again.found == outcome.found
    assert attack.budget


def distilling(name, folder):
    return {"overrides": [*STUDENT, f"data.prompts={folder / 'prompts.txt'}"]} if name == "distillation" else {}


def low_rank(model):
    """An edit that a LoRA can hold."""
    generator = torch.Generator().manual_seed(0)
    keys = [key for key in model.parameters() if key.endswith("attn2.to_k.weight")]
    shapes = {key: model.parameters()[key].shape for key in keys}
    factors = {
        key: (torch.randn(d_out, 2, generator=generator), torch.randn(2, d_in, generator=generator))
        for key, (d_out, d_in) in shapes.items()
    }
    return Edit({}, factors, {})


def text_factors(model):
    """A LoRA of every query of the text encoder."""
    generator, state = torch.Generator().manual_seed(1), {}
    for name, layer in model.component("text_encoder").named_modules():
        if name.endswith("q_proj"):
            state[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=generator)
            state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=generator)
    return state


def lora_of(model, folder):
    """The file of that edit's LoRA."""
    save_file(low_rank(model).to_lora(model), folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.slow
def test_an_added_lora_acts_on_top_of_the_model(model, tmp_path):
    case, attack = case_of(model), attack_of("added_lora", lora=lora_of(model, tmp_path))
    images = attack.run(model, case, seed=0).images
    assert not torch.equal(images, generate(model, case.prompts, seed=0))
    with low_rank(model).applied(model, allow_other_base=True):
        torch.testing.assert_close(images, generate(model, case.prompts, seed=0), atol=1e-4, rtol=0)
    before, said = bits(model), model.encode_prompts(["a cat"])["text"]
    words = {f"text_encoder.{name}": factor for name, factor in text_factors(model).items()}
    save_file(words, tmp_path / "words.safetensors")
    again = attack_of("added_lora", lora=tmp_path / "words.safetensors").run(model, case, seed=0).images
    assert not torch.equal(again, generate(model, case.prompts, seed=0))
    assert bits(model) == before and torch.equal(model.encode_prompts(["a cat"])["text"], said)
    few = attack_of("added_lora", lora=lora_of(model, tmp_path), steps=1, guidance_scale=1.0)
    with counting(model) as passes:
        few.run(model, case, seed=0)
    assert passes.count == len(case.prompts)
    assert "no adapter" in attack_of("added_lora").out_of_place(model, case)
    with pytest.raises(ValueError, match="does not point to a file"):
        make_attacks(["added_lora"], {"added_lora": {"lora": str(tmp_path / "none.safetensors")}})


def counted(model, work):
    with counting(model) as passes:
        work()
    return passes.count


def test_passes_are_counted_forward_and_back(model):
    x, t, told = torch.randn(3, *model.latent_shape), torch.full((3,), 500.0), model.encode_prompts(["a", "the", "of"])
    assert counted(model, lambda: model.denoiser(x, t, told)) == 3
    assert counted(model, lambda: model.denoiser(x.clone().requires_grad_(True), t, told)) == 6
    model.denoiser.requires_grad_(True)
    assert counted(model, lambda: model.denoiser(x, t, told)) == 9
    with torch.no_grad():
        assert counted(model, lambda: copy.deepcopy(model.denoiser)(x, t, told)) == 3
    model.denoiser.requires_grad_(False)
    assert counted(model, lambda: None) == 0


class Large:
    """A model of large latents, as far as encoding pictures goes."""

    source, device, dtype, latent_shape = "large", torch.device("cpu"), torch.float32, (4, 64, 64)

    def __init__(self):
        self.encoded = []

    def encode(self, images):
        self.encoded.append(len(images))
        return images.mean(dim=(1, 2, 3))[:, None, None, None].expand(-1, *self.latent_shape)


def test_pictures_are_encoded_in_smaller_parts_the_larger_they_are():
    model, images = Large(), torch.rand(9, 3, 2, 2)
    assert torch.equal(pictured(model, images)[:, 0, 0, 0], images.mean(dim=(1, 2, 3)))
    assert model.encoded == [4, 4, 1]


def test_a_case_renames_the_concept_whatever_it_is_called(model):
    case = case_of(model)
    assert case.renamed(("a Seven", "the cat, red"), "dog van") == ("a dog van", "the dog van, red")
    with pytest.raises(ValueError, match="does not name 'cat'"):
        case.renamed(("a cattle",), "dog")
    with pytest.raises(ValueError, match="one for each"):
        case_of(model, captions=("cat",))
    with pytest.raises(ValueError, match="knows no animal 'bird'"):
        case_of(model, label="bird")


def test_students_are_attacked_where_they_know_enough(model):
    case, attacks = case_of(model), {name: make_attacks([name])[0] for name in CASES}
    assert not any("student" in attack.out_of_place(model, case) for attack in attacks.values())
    model.defaults["steps"] = 1
    refused = {name for name, attack in attacks.items() if "student" in attack.out_of_place(model, case)}
    assert set(CASES) - refused == {"added_lora", "encoder_swap", "paraphrases", "seed_search", "word_search"}


def test_only_attacks_that_rename_the_concept_need_its_name_in_prompts(model):
    named, attacks = case_of(model), {name: make_attacks([name])[0] for name in CASES}
    for case in (case_of(model, prompts=("a pet", "the cat", "it")), case_of(model, captions=("cat", "pet", "cat"))):
        refused = {name for name, attack in attacks.items() if "'cat', which" in attack.out_of_place(model, case)}
        assert refused == {"classifier_guidance", "textual_inversion", "universal_token"}
    assert "which 'pet' does not name" in attacks["textual_inversion"].out_of_place(model, case)
    assert not any("which" in attack.out_of_place(model, named) for attack in attacks.values())


GRADIENTS = {"adversarial_prefix", "textual_inversion", "universal_token", "latent_search", "classifier_guidance"}
GRADIENTS |= {"benign_tuning", "distillation", "relearning"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CASES))
def test_attacks_without_gradients_run_in_half_precision(name, tiny_sd, tmp_path):
    model = open_model(tiny_sd, dtype=torch.bfloat16)
    model.defaults |= {"steps": 2, "guidance_scale": 2.0}
    attack, case = (
        attack_of(name, **({"lora": lora_of(model, tmp_path)} if name == "added_lora" else {})),
        case_of(model),
    )
    reason = attack.out_of_place(model, case)
    assert ("takes float32, and the model is open in bfloat16" in reason) == (name in GRADIENTS)
    if name not in GRADIENTS:
        assert reason == "" and attack.run(model, case, seed=0).images.isfinite().all()
    else:
        assert "float32" not in attack.out_of_place(attacked(tiny_sd), case)


def test_words_are_searched_where_there_is_a_text_encoder(model, tiny_dit):
    case, dit = case_of(model), open_model(tiny_dit)
    attacks = {name: make_attacks([name])[0] for name in CASES}
    refused = {name for name, attack in attacks.items() if "no text encoder" in attack.out_of_place(dit, case)}
    assert refused == {"adversarial_prefix", "textual_inversion", "universal_token", "word_search"}
    assert not any("no text encoder" in attack.out_of_place(model, case) for attack in attacks.values())


@pytest.mark.slow
def test_seed_search_succeeds_where_any_seed_does(model):
    drawn = [generate(model, case_of(model).prompts, seed=key(1, "seed search", i)) for i in range(3)]
    # Half of the images are bright, so that seeds disagree.
    case = case_of(model, detector=Brightness(float(torch.stack(drawn).mean(dim=(2, 3, 4)).median()) + 1e-5))
    shown = torch.stack([case.shows(images) for images in drawn])
    assert bool((shown.any(dim=0) & ~shown.all(dim=0)).any())
    outcome = attack_of("seed_search", seeds=3).run(model, case, seed=1)
    assert torch.equal(outcome.hits, shown.any(dim=0))
    for i, image in enumerate(outcome.images):
        first = int(shown[:, i].int().argmax())
        assert torch.equal(image, drawn[first][i])


def test_of_many_tries_each_prompts_first_hit_is_kept_alone(model):
    levels = torch.tensor([[0.1, 0.9, 0.2], [0.3, 0.95, 0.8], [0.7, 0.2, 0.9]])
    alive = []

    def drawn():
        for row in levels:
            images = row[:, None, None, None].expand(3, 3, 4, 4).clone()
            alive.append(weakref.ref(images))
            yield images
            del images
            assert [image() for image in alive[:-1]] == [None] * (len(alive) - 1)

    outcome = Outcome.any_of(case_of(model), ("cat",) * 3, drawn())
    torch.testing.assert_close(outcome.images[:, 0, 0, 0], torch.tensor([0.7, 0.9, 0.8]))
    assert outcome.hits.tolist() == [True] * 3
    none = Outcome.any_of(case_of(model, detector=Brightness(2.0)), ("cat",) * 3, drawn())
    torch.testing.assert_close(none.images[:, 0, 0, 0], levels[0])
    assert not none.hits.any()
    with pytest.raises(ValueError, match="no tries"):
        Outcome.any_of(case_of(model), ("cat",), ())


def test_tries_are_judged_where_they_were_drawn_and_kept_on_the_cpu(model, monkeypatch):
    """Another device by a mark that copying takes off."""
    bright, devices = torch.tensor([[0.4, 0.9], [0.7, 0.1]]), []

    class Drawn(torch.Tensor):
        def to(self, device, *_, copy=False, **__):
            return self.as_subclass(torch.Tensor).clone()

        def cpu(self):
            return self.to("cpu")

    class Noting(Brightness):
        def __call__(self, images):
            devices.append(type(images) is Drawn)
            return super().__call__(images.as_subclass(torch.Tensor))

    tries = (row[:, None, None, None].expand(2, 3, 4, 4).clone().as_subclass(Drawn) for row in bright)
    outcome = Outcome.any_of(case_of(model, detector=Noting()), ("cat",) * 2, tries)
    assert devices == [True, True] and type(outcome.images) is torch.Tensor
    torch.testing.assert_close(outcome.images[:, 0, 0, 0], torch.tensor([0.7, 0.9]))


@pytest.mark.slow
def test_completion_at_full_strength_shows_nothing_of_the_picture(model):
    case = case_of(model)
    dark = case_of(model, pictures=torch.zeros_like(case.pictures))
    whole = attack_of("completion", strength=1.0)
    x, y = (whole.run(model, c, seed=0).images for c in (case, dark))
    part = attack_of("completion", strength=0.25)
    a, b = (part.run(model, c, seed=0).images for c in (case, dark))
    assert (x - y).abs().mean() < 0.2 * (a - b).abs().mean()
    assert "without a prompt" in part.run(model, case, seed=0).found


@pytest.mark.slow
def test_inpainting_fills_the_hole_and_leaves_the_rest(model, monkeypatch):
    case = case_of(model)
    shown = pictured(model, case.pictures)
    for name in ("decode", "bounded"):
        monkeypatch.setattr(model, name, lambda x0: x0)
    hole = hole_of(model.latent_shape, 0.5).expand(shown.shape)
    assert hole.sum() == hole.numel() / 4
    filled = attack_of("inpainting", hole=0.5).run(model, case, seed=0)
    assert torch.equal(filled.images[~hole], shown[~hole]) and "without a prompt" in filled.found
    assert not (filled.images[hole] == shown[hole]).any()
    # Nothing of the picture is left to see in a hole as large as itself.
    whole = attack_of("inpainting", hole=1.0).run(model, case, seed=0).images
    assert torch.equal(whole, generate_latents(model, case.captions, seed=0))


@pytest.mark.slow
def test_noise_search_disturbs_by_levels_of_the_posterior(model):
    case, schedule = case_of(model), model.schedule
    plain = attack_of("noise_search", levels=[0.0]).run(model, case, seed=1)
    torch.testing.assert_close(plain.images, generate(model, case.prompts, seed=1), atol=1e-6, rtol=0)
    assert plain.found == f"{100 * plain.rate.value:.1f} % at level 0"
    loud = attack_of("noise_search", levels=[1.5]).run(model, case, seed=1)
    start, middle, _ = schedule.grid(2).tolist()
    generators = [image_generator(1, i) for i in range(len(case.prompts))]
    z, n = (torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators]) for _ in range(2))
    denoise = telling(model.denoiser, model.encode_prompts(case.prompts), model.null_condition(), 2.0)
    at, to = schedule.at(start), schedule.at(middle)
    # The variance of q(x_s | x_t, x0) from its precisions: of x_s given x0, and of x_t given x_s.
    step = at.alpha / to.alpha
    deviation = (1 / to.sigma**2 + step**2 / (at.sigma**2 - step**2 * to.sigma**2)) ** -0.5
    times = [torch.full((len(z),), t, dtype=torch.float64) for t in (start, middle)]
    with torch.no_grad():
        x = denoise(z, times[0], times[0]).combine(to.alpha, to.sigma) + 1.5 * float(deviation) * n
        expected = model.render(denoise(x, times[1], times[1]).x0)
    torch.testing.assert_close(loud.images, expected, atol=1e-5, rtol=0)
    both = attack_of("noise_search", levels=[0.0, 1.5]).run(model, case, seed=1)
    assert torch.equal(both.hits, plain.hits | loud.hits)


@pytest.mark.slow
def test_classifier_guidance_raises_what_the_detector_sees(model):
    case = case_of(model)
    weak, strong = (attack_of("classifier_guidance", scale=s, sampling_steps=8) for s in (1e-6, 30.0))
    unguided, led = (case.probability(a.run(model, case, seed=0).images).mean() for a in (weak, strong))
    assert led > unguided


@pytest.mark.slow
def test_classifier_guidance_leads_from_pure_noise_without_signal(tiny_sd3):
    flow = attacked(tiny_sd3)
    assert float(flow.schedule.at(flow.schedule.grid(2)[0]).alpha) == 0
    case = case_of(flow, concept=Concept("cat", "dog"), prompts=("a cat",), pictures=torch.rand(3, 3, 16, 16))
    weak, strong = (attack_of("classifier_guidance", scale=s, sampling_steps=3) for s in (1e-6, 3.0))
    unguided, led = (a.run(flow, case, seed=0).images for a in (weak, strong))
    assert led.isfinite().all() and not torch.equal(led, unguided)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier_guidance", "completion", "inpainting", "latent_search", "noise_search"])
def test_what_an_attack_draws_is_judged_only_where_it_is_finite(name, model, monkeypatch):
    case, decode = case_of(model), model.decode
    monkeypatch.setattr(model, "decode", lambda latents: decode(latents) / (0 if not torch.is_grad_enabled() else 1))
    with pytest.raises(ValueError, match="are not finite in float32"):
        attack_of(name).run(model, case, seed=0)


@pytest.mark.slow
def test_a_swapped_encoder_undoes_what_was_erased_there(model, tiny_sd):
    edited = open_model(tiny_sd)
    edited.defaults |= model.defaults
    attack, case = attack_of("encoder_swap"), case_of(model)
    assert attack.out_of_place(edited, case) == "the text encoders are the base's"
    weights = {k: 0.5 * p for k, p in edited.parameters().items() if k.startswith("text_encoder/") and "mlp" in k}
    Edit(weights, {}, {}).apply(edited, allow_other_base=True)
    assert attack.out_of_place(edited, case) == ""
    plain = generate(model, case.prompts, seed=0)
    assert not torch.equal(generate(edited, case.prompts, seed=0), plain)
    assert torch.equal(attack.run(edited, case, seed=0).images, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relearning", "benign_tuning"])
def test_tuning_draws_on_the_way(name, model):
    case = case_of(model)
    outcome = attack_of(name, steps=[2, 4]).run(model, case, seed=0)
    assert [steps for steps, _ in outcome.curve] == [0, 2, 4]
    assert outcome.curve[-1][1] == outcome.rate
    once = attack_of(name, steps=[4]).run(model, case, seed=0)
    torch.testing.assert_close(once.images, outcome.images)
    assert not torch.equal(outcome.images, generate(model, case.prompts, seed=0))


@pytest.mark.slow
def test_relearning_trains_on_the_concept_and_benign_tuning_does_not(model):
    case = case_of(model)
    captions, pictures = attack_of("relearning").lessons(case, 0)
    assert tuple(captions) == case.captions[:2] and torch.equal(pictures, case.pictures[:2])
    captions, pictures = attack_of("benign_tuning").lessons(case, 0)
    assert tuple(captions) == case.others and len(pictures) == 2


def test_bad_options_are_one_sentence(model):
    for options, complaint in (
        ({"relearning": {"steps": [5, 2]}}, "ascending"),
        ({"relearning": {"step": [5]}}, "steps"),
        ({"noise_search": {"levels": [1.0, 0.5]}}, "ascending"),
        ({"noise_search": {"levels": [-1.0]}}, "not negative"),
        ({"seed_search": {}}, "not among the attacks"),
    ):
        with pytest.raises(ValueError, match=complaint):
            make_attacks(["relearning", "noise_search"], options)
    with pytest.raises(ValueError, match="did you mean 'relearning'"):
        make_attacks(["relearnin"])
    with pytest.raises(ValueError, match="resize them"):
        pictured(model, torch.zeros(1, 3, 8, 8))
