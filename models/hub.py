"""The hub and local folders in its format: where a pretrained model lies, and how a checkpoint is uploaded.

Nothing here touches the network for what is local, or imports torch.
"""

import filecmp
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from models.config import VLMConfig

HUB_TIMEOUT_S = 5
CONFIG_FILES = ("config.json",)
WEIGHT_FILES = (*CONFIG_FILES, "*.safetensors", "*.safetensors.index.json")
WEIGHTS = "model.safetensors"
OLD_WEIGHTS = "pytorch_model.bin"  # fetched where the repository has no safetensors
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")

MODEL_CARD = """\
---
library_name: nanovlm
pipeline_tag: image-text-to-text
---

# {name}

A vision-language model of the nanoVLM family: {parts}.
Load it from a checkout of the training repository:

```python
from models.vision_language_model import VisionLanguageModel

model = VisionLanguageModel.from_pretrained("{repo_id}")
```
"""


class BackboneUnavailable(OSError):
    """A pretrained model that is not a local folder and that the hub does not provide."""


def hub_folder(name: str, flag: str, patterns: tuple[str, ...], revision: str | None = None) -> Path:
    """`name` itself if it is a folder, else the hub's snapshot of it, from the local cache if the hub does not answer.

    flag: the setting that an error names. patterns: the files of the repository that are needed. Raises
    BackboneUnavailable.
    """
    if Path(name).is_dir():
        return Path(name)
    if name.endswith(".gguf"):
        raise BackboneUnavailable(
            f"--{flag} {name}: must be a folder; convert the file with: python scripts/convert_gguf.py {name} FOLDER"
        )
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    files = list(patterns)
    try:
        # A single request with a timeout: the download would wait forever for a hub that does not answer.
        info = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_S)
        has = [sibling.rfilename for sibling in info.siblings or ()]
        if "*.safetensors" in files and OLD_WEIGHTS in has and not any(file.endswith(".safetensors") for file in has):
            files.append(OLD_WEIGHTS)
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HTTPError, OSError, HFValidationError) as error:
        reason = error
    try:
        cached = [*patterns, OLD_WEIGHTS]
        return Path(snapshot_download(name, revision=revision, allow_patterns=cached, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        first_line = (str(reason).splitlines() or [""])[0].rstrip(".")
        raise BackboneUnavailable(
            f"--{flag} {name}: no such local folder, and the hub could not be reached or does not have it "
            f"({type(reason).__name__}: {first_line}); must be a local folder or a hub id"
        ) from reason


def checkpoint_folder(path: str | Path, revision: str | None = None, flag: str = "vlm_checkpoint_path") -> Path:
    """The folder of a nanoVLM checkpoint: `path` itself if it is a local folder, else a snapshot of that hub id.

    flag: the setting that an error names. Raises BackboneUnavailable.
    """
    return hub_folder(str(path), flag, WEIGHT_FILES + TOKENIZER_FILES, revision)


def push_folder(save: Callable[[str], None], repo_id: str, private: bool = False, source: Path | None = None) -> None:
    """Upload what save(folder) writes, with a model card, to the hub repository repo_id, created if necessary.

    repo_id: in the user's own namespace where it has none. source: the checkpoint that the model was loaded from. Its
    tokenizer is uploaded too, and its own card, which says how it was trained, where the weights are still the same.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as name:
        save(name)
        folder, api = Path(name), HfApi()
        parts = VLMConfig.load(folder).in_words
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # now with a namespace
        card = MODEL_CARD.format(name=repo_id.split("/")[-1], repo_id=repo_id, parts=parts)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if source is not None:
            kept = [path for pattern in TOKENIZER_FILES for path in source.glob(pattern)]
            if _is_same(folder / WEIGHTS, source / WEIGHTS):
                kept += source.glob("README.md")
            for path in kept:
                shutil.copyfile(path, folder / path.name)
        api.upload_folder(repo_id=repo_id, folder_path=name, commit_message="Upload nanoVLM checkpoint")


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)
