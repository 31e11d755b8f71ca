"""Pictures of result files, each beside its file and drawn from the newest run that has what it shows.

    python -m benchmarks.plot [FILE.jsonl ...] [--format png|svg]

Without a file: every result file in benchmarks/results/. ``mod-kernels report`` makes a page of them all.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from mod_kernels.report import gallery
from mod_kernels.report.collect import collect
from mod_kernels.report.picture import missing, save

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot benchmark results.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    arguments = parser.parse_args()
    lacking = missing()
    if lacking:
        parser.exit(1, lacking + "\n")
    for file in arguments.files or sorted(RESULTS.glob("*/*.jsonl")):
        for picture in plot(file, arguments.format):
            print(picture)


def plot(file: Path, picture_format: str = "png") -> list[Path]:
    """What was drawn; what could not be read of the file is said on standard error."""
    collected = collect([file])
    for problem in collected.problems:
        print(problem, file=sys.stderr)
    written, source = [], source_of(file)
    for machine in collected.machines:
        pictures = [one for group in machine.groups for one in gallery.of_group(machine, group, file.stem)]
        for suite in machine.memory:
            pictures += gallery.of_memory(machine, suite, file.stem)
        for picture in pictures:
            path = file.with_name(f"{picture.name}.{picture_format}")
            save(picture, path, source)
            written.append(path)
    return written


def source_of(file: Path) -> str:
    """What a picture says it was made from: a file that has changed since makes it an old one."""
    return f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


if __name__ == "__main__":
    main()
