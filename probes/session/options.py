"""The options that `capture`, `record`, `describe` and `jacobian` share: their meaning, defaults and valid values."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict, TypeVar

import torch

from depthscope.diagnostics.errors import InputError, did_you_mean
from depthscope.probes.model.layout import is_packed
from depthscope.probes.model.modules import Mask
from depthscope.probes.structure.sites import SiteSelection, select

Function = TypeVar("Function", bound=Callable[..., Any])


# The types below are for editors and type checkers, which expand ``**options: Unpack[CaptureOptions]``. Defaults, meaning
# and validation are those of `Options`; a test compares the names.


class ModelOptions(TypedDict, total=False):
    """How the model is read."""

    layers: str | Iterable[str] | None
    layout: str | None
    streams: int | None
    mask: Mask


class SiteOptions(ModelOptions, total=False):
    """How the model is read, and which of its chains and sites."""

    chain: str | None
    sites: str | Iterable[str] | None


class CaptureOptions(SiteOptions, total=False):
    """How the model is read, which of its sites, and how much of the data is stored."""

    gradients: bool
    max_sequences: int
    seed: int
    first_sequence: int


@dataclass(frozen=True)
class Options:
    """What to capture of a model, and how much of it to store.

    Parameters
    ----------
    gradients : bool
        Also capture ∂loss/∂state at every depth.
    layers : str or iterable of str, optional
        Module paths of the blocks, a ModuleList's path, or a pattern such as ``"model.layers.{i}"``; found when not given.
    layout : str, optional
        Axes of the state, such as ``"B T D"`` or ``"B T N D"``; found when not given. One without ``B``, such as ``"T D"``,
        says that all tokens are of one sequence, as where several images are packed into one axis.
    streams : int, optional
        Number of streams, where the layout merges them with another axis, as ``"B T (N D)"`` does.
    chain : str, optional
        Which residual memory of the model is read, by its name in `describe`, where it has several; the model's own, and
        further towers of at least a tenth of its weights, when not given.
    sites : str or iterable of str, optional
        What to capture, by the names that people know, such as ``"mid"``, ``"final"``, ``"h_res"``, ``"attention"`` or
        ``"blocks.3.hook_resid_post"``: see `probes.structure.sites`. By default every state, and every weight of stream
        connections, and what the queries attend to; the insides of plain blocks (``mid``, ``branch_out``) only on request.
        A training loop looks at attention only where it is named here.
    mask : Tensor or callable, optional
        (B, T), true on real tokens, or a function from the model's arguments to it. Without it the arguments
        ``attention_mask`` and ``src_key_padding_mask`` are used.
    max_sequences : int
        Complete sequences to store raw, drawn uniformly from all that ran; the statistics count every token.
    seed : int
        Seed of that draw.
    first_sequence : int
        Number of the first sequence, where the batches are a part of larger data whose parts are captured one by one. The
        sample is drawn by these numbers, so that `open_run` of a folder of all parts gives the sample of one run over all.
    """

    gradients: bool = False
    layers: str | Iterable[str] | None = None
    layout: str | None = None
    streams: int | None = None
    chain: str | None = None
    sites: str | Iterable[str] | None = None
    mask: Mask = None
    max_sequences: int = 8
    seed: int = 0
    first_sequence: int = 0
    blocks: tuple[str, ...] | None = field(init=False)  # `layers` as a tuple
    selection: SiteSelection = field(init=False)  # what `sites` means
    is_packed: bool = field(init=False)  # whether `layout` says that all tokens are of one sequence

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _block_names(self.layers))
        names = self.sites if self.sites is None or isinstance(self.sites, str) else list(self.sites)
        object.__setattr__(self, "selection", select(names))
        object.__setattr__(self, "is_packed", self.layout is not None and is_packed(self.layout))
        for name, least in (("streams", 1), ("max_sequences", 1), ("first_sequence", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; expected at least {least}")
        if not (self.mask is None or callable(self.mask) or isinstance(self.mask, torch.Tensor)):
            raise InputError(
                f"mask is of type {type(self.mask).__name__}; expected a tensor (B, T), or a function from the model's "
                "arguments to one"
            )


@dataclass(frozen=True)
class Scope:
    """Whose forwards a session measures, and how much of them.

    ``only_own``: whether only calls of the model inside of ``own_call(session.owner)`` are recorded, and not the user's.
    ``sums``: whether statistics of all tokens are added up, next to the sampled sequences.
    ``origins``: finds from what the coefficients of connections were computed in a first forward; None where it is not asked.
    ``live_tokens``: how many tokens of a step are sampled for a live row; 0 for none.
    ``exact_sums``: as `TokenSums.is_exact`.
    ``digests``: whether a digest of each batch is kept, by which processes with the same data are told apart from others.
    """

    only_own: bool = False
    sums: bool = True
    origins: Callable[..., Any] | None = None
    live_tokens: int = 0
    exact_sums: bool = False
    digests: bool = False


def _block_names(layers: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if layers is None:
        return None
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            f"layers is {names!r}; expected module paths such as 'model.layers.{{i}}' or ['h.0', 'h.1']"
        )
    return names


# --- plain keywords ---


def takes_options(declared: type) -> Callable[[Function], Function]:
    """Decorate a function that passes its ``**options`` on to `Options`; ``declared``: the TypedDict of those that it takes.

    The options appear one by one in its signature and in its docstring, in place of ``**options``, so that `help` and
    notebooks show them as if they were written there; a name that is none of them is refused.
    """
    taken: frozenset[str] = declared.__optional_keys__  # type: ignore[attr-defined]
    names = [option.name for option in fields(Options) if option.name in taken]
    defaults = inspect.signature(Options).parameters

    def decorate(function: Function) -> Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [defaults[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        signature = inspect.signature(function).replace(parameters=[*own, *options])

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            unknown = [name for name in kwargs if name not in signature.parameters]
            if unknown:
                advice = did_you_mean(unknown[0], signature.parameters)
                raise TypeError(
                    f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}; {advice}"
                )
            return function(*args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        checked.__doc__ = _with_option_docs(function.__doc__, names)
        return checked  # type: ignore[return-value]

    return decorate


def _with_option_docs(docstring: str | None, names: list[str]) -> str | None:
    """A docstring with the entries of `Options` in place of the entry ``**options``."""
    if docstring is None or Options.__doc__ is None:  # python -OO removes docstrings
        return docstring
    _, section = inspect.cleandoc(Options.__doc__).split("Parameters\n----------\n")
    entries = {entry.partition(" :")[0]: entry.rstrip() for entry in re.split(r"\n(?=\S)", section)}
    chosen = "\n".join(entries[name] for name in names) + "\n"
    return re.sub(
        r"^\*\*options\b.*\n(?:    .*\n)*",
        lambda _: chosen,
        inspect.cleandoc(docstring) + "\n",
        flags=re.MULTILINE,
    )
