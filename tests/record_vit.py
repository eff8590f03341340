"""Records small random Vision Transformers and text towers of every published naming, and what
PyTorch computes with them: tests/data/vit/*.npz.

    pip install torch torchvision timm transformers open_clip_torch    # in an environment of its own; each file names the versions
    python tests/record_vit.py [timm_ones] [hugging_face] [google] [swiglu] [sixteen_heads]
        [exact_gelu] [post_norm] [dinov3] [text]    # all, or these

Each file holds the weights under their published names (`weights/...`), images of the size of the
positions and of a larger one, and the tokens after the final norm, prefix tokens first. Files of
text towers hold ids as long as the context, and shorter ones. `config` is the text of the
`config.json` that the publisher writes beside such a file (open_clip: `open_clip_config.json`). The
networks are those of timm, transformers and open_clip; Google's files are made here and read by the
loaders of timm and open_clip.
"""

import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import timm
import torch
import transformers
from open_clip.convert import load_big_vision_weights
from safetensors.torch import load_file
from timm.models._hub import save_config_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer, _load_weights

OUT = Path(__file__).parent / "data" / "vit"
WIDTH, DEPTH, HEADS, PATCH, SIDE, MLP = 16, 2, 2, 4, 4, 24
IMAGE, LARGE = PATCH * SIDE, (PATCH * 6, PATCH * 5)
SMALL = {
    "img_size": IMAGE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": MLP / WIDTH,
    "num_classes": 3,
}
HF = {
    "hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS,
    "intermediate_size": MLP, "image_size": IMAGE,
    "patch_size": PATCH,
}  # fmt: skip
VERSIONS = (
    f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}"
)
VOCABULARY, CONTEXT, SHARED = 30, 8, 5
IDS = torch.tensor(
    [[28, 3, 7, 11, 29, 0, 0, 0], [28, 5, 29, 0, 29, 0, 0, 0], [28, 1, 2, 3, 4, 5, 6, 29]]
)  # 29 ends a text


def main(parts: list[str]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    parts_of_all = (
        timm_ones, hugging_face, google, swiglu, sixteen_heads, exact_gelu, post_norm, dinov3, text,
    )  # fmt: skip
    for part in parts_of_all:
        if not parts or part.__name__ in parts:
            part()


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives a model weights that make every parameter count: norms, biases and LayerScale are as
    random as the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.2
            drawn = torch.randn(parameter.shape, generator=generator) * scale + (
                1.0 if "norm" in name and name.endswith("weight") else 0.0
            )
            parameter.copy_(drawn.half())  # as the file stores them
    return model.eval()


def save(name: str, weights: dict, config: str | None = None, **outputs) -> None:
    """Writes a file; `outputs` are functions from images to the tokens after the final norm, or to
    a descriptor.
    """
    generator = torch.Generator().manual_seed(1)
    found = {
        f"weights/{key}": np.asarray(
            value.detach().float().numpy() if hasattr(value, "detach") else value,
            np.float32 if key.startswith("rope") else np.float16,  # periods are not drawn
        )
        for key, value in weights.items()
    }
    if config is not None:
        found["config"] = np.array(config)
    for size, shape in (("", (IMAGE, IMAGE)), ("large_", LARGE)):
        images = torch.randn((2, 3, *shape), generator=generator)
        with torch.no_grad():
            found[f"{size}images"] = images.permute(0, 2, 3, 1).numpy()
            for key, output in outputs.items():
                try:
                    found[f"{size}{key}"] = output(images).numpy()
                except (TypeError, AssertionError, RuntimeError):
                    if not size:
                        raise
                    found.pop(f"{size}images", None)  # this network takes one size
    np.savez_compressed(OUT / f"{name}.npz", about=VERSIONS, **found)
    print(
        name, {key: value.shape for key, value in found.items() if not key.startswith("weights/")}
    )


def timm_ones() -> None:
    quick = timm.layers.get_act_layer("quick_gelu")
    networks = {
        "timm-vit": VisionTransformer(**SMALL, dynamic_img_size=True),
        "timm-mae-finetuned": VisionTransformer(**SMALL, global_pool="avg", dynamic_img_size=True),
        "timm-deit-distilled": VisionTransformerDistilled(**SMALL, dynamic_img_size=True),
        "timm-deit3": VisionTransformer(
            **SMALL, no_embed_class=True, init_values=1e-5, dynamic_img_size=True
        ),
        "timm-dinov2-registers": VisionTransformer(
            **SMALL, reg_tokens=3, no_embed_class=True, init_values=1e-5, dynamic_img_size=True
        ),
        "timm-clip": VisionTransformer(
            **SMALL,
            pre_norm=True,
            act_layer=quick,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
            dynamic_img_size=True,
        ),
        "timm-siglip": VisionTransformer(
            **SMALL | {"num_classes": 0},
            class_token=False,
            global_pool="map",
            dynamic_img_size=True,
        ),
        "timm-no-bias": VisionTransformer(
            **SMALL,
            qkv_bias=False,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            dynamic_img_size=True,
        ),
    }
    for name, network in networks.items():
        randomised(network)
        outputs = {"tokens": network.forward_features}
        if name == "timm-mae-finetuned":  # its norm comes after the pooling
            outputs = {
                "descriptor": lambda x, network=network: network.forward_head(
                    network.forward_features(x), pre_logits=True
                )
            }
        if name == "timm-siglip":
            outputs["descriptor"] = network
        save(name, network.state_dict(), **outputs)
    mae = randomised(VisionTransformer(**SMALL | {"num_classes": 0}))
    extra = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, WIDTH),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
    }
    save("mae", mae.state_dict() | extra, tokens=mae.forward_features)
    deit3 = randomised(VisionTransformer(**SMALL, no_embed_class=True, init_values=1e-5))
    renamed = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in deit3.state_dict().items()
    }
    save("deit3", renamed, tokens=deit3.forward_features)


