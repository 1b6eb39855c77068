"""What a freeze means: weights stand still, memory is freed, and what lies before runs without autograd."""

import copy
import re

import pytest
import torch
import torch.nn as nn
from tiny.grades import ALWAYS, FAMILIES, NEVER, Loop, batch, make_model, make_optimizer, same_weights, unfreezing_loop

from grades import GradESConfig, GradESMonitor, find_components
from grades.freezing import Freezer


def freeze(
    model: nn.Module, wanted: str, optimizer=None, prefix: bool = True, targets: tuple[str, ...] = (),
    run=lambda model: loss_of(model),
) -> Freezer:  # fmt: skip
    """Freeze the components in whose name the pattern `wanted` is, after a forward pass by `run`."""
    components = find_components(model, targets)
    freezer = Freezer(model, components, optimizer, prefix)
    run(model)
    freezer.freeze([component.name for component in components if re.search(wanted, component.name)])
    return freezer


def trainable(model: nn.Module, inside: str = "") -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad and inside in name}


def needs_gradient(model: nn.Module, run=lambda model: loss_of(model)) -> dict[str, bool]:
    """Whether the output of each module needs a gradient when the model runs."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, bool] = {}

    def look(module, inputs, output):
        found[names[module]] = (output[0] if isinstance(output, tuple | dict) else output).requires_grad

    with nn.modules.module.register_module_forward_hook(look):
        run(model)
    return found


def loss_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return model(**batch(seed))[1]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of one step, by name."""
    model.zero_grad(set_to_none=True)
    loss_of(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model(request):
    return make_model(**FAMILIES[getattr(request, "param", "nanovlm")])


of_families = pytest.mark.parametrize("model", FAMILIES, indirect=True)


@of_families
def test_of_a_frozen_vision_tower_nothing_trains_and_no_activation_is_kept(model):
    before = trainable(model)
    freeze(model, "vision_encoder")
    assert trainable(model) == {name for name in before if not name.startswith("vision_encoder")}
    needs = needs_gradient(model)
    assert not any(needs[name] for name in needs if name.startswith("vision_encoder"))
    assert needs["MP"]
    assert needs["decoder.token_embedding"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda shape: None):
        features = model.vision_encoder(batch(0)["images"])
    assert features.grad_fn is None
    assert kept == []


def test_of_a_frozen_first_block_the_activations_before_the_second_are_not_kept(model):
    freeze(model, "vision_encoder.blocks.0.")
    left = trainable(model, "vision_encoder")
    assert left == {name for name in left if name.startswith(("vision_encoder.blocks.1.", "vision_encoder.layer_norm"))}
    assert len(left) == 14  # all of block 1 and the last norm
    needs = needs_gradient(model)
    assert not needs["vision_encoder.patch_embedding"]
    assert not needs["vision_encoder.blocks.0"]
    assert needs["vision_encoder.blocks.1.attn"]
    assert needs["vision_encoder"]


@pytest.mark.parametrize(
    ("wanted", "prefix", "targets"),
    [
        ("vision_encoder.blocks.1.", True, ()),
        ("vision_encoder.blocks.0.mlp", True, ()),
        ("qkv_proj", True, ()),
        ("", True, ("fc1",)),  # all that are watched
        ("", True, ("q_proj",)),
        ("", False, ()),
    ],
)
def test_behind_a_matrix_that_trains_watched_or_not_and_without_prefix_matrices_alone_freeze(
    model, wanted, prefix, targets
):
    model = language_alone() if "q_proj" in targets else model
    before = trainable(model)
    chosen = {c.name for c in find_components(model, targets) if wanted in c.name}
    assert not freeze(model, wanted, prefix=prefix, targets=targets).cuts
    assert before - trainable(model) == {name for name in before if name.rpartition(".")[0] in chosen}


def test_the_blocks_of_both_towers_pass_one_after_the_other(model):
    """Frozen in several decisions as in one."""
    freezer = Freezer(model, find_components(model), make_optimizer(model))
    loss_of(model)
    for component in freezer.components:
        freezer.freeze([component.name])
    twin = make_model()
    freeze(twin, "")
    assert trainable(model) == trainable(twin)
    assert "vision_encoder.layer_norm.weight" not in trainable(model)
    assert trainable(model, "decoder.blocks") == {
        f"decoder.blocks.{i}.{norm}.weight" for i in (0, 1) for norm in ("norm1", "norm2")
    }  # the projector trains


def test_the_language_prefix_waits_for_vision_tower_and_projector(model):
    freeze(model, "decoder.blocks.0.")
    assert "decoder.blocks.0.norm1.weight" in trainable(model)
    model = make_model()
    model.MP.requires_grad_(False)
    freezer = freeze(model, "decoder.blocks.0.")
    assert "decoder.blocks.0.norm1.weight" in trainable(model)
    assert not freezer.cuts
    freezer.freeze([component.name for component in find_components(model) if component.tower == "vision"])
    assert trainable(model, "vision_encoder") == set()
    assert trainable(model, "decoder.blocks.0") == set()


def language_alone(**fields) -> nn.Module:
    """A model whose projector and vision tower do not train."""
    model = make_model(**fields)
    model.vision_encoder.requires_grad_(False)
    model.MP.requires_grad_(False)
    return model


def test_a_tied_embedding_trains_on_as_the_head_alone():
    model = language_alone()
    twin = copy.deepcopy(model)
    freezer = freeze(model, "decoder.blocks.0.")
    assert model.decoder.head.weight is model.decoder.token_embedding.weight
    assert trainable(model, "decoder.blocks.0.") == set()
    assert "decoder.token_embedding.weight" in trainable(model)
    needs = needs_gradient(model)
    assert not needs["decoder.blocks.0"]
    assert needs["decoder.blocks.1.attn"]
    untied = language_alone(lm_tie_weights=False)
    untied.load_state_dict(twin.state_dict())
    as_head, whole = gradients(untied)["decoder.head.weight"], gradients(twin)["decoder.token_embedding.weight"]
    found = gradients(model)["decoder.token_embedding.weight"]
    assert torch.equal(found, as_head)
    assert not torch.equal(found, whole)
    freezer.unfreeze(["decoder.blocks.0.attn.q_proj"])
    assert not freezer.cuts
    assert torch.equal(gradients(model)["decoder.token_embedding.weight"], whole)
    freezer.freeze(["decoder.blocks.0.attn.q_proj"])
    assert len(freezer.cuts) == 1


@pytest.mark.parametrize(("name", "trains"), [("pool", {"layer_norm", "pool"}), ("merger", {"merger"})])
def test_a_matrix_behind_the_blocks_of_the_vision_tower_trains_and_a_projector_in_it_is_not_part_of_it(
    model, name, trains
):
    model.vision_encoder.add_module(name, nn.Linear(16, 16))
    freeze(model, "vision_encoder")
    assert trainable(model, "vision_encoder") == {f"vision_encoder.{n}.{p}" for n in trains for p in ("weight", "bias")}
    assert needs_gradient(model)["vision_encoder"] == (name == "pool")


@pytest.mark.parametrize("wanted", ["vision_encoder", "vision_encoder.blocks.0.", "decoder.blocks.0.", ""])
@pytest.mark.parametrize("projector", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_the_same_with_and_without_prefix(family, wanted, projector):
    """The loss and every gradient of what trains on; that of a tied embedding whose lookup is cut off excepted."""
    models = [make_model(**FAMILIES[family]) for _ in range(2)]
    for model, prefix in zip(models, (True, False), strict=True):
        model.MP.requires_grad_(projector)
        cut = freeze(model, wanted, prefix=prefix).cuts
        assert bool(cut) == (prefix and not projector and wanted == "")
    assert torch.equal(loss_of(models[0]), loss_of(models[1]))
    with_prefix, without = map(gradients, models)
    assert with_prefix.keys() <= without.keys()
    for name, gradient in with_prefix.items():
        if not (wanted == "" and not projector and name == "decoder.token_embedding.weight"):
            assert torch.equal(gradient, without[name])


@of_families
def test_gradients_and_optimizer_state_are_freed_of_matrices_and_prefix(model):
    optimizer = make_optimizer(model)
    loss_of(model).backward()
    optimizer.step()
    frozen = [p for name, p in model.named_parameters() if name.startswith("vision_encoder")]
    first = freeze(model, "vision_encoder", optimizer)  # the gradients are still there
    assert first.freed_bytes == sum(3 * p.nbytes + 4 for p in frozen)  # with two moments and a step
    assert all(p.grad is None and p not in optimizer.state for p in frozen)
    assert all(p in optimizer.state for p in model.decoder.parameters())
    before = [p.detach().clone() for p in frozen]
    optimizer.zero_grad(set_to_none=True)
    loss_of(model).backward()
    optimizer.step()  # with weight decay
    assert all(torch.equal(p, b) for p, b in zip(frozen, before, strict=True))
    fresh = make_optimizer(copy.deepcopy(model).requires_grad_(True))
    fresh.load_state_dict(optimizer.state_dict())  # the groups still fit
    assert len(fresh.state) == len(optimizer.state) == len(list(model.parameters())) - len(frozen)


@pytest.mark.parametrize("with_momentum", [False, True])
@of_families
def test_frozen_weights_never_move_again(model, with_momentum):
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9, **settings)
    config = GradESConfig(vision_tau=ALWAYS, language_tau="auto", language_mlp_tau=NEVER, alpha=0.2)
    loop = Loop(model, config, 30, sgd if with_momentum else make_optimizer(model), accumulation=2)
    at_freeze: dict[str, list[torch.Tensor]] = {}

    def keep(step):
        for name in loop.monitor.frozen:
            parameters = loop.monitor.by_name[name].parameters
            copies = at_freeze.setdefault(name, [p.detach().clone() for p in parameters])
            assert all(torch.equal(p, c) for p, c in zip(parameters, copies, strict=True))
            assert all(p.grad is None and not p.requires_grad and p not in loop.optimizer.state for p in parameters)

    loop.on_step = keep
    monitor = loop.run().monitor
    assert 8 < len(monitor.frozen) < 22
    assert len(set(monitor.frozen.values())) > 1
    assert monitor.freed_bytes > 0


def tiny_text_model(name: str, **settings) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("tied", [True, False])
def test_the_prefix_of_a_hugging_face_llama(tied):
    model = tiny_text_model("Llama", intermediate_size=24, tie_word_embeddings=tied)
    embedding = model.get_input_embeddings().weight
    assert (embedding is model.lm_head.weight) is tied
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(3, 40, (2, 8), generator=torch.Generator().manual_seed(0))

    def loss(model):
        return model(input_ids=ids, labels=ids).loss

    exact = loss(model)
    freezer = freeze(model, r"\.layers\.[01]\.", optimizer)
    needs = needs_gradient(model, loss)
    assert [needs[f"model.layers.{i}"] for i in (0, 1, 2)] == [False, False, True]
    assert trainable(model, "layers.1") == set()
    assert embedding.requires_grad is tied
    assert torch.equal(loss(model), exact)
    loss(model).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)
    optimizer.step()
    freezer.unfreeze(list(freezer.decided))
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert needs_gradient(model, loss)["model.embed_tokens"]


