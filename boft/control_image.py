"""Control images → tensors, and diffusers pipelines that are called with them."""

from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from boft.control import following, heads_of
from boft.errors import BOFTError

ControlImage = Image.Image | Tensor | Sequence[Image.Image]


def control_tensor(images: ControlImage) -> Tensor:
    """One or several control images as [B, 3, H, W] in 0 … 1.

    Pictures are RGB or grey (L, 1); tensors pass if they have that shape. Raises BOFTError for other modes and shapes.
    """
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            shape = list(images.shape)
            raise BOFTError(f"a control tensor must be [B, 3, H, W] floats in 0 … 1, not {shape} {images.dtype}")
        return images
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not images:
        raise BOFTError("the list of control images is empty; give one image, or one for each prompt")
    pixels = []
    for image in images:
        if not isinstance(image, Image.Image):
            raise BOFTError(f"a control image must be a PIL picture, not a {type(image).__name__}")
        if image.mode not in ("RGB", "L", "1"):
            raise BOFTError(f"the control image has mode {image.mode}; RGB or grey would fit: image.convert('RGB')")
        if image.size != images[0].size:
            raise BOFTError(f"the control images differ in size: {images[0].size} and {image.size}")
        pixels.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(pixels).float() / 255


def accept_control_images(pipe: Any) -> None:
    """Let a diffusers pipeline be called with `control_image=` and `control_scale=`.

    Raises BOFTError for a pipeline that has a `control_image` of its own, as some with a ControlNet have.
    """
    if not isinstance(pipe, _FollowsControl):
        if "control_image" in signature(type(pipe).__call__).parameters:
            raise BOFTError(f"{type(pipe).__name__} has a control_image of its own, so no adapter can follow one in it")
        pipe.__class__ = _following_class(type(pipe))


class _FollowsControl:
    """What a pipeline gains with a control head; everything else is the pipeline's own."""

    def __call__(
        self,
        *args: Any,
        control_image: ControlImage | Mapping[str, ControlImage] | None = None,
        control_scale: float = 1.0,
        **options: Any,
    ) -> Any:
        """The pipeline's own call, following a control image: one for all pictures, one a prompt or one a picture.

        control_image: as large as the pictures; where several adapters follow one, a mapping adapter name → its own.
        control_scale multiplies its features, 0 ignores it. Raises BOFTError for an image missing where an adapter
        wants one, one too many, or of another size or mode.
        """
        heads = heads_of(self.unet)
        active = heads.active_heads() if heads else {}
        if control_image is None:
            if active:
                name, head = next(iter(active.items()))
                kind = f" ({head.kind})" if head.kind else ""
                raise BOFTError(f"the adapter '{name}' follows a control image{kind}: give control_image=")
            return super().__call__(*args, **options)
        if not active:
            raise BOFTError("control_image was given, but no active adapter has a control head")
        control = _by_adapter(control_image, list(active))
        count = len(next(iter(control.values())))
        prompts, per_prompt = _prompt_count(args, options), options.get("num_images_per_prompt") or 1
        if count not in (1, prompts, prompts * per_prompt):
            raise BOFTError(
                f"{count} control images do not go with {prompts} prompts of {per_prompt} pictures; "
                "give one, one a prompt or one a picture"
            )
        repeats = per_prompt if 1 < count == prompts else 1
        # The pipeline's own call is under no_grad too.
        with torch.no_grad(), following(self.unet, control, control_scale, repeats):
            return super().__call__(*args, **options)


def _by_adapter(images: ControlImage | Mapping[str, ControlImage], names: list[str]) -> dict[str, Tensor]:
    """The control images of each adapter that follows one, [B, 3, H, W] of one shape."""
    if not isinstance(images, Mapping):
        return dict.fromkeys(names, control_tensor(images))
    if set(images) != set(names):
        raise BOFTError(f"control images are given for {', '.join(images) or 'none'}; {', '.join(names)} follow one")
    controls = {name: control_tensor(image) for name, image in images.items()}
    if len({control.shape for control in controls.values()}) > 1:
        raise BOFTError(f"the control images of {', '.join(controls)} differ in size or number")
    return controls


def _prompt_count(args: tuple, options: dict[str, Any]) -> int:
    prompt = args[0] if args else options.get("prompt")
    if prompt is None:
        embeddings = options.get("prompt_embeds")
        return 1 if embeddings is None else len(embeddings)
    return 1 if isinstance(prompt, str) else len(prompt)


@cache
def _following_class(base: type) -> type:
    # Under the name of the pipeline that it is: `save_pretrained` writes it down.
    return type(base.__name__, (_FollowsControl, base), {"__module__": base.__module__, "__doc__": base.__doc__})