def hugging_face() -> None:
    vit = randomised(
        transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=3))
    )
    save(
        "hf-vit",
        published(vit),
        tokens=lambda x: vit.vit(x, interpolate_pos_encoding=True).last_hidden_state,
    )
    dinov2 = randomised(
        transformers.Dinov2Model(
            transformers.Dinov2Config(
                **{k: v for k, v in HF.items() if k != "intermediate_size"}, mlp_ratio=2
            )
        )
    )
    save("hf-dinov2", published(dinov2), tokens=lambda x: dinov2(x).last_hidden_state)
    config = transformers.Dinov2WithRegistersConfig(
        **{k: v for k, v in HF.items() if k != "intermediate_size"},
        mlp_ratio=2,
        num_register_tokens=3,
    )
    registers = randomised(transformers.Dinov2WithRegistersModel(config))
    save(
        "hf-dinov2-registers", published(registers), tokens=lambda x: registers(x).last_hidden_state
    )
    clip = randomised(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**HF, projection_dim=5)
        )
    )

    def normed(x, model=clip.vision_model):
        return model.post_layernorm(model(x, interpolate_pos_encoding=True).last_hidden_state)

    projected = {"logits": lambda x: clip(x, interpolate_pos_encoding=True).image_embeds}
    save("hf-clip", published(clip), tokens=normed, **projected)
    save("openai-clip", openai_names(published(clip)), tokens=normed, **projected)
    siglip = randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)))
    outputs = {"tokens": "last_hidden_state", "descriptor": "pooler_output"}
    save(
        "hf-siglip",
        published(siglip),
        **{
            key: lambda x, name=name: getattr(siglip(x, interpolate_pos_encoding=True), name)
            for key, name in outputs.items()
        },
    )


