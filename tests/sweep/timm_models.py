"""One small model of every module of timm.models."""

import warnings
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from sweep.sources import ROWS, Built, NotBuilt

# the entry point with the fewest parameters of each module, and what makes it smaller still; "side" is that of images
_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}
_DEEP = (1, 1, 2, 1)
_WIDE = (16, 32, 48, 64)
_SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", _VIT),
    "byoanet": ("ByobNet", {"cfg": None}),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", {**_VIT, "init_values": 0.5}),
    "coat": ("coat_tiny", {"embed_dims": (16, 32, 32, 32)}),
    "convit": ("convit_tiny", {"embed_dim": 8, "depth": 4, "num_heads": 4, "local_up_to_layer": 2}),
    "convmixer": ("ConvMixer", {"dim": 32, "depth": 3}),
    "convnext": ("test_convnext", {}),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_tiny_240", {"embed_dim": (16, 32), "num_heads": (2, 2)}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "davit": ("davit_tiny", {"depths": _DEEP, "embed_dims": _WIDE, "num_heads": (1, 2, 4, 4)}),
    "deepseek_vit": ("deepseek_vit_412m", _VIT),
    "deit": ("deit_tiny_patch16_224", _VIT),
    "densenet": ("densenet121", {"block_config": (2, 2, 2, 2)}),
    "dla": ("dla46x_c", {}),
    "dpn": ("dpn48b", {"k_sec": (2, 2, 2, 2)}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {"depths": (1, 1, 2, 2), "embed_dims": _WIDE, "num_vit": 1}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "efficientnet": ("mobilenetv2_035", {}),
    "efficientvim": ("efficientvim_m1", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", _VIT),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("FocalNet", {"depths": _DEEP, "embed_dim": 16, "layerscale_value": 0.5}),
    "gcvit": (
        "GlobalContextVit",
        {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 16, "img_size": 128, "layer_scale": 0.5},
    ),
    "gemma4_vit": ("gemma4_vit_167m", _VIT),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_b", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 2, 1)}),
    "hieradet_sam2": (
        "sam2_hiera_tiny",
        {"embed_dim": 16, "stages": (1, 2, 3, 2), "global_att_blocks": (4,)},
    ),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {}),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_coatnet", {}),
    "metaformer": ("MetaFormer", {"depths": _DEEP, "dims": _WIDE, "layer_scale_init_values": 0.5}),
    "mlp_mixer": ("MlpMixer", {"num_blocks": 3, "embed_dim": 32}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv5": ("mobilenetv5_base", {"channel_multiplier": 0.25}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("MultiScaleVit", {"cfg": None}),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", _VIT),
    "nasnet": ("nasnetalarge", {"num_features": 192, "stem_size": 16}),
    "nest": ("Nest", {"embed_dims": (16, 32, 32), "num_heads": (1, 2, 2), "depths": (2, 2, 2), "img_size": 64}),
    "nextvit": ("nextvit_small", {"depths": (1, 2, 5, 1), "stem_chs": (16, 8, 16)}),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {"depth": (1, 2, 1), "base_dims": (16, 16, 16), "heads": (1, 2, 2)}),
    "pnasnet": ("pnasnet5large", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "qwen3_vit": ("qwen3_vit_88m", _VIT),
    "rdnet": (
        "rdnet_tiny",
        {
            "num_init_features": 16,
            "growth_rates": (16, 24, 32, 32, 32, 32, 48),
            "ls_init_value": 0.5,
            "drop_path_rate": 0.0,
        },
    ),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m1", {"depth": (2, 2, 2, 2), "embed_dim": _WIDE}),
    "res2net": ("res2net50_14w_8s", {"layers": (1, 2, 2, 1)}),
    "resnest": ("resnest14d", {"layers": (1, 2, 2, 1)}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {"channels": _WIDE}),
    "rexnet": ("rexnet_100", {"width_mult": 0.5}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {"layers": _DEEP, "embed_dims": (16, 32, 32, 32), "hidden_sizes": (4, 8, 8, 8)}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {"layers": (1, 2, 2, 1)}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {"layers": (1, 2, 2, 2), "embed_dims": _WIDE}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"depths": _DEEP, "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "swin_transformer_v2": ("swinv2_tiny_window16_256", {"depths": _DEEP, "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {"depths": _DEEP, "embed_dim": 16, "num_heads": (1, 2, 2, 4)}),
    "tiny_vit": ("tiny_vit_5m_224", {"depths": (1, 2, 2, 1), "embed_dims": _WIDE, "num_heads": (1, 2, 2, 2)}),
    "tnt": ("tnt_s_legacy_patch16_224", {"embed_dim": 32, "inner_dim": 12, "depth": 3, "num_heads_outer": 2}),
    "tresnet": ("tresnet_m", {"layers": (1, 2, 2, 1), "width_factor": 0.25}),
    "twins": ("twins_svt_small", {"embed_dims": _WIDE, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 2)}),
    "vgg": ("vgg11", {"mlp_ratio": 0.02}),
    "visformer": ("visformer_tiny", {"embed_dim": 32, "depth": (2, 2, 2), "init_channels": 8, "num_heads": 2}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", _VIT),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", {**_VIT, "global_attn_indexes": (1,)}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": (
        "VOLO",
        {"layers": (2, 2, 2, 2), "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2), "img_size": 64},
    ),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41p", {}),
    "xcit": ("xcit_nano_12_p8_224", {"embed_dim": 32, "depth": 3, "num_heads": 2}),
}
_SIDES = (64, 96, 128, 160, 224, 256)


