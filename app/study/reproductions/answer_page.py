"""What does the answer's page say? A question, three sentences, tables and figures, all from the table of measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from depthscope.app.figures import Lines
from depthscope.app.study.reproductions.answer import FAMILIES, FURTHER, STUDY, VIEWS
from depthscope.app.study.reproductions.answer_figures import answer_figures
from depthscope.app.study.reproductions.answer_table import Measurements, read_table, table_text
from depthscope.app.study.reproductions.claims import Row
from depthscope.diagnostics.analysis.differences import SIGNIFICANCE, Difference
from depthscope.diagnostics.atomic_writes import replaced_file
from depthscope.diagnostics.errors import TakenError
from depthscope.diagnostics.experiments.intervals import Estimate
from depthscope.diagnostics.verdicts.same_representation import ALIKE

MARK = "<!-- written by depthscope: the page of the study answer; change the study, not this page -->"
PAGE, TABLE, PICTURES = "answer.md", "answer.csv", "images"
SEVERITIES = ("passed", "noted", "warned", "failed")
PLAIN = "residual"


def write_page(folder: Path, rows: Sequence[Row] | None = None, planned: int = 0) -> list[Path]:
    """Write the table of measurements, the page and its figures; without rows the table that is there is read.

    Raises TakenError: Where a page or a table of another origin has the name.
    """
    from depthscope.app.drawing.matplotlib import write_figure  # matplotlib takes a second to import

    page, table = folder / PAGE, folder / TABLE
    if rows is not None:
        with replaced_file(table, check=_require_table) as fresh:
            fresh.write_text(table_text(rows, planned), encoding="utf-8", newline="\n")
    found = read_table(table)
    figures = answer_figures(found)
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    pictures = [folder / PICTURES / f"{figure.name}.png" for figure in figures]
    with replaced_file(page, check=_require_page) as fresh:
        fresh.write_text(page_text(found, figures), encoding="utf-8", newline="\n")
    for figure, path in zip(figures, pictures, strict=True):
        write_figure(figure, path)
    return [page, table, *pictures]


def _require_table(path: Path) -> None:
    try:
        read_table(path)
    except ValueError as error:
        raise TakenError(f"{error}; move it away, or name another folder") from error


def _require_page(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(MARK)) != MARK.encode():
            raise TakenError(
                f"{path} exists and is not the page of this study; move it away, or name another folder"
            )


def page_text(found: Measurements, figures: Sequence[Lines]) -> str:
    """The page as Markdown."""
    pictures = {
        figure.name: f"![{figure.alt}]({PICTURES}/{figure.name}.png)\n\n*{figure.caption}*"
        for figure in figures
    }
    show = partial(_section, pictures)
    parts = [
        MARK,
        f"# {STUDY.question}",
        _setting(found),
        "## The answer",
        f"**In which design?** {_which(found)}",
        f"**From which depth?** {_depth(found)}",
        f"**At what cost?** {_cost(found)}",
        "## The designs",
        *(text for steps in found.steps for text in (f"After {steps} steps:", _designs(found, steps))),
        _design_notes(),
        *show("Is it one representation, and from which depth?", "answer_depth", _views(found)),
        *show("Are the later blocks needed?", "answer_skipped", _blocks(found)),
        *show("What makes it degenerate?", ("answer_scale", "answer_scale_loss"), _doses(found)),
        *show("What does it cost in memory and loss?", "answer_memory", _tests(found)),
        "## What it took",
        _effort(found),
        "## What this does not show",
        f"{STUDY.limits} Other limits are in [what depthscope can and cannot do](limits.md); the other studies are in "
        "[studies](studies.md).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(pictures: dict[str, str], title: str, names: str | tuple[str, ...], text: str) -> list[str]:
    shown = [pictures[name] for name in ((names,) if isinstance(names, str) else names) if name in pictures]
    return [f"## {title}", *shown, text] if shown or text else []


# --- numbers as words


def _interval(found: Estimate | None, digits: int = 3) -> str:
    if found is None:
        return "–"
    mean, low, high = (f"{value:#.{digits}g}".rstrip(".") for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})" if math.isfinite(found.low) else f"{mean} (one network)"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _of_designs(found: Measurements, name: str, digits: int = 3) -> str:
    """A number of every design that has it, such as ``residual 0.56 (0.5 to 0.6), …``."""
    parts = [
        f"{title} {_interval(mean, digits)}"
        for family, title in FAMILIES.items()
        if (mean := found.mean(name, family)) is not None
    ]
    return _listed(parts)


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)) if rows else ""


# --- the answer


def _setting(found: Measurements) -> str:
    settings = found.rows[0].settings
    done = ""
    if len(found.rows) < found.planned:
        done = (
            f" **{len(found.rows)} of {found.planned} trainings are done** ({_kinds_done(found)}): `depthscope study answer` "
            "goes on with the others, and the page says what there is."
        )
    return (
        f"Five byte decoders that differ in how their layers are joined: {_listed(list(FAMILIES.values()))}. Each has "
        f"{settings['depth']} blocks of an attention and an MLP, width {settings['width']}, {settings['heads']} heads and, "
        f"where it has streams, {settings['streams']} of them, and is trained on Python's own documentation, "
        f"{settings['batch']} × {settings['length']} bytes per step. States are those between blocks; of AttnRes, what the "
        "first sublayer of a block reads. Two states are called the same where their debiased CKA is at least "
        f"{ALIKE:g} in each of four views: {_listed([title for _, title in VIEWS.values()])}. Intervals are 95 % over "
        f"seeds (Student's t).{done}"
    )


def _kinds_done(found: Measurements) -> str:
    short = found.steps[0]
    counts = {
        f"of {short} steps": sum(
            r.settings["steps"] == short and r.settings["branch_scale"] == 1.0 for r in found.rows
        ),
        "with branches scaled down": sum(r.settings["branch_scale"] < 1.0 for r in found.rows),
        "longer": sum(r.settings["steps"] > short for r in found.rows),
    }
    return ", ".join(f"{count or 'none'} {words}" for words, count in counts.items())


def _which(found: Measurements) -> str:
    means = {title: found.mean("alike", family) for family, title in FAMILIES.items()}
    known = {title: mean for title, mean in means.items() if mean is not None}
    # One seed has no interval, and decides nothing.
    same = [title for title, mean in known.items() if mean.low > ALIKE]
    apart = [title for title, mean in known.items() if mean.high < ALIKE]
    rest = [title for title in known if title not in (*same, *apart)]
    if len(apart) == len(known):
        told = "No design holds one representation in all layers"
    else:
        told = "; ".join(
            f"{_listed(titles)} {one if len(titles) == 1 else several}"
            for titles, one, several in (
                (same, "holds one representation in all layers", "hold one representation in all layers"),
                (apart, "does not", "do not"),
                (rest, "is not decided", "are not decided"),
            )
            if titles
        )
    return (
        f"{told}: after {found.steps[0]} steps the CKA of the first and the last state, where {ALIKE:g} would be the same, is "
        f"{_of_designs(found, 'alike')}{_which_scale(found)}."
    )


def _which_scale(found: Measurements) -> str:
    """The largest scale of the branches at which some design holds one representation, where one does."""
    for scale in found.scales[::-1]:
        same = {
            title: mean
            for family, title in FAMILIES.items()
            if scale < 1.0 and (mean := found.mean("alike", family, scale=scale)) and mean.mean > ALIKE
        }
        if same:
            values = _listed([f"{title} {_interval(mean)}" for title, mean in same.items()])
            return f"; with all branches scaled down to {scale:g}: {values}"
    return ""


def _depth(found: Measurements) -> str:
    blocks = found.rows[0].settings["depth"]
    starts = {title: found.values("same_from", family) for family, title in FAMILIES.items()}
    early = sorted({value for values in starts.values() for value in values if value < blocks})
    parts = [
        f"after {first:g} of {blocks} blocks in "
        + _listed([f"{v.count(first)} of {len(v)} {title}" for title, v in starts.items() if first in v])
        for first in early
    ]
    none = "not even the last two states are the same"
    told = f"From none on: {none}"
    if parts:
        told = f"States are the same from the one {_listed(parts)} networks on; in the others {none}"
    return (
        f"{told}, and leaving out the later half of the blocks raises the held-out loss, in nats per byte, by "
        f"{_of_designs(found, 'skip_later', 2)}."
    )


def _cost(found: Measurements) -> str:
    plain = found.mean("kept_bytes", PLAIN)
    memory = [
        f"{mean.mean / plain.mean:.1f} times ({title})"
        for family, title in FAMILIES.items()
        if family != PLAIN and plain is not None and (mean := found.mean("kept_bytes", family)) is not None
    ]
    losses = _compared(found, "loss")
    told = ", ".join(f"{title} {_difference(each, p)}" for title, (each, p) in losses.items())
    apart = [title for title, (each, p) in losses.items() if p < SIGNIFICANCE and not each.undecided]
    which = f"that of {_listed(apart)} differs" if apart else "none can be said to differ"
    if not memory:
        return "There is no residual network to compare with yet."
    loss = f"; of the losses {which} from the residual network's (in nats per byte: {told})" if told else ""
    return (
        f"A forward keeps {_listed(memory)} what a residual network keeps of a token for its backward{loss}."
    )


# --- tables


def _compared(
    found: Measurements, name: str, steps: int | None = None
) -> dict[str, tuple[Difference, float]]:
    """Every design less the residual network."""
    others = {
        title: found.values(name, family, steps=steps)
        for family, title in FAMILIES.items()
        if family != PLAIN
    }
    return found.against(name, found.values(name, PLAIN, steps=steps), others)


def _difference(each: Difference, p: float) -> str:
    value, reach = float(each.value.item()), float(each.half_width.item())
    sure = f"p {p:.2g}" if not each.undecided else "too few seeds to decide"
    return f"{value:+#.2g} ({value - reach:+#.2g} to {value + reach:+#.2g}; {sure})"


def _designs(found: Measurements, steps: int) -> str:
    columns: dict[str, Callable[[str], str]] = {
        "design": lambda family: FAMILIES[family],
        "seeds": lambda family: str(len(found.of(family, steps=steps))),
        "held-out loss": lambda family: _interval(found.mean("loss", family, steps=steps)),
        "CKA, first and last state": lambda family: _interval(found.mean("alike", family, steps=steps)),
        "the same after block": partial(_same_from, found, steps),
        "loss without the later half": lambda family: _signed(found.mean("skip_later", family, steps=steps)),
        "kept, KiB per token": lambda family: _kibibytes(found.mean("kept_bytes", family, steps=steps)),
        "verdict": partial(_verdicts, found, steps),
    }
    families = [family for family in FAMILIES if found.of(family, steps=steps)]
    return _grid(list(columns), [[make(family) for make in columns.values()] for family in families])


def _design_notes() -> str:
    return (
        "*Loss* is in nats per byte. *The same after block*: every two states from the one after this block on; «none» where "
        "not even the last two. *Loss without the later half* is what is added to the loss where these blocks are left out. "
        "*Verdict* is `same_representation`, in how many networks."
    )


def _same_from(found: Measurements, steps: int, family: str) -> str:
    values = found.values("same_from", family, steps=steps)
    early = sorted({value for value in values if value < found.rows[0].settings["depth"]})
    return ", ".join(f"{value:g} ({values.count(value)} of {len(values)})" for value in early) or "none"


def _signed(mean: Estimate | None) -> str:
    return "–" if mean is None else f"{'+' if mean.mean >= 0 else ''}{_interval(mean, 2)}"


def _kibibytes(mean: Estimate | None) -> str:
    return "–" if mean is None else f"{mean.mean / 1024:.1f}"


def _verdicts(found: Measurements, steps: int, family: str, scale: float = 1.0) -> str:
    values = found.values("severity", family, steps=steps, scale=scale)
    counts = {word: sum(value == number for value in values) for number, word in enumerate(SEVERITIES)}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "–"


def _views(found: Measurements) -> str:
    titles = {name: title for name, (_, title) in {**VIEWS, **FURTHER}.items()}
    rows = [
        [
            title,
            *(_interval(found.mean(f"alike_{name}", family), 2) for name in titles),
            _interval(found.mean("start_alike", family), 2),
        ]
        for family, title in FAMILIES.items()
        if found.of(family)
    ]
    return (
        "The first and the last state, compared in several ways (whitened: directions of small variance count as much as "
        "large ones; CKNNA: nearest neighbours alone; before training: the least of the first four):\n\n"
        + _grid(["design", *titles.values(), "before training"], rows)
    )


def _blocks(found: Measurements) -> str:
    rows = []
    for family, title in FAMILIES.items():
        curves = [row.curves["skip_each"] for row in found.of(family)]
        if curves:
            rows.append(
                [title, *(f"{sum(values) / len(values):+#.2g}" for values in zip(*curves, strict=True))]
            )
    head = ["left out", *(f"block {number}" for number in range(len(rows[0]) - 1))] if rows else []
    return "What the loss gains without one block, mean over seeds, in nats per byte:\n\n" + _grid(head, rows)


def _doses(found: Measurements) -> str:
    rows = [
        [
            f"{scale:g}", title, str(len(networks)),
            _interval(found.mean("alike", family, scale=scale)),
            _interval(found.mean("turn", family, scale=scale)),
            _interval(found.mean("loss", family, scale=scale)),
            _signed(found.mean("skip_same", family, scale=scale)),
            _verdicts(found, found.steps[0], family, scale),
        ]
        for scale in found.scales[::-1]
        for family, title in FAMILIES.items()
        if (networks := found.of(family, scale=scale)) and len(found.scales) > 1
    ]  # fmt: skip
    if not rows:
        return ""
    head = (
        "scale",
        "design",
        "seeds",
        "CKA, first and last state",
        "angle between them, degrees",
        "held-out loss",
        "loss without the blocks that are the same",
        "verdict",
    )
    return (
        "Every branch's output is multiplied with a constant that is not trained: the smaller it is, the less the layers "
        "can write. The verdict is a failure where the range can be left out at no cost, a warning where that could not be "
        "tried (blocks of AttnRes read all earlier ones), and a note where leaving it out costs something. CKA counts "
        "lengths that change from token to token as a difference, the angle does not: what AttnRes reads is scaled by a "
        "softmax of its own at each token.\n\n" + _grid(head, rows)
    )


def _tests(found: Measurements) -> str:
    titles = {
        "loss": "held-out loss",
        "alike": "CKA, first and last state",
        "skip_later": "loss without the later half",
    }
    rows = [
        [str(steps), title, words, _difference(each, p)]
        for steps in found.steps
        for name, words in titles.items()
        for title, (each, p) in _compared(found, name, steps).items()
    ]
    longer = [
        ["", title, words, _difference(each, p)]
        for name, words in titles.items()
        for title, (each, p) in _longer(found, name).items()
    ]
    parts = [
        "Each design less the residual network, tested by exchanging the labels of seeds; p is corrected for the number of "
        "designs (Holm):\n\n" + _grid(("steps", "design", "number", "difference"), rows)
        if rows
        else "",
        f"After {found.steps[-1]} steps less after {found.steps[0]}:\n\n"
        + _grid(("", "design", "number", "difference"), longer)
        if longer
        else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _longer(found: Measurements, name: str) -> dict[str, tuple[Difference, float]]:
    """The longest trainings less the shortest ones, of each design."""
    if len(found.steps) < 2:
        return {}
    compared = {
        title: found.against(
            name, found.values(name, family), {title: found.values(name, family, steps=found.steps[-1])}
        )
        for family, title in FAMILIES.items()
    }
    return {title: each[title] for title, each in compared.items() if title in each}


def _effort(found: Measurements) -> str:
    seconds = sum(row.numbers.get("seconds", 0.0) for row in found.rows)
    return (
        f"{len(found.rows)} of {found.planned} networks, {seconds:.0f} processor seconds of one core for training and "
        "measuring, on a machine of two cores that others shared. `depthscope study answer --out DIR --page docs` makes this "
        "page; a run that is ended goes on where it was, and no network is trained twice. `depthscope study answer --page "
        f"docs` writes it again from [the table of measurements]({TABLE})."
    )