def published(model: transformers.PreTrainedModel) -> dict:
    """Returns the weights under the names of the file, which differ from those in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def openai_names(weights: dict) -> dict:
    """The names of openai/CLIP's model.py, which fuses the three projections and does not transpose
    the last projection.
    """
    found, parts = {}, {}
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "embeddings.patch_embedding.weight": "conv1.weight", "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    for name, value in weights.items():
        if name == "visual_projection.weight":
            found["visual.proj"] = value.T.contiguous()
            continue
        short = name.removeprefix("vision_model.")
        for theirs, ours in names.items():
            short = short.replace(theirs, ours)
        if "self_attn." in short:
            module, part, leaf = short.replace("self_attn", "attn").rsplit(".", 2)
            parts.setdefault(f"visual.{module}.in_proj_{leaf}", {})[part[0]] = value
        else:
            found[f"visual.{short}"] = value
    found |= {name: torch.cat([each[part] for part in "qkv"]) for name, each in parts.items()}
    return found | {
        "logit_scale": torch.tensor(4.6),
        "ln_final.weight": torch.ones(4),
        "token_embedding.weight": torch.ones(7, 4),
    }


def swiglu() -> None:
    """The gated MLP of DINOv2-g: timm's names, those of the original files, which timm renames, and
    Hugging Face's.
    """
    packed = {
        "mlp_layer": timm.layers.SwiGLUPacked,
        "act_layer": torch.nn.SiLU,
        "init_values": 1e-5,
        "dynamic_img_size": True,
    }
    network = randomised(
        VisionTransformer(**SMALL | {"mlp_ratio": 2 * MLP / WIDTH, "num_classes": 0}, **packed)
    )
    save("timm-swiglu", network.state_dict(), tokens=network.forward_features)
    weights = {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
        for name, value in network.state_dict().items()
    }
    weights["mask_token"] = torch.zeros(1, WIDTH)
    network.load_state_dict(
        timm.models.vision_transformer.checkpoint_filter_fn(dict(weights), network)
    )
    save("dinov2-swiglu", weights, tokens=network.forward_features)
    config = transformers.Dinov2Config(
        **{k: v for k, v in HF.items() if k != "intermediate_size"},
        mlp_ratio=2,
        use_swiglu_ffn=True,
    )
    hugging = randomised(transformers.Dinov2Model(config))
    save("hf-dinov2-swiglu", published(hugging), tokens=lambda x: hugging(x).last_hidden_state)


def google() -> None:
    """Files as Flax wrote them, read by timm's loader."""
    tanh = partial(torch.nn.GELU, approximate="tanh")
    head = WIDTH // HEADS
    for name, attention, second, mlp, prefix in (
        ("augreg", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3", ""),
        (
            "big_vision-siglip",
            "MultiHeadDotProductAttention_0",
            "LayerNorm_1",
            "MlpBlock_0",
            "params/img/",
        ),
    ):
        rng = np.random.default_rng(0)
        weights: dict[str, np.ndarray] = {}

        def put(key: str, *shape: int, weights=weights, rng=rng, prefix=prefix) -> None:
            drawn = rng.normal(0, 0.3, shape) + (1.0 if key.endswith("scale") else 0.0)
            weights[prefix + key] = drawn.astype(np.float16).astype(np.float32)

        def block(inside: str, attention: str, put=put) -> None:
            for each in ("query", "key", "value"):
                put(f"{inside}{attention}/{each}/kernel", WIDTH, HEADS, head)
                put(f"{inside}{attention}/{each}/bias", HEADS, head)
            put(f"{inside}{attention}/out/kernel", HEADS, head, WIDTH)
            put(f"{inside}{attention}/out/bias", WIDTH)

        def dense(key: str, inner: int, outer: int, put=put) -> None:
            put(f"{key}/kernel", inner, outer)
            put(f"{key}/bias", outer)

        def norm(key: str, put=put) -> None:
            put(f"{key}/scale", WIDTH)
            put(f"{key}/bias", WIDTH)

        put("embedding/kernel", PATCH, PATCH, 3, WIDTH)
        put("embedding/bias", WIDTH)
        for i in range(DEPTH):
            inside = f"Transformer/encoderblock_{i}/"
            norm(f"{inside}LayerNorm_0")
            norm(f"{inside}{second}")
            block(inside, attention)
            dense(f"{inside}{mlp}/Dense_0", WIDTH, MLP)
            dense(f"{inside}{mlp}/Dense_1", MLP, WIDTH)
        norm("Transformer/encoder_norm")
        if name == "augreg":
            put("cls", 1, 1, WIDTH)
            put("Transformer/posembed_input/pos_embedding", 1, 1 + SIDE * SIDE, WIDTH)
            dense("head", WIDTH, 3)
            network = VisionTransformer(**SMALL, act_layer=tanh)
        else:
            put("pos_embedding", 1, SIDE * SIDE, WIDTH)
            put("MAPHead_0/probe", 1, 1, WIDTH)
            block("MAPHead_0/", attention)
            norm("MAPHead_0/LayerNorm_0")
            dense("MAPHead_0/MlpBlock_0/Dense_0", WIDTH, MLP)
            dense("MAPHead_0/MlpBlock_0/Dense_1", MLP, WIDTH)
            network = VisionTransformer(
                **SMALL | {"num_classes": 0}, class_token=False, global_pool="map", act_layer=tanh
            )
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder) / "weights.npz", **weights)
            _load_weights(network.eval(), str(Path(folder) / "weights.npz"))
        save(
            name,
            weights,
            tokens=network.forward_features,
            **({} if name == "augreg" else {"descriptor": network}),
        )


