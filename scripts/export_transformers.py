"""Turn a checkpoint into a folder that transformers reads, as SmolVLMForConditionalGeneration, and back.

    python scripts/export_transformers.py grades_output/<run name> exported
    python scripts/export_transformers.py --back exported checkpoint

The first is a run folder, a checkpoint folder or a hub id. In exported, AutoProcessor and AutoModelForImageTextToText
find all they need. --back takes such a folder after any training, or the folder of a LoRA adapter of peft for it, and
makes a checkpoint of this project of it.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grades.files import write_json, written_beside
from models.config import VLMConfig
from models.hub import checkpoint_folder
from training.checkpoint_folder import find_checkpoint

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, ProcessorMixin, SmolVLMConfig

    from models.vision_language_model import VisionLanguageModel

OURS = "nanovlm_config"  # in the exported config.json: the checkpoint's own
ADAPTER = "adapter_config.json"
# Makes a text of the list of parts that transformers' users write, in which an image is the tokens in {image}.
TEXT_OF_PARTS = """\
{{%- set flat = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- set said = namespace(text='') -%}}
{{%- if message['content'] is not string and message['content'] is iterable -%}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}{{%- set said.text = said.text + {image} -%}}
{{%- elif part['type'] == 'text' -%}}{{%- set said.text = said.text + part['text'] -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- set flat.messages = flat.messages + [dict(message, content=said.text)] -%}}
{{%- else -%}}{{%- set flat.messages = flat.messages + [message] -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = flat.messages -%}}{{{{ '' }}}}"""


def export(folder: Path, output: Path, lm_tokenizer: str | None = None) -> list[str]:
    """Write the checkpoint in `folder` into the new folder `output`, which appears only when it is complete.

    lm_tokenizer: instead of the checkpoint's. Returns notes for the user. Raises ValueError where the model cannot be
    expressed, and OSError.
    """
    from safetensors.torch import save_file

    from data.text import get_tokenizer
    from models.vision_language_model import VisionLanguageModel

    cfg = VLMConfig.load(folder)
    if problems := inexpressible(cfg):
        raise ValueError(f"{folder}: " + "; ".join(problems))
    cfg.lm_tokenizer = lm_tokenizer or cfg.lm_tokenizer
    tokenizer = get_tokenizer(cfg, None if lm_tokenizer else folder)
    model = VisionLanguageModel.from_pretrained(folder)
    config = smolvlm_config(cfg, tokenizer)
    with written_beside(output) as beside:
        beside.mkdir(parents=True)
        config.save_pretrained(beside)
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in smolvlm_tensors(model).items()}
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        generation = {
            "do_sample": False,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        write_json(beside / "generation_config.json", generation)
        processor_of(cfg, tokenizer).save_pretrained(beside)
    return notes(cfg)


def inexpressible(cfg: VLMConfig) -> list[str]:
    """What of the model SmolVLM's class does not compute."""
    problems = []
    if cfg.lm_attn_scaling != 1.0:
        problems.append(f"lm_attn_scaling {cfg.lm_attn_scaling}: must be 1.0, SmolVLM has no such factor")
    only = {
        "vit_architecture": "siglip", "vit_feature_layers": [], "lm_qk_norm": False, "lm_qkv_bias": False,
        "mp_type": "pixel_shuffle", "mp_merge": "replace", "keep_aspect": False,
    }  # fmt: skip
    for name, value in only.items():
        if getattr(cfg, name) != value:
            problems.append(f"{name} {getattr(cfg, name)}: must be {value}, as in SmolVLM")
    if cfg.image_layout == "molmo_crops":
        problems.append("image_layout molmo_crops: must be tiles or resize, SmolVLM knows no such crops")
    if len(cfg.pixel_scaling()) > 1:
        problems.append(f"image_mean {cfg.image_mean}, image_std {cfg.image_std}: must be equal for all colors here")
    if not keeps_positions(cfg.vit_grid):
        problems.append(
            f"vit_img_size {cfg.vit_img_size} / vit_patch_size {cfg.vit_patch_size} = {cfg.vit_grid}: of so many "
            "patches a side SmolVLM gives two the same position, by rounding"
        )
    return problems


def keeps_positions(grid: int) -> bool:
    """Whether SmolVLM numbers grid x grid patches in order: it computes the numbers in float32, for any shape."""
    import torch
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionConfig, SmolVLMVisionEmbeddings

    numbers: Any = SmolVLMVisionEmbeddings(SmolVLMVisionConfig(hidden_size=1, image_size=grid, patch_size=1))
    with torch.no_grad():
        numbers.patch_embedding.weight.zero_()
        numbers.patch_embedding.bias.zero_()
        numbers.position_embedding.weight.copy_(torch.arange(grid * grid)[:, None])
        found = numbers(torch.zeros(1, 3, grid, grid), torch.ones(1, grid, grid, dtype=torch.bool))
    return torch.equal(found.flatten(), torch.arange(grid * grid).float())


