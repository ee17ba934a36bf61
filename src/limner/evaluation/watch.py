"""Pictures that are still in memory before a judge: those of a U-Net in training, and of mixes of two CLIPs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from limner.evaluation.agreement import clip_score, distinct, r_precision
from limner.evaluation.distances import cmmd
from limner.evaluation.yardstick import Yardstick
from limner.generation.engine import to_images


class Watch:
    """Scores pictures of the same captions again and again, as `limner evaluate` scores the files of such pictures."""

    def __init__(self, judge: Yardstick, captions: Sequence[str], real: Tensor, rivals: Sequence[str] = ()) -> None:
        """`captions` are what is drawn, N; `real` (M, E) what the judge sees in photographs; a picture's own caption is
        sought among others of these and of `rivals`.
        """
        texts, own = distinct([*captions, *rivals])
        self.judge, self.real = judge, real
        self.text, self.own = judge.text_features(texts), own[: len(captions)]  # (K, E), (N,)

    def score(self, pixels: Tensor) -> dict[str, float]:
        """Figures of pictures (N, 3, H, W) in [-1, 1], one a caption: cmmd, clip_score and r_precision.

        CMMD falls with the number of pictures: compare only figures of equally many.
        """
        images = self.judge.look(to_images(pixels))  # (N, E)
        return {
            "cmmd": cmmd(self.real, images),
            "clip_score": clip_score(self.text[self.own], images).mean().item(),
            "r_precision": r_precision(images, self.text, self.own).mean().item(),
        }