def timm_config(network: torch.nn.Module) -> str:
    """The text of the `config.json` that timm writes beside the weights of a network."""
    with tempfile.TemporaryDirectory() as folder:
        save_config_for_hf(network, str(Path(folder) / "config.json"))
        return (Path(folder) / "config.json").read_text()


def hf_config(model: transformers.PreTrainedModel) -> str:
    return model.config.to_json_string(use_diff=True)


def timm_named(name: str, **changes) -> torch.nn.Module:
    """The network that timm makes of a published name, at a small size."""
    sizes = {
        "img_size": IMAGE,
        "patch_size": PATCH,
        "embed_dim": 32,
        "depth": DEPTH,
        "num_heads": 2,
        "mlp_ratio": 1.25,
    }
    return randomised(timm.create_model(name, **sizes | changes).eval())


def sixteen_heads() -> None:
    """Networks with 16 heads, as many giants have, at a width that does not tell it."""
    sizes = {"embed_dim": 64, "num_heads": 16, "mlp_ratio": 0.5, "dynamic_img_size": True}
    clip = timm_named("vit_giant_patch14_clip_224", num_classes=5, **sizes)
    save("timm-clip-16-heads", clip.state_dict(), timm_config(clip), tokens=clip.forward_features)
    siglip = timm_named("vit_giantopt_patch16_siglip_256", **sizes)
    save(
        "timm-siglip-16-heads",
        siglip.state_dict(),
        timm_config(siglip),
        tokens=siglip.forward_features,
        descriptor=siglip,
    )
    sizes = {"hidden_size": 64, "num_attention_heads": 16, "intermediate_size": 32}
    hugging = randomised(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF | sizes))
    )
    outputs = {"tokens": "last_hidden_state", "descriptor": "pooler_output"}
    save(
        "hf-siglip-16-heads",
        published(hugging),
        hf_config(hugging),
        **{
            key: lambda x, name=name: getattr(hugging(x, interpolate_pos_encoding=True), name)
            for key, name in outputs.items()
        },
    )


