"""What is known of a model's connections, from reading its source? Everything that is not named here is plain."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """What a run may say of a model's connections.

    Parameters
    ----------
    families : tuple of str
        Words that the run's family may be; empty where the model is plain.
    streams : int
        Number of residual streams.
    layout : str
        Axes of a block's output, where it holds several streams.
    apart : bool
        Whether each stream is a tensor of its own.
    """

    families: tuple[str, ...] = ()
    streams: int = 1
    layout: str = ""
    apart: bool = False


PLAIN = Expected()
# Networks that have no residual connection, or that are outside of what is read: to be refused or unproven.
NO_RESIDUAL = Expected(("unproven", "unknown", "dense"))
# Their blocks read, or start again from, states of earlier depths: whatever the word, it is not «residual».
OVER_DEPTH = Expected(("depth_attention", "depth_history", "attention_residual", "depth"))
_MHC = Expected(("mhc",), 4, "B T N D")
_INDEPENDENT = Expected(("independent_hc",), 4, "B T N D")
_GATED = Expected(("gated",), 4, "B T (N D)")
_REVERSIBLE = Expected(("streams",), 2, apart=True)

TRANSFORMERS: dict[str, Expected] = {
    "deepseek_v4": _MHC,
    "glm5_next": _MHC,
    "glm5_next_text": _MHC,
    "hy_v4": _INDEPENDENT,
    "hy_v4_vl": _INDEPENDENT,
    "hy_v4_vl_text": _INDEPENDENT,
    "qwen4_exp": _GATED,
    "qwen4_exp_text": _GATED,
    "gemma3n": NO_RESIDUAL,
    "gemma3n_text": NO_RESIDUAL,
    "reformer": _REVERSIBLE,
    "inkling2": OVER_DEPTH,
    "inkling2_text": OVER_DEPTH,
    "inkling2_loop": OVER_DEPTH,
    "inkling2_loop_text": OVER_DEPTH,
}

IMAGES: dict[str, Expected] = {
    "torchvision/densenet121": NO_RESIDUAL,
    "timm/densenet": NO_RESIDUAL,
    "timm/repvit": Expected(("highway",)),  # squeeze-and-excitation multiplies the state itself
    "torchvision/alexnet": NO_RESIDUAL,
    "torchvision/vgg11": NO_RESIDUAL,
    "torchvision/squeezenet1_1": NO_RESIDUAL,
    "torchvision/googlenet": NO_RESIDUAL,
    "torchvision/inception_v3": NO_RESIDUAL,
    "timm/vgg": NO_RESIDUAL,
    "timm/inception_v3": NO_RESIDUAL,
    "timm/inception_v4": NO_RESIDUAL,
}