def smolvlm_config(cfg: VLMConfig, tokenizer: "PreTrainedTokenizerFast") -> "SmolVLMConfig":
    """The same model in transformers' words, with ours kept beside."""
    from transformers import LlamaConfig, SmolVLMConfig

    text = LlamaConfig(
        vocab_size=int(cfg.lm_vocab_size or 0), hidden_size=cfg.lm_hidden_dim, intermediate_size=cfg.lm_inter_dim,
        num_hidden_layers=cfg.lm_n_blocks, num_attention_heads=cfg.lm_n_heads, num_key_value_heads=cfg.lm_n_kv_heads,
        head_dim=cfg.head_dim, max_position_embeddings=cfg.lm_max_position_embeddings,
        rms_norm_eps=cfg.lm_rms_eps, rope_parameters={"rope_type": "default", "rope_theta": float(cfg.lm_re_base)},
        tie_word_embeddings=cfg.lm_tie_weights, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # that token would get no gradient, and ours is often the end token
    )  # fmt: skip
    vision = {
        "hidden_size": cfg.vit_hidden_dim, "intermediate_size": cfg.vit_inter_dim, "image_size": cfg.vit_img_size,
        "patch_size": cfg.vit_patch_size, "num_attention_heads": cfg.vit_n_heads, "layer_norm_eps": cfg.vit_ln_eps,
        "num_hidden_layers": cfg.vit_n_blocks, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    tokens = [list(token) for token in cfg.vlm_extra_tokens.items()]  # transformers would sort a mapping
    config = SmolVLMConfig(
        text_config=text.to_dict(), vision_config=vision, scale_factor=cfg.mp_pixel_shuffle_factor,
        image_token_id=cfg.image_token_id, tie_word_embeddings=cfg.lm_tie_weights, dtype="float32",
    )  # fmt: skip
    config.update({OURS: asdict(cfg) | {"vlm_extra_tokens": tokens}})
    config.architectures = ["SmolVLMForConditionalGeneration"]
    return config


def smolvlm_tensors(model: "VisionLanguageModel") -> "dict[str, torch.Tensor]":
    """SmolVLM's tensor names -> our tensors, or the part of one that a name fills."""
    found = {f"model.vision_model.{name}": tensor for name, tensor in model.vision_encoder.siglip_tensors().items()}
    found |= {f"model.text_model.{name}": tensor for name, tensor in model.decoder.llama_tensors().items()}
    if (head := found.pop("model.text_model.lm_head.weight", None)) is not None:
        found["lm_head.weight"] = head
    found["model.connector.modality_projection.proj.weight"] = model.MP.proj.weight
    return found


def has_tiles(cfg: VLMConfig) -> bool:
    """Whether a picture can become more than one image of the vision tower."""
    return cfg.image_layout == "tiles" and cfg.max_img_size > cfg.vit_img_size


def processor_of(cfg: VLMConfig, tokenizer: "PreTrainedTokenizerFast") -> "ProcessorMixin":
    """What makes the model's inputs in transformers, with the chat template.

    Without tiles a class of transformers that writes an image as so many image tokens and nothing else, DeepSeek-VL's;
    SmolVLM's own writes more. None writes tiles as nanoVLM does, so that with tiles the folder gets a file of its own.
    """
    from transformers import DeepseekVLProcessor

    try:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as Images
    except ImportError:  # earlier versions of transformers, where it has the name that is written into the folder
        from transformers import Idefics3ImageProcessor as Images  # type: ignore[assignment]

    tokens = cfg.vlm_extra_tokens
    name = "" if has_tiles(cfg) else tokens.get("global_image_token", tokens.get("r1c1", ""))
    image = name + tokens["image_token"]
    template = TEXT_OF_PARTS.format(image=json.dumps(image)) + cfg.lm_chat_template
    tokenizer = with_image_token(tokenizer, tokens["image_token"], cfg.lm_max_position_embeddings)
    tokenizer.chat_template = template
    if has_tiles(cfg):
        return tiles_processor(cfg, tokenizer, template)
    images = Images(
        do_resize=False, do_image_splitting=False, max_image_size={"longest_edge": cfg.vit_img_size}, resample=3,
        image_mean=[mean_in_use(cfg)] * 3, image_std=[one(cfg.image_std)] * 3,
    )  # fmt: skip
    return DeepseekVLProcessor(images, tokenizer, template, num_image_tokens=cfg.mp_image_token_length)


def tiles_processor(cfg: VLMConfig, tokenizer: "PreTrainedTokenizerFast", template: str) -> "ProcessorMixin":
    """That of scripts/processing_nanovlm.py, which save_pretrained copies."""
    from scripts.processing_nanovlm import NanoVLMImageProcessor, NanoVLMProcessor

    NanoVLMImageProcessor.register_for_auto_class()
    NanoVLMProcessor.register_for_auto_class()
    images = NanoVLMImageProcessor(
        cfg.vit_img_size, cfg.max_img_size, cfg.resize_to_max_side_len, "global_image_token" in cfg.vlm_extra_tokens,
        mean_in_use(cfg), one(cfg.image_std),
    )  # fmt: skip
    return NanoVLMProcessor(images, tokenizer, cfg.mp_image_token_length, cfg.vlm_extra_tokens, template)


def mean_in_use(cfg: VLMConfig) -> float:
    """image_mean, or beside it by less than a float32 pixel shows where a pixel value would become exactly 0: SmolVLM
    takes a tile of zeros (with mean 0 a black one) for one that is not there."""
    mean = one(cfg.image_mean)
    levels = 255 * mean
    return mean - 1e-7 if abs(levels - round(levels)) < 1e-6 else mean


def one(value: float | list[float]) -> float:
    """The number for all colors, which `inexpressible` has checked to be the same."""
    return value[0] if isinstance(value, list) else value


def with_image_token(
    tokenizer: "PreTrainedTokenizerFast", image_token: str, positions: int
) -> "PreTrainedTokenizerFast":
    """A copy that also knows the image token and the model's positions, and that adds no token to a text."""
    from transformers import PreTrainedTokenizerFast

    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    known = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=adding_nothing(tokenizer.backend_tokenizer), extra_special_tokens={"image_token": image_token},
        padding_side="left", model_max_length=positions, model_input_names=["input_ids", "attention_mask"], **known,
    )  # fmt: skip


