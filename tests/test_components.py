"""The matrices that are found in the models of other libraries: which, how often, and in which tower.

What is expected is written down here model by model, from the architectures, for random models of a few weights.
"""

from collections import Counter

import pytest
import torch
import torch.nn as nn

from grades import find_components

WIDTH, INNER, LAYERS, VISION_LAYERS, EXPERTS = 32, 48, 2, 3, 4
TEXT = {
    "vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": VISION_LAYERS, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
QWEN_VISION = {
    "depth": VISION_LAYERS, "hidden_size": WIDTH, "intermediate_size": INNER, "num_heads": 4, "out_hidden_size": WIDTH,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA_BLOCK = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CLIP_BLOCK = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

EXPERT_BLOCK = [*ATTENTION, "gate_up_proj", "down_proj"]  # each a stack of all experts
SIGLIP = {"vision_config": VISION | {"model_type": "siglip_vision_model"}}
CLIP = {"vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 16}}
LLAMA, GPT2, QWEN_VL, PALIGEMMA = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2_5_VLForConditionalGeneration", "PaliGemmaForConditionalGeneration",
)  # fmt: skip


def text(model_type: str) -> dict:
    return {"text_config": TEXT | {"model_type": model_type}}


# The model's class: its settings, and the last part of the names of the matrices of a vision and of a language block.
MODELS = {
    LLAMA: (TEXT, [], LLAMA_BLOCK),
    "Qwen3ForCausalLM": (TEXT, [], LLAMA_BLOCK),
    "MistralForCausalLM": (TEXT, [], LLAMA_BLOCK),
    "Phi3ForCausalLM": (TEXT, [], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "Gemma3ForCausalLM": (TEXT, [], LLAMA_BLOCK),
    GPT2: (
        {"vocab_size": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 32},
        [],
        ["c_attn", "c_proj", "c_fc", "c_proj"],  # of the attention and of the MLP
    ),
    "MixtralForCausalLM": (TEXT | {"num_local_experts": EXPERTS}, [], EXPERT_BLOCK),
    "Qwen3MoeForCausalLM": (
        TEXT | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}, [], EXPERT_BLOCK,
    ),
    "Qwen2MoeForCausalLM": (
        TEXT | {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
        [],
        [*EXPERT_BLOCK, "gate_proj", "up_proj", "down_proj"],  # and a shared expert
    ),
    "GptOssForCausalLM": (TEXT | {"num_local_experts": EXPERTS}, [], EXPERT_BLOCK),
    QWEN_VL: (
        {"text_config": TEXT | MROPE, "vision_config": QWEN_VISION | {"fullatt_block_indexes": [2]}},
        ["qkv", "proj", "gate_proj", "up_proj", "down_proj"],
        LLAMA_BLOCK,
    ),
    "Qwen3VLForConditionalGeneration": (
        {
            "text_config": TEXT,
            "vision_config": QWEN_VISION | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        },
        ["qkv", "proj", "linear_fc1", "linear_fc2"],
        LLAMA_BLOCK,
    ),
    "SmolVLMForConditionalGeneration": (text("llama") | {"vision_config": VISION}, CLIP_BLOCK, LLAMA_BLOCK),
    "Idefics3ForConditionalGeneration": (text("llama") | {"vision_config": VISION}, CLIP_BLOCK, LLAMA_BLOCK),
    "LlavaForConditionalGeneration": (text("llama") | CLIP, CLIP_BLOCK, LLAMA_BLOCK),
    PALIGEMMA: (text("gemma") | SIGLIP, CLIP_BLOCK, LLAMA_BLOCK),
    "Gemma3ForConditionalGeneration": ({"text_config": TEXT, "vision_config": VISION}, CLIP_BLOCK, LLAMA_BLOCK),
}  # fmt: skip


def build(name: str, device: str = "meta") -> nn.Module:
    model = getattr(pytest.importorskip("transformers"), name)
    torch.manual_seed(0)
    with torch.device(device):
        return model(model.config_class(**MODELS[name][0]))


def tally(components) -> Counter:
    """How many matrices of which name there are in which block of which tower."""
    return Counter((c.tower, c.layer, c.name.rpartition(".")[2]) for c in components)


def expected(vision_block: list[str], language_block: list[str]) -> Counter:
    vision = [("vision", layer, kind) for layer in range(VISION_LAYERS) for kind in vision_block]
    return Counter(vision + [("language", layer, kind) for layer in range(LAYERS) for kind in language_block])


@pytest.mark.parametrize("name", MODELS)
def test_every_projection_matrix_of_both_towers_once(name):
    components = find_components(build(name))
    assert tally(components) == expected(*MODELS[name][1:])
    parameters = [p for component in components for p in component.parameters]
    assert len(set(parameters)) == len(parameters)
    assert len({component.name for component in components}) == len(components)
    assert len({(c.tower, c.layer, c.kind) for c in components}) == len(components)


def test_weights_are_measured_and_biases_freeze_with_them():
    attention, narrow, mlp = WIDTH * WIDTH, WIDTH * WIDTH // 2, WIDTH * INNER
    components = find_components(build(QWEN_VL))
    vision = [c for c in components if c.tower == "vision"]
    language = [c for c in components if c.tower == "language"]
    assert sum(c.elements for c in vision) == VISION_LAYERS * (4 * attention + 3 * mlp)
    assert sum(c.elements for c in language) == LAYERS * (2 * attention + 2 * narrow + 3 * mlp)
    assert all([p.dim() for p in c.parameters] == [2, 1] for c in vision)
    with_bias = {c.kind for c in language if len(c.parameters) == 2}
    assert with_bias == {"q_proj", "k_proj", "v_proj"}


def test_gpt2_stores_its_matrices_transposed_and_has_two_of_one_name():
    first = [c for c in find_components(build(GPT2)) if c.layer == 0]
    assert {c.kind: tuple(c.weights[0].shape) for c in first} == {
        "c_attn": (WIDTH, 3 * WIDTH),
        "attn.c_proj": (WIDTH, WIDTH),
        "c_fc": (WIDTH, 4 * WIDTH),
        "mlp.c_proj": (4 * WIDTH, WIDTH),
    }


def test_the_experts_of_a_layer_are_one_stack_a_matrix_and_routers_are_none():
    components = find_components(build("GptOssForCausalLM"))
    stacks = {c.name: [tuple(p.shape) for p in c.parameters] for c in components if "experts" in c.name}
    assert stacks == {
        f"model.layers.{layer}.mlp.experts.{kind}": shapes
        for layer in range(LAYERS)
        for kind, shapes in {
            "gate_up_proj": [(EXPERTS, WIDTH, 2 * INNER), (EXPERTS, 2 * INNER)],
            "down_proj": [(EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH)],
        }.items()
    }
    listed = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({
        "gate": nn.Linear(4, 3), "shared_expert_gate": nn.Linear(4, 1), "gate_proj": nn.Linear(4, 4),
        "router": nn.ModuleDict({"layer": nn.Linear(4, 3)}),
        "experts": nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 4)}) for _ in range(3)),
    })])})  # fmt: skip
    names = ["layers.0.gate_proj", *(f"layers.0.experts.{expert}.w1" for expert in range(3))]
    found = find_components(listed)
    assert [(c.name, c.layer) for c in found] == [(name, 0) for name in names]
    assert [c.kind for c in found] == ["gate_proj", *(f"experts.{expert}.w1" for expert in range(3))]


