"""How every picture ends: signed with its machine, commit and date, and written."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mod_kernels.bench.machine import short_name
from mod_kernels.bench.store import Results


def sign_and_save(
    figure: plt.Figure, results: Results, picture: Path, label_y: float, rect: tuple[float, float, float, float]
) -> None:
    """``label_y`` and ``rect`` (left, bottom, right, top of the rest) are shares of the figure."""
    machine = results.machine
    label = f"{short_name(machine)}; commit {machine['commit']}, {machine['date']}"
    figure.text(0.5, label_y, label, ha="center", fontsize=8, color="#555555")
    figure.tight_layout(rect=rect)
    figure.savefig(picture, dpi=130, metadata={"Date": None} if picture.suffix == ".svg" else None)
    plt.close(figure)