def names() -> list[str]:
    import timm

    return [name for name in timm.list_modules() if _entries(name)]


def _entries(module: str) -> list[str]:
    from timm.models import _registry

    return sorted(_registry._module_to_models[module])


@cache
def _smallest(module: str) -> str:
    """The entry point with the fewest parameters; in minutes for large modules."""
    import timm

    sizes: dict[str, int] = {}
    for name in _entries(module):
        try:
            with torch.device("meta"):
                sizes[name] = sum(one.numel() for one in timm.create_model(name).parameters())
        except Exception:
            continue
    if not sizes:
        raise NotBuilt("no entry point of it can be built")
    return min(sizes, key=lambda name: sizes[name])


def build(name: str) -> Built:
    entry, smaller = _SMALL.get(name, ("", {}))
    if entry not in _entries(name) and not entry[:1].isupper():
        entry, smaller = _smallest(name), {}
    sides = (smaller["side"],) if "side" in smaller else _SIDES
    smaller = {key: value for key, value in smaller.items() if key != "side"}
    why: Exception | None = None
    for side in sides:
        for options in ({"img_size": side}, {}):
            torch.manual_seed(0)
            x = torch.randn(ROWS, 3, side, side)
            try:
                model = _create(name, entry, {**options, **smaller, "num_classes": 7})
                with torch.no_grad():
                    model.eval()(x)
            except Exception as error:
                why = why or error
            else:
                return Built(model, (x,), family=name)
    raise NotBuilt(f"{entry}: {type(why).__name__} {why}")


def _create(module: str, entry: str, options: dict[str, Any]) -> nn.Module:
    """With drop paths, which are set to drop nothing, where the model has them."""
    import timm

    make = partial(timm.create_model, entry, pretrained=False)
    if entry[:1].isupper():
        made = import_module(f"timm.models.{module}")
        make = getattr(made, entry)
        if "cfg" in options:
            options = {**options, "cfg": _configuration(module, made)}
    for given in ({"drop_path_rate": 0.1, **options}, options):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return make(**given)
        except TypeError:
            if given is options:
                raise
    raise AssertionError


def _configuration(module: str, made: Any) -> Any:
    if module == "mvitv2":
        return made.MultiScaleVitCfg(depths=(1, 2, 1, 1), embed_dim=16)
    stages = [{"type": "bottle", "c": 32, "s": 1}, {"type": "self_attn", "c": 64, "s": 2}]
    return made.ByoModelCfg(
        blocks=tuple(made.ByoBlockCfg(d=2, gs=0, br=0.25, **stage) for stage in stages),
        stem_chs=16,
        stem_type="3x3",
        self_attn_layer="halo",
        self_attn_kwargs={"block_size": 4, "halo_size": 1},
    )