def test_the_input_projection_of_pytorchs_attention_is_a_component():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), num_layers=2)
    components = find_components(model)
    assert [c.kind for c in components if c.layer == 1] == ["in_proj", "out_proj", "linear1", "linear2"]
    assert [tuple(p.shape) for p in components[0].parameters] == [(24, 8), (24,)]


def test_convolutions_embeddings_norms_and_tables_in_a_block_are_none():
    block = nn.ModuleDict({
        "conv1d": nn.Conv1d(4, 4, 3), "relative_bias": nn.Embedding(4, 4), "norm": nn.LayerNorm(4),
        "proj": nn.Linear(4, 4),
    })  # fmt: skip
    block["table"] = nn.Module()
    block["table"].weight = nn.Parameter(torch.zeros(4, 4))
    block["table"].positions = nn.Parameter(torch.zeros(2, 4, 4))
    assert [c.name for c in find_components(nn.ModuleDict({"h": nn.ModuleList([block])}))] == ["h.0.proj"]


PATHS = {
    "vision": ["vision_tower.encoder.layers", "model.vision_model.layers", "visual.blocks", "image_encoder.layers"],
    "language": ["layers", "language_model.vision_experts", "text_model.encoder.layers"],  # the first word decides
    "audio": ["audio_tower.layers", "speech_encoder.layers"],
    None: ["visual.deepstack_merger_list", "model.connector.perceiver_resampler.layers", "qformer.encoder.layer",
           "aligner.layers"],
}  # fmt: skip


@pytest.mark.parametrize(("path", "tower"), [(path, tower) for tower in PATHS for path in PATHS[tower]])
def test_the_path_tells_the_tower(path, tower):
    model = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(2, 2)})])
    for part in reversed(path.split(".")):
        model = nn.ModuleDict({part: model})
    model["layers_of_another"] = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(2, 2)})])
    found = {c.name: c.tower for c in find_components(model)}
    assert found.get(f"{path}.0.fc1") == tower
    assert len(found) == (2 if tower else 1)


def test_frozen_and_integer_weights_are_left_alone():
    model = build(LLAMA)
    for layer in model.model.layers:
        layer.self_attn.requires_grad_(False)
        layer.mlp.up_proj.weight = nn.Parameter(torch.zeros(INNER, WIDTH, dtype=torch.uint8), requires_grad=False)
    assert tally(find_components(model)) == expected([], ["gate_proj", "down_proj"])


