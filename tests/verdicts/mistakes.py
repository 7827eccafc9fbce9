"""49 mistakes that people made, from public threads: planted in a tiny network with its right twin, or why none can be seen.

A mistake counts as found where one of its verdicts is told (of some a note is all that can be said), and none of them is loud
about the right twin. ``python -m tests.verdicts.mistakes`` prints the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from depthscope import diagnostics, probes
from depthscope.diagnostics import Finding, Severity
from tests.models import stream_bugs
from tests.verdicts import held_out, held_out_cases, page
from tests.verdicts.held_out import Recipe, Shape


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Parameters
    ----------
    number : int
        In the list of public threads.
    name : str
        What was wrong.
    found_by : tuple of str
        Verdicts that name it.
    run : callable, optional
        ``run(wrong)`` gives the run of the wrong network, or of its right twin.
    unseen : str
        Why a run cannot show it.
    """

    number: int
    name: str
    found_by: tuple[str, ...] = ()
    run: Callable[[bool], Any] | None = None
    unseen: str = ""


def wired(bug: str) -> Callable[[bool], Any]:
    def run(wrong: bool) -> Any:
        wiring = stream_bugs.Wiring(bug=bug) if wrong else stream_bugs.Wiring(bug=bug).right
        return probes.capture(stream_bugs.network(wiring, 0), stream_bugs.tokens(8))

    return run


def of(recipe: Recipe, **right: Any) -> Callable[[bool], Any]:
    """A recipe of `held_out` as it is, and without what is wrong."""
    twin = {"touch": held_out.same, "before": held_out.same} | right
    return lambda wrong: held_out.run_of(recipe if wrong else replace(recipe, **twin), 3)


def planted(
    touch: Callable[[Any], Any], shape: Shape | None = None, steps: int = 0, **more: Any
) -> Callable[[bool], Any]:
    return of(Recipe("", shape or Shape(blocks=4), steps=steps, touch=touch, **more))


STREAMS = Shape(streams=4, blocks=3)


def cold(model: Any) -> None:
    for block in model.blocks:
        for mixing in block.mixings:
            mixing.res.data = (8.0 * torch.eye(4) - 8.0) / 0.5
            mixing.scale.data.zero_()


def ten_times_identity(model: Any) -> None:
    for block in model.blocks:
        for mixing in block.mixings:
            mixing.res.data = 10.0 * torch.eye(4)
            mixing.scale.data.zero_()


def wrong_slices(pre: Any, post: Any, res: Any) -> tuple:
    return pre, post, 2 * res.logit(eps=1e-3).sigmoid() + 1.0


def gains_of(value: float) -> Callable[[Any], None]:
    def touch(model: Any) -> None:
        for block in model.blocks:
            for norm in block.norms:
                nn.init.constant_(norm.weight, value)
                nn.init.zeros_(norm.bias)

    return touch


class NoNorm(nn.Module):
    """Squares that overflow: the root is infinite, and what is divided by it zero."""

    def forward(self, x):
        return x / (x * 1e30).pow(2).mean(-1, keepdim=True).sqrt()


def overflowing_squares(model: Any) -> None:
    model.blocks[2].norms = nn.ModuleList(NoNorm() for _ in range(2))


def weak_mask(model: Any) -> None:
    for block in model.blocks:
        block.branches[0].causal = False
        block.branches[0].temperature = 1.0


def masked_row(x: torch.Tensor) -> torch.Tensor:
    scores = x.new_zeros(len(x), x.shape[1])
    scores[0] = -torch.inf  # all keys of one sample are padding
    return x + scores.softmax(-1).unsqueeze(-1)


class HalfStream(nn.Module):
    """What a residual stream in float16 keeps of a sum."""

    def forward(self, x):
        return (x * 3e4).half().float()


def zero_eps(x: torch.Tensor) -> torch.Tensor:
    x = torch.cat([x[:, :1] * 0, x[:, 1:]], 1)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False)).sqrt()


def infinite_backward(x: torch.Tensor) -> torch.Tensor:
    return x + 0 * (x - x.detach()).abs().sqrt()


def detached(x: torch.Tensor) -> torch.Tensor:
    return x.detach()


def before(change: Callable[[Any], Any], number: int = 2) -> Callable[[Any], None]:
    return lambda model: setattr(model.blocks[number], "before", change)


def trained_by(
    optimizer: Callable[[Any], torch.optim.Optimizer], half: bool = False
) -> Callable[[bool], Any]:
    """Two recorded steps with an optimizer that is made wrongly."""

    def run(wrong: bool) -> Any:
        torch.manual_seed(3)
        rng = torch.Generator().manual_seed(3)
        model = held_out.Network(Shape(blocks=4, rms=half))
        model = model.bfloat16() if half and wrong else model
        made = optimizer(model) if wrong or half else torch.optim.Adam(model.parameters(), lr=1e-3)
        with probes.record(model, gradients=True, weights=True) as recorder:
            for _ in range(2):
                batch = held_out.prose(8, rng)
                made.zero_grad()
                loss = held_out.loss_of(model(batch["ids"]), batch)
                loss.backward()
                made.step()
                recorder.step(loss)
        return recorder.run

    return run