def exact_gelu() -> None:
    """CLIPs whose GELU is the exact one, as LAION's and most of open_clip's."""
    clip = randomised(
        transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**HF, projection_dim=5, hidden_act="gelu")
        )
    )

    def normed(x, model=clip.vision_model):
        return model.post_layernorm(model(x, interpolate_pos_encoding=True).last_hidden_state)

    save(
        "hf-clip-exact",
        published(clip),
        hf_config(clip),
        tokens=normed,
        logits=lambda x: clip(x, interpolate_pos_encoding=True).image_embeds,
    )
    sizes = {
        "embed_dim": SHARED,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": IMAGE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH,
            "head_width": WIDTH // HEADS, "mlp_ratio": MLP / WIDTH,
        },
        "text_cfg": {
            "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS,
            "layers": 1, "mlp_ratio": MLP / WIDTH,
        },
    }  # fmt: skip
    preprocess = {"mean": [0.48145466, 0.4578275, 0.40821073]}
    preprocess["std"] = [0.26862954, 0.26130258, 0.27577711]
    network = randomised(open_clip.CLIP(**sizes))
    visual = network.visual

    def tokens(x):
        return visual.ln_post(visual.transformer(visual._embeds(x)))

    save(
        "open_clip-exact",
        network.state_dict(),
        json.dumps({"model_cfg": sizes, "preprocess_cfg": preprocess}),
        tokens=tokens,
        logits=network.encode_image,
    )


def post_norm() -> None:
    """timm's residual post-norm blocks, under the names of its pre-norm ones."""
    sizes = {"dynamic_img_size": True, "num_classes": 3}
    mean = timm_named("vit_base_patch16_rpn_224", **sizes)
    save(
        "timm-post-norm",
        mean.state_dict(),
        timm_config(mean),
        descriptor=lambda x: mean.forward_head(mean.forward_features(x), pre_logits=True),
    )
    token = timm_named(
        "vit_base_patch16_rpn_224", class_token=True, global_pool="token", qkv_bias=True, **sizes
    )
    save(
        "timm-post-norm-token",
        token.state_dict(),
        timm_config(token),
        tokens=token.forward_features,
        logits=token,
    )


def dinov3() -> None:
    """Rotary positions: timm's names, Hugging Face's, and those of the original files, which timm's
    loader reads. Heads have 16 channels, so 4 periods, of which bfloat16 rounds two.
    """
    names = {"timm-dinov3": "vit_small_patch16_dinov3"}
    names["timm-dinov3-swiglu"] = "vit_small_plus_patch16_dinov3_qkvb"
    for name, architecture in names.items():
        network = timm_named(architecture)
        save(name, network.state_dict(), timm_config(network), tokens=network.forward_features)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_register_tokens": 4}
    gated = {
        "use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False,
    }  # fmt: skip
    for name, changes in {"hf-dinov3": {}, "hf-dinov3-swiglu": gated}.items():
        model = randomised(
            transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**HF | sizes | changes))
        )
        save(
            name,
            published(model),
            hf_config(model),
            tokens=lambda x, model=model: model(x).last_hidden_state,
            descriptor=lambda x, model=model: model(x).pooler_output,
        )
    for name, architecture, rounded in (
        ("dinov3", "vit_small_patch16_dinov3_qkvb", torch.float32),
        ("dinov3-swiglu", "vit_7b_patch16_dinov3", torch.bfloat16),
    ):
        network = timm_named(architecture, swiglu_align_to=8)
        periods = (100.0 ** (torch.arange(4) / 4)).to(rounded).float()
        network.rope.periods.copy_(periods)
        weights = original_names(network.state_dict()) | {
            "rope_embed.periods": periods,
            "mask_token": torch.zeros(1, 32),
        }
        if rounded == torch.bfloat16:
            weights |= {f"local_cls_norm.{leaf}": torch.ones(32) for leaf in ("weight", "bias")}
        timm_names = timm.models.eva.checkpoint_filter_fn(dict(weights), network)
        network.load_state_dict(timm_names)
        save(name, weights, tokens=network.forward_features)


