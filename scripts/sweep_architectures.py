"""What GradES would watch in every architecture of transformers: built from its default configuration, without weights.

    python scripts/sweep_architectures.py                       # all, about ten minutes
    python scripts/sweep_architectures.py llama qwen2_5_vl      # only these model types

Models are built on the meta device with two layers where their configuration can be shortened; a configuration that
builds no model as it stands gets what is missing from SETTINGS. Writes OUT/architectures.json (every matrix, watched or
why not) and OUT/architectures.md (a line for each architecture). Exit code 1 where grades failed on a model that was
built. Some architectures need further packages (timm, torchvision, torchaudio ...); what is missing is said.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grades.fields import suggestion
from grades.listing import NO_MODEL, NO_PROJECTION, NO_TAU, Row, build, rows

LAYERS = 2
LAYER_NAMES = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers",
)  # fmt: skip
FORECAST, HEADS, WORDS = {"prediction_length": 4}, {"head_dim": 64}, {"vocab_size": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": FORECAST, "informer": FORECAST, "time_series_transformer": FORECAST, "ministral": HEADS,
    "hunyuan_v1_dense": HEADS, "hunyuan_v1_moe": HEADS, "hunyuan_vl_text": HEADS,
    "esm": WORDS, "wav2vec2-bert": WORDS, "wav2vec2-conformer": WORDS, "reformer": {"is_decoder": True},
    "beit": {"architectures": ["BeitForImageClassification"]}, "nemotron": {"num_key_value_heads": 8},
    "musicgen": {"architectures": ["MusicgenForConditionalGeneration"]},
    "musicgen_melody": {"architectures": ["MusicgenMelodyForConditionalGeneration"]},
    "chameleon": {"vocabulary_map": {"<image>": 4}}, "emu3": {"vocabulary_map": {"<image>": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "sapiens2": {"architectures": ["Sapiens2Model"]}, "dbrx": {"attn_config": {"rope_theta": 1e4}},
}  # fmt: skip
WITHOUT_TIMM = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}


@dataclass
class Outcome:
    """One architecture."""

    model_type: str
    model: str = ""  # the class that was built
    error: str = ""  # why none was built
    failed: str = ""  # what grades said of it where it failed
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    def watched(self) -> Counter[str]:
        """Matrices by tower."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            if is_component(row):
                counts[row.tower] += row.count
        return counts