def not_loaded(wrong: bool) -> Any:
    """A checkpoint none of whose names was found, as `depthscope probe` runs it."""
    recipe = Recipe("", Shape(blocks=3), steps=0 if wrong else 60)
    torch.manual_seed(3)
    rng = torch.Generator().manual_seed(3)
    model = held_out.Network(recipe.shape)
    held_out.train(model, recipe, rng)
    batch = held_out.prose(8, rng)
    return probes.capture(
        held_out.Called(model).eval(), batch, gradients=True, loss=held_out.loss_of, attrs={"checkpoint": 1}
    )


def without_block_2(model: Any) -> torch.optim.Optimizer:
    kept = [p for name, p in model.named_parameters() if not name.startswith("blocks.2.")]
    return torch.optim.Adam(kept, lr=1e-3)


EXPERTS = Recipe("", Shape(blocks=3, experts=4), record=10, touch=held_out_cases.starved_expert)
COPIES = Recipe(
    "", Shape(streams=4, blocks=4, start="copies"), steps=120, before=held_out_cases.held_as_copies
)
STALE = Recipe("", Shape(blocks=3, classes=10), data=held_out.digits, build=held_out.ConvNet, steps=40,
               touch=held_out_cases.stale_norms)  # fmt: skip
AHEAD = "looks_ahead"

MISTAKES = (
    Mistake(1, "mixing thrown away", ("discarded_mixing",), wired("discarded")),
    Mistake(2, "Sinkhorn on a singleton axis", ("constant_mixing",), wired("ones")),
    Mistake(3, "mixing frozen at the identity by cold logits", ("stuck_at_identity", "saturated_logits"),
            planted(cold, STREAMS)),
    Mistake(4, "streams do not persist", ("passing_streams",), wired("passing")),
    Mistake(5, "mixing not transposed", ("transposed_mixing",), wired("transposed_once")),
    Mistake(6, "coefficient slices in the wrong order", ("gain_explosion",),
            planted(held_out_cases.edits(wrong_slices), STREAMS)),
    Mistake(7, "write gate without its factor 2",
            unseen="a branch at half strength is a scale like any other, and training undoes it"),
    Mistake(8, "gate scales are constants", unseen="a number that is no parameter looks like a choice of the design"),
    Mistake(9, "test bias 10 I left in the initialisation", ("stuck_at_identity", "saturated_logits"),
            planted(ten_times_identity, STREAMS)),
    Mistake(10, "lanes that are copies", ("copied_streams",), of(COPIES)),
    Mistake(11, "one dominant stream", ("dominant_stream",),
            planted(held_out_cases.factors("pre", 1.0, 1e-3), STREAMS)),
    Mistake(12, "unconstrained mixing hidden by clipping", ("gain_explosion",),
            planted(held_out_cases.gain(2.5), Shape(streams=4, blocks=4, mixing="hc"))),
    Mistake(13, "AttnRes without pre-norm", unseen="the read is smaller by the root of the sources, as some designs mean it"),
    Mistake(14, "depth-scaled initialisation never applied",
            unseen="a standard deviation of 0.02 in every matrix is another published start"),
    Mistake(15, "depth scaling on the wrong matrix", unseen="the size of the branch is the product of both, and the same"),
    Mistake(16, "norm gain 2 at the start", unseen="gains of 2 are what trained networks have"),
    Mistake(17, "norm gain about 0", ("constant_branch", "idle_layer", "same_representation"),
            planted(gains_of(0.0), steps=40)),
    Mistake(18, "norm weight uninitialised", ("residual_not_finite",), planted(gains_of(float("nan")))),
    Mistake(19, "skip taken after the norm", unseen="the states are those of a post-norm network"),
    Mistake(20, "skip added twice", ("exploding_state",),
            planted(held_out_cases.everywhere(lambda x: 2 * x), Shape(blocks=18))),
    Mistake(21, "attention scale inverted", unseen="at a head of 12 features the logits are 12 times as large, and trained "
            "heads are as sharp; of 128 features `attention_entropy_collapse` is told"),
    Mistake(22, "scale after the softmax", unseen="attention at a fraction of its strength, which training undoes"),
    Mistake(23, "mask constant too weak", (AHEAD,), planted(weak_mask, steps=20)),
    Mistake(24, "causal mask dropped on one path", (AHEAD,), planted(held_out_cases.looking_ahead)),
    Mistake(25, "fully masked row", ("residual_not_finite",), planted(held_out_cases.after(masked_row))),
    Mistake(26, "QK norm built and never called", unseen="a parameter that nothing uses has no gradient, and no state"),
    Mistake(27, "RoPE pairs mismatched", unseen="only the loss is worse; no state leaves its range"),
    Mistake(28, "root mean square reduced in bfloat16", unseen="needs the same forward in float32 to compare with"),
    Mistake(29, "squares overflow in half precision", ("constant_branch", "idle_layer"),
            planted(overflowing_squares, steps=40)),
    Mistake(30, "float16 residual stream overflows", ("residual_not_finite",),
            planted(held_out_cases.after(HalfStream()))),
    Mistake(31, "norm gains stuck at 1 in bfloat16", ("lost_update",),
            trained_by(lambda model: torch.optim.Adam(model.parameters(), lr=1e-3), half=True)),
    Mistake(32, "clipping before unscaling", unseen="gradients are measured before they are clipped"),
    Mistake(33, "router in bfloat16", unseen="another expert on near ties leaves every number in its range"),
    Mistake(34, "mHC coefficients in bfloat16",
            unseen="sums that are wrong by a rounding of bfloat16 amplify nothing that a trained network shows"),
    Mistake(35, "backward of Sinkhorn overflows", ("gradient_not_finite",), planted(before(infinite_backward))),
    Mistake(36, "checkpointing over frozen embeddings", ("cut_gradient",), planted(before(detached))),
    Mistake(37, "the optimizer misses parameters", ("lost_update", "frozen_module"), trained_by(without_block_2)),
    Mistake(38, "weight decay on norm gains", unseen="gains that shrink are seen in a history of checkpoints alone"),
    Mistake(39, "accumulation not divided", unseen="the scale of a loss is its own"),
    Mistake(40, "auxiliary loss never added", unseen="the total loss is one number"),
    Mistake(41, "auxiliary loss near constant", unseen="the total loss is one number"),
    Mistake(42, "router collapse", ("silent_module", "lost_update"), of(EXPERTS)),
    Mistake(43, "running statistics never written", ("stale_statistics",), of(STALE)),
    Mistake(44, "a frozen batch norm goes on learning", unseen="one capture has one set of buffers"),
    Mistake(45, "eps is 0", ("residual_not_finite",), planted(held_out_cases.after(zero_eps))),
    Mistake(46, "tied head lost on restore", unseen="a head of its own is a design; the loss alone is at guessing"),
    Mistake(47, "nothing loaded and no error", ("untrained_weights",), not_loaded),
    Mistake(48, "LoRA scale wrong", unseen="an adapter 8 times as large is another network"),
    Mistake(49, "bfloat16 bytes read as float32", unseen="the matrices are doubly stochastic, only not those of the file"),
)  # fmt: skip


