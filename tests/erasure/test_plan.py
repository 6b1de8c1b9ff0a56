"""The counted plans of erasures against the same erasures with real tensors."""

import pytest
import torch
from memory import kept_bytes, most_allocated
from torch.utils.flop_counter import FlopCounterMode

from sublimate.erasure.eraser import Eraser, NotCounted
from sublimate.erasure.fine_tuning import NoData, trainer_config
from sublimate.erasure.request import Concept, Request
from sublimate.erasure.token_rows import request_rows
from sublimate.pipelines.model import open_model
from sublimate.pipelines.shapes import open_shapes
from sublimate.training import registry
from sublimate.training.plan import CPU_ATTENTION
from sublimate.training.trainer import Trainer

SEVERAL = {"sampling_steps": 6, "updates_per_rollout": 3}
DRAWN = {"images": 3, "sampling_steps": 2}

# name: (method, options).
CASES = {
    "esd": ("esd", {"train_batch_size": 2, "l1": 0.1}),
    "esd-several": ("esd", {**SEVERAL, "gradient_accumulation_steps": 2, "weights": "full"}),
    "esd-lora": ("esd", {"train_batch_size": 2, "weights": "full", "lora_rank": 8}),
    "esd-over-bf16": ("esd", {**SEVERAL, "train_batch_size": 2, "mixed_precision": "bf16"}),
    "adv_unlearn": ("adv_unlearn", {**SEVERAL, "train_batch_size": 2, "adversary_steps": 3, "warmup_steps": 1}),
    "receler": ("receler", {"sampling_steps": 2, "train_batch_size": 2, "adversary_steps": 3}),
    "salun": ("salun", {**DRAWN, "train_batch_size": 2}),
    "one_step": ("one_step", {"times": (999.0,)}),
}
REQUEST = Request("cat", preserve=("seven",))


def eraser(method, **options):
    return registry.load("sublimate.erasure.methods", method, Eraser)(**options)


def precision_of(method):
    """The model's: a run in bf16 is one over a base that is."""
    return torch.bfloat16 if method.config.mixed_precision == "bf16" else torch.float32


def real_trainer(folder, method, request=REQUEST):
    model = open_model(folder, dtype=precision_of(method))
    objective = method.objective(model, method.config, request)
    return model, Trainer(objective, NoData(), trainer_config(method.config), progress=False)


def take(trainer):
    for turn in trainer.objective.turns(trainer.step):
        trainer.accumulate(turn)
        trainer.update(turn)
    trainer.step += 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_fine_tuning_is_what_torchs_allocator_reports(tiny_sd_v, case):
    name, options = CASES[case]
    method = eraser(name, **options)
    found = method.plan(open_shapes(tiny_sd_v, dtype=precision_of(method)), REQUEST)
    model, trainer = real_trainer(tiny_sd_v, method)
    take(trainer)
    peak = kept_bytes(model, trainer) + most_allocated(lambda: take(trainer))
    assert max(turn.peak for turn in found.turns.values()) == pytest.approx(peak, rel=0.15)


@pytest.mark.slow
def test_operations_are_those_of_an_average_sampling(tiny_sd_v):
    method = eraser("esd", sampling_steps=2)
    _, trainer = real_trainer(tiny_sd_v, method)
    counts = set()
    for _ in range(24):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            take(trainer)
        counts.add(counter.get_total_flops())
        if len(counts) == 3:
            break
    # x_t of one sample is noise or has had one step, of the concept and of what is preserved alike.
    assert len(counts) == 3
    assert method.plan(open_shapes(tiny_sd_v), REQUEST).flops == pytest.approx((min(counts) + max(counts)) / 2)


@pytest.mark.slow
def test_updates_that_share_a_sampling_are_counted_once(tiny_sd_v):
    method, request = eraser("esd", **SEVERAL), Request("cat")
    found = method.plan(open_shapes(tiny_sd_v), request)
    _, trainer = real_trainer(tiny_sd_v, method, request)
    counts = []
    for turn in trainer.objective.turns(0):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            trainer.accumulate(turn)
        counts.append(counter.get_total_flops())
    sampled, shared = found.turns.values()
    assert (sampled.times, shared.times) == (1, 2)
    assert counts[1:] == [shared.flops] * 2 and sampled.flops > shared.flops


@pytest.mark.slow
def test_what_is_drawn_before_training_is_counted_before_it(tiny_sd_v):
    found = eraser("concept_ablation", images=2, train_batch_size=4).plan(open_shapes(tiny_sd_v), REQUEST)
    assert found.before.flops > 0 and found.peak >= found.before.peak
    assert any(line.startswith("before training: ") for line in found.lines())


@pytest.mark.slow
def test_what_a_request_preserves_nothing_of_is_counted_where_something_is_retained_all_the_same(tiny_inpainting):
    method = eraser("image_to_image", images=2, sampling_steps=1, train_batch_size=2)
    request = Request("cat")
    _, trainer = real_trainer(tiny_inpainting, method, request)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        take(trainer)
    assert method.plan(open_shapes(tiny_inpainting), request).flops == pytest.approx(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["uce", "rece", "speed", "mace_fusion"])
def test_a_closed_form_counts_what_it_reads_and_solves(tiny_sd_v, method):
    concept = Concept("cat", anchor="dog", synonyms=("seven",))
    request = Request((concept,), preserve=("red",))
    closed = eraser(method, templates=("{}", "a {}"), tokens="last")
    found = closed.plan(open_shapes(tiny_sd_v), request)
    model = open_model(tiny_sd_v)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        ((erased, kept),) = request_rows(model, request, ("{}", "a {}"), "last").values()
    (solve,) = found.solves.values()
    # "cat", "seven", "red" and "dog", in two templates each.
    assert found.prompts == 8 and found.reading.flops == counter.get_total_flops()
    assert (solve.erased, solve.preserved, solve.width) == (*map(len, (erased.own, kept)), erased.own.shape[1])
    layers = [p for name, p in model.parameters().items() if ".attn2.to_k." in name or ".attn2.to_v." in name]
    assert (solve.layers, solve.written) == (len(layers), sum(p.nbytes for p in layers))
    assert found.base == sum(p.nbytes for p in model.parameters().values()) < found.reading.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"), [("few_shot", {}), ("slug", {}), ("prune_then_erase", {"then": "esd"})]
)
def test_what_depends_on_values_says_so(tiny_sd_v, method, options):
    with pytest.raises(NotCounted, match=f"what {method} does depends on values"):
        eraser(method, **options).plan(open_shapes(tiny_sd_v), REQUEST)
