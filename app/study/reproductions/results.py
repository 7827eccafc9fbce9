"""How does a study end? With figures, a table, a bundle of its runs for a paper, and a summary in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from depthscope.app.paper.export import figure_csv, write_bundle
from depthscope.app.paper.replaced_folder import foreign_files, replaced_folder, write_manifest
from depthscope.app.readings.provenance import software
from depthscope.app.readings.readings import Reading, judged, shown_attributes
from depthscope.app.study.reproductions.cells import run_path
from depthscope.app.study.reproductions.claims import by_seed, by_variant, deepest
from depthscope.app.study.reproductions.figures import LOSS, study_figures
from depthscope.app.study.reproductions.plan import Row, Scale, Study
from depthscope.app.tables.formats import to_csv, to_latex, to_markdown
from depthscope.app.tables.tables import Table
from depthscope.diagnostics import schema
from depthscope.diagnostics.atomic_writes import replaced_file, require_replaceable_file
from depthscope.diagnostics.errors import TakenError
from depthscope.diagnostics.experiments.intervals import estimate

VERDICTS = ("reproduced", "not reproduced", "not decided")


def summary_text(study: Study, scale: Scale, rows: Sequence[Row], planned: int) -> str:
    """What was and what was not reproduced, as Markdown; every sentence follows from the rows."""
    claims = study.claims(rows)
    counts = {verdict: sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS}
    counted = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines = [
        _mark(study),
        f"# {study.question}",
        "",
        f"Of {len(claims)} claims tested at this scale: {counted}.",
    ]
    lines[-1] += f" {_scale_sentence(study, scale)}"
    if len(rows) < planned:
        lines[-1] += f" {len(rows)} of {planned} networks are done: the same command goes on with the others."
    for verdict in VERDICTS:
        if counts[verdict]:
            lines += ["", f"## {verdict.capitalize()}", ""]
            lines += [f"- {claim.sentence}" for claim in claims if claim.verdict == verdict]
    return "\n".join(
        [*lines, "", "## Not tested", "", study.limits, "", "Sources: " + "; ".join(study.sources) + ".", ""]
    )


def _scale_sentence(study: Study, scale: Scale) -> str:
    if not study.trained:
        return "Nothing is trained."
    depths, seeds = ", ".join(map(str, scale.depths)), scale.seeds
    steps = " or ".join(str(each) for each in sorted({v.get("steps", scale.steps) for v in scale.variants}))
    return (
        f"The networks are byte decoders of {depths} layers and width {scale.width}, each trained for {steps} "
        f"steps of {scale.batch} × {scale.length} bytes of Python's documentation, from {seeds} "
        f"seed{'s' if seeds > 1 else ''}. A claim counts where the 95 % interval over seeds lies inside its limit, which "
        "is this project's unless a paper prints it."
    )


def results_table(study: Study, rows: Sequence[Row]) -> Table:
    """A row for each family and depth: means over seeds, half widths of their intervals in ``_error`` columns."""
    numbers = (LOSS, *study.numbers) if study.trained else study.numbers
    data, printed = [], []
    for variant, of in by_variant(rows):
        for family, title in study.families.items():
            for depth in sorted({row.settings["depth"] for row in of if row.settings["family"] == family}):
                values = {"family": family, "depth": depth, **variant}
                words = {"family": title, "layers": str(depth)}
                words |= {name.replace("_", " "): f"{value:g}" for name, value in variant.items()}
                for number in numbers:
                    found = np.array(list(by_seed(of, number.name, family, depth).values()))
                    one = estimate(found) if np.isfinite(found).any() else None
                    values[number.name] = one.mean if one else math.nan
                    values[f"{number.name}_error"] = one.mean - one.low if one else math.nan
                    words[number.title] = cell(one.mean, one.mean - one.low) if one else "–"
                data.append(values)
                printed.append(words)
    caption = "Mean over seeds, and half of its 95 % interval (Student's t) where there are several."
    title = f"Numbers of the study {study.name}"
    return Table(study.name.replace("-", "_"), title, caption, pd.DataFrame(data), pd.DataFrame(printed))


def cell(mean: float, reach: float) -> str:
    """A mean with half of its interval, where it has one, for a table."""
    return f"{mean:.3g}" if not math.isfinite(reach) else f"{mean:.3g} ± {reach:.1g}"


def require_own(study: Study, out: Path) -> None:
    """Refuse a folder of another study, or of somebody else, before anything is computed.

    Raises ValueError: Where one of its folders is somebody else's, or files in it were edited.
    """
    require_replaceable_file(out / "summary.md", partial(_require_summary, study))
    for name in ("results", "paper"):
        if (out / name).exists():
            foreign_files(out / name)


def _mark(study: Study) -> str:
    """The first line of a summary: by it the next run knows that the file is its own."""
    return f"<!-- written by depthscope: the study {study.name} -->"


def _require_summary(study: Study, path: Path) -> None:
    mark = f"{_mark(study)}\n".encode()
    with path.open("rb") as file:
        if file.read(len(mark)) != mark:
            raise TakenError(
                f"{path} exists and is not the summary of the study {study.name}; move it away, or name another folder"
            )


def write_results(study: Study, scale: Scale, rows: Sequence[Row], planned: int, out: Path) -> list[Path]:
    """Write ``results/`` (figures, table, claims), ``paper/`` (a bundle of the deepest networks' runs) and ``summary.md``.

    ``out``: folder of the study. Files of others in it stay.
    Raises OSError: Where a file of another origin has a name of the study's.
    Raises ValueError: Where one of the two folders is somebody else's, or its files were edited.
    """
    from depthscope.app.drawing.matplotlib import write_figure  # matplotlib takes a second to import

    require_own(study, out)
    text, table = summary_text(study, scale, rows, planned), results_table(study, rows)
    claims = pd.DataFrame(claim.as_dict() for claim in study.claims(rows))
    with replaced_folder(out / "results") as folder:
        for name in ("figures", "tables", "data"):
            (folder / name).mkdir()
        for figure in study_figures(study, rows):
            write_figure(figure, *(folder / "figures" / f"{figure.name}.{end}" for end in ("pdf", "png")))
            _write(folder / "data" / f"{figure.name}.csv", figure_csv(figure))
        for ending, written in (
            ("tex", to_latex(table, {})),
            ("csv", to_csv(table)),
            ("md", to_markdown(table)),
        ):
            _write(folder / "tables" / f"{table.name}.{ending}", written)
        _write(folder / "data" / "claims.csv", claims.to_csv(index=False))
        write_manifest(folder, {"software": software(), "study": study.name, "question": study.question})
    readings = list(_deepest_readings(study, scale, rows, out))
    if readings:
        write_bundle(readings, out / "paper")
    with replaced_file(out / "summary.md", check=partial(_require_summary, study)) as fresh:
        _write(fresh, text)
    return [out / "results", *([out / "paper"] if readings else []), out / "summary.md"]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _deepest_readings(study: Study, scale: Scale, rows: Sequence[Row], out: Path) -> list[Reading]:
    """The saved runs of the deepest networks, with the metrics of the study alone."""
    done = {tuple(sorted(row.settings.items())) for row in rows}
    found = []
    for cell in study.cells(scale):
        is_deepest = cell.settings["depth"] == deepest(rows)
        if not (cell.keeps_run and is_deepest and tuple(sorted(cell.settings.items())) in done):
            continue
        path = run_path(out, cell)
        run = schema.open_run(path)
        try:
            analysis = schema.chain_dataset(run, "metrics")
            assert analysis is not None
            title = study.families[cell.settings["family"]]
            attrs: Mapping[str, object] = shown_attributes(dict(run.attrs))
            found.append(
                judged(
                    title,
                    attrs,
                    analysis.load(),
                    chain="",
                    path=str(path),
                    results={},
                    is_alone=True,
                )
            )
        finally:
            run.close()
    return found