def test_a_last_norm_that_is_defined_before_the_blocks_is_not_before_them():
    model = tiny_text_model("OPT", ffn_dim=24, word_embed_proj_dim=16, tie_word_embeddings=False)
    freeze(model, ".layers.0.")
    left = trainable(model)
    assert {name for name in left if "layers" not in name} == {
        "model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias", "lm_head.weight",
    }  # fmt: skip
    assert not any("layers.0." in name for name in left)


def test_a_tower_that_is_decided_whole_waits_for_no_share_of_the_other():
    model = make_model(lm_n_blocks=30)
    components = find_components(model)
    freezer = Freezer(model, components, None, rounds=2, rewrap=lambda: None)
    loss_of(model)
    vision = [c.name for c in components if c.tower == "vision"]
    for name in vision[:-1]:
        freezer.freeze([name])
    assert not freezer.applied
    freezer.freeze(vision[-1:])
    assert freezer.applied == set(vision)
    assert not trainable(model, "vision_encoder")


def test_what_thaws_and_freezes_again_is_applied_again(model):
    freezer = Freezer(model, find_components(model), None, rewrap=lambda: None)
    loss_of(model)
    vision = {c.name for c in freezer.components if c.tower == "vision"}
    for _ in range(2):
        freezer.freeze(vision)
        assert not trainable(model, "vision_encoder")
        freezer.unfreeze(vision)


