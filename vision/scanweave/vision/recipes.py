"""Settings to start from, by name: `python -m scanweave.vision.train --recipe vim_small`.

    RECIPES      name -> Config
    get_recipe   one of them

    vim_tiny, vim_small       official scripts `pt-vim-t.sh`, `pt-vim-s.sh` and `main.py` [1]
    vim_base                  as vim_small: the official code has none of this size
    vim_tiny_stride8, ...     official `ft-vim-t.sh`, `ft-vim-s.sh` [1]; set `init_checkpoint`
    vmamba_tiny, ...          official `config.py` and `vmambav2v_*_224.yaml` [2]
    hydra_vit                 S4's ViT-B [3], which the authors point to
    ssm_vit                   those of DeiT, as in [1]
    digits, fashion_mnist, cifar10    ours, for small images
    none                      plain settings

[1] https://github.com/hustvl/Vim/tree/dd0358ad1e42701f22afbefa0717cc8825cf9f45/vim
[2] https://github.com/MzeroMiko/VMamba/tree/2ed52ead062a51a64521ed3871d52914bf532876/classification
[3] https://github.com/state-spaces/s4, configs/experiment/s4nd/vit/vit_b_16_s4_imagenet_v2.yaml,
    configs/dataset/imagenet.yaml, configs/scheduler/timm_cosine.yaml

What differs from the sources, in all of ImageNet's: the learning rate rises from 0, not from
1e-6, and by step; bfloat16 stands for the float16 that VMamba and S4 train with; weight decay
spares the scans' own parameters (`param_groups`); the ten epochs at the lowest rate that DeiT's
and Vim's code adds at the end are left out. Batches are for 8 processes; with fewer, the learning
rate shrinks with the batch, or raise `--train.accumulate`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from scanweave.core.training import TrainConfig

from .settings import Config


def _imagenet(
    model: str,
    *,
    batch: int = 128,
    lr: float = 1e-3,
    lr_batch: int = 1024,
    weight_decay: float = 0.05,
    drop_path: float = 0.1,
    ema: float = 0.99996,
    warmup: float = 5,
    epochs: int = 300,
    clip: float = 0.0,
    jitter: float = 0.3,
    repeats: int = 3,
    interpolation: Literal["bicubic", "random"] = "bicubic",
    precision: Literal["no", "bf16"] = "bf16",
    schedule: Literal["cosine", "constant"] = "cosine",
) -> Config:
    """DeiT's settings, and what a family changes in them."""
    loop = TrainConfig(
        output_dir=Path("runs/vision"),
        epochs=epochs,
        batch_size=batch,
        num_workers=10,
        lr=lr,
        weight_decay=weight_decay,
        # 1e-5 in the sources
        final_lr=0.01,
        clip_grad=clip,
        precision=precision,
        schedule=schedule,
        log_every=50,
    )
    return Config(
        model=model,
        drop_path=drop_path,
        color_jitter=jitter,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation=interpolation,
        re_prob=0.25,
        re_mode="pixel",
        repeats=repeats,
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=ema,
        lr_batch=lr_batch,
        warmup_epochs=warmup,
        train=loop,
    )


def _vim(size: str, weight_decay: float, drop_path: float, batch: int) -> Config:
    # the small one's rate is for half as many images per step
    return _imagenet(
        f"vim_{size}_patch16_224",
        weight_decay=weight_decay,
        drop_path=drop_path,
        batch=batch,
        lr_batch=8 * batch,
        precision="no",
    )


def _vim_stride8(size: str) -> Config:
    return _imagenet(
        f"vim_{size}_patch16_stride8_224",
        lr=1e-5,
        weight_decay=1e-8,
        drop_path=0.0,
        epochs=30,
        # its lowest, its first and its highest rate are the same
        warmup=0,
        schedule="constant",
        precision="no",
    )


def _vmamba(model: str, drop_path: float) -> Config:
    return _imagenet(
        model, drop_path=drop_path, ema=0.9999, warmup=20, clip=5.0, jitter=0.4, repeats=1
    )


def _hydra_vit() -> Config:
    config = _imagenet(
        "hydra_vit_base_patch16_224",
        weight_decay=0.03,
        epochs=310,
        warmup=10,
        jitter=0.4,
        interpolation="random",
    )
    return replace(config, crop_pct=0.9)


def _digits() -> Config:
    """Three times the scans' size, so that a patch of 4 covers little more than one pixel."""
    return Config(
        dataset="digits",
        model_args=("patch_size=4", "embed_dim=64", "depth=3", "d_state=4"),
        img_size=24,
        mean=(0.305,),
        std=(0.376,),
        crop="shift",
        hflip=0.0,
        interpolation="bilinear",
        crop_pct=1.0,
        train=TrainConfig(
            output_dir=Path("runs/vision"),
            epochs=14,
            batch_size=32,
            lr=4e-3,
            warmup_steps=80,
        ),
    )


def _small_images(dataset: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Config:
    """32 x 32 pixels, patches of 4: 64 tokens."""
    return Config(
        dataset=dataset,
        data_dir=Path("data"),
        model_args=("patch_size=4", "embed_dim=192", "depth=12"),
        img_size=32,
        mean=mean,
        std=std,
        crop="shift",
        auto_augment="rand-m5-mstd0.5-inc1" if len(mean) == 3 else "",
        re_prob=0.25,
        crop_pct=1.0,
        drop_path=0.1,
        warmup_epochs=5,
        ema_decay=0.999,
        ema_warmup=True,
        train=TrainConfig(
            output_dir=Path("runs/vision"), epochs=100, batch_size=128, lr=1e-3, num_workers=8
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "none": Config,
    "digits": _digits,
    "fashion_mnist": lambda: _small_images("fashion_mnist", (0.2860,), (0.3530,)),
    "cifar10": lambda: _small_images(
        "cifar10_jpeg", (0.4913, 0.4821, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "vim_tiny": lambda: _vim("tiny", 0.1, 0.0, 128),
    "vim_small": lambda: _vim("small", 0.05, 0.05, 64),
    "vim_base": lambda: _vim("base", 0.05, 0.05, 64),
    "vim_tiny_stride8": lambda: _vim_stride8("tiny"),
    "vim_small_stride8": lambda: _vim_stride8("small"),
    "vmamba_tiny": lambda: _vmamba("vmamba_tiny_s1l8", 0.2),
    "vmamba_small": lambda: _vmamba("vmamba_small_s1l20", 0.3),
    "vmamba_base": lambda: _vmamba("vmamba_base_s1l20", 0.5),
    "hydra_vit": _hydra_vit,
    "ssm_vit": lambda: _imagenet("ssm_vit_small_patch16_224"),
}


def get_recipe(name: str) -> Config:
    """The settings of a recipe.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return replace(RECIPES[name](), recipe=name)