def original_names(weights: dict) -> dict:
    """The names of facebookresearch/dinov3, where the bias of the keys is there but masked."""
    names = (
        (r"reg_token", "storage_tokens"), (r"\.gamma_(\d)", r".ls\1.gamma"),
        (r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2"),
    )  # fmt: skip
    gated = any("fc1_g" in name for name in weights)
    found = {}
    for name, value in weights.items():
        for theirs, ours in (*names, *([(r"mlp\.fc2", "mlp.w3")] if gated else [])):
            name = re.sub(theirs, ours, name)
        found[name] = value
    for name in [name for name in found if name.endswith("q_bias")]:
        query, value = found.pop(name), found.pop(name.replace("q_bias", "v_bias"))
        together = name.replace("q_bias", "qkv.bias")
        found[together] = torch.cat([query, torch.full_like(query, 0.5), value])
        found[f"{together}_mask"] = torch.ones(3, len(query))
        found[f"{together}_mask"][1] = 0
        found[f"{together}_mask"] = found[f"{together}_mask"].reshape(-1)
    return found


def text() -> None:
    """Towers that see only the text before a token and take the token of its end (CLIP), and towers
    that see all and take the last token (SigLIP).
    """
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
    }
    of_text = sizes | {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 28,
        "eos_token_id": 29,
        "pad_token_id": 0,
    }
    of_pictures = sizes | {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    clip = randomised(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=of_text, vision_config=of_pictures, projection_dim=SHARED
            )
        )
    )
    save_text(
        "text-hf-clip",
        published(clip),
        lambda ids: (
            clip.text_model(ids).last_hidden_state,
            clip.text_projection(clip.text_model(ids).pooler_output),
        ),
    )
    config = transformers.SiglipConfig(
        text_config=of_text | {"projection_size": SHARED}, vision_config=of_pictures
    )
    siglip = randomised(transformers.SiglipModel(config))
    save_text("text-hf-siglip", published(siglip), lambda ids: tuple(siglip.text_model(ids)[:2]))
    pictures = {
        "image_size": IMAGE,
        "patch_size": 8,
        "width": WIDTH,
        "layers": 1,
        "head_width": WIDTH // HEADS,
        "mlp_ratio": MLP / WIDTH,
    }
    texts = {
        "context_length": CONTEXT,
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": HEADS,
        "layers": DEPTH,
        "mlp_ratio": MLP / WIDTH,
    }
    openai = randomised(open_clip.CLIP(SHARED, pictures, texts, quick_gelu=True))
    custom = open_clip.CustomTextCLIP(
        SHARED, pictures, texts | {"output_tokens": True}, quick_gelu=True
    )
    custom.load_state_dict(
        {
            name if name in custom.state_dict() else f"text.{name}": value
            for name, value in openai.state_dict().items()
        }
    )
    save_text(
        "text-open_clip",
        openai.state_dict(),
        lambda ids: custom.text(ids)[::-1],
        short=False,
        logits=openai.encode_image,
    )
    siglip = open_clip.CustomTextCLIP(SHARED, pictures, texts | SIGLIP, init_logit_bias=-10)
    siglip.visual = torch.nn.Module()
    siglip.visual.trunk = tower_of_siglip(torch.nn.GELU)
    randomised(siglip)
    save_text(
        "text-open_clip-siglip",
        siglip.state_dict(),
        lambda ids: siglip.text(ids)[::-1],
        descriptor=siglip.visual.trunk,
    )
    google_text(open_clip.CustomTextCLIP(SHARED, pictures, texts | SIGLIP, init_logit_bias=-10))


SIGLIP = {
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
    "output_tokens": True,
}  # fmt: skip


def tower_of_siglip(gelu) -> VisionTransformer:
    small = SMALL | {"num_classes": 0, "depth": 1, "patch_size": 8}
    return VisionTransformer(**small, class_token=False, global_pool="map", act_layer=gelu)