def test_what_waited_for_a_round_is_applied_where_a_run_continues_without_rounds(model):
    freezer = Freezer(model, find_components(model), None, rounds=1, rewrap=lambda: None)
    freezer.freeze([c.name for c in freezer.components if c.tower == "vision"])
    assert not freezer.applied
    again = make_model()
    alone = Freezer(again, find_components(again), None, rounds=1)
    alone.load_state_dict(freezer.state_dict())
    loss_of(again).backward()
    alone.drop_gradients()
    assert alone.applied == freezer.decided
    assert not trainable(again, "vision_encoder")
    assert all(p.grad is None for p in again.vision_encoder.parameters())


def test_ddp_cannot_be_probed_and_says_so_at_once(model):
    config = GradESConfig(metric="gradient_norm", unfreeze_factor=2.0)
    with pytest.raises(ValueError, match=r"^unfreeze_factor 2: .*FSDP2"):
        GradESMonitor(config, model, rewrap=lambda: None)


def test_unfreezing_takes_the_prefix_back_to_what_is_still_frozen(model):
    everything = trainable(model)
    freezer = freeze(model, "vision_encoder")
    freezer.unfreeze(["vision_encoder.blocks.1.mlp.fc1"])
    assert trainable(model, "vision_encoder") == {
        f"vision_encoder.{name}.{part}"
        for name in ("blocks.1.ln1", "blocks.1.ln2", "blocks.1.mlp.fc1", "layer_norm") for part in ("weight", "bias")
    }  # fmt: skip
    assert not needs_gradient(model)["vision_encoder.blocks.0"]
    freezer.unfreeze(list(freezer.decided))
    assert trainable(model) == everything


