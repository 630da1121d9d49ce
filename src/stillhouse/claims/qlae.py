"""QLAE's claim: latent quantisation with strong decay gives more modular and more explicit codes than an autoencoder."""

from __future__ import annotations

from typing import Any

from stillhouse.claims.claim import Claim, Margin

MODEL: dict[str, Any] = {
    "kind": "autoencoder",
    "num_latents": 10,
    "num_values": 8,
    "widths": [16, 32],
    "dense_widths": [128, 128],
    "convolutions_per_stage": 1,
}


def arm(method: str, latent: str, **fields: Any) -> dict[str, Any]:
    """A method with its kind of code, all else equal."""
    return {"method": method, "model": {**MODEL, "latent": latent}, **fields}


claim = Claim(
    name="qlae",
    statement=(
        "On procedural scenes with five known factors QLAE's codes are more modular (InfoM by 0.10) and at least as explicit "
        "(InfoE) as an autoencoder's, decay adds to their modularity, and reconstruction stays within 2 dB."
    ),
    base={
        "data": {"kind": "scenes", "size": 16, "pixels": "unit", "held_out": 0},
        "num_steps": 6000,
        "batch_size": 64,
        "run": {"threads": 1},
    },
    arms={
        "qlae": arm("qlae", "per_latent"),
        "qlae-no-decay": arm("qlae", "per_latent", weight_decay=0.0),
        "qlae-decay-1": arm("qlae", "per_latent", weight_decay=1.0),
        "autoencoder": arm("autoencoder", "none", clip_value=1.0),
        "autoencoder-decay": arm("autoencoder", "none", weight_decay=0.1, clip_value=1.0),
        "beta-tcvae": arm("beta-tcvae", "gaussian"),
    },
    margins=[
        Margin("qlae", "autoencoder", "infom", by=0.10),
        Margin("qlae", "autoencoder", "infoe", by=0.0),
        Margin("qlae", "qlae-no-decay", "infom", by=0.0),
        Margin("qlae", "autoencoder", "psnr", by=-2.0),
    ],
    metrics=["infoc", "mig", "dci/disentanglement"],
    seeds=(0, 1, 2),
    remark=(
        "576 images of 16 x 16, a code of 10 latents of 8 values, small networks, and 6,000 steps at batch 64, where "
        "the paper takes 200,000 at batch 128. Modularity fails, and what fails it is mostly how little decay does in "
        "so few steps: rate times decay times steps is 0.6 here and 20 in the paper. With ten times the decay (qlae- "
        "decay-1, in sum 6) InfoM rises by 0.12 in the mean and in every seed, DCI disentanglement from 0.27 to 0.49, "
        "explicitness stays, and 2.6 dB of PSNR are lost; InfoM is then 0.07 over the autoencoder's, still short of "
        "0.10. InfoM compares two estimates besides: of a quantised code it is counted, of a continuous one it comes "
        "from nearest neighbours, where even random codes score about 0.65 (0.10 when quantised), so the "
        "autoencoders' figures are too high; DCI, which treats both alike, has QLAE ahead at every decay. "
        "Explicitness holds in every seed."
    ),
)