def main(argv: list[str] | None = None) -> int:
    """Sweep, write the tables, print the summary; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*", help="of transformers; none: all")
    parser.add_argument("--out", type=Path, default=Path("grades_output/architectures"), help="folder of the tables")
    given = parser.parse_args(argv)
    known = model_types()
    for unknown in sorted(set(given.model_types) - set(known)):
        parser.error(f"{unknown}: must be a model type of transformers{suggestion(unknown, known)}")
    given.out.mkdir(parents=True, exist_ok=True)  # before the ten minutes
    quiet()
    outcomes = []
    for model_type in given.model_types or known:
        outcomes.append(sweep(model_type))
        last = outcomes[-1]
        print(f"{model_type}: {last.failed or last.error or dict(last.watched())} ({last.seconds:.1f} s)", flush=True)
    found = [asdict(outcome) for outcome in outcomes]
    (given.out / "architectures.json").write_text(json.dumps(found), encoding="utf-8")
    text = "\n".join([*summary(outcomes), "", lines(outcomes)])
    (given.out / "architectures.md").write_text(text, encoding="utf-8")
    print("", *summary(outcomes), sep="\n")
    return int(any(outcome.failed for outcome in outcomes))


def quiet() -> None:
    """No advice of transformers in between."""
    import transformers

    transformers.logging.set_verbosity_error()


def model_types() -> list[str]:
    """All that transformers knows, in alphabetical order."""
    from transformers import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def sweep(model_type: str) -> Outcome:
    """Build a model of the type and list its matrices."""
    begun, outcome = time.perf_counter(), Outcome(model_type)
    model = None
    for values in variants(model_type):
        try:
            model = build(values())
            break
        except Exception as error:  # of transformers: a default configuration may be of no model
            outcome.error = outcome.error or " ".join(str(error).split())[:200] or type(error).__name__
    if model is not None:
        outcome.model, outcome.error = type(model).__name__, ""
        try:
            outcome.rows = rows(model)
        except Exception as error:  # what this sweep is to find
            outcome.failed = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - begun
    return outcome


def variants(model_type: str) -> Iterator[Any]:
    """Functions that make a configuration: with few layers, as it is by default, and with a backbone not of timm."""
    from transformers import CONFIG_MAPPING

    kind, settings = CONFIG_MAPPING[model_type], SETTINGS.get(model_type, {})
    yield lambda: kind(**(shortened(kind(**settings)) | settings))
    yield lambda: kind(**settings)
    other = settings | WITHOUT_TIMM | {"backbone_config": CONFIG_MAPPING["resnet"]()}
    yield lambda: kind(**(shortened(kind(**other)) | other))


def shortened(config: Any) -> dict[str, Any]:
    """The arguments that give a configuration, and its parts, LAYERS layers."""
    found: dict[str, Any] = {
        name: LAYERS for name in LAYER_NAMES if isinstance(value := getattr(config, name, None), int) and value > LAYERS
    }
    for key, part in vars(config).items():
        if hasattr(part, "to_dict") and (values := shortened(part)):
            found[key] = {"model_type": part.model_type, **values}
    return found


def lines(outcomes: Iterable[Outcome]) -> str:
    """A line for each architecture that was built, as Markdown; then those that were not."""
    outcomes = list(outcomes)
    built = [
        [outcome.model_type, outcome.model, *(kinds(outcome.rows, True), kinds(outcome.rows, False))]
        for outcome in outcomes
        if outcome.model
    ]
    missing = [[outcome.model_type, outcome.error.replace("|", "/")] for outcome in outcomes if not outcome.model]
    return "\n".join([
        markdown_table(["model type", "class", "watched, by tower", "not watched"], built), "",
        markdown_table(["not built", "why"], missing), "",
    ])  # fmt: skip


def is_component(row: Row) -> bool:
    """Whether it is watched, where its tower has a tau."""
    return not row.why_not or row.why_not.startswith(NO_TAU)


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Not aligned, as the cells are long."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body))


def kinds(found: Sequence[Row], is_watched: bool) -> str:
    """The last parts of the names of what is watched, or not, with how many there are, for each tower or reason."""
    groups: dict[str, Counter[str]] = {}
    for row in found:
        if is_component(row) == is_watched and row.why_not != NO_PROJECTION:
            key = row.tower if is_watched else row.why_not
            groups.setdefault(key, Counter())[row.kind] += row.count
    return "; ".join(
        f"{key}: " + ", ".join(f"{n} {kind}" for kind, n in names.items()) for key, names in groups.items()
    )


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """How many were built, with which towers, and which have nothing that is watched."""
    built = [outcome for outcome in outcomes if outcome.model]
    sets = Counter(" + ".join(sorted(outcome.watched())) or "nothing" for outcome in built)
    nothing = [outcome.model_type for outcome in built if not outcome.watched()]
    failed = [f"{outcome.model_type}: {outcome.failed}" for outcome in outcomes if outcome.failed]
    missing = [outcome for outcome in outcomes if not outcome.model]
    others = [outcome.model_type for outcome in missing if NO_MODEL not in outcome.error]
    return [
        f"{len(built)} of {len(outcomes)} model types were built.",
        f"{len(missing) - len(others)} have no class of their own, as they configure parts of others.",
        f"Not built for another reason: {', '.join(others) or 'none'}.",
        "",
        markdown_table(
            ["towers with projection matrices", "architectures"], [[k, str(n)] for k, n in sets.most_common()]
        ),
        "",
        f"Nothing to watch in: {', '.join(nothing) or 'none'}.",
        f"Failed: {'; '.join(failed) or 'none'}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
