"""Which models of timm and torchvision stand for their families? The smallest of each, on small images."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from tests.models.matrix.cases import Case, NotBuildable, Subject
from tests.models.matrix.expectations import IMAGES, PLAIN
from tests.models.matrix.transformers_models import generic

SIDES = (32, 64, 96, 224)
"""Of the images, the smallest first; many models take one size only, or need a few places after all of their stages."""
DEEPEST_INPUT = 1_500_000_000
"""Multiplications (parameters × places, roughly) above which a larger image is not tried."""

# The smallest member of every module of timm.
TIMM = {
    "byoanet": "halonet_h1", "byobnet": "mobileone_s1", "cait": "cait_xxs24_224", "coat": "coat_tiny",
    "convit": "convit_tiny", "convmixer": "convmixer_768_32", "convnext": "test_convnext", "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cs3darknet_focus_s", "cspnext": "cspnext_tiny",
    "davit": "davit_tiny", "deit": "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla46x_c",
    "dpn": "dpn48b", "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "efficientnet_b0", "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0", "efficientvit_msra": "efficientvit_m0", "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b", "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny", "hrnet": "hrnet_w18_small", "iformer": "iformer_t",
    "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small", "levit": "levit_128s",
    "lowformer": "lowformer_b0", "mambaout": "test_mambaout", "maxxvit": "coatnet_pico_rw_224",
    "metaformer": "caformer_s18", "mlp_mixer": "gmlp_ti16_224", "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny", "nest": "nest_tiny", "nextvit": "nextvit_small",
    "pit": "pit_ti_224", "pvt_v2": "pvt_v2_b0", "rdnet": "rdnet_tiny", "regnet": "regnetx_002",
    "repghost": "repghostnet_050", "repvit": "repvit_m1", "res2net": "res2net50_14w_8s", "resnest": "resnest14d",
    "resnet": "ecaresnext26t_32x4d", "resnetv2": "resnetv2_18", "rexnet": "rexnet_100", "selecsls": "selecsls42",
    "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s", "shvit": "shvit_s1", "sknet": "skresnet18",
    "starnet": "starnet_s050", "swiftformer": "swiftformer_xs", "swin_transformer": "swin_tiny_patch4_window7_224",
    "tiny_vit": "tiny_vit_5m_224", "tnt": "tnt_s_legacy_patch16_224", "tresnet": "tresnet_m",
    "twins": "twins_pcpvt_small", "visformer": "visformer_tiny", "vision_transformer_relpos": "test_vit_relpos",
    "volo": "volo_d1_224", "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception",
    "xception_aligned": "xception41p", "xcit": "xcit_nano_12_p8_224",
    "vision_transformer": "vit_tiny_patch16_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_ns_224",
    "beit": "beit_base_patch16_224",
    "deepseek_vit": "deepseek_vit_412m",
    "gemma4_vit": "gemma4_vit_167m",
    "mobilenetv5": "mobilenetv5_base",
    "naflexvit": "naflexvit_base_patch16_gap",
    "qwen3_vit": "qwen3_vit_88m",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "nfnet": "nfnet_l0",
}  # fmt: skip

TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50",
    "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "wide_resnet50_2", "vit_b_32",
    "mc3_18", "mvit_v2_s", "r2plus1d_18", "r3d_18", "swin3d_t", "fcn_resnet50", "lraspp_mobilenet_v3_large",
)  # fmt: skip


def image_cases() -> list[Case]:
    """One for every family of timm and torchvision."""
    found = [
        Case("timm", family, partial(_timm, name), IMAGES.get(f"timm/{family}", PLAIN))
        for family, name in TIMM.items()
    ]
    return found + [
        Case("torchvision", name, partial(_torchvision, name), IMAGES.get(f"torchvision/{name}", PLAIN))
        for name in TORCHVISION
    ]


def _timm(name: str, seed: int) -> list[Subject]:
    def build(side: int) -> nn.Module:
        for sizes in ({"img_size": side, "depth": 3}, {"img_size": side}, {"depth": 3}):
            with contextlib.suppress(TypeError):  # a convolutional network has neither
                return timm.create_model(name, pretrained=False, num_classes=5, **sizes)
        return timm.create_model(name, pretrained=False, num_classes=5)

    return _fitting(build, 4, seed)


def _torchvision(name: str, seed: int) -> list[Subject]:
    video = name in torchvision.models.list_models(module=torchvision.models.video)

    def build(side: int) -> nn.Module:
        sized = {"image_size": side} if name.startswith("vit") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=5, **sized)

    if name == "mvit_v2_s":
        return _fitting(_small_mvit, 5, seed)
    return _fitting(build, 5 if video else 4, seed)


def _small_mvit(side: int) -> nn.Module:
    """Four blocks of MViTv2-S, each pooled as there: the whole one takes half a minute for one film, forward and backward."""
    three = [3, 3, 3]
    blocks = [
        torchvision.models.video.mvit.MSBlockConfig(1, 32, 32, three, three, [1, 1, 1], [1, 4, 4]),
        torchvision.models.video.mvit.MSBlockConfig(2, 32, 64, three, three, [1, 2, 2], [1, 2, 2]),
        torchvision.models.video.mvit.MSBlockConfig(2, 64, 64, three, three, [1, 1, 1], [1, 2, 2]),
        torchvision.models.video.mvit.MSBlockConfig(2, 64, 64, three, three, [1, 1, 1], [1, 2, 2]),
    ]
    return torchvision.models.video.MViT(
        (side, side), 16, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
        proj_after_attn=True, num_classes=5,
    )  # fmt: skip


def _fitting(build: Any, axes: int, seed: int) -> list[Subject]:
    """The model with the smallest images that it takes."""
    errors = []
    for side in SIDES:
        try:
            torch.manual_seed(seed)
            model = build(side).eval()
            make = partial(_batch, side, axes)
            with torch.no_grad():
                model(**make(2, 0))
        except Exception as error:
            errors.append(f"{side}: {type(error).__name__}: {str(error)[:120]}")
        else:
            return [Subject("", generic(model, seed), make, f"image of {side}×{side}")]
    raise NotBuildable(f"no size of an image fits: {' | '.join(errors)}")


def _batch(side: int, axes: int, sequences: int, tokens: int) -> dict[str, torch.Tensor]:
    """Images or, with five axes, films; they have no number of tokens to choose."""
    generator = torch.Generator().manual_seed(7)
    frames = (16,) if axes == 5 else ()
    return {"x": torch.randn(sequences, 3, *frames, side, side, generator=generator)}
