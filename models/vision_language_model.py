"""The vision-language model: vision tower -> projector -> image slots of the token embeddings -> decoder -> loss.

Shapes: B rows, T positions, C lm_hidden_dim, N images (or tiles), M tokens of an image, L label positions, V rows of
the head.
"""

import json
import warnings
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from grades.files import write_json, written_beside
from models.attention import compute_dtype
from models.config import VLMConfig
from models.hub import checkpoint_folder, push_folder
from models.language_model import KVCache, LanguageModel
from models.lora import is_adapted, merged_state
from models.modality_projector import ModalityProjector
from models.tensors import copy_tensors, set_extra_rows, stored_tensors
from models.vision_transformer import ViT

EMBEDDING, HEAD, INV_FREQ = "decoder.token_embedding.weight", "decoder.head.weight", "decoder.rotary_embd.inv_freq"

# uint8, or float and normalised: [N, 3, S, S], or (nested) sequences of [n, 3, S, S] or [3, S, S]; None or empty: no
# image.
Images: TypeAlias = Union[torch.Tensor, Sequence["Images"], None]  # noqa: UP007  # `|` takes no string


class VisionLanguageModel(nn.Module):
    """ViT + projector + decoder. Takes ids and tensors, never text: tokenizer and images belong to `data`."""

    def __init__(self, cfg: VLMConfig, load_backbone: bool = False):
        """load_backbone: start from the pretrained vit_model_type and lm_model_type, whose sizes cfg then gets.

        Otherwise the weights are random and the sizes are cfg's.
        """
        super().__init__()
        self.cfg = cfg
        self.cross_entropy = summed_cross_entropy  # compiled along with the blocks
        self.loaded_from: Path | None = None  # checkpoint
        self.z_loss = 0.0  # in training, of the squared logarithm of the softmax's denominator at each label
        self._config_keys: frozenset[str] = frozenset()  # of its config.json
        self.loss_chunk_size = 0  # label positions whose logits are in memory at a time in training; 0: all
        self.vision_encoder = ViT.from_pretrained(cfg) if load_backbone else ViT(cfg)
        self.decoder = LanguageModel.from_pretrained(cfg) if load_backbone else LanguageModel(cfg)
        self.MP = ModalityProjector(cfg)

    @property
    def _saved_config_keys(self) -> frozenset[str]:
        """The keys of its config.json: VLMEvalKit looks here whether a checkpoint knows tiles. One with image_layout
        resize knows none, and gets one square. Raises ValueError with keep_aspect, as that square is filled up."""
        if self.cfg.keep_aspect:
            raise ValueError(
                "--keep_aspect True: must be False here; generate.py and evaluate.py keep an image's aspect"
            )
        return self._config_keys - ({"vlm_extra_tokens"} if self.cfg.image_layout == "resize" else set())

    def forward(
        self,
        input_ids: torch.Tensor,
        images: Images = None,
        attention_mask: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        *,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        branch_ids: torch.Tensor | None = None,
        image_slots: torch.Tensor | None = None,
        image_sources: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        label_weights: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        pool_index: torch.Tensor | None = None,
        loss_per_label: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """(logits [B, T, V], mean loss or None) as nanoVLM; with label_positions the summed loss alone.

        input_ids, targets: int [B, T]; targets are already shifted, -100 where there is no label.
        images: see Images. attention_mask: [B, T], zero at padding.
        Indices from the collator, so that the device need not search for them:
        image_slots, int [K]: flat positions in B * T that hold image tokens, in ascending order;
        image_sources, int [K]: for each of them its row of the N * M image embeddings (default: in order), so that
        rows can share an image; label_positions, int [L]: flat positions in B * T that have a target;
        label_weights, float32 [L]: how much each of them counts in the sum (default: 1).
        image_features, [N, patches, vit_feature_dim]: what the vision tower gave for `images`, which are then not
        needed. image_embeddings, [N, M, C]: what the projector made of them, in place of both.
        pool_index, int [M, K]: see ModalityProjector; image_sources then count its M image embeddings.
        loss_per_label: with label_positions, the loss of each of them without weights, float32 [L].
        position_ids, document_ids, branch_ids, int [B, T]: see LanguageModel.forward.
        """
        x = self.embed(
            input_ids, images, image_slots, image_sources, image_features, image_embeddings, pool_index=pool_index
        )
        response = targets != -100 if targets is not None and self.decoder.drops_responses() else None
        x = self.decoder(x, attention_mask, position_ids, document_ids, response=response, branch_ids=branch_ids)
        if label_positions is not None:
            assert targets is not None
            hidden = x.flatten(0, 1).index_select(0, label_positions)  # [L, C]
            labels = targets.flatten().index_select(0, label_positions)
            if loss_per_label:
                return self._losses(hidden, labels)
            return self._summed_loss(hidden, labels, label_weights)
        logits = self.decoder.head(x)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return logits, loss

    def _losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each of the hidden states [L, C] and int labels [L], by loss_chunk_size: float32 [L]."""
        size = self.loss_chunk_size or max(1, len(labels))
        chunks = zip(hidden.split(size), labels.split(size), strict=True)
        return torch.cat([F.cross_entropy(self.decoder.head(h).float(), of, reduction="none") for h, of in chunks])

    def _summed_loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy of hidden states [L, C] and int labels [L] times float32 weights [L], summed: float32 [].

        The float32 logits [L, V] can be the largest tensor of a step. With loss_chunk_size they are computed a chunk at
        a time, and again in the backward pass.
        """

        more = (self.z_loss,) if self.training and self.z_loss else ()

        def of_chunk(hidden: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
            return self.cross_entropy(self.decoder.head(hidden), labels, weights, *more)

        size = self.loss_chunk_size
        if not 0 < size < len(labels):
            return of_chunk(hidden, labels, weights)
        parts = [None] * -(-len(labels) // size) if weights is None else weights.split(size)
        chunks = zip(hidden.split(size), labels.split(size), parts, strict=True)
        if not torch.is_grad_enabled():
            return torch.stack([of_chunk(*chunk) for chunk in chunks]).sum()
        losses = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return torch.stack(losses).sum()

    def embed(
        self,
        input_ids: torch.Tensor,
        images: Images = None,
        image_slots: torch.Tensor | None = None,
        image_sources: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        *,
        pool_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Token embeddings [B, T, C] with image embeddings in the image slots; arguments as in `forward`.

        With mp_merge "add" the image embeddings are added to those of the tokens in the slots.

        Raises ValueError where input_ids do not hold one image token per image embedding.
        """
        x = self.decoder.token_embedding(input_ids)
        if image_embeddings is None:
            if image_features is None:
                images = _stack_images(images)
                if images is None:
                    return x
                image_features = self.vision_encoder(images)
            assert image_features is not None
            image_embeddings = self.MP(image_features, pool_index)
        image_embeddings = image_embeddings.view(-1, x.shape[-1])  # [N * M, C], or [M, C]
        if image_sources is not None:
            image_embeddings = image_embeddings.index_select(0, image_sources)
        if image_slots is None:
            image_slots = (input_ids.flatten() == self.cfg.image_token_id).nonzero().squeeze(1)
            if len(image_slots) != len(image_embeddings):
                length = self.cfg.mp_image_token_length
                images_of = f"of {length} tokens" if pool_index is None else "by pool_index"
                count = len(image_embeddings) // length if image_features is None else len(image_features)
                raise ValueError(
                    f"input_ids hold {len(image_slots)} image tokens, {count} images {images_of} make "
                    f"{len(image_embeddings)}"
                )
        image_embeddings, tokens = image_embeddings.to(x.dtype), x.flatten(0, 1)
        if self.cfg.mp_merge == "add":
            return tokens.index_add(0, image_slots, image_embeddings).view_as(x)
        return tokens.index_copy(0, image_slots, image_embeddings).view_as(x)

    def generate(self, input_ids: torch.Tensor, images: Images = None, *args: Any, **options: Any) -> torch.Tensor:
        """All that `stream` yields for the same arguments: int [B, at most max_new_tokens]."""
        return torch.stack(list(self.stream(input_ids, images, *args, **options)), dim=1)

    @torch.no_grad()  # not inference_mode, in which autocast would cast every weight again for each token
    def stream(
        self,
        input_ids: torch.Tensor,
        images: Images = None,
        attention_mask: torch.Tensor | None = None,
        max_new_tokens: int = 5,
        top_k: int | None = 50,
        top_p: float | None = 0.9,
        temperature: float = 0.5,
        greedy: bool = False,
        *,
        eos_token_id: int | None = None,
        image_slots: torch.Tensor | None = None,
        image_sources: torch.Tensor | None = None,
        pool_index: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Generator[torch.Tensor, None, None]:
        """Yields the next token id of each row, int [B], until all rows have ended; an ended one repeats its end token.

        Rows of different lengths are padded on the left, with attention_mask [B, T] zero there. The end token is
        eos_token_id, else cfg.lm_eos_token_id; without either every row gets max_new_tokens. Sampling: greedy, or from
        logits / temperature, limited to the top_k most likely tokens and to the most likely ones that reach top_p
        together. images, image_slots, image_sources, pool_index: as in `forward`. cache: holds the positions before
        input_ids, with their images, and room for the new ones; only without attention_mask. It takes in all but the
        last new token.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: must be >= 1")
        eos = self.cfg.lm_eos_token_id if eos_token_id is None else eos_token_id
        B, T = input_ids.shape
        images = _stack_images(images)
        if images is not None:  # as nanoVLM, whose callers leave them where they were decoded
            images = images.to(input_ids.device)
        x = self.embed(input_ids, images, image_slots, image_sources, pool_index=pool_index)
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(1) - 1).clamp_(min=0)
        if cache is None:
            cache = KVCache(self.cfg, B, T + max_new_tokens, x.device, compute_dtype(x))
        ended = torch.zeros(B, dtype=torch.bool, device=x.device)
        for step in range(max_new_tokens):
            hidden = self.decoder(x, attention_mask, positions, cache=cache)[:, -1]
            next_ids = _sample(self.decoder.head(hidden).float(), top_k, top_p, temperature, greedy)
            if eos is not None:
                next_ids = next_ids.masked_fill(ended, eos)
                ended |= next_ids == eos
            yield next_ids
            if step + 1 == max_new_tokens or ended.all():
                return
            x = self.decoder.token_embedding(next_ids)[:, None]
            if attention_mask is not None and positions is not None:
                attention_mask = F.pad(attention_mask, (0, 1), value=1)
                positions = positions[:, -1:] + 1

    @classmethod
    def from_pretrained(cls, path: str | Path, revision: str | None = None) -> "VisionLanguageModel":
        """A checkpoint in nanoVLM's format: a local folder with config.json and model.safetensors, or a hub id.

        Raises BackboneUnavailable without folder and hub, ValueError for tensors that do not fit.
        """
        folder = checkpoint_folder(path, revision)
        model = load_vlm_weights(cls(VLMConfig.load(folder)), folder)
        model.loaded_from = folder
        model._config_keys = frozenset(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (the tied head once) into the folder, created if necessary.

        LoRA adapters are written merged, under the plain model's names; in this model they stay separate.
        """
        from safetensors.torch import save_model

        plain = self
        if is_adapted(self):
            with torch.device("meta"):
                plain = VisionLanguageModel(self.cfg)
            plain.load_state_dict(merged_state(self), assign=True)

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", asdict(self.cfg))
        with written_beside(folder / "model.safetensors") as beside:
            save_model(plain, str(beside))

    def push_to_hub(self, repo_id: str | None = None, private: bool = False) -> None:
        """Upload weights, config, tokenizer and a model card to a hub repository (default cfg.hf_repo_name).

        Of a model from `from_pretrained` the card and the tokenizer are those of its folder: see push_folder.
        """
        push_folder(self.save_pretrained, repo_id or self.cfg.hf_repo_name, private, self.loaded_from)


def summed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None, z_loss: float = 0.0
) -> torch.Tensor:
    """Cross-entropy of logits [L, V] and int labels [L] times float32 weights [L], summed in float32: float32 [].

    z_loss: this much of the square of log(sum(exp(logits))) is added to each, before it is weighted.
    """
    logits = logits.float()
    if weights is None and not z_loss:
        return F.cross_entropy(logits, labels, reduction="sum")
    losses = F.cross_entropy(logits, labels, reduction="none")
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(dim=-1).square()
    return losses.sum() if weights is None else (losses * weights).sum()


def load_vlm_weights(model: VisionLanguageModel, folder: Path) -> VisionLanguageModel:
    """Fill the model with the nanoVLM checkpoint in the folder, and return it.

    Raises ValueError that lists every tensor that does not fit. A checkpoint from before the image token has no
    embeddings for the extra tokens: they start at the mean embedding, with a warning.
    """
    cfg = model.cfg
    stored, destinations = stored_tensors(folder), model.state_dict()
    if cfg.lm_tie_weights:  # one matrix, in the file under either name or both
        spare = HEAD if EMBEDDING in stored else EMBEDDING
        stored.pop(spare, None)
        destinations.pop(spare)
    if INV_FREQ not in stored:
        destinations.pop(INV_FREQ)
    base = cfg.lm_base_vocab_size
    short = [
        name
        for name in (EMBEDDING, HEAD)
        if name in destinations and name in stored and stored[name].shape[:1] == [base] != [cfg.lm_vocab_size]
    ]
    matrices = [destinations[name] for name in short]
    destinations |= {name: destinations[name][:base] for name in short}
    copy_tensors(str(folder), stored, destinations)
    for matrix in matrices:
        set_extra_rows(matrix, base)
    if short:
        message = f"{folder}: no rows for {cfg.extra_token_amount} extra tokens, they start at the mean"
        warnings.warn(message, stacklevel=3)
    return model


def _stack_images(images: Images) -> torch.Tensor | None:
    """All images in one tensor [N, 3, S, S]; None where there is none."""
    if images is None or isinstance(images, torch.Tensor):
        if images is None or images.numel() == 0:
            return None
        return images[None] if images.dim() == 3 else images
    stacked = [image for image in map(_stack_images, images) if image is not None]
    return torch.cat(stacked) if stacked else None


def _sample(
    logits: torch.Tensor, top_k: int | None, top_p: float | None, temperature: float, greedy: bool
) -> torch.Tensor:
    """The next id of each row: logits, float32 [B, V] -> int [B]. temperature 0 is greedy; None or 0 of top_k: all."""
    if greedy or temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # Drop a token where those before it already reach top_p; the most likely one always stays.
        dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
        dropped[:, 0] = False
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1).squeeze(1)