def test_a_matrix_that_two_modules_share_is_found_once():
    model = build(LLAMA)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    names = [c.name for c in find_components(model) if c.kind == "up_proj"]
    assert names == ["model.layers.0.mlp.up_proj"]


def test_wrappers_leave_no_trace_in_the_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = build(LLAMA)
    plain = [c.name for c in find_components(model)]
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    compiled = nn.ModuleDict({"_orig_mod": model})
    assert [c.name for c in find_components(nn.ModuleDict({"module": compiled}))] == plain


def adapted(name: str, **settings) -> nn.Module:
    peft = pytest.importorskip("peft")
    given = {"r": 4, "target_modules": "all-linear"} | settings
    return peft.get_peft_model(build(name, "cpu"), peft.LoraConfig(**given))


@pytest.mark.parametrize("name", [LLAMA, "Phi3ForCausalLM", GPT2, QWEN_VL, PALIGEMMA])
def test_an_adapted_matrix_is_one_component_of_its_adapter_alone(name):
    model = adapted(name)
    plain, found = find_components(build(name)), find_components(model)
    for component, base in zip(found, plain, strict=True):
        assert [getattr(component, key) == getattr(base, key) for key in ("name", "tower", "kind", "layer")] == [
            True
        ] * 4
        shape = base.weights[0].shape
        inner, outer = shape if name == GPT2 else reversed(shape)
        assert [tuple(weight.shape) for weight in component.weights] == [(4, inner), (outer, 4)]
        assert component.parameters == component.weights
        assert component.elements == 4 * (inner + outer)
    # all-linear leaves out the language model's head, and gives merger, projector and pooling head adapters too.
    adapters = {path: p.numel() for path, p in model.named_parameters() if "lora_" in path}
    beyond = [path for path in adapters if any(part in path for part in ("merger", "projector", "head"))]
    assert sum(c.elements for c in found) == sum(adapters.values()) - sum(adapters[path] for path in beyond)


def test_everything_trainable_of_an_adapter_freezes_with_it():
    model = adapted(QWEN_VL, use_dora=True, bias="lora_only", target_modules=["q_proj", "o_proj"])
    kinds = {c.kind: c for c in find_components(model) if c.tower == "language"}
    magnitude = (WIDTH,)
    assert [tuple(p.shape) for p in kinds["o_proj"].parameters] == [(4, WIDTH), (WIDTH, 4), magnitude]
    assert [tuple(p.shape) for p in kinds["q_proj"].parameters] == [(4, WIDTH), (WIDTH, 4), magnitude, (WIDTH,)]
    assert all(len(c.weights) == 2 for c in kinds.values())


def test_several_active_adapters_of_a_matrix_are_one_component_and_an_inactive_one_is_none():
    model = adapted(LLAMA, target_modules=["q_proj"])
    model.add_adapter("second", model.peft_config["default"].__class__(r=2, target_modules=["q_proj", "v_proj"]))
    assert {c.kind for c in find_components(model)} == {"q_proj"}
    model.base_model.set_adapter(["default", "second"])
    sizes = {c.kind: [tuple(w.shape) for w in c.weights] for c in find_components(model)}
    assert sizes == {
        "q_proj": [(4, WIDTH), (WIDTH, 4), (2, WIDTH), (WIDTH, 2)],
        "v_proj": [(2, WIDTH), (WIDTH // 2, 2)],
    }


def test_adapters_of_stacked_experts_are_told_apart():
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    components = find_components(adapted("MixtralForCausalLM", target_modules=["q_proj"], target_parameters=names))
    assert tally(components) == expected([], ["q_proj", "gate_up_proj", "down_proj"])
    stacks = {c.kind: c.elements for c in components}
    assert stacks["gate_up_proj"] == 4 * EXPERTS * (WIDTH + 2 * INNER)
    assert stacks["down_proj"] == 4 * EXPERTS * (WIDTH + INNER)


def test_a_base_that_trains_beside_its_adapter_is_no_component():
    model = adapted(LLAMA, target_modules=["q_proj"])
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.base_layer.requires_grad_(True)
    assert all(min(weight.shape) == 4 for c in find_components(model) for weight in c.weights)


def test_wholly_trained_copies_have_the_names_of_what_they_replace():
    model = adapted(LLAMA, target_modules=["q_proj"], modules_to_save=["down_proj"])
    assert {c.name for c in find_components(model) if c.layer == 0} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
    }


def test_a_model_without_components_lists_its_linears_once_a_block_and_not_without_end():
    model = build(QWEN_VL)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable projection matrix") as error:
        find_components(model)
    assert str(error.value).count("q_proj") == 1
    assert ".*.self_attn.q_proj" in str(error.value)
    many = nn.ModuleDict({f"linear_{i}": nn.Linear(1, 1) for i in range(1000)})
    with pytest.raises(ValueError, match="and 970 more") as error:
        find_components(many)
    assert len(str(error.value)) < 1000
    with pytest.raises(ValueError, match="named by proj_out"):
        find_components(build(LLAMA), ["proj_out"])