def adding_nothing(backend: "Tokenizer") -> "Tokenizer":
    """A copy that puts no token around a text, such as a BOS: training does not either."""
    from tokenizers import Tokenizer

    stored = json.loads(backend.to_str())
    own = stored["post_processor"] or {}
    kept = [part for part in own.get("processors", [own]) if part.get("type") == "ByteLevel"]  # moves offsets alone
    # Not None, for which transformers would put in its own.
    return Tokenizer.from_str(json.dumps(stored | {"post_processor": {"type": "Sequence", "processors": kept}}))


def notes(cfg: VLMConfig) -> list[str]:
    """What a user of the exported folder has to know."""
    found = []
    if has_tiles(cfg):
        found.append(
            "its pictures are cut into tiles, which no processor of transformers writes as nanoVLM does: AutoProcessor "
            "needs trust_remote_code=True for it (the model does not)"
        )
    if cfg.vit_dropout or cfg.lm_dropout:
        found.append(f"vit_dropout {cfg.vit_dropout} and lm_dropout {cfg.lm_dropout} are not in it: train without")
    return found


def back(folder: Path, output: Path) -> None:
    """Make a checkpoint of this project, the new folder `output`, of an exported folder or of an adapter for one.

    Raises ValueError where the folder was not exported by this project or its tensors no longer fit, and OSError.
    """
    from data.text import get_tokenizer
    from models.tensors import copy_tensors, stored_tensors
    from models.vision_language_model import VisionLanguageModel

    if (folder / ADAPTER).is_file():
        with tempfile.TemporaryDirectory() as merged:
            exported = merge(folder, Path(merged))
            return back(exported, output)
    stored_config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if OURS not in stored_config:
        raise ValueError(f"{folder}: its config.json has no {OURS}; must be a folder that this script has exported")
    cfg = VLMConfig.from_dict(stored_config[OURS] | {"vlm_extra_tokens": dict(stored_config[OURS]["vlm_extra_tokens"])})
    model = VisionLanguageModel(cfg)
    stored = stored_tensors(folder)
    if cfg.lm_tie_weights:
        stored.pop("lm_head.weight", None)
    copy_tensors(str(folder), stored, smolvlm_tensors(model))
    with written_beside(output) as beside:
        model.save_pretrained(beside)
        get_tokenizer(cfg, folder).save_pretrained(beside)


def merge(adapter: Path, merged: Path) -> Path:
    """Write the exported model with the adapter of peft added to its weights into `merged`, and return that."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    base = json.loads((adapter / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or not (Path(base) / "config.json").is_file():
        raise ValueError(f"{adapter / ADAPTER}: base_model_name_or_path {base!r}, must be the exported folder")
    model: Any = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), str(adapter))
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    return merged


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder, checkpoint folder or hub id; with --back an exported folder")
    parser.add_argument("output", type=Path, help="new folder")
    parser.add_argument("--lm_tokenizer", help="as in train.py, for a checkpoint without a tokenizer of its own")
    parser.add_argument("--back", action="store_true", help="from an exported folder, or an adapter, to a checkpoint")
    given = parser.parse_args(argv)
    try:
        if given.output.exists():
            raise ValueError(f"{given.output}: exists already; must be a new folder")
        given.output.parent.mkdir(parents=True, exist_ok=True)
        if given.back:
            back(Path(given.checkpoint), given.output)
        else:
            folder = checkpoint_folder(find_checkpoint(given.checkpoint), flag="checkpoint")
            for note in export(folder, given.output, given.lm_tokenizer):
                print(f"note: {note}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"export_transformers.py: error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
