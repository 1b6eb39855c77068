"""Download the public data sets of nanoMolmo2's stages, so that they can be trained on.

    python scripts/download_datasets.py --list
    python scripts/download_datasets.py --stage 1 --max_images 20000 --skip_errors
    python scripts/download_datasets.py --dataset pixmo-docs
    python scripts/download_datasets.py --stage 1 --check

Licences and sizes are shown before anything is fetched. What is there is not fetched again: after an interruption the
same command continues. The exit code is 1 where anything failed, a single picture too, unless --skip_errors.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.fetching.download import FAILED, Options, Outcome, describe, download, is_done, note, problems_of
from data.fetching.hub import HubError, Remote, ask
from data.fetching.places import STATUS, Places, read_json
from data.hub import hub_problem
from data.molmo2_sets import SETS, STAGES, PublicSet, named, of_stage

OUTPUT = "./data/molmo2_datasets"


def parser() -> ArgumentParser:
    """Each flag with a hyphen as well as with an underscore."""
    found = ArgumentParser(
        description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, usage="%(prog)s [flags]"
    )

    def flag(name: str, *others: str, **more: object) -> None:
        names = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}", *others])
        found.add_argument(*names, **more)  # type: ignore[arg-type]

    flag("list", action="store_true", help="show the data sets and what is downloaded of them")
    flag("stage", choices=[*STAGES, "all"], help="the sets of a stage")
    flag("all", action="store_true", help="the same as --stage all")
    flag("dataset", action="append", default=[], metavar="NAME", help="one set, by its name or hub id; may be repeated")
    flag("molmo2_only", action="store_true", help="of these, the sets of Molmo2's own videos and pictures")
    flag("pixmo_only", action="store_true", help="of these, the sets of PixMo and CoSyn")
    flag("academic_only", action="store_true", help="of these, the academic benchmarks' training sets")
    flag("check", action="store_true", help="read what is on disk and compare it with the lock files; no network")
    flag("dry_run", action="store_true", help="show what would be fetched")
    flag(
        "force",
        action="store_true",
        help="fetch the hub's files again, and ask again for pictures that failed for good",
    )
    flag("skip_errors", action="store_true", help="exit code 0 although something failed")
    flag("output_dir", "--data_dir", "--data-dir", default=OUTPUT, metavar="DIR", help=f"where to [{OUTPUT}]")
    flag("cache_dir", metavar="DIR", help="cache of huggingface_hub")
    flag("max_images", type=int, metavar="N", help="of pictures behind links, fetch N of each set [all]")
    flag("workers", type=int, default=32, metavar="N", help="pictures asked for at once [32]")
    flag("per_host", type=int, default=4, metavar="N", help="of these, of one host [4]")
    return found


def wanted(flags: Namespace) -> list[PublicSet]:
    """The sets that the flags name. Raises ValueError."""
    found = [named(name) for name in flags.dataset]
    if flags.stage or flags.all:
        found += of_stage("all" if flags.all else flags.stage)
    elif not found and flags.list:
        found = list(SETS)
    groups = [name for name in ("molmo2", "pixmo", "academic") if getattr(flags, f"{name}_only")]
    if not found and groups:
        found = of_stage("all")
    if not found and flags.check:
        found = [one for one in SETS if one.name in read_json(Path(flags.output_dir) / STATUS)]
    found = [one for one in dict.fromkeys(found) if not groups or one.group in groups]
    if not found:
        raise ValueError("no data set is chosen: --stage 1, --dataset NAME or --all does; --list shows them")
    return found


def show(sets: list[PublicSet], output: Path) -> None:
    """--list."""
    status = read_json(output / STATUS)
    for one in sets:
        facts = status.get(one.name, {})
        stages = f"stages {' '.join(one.stages)}" if one.stages else "no stage"
        print(f"{describe(one, None)}, {stages}, here: {facts.get('state', 'no')}")


def check(sets: list[PublicSet], options: Options) -> list[str]:
    """--check: the sets that have problems."""
    bad = []
    for one in sets:
        problems = list(problems_of(one, options))
        print("\n".join(problems[:20] or [f"{one.name}: as it should be"]))
        if len(problems) > 20:
            print(f"{one.name}: {len(problems) - 20} more")
        bad += [one.name] if problems else []
    return bad


def ask_all(sets: list[PublicSet], options: Options) -> tuple[list[tuple[PublicSet, Remote]], list[Outcome]]:
    """(what the hub has of each set, shown; the sets of which it has nothing)."""
    found, failed = [], []
    for one in sets:
        try:
            remote = ask(Places(options.output, one), options.endpoint)
        except (HubError, ValueError) as error:
            failed.append(Outcome(one.name, FAILED, str(error)))
            continue
        found.append((one, remote))
        print(describe(one, remote))
    total = sum(remote.total_bytes for _, remote in found)
    print(f"{len(found)} data sets, {total / 1e9:.2f} GB on the hub, besides the pictures that rows link to")
    return found, failed


def fetch(sets: list[PublicSet], options: Options, dry_run: bool) -> list[Outcome]:
    """Show, then fetch; what became of each."""
    if problem := hub_problem(options.endpoint):
        if not dry_run:
            raise ConnectionError(problem)
        print(f"{problem}: these are the numbers that were known before")
        print("\n".join(describe(one, None) for one in sets))
        return []
    found, outcomes = ask_all(sets, options)
    for outcome in outcomes:
        print(f"FAILED {outcome.name}: {outcome.words}", file=sys.stderr)
        if not dry_run:
            note(Places(options.output, named(outcome.name)), outcome)
    for one, remote in found if not dry_run else ():
        if is_done(one, remote, options):
            print(f"{one.name}: is there already")
            continue
        print(f"{one.name}: fetching to {options.output / one.name}", flush=True)
        outcome = download(one, remote, options)
        print(
            f"{outcome.state} {one.name}: {outcome.words}", file=sys.stderr if outcome.state == FAILED else sys.stdout
        )
        outcomes.append(outcome)
    reasons: Counter[str] = sum((outcome.reasons for outcome in outcomes), Counter())
    if reasons:
        print("Pictures that were not fetched:")
        print("\n".join(f"  {count:>9,}  {reason}" for reason, count in reasons.most_common()))
    return outcomes


def main(argv: list[str], options: Options | None = None) -> int:
    """The exit code. options: in place of those that the flags say nothing of, for tests: hub, allowed addresses."""
    flags = parser().parse_args(argv)
    made = options or Options(Path())
    made.output, made.workers, made.per_host = Path(flags.output_dir), flags.workers, flags.per_host
    made.max_pictures, made.again, made.cache_dir = flags.max_images, flags.force, flags.cache_dir
    try:
        for name in ("workers", "per_host", "max_images"):
            if getattr(flags, name) is not None and getattr(flags, name) < 1:
                raise ValueError(f"--{name} {getattr(flags, name)}: must be 1 or more")
        sets = wanted(flags)
        if flags.list:
            show(sets, made.output)
            return 0
        if flags.check:
            failed = check(sets, made)
        else:
            failed = [one.name for one in fetch(sets, made, flags.dry_run) if one.state != "done"]
    except (ValueError, OSError) as error:
        print(f"download_datasets.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("download_datasets.py: interrupted; the same command continues", file=sys.stderr)
        return 130
    if failed:
        print(f"Not complete: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed and not flags.skip_errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