def told(mistake: Mistake, wrong: bool) -> list[Finding]:
    """What is said of the wrong network, or of the right twin, by the verdicts that name the mistake."""
    assert mistake.run is not None
    found = diagnostics.judge(diagnostics.analyze(mistake.run(wrong)))
    return [each for each in found if each.verdict in mistake.found_by]


def row(mistake: Mistake) -> tuple[str, ...]:
    """What the page says of one mistake."""
    if mistake.run is None:
        return str(mistake.number), mistake.name, f"cannot be seen: {mistake.unseen}", "", ""
    wrong, right = (told(mistake, each) for each in (True, False))
    found = ", ".join(f"{f.severity.name} `{f.verdict}`" for f in wrong) or "**missed**"
    where = "; ".join(dict.fromkeys(_where(f) for f in wrong))
    loud = ", ".join(f"{f.severity.name} `{f.verdict}`" for f in right if f.severity > Severity.INFO)
    return str(mistake.number), mistake.name, found, where, loud or "silent"


def _where(finding: Finding) -> str:
    if finding.axis == "run":
        return "the whole network"
    span = f"{finding.first}" if finding.first == finding.last else f"{finding.first} to {finding.last}"
    return f"{finding.axis} {span}" + (f", stream {finding.stream}" if finding.stream else "")


def main() -> int:
    """Print the table, and write it to the page."""
    torch.set_num_threads(1)
    rows = []
    for each in MISTAKES:
        rows.append(row(each))
        sys.stdout.write(f"{' | '.join(rows[-1])}\n")
        sys.stdout.flush()
    head = ("", "mistake", "told by", "where", "its right twin")
    missed, seen = (sum(word in each[2] for each in rows) for word in ("missed", "`"))
    page.write_section("Mistakes that people made", f"""
`python -m tests.verdicts.mistakes`: 49 mistakes from public threads, each planted in a tiny network with its right twin.
{seen} are told, {missed} missed, {len(rows) - seen - missed} cannot be seen in a run.

{page.table(head, rows)}
""")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
