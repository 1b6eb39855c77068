"""TRL's trainers with the callback, offline: what they do around the model that is trained."""

import copy

import pytest
import torch

import grades

WORDS = [f"word{i}" for i in range(20)]
STEPS = 8


@pytest.fixture(scope="module")
def hf():
    pytest.importorskip("trl")
    from tiny import trainer

    return trainer


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<unknown>", *WORDS]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", bos_token="<end>", unk_token="<unknown>"
    )


@pytest.fixture(scope="module")
def folder(hf, tokenizer, tmp_path_factory):
    """A saved model: TRL loads the reference model from there."""
    path = tmp_path_factory.mktemp("model")
    hf.llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def load(hf, folder, adapter):
    """The model as a user has it, and the peft_config that he gives the trainer. adapter: none, "new" or "trained"."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    if adapter == "trained":
        return get_peft_model(model, lora), None
    return model, lora if adapter else None


def texts(count, seed):
    """Rows of 4 to 7 words."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randint(len(WORDS), (4 + i % 4,), generator=generator).tolist() for i in range(count)]
    return [" ".join(WORDS[i] for i in row) for row in chosen]


def given(hf, folder, **others):
    return hf.arguments(folder, max_steps=STEPS, per_device_train_batch_size=2, bf16=False, **others)


@pytest.mark.parametrize("adapter", [None, "new"], ids=["full", "lora"])
def test_sft(hf, tokenizer, folder, tmp_path, adapter):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, lora = load(hf, folder, adapter)
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**given(hf, tmp_path), max_length=16, packing=True),
        train_dataset=Dataset.from_dict({"text": texts(80, 0)}), processing_class=tokenizer, peft_config=lora,
        callbacks=[callback],
    )  # fmt: skip
    hf.train_and_check(trainer, callback)
    assert any("grades/frozen_share" in log and "mean_token_accuracy" in log for log in trainer.state.log_history)


DPO = {
    "full": (None, {}),
    "synced": (None, {"sync_ref_model": True, "ref_model_sync_steps": 3}),
    "precomputed": (None, {"precompute_ref_log_probs": True}),
    # The reference is the model with its adapters switched off, or another adapter.
    "lora": ("new", {}),
    "lora goes on": ("trained", {"gradient_accumulation_steps": 2, "gradient_checkpointing": False}),
}


@pytest.mark.parametrize("case", DPO)
def test_dpo(hf, tokenizer, folder, tmp_path, case):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    adapter, others = DPO[case]
    model, lora = load(hf, folder, adapter)
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    rows = {"prompt": texts(16, 1), "chosen": texts(16, 2), "rejected": texts(16, 3)}
    trainer = DPOTrainer(
        model=model, args=DPOConfig(**given(hf, tmp_path, **others), max_length=16),
        train_dataset=Dataset.from_dict(rows), processing_class=tokenizer, peft_config=lora, callbacks=[callback],
    )  # fmt: skip
    reference = trainer.ref_model and copy.deepcopy(trainer.ref_model)
    hf.train_and_check(trainer, callback)
    assert (trainer.ref_model is None) == (case not in ("full", "synced"))
    if reference is not None:
        assert hf.same(trainer.ref_model, reference) == (case == "full")
        flags = [[p.requires_grad for p in one.parameters()] for one in (trainer.ref_model, reference)]
        assert flags[0] == flags[1]
        assert not hf.ours(trainer.ref_model)


@pytest.mark.parametrize("adapter", [None, "new"], ids=["full", "lora"])
def test_grpo_which_generates_while_it_trains(hf, tokenizer, folder, tmp_path, adapter):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, lora = load(hf, folder, adapter)
    callback = grades.GradEarlyStoppingCallback(hf.settings())
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
        args=GRPOConfig(
            **given(hf, tmp_path), num_generations=2, max_completion_length=6, beta=0.1, num_iterations=2,
        ),
        train_dataset=Dataset.from_dict({"prompt": texts(16, 4)}), processing_class=tokenizer, peft_config=lora,
        callbacks=[callback],
    )  # fmt: skip
    hf.train_and_check(trainer, callback)
    assert (trainer.ref_model is None) == bool(adapter)
