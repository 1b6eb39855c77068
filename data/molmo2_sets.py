"""The public data sets of nanoMolmo2's three stages: where each is, how large, under which licence, how it is read.

Numbers and licences are those of the sets' pages; None and "" where nobody has looked. The stages are those
of Molmo2's released scripts (launch_scripts/pretrain.py, sft.py): 1 pretraining, 2 fine-tuning, 3 the same in a long
context. What is on the hub today is asked before anything is fetched: see data.fetching.hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STAGES = {"1": "1", "2": "2", "3": "3", "pretraining": "1", "pretrain": "1", "sft": "2", "long": "3", "eval": "eval"}
TRAINING = ("2", "3")
INSIDE, LINKED, NONE = "in the rows", "links, fetched here", "none"
CLIPS = "clips of 16 other sets, not fetched"
COCO, YOUTUBE, TAR = "COCO's, not fetched", "videos, not fetched", "videos in archives, unpacked here"
ODC, SOME = "ODC-BY", ""
IMAGE_BYTES = 520_000  # of one picture on average: anthracite-org/pixmo-cap-images has 717k of them in 370 GB


@dataclass(frozen=True)
class PublicSet:
    """A data set on the hub."""

    repo: str
    group: str  # pixmo, molmo2, academic, text, other
    stages: tuple[str, ...]
    format: str  # the name by which data.conversations or data.set_formats reads its rows
    pictures: str = INSIDE
    rows: int | None = None  # a round number of thousands is about right
    gigabytes: float | None = None  # of the files on the hub, without what they link to
    licence: str = SOME
    files: tuple[str, ...] = ()  # patterns of those that are fetched; () for all
    link_columns: tuple[str, ...] = ()  # a URL each, or a list of them
    hash_column: str = ""  # SHA-256 of the bytes behind the first link
    revision: str | None = None  # a commit; None: the newest at the first download, then held by the lock file

    @property
    def name(self) -> str:
        """Its folder, and its name on the command line."""
        return self.repo.split("/")[1].lower()

    @property
    def kind(self) -> str:
        """hub: files that hold all; url: rows whose pictures are links; archive: packed files beside the rows."""
        return "url" if self.link_columns else "archive" if self.pictures == TAR else "hub"

    @property
    def about_rows(self) -> str:
        """As "about 717,000", "36,916" or "not known"."""
        if self.rows is None:
            return "not known"
        return f"{'about ' * (self.rows % 1000 == 0)}{self.rows:,}"

    @property
    def about_size(self) -> str:
        """Of the files on the hub, in GB."""
        return "not known" if self.gigabytes is None else f"{self.gigabytes:g} GB"


def _linked(repo: str, group: str, stages: tuple[str, ...], read_as: str, rows: int | None, hashed: bool = True,
            gigabytes: float | None = None, licence: str = ODC, column: str = "image_url") -> PublicSet:  # fmt: skip
    return PublicSet(
        repo, group, stages, read_as, LINKED, rows, gigabytes, licence,
        link_columns=(column,), hash_column="image_sha256" if hashed else "",
    )  # fmt: skip


QUESTIONS, CAPTIONS, SEVERAL = "questions and answers", "captions", "multi-image points"
VQA = ("text-vqa", "okvqa", "vqa2-2014", "tally-qa", "a-ok-vqa")
SETS: tuple[PublicSet, ...] = (
    _linked("allenai/pixmo-cap", "pixmo", ("1", *TRAINING), "captions with transcripts", 717_000, False, 1.1),
    _linked("allenai/pixmo-points", "pixmo", ("1", *TRAINING), "pixmo-points", 2_376_222),
    _linked("allenai/pixmo-count", "pixmo", ("1", *TRAINING, "eval"), "pixmo-count", 37_996),
    _linked("allenai/pixmo-ask-model-anything", "pixmo", TRAINING, QUESTIONS, 162_000),
    _linked("allenai/pixmo-cap-qa", "pixmo", TRAINING, "question chains", 190_000, False, licence=SOME),
    _linked("allenai/pixmo-point-explanations", "pixmo", TRAINING, "point explanations", None, False),
    PublicSet("allenai/pixmo-docs", "pixmo", TRAINING, "question pairs", INSIDE, 255_000, 54.6, ODC),
    PublicSet("allenai/CoSyn-400K", "pixmo", TRAINING, "question pairs"),
    PublicSet("allenai/CoSyn-point", "pixmo", ("1", *TRAINING), "CoSyn-point", rows=68_000),
    PublicSet("allenai/Molmo2-Cap", "molmo2", TRAINING, "video captions", YOUTUBE, 104_000),
    PublicSet("allenai/Molmo2-AskModelAnything", "molmo2", TRAINING, "video questions", YOUTUBE, 43_000),
    PublicSet("allenai/Molmo2-VideoCapQA", "molmo2", TRAINING, "video multiple choice", YOUTUBE, 1_000_000,
              licence=ODC),
    PublicSet("allenai/Molmo2-VideoSubtitleQA", "molmo2", TRAINING, "video multiple choice", YOUTUBE, 300_000,
              licence=ODC),
    PublicSet("allenai/Molmo2-VideoPoint", "molmo2", TRAINING, "video points", YOUTUBE, 330_000, licence=ODC),
    PublicSet("allenai/molmo2-track-instruction", "molmo2", TRAINING, "video tracks", CLIPS),
    _linked("allenai/Molmo2-MultiImageQA", "molmo2", TRAINING, "question pairs", 45_000, False, licence=SOME,
            column="image_urls"),
    PublicSet("allenai/Molmo2-SynMultiImageQA", "molmo2", TRAINING, "question pairs", rows=188_000),
    _linked("allenai/Molmo2-MultiImagePoint", "molmo2", TRAINING, SEVERAL, 472_943, False, column="image_urls"),
    # What the released scripts load, the same rows with file names of their makers; the one above is as published.
    _linked("allenai/molmo2-pixmo-multi-points", "molmo2", (), SEVERAL, 470_000, False, licence=SOME,
            column="image_urls"),
    *(PublicSet(f"allenai/molmo2-{name}", "academic", TRAINING, "message lists", COCO) for name in VQA),
    PublicSet("HuggingFaceM4/ChartQA", "academic", (*TRAINING, "eval"), "chart questions"),
    PublicSet("lmms-lab/DocVQA", "academic", (*TRAINING, "eval"), QUESTIONS),
    PublicSet("lmms-lab/LLaVA-Video-178K", "academic", TRAINING, "LLaVA conversations", TAR),
    PublicSet("allenai/molmo2-tulu4-classified", "text", ("1", *TRAINING), "OpenAI messages", NONE, 940_000,
              licence=ODC),
    PublicSet("allenai/tulu-3-sft-mixture", "text", (), "OpenAI messages", NONE, 940_000, licence=ODC),
    PublicSet("liuhaotian/LLaVA-Instruct-150K", "other", (), "LLaVA conversations", COCO, 158_000,
              files=("llava_instruct_150k.json",)),
    PublicSet("HuggingFaceH4/llava-instruct-mix-vsft", "other", (), "OpenAI messages"),
    _linked("merve/pixmo-cap-tiny", "other", (), "captions with transcripts", 7_170, False, licence=SOME),
    PublicSet("anthracite-org/pixmo-cap-images", "other", (), CAPTIONS, rows=717_000, gigabytes=370.0),
)  # fmt: skip
BY_NAME = {one.name: one for one in SETS}


def named(name: str) -> PublicSet:
    """The set of that name or hub id, in any case. Raises ValueError that lists them."""
    found = BY_NAME.get(name.lower().rpartition("/")[2])
    if found is None or ("/" in name and found.repo.lower() != name.lower()):
        raise ValueError(f"--dataset {name}: must be one of {', '.join(BY_NAME)}")
    return found


def of_stage(stage: str) -> list[PublicSet]:
    """The sets of a stage by one of the names in STAGES; of "all" those of any stage."""
    if stage == "all":
        return [one for one in SETS if one.stages]
    return [one for one in SETS if STAGES[stage] in one.stages]


def table_lines(sets: Sequence[PublicSet]) -> list[str]:
    """The sets as a table in Markdown."""
    head = ("name", "hub id", "stages", "rows", "size on the hub", "pictures", "licence", "read as")
    lines = [
        (f"`{one.name}`", one.repo, " ".join(one.stages) or "-", one.about_rows, one.about_size, one.pictures,
         one.licence or "look there", one.format)
        for one in sets
    ]  # fmt: skip
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *lines)]