def google_text(network: open_clip.CustomTextCLIP) -> None:
    """A file of big_vision's with both towers, read by open_clip's loader."""
    rng = np.random.default_rng(0)
    attention = {
        f"{part}/kernel": (WIDTH, HEADS, WIDTH // HEADS) for part in ("query", "key", "value")
    }
    attention |= {f"{part}/bias": (HEADS, WIDTH // HEADS) for part in ("query", "key", "value")}
    attention |= {"out/kernel": (HEADS, WIDTH // HEADS, WIDTH), "out/bias": (WIDTH,)}
    mlp = {
        "Dense_0/kernel": (WIDTH, MLP),
        "Dense_0/bias": (MLP,),
        "Dense_1/kernel": (MLP, WIDTH),
        "Dense_1/bias": (WIDTH,),
    }
    norm = {"scale": (WIDTH,), "bias": (WIDTH,)}
    heads = inside("MultiHeadDotProductAttention_0", attention)
    block = (
        inside("LayerNorm_0", norm)
        | inside("LayerNorm_1", norm)
        | inside("MlpBlock_0", mlp)
        | heads
    )
    texts = {
        "Embed_0/embedding": (VOCABULARY, WIDTH),
        "pos_embedding": (1, CONTEXT, WIDTH),
        "head/kernel": (WIDTH, SHARED),
        "head/bias": (SHARED,),
    }
    texts |= inside("Encoder_0/encoder_norm", norm)
    for i in range(DEPTH):
        texts |= inside(f"Encoder_0/encoderblock_{i}", block)
    pictures = {
        "embedding/kernel": (8, 8, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "pos_embedding": (1, 4, WIDTH),
    }
    pictures |= inside("Transformer/encoderblock_0", block) | inside(
        "Transformer/encoder_norm", norm
    )
    pictures |= (
        {"MAPHead_0/probe": (1, 1, WIDTH)}
        | inside("MAPHead_0/LayerNorm_0", norm)
        | inside("MAPHead_0/MlpBlock_0", mlp)
    )
    pictures |= inside("MAPHead_0", heads)
    shapes = (
        inside("params/txt", texts)
        | inside("params/img", pictures)
        | {
            "params/t": (1,),
            "params/b": (1,),
        }
    )
    weights = {
        name: rng.normal(0, 0.3, shape) + name.endswith("scale") for name, shape in shapes.items()
    }
    weights = {name: value.astype(np.float16).astype(np.float32) for name, value in weights.items()}
    trunk = tower_of_siglip(partial(torch.nn.GELU, approximate="tanh")).eval()
    network.eval()
    holder = SimpleNamespace(
        visual=SimpleNamespace(trunk=trunk),
        text=network.text,
        logit_scale=network.logit_scale,
        logit_bias=network.logit_bias,
    )
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "weights.npz", **weights)
        load_big_vision_weights(holder, str(Path(folder) / "weights.npz"))
    save_text("text-big_vision", weights, lambda ids: network.text(ids)[::-1], descriptor=trunk)


def inside(folder: str, shapes: dict) -> dict:
    return {f"{folder}/{name}": shape for name, shape in shapes.items()}


def save_text(name: str, weights: dict, output, short: bool = True, **of_pictures) -> None:
    """Writes a file; `output` is a function from ids to the tokens after the final norm and the
    projected descriptor, `of_pictures` are like the outputs of `save`.
    """
    found = {
        f"weights/{key}": (
            (value.detach().numpy() if hasattr(value, "detach") else value).astype(np.float16)
        )
        for key, value in weights.items()
    }
    with torch.no_grad():
        for size, ids in (("", IDS), *([("short_", IDS[:2, :5])] if short else [])):
            tokens, projected = output(ids)
            found |= {
                f"{size}ids": ids.numpy(),
                f"{size}tokens": tokens.numpy(),
                f"{size}projected": projected.numpy(),
            }
        images = torch.randn((2, 3, IMAGE, IMAGE), generator=torch.Generator().manual_seed(1))
        for key, each in of_pictures.items():
            found |= {"images": images.permute(0, 2, 3, 1).numpy(), key: each(images).numpy()}
    np.savez_compressed(
        OUT / f"{name}.npz", about=f"{VERSIONS}, open_clip {open_clip.__version__}", **found
    )
    print(
        name, {key: value.shape for key, value in found.items() if not key.startswith("weights/")}
    )


if __name__ == "__main__":
    main(sys.argv[1:])