def test_probes_change_nothing_where_nothing_is_unfrozen():
    """No weight moves, frozen or not, and the clipping does not see the probe's gradients."""
    probed, plain = unfreezing_loop(unfreeze_factor=1e9), unfreezing_loop(unfreeze_factor=None)
    probes = []

    def look(step):
        weights = [weight for name in probed.monitor.frozen for weight in probed.monitor.by_name[name].weights]
        if weights and all(weight.grad is not None for weight in weights):
            probes.append(step)

    probed.on_backward = look
    probed.run()
    plain.run()
    assert probed.monitor.frozen == plain.monitor.frozen
    assert len(plain.monitor.frozen) == 8
    assert probes == [6, 9, 12, 15]
    assert probed.clip_norms == plain.clip_norms
    assert same_weights(probed.model, plain.model)
    assert trainable(probed.model) == trainable(plain.model)


def test_a_run_does_not_end_in_a_probe():
    loop = unfreezing_loop(vision_tau=ALWAYS, language_tau=ALWAYS, probe_interval=6).run()
    assert loop.step == 5
    assert not any(weight.requires_grad for component in loop.monitor.components for weight in component.weights)


def test_a_component_whose_gradient_has_grown_trains_again_and_may_freeze_again():
    loop = unfreezing_loop(vision_attention_tau=ALWAYS)
    monitor, vision = loop.monitor, loop.model.vision_encoder
    loop.run(until=7)
    assert list(monitor.frozen.values()) == [5] * 8
    assert trainable(vision) == set()
    kept = copy.deepcopy(vision)
    loop.run(until=9)
    assert same_weights(vision, kept)  # not in the step of the probe itself
    events = [event for event in monitor.events if event.get("unfrozen")]
    mlp = [name for name in monitor.by_name if name.startswith("vision_encoder") and "mlp" in name]
    assert [event["name"] for event in events] == mlp
    assert all(event["step"] == 9 and event["value"] > 3 * event["tau"] == 150 for event in events)
    assert "step 9: unfroze 4 of 8 vision matrices (4 frozen): tau 50" in loop.lines
    assert sum(line.startswith("step 9: unfroze") for line in loop.details) == 4
    # The prefix is gone: norms, embedding and the last norm train too; the attention's matrices do not.
    assert trainable(vision) == {name for name, _ in vision.named_parameters() if "attn" not in name}
    loop.run(until=10)
    fc1 = vision.blocks[0].mlp.fc1.weight
    assert not torch.equal(fc1, kept.blocks[0].mlp.fc1.weight)
    assert torch.equal(vision.blocks[0].attn.qkv_proj.weight, kept.blocks[0].attn.qkv_proj.weight)
    assert [loop.optimizer.state[p]["step"].item() for p in (fc1, vision.layer_norm.weight)] == [1, 1]
    measured = {name for name, value in monitor.latest.items() if value is not None and "vision" in name}
    assert measured == set(mlp)
    loop.run()
    assert {monitor.frozen[name] for name in mlp} == {13}
    assert trainable(vision) == set()
