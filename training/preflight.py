"""What the names and paths in the settings can tell before torch is imported: what is absent or out of reach."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data import easy_vqa
from data.hub import require_hub
from data.mixture import sets_of
from data.options import RowOptions
from models.config import SCRATCH
from training.arguments import Settings, end
from training.checkpoint_folder import find_checkpoint
from training.trackers import check_tracker

HUB_TIMEOUT_S = 2.5
CHECKPOINTS = ("resume_weights", "vlm_checkpoint_path")  # flags that name one
FILE_ENDINGS = (
    ".parquet", ".jsonl", ".json", ".arrow", ".csv", ".tsv", ".yaml", ".zip", ".tar", ".tgz", ".gz", ".zst", ".gguf",
)  # fmt: skip

# Folders of data that recipes name, and what makes each.
MADE_BY = {
    "shapes_rows": "python scripts/make_shapes.py --output shapes_rows",
    "nlvr_rows": "python scripts/prepare_nlvr.py NLVR --output nlvr_rows",
}


class Source(NamedTuple):
    """Something that a run reads before its first step, from this machine or from the hub."""

    flag: str
    name: str
    kind: str  # what the hub's cache calls it: datasets or models

    def is_here(self) -> bool:
        """Whether this machine has it as a file or folder."""
        return Path(self.name).expanduser().exists()

    def is_path(self) -> bool:
        """Whether the name can be a path alone; another one may be a hub id as well."""
        if self.flag in CHECKPOINTS and ("/" not in self.name or Path(self.name).parent.is_dir()):
            return True
        return (
            self.name.count("/") > 1 or "\\" in self.name or self.name[:1] in "/.~" or self.name.endswith(FILE_ENDINGS)
        )

    def made_by(self) -> str:
        """What to do for a file of a recipe that one of this project's scripts makes, to follow its name."""
        commands = [MADE_BY[part] for part in Path(self.name).parts if part in MADE_BY]
        return f"; first run: {commands[0]}" if commands else ""

    def is_cached(self) -> bool:
        """Whether the hub's cache on this machine holds a snapshot."""
        from huggingface_hub import constants

        folder = Path(constants.HF_HUB_CACHE) / f"{self.kind}--{self.name.replace('/', '--')}" / "snapshots"
        return folder.is_dir() and any(folder.iterdir())


def check_paths(settings: Settings) -> Settings:
    """The settings, where all that they name is there; else ends the program with every error at once."""
    if problems := path_problems(settings) or hub_problems(settings):
        end(problems)
    return settings


def path_problems(settings: Settings) -> list[str]:
    """Every file, folder or package that is named and absent, and a run folder that exists already. Asks no network."""
    cfg = settings.train
    found: list[str] = []
    for source in sources(settings):
        if source.is_path() and not source.is_here():
            origin = "" if source.flag in settings.given else f" (from {settings.recipe} or a default)"
            found.append(f"--{source.flag} {source.name}: no such file or folder{origin}{source.made_by()}")
        elif source.flag in CHECKPOINTS and source.is_here():
            try:
                find_checkpoint(source.name)
            except FileNotFoundError as error:
                found.append(f"--{source.flag} {source.name}: {error}")
    if cfg.resume not in (None, "auto") and not Path(cfg.resume).is_dir():
        found.append(f"--resume {cfg.resume}: no such folder")
    if cfg.run_name and cfg.resume is None and not cfg.dry_run and run_folder(settings).exists():
        found.append(f"--run_name {cfg.run_name}: {run_folder(settings)} exists already; --resume auto continues it")
    output = Path(cfg.output_dir)
    if file := next((path for path in (output, *output.parents) if path.is_file()), None):
        found.append(f"--output_dir {cfg.output_dir}: {file} is a file, must be a folder")
    configs = [cfg, *(one.config(cfg) for one in sets_of(cfg))]
    for check, given in ((check_tracker, cfg), *((RowOptions.of, config) for config in configs)):
        try:
            check(given)
        except ValueError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def hub_problems(settings: Settings) -> list[str]:
    """What has to come from the hub and cannot: one request, and only where the hub's cache does not have all of it."""
    from huggingface_hub import constants

    if settings.train.dry_run:
        return []
    needed = [source for source in sources(settings) if not source.is_here() and not source.is_cached()]
    if not needed:
        return []
    names = ", ".join(f"--{source.flag} {source.name}" for source in needed)
    if constants.HF_HUB_OFFLINE:
        return [f"{names}: neither on this machine nor in the hub's cache, and HF_HUB_OFFLINE is set"]
    try:
        require_hub(names, "a local folder", HUB_TIMEOUT_S)
    except ConnectionError as error:
        return [str(error)]
    return []


def sources(settings: Settings) -> Iterator[Source]:
    """The data and the pretrained weights that the run reads; those of a checkpoint that it continues are its own."""
    vlm, cfg = settings.vlm, settings.train
    if not cfg.dry_run:
        yield from data_sources(settings)
    if cfg.resume is not None and (cfg.resume != "auto" or run_folder(settings).exists()):
        return
    if settings.weights is not None:
        yield Source(*settings.weights, "models")
        return
    flags = ("vit_model_type", "lm_model_type") if vlm.vlm_load_backbone_weights else ()
    for flag in (*flags, "lm_tokenizer"):
        name = getattr(vlm, flag)
        if flag == "lm_tokenizer" and flags and name == vlm.lm_model_type:
            continue
        if name not in (SCRATCH, easy_vqa.NAME):
            yield Source(flag, name, "models")


def data_sources(settings: Settings) -> Iterator[Source]:
    """The data sets that the run reads, without the embedded one."""
    cfg = settings.train
    named = [("mixture" if cfg.mixture else "train_dataset_path", path) for path in cfg.train_data]
    named += [(flag, path) for flag in ("val_dataset_path", "test_dataset_path") if (path := getattr(cfg, flag))]
    yield from (Source(flag, path, "datasets") for flag, path in named if path != easy_vqa.NAME)


def run_folder(settings: Settings) -> Path:
    """The folder of a run with --run_name."""
    return Path(settings.train.output_dir) / (settings.train.run_name or "")
